"""What a run says: tables for people, JSON for programs, and which figures of the speed table are reached."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path

from benchmarks.implementations import BACKENDS, HALF_BATCH, LOOP, PEER, UPDATE
from benchmarks.results import Case, MethodsPart, OptimizerPart, Results, TrainingStep

# The speed table: at least so many times faster than the loop, at most so many fused steps of the base alone.
TARGETS: dict[tuple[str, str], tuple[float | None, float | None]] = {
    ("4 x 4096^2", "SGD"): (4.0, 2.5),
    ("ResNet-50", "SGD"): (4.0, 2.0),
    ("2,000 x 256", "SGD"): (25.0, 0.35),
    ("4 x 4096^2", "AdamW"): (None, 2.0),
}
# Whole training steps: at most so many of the base's.
TRAINING_TARGETS = {"CNN": {HALF_BATCH: 1.6, "FastSAM, LookSAM()": 1.25, "FastSAM, MomentumSAM()": 1.02}}
# How far the loop may be from the published SAM that it stands for.
PEER_TOLERANCE = 0.10


def lines(results: Results) -> list[str]:
    """The whole report."""
    text = [", ".join(f"{name} {value}" for name, value in results.environment.items()), ""]
    if results.optimizer_part:
        text += ["THE OPTIMIZER PART OF A SAM STEP: first_step() + second_step()", ""]
        for case in results.optimizer_part:
            text += [*optimizer_part_table(case), ""]
        text += [
            "EACH OPERATION, as FastSAM calls it: median ms, share of the copy's bandwidth",
            "",
            *operations_table(results.optimizer_part),
            "",
        ]
    if results.methods:
        text += ["THE OPTIMIZER PART OF EVERY METHOD'S STEP", ""]
        for part in results.methods:
            text += [*methods_table(part), ""]
    if results.training_step:
        text += ["WHOLE TRAINING STEPS: forward, backward, optimizer", ""]
        for step in results.training_step:
            text += [*training_step_table(step), ""]
    if judged := verdicts(results):
        text += ["WHAT WAS AIMED AT", "", *judged, ""]
    return text


def optimizer_part_table(case: OptimizerPart) -> list[str]:
    title = (
        f"{case.name}: {case.parameters:,} parameters in {case.tensors:,} tensors"
        f" ({case.rounds} rounds, a copy runs at {case.copy_gb_s:.1f} GB/s)"
    )
    header = ("", "median ms", "IQR ms", "fastest", "GB/s", "of copy", "vs loop", "fused base steps", "page faults")
    rows = [
        (
            name,
            number(case.step(name).median),
            number(case.step(name).spread),
            number(case.step(name).fastest),
            f"{case.gb_s(name):.1f}",
            f"{case.share_of_copy(name):.0%}",
            f"{case.times_faster_than_loop(name):.2f}x",
            f"{case.fused_base_steps(name):.2f}",
            f"{case.measured[name].page_faults:,}",
        )
        for name in case.measured
    ]
    return [title, *_aligned([header, *rows])]


def operations_table(cases: Iterable[OptimizerPart]) -> list[str]:
    rows = [("", "", "grad_norm", "perturb_", "restore_", "restore_and_update_", "around them")]
    for case in cases:
        for backend in (name for name in BACKENDS if name in case.measured):
            cells = [
                f"{number(case.operations(backend)[operation].median)}"
                f" {case.operation_share_of_copy(backend, operation):>5.0%}"
                for operation in ("grad_norm", "perturb_", "restore_", UPDATE[case.base])
            ]
            rows.append((case.name, backend, *cells, number(case.around_operations(backend))))
    return _aligned(rows)


def methods_table(case: MethodsPart) -> list[str]:
    title = (
        f"{case.name}: {case.parameters:,} parameters in {case.tensors:,} tensors"
        f" ({case.rounds} rounds, a copy runs at {case.copy_gb_s:.1f} GB/s)"
    )
    header = ("", "median ms", "IQR ms", "SAM steps", "bytes", "of SAM's", "GB/s", "of copy")
    sam = case.floor_bytes(next(iter(case.measured)))
    rows = [
        (
            name,
            number(case.step(name).median),
            number(case.step(name).spread),
            f"{case.sam_steps(name):.2f}",
            f"{case.floor_bytes(name):.1f}",
            f"{case.floor_bytes(name) / sam:.2f}",
            f"{case.gb_s(name):.1f}",
            f"{case.share_of_copy(name):.0%}",
        )
        for name in case.measured
    ]
    return [title, *_aligned([header, *rows])]


def training_step_table(case: TrainingStep) -> list[str]:
    title = f"{case.name}: {case.parameters:,} parameters in {case.tensors:,} tensors ({case.rounds} rounds)"
    header = ("", "median ms", "IQR ms", "base steps", "optimizer ms", "of the step")
    rows = [
        (
            name,
            number(case.step(name).median),
            number(case.step(name).spread),
            f"{case.base_steps(name):.2f}",
            number(case.optimizer_ms(name)),
            f"{case.share_of_optimizer(name):.1%}",
        )
        for name in case.measured
    ]
    return [title, *_aligned([header, *rows])]


def verdicts(results: Results) -> list[str]:
    """For each figure that is aimed at and was measured: whether it is reached."""
    text = []
    for case in results.optimizer_part:
        least, most = TARGETS.get((case.model, case.base), (None, None))
        if least is not None:
            measured = case.times_faster_than_loop("native")
            text.append(_verdict(measured >= least, case, f"{measured:.2f}x faster than the loop, wanted >= {least}x"))
        if most is not None:
            measured = case.fused_base_steps("native")
            text.append(_verdict(measured <= most, case, f"{measured:.2f} fused base steps, wanted <= {most}"))
        if least is not None and PEER in case.measured:
            measured = case.step(LOOP).median / case.step(PEER).median
            close = abs(measured - 1) <= PEER_TOLERANCE
            text.append(_verdict(close, case, f"the loop takes {measured:.2f} of {PEER}'s time, wanted 0.9 to 1.1"))
    for step in results.training_step:
        for name, most in TRAINING_TARGETS.get(step.model, {}).items():
            if name in step.measured:
                measured = step.base_steps(name)
                figure = f"{name}: {measured:.2f} steps of the base alone, wanted <= {most}"
                text.append(_verdict(measured <= most, step, figure))
    return text


def _verdict(reached: bool, case: Case, figure: str) -> str:
    return f"{'reached' if reached else 'NOT REACHED':12} {case.name}: {figure}"


def _aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    """The rows as text; the first column starts at the left, the others end at the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  ".join(
            cell.rjust(width) if column else cell.ljust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]


def number(milliseconds: float) -> str:
    """Three digits that mean something."""
    if milliseconds >= 100:
        return f"{milliseconds:.0f}"
    if milliseconds >= 10:
        return f"{milliseconds:.1f}"
    return f"{milliseconds:.2f}" if milliseconds >= 1 else f"{milliseconds:.3f}"


def write_json(results: Results, folder: Path) -> Path:
    """Writes everything into a file named after the device, the time and the commit."""
    environment = results.environment
    device = "-".join(environment["cpu"].lower().split())
    path = folder / f"{device}_{environment['threads']}-threads_{environment['date']}_{environment['commit']}.json"
    path.write_text(json.dumps({**results.as_json(), "verdicts": verdicts(results)}, indent=1) + "\n")
    return path
