"""The state that a phase needs: bound to the tables' rows before it runs, published in ``state`` before the update."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple

from fastsam.methods import Method
from fastsam.plan import Plan
from fastsam.tables import TensorTable, Wanted
from fastsam.tables.state import OptimizerState


class Binding(NamedTuple):
    """What a table's rows were bound to, and whether anything was new."""

    table: TensorTable
    wanted: Wanted
    is_new: bool


class StateBindings:
    """Binds tables to the optimizer's state as a method needs it."""

    def __init__(self, method: Method) -> None:
        self._method = method

    def bind(
        self,
        table: TensorTable,
        plan: Plan,
        masters: Sequence[int] = (),
        moments: Sequence[int] = (),
        method: Sequence[int] = (),
    ) -> Binding:
        """Fills the table's rows from ``state`` and allocates what is missing, for the parameters of these indices."""
        wanted = Wanted(plan.options.state_names, self._method.state_name, masters, moments, method)
        return Binding(table, wanted, table.slots.bind(table, plan.state, wanted))

    def bind_for_ascent(self, table: TensorTable, plan: Plan) -> None:
        """Binds what the ascent of the perturbed parameters reads."""
        if table.stochastic or table.has_masters or self._method.state_name is not None:
            self.bind(table, plan, masters=table.perturbed)

    def keepers(self, table: TensorTable, plan: Plan, ascended: bool) -> Sequence[int]:
        """The parameters that have method state: the perturbed ones, or those that an ascent would perturb."""
        if self._method.state_name is None:
            return ()
        return table.perturbed if ascended else plan.would_move(table)

    def publish(self, plan: Plan, bindings: Sequence[Binding]) -> None:
        """Puts what was allocated into ``state``."""
        if not any(binding.is_new for binding in bindings):
            return
        for table, wanted, _ in bindings:
            table.slots.publish(table, plan.state, wanted)
        for table, wanted, _ in bindings:
            table.slots.note(table, plan.state, wanted)

    @contextmanager
    def hiding_method_state(self, state: OptimizerState) -> Iterator[None]:
        """A block in which ``state`` holds the base's own entries alone: an empty one tells it of a first step."""
        name = self._method.state_name
        kept = {} if name is None else {p: e for p, e in state.items() if isinstance(e, dict) and name in e}
        hidden = {param: entries.pop(str(name)) for param, entries in kept.items()}
        try:
            yield
        finally:
            for param, tensor in hidden.items():
                state[param][str(name)] = tensor
