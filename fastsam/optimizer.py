"""FastSAM: arguments, the two phases of a step, closures. Half of this file is the public docstrings."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from fastsam import methods
from fastsam.arguments import check_count
from fastsam.backends import check_name
from fastsam.bases import check_base, complete_base
from fastsam.distributed import ShardGroups, check_shards
from fastsam.engine import Engine
from fastsam.groups import (
    GROUP_OPTIONS,
    as_groups,
    check_parameters,
    give_options,
    split_options,
    tensors_of,
    with_defaults,
)
from fastsam.last_ascent import LastAscent, average, record
from fastsam.micro_batches import GradientSums
from fastsam.missing_grads import refuse_missing_grads, warn_of_missing_grads
from fastsam.phases import Closure, StepPhases
from fastsam.policy import Policy
from fastsam.runtime.batch_norm import RunningStatistics
from fastsam.runtime.compile import untraced
from fastsam.runtime.interrupts import DeferredInterrupts
from fastsam.runtime.parallel_models import ParallelModel
from fastsam.runtime.zero import drop_arguments, zero_around
from fastsam.schedules import RhoSchedule, Schedule, check_schedule
from fastsam.wrapper import refuse_groups_of_others

PLAIN = methods.SAM()


class FastSAM(StepPhases):
    r"""Sharpness-Aware Minimization over any base optimizer, as fused multi-tensor operations.

    Every step moves from the weights to the worst point nearby, takes the gradient there, restores the weights, and
    lets the base optimizer apply that gradient (Foret et al., ICLR 2021, https://arxiv.org/abs/2010.01412, equation 2):

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
            ``rho``, ``adaptive``, ``perturb`` (False: it is not perturbed and has no part in the norm), ``rounding``,
            ``rounding_seed``, ``master_weights`` and any option of the base. With ``maximize=True`` (the base's option)
            the ascent goes downhill.
        base: a :class:`torch.optim.Optimizer` class. SGD, Adam and AdamW run fused with the restore, every other class
            by its own ``step()``.
        rho: radius of the neighbourhood, in the units of the weights' L2 norm; a number or a 0-dim tensor, >= 0; or a
            schedule: a function of the number of the step (from 0), or :class:`fastsam.methods.RhoByLR`. If it is the
            number 0 in every perturbed group, the step is the base's, of one pass.
        adaptive: ASAM's ascent with T = \|w\|: ``e = rho * w^2 * g / || |w| g ||`` (Kwon et al., ICML 2021,
            https://arxiv.org/abs/2102.11600, without its eta, as in davda54/sam).
        method: one of :mod:`fastsam.methods`; :class:`fastsam.methods.SAM` by default.
        interval: perturb in every ``interval``-th step only; the others are the base's, of one pass.
        schedule: perturb only in the steps for which this function of the step's number (from 0) returns True:
            :class:`fastsam.schedules.Late`, :class:`fastsam.schedules.Early`, a function of your own; or
            :class:`fastsam.schedules.AESAM`, which decides by the gradient's norm.
        model: if given, the running statistics of its batch-norm layers move in the first pass only, and FSDP2's
            unsharded copies of weights are freed whenever the weights change.
        replay_rng: give both passes of ``step(closure)`` the same random numbers (dropout masks).
        rounding: how bfloat16 and float16 parameters and their state are stored: ``"nearest"``, or ``"stochastic"``, up
            or down at random so that the expected value is exact; nearest loses every step of less than half a unit in
            the last place, which at a common ``rho`` is most of the perturbation. Bases: SGD, Adam, AdamW.
        rounding_seed: 0 <= seed < 2^32, kept in ``param_groups``; the same one gives the same bits on every backend.
            None: 0, so that the replicas of a model round alike.
        master_weights: bfloat16 and float16 parameters have float32 master weights in ``state``, and so is the base's
            state in float32; the parameters are the masters' rounding to nearest. Training is then that of float32
            parameters with the same gradients; ``rounding`` applies to the perturbation alone, which needs no backup. A
            parameter that is not its master's rounding (it was written to from outside) replaces it. Bases: SGD, Adam,
            AdamW.
        shard_groups: for parameters of which other ranks hold the rest and that are not DTensors (pipeline stages,
            FSDP1, Megatron's tensor parallelism, ZeroRedundancyOptimizer around this one): the process groups over
            which the norm must be added up; one, several, or a function of a parameter that returns some. DTensors
            (``fully_shard``, ``parallelize_module``) need nothing.
        local_ascent: with ``model``, a DistributedDataParallel module: each rank ascends by the gradient of its own
            batch (the paper's m-sharpness), so that ``step(closure)`` averages gradients once, not twice. Not possible
            with methods that use the first pass's gradients or norm in the descent.
        backend: ``"auto"`` (the fastest that can run on the parameters' device), ``"reference"``, ``"foreach"``,
            ``"native"`` or ``"triton"``; a named one runs or raises.
        **base_kwargs: the base's options (``lr``, ``momentum``, ``weight_decay``, ...).

    Raises:
        TypeError: ``params`` or ``base`` is not of a supported kind, or the base does not know an option.
        ValueError: an option is out of range, or a parameter cannot be trained; the message names it.
        fastsam.backends.BackendUnavailable: the backend cannot run on a parameter's device.
    """

    # torch.amp.GradScaler then always calls step(), which reads grad_scale and found_inf itself: an overflow in the
    # second pass must not leave the weights perturbed.
    _step_supports_amp_scaling = True

    last_ascent: LastAscent | None = None
    """What the last ``step(closure)`` has measured: ``loss`` at w, ``perturbed_loss`` at w + e, ``grad_norm``.

    Detached tensors, on the device (reading them waits for it). With ``closures=`` the means over the micro-batches; in
    distributed training the losses are this rank's. Without ``replay_rng=True`` the difference of the losses contains
    that of two dropout masks. None in two-phase use without :meth:`note_losses`, with ``ascent_closure=`` (the losses
    are of different data), after a step without an ascent, with methods that have no pass at w, and if the closure does
    not return its loss. In a captured step the tensors belong to the graph: each replay writes them.
    """

    def __init__(
        self,
        params: Any,
        base: type[Optimizer] = torch.optim.SGD,
        *,
        rho: float | Tensor | RhoSchedule = 0.05,
        adaptive: bool = False,
        method: methods.Method = PLAIN,
        interval: int = 1,
        schedule: Schedule | None = None,
        model: nn.Module | None = None,
        replay_rng: bool = False,
        rounding: str = "nearest",
        rounding_seed: int | None = None,
        master_weights: bool = False,
        shard_groups: ShardGroups = None,
        local_ascent: bool = False,
        backend: str = "auto",
        **base_kwargs: Any,
    ) -> None:
        check_base(base, base_kwargs, GROUP_OPTIONS)
        check_name(backend)
        methods.check_method(method)
        check_count("interval", interval)
        check_schedule(schedule)
        if interval > 1 and not method.needs_first_pass:
            raise ValueError(f"interval={interval} saves no pass with {method}, whose ascent needs none")
        if model is not None and not isinstance(model, nn.Module):
            raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
        own: dict[str, Any] = {"rho": rho, "adaptive": adaptive, "perturb": True, "rounding": rounding}
        own |= {"rounding_seed": rounding_seed, "master_weights": master_weights}
        own = with_defaults({"params": []}, own, base)
        del own["params"]
        zero = zero_around()
        drop_arguments(zero, params, _OF_THE_WHOLE)
        groups = [with_defaults(group, own, base) for group in as_groups(params)]
        if method is PLAIN and interval == 1 and schedule is None and model is None and not replay_rng:
            refuse_groups_of_others(params)
        check_parameters(groups)
        check_shards((p for group in groups for p in tensors_of(group)), shard_groups, method, zero)
        self.backend = backend
        self._policy, self._replay_rng = Policy(interval, schedule), replay_rng
        self._policy.check(method, local_ascent)
        self._parallel = ParallelModel(model, local_ascent, method, zero)
        self._statistics = RunningStatistics(model) if model is not None else None
        self._engine = Engine(backend, method, shard_groups)
        for group in groups:
            self._check_backends(group)
        # The base may check what its groups hold: it is shown its own options alone.
        self.base_optimizer = base([split_options(group)[0] for group in groups], **base_kwargs)
        complete_base(self.base_optimizer)
        give_options(self.base_optimizer.param_groups, groups)
        for group in self.base_optimizer.param_groups:
            self._check_group(group)
        super().__init__(self.base_optimizer.param_groups, {**self.base_optimizer.defaults, **own})
        self._engine.is_constructed = True
        self._parallel.watch_events(self._engine)
        self._adopt_base()

    # ---- steps ----

    @untraced
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
                pass, with gradients enabled. Between the passes gradients are set to None (views of a buffer: to
                zeros) whatever it does. While the weights are perturbed it is the second pass (a wrapper's closure
                that does nothing is allowed: the gradients are there then).
            ascent_closure: takes ``closure``'s place in all passes but the last of a step with an ascent (a part of the
                batch; or the whole data set: n-SAM).
            closures: in the place of ``closure``, one for each micro-batch: each has an ascent and a second pass of its
                own, and one update takes the average of the gradients (m-sharpness: mSAM,
                https://arxiv.org/abs/2302.09693).

        Returns:
            What the first pass's closure returned (``closures``: a list of these); None in two-phase use.

        Raises:
            RuntimeError: there is neither a closure nor a perturbation to finish; or a GradScaler was handed a closure.
            ValueError: ``closures`` is empty, given beside another, or not possible with the method.
            Exception: whatever a closure raises; the weights, the state and ``perturbed`` are then as before the step.
        """
        engine = self._engine
        engine.refuse_displaced()
        has_begun = (engine.perturbed or engine.is_single) and not engine.is_running
        if not has_begun:
            self.last_ascent = None
        if closures is not None:
            if closure is not None or ascent_closure is not None:
                raise ValueError("step(): closures stands for closure and ascent_closure, it cannot be beside them")
            return self._step_by_micro_batches(list(closures))
        if closure is None:
            if ascent_closure is not None:
                raise RuntimeError("step(): ascent_closure needs a closure for the second pass beside it")
            self._finish()
            return None
        if has_begun:
            return self._finish_with(closure)
        self._check_closure_step()
        if not self.method.needs_first_pass:
            return self._step_of_one_pass(closure)
        return self._step_of_two_passes(closure, ascent_closure)

    def _step_of_two_passes(self, closure: Closure, ascent_closure: Closure | None) -> Any:
        """First pass at w; norm, perturb; second pass at w + e; restore, update."""
        first = self._parallel.locally(ascent_closure or closure)
        ascends = self._ascends_now()
        states = self._generator_states()
        loss = self._run_first(first if ascends else closure, ascends)
        if not self._has_gradients():
            if ascends and ascent_closure is not None:
                raise RuntimeError("no parameter has a gradient; ascent_closure must call backward()")
            warn_of_missing_grads(self._parameters())
            return loss
        if states is not None and ascends:
            closure, first = states.replayed(closure), states.replayed(first)
        measured = None
        with self._undone_by_exceptions():
            if self._still_ascends(ascends):
                self._ascend_all_the_way(first)
                perturbed_loss = self._run_second(closure)
                if ascent_closure is None:
                    measured = record(loss, perturbed_loss, self._engine.grad_norm)
            elif ascends and ascent_closure is not None:
                self._clear_grads()
                self._run_second(closure)
            self._descend()
        self.last_ascent = measured
        return loss

    def _step_of_one_pass(self, closure: Closure) -> Any:
        """A step of a method whose ascent needs no gradient."""
        with self._undone_by_exceptions():
            if self._ascends_now():
                self._ascend()
            self._clear_grads()
            loss = self._engine.run(closure)
            if self._has_gradients():
                self._descend()
            else:
                self.restore()
                warn_of_missing_grads(self._parameters())
        return loss

    def _step_by_micro_batches(self, closures: list[Closure]) -> list[Any]:
        if not closures:
            raise ValueError("step(): closures is empty; it must hold one closure for each micro-batch")
        descent = self.method.descent_form(ascended=True)
        if reason := self.method.why_no_micro_batches:
            raise ValueError(f"step(closures=...) is not possible with {self.method}, {reason}")
        if self._policy.statistics is not None:
            raise ValueError(
                f"step(closures=...) is not possible with {self._policy.schedule}: the gradient at w is not computed"
            )
        self._check_closure_step()
        losses: list[Any] = []
        measured: list[LastAscent | None] = []
        sums = GradientSums()
        with self._undone_by_exceptions():
            for number, closure in enumerate(closures):
                if losses:
                    self._clear_grads()
                states = self._generator_states()
                ascends = self._ascends_now()
                first = self._parallel.locally(closure) if ascends else closure
                losses.append(self._engine.run(first) if losses else self._run_first(first, ascends))
                if ascends and self._has_gradients():
                    again = closure if states is None else states.replayed(closure)
                    self._ascend_all_the_way(self._parallel.locally(again), number)
                    measured.append(record(losses[-1], self._run_second(again), self._engine.grad_norm))
                    self._bring_back(combine=descent is not None)
                sums.add(self._parameters())
            if sums.hand_over(self._parameters(), len(closures)):
                self._descend()
            else:
                warn_of_missing_grads(self._parameters())
        self.last_ascent = average(measured)
        return losses

    @untraced
    def first_step(self, zero_grad: bool = True) -> bool:
        """Perturbs: call it after the first backward; then compute the loss and its gradients again.

        Where a method ascends K times a step, call it after each of K backward passes. Where the ascent needs no
        gradient (:class:`fastsam.methods.MomentumSAM`, :class:`fastsam.methods.RandomSAM`), call it before the forward
        pass.

        Args:
            zero_grad: set the gradients to None afterwards (to zeros, where they are views of a buffer). If the method
                needs them for the update, this is done in any case.

        Returns:
            Whether the gradients must be computed once more. If not, they are there (or the only pass is still to
            come): ``step()`` is the update.

        Raises:
            RuntimeError: the weights are perturbed already, or no parameter has a gradient.
        """
        engine = self._engine
        if self._parallel.local_ascent:
            raise RuntimeError(
                "local_ascent=True is for step(closure); in a loop of two phases leave it out, and enter "
                "model.no_sync() around the first forward and backward"
            )
        engine.refuse_displaced()
        engine.check_writes()
        self.last_ascent = None
        if engine.is_single or not (engine.perturbed and engine.ascents < self.method.ascents):
            self._refuse_perturbed("first_step()")
        is_first = not engine.perturbed
        if self.method.needs_first_pass and is_first and not self._has_gradients():
            refuse_missing_grads(self._parameters())
        if is_first and not self._still_ascends(self._ascends_now()):
            engine.is_single = True
            return False
        self._ascend()
        if zero_grad:
            self._clear_grads()
        return self.method.needs_first_pass

    def note_losses(self, loss: Any, perturbed_loss: Any, scale: Tensor | None = None) -> None:
        """In two-phase use, before the update: the losses of both passes, for :attr:`last_ascent`.

        Args:
            loss: the first pass's.
            perturbed_loss: the last pass's.
            scale: the factor of the gradients that :meth:`first_step` was given (a GradScaler's), if there is one.
        """
        norm = self._engine.grad_norm
        self.last_ascent = record(loss, perturbed_loss, norm if norm is None or scale is None else norm / scale)

    @untraced
    def second_step(self, zero_grad: bool = False) -> None:
        """Restores the weights and lets the base apply the present gradients; calls :meth:`step`.

        Args:
            zero_grad: set the gradients to None afterwards.

        Raises:
            RuntimeError: there was no ``first_step()``.
        """
        if not (self._engine.perturbed or self._engine.is_single):
            raise RuntimeError("second_step() without first_step()")
        self.step()
        if zero_grad:
            self._clear_grads()

    @untraced
    def restore(self) -> None:
        """Gives the ascent up: the weights come back bit for bit, nothing is updated. Otherwise a no-op."""
        self._engine.is_single = False
        self._policy.discard()
        if self._engine.perturbed:
            self._bring_back()
            self._parallel.abandon_pass()

    @contextmanager
    def perturb_by(self, tensors: Iterable[Tensor | None]) -> Iterator[None]:
        """A block in which given tensors are added to the weights; at its end the weights are back bit for bit.

        For measurements around w: no gradient, no state and no ``rho`` are needed, and parameters of groups with
        ``perturb=False`` move, too. The block may compute losses and gradients, but no step. With ``model=`` the
        running statistics of its batch-norm layers are preserved.

        Args:
            tensors: one for each parameter, in the order of ``param_groups``, of the parameter's shape on its device;
                None: this parameter stays (as frozen ones must).

        Raises:
            RuntimeError: the weights are perturbed already.
            TypeError, ValueError: an entry cannot be added to its parameter, or there are too many or too few;
                nothing has been changed then.
        """
        self._refuse_perturbed("perturb_by()")
        try:
            with DeferredInterrupts():
                self._engine.displace(self._plan(), list(tensors))
                if self._statistics is not None:
                    self._statistics.save()
            self._parallel.note_ascent()
            yield
        finally:
            if self._engine.perturbed:
                self._bring_back()


# Arguments that no parameter group has.
_OF_THE_WHOLE = [n for n in inspect.signature(FastSAM).parameters if n not in (*GROUP_OPTIONS, "params", "base_kwargs")]
