"""What a run has measured, and the figures that follow from it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from typing_extensions import Self

from benchmarks.implementations import FUSED_BASE, LOOP, UPDATE
from benchmarks.measure import STEP, Copy, Measured, Rounds, Timing

# Bytes per fp32 parameter that an operation cannot do without: everything is read once and written once.
FLOOR = {"grad_norm": 4, "perturb_": 16, "restore_": 8, "restore_and_sgd_": 20, "restore_and_adam_": 28}

# The part of a FastSAM step that is in no operation.
AROUND = "around the operations"


@dataclass(frozen=True)
class Case:
    """What was measured side by side, on one model over one base."""

    model: str
    base: str
    parameters: int
    tensors: int
    rounds: int
    measured: dict[str, Measured]

    @property
    def name(self) -> str:
        return f"{self.model}, {self.base}"

    def step(self, name: str) -> Timing:
        return self.measured[name].parts[STEP]

    def _head_json(self) -> dict[str, Any]:
        return {
            "model": self.model,
            "base": self.base,
            "parameters": self.parameters,
            "tensors": self.tensors,
            "rounds": self.rounds,
        }


@dataclass(frozen=True)
class WithCopy(Case):
    """A case in whose rounds a large copy was measured too."""

    copy: Timing

    @classmethod
    def of(cls, model: str, base: str, shapes: Sequence[Sequence[int]], rounds: Rounds, **more: Any) -> Self:
        measured = dict(rounds.measured)
        copy = measured.pop(Copy.NAME).parts[STEP]
        return cls(model, base, sum(map(math.prod, shapes)), len(shapes), rounds.count, measured, copy, **more)

    @property
    def copy_gb_s(self) -> float:
        return Copy.gb_s(self.copy.median)

    def floor_bytes(self, name: str) -> float:
        """Per parameter, of a step."""
        raise NotImplementedError

    def gb_s(self, name: str) -> float:
        """The floor's bytes, whatever is moved beyond them, per second."""
        return self.parameters * self.floor_bytes(name) / self.step(name).median / 1e6

    def share_of_copy(self, name: str) -> float:
        return self.gb_s(name) / self.copy_gb_s


@dataclass(frozen=True)
class OptimizerPart(WithCopy):
    """Every implementation's first_step() + second_step(), and one fused step of the base."""

    def floor_bytes(self, implementation: str) -> int:
        """Per parameter, of a SAM step, or of the base's step alone."""
        update = FLOOR[UPDATE[self.base]]
        return update if implementation == FUSED_BASE else FLOOR["grad_norm"] + FLOOR["perturb_"] + update

    def times_faster_than_loop(self, implementation: str) -> float:
        return self.step(LOOP).median / self.step(implementation).median

    def fused_base_steps(self, implementation: str) -> float:
        """The time in units of one fused step of the base alone."""
        return self.step(implementation).median / self.step(FUSED_BASE).median

    def operations(self, implementation: str) -> dict[str, Timing]:
        """A FastSAM backend's operations; empty for the others."""
        return {name: timing for name, timing in self.measured[implementation].parts.items() if name in FLOOR}

    def operation_share_of_copy(self, implementation: str, operation: str) -> float:
        milliseconds = self.operations(implementation)[operation].median
        return self.parameters * FLOOR[operation] / milliseconds / 1e6 / self.copy_gb_s

    def around_operations(self, implementation: str) -> float:
        """Milliseconds of a step outside the operations: what it costs to follow addresses and options."""
        return self.measured[implementation].parts[AROUND].median

    def as_json(self) -> dict[str, Any]:
        return {
            **self._head_json(),
            "copy_gb_s": self.copy_gb_s,
            "implementations": {name: self._implementation_json(name) for name in self.measured},
        }

    def _implementation_json(self, name: str) -> dict[str, Any]:
        figures = {
            **_milliseconds(self.step(name)),
            "gb_s": self.gb_s(name),
            "share_of_copy": self.share_of_copy(name),
            "times_faster_than_loop": self.times_faster_than_loop(name),
            "fused_base_steps": self.fused_base_steps(name),
            "page_faults": self.measured[name].page_faults,
        }
        if operations := self.operations(name):
            figures["operations"] = {
                operation: {
                    **_milliseconds(timing),
                    "share_of_copy": self.operation_share_of_copy(name, operation),
                }
                for operation, timing in operations.items()
            }
            figures["around_operations_ms"] = self.around_operations(name)
        return figures


@dataclass(frozen=True)
class MethodsPart(WithCopy):
    """The methods' optimizer parts of a step, the first one being SAM's."""

    bytes_per_parameter: dict[str, float]

    def floor_bytes(self, name: str) -> float:
        return self.bytes_per_parameter[name]

    def sam_steps(self, name: str) -> float:
        """The time in units of SAM's."""
        return self.step(name).median / self.step(next(iter(self.measured))).median

    def as_json(self) -> dict[str, Any]:
        return {
            **self._head_json(),
            "copy_gb_s": self.copy_gb_s,
            "methods": {
                name: {
                    **_milliseconds(self.step(name)),
                    "sam_steps": self.sam_steps(name),
                    "bytes_per_parameter": self.floor_bytes(name),
                    "gb_s": self.gb_s(name),
                    "share_of_copy": self.share_of_copy(name),
                }
                for name in self.measured
            },
        }


@dataclass(frozen=True)
class TrainingStep(Case):
    """Whole training steps, the first implementation being the base optimizer alone."""

    OPTIMIZER = "optimizer"

    def optimizer_ms(self, implementation: str) -> float:
        """What is not forward and backward."""
        return self.measured[implementation].parts[self.OPTIMIZER].median

    def share_of_optimizer(self, implementation: str) -> float:
        return self.optimizer_ms(implementation) / self.step(implementation).median

    def base_steps(self, implementation: str) -> float:
        """The time in units of the base's step."""
        base = next(iter(self.measured))
        return self.step(implementation).median / self.step(base).median

    def as_json(self) -> dict[str, Any]:
        return {
            **self._head_json(),
            "implementations": {
                name: {
                    **_milliseconds(self.step(name)),
                    "base_steps": self.base_steps(name),
                    "optimizer_ms": self.optimizer_ms(name),
                    "share_of_optimizer": self.share_of_optimizer(name),
                }
                for name in self.measured
            },
        }


@dataclass
class Results:
    """Everything that one run has measured."""

    seconds: float
    """How long to measure each case."""
    environment: dict[str, Any]
    optimizer_part: list[OptimizerPart] = field(default_factory=list)
    methods: list[MethodsPart] = field(default_factory=list)
    training_step: list[TrainingStep] = field(default_factory=list)

    def as_json(self) -> dict[str, Any]:
        return {
            "environment": self.environment,
            "optimizer_part": [case.as_json() for case in self.optimizer_part],
            "methods": [case.as_json() for case in self.methods],
            "training_step": [case.as_json() for case in self.training_step],
        }


def _milliseconds(timing: Timing) -> dict[str, float]:
    return {f"{name}_ms": value for name, value in timing._asdict().items()}
