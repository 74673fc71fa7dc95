"""The plan of one phase of a step: a value that flows from the optimizer down to the engine."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastsam.bases import FusedUpdate
from fastsam.distributed import local_of, whole_of
from fastsam.groups import ascent_options
from fastsam.spec import AscentOptions, StateNames
from fastsam.tables import TensorTable
from fastsam.tables.state import OptimizerState


class Plan(NamedTuple):
    """What one phase of a step is to work on.

    Attributes:
        groups: the parameter groups.
        state: the base optimizer's state.
        step: the number of the step, from 0.
        update: how the base runs fused; None: by its own ``step()``.
        grad_scale, found_inf: a GradScaler's, or None.
        micro_batch: which of the step's closures this is, each with an ascent of its own.
        rho_scale: what a schedule multiplies every rho by.
    """

    groups: Sequence[Mapping[str, Any]]
    state: OptimizerState
    step: int
    update: FusedUpdate | None
    grad_scale: Tensor | None = None
    found_inf: Tensor | None = None
    micro_batch: int = 0
    rho_scale: float = 1.0

    @property
    def state_names(self) -> list[StateNames]:
        """What the base update keeps, for each group."""
        return [] if self.update is None else [self.update.state_names(group) for group in self.groups]

    @property
    def ascent_options(self) -> list[AscentOptions]:
        """How the parameters of each group ascend."""
        return [ascent_options(group, self.step, self.rho_scale) for group in self.groups]

    @property
    def perturb(self) -> list[bool]:
        """Whether each group is perturbed."""
        return [bool(group["perturb"]) for group in self.groups]

    def would_move(self, table: TensorTable) -> list[int]:
        """The indices of a table's parameters that an ascent by their gradients would perturb."""
        perturb = self.perturb
        return [i for i in table.present if perturb[table.groups[i]]]

    def unscale_grads(self) -> None:
        """Divides the gradients by the scaler's scale, if there is one."""
        if self.grad_scale is None:
            return
        inverse = self.grad_scale.double().reciprocal().float()
        for group in self.groups:
            for param in group["params"]:
                grad = local_of(param.grad)
                if grad is not None:
                    grad.mul_(inverse.to(grad.device))

    def scaler_scalars(self, table: TensorTable) -> tuple[Tensor | None, Tensor | None]:
        """``grad_scale`` and ``found_inf`` on the table's device."""
        return _to_device(self.grad_scale, table.device), _to_device(self.found_inf, table.device)


def _to_device(scalar: Any, device: torch.device) -> Tensor | None:
    if scalar is None:
        return None
    # A number where the scaler saw no gradient at all.
    scalar = whole_of(scalar)
    tensor = scalar if isinstance(scalar, Tensor) else torch.tensor(scalar, dtype=torch.float32, device="cpu")
    return tensor.to(device, torch.float32, non_blocking=device.type != "cpu").reshape(())
