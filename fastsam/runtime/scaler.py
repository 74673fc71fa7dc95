"""What ``torch.amp.GradScaler`` sets on an optimizer, shared by all wrappers around it."""

from __future__ import annotations

from typing import Any

from torch import Tensor


def name_way_to_clip(error: RuntimeError) -> None:
    """Adds what works to Lightning's refusal to clip gradients for optimizers that take a scaler by themselves."""
    if "does not allow for gradient clipping" in str(error):
        remedy = "With FastSAM, give the trainer callbacks=[fastsam.integrations.lightning.FastSAMCallback()]"
        error.args = (f"{error} {remedy}, which clips in the right place",)


class ScalerAttribute:
    """An attribute that GradScaler sets before ``step()`` and deletes after it: ``grad_scale`` or ``found_inf``.

    A wrapper may be an object of its own, of a subclass of the optimizer's class. What is set on it would not reach the
    optimizer whose ``step()`` it calls, so the value lives in the step's state, which both share.
    """

    def __set_name__(self, owner: type, name: str) -> None:
        self._name = name

    def __get__(self, optimizer: Any, owner: type | None = None) -> Any:
        if optimizer is None:
            return self
        values: dict[str, Tensor] = optimizer._engine.scaler
        if self._name not in values:
            raise AttributeError(f"{type(optimizer).__name__!r} object has no attribute {self._name!r}")
        return values[self._name]

    def __set__(self, optimizer: Any, value: Any) -> None:
        optimizer._engine.scaler[self._name] = value

    def __delete__(self, optimizer: Any) -> None:
        if optimizer._engine.scaler.pop(self._name, self) is self:
            raise AttributeError(self._name)
