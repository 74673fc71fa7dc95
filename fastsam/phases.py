"""The phases of a step, whatever calls them: perturb; restore and update; what surrounds them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor

from fastsam.bases import note_step, run_step
from fastsam.checkpoint import STEP_COUNT, step_count
from fastsam.plan import Plan
from fastsam.runtime.batch_norm import RunningStatistics
from fastsam.runtime.interrupts import DeferredInterrupts
from fastsam.runtime.parallel_models import ParallelModel
from fastsam.runtime.replay_rng import GeneratorStates
from fastsam.runtime.scaler import name_way_to_clip
from fastsam.tables.memory import have_grads
from fastsam.wrapper import BaseWrapper, check_group

Closure = Callable[[], Any]


class StepPhases(BaseWrapper):
    """An optimizer that can perturb, restore and update, with batch-norm statistics, signals and scalers in order."""

    _parallel: ParallelModel
    _replay_rng: bool
    _statistics: RunningStatistics | None

    @property
    def ascends_next(self) -> bool:
        """Whether the coming step has an ascent, as far as is known before its first pass."""
        return self._ascends_now()

    @property
    def depends_on_length(self) -> bool:
        """Whether the coming step depends on the length of the first pass's gradients: a scaler must unscale them."""
        if self._policy.statistics is not None:
            return True
        return self.method.needs_first_pass and self.method.depends_on_length and self._ascends_now()

    @property
    def replay_rng(self) -> bool:
        """Whether both passes have the same random numbers."""
        return self._replay_rng

    # ---- perturb; restore and update ----

    def _bring_back(self, combine: bool = False) -> None:
        """Restores the weights; ``combine``: a method's descent then takes the gradients' place."""
        with DeferredInterrupts():
            if combine:
                self._engine.combine_grads(self._plan())
            else:
                self._engine.restore()
            self._restore_statistics()
        self._parallel.note_restore()

    def _ascend_all_the_way(self, ascent_closure: Closure, micro_batch: int = 0) -> None:
        self._ascend(micro_batch)
        for _ in range(1, self.method.ascents):
            self._clear_grads()
            self._engine.run(ascent_closure)
            self._ascend(micro_batch)
        self._clear_grads()

    def _ascend(self, micro_batch: int = 0) -> None:
        """Norm, perturb."""
        plan, method = self._plan(micro_batch), self.method
        if not plan.options.are_checked:
            for group in plan.groups:
                check_group(type(self.base_optimizer), method, plan.update is not None, group)
            plan.options.are_checked = True
        if method.needs_first_pass:
            self._parallel.check_first_pass()
        if self._statistics is not None and method.needs_first_pass and not self._engine.perturbed:
            self._statistics.save()
        try:
            with DeferredInterrupts():
                self._engine.ascend(plan)
            self._parallel.note_ascent()
        except BaseException:
            if not self._engine.perturbed:
                self._restore_statistics()
            raise
        if method.needs_first_grads:
            self._clear_grads()

    def _descend(self) -> None:
        """Restore, update."""
        plan = self._plan()
        if not self._engine.perturbed:
            self._observe_single_pass(plan)
            self._engine.begin_without_ascent(plan)
        with DeferredInterrupts():
            self._engine.descend(plan, lambda: run_step(self.base_optimizer))
            note_step(self.base_optimizer)
            self._count_step(plan)
            self._restore_statistics()
        self._parallel.note_update()
        self._engine.accumulation.end_step(self._parameters())

    def _finish(self) -> None:
        """The update of two-phase use."""
        engine = self._engine
        try:
            if not (engine.perturbed or engine.is_single):
                if self._is_initialized_by_this():
                    self._initialize_state()
                    return
                raise RuntimeError(
                    "step() needs a closure; in a loop without one, or in a wrapper that calls the closure itself "
                    "(opacus, GradScaler), call first_step() after the first backward and second_step() (or step()) "
                    "after the second. A tool that steps by itself, such as a learning-rate finder, takes "
                    "optimizer.base_optimizer"
                )
            engine.check_writes()
            if engine.perturbed and engine.ascents < self.method.ascents:
                raise RuntimeError(
                    f"{self.method} ascends {self.method.ascents} times: call first_step() after each of so many "
                    f"backward passes; this step has had {engine.ascents}"
                )
            self._descend()
        except BaseException:
            self._forget_scaler()
            raise

    def _initialize_state(self) -> None:
        """Makes all that a checkpoint may hold: torch.distributed.checkpoint loads only what is there."""
        plan = self._plan()
        self._engine.initialize_state(plan, lambda: run_step(self.base_optimizer))
        for group in self.param_groups if self._counts_steps(plan) else ():
            group.setdefault(STEP_COUNT, 0)

    def _finish_with(self, closure: Closure) -> Any:
        """``closure`` as the second pass of two-phase use, and the update."""
        loss = self._engine.run(closure)
        self._finish()
        return loss

    @contextmanager
    def _undone_by_exceptions(self) -> Iterator[None]:
        """A block whose exceptions restore the weights."""
        try:
            yield
        except BaseException:
            self.restore()
            raise

    def _check_closure_step(self) -> None:
        self._refuse_perturbed("step(closure)")
        if "found_inf" in self._engine.scaler:
            self._forget_scaler()
            raise RuntimeError(
                "GradScaler.step(optimizer, closure) is not supported: scale, backward, optimizer.first_step(), scale, "
                "backward again, then scaler.step(optimizer) without a closure"
            )

    def _run_first(self, closure: Closure, ascends: bool) -> Any:
        watch = self._engine.accumulation
        if ascends:  # in a step of one pass accumulation is right
            watch.begin_closure(self._parameters())
        try:
            return self._engine.run(closure)
        except RuntimeError as error:
            name_way_to_clip(error)
            raise
        finally:
            watch.end_closure()

    def _run_second(self, closure: Closure) -> Any:
        loss = self._engine.run(closure)
        if not self._has_gradients():
            raise RuntimeError(
                "no parameter has a gradient after the second pass: the closure of step() must call backward() each "
                "time it is called. If the gradients were computed outside of it, call first_step() and second_step()"
            )
        return loss

    def _observe_single_pass(self, plan: Plan) -> None:
        """The statistics of a step that was known to have no ascent; its gradients may still have a scaler's scale."""
        statistics = self._policy.statistics
        if statistics is not None and not statistics.has_observed:
            norm = self._engine.measure(plan)
            scale = plan.grad_scale
            statistics.observe(norm if scale is None else norm / scale.to(norm.device, norm.dtype), plan.step)

    def _still_ascends(self, ascends: bool) -> bool:
        """Whether a step that :meth:`_ascends_now` says yes to has an ascent after all, by its gradients."""
        if (statistics := self._policy.statistics) is None or not ascends:
            return ascends
        with DeferredInterrupts():
            plan = self._plan()
            statistics.observe(self._engine.measure(plan), plan.step)
        return statistics.ascends_after_first_pass()

    # ---- what a phase needs to know ----

    def _plan(self, micro_batch: int = 0) -> Plan:
        groups, update, scaler = self._complete_groups(), self._update, self._engine.scaler
        step = step_count(groups)
        scale, found_inf = scaler.get("grad_scale"), scaler.get("found_inf")
        options = self._engine.options.of(groups, update, step, self._policy.rho_scale(step))
        return Plan(groups, self.state, step, update, options, scale, found_inf, micro_batch)

    def _generator_states(self) -> GeneratorStates | None:
        return GeneratorStates(p.device for p in self._parameters()) if self._replay_rng else None

    def _ascends_now(self) -> bool:
        """Whether this step has an ascent, as far as is known before its first pass."""
        groups = self._complete_groups()
        return self._policy.ascends(step_count(groups), groups, self.method)

    def _count_step(self, plan: Plan) -> None:
        self._engine.is_single = False
        self._policy.commit()
        if self._counts_steps(plan):
            for group in self.param_groups:
                group[STEP_COUNT] = plan.step + 1

    def _counts_steps(self, plan: Plan) -> bool:
        return self._policy.counts_steps or self.method.counts_steps or plan.options.has_schedules

    def _is_initialized_by_this(self) -> bool:
        """Whether ``step()`` is to make the state: torch.distributed.checkpoint calls it with every lr set to 0."""
        lrs = [group.get("lr") for group in self.param_groups]
        on_host = all(lr.device.type == "cpu" if isinstance(lr, Tensor) else lr is not None for lr in lrs)
        return (
            not any(self.state.values())
            and on_host
            and all(float(lr or 0) == 0 for lr in lrs)
            and self._has_gradients()
        )

    def _has_gradients(self) -> bool:
        return self._engine.may_have_grads([have_grads(self._parameters())])

    # ---- what surrounds a phase ----

    def _clear_grads(self) -> None:
        """Sets gradients to None, or to zeros where they are views of a buffer, which are to remain the gradients."""
        in_buffers = {id(param) for param in self._engine.tables.in_buffers}
        for param in self._parameters():
            grad = param.grad
            if grad is None or id(param) not in in_buffers:
                param.grad = None
                continue
            if grad.requires_grad:
                param.grad = grad = grad.detach()
            grad.zero_()
        self._parallel.clear_others_grads()

    def _restore_statistics(self) -> None:
        if self._statistics is not None:
            self._statistics.restore()

    def _forget_scaler(self) -> None:
        # GradScaler.step takes these back itself, but not after an exception: the next step would use them again.
        self._engine.scaler.clear()
