"""What the ranks of a distributed model do together: sums, broadcasts, and a solver that runs on one of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from fastsam.distributed import is_distributed

Result = TypeVar("Result")


class Ranks:
    """The ranks that hold a model together: those of its DTensors' mesh, or of a DistributedDataParallel.

    Every method is a collective call. Without such a model there is one rank, and nothing is sent.
    """

    def __init__(self, model: nn.Module | None, params: Sequence[Tensor]) -> None:
        meshes: list[Any] = [p.device_mesh for p in params if is_distributed(p)]  # type: ignore[attr-defined]
        self.sharded = bool(meshes)
        self._groups: list[Any] = []
        if meshes:
            mesh = max(meshes, key=lambda m: m.size())
            self._groups = [mesh.get_group(dim) for dim in range(mesh.ndim)]
        elif isinstance(model, nn.parallel.DistributedDataParallel):
            self._groups = [model.process_group]
        self._device = params[0].device

    @property
    def size(self) -> int:
        """The number of ranks."""
        count = 1
        for group in self._groups:
            count *= dist.get_world_size(group)
        return count

    @property
    def is_first(self) -> bool:
        """Whether this is the rank that runs what only one may run."""
        return all(dist.get_rank(group) == 0 for group in self._groups)

    def sum(self, tensor: Tensor) -> Tensor:
        """The sum over the ranks, in place."""
        for group in self._groups:
            dist.all_reduce(tensor, group=group)
        return tensor

    def broadcast(self, tensor: Tensor) -> Tensor:
        """The first rank's tensor, in place."""
        for group in self._groups:
            dist.broadcast(tensor, group=group, group_src=0)
        return tensor

    def solve(
        self, product: Callable[[Tensor], Tensor], size: int, solver: Callable[[Callable[[Tensor], Tensor]], Result]
    ) -> Result:
        """Runs ``solver(product)`` on the first rank alone; the others compute each product with it.

        A solver stops when its data say so, and ranks that stopped at different products would wait for each other
        forever.

        Args:
            product: of float64 vectors on the CPU, a collective call.
            size: of the vectors.
            solver: is given the product; its result, or its exception, is every rank's.
        """
        if not self._groups:
            return solver(product)
        outcome: list[Any] = [None, None]
        if self.is_first:
            try:
                outcome[0] = solver(lambda vector: self._announced(product, vector))
            except Exception as error:
                outcome[1] = error
            self.broadcast(torch.zeros(1, device=self._device))
        else:
            while self.broadcast(torch.zeros(1, device=self._device)).item():
                product(self.broadcast(torch.zeros(size, dtype=torch.float64, device=self._device)).cpu())
        for group in self._groups:
            dist.broadcast_object_list(outcome, group=group, group_src=0, device=self._device)
        if outcome[1] is not None:
            raise outcome[1]
        return outcome[0]

    def _announced(self, product: Callable[[Tensor], Tensor], vector: Tensor) -> Tensor:
        self.broadcast(torch.ones(1, device=self._device))
        return product(self.broadcast(vector.to(self._device, copy=True)).cpu())
