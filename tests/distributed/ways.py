"""Ways to distribute a model, and the same training in one process. Everything here runs on the ranks."""

import functools
from contextlib import nullcontext

import torch
import torch.distributed as dist
from registry import BASES, METHODS
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    PrepareModuleInput,
    RowwiseParallel,
    SequenceParallel,
    parallelize_module,
)
from torch.nn.parallel import DistributedDataParallel
from torch.utils._python_dispatch import TorchDispatchMode

from fastsam import FastSAM

STEPS = 4
ROWS = 8  # of a batch, for each rank


class Block(nn.Module):
    """A normalisation, two layers whose rows do not divide evenly, one of a single row, and a scalar."""

    def __init__(self, sequence=False):
        super().__init__()
        torch.manual_seed(0)
        self.sequence = sequence
        self.norm, self.up, self.down = nn.LayerNorm(12), nn.Linear(12, 16), nn.Linear(16, 12)
        self.head, self.one = nn.Linear(12, 3), nn.Linear(3, 1)

    def forward(self, x):
        mixed = self.down(torch.tanh(self.up(self.norm(x))))
        return self.one(self.head(mixed if self.sequence else x + mixed))


@functools.cache
def mesh_of(*shape):
    """A mesh of so many ranks in each dimension; its dimensions are called d0, d1, ..."""
    return init_device_mesh("cpu", shape, mesh_dim_names=tuple(f"d{i}" for i in range(len(shape))))


def batch(step, ranks, rank=None, dtype=torch.float64):
    """The batch of all data-parallel ranks, or one rank's part of it."""
    generator = torch.Generator().manual_seed(100 + step)
    x, y = (torch.randn(ROWS * ranks, n, generator=generator, dtype=torch.float64).to(dtype) for n in (12, 1))
    return (x, y) if rank is None else (x[rank::ranks], y[rank::ranks])


def loss_of(output, y):
    return (output - y).square().mean()


class Collectives(TorchDispatchMode):
    """The collectives that are run. (CommDebugMode also hooks modules, which fails where a step runs a model twice.)"""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if "c10d" in func.namespace:
            self.names.append(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))


# ---- ways: each returns the module and the data-parallel rank and size ----


def fsdp2(model, **options):
    for layer in (model.up, model.down):
        fully_shard(layer, mesh=mesh_of(dist.get_world_size()), **options)
    fully_shard(model, mesh=mesh_of(dist.get_world_size()), **options)
    return model, dist.get_rank(), dist.get_world_size()


def fsdp2_columns(model):
    """``Shard(1)`` where a tensor has even columns."""
    even = lambda p: Shard(1) if p.dim() > 1 and p.size(1) % dist.get_world_size() == 0 else None  # noqa: E731
    return fsdp2(model, shard_placement_fn=even)


def hsdp(model):
    mesh = mesh_of(2, dist.get_world_size() // 2)
    fully_shard(model, mesh=mesh)
    return model, dist.get_rank(), dist.get_world_size()


def tp(model):
    plan = {"up": ColwiseParallel(), "down": RowwiseParallel()}
    return parallelize_module(model, mesh_of(dist.get_world_size()), plan), 0, 1


def sequence(model):
    model.sequence = True
    mesh = mesh_of(dist.get_world_size())
    inputs = PrepareModuleInput(input_layouts=(Replicate(),), desired_input_layouts=(Shard(0),))
    parallelize_module(model, mesh, inputs)
    plan = {"norm": SequenceParallel(sequence_dim=0), "up": ColwiseParallel(input_layouts=Shard(0))}
    return parallelize_module(model, mesh, plan | {"down": RowwiseParallel(output_layouts=Replicate())}), 0, 1


def tp_fsdp2(model):
    mesh = mesh_of(dist.get_world_size() // 2, 2)
    parallelize_module(model, mesh["d1"], {"up": ColwiseParallel(), "down": RowwiseParallel()})
    fully_shard(model, mesh=mesh["d0"])
    return model, mesh["d0"].get_local_rank(), mesh["d0"].size()


def ddp(model, **options):
    return DistributedDataParallel(model, **options), dist.get_rank(), dist.get_world_size()


def fsdp1(model, **options):
    module = FullyShardedDataParallel(model, device_id=torch.device("cpu"), **options)
    return module, dist.get_rank(), dist.get_world_size()


def fsdp1_original(model):
    return fsdp1(model, use_orig_params=True)


WAYS = {way.__name__: way for way in (fsdp2, fsdp2_columns, tp, sequence, ddp, fsdp1, fsdp1_original)}
WAYS_OF_FOUR = {way.__name__: way for way in (fsdp2, hsdp, tp_fsdp2, tp)}


# ---- training ----


def optimizer_for(module, base, method, **options):
    cls, base_options = BASES[base]
    if isinstance(module, FullyShardedDataParallel):
        options["shard_groups"] = module.process_group
    params = options.pop("params", None) or module.parameters()
    return FastSAM(params, cls, rho=0.1, method=METHODS[method].method, **base_options, **options)


def closure_of(module, optimizer, x, y):
    def closure():
        optimizer.zero_grad()
        loss = loss_of(module(x), y)
        loss.backward()
        return loss

    return closure


def train(module, optimizer, ranks, rank, steps=range(STEPS), dtype=torch.float64):
    for step in steps:
        x, y = batch(step, ranks, rank, dtype)
        optimizer.step(closure_of(module, optimizer, x, y))


def whole(module):
    """All weights of the model, whole, on every rank, as one tensor."""
    is_flat = isinstance(module, FullyShardedDataParallel)
    with FullyShardedDataParallel.summon_full_params(module) if is_flat else nullcontext():
        model = module.module if hasattr(module, "module") else module
        tensors = [whole_tensor(p) for _, p in sorted(model.named_parameters())]
        return torch.cat([tensor.reshape(-1).clone() for tensor in tensors])


def whole_tensor(tensor):
    """A DTensor's whole value; any other tensor itself, without its graph."""
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).detach()


@functools.cache
def expected(base, method, data_ranks, is_sequence=False, dtype=torch.float64):
    """The weights after the same steps in one process, by ``reference``."""
    model = Block(is_sequence).to(dtype)
    optimizer = optimizer_for(model, base, method, backend="reference")
    train(model, optimizer, data_ranks, None, dtype=dtype)
    return whole(model)


def error_of(module, reference):
    """The largest error, relative to the largest weight."""
    return ((whole(module) - reference).abs().max() / reference.abs().max()).item()


def compare(way, base, method, backend="native", **options):
    """Trains in a way and in one process; returns the error."""
    module, rank, ranks = {**WAYS, **WAYS_OF_FOUR}[way](Block(way == "sequence").double())
    optimizer = optimizer_for(module, base, method, backend=backend, **options)
    train(module, optimizer, ranks, rank)
    return error_of(module, expected(base, method, ranks, way == "sequence"))


def refusal(call):
    """What the error says that ``call`` raises; empty if it raises none."""
    try:
        call()
    except (ValueError, TypeError, RuntimeError) as error:
        return str(error)
    return ""
