"""One run of the benchmarks: the device, how long each case is measured, and where its findings go."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import pytest

from benchmarks import report
from benchmarks.device import CudaDevice, Device, Unavailable
from benchmarks.measure import FEWEST_ROUNDS
from benchmarks.operations import KERNELS
from benchmarks.records import Record, Results

# By device: seconds for a case, and how many times that for whole training steps.
SECONDS = {"cpu": 8.0, "cuda": 2.0}
TRAINING = {"cpu": 4.0, "cuda": 2.0}
DRY_COPY_ELEMENTS = 2**16


@dataclass
class Session:
    """What every benchmark is given.

    Attributes:
        device: what is measured.
        results: what has been found so far.
        say: prints a line at once.
        dry: a rehearsal: nothing takes time, and no figure means anything.
        seconds: of a case, the preparations not counted.
    """

    device: Device
    results: Results
    say: Callable[[str], None]
    dry: bool
    seconds: float

    @property
    def training_seconds(self) -> float:
        return self.seconds * TRAINING[self.device.type]

    @property
    def fewest(self) -> int:
        """Rounds of a case, however long they take."""
        return 2 if self.dry else FEWEST_ROUNDS

    @property
    def required(self) -> set[str]:
        """The backends that must run."""
        return {*KERNELS} if self.device.asynchronous or self.dry else {"native"}

    def add(self, record: Record, needed: set[str]) -> None:
        """Keeps and prints a record; fails the test if something that must run is not in it."""
        self.results.add(record)
        for line in report.record_lines(record):
            self.say(line)
        missing = [f"{record.name}: {name}: {why}" for name, why in record.skipped.items() if name in needed]
        if missing:
            pytest.fail("; ".join(missing), pytrace=False)


def device_of(kind: str, *, dry: bool) -> Device:
    """The device of that type.

    Raises:
        Unavailable: there is none.
    """
    if kind == "cuda":
        import torch

        if not torch.cuda.is_available():
            raise Unavailable(f"torch {torch.__version__} sees no CUDA device")
        return CudaDevice()
    device = Device()
    if dry:
        device.copy_elements = DRY_COPY_ELEMENTS
    return device
