"""Hugging Face Transformers: ``SAMTrainer``, and a mixin that makes any subclass of ``Trainer`` one."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

from torch import Tensor, nn
from transformers import Trainer

from fastsam.integrations import unwrap
from fastsam.optimizer import FastSAM
from fastsam.training import Passes


class SAMTrainerMixin:
    """Makes any subclass of ``transformers.Trainer`` train with FastSAM: ``class Mine(SAMTrainerMixin, SFTTrainer)``.

    See :class:`SAMTrainer`.
    """

    _passes: Passes | None = None

    def __init__(self, *args: Any, sam: Mapping[str, Any] | None = None, **kwargs: Any) -> None:
        self._sam = dict(sam or {})
        super().__init__(*args, **kwargs)

    def get_optimizer_cls_and_kwargs(self, args: Any, model: Any = None) -> tuple[Any, dict[str, Any]]:
        """Returns FastSAM over the optimizer that the training arguments ask for."""
        base, options = super().get_optimizer_cls_and_kwargs(args, model)  # type: ignore[misc]
        return FastSAM, {"base": base, **options, **self._sam}

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """Trains; after an exception the weights are not perturbed."""
        self._passes = None
        try:
            return super().train(*args, **kwargs)  # type: ignore[misc]
        finally:
            if self._passes is not None:
                self._passes.forget()
                self._passes.optimizer.restore()

    def training_step(self, model: nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Tensor:
        """A micro-batch's first pass; with the last one of a step, the other passes of all of them."""
        trainer: Any = self
        if self._passes is None:
            clip = trainer.args.max_grad_norm or 0
            clips = partial(nn.utils.clip_grad_norm_, list(model.parameters()), clip)
            scaler = trainer.accelerator.scaler
            self._passes = Passes(unwrap(trainer.optimizer), scaler=scaler, clip=clips if clip > 0 else None)
        step = partial(super().training_step, model, inputs, *args, **kwargs)  # type: ignore[misc]
        loss: Tensor = self._passes.first(step)
        if trainer.accelerator.sync_gradients:
            self._passes.repeat(partial(trainer.accelerator.no_sync, model))
        return loss

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Logs; with the training loss also the last step's ``sharpness``, ``L(w + e) - L(w)`` on its batch."""
        found = self._passes.optimizer.last_ascent if self._passes is not None else None
        if found is not None and "loss" in logs:
            logs = {**logs, "perturbed_loss": float(found.perturbed_loss), "sharpness": float(found.sharpness)}
        super().log(logs, *args, **kwargs)  # type: ignore[misc]


class SAMTrainer(SAMTrainerMixin, Trainer):
    """``transformers.Trainer`` whose steps are SAM's, with the same arguments and ``TrainingArguments``.

    The optimizer that the arguments ask for (``optim``, ``learning_rate``, ``weight_decay``, ...) becomes FastSAM's
    base. Accumulation, clipping, mixed precision, DDP, FSDP2, gradient checkpointing, ``torch_compile`` and resuming
    work as with ``Trainer``. Logged are the first pass's loss, the second's gradient norm, and on this process the last
    step's ``perturbed_loss`` and ``sharpness``.

    Example::

        trainer = SAMTrainer(model, args, train_dataset=dataset, sam={"rho": 0.05})

    Args:
        *args: as for ``Trainer``.
        sam: options of FastSAM: ``rho``, ``method``, ``interval``, ... An optimizer that is given by ``optimizers`` or
            ``optimizer_cls_and_kwargs`` must be FastSAM itself and has its own.
        **kwargs: as for ``Trainer``.
    """
