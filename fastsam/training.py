"""One SAM step over micro-batches in the right order, for training loops of one's own and for the integrations."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.amp import GradScaler

from fastsam.optimizer import FastSAM
from fastsam.runtime.replay_rng import GeneratorStates

Batch = TypeVar("Batch")
Result = TypeVar("Result")


def sam_step(
    model: nn.Module,
    loss_fn: Callable[[nn.Module, Batch], Tensor],
    micro_batches: Iterable[Batch],
    optimizer: FastSAM,
    *,
    scaler: GradScaler | None = None,
    max_grad_norm: float | None = None,
    autocast: AbstractContextManager[Any] | None = None,
) -> Tensor:
    """One whole step: every pass over all micro-batches, loss scaling, clipping and the update.

    Example::

        def loss_fn(model, batch):
            x, y = batch
            return F.cross_entropy(model(x), y)

        loss = sam_step(model, loss_fn, [batch], optimizer, autocast=torch.autocast("cuda", torch.bfloat16))

    If ``model`` has ``no_sync()`` (DistributedDataParallel), gradients are reduced once per pass.

    Args:
        model: what is trained; given to ``loss_fn``.
        loss_fn: a function of ``model`` and a micro-batch that returns the loss, a scalar. The step minimizes the
            average over the micro-batches.
        micro_batches: the parts of the batch, at least one. All of them are needed in every pass.
        optimizer: the optimizer, with any method.
        scaler: for float16 autocast; its ``step()`` and ``update()`` are called here.
        max_grad_norm: the gradients that the base applies are clipped to this L2 norm, over all parameters of the
            optimizer.
        autocast: entered around each call of ``loss_fn``, such as ``torch.autocast("cuda", torch.float16)``.

    Returns:
        The average loss of the first pass, detached: the loss at w, unless the method's only pass is at w + e.

    Raises:
        ValueError: there is no micro-batch.
        RuntimeError: no parameter has got a gradient, or the weights are perturbed already.
        Exception: whatever ``loss_fn`` raises; the weights and the optimizer's state are then as before the step.
    """
    batches = list(micro_batches)
    if not batches:
        raise ValueError("sam_step(): micro_batches is empty; it must hold at least one")

    def backward(batch: Batch) -> Tensor:
        with autocast or nullcontext():
            loss = loss_fn(model, batch)
        mean = loss / len(batches)
        (mean if scaler is None else scaler.scale(mean)).backward()
        return mean.detach()

    def clip() -> None:
        params = [p for group in optimizer.param_groups for p in group["params"]]
        nn.utils.clip_grad_norm_(params, max_grad_norm)  # type: ignore[arg-type]

    no_sync = getattr(model, "no_sync", nullcontext)
    passes = Passes(optimizer, scaler=scaler, clip=None if max_grad_norm is None else clip)
    optimizer.zero_grad()
    losses = []
    for left, batch in zip(reversed(range(len(batches))), batches, strict=True):
        with no_sync() if left else nullcontext():
            losses.append(passes.first(partial(backward, batch)))
    passes.repeat(no_sync)
    passes.update()
    return torch.stack(losses).sum()


class Passes:
    """The passes of each step, for loops that compute gradients micro-batch by micro-batch and call ``step()``.

    :meth:`first` runs a micro-batch's forward and backward pass and remembers it. After the last one :meth:`repeat`
    perturbs the weights and runs all of them again, as often as the method asks for. Then the gradients are those for
    the base: :meth:`update` clips, restores and updates; or the loop clips and calls ``optimizer.step()`` itself.

    Example::

        passes = Passes(optimizer)
        for x, y in micro_batches:
            passes.first(partial(compute_gradients, x, y))
        passes.repeat()
        passes.update()

    Args:
        optimizer: the optimizer, with any method.
        scaler: if the gradients are scaled, by which scaler.
        clip: clips the gradients, which are unscaled before. It is called in :meth:`update`, and for the first pass's
            gradients if the method depends on their length. If the loop clips by itself, give it all the same.
        stepped: what is given to ``scaler.unscale_()`` and ``scaler.step()`` if it is not the optimizer but a wrapper.
    """

    def __init__(
        self,
        optimizer: FastSAM,
        *,
        scaler: GradScaler | None = None,
        clip: Callable[[], Any] | None = None,
        stepped: Any = None,
    ) -> None:
        self.optimizer = optimizer
        self._stepped = stepped or optimizer
        self._scaler = scaler
        self.clip = clip
        self._repeats: list[tuple[Callable[[], Any], GeneratorStates | None]] = []
        self._losses: list[Any] = []
        self._has_begun = False

    def first(self, compute_gradients: Callable[[], Result]) -> Result:
        """Runs a micro-batch for the first time.

        Args:
            compute_gradients: the forward and backward pass, which adds to the gradients and returns the micro-batch's
                part of the step's loss, for ``optimizer.last_ascent`` (or None). It runs again in :meth:`repeat`, so it
                must hold its own micro-batch and not read it from a variable of the loop.

        Returns:
            What ``compute_gradients`` returns.
        """
        self.record(compute_gradients)
        with self.undone_by_exceptions():
            result = compute_gradients()
        self.note_loss(result)
        return result

    def record(self, compute_gradients: Callable[[], Any]) -> None:
        """Announces a micro-batch whose first pass the loop runs itself; comes before its forward pass.

        Args:
            compute_gradients: as for :meth:`first`.
        """
        needs_first_pass = self.optimizer.method.needs_first_pass
        if not (self._has_begun or needs_first_pass):
            self.optimizer.first_step(zero_grad=False)
        self._has_begun = True
        if needs_first_pass:
            self._repeats.append((compute_gradients, self._generator_states()))

    @property
    def is_open(self) -> bool:
        """Whether micro-batches of a step have been recorded that :meth:`repeat` has not run yet."""
        return self._has_begun

    def note_loss(self, loss: Any) -> None:
        """A micro-batch's part of the first pass's loss, where the loop runs that itself."""
        self._losses.append(loss)

    def repeat(self, no_sync: Callable[[], AbstractContextManager[Any]] = nullcontext) -> None:
        """Perturbs the weights and computes the gradients there; comes after the last micro-batch's backward pass.

        Args:
            no_sync: a context manager around every micro-batch but the last, in which gradients are not reduced.
        """
        repeats, losses = [self._replayed(*each) for each in self._repeats], self._losses
        self.forget()
        if not self.optimizer.method.needs_first_pass:
            return
        with self.undone_by_exceptions():
            for _ in range(self.optimizer.method.ascents):
                if not self._ascend():
                    return
                perturbed = []
                for left, compute_gradients in zip(reversed(range(len(repeats))), repeats, strict=True):
                    with no_sync() if left else nullcontext():
                        perturbed.append(compute_gradients())
            is_unscaled = self.optimizer.depends_on_length
            self._note_losses(losses, perturbed, is_unscaled)
            if is_unscaled and self._scaler is not None and self.clip is None:
                self._scaler.unscale_(self._stepped)  # as the first pass's; a loop that clips does it itself

    def update(self) -> None:
        """Clips the gradients, and restores and updates the weights; for loops that leave this to FastSAM."""
        optimizer, scaler = self._stepped, self._scaler
        with self.undone_by_exceptions():
            if self.clip is not None:
                if scaler is not None:
                    scaler.unscale_(optimizer)
                self.clip()
            if scaler is None:
                optimizer.step()
            else:
                scaler.step(optimizer)
                scaler.update()
                # After an overflow a scaler does not call the step of a wrapper, and so not FastSAM's.
                self.optimizer.restore()

    def forget(self) -> None:
        """Forgets the recorded micro-batches."""
        self._repeats, self._losses, self._has_begun = [], [], False

    def undone_by_exceptions(self) -> AbstractContextManager[None]:
        """A block whose exceptions restore the weights and end the step."""
        return _Undone(self)

    def _ascend(self) -> bool:
        """``first_step()``; gradients on whose length the method depends are unscaled and clipped before."""
        optimizer, scaler = self.optimizer, self._scaler
        if not optimizer.depends_on_length:
            return optimizer.first_step()
        if scaler is not None:
            scaler.unscale_(self._stepped)
        if self.clip is not None:
            self.clip()
        goes_on = optimizer.first_step()
        if scaler is not None:
            self._let_unscale_again(scaler, is_last=not goes_on)
        return goes_on

    def _note_losses(self, losses: list[Any], perturbed: list[Any], is_unscaled: bool) -> None:
        if len(losses) == len(perturbed) and all(isinstance(loss, Tensor) for loss in [*losses, *perturbed]):
            is_scaled = self._scaler is not None and not is_unscaled
            loss, perturbed_loss = (torch.stack([part.detach() for part in each]).sum() for each in (losses, perturbed))
            self.optimizer.note_losses(loss, perturbed_loss, self._scale() if is_scaled else None)

    def _scale(self) -> Tensor:
        """The scaler's scale, on the device."""
        assert self._scaler is not None
        device = self.optimizer.param_groups[0]["params"][0].device
        return self._scaler.scale(torch.ones((), device=device))

    def _let_unscale_again(self, scaler: GradScaler, is_last: bool) -> None:
        """A scaler unscales an optimizer's gradients once between two updates: an update to the same scale."""
        scale = self._scale()
        scaler.update(scale)
        if is_last:  # the step has no ascent: the loop takes these gradients for scaled ones
            params = [p for group in self.optimizer.param_groups for p in group["params"]]
            torch._foreach_mul_([p.grad for p in params if p.grad is not None], scale)

    def _generator_states(self) -> GeneratorStates | None:
        optimizer = self.optimizer
        if not optimizer.replay_rng:
            return None
        return GeneratorStates(p.device for group in optimizer.param_groups for p in group["params"])

    @staticmethod
    def _replayed(compute_gradients: Callable[[], Any], states: GeneratorStates | None) -> Callable[[], Any]:
        return compute_gradients if states is None else states.replayed(compute_gradients)


class _Undone(AbstractContextManager[None]):
    def __init__(self, passes: Passes) -> None:
        self._passes = passes

    def __exit__(self, kind: type[BaseException] | None, *_: Any) -> None:
        if kind is not None:
            self._passes.forget()
            self._passes.optimizer.restore()
