"""CUDA streams: whether one is being captured, and memory that another stream than its own may still use."""

from __future__ import annotations

from typing import Any, NoReturn

import torch
from torch import Tensor


class StreamGuard:
    """Keeps memory that was allocated on one stream and last used on another until the other has finished with it.

    PyTorch's allocator would hand it out again at once.
    """

    def __init__(self) -> None:
        self._waiting: list[tuple[torch.cuda.Event, Any]] = []

    def keep(self, device: torch.device, made_on: int, memory: Any) -> None:
        """``memory`` is about to be dropped.

        Args:
            device: where it is.
            made_on: what :func:`current_stream` was when it was allocated.
            memory: anything that refers to it.
        """
        if current_stream(device) != made_on:
            self._waiting.append((torch.cuda.current_stream(device).record_event(), memory))

    def free(self) -> None:
        """Drops what no stream uses any longer; does not wait."""
        if self._waiting:
            self._waiting = [(event, memory) for event, memory in self._waiting if not event.query()]


def is_capturing(device: torch.device) -> bool:
    """Whether work for ``device`` goes into a CUDA graph now."""
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


def refuse_capture(reason: str, remedy: str = "") -> NoReturn:
    """Raises, and says what to do."""
    remedy = remedy or "run a step outside the capture first, and capture the one after it"
    raise RuntimeError(f"this step cannot be captured into a CUDA graph: {reason}; {remedy}")


def send(tensor: Tensor, device: torch.device) -> Tensor:
    """A tensor of the CPU's on ``device``, without waiting for it; to be kept, and never made within a CUDA graph."""
    if device.type == "cpu":
        return tensor
    if is_capturing(device):
        refuse_capture("numbers have to be copied to the device")
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)


def current_stream(device: torch.device) -> int:
    """The handle of the device's current stream; 0 where there are none."""
    return torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0
