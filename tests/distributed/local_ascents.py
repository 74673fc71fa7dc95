"""Per-rank ascents under DDP, on the ranks, and the same by hand in one process."""

import contextlib

import torch
import torch.distributed as dist
import ways
from registry import BASES, METHODS
from torch import nn

from fastsam import FastSAM

RHO = 0.1


class Branches(nn.Module):
    """A part of it is used in every other step only."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.other, self.head = nn.Linear(12, 9), nn.Linear(12, 9), nn.Linear(9, 1)
        self.step = 0

    def forward(self, x):
        hidden = self.first(x) + (self.other(x) if self.step % 2 else 0)
        return self.head(torch.tanh(hidden))


def _by_hand(model, base, steps, first_is_synchronized=False, closure_parts=1):
    """SAM in which each rank's perturbation is its own; gradients of the second pass are averaged."""
    cls, options = BASES[base]
    optimizer = cls(model.parameters(), foreach=False, **options)
    params, ranks = list(model.parameters()), dist.get_world_size()

    def gradients(x, y):
        model.zero_grad()
        for part_x, part_y in zip(x.chunk(closure_parts), y.chunk(closure_parts), strict=True):
            (ways.loss_of(model(part_x), part_y) / closure_parts).backward()
        return [None if p.grad is None else p.grad.clone() for p in params]

    for step in range(steps):
        model.step = step
        before, sums = [p.detach().clone() for p in params], [torch.zeros_like(p) for p in params]
        shared = gradients(*ways.batch(step, ranks)) if first_is_synchronized and step == 0 else None
        for rank in range(ranks):
            first = shared or gradients(*ways.batch(step, ranks, rank))
            norm = torch.sqrt(sum(g.square().sum() for g in first if g is not None)) + 1e-12
            with torch.no_grad():
                for p, g in zip(params, first, strict=True):
                    if g is not None:
                        p.add_(RHO * g / norm)
            second = gradients(*ways.batch(step, ranks, rank))
            with torch.no_grad():
                for p, w, total, g in zip(params, before, sums, second, strict=True):
                    p.copy_(w)
                    if g is not None:
                        total.add_(g / ranks)
        for p, total, g in zip(params, sums, second, strict=True):
            p.grad = None if g is None else total
        optimizer.step()


def compare(base, ddp_options, steps=6, parts=1, branches=False):
    """The error against :func:`_by_hand`, and the gradients' all-reduces in the last step."""
    ranks, rank = dist.get_world_size(), dist.get_rank()
    make = Branches if branches else ways.Block
    model, single = make().double(), make().double()
    module, *_ = ways.ddp(model, **ddp_options)
    cls, options = BASES[base]
    optimizer = FastSAM(module.parameters(), cls, rho=RHO, model=module, local_ascent=True, **options)
    for step in range(steps):
        model.step = step
        x, y = ways.batch(step, ranks, rank)

        def closure(x=x, y=y):
            optimizer.zero_grad()
            chunks = list(zip(x.chunk(parts), y.chunk(parts), strict=True))
            for number, (part_x, part_y) in enumerate(chunks):
                with contextlib.nullcontext() if number == len(chunks) - 1 else module.no_sync():
                    loss = ways.loss_of(module(part_x), part_y) / parts
                    loss.backward()
            return loss

        with ways.Collectives() as collectives:
            optimizer.step(closure)
    _by_hand(single, base, steps, ddp_options.get("static_graph", False), parts)
    return ways.error_of(module, ways.whole(single)), sum("allreduce" in name for name in collectives.names)


def replicas_after(steps, method, spoils=False):
    """Whether weights and state are the same bits on all ranks, and finite."""
    ranks, rank = dist.get_world_size(), dist.get_rank()
    module, *_ = ways.ddp(ways.Block().double())
    optimizer = ways.optimizer_for(module, "adamw", method, model=module, local_ascent=True)
    for step in range(steps):
        x, y = ways.batch(step, ranks, rank)
        if spoils and rank == 1 and step % 2 == 0:
            optimizer.step(ways.closure_of(module, optimizer, x, y), ascent_closure=_spoiled(module, optimizer, x, y))
        else:
            optimizer.step(ways.closure_of(module, optimizer, x, y))
    state = [t.reshape(-1).double() for entries in optimizer.state.values() for t in entries.values()]
    mine = torch.cat([ways.whole(module), *state])
    all_ranks = [torch.empty_like(mine) for _ in range(ranks)]
    dist.all_gather(all_ranks, mine)
    return all(torch.equal(mine, other) for other in all_ranks), bool(mine.isfinite().all())


def _spoiled(module, optimizer, x, y):
    def closure():
        loss = ways.closure_of(module, optimizer, x, y)()
        next(module.parameters()).grad.view(-1)[0] = torch.inf
        return loss

    return closure


def batch_norm_replicas(steps):
    """A batch norm under local ascents: its statistics move once a step. (SyncBatchNorm runs on accelerators only.)"""
    rank = dist.get_rank()
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(12, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Linear(8, 1)).double()
    module, *_ = ways.ddp(model)
    optimizer = FastSAM(module.parameters(), rho=RHO, lr=0.1, model=module, local_ascent=True)
    for step in range(steps):
        x, y = ways.batch(step, dist.get_world_size(), rank)
        optimizer.step(ways.closure_of(module, optimizer, x, y))
    return ways.whole(module).tolist(), model[1].num_batches_tracked.item()


def refusals():
    """What the constructor says to each method, and to modules without replicas."""
    module, *_ = ways.ddp(ways.Block())
    sharded, *_ = ways.fsdp2(ways.Block())
    said = {}
    for name, case in METHODS.items():
        said[name] = ways.refusal(lambda m=case.method: FastSAM(module.parameters(), _sgd, method=m, **_local(module)))
    said["fsdp2"] = ways.refusal(lambda: FastSAM(sharded.parameters(), _sgd, **_local(sharded)))
    said["plain"] = ways.refusal(lambda: FastSAM(ways.Block().parameters(), _sgd, local_ascent=True))
    optimizer = FastSAM(module.parameters(), _sgd, **_local(module))
    ways.loss_of(module(torch.ones(2, 12)), torch.ones(2, 1)).backward()
    said["two phases"] = ways.refusal(optimizer.first_step)
    return said


def _local(module):
    return {"model": module, "local_ascent": True, "momentum": 0.9, "lr": 0.1}


_sgd = torch.optim.SGD
