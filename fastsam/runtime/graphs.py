"""CUDA graphs: whether one is being captured, and what cannot be."""

from __future__ import annotations

from typing import NoReturn

import torch


def is_capturing(device: torch.device) -> bool:
    """Whether work for ``device`` goes into a CUDA graph now."""
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


def refuse_capture(reason: str, remedy: str = "") -> NoReturn:
    """Raises, and says what to do."""
    remedy = remedy or "run a step outside the capture first, and capture the one after it"
    raise RuntimeError(f"this step cannot be captured into a CUDA graph: {reason}; {remedy}")
