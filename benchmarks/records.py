"""What a run has measured, the figures that follow from it, and how both are written down and read again."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, ClassVar

import torch

from benchmarks import operations
from benchmarks.implementations import FUSED_BASE, LOOP, PLAIN_PYTORCH
from benchmarks.measure import DEVICE, STEP, Timing, Timings
from benchmarks.operations import BACKENDS

# The part of a FastSAM step that is in no operation.
AROUND = "around the operations"
# What is not forward and backward, of a training step on the CPU.
OPTIMIZER = "optimizer"
# A training step that a graph replays; what it is called after whose step it is.
IN_A_GRAPH = "in a CUDA graph"
# What differs from step to step while the host's time is taken.
STATIC, NEW_GRADIENTS, CHANGING_LR = "static gradients", "new gradients", "new gradients, changing lr"
# On several ranks.
LOCAL, SHARDED = "FastSAM, a rank's shards alone", "FastSAM, DTensors"
SHARDED_BASE, SHARDED_CLIP = "the base, fused, DTensors", "clip_grad_norm_, DTensors"
# A part of step(closure) that the two phases do not have.
WATCH = "watch for accumulated gradients"


@dataclass(frozen=True, kw_only=True)
class Record:
    """What was measured side by side on one model's parameters over one base.

    Attributes:
        times: by implementation and part; the implementation's own are ``STEP`` and, on a GPU, ``HOST`` and ``DEVICE``.
        skipped: what was not measured, and why.
    """

    kind: ClassVar[str]

    model: str
    base: str
    parameters: int
    tensors: int
    rounds: int = 0
    times: Timings
    skipped: dict[str, str] = field(default_factory=dict)

    @property
    def name(self) -> str:
        return f"{self.model}, {self.base}"

    def step(self, implementation: str) -> Timing:
        return self.times[implementation][STEP]

    def device(self, implementation: str) -> Timing:
        """In the device's own time, with the whole step queued; on the CPU the step's."""
        return self.times[implementation].get(DEVICE, self.step(implementation))

    def ratio(self, implementation: str | None, unit: str | None) -> float | None:
        """An implementation's time in units of another's; None if one of them was not measured."""
        if implementation not in self.times or unit not in self.times:
            return None
        return self.step(implementation).median / self.step(unit).median

    def faster(self, implementation: str, than: str | None) -> float | None:
        """How many times faster one is than the other."""
        return self.ratio(than, implementation)

    def figures(self, implementation: str) -> dict[str, Any]:
        """Figures derived from the times, for readers of the file who do not have this class."""
        return {}

    def as_json(self) -> dict[str, Any]:
        times = {name: {part: t._asdict() for part, t in parts.items()} for name, parts in self.times.items()}
        figures = {name: self.figures(name) for name in self.times}
        return {"kind": self.kind, **asdict(self), "times": times, "figures": figures}


@dataclass(frozen=True, kw_only=True)
class OptimizerPart(Record):
    """A whole optimizer part of a SAM step: every implementation's, or every method's.

    Attributes:
        copy_gb_s: of a large copy in the same rounds, bytes read plus bytes written.
        bytes_per_parameter: by implementation, what cannot be done without, of float32.
        page_faults: by implementation, in a step; on the CPU.
        shifted: the gradients are not aligned as the parameters are.
    """

    kind = "optimizer part"

    copy_gb_s: float
    bytes_per_parameter: dict[str, float]
    dtype: str = "float32"
    chunk_size: int | None = None
    page_faults: dict[str, int] = field(default_factory=dict)
    shifted: bool = False

    @property
    def name(self) -> str:
        more = "" if self.dtype == "float32" else f", {self.dtype}"
        more += f", chunks of {self.chunk_size:,}" if self.chunk_size else ""
        return super().name + more + (", gradients aligned otherwise" if self.shifted else "")

    def gb_s(self, implementation: str) -> float:
        """The floor's bytes, whatever is moved beyond them, by the device's time."""
        moved = self._moved(self.bytes_per_parameter[implementation])
        return moved / self.device(implementation).median / 1e6

    def share_of_copy(self, implementation: str) -> float:
        return self.gb_s(implementation) / self.copy_gb_s

    @property
    def best_plain(self) -> str | None:
        """The fastest of the ways of plain PyTorch that were measured."""
        measured = [name for name in PLAIN_PYTORCH if name in self.times]
        return min(measured, key=lambda name: self.step(name).median, default=None)

    def operations(self, implementation: str) -> dict[str, Timing]:
        """A FastSAM backend's, in the device's time; empty for the others."""
        parts = self.times[implementation]
        return {name: parts[name] for name in (*operations.BYTES, operations.UPDATE) if name in parts}

    def operation_share_of_copy(self, implementation: str, operation: str) -> float:
        moved = self._moved(operations.operation_bytes(operation, self.base))
        return moved / self.operations(implementation)[operation].median / 1e6 / self.copy_gb_s

    def _moved(self, bytes_per_parameter: float) -> float:
        return self.parameters * bytes_per_parameter * getattr(torch, self.dtype).itemsize / 4

    def figures(self, implementation: str) -> dict[str, Any]:
        shares = {name: self.operation_share_of_copy(implementation, name) for name in self.operations(implementation)}
        return {
            "gb_s": self.gb_s(implementation),
            "share_of_copy": self.share_of_copy(implementation),
            "times_faster_than_loop": self.faster(implementation, LOOP),
            "times_faster_than_best_plain_pytorch": self.faster(implementation, self.best_plain),
            "fused_base_steps": self.ratio(implementation, FUSED_BASE),
            "operations_share_of_copy": shares,
        }


@dataclass(frozen=True, kw_only=True)
class MethodCosts(OptimizerPart):
    """The optimizer part of every method's step, the first one being SAM's."""

    kind = "methods"

    def sam_steps(self, method: str) -> float | None:
        """The time in units of SAM's."""
        return self.ratio(method, next(iter(self.times)))

    def figures(self, implementation: str) -> dict[str, Any]:
        steps = self.sam_steps(implementation)
        return {
            "sam_steps": steps,
            "gb_s": self.gb_s(implementation),
            "share_of_copy": self.share_of_copy(implementation),
        }


@dataclass(frozen=True, kw_only=True)
class TrainingStep(Record):
    """Whole training steps, the first implementation being the base alone."""

    kind = "training step"

    batch: int

    @property
    def name(self) -> str:
        return f"{super().name}, batch {self.batch}"

    def base_steps(self, implementation: str) -> float | None:
        """The time in units of the base's own training step, replayed from a graph where the implementation's is."""
        base = next(iter(self.times))
        captured = f"{base} {IN_A_GRAPH}"
        is_captured = implementation.endswith(IN_A_GRAPH) and captured in self.times
        return self.ratio(implementation, captured if is_captured else base)

    def figures(self, implementation: str) -> dict[str, Any]:
        return {"base_steps": self.base_steps(implementation)}


@dataclass(frozen=True, kw_only=True)
class HostTime(Record):
    """What a step costs beside the arithmetic.

    Attributes:
        times: parts are ``STATIC``, ``NEW_GRADIENTS`` and, but of ``WATCH``, ``CHANGING_LR``; until the calls return.
        stubbed: the launches did nothing; else they were made, on an idle device.
        launches: by implementation, kernels and copies of a step with static gradients, by name.
        extra_copies: peak memory over that of the fused base alone, in copies of the parameters.
        frozen: how many more parameters the optimizer was given, which have no gradient.
    """

    kind = "host time"

    stubbed: bool
    frozen: int = 0
    launches: dict[str, dict[str, int]] = field(default_factory=dict)
    extra_copies: dict[str, float] = field(default_factory=dict)

    @property
    def name(self) -> str:
        beside = f" beside {self.frozen:,} frozen" if self.frozen else ""
        return f"{super().name}, {self.tensors:,} tensors{beside}" + (", launches stubbed out" if self.stubbed else "")

    def microseconds(self, implementation: str, part: str = STATIC) -> float | None:
        timing = self.times.get(implementation, {}).get(part)
        return None if timing is None else 1e3 * timing.median


@dataclass(frozen=True, kw_only=True)
class RankCosts(Record):
    """The optimizer part over DTensors; ``parameters`` and ``tensors`` are those of each rank.

    Attributes:
        ranks: how many there are.
    """

    kind = "ranks"

    ranks: int

    @property
    def name(self) -> str:
        return f"{super().name}, on each of {self.ranks} ranks"

    def local_steps(self, implementation: str) -> float | None:
        """The time in units of FastSAM's without other ranks."""
        return self.ratio(implementation, LOCAL)

    def figures(self, implementation: str) -> dict[str, Any]:
        return {"local_steps": self.local_steps(implementation)}


_KINDS: dict[str, type[Record]] = {
    kind.kind: kind for kind in (OptimizerPart, MethodCosts, TrainingStep, HostTime, RankCosts)
}


def record_from_json(data: Mapping[str, Any]) -> Record:
    """The record that ``as_json()`` gave."""
    kind = _KINDS[data["kind"]]
    values = {one.name: data[one.name] for one in fields(kind) if one.name in data}
    times = {name: {part: Timing(**t) for part, t in parts.items()} for name, parts in data["times"].items()}
    return kind(**{**values, "times": times})


@dataclass
class Results:
    """Everything that one run has measured.

    Attributes:
        environment: where.
        records: in the order of the run.
        not_measured: what of the plan was left out or failed, and why.
        lines: if given, is handed a line of JSON for the environment, each record and each reason, as they come.
    """

    environment: dict[str, Any]
    records: list[Record] = field(default_factory=list)
    not_measured: list[str] = field(default_factory=list)
    lines: Callable[[str], None] | None = field(default=None, compare=False, repr=False)

    def __post_init__(self) -> None:
        self._write({"environment": self.environment})

    def add(self, record: Record) -> None:
        self.records.append(record)
        self._write({"record": record.as_json()})

    def leave_out(self, what: str) -> None:
        self.not_measured.append(what)
        self._write({"not_measured": what})

    def of(self, kind: type[Record]) -> list[Any]:
        return [record for record in self.records if type(record) is kind]

    @property
    def backends(self) -> list[str]:
        """FastSAM's that were measured, fastest first."""
        measured = {name for record in self.records for name in record.times}
        return [name for name in reversed(BACKENDS) if name in measured]

    def as_json(self) -> dict[str, Any]:
        records = [record.as_json() for record in self.records]
        return {"environment": self.environment, "records": records, "not_measured": self.not_measured}

    @classmethod
    def read(cls, path: Path) -> Results:
        """A file of results, or the lines of a run; of these the last may be cut off."""
        if path.suffix == ".json":
            data = json.loads(path.read_text())
            return cls(data["environment"], [*map(record_from_json, data["records"])], data["not_measured"])
        results = cls({})
        for line in path.read_text().splitlines(keepends=True):
            entry = json.loads(line) if line.endswith("\n") else {}
            results.environment |= entry.get("environment", {})
            results.records += map(record_from_json, [entry["record"]] if "record" in entry else [])
            results.not_measured += [entry["not_measured"]] if "not_measured" in entry else []
        return results

    def _write(self, entry: dict[str, Any]) -> None:
        if self.lines is not None:
            self.lines(json.dumps(entry))
