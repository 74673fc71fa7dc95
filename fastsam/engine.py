"""One step over tables: perturb, restore, update, from a plan. One file: each phase leaves what the next one needs."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from fastsam.backends import Backend, operations
from fastsam.bindings import StateBindings
from fastsam.coefficients import Coefficients, divide_kept, whole_direction
from fastsam.directions import choose_directions, set_displacements
from fastsam.distributed import GlobalSums, ShardGroups, local_of
from fastsam.groups import learning_rate
from fastsam.methods import Method
from fastsam.missing_grads import refuse_missing_grads
from fastsam.noise import draw_noise
from fastsam.plan import KnownOptions, Plan
from fastsam.precision import ascent_seed
from fastsam.runtime.accumulation import AccumulationWatch
from fastsam.runtime.grad_mode import untracked
from fastsam.runtime.weight_caches import clear_weight_caches
from fastsam.runtime.writers import ForeignWrites
from fastsam.spec import Ascent, AscentOptions, Descent, Row, Update
from fastsam.tables import TensorTable, TensorTables
from fastsam.tables.gradients import separate_grads
from fastsam.tables.memory import as_real


class Engine:
    """The tables of one optimizer, and where in a step they are.

    Args:
        backend: the name of one, or "auto".
        method: the method.
        shard_groups: see :class:`fastsam.distributed.GlobalSums`.

    Attributes:
        tables: the tables.
        perturbed: whether the weights are perturbed.
        is_single: whether ``first_step()`` has found that this step has no ascent: its gradients are for the update.
        is_displaced: whether the weights are perturbed by given tensors: no step may follow.
        ascents: how many ascent steps this step has had.
        is_running: whether a closure runs.
        is_initial: whether ``state`` is what :meth:`initialize_state` has made.
        is_constructed: whether the optimizer's constructor is through.
        accumulation: warns of gradients that a closure adds to.
        sums: adds up over the ranks that hold other parts of the parameters.
        scaler: what a GradScaler has set for the coming update.
        options: what the groups' options say.
    """

    def __init__(self, backend: str, method: Method, shard_groups: ShardGroups = None) -> None:
        self.backend, self.method = backend, method
        self.sums = GlobalSums(shard_groups)
        self.tables = TensorTables(self.sums.sharding_of)
        self.perturbed = False
        self.is_single = self.is_running = self.is_displaced = self.is_initial = False
        self.ascents = 0
        self._norm: Tensor | None = None
        self.is_constructed = False
        self.accumulation = AccumulationWatch()
        self.scaler: dict[str, Any] = {}
        self.options = KnownOptions()
        self._writes = ForeignWrites()
        self._watched_builds = 0
        self._coefficients = Coefficients(method, self.sums)
        self._bindings = StateBindings(method)

    @property
    def grad_norm(self) -> Tensor | None:
        """The norm that the last step's first ascent was scaled by: float64, 0-dim; None if its method has none."""
        return self._coefficients.grad_norm if self._norm is None else self._norm

    def watch(self, params: Iterable[Tensor]) -> None:
        """These are the parameters, to which nobody else may write while they are perturbed."""
        self._watched_builds = self.tables.builds
        self._writes.watch(params)
        self.accumulation.forget()

    def run(self, closure: Callable[[], Any]) -> Any:
        """Calls a closure with gradients enabled, and what it returns.

        Raises:
            RuntimeError: one is running already, or it has written to perturbed weights.
        """
        if self.is_running:
            raise RuntimeError("step(closure) was called within a closure of the same optimizer")
        try:
            try:
                self.is_running = True
                with torch.enable_grad():
                    result = closure()
            finally:
                self.is_running = False
        except BaseException:
            self.is_running = False  # a Ctrl-C may come between two lines, and before the one above
            raise
        self.check_writes()
        return result

    # ---- perturb ----

    @untracked
    def ascend(self, plan: Plan) -> None:
        """Moves the weights uphill by the present gradients (or by what the method has instead).

        Raises:
            RuntimeError: no parameter has a gradient, or one cannot be used; nothing has been changed then.
        """
        further = self.perturbed
        with self.tables.holding_grads():
            if further:
                tables = self._read_grads_again()
                for table in tables:
                    table.fill_missing_grads()
            else:
                tables = self._read_grads_of_step(plan)
            if self.method.needs_first_pass and not self.may_have_grads([table.present for table in tables]):
                refuse_missing_grads(param for group in plan.groups for param in group["params"])
            self._choose_perturbed(tables, plan, further)
            backends = self._backends(tables)
            if not further:
                self._prepare_update(backends, tables, plan)
            self._perturb(backends, tables, self._plan_ascents(backends, tables, plan, further))
            if self.method.needs_first_grads:
                for table in tables:
                    table.keep_first_grads()
        clear_weight_caches()

    def _choose_perturbed(self, tables: Sequence[TensorTable], plan: Plan, further: bool) -> None:
        """Decides which parameters move, and gives them all that the ascent reads or writes."""
        if (seed := self.method.noise_seed()) is not None:
            draw_noise(tables, seed, plan.step)
        if not further:
            form = self.method.ascent_form(further)
            if form is not None and Row.STATE <= form.x < Row.STATE + 3:
                for table in tables:
                    self._bindings.bind(table, plan)
            for table in tables:
                among = table.present
                if form is not None and form.x not in (Row.GRAD, Row.DIRECTION):
                    among = [i for i, tensor in enumerate(table.rows[form.x]) if tensor is not None]
                elif seed is not None:
                    among = [i for i, param in enumerate(table.params) if param.requires_grad]
                table.choose_perturbed(plan.options.perturb, among)
        if self.method.has_direction:
            choose_directions(tables, self.method, further)
        for table in tables:
            self._bindings.bind_for_ascent(table, plan)

    def _plan_ascents(
        self, backends: Sequence[Backend], tables: Sequence[TensorTable], plan: Plan, further: bool
    ) -> list[Ascent]:
        number = plan.micro_batch * self.method.ascents + self.ascents
        options = plan.options.ascent if number == 0 else [_for_ascent(mine, number) for mine in plan.options.ascent]
        if self.method.ascent_form(further) is not None:
            self._norm = None
            return self._coefficients.ascents(backends, tables, options, plan.step, further)
        norms = self._coefficients.norms(backends, tables, options)
        self._norm = next(iter(norms.values()))
        if self.method.needs_first_grads:
            self._coefficients.note_norms(norms)
        return [Ascent(options, norms[table.device]) for table in tables]

    def _prepare_update(self, backends: Sequence[Backend], tables: Sequence[TensorTable], plan: Plan) -> None:
        kind, form = Update.NONE if plan.update is None else plan.update.kind, self.method.descent_form(ascended=True)
        for backend, table in zip(backends, tables, strict=True):
            backend.prepare_update(table, kind, form)

    def may_have_grads(self, present: Iterable[Any]) -> bool:
        """Whether any of ``present`` is true, or another rank may have gradients and count on this one."""
        return any(present) or self.sums.has_shard_groups

    def _perturb(self, backends: Sequence[Backend], tables: Sequence[TensorTable], ascents: Sequence[Ascent]) -> None:
        self.perturbed = True
        try:
            for backend, table, ascent in zip(backends, tables, ascents, strict=True):
                backend.perturb_(table, ascent)
                table.is_perturbed = True
                table.scatter(table.perturbed)
        except BaseException:
            self.restore()
            raise
        self.ascents += 1
        self._writes.note_ascent()

    def check_writes(self) -> None:
        """Raises RuntimeError if somebody else has written to a perturbed parameter."""
        if not self.perturbed or not (written := set(self._writes.find())):
            return
        if any(table.changed() for table in self.tables):
            return  # other memory, which is refused by another message
        name = next((t.name(i) for t in self.tables for i in t.perturbed if t.params[i] in written), None)
        if name is None:
            return  # what does not move stays written
        raise RuntimeError(
            f"{name} was written to while it was perturbed, by another optimizer, say: the restore would undo that; "
            "call restore() to give the ascent up; the other one may step before first_step() or after second_step()"
        )

    @untracked
    def displace(self, plan: Plan, tensors: Sequence[Tensor | None]) -> None:
        """Adds given tensors to the weights, one per parameter in the groups' order; None: it stays.

        Raises:
            TypeError, ValueError: a tensor does not fit its parameter; nothing has been changed then.
        """
        with self.tables.holding_grads():
            tables = self._read_grads_of_step(plan)
            set_displacements(tables, tensors, sum(len(group["params"]) for group in plan.groups))
            for table in tables:
                self._bindings.bind_for_ascent(table, plan)
            ascents = [whole_direction(table, plan.options.ascent) for table in tables]
            backends = self._backends(tables)
            self.is_displaced = True
            self._perturb(backends, tables, ascents)
        clear_weight_caches()

    def refuse_displaced(self) -> None:
        """Raises RuntimeError within ``perturb_by()``."""
        if self.is_displaced:
            raise RuntimeError("a step is not possible within perturb_by(); leave its block first")

    # ---- restore ----

    @untracked
    def restore(self) -> None:
        """Brings the weights back, bit for bit, and ends the step without an update."""
        moved = any(table.changed() for table in self.tables)
        for table in self.tables if moved else ():
            table.check_memory()
        for table in self.tables:
            if not table.is_perturbed:
                continue
            if moved:
                table.restore_elsewhere()
            else:
                self._backend(table).restore_(table)
                table.scatter(table.perturbed)
        self._end_step()
        if moved:
            self.tables.drop()

    # ---- update ----

    @untracked
    def begin_without_ascent(self, plan: Plan) -> None:
        """Reads the gradients of a step that has no ascent, or none any more; :meth:`descend` follows."""
        with self.tables.holding_grads():
            for table in self._read_tables(plan):
                table.choose_perturbed([False] * len(plan.groups), [])

    @untracked
    def measure(self, plan: Plan) -> Tensor:
        """The norm of the present gradients of the parameters that a step perturbs: float64, 0-dim."""
        with self.tables.holding_grads():
            tables = self.tables.read_grads(plan.groups)
            for table in tables:
                table.choose_perturbed(plan.options.perturb, table.present)
            options = [AscentOptions(0.0, adaptive=False, maximize=False)] * len(plan.groups)
            norms = self._coefficients.norms(self._backends(tables), tables, options)
        return next((norm for device, norm in norms.items() if device.type != "cpu"), next(iter(norms.values())))

    @untracked
    def initialize_state(self, plan: Plan, base_step: Callable[[], None]) -> None:
        """Makes the state of every parameter that has a gradient, as torch's optimizers do in a step with lr = 0."""
        self.begin_without_ascent(plan)
        if plan.update is None:
            base_step()
            self._writes.end()
        with self.tables.holding_grads():
            self._read_grads_again()
            keepers = [self._bindings.keepers(table, plan, ascended=False) for table in self.tables]
            bindings = [
                self._bindings.bind(table, plan, moments=table.present, method=mine)
                for table, mine in zip(self.tables, keepers, strict=True)
            ]
            self._bindings.publish(plan, bindings)
        self.is_initial = True

    @untracked
    def descend(self, plan: Plan, base_step: Callable[[], None]) -> None:
        """Restores the weights and lets the base apply the present gradients.

        Args:
            plan: the plan.
            base_step: the base's own step, which runs if there is no fused update.
        """
        self.is_initial = False
        if plan.update is None and (plan.grad_scale is not None or self.method.descent_form(self.ascents > 0)):
            separate_grads(param for group in plan.groups for param in group["params"])
        with self.tables.holding_grads():
            tables = self._read_last_grads()
            overflow = plan.update is None and plan.found_inf is not None and float(plan.found_inf) != 0
            descents = None if overflow else self._plan_descents(tables, plan)
            keeps = bool(descents and descents[0].form.keeps)
            keepers = [self._bindings.keepers(table, plan, self.ascents > 0) if keeps else () for table in tables]
            bindings = [
                self._bindings.bind(table, plan, table.perturbed, table.present, mine)
                for table, mine in zip(tables, keepers, strict=True)
            ]
            self._bindings.publish(plan, bindings)
            if plan.update is not None:
                self._update(tables, plan, descents)
                self._end_step()
                return
            moves = self._prepare_base(tables, descents)
            self._end_step()
        if not overflow:
            with self._bindings.hiding_method_state(plan.state):
                plan.unscale_grads()
                base_step()
                for param, move in moves:
                    param.sub_(move)
            self._writes.end()

    @untracked
    def combine_grads(self, plan: Plan) -> None:
        """Restores the weights, without an update, and makes the gradients what the method gives the base."""
        separate_grads(param for group in plan.groups for param in group["params"])
        with self.tables.holding_grads():
            tables = self._read_last_grads()
            self._prepare_base(tables, self._plan_descents(tables, plan))
        self._end_step()

    def _plan_descents(self, tables: Sequence[TensorTable], plan: Plan) -> list[Descent] | None:
        form = self.method.descent_form(self.ascents > 0)
        if form is None:
            return None
        if self.method.state_name is not None:
            for table in tables:
                kept = self._bindings.keepers(table, plan, self.ascents > 0) if form.keeps else ()
                self._bindings.bind(table, plan, method=kept)
        if form.keeps and self.ascents == 0:
            for table in tables:
                table.take_grads_for_first_ones()
        backends = self._backends(tables)
        scales = [plan.scaler_scalars(table)[0] for table in tables]
        lrs = lambda: [learning_rate(group) for group in plan.groups]  # noqa: E731
        descents = self._coefficients.descents(
            backends, tables, plan.options.ascent, plan.step, lrs, self.ascents > 0, scales
        )
        if form.keeps and self.ascents == 0 and plan.grad_scale is not None:
            for descent, scale in zip(descents or (), scales, strict=True):
                divide_kept(descent, scale)
        return descents

    def _update(self, tables: Sequence[TensorTable], plan: Plan, descents: Sequence[Descent] | None) -> None:
        update = plan.update
        assert update is not None
        for index, table in enumerate(tables):
            descent = None if descents is None else descents[index]
            scalars = plan.scaler_scalars(table)
            self._backend(table).restore_and_update_(table, update.kind, plan.options.update, descent, *scalars)
            table.is_perturbed = False
            table.scatter(table.written, state=True)

    def _prepare_base(
        self, tables: Sequence[TensorTable], descents: Sequence[Descent] | None
    ) -> list[tuple[Tensor, Tensor]]:
        """Restores, and gives the base its gradients; returns what is to be subtracted after its step, by parameter."""
        moves: list[tuple[Tensor, Tensor]] = []
        for index, table in enumerate(tables):
            descent = None if descents is None else descents[index]
            self._backend(table).restore_and_update_(table, Update.NONE, [], descent)
            table.is_perturbed = False
            table.scatter(table.perturbed)
            if descent is None:
                continue
            for i in table.present:
                grad, laid_out = table.params[i].grad, table.grads[i]
                memory = None if grad is None else as_real(local_of(grad))
                if memory is not None and laid_out is not None and memory.data_ptr() != laid_out.data_ptr():
                    memory.copy_(laid_out)
                move = table.first_grads[i]
                if descent.form.decoupled and move is not None:
                    moves.append((as_real(table.locals[i]), move))
        return moves

    # ---- small things ----

    def _backend(self, table: TensorTable) -> Backend:
        return operations(self.backend, table.device.type, table.has_own_grads and not table.needs_lists)

    def _backends(self, tables: Sequence[TensorTable]) -> list[Backend]:
        return [self._backend(table) for table in tables]

    def _read_tables(self, plan: Plan) -> list[TensorTable]:
        """The tables with the present gradients; what is watched is what they hold."""
        tables = self.tables.read_grads(plan.groups)
        if self.tables.builds != self._watched_builds:
            self.watch([param for table in tables for param in table.params])
        return tables

    def _read_grads_of_step(self, plan: Plan) -> list[TensorTable]:
        """The same, before anything is perturbed."""
        tables = self._read_tables(plan)
        for table in tables:
            table.begin_step()
        self._writes.begin()
        return tables

    def _read_grads_again(self) -> list[TensorTable]:
        """The tables with the gradients of a further pass, about which nothing else may have changed."""
        tables = list(self.tables)
        for table in tables:
            table.check_first_grads()
        if self.tables.has_strange_grads():
            raise RuntimeError(
                "a parameter that was frozen in the first pass has a gradient in the second; call restore() to give "
                "the ascent up, and change requires_grad between steps"
            )
        for table in tables:
            if not table.read_grads():
                raise RuntimeError(
                    f"{table.name(table.changed()[0])} was moved, cast or given other memory between the two "
                    "passes; call restore() to give the ascent up"
                )
        return tables

    def _read_last_grads(self) -> list[TensorTable]:
        """The tables with the last pass's gradients, about to be restored."""
        tables = self._read_grads_again()
        for table in tables:
            table.gather()
        return tables

    def _end_step(self) -> None:
        self.perturbed, self.is_displaced, self.ascents = False, False, 0
        for table in self.tables:
            table.end_step()
        self._writes.end()
        clear_weight_caches()


def _for_ascent(options: AscentOptions, number: int) -> AscentOptions:
    """The options of a step's ascent ``number``, which has random numbers of its own."""
    return options._replace(rounding_seed=ascent_seed(options.rounding_seed, number))
