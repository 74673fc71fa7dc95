"""The torch.optim classes that run fused with the restore, with their options and state names."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch

from fastsam.precision import rounding_seed
from fastsam.spec import STEP_NAME, AdamOptions, BaseOptions, SGDOptions, StateNames, Update

Group = Mapping[str, Any]


class FusedUpdate(NamedTuple):
    """How one base optimizer class runs on the backends."""

    kind: Update
    options: Callable[[Group], BaseOptions]
    state_names: Callable[[Group], StateNames]
    saved: Callable[[dict[str, Any]], dict[str, Any]] = dict
    """The entries of a parameter's state that a state_dict contains."""


def _sgd_options(group: Group) -> SGDOptions:
    return SGDOptions(
        group["lr"],
        group["momentum"],
        group["dampening"],
        group["weight_decay"],
        group["nesterov"],
        group["maximize"],
        rounding_seed(group),
    )


def _sgd_state(group: Group) -> StateNames:
    if group["momentum"] == 0:
        return StateNames()
    # torch.optim.SGD counts no steps. A first step differs from one with a buffer of zeros only with dampening, so only
    # then a checkpoint must contain a count.
    # A buffer of -0.0 becomes the first gradient bit for bit, as torch's: -0.0 + g is g.
    return StateNames(("momentum_buffer",), STEP_NAME if group["dampening"] != 0 else None, -0.0)


def _saved_sgd_state(entries: dict[str, Any]) -> dict[str, Any]:
    # Before the first step (which an overflow may have skipped) the buffer is zeros; torch.optim.SGD would take it for
    # the result of an earlier step.
    if float(entries.get(STEP_NAME, 1)) != 0:
        return dict(entries)
    return {name: value for name, value in entries.items() if name not in ("momentum_buffer", STEP_NAME)}


def _adam_options(group: Group) -> AdamOptions:
    beta1, beta2 = group["betas"]
    return AdamOptions(
        group["lr"],
        beta1,
        beta2,
        group["eps"],
        group["weight_decay"],
        group["decoupled_weight_decay"],
        group["amsgrad"],
        group["maximize"],
        rounding_seed(group),
    )


def _adam_state(group: Group) -> StateNames:
    moments = ("exp_avg", "exp_avg_sq")
    return StateNames((*moments, "max_exp_avg_sq") if group["amsgrad"] else moments, "step")


_ADAM = FusedUpdate(Update.ADAM, _adam_options, _adam_state)

# Exactly these classes: a subclass may have another step().
FUSED: dict[type[torch.optim.Optimizer], FusedUpdate] = {
    torch.optim.SGD: FusedUpdate(Update.SGD, _sgd_options, _sgd_state, _saved_sgd_state),
    torch.optim.Adam: _ADAM,
    torch.optim.AdamW: _ADAM,
}


def check_base(base: Any, options: Mapping[str, Any], reserved: Sequence[str]) -> None:
    """Raises TypeError or ValueError if ``base`` cannot be the base optimizer, or has a ``reserved`` option."""
    if isinstance(base, torch.optim.Optimizer):
        raise TypeError(f"base must be a class such as torch.optim.SGD, got an instance of {type(base).__name__}")
    if not (isinstance(base, type) and issubclass(base, torch.optim.Optimizer)):
        raise TypeError(f"base must be a torch.optim.Optimizer class, got {base!r}")
    if _needs_closure(base):
        raise TypeError(f"base {base.__name__} is not supported: its step() needs a closure of its own")
    if issubclass(base, torch.optim.SparseAdam):
        raise TypeError(f"base {base.__name__} is not supported: it takes sparse gradients only")
    for name in reserved:
        if name in inspect.signature(base).parameters:
            raise TypeError(f"base {base.__name__} is not supported: its option {name!r} is also FastSAM's")
    if options.get("differentiable"):
        raise ValueError(f"base {base.__name__}: differentiable=True is not supported")


def _needs_closure(base: type[torch.optim.Optimizer]) -> bool:
    closure = inspect.signature(base.step).parameters.get("closure")
    return issubclass(base, torch.optim.LBFGS) or (closure is not None and closure.default is inspect.Parameter.empty)


def fused_update(optimizer: torch.optim.Optimizer) -> FusedUpdate | None:
    """How the base runs on the backends; None: by its own ``step()``, which may have hooks or have been replaced."""
    update = FUSED.get(type(optimizer))
    if update is None or optimizer._optimizer_step_pre_hooks or optimizer._optimizer_step_post_hooks:
        return None
    return None if _replaced_step(optimizer) is not None else update


def complete_base(optimizer: torch.optim.Optimizer) -> None:
    """Gives a base that does not call ``Optimizer.__init__`` the hooks that it lacks, as unpickling does."""
    if not hasattr(optimizer, "_optimizer_load_state_dict_pre_hooks"):
        torch.optim.Optimizer.__setstate__(optimizer, {})


def run_step(optimizer: torch.optim.Optimizer) -> None:
    """``optimizer.step()`` with its own hooks. Global hooks run once, on FastSAM's own ``step``."""
    if (replaced := _replaced_step(optimizer)) is not None:
        replaced()
        return
    step: Any = type(optimizer).step
    if getattr(step, "hooked", False):
        step = step.__wrapped__
    args: tuple[Any, ...] = (optimizer,)
    kwargs: dict[str, Any] = {}
    for before in list(optimizer._optimizer_step_pre_hooks.values()):
        args, kwargs = before(optimizer, args, kwargs) or (args, kwargs)
    step(*args, **kwargs)
    for after in list(optimizer._optimizer_step_post_hooks.values()):
        after(optimizer, args, kwargs)


def note_step(optimizer: torch.optim.Optimizer) -> None:
    """Tells a learning-rate scheduler that was made for the base of its step, of which it would miss the call."""
    if "step" in optimizer.__dict__:
        optimizer._opt_called = True  # type: ignore[attr-defined]


def _replaced_step(optimizer: torch.optim.Optimizer) -> Any:
    """A ``step`` set on the instance that replaces the class's; a learning-rate scheduler's only notes the call."""
    step = optimizer.__dict__.get("step")
    return None if getattr(step, "_wrapped_by_lr_sched", False) else step
