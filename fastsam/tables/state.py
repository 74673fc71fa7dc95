"""The tensors that live in the optimizer's ``state``: moments, masters, method state, step counts.

Each tensor is found there under torch's name, or allocated by itself (a pickled view of a shared block would contain
the whole block). Allocated tensors are in the table's rows at once, but in ``state`` only after
:meth:`StateSlots.publish`, so that an exception before the update leaves ``state`` unchanged.
"""

from __future__ import annotations

from collections.abc import Mapping, MutableMapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from fastsam.distributed import distribute_like, is_distributed, is_placed_like, local_of, placed_like
from fastsam.spec import MASTER_NAME, STATE_SLOTS, STEP_NAME, Row, StateNames
from fastsam.tables.memory import StateMemory, as_real, copy_into, has_memory, is_dense, same_order
from fastsam.tables.signature import Watch, nested_identities

if TYPE_CHECKING:
    from fastsam.tables.table import TensorTable

OptimizerState = MutableMapping[Tensor, dict[str, Any]]

_MOMENTS = tuple(Row(Row.STATE + slot) for slot in range(STATE_SLOTS))
_ROWS = (*_MOMENTS, Row.MASTER, Row.METHOD_STATE, Row.STEP)


class Wanted(NamedTuple):
    """The state that the coming operations need.

    Attributes:
        names: the base update's, one per parameter group.
        method_state: the name of the method state in ``state``, if there is one.
        masters: the indices of the parameters that need their master, and their step count if rounding uses it.
        moments: of those that need the rest of the base update's state.
        method: of those that need method state.
    """

    names: Sequence[StateNames]
    method_state: str | None = None
    masters: Sequence[int] = ()
    moments: Sequence[int] = ()
    method: Sequence[int] = ()


class StateSlots:
    """The rows of one table whose tensors live in the optimizer's ``state``."""

    def __init__(self) -> None:
        self.written: list[Tensor] = []
        """The tensors that an update writes, whose version counters must be bumped."""
        # Allocated, and not in ``state`` yet.
        self._pending: dict[tuple[int, Row], Tensor] = {}
        self._memory = StateMemory()
        self._key: tuple[Any, ...] | None = None
        self._identities: bytes | None = None
        self._alive: list[Any] = []
        self._bound: list[Tensor] = []
        self._has_shards = False
        self._watch: Watch | None = None
        self._made: dict[str, set[int]] = {}
        self._known: list[tuple[Any, ...]] = []

    def bind(self, table: TensorTable, state: OptimizerState, wanted: Wanted) -> bool:
        """Fills the table's rows from ``state`` and allocates what is wanted and missing; ``state`` is not changed.

        Returns:
            Whether anything was done: False in the steady state, where nothing has changed.

        Raises:
            RuntimeError: a state tensor has another shape than its parameter.
        """
        if self._is_current(state, wanted):
            return False
        names = _complete(table, wanted.names)
        made = {name: set(getattr(wanted, name)) for name in ("masters", "moments", "method")}
        made["masters"] |= made["moments"]
        # The random numbers of the ascent depend on the count, too.
        needed = {**made, "step": made["masters"] if table.stochastic else made["moments"]}
        rows: dict[Row, list[Tensor | None]] = {row: [None] * len(table.params) for row in _ROWS}
        pending: dict[tuple[int, Row], Tensor] = {}
        for i, param in enumerate(table.params):
            entries = state.get(param) or {}
            for row, name in _slots(table, names, wanted.method_state, i):
                tensor = self._find(table, entries, row, name, i, needed=i in needed[_NEED[row]], names=names)
                if tensor is not None and tensor is not entries.get(name):
                    pending[i, row] = tensor
                rows[row][i] = None if tensor is None else as_real(local_of(tensor).detach())
        self._pending = pending
        for row, tensors in rows.items():
            table.set_row(row, tensors)
        if table.has_masters:
            table.place_backups()
        self._key, self._made, self._known = (tuple(wanted.names), wanted.method_state), made, []
        self._identities = None
        return True

    def publish(self, table: TensorTable, state: OptimizerState, wanted: Wanted) -> None:
        """Puts the allocated tensors into ``state``."""
        names = _complete(table, wanted.names)
        left: dict[tuple[int, Row], Tensor] = {}
        for (i, row), tensor in self._pending.items():
            # A parameter that was perturbed and is not updated keeps its master for the next step, but has no state.
            if i not in self._made["method" if row == Row.METHOD_STATE else "moments"]:
                left[i, row] = tensor
                continue
            name = dict(_slots(table, names, wanted.method_state, i))[row]
            state.setdefault(table.params[i], {})[name] = tensor  # a base's own state may be a plain dict
        self._pending = left
        if not table.has_masters:
            for param in table.params:  # from steps with master weights
                if param in state:
                    state[param].pop(MASTER_NAME, None)

    def note(self, table: TensorTable, state: OptimizerState, wanted: Wanted) -> None:
        """Remembers which tensors ``state`` holds, once every table has published its own."""
        names = _complete(table, wanted.names)
        self._bound = [
            entries[name]
            for i, param in enumerate(table.params)
            if (entries := state.get(param))
            for _, name in _slots(table, names, wanted.method_state, i)
            if isinstance(entries.get(name), Tensor)
        ]
        self._has_shards = any(map(is_distributed, self._bound))
        bases = {id(base): base for base in (t if t._base is None else t._base for t in self._locals())}
        self.written = self._memory.distinct(list(bases.values()))  # views of one allocation share its version
        self._asked = _names_of(table, names, wanted.method_state)
        self._identities = nested_identities(state, self._asked)
        # An identity is valid only while its object is alive.
        self._alive = [(p, e, *(e.values() if isinstance(e, dict) else ())) for p, e in state.items()]
        self._watch = Watch(self._locals())

    def _locals(self) -> list[Tensor]:
        return list(map(local_of, self._bound)) if self._has_shards else self._bound

    def _is_current(self, state: OptimizerState, wanted: Wanted) -> bool:
        return (
            self._identities is not None
            and self._key == (tuple(wanted.names), wanted.method_state)
            and self._covers(wanted)
            and nested_identities(state, self._asked) == self._identities
            and self._watch is not None
            and self._watch.is_unchanged()
        )

    def _covers(self, wanted: Wanted) -> bool:
        # The lists are the same objects from step to step.
        if wanted[2:] in self._known:
            return True
        if all(self._made[name].issuperset(getattr(wanted, name)) for name in self._made):
            self._known = [*self._known[-2:], wanted[2:]]
            return True
        return False

    def _find(
        self,
        table: TensorTable,
        entries: Mapping[str, Any],
        row: Row,
        name: str,
        i: int,
        *,
        needed: bool,
        names: Sequence[StateNames],
    ) -> Tensor | None:
        """The state tensor itself if the operations can use it, else a copy in the right form; None: not needed."""
        value = entries.get(name)
        if row == Row.STEP:
            wanted = needed or value is not None
            return self._find_step(table, entries, value, names[table.groups[i]]) if wanted else None
        if value is not None and value.shape != table.params[i].shape:
            raise RuntimeError(
                f"{table.name(i)}: its state {name!r} has shape {tuple(value.shape)}; resize it with the parameter, or "
                f"start anew without: optimizer.state[parameter].pop({name!r})"
            )
        if value is not None and _fits(table, i, value):
            return value
        if value is None and (i, row) in self._pending:
            return self._pending[i, row]
        if value is None and row == Row.MASTER and table.is_perturbed and table.masters[i] is not None:
            # Of a perturbed parameter only the master still has the weights.
            return _as_state(table, i, table.rows[Row.MASTER][i])
        if value is None and not needed:
            return None
        initial = names[table.groups[i]].initial if row in _MOMENTS else 0.0
        made = self._memory.allocate(table.values[i], table.state_dtype).fill_(initial)
        if value is not None:
            placed = local_of(placed_like(table.params[i], value))
            copy_into(made, as_real(placed), f"{table.name(i)}: its state {name!r}")
        elif row == Row.MASTER:
            made.copy_(table.values[i])
        return _as_state(table, i, made)

    def _find_step(self, table: TensorTable, entries: Mapping[str, Any], value: Any, names: StateNames) -> Tensor:
        is_tensor = isinstance(value, Tensor)
        if is_tensor and value.dtype == torch.float32 and value.device == table.device and value.shape == ():
            return value
        step = self._memory.allocate(torch.empty((), dtype=torch.float32, device=table.device), torch.float32)
        if is_tensor:
            return step.copy_(local_of(value).detach().reshape(()), non_blocking=True)
        if value is None:
            # torch.optim.SGD counts no steps: a momentum buffer means that there was one.
            value = float(bool(names.moments) and entries.get(names.moments[0]) is not None)
        return step.fill_(float(value))


def _as_state(table: TensorTable, i: int, memory: Tensor) -> Tensor:
    """A table's memory as what ``state`` holds for a parameter."""
    param = table.params[i]
    return distribute_like(param, torch.view_as_complex(memory) if param.is_complex() else memory)


_NEED = {Row.MASTER: "masters", Row.METHOD_STATE: "method", Row.STEP: "step"} | {
    Row(Row.STATE + slot): "moments" for slot in range(STATE_SLOTS)
}


def _complete(table: TensorTable, names: Sequence[StateNames]) -> tuple[StateNames, ...]:
    """The names, with a step count for every base where the table is rounded stochastically: random numbers use it."""
    if not table.stochastic:
        return tuple(names)
    return tuple(mine if mine.step is not None else mine._replace(step=STEP_NAME) for mine in names)


def _slots(table: TensorTable, names: Sequence[StateNames], method_state: str | None, i: int) -> list[tuple[Row, str]]:
    """The rows of a parameter, and the names of their tensors in ``state``."""
    moments, step, _ = names[table.groups[i]] if names else StateNames()
    slots = [(Row(Row.STATE + slot), name) for slot, name in enumerate(moments)]
    if table.has_masters:
        slots.append((Row.MASTER, MASTER_NAME))
    if method_state is not None:
        slots.append((Row.METHOD_STATE, method_state))
    if step is not None:
        slots.append((Row.STEP, step))
    return slots


def _names_of(table: TensorTable, names: Sequence[StateNames], method_state: str | None) -> tuple[str, ...]:
    asked = {name for mine in names for name in (*mine.moments, mine.step) if name is not None}
    asked |= {MASTER_NAME} if table.has_masters else set()
    return tuple(sorted(asked | ({method_state} if method_state is not None else set())))


def _fits(table: TensorTable, i: int, value: Any) -> bool:
    if not is_placed_like(table.params[i], value) or value.is_conj() or value.is_neg():
        return False
    real, like = as_real(local_of(value)), table.values[i]
    return (
        real.dtype == table.state_dtype
        and real.device == like.device
        and same_order(real, like)
        and has_memory(real)
        and is_dense(real)
    )
