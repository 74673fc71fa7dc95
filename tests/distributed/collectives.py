"""What tests of collectives, failures and state run on the ranks."""

import torch
import torch.distributed as dist
import ways
from torch.distributed.tensor import DTensor

from fastsam import methods


def count_all_reduces(way, method, base="sgd"):
    """The all-reduces of ``first_step()``, of ``second_step()`` and of both for each, in the second step."""
    module, rank, ranks = {**ways.WAYS, **ways.WAYS_OF_FOUR}[way](ways.Block(way == "sequence").double())
    optimizer = ways.optimizer_for(module, base, method)
    ways.train(module, optimizer, ranks, rank, steps=[0])
    x, y = ways.batch(1, ranks, rank)
    backward = ways.closure_of(module, optimizer, x, y)
    backward()
    if way == "sequence":  # partial gradients are redistributed once, whoever reads them first
        for param in module.parameters():
            if isinstance(param.grad, DTensor):
                param.grad = param.grad.redistribute(placements=param.placements)
    with ways.Collectives() as first:
        optimizer.first_step()
    ways.loss_of(module(x), y).backward()
    with ways.Collectives() as second:
        optimizer.second_step()
    return len(first.names), len(second.names)


def count_bytes(method):
    """The sizes of the tensors that are all-reduced in ``first_step()``."""
    module, rank, ranks = ways.fsdp2(ways.Block().double())
    optimizer = ways.optimizer_for(module, "sgd", method)
    x, y = ways.batch(0, ranks, rank)
    sizes = []
    original = dist.all_reduce
    ways.closure_of(module, optimizer, x, y)()

    def recorded(tensor, *args, **kwargs):
        sizes.append((tensor.dtype, tensor.numel()))
        return original(tensor, *args, **kwargs)

    dist.all_reduce = recorded
    try:
        optimizer.first_step()
    finally:
        dist.all_reduce = original
    optimizer.restore()
    return sizes


def step_with_bad_shard(way, where, method="sam"):
    """A NaN in rank 1's gradient of the first (or second) pass; whether weights moved, and whether they are finite."""
    module, rank, ranks = ways.WAYS[way](ways.Block().double())
    optimizer = ways.optimizer_for(module, "sgd", method)
    x, y = ways.batch(0, ranks, rank)
    before = ways.whole(module)
    ways.closure_of(module, optimizer, x, y)()
    _spoil(module, rank, where == "first")
    optimizer.first_step()
    perturbed = ways.whole(module)
    ways.loss_of(module(x), y).backward()
    optimizer.second_step()
    after = ways.whole(module)
    return torch.equal(before, perturbed), bool(after.isfinite().all()), not torch.equal(before, after)


def _spoil(module, rank, spoils):
    """A NaN in the last element that rank 1 has of a sharded gradient."""
    if rank == 1 and spoils:
        grads = [p.grad.to_local() if isinstance(p.grad, DTensor) else p.grad for p in module.parameters()]
        next(g for g in grads if g is not None and g.numel() > 0).view(-1)[-1] = torch.nan


def scaler_step(way, base, is_bad, unscales):
    """``GradScaler.step`` over DTensors: the weights, against those of one process (or of no step)."""
    module, rank, ranks = ways.WAYS[way](ways.Block().double())
    optimizer = ways.optimizer_for(module, base, "sam")
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    before = ways.whole(module)
    x, y = ways.batch(0, ranks, rank)
    scaler.scale(ways.loss_of(module(x), y)).backward()
    optimizer.first_step()
    scaler.scale(ways.loss_of(module(x), y)).backward()
    _spoil(module, rank, is_bad)
    if unscales:
        scaler.unscale_(optimizer)
    scaler.step(optimizer)
    scaler.update()
    after = ways.whole(module)
    assert not optimizer.perturbed
    if is_bad:
        return torch.equal(before, after), scaler.get_scale()
    single = ways.Block().double()
    reference = ways.optimizer_for(single, base, "sam", backend="reference")
    ways.train(single, reference, ranks, None, steps=[0])
    return bool((after - ways.whole(single)).abs().max() < 1e-6), scaler.get_scale()


def state_types(way, base, method):
    """For each parameter that is a DTensor: whether its state of the same shape is one of its placements."""
    module, rank, ranks = ways.WAYS[way](ways.Block(way == "sequence").double())
    optimizer = ways.optimizer_for(module, base, method)
    ways.train(module, optimizer, ranks, rank, steps=[0, 1])
    wrong = []
    for param, entries in optimizer.state.items():
        for name, value in entries.items():
            if value.shape == param.shape and isinstance(param, DTensor):
                alike = isinstance(value, DTensor) and value.placements == param.placements
                alike = alike and value.to_local().shape == param.to_local().shape
                wrong += [] if alike else [(name, type(value).__name__)]
    return len(optimizer.state), wrong


def direction_sees():
    """The types of what a method's own direction is given, and the error of its training."""
    seen = set()

    def sign(params, grads):
        seen.update(type(tensor).__name__ for tensor in (*params, *grads))
        return [grad.sign() for grad in grads]

    single = ways.Block().double()
    module, rank, ranks = ways.fsdp2(ways.Block().double())
    for model, mine in ((single, None), (module, rank)):
        optimizer = ways.FastSAM(model.parameters(), rho=0.1, lr=0.1, method=methods.Direction(sign))
        ways.train(model, optimizer, ranks, mine)
        seen = set() if mine is None else seen
    return seen, ways.error_of(module, ways.whole(single))
