"""Tensors -> addresses, sizes and chunks: the one structure all backends work on, and when it must be rebuilt."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from operator import is_
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.parameter import is_lazy

from fastsam.fingerprint import BLOCK, ParameterBlock, describe, identities
from fastsam.memory_layout import allocate_like, as_real, check_disjoint, check_parameter, is_dense, same_order
from fastsam.optimizer_state import MASTER_SLOT, STATE_SLOTS, OptimizerState, PreparedState, StateBinding, StateNames
from fastsam.precision import Precision, precision_of

# The rows of a table, in the order of csrc/tensor_table.h.
PARAM, GRAD, BACKUP, STATE = range(4)
MASTER = STATE + MASTER_SLOT
# Of methods beyond SAM: a gradient taken in the first pass (or a random direction), and what is kept between steps.
TAKEN, KEPT = MASTER + 1, MASTER + 2
ROWS = KEPT + 1

# What finding a chunk costs, in elements (csrc/tensor_table.h): threads share the chunks by it.
CHUNK_OVERHEAD = 64


class Member(NamedTuple):
    """One parameter of a table."""

    position: int
    """In the flattened parameter groups, for messages."""
    param: Tensor
    group: int


class TensorTable:
    """The parameters of one (device, dtype, precision), with everything that the five operations read and write.

    The lists have one entry per parameter. ``values``, ``grads``, ``backups`` and ``state`` of one parameter have the
    same real dtype (``grads``: ``grad_dtype``), shape and strides, dense in memory; where the tensor that PyTorch knows
    differs, they are scratch copies of it (:meth:`gather`, :meth:`scatter`). In a table with masters these and
    ``state`` are float32, and the backup of a parameter is its master.

    Attributes:
        device, dtype: of ``values``; a complex parameter is a tensor of pairs of reals.
        grad_dtype: of ``grads``: ``dtype``, or, if one of a low-precision table's gradients is of another, float32,
            in which they are computed with: they may hold what ``dtype`` cannot.
        stochastic, has_masters: the table's :class:`~fastsam.precision.Precision`.
        groups: for each parameter, the index of its parameter group.
        positions: for each parameter, its place in the flattened parameter groups.
        values: the parameters' memory.
        grads: the present gradients, None where there is none. Valid between :meth:`read_grads` and
            :meth:`drop_grads`.
        backups: where the climb keeps the weights; None for a parameter that has never climbed.
        masters: the fp32 weights; those of what climbs are there from :meth:`begin_climb` on, all others that are
            updated from :meth:`publish_state` on.
        state: ``STATE_SLOTS`` lists of state tensors, filled by :meth:`publish_state`.
        taken: gradients of the first pass (:meth:`take_grads`) or directions (:meth:`lend`), None where there is none.
        kept: what a method keeps from step to step (:meth:`keep`).
        steps: float32 ``(n,)``, the updates that each parameter has had.
        present: the indices of the parameters that have a gradient.
        climbing: the indices of those that the current climb moves.
        addresses: int64 ``(ROWS, n)`` on the CPU; 0 says "absent".
        versions: one number per row of ``addresses``, another one whenever the row has changed.
        cache: what a backend keeps beside the table; it ends with it.
    """

    def __init__(
        self,
        device: torch.device,
        dtype: torch.dtype,
        members: Sequence[Member],
        precision: Precision = Precision(),  # noqa: B008 (a NamedTuple does not change)
    ) -> None:
        self.device, self.dtype = device, dtype
        self.grad_dtype = self._taken_dtype = dtype
        self._has_taken = False
        self.stochastic, self.has_masters = precision
        self.params = [m.param for m in members]
        self.groups = [m.group for m in members]
        self.positions = [m.position for m in members]
        # Detached: they keep the memory alive, so that an address that is still the same is still the same memory.
        self._originals = [p.detach() for p in self.params]
        self._memory = [as_real(p) for p in self._originals]
        self._gaps = [i for i, real in enumerate(self._memory) if not is_dense(real)]
        self.values = list(self._memory)
        for i in self._gaps:
            self.values[i] = torch.empty_like(self._memory[i])
        n = len(self.params)
        self.grads: list[Tensor | None] = [None] * n
        self.backups: list[Tensor | None] = [None] * n
        self.masters: list[Tensor | None] = [None] * n
        self.state: list[list[Tensor | None]] = [[None] * n for _ in range(STATE_SLOTS)]
        self.taken: list[Tensor | None] = [None] * n
        self.kept: list[Tensor | None] = [None] * n
        self.steps = torch.zeros(n, dtype=torch.float32, device=device)
        self.present: list[int] = []
        self.climbing: list[int] = []
        self.climbed = False
        self.cache: dict[str, Any] = {}
        self._empty = [i for i, value in enumerate(self.values) if value.numel() == 0]
        self._rows = bytearray(8 * ROWS * n)
        self.addresses = torch.frombuffer(self._rows, dtype=torch.int64).view(ROWS, n)
        self.versions = [0] * ROWS
        self.tensors = torch.tensor([[v.numel() for v in self.values], self.groups], dtype=torch.int64)
        self._write_row(PARAM, self.values)
        # Of each parameter alone: a resized one takes its detached twin's memory along.
        self._descriptions = [describe([p]) for p in self.params]
        self._blocks = [ParameterBlock(start, self.params[start : start + BLOCK]) for start in range(0, n, BLOCK)]
        self._grad_scratch: dict[int, Tensor] = {}
        self._kept_as: dict[int, Tensor] = {}
        self._climb_key: tuple[Any, ...] | None = None
        # Not self.name: a ring of references would hold the backups' memory beyond the table's end.
        name = partial(_name, self.positions, self.params)
        self._binding = StateBinding(self.params, self.values, self.groups, self.steps, name, precision)

    def name(self, i: int) -> str:
        """How messages call a parameter."""
        return _name(self.positions, self.params, i)

    # ---- what changes from step to step ----

    def changed(self) -> list[int]:
        """The parameters that are not where, or not what, they were when the table was built."""
        if all(block.is_unchanged() for block in self._blocks):
            return []
        return [i for i, param in enumerate(self.params) if describe([param]) != self._descriptions[i]]

    def read_grads(self) -> bool:
        """Takes the parameters' present gradients into ``grads`` and the table.

        Returns:
            False, and the table has no gradients, if a parameter has :meth:`changed`.

        Raises:
            RuntimeError: a sparse gradient, or one of another shape or device; the table has no gradients then.
        """
        self.drop_grads()
        grads: list[Tensor | None] = []
        found: list[bytes | None] = []
        for block in self._blocks:
            if not block.is_unchanged():
                return False
            mine, addresses = block.read_grads()
            grads += mine
            found.append(addresses)
        usual = [addresses for addresses in found if addresses is not None]
        if len(usual) == len(found):
            self.grads = grads
            self._write_row(GRAD, grads, b"".join(usual))
        else:
            self._read_any_grads(grads)
        return True

    def _read_any_grads(self, grads: list[Tensor | None]) -> None:
        present = [(i, g) for i, g in enumerate(grads) if g is not None]
        for i, grad in present:
            self._check_grad(i, grad)
        ordinary = all(grad.dtype == self.params[i].dtype for i, grad in present)
        self.grad_dtype = self.dtype if ordinary else torch.promote_types(self.dtype, torch.float32)
        laid_out = [None if g is None else self._lay_out(i, g) for i, g in enumerate(grads)]
        self.grads = laid_out
        self.present = [i for i, _ in present]
        self._write_row(GRAD, laid_out)
        for block in self._blocks:
            mine = slice(block.start, block.stop)
            block.expect_grads(grads[mine], usable=all(map(is_, grads[mine], laid_out[mine])))

    def _check_grad(self, i: int, grad: Tensor) -> None:
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

    def _lay_out(self, i: int, grad: Tensor) -> Tensor:
        """The gradient itself where its elements are and lie as they are to, else a copy where they do."""
        real = grad if not (grad.is_complex() or grad.is_neg()) else as_real(grad)
        if real.dtype == self.grad_dtype and same_order(real, self.values[i]):
            return real
        if i not in self._grad_scratch or self._grad_scratch[i].dtype != self.grad_dtype:
            self._grad_scratch[i] = torch.empty_like(self.values[i], dtype=self.grad_dtype)
        return self._grad_scratch[i].copy_(real)

    @property
    def has_own_grads(self) -> bool:
        """Whether the gradients, taken ones included, are of the table's own dtype."""
        return self.grad_dtype == self._taken_dtype == self.dtype

    def drop_grads(self) -> None:
        """Lets go of the gradients: held any longer, they would double the memory of the next backward."""
        self.grads = [None] * len(self.params)

    # ---- the climb ----

    def begin_climb(
        self,
        perturb: Sequence[bool],
        state: OptimizerState | None = None,
        names: Sequence[StateNames] = (),
        among: list[int] | None = None,
    ) -> None:
        """Gives a backup to each parameter, with a gradient or of ``among``, whose group climbs (``perturb``).

        Args:
            perturb: one per parameter group.
            state: the optimizer's, for masters and for the counts that random numbers need.
            names: as for :meth:`prepare_state`.
            among: indices of parameters.

        Raises:
            RuntimeError: a master has another shape than its parameter.
        """
        self.gather()
        among = self.present if among is None else among
        key = (among, tuple(perturb))
        if is_new := key != self._climb_key:
            self.climbing = [i for i in among if perturb[self.groups[i]]]
            self._climb_key = None
        if self.stochastic or self.has_masters:
            masters = self._binding.prepare_climb({} if state is None else state, names, self.climbing)
            if masters is not None:
                # Those that do not climb now may be updated nevertheless.
                self.masters = [masters.get(i, known) for i, known in enumerate(self.masters)]
                self._write_row(MASTER, self.masters)
                is_new = True
        if is_new:
            self._place_backups()
            self._climb_key = key

    def _place_backups(self) -> None:
        if self.has_masters:
            self.backups = list(self.masters)
        missing = [i for i in self.climbing if self.backups[i] is None]
        if missing:
            views = allocate_like([self.values[i] for i in missing], zero=False)
            for i, view in zip(missing, views, strict=True):
                self.backups[i] = view
        moving = set(self.climbing)
        self._write_row(BACKUP, [b if i in moving else None for i, b in enumerate(self.backups)])

    def undo_elsewhere(self) -> None:
        """Copies the backups to where the parameters are now, for a model that was moved while perturbed."""
        for i in self.climbing:
            backup = self.backups[i]
            assert backup is not None
            as_real(self.params[i].detach()).copy_(backup.to(self.dtype))
        self.climbed = False

    def gather(self) -> None:
        """Copies the parameters that have gaps in memory into their scratch."""
        for i in self._gaps:
            self.values[i].copy_(self._memory[i])

    def scatter(self, written: list[int], *, state: bool = False) -> None:
        """Makes an operation's writes to the parameters ``written``, their masters (and the state) known to PyTorch."""
        for i in self._gaps:
            if i in written:
                self._memory[i].copy_(self.values[i])
        everything = len(written) == len(self.params)
        torch.autograd.graph.increment_version(self.params if everything else [self.params[i] for i in written])
        if state:
            torch.autograd.graph.increment_version(self._binding.written)
        elif self.has_masters:
            torch.autograd.graph.increment_version([m for m in (self.masters[i] for i in written) if m is not None])

    @property
    def written(self) -> list[int]:
        """The indices that a restore with update writes: those with a gradient, and those that climbed."""
        if len(self.present) == len(self.params):
            return self.present
        return sorted({*self.present, *self.climbing})

    # ---- what methods beyond SAM read ----

    def row(self, row: int) -> Sequence[Tensor | None]:
        """The tensors whose addresses a row holds."""
        if row == PARAM:
            return self.values
        rows = {GRAD: self.grads, BACKUP: self.backups, TAKEN: self.taken, KEPT: self.kept}
        return rows[row] if row in rows else self.state[row - STATE]

    def take_grads(self) -> None:
        """Makes the climbing parameters' gradients ``taken`` ones; autograd is to allocate others (``.grad`` None)."""
        taken: list[Tensor | None] = [None] * len(self.params)
        for i in self.climbing:
            grad = self.grads[i]
            assert grad is not None
            # Scratch is written again by the next read_grads; a view (DDP's bucket) by the next backward.
            if self._grad_scratch.get(i) is grad:
                del self._grad_scratch[i]
            elif grad._base is not None and not self.params[i].is_complex():
                grad = torch.empty_like(self.values[i], dtype=grad.dtype).copy_(grad)
            taken[i] = grad
        self.lend(taken)

    def lend(self, tensors: list[Tensor | None]) -> None:
        """Makes ``tensors`` (like ``values`` or ``grads``) the ``taken`` ones, until :meth:`drop_taken`."""
        self.taken = tensors
        dtype = next((tensor.dtype for tensor in tensors if tensor is not None), None)
        self._has_taken, self._taken_dtype = dtype is not None, dtype or self.dtype
        self._write_row(TAKEN, tensors)

    def drop_taken(self) -> None:
        """Lets go of them."""
        if self._has_taken:
            self.lend([None] * len(self.params))

    def keep(self, state: OptimizerState, name: str, indices: Sequence[int]) -> None:
        """Finds what is kept under ``name`` in ``state``; for the parameters ``indices`` makes it, of zeros.

        Raises:
            RuntimeError: what is kept has another shape than its parameter.
        """
        kept: list[Tensor | None] = [None] * len(self.params)
        wanted = set(indices)
        for i, param in enumerate(self.params):
            value = state[param].get(name) if param in state else None
            if value is None and i not in wanted:
                continue
            if value is None or value is not self._kept_as.get(i):
                value = self._lay_out_kept(i, name, value)
                state[param][name] = torch.view_as_complex(value) if param.is_complex() else value
                self._kept_as[i] = state[param][name]
            kept[i] = as_real(state[param][name])
        self.kept = kept
        self._write_row(KEPT, kept)

    def _lay_out_kept(self, i: int, name: str, value: Tensor | None) -> Tensor:
        like = self.values[i]
        if value is None:
            return torch.zeros_like(like)
        if value.shape != self.params[i].shape:
            raise RuntimeError(f"{self.name(i)}: its state {name!r} has shape {tuple(value.shape)}")
        real = as_real(value)
        if real.dtype == like.dtype and real.device == like.device and same_order(real, like) and is_dense(real):
            return real
        return torch.empty_like(like).copy_(real)

    # ---- the base update's state ----

    def prepare_state(
        self, state: OptimizerState, names: Sequence[StateNames], among: list[int] | None = None
    ) -> PreparedState | None:
        """Makes what is missing of the state of every parameter that has a gradient, or of ``among``.

        Args:
            state: the optimizer's.
            names: one per parameter group.
            among: indices of parameters; those that have a state keep it in any case.

        Returns:
            What :meth:`publish_state` is to put in place; None in the steady state: everything is there.

        Raises:
            RuntimeError: a state tensor has another shape than its parameter.
        """
        return self._binding.prepare(state, names, self.present if among is None else among)

    def publish_state(self, state: OptimizerState, prepared: PreparedState) -> None:
        """Puts the state under torch.optim's names and into the table."""
        *self.state, masters = self._binding.publish(state, prepared)
        for slot, tensors in enumerate(self.state):
            self._write_row(STATE + slot, tensors)
        if self.has_masters:
            # What has climbed and has no state yet keeps its master, too.
            self.masters = [old if new is None else new for new, old in zip(masters, self.masters, strict=True)]
            self._write_row(MASTER, self.masters)
            self._place_backups()

    def note_state(self, state: OptimizerState) -> None:
        """Remembers which tensors ``state`` holds, once every table has published its own."""
        self._binding.note(state)

    # ---- addresses and chunks ----

    def _write_row(self, row: int, tensors: list[Tensor] | list[Tensor | None], found: bytes | None = None) -> None:
        numbers = bytearray(describe(tensors).addresses if found is None else found)
        # An empty tensor may have the address 0, which says "absent". It has no chunk, so no address is ever used.
        for i in self._empty:
            numbers[8 * i : 8 * i + 8] = int(tensors[i] is not None).to_bytes(8, sys.byteorder)
        place = slice(row * len(numbers), (row + 1) * len(numbers))
        if self._rows[place] != numbers:
            self._rows[place] = numbers
            self.versions[row] += 1

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


def _name(positions: Sequence[int], params: Sequence[Tensor], i: int) -> str:
    return f"parameter {positions[i]} (shape {tuple(params[i].shape)})"


class TensorTables:
    """The tables of an optimizer, one per device, dtype and precision, rebuilt whenever these or parameters change."""

    def __init__(self) -> None:
        self._members: list[tuple[Any, ...]] = []
        self._tables: list[TensorTable] = []

    def __iter__(self) -> Iterator[TensorTable]:
        return iter(self._tables)

    def read_grads(self, groups: Sequence[Mapping[str, Any]]) -> list[TensorTable]:
        """The tables for the parameters as they are now, with their present gradients."""
        members = [(identities(g["params"]), g.get("rounding"), g.get("master_weights")) for g in groups]
        if members != self._members or not all(table.read_grads() for table in self._tables):
            self.drop()
            self._tables = _build(groups)
            # A lazy parameter that has got its memory is still the same object, but not in a table yet.
            lazy = any(is_lazy(param) for group in groups for param in group["params"])
            self._members = [] if lazy else members
            for table in self._tables:
                table.read_grads()
        return self._tables

    @contextmanager
    def holding_grads(self) -> Iterator[None]:
        """A block in which the tables read and use gradients; they let go of them at its end, however it ends."""
        try:
            yield
        finally:
            for table in self._tables:
                table.drop_grads()

    def drop(self) -> None:
        """Forgets everything; the next step builds anew."""
        self._members, self._tables = [], []


def _build(groups: Sequence[Mapping[str, Any]]) -> list[TensorTable]:
    buckets: dict[tuple[torch.device, torch.dtype, Precision], list[Member]] = {}
    params = [(param, index) for index, group in enumerate(groups) for param in group["params"]]
    for position, (param, _) in enumerate(params):
        check_parameter(param, position)
    check_disjoint([param for param, _ in params])
    for position, (param, group_index) in enumerate(params):
        if is_lazy(param):
            continue
        dtype = param.dtype.to_real() if param.is_complex() else param.dtype
        key = param.device, dtype, precision_of(groups[group_index], dtype)
        buckets.setdefault(key, []).append(Member(position, param, group_index))
    return [TensorTable(device, dtype, members, precision) for (device, dtype, precision), members in buckets.items()]
