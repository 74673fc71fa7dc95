"""The number of the step in a device's memory: replays of a CUDA graph must not repeat the capture's random numbers."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastsam.runtime import streams


class StepNumber:
    """Counts the steps on one device.

    What is captured into a CUDA graph happens at each replay: there the number goes on by one, wherever it was.

    Args:
        table: a table, whose ``device`` it is.
    """

    def __init__(self, table: Any) -> None:
        if streams.is_capturing(table.device):
            streams.refuse_capture("fastsam has drawn no random numbers for these parameters before")
        self._number = torch.zeros((), dtype=torch.int64, device=table.device)
        self._is_of_this_step = False

    def begin_step(self) -> None:
        """A step begins, or begins once more after a failure."""
        self._is_of_this_step = False

    def of(self, step: int) -> Tensor:
        """``step``, or in a replay that of the replay: int64, 0-dim. It is overwritten by the next step."""
        if not self._is_of_this_step:
            if streams.is_capturing(self._number.device):
                self._number += 1
            else:
                self._number.fill_(step)
            self._is_of_this_step = True
        return self._number
