"""The same random numbers (dropout masks) in both passes, on every device that holds parameters."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor


class GeneratorStates:
    """The present states of the generators of the CPU and of ``devices``.

    Raises:
        RuntimeError: a CUDA graph is being captured, during which generators can be neither read nor set.
    """

    def __init__(self, devices: Iterable[torch.device]) -> None:
        self._devices = {d for d in devices if d.type != "cpu"}
        self._states = self._read()

    def replayed(self, closure: Callable[[], Any]) -> Callable[[], Any]:
        """``closure``, run from these states; afterwards the generators have the states they have now."""
        after = self._read()

        def run() -> Any:
            self._write(self._states)
            try:
                return closure()
            finally:
                self._write(after)

        return run

    def restore(self) -> None:
        """Gives the generators these states back."""
        self._write(self._states)

    def _read(self) -> tuple[Tensor, dict[torch.device, Tensor]]:
        states = {}
        for device in self._devices:
            module: Any = torch.get_device_module(device)
            if device.type == "cuda" and module.is_current_stream_capturing():
                raise RuntimeError("replay_rng=True cannot be used under CUDA graph capture; build FastSAM without it")
            states[device] = module.get_rng_state(device)
        return torch.get_rng_state(), states

    def _write(self, states: tuple[Tensor, dict[torch.device, Tensor]]) -> None:
        cpu, others = states
        torch.set_rng_state(cpu)
        for device, state in others.items():
            module: Any = torch.get_device_module(device)
            module.set_rng_state(state, device)
