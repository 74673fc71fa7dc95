"""A report as text: aligned columns, and after each row what is wrong with it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any


def text_table(columns: Sequence[str], entries: Sequence[Mapping[str, Any]], notes: Sequence[Sequence[str]]) -> str:
    """One line per entry, with its notes behind it, under a line of ``columns``."""
    rows = [tuple(columns), *([str(entry[column]) for column in columns] for entry in entries)]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["  ".join(f"{cell:{width}}" for cell, width in zip(row, widths, strict=True)) for row in rows]
    ends = ["", *map(", ".join, notes)]
    return "\n".join(f"{line}  {end}".rstrip() for line, end in zip(lines, ends, strict=True))
