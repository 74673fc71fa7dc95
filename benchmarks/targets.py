"""The figures to reach, on a GPU and on the CPU, and what a run has for each."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from benchmarks.implementations import FUSED_BASE, LOOP, PEER
from benchmarks.methods import SAM
from benchmarks.operations import KERNELS, fastest
from benchmarks.records import (
    CHANGING_LR,
    NEW_GRADIENTS,
    SHARDED,
    STATIC,
    WATCH,
    HostTime,
    MethodCosts,
    OptimizerPart,
    RankCosts,
    Results,
)
from benchmarks.records import TrainingStep as TrainingRecord
from benchmarks.shapes import MODELS
from benchmarks.training import FASTSAM, FASTSAM_IN_A_GRAPH, HALF_BATCH, HALF_BATCH_IN_A_GRAPH, of_method

# ---- on a GPU ----
# Shares of the copy's bandwidth, float32.
LARGE, SHARE_OF_LARGE, SHARE_OF_RESNET_50 = 86_000_000, 0.95, 0.90
# So many times the loop, and the best of plain PyTorch.
GPU_FASTER = {"ResNet-50": (10.0, 2.5), "2,000 x 256": (40.0, 5.0)}
# WRN-28-10, in training steps of the base alone. Half a batch is measured in graphs only: in eager steps of this
# model on an H200, the time is that of the host's launches.
GPU_TRAINING = {FASTSAM: 2.02, FASTSAM_IN_A_GRAPH: 2.02, HALF_BATCH_IN_A_GRAPH: 1.55}
# One copy of the parameters and nothing else: tables, partial sums and the allocator's rounding are within 2 MiB.
COPIES, SMALL_BYTES = 1.0, 2**21

# ---- on the CPU ----
# At least so many times faster than the loop, at most so many fused steps of the base alone.
CPU_SPEED: dict[tuple[str, str], tuple[float | None, float]] = {
    ("4 x 4096^2", "SGD"): (4.0, 2.5),
    ("ResNet-50", "SGD"): (4.0, 2.0),
    ("2,000 x 256", "SGD"): (18.0, 0.45),
    ("4 x 4096^2", "AdamW"): (None, 2.0),
}
# `foreach` is what a user without a compiler gets.
FOREACH_FASTER = 1.0
CPU_TRAINING = {HALF_BATCH: 1.6, of_method("LookSAM()"): 1.25, of_method("MomentumSAM()"): 1.02}
SAM_STEPS = {"MomentumSAM()": 1.05, "AMP()": 1.05}
# Over DTensors on two ranks, in units of the same over a rank's shards alone.
LOCAL_STEPS = 1.15
# How far the loop may be from the published SAM that it stands for.
PEER_TOLERANCE = 0.10

# ---- on both: microseconds of the host's a step, at 161 tensors; on the CPU with stubbed launches ----
HOST_TENSORS = 161
HOST_MICROSECONDS = {"native": 80.0, "triton": 120.0}
CHANGING_LR_MICROSECONDS = 5.0
WATCH_MICROSECONDS = 3.0
NATIVE_FUSED_STEPS = 0.5


class Verdict(NamedTuple):
    """One figure; ``reached`` is None if it was not measured."""

    what: str
    wanted: str
    measured: str = "not measured"
    reached: bool | None = None

    def __str__(self) -> str:
        word = {None: "", True: "reached", False: "NOT REACHED"}[self.reached]
        return f"{word:12} {self.what}: {self.measured}, wanted {self.wanted}"


def verdicts(results: Results) -> list[Verdict]:
    """Of a run on a GPU all figures, of one on the CPU those that were measured."""
    if "gpu" in results.environment:
        return [*_of_gpu(results), *_of_host_time(results)]
    found = [*_of_cpu(results), *_of_host_time(results)]
    return [verdict for verdict in found if verdict.reached is not None]


def at_least(what: str, figure: float | None, least: float, unit: str = "x") -> Verdict:
    wanted = f">= {_figure(least, unit)}"
    return Verdict(what, wanted) if figure is None else Verdict(what, wanted, _figure(figure, unit), figure >= least)


def at_most(what: str, figure: float | None, most: float, unit: str = "x") -> Verdict:
    wanted = f"<= {_figure(most, unit)}"
    return Verdict(what, wanted) if figure is None else Verdict(what, wanted, _figure(figure, unit), figure <= most)


def _figure(value: float, unit: str) -> str:
    return f"{value:.1%}" if unit == "%" else f"{value:.0f} {unit}" if unit == "us" else f"{value:.3g}{unit}"


def _of_gpu(results: Results) -> Iterator[Verdict]:
    parts = [part for part in results.of(OptimizerPart) if part.chunk_size is None and not part.shifted]
    float32 = [part for part in parts if part.dtype == "float32"]
    for backend in KERNELS:
        measured = [part for part in float32 if backend in part.times]
        large = [part for part in measured if part.parameters >= LARGE]
        for base in ("SGD", "AdamW"):
            worst = min((p for p in large if p.base == base), key=lambda p: p.share_of_copy(backend), default=None)
            what = f"{backend}: share of the copy, {base}, from 86M parameters up"
            what += "" if worst is None else f" (lowest: {worst.model})"
            yield at_least(what, worst and worst.share_of_copy(backend), SHARE_OF_LARGE, "%")
        resnet = [p.share_of_copy(backend) for p in measured if (p.model, p.base) == ("ResNet-50", "SGD")]
        yield at_least(
            f"{backend}: share of the copy, SGD, ResNet-50", min(resnet, default=None), SHARE_OF_RESNET_50, "%"
        )
        for model, (than_loop, than_plain) in GPU_FASTER.items():
            mine = [p for p in measured if (p.model, p.base) == (model, "SGD")]
            loops = [faster for p in mine if (faster := p.faster(backend, LOOP))]
            plain = [faster for p in mine if (faster := p.faster(backend, p.best_plain))]
            yield at_least(f"{backend}: {model}, faster than the loop", min(loops, default=None), than_loop)
            yield at_least(f"{backend}: {model}, faster than plain PyTorch", min(plain, default=None), than_plain)
        yield _of_memory(results, backend)
    wrn = next((step for step in results.of(TrainingRecord) if step.model == "WRN-28-10"), None)
    for name, most in GPU_TRAINING.items():
        yield at_most(f"WRN-28-10, training steps of SGD: {name}", wrn and wrn.base_steps(name), most)


def _of_memory(results: Results, backend: str) -> Verdict:
    record = next((one for one in results.of(HostTime) if backend in one.extra_copies), None)
    if record is None:
        return at_most(f"{backend}: extra memory, copies of the parameters", None, COPIES)
    allowed = COPIES + SMALL_BYTES / (4 * record.parameters)
    return at_most(f"{backend}: extra memory, copies of the parameters", record.extra_copies[backend], allowed)


def _of_cpu(results: Results) -> Iterator[Verdict]:
    native = fastest("cpu")
    for part in results.of(OptimizerPart):
        if part.model not in MODELS:
            continue  # a rehearsal's
        least, most = CPU_SPEED.get((part.model, part.base), (None, None))
        if least is not None:
            yield at_least(f"{part.name}: {native}, faster than the loop", part.faster(native, LOOP), least)
        if most is not None:
            yield at_most(f"{part.name}: {native}, fused base steps", part.ratio(native, FUSED_BASE), most, "")
        yield at_least(f"{part.name}: foreach, faster than the loop", part.faster("foreach", LOOP), FOREACH_FASTER)
        if least is not None and (peer := part.ratio(LOOP, PEER)) is not None:
            wanted = f"{1 - PEER_TOLERANCE:.1f} to {1 + PEER_TOLERANCE:.1f}"
            reached = abs(peer - 1) <= PEER_TOLERANCE
            yield Verdict(f"{part.name}: the loop in units of {PEER}", wanted, f"{peer:.2f}", reached)
    for part in results.of(MethodCosts):
        for name, most in (SAM_STEPS if part.model in MODELS else {}).items():
            yield at_most(f"{part.name}: {name} in units of {SAM}", part.sam_steps(name), most, "")
    for record in results.of(RankCosts):
        what = f"{record.name}: {SHARDED}, of a rank's shards alone"
        yield at_most(what, record.local_steps(SHARDED) if record.model in MODELS else None, LOCAL_STEPS, "")
    for step in results.of(TrainingRecord):
        for name, most in (CPU_TRAINING if step.model == "CNN" else {}).items():
            yield at_most(f"{step.name}: {name}, steps of the base", step.base_steps(name), most, "")


def _of_host_time(results: Results) -> Iterator[Verdict]:
    records = [one for one in results.of(HostTime) if one.tensors == HOST_TENSORS]
    for record in records[:1]:
        for backend, most in HOST_MICROSECONDS.items():
            what = f"{record.name}: {backend}, host time"
            yield at_most(what, record.microseconds(backend, STATIC), most, "us")
            changing, new = record.microseconds(backend, CHANGING_LR), record.microseconds(backend, NEW_GRADIENTS)
            more = None if changing is None or new is None else changing - new
            yield at_most(f"{what} of a changing lr", more, CHANGING_LR_MICROSECONDS, "us")
        mine, fused = record.microseconds("native"), record.microseconds(FUSED_BASE)
        steps = None if mine is None or fused is None else mine / fused
        yield at_most(f"{record.name}: native, fused base steps of host time", steps, NATIVE_FUSED_STEPS, "")
        watch = record.microseconds(WATCH, NEW_GRADIENTS)
        yield at_most(f"{record.name}: {WATCH}", watch, WATCH_MICROSECONDS, "us")
    if not records:
        yield from (at_most(f"{backend}: host time", None, most, "us") for backend, most in HOST_MICROSECONDS.items())
