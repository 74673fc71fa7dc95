"""Tensor parallelism: one layer's weights over several ranks, with FastSAM as on one.

    torchrun --nproc-per-node=2 examples/tensor_parallel.py

`parallelize_module` makes the layer's weights DTensors. Their gradients and the optimizer's state are sharded alike;
the norm of the ascent is that of the whole model, with parameters that every rank has counted once. The script
trains the same model in one process, too, and prints by how much the weights differ.
"""

import os

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

from fastsam import FastSAM


class MLP(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm, self.up, self.down, self.head = (
            nn.LayerNorm(32),
            nn.Linear(32, 128),
            nn.Linear(128, 32),
            nn.Linear(32, 8),
        )

    def forward(self, x):
        return self.head(x + self.down(torch.relu(self.up(self.norm(x)))))


def make(device, mesh=None):
    """The model, distributed over a mesh if there is one."""
    torch.manual_seed(0)
    model = MLP().to(device)
    return (
        model if mesh is None else parallelize_module(model, mesh, {"up": ColwiseParallel(), "down": RowwiseParallel()})
    )


def train(model, device, *, steps=20):
    """Trains on random data, the same on every rank; returns the last loss."""
    optimizer = FastSAM(model.parameters(), torch.optim.AdamW, rho=0.05, lr=1e-3)
    for step in range(steps):
        generator = torch.Generator().manual_seed(step)
        x, y = (torch.randn(16, width, generator=generator).to(device) for width in (32, 8))

        def closure(x=x, y=y):
            optimizer.zero_grad()
            loss = (model(x) - y).square().mean()
            loss.backward()
            return loss

        loss = optimizer.step(closure)
    return loss


def weights(model):
    """All weights, whole, on every rank."""
    return [p.full_tensor() if isinstance(p, DTensor) else p.detach() for p in model.parameters()]


def difference(device, **options):
    """The largest difference between weights trained over all ranks and in one process."""
    mesh = init_device_mesh(device.type, (dist.get_world_size(),))
    parallel, single = make(device, mesh), make(device)
    train(parallel, device, **options)
    train(single, device, **options)
    return max((p - q).abs().max().item() for p, q in zip(weights(parallel), weights(single), strict=True))


if __name__ == "__main__":
    on_gpu = torch.cuda.is_available()
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if on_gpu else torch.device("cpu")
    dist.init_process_group("nccl" if on_gpu else "gloo", device_id=device if on_gpu else None)
    largest = difference(device)
    if dist.get_rank() == 0:
        print(f"largest difference to training in one process: {largest:.1e}")
    dist.destroy_process_group()
