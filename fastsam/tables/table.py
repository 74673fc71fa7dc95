"""Geometry of the parameters of one (device, dtype, precision): tensors -> rows of addresses, and chunks."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

from fastsam.distributed import Place, Sharding, is_distributed, local_of, place_of
from fastsam.precision import Precision
from fastsam.runtime.step_number import StepNumber
from fastsam.runtime.streams import current_stream
from fastsam.spec import NONE, ROWS, STATE_SLOTS, AscentForm, DescentForm, Row
from fastsam.tables.gradients import Gradients
from fastsam.tables.memory import allocate_like, as_real, has_memory, is_dense
from fastsam.tables.signature import ParameterReader, describe
from fastsam.tables.state import StateSlots

# What finding a chunk costs, in elements (csrc/table.h): threads share the chunks by it.
CHUNK_OVERHEAD = 64

Tensors = list[Tensor | None]
Attachment = TypeVar("Attachment")


class Member(NamedTuple):
    """One parameter of a table."""

    position: int
    """In the flattened parameter groups, for messages and random numbers."""
    param: Tensor
    group: int


class TensorTable:
    """The parameters of one device, dtype and precision, with everything that the five operations read and write.

    ``rows[row]`` has one tensor (or None) per parameter; ``addresses`` has the same as addresses. The tensors of one
    parameter have the same shape and strides, dense in memory; where the tensor that PyTorch knows differs, they are
    scratch copies of it (:meth:`gather`, :meth:`scatter`). Complex parameters are tensors of pairs of reals.

    Attributes:
        device, dtype: of the parameters (a real dtype).
        state_dtype: of state, masters and method state: float32 with master weights, else ``dtype``.
        grad_dtype: of the gradients: ``dtype``, or float32 if one of a 16-bit table's gradients has another dtype.
        stochastic, has_masters: the table's :class:`~fastsam.precision.Precision`.
        sharding: the process groups whose other ranks hold the rest of the parameters.
        params, groups, positions: the parameters, the indices of their groups, their positions in the flattened groups.
        locals: the parameters' detached memory on this rank: the shards of DTensors.
        rows: for each :class:`~fastsam.spec.Row` a list of tensors.
        present: the indices of the parameters that have a gradient.
        perturbed: the indices of the parameters that the present ascent perturbs.
        is_perturbed: whether ``perturb_`` has run, and neither restore nor update since.
        addresses: int64 ``(ROWS, n)`` on the CPU; 0 says "absent".
        versions: a number per row of ``addresses``, which changes whenever the row changes.
        tensors: int64 ``(2, n)``: sizes and groups.
        gradients, slots: what fills the rows of gradients and of state.
    """

    def __init__(
        self,
        device: torch.device,
        dtype: torch.dtype,
        members: Sequence[Member],
        precision: Precision = Precision(),  # noqa: B008 (a NamedTuple does not change)
        sharding: Sharding = (),
    ) -> None:
        self.device, self.dtype = device, dtype
        self.precision, self.sharding = precision, sharding
        self.stochastic, self.has_masters = precision
        self.state_dtype = torch.float32 if self.has_masters else dtype
        self.grad_dtype = self.first_grad_dtype = dtype
        self.params = [m.param for m in members]
        self.groups = [m.group for m in members]
        self.positions = [m.position for m in members]
        # Detached tensors, which keep the memory alive: an equal address is then the same memory.
        self.locals = [local_of(p).detach() for p in self.params]
        self._memory = [as_real(p) for p in self.locals]
        self._sharded = [i for i, param in enumerate(self.params) if is_distributed(param)]
        self._gaps = [i for i, real in enumerate(self._memory) if not is_dense(real)]
        values = list(self._memory)
        for i in self._gaps:
            values[i] = torch.empty_like(self._memory[i])
        n = len(self.params)
        self._absent: Tensors = [None] * n
        self.rows: list[Any] = [self._absent] * ROWS
        self.present: list[int] = []
        self.perturbed: list[int] = []
        self.is_perturbed = False
        self._empty = [i for i, value in enumerate(values) if value.numel() == 0]
        self._bytes = bytearray(8 * ROWS * n)
        self.addresses = torch.frombuffer(self._bytes, dtype=torch.int64).view(ROWS, n)
        self.versions = [0] * ROWS
        self._found: list[bytes | None] = [None] * ROWS
        self.tensors = torch.tensor([[v.numel() for v in values], self.groups], dtype=torch.int64, device="cpu")
        self.set_row(Row.PARAM, values)
        # Of each parameter alone, because resizing one also resizes the memory of its detached alias.
        self._descriptions = [describe([local_of(p)]) for p in self.params]
        self.reader = ParameterReader(self.params)
        self.gradients = Gradients()
        self.slots = StateSlots()
        self._first_versions: list[int] = []
        self._backup_key: tuple[Any, ...] | None = None
        # Rows whose tensors live until the end of the step.
        self._of_this_step: set[Row] = set()
        self._attachments: dict[Any, Any] = {}
        self.made_on = current_stream(device)
        self._chunks: dict[int, Tensor] = {}

    # ---- rows ----

    def row(self, row: int) -> Tensors:
        """The tensors of a row."""
        return self.rows[row]

    @property
    def values(self) -> list[Tensor]:
        """The parameters' memory."""
        values: list[Tensor] = self.rows[Row.PARAM]
        return values

    @functools.cached_property
    def places(self) -> list[Place]:
        """Where each parameter's shard lies in it, for random numbers."""
        return [place_of(param) for param in self.params]

    @functools.cached_property
    def needs_lists(self) -> bool:
        """Whether a shard's elements are not consecutive in its parameter and need random numbers: kernels count up."""
        return self.stochastic and any(place.axes for place in self.places)

    def random_places(self) -> Tensor:
        """Int64 ``(2, n)``, for random numbers: :attr:`positions`, and the numbers of the shards' first elements."""
        return torch.tensor([self.positions, [place.offset for place in self.places]], dtype=torch.int64, device="cpu")

    @property
    def grads(self) -> Tensors:
        """The present gradients. Valid between :meth:`read_grads` and :meth:`drop_grads`."""
        return self.rows[Row.GRAD]

    @property
    def backups(self) -> Tensors:
        """The weights before the ascent; None for a parameter that is not perturbed."""
        return self.rows[Row.BACKUP]

    @property
    def masters(self) -> Tensors:
        """The float32 master weights."""
        return self.rows[Row.MASTER]

    @property
    def state(self) -> list[Tensors]:
        """``STATE_SLOTS`` lists of state tensors."""
        return self.rows[Row.STATE : Row.STATE + STATE_SLOTS]

    @property
    def first_grads(self) -> Tensors:
        """The first pass's gradients, where the method needs them."""
        return self.rows[Row.FIRST_GRAD]

    @property
    def directions(self) -> Tensors:
        """Directions of ascent that are not gradients."""
        return self.rows[Row.DIRECTION]

    @property
    def method_state(self) -> Tensors:
        """What the method keeps from step to step."""
        return self.rows[Row.METHOD_STATE]

    @property
    def steps(self) -> Tensors:
        """Float32, 0-dim: the number of updates of each parameter; None where the count is not needed."""
        return self.rows[Row.STEP]

    def set_row(self, row: Row, tensors: list[Tensor] | Tensors, found: bytes | None = None) -> None:
        """Sets a row to ``tensors``; ``found``: their addresses, if known; the same object: the same addresses."""
        self.rows[row] = tensors
        if found is not None and found is self._found[row]:
            return
        self._found[row] = None  # until the addresses are written
        numbers = bytearray(describe(tensors).addresses if found is None else found)
        # An empty tensor may have the address 0, which means "absent". It has no chunk, so its address is never used.
        for i in self._empty:
            if row != Row.STEP:
                numbers[8 * i : 8 * i + 8] = int(tensors[i] is not None).to_bytes(8, sys.byteorder)
        place = slice(row * len(numbers), (row + 1) * len(numbers))
        if self._bytes[place] != numbers:
            self._check_addresses(row, tensors, numbers)
            self._bytes[place] = numbers
            self.versions[row] += 1
        self._found[row] = found

    def _check_addresses(self, row: Row, tensors: Sequence[Tensor | None], numbers: bytearray) -> None:
        """Raises RuntimeError if a tensor has no address: kernels would take it for absent."""
        if bytes(8) not in numbers:
            return
        for i, address in enumerate(memoryview(numbers).cast("q")):
            if address == 0 and tensors[i] is not None:
                raise RuntimeError(f"{self.name(i)}: the tensor of its {row.name} has no memory")

    def name(self, i: int) -> str:
        """The name of a parameter in messages."""
        return f"parameter {self.positions[i]} (shape {tuple(self.params[i].shape)})"

    def attached(self, make: Callable[[TensorTable], Attachment]) -> Attachment:
        """What a backend stores with the table: made by ``make`` at the first call, and dropped with the table.

        It must not refer to the table: a cycle would keep the memory of the backups until the garbage collector runs.
        """
        if make not in self._attachments:
            self._attachments[make] = make(self)
        attachment: Attachment = self._attachments[make]
        return attachment

    def chunks(self, size: int) -> Tensor:
        """The chunks of at most ``size`` elements: int64 ``(count, 3)``: tensor, first element, work before it."""
        if size not in self._chunks:
            rows, work = [], 0
            for i, value in enumerate(self.values):
                for start in range(0, value.numel(), size):
                    rows.append((i, start, work))
                    work += min(size, value.numel() - start) + CHUNK_OVERHEAD
            self._chunks[size] = torch.tensor(rows, dtype=torch.int64, device="cpu").reshape(-1, 3)
        return self._chunks[size]

    # ---- what changes from step to step ----

    def changed(self) -> list[int]:
        """The parameters whose address or metadata differ from those when the table was built."""
        if self.reader.is_unchanged():
            return []
        return [i for i, param in enumerate(self.params) if describe([local_of(param)]) != self._descriptions[i]]

    def read_grads(self) -> bool:
        """Reads the parameters' present gradients; False, and no gradients, if a parameter has :meth:`changed`."""
        return self.gradients.read(self)

    def drop_grads(self) -> None:
        """Drops the references to gradients, which would double the memory of the next backward."""
        self.rows[Row.GRAD] = self._absent

    @property
    def has_own_grads(self) -> bool:
        """Whether the gradients, first-pass gradients included, have the table's own dtype."""
        return self.grad_dtype == self.first_grad_dtype == self.dtype

    def keep_first_grads(self) -> None:
        """Makes the perturbed parameters' present gradients their first-pass gradients, without a copy if possible."""
        firsts: Tensors = [None] * len(self.params)
        for i in self.perturbed:
            if self.grads[i] is not None:
                firsts[i] = self.gradients.adopt(self, i)
        self.first_grad_dtype = self.grad_dtype
        self.set_row(Row.FIRST_GRAD, firsts)
        self._first_versions = [grad._version for grad in firsts if grad is not None]
        self._of_this_step.add(Row.FIRST_GRAD)

    def take_grads_for_first_ones(self) -> None:
        """In a step of one pass, its gradients are those at w: the update reads them in the first ones' place."""
        self.first_grad_dtype = self.grad_dtype
        self.set_row(Row.FIRST_GRAD, list(self.grads))
        self._of_this_step.add(Row.FIRST_GRAD)

    def check_first_grads(self) -> None:
        """Raises RuntimeError if somebody has written to the first-pass gradients since."""
        if not self._first_versions:
            return
        kept = [(i, grad) for i, grad in enumerate(self.first_grads) if grad is not None]
        for (i, grad), version in zip(kept, self._first_versions, strict=True):
            if grad._version != version:
                raise RuntimeError(
                    f"{self.name(i)}: its first-pass gradient was written to between the passes; call restore(), and "
                    "give .grad a tensor that nobody else writes to"
                )

    def fill_missing_grads(self) -> None:
        """Gives zeros to perturbed parameters without a gradient: a further ascent still counts their perturbation."""
        missing = [i for i in self.perturbed if self.grads[i] is None]
        if not missing:
            return
        grads = list(self.grads)
        for i in missing:
            grads[i] = torch.zeros_like(self.values[i], dtype=self.grad_dtype)
        self.set_row(Row.GRAD, grads)

    def set_directions(self, tensors: Tensors) -> None:
        """Sets the directions of this step to ``tensors``, which are laid out like ``values``."""
        self.set_row(Row.DIRECTION, tensors)
        self._of_this_step.add(Row.DIRECTION)

    def begin_step(self) -> None:
        """A step's first ascent is about to begin."""
        if (number := self._attachments.get(StepNumber)) is not None:
            number.begin_step()

    def end_step(self) -> None:
        """Drops what lives for one step: first-pass gradients and directions."""
        self.is_perturbed = False
        self._first_versions = []
        self.first_grad_dtype = self.dtype
        for row in self._of_this_step:
            self.set_row(row, self._absent)
        self._of_this_step.clear()

    # ---- the ascent ----

    def choose_perturbed(self, perturb: Sequence[bool], among: list[int]) -> None:
        """Gives a backup to each parameter of ``among`` whose group is perturbed (``perturb``: one per group)."""
        self.gather()
        key = (among, tuple(perturb))
        if key != self._backup_key:
            self.perturbed = [i for i in among if perturb[self.groups[i]]]
            self.place_backups()
            self._backup_key = key

    def place_backups(self) -> None:
        """Fills the row of backups: with the masters, if there are any, else with memory of the table's own."""
        self._backup_key = None
        if self.has_masters:
            known: Tensors = self.masters
        else:
            known = self.attached(_Backups).tensors
            missing = [i for i in self.perturbed if known[i] is None]
            if missing:
                views = allocate_like([self.values[i] for i in missing], zero=False)
                for i, view in zip(missing, views, strict=True):
                    known[i] = view
        moving = set(self.perturbed)
        self.set_row(Row.BACKUP, [tensor if i in moving else None for i, tensor in enumerate(known)])

    def check_memory(self) -> None:
        """Raises RuntimeError if a perturbed parameter has no memory to which it could be restored."""
        for i in self.perturbed if self.is_perturbed else ():
            if not has_memory(self.params[i]):
                raise RuntimeError(
                    f"{self.name(i)}: its storage was freed while it was perturbed; give it memory, then call restore()"
                )

    def restore_elsewhere(self) -> None:
        """Copies the backups into the parameters' present memory, for a model that was moved while perturbed."""
        for i in self.perturbed:
            backup = self.backups[i]
            assert backup is not None
            as_real(local_of(self.params[i]).detach()).copy_(backup.to(self.dtype))
        self.is_perturbed = False

    def gather(self) -> None:
        """Copies the parameters that are not dense in memory into scratch memory."""
        for i in self._gaps:
            self.values[i].copy_(self._memory[i])

    def scatter(self, written: list[int], *, state: bool = False) -> None:
        """After an operation wrote the parameters ``written``: copies scratch back and bumps version counters.

        ``state``: it wrote the state, too; else only the parameters and their masters.
        """
        for i in self._gaps:
            if i in written:
                self._memory[i].copy_(self.values[i])
        everything = len(written) == len(self.params)
        moved = self.params if everything else [self.params[i] for i in written]
        if self._sharded:  # a DTensor and its shard each have a version
            moved = moved + [
                self.locals[i] for i in (self._sharded if everything else set(written) & set(self._sharded))
            ]
        if state:
            moved = moved + self.slots.written
        elif self.has_masters:
            moved = moved + [m for m in (self.masters[i] for i in written) if m is not None]
        torch.autograd.graph.increment_version(moved)

    @property
    def written(self) -> list[int]:
        """The indices that an update writes: parameters with a gradient, and perturbed ones."""
        if len(self.present) == len(self.params):
            return self.present
        return sorted({*self.present, *self.perturbed})


class _Backups:
    """A table's own memory for backups, reused in every step."""

    def __init__(self, table: TensorTable) -> None:
        self.tensors: Tensors = [None] * len(table.params)


def taking_part(form: AscentForm | DescentForm, table: TensorTable) -> list[int]:
    """The indices of a table's parameters that a form applies to."""
    if isinstance(form, AscentForm):
        return [i for i in table.perturbed if table.rows[form.x][i] is not None]
    needed = {form.y, *((Row.FIRST_GRAD, Row.METHOD_STATE) if form.keeps else ())} - {NONE}
    return [i for i in table.present if all(table.rows[row][i] is not None for row in needed)]


Groups = Sequence[Mapping[str, Any]]
