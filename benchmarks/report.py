"""What a run says: tables for people, JSON for programs."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path

from benchmarks.environment import file_name
from benchmarks.implementations import COMPILED, DESCRIPTIONS, FUSED_BASE, LOOP
from benchmarks.measure import DEVICE, HOST, Timing
from benchmarks.operations import UPDATE
from benchmarks.records import (
    AROUND,
    CHANGING_LR,
    NEW_GRADIENTS,
    OPTIMIZER,
    STATIC,
    HostTime,
    MethodCosts,
    OptimizerPart,
    RankCosts,
    Record,
    Results,
    TrainingStep,
)
from benchmarks.targets import verdicts

TITLES: dict[type[Record], str] = {
    OptimizerPart: "THE OPTIMIZER PART OF A SAM STEP: first_step() + second_step()",
    MethodCosts: "THE OPTIMIZER PART OF EVERY METHOD'S STEP",
    RankCosts: "THE OPTIMIZER PART ON SEVERAL RANKS, by gloo on this machine",
    HostTime: "THE HOST'S TIME, microseconds of a step",
    TrainingStep: "WHOLE TRAINING STEPS: forward, backward, optimizer",
}


def lines(results: Results) -> list[str]:
    """The whole report."""
    text = [", ".join(f"{name} {value}" for name, value in results.environment.items()), ""]
    for kind, title in TITLES.items():
        records = results.of(kind)
        text += [title, ""] if records else []
        for record in records:
            text += [*record_lines(record), ""]
    parts = results.of(OptimizerPart)
    if parts:
        text += ["EACH OPERATION, as FastSAM calls it: median ms, share of the copy's bandwidth", ""]
        text += [*operations_table(parts), "", "WHAT THE OTHERS DO", ""]
        measured = {name for part in parts for name in part.times}
        text += [f"{name}: {what}" for name, what in DESCRIPTIONS.items() if name in measured]
        text += [""]
    if results.not_measured:
        text += ["NOT MEASURED", "", *results.not_measured, ""]
    if judged := verdicts(results):
        text += ["WHAT WAS AIMED AT", "", *map(str, judged), ""]
    return text


def record_lines(record: Record) -> list[str]:
    """The table of one record."""
    title = f"{record.name}: {record.parameters:,} parameters in {record.tensors:,} tensors"
    title += f" ({record.rounds} rounds" if record.rounds else ""
    title += f", a copy runs at {record.copy_gb_s:,.1f} GB/s" if isinstance(record, OptimizerPart) else ""
    title += ")" if record.rounds else ""
    table = {
        OptimizerPart: _optimizer_part,
        MethodCosts: _method_costs,
        RankCosts: _rank_costs,
        HostTime: _host_time,
        TrainingStep: _training_step,
    }[type(record)]
    not_measured = [f"not measured: {name} ({reason})" for name, reason in record.skipped.items()]
    return [title, *_aligned(table(record)), *not_measured]


def _optimizer_part(part: OptimizerPart) -> Iterable[Sequence[str]]:
    on_gpu = any(DEVICE in parts for parts in part.times.values())
    clocks = ("host ms", "device ms", "IQR ms") if on_gpu else ("fastest",)
    others = ("vs compiled",) if COMPILED in part.times else ()
    faults = ("page faults",) if part.page_faults else ()
    against = ("vs loop", "vs plain", *others, "fused base steps")
    yield ("", "median ms", "IQR ms", *clocks, "GB/s", "of copy", *against, *faults)
    for name, parts in part.times.items():
        step = part.step(name)
        if on_gpu:
            device = part.device(name)
            more = [number(parts[HOST].median), number(device.median), number(device.spread)]
        else:
            more = [number(step.fastest)]
        units = (LOOP, part.best_plain, *([COMPILED] if others else []))
        ratios = [_ratio(part.faster(name, unit), "x") for unit in units]
        row = [name, number(step.median), number(step.spread), *more, f"{part.gb_s(name):,.1f}"]
        row += [f"{part.share_of_copy(name):.0%}", *ratios, _ratio(part.ratio(name, FUSED_BASE))]
        yield [*row, *([f"{part.page_faults[name]:,}"] if faults else [])]


def operations_table(parts: Iterable[OptimizerPart]) -> list[str]:
    """A row for each of FastSAM's backends in each part."""
    operations = ("grad_norm", "perturb_", "restore_", UPDATE)
    rows = [("", "", *operations, "around them")]
    for part in parts:
        for backend in (name for name in part.times if part.operations(name)):
            cells = [
                f"{number(part.operations(backend)[name].median)} {part.operation_share_of_copy(backend, name):>5.0%}"
                for name in operations
            ]
            around = part.times[backend].get(AROUND)
            rows.append((part.name, backend, *cells, "" if around is None else number(around.median)))
    return _aligned(rows)


def _method_costs(part: MethodCosts) -> Iterable[Sequence[str]]:
    sam = part.bytes_per_parameter[next(iter(part.times))]
    yield ("", "median ms", "IQR ms", "SAM steps", "bytes", "of SAM's", "GB/s", "of copy")
    for name in part.times:
        moved, step = part.bytes_per_parameter[name], part.step(name)
        row = [name, number(step.median), number(step.spread), _ratio(part.sam_steps(name)), f"{moved:.1f}"]
        yield [*row, f"{moved / sam:.2f}", f"{part.gb_s(name):,.1f}", f"{part.share_of_copy(name):.0%}"]


def _rank_costs(record: RankCosts) -> Iterable[Sequence[str]]:
    yield ("", "median ms", "IQR ms", "of a rank's alone")
    for name in record.times:
        step = record.step(name)
        yield [name, number(step.median), number(step.spread), _ratio(record.local_steps(name), digits=3)]


def _training_step(case: TrainingStep) -> Iterable[Sequence[str]]:
    of_optimizer = any(OPTIMIZER in parts for parts in case.times.values())
    yield ("", "median ms", "IQR ms", "base steps", *(("optimizer ms", "of the step") if of_optimizer else ()))
    for name, parts in case.times.items():
        step = case.step(name)
        row = [name, number(step.median), number(step.spread), _ratio(case.base_steps(name), digits=3)]
        if of_optimizer:
            row += [number(parts[OPTIMIZER].median), f"{parts[OPTIMIZER].median / step.median:.1%}"]
        yield row


def _host_time(record: HostTime) -> Iterable[Sequence[str]]:
    on_device = ("launches and copies", "extra copies of the parameters") if record.launches else ()
    yield ("", f"{STATIC} (IQR)", f"{NEW_GRADIENTS} (IQR)", f"{CHANGING_LR} (IQR)", *on_device)
    for name, parts in record.times.items():
        row = [name, *(_microseconds(parts.get(part)) for part in (STATIC, NEW_GRADIENTS, CHANGING_LR))]
        if on_device:
            launches, copies = record.launches.get(name), record.extra_copies.get(name)
            row.append("" if launches is None else str(sum(launches.values())))
            row.append("" if copies is None else f"{copies:.4f}")
        yield row


def _microseconds(timing: Timing | None) -> str:
    return "" if timing is None else f"{timing.median * 1e3:.0f} ({timing.spread * 1e3:.0f})"


def _ratio(value: float | None, unit: str = "", digits: int = 2) -> str:
    return "" if value is None else f"{value:.{digits}f}{unit}"


def _aligned(rows: Iterable[Sequence[str]]) -> list[str]:
    """The rows as text; the first column starts at the left, the others end at the right."""
    rows = list(rows)
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
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{file_name(results.environment)}.json"
    judged = [verdict._asdict() for verdict in verdicts(results)]
    path.write_text(json.dumps({**results.as_json(), "verdicts": judged}, indent=1) + "\n")
    return path
