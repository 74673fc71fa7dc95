"""A small GPT, sharded by FSDP2 and trained with FastSAM: the optimizer needs no option for it.

    torchrun --nproc-per-node=2 examples/fsdp2.py checkpoints/     # kill it and start it again as often as you like

With bfloat16 arithmetic, gradient accumulation, clipping by the norm over all ranks, a schedule, and checkpoints by
torch.distributed.checkpoint, which another number of ranks can load. On CPUs it communicates by gloo, on GPUs by NCCL.
A resumed run ends with the same bits as an undisturbed one.
"""

import os
import shutil
import sys
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.nn import functional as F

from fastsam import FastSAM

VOCABULARY, CONTEXT, WIDTH, HEADS, LAYERS = 64, 32, 64, 4, 2
BATCH_SIZE, MICRO_BATCHES, PEAK_LR = 8, 2, 3e-3


class Layer(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm, self.qkv, self.out = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.mlp = nn.Sequential(
            nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 4 * WIDTH), nn.GELU(), nn.Linear(4 * WIDTH, WIDTH)
        )

    def forward(self, x):
        q, k, v = (t.unflatten(-1, (HEADS, -1)).transpose(1, 2) for t in self.qkv(self.norm(x)).chunk(3, dim=-1))
        attended = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(attended.transpose(1, 2).flatten(2))
        return x + self.mlp(x)


class GPT(nn.Module):
    def __init__(self):
        super().__init__()
        self.tokens, self.positions = nn.Embedding(VOCABULARY, WIDTH), nn.Embedding(CONTEXT, WIDTH)
        self.layers = nn.ModuleList(Layer() for _ in range(LAYERS))
        self.norm, self.head = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, VOCABULARY)

    def forward(self, tokens):
        x = self.tokens(tokens) + self.positions(torch.arange(tokens.shape[1], device=tokens.device))
        for layer in self.layers:
            x = layer(x)
        return self.head(self.norm(x))


def batch_of(step, rank, device):
    """A rank's sequences in a step, a function of both: each token is the sum of the two before it, and noise."""
    generator = torch.Generator().manual_seed(step * 10_007 + rank)
    tokens = torch.randint(VOCABULARY, (BATCH_SIZE, CONTEXT + 1), generator=generator)
    noise = torch.rand(tokens.shape, generator=generator) < 0.05
    for i in range(2, CONTEXT + 1):
        tokens[:, i] = torch.where(noise[:, i], tokens[:, i], (tokens[:, i - 1] + tokens[:, i - 2]) % VOCABULARY)
    return tokens.to(device)


def make(device):
    """The sharded model, its optimizer and schedule. The optimizer comes after `fully_shard`."""
    torch.manual_seed(0)  # the same weights on every rank
    model = GPT().to(device)
    mesh = init_device_mesh(device.type, (dist.get_world_size(),))
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    for layer in model.layers:
        fully_shard(layer, mesh=mesh, mp_policy=policy)
    fully_shard(model, mesh=mesh, mp_policy=policy)
    optimizer = FastSAM(model.parameters(), torch.optim.AdamW, rho=0.05, lr=PEAK_LR, model=model)
    return model, optimizer


def train_step(model, optimizer, tokens):
    """One SAM step over micro-batches; gradients are reduced once per pass, with the last micro-batch."""

    def closure():
        optimizer.zero_grad()
        total = torch.zeros((), device=tokens.device)
        for number, part in enumerate(tokens.chunk(MICRO_BATCHES)):
            model.set_requires_gradient_sync(number == MICRO_BATCHES - 1)
            logits = model(part[:, :-1])
            loss = F.cross_entropy(logits.flatten(0, 1).float(), part[:, 1:].flatten()) / MICRO_BATCHES
            loss.backward()
            total += loss.detach()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)  # of the whole gradient: they are DTensors
        return total

    return optimizer.step(closure)


def train(folder, device, *, steps=60, save_every=10):
    """Trains up to step `steps`, from the last checkpoint in `folder` if there is one; returns the last loss."""
    model, optimizer = make(device)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=steps)
    done, loss = load(folder, model, optimizer, schedule), None
    while done < steps:
        loss = train_step(model, optimizer, batch_of(done, dist.get_rank(), device))
        schedule.step()
        done += 1
        if done % save_every == 0 or done == steps:
            save(folder, model, optimizer, schedule, done)
            if dist.get_rank() == 0:
                print(f"step {done}: loss {loss.item():.3f}", flush=True)
    return loss


def state_of(model, optimizer, schedule, done):
    weights, moments = get_state_dict(model, optimizer)
    return {"model": weights, "optimizer": moments, "schedule": schedule.state_dict(), "step": done}


def save(folder, model, optimizer, schedule, done):
    """A checkpoint is complete when `latest` names it: after a kill that is the old one or the new one."""
    state = state_of(model, optimizer, schedule, done)
    dcp.save(state, checkpoint_id=folder / str(done))
    if dist.get_rank() == 0:
        unfinished = folder / "latest.unfinished"
        unfinished.write_text(str(done))
        os.replace(unfinished, folder / "latest")
        for old in folder.iterdir():
            if old.name.isdigit() and int(old.name) < done:
                shutil.rmtree(old)
    dist.barrier()


def load(folder, model, optimizer, schedule):
    """Loads the last checkpoint, if there is one; returns the number of steps done."""
    if not (folder / "latest").exists():
        return 0
    state = state_of(model, optimizer, schedule, 0)
    dcp.load(state, checkpoint_id=folder / (folder / "latest").read_text())
    set_state_dict(model, optimizer, model_state_dict=state["model"], optim_state_dict=state["optimizer"])
    schedule.load_state_dict(state["schedule"])
    return state["step"]


if __name__ == "__main__":
    folder = Path(sys.argv[1])
    folder.mkdir(parents=True, exist_ok=True)
    on_gpu = torch.cuda.is_available()
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if on_gpu else torch.device("cpu")
    dist.init_process_group("nccl" if on_gpu else "gloo", device_id=device if on_gpu else None)
    train(folder, device)
    dist.destroy_process_group()
