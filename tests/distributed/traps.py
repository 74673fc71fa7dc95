"""FSDP2's traps, on the ranks: each would train wrongly and say nothing."""

import contextlib
import functools
import io
import warnings

import torch
import torch.distributed as dist
import ways
from registry import METHODS
from torch.distributed.optim import ZeroRedundancyOptimizer

from fastsam import FastSAM, methods


def keep_unsharded(after_backward, after_forward, gives_model):
    """The error of training with unsharded copies that FSDP keeps."""
    module, rank, ranks = ways.fsdp2(ways.Block().double(), reshard_after_forward=after_forward)
    module.set_reshard_after_backward(after_backward)
    options = {"model": module} if gives_model else {}
    optimizer = ways.optimizer_for(module, "sgd", "sam", **options)
    ways.train(module, optimizer, ranks, rank)
    return ways.error_of(module, ways.expected("sgd", "sam", ranks))


def first_pass_without_sync(gives_model, keeps_one):
    """What a step says whose first pass does not reduce its gradients (``keeps_one``: but for one layer's)."""
    module, rank, ranks = ways.fsdp2(ways.Block().double())
    optimizer = ways.optimizer_for(module, "sgd", "sam", **({"model": module} if gives_model else {}))
    x, y = ways.batch(0, ranks, rank)
    closure = ways.closure_of(module, optimizer, x, y)

    def first():
        module.set_requires_gradient_sync(False)
        if keeps_one:
            module.up.set_requires_gradient_sync(True)
        try:
            return closure()
        finally:
            module.set_requires_gradient_sync(True)

    before = ways.whole(module)
    try:
        optimizer.step(first)
    except RuntimeError as error:
        assert torch.equal(ways.whole(module), before)
        return str(error)
    return ""


def event_before_the_ascent():
    """Which events FSDP has when each pass of a step begins, if the closure sets one that it did not record."""
    module, rank, ranks = ways.fsdp2(ways.Block().double())
    optimizer = ways.optimizer_for(module, "sgd", "sam", model=module)
    x, y = ways.batch(0, ranks, rank)
    event, found = torch.Event("cpu") if hasattr(torch, "Event") else object(), []
    context = module._get_fsdp_state()._state_ctx
    closure = ways.closure_of(module, optimizer, x, y)
    root_pre_forward = type(module._get_fsdp_state())._root_pre_forward

    def observed(state, *args):
        if context.post_optim_event is not None or not found or state is module._get_fsdp_state():
            found.append(context.post_optim_event is event)
            context.post_optim_event = None  # the CPU has no streams to wait on
        return root_pre_forward(state, *args)

    type(module._get_fsdp_state())._root_pre_forward = observed
    try:

        def with_event():
            module.set_post_optim_event(event)
            return closure()

        optimizer.step(with_event)
    finally:
        type(module._get_fsdp_state())._root_pre_forward = root_pre_forward
    return found


def failing_pass(number):
    """After an exception in the middle of a pass on all ranks: weights as before; the error of training on."""
    module, rank, ranks = ways.fsdp2(ways.Block().double())
    optimizer = ways.optimizer_for(module, "sgd", "sam", model=module)
    calls = []

    def fail(*_):
        calls.append(1)
        if len(calls) == number:
            raise ValueError("in the middle of a pass")

    hook = module.head.register_forward_pre_hook(fail)
    before = [p.to_local().clone() for p in module.parameters()]
    x, y = ways.batch(0, ranks, rank)
    with contextlib.suppress(ValueError):
        optimizer.step(ways.closure_of(module, optimizer, x, y))
    hook.remove()
    if number == 1:
        module.reset_iter_state()
    came_back = all(torch.equal(p.to_local(), w) for p, w in zip(module.parameters(), before, strict=True))
    ways.train(module, optimizer, ranks, rank)
    return len(calls), came_back, ways.error_of(module, ways.expected("sgd", "sam", ranks))


def made_before_sharding(gives_closure):
    """What an optimizer says, as an error or a warning, whose parameters fully_shard has replaced."""
    model = ways.Block().double()
    optimizer = FastSAM(model.parameters(), lr=0.1)
    module, rank, ranks = ways.fsdp2(model)
    x, y = ways.batch(0, ranks, rank)
    closure = ways.closure_of(module, optimizer, x, y)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        try:
            if gives_closure:
                optimizer.step(closure)
            else:
                closure()
                optimizer.first_step()
        except RuntimeError as error:
            return str(error)
    return " ".join(str(warning.message) for warning in said)


def swapped_parameters():
    """The error of training when the groups are given the DTensors after construction, as accelerate does."""
    model = ways.Block().double()
    optimizer = FastSAM(model.parameters(), rho=0.1, lr=0.1, momentum=0.9)
    module, rank, ranks = ways.fsdp2(model)
    optimizer.param_groups[0]["params"] = list(module.parameters())
    ways.train(module, optimizer, ranks, rank)
    return ways.error_of(module, ways.expected("sgd", "sam", ranks))


def refusals():
    """What is said to parameters whose other parts nobody has named."""
    flat, *_ = ways.fsdp1(ways.Block())
    original, *_ = ways.fsdp1_original(ways.Block())
    group = flat.process_group
    model = ways.Block()
    return {
        "flat": ways.refusal(lambda: FastSAM(flat.parameters(), lr=0.1)),
        "original": ways.refusal(lambda: FastSAM(original.parameters(), lr=0.1)),
        "not a group": ways.refusal(lambda: FastSAM(model.parameters(), lr=0.1, shard_groups="dp")),
        "awp": ways.refusal(lambda: FastSAM(flat.parameters(), lr=0.1, shard_groups=group, method=methods.AWP())),
        "asam": ways.refusal(lambda: FastSAM(original.parameters(), lr=0.1, shard_groups=group, method=methods.ASAM())),
        "zero": ways.refusal(lambda: ZeroRedundancyOptimizer(model.parameters(), optimizer_class=FastSAM, lr=0.1)),
        "local zero": ways.refusal(_local_ascent_inside_zero),
    }


def _local_ascent_inside_zero():
    module, *_ = ways.ddp(ways.Block())
    options = {"shard_groups": dist.group.WORLD, "model": module, "local_ascent": True, "lr": 0.1}
    return ZeroRedundancyOptimizer(module.parameters(), FastSAM, **options)


def zero_as_base():
    """The error of FastSAM over ZeroRedundancyOptimizer over AdamW."""
    module, rank, ranks = ways.ddp(ways.Block().double())
    options = {"optimizer_class": torch.optim.AdamW, "lr": 0.01}
    optimizer = FastSAM(module.parameters(), ZeroRedundancyOptimizer, rho=0.1, **options)
    ways.train(module, optimizer, ranks, rank)
    return ways.error_of(module, ways.expected("adamw", "sam", ranks))


def zero_around(method, given_by, few=False):
    """The error of ZeroRedundancyOptimizer over FastSAM with ``shard_groups``, saved and resumed in the middle.

    Args:
        method: the method's name.
        given_by: how the options reach FastSAM: ``arguments`` of ZeroRedundancyOptimizer's, or ``partial``.
        few: there are fewer parameters than ranks.
    """
    options = {"method": METHODS[method].method, "shard_groups": dist.group.WORLD, "backend": "native"}
    options |= {"rho": 0.1, "lr": 0.1, "momentum": 0.9}
    make = (lambda: torch.nn.Linear(12, 1, bias=False)) if few else ways.Block
    torch.manual_seed(0)
    model, single = make().double(), make().double()
    single.load_state_dict(model.state_dict())
    module, rank, ranks = ways.ddp(model)

    def build():
        if given_by == "partial":
            return ZeroRedundancyOptimizer(module.parameters(), functools.partial(FastSAM, **options))
        return ZeroRedundancyOptimizer(module.parameters(), FastSAM, **options)

    optimizer = build()
    ways.train(module, optimizer, ranks, rank, range(2))
    optimizer.consolidate_state_dict(to=0)
    saved = io.BytesIO()
    torch.save(optimizer.state_dict() if rank == 0 else None, saved)
    found = [saved.getvalue()]
    dist.broadcast_object_list(found)
    resumed = build()
    resumed.load_state_dict(torch.load(io.BytesIO(found[0]), weights_only=False))
    ways.train(module, resumed, ranks, rank, range(2, ways.STEPS))
    alone = ways.optimizer_for(single, "sgd", method, backend="reference")
    ways.train(single, alone, ranks, None)
    return ways.error_of(module, ways.whole(single))


def zero_without_clearing():
    """The error with a closure that leaves it to the optimizer to clear gradients between the passes."""
    torch.manual_seed(0)
    model, single = ways.Block().double(), ways.Block().double()
    single.load_state_dict(model.state_dict())
    module, rank, ranks = ways.ddp(model)
    options = {"shard_groups": dist.group.WORLD, "rho": 0.1, "lr": 0.1, "momentum": 0.9}
    optimizer = ZeroRedundancyOptimizer(module.parameters(), FastSAM, base=torch.optim.SGD, **options)
    x, y = ways.batch(0, ranks, rank)
    optimizer.zero_grad()
    optimizer.step(lambda: torch.nn.functional.mse_loss(module(x), y).backward())
    alone = ways.optimizer_for(single, "sgd", "sam", backend="reference")
    x, y = ways.batch(0, ranks, None)
    alone.step(lambda: torch.nn.functional.mse_loss(single(x), y).backward())
    optimizer.consolidate_state_dict(to=0)
    saved = io.BytesIO()
    torch.save(optimizer.state_dict() if rank == 0 else {}, saved)
    torch.load(io.BytesIO(saved.getvalue()), weights_only=True)
    return ways.error_of(module, ways.whole(single))


def zero_fails(number):
    """Whether a closure that raises in a pass, on one rank alone, leaves all weights as before there, bit for bit."""
    module, rank, ranks = ways.ddp(ways.Block().double())
    optimizer = ZeroRedundancyOptimizer(
        module.parameters(), FastSAM, shard_groups=dist.group.WORLD, rho=0.1, lr=0.1, momentum=0.9
    )
    before, calls, moved = ways.whole(module), [], []
    x, y = ways.batch(0, ranks, rank)
    closure = ways.closure_of(module, optimizer, x, y)

    def failing():
        calls.append(1)
        moved.append(not torch.equal(ways.whole(module), before))
        if len(calls) == number:
            raise ValueError("in a pass")
        return closure()

    with contextlib.suppress(ValueError):
        optimizer.step(failing)
    return moved, torch.equal(ways.whole(module), before)


def stages(method):
    """The error of a model whose two halves are two ranks' own, with ``shard_groups=``; each rank's half is checked.

    The gradients are those of the whole model, which each rank computes for itself here.
    """
    whole, reference = ways.Block().double(), ways.Block().double()
    rank = dist.get_rank()
    mine = [p for i, p in enumerate(whole.parameters()) if i % 2 == rank]
    optimizer = ways.optimizer_for(whole, "adamw", method, params=mine, shard_groups=dist.group.WORLD)
    single = ways.optimizer_for(reference, "adamw", method, backend="reference")
    params = list(whole.parameters())

    def share():
        for i, p in enumerate(params):
            dist.broadcast(p.data, src=i % 2)

    for step in range(ways.STEPS):
        x, y = ways.batch(step, 1, None)

        def closure(x=x, y=y):
            share()  # the ascent, which every stage makes for its own parameters
            whole.zero_grad()
            loss = ways.loss_of(whole(x), y)
            loss.backward()
            return loss

        optimizer.step(closure)
        single.step(ways.closure_of(reference, single, x, y))
    share()
    return ways.error_of(whole, ways.whole(reference))


def rank_without_parameters():
    """A rank whose only parameter has no gradient takes part in the sum; the length of the other's perturbation."""
    rank = dist.get_rank()
    weight = torch.nn.Parameter(torch.zeros(4, dtype=torch.float64))
    optimizer = FastSAM([weight], rho=0.5, lr=0.0, shard_groups=[dist.group.WORLD])
    weight.grad = torch.full((4,), 3.0, dtype=torch.float64) if rank == 0 else None
    optimizer.first_step()
    length = weight.detach().norm().item()
    optimizer.restore()
    return length
