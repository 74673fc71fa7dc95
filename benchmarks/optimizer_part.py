"""Measures the optimizer part of a SAM step, whole and by operation: every implementation's, and every method's."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from benchmarks import implementations, methods, operations
from benchmarks.device import Device, OutOfTime, Step, Unavailable, at_most, reason_of
from benchmarks.implementations import FUSED_BASE, NEED_A_COMPILER, Implementation
from benchmarks.measure import (
    FEWEST_ROUNDS,
    HOST,
    STEP,
    Copy,
    Gradients,
    Seconds,
    Timings,
    Visit,
    by_every_clock,
    interleaved,
)
from benchmarks.methods import METHODS, MethodSteps
from benchmarks.operations import KERNELS, OperationClock
from benchmarks.plan import Part
from benchmarks.records import AROUND, MethodCosts, OptimizerPart
from benchmarks.shapes import shapes_of, sizes
from fastsam import FastSAM

# Beside the weights and two sets of gradients: state (two moments), a backup, and as much again for temporaries.
COPIES = 5
# What is left to the allocator and to everyone else on the device.
USABLE = 0.85
# One implementation's compiler gets no more.
COMPILE_SECONDS = 45.0

Drive = Callable[[Step, int], None]


class PartRun:
    """Measures one ``Part`` of the plan, as many implementations at a time as there is memory for.

    Args:
        device: what to measure on.
        part: of the plan.
        compiler: ``torch.compile``'s backend.
        fewest: rounds, however long they take.
    """

    def __init__(self, device: Device, part: Part, *, compiler: str = "inductor", fewest: int = FEWEST_ROUNDS) -> None:
        self._device, self._part, self._compiler, self._fewest = device, part, compiler, fewest
        self._shapes = shapes_of(part.model)
        self._options: dict[str, Any] = {"device": device.type, "dtype": getattr(torch, part.dtype)}
        self.parameters = sum(map(math.prod, self._shapes))

    def names(self) -> tuple[list[str], dict[str, str]]:
        """What is measured, and what is not, with the reason."""
        names, skipped = implementations.names(self._device.type, compiled=self._part.compiled)
        if self._part.chunk_size is not None:
            names, skipped = [name for name in names if name in KERNELS], {}
        elif self._part.fewer:
            names, skipped = [name for name in names if name in (*KERNELS, FUSED_BASE)], {}
        return names, skipped

    def measure(
        self, names: Sequence[str], skipped: dict[str, str], seconds: float, drive: Drive | None = None
    ) -> OptimizerPart:
        """Rounds over the implementations for about ``seconds``, the preparations not counted."""
        times: Timings = {}
        faults: dict[str, int] = {}
        skipped, counts, copies = dict(skipped), [], []
        copy = Copy(self._device)
        gradients = Gradients(self._shapes, shifted=self._part.shifted, **self._options)
        shifts = self._shifts(names)
        with operations.chunk_size(self._part.chunk_size):
            for shift in shifts:
                visits = {Copy.NAME: copy.visit, **self._visits(shift, gradients, skipped)}
                # pytest-benchmark's fixture can be used once; on a device of little memory a loop drives the rounds.
                rounds = interleaved(visits, seconds / len(shifts), drive if len(shifts) == 1 else None, self._fewest)
                copies.append(rounds.times.pop(Copy.NAME)[STEP])
                times |= rounds.times
                faults |= {name: rounds.page_faults[name] for name in rounds.times}
                counts.append(rounds.count)
                del visits
                if any(name in NEED_A_COMPILER for name in shift):
                    torch.compiler.reset()
                self._device.release_memory()
        sam = operations.sam_bytes(self._part.base)
        floor = {name: operations.UPDATE_BYTES[self._part.base] if name == FUSED_BASE else sam for name in times}
        return OptimizerPart(
            **sizes(self._part.model),
            base=self._part.base,
            dtype=self._part.dtype,
            rounds=min(counts),
            times=times,
            skipped=skipped,
            # The fastest copy of all: a share is never flattered by a slow one.
            copy_gb_s=max(copy.gb_s(timing) for timing in copies),
            bytes_per_parameter=floor,
            chunk_size=self._part.chunk_size,
            shifted=self._part.shifted,
            page_faults={} if self._device.asynchronous else faults,
        )

    def _shifts(self, names: Sequence[str]) -> list[list[str]]:
        """The implementations that are in memory together, as many as fit."""
        each = COPIES * self.parameters * self._options["dtype"].itemsize
        fitting = min(USABLE * self._device.free_bytes() / each, len(names))
        if fitting < 1:
            raise Unavailable(f"one implementation needs {each / 2**30:.0f} GiB of memory")
        count = math.ceil(len(names) / int(fitting))
        size = math.ceil(len(names) / count)
        return [list(names[i : i + size]) for i in range(0, len(names), size)]

    def _visits(self, names: Sequence[str], gradients: Gradients, skipped: dict[str, str]) -> dict[str, Visit]:
        """Of those that get through a first visit, in which most of what can fail does; the others are ``skipped``."""
        visits: dict[str, Visit] = {}
        for name in names:
            try:
                visits[name] = self._visit(name, gradients)
                visits[name]()
            except Exception as error:
                visits.pop(name, None)
                skipped[name] = reason_of(error)
                self._device.release_memory()
        return visits

    def _visit(self, name: str, gradients: Gradients) -> Visit:
        torch.manual_seed(0)
        params = [torch.randn(shape, **self._options).mul_(0.02).requires_grad_() for shape in self._shapes]
        options = {"compiler": self._compiler} if name == implementations.COMPILED else {}
        implementation = implementations.build(name, params, self._part.base, **options)
        if name in NEED_A_COMPILER:
            try:
                with at_most(COMPILE_SECONDS):
                    gradients.hand_to(params)
                    implementation.step()
            except OutOfTime:
                raise Unavailable(f"compiling took more than {COMPILE_SECONDS:.0f} s") from None
        return one_visit(self._device, implementation, params, gradients)


def one_visit(device: Device, implementation: Implementation, params: list[Tensor], gradients: Gradients) -> Visit:
    """The step by every clock, and a FastSAM backend's operations; nothing of it finds its tensors cached on a GPU.

    On the CPU the operations are timed in the very step; on a GPU in one more, so that no event delays the step.
    """
    step, optimizer = implementation
    clock = OperationClock(device)

    def prepare() -> None:
        gradients.hand_to(params)

    def timed_operations() -> None:
        with clock.running():
            step()

    def restoring(head_start: float = 0.0) -> dict[str, float]:
        """``restore_``, which no step over a fused base calls."""
        device.flush_cache()
        device.head_start(head_start)
        optimizer.first_step(zero_grad=False)
        with clock.running():
            optimizer.restore()
        device.synchronize()
        return clock.seconds()

    def visit() -> Seconds:
        if not isinstance(optimizer, FastSAM):
            return by_every_clock(device, prepare, step)
        if device.asynchronous:
            seconds = by_every_clock(device, prepare, step)
            ahead = 2 * seconds[HOST]
            prepare()
            device.flush_cache()
            device.head_start(ahead)
            timed_operations()
            device.synchronize()
            return {**seconds, **clock.seconds(), **restoring(ahead)}
        seconds = by_every_clock(device, prepare, timed_operations)
        parts = clock.seconds()
        return {**seconds, AROUND: seconds[STEP] - sum(parts.values()), **parts, **restoring()}

    return visit


def method_costs(
    device: Device, model: str, base: str, seconds: float, drive: Drive | None = None, fewest: int = FEWEST_ROUNDS
) -> MethodCosts:
    """Rounds over all methods, by the backend that "auto" takes for each; on one CPU thread in its own time."""
    shapes = shapes_of(model)
    torch.manual_seed(0)
    weights = [torch.randn(shape, device=device.type).mul_(0.02) for shape in shapes]
    gradients = Gradients(shapes, device=device.type)
    copy = Copy(device)

    # One thread's own time is of its work alone, however busy the machine is.
    now = time.thread_time if not device.asynchronous and torch.get_num_threads() == 1 else time.perf_counter

    def clock() -> float:
        device.synchronize()
        return now()

    visits: dict[str, Visit] = {Copy.NAME: copy.visit}
    skipped = {}
    for name in METHODS:
        try:
            params = [w.clone().requires_grad_() for w in weights]
            steps = MethodSteps(name, params, gradients, base, "auto")
            steps(clock)
            visits[name] = lambda steps=steps: {STEP: steps(clock)}
        except Exception as error:
            skipped[name] = reason_of(error)
    rounds = interleaved(visits, seconds, drive, fewest)
    copied = rounds.times.pop(Copy.NAME)[STEP]
    return MethodCosts(
        **sizes(model),
        base=base,
        rounds=rounds.count,
        times=rounds.times,
        skipped=skipped,
        copy_gb_s=copy.gb_s(copied),
        bytes_per_parameter={name: methods.floor_bytes(name, base) for name in rounds.times},
    )
