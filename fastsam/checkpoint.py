"""What FastSAM adds to the base's state_dict, and how it completes a loaded one."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from fastsam import methods
from fastsam.bases import FUSED, FusedUpdate
from fastsam.distributed import is_distributed
from fastsam.groups import fill_options, rho_in, split_options
from fastsam.methods import Method
from fastsam.schedules import is_schedule
from fastsam.spec import MASTER_NAME, STEP_NAME

STEP_COUNT = "fastsam_step"
"""In each parameter group: the number of steps, if a method, an interval or a schedule uses it."""

METHOD = "fastsam_method"
"""In the groups of a checkpoint: the method, if it keeps something in ``state``."""

Groups = Sequence[Mapping[str, Any]]


def step_count(groups: Groups) -> int:
    """The number of steps, or 0 where it is not counted."""
    # A group that was added later, or put first, has no count yet.
    return int(max([group[STEP_COUNT] for group in groups if STEP_COUNT in group], default=0))


def complete_saved(
    saved: dict[str, Any], method: Method, update: FusedUpdate | None, step: int, *, is_initial: bool = False
) -> None:
    """Completes the result of ``Optimizer.state_dict()`` in step ``step``, so that FastSAM and its base can load it.

    Args:
        saved: changed in place.
        method: the method.
        update: how the base runs fused, if it can.
        step: the number of the step.
        is_initial: the state was made to be loaded into (by torch.distributed.checkpoint): nothing of it is left out.
    """
    if update is not None:
        saved["state"] = {key: dict(e) if is_initial else update.saved(e) for key, e in saved["state"].items()}
        _copy_steps(saved)
    for group in saved.get("param_groups", ()):
        if method.state_name is not None:
            group[METHOD] = type(method).__name__
        if is_schedule(group.get("rho")):
            group["rho"] = rho_in(group, step)  # a schedule is code, which a checkpoint cannot hold


def _copy_steps(saved: dict[str, Any]) -> None:
    """Copies step counts, which go on counting: to the CPU, unless a base that is capturable or fused loads them."""
    found: list[tuple[dict[str, Any], str]] = []
    for group in saved["param_groups"]:
        stays = group.get("capturable") or group.get("fused")
        for key in group["params"]:
            entries = saved["state"].get(key, {})
            for name in ("step", STEP_NAME):
                if _is_on_device(entries.get(name)) and not stays:
                    found.append((entries, name))
                elif isinstance(entries.get(name), Tensor):
                    entries[name] = entries[name].clone()
    for device in {entries[name].device for entries, name in found}:
        mine = [(entries, name) for entries, name in found if entries[name].device == device]
        steps = torch.stack([entries[name] for entries, name in mine]).cpu()
        for (entries, name), step in zip(mine, steps, strict=True):
            entries[name] = step.clone()


def _is_on_device(value: Any) -> bool:
    return isinstance(value, Tensor) and value.device.type != "cpu"


class LoadHooks:
    """What FastSAM does before and after the base's ``load_state_dict``, also where that is called directly.

    Args:
        base: the base optimizer; its hooks do not refer to it.
        method: the method.
        check_group: raises if a group's options are not possible.
    """

    def __init__(self, base: Optimizer, method: Method, check_group: Callable[[Mapping[str, Any]], None]) -> None:
        self._method, self._check_group = method, check_group
        self._given: dict[str, Any] = {}
        self._options: list[dict[str, Any]] = []
        base.register_load_state_dict_pre_hook(self._before)
        base.register_load_state_dict_post_hook(self._after)

    def _before(self, base: Optimizer, given: dict[str, Any]) -> dict[str, Any]:
        """Checks a state dict before anything is changed, and leaves out what is another SAM's.

        Raises:
            ValueError: the state is another method's, or an option is not possible.
            RuntimeError: a state tensor has another shape than its parameter.
        """
        groups = [dict(group) for group in given["param_groups"]]
        self._options = [split_options(group)[1] for group in base.param_groups]
        for group in groups:
            self._check_method(group.pop(METHOD, None))
        for group, mine in zip(groups, self._options, strict=False):
            self._check_group({**base.defaults, **mine, **group})
        state = {key: _without_foreign(entries) for key, entries in given["state"].items()}
        state = {key: entries for key, entries in state.items() if entries != {} or not given["state"][key]}
        self._given = {**given, "state": state, "param_groups": groups}
        if (update := FUSED.get(type(base))) is not None:
            _check_shapes(_pairs(groups, base), state, base.defaults, update)
        return dict(self._given)

    def _after(self, base: Optimizer) -> None:
        """Completes what torch has made of the state dict."""
        given = self._given
        self._given = {}
        fill_options(base.param_groups, self._options)
        for group, mine in zip(base.param_groups, self._options, strict=False):
            if is_schedule(mine.get("rho")):
                group["rho"] = mine["rho"]
        is_torchs = type(base).load_state_dict is Optimizer.load_state_dict
        for key, param, _, options in _pairs(given["param_groups"], base):
            saved = given["state"].get(key)
            for name, value in saved.items() if isinstance(saved, Mapping) else ():
                if not isinstance(value, Tensor):
                    continue
                entries = base.state[param]
                # torch casts what it loads to the parameter's dtype, in which a count may end at 256.
                if name.startswith("fastsam_") or (options.get("master_weights") and name != "step"):
                    entries[name] = value.to(param.device, copy=True)
                elif is_torchs and entries[name] is value and _may_be_cloned(value):
                    entries[name] = value.clone()  # two optimizers may load one dict

    def _check_method(self, name: str | None) -> None:
        # Checkpoints of older versions name every method.
        saved: Any = None if name is None else getattr(methods, name, None)
        if name is None or getattr(saved, "state_name", "") is None or name == type(self._method).__name__:
            return
        raise ValueError(
            f"the state belongs to the method {name}, this optimizer's method is {self._method}, which cannot use it; "
            f"to load it without the method's state, remove {METHOD!r} from its param_groups"
        )


_FOREIGN = frozenset({"old_p", "e_w"})
"""What other implementations of SAM keep in ``state`` during a step."""


def _may_be_cloned(value: Tensor) -> bool:
    """Whether a tensor is torch's own; a base's own kind (torchao's quantised states) may know no ``clone()``."""
    return type(value) is Tensor or is_distributed(value)


def _without_foreign(entries: Any) -> Any:
    if not isinstance(entries, Mapping):
        return entries  # an entry that is about no parameter
    return {name: value for name, value in entries.items() if name not in _FOREIGN}


def _pairs(saved: Groups, base: Optimizer) -> Iterator[tuple[Any, Tensor, Mapping[str, Any], Mapping[str, Any]]]:
    """Each saved key with its parameter, and their groups."""
    for theirs, mine in zip(saved, base.param_groups, strict=False):
        for key, param in zip(theirs["params"], mine["params"], strict=False):
            yield key, param, theirs, mine


def _check_shapes(
    pairs: Iterable[Any], state: Mapping[Any, Any], defaults: Mapping[str, Any], update: FusedUpdate
) -> None:
    """Raises RuntimeError if a state tensor has another shape than its parameter."""
    for index, (key, param, theirs, mine) in enumerate(pairs):
        names = (*update.state_names({**defaults, **mine, **theirs}).moments, MASTER_NAME)
        for name in names:
            value = state.get(key, {}).get(name)
            if value is not None and value.shape != param.shape:
                raise RuntimeError(
                    f"parameter {index} (shape {tuple(param.shape)}): its loaded state {name!r} has shape "
                    f"{tuple(value.shape)}"
                )
