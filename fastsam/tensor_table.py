"""Tensors -> addresses, sizes and chunks: the one structure all backends work on, and when it must be rebuilt."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from operator import attrgetter, is_
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastsam.memory_layout import (
    Fingerprint,
    addresses,
    allocate_like,
    as_real,
    identities,
    is_dense,
    nested_identities,
    same_order,
)

# The rows of a table, in the order of csrc/tensor_table.h.
PARAM, GRAD, BACKUP, STATE = range(4)
STATE_SLOTS = 3
ROWS = STATE + STATE_SLOTS

SUPPORTED_DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)

# What finding a chunk costs, in elements (csrc/tensor_table.h): threads share the chunks by it.
CHUNK_OVERHEAD = 64

_grad = attrgetter("grad")


class StateNames(NamedTuple):
    """The tensors that a base update keeps for one parameter, under torch.optim's names."""

    moments: tuple[str, ...] = ()
    """One per state slot, of the parameter's shape and dtype."""
    step: str | None = None
    """The 0-dim count of updates, where it is kept in the optimizer's state."""


class Member(NamedTuple):
    """One parameter of a table."""

    index: int
    """Position in the flattened parameter groups, for messages."""
    param: Tensor
    group: int


# Parameters that are looked at together: few enough that all that is asked of them finds them in the cache.
_BLOCK = 256


class _Block:
    """A run of a table's parameters: what they and their gradients looked like when they were last looked at closely."""

    def __init__(self, start: int, params: list[Tensor]) -> None:
        self.start, self.stop = start, start + len(params)
        self.params = params
        self._addresses, self._look = addresses(params), Fingerprint(params)
        self._present: list[int] = []
        self._grad_look: Fingerprint | None = None

    def is_unchanged(self) -> bool:
        return addresses(self.params) == self._addresses and self._look.matches(self.params)

    def has_usual_grads(self, grads: list[Tensor | None]) -> bool:
        """The steady state: the same parameters have gradients, and these can be used as they are."""
        if self._grad_look is None:
            return False
        if len(self._present) == len(grads):
            return self._grad_look.matches(grads)
        present = [i for i, grad in enumerate(grads) if grad is not None]
        return present == self._present and self._grad_look.matches([grads[i] for i in present])

    def expect_grads(self, grads: list[Tensor | None], laid_out: list[Tensor | None]) -> None:
        self._present = [i for i, grad in enumerate(grads) if grad is not None]
        usable = all(map(is_, grads, laid_out))
        self._grad_look = Fingerprint([grads[i] for i in self._present]) if usable else None


class PreparedState(NamedTuple):
    """State tensors that have been allocated but not yet put in place."""

    names: tuple[StateNames, ...]
    chosen: list[int]
    fresh: dict[tuple[int, int], Tensor]
    """By parameter and slot."""
    steps: Tensor


class TensorTable:
    """The parameters of one (device, dtype), with everything that the five operations read and write.

    The lists have one entry per parameter. ``values``, ``grads``, ``backups`` and ``state`` of one parameter have the
    same real dtype, shape and strides, dense in memory; where the tensor that PyTorch knows differs, they are scratch
    copies of it (:meth:`gather`, :meth:`scatter`).

    Attributes:
        device, dtype: of ``values``; a complex parameter is a tensor of pairs of reals.
        groups: for each parameter, the index of its parameter group.
        values: the parameters' memory.
        grads: the present gradients, None where there is none. Valid between :meth:`read_grads` and
            :meth:`drop_grads`.
        backups: where the climb keeps the weights; None for a parameter that has never climbed.
        state: ``STATE_SLOTS`` lists of state tensors, filled by :meth:`publish_state`.
        steps: float32 ``(n,)``, the updates that each parameter has had.
        present: the indices of the parameters that have a gradient.
        climbing: the indices of those that the current climb moves.
        addresses: int64 ``(ROWS, n)`` on the CPU; 0 says "absent".
        cache: what a backend keeps beside the table; it ends with it.
    """

    def __init__(self, device: torch.device, dtype: torch.dtype, members: Sequence[Member]) -> None:
        self.device, self.dtype = device, dtype
        self.params = [m.param for m in members]
        self.groups = [m.group for m in members]
        self._indices = [m.index for m in members]
        # Detached: they keep the memory alive, so that an address that is still the same is still the same memory.
        self._memory = [as_real(p.detach()) for p in self.params]
        self._gaps = [i for i, real in enumerate(self._memory) if not is_dense(real)]
        self.values = list(self._memory)
        for i in self._gaps:
            self.values[i] = torch.empty_like(self._memory[i])
        n = len(self.params)
        self.grads: list[Tensor | None] = [None] * n
        self.backups: list[Tensor | None] = [None] * n
        self.state: list[list[Tensor | None]] = [[None] * n for _ in range(STATE_SLOTS)]
        self.steps = torch.zeros(n, dtype=torch.float32, device=device)
        self.present: list[int] = []
        self.climbing: list[int] = []
        self.climbed = False
        self.cache: dict[str, Any] = {}
        self._empty = [i for i, value in enumerate(self.values) if value.numel() == 0]
        self._rows = bytearray(8 * ROWS * n)
        self.addresses = torch.frombuffer(self._rows, dtype=torch.int64).view(ROWS, n)
        self.tensors = torch.tensor([[v.numel() for v in self.values], self.groups], dtype=torch.int64)
        self._write_row(PARAM, self.values)
        self._blocks = [_Block(start, self.params[start : start + _BLOCK]) for start in range(0, n, _BLOCK)]
        self._grad_scratch: dict[int, Tensor] = {}
        self._climb_key: tuple[Any, ...] | None = None
        self._state_names: tuple[StateNames, ...] | None = None
        self._state_look = b""
        self._stateful: set[int] = set()
        self._covered: list[int] | None = None
        self._written_state: list[Tensor] = []
        self._step_views = list(self.steps.unbind())

    def name(self, i: int) -> str:
        """How messages call a parameter."""
        return f"parameter {self._indices[i]} (shape {tuple(self.params[i].shape)})"

    # ---- what changes from step to step ----

    def changed(self) -> list[int]:
        """The parameters that are not where, or not what, they were when the table was built."""
        if all(block.is_unchanged() for block in self._blocks):
            return []
        now = [as_real(param.detach()) for param in self.params]
        return [
            i
            for i, (memory, present) in enumerate(zip(self._memory, now, strict=True))
            if addresses([memory]) != addresses([present]) or not Fingerprint([memory]).matches([present])
        ]

    def read_grads(self) -> bool:
        """Takes the parameters' present gradients into ``grads`` and the table.

        Returns:
            False, and the table has no gradients, if a parameter has :meth:`changed`.

        Raises:
            RuntimeError: a sparse gradient, or one of another shape or device; the table has no gradients then.
        """
        self.drop_grads()
        grads: list[Tensor | None] = []
        found: list[bytes] = []
        usual = True
        for block in self._blocks:
            if not block.is_unchanged():
                return False
            mine = list(map(_grad, block.params))
            usual = usual and block.has_usual_grads(mine)
            if usual:
                found.append(addresses(mine))
            grads += mine
        if usual:
            self.grads = grads
            self._write_row(GRAD, grads, b"".join(found))
        else:
            self._read_any_grads(grads)
        return True

    def _read_any_grads(self, grads: list[Tensor | None]) -> None:
        self.present = []
        laid_out = [None if g is None else self._lay_out(i, g) for i, g in enumerate(grads)]
        self.grads = laid_out
        self.present = [i for i, g in enumerate(grads) if g is not None]
        self._write_row(GRAD, laid_out)
        for block in self._blocks:
            block.expect_grads(grads[block.start : block.stop], laid_out[block.start : block.stop])

    def _lay_out(self, i: int, grad: Tensor) -> Tensor:
        """The gradient itself where its elements lie as the parameter's do, else a copy that does."""
        value = self.values[i]
        if grad.layout is not torch.strided:
            raise RuntimeError(
                f"{self.name(i)}: sparse gradients are not supported; use dense ones (torch.nn.Embedding(sparse=False))"
            )
        if grad.device != value.device:
            raise RuntimeError(f"{self.name(i)}: its gradient is on {grad.device}, the parameter on {value.device}")
        if grad.shape != self.params[i].shape:
            raise RuntimeError(f"{self.name(i)}: its gradient has shape {tuple(grad.shape)}")
        if grad.is_complex() != self.params[i].is_complex():
            raise RuntimeError(f"{self.name(i)}: its gradient has dtype {grad.dtype}")
        real = grad if not (grad.is_complex() or grad.is_neg()) else as_real(grad)
        if real.dtype == value.dtype and same_order(real, value):
            return real
        if i not in self._grad_scratch:
            self._grad_scratch[i] = torch.empty_like(value)
        return self._grad_scratch[i].copy_(real)

    def drop_grads(self) -> None:
        """Lets go of the gradients: held any longer, they would double the memory of the next backward."""
        self.grads = [None] * len(self.params)

    # ---- the climb ----

    def begin_climb(self, perturb: Sequence[bool]) -> None:
        """Gives a backup to every parameter that has a gradient and whose group climbs (``perturb``)."""
        key = (self.present, tuple(perturb))
        if key != self._climb_key:
            climbing = [i for i in self.present if perturb[self.groups[i]]]
            missing = [i for i in climbing if self.backups[i] is None]
            if missing:
                _, views = allocate_like([self.values[i] for i in missing], zero=False)
                for i, view in zip(missing, views, strict=True):
                    self.backups[i] = view
            moving = set(climbing)
            self._write_row(BACKUP, [b if i in moving else None for i, b in enumerate(self.backups)])
            self.climbing, self._climb_key = climbing, key
        self.gather()

    def undo_elsewhere(self) -> None:
        """Copies the backups to where the parameters are now, for a model that was moved while perturbed."""
        for i in self.climbing:
            backup = self.backups[i]
            assert backup is not None
            as_real(self.params[i].detach()).copy_(backup)
        self.climbed = False

    def gather(self) -> None:
        """Copies the parameters that have gaps in memory into their scratch."""
        for i in self._gaps:
            self.values[i].copy_(self._memory[i])

    def scatter(self, written: list[int], *, state: bool = False) -> None:
        """Makes an operation's writes to the parameters ``written`` (and to the state) known to PyTorch."""
        for i in self._gaps:
            if i in written:
                self._memory[i].copy_(self.values[i])
        everything = len(written) == len(self.params)
        torch.autograd.graph.increment_version(self.params if everything else [self.params[i] for i in written])
        if state:
            torch.autograd.graph.increment_version(self._written_state)

    @property
    def written(self) -> list[int]:
        """The indices that a restore with update writes: those with a gradient, and those that climbed."""
        if len(self.present) == len(self.params):
            return self.present
        return sorted({*self.present, *self.climbing})

    # ---- the base update's state ----

    def prepare_state(
        self, state: Mapping[Tensor, dict[str, Any]], names: Sequence[StateNames]
    ) -> PreparedState | None:
        """Makes what is missing of the state of every parameter that has a gradient (``names``: one per group).

        Returns:
            What :meth:`publish_state` is to put in place; None in the steady state: everything is there.

        Raises:
            RuntimeError: a state tensor has another shape than its parameter.
        """
        names = tuple(names)
        if names == self._state_names and self._covers(self.present) and _look_at(state, names) == self._state_look:
            return None
        wanted = set(self.present)
        chosen = [i for i, p in enumerate(self.params) if i in wanted or p in state]
        self._check_state_shapes(chosen, state, names)
        return PreparedState(names, chosen, *self._make_state(chosen, state, names))

    def _covers(self, present: list[int]) -> bool:
        if present is not self._covered and self._stateful.issuperset(present):
            self._covered = present
        return present is self._covered

    def _check_state_shapes(self, chosen: list[int], state: Mapping[Tensor, Any], names: Sequence[StateNames]) -> None:
        for i in chosen:
            entries = state.get(self.params[i], {})
            for name in names[self.groups[i]].moments:
                value = entries.get(name)
                if value is not None and value.shape != self.params[i].shape:
                    raise RuntimeError(f"{self.name(i)}: its state {name!r} has shape {tuple(value.shape)}")

    def _make_state(
        self, chosen: list[int], state: Mapping[Tensor, Any], names: Sequence[StateNames]
    ) -> tuple[dict[tuple[int, int], Tensor], Tensor]:
        """Allocates, and fills from ``state``, what is not there in a form that the operations can use."""
        steps = self.steps.clone()
        needed: list[tuple[int, int]] = []
        for i in chosen:
            moments, step_name = names[self.groups[i]]
            entries = state.get(self.params[i], {})
            for slot, name in enumerate(moments):
                if entries.get(name) is None or not self._fits(i, entries[name]):
                    needed.append((i, slot))
            if step_name is not None and entries.get(step_name) is not None:
                steps[i].copy_(torch.as_tensor(entries[step_name]).reshape(()), non_blocking=True)
            elif self._state_names is None and moments and entries.get(moments[0]) is not None:
                steps[i].fill_(1.0)  # torch.optim.SGD counts no steps: a momentum buffer says that there was one
        if not needed:
            return {}, steps
        _, views = allocate_like([self.values[i] for i, _ in needed], zero=True)
        fresh = dict(zip(needed, views, strict=True))
        for (i, slot), view in fresh.items():
            value = state.get(self.params[i], {}).get(names[self.groups[i]].moments[slot])
            if value is not None:
                view.copy_(as_real(value))
        return fresh, steps

    def _fits(self, i: int, value: Tensor) -> bool:
        real = as_real(value)
        like = self.values[i]
        return real.dtype == like.dtype and real.device == like.device and same_order(real, like) and is_dense(real)

    def publish_state(self, state: Mapping[Tensor, dict[str, Any]], prepared: PreparedState) -> None:
        """Puts the state under torch.optim's names and into the table."""
        names, chosen, fresh, steps = prepared
        self.steps.copy_(steps)
        self.state = [[None] * len(self.params) for _ in range(STATE_SLOTS)]
        written: dict[int, Tensor] = {id(self.steps): self.steps}
        for i in chosen:
            moments, step_name = names[self.groups[i]]
            # Not touched where there is nothing to keep: reading a defaultdict makes an entry.
            entries = state[self.params[i]] if moments or step_name else {}
            if step_name is not None:
                entries[step_name] = self._step_views[i]
            for slot, name in enumerate(moments):
                value = fresh.get((i, slot))
                if value is None:
                    value = entries[name]
                elif self.params[i].is_complex():
                    value = torch.view_as_complex(value)
                entries[name] = value
                self.state[slot][i] = as_real(value.detach())
                # Views of one allocation share its version.
                base = value if value._base is None else value._base
                written[id(base)] = base
        for slot, tensors in enumerate(self.state):
            self._write_row(STATE + slot, tensors)
        self._written_state = list(written.values())
        self._state_names, self._state_look = names, _look_at(state, names)
        self._stateful, self._covered = set(chosen), self.present

    # ---- addresses and chunks ----

    def _write_row(self, row: int, tensors: list[Tensor] | list[Tensor | None], found: bytes | None = None) -> None:
        size = 8 * len(tensors)
        self._rows[row * size : (row + 1) * size] = addresses(tensors) if found is None else found
        # An empty tensor may have the address 0, which says "absent". It has no chunk, so no address is ever used.
        for i in self._empty:
            self.addresses[row, i] = 0 if tensors[i] is None else 1

    def chunks(self, size: int) -> Tensor:
        """The cut into chunks of at most ``size`` elements: int64 ``(count, 3)``: tensor, start, work before it."""
        key = f"chunks of {size}"
        if key not in self.cache:
            rows, work = [], 0
            for i, value in enumerate(self.values):
                for start in range(0, value.numel(), size):
                    rows.append((i, start, work))
                    work += min(size, value.numel() - start) + CHUNK_OVERHEAD
            self.cache[key] = torch.tensor(rows, dtype=torch.int64).reshape(-1, 3)
        chunks: Tensor = self.cache[key]
        return chunks


def _look_at(state: Mapping[Tensor, dict[str, Any]], names: Sequence[StateNames]) -> bytes:
    """Which tensors ``state`` holds under ``names``, by identity."""
    asked = {name for moments, step in names for name in (*moments, step) if name is not None}
    return nested_identities(state, tuple(sorted(asked)))


class TensorTables:
    """The tables of an optimizer, one per (device, dtype), rebuilt whenever the parameters are not what they were."""

    def __init__(self) -> None:
        self.drop()

    def __iter__(self) -> Iterator[TensorTable]:
        return iter(self._tables)

    def read_grads(self, groups: Sequence[Mapping[str, Any]]) -> list[TensorTable]:
        """The tables for the parameters as they are now, with their present gradients."""
        members = [identities(group["params"]) for group in groups]
        if members != self._members or not all([table.read_grads() for table in self._tables]):
            self.drop()
            self._tables = _build(groups)
            self._members = members
            for table in self._tables:
                table.read_grads()
        return self._tables

    def drop(self) -> None:
        """Forgets everything; the next step builds anew."""
        self._members: list[bytes] = []
        self._tables: list[TensorTable] = []


def _build(groups: Sequence[Mapping[str, Any]]) -> list[TensorTable]:
    buckets: dict[tuple[torch.device, torch.dtype], list[Member]] = {}
    index = 0
    for group_index, group in enumerate(groups):
        for param in group["params"]:
            check_parameter(param, index)
            dtype = param.dtype.to_real() if param.is_complex() else param.dtype
            buckets.setdefault((param.device, dtype), []).append(Member(index, param, group_index))
            index += 1
    return [TensorTable(device, dtype, members) for (device, dtype), members in buckets.items()]


def check_parameter(param: Tensor, index: int) -> None:
    """Raises if FastSAM cannot train ``param``, the ``index``-th of the flattened groups."""
    name = f"parameter {index} (shape {tuple(param.shape)})"
    if torch.utils._python_dispatch.is_traceable_wrapper_subclass(param):
        raise TypeError(f"{name}: {type(param).__name__} parameters are not supported; pass plain tensors")
    if param.layout is not torch.strided:
        raise ValueError(f"{name}: sparse parameters are not supported; use a dense one")
    if param.device.type == "meta":
        raise ValueError(f"{name}: it is on the meta device; give it memory (module.to_empty(device=...)) first")
    real = param.dtype.to_real() if param.is_complex() else param.dtype
    if real not in SUPPORTED_DTYPES:
        raise ValueError(f"{name}: dtype {param.dtype} is not supported; use one of float32, float64, bfloat16, float16")
    try:
        is_dense(param)
    except ValueError as reason:
        raise ValueError(f"{name}: {reason}") from None
