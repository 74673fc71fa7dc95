"""One step over tables: perturb, restore, update, from a plan that says what the optimizer wants."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastsam.backends import Backend, grad_norms, operations
from fastsam.bases import FusedUpdate
from fastsam.coefficients import Coefficients, home_of
from fastsam.directions import choose_directions, draw_noise, set_displacements
from fastsam.distributed import GlobalSums, ShardGroups, Sharding, check_missing_grads, local_of, whole_of
from fastsam.groups import ascent_options, learning_rate
from fastsam.methods import Method
from fastsam.precision import ascent_seed
from fastsam.runtime.accumulation import AccumulationWatch
from fastsam.runtime.weight_caches import clear_weight_caches
from fastsam.runtime.writers import ForeignWrites
from fastsam.spec import Ascent, AscentCoefficients, AscentForm, AscentOptions, Descent, Row, StateNames, Update
from fastsam.tables import TensorTable, TensorTables, Wanted
from fastsam.tables.memory import as_real
from fastsam.tables.state import OptimizerState


class Plan(NamedTuple):
    """What one phase of a step is to work on.

    Attributes:
        groups: the parameter groups.
        state: the base optimizer's state.
        step: the number of the step, from 0.
        update: how the base runs fused; None: by its own ``step()``.
        grad_scale, found_inf: a GradScaler's, or None.
        micro_batch: which of the step's closures this is, each with an ascent of its own.
        rho_scale: what a schedule multiplies every rho by.
    """

    groups: Sequence[Mapping[str, Any]]
    state: OptimizerState
    step: int
    update: FusedUpdate | None
    grad_scale: Tensor | None = None
    found_inf: Tensor | None = None
    micro_batch: int = 0
    rho_scale: float = 1.0

    @property
    def state_names(self) -> list[StateNames]:
        """What the base update keeps, for each group."""
        return [] if self.update is None else [self.update.state_names(group) for group in self.groups]

    @property
    def ascent_options(self) -> list[AscentOptions]:
        """How the parameters of each group ascend."""
        return [ascent_options(group, self.step, self.rho_scale) for group in self.groups]

    @property
    def perturb(self) -> list[bool]:
        """Whether each group is perturbed."""
        return [bool(group["perturb"]) for group in self.groups]


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
        self._writes = ForeignWrites()
        self._watched_builds = 0
        self._coefficients = Coefficients(method, self.sums)

    @property
    def grad_norm(self) -> Tensor | None:
        """The norm that the last step's first ascent was scaled by: float64, 0-dim; None if its method has none."""
        return self._coefficients.grad_norm if self._norm is None else self._norm

    def watch(self, params: Iterable[Tensor]) -> None:
        """These are the parameters, to which nobody else may write while they are perturbed."""
        self._watched_builds = self.tables.builds
        self._writes.watch(params)

    def run(self, closure: Callable[[], Any]) -> Any:
        """Calls a closure with gradients enabled, and what it returns.

        Raises:
            RuntimeError: one is running already, or it has written to perturbed weights.
        """
        if self.is_running:
            raise RuntimeError("step(closure) was called within a closure of the same optimizer")
        self.is_running = True
        try:
            with torch.enable_grad():
                result = closure()
        finally:
            self.is_running = False
        self.check_writes()
        return result

    # ---- perturb ----

    @torch.no_grad()
    def ascend(self, plan: Plan) -> None:
        """Moves the weights uphill by the present gradients (or by what the method has instead).

        Raises:
            RuntimeError: no parameter has a gradient, or one cannot be used; nothing has been changed then.
        """
        further = self.perturbed
        if not further:
            self._writes.begin()
        with self.tables.holding_grads():
            if further:
                self._read_grads_again()
                tables = list(self.tables)
                for table in tables:
                    table.fill_missing_grads()
            else:
                tables = self.tables.read_grads(plan.groups)
            if self.method.needs_first_pass and not self.may_have_grads(table.present for table in tables):
                check_missing_grads(param for group in plan.groups for param in group["params"])
                raise RuntimeError("no parameter has a gradient; call backward() first")
            self._choose_perturbed(tables, plan, further)
            self._perturb(tables, self._plan_ascents(tables, plan, further))
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
                self._bind(tables, plan)
            for table in tables:
                among = table.present
                if form is not None and form.x not in (Row.GRAD, Row.DIRECTION):
                    among = [i for i, tensor in enumerate(table.rows[form.x]) if tensor is not None]
                elif seed is not None:
                    among = [i for i, param in enumerate(table.params) if param.requires_grad]
                table.choose_perturbed(plan.perturb, among)
        if self.method.has_direction:
            choose_directions(tables, self.method, further)
        self._bind_for_ascent(tables, plan)

    def _bind_for_ascent(self, tables: Sequence[TensorTable], plan: Plan) -> None:
        for table in tables:
            if table.stochastic or table.has_masters or self.method.state_name is not None:
                self._bind([table], plan, masters=True)

    def _plan_ascents(self, tables: Sequence[TensorTable], plan: Plan, further: bool) -> list[Ascent]:
        number = plan.micro_batch * self.method.ascents + self.ascents
        options = [_for_ascent(mine, number) for mine in plan.ascent_options]
        backends = [self._backend(table) for table in tables]
        if self.method.ascent_form(further) is not None:
            self._norm = None
            return self._coefficients.ascents(backends, tables, options, plan.step, further)
        norms = self._norms(backends, tables, options)
        self._norm = next(iter(norms.values()))
        if self.method.needs_first_grads:
            self._coefficients.note_norms(norms)
        return [Ascent(options, norms[table.device]) for table in tables]

    def _norms(
        self, backends: Sequence[Backend], tables: Sequence[TensorTable], options: Sequence[AscentOptions]
    ) -> dict[torch.device, Tensor]:
        """The norm of the whole model's gradient, on each of the tables' devices."""
        if not (self.sums.has_shard_groups or any(table.sharding for table in tables)):
            return grad_norms(backends, tables, options)
        home = home_of([table.device for table in tables])
        squares: dict[Sharding, Tensor] = {}
        for sharding in dict.fromkeys(table.sharding for table in tables):
            mine = [(b, t) for b, t in zip(backends, tables, strict=True) if t.sharding == sharding]
            norms = grad_norms([b for b, _ in mine], [t for _, t in mine], options)
            squares[sharding] = next(iter(norms.values())).to(home, non_blocking=True).square()
        norm = self.sums.total(squares, home).sqrt()
        return {table.device: norm.to(table.device, non_blocking=table.device.type != "cpu") for table in tables}

    def may_have_grads(self, present: Iterable[Any]) -> bool:
        """Whether any of ``present`` is true, or another rank may have gradients and count on this one."""
        return any(present) or self.sums.has_shard_groups

    def _perturb(self, tables: Sequence[TensorTable], ascents: Sequence[Ascent]) -> None:
        self.perturbed = True
        try:
            for table, ascent in zip(tables, ascents, strict=True):
                self._backend(table).perturb_(table, ascent)
                table.is_perturbed = True
                table.scatter(table.perturbed)
        except BaseException:
            self.restore()
            raise
        self.ascents += 1
        self._writes.note_ascent()

    def check_writes(self) -> None:
        """Raises RuntimeError if somebody else has written to a perturbed parameter."""
        if not self.perturbed or (param := self._writes.find()) is None:
            return
        if any(table.changed() for table in self.tables):
            return  # other memory, which is refused by another message
        name = next(t.name(i) for t in self.tables for i, mine in enumerate(t.params) if mine is param)
        raise RuntimeError(
            f"{name} was written to while it was perturbed, by another optimizer, say: the restore would undo that; "
            "call restore() to give the ascent up; the other one may step before first_step() or after second_step()"
        )

    @torch.no_grad()
    def displace(self, plan: Plan, tensors: Sequence[Tensor | None]) -> None:
        """Adds given tensors to the weights, one per parameter in the groups' order; None: it stays.

        Raises:
            TypeError, ValueError: a tensor does not fit its parameter; nothing has been changed then.
        """
        self._writes.begin()
        with self.tables.holding_grads():
            tables = self.tables.read_grads(plan.groups)
            set_displacements(tables, tensors)
            self._bind_for_ascent(tables, plan)
            options = plan.ascent_options
            self.is_displaced = True
            self._perturb(tables, [_whole_direction(table, options) for table in tables])
        clear_weight_caches()

    def refuse_displaced(self) -> None:
        """Raises RuntimeError within ``perturb_by()``."""
        if self.is_displaced:
            raise RuntimeError("a step is not possible within perturb_by(); leave its block first")

    # ---- restore ----

    @torch.no_grad()
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

    @torch.no_grad()
    def begin_without_ascent(self, plan: Plan) -> None:
        """Reads the gradients of a step that has no ascent, or none any more; :meth:`descend` follows."""
        with self.tables.holding_grads():
            for table in self.tables.read_grads(plan.groups):
                table.choose_perturbed([False] * len(plan.groups), [])

    @torch.no_grad()
    def measure(self, plan: Plan) -> Tensor:
        """The norm of the present gradients of the parameters that a step perturbs: float64, 0-dim."""
        with self.tables.holding_grads():
            tables = self.tables.read_grads(plan.groups)
            for table in tables:
                table.choose_perturbed(plan.perturb, table.present)
            options = [AscentOptions(0.0, adaptive=False, maximize=False)] * len(plan.groups)
            norms = self._norms([self._backend(table) for table in tables], tables, options)
        return next((norm for device, norm in norms.items() if device.type != "cpu"), next(iter(norms.values())))

    @torch.no_grad()
    def initialize_state(self, plan: Plan, base_step: Callable[[], None]) -> None:
        """Makes the state of every parameter that has a gradient, as torch's optimizers do in a step with lr = 0."""
        self.begin_without_ascent(plan)
        if plan.update is None:
            base_step()
        with self.tables.holding_grads():
            self._read_grads_again()
            tables, wanted = list(self.tables), []
            for table in tables:
                among = _would_move(table, plan) if self.method.state_name is not None else ()
                mine = self._wanted(plan, (), table.present, among)
                wanted.append((mine, table.slots.bind(table, plan.state, mine)))
            self._publish(tables, plan, wanted)
        self.is_initial = True

    @torch.no_grad()
    def descend(self, plan: Plan, base_step: Callable[[], None]) -> None:
        """Restores the weights and lets the base apply the present gradients.

        Args:
            plan: the plan.
            base_step: the base's own step, which runs if there is no fused update.
        """
        self.is_initial = False
        with self.tables.holding_grads():
            self._read_grads_again()
            tables = list(self.tables)
            for table in tables:
                table.gather()
            overflow = plan.update is None and plan.found_inf is not None and float(plan.found_inf) != 0
            descents = None if overflow else self._plan_descents(tables, plan)
            wanted = self._bind_all(tables, plan, descents)
            self._publish(tables, plan, wanted)
            if plan.update is not None:
                self._update(tables, plan, descents)
                self._end_step()
                return
            moves = self._prepare_base(tables, descents)
            self._end_step()
        if not overflow:
            with self._hiding_method_state(plan.state):
                _unscale(plan)
                base_step()
                for param, move in moves:
                    param.sub_(move)
            self._writes.end()

    def _plan_descents(self, tables: Sequence[TensorTable], plan: Plan) -> list[Descent] | None:
        form = self.method.descent_form(self.ascents > 0)
        if form is None:
            return None
        if self.method.state_name is not None:
            self._bind(tables, plan, method=form.keeps)
        if form.keeps and self.ascents == 0:
            for table in tables:
                table.take_grads_for_first_ones()
        backends = [self._backend(table) for table in tables]
        # An unfused base is given unscaled gradients: the combination is unscaled with them.
        scales = [to_table_device(plan.grad_scale, t) if plan.update is not None else None for t in tables]
        lrs = lambda: [learning_rate(group) for group in plan.groups]  # noqa: E731
        return self._coefficients.descents(
            backends, tables, plan.ascent_options, plan.step, lrs, self.ascents > 0, scales
        )

    def _update(self, tables: Sequence[TensorTable], plan: Plan, descents: Sequence[Descent] | None) -> None:
        update = plan.update
        assert update is not None
        options = [update.options(group) for group in plan.groups]
        for index, table in enumerate(tables):
            descent = None if descents is None else descents[index]
            scalars = to_table_device(plan.grad_scale, table), to_table_device(plan.found_inf, table)
            self._backend(table).restore_and_update_(table, update.kind, options, descent, *scalars)
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

    # ---- state ----

    def _bind(self, tables: Sequence[TensorTable], plan: Plan, *, masters: bool = False, method: bool = False) -> None:
        for table in tables:
            kept = self._keepers(table, plan) if method else ()
            table.slots.bind(table, plan.state, self._wanted(plan, table.perturbed if masters else (), (), kept))

    def _wanted(self, plan: Plan, masters: Sequence[int], moments: Sequence[int], method: Sequence[int]) -> Wanted:
        return Wanted(plan.state_names, self.method.state_name, masters, moments, method)

    def _keepers(self, table: TensorTable, plan: Plan) -> Sequence[int]:
        """The parameters that have method state: the perturbed ones, or those that an ascent would perturb."""
        return table.perturbed if self.ascents > 0 else _would_move(table, plan)

    def _bind_all(
        self, tables: Sequence[TensorTable], plan: Plan, descents: Sequence[Descent] | None
    ) -> list[tuple[Wanted, bool]]:
        """Allocates what the update needs and ``state`` lacks."""
        keeps = descents is not None and descents[0].form.keeps
        result = []
        for table in tables:
            kept = self._keepers(table, plan) if keeps else ()
            wanted = self._wanted(plan, table.perturbed, table.present, kept)
            result.append((wanted, table.slots.bind(table, plan.state, wanted)))
        return result

    def _publish(self, tables: Sequence[TensorTable], plan: Plan, wanted: Sequence[tuple[Wanted, bool]]) -> None:
        if not any(is_new for _, is_new in wanted):
            return
        for table, (mine, _) in zip(tables, wanted, strict=True):
            table.slots.publish(table, plan.state, mine)
        for table, (mine, _) in zip(tables, wanted, strict=True):
            table.slots.note(table, plan.state, mine)

    @contextmanager
    def _hiding_method_state(self, state: OptimizerState) -> Iterator[None]:
        """A block in which ``state`` holds the base's own entries alone: an empty one tells it of a first step."""
        name = self.method.state_name
        kept = {} if name is None else {p: e for p, e in state.items() if isinstance(e, dict) and name in e}
        hidden = {param: entries.pop(str(name)) for param, entries in kept.items()}
        try:
            yield
        finally:
            for param, tensor in hidden.items():
                state[param][str(name)] = tensor

    # ---- small things ----

    def _backend(self, table: TensorTable) -> Backend:
        return operations(self.backend, table.device.type, table.has_own_grads and not table.needs_lists)

    def _read_grads_again(self) -> None:
        for table in self.tables:
            table.check_first_grads()
        if self.tables.has_strange_grads():
            raise RuntimeError(
                "a parameter that was frozen in the first pass, and cannot be trained as it is, has a gradient in the "
                "second; call restore() to give the ascent up"
            )
        for table in self.tables:
            if not table.read_grads():
                raise RuntimeError(
                    f"{table.name(table.changed()[0])} was moved, cast or given other memory between the two "
                    "passes; call restore() to give the ascent up"
                )

    def _end_step(self) -> None:
        self.perturbed, self.is_displaced, self.ascents = False, False, 0
        for table in self.tables:
            table.end_step()
        if self.tables.builds != self._watched_builds:
            self.watch([param for table in self.tables for param in table.params])
        else:
            self._writes.end()
        clear_weight_caches()


def _would_move(table: TensorTable, plan: Plan) -> list[int]:
    perturb = plan.perturb
    return [i for i in table.present if perturb[table.groups[i]]]


def _for_ascent(options: AscentOptions, number: int) -> AscentOptions:
    """The options with random numbers of their own for each ascent of a step."""
    return options._replace(rounding_seed=ascent_seed(options.rounding_seed, number)) if number else options


def _whole_direction(table: TensorTable, options: Sequence[AscentOptions]) -> Ascent:
    """``w <- w + d`` for every parameter that has a direction d."""
    shape = len(table.params), len(AscentCoefficients)
    coefficients = torch.zeros(shape, dtype=torch.float64, device=table.device)
    coefficients[:, AscentCoefficients.A].fill_(1.0)
    return Ascent(options, form=AscentForm(x=Row.DIRECTION), coefficients=coefficients)


def _unscale(plan: Plan) -> None:
    if plan.grad_scale is None:
        return
    inverse = plan.grad_scale.double().reciprocal().float()
    for group in plan.groups:
        for param in group["params"]:
            grad = local_of(param.grad)
            if grad is not None:
                grad.mul_(inverse.to(grad.device))


def to_table_device(scalar: Any, table: TensorTable) -> Tensor | None:
    """GradScaler's scalar on the table's device."""
    if scalar is None:
        return None
    # A number where the scaler saw no gradient at all.
    scalar = whole_of(scalar)
    tensor = scalar if isinstance(scalar, Tensor) else torch.tensor(scalar, dtype=torch.float32, device="cpu")
    return tensor.to(table.device, torch.float32, non_blocking=table.device.type != "cpu").reshape(())
