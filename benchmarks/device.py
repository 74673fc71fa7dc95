"""The device that is measured: its clock, its cache, its memory, its launches, its graphs."""

from __future__ import annotations

import gc
import signal
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

import torch

Step = Callable[[], Any]

# A head start longer than this keeps the GPU asleep for nothing: its queue is full before.
LONGEST_HEAD_START = 0.02


class Unavailable(RuntimeError):
    """What cannot be measured here; the message says why."""


class Device:
    """The CPU: an operation is over when its call returns."""

    type = "cpu"
    asynchronous = False
    # Large enough that no cache holds them: 256 MiB read and as much written.
    copy_elements = 2**26

    def mark(self) -> Any:
        """A point in the device's time: when everything that was asked of it so far is done."""
        return time.perf_counter()

    def seconds(self, start: Any, end: Any) -> float:
        """Between two marks, after :meth:`synchronize`."""
        return end - start

    def synchronize(self) -> None:
        """Waits until the device is idle."""

    def flush_cache(self) -> None:
        """Leaves nothing of the tensors to be measured in the device's cache; on the CPU the other visits do that."""

    def head_start(self, seconds: float) -> None:
        """Keeps the device busy, so that what follows is queued before it runs."""

    def free_bytes(self) -> float:
        """How much memory can still be allocated."""
        return float("inf")

    def release_memory(self) -> None:
        """Frees what is no longer referenced, reference cycles included."""
        gc.collect()

    def peak_bytes(self, step: Step) -> int:
        """The most memory that is allocated at any time during the step."""
        raise Unavailable("PyTorch counts no memory on the CPU")

    def launches(self, step: Step) -> dict[str, int]:
        """What the step has the device do: how often each kernel or copy."""
        raise Unavailable("the CPU has no launches")

    def capture(self, step: Step) -> Step:
        """Captures the step into a CUDA graph; returns a function that replays it."""
        raise Unavailable("the CPU has no CUDA graphs")


class CudaDevice(Device):
    """The current CUDA device, and its current stream."""

    type = "cuda"
    asynchronous = True

    def __init__(self) -> None:
        found = torch.cuda.get_device_properties(torch.cuda.current_device())
        self.copy_elements = min(2**30, found.total_memory // 64)
        cache = getattr(found, "L2_cache_size", 0) or 2**26
        # Read, not written: what is dirty in the cache would be written back while something else is measured.
        self._flusher = torch.zeros(cache, dtype=torch.float32, device="cuda")
        self._cycles_per_second = self._count_cycles()

    def mark(self) -> torch.cuda.Event:
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def seconds(self, start: torch.cuda.Event, end: torch.cuda.Event) -> float:
        return start.elapsed_time(end) / 1e3

    def synchronize(self) -> None:
        torch.cuda.synchronize()

    def flush_cache(self) -> None:
        self._flusher.sum()

    def head_start(self, seconds: float) -> None:
        torch.cuda._sleep(int(min(seconds, LONGEST_HEAD_START) * self._cycles_per_second))

    def free_bytes(self) -> float:
        return torch.cuda.mem_get_info()[0]

    def release_memory(self) -> None:
        torch.cuda.synchronize()
        gc.collect()
        torch.cuda.empty_cache()

    def peak_bytes(self, step: Step) -> int:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        step()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated()

    def launches(self, step: Step) -> dict[str, int]:
        torch.cuda.synchronize()
        activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
        with torch.profiler.profile(activities=activities) as profile:
            step()
            torch.cuda.synchronize()
        events = [event for event in profile.events() if event.device_type == torch.autograd.DeviceType.CUDA]
        return dict(Counter(event.name for event in events if not event.is_user_annotation))

    def capture(self, step: Step) -> Step:
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(3):
                step()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            step()

        def replay(captured: Step = step) -> None:  # what a graph reads and writes lives as long as the step
            graph.replay()

        return replay

    def _count_cycles(self) -> float:
        """How many of ``_sleep``'s cycles are a second, once the device has woken up."""
        cycles = 10_000_000
        for _ in range(20):
            start = self.mark()
            torch.cuda._sleep(cycles)
            end = self.mark()
            self.synchronize()
        return cycles / self.seconds(start, end)


def default_type() -> str:
    """``cuda`` if there is a CUDA device, else ``cpu``."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def reason_of(error: BaseException) -> str:
    """Why something was not measured, in one line."""
    first_line = str(error).strip().partition("\n")[0]
    return first_line if isinstance(error, Unavailable) else f"{type(error).__name__}: {first_line}"


class OutOfTime(BaseException):
    """Raised anywhere in :func:`at_most`. Not an ``Exception``: no handler in between takes it for a failure."""


@contextmanager
def at_most(seconds: float) -> Iterator[None]:
    """A block that ends with :class:`OutOfTime` after so many seconds; in the main thread, and not in itself.

    Python code is interrupted at once, a call into C when it returns.
    """

    def stop(signum: int, frame: FrameType | None) -> None:
        raise OutOfTime

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, max(seconds, 1e-3))
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
