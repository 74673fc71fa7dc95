"""timm: FastSAM in its registry of optimizers, and SAM's passes in a loop with its ``NativeScaler``."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any

import torch
from timm.optim import OptimInfo, list_optimizers
from timm.optim._optim_factory import default_registry
from timm.utils import NativeScaler, dispatch_clip_grad
from torch import Tensor
from torch.optim import Optimizer

from fastsam.integrations import unwrap
from fastsam.optimizer import FastSAM
from fastsam.training import Passes


def register() -> None:
    """Makes ``create_optimizer_v2(model, "fastsam", ...)`` known to timm; a second call changes nothing.

    Example::

        register()
        optimizer = create_optimizer_v2(model, "fastsam", base=torch.optim.AdamW, lr=1e-3, layer_decay=0.7, rho=0.05)

    ``base`` is SGD if not given. Weight-decay groups, ``layer_decay`` and ``"lookahead_fastsam"`` work as with timm's
    own optimizers; as there, bases with a momentum get ``momentum=0.9``.
    """
    if "fastsam" in list_optimizers():
        return
    description = "Sharpness-Aware Minimization over any optimizer"
    info = OptimInfo("fastsam", _create, description, has_eps=True, has_momentum=True, has_betas=True)
    default_registry.register(info)


def _create(params: Any, *, base: type[Optimizer] = torch.optim.SGD, **options: Any) -> FastSAM:
    if "momentum" not in inspect.signature(base).parameters:
        options.pop("momentum", None)  # timm's default
    return FastSAM(params, base, **options)


class SAMBackward:
    """Takes the place of computing the loss and of ``loss_scaler(loss, optimizer, ...)`` in timm's training loop.

    Example::

        def loss_fn(x, y):
            with torch.autocast("cuda", torch.float16):
                return criterion(model(x), y) / accumulation_steps

        backward = SAMBackward(optimizer, NativeScaler())
        for i, (x, y) in enumerate(loader):
            need_update = (i + 1) % accumulation_steps == 0
            loss = backward(loss_fn, x, y, need_update=need_update, clip_grad=1.0, parameters=model.parameters())
            if need_update:
                optimizer.zero_grad()

    Args:
        optimizer: FastSAM, or timm's Lookahead around it.
        loss_scaler: timm's ``NativeScaler``; None: gradients are not scaled.
        no_sync: ``model.no_sync`` of a DistributedDataParallel model: used in further passes over all micro-batches but
            the last. In the first pass the loop uses it.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        loss_scaler: NativeScaler | None = None,
        *,
        no_sync: Callable[[], AbstractContextManager[Any]] = nullcontext,
    ) -> None:
        self._scaler = None if loss_scaler is None else loss_scaler._scaler
        self._no_sync = no_sync
        self._passes = Passes(unwrap(optimizer), scaler=self._scaler, stepped=optimizer)

    def __call__(
        self,
        loss_fn: Callable[..., Tensor],
        *inputs: Any,
        need_update: bool = True,
        clip_grad: float | None = None,
        clip_mode: str = "norm",
        parameters: Any = None,
    ) -> Tensor:
        """Computes a micro-batch's gradients; with the last one, runs the other passes and updates.

        Args:
            loss_fn: computes the loss from ``inputs``. It is called again at the end of the step, so it must take the
                micro-batch from its arguments and not from a variable of the loop.
            *inputs: the micro-batch, for ``loss_fn``.
            need_update: whether this is the last micro-batch of the step.
            clip_grad: clips the gradients, as ``NativeScaler`` does: the norm, the value or AGC's factor.
            clip_mode: ``"norm"``, ``"value"`` or ``"agc"``.
            parameters: what is clipped; the optimizer's parameters if not given.

        Returns:
            The first pass's loss, detached.
        """
        loss = self._passes.first(partial(self._compute_gradients, partial(loss_fn, *inputs)))
        if need_update:
            groups = self._passes.optimizer.param_groups
            params = list(parameters) if parameters is not None else [p for group in groups for p in group["params"]]
            clips = partial(dispatch_clip_grad, params, clip_grad, mode=clip_mode)
            self._passes.clip = None if clip_grad is None else clips
            self._passes.repeat(self._no_sync)
            self._passes.update()
        return loss

    @torch.enable_grad()
    def _compute_gradients(self, compute_loss: Callable[[], Tensor]) -> Tensor:
        loss = compute_loss()
        (loss if self._scaler is None else self._scaler.scale(loss)).backward()
        return loss.detach()
