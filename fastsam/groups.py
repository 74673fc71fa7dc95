"""FastSAM's options in parameter groups: defaults and checks; rho in a given step."""

from __future__ import annotations

import inspect
import math
import numbers
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from torch import Tensor
from torch.optim import Optimizer

from fastsam.bases import FUSED
from fastsam.precision import DEFAULT_SEED, PRECISION_OPTIONS, check_precision, rounding_seed
from fastsam.schedules import RhoByLR, is_schedule
from fastsam.spec import AscentOptions
from fastsam.tables.memory import check_disjoint, check_parameter

GROUP_OPTIONS = ("rho", "adaptive", "perturb", *PRECISION_OPTIONS)
"""FastSAM's options in each group, besides the base's."""


_OPTIONS = frozenset(GROUP_OPTIONS)


def lacks_options(group: Mapping[str, Any]) -> bool:
    """Whether the base was given, or has loaded, the group without FastSAM."""
    return not group.keys() >= _OPTIONS


def split_options(group: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """What of a group is the base's, and what is FastSAM's."""
    own = {name for name in group if name in _OPTIONS or str(name).startswith("fastsam_")}
    return {n: v for n, v in group.items() if n not in own}, {n: v for n, v in group.items() if n in own}


def give_options(groups: Sequence[dict[str, Any]], given: Sequence[Mapping[str, Any]]) -> None:
    """Sets FastSAM's options in the base's ``groups``, which it has made of the groups ``given``."""
    of = {id(tensor): group for group in given for tensor in tensors_of(group)}
    for index, group in enumerate(groups):
        first = next(iter(group["params"]), None)
        mine = of.get(id(first), given[min(index, len(given) - 1)])
        fill_options([group], [split_options(mine)[1]])


def fill_options(groups: Sequence[dict[str, Any]], options: Sequence[Mapping[str, Any]]) -> None:
    """Gives each group the options that it lacks."""
    for group, mine in zip(groups, options, strict=False):
        for name, value in mine.items():
            group.setdefault(name, value)


def as_groups(params: Any) -> list[dict[str, Any]]:
    """The parameter groups in the argument ``params`` of a constructor."""
    if isinstance(params, (Tensor, Mapping)) or not isinstance(params, Iterable):
        raise TypeError(
            f"params must be an iterable of tensors, (name, tensor) pairs or dicts, got {type(params).__name__}"
        )
    entries = list(params)
    if not entries:
        raise ValueError("params is empty: there is nothing to optimize")
    return entries if isinstance(entries[0], dict) else [{"params": entries}]


def with_defaults(group: Any, own: Mapping[str, Any], base: type[Optimizer]) -> dict[str, Any]:
    """A copy of a parameter group, with its parameters as a list and with FastSAM's options, all checked."""
    if not isinstance(group, dict) or "params" not in group:
        raise TypeError(f"a parameter group must be a dict with 'params', got {group!r}")
    if group.get("differentiable"):
        raise ValueError("differentiable=True is not supported")
    params = group["params"]
    if not isinstance(params, Iterable):
        raise TypeError(
            f"params must be an iterable of tensors, (name, tensor) pairs or dicts, got {type(params).__name__}"
        )
    if isinstance(params, set):
        raise TypeError("params must be in an order that is the same in every run, got a set; use a list")
    params = [params] if isinstance(params, Tensor) else list(params)
    _refuse_other_bases(group, base)
    whole = {**own, **group, "params": params}
    if whole["rounding_seed"] is None:
        whole["rounding_seed"] = DEFAULT_SEED
    _check_options(whole)
    check_precision(whole, base, fused=base in FUSED)
    if isinstance(whole["rho"], numbers.Real):
        whole["rho"] = float(whole["rho"])  # a checkpoint with NumPy's numbers does not load with weights_only
    return whole


def _refuse_other_bases(group: Mapping[str, Any], base: type[Optimizer]) -> None:
    """Raises TypeError for a group of a FastSAM with another base, whose options would silently have no effect."""
    if not all(name in group for name in GROUP_OPTIONS):
        return
    known = inspect.signature(base).parameters
    implied = {"decoupled_weight_decay", "initial_lr", "params", "param_names", *GROUP_OPTIONS}
    unknown = [name for name in group if name not in known and name not in implied and not name.startswith("fastsam_")]
    if unknown:
        raise TypeError(
            f"this parameter group belongs to another optimizer: base {base.__name__} has no {', '.join(unknown)}; "
            "pass that optimizer's base= and method=, or parameters without its options"
        )


def tensors_of(group: Mapping[str, Any]) -> list[Tensor]:
    """The tensors of a group whose parameters may be (name, tensor) pairs."""
    return [p[1] if isinstance(p, tuple) else p for p in group["params"]]


def check_parameters(groups: Sequence[Mapping[str, Any]]) -> None:
    """Raises TypeError or ValueError if a parameter cannot be trained, or if two are one or share memory.

    A frozen one may be anything: it is checked when it has a gradient.
    """
    params = [p for group in groups for p in tensors_of(group)]
    seen: dict[int, int] = {}
    for index, param in enumerate(params):
        if not isinstance(param, Tensor):
            raise TypeError(f"parameter {index} must be a tensor, got {type(param).__name__}")
        if id(param) in seen:
            raise ValueError(f"parameter {index} (shape {tuple(param.shape)}) is parameter {seen[id(param)]} again")
        seen[id(param)] = index
        if param.requires_grad:
            check_parameter(param, index)
    check_disjoint(params)


def rho_in(group: Mapping[str, Any], step: int) -> Any:
    """The radius of ``group`` in step ``step`` (from 0)."""
    rho = group["rho"]
    if isinstance(rho, RhoByLR):
        return rho.of(learning_rate(group))
    return rho(step) if callable(rho) else rho


def learning_rate(group: Mapping[str, Any]) -> Any:
    """The group's lr.

    Raises:
        ValueError: the base has none, or computes it by itself (None).
    """
    if group.get("lr") is None:
        raise ValueError("lr must be a number or a tensor for this method or schedule of rho, got None; set lr")
    return group["lr"]


def ascent_options(group: Mapping[str, Any], step: int, rho_scale: float = 1.0) -> AscentOptions:
    """The options of ``group`` that backends need for the ascent in step ``step``; ``rho_scale``: rho's factor."""
    rho = rho_in(group, step)
    _check_rho(rho, read=not isinstance(rho, Tensor) or rho.device.type == "cpu")
    if rho_scale != 1.0:
        rho = rho * rho_scale
    return AscentOptions(rho, bool(group["adaptive"]), bool(group.get("maximize", False)), rounding_seed(group))


def _check_options(group: Mapping[str, Any]) -> None:
    if not is_schedule(group["rho"]):
        _check_rho(group["rho"])
    for name in ("adaptive", "perturb"):
        if not isinstance(group[name], bool):
            raise TypeError(f"{name} must be True or False, got {group[name]!r}")


def _check_rho(rho: Any, *, read: bool = True) -> None:
    """Raises if ``rho`` is not a radius; ``read=False``: does not read its value, which may be on an accelerator."""
    if isinstance(rho, Tensor):
        if rho.numel() != 1:
            raise ValueError(f"rho must be a number or a tensor with one element, got shape {tuple(rho.shape)}")
        if not read:
            return
        rho = rho.item()
    if not isinstance(rho, (float, numbers.Real)):  # to ask an abstract class takes longer
        raise TypeError(f"rho must be a number or a tensor with one element, got {type(rho).__name__}")
    if not 0 <= float(rho) < math.inf:
        raise ValueError(f"rho must be finite and >= 0, got {rho}")
