"""AE-SAM's statistics of the gradient's norm, and the decision that follows from them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fastsam.runtime import streams
from fastsam.runtime.grad_mode import untracked
from fastsam.schedules import AESAM

# What one tensor holds, so that a captured step can update it in place.
MEAN, VARIANCE, ASCENDS, STEP = range(4)


class Statistics:
    """The moving average and variance of the squared norm of the gradients at w.

    All of it is on the device: mean, variance, the decision, the number of the step. The decision is copied to host
    memory as soon as it is known, and the host waits for that copy alone. A captured step updates the same tensors at
    each replay; the host then waits for the replay, in which no event can be waited for.
    """

    def __init__(self, config: AESAM) -> None:
        self.config = config
        self._loaded: Sequence[float] = (0.0, 0.0, 1.0)
        self._state: Tensor | None = None
        self._next: Tensor | None = None
        self._decision: _HostCopy | None = None
        self._known: bool | None = None

    def ascends_before_first_pass(self) -> bool:
        """The decision that belongs to the step before; with ``delay=0``, True."""
        if self.config.delay == 0 or self._state is None:
            return self.config.delay == 0 or bool(self._loaded[ASCENDS])
        if streams.is_capturing(self._state.device):
            if self._known is None:
                streams.refuse_capture(
                    "whether this step ascends is known on the device only",
                    "read optimizer.ascends_next before the capture",
                )
            return self._known
        assert self._decision is not None
        self._known = self._decision.read()
        return self._known

    @untracked
    def observe(self, norm: Tensor, step: int) -> None:
        """Takes the norm of this step's gradients at w into account; :meth:`commit` makes that permanent.

        ``step`` is where the count on the device begins.
        """
        state, decision = self._on(norm.device, norm.dtype, step)
        delta, squares = self.config.delta, norm.square()
        mean = delta * state[MEAN] + (1 - delta) * squares
        variance = delta * state[VARIANCE] + (1 - delta) * (squares - mean).square()
        # Negated, so that a norm that is not a number perturbs.
        ascends = ~(squares < mean + self.config.threshold(state[STEP]) * variance.sqrt())
        finite = torch.isfinite(variance)
        statistics = torch.where(finite, torch.stack([mean, variance]), state[: VARIANCE + 1])
        rest = torch.stack([(ascends | ~finite).to(state.dtype), state[STEP] + 1])
        self._next = torch.cat([statistics, rest])
        decision.take(self._next[ASCENDS])

    @property
    def has_observed(self) -> bool:
        """Whether this step's gradients have been taken into account."""
        return self._next is not None

    def ascends_after_first_pass(self) -> bool:
        """The decision that belongs to this step, for ``delay=0``; else True."""
        assert self._state is not None
        assert self._decision is not None
        if self.config.delay == 1:
            return True
        if streams.is_capturing(self._state.device):
            streams.refuse_capture(f"{self.config} decides after the first pass", "use delay=1, which decides before")
        return self._decision.read()

    @untracked
    def commit(self) -> None:
        """The step is done."""
        if self._next is None:
            return
        assert self._state is not None
        self._state.copy_(self._next)
        self._next = None
        if not streams.is_capturing(self._state.device):
            self._known = None

    @untracked
    def discard(self) -> None:
        """The step has been given up."""
        if self._next is not None:
            assert self._state is not None
            assert self._decision is not None
            self._next = None
            self._decision.take(self._state[ASCENDS])

    def numbers(self) -> list[float]:
        """For a checkpoint: mean, variance, the coming step's decision, and its number."""
        return [float(n) for n in (self._loaded if self._state is None else self._state.tolist())]

    def load(self, numbers: Sequence[float]) -> None:
        """Goes on from what :meth:`numbers` returned."""
        self._loaded = tuple(numbers)
        self._state = self._next = self._decision = self._known = None

    def __getstate__(self) -> dict[str, Any]:
        return {"config": self.config, "numbers": self.numbers()}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(state["config"])  # type: ignore[misc]
        self.load(state["numbers"])

    def _on(self, device: torch.device, dtype: torch.dtype, step: int) -> tuple[Tensor, _HostCopy]:
        if self._state is None or self._state.device != device:
            if streams.is_capturing(device):
                streams.refuse_capture("fastsam has taken no statistics of the gradients before")
            numbers = [*self.numbers(), float(step)][: STEP + 1]
            self._state = torch.zeros(STEP + 1, dtype=dtype, device=device)
            for place, number in enumerate(numbers):
                self._state[place].fill_(number)
            self._decision = _HostCopy(device, dtype)
        assert self._decision is not None
        return self._state, self._decision


class _HostCopy:
    """A number that a device computes, on the host: one place in pinned memory."""

    def __init__(self, device: torch.device, dtype: torch.dtype) -> None:
        self._device = device
        self._is_in_graphs = False
        self._value = torch.zeros((), dtype=dtype, device="cpu", pin_memory=device.type == "cuda")
        self._event = torch.cuda.Event() if device.type == "cuda" else None

    def take(self, value: Tensor) -> None:
        """Begins to copy."""
        self._value.copy_(value, non_blocking=self._event is not None)
        if streams.is_capturing(self._device):
            self._is_in_graphs = True
        elif self._event is not None:
            self._event.record(torch.cuda.current_stream(self._device))

    def read(self) -> bool:
        """Waits for the last copy; where a graph makes it, for all work on the current stream, which replays it."""
        if self._event is not None:
            if self._is_in_graphs:
                self._event.record(torch.cuda.current_stream(self._device))
            self._event.synchronize()
        return bool(self._value)
