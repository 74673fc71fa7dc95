"""What examples/ and the doctor do on the ranks."""

import contextlib
import io
import os
import runpy
from pathlib import Path

import torch
import torch.distributed as dist

from fastsam.doctor import ranks

EXAMPLES = Path(__file__).parents[2] / "examples"
CPU = torch.device("cpu")


def _example(name):
    return runpy.run_path(str(EXAMPLES / f"{name}.py"))


def fsdp2(folder):
    """The last loss of a short run, and of one that is stopped after the first checkpoint and started again."""
    example = _example("fsdp2")
    for name in ("whole", "parts"):
        (folder / name).mkdir(exist_ok=True)
    whole = example["train"](folder / "whole", CPU, steps=4, save_every=2)
    train_step, calls = example["train_step"], []

    def stopping(*args):
        calls.append(1)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return train_step(*args)

    example["train"].__globals__["train_step"] = stopping
    with contextlib.suppress(KeyboardInterrupt):
        example["train"](folder / "parts", CPU, steps=4, save_every=2)
    return whole.item(), example["train"](folder / "parts", CPU, steps=4, save_every=2).item()


def ddp():
    """The accuracy, and whether the weights are the same on all ranks."""
    model, accuracy = _example("ddp")["train"](CPU, epochs=2)
    weights = torch.cat([p.detach().flatten() for p in model.parameters()])
    all_ranks = [torch.empty_like(weights) for _ in range(dist.get_world_size())]
    dist.all_gather(all_ranks, weights)
    return accuracy, all(torch.equal(weights, other) for other in all_ranks)


def tensor_parallel():
    return _example("tensor_parallel")["difference"](CPU, steps=5)


def doctor(spoils):
    """The doctor's status and report, in this group; ``spoils``: the ranks' norms are not added up."""
    starts, ends = ranks._start, dist.destroy_process_group
    total = ranks.fastsam.distributed.GlobalSums.total
    ranks._start, dist.destroy_process_group = lambda: CPU, lambda: None
    if spoils:
        ranks.fastsam.distributed.GlobalSums.total = lambda self, parts, *_: next(iter(parts.values()))
    output = io.StringIO()
    try:
        with contextlib.redirect_stdout(output):
            return ranks.run(), output.getvalue()
    finally:
        ranks._start, dist.destroy_process_group = starts, ends
        ranks.fastsam.distributed.GlobalSums.total = total


def doctor_alone():
    """What it says outside of torchrun."""
    rank = os.environ.pop("RANK")
    output = io.StringIO()
    try:
        with contextlib.redirect_stdout(output):
            return ranks.run(), output.getvalue()
    finally:
        os.environ["RANK"] = rank
