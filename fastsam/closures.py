"""Closures for ``step(closure, ascent_closure=...)`` whose second pass is not the first again: Functional SAM, ESAM."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from fastsam.arguments import check

Closure = Callable[[], Any]
LossFunction = Callable[[Tensor, Any], Tensor]


def functional_sam_closures(model: nn.Module, loss_fn: LossFunction | None, *batches: Any) -> tuple[Closure, Closure]:
    r"""Functional SAM: the second pass keeps the loss's gradient by the logits and takes the logits' gradient at w + e.

    The first pass is the loss's, at w. The second differentiates ``<F(w + e), dL/dF(w)>``, so that the perturbation
    acts on the function F that the network computes and not on how the loss weights its outputs. Singh et al., ICML
    2025, https://arxiv.org/abs/2502.02407: plain SAM does the latter in language models, and hurts there.

    From the first pass to the second, the gradient by the logits is held: as much memory as the logits, (batch, time,
    vocabulary). Both passes must use the same dropout masks: ``FastSAM(..., replay_rng=True)``. In a step without an
    ascent (``interval``, ``schedule``, rho = 0) the closure computes the loss's own gradient.

    Example::

        optimizer = FastSAM(model.parameters(), torch.optim.AdamW, rho=0.1, lr=3e-4, replay_rng=True)
        for batch in loader:
            closure, ascent_closure = functional_sam_closures(model, None, batch)
            loss = optimizer.step(closure, ascent_closure=ascent_closure)

    Args:
        model: is called with a batch: ``model(**batch)`` for a mapping, ``model(*batch)`` for a tuple or list, else
            ``model(batch)``. It returns the logits, or an object with ``logits`` (as Hugging Face's models do).
        loss_fn: called with the logits and the batch, returns the loss; None: the model's output has it as ``loss``.
        *batches: one, or several of which the mean of the losses counts (gradient accumulation).

    Returns:
        closure, ascent_closure: both clear the gradients, and return the loss of w (detached), or None from a second
        pass.

    Raises:
        TypeError: there is no batch, or the model's output has neither logits nor, without ``loss_fn``, a loss.
    """
    if not batches:
        raise TypeError("functional_sam_closures() needs at least one batch")
    held: list[Tensor] = []

    def ascent_closure() -> Tensor:
        model.zero_grad(set_to_none=True)
        held.clear()
        losses = []
        for batch in batches:
            logits, loss = _logits_and_loss(model, loss_fn, batch)
            logits.retain_grad()
            loss = loss / len(batches)
            loss.backward()
            assert logits.grad is not None
            held.append(logits.grad)
            losses.append(loss.detach())
        return torch.stack(losses).sum()

    def closure() -> Tensor | None:
        if not held:
            loss = ascent_closure()
            held.clear()
            return loss
        model.zero_grad(set_to_none=True)
        for batch, grad in zip(batches, held, strict=True):
            _logits(_output(model, batch)).backward(grad)
        held.clear()
        return None

    return closure, ascent_closure


def esam_closures(
    model: nn.Module,
    loss_fn: Callable[[Tensor, Tensor], Tensor],
    inputs: Tensor,
    targets: Tensor,
    *,
    gamma: float = 0.5,
) -> tuple[Closure, Closure]:
    r"""ESAM's sharpness-sensitive data selection: the second pass is over the samples whose loss rises most.

    Du et al., ICLR 2022, https://arxiv.org/abs/2110.03141, section 3.2. The second pass costs a forward pass over the
    batch and a forward and backward pass over a part of it. Together with :class:`fastsam.methods.ESAM`::

        closure, ascent_closure = esam_closures(model, loss_fn, inputs, targets, gamma=0.5)
        loss = optimizer.step(closure, ascent_closure=ascent_closure)

    In a step without an ascent the closure is a pass over the whole batch.

    Args:
        model: called with inputs.
        loss_fn: called with the model's outputs and targets, returns the loss of each sample, shape (batch,); for
            example ``torch.nn.CrossEntropyLoss(reduction="none")``.
        inputs: the batch, samples first.
        targets: likewise.
        gamma: the selected fraction of the batch, in (0, 1]; at least one sample.

    Returns:
        closure, ascent_closure: both clear the gradients and return a mean loss, detached.
    """
    check("gamma", gamma, "in (0, 1]", 0 < gamma <= 1)
    before: list[Tensor] = []

    def gradient_of(chosen: Tensor | slice) -> Tensor:
        model.zero_grad(set_to_none=True)
        losses = loss_fn(model(inputs[chosen]), targets[chosen])
        losses.mean().backward()
        return losses.detach()

    def ascent_closure() -> Tensor:
        before[:] = [gradient_of(slice(None))]
        return before[0].mean()

    def closure() -> Tensor:
        if not before:
            return gradient_of(slice(None)).mean()
        with torch.no_grad():
            raised = loss_fn(model(inputs), targets) - before.pop()
        return gradient_of(raised.topk(max(1, int(gamma * len(raised)))).indices).mean()

    return closure, ascent_closure


def _logits_and_loss(model: nn.Module, loss_fn: LossFunction | None, batch: Any) -> tuple[Tensor, Tensor]:
    output = _output(model, batch)
    logits = _logits(output)
    loss = getattr(output, "loss", None) if loss_fn is None else loss_fn(logits, batch)
    if not isinstance(loss, Tensor):
        raise TypeError(
            f"the model's output, {type(output).__name__}, has no loss; pass loss_fn, or labels with the batch"
        )
    return logits, loss


def _output(model: nn.Module, batch: Any) -> Any:
    if isinstance(batch, Mapping):
        return model(**batch)
    return model(*batch) if isinstance(batch, (tuple, list)) else model(batch)


def _logits(output: Any) -> Tensor:
    logits = output if isinstance(output, Tensor) else getattr(output, "logits", None)
    if not isinstance(logits, Tensor):
        raise TypeError(f"the model must return logits, or an object with logits, got {type(output).__name__}")
    return logits
