"""Ranks that fail alone: the others wait for a group's timeout at most, and everyone's weights come back."""

import time
from datetime import timedelta

import torch
import torch.distributed as dist

from fastsam import FastSAM

TIMEOUT = 3.0


def closure_raises(failing_pass):
    """Rank 1's closure raises in a pass; each rank's error, how long it took, and whether its weights are back."""
    group = dist.new_group(timeout=timedelta(seconds=TIMEOUT), backend="gloo")
    weight = torch.nn.Parameter(torch.arange(14, dtype=torch.float64))
    optimizer = FastSAM([weight], rho=0.1, lr=0.1, momentum=0.9, shard_groups=group)
    before, passes = weight.detach().clone(), []

    def closure():
        passes.append(1)
        weight.grad = torch.ones_like(weight)
        if dist.get_rank() == 1 and len(passes) == failing_pass:
            raise ValueError("on this rank alone")

    begun, error = time.monotonic(), ""
    try:
        optimizer.step(closure)
        dist.all_reduce(torch.zeros(1), group=group)  # what the next step would begin with
    except Exception as reason:
        error = f"{type(reason).__name__}: {reason}"
    optimizer.restore()
    waited = time.monotonic() - begun
    is_back = torch.equal(weight.detach(), before)
    return error, waited < TIMEOUT + 20, is_back or not error, optimizer.perturbed


def two_phases_fail():
    """The same where a rank never reaches ``first_step()``."""
    group = dist.new_group(timeout=timedelta(seconds=TIMEOUT), backend="gloo")
    weight = torch.nn.Parameter(torch.ones(3, dtype=torch.float64))
    optimizer = FastSAM([weight], rho=0.1, lr=0.1, shard_groups=group)
    weight.grad = torch.ones(3, dtype=torch.float64)
    error = ""
    if dist.get_rank() == 0:
        try:
            optimizer.first_step()
        except Exception as reason:
            error = type(reason).__name__
    else:
        time.sleep(TIMEOUT + 1)
    optimizer.restore()
    return error, bool((weight == 1).all()), optimizer.perturbed
