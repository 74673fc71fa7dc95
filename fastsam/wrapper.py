"""An optimizer that is one object with its base: the same groups and state, checkpoints that either can load."""

from __future__ import annotations

import functools
import weakref
from collections.abc import Iterable, Mapping
from itertools import chain
from typing import Any

from torch import Tensor
from torch.optim import Optimizer

from fastsam import methods
from fastsam.backends import resolve
from fastsam.bases import FUSED, FusedUpdate, fused_update
from fastsam.checkpoint import LoadHooks, complete_saved, step_count
from fastsam.engine import Engine
from fastsam.groups import (
    GROUP_OPTIONS,
    check_parameters,
    fill_options,
    give_options,
    lacks_options,
    split_options,
    tensors_of,
    with_defaults,
)
from fastsam.policy import Policy
from fastsam.precision import check_precision
from fastsam.runtime.batch_norm import RunningStatistics
from fastsam.runtime.scaler import ScalerAttribute

_living: weakref.WeakSet[BaseWrapper] = weakref.WeakSet()


class BaseWrapper(Optimizer):
    """What FastSAM shares with ``base_optimizer``: parameter groups, state and checkpoints."""

    base_optimizer: Optimizer
    backend: str
    _engine: Engine
    _policy: Policy
    _replay_rng: bool
    _statistics: RunningStatistics | None

    grad_scale = ScalerAttribute()
    found_inf = ScalerAttribute()

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """The base optimizer's own parameter groups."""
        return self.base_optimizer.param_groups

    @param_groups.setter
    def param_groups(self, groups: list[dict[str, Any]]) -> None:
        if self._engine.is_constructed:  # Optimizer.__init__ sets empty ones
            self.base_optimizer.param_groups = groups

    @property
    def state(self) -> Any:
        """The base optimizer's own state."""
        return self.base_optimizer.state

    @state.setter
    def state(self, state: Any) -> None:
        if self._engine.is_constructed:
            self.base_optimizer.state = state

    def __getattr__(self, name: str) -> Any:
        """What only the base has, such as the ``train()`` and ``eval()`` of schedule-free optimizers."""
        if name.startswith("_") or "base_optimizer" not in self.__dict__:
            raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")
        return getattr(self.base_optimizer, name)

    @property
    def perturbed(self) -> bool:
        """Whether the weights are perturbed: between ``first_step()`` and ``second_step()``."""
        return self._engine.perturbed

    @property
    def method(self) -> methods.Method:
        """The method, which cannot be changed: its state would be of no use to another."""
        return self._engine.method

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Adds a parameter group; what it does not set is taken from the constructor's options.

        Raises:
            RuntimeError: the weights are perturbed.
        """
        if not self._engine.is_constructed:
            return
        self._refuse_perturbed("add_param_group()")
        own = {name: self.defaults[name] for name in GROUP_OPTIONS}
        group = with_defaults(param_group, own, type(self.base_optimizer))
        check_parameters([*self.param_groups, group])
        self._check_backends(group)
        self._check_group({**self.base_optimizer.defaults, **group})
        self.base_optimizer.add_param_group(split_options(group)[0])
        give_options([self.param_groups[-1]], [group])
        self._engine.watch(self._parameters())

    def state_dict(self) -> dict[str, Any]:
        """The base optimizer's: ``base`` alone can load it, and FastSAM loads the base's.

        Raises:
            RuntimeError: the weights are perturbed.
        """
        self._refuse_perturbed("state_dict()")
        for before in self._optimizer_state_dict_pre_hooks.values():
            before(self)
        self._complete_groups()
        saved = self.base_optimizer.state_dict()
        update, is_initial = FUSED.get(type(self.base_optimizer)), self._engine.is_initial
        complete_saved(saved, self.method, update, step_count(self.param_groups), is_initial=is_initial)
        self._policy.save(saved.get("param_groups", ()))
        for after in self._optimizer_state_dict_post_hooks.values():
            changed = after(self, saved)
            saved = saved if changed is None else changed
        return saved

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Loads a state of FastSAM or of the base alone; what the latter lacks is kept as it is.

        Raises:
            RuntimeError: the weights are perturbed, or a state tensor has another shape than its parameter.
            ValueError: the parameter groups are others, or it is another method's.
        """
        self._refuse_perturbed("load_state_dict()")
        given = state_dict.copy()
        for before in self._optimizer_load_state_dict_pre_hooks.values():
            changed = before(self, given)
            given = given if changed is None else changed
        saved_groups = [dict(group) for group in given.get("param_groups", ())]
        statistics = self._policy.take_saved(saved_groups)
        if statistics is not None:
            given = {**given, "param_groups": saved_groups}
        self._complete_groups()
        state, groups = self.state, self.param_groups
        options = [split_options(group)[1] for group in groups]
        try:
            self.base_optimizer.load_state_dict(given)
        except BaseException:
            if self.param_groups is not groups:
                self.state, self.param_groups = state, groups
            raise
        self._policy.load(statistics)
        fill_options(self.param_groups, options)  # a load_state_dict of the base's own may run no hooks
        for loaded in self._optimizer_load_state_dict_post_hooks.values():
            loaded(self)

    def __getstate__(self) -> dict[str, Any]:
        self._refuse_perturbed("copying or pickling")
        if self._engine.sums.has_shard_groups:
            raise TypeError("an optimizer with shard_groups cannot be copied: a process group is this process's own")
        names = (
            "base_optimizer",
            "defaults",
            "backend",
            "method",
            "_policy",
            "_replay_rng",
            "_statistics",
            "_parallel",
        )
        return {name: getattr(self, name) for name in names}

    def __setstate__(self, state: dict[str, Any]) -> None:
        method = state.pop("method")
        self._engine = Engine(state["backend"], method)
        super().__setstate__(state)
        self._engine.is_constructed = True
        self._adopt_base()

    def __copy__(self) -> BaseWrapper:
        """A view of the same optimizer: it shares the base, so it must share the step's state."""
        view = object.__new__(type(self))
        view.__dict__.update(self.__dict__)
        return view

    def __repr__(self) -> str:
        text = super().__repr__()
        return text.replace(type(self).__name__, f"{type(self).__name__} over {type(self.base_optimizer).__name__}", 1)

    # ---- small things ----

    def _adopt_base(self) -> None:
        _living.add(self)
        base, method = self.base_optimizer, self.method
        self._engine.watch(self._parameters())
        LoadHooks(base, method, functools.partial(check_group, type(base), method, type(base) in FUSED))

    def _complete_groups(self) -> list[dict[str, Any]]:
        """The groups, with FastSAM's options also in those that the base was given, or has loaded, by itself."""
        groups = self.param_groups
        for group in groups:
            if lacks_options(group):
                fill_options([group], [{name: self.defaults[name] for name in GROUP_OPTIONS}])
        return groups

    def _parameters(self) -> Iterable[Tensor]:
        return chain.from_iterable(group["params"] for group in self.param_groups)

    @property
    def _update(self) -> FusedUpdate | None:
        """How the base runs on the backends; None: by its own ``step()``."""
        return fused_update(self.base_optimizer)

    def _check_backends(self, group: Mapping[str, Any]) -> None:
        for device_type in {p.device.type for p in tensors_of(group) if p.requires_grad}:
            resolve(self.backend, device_type)

    def _check_group(self, group: Mapping[str, Any]) -> None:
        check_group(type(self.base_optimizer), self.method, self._update is not None, group)

    def _refuse_perturbed(self, what: str) -> None:
        if self._engine.perturbed:
            raise RuntimeError(
                f"{what} is not possible while the weights are perturbed; call second_step() or restore() first"
            )


def refuse_groups_of_others(params: Any) -> None:
    """Raises TypeError if ``params`` are the live groups of a FastSAM with options that groups do not hold.

    ``type(optimizer)(optimizer.param_groups)``, as some distributed wrappers do it, would silently lose them.
    """
    for other in list(_living):
        if params is not other.param_groups:
            continue
        policy = other._policy
        plain = other.method == methods.SAM() and policy.interval == 1 and policy.schedule is None
        if not plain or other._replay_rng or other._statistics is not None:
            raise TypeError(
                f"these are the param_groups of another FastSAM, with method={other.method}, "
                f"interval={policy.interval}, schedule={policy.schedule}, replay_rng={other._replay_rng}, which groups "
                "do not hold; pass the same arguments, or parameters"
            )


def check_group(base: type[Optimizer], method: methods.Method, fused: bool, group: Mapping[str, Any]) -> None:
    """Raises if a group's options are not possible; ``fused``: whether the base runs on the backends."""
    check_precision(group, base, fused=fused)
    method.check_group(base, group, fused=fused)
