"""PyTorch-Ignite: a trainer whose steps are SAM's."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any

import torch
from ignite.engine import Engine, _prepare_batch
from torch import Tensor, nn
from torch.amp import GradScaler

from fastsam.integrations import unwrap
from fastsam.training import Passes


def create_sam_trainer(
    model: nn.Module,
    optimizer: Any,
    loss_fn: Callable[[Any, Any], Tensor],
    device: str | torch.device | None = None,
    *,
    prepare_batch: Callable[..., tuple[Any, Any]] = _prepare_batch,
    output_transform: Callable[[Any, Any, Any, Tensor], Any] = lambda x, y, y_pred, loss: loss.item(),
    gradient_accumulation_steps: int = 1,
    max_grad_norm: float | None = None,
    scaler: GradScaler | None = None,
    autocast: AbstractContextManager[Any] | None = None,
) -> Engine:
    """``ignite.engine.create_supervised_trainer`` for FastSAM: both passes, over all accumulated batches.

    Example::

        trainer = create_sam_trainer(model, optimizer, F.cross_entropy, "cuda")
        trainer.run(loader, max_epochs=10)

    Args:
        model: what is trained.
        optimizer: FastSAM, with any method.
        loss_fn: a function of the predictions and the targets.
        device: where batches are moved to.
        prepare_batch: makes ``(x, y)`` of a batch, as in ignite.
        output_transform: a function of x, y, the predictions and the loss of the first pass that returns what
            ``engine.state.output`` becomes.
        gradient_accumulation_steps: how many batches a step has.
        max_grad_norm: the L2 norm to which the gradients for the base are clipped.
        scaler: for float16 autocast.
        autocast: entered around the forward pass and the loss, such as ``torch.autocast("cuda", torch.float16)``.

    Returns:
        The engine. Iterations are batches; a step is taken in every ``gradient_accumulation_steps``-th one.
    """
    if gradient_accumulation_steps < 1:
        raise ValueError(f"gradient_accumulation_steps must be >= 1, got {gradient_accumulation_steps}")
    clip = None
    if max_grad_norm is not None:
        clip = partial(nn.utils.clip_grad_norm_, list(model.parameters()), max_grad_norm)
    passes = Passes(unwrap(optimizer), scaler=scaler, clip=clip, stepped=optimizer)
    no_sync = getattr(model, "no_sync", nullcontext)

    def compute_gradients(x: Any, y: Any, keep: Callable[[Any], Any] = lambda predictions: None) -> Tensor:
        with autocast or nullcontext():
            predictions = model(x)
            part = loss_fn(predictions, y) / gradient_accumulation_steps
        keep(predictions)
        (part if scaler is None else scaler.scale(part)).backward()
        return part.detach()

    def update(engine: Engine, batch: Any) -> Any:
        number = engine.state.iteration
        if (number - 1) % gradient_accumulation_steps == 0:
            optimizer.zero_grad()
            passes.forget()  # what an ended run has left
        model.train()
        x, y = prepare_batch(batch, device=device, non_blocking=False)
        is_last = number % gradient_accumulation_steps == 0
        kept: list[Any] = []  # the predictions of the first pass alone
        with nullcontext() if is_last else no_sync():
            passes.record(partial(compute_gradients, x, y))
            with passes.undone_by_exceptions():
                loss = compute_gradients(x, y, kept.append)
        passes.note_loss(loss)
        if is_last:
            passes.repeat(no_sync)
            passes.update()
        return output_transform(x, y, kept[0], loss * gradient_accumulation_steps)

    return Engine(update)
