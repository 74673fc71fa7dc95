"""``torchrun ... -m fastsam doctor --distributed``: whether collectives add up, and whether ranks agree.

Each rank trains one small model by FSDP2 and by itself alone; options and versions that must be equal are compared.
"""

from __future__ import annotations

import os
import platform
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

import fastsam
from fastsam import FastSAM, methods
from fastsam.distributed import whole_of

STEPS, TOLERANCE = 3, 1e-5


def run() -> int:
    """Prints the report on rank 0; returns 1 if something is wrong, on every rank."""
    if "RANK" not in os.environ:
        print("doctor --distributed runs under torchrun: torchrun --nproc-per-node=2 -m fastsam doctor --distributed")
        return 1
    device = _start()
    try:
        lines = [*_agreements(), *_trainings(device)]
    finally:
        dist.destroy_process_group()
    if int(os.environ["RANK"]) == 0:
        for name, is_right, detail in lines:
            print(f"{name:30}{'ok' if is_right else 'WRONG':8}{detail}")
    return 0 if all(is_right for _, is_right, _ in lines) else 1


def _start() -> torch.device:
    has_gpu = torch.cuda.is_available()
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0))) if has_gpu else torch.device("cpu")
    dist.init_process_group("nccl" if has_gpu else "gloo", device_id=device if has_gpu else None)
    return device


Line = tuple[str, bool, str]


def _agreements() -> list[Line]:
    """What must be the same on every rank; seeds need not be, and are shown."""
    mine = {
        "fastsam": fastsam.__version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "seed": torch.initial_seed(),
    }
    found: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(found, mine)
    lines = []
    for name in mine:
        values = list(dict.fromkeys(str(rank[name]) for rank in found))
        same = len(values) == 1
        detail = values[0] if same else f"differs: {', '.join(values)}"
        if name == "seed" and not same:
            detail += " (sharded models are initialized alike only by equal seeds)"
        lines.append((f"{name} on all ranks", same or name == "seed", detail))
    return lines


def _trainings(device: torch.device) -> list[Line]:
    lines = []
    for method in (methods.SAM(), methods.ASAM(), methods.GSAM(), methods.AWP()):
        error = _largest_error(method, device)
        detail = f"{STEPS} steps, against one process: largest difference {error:.1e} of {TOLERANCE:.0e}"
        lines.append((f"FSDP2, {type(method).__name__}", error <= TOLERANCE, detail))
    return lines


def _largest_error(method: methods.Method, device: torch.device) -> float:
    """Between the weights of a sharded model and of the same one on this rank alone, over all ranks."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    sharded, alone = _model(device), _model(device)
    fully_shard(sharded, mesh=init_device_mesh(device.type, (dist.get_world_size(),)))
    for model, backend in ((sharded, "auto"), (alone, "reference")):
        optimizer = FastSAM(model.parameters(), rho=0.1, lr=0.1, momentum=0.9, method=method, backend=backend)
        for step in range(STEPS):
            x = torch.randn(8, 7, generator=torch.Generator().manual_seed(step)).to(device)

            def closure(model: nn.Module = model, optimizer: FastSAM = optimizer, x: torch.Tensor = x) -> torch.Tensor:
                optimizer.zero_grad()
                loss: torch.Tensor = model(x).square().mean()
                loss.backward()
                return loss

            optimizer.step(closure)
    pairs = zip(sharded.parameters(), alone.parameters(), strict=True)
    error = torch.stack([(whole_of(p.detach()) - q.detach()).abs().max() for p, q in pairs]).max()
    dist.all_reduce(error, dist.ReduceOp.MAX)
    return error.item()


def _model(device: torch.device) -> nn.Module:
    """Layers whose rows do not divide evenly, and one of a single row, of which some ranks have nothing."""
    generator = torch.Generator().manual_seed(0)
    model = nn.Sequential(nn.Linear(7, 5), nn.Tanh(), nn.Linear(5, 1)).to(device)
    with torch.no_grad():
        for param in model.parameters():
            param.copy_(torch.randn(param.shape, generator=generator))
    return model
