"""Everything that knows DTensors, meshes and process groups: local shards, and sums over the ranks that hold the rest.

Inside, the engine, the tables and the kernels work on plain local tensors. Outside, parameters, gradients, state and
method buffers are what PyTorch's users see.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

if TYPE_CHECKING:
    from fastsam.methods import Method

ShardGroups = Any
"""The option ``shard_groups``: None, a process group, several, or a function of a parameter that returns some."""

Sharding = tuple[str, ...]
"""The names of the process groups over which sums over a parameter must be added up; empty: it is whole here."""


# ---- local shards ----


def is_distributed(tensor: Any) -> bool:
    """Whether it is a DTensor."""
    module = sys.modules.get("torch.distributed.tensor")  # there are no DTensors before it is imported
    return module is not None and isinstance(tensor, module.DTensor)


def local_of(tensor: Any) -> Any:
    """The local shard of a DTensor, in the shard's own memory; any other object itself."""
    if not is_distributed(tensor):
        return tensor
    local = tensor._local_tensor  # to_local() would make a view of a parameter's shard
    # The result of a collective that may still be running: a kernel that is given its address would not wait.
    return local.wait() if hasattr(local, "wait") and hasattr(local, "trigger_wait") else local


def local_grad(param: Tensor) -> Tensor | None:
    """The local shard of a parameter's gradient, which is given the parameter's placements first.

    In tensor parallelism a gradient may be partial (each rank has a summand). All ranks must call this.
    """
    grad: Any = param.grad
    if not is_distributed(grad) or not is_distributed(param):
        return grad
    if grad.placements != param.placements or grad.device_mesh != param.device_mesh:  # type: ignore[attr-defined]
        grad = placed_like(param, grad)
        param.grad = grad  # or the next reader would redistribute it again
    local: Tensor = local_of(grad)
    return local


def distribute_like(param: Tensor, local: Tensor) -> Tensor:
    """``local`` as what it is a part of: a DTensor with the placements of ``param``; itself for a plain parameter."""
    if not is_distributed(param):
        return local
    from torch.distributed.tensor import DTensor

    mesh, placements = param.device_mesh, param.placements  # type: ignore[attr-defined]
    return DTensor.from_local(local, mesh, placements, run_check=False, shape=param.shape, stride=param.stride())


def is_placed_like(param: Tensor, tensor: Tensor) -> bool:
    """Whether the local shards of both are the same part of the whole."""
    if not is_distributed(param):
        return not is_distributed(tensor)
    same: bool = (
        is_distributed(tensor)
        and tensor.placements == param.placements  # type: ignore[attr-defined]
        and tensor.device_mesh == param.device_mesh  # type: ignore[attr-defined]
    )
    return same


def placed_like(param: Tensor, tensor: Tensor) -> Tensor:
    """``tensor``, of the parameter's (global) shape, with the placements of ``param``.

    A plain tensor is taken to be whole, and the same on every rank.

    Raises:
        RuntimeError: it is on another device mesh.
    """
    if is_placed_like(param, tensor):
        return tensor
    if not is_distributed(param):
        whole: Any = tensor
        return whole.full_tensor()
    mesh, placements = param.device_mesh, param.placements  # type: ignore[attr-defined]
    if is_distributed(tensor):
        theirs: Any = tensor
        if theirs.device_mesh != mesh:
            raise RuntimeError(
                f"a tensor of shape {tuple(tensor.shape)} is on another device mesh ({theirs.device_mesh}) than its "
                f"parameter ({mesh}); redistribute it first"
            )
        return theirs.redistribute(mesh, placements)
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(tensor.to(param.device), mesh, placements, src_data_rank=None)


def whole_of(value: Any) -> Any:
    """A DTensor's whole value, the same on every rank; any other object itself. All ranks must call this."""
    return value.full_tensor() if is_distributed(value) else value


# ---- where a shard lies in its parameter ----


class Place(NamedTuple):
    """Which elements of a whole parameter a local tensor has; all are counted in memory order."""

    offset: int = 0
    """The first one's number."""
    axes: tuple[tuple[int, int], ...] = ()
    """Of a shard whose elements are not consecutive: for each of its dimensions, the outermost in memory first, the
    length here and how far apart neighbours are in the whole parameter."""

    def elements(self, start: int, count: int, device: torch.device) -> Tensor:
        """The numbers, in the whole parameter, of the local elements ``start ... start + count - 1``: int64."""
        left = torch.arange(start, start + count, dtype=torch.int64, device=device)
        if not self.axes:
            return left + self.offset
        numbers = torch.full_like(left, self.offset)
        for length, distance in reversed(self.axes):
            numbers += left % length * distance
            left = left // length
        return numbers


def place_of(param: Any) -> Place:
    """Where this rank's shard of a parameter lies; a plain tensor is taken to be whole."""
    if not is_distributed(param) or param.numel() == 0:
        return Place()
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

    shape, origin = compute_local_shape_and_global_offset(param.shape, param.device_mesh, param.placements)
    if 0 in shape:
        return Place()
    order = sorted(range(param.dim()), key=lambda dim: (-param.stride(dim), dim))
    distances, distance = {}, 1
    for dim in reversed(order):
        distances[dim] = distance
        distance *= param.shape[dim]
    offset = sum(origin[dim] * distances[dim] for dim in order)
    axes = tuple((shape[dim], distances[dim]) for dim in order if shape[dim] > 1)
    consecutive, expected = True, 1
    for length, apart in reversed(axes):
        consecutive = consecutive and apart == expected
        expected = length * apart
    return Place(offset) if consecutive else Place(offset, axes)


# ---- shards that are not DTensors ----


def check_shards(params: Iterable[Any], shard_groups: ShardGroups, method: Method, zero: Any = None) -> None:
    """Raises if parameters are shards without ``shard_groups``, or shards whose shape does not suit the method.

    Args:
        params: the parameters.
        shard_groups: the optimizer's option.
        method: its method.
        zero: the ZeroRedundancyOptimizer that constructs it, or None.

    Raises:
        ValueError: parameters of FSDP1 or of ZeroRedundancyOptimizer without ``shard_groups``; a method that cannot
            work with such shards.
    """
    if zero is not None:
        _check_zero(zero, shard_groups)
    flattened = next((i for i, param in enumerate(params) if getattr(param, "_fsdp_flattened", False)), None)
    if flattened is not None and shard_groups is None:
        raise ValueError(
            f"parameter {flattened} belongs to FullyShardedDataParallel (FSDP1), which does not say what other ranks "
            "hold of it: the norm would be that of this rank's shard. Pass shard_groups=fsdp_model.process_group (for "
            "ShardingStrategy.NO_SHARD shard_groups=()), or use fully_shard (FSDP2), which needs nothing"
        )
    if shard_groups is None or (not callable(shard_groups) and not _as_list(shard_groups)):
        return
    if method.reads_each_dot:
        raise ValueError(
            f"{method} needs the norm of each whole parameter, and shard_groups does not say which of them are in "
            "parts; use DTensors (fully_shard, parallelize_module)"
        )
    if method.uses_shapes and flattened is not None:
        raise ValueError(f"{method} needs the parameters' shapes, and FSDP1's are flat; use fully_shard")


def _check_zero(zero: Any, shard_groups: ShardGroups) -> None:
    """Raises ValueError if the parts that ZeroRedundancyOptimizer gives to other ranks are not in ``shard_groups``."""
    if callable(shard_groups) or any(group is zero.process_group for group in _as_list(shard_groups)):
        return
    raise ValueError(
        "ZeroRedundancyOptimizer(optimizer_class=FastSAM) gives each rank a part of the parameters: the norm would be "
        "that of this part. Pass shard_groups=, its process group (torch.distributed.group.WORLD), or turn it round, "
        "which communicates less: FastSAM(params, ZeroRedundancyOptimizer, optimizer_class=torch.optim.AdamW, ...)"
    )


# ---- sums over ranks ----


class GlobalSums:
    """Adds up what every rank has summed over its own parts of the parameters.

    Every rank takes part in every reduction, in the same order, also with an empty shard. Nothing waits for an
    accelerator.

    Args:
        shard_groups: the process groups that hold other parts of the model than this rank, for parameters that do not
            say so themselves (DTensors do): one, several, or a function of a parameter that returns some.
    """

    def __init__(self, shard_groups: ShardGroups = None) -> None:
        self._shard_groups = shard_groups
        self._groups: dict[str, Any] = {}
        self._declared: set[str] = set()
        self._own_sharding = () if callable(shard_groups) else self._note(shard_groups)

    @property
    def has_shard_groups(self) -> bool:
        """Whether other ranks may have parameters, and gradients, where this one has none."""
        return callable(self._shard_groups) or bool(self._own_sharding)

    def sharding_of(self, param: Tensor) -> Sharding:
        """The process groups over which sums over ``param`` must be added up."""
        placed = {group.group_name: group for group in _groups_of_placements(param)}
        self._groups.update(placed)
        given = self._note(self._shard_groups(param)) if callable(self._shard_groups) else self._own_sharding
        return tuple(dict.fromkeys((*placed, *given)))

    def _note(self, groups: Any) -> Sharding:
        """The names of groups of the option ``shard_groups``."""
        found = {group.group_name: group for group in _as_list(groups) if group.size() > 1}
        self._groups.update(found)
        self._declared.update(found)
        return tuple(found)

    def _in_order(self, shardings: Iterable[Sharding]) -> list[str]:
        """The process groups in an order that is the same on all of their ranks.

        That is the order of the first parameters; ``shard_groups``, whose ranks may have others, come last.
        """
        names = dict.fromkeys(name for sharding in shardings for name in sharding)
        return sorted(names, key=self._declared.__contains__)

    def total(self, parts: Mapping[Sharding, Tensor], device: torch.device, shape: tuple[int, ...] = ()) -> Tensor:
        """The sum over everything: one all-reduce for each process group that occurs.

        Args:
            parts: float64, of one shape and on one device: for each sharding that occurs, the sum over this rank's
                parts of the parameters.
            device: theirs.
            shape: theirs.
        """
        if not self._groups and parts:
            return parts[()]
        zero = torch.zeros(shape, dtype=torch.float64, device=device)
        left: dict[Sharding, Tensor] = {self._own_sharding: zero}  # other ranks wait for this one
        for sharding, part in parts.items():
            _add(left, sharding, part)
        for name in self._in_order(left):
            mine = [sharding for sharding in left if name in sharding]
            summed = self._all_reduce(torch.stack([left.pop(sharding) for sharding in mine]), name)
            for sharding, part in zip(mine, summed, strict=True):
                _add(left, tuple(other for other in sharding if other != name), part)
        return left[()]

    def of_each_parameter(self, shardings: Sequence[Sharding], sums: Sequence[Tensor]) -> list[Tensor]:
        """``sums`` of the local parts of each parameter, ``(n, k)`` for each table, as those of whole parameters."""
        result = list(sums)
        for name in self._in_order(shardings):
            mine = [i for i, sharding in enumerate(shardings) if name in sharding]
            home = result[mine[0]].device
            summed = self._all_reduce(torch.cat([result[i].to(home, non_blocking=True) for i in mine]), name)
            for i, part in zip(mine, summed.split([len(sums[i]) for i in mine]), strict=True):
                result[i] = part.to(result[i].device, non_blocking=result[i].device.type != "cpu")
        return result

    def _all_reduce(self, tensor: Tensor, name: str) -> Tensor:
        group = self._groups[name]
        # CPU-offloaded parameters are sharded over a group that communicates between accelerators.
        types = [device.type for device in getattr(group, "_device_types", [])] or [tensor.device.type]
        device = tensor.device if tensor.device.type in types else torch.device(types[0])
        moved = tensor.to(device)
        dist.all_reduce(moved, group=group)
        return moved.to(tensor.device)


def _groups_of_placements(param: Any) -> list[Any]:
    """The process groups of the mesh dimensions that shard a DTensor; a replicated dimension is counted once."""
    if not is_distributed(param):
        return []
    mesh, placements = param.device_mesh, param.placements
    return [
        mesh.get_group(dim)
        for dim, placement in enumerate(placements)
        if mesh.size(dim) > 1 and not (placement.is_replicate() or placement.is_partial())
    ]


def _add(sums: dict[Sharding, Tensor], sharding: Sharding, part: Tensor) -> None:
    sums[sharding] = sums[sharding] + part if sharding in sums else part


def _as_list(groups: Any) -> list[Any]:
    """The process groups that a value of ``shard_groups`` names.

    Raises:
        TypeError: it names something else.
    """
    found = [] if groups is None else list(groups) if isinstance(groups, (list, tuple)) else [groups]
    for group in found:
        if not hasattr(group, "group_name"):
            raise TypeError(
                "shard_groups must be a process group of which this rank is a member, several, or a function of a "
                f"parameter that returns some, got {group!r}"
            )
    return found
