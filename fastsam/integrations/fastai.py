"""fastai: a callback that makes a Learner's steps SAM's."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any

from fastai.callback.core import Callback
from fastai.callback.fp16 import MixedPrecision
from fastai.callback.training import GradientAccumulation, GradientClip
from fastai.torch_core import find_bs, to_float

from fastsam.integrations import unwrap
from fastsam.training import Passes


class SAMCallback(Callback):  # type: ignore[misc]
    """Runs the further passes of a step before fastai clips and updates.

    Example::

        opt_func = partial(OptimWrapper, opt=FastSAM, rho=0.05, momentum=0.9)
        learner = Learner(dls, model, loss_func=loss_func, opt_func=opt_func, cbs=SAMCallback())

    ``GradientAccumulation``, ``GradientClip``, ``MixedPrecision`` and schedules work as usual; other callbacks see the
    first pass only.
    """

    # After GradientAccumulation, which ends incomplete steps; before MixedPrecision, which unscales.
    order, run_valid = GradientAccumulation.order + 1, False
    _passes: Passes | None = None

    def before_fit(self) -> None:
        """Finds the optimizer and the callbacks that change the loss."""
        self._accumulation, self._mixed = self._find(GradientAccumulation), self._find(MixedPrecision)
        clips = self._find(GradientClip)
        self._clip = clips and clips.before_step
        self._passes = None

    def before_batch(self) -> None:
        """Announces the batch, which is read after the forward pass: callbacks such as MixUp change it before."""
        if self._passes is None:
            scaler = self.learn.scaler if self._mixed else None
            # MixedPrecision gives itself to the scaler as the optimizer.
            self._passes = Passes(unwrap(self.learn.opt), scaler=scaler, clip=self._clip, stepped=self._mixed)
        self._batch: dict[str, Any] = {}
        self._passes.record(partial(self._compute_gradients, self._batch))

    def after_pred(self) -> None:
        """Remembers the batch."""
        self._batch |= {"xb": self.learn.xb, "yb": self.learn.yb, "loss_func": self.learn.loss_func}

    def before_step(self) -> None:
        """Runs the further passes."""
        self._passes.repeat()  # type: ignore[union-attr]

    def after_cancel_step(self) -> None:
        """Restores the weights: MixedPrecision does not step after an overflow."""
        self.after_cancel_fit()

    def after_cancel_fit(self) -> None:
        """Restores the weights."""
        if self._passes is not None:
            self._passes.optimizer.restore()

    def _find(self, kind: type) -> Any:
        return next((each for each in self.learn.cbs if isinstance(each, kind)), None)

    def _compute_gradients(self, batch: dict[str, Any]) -> None:
        with self._autocast():
            predictions = self.learn.model(*batch["xb"])
            if self._mixed:
                predictions = to_float(predictions)
            loss = batch["loss_func"](predictions, *batch["yb"])
        if self._accumulation:
            loss = loss / (self._accumulation.n_acc / find_bs(batch["yb"]))
        (self.learn.scaler.scale(loss) if self._mixed else loss).backward()

    def _autocast(self) -> AbstractContextManager[Any]:
        return self._mixed.autocast if self._mixed else nullcontext()
