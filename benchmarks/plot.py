"""A picture of the optimizer part of a step in float32: how many times faster than the loop, on a logarithmic axis."""

from __future__ import annotations

from pathlib import Path

import matplotlib
from matplotlib.figure import Figure

from benchmarks.implementations import (
    COMPILED,
    FUSED_BASE,
    HEAVYBALL,
    LISTS,
    LISTS_ON_HOST,
    LOOP,
    PEER,
    PEER_IN_LISTS,
)
from benchmarks.records import OptimizerPart, Results
from benchmarks.report import number

COLORS = {
    PEER: "#c4c4c4",
    PEER_IN_LISTS: "#a8a8a8",
    HEAVYBALL: "#7f7f7f",
    LISTS: "#bcd3a8",
    LISTS_ON_HOST: "#86ad63",
    COMPILED: "#4f7a33",
    "foreach": "#8db4dc",
    "triton": "#7570b3",
    "native": "#d95f02",
    FUSED_BASE: "white",
}
LABELS = {name: f"FastSAM(backend={name!r})" for name in ("foreach", "triton", "native")}
LABELS[FUSED_BASE] = "one fused step of the base, no SAM"
BAR, GAP = 0.8, 1.0


def draw(results: Results, path: Path, note: str = "") -> None:
    """Writes a PNG (or what the file's ending says) of every float32 part that has the loop in it.

    Args:
        results: of a run.
        path: the file.
        note: kept in a PNG's description.
    """
    parts = [part for part in results.of(OptimizerPart) if part.dtype == "float32" and LOOP in part.times]
    bars = sum(len(part.times) - 1 for part in parts)
    figure = Figure(figsize=(10, 1.6 + 0.24 * (bars + GAP * len(parts))), layout="constrained")
    axes = figure.add_subplot()
    top, ticks, labels, drawn = 0.0, [], [], {}
    for part in parts:
        names = [name for name in part.times if name != LOOP]
        for row, name in enumerate(names):
            drawn[name] = _bar(axes, top + row, part, name)
        ticks.append(top + (len(names) - 1) / 2)
        labels.append(f"{part.model}\n{part.base}, {part.parameters / 1e6:.1f}M\nin {part.tensors:,} tensors")
        top += len(names) + GAP
    axes.set_xscale("log")
    axes.margins(x=0.3)
    axes.axvline(1, color="#555555", linewidth=0.8, linestyle=":")
    axes.set_yticks(ticks, labels)
    axes.tick_params(axis="y", length=0)
    axes.set_ylim(max(top - GAP, BAR), -GAP)
    axes.set_xlabel("times faster than the per-tensor loop")
    axes.spines[["top", "right", "left"]].set_visible(False)
    where = results.environment
    device = where.get("gpu") or f"{where['cpu']}, {where['threads']} threads"
    figure.suptitle(f"Optimizer part of a SAM step, fp32: {device}, torch {where['torch']}", fontsize="medium")
    figure.legend(drawn.values(), [LABELS.get(name, name) for name in drawn], loc="outside lower center", ncols=3)
    figure.savefig(path, dpi=120, metadata={"Description": note} if path.suffix == ".png" else None)


def _bar(axes: matplotlib.axes.Axes, y: float, part: OptimizerPart, name: str) -> matplotlib.container.BarContainer:
    faster = part.faster(name, LOOP)
    assert faster is not None
    edge = "#555555" if name == FUSED_BASE else "none"
    bar = axes.barh(y, faster - 1, BAR, left=1, color=COLORS.get(name), edgecolor=edge)
    text = f"{faster:.2g}x, {number(part.step(name).median)} ms, {part.share_of_copy(name):.0%} of copy"
    axes.annotate(text, (max(faster, 1), y), (6, 0), textcoords="offset points", va="center", fontsize="small")
    return bar
