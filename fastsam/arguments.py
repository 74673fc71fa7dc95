"""Checks of plain arguments."""

from __future__ import annotations

from typing import Any


def check(name: str, value: Any, condition: str, holds: bool) -> None:
    """Raises ValueError if an argument is out of range."""
    if not holds:
        raise ValueError(f"{name} must be {condition}, got {value!r}")


def check_count(name: str, value: Any) -> None:
    """Raises ValueError unless ``value`` is a whole number >= 1."""
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ValueError(f"{name} must be a whole number >= 1, got {value!r}")
