"""A picture of the optimizer part of a step: bars per case, the loop's time as 1."""

from __future__ import annotations

from pathlib import Path

import matplotlib
from matplotlib.figure import Figure

from benchmarks.implementations import FUSED_BASE, LOOP, PEER
from benchmarks.results import OptimizerPart, Results

COLORS = {LOOP: "#8c8c8c", PEER: "#c4c4c4", "foreach": "#8db4dc", "native": "#d95f02", FUSED_BASE: "white"}
LABELS = {
    LOOP: "per-tensor loop",
    "foreach": "FastSAM(backend='foreach')",
    "native": "FastSAM(backend='native')",
    FUSED_BASE: "one fused step of the base, no SAM",
}
BAR, GAP = 0.8, 1.0


def draw(results: Results, path: Path) -> None:
    """Writes a PNG (or what the file's ending says) of every case in ``results.optimizer_part``."""
    cases = results.optimizer_part
    bars = sum(len(case.measured) for case in cases)
    figure = Figure(figsize=(10, 1.6 + 0.24 * (bars + GAP * len(cases))), layout="constrained")
    axes = figure.add_subplot()
    limit = 1.45 * max(_relative(case, name) for case in cases for name in case.measured)
    top = 0.0
    ticks, names, drawn = [], [], {}
    for case in cases:
        for row, name in enumerate(case.measured):
            drawn[name] = _bar(axes, top + row, case, name)
        ticks.append(top + (len(case.measured) - 1) / 2)
        names.append(f"{case.model}\n{case.base}, {_count(case.parameters)}\nin {case.tensors:,} tensors")
        top += len(case.measured) + GAP
    axes.axvline(1, color="#555555", linewidth=0.8, linestyle=":")
    axes.set_yticks(ticks, names)
    axes.tick_params(axis="y", length=0)
    axes.set_ylim(top - GAP, -GAP)
    axes.set_xlim(0, limit)
    axes.set_xlabel("time relative to the loop (shorter is better)")
    axes.spines[["top", "right", "left"]].set_visible(False)
    environment = results.environment
    figure.suptitle(
        f"Optimizer part of a SAM step, fp32: {environment['cpu']}, {environment['threads']} threads, torch"
        f" {environment['torch']}",
        fontsize="medium",
    )
    figure.legend(drawn.values(), [LABELS.get(name, name) for name in drawn], loc="outside lower center", ncols=3)
    figure.savefig(path, dpi=150)


def _bar(axes: matplotlib.axes.Axes, y: float, case: OptimizerPart, name: str) -> matplotlib.container.BarContainer:
    timing = case.step(name)
    loop = case.step(LOOP).median
    spread = [[(timing.median - timing.q1) / loop], [(timing.q3 - timing.median) / loop]]
    bar = axes.barh(
        y,
        _relative(case, name),
        BAR,
        color=COLORS.get(name),
        edgecolor="#555555" if name == FUSED_BASE else "none",
        xerr=spread,
        error_kw={"elinewidth": 0.8, "ecolor": "#333333"},
    )
    faster = "" if name == LOOP else f", {case.times_faster_than_loop(name):.2g}x"
    axes.annotate(
        f"{timing.median:.3g} ms{faster}",
        (timing.q3 / loop, y),
        (6, 0),
        textcoords="offset points",
        va="center",
        fontsize="small",
    )
    return bar


def _relative(case: OptimizerPart, name: str) -> float:
    return case.step(name).median / case.step(LOOP).median


def _count(parameters: int) -> str:
    return f"{parameters / 1e6:.1f}M"
