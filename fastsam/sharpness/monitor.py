"""Sharpness while training: every n steps, into a function, TensorBoard or a CSV file."""

from __future__ import annotations

import csv
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

from torch import nn

from fastsam.arguments import check_count
from fastsam.optimizer import FastSAM
from fastsam.schedules import is_schedule
from fastsam.sharpness.hessian import hessian_eigenvalues, hessian_trace
from fastsam.sharpness.measures import average, worst
from fastsam.sharpness.objective import LossFunction

Record = dict[str, float]
Log = Callable[[Record], Any]

MEASURES = ("ascent", "worst", "average", "lambda_max", "trace")


class Monitor:
    """Measures sharpness in every ``every``-th step of an optimizer, and logs it.

    It runs by itself, after the optimizer's steps, until :meth:`close` (or the end of a ``with`` block)::

        with sharpness.Monitor(optimizer, every=100, log="sharpness.csv"):
            train()

    Args:
        optimizer: a :class:`~fastsam.FastSAM`.
        model, loss_fn, data: what every measure but ``"ascent"`` needs; see
            :class:`~fastsam.sharpness.objective.Objective`.
        every: in which steps, counted from this object's creation.
        measures: some of ``"ascent"`` (of that step's own batch, from ``optimizer.last_ascent``: it costs nothing but
            the wait for three numbers), ``"worst"``, ``"average"``, ``"lambda_max"``, ``"trace"``.
        rho: the radius of ``"worst"`` and ``"average"``; None: the first parameter group's.
        log: a function, which is given a dict of numbers; a ``torch.utils.tensorboard.SummaryWriter``; or the path of a
            CSV file, which is overwritten. None: only :attr:`history`.
        settings: for each measure keyword arguments of its function, for example ``{"worst": {"steps": 5}}``.

    Attributes:
        history: all records: ``step``, and for ``"ascent"`` also ``loss``, ``perturbed_loss`` and ``grad_norm``. A step
            without an ascent has no such entries.
    """

    def __init__(
        self,
        optimizer: FastSAM,
        model: nn.Module | None = None,
        loss_fn: LossFunction | None = None,
        data: Any = None,
        *,
        every: int = 100,
        measures: Sequence[str] = ("ascent",),
        rho: float | None = None,
        log: Log | str | os.PathLike[str] | Any = None,
        settings: dict[str, dict[str, Any]] | None = None,
    ) -> None:
        if not isinstance(optimizer, FastSAM):
            raise TypeError(f"optimizer must be a FastSAM, got {type(optimizer).__name__}")
        check_count("every", every)
        measures = (measures,) if isinstance(measures, str) else tuple(measures)
        for name in measures:
            if name not in MEASURES:
                raise ValueError(f"measures must be of {', '.join(MEASURES)}, got {name!r}")
        if set(measures) - {"ascent"} and (model is None or data is None):
            raise ValueError(f"measures={measures} needs model, loss_fn and data; only 'ascent' does not")
        self.optimizer, self.every, self.measures = optimizer, every, measures
        self._arguments = model, loss_fn, data
        self._rho, self._settings = rho, settings or {}
        self._log = _as_function(log, measures)
        self.history: list[Record] = []
        self._steps = 0
        self._hook = optimizer.register_step_post_hook(lambda *_: self._count())

    def close(self) -> None:
        """Ends the measurements."""
        self._hook.remove()

    def __enter__(self) -> Monitor:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def measure(self) -> Record:
        """Measures now, and logs."""
        record: Record = {"step": self._steps}
        for name in self.measures:
            record |= self._ascent() if name == "ascent" else {name: self._value(name)}
        self.history.append(record)
        self._log(record)
        return record

    def _count(self) -> None:
        self._steps += 1
        if self._steps % self.every == 0:
            self.measure()

    def _ascent(self) -> Record:
        found = self.optimizer.last_ascent
        if found is None:
            return {}
        values = {"ascent": found.sharpness, "loss": found.loss, "perturbed_loss": found.perturbed_loss}
        if found.grad_norm is not None:
            values["grad_norm"] = found.grad_norm
        return {name: float(value) for name, value in values.items()}

    def _value(self, name: str) -> float:
        settings = self._settings.get(name, {})
        if name == "lambda_max":
            return float(hessian_eigenvalues(*self._arguments, **{"k": 1, **settings}).values[0])  # type: ignore[arg-type]
        if name == "trace":
            return float(hessian_trace(*self._arguments, **settings))  # type: ignore[arg-type]
        function = worst if name == "worst" else average
        return float(function(*self._arguments, **{"rho": self._radius(), **settings}))  # type: ignore[arg-type]

    def _radius(self) -> float:
        rho = self.optimizer.param_groups[0]["rho"] if self._rho is None else self._rho
        if is_schedule(rho):
            raise ValueError("the optimizer's rho is a schedule: give the Monitor a rho of its own")
        return float(rho)


def _as_function(log: Any, measures: Sequence[str]) -> Log:
    if log is None:
        return lambda record: None
    if isinstance(log, (str, os.PathLike)):
        ascent = ("ascent", "loss", "perturbed_loss", "grad_norm") if "ascent" in measures else ()
        return _CSV(Path(log), ["step", *ascent, *(name for name in measures if name != "ascent")])
    if hasattr(log, "add_scalar"):
        return lambda record: _add_scalars(log, record)
    if callable(log):
        return log
    raise TypeError(f"log must be a function, a SummaryWriter or a path, got {type(log).__name__}")


def _add_scalars(writer: Any, record: Record) -> None:
    for name, value in record.items():
        if name != "step":
            writer.add_scalar(f"sharpness/{name}", value, record["step"])


class _CSV:
    """Appends records to a file; what a record lacks stays empty."""

    def __init__(self, path: Path, columns: Sequence[str]) -> None:
        self._path, self._columns = path, columns
        path.write_text(",".join(columns) + "\n")

    def __call__(self, record: Record) -> None:
        with self._path.open("a", newline="") as file:
            csv.DictWriter(file, self._columns, lineterminator="\n").writerow(record)
