"""SAM under davda54/sam's signature and closure contract: change one import and keep the training loop."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.optim import Optimizer

from fastsam.optimizer import FastSAM


class SAM(FastSAM):
    r"""FastSAM for code written for https://github.com/davda54/sam.

    It differs from :class:`FastSAM` in two ways: ``step(closure)`` expects the gradients of the first pass to exist and
    calls the closure once, and ``first_step`` and ``second_step`` do not clear the gradients by default.

    Example::

        optimizer = SAM(model.parameters(), torch.optim.SGD, rho=0.05, lr=0.1, momentum=0.9)

        loss_fn(model(x), y).backward()
        optimizer.first_step(zero_grad=True)
        loss_fn(model(x), y).backward()
        optimizer.second_step(zero_grad=True)

    Args:
        params: as for any torch optimizer.
        base_optimizer: a :class:`torch.optim.Optimizer` class.
        rho: radius of the neighbourhood, >= 0.
        adaptive: ASAM's perturbation, with T = \|w\|.
        **kwargs: the base optimizer's options; also FastSAM's ``model``, ``backend``, ``rounding``,
            ``rounding_seed`` and ``master_weights``.
    """

    def __init__(
        self,
        params: Any,
        base_optimizer: type[Optimizer],
        rho: float | torch.Tensor = 0.05,
        adaptive: bool = False,
        **kwargs: Any,
    ) -> None:
        if kwargs.pop("replay_rng", False):
            raise ValueError("replay_rng is FastSAM's option: here the first pass is over before step(closure) begins")
        for name in ("method", "interval", "schedule"):
            if name in kwargs:
                raise ValueError(f"{name} is FastSAM's option: here every step is plain SAM's")
        super().__init__(params, base_optimizer, rho=rho, adaptive=adaptive, **kwargs)

    def _ascends_now(self) -> bool:
        return True  # its loops compute the second pass's gradients whatever first_step() returns

    def first_step(self, zero_grad: bool = False) -> bool:
        """Perturbs; see :meth:`FastSAM.first_step`."""
        return super().first_step(zero_grad)

    def step(self, closure: Callable[[], Any] | None = None) -> None:  # type: ignore[override]
        """Perturbs by the present gradients, calls ``closure`` once for the gradients at w + e, and updates.

        Args:
            closure: a full forward and backward pass; gradients are set to None before it.

        Raises:
            RuntimeError: no closure while not perturbed, or no parameter has a gradient.
            Exception: whatever the closure raises; the weights are then as before.
        """
        if closure is None:
            self._finish()
            return
        self._check_closure_step()
        with self._undone_by_exceptions():
            self._ascend_all_the_way(closure)
            self._engine.run(closure)
            self._descend()
