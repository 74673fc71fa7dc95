"""The plan of one phase of a step: a value that flows from the optimizer down to the engine."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property
from operator import is_
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastsam.bases import FusedUpdate
from fastsam.distributed import local_of, whole_of
from fastsam.groups import ascent_options
from fastsam.schedules import is_schedule
from fastsam.spec import AscentOptions, BaseOptions, StateNames
from fastsam.tables import TensorTable
from fastsam.tables.state import OptimizerState

Groups = Sequence[Mapping[str, Any]]


class StepOptions:
    """What the options of the parameter groups say in a step: each list has one entry per group.

    Args:
        groups: the parameter groups.
        update: how the base runs fused; None: by its own ``step()``.
        step: the number of the step, from 0.
        rho_scale: what a schedule multiplies every rho by.

    Attributes:
        are_checked: whether the groups have been validated with these options.
    """

    def __init__(self, groups: Groups, update: FusedUpdate | None, step: int, rho_scale: float) -> None:
        self._groups, self._update, self._step, self._rho_scale = groups, update, step, rho_scale
        self.are_checked = False

    def with_other_lr(self, groups: Groups) -> StepOptions:
        """The options where only learning rates have changed."""
        changed = StepOptions(groups, self._update, self._step, self._rho_scale)
        changed.__dict__.update({name: value for name, value in self.__dict__.items() if name != "update"})
        changed._groups = groups
        return changed

    @cached_property
    def has_schedules(self) -> bool:
        """Whether rho depends on the number of the step in a group."""
        return any(is_schedule(group["rho"]) for group in self._groups)

    @cached_property
    def perturb(self) -> list[bool]:
        """Whether each group is perturbed."""
        return [bool(group["perturb"]) for group in self._groups]

    @cached_property
    def ascent(self) -> list[AscentOptions]:
        """How the parameters of each group ascend."""
        return [ascent_options(group, self._step, self._rho_scale) for group in self._groups]

    @cached_property
    def state_names(self) -> tuple[StateNames, ...]:
        """What the base update keeps, for each group; nothing if it does not run fused."""
        update = self._update
        return () if update is None else tuple(update.state_names(group) for group in self._groups)

    @cached_property
    def update(self) -> list[BaseOptions]:
        """The base update's options; nothing if it does not run fused."""
        return [] if self._update is None else [self._update.options(group) for group in self._groups]


class KnownOptions:
    """Caches the options of the last step; they are computed again when a group holds another object."""

    def __init__(self) -> None:
        self._options: StepOptions | None = None
        self._groups: list[dict[str, Any]] = []  # as they were; an identity is valid only while its object is alive
        self._key: tuple[Any, ...] = ()

    def of(self, groups: Groups, update: FusedUpdate | None, step: int, rho_scale: float) -> StepOptions:
        """The options in this step."""
        key, known = (update, rho_scale, len(groups)), self._options
        if known is not None and key == self._key:
            if all(map(_have_same_objects, groups, self._groups)):
                return known
            if self._only_lr_differs(groups):
                known = known.with_other_lr(groups)
                self._options, self._groups = known, [dict(group) for group in groups]
                return known
        options = StepOptions(groups, update, step, rho_scale)
        # A schedule says something else in each step, and a list may be written to.
        is_fixed = all(_is_fixed(value) or name in _NO_OPTIONS for group in groups for name, value in group.items())
        self._options, self._key = options if is_fixed else None, key
        self._groups = [dict(group) for group in groups]
        return options

    def _only_lr_differs(self, groups: Groups) -> bool:
        """Whether nothing else has changed: a scheduler sets it in every step."""
        for group, known in zip(groups, self._groups, strict=True):
            if group.keys() != known.keys() or not _is_fixed(group.get("lr")):
                return False
            if not {name for name in known if group[name] is not known[name]} <= {"lr"}:
                return False
        return True


_IMMUTABLE = frozenset({float, int, bool, str, type(None)})
_NO_OPTIONS = frozenset({"params", "param_names"})


def _have_same_objects(group: Mapping[str, Any], known: Mapping[str, Any]) -> bool:
    return group.keys() == known.keys() and all(map(is_, group.values(), known.values()))


def _is_fixed(value: Any) -> bool:
    """Whether an option stays what it is; of a tensor, which tensor it is."""
    if isinstance(value, tuple):
        return all(map(_is_fixed, value))
    return type(value) in _IMMUTABLE or isinstance(value, Tensor)


class Plan(NamedTuple):
    """What one phase of a step is to work on.

    Attributes:
        groups: the parameter groups.
        state: the base optimizer's state.
        step: the number of the step, from 0.
        update: how the base runs fused; None: by its own ``step()``.
        grad_scale, found_inf: a GradScaler's, or None.
        options: what the groups' options say.
        micro_batch: which of the step's closures this is, each with an ascent of its own.
    """

    groups: Groups
    state: OptimizerState
    step: int
    update: FusedUpdate | None
    options: StepOptions
    grad_scale: Tensor | None = None
    found_inf: Tensor | None = None
    micro_batch: int = 0

    def would_move(self, table: TensorTable) -> list[int]:
        """The indices of a table's parameters that an ascent by their gradients would perturb."""
        perturb = self.options.perturb
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
        if self.grad_scale is None and self.found_inf is None:
            return None, None
        return _to_device(self.grad_scale, table.device), _to_device(self.found_inf, table.device)


def _to_device(scalar: Any, device: torch.device) -> Tensor | None:
    if scalar is None:
        return None
    # A number where the scaler saw no gradient at all.
    scalar = whole_of(scalar)
    tensor = scalar if isinstance(scalar, Tensor) else torch.tensor(scalar, dtype=torch.float32, device="cpu")
    return tensor.to(device, torch.float32, non_blocking=device.type != "cpu").reshape(())
