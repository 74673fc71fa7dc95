"""Interleaved rounds: every implementation once per round, so that drift of the machine hits all alike."""

from __future__ import annotations

import ctypes
import gc
import resource
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from benchmarks.device import Device, Step

# What one visit returns: seconds, by the part that was timed.
Seconds = dict[str, float]
Visit = Callable[[], Seconds]
Timings = dict[str, dict[str, "Timing"]]

# From an idle device until it is idle again; until the calls have returned; in the device's time, all of it queued.
STEP, HOST, DEVICE = "step", "host", "device"

FEWEST_ROUNDS, MOST_ROUNDS = 5, 200

# A timed step's device time begins so much later than its calls, for the host to stay ahead.
HEAD_START, LEAST_HEAD_START = 1.5, 50e-6

# glibc's mallopt: the size from which a block is mapped on its own, the free memory at which the heap shrinks.
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3
LARGEST_HEAP_BLOCK = 2**25  # as far as glibc lets it be set, and as far as it grows by itself


class Timing(NamedTuple):
    """Milliseconds over the rounds of one run."""

    median: float
    q1: float
    q3: float
    fastest: float

    @classmethod
    def of(cls, seconds: Sequence[float]) -> Timing:
        # A run that is cut off may have had one round.
        q1, median, q3 = statistics.quantiles([*seconds, *seconds], n=4, method="inclusive")
        return cls(*(1e3 * x for x in (median, q1, q3, min(seconds))))

    @property
    def spread(self) -> float:
        """The interquartile range."""
        return self.q3 - self.q1


class Rounds(NamedTuple):
    """What was measured side by side; page faults are per visit, 4 KiB each."""

    count: int
    times: Timings
    page_faults: dict[str, int]


def interleaved(
    visits: Mapping[str, Visit],
    seconds: float,
    drive: Callable[[Step, int], None] | None = None,
    fewest: int = FEWEST_ROUNDS,
) -> Rounds:
    """Visits A B C A B C ... for about ``seconds``, after two rounds that do not count.

    Args:
        visits: by implementation; each prepares what is not timed, times one step, and returns its times.
        seconds: how long to measure.
        drive: calls a round so many times; by default a loop.
        fewest: rounds, however long they take; at least 2.
    """
    times: dict[str, dict[str, list[float]]] = {}
    faults: dict[str, list[int]] = {}

    def one_round() -> None:
        for name, visit in visits.items():
            before = _page_faults()
            for part, elapsed in visit().items():
                times.setdefault(name, {}).setdefault(part, []).append(elapsed)
            faults.setdefault(name, []).append(_page_faults() - before)

    gc.collect()
    gc.disable()
    try:
        one_round()  # allocates states, builds tables
        start = time.perf_counter()
        one_round()
        rounds = round(seconds / (time.perf_counter() - start))
        times.clear()
        faults.clear()
        (drive or _repeat)(one_round, min(max(rounds, fewest), MOST_ROUNDS))
    finally:
        gc.enable()
    return Rounds(
        len(next(iter(faults.values()))),
        {name: {part: Timing.of(t) for part, t in parts.items()} for name, parts in times.items()},
        {name: round(statistics.median(counts)) for name, counts in faults.items()},
    )


def driven_by(benchmark: Any) -> Callable[[Step, int], None]:
    """:func:`interleaved`'s ``drive`` by pytest-benchmark's fixture, which can be used once in a test."""
    return lambda one_round, count: benchmark.pedantic(one_round, rounds=count)


def _repeat(one_round: Step, rounds: int) -> None:
    for _ in range(rounds):
        one_round()


def timed_step(device: Device, step: Step, head_start: float | None = None) -> Seconds:
    """One step by every clock that means something.

    Args:
        device: what it runs on.
        step: the step.
        head_start: seconds of the host's that the device sleeps for, so that it never waits for a call: the device's
            time is then that of its work. Without, the step begins on an idle device.
    """
    device.flush_cache()
    if head_start is None:
        device.synchronize()
    else:
        device.head_start(max(HEAD_START * head_start, LEAST_HEAD_START))
    start = time.perf_counter()
    begin = device.mark()
    step()
    end = device.mark()
    returned = time.perf_counter()
    device.synchronize()
    idle = time.perf_counter()
    if not device.asynchronous:
        return {STEP: returned - start}
    return {STEP: idle - start, HOST: returned - start, DEVICE: device.seconds(begin, end)}


def by_every_clock(device: Device, prepare: Step, step: Step) -> Seconds:
    """A step from idle to idle and, on an asynchronous device, a second one for the device's time."""
    prepare()
    seconds = timed_step(device, step)
    if device.asynchronous:
        prepare()
        seconds[DEVICE] = timed_step(device, step, head_start=seconds[HOST])[DEVICE]
    return seconds


def settle_allocator() -> None:
    """Puts glibc's malloc where a long training run leaves it, at its best for implementations that allocate.

    Otherwise the state of the heap decides whether a step's clones reuse memory or fault in every page
    anew. Blocks over 32 MiB are always mapped anew, here as in training. Other allocators are left alone.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(M_MMAP_THRESHOLD, LARGEST_HEAP_BLOCK)
        mallopt(M_TRIM_THRESHOLD, 2**31 - 1)


def _page_faults() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt


class Copy:
    """A large copy by ``Tensor.copy_``, of random numbers: the bandwidth that the figures are set against."""

    NAME = "copy"

    def __init__(self, device: Device) -> None:
        self._device = device
        self._source = torch.randn(device.copy_elements, device=device.type)
        self._target = torch.empty_like(self._source)
        self._bytes = 2 * self._source.numel() * self._source.element_size()

    def visit(self) -> Seconds:
        self._device.synchronize()
        start = self._device.mark()
        self._target.copy_(self._source)
        end = self._device.mark()
        self._device.synchronize()
        return {STEP: self._device.seconds(start, end)}

    def gb_s(self, timing: Timing) -> float:
        """Bytes read plus bytes written, per second."""
        return self._bytes / timing.median / 1e6


class Gradients:
    """Two sets of gradients that each list of parameters gets in turn, as autograd allocates anew for every step.

    ``shifted``: by one element, so that they are aligned otherwise than the parameters, as views of buckets may be.
    """

    def __init__(self, shapes: Sequence[tuple[int, ...]], *, shifted: bool = False, **options: Any) -> None:
        first = [torch.randn(shape, **options).mul_(1e-2) for shape in shapes]
        self._sets = first, [grad * 0.5 for grad in first]
        if shifted:
            self._sets = [*map(_shifted, self._sets[0])], [*map(_shifted, self._sets[1])]
        self._turns: dict[int, int] = {}

    def hand_to(self, params: Sequence[Tensor]) -> None:
        turn = self._turns.get(id(params), 0)
        self._turns[id(params)] = 1 - turn
        for param, grad in zip(params, self._sets[turn], strict=True):
            param.grad = grad


def _shifted(grad: Tensor) -> Tensor:
    return torch.empty(grad.numel() + 1, dtype=grad.dtype, device=grad.device)[1:].view(grad.shape).copy_(grad)
