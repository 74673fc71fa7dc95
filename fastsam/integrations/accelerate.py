"""Hugging Face Accelerate: SAM in a loop with ``accumulate()``, ``clip_grad_norm_`` and ``optimizer.step()``."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from fastsam.integrations import unwrap
from fastsam.training import Passes


class SAMBackward:
    """Takes the place of computing the loss and of ``accelerator.backward(loss)`` in a loop of Accelerate.

    The rest of the loop stays: accumulation, clipping, scaler, DDP and FSDP2 work as with any optimizer. With the
    last micro-batch of a step, the call perturbs the weights and runs all of its micro-batches again.

    Example::

        def loss_fn(x, y):
            return F.cross_entropy(model(x), y)

        backward = SAMBackward(accelerator, model, optimizer)
        for x, y in loader:
            with accelerator.accumulate(model):
                loss = backward(loss_fn, x, y)
                if accelerator.sync_gradients:
                    accelerator.clip_grad_norm_(model.parameters(), 1.0)
                optimizer.step()
                scheduler.step()
                optimizer.zero_grad()

    Args:
        accelerator: the accelerator.
        model: the model, as ``accelerator.prepare`` has returned it.
        optimizer: the optimizer, as ``accelerator.prepare`` has returned it; FastSAM inside, with any method.
        max_grad_norm: what the loop clips to, if it clips: methods that combine the gradients of both passes or perturb
            by their length (GSAM, WSAM, LookSAM, FriendlySAM, AMP, Direction) need to know.
    """

    def __init__(
        self, accelerator: Accelerator, model: nn.Module, optimizer: Any, max_grad_norm: float | None = None
    ) -> None:
        self._accelerator, self._model = accelerator, model
        clip = None
        if max_grad_norm is not None:
            clip = partial(nn.utils.clip_grad_norm_, list(model.parameters()), max_grad_norm)
        self._passes = Passes(unwrap(optimizer), scaler=accelerator.scaler, clip=clip)

    def __call__(self, loss_fn: Callable[..., Tensor], *inputs: Any, **named_inputs: Any) -> Tensor:
        """Computes a micro-batch's gradients; with the last one, those of the whole step at the perturbed weights.

        Args:
            loss_fn: computes the loss from ``inputs``. It is called again at the end of the step, so it must take the
                micro-batch from its arguments and not from a variable of the loop.
            *inputs: the micro-batch, for ``loss_fn``.
            **named_inputs: more of it.

        Returns:
            The first pass's loss, detached.
        """
        compute_loss = partial(loss_fn, *inputs, **named_inputs)
        part = self._passes.first(partial(self._compute_gradients, compute_loss))
        if self._accelerator.sync_gradients:
            self._passes.repeat(partial(self._accelerator.no_sync, self._model))
        return part * self._accelerator.gradient_accumulation_steps

    @torch.enable_grad()
    def _compute_gradients(self, compute_loss: Callable[[], Tensor]) -> Tensor:
        loss = compute_loss()
        self._accelerator.backward(loss)
        return loss.detach() / self._accelerator.gradient_accumulation_steps
