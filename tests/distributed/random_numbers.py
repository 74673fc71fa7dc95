"""Random numbers that do not depend on the sharding: the same gradients give the same bits."""

import torch
import torch.distributed as dist
import ways
from torch.distributed.tensor import Replicate, Shard, distribute_tensor
from torch.distributed.tensor.placement_types import _StridedShard

from fastsam import FastSAM, methods
from fastsam.distributed import place_of, whole_of

SHAPES = {"rows": (7, 5), "columns": (3, 6), "middle": (3, 4, 5), "vector": (9,), "scalar": ()}


def distributed(whole, kind):
    """A whole tensor as a DTensor of a kind; ``strided``: as tensor parallelism with FSDP2 shards rows twice."""
    world, shape = dist.get_world_size(), whole.shape
    mesh = ways.mesh_of(world // 2, 2) if kind == "strided" else ways.mesh_of(world)
    return distribute_tensor(whole, mesh, placements_of(shape, kind), src_data_rank=None)


def placements_of(shape, kind):
    if kind == "strided":
        return [_StridedShard(0, split_factor=2), Shard(0)] if shape else [Replicate(), Replicate()]
    if kind == "columns":
        return [Shard(1 if len(shape) > 1 and shape[1] % dist.get_world_size() == 0 else 0)] if shape else [Replicate()]
    return [Shard(0)] if shape else [Replicate()]


def make(kind, dtype):
    """Parameters and gradients of all shapes, whole or distributed: the same numbers."""
    generator = torch.Generator().manual_seed(1)
    params, grads = [], []
    for shape in SHAPES.values():
        for tensors in (params, grads):
            whole = torch.randn(shape, generator=generator).to(dtype)
            tensors.append(whole if kind == "whole" else distributed(whole, kind))
    return [torch.nn.Parameter(p) for p in params], grads


def steps(kind, backend, method, dtype, **options):
    """Weights and state after three steps with given gradients, and the perturbed weights, whole."""
    params, grads = make(kind, dtype)
    optimizer = FastSAM(params, torch.optim.AdamW, rho=0.5, lr=0.1, method=method, backend=backend, **options)
    found = []
    for _ in range(3):
        for phase in (optimizer.first_step, optimizer.second_step):
            for param, grad in zip(params, grads, strict=True):
                param.grad = grad.clone()
            phase()
            found += [whole_of(param.detach()).clone() for param in params]
    state = [t for param in params for t in optimizer.state[param].values()]
    return [*found, *map(whole_of, state)]


def same_bits(kind, backend, method_name, dtype_name, whole_backend="reference", **options):
    """Whether distributed and whole parameters get the same bits.

    The norm is summed in another order. Gradients of powers of two have the same norm in every order.
    """
    dtype, method = getattr(torch, dtype_name), getattr(methods, method_name)()
    sharded = steps(kind, backend, method, dtype, **options)
    whole = steps("whole", whole_backend, method, dtype, **options)
    return [torch.equal(one, other) for one, other in zip(sharded, whole, strict=True)]


def places(kind):
    """Whether ``place_of`` finds each local element where it is in the whole parameter."""
    right = []
    for shape in SHAPES.values():
        numbers = torch.arange(max(1, torch.Size(shape).numel())).reshape(shape)
        tensor = distributed(numbers, kind)
        local = tensor.to_local()
        right.append(torch.equal(place_of(tensor).elements(0, local.numel(), local.device), local.flatten()))
    return right
