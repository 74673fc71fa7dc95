"""What FastSAM adds to the base's state_dict, and how it completes a loaded one."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from itertools import chain
from typing import Any

import torch
from torch import Tensor

from fastsam.bases import FusedUpdate
from fastsam.groups import GROUP_OPTIONS, rho_in
from fastsam.methods import SAM, Method
from fastsam.schedules import is_schedule
from fastsam.spec import MASTER_NAME, STEP_NAME

STEP_COUNT = "fastsam_step"
"""In each parameter group: the number of steps, if a method, an interval or a schedule uses it."""

METHOD = "fastsam_method"
"""In the groups of a checkpoint: the method's name, if it is not SAM."""

Groups = Sequence[Mapping[str, Any]]


def complete_saved(saved: dict[str, Any], method: Method, update: FusedUpdate | None, step: int) -> None:
    """Completes the result of ``Optimizer.state_dict()`` in step ``step``, so that FastSAM and its base can load it."""
    if update is not None:
        saved["state"] = {key: update.saved(entries) for key, entries in saved["state"].items()}
        _bring_steps_to_host(saved)
    for group in saved["param_groups"]:
        if not isinstance(method, SAM):
            group[METHOD] = type(method).__name__
        if is_schedule(group["rho"]):
            group["rho"] = rho_in(group, step)  # a schedule is code, which a checkpoint cannot hold


def _bring_steps_to_host(saved: dict[str, Any]) -> None:
    """Moves step counts to the CPU, where a base that is neither capturable nor fused reads them without waiting."""
    found: list[tuple[dict[str, Any], str]] = []
    for group in saved["param_groups"]:
        if group.get("capturable") or group.get("fused"):
            continue
        for key in group["params"]:
            entries = saved["state"].get(key, {})
            found += [(entries, name) for name in ("step", STEP_NAME) if _is_on_device(entries.get(name))]
    for device in {entries[name].device for entries, name in found}:
        mine = [(entries, name) for entries, name in found if entries[name].device == device]
        steps = torch.stack([entries[name] for entries, name in mine]).cpu()
        for (entries, name), step in zip(mine, steps, strict=True):
            entries[name] = step.clone()


def _is_on_device(value: Any) -> bool:
    return isinstance(value, Tensor) and value.device.type != "cpu"


def complete_loaded(loaded: dict[str, Any], given: Mapping[str, Any], present: Groups, method: Method) -> None:
    """Completes and corrects the copy that ``Optimizer.load_state_dict()`` has made of a state dict.

    Args:
        loaded: torch's copy, with tensors cast to the parameters' dtype; changed in place.
        given: the state dict itself.
        present: the optimizer's parameter groups, which supply what the loaded ones lack.
        method: the optimizer's method.

    Raises:
        ValueError: the state belongs to another method.
    """
    for group, mine in zip(loaded["param_groups"], present, strict=True):
        name = group.pop(METHOD, None)
        if name is not None and name != type(method).__name__:
            raise ValueError(
                f"the state belongs to the method {name}, this optimizer's method is {method}, which cannot use it; "
                f"to load it without the method's state, remove {METHOD!r} from its param_groups"
            )
        for name in GROUP_OPTIONS:
            group.setdefault(name, mine[name])
        if STEP_COUNT in mine:
            group.setdefault(STEP_COUNT, mine[STEP_COUNT])
        if is_schedule(mine["rho"]):
            group["rho"] = mine["rho"]
    saved = chain.from_iterable(group["params"] for group in given["param_groups"])
    params = ((param, group) for group in loaded["param_groups"] for param in group["params"])
    for key, (param, group) in zip(saved, params, strict=True):
        for name, value in given["state"].get(key, {}).items():
            if not isinstance(value, Tensor):
                continue
            entries = loaded["state"][param]
            # torch casts loaded tensors to the parameter's dtype, in which a count may not exceed 256.
            if name.startswith("fastsam_") or (group["master_weights"] and name != "step"):
                entries[name] = value.to(param.device, copy=True)
            elif entries[name] is value:
                entries[name] = value.clone()  # two optimizers may load one dict


def check_shapes(loaded: Mapping[str, Any], names_of: Callable[[Mapping[str, Any]], Sequence[str]]) -> None:
    """Raises RuntimeError if a state tensor has another shape than its parameter.

    Args:
        loaded: the state and the groups, keyed by parameters.
        names_of: returns the names of a group's state tensors that have the shapes of their parameters.
    """
    index = 0
    for group in loaded["param_groups"]:
        names = [*names_of(group), MASTER_NAME]
        for param in group["params"]:
            for name in names:
                value = loaded["state"].get(param, {}).get(name)
                if value is not None and value.shape != param.shape:
                    raise RuntimeError(
                        f"parameter {index} (shape {tuple(param.shape)}): its loaded state {name!r} has shape "
                        f"{tuple(value.shape)}"
                    )
            index += 1
