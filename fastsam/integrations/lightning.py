"""Lightning: a callback that makes automatic optimization right with FastSAM."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities.model_helpers import is_overridden
from torch import Tensor

from fastsam.integrations import unwrap
from fastsam.optimizer import FastSAM
from fastsam.sharpness import Monitor
from fastsam.training import Passes


class FastSAMCallback(Callback):
    """Makes automatic optimization take whole SAM steps.

    With it ``accumulate_grad_batches``, every precision (also with a GradScaler), ``gradient_clip_val``,
    ``configure_gradient_clipping``, DDP and FSDP2 work as with any optimizer. ``self.log`` counts in the first pass
    only, and ``on_before_optimizer_step`` runs once a step. Manual optimization needs no callback.

    Example::

        trainer = Trainer(callbacks=[FastSAMCallback()], precision="16-mixed", accumulate_grad_batches=4)

    ``training_step`` runs once in every pass; ``self.optimizers().perturbed`` tells which one it is. Metric objects
    that it updates by themselves see all passes. A module's own ``optimizer_step`` is called for the last pass and the
    update.
    """

    _passes: Passes | None = None
    _is_resumed = False

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Puts the further passes in front of the module's ``optimizer_step``.

        Raises:
            TypeError: the optimizer of automatic optimization is not FastSAM, or ``training_step`` takes an iterator.
        """
        self._passes = None
        if not pl_module.automatic_optimization:
            return
        arguments = inspect.signature(pl_module.training_step).parameters
        if "dataloader_iter" in arguments:
            raise TypeError("training_step(dataloader_iter) cannot be repeated; use manual optimization with a closure")
        self._takes_index = len(arguments) > 1 or any(a.kind is a.VAR_POSITIONAL for a in arguments.values())
        sam = unwrap(trainer.optimizers[0])
        self._passes = Passes(sam, scaler=getattr(trainer.precision_plugin, "scaler", None))
        if _clips(trainer, pl_module):
            self._passes.clip = partial(
                pl_module.configure_gradient_clipping, sam, trainer.gradient_clip_val, trainer.gradient_clip_algorithm
            )
        self._own_step = pl_module.optimizer_step
        pl_module.optimizer_step = partial(self._optimizer_step, trainer, pl_module)  # type: ignore[method-assign]

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Gives the module its own ``optimizer_step`` back."""
        if self._passes is not None:
            pl_module.optimizer_step = self._own_step  # type: ignore[method-assign]
            self._passes = None

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Restores the weights."""
        self._give_up()
        self.on_train_end(trainer, pl_module)

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Forgets what an epoch that was left early has begun."""
        self._give_up()

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Announces a micro-batch, to be repeated in the further passes."""
        if self._passes is not None:
            inputs = (batch, batch_idx) if self._takes_index else (batch,)
            self._passes.record(partial(_compute_gradients, trainer, pl_module, inputs))

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Remembers the loss of a micro-batch after which there is no update yet."""
        if self._passes is not None and self._passes.is_open:
            self._passes.note_loss(outputs["loss"] if outputs else None)

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Restores the weights, which methods of one pass perturb from the first micro-batch on."""
        self._is_resumed = self._passes is not None and self._passes.optimizer.perturbed
        if self._is_resumed:
            self._passes.optimizer.restore()  # type: ignore[union-attr]

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Perturbs them again."""
        if self._is_resumed:
            self._passes.optimizer.first_step(zero_grad=False)  # type: ignore[union-attr]

    def _give_up(self) -> None:
        if self._passes is not None:
            self._passes.forget()
            self._passes.optimizer.restore()

    def _optimizer_step(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        epoch: int,
        batch_idx: int,
        optimizer: Any,
        optimizer_closure: Callable[[], Any],
    ) -> None:
        passes = self._passes
        assert passes is not None
        sam = passes.optimizer
        with passes.undone_by_exceptions(), _unscaled_by_lightning(trainer, pl_module, sam):
            loss = optimizer_closure()
            passes.note_loss(loss)
            if any(p.grad is not None for group in sam.param_groups for p in group["params"]):
                passes.repeat(getattr(trainer.strategy, "block_backward_sync", nullcontext))
            else:  # training_step has skipped the batch
                self._give_up()
            # The gradients are there: what is left to Lightning are its hooks, clipping and the update.
            self._own_step(epoch, batch_idx, optimizer, lambda: loss)
        sam.restore()  # after an overflow Lightning may leave the update out


class SharpnessMonitor(Callback):
    """Logs sharpness with the trainer's loggers, as ``sharpness/ascent`` and so on.

    Args:
        every: in which steps.
        measures: see :class:`fastsam.sharpness.Monitor`. ``"ascent"`` is the last step's ``L(w + e) - L(w)`` on its own
            batch (this rank's) and costs nothing; it needs :class:`FastSAMCallback` before this callback.
        loss_fn, data: for the other measures, as for the monitor, with the LightningModule as the model.
        **options: more of the monitor's options.
    """

    def __init__(
        self,
        every: int = 100,
        measures: Sequence[str] = ("ascent",),
        *,
        loss_fn: Callable[..., Any] | None = None,
        data: Any = None,
        **options: Any,
    ) -> None:
        self._every, self._measures = every, measures
        self._loss_fn, self._data, self._options = loss_fn, data, options
        self.monitor: Monitor | None = None
        """What measures, while training runs; ``monitor.history`` has all records."""

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Begins to measure."""

        def log(record: dict[str, float]) -> None:
            values = {f"sharpness/{name}": value for name, value in record.items() if name != "step"}
            for logger in trainer.loggers:
                logger.log_metrics(values, step=trainer.global_step)

        arguments = unwrap(trainer.optimizers[0]), pl_module, self._loss_fn, self._data
        options = {"every": self._every, "measures": self._measures, **self._options}
        self.monitor = Monitor(*arguments, log=log, **options)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Ends the measurements."""
        if self.monitor is not None:
            self.monitor.close()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Ends the measurements."""
        self.on_train_end(trainer, pl_module)


def _compute_gradients(trainer: Trainer, pl_module: LightningModule, inputs: tuple[Any, ...]) -> Tensor | None:
    """One micro-batch as Lightning's loop does it, without logging."""
    strategy = trainer.strategy
    with torch.enable_grad(), _without_logging(pl_module):
        output = strategy.training_step(*inputs)
        loss = output["loss"] if isinstance(output, Mapping) else output
        if loss is None:
            return None
        loss = loss / trainer.accumulate_grad_batches
        strategy.backward(loss, None)
        return loss.detach()


@contextmanager
def _without_logging(pl_module: LightningModule) -> Iterator[None]:
    pl_module.log = lambda *_, **__: None  # type: ignore[method-assign]
    try:
        yield
    finally:
        del pl_module.log


def _clips(trainer: Trainer, pl_module: LightningModule) -> bool:
    return bool(trainer.gradient_clip_val) or is_overridden("configure_gradient_clipping", pl_module)


@contextmanager
def _unscaled_by_lightning(trainer: Trainer, pl_module: LightningModule, optimizer: FastSAM) -> Iterator[None]:
    """Lets Lightning unscale and clip, which it refuses for optimizers that unscale by themselves."""
    if not _clips(trainer, pl_module):
        yield
        return
    optimizer._step_supports_amp_scaling = False  # the scaler then does not call step() after an overflow
    try:
        yield
    finally:
        del optimizer._step_supports_amp_scaling
