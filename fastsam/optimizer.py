"""FastSAM: arguments, parameter groups, the two phases, closures and the state_dict."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from fastsam import methods
from fastsam.backends import Backend, ClimbOptions, backend_of, check_name, foreach, grad_norms, resolve
from fastsam.backends.combination import Combination
from fastsam.bases import FUSED, FusedUpdate, check_base, unhooked_step
from fastsam.runtime.batch_norm import RunningStatistics
from fastsam.checkpoint import STEP_COUNT, check_shapes, complete_loaded, complete_saved
from fastsam.runtime.interrupts import DeferredInterrupts
from fastsam.tables.memory import as_real
from fastsam.method_steps import MethodSteps
from fastsam.tables.state import PreparedState, StateNames
from fastsam.groups import (
    GROUP_OPTIONS,
    as_groups,
    check_parameters,
    climb_options,
    completed,
    is_schedule,
    tensors_of,
)
from fastsam.precision import check_precision
from fastsam.runtime.replay_rng import GeneratorStates
from fastsam.tables import GRAD, STATE, TAKEN, TensorTable, TensorTables

Closure = Callable[[], Any]

PLAIN = methods.SAM()


class FastSAM(Optimizer):
    r"""Sharpness-Aware Minimization over any base optimizer, as fused multi-tensor operations.

    Every step climbs from the weights to the worst point nearby, takes the gradient there, goes back, and lets the base
    optimizer apply that gradient (Foret et al., ICLR 2021, https://arxiv.org/abs/2010.01412, equation 2):

    .. math::
        e(w) = \rho \, g / (\lVert g \rVert_2 + 10^{-12}), \qquad w \leftarrow \text{base}(w, \nabla L(w + e(w)))

    with the norm over all perturbed parameters together.

    Example::

        optimizer = FastSAM(model.parameters(), base=torch.optim.SGD, rho=0.05, lr=0.1, momentum=0.9)

        def closure():
            optimizer.zero_grad()
            loss = loss_fn(model(x), y)
            loss.backward()
            return loss

        loss = optimizer.step(closure)   # the first pass's loss, at w

    Args:
        params: parameters, named parameters, or dicts of parameter groups, as for any torch optimizer. A group may set
            ``rho``, ``adaptive``, ``perturb`` (False: it does not climb and has no part in the norm), ``rounding``,
            ``rounding_seed``, ``master_weights`` and any option of the base. With ``maximize=True`` (the base's option)
            the climb is downhill.
        base: a :class:`torch.optim.Optimizer` class. SGD, Adam and AdamW run fused with the restore, every other class
            by its own ``step()``.
        rho: radius of the neighbourhood, in the units of the weights' L2 norm; a number or a 0-dim tensor, >= 0; or a
            schedule: a function of the number of the step (from 0), or :class:`fastsam.methods.RhoByLR`.
        adaptive: ASAM's climb with T = \|w\|: ``e = rho * w^2 * g / || |w| g ||`` (Kwon et al., ICML 2021,
            https://arxiv.org/abs/2102.11600, without its eta, as in davda54/sam).
        method: one of :mod:`fastsam.methods`; :class:`fastsam.methods.SAM` by default.
        interval: climb in every ``interval``-th step only; the others are the base's, of one pass.
        model: if given, the running statistics of its batch-norm layers move in the first pass only.
        replay_rng: give both passes of ``step(closure)`` the same random numbers (dropout masks).
        rounding: how bfloat16 and float16 parameters and their state are stored: ``"nearest"``, or ``"stochastic"``, up
            or down at random so that the expected value is exact; nearest loses every step of less than half a unit in
            the last place, which at a common ``rho`` is most of the climb. Bases: SGD, Adam, AdamW.
        rounding_seed: 0 <= seed < 2^32, kept in ``param_groups``; the same one gives the same bits on every backend.
            None: from ``torch.initial_seed()``.
        master_weights: the weights proper of bfloat16 and float16 parameters are float32 tensors in ``state``, and so
            is the base's state; the parameters are their rounding to nearest. Training is then that of float32
            parameters with the same gradients; ``rounding`` applies to the climb alone, which needs no backup. A
            parameter that is not its master's rounding (somebody has written to it) replaces it. Bases: SGD, Adam,
            AdamW.
        backend: ``"auto"`` (the fastest that can run on the parameters' device), ``"reference"``, ``"foreach"``,
            ``"native"`` or ``"triton"``; a named one runs or raises.
        **base_kwargs: the base's options (``lr``, ``momentum``, ``weight_decay``, ...).

    Raises:
        TypeError: ``params`` or ``base`` is not of a supported kind, or the base does not know an option.
        ValueError: an option is out of range, or a parameter cannot be trained; the message names it.
        fastsam.backends.BackendUnavailable: the backend cannot run on a parameter's device.
    """

    # torch.amp.GradScaler then always calls step(), which reads grad_scale and found_inf itself: an overflow in the
    # second pass must not leave the weights climbed.
    _step_supports_amp_scaling = True

    _complete = False  # until the constructor is through

    def __init__(
        self,
        params: Any,
        base: type[Optimizer] = torch.optim.SGD,
        *,
        rho: float | Tensor | methods.RhoSchedule = 0.05,
        adaptive: bool = False,
        method: methods.Method = PLAIN,
        interval: int = 1,
        model: nn.Module | None = None,
        replay_rng: bool = False,
        rounding: str = "nearest",
        rounding_seed: int | None = None,
        master_weights: bool = False,
        backend: str = "auto",
        **base_kwargs: Any,
    ) -> None:
        check_base(base, base_kwargs, GROUP_OPTIONS)
        check_name(backend)
        methods.check_method(method)
        if isinstance(interval, bool) or not isinstance(interval, int) or interval < 1:
            raise ValueError(f"interval must be a whole number >= 1, got {interval!r}")
        if interval > 1 and method.climbs_by != GRAD:
            raise ValueError(f"interval={interval} saves no pass with {method}, whose climb needs none")
        if model is not None and not isinstance(model, nn.Module):
            raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
        own: dict[str, Any] = {"rho": rho, "adaptive": adaptive, "perturb": True, "rounding": rounding}
        own |= {"rounding_seed": rounding_seed, "master_weights": master_weights}
        own = completed({"params": []}, own, base)
        del own["params"]
        groups = [completed(group, own, base) for group in as_groups(params)]
        check_parameters(groups)
        self.backend = backend
        self._method, self._interval = method, interval
        for group in groups:
            self._check_backends(group)
        self.base_optimizer = base(groups, **base_kwargs)
        for group in self.base_optimizer.param_groups:
            self._check_group(group)
        self._replay_rng = replay_rng
        self._statistics = RunningStatistics(model) if model is not None else None
        self._start()
        # Optimizer.__init__ empties state and param_groups, which are the base's, and adds the groups once more.
        state, param_groups = self.base_optimizer.state, self.base_optimizer.param_groups
        super().__init__(param_groups, {**self.base_optimizer.defaults, **own})
        self.base_optimizer.state, self.base_optimizer.param_groups = state, param_groups
        self._complete = True

    def _start(self) -> None:
        self._tables = TensorTables()
        self._perturbed = False
        # How often this step has climbed, and whether it goes on without a climb: the present gradients are for step().
        self._ascents, self._is_single = 0, False
        self._steps = MethodSteps(self._method)

    # ---- one object with the base ----

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
        """Whether the weights are climbed: between ``first_step()`` and ``second_step()``."""
        return self._perturbed

    @property
    def method(self) -> methods.Method:
        """The method, which cannot be changed: what it keeps would be another's."""
        return self._method

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Adds a parameter group; what it does not set is taken from the constructor's options.

        Raises:
            RuntimeError: the weights are climbed.
        """
        if not self._complete:
            return
        self._refuse_perturbed("add_param_group()")
        own = {name: self.defaults[name] for name in GROUP_OPTIONS}
        group = completed(param_group, own, type(self.base_optimizer))
        check_parameters([*self.param_groups, group])
        self._check_backends(group)
        self._check_group({**self.base_optimizer.defaults, **group})
        self.base_optimizer.add_param_group(group)

    # ---- steps ----

    def step(
        self,
        closure: Closure | None = None,
        *,
        ascent_closure: Closure | None = None,
        closures: Sequence[Closure] | None = None,
    ) -> Any:
        """All passes and the update; or, after :meth:`first_step` and without a closure, the update.

        Args:
            closure: clears the gradients, computes the loss, calls ``backward()``, returns the loss; called once per
                pass, with gradients enabled. Between the passes gradients are set to None whatever it does.
            ascent_closure: takes ``closure``'s place in all passes but the last of a step that climbs (a part of the
                batch; or the whole data set: n-SAM).
            closures: in the place of ``closure``, one for each micro-batch: each climbs and is descended by itself, and
                one update takes the average of the gradients (m-sharpness: mSAM, https://arxiv.org/abs/2302.09693).

        Returns:
            What the first pass's closure returned (``closures``: a list of these); None in two-phase use.

        Raises:
            RuntimeError: there is neither a closure nor a climb to finish; or a GradScaler was handed a closure.
            ValueError: ``closures`` is empty, given beside another, or not possible with the method.
            Exception: whatever a closure raises; the weights, the state and ``perturbed`` are then as before the step.
        """
        if closures is not None:
            if closure is not None or ascent_closure is not None:
                raise ValueError("step(): closures stands for closure and ascent_closure, it cannot be beside them")
            return self._step_by_micro_batches(list(closures))
        if closure is None:
            if ascent_closure is not None:
                raise RuntimeError("step(): ascent_closure needs a closure for the second pass beside it")
            self._finish()
            return None
        self._check_closure_step()
        if not self._climbs_by_gradients():
            return self._climb_without_a_pass(closure)
        climbs = self._climbs_now()
        states = GeneratorStates(p.device for p in self._parameters()) if self._replay_rng else None
        ascent_closure = ascent_closure or closure
        with torch.enable_grad():
            loss = (ascent_closure if climbs else closure)()
        if self._has_gradients():
            if not climbs:
                self._descend_at_once()
            elif states is None:
                self._climb_and_descend(closure, ascent_closure)
            else:
                self._climb_and_descend(states.replayed(closure), states.replayed(ascent_closure))
        return loss

    def _finish(self) -> None:
        try:
            if self._is_single:
                self._descend_at_once()
                return
            if not self._perturbed:
                raise RuntimeError(
                    "step() needs a closure; in a loop without one, call first_step() after the first backward and "
                    "second_step() (or step()) after the second"
                )
            if self._ascents < self._method.ascents:
                raise RuntimeError(
                    f"{self._method} climbs {self._method.ascents} times: call first_step() after each of so many "
                    f"backward passes; this step has had {self._ascents}"
                )
            self._descend()
        except BaseException:
            self._forget_scaler()
            raise

    def _forget_scaler(self) -> None:
        # GradScaler.step takes these back itself, but not after an exception: the next step would use them again.
        for name in ("grad_scale", "found_inf"):
            self.__dict__.pop(name, None)

    def _check_closure_step(self) -> None:
        self._refuse_perturbed("step(closure)")
        if getattr(self, "found_inf", None) is not None:
            self._forget_scaler()
            raise RuntimeError(
                "GradScaler.step(optimizer, closure) is not supported: scale, backward, optimizer.first_step(), scale, "
                "backward again, then scaler.step(optimizer) without a closure"
            )

    def _climb_and_descend(self, closure: Closure, ascent_closure: Closure | None = None) -> None:
        """The rest of a step, from the first pass's gradients on. Until the update begins, an exception undoes it."""
        try:
            self._climb_all_the_way(ascent_closure or closure)
            with torch.enable_grad():
                closure()
            self._descend()
        except BaseException:
            self.restore()
            raise

    def _climb_all_the_way(self, ascent_closure: Closure) -> None:
        self._climb()
        for _ in range(1, self._method.ascents):
            self._clear_grads()
            with torch.enable_grad():
                ascent_closure()
            self._climb()
        self._clear_grads()

    def _climb_without_a_pass(self, closure: Closure) -> Any:
        """A step of a method whose climb needs no gradient."""
        try:
            self._climb()
            with torch.enable_grad():
                loss = closure()
            if self._has_gradients():
                self._descend()
            else:
                self.restore()
        except BaseException:
            self.restore()
            raise
        return loss

    def _step_by_micro_batches(self, closures: list[Closure]) -> list[Any]:
        if not closures:
            raise ValueError("step(): closures is empty; it must hold one closure for each micro-batch")
        if not self._climbs_by_gradients() or self._method.takes:
            raise ValueError(f"step(closures=...) is not possible with {self._method}: its steps cannot be averaged")
        self._check_closure_step()
        losses: list[Any] = []
        sums: dict[Tensor, Tensor] = {}
        try:
            for closure in closures:
                if losses:
                    self._clear_grads()
                with torch.enable_grad():
                    losses.append(closure())
                if self._climbs_now() and self._has_gradients():
                    self._climb_all_the_way(closure)
                    with torch.enable_grad():
                        closure()
                    self.restore()
                self._add_grads(sums)
            for param in self._parameters():
                param.grad = sums.get(param)
            if sums:
                torch._foreach_mul_(list(sums.values()), 1 / len(closures))
                self._descend_at_once()
        except BaseException:
            self.restore()
            raise
        return losses

    def _add_grads(self, sums: dict[Tensor, Tensor]) -> None:
        """Adds the present gradients to ``sums``; the first ones are taken."""
        present = {p: p.grad for p in self._parameters() if p.grad is not None}
        known = [p for p in present if p in sums]
        if known:
            torch._foreach_add_([sums[p] for p in known], [present[p] for p in known])
        for param in present.keys() - sums.keys():
            grad = present[param]
            sums[param] = grad.clone() if grad._base is not None else grad

    def first_step(self, zero_grad: bool = True) -> bool:
        """Climbs: call it after the first backward; then compute the loss and its gradients again.

        Where a method climbs K times a step, call it after each of K backward passes. Where the climb needs no gradient
        (:class:`fastsam.methods.MomentumSAM`, :class:`fastsam.methods.RandomSAM`), call it before the forward pass.

        Args:
            zero_grad: set the gradients to None afterwards. If the method needs them for the update, they are taken:
                ``.grad`` is None in any case.

        Returns:
            Whether the gradients must be computed once more. If not, they are there (or the only pass is still to
            come): ``step()`` is the update.

        Raises:
            RuntimeError: the weights are climbed already, or no parameter has a gradient.
        """
        if self._is_single or not (self._perturbed and self._ascents < self._method.ascents):
            self._refuse_perturbed("first_step()")
        if not self._climbs_by_gradients():
            self._climb()
            if zero_grad:
                self._clear_grads()
            return False
        if not self._climbs_now():
            if not self._has_gradients():
                raise RuntimeError("no parameter has a gradient; call backward() first")
            self._is_single = True
            return False
        self._climb()
        if zero_grad:
            self._clear_grads()
        return True

    def second_step(self, zero_grad: bool = False) -> None:
        """Restores the weights and lets the base apply the present gradients; calls :meth:`step`.

        Args:
            zero_grad: set the gradients to None afterwards.

        Raises:
            RuntimeError: there was no ``first_step()``.
        """
        if not (self._perturbed or self._is_single):
            raise RuntimeError("second_step() without first_step()")
        self.step()
        if zero_grad:
            self._clear_grads()

    @torch.no_grad()
    def restore(self) -> None:
        """Gives the climb up: the weights come back bit for bit, nothing is updated. Otherwise a no-op."""
        self._is_single = False
        if not self._perturbed:
            return
        with DeferredInterrupts():
            moved = any(table.changed() for table in self._tables)
            for table in self._tables:
                if not table.climbed:
                    continue
                if moved:
                    table.undo_elsewhere()
                else:
                    self._backend(table).restore_(table)
                    table.scatter(table.climbing)
                table.climbed = False
            self._climb_is_over()
            if moved:
                self._tables.drop()

    # ---- the two phases ----

    @torch.no_grad()
    def _climb(self) -> None:
        again = self._perturbed
        for group in self.param_groups:
            self._check_group(group)
        with self._tables.holding_grads():
            if again:
                self._read_grads_again()
                tables = list(self._tables)
            else:
                tables = self._tables.read_grads(self.param_groups)
            self._climb_tables(tables, again)
            if self._method.takes:
                for table in tables:
                    table.take_grads()
        if self._method.takes:
            self._clear_grads()
        torch.clear_autocast_cache()

    def _climb_tables(self, tables: list[TensorTable], again: bool) -> None:
        if self._climbs_by_gradients() and not any(table.present for table in tables):
            raise RuntimeError("no parameter has a gradient; call backward() first")
        options = self._climb_options()
        backends = [self._backend(table) for table in tables]
        if not again:
            self._begin_climb(tables)
        combined = self._method.climb_form(again) is not None
        if combined:
            combinations = self._steps.climb_combinations(backends, tables, options, again)
        else:
            norms = grad_norms(backends, tables, options)
            if self._method.takes:
                self._steps.note_norms(norms)
        if self._statistics is not None and not again and self._climbs_by_gradients():
            self._statistics.save()
        with DeferredInterrupts():
            self._perturbed = True
            try:
                for index, (backend, table) in enumerate(zip(backends, tables, strict=True)):
                    if combined:
                        backend.perturb_by_(table, combinations[index])
                    else:
                        backend.perturb_(table, norms[table.device], options)
                    table.climbed = True
                    table.scatter(table.climbing)
            except BaseException:
                self.restore()
                raise
            self._ascents += 1

    def _begin_climb(self, tables: list[TensorTable]) -> None:
        perturb = [bool(group["perturb"]) for group in self.param_groups]
        names = self._state_names()
        if self._method.climbs_by == TAKEN:
            assert isinstance(self._method, methods.RandomSAM)
            self._steps.lend_random(tables, self._method.seed, self._step_count())
        if self._method.climbs_by == STATE:
            self._bind_state(tables, [table.prepare_state(self.state, names, among=[]) for table in tables])
        for table in tables:
            if self._method.climbs_by == GRAD:
                table.begin_climb(perturb, self.state, names)
            else:
                direction = table.row(self._method.climbs_by)
                among = [i for i, tensor in enumerate(direction) if tensor is not None]
                table.begin_climb(perturb, self.state, names, among)
            if self._method.kept is not None:
                table.keep(self.state, self._method.kept, [])

    def _read_grads_again(self) -> None:
        for table in self._tables:
            if not table.read_grads():
                raise RuntimeError(
                    f"{table.name(table.changed()[0])} was moved, cast or given other memory between the two "
                    "passes; call restore() to give the climb up"
                )

    @torch.no_grad()
    def _descend(self) -> None:
        with self._tables.holding_grads():
            self._read_grads_again()
            if self._update is not None:
                self._descend_fused(self._update)
            elif self._method.descent_form(self._ascents > 0) is not None:
                self._hand_combinations_over()
        if self._update is None:
            self._descend_unfused()

    @torch.no_grad()
    def _descend_at_once(self) -> None:
        """The update with the present gradients, where this step does not climb."""
        with self._tables.holding_grads():
            for table in self._tables.read_grads(self.param_groups):
                table.begin_climb([False] * len(self.param_groups), self.state, self._state_names())
                if self._method.kept is not None:
                    table.keep(self.state, self._method.kept, [])
        self._descend()

    def _descend_fused(self, update: FusedUpdate) -> None:
        options = [update.options(group) for group in self.param_groups]
        names = self._state_names()
        scale, found_inf = getattr(self, "grad_scale", None), getattr(self, "found_inf", None)
        for table in self._tables:
            table.gather()
        combinations = self._combinations(scale)
        prepared = [table.prepare_state(self.state, names) for table in self._tables]
        with DeferredInterrupts():
            self._bind_state(list(self._tables), prepared)
            for index, table in enumerate(self._tables):
                operation = getattr(self._backend(table), update.operation)
                combination = () if combinations is None else (combinations[index],)
                operation(table, options, _beside(scale, table), _beside(found_inf, table), *combination)
                table.climbed = False
                table.scatter(table.written, state=True)
            self._count_step()
            self._climb_is_over()

    def _bind_state(self, tables: list[TensorTable], prepared: Sequence[PreparedState | None]) -> None:
        for table, missing in zip(tables, prepared, strict=True):
            if missing is not None:
                table.publish_state(self.state, missing)
        if any(missing is not None for missing in prepared):
            for table in tables:
                table.note_state(self.state)

    def _combinations(self, scale: Any) -> list[Combination] | None:
        """What the base is given in the gradients' place; None: the gradients."""
        climbed = self._ascents > 0
        form = self._method.descent_form(climbed)
        if form is None:
            return None
        if form.keeps and self._method.kept is not None:
            for table in self._tables:
                table.keep(self.state, self._method.kept, [i for i, t in enumerate(table.taken) if t is not None])
        tables = list(self._tables)
        backends = [self._backend(table) for table in tables]
        scales = [_beside(scale, table) for table in tables]
        return self._steps.descent_combinations(
            backends, tables, self._climb_options(), self.param_groups, climbed, scales
        )

    def _hand_combinations_over(self) -> None:
        """For bases that read ``.grad``; the weights are restored afterwards."""
        found_inf = getattr(self, "found_inf", None)
        if found_inf is not None and float(found_inf) != 0:
            return
        combinations = self._combinations(None)
        assert combinations is not None
        for table, combination in zip(self._tables, combinations, strict=True):
            foreach.combine_(table, combination)
            for i in table.present:
                grad, laid_out = table.params[i].grad, table.grads[i]
                if grad is not None and laid_out is not None and as_real(grad).data_ptr() != laid_out.data_ptr():
                    as_real(grad).copy_(laid_out)

    def _descend_unfused(self) -> None:
        scale, found_inf = getattr(self, "grad_scale", None), getattr(self, "found_inf", None)
        self.restore()
        if found_inf is not None and float(found_inf) != 0:
            self._count_step()
            return
        with DeferredInterrupts():
            if scale is not None:
                inverse = scale.double().reciprocal().float()
                for param in self._parameters():
                    if param.grad is not None:
                        param.grad.mul_(inverse.to(param.grad.device))
            with self._hiding_kept():
                unhooked_step(self.base_optimizer)
            self._count_step()

    @contextmanager
    def _hiding_kept(self) -> Iterator[None]:
        """A block in which ``state`` holds the base's own entries alone: an empty one tells it of a first step."""
        name = self._method.kept
        kept = {} if name is None else {p: e.pop(name) for p, e in self.state.items() if name in e}
        try:
            yield
        finally:
            for param, tensor in kept.items():
                self.state[param][name] = tensor

    def _climb_is_over(self) -> None:
        self._perturbed, self._is_single, self._ascents = False, False, 0
        for table in self._tables:
            table.drop_taken()
        if self._statistics is not None:
            self._statistics.restore()
        torch.clear_autocast_cache()

    # ---- checkpoints and copies ----

    def state_dict(self) -> dict[str, Any]:
        """The base optimizer's: ``base`` alone can load it, and FastSAM loads the base's.

        Raises:
            RuntimeError: the weights are climbed.
        """
        self._refuse_perturbed("state_dict()")
        saved = super().state_dict()
        complete_saved(saved, self._method, self._update, self._step_count())
        return saved

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Loads a state of FastSAM or of the base alone; what the latter lacks is kept as it is.

        Raises:
            RuntimeError: the weights are climbed, or a state tensor has another shape than its parameter.
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
        names = (
            "base_optimizer",
            "defaults",
            "backend",
            "_method",
            "_interval",
            "_replay_rng",
            "_statistics",
            "_complete",
        )
        return {name: getattr(self, name) for name in names}

    def __setstate__(self, state: dict[str, Any]) -> None:
        if "base_optimizer" in state:  # a copy or a pickle
            super().__setstate__(state)
            self._start()
            return
        self._load(state)  # from Optimizer.load_state_dict: nothing has been changed yet

    def _load_state(self, loaded: dict[str, Any], given: Mapping[str, Any]) -> None:
        """Takes over what torch has cast (``loaded``) of a state dict (``given``); all of it or nothing."""
        complete_loaded(loaded, given, self.param_groups, self._method)
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

    def _state_names(self) -> list[StateNames]:
        return [] if self._update is None else [self._update.state_names(group) for group in self.param_groups]

    def _backend(self, table: TensorTable) -> Backend:
        return backend_of(table, self._resolve(table.device.type))

    def _resolve(self, device_type: str) -> Backend:
        # Not methods=False: to the cache of resolve() that would be another question, logged once more.
        more = {"methods": True} if self._method.is_combined else {}
        return resolve(self.backend, device_type, **more)

    def _check_backends(self, group: Mapping[str, Any]) -> None:
        for device_type in {p.device.type for p in tensors_of(group)}:
            self._resolve(device_type)

    def _check_group(self, group: Mapping[str, Any]) -> None:
        check_precision(group, type(self.base_optimizer), fused=self._update is not None)
        self._method.check_group(type(self.base_optimizer), group)

    def _has_gradients(self) -> bool:
        return any(p.grad is not None for p in self._parameters())

    # ---- which step this is ----

    def _climbs_by_gradients(self) -> bool:
        return self._method.climbs_by == GRAD

    def _climbs_now(self) -> bool:
        step = self._step_count()
        return step % self._interval == 0 and self._method.climbs(step)

    def _step_count(self) -> int:
        return int(self.param_groups[0].get(STEP_COUNT, 0))

    def _count_step(self) -> None:
        schedules = any(is_schedule(group["rho"]) for group in self.param_groups)
        if self._interval > 1 or self._method.counts or schedules:
            count = self._step_count() + 1
            for group in self.param_groups:
                group[STEP_COUNT] = count

    def _climb_options(self) -> list[ClimbOptions]:
        step = self._step_count()
        return [climb_options(group, step) for group in self.param_groups]

    def _clear_grads(self) -> None:
        for param in self._parameters():
            param.grad = None

    def _refuse_perturbed(self, what: str) -> None:
        if self._perturbed:
            raise RuntimeError(
                f"{what} is not possible while the weights are climbed; call second_step() or restore() first"
            )


def _beside(scalar: Any, table: TensorTable) -> Tensor | None:
    """GradScaler's scalar on the table's device."""
    if scalar is None:
        return None
    # A number where the scaler saw no gradient at all.
    tensor = torch.as_tensor(scalar, dtype=torch.float32)
    return tensor.to(table.device, non_blocking=table.device.type != "cpu").reshape(())
