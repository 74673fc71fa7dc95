"""Measures the optimizer part of a step over DTensors on two ranks, which communicate by gloo on this machine's CPU.

Each rank is a process of its own with one thread. All begin a step together, and the slowest one's time counts.
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from benchmarks.implementations import BASES, RHO
from benchmarks.measure import FEWEST_ROUNDS, STEP, Gradients, Seconds, Timing, Visit, interleaved, settle_allocator
from benchmarks.records import LOCAL, SHARDED, SHARDED_BASE, SHARDED_CLIP, RankCosts
from benchmarks.shapes import shapes_of, sizes
from fastsam import FastSAM

RANKS = 2
TIMEOUT = 600.0


def rank_costs(model: str, base: str, seconds: float, fewest: int = FEWEST_ROUNDS) -> RankCosts:
    """Each rank's shards have the shapes of ``model``'s parameters; the whole model has twice the rows."""
    with tempfile.TemporaryDirectory() as folder, socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        result = Path(folder) / "result.json"
        command = [sys.executable, "-m", "benchmarks.ranks", model, base, str(seconds), str(fewest), str(result)]
        shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(listener.getsockname()[1]), "OMP_NUM_THREADS": "1"}
        shared |= {
            "WORLD_SIZE": str(RANKS),
            "PYTHONPATH": os.pathsep.join(
                [*sys.path, os.environ.get("PYTHONPATH", ""), str(Path(__file__).parents[1])]
            ),
        }
        listener.close()
        ranks = [
            # Not in the checkout, whose package would come before the one that is measured.
            subprocess.Popen(command, env=os.environ | shared | {"RANK": str(rank)}, cwd=folder)
            for rank in range(RANKS)
        ]
        try:
            if any(rank.wait(TIMEOUT) for rank in ranks):
                raise RuntimeError("a rank has failed; its traceback is above")
        finally:
            for rank in ranks:
                rank.kill()
        found = json.loads(result.read_text())
    times = {name: {STEP: Timing(*timing)} for name, timing in found["times"].items()}
    return RankCosts(**sizes(model), base=base, ranks=RANKS, rounds=found["rounds"], times=times)


def main(model: str, base: str, seconds: float, fewest: int, result: Path) -> None:
    """On each rank; the first one writes the result."""
    torch.set_num_threads(1)
    settle_allocator()
    dist.init_process_group("gloo")
    rounds = interleaved(_visits(model, base), seconds, _together, fewest)
    if dist.get_rank() == 0:
        times = {name: parts[STEP] for name, parts in rounds.times.items()}
        result.write_text(json.dumps({"rounds": rounds.count, "times": times}))
    dist.destroy_process_group()


def _visits(model: str, base: str) -> dict[str, Visit]:
    """The whole optimizer part, over this rank's shards alone and over DTensors; and what else such a step has."""
    shapes = shapes_of(model)
    gradients = Gradients(shapes)
    optimizer_class, options = BASES[base]

    def local_shards() -> list[Tensor]:
        torch.manual_seed(dist.get_rank())
        return [torch.randn(shape).mul_(0.02).requires_grad_() for shape in shapes]

    local, sharded = local_shards(), _DTensors(local_shards(), gradients)
    alone, clipped = _DTensors(local_shards(), gradients), _DTensors(local_shards(), gradients)
    sam = [FastSAM(params, optimizer_class, rho=RHO, **options) for params in (local, sharded.params)]
    fused = optimizer_class(alone.params, fused=True, **options)
    return {
        LOCAL: _visit(lambda: gradients.hand_to(local), lambda: _sam_step(sam[0])),
        SHARDED: _visit(sharded.take_gradients, lambda: _sam_step(sam[1])),
        SHARDED_BASE: _visit(alone.take_gradients, fused.step),
        SHARDED_CLIP: _visit(
            clipped.take_gradients, lambda: torch.nn.utils.clip_grad_norm_(clipped.params, 1e9, foreach=True)
        ),
    }


class _DTensors:
    """Parameters of which this rank has ``shards``, and gradients like them."""

    def __init__(self, shards: list[Tensor], gradients: Gradients) -> None:
        from torch.distributed.device_mesh import init_device_mesh

        self._shards, self._gradients = shards, gradients
        self._mesh = init_device_mesh("cpu", (RANKS,))
        self.params = [torch.nn.Parameter(self._distributed(shard.detach())) for shard in shards]

    def _distributed(self, shard: Tensor) -> Tensor:
        from torch.distributed.tensor import DTensor, Shard

        return DTensor.from_local(shard, self._mesh, [Shard(0)], run_check=False)

    def take_gradients(self) -> None:
        self._gradients.hand_to(self._shards)
        for param, shard in zip(self.params, self._shards, strict=True):
            assert shard.grad is not None
            param.grad = self._distributed(shard.grad)


def _sam_step(optimizer: FastSAM) -> None:
    optimizer.first_step(zero_grad=False)
    optimizer.second_step()


def _visit(prepare: Callable[[], Any], step: Callable[[], Any]) -> Visit:
    def visit() -> Seconds:
        prepare()
        dist.barrier()
        start = time.perf_counter()
        step()
        elapsed = torch.tensor(time.perf_counter() - start)
        dist.all_reduce(elapsed, dist.ReduceOp.MAX)
        return {STEP: elapsed.item()}

    return visit


def _together(one_round: Callable[[], None], count: int) -> None:
    """As many rounds on every rank as the first one wants."""
    agreed = torch.tensor(count)
    dist.broadcast(agreed, 0)
    for _ in range(int(agreed)):
        one_round()


if __name__ == "__main__":
    name, base_name, duration, least, path = sys.argv[1:]
    main(name, base_name, float(duration), int(least), Path(path))
