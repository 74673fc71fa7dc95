"""An optimizer that is one object with its base: the same groups and state, checkpoints that either can load."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from itertools import chain
from typing import Any

from torch import Tensor
from torch.optim import Optimizer

from fastsam import methods
from fastsam.backends import resolve
from fastsam.bases import FUSED, FusedUpdate
from fastsam.checkpoint import STEP_COUNT, check_shapes, complete_loaded, complete_saved
from fastsam.engine import Engine
from fastsam.groups import GROUP_OPTIONS, check_parameters, tensors_of, with_defaults
from fastsam.policy import Policy
from fastsam.precision import check_precision


class BaseWrapper(Optimizer):
    """What FastSAM shares with ``base_optimizer``: parameter groups, state and checkpoints."""

    base_optimizer: Optimizer
    backend: str
    _engine: Engine
    _policy: Policy

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """The base optimizer's own parameter groups."""
        return self.base_optimizer.param_groups

    @param_groups.setter
    def param_groups(self, groups: list[dict[str, Any]]) -> None:
        self.base_optimizer.param_groups = groups

    @property
    def state(self) -> Any:
        """The base optimizer's own state."""
        return self.base_optimizer.state

    @state.setter
    def state(self, state: Any) -> None:
        self.base_optimizer.state = state

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
        self.base_optimizer.add_param_group(group)

    def state_dict(self) -> dict[str, Any]:
        """The base optimizer's: ``base`` alone can load it, and FastSAM loads the base's.

        Raises:
            RuntimeError: the weights are perturbed.
        """
        self._refuse_perturbed("state_dict()")
        saved = super().state_dict()
        complete_saved(saved, self.method, self._update, self._step_count())
        self._policy.save(saved["param_groups"])
        return saved

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Loads a state of FastSAM or of the base alone; what the latter lacks is kept as it is.

        Raises:
            RuntimeError: the weights are perturbed, or a state tensor has another shape than its parameter.
            ValueError: the parameter groups are others, or it is another method's.
        """
        self._refuse_perturbed("load_state_dict()")
        given: list[Mapping[str, Any]] = []
        # The last of the hooks: it sees what the others have made of the dict.
        last = self.register_load_state_dict_pre_hook(lambda _, state: given.append(state))
        self._load = lambda loaded: self._load_state(loaded, given[-1] if given else state_dict)
        try:
            super().load_state_dict(state_dict)
        finally:
            last.remove()
            del self._load

    def __getstate__(self) -> dict[str, Any]:
        self._refuse_perturbed("copying or pickling")
        names = ("base_optimizer", "defaults", "backend", "method", "_policy", "_replay_rng", "_statistics")
        return {name: getattr(self, name) for name in names}

    def __setstate__(self, state: dict[str, Any]) -> None:
        if "base_optimizer" in state:  # a copy or a pickle
            method = state.pop("method")
            super().__setstate__(state)
            self._engine = Engine(self.backend, method)
            self._engine.is_constructed = True
            return
        self._load(state)  # from Optimizer.load_state_dict: nothing has been changed yet

    def _load_state(self, loaded: dict[str, Any], given: Mapping[str, Any]) -> None:
        """Takes over what torch has cast (``loaded``) of a state dict (``given``); all of it or nothing."""
        statistics = self._policy.take_saved(loaded["param_groups"])
        complete_loaded(loaded, given, self.param_groups, self.method)
        for group in loaded["param_groups"]:
            self._check_group(group)
        if (update := self._update) is not None:
            check_shapes(loaded, lambda group: update.state_names({**self.defaults, **group}).moments)
        before = self.state, self.param_groups
        try:
            self.base_optimizer.__setstate__(loaded)
        except BaseException:
            self.state, self.param_groups = before
            raise
        self._policy.load(statistics)

    def __repr__(self) -> str:
        text = super().__repr__()
        return text.replace(type(self).__name__, f"{type(self).__name__} over {type(self.base_optimizer).__name__}", 1)

    # ---- small things ----

    def _parameters(self) -> Iterable[Tensor]:
        return chain.from_iterable(group["params"] for group in self.param_groups)

    @property
    def _update(self) -> FusedUpdate | None:
        """How the base runs on the backends; None: by its own ``step()``."""
        return FUSED.get(type(self.base_optimizer))

    def _check_backends(self, group: Mapping[str, Any]) -> None:
        for device_type in {p.device.type for p in tensors_of(group)}:
            resolve(self.backend, device_type)

    def _check_group(self, group: Mapping[str, Any]) -> None:
        base, fused = type(self.base_optimizer), self._update is not None
        check_precision(group, base, fused=fused)
        self.method.check_group(base, group, fused=fused)

    def _step_count(self) -> int:
        # A group that was added later, or put first, has no count yet.
        return max((int(group.get(STEP_COUNT, 0)) for group in self.param_groups), default=0)

    def _refuse_perturbed(self, what: str) -> None:
        if self._engine.perturbed:
            raise RuntimeError(
                f"{what} is not possible while the weights are perturbed; call second_step() or restore() first"
            )
