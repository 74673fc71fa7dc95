"""How the benchmarks measure: gradients, rounds, clocks, limits, what is asked of a device."""

# ruff: noqa: E402 - benchmarks/ is a package that is not installed: it has to be put in place before it is imported.

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Iterator
from types import SimpleNamespace

import pytest
import torch
from checkout import import_benchmarks
from small_models import SHAPES, parameters

import_benchmarks()

from benchmarks import implementations, measure, operations, optimizer_part
from benchmarks.device import CudaDevice, Device, OutOfTime, Unavailable, at_most
from benchmarks.host_time import host_time
from benchmarks.implementations import FUSED_BASE, LISTS, LOOP
from benchmarks.measure import DEVICE, HOST, STEP, Gradients, Timing
from benchmarks.operations import BACKENDS, UPDATE, OperationClock
from benchmarks.optimizer_part import PartRun, one_visit
from benchmarks.plan import Part
from benchmarks.records import (
    AROUND,
    CHANGING_LR,
    NEW_GRADIENTS,
    STATIC,
    WATCH,
)
from benchmarks.shapes import TINY, sizes

# ---- how it is measured ----


@pytest.mark.parametrize("base", implementations.BASES)
@pytest.mark.parametrize("backend", BACKENDS)
def test_timing_the_operations_changes_nothing(backend: str, base: str) -> None:
    if reason := operations.obstacle(backend, "cpu"):
        pytest.skip(reason)
    gradients, clock = Gradients(SHAPES), OperationClock(Device())
    params, others = parameters(), parameters()
    mine, plain = implementations.build(backend, params, base), implementations.build(backend, others, base)
    for _ in range(3):
        before = [p.detach().clone() for p in params]
        gradients.hand_to(params)
        gradients.hand_to(others)
        with clock.running():
            mine.step()
        plain.step()
        assert all(map(torch.equal, params, others))
        assert set(clock.seconds()) == {"grad_norm", "perturb_", UPDATE}
        assert min(clock.seconds().values()) > 0
    before = [p.detach().clone() for p in params]
    with clock.running():
        mine.optimizer.first_step()
        mine.optimizer.restore()
    assert all(map(torch.equal, params, before))
    assert "restore_" in clock.seconds()


def test_gradients_alternate_between_two_sets_of_addresses() -> None:
    gradients, params = Gradients(SHAPES), parameters()
    seen = []
    for _ in range(4):
        gradients.hand_to(params)
        seen.append([p.grad.data_ptr() for p in params])
    assert seen[0] == seen[2] != seen[1] == seen[3]


def test_rounds_are_interleaved() -> None:
    visited = []

    def visit(name: str, seconds: float) -> measure.Visit:
        return lambda: visited.append(name) or {STEP: seconds}

    benchmark = SimpleNamespace(pedantic=lambda target, rounds: [target() for _ in range(rounds)])
    visits = {"a": visit("a", 0.25), "b": visit("b", 0.5)}
    for drive in (None, measure.driven_by(benchmark)):
        visited.clear()
        rounds = measure.interleaved(visits, 0.0, drive)
        assert rounds.count == measure.FEWEST_ROUNDS
        assert visited == ["a", "b"] * (2 + measure.FEWEST_ROUNDS)
        assert rounds.times["b"][STEP] == Timing(500, 500, 500, 500)


class StrictDevice(Device):
    """Asynchronous; fails where a time is read before it is idle, or taken of a step with a warm cache."""

    type, asynchronous, copy_elements = "cpu", True, 2**10

    def __init__(self, memory: float = math.inf) -> None:
        self.memory, self.pending, self.warm, self.asleep = memory, 0, True, False

    def mark(self) -> float:
        self.pending += 1
        return super().mark()

    def seconds(self, start: float, end: float) -> float:
        assert self.pending == 0, "read before the device was idle"
        return super().seconds(start, end)

    def synchronize(self) -> None:
        self.pending, self.asleep = 0, False

    def flush_cache(self) -> None:
        self.warm = False

    def head_start(self, seconds: float) -> None:
        assert not self.warm, "the cache is flushed before the head start, which is to last"
        assert seconds > 0
        self.asleep = True

    def free_bytes(self) -> float:
        return self.memory


@pytest.mark.parametrize("name", [LOOP, "foreach", FUSED_BASE])
def test_times_are_read_of_an_idle_device_and_with_a_cold_cache(name: str) -> None:
    device, params = StrictDevice(), parameters()
    implementation = implementations.build(name, params, "SGD")
    seen = []

    def step() -> None:
        seen.append((device.warm, device.asleep))
        device.warm = True
        implementation.step()

    visit = one_visit(device, implementation._replace(step=step), params, Gradients(SHAPES))
    for _ in range(2):
        seconds = visit()
    operations_of = {"grad_norm", "perturb_", "restore_", UPDATE} if name == "foreach" else set()
    assert set(seconds) == {STEP, HOST, DEVICE} | operations_of
    one = [(False, False), (False, True), *([(False, True)] if operations_of else [])]
    assert seen == one * 2


def small_device() -> Device:
    device = Device()
    device.copy_elements = 2**10
    return device


def test_a_whole_case_on_the_cpu() -> None:
    run = PartRun(small_device(), Part(TINY, "AdamW", "bfloat16"), fewest=2)
    record = run.measure([LOOP, "foreach", "no such"], {"triton": "because"}, 0.0)
    assert list(record.times) == [LOOP, "foreach"]
    assert record.skipped == {"triton": "because", "no such": "ValueError: there is no implementation 'no such'"}
    assert record.rounds == 2
    assert record._moved(record.bytes_per_parameter["foreach"]) == 24 * record.parameters
    assert set(record.operations("foreach")) == {"grad_norm", "perturb_", "restore_", UPDATE}
    assert set(record.times["foreach"]) >= {STEP, AROUND}


def test_one_that_fails_does_not_take_the_others_along(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail() -> None:
        raise torch.OutOfMemoryError("no memory\nand more")

    def build(name: str, *args: object, **options: object) -> implementations.Implementation:
        return implementations.Implementation(fail, None) if name == LISTS else real(name, *args, **options)

    real = implementations.build
    monkeypatch.setattr(implementations, "build", build)
    record = PartRun(small_device(), Part(TINY), fewest=2).measure([LISTS, LOOP], {}, 0.0)
    assert list(record.times) == [LOOP]
    assert record.skipped == {LISTS: "OutOfMemoryError: no memory"}


def test_no_more_implementations_at_a_time_than_there_is_memory_for() -> None:
    names = ["a", "b", "c", "d", "e"]
    each = optimizer_part.COPIES * 4 * int(sizes(TINY)["parameters"])
    for fitting, shifts in ((5, [5]), (4, [3, 2]), (2, [2, 2, 1]), (1, [1] * 5)):
        device = StrictDevice((fitting + 0.5) * each / optimizer_part.USABLE)
        assert list(map(len, PartRun(device, Part(TINY))._shifts(names))) == shifts
    with pytest.raises(Unavailable, match="memory"):
        PartRun(StrictDevice(each), Part(TINY))._shifts(names)


@pytest.mark.skipif(bool(operations.obstacle("native", "cpu")), reason="the extension is not compiled")
def test_host_time_without_launches() -> None:
    """Nothing is launched, nothing is changed, and everything is as before afterwards."""
    record = host_time(Device(), TINY, seconds=0.0)
    assert {FUSED_BASE, "native"} <= set(record.times)
    assert set(record.times["native"]) == {STATIC, NEW_GRADIENTS, CHANGING_LR}
    assert set(record.times[WATCH]) == {STATIC, NEW_GRADIENTS}
    assert record.stubbed
    beside = host_time(Device(), TINY, seconds=0.0, frozen=3)
    assert "2 tensors beside 3 frozen" in beside.name
    assert beside.tensors == record.tensors
    params = parameters()
    Gradients(SHAPES).hand_to(params)
    before = [p.detach().clone() for p in params]
    with operations.stubbed_launches("native"):
        implementations.build("native", params, "SGD").step()
    assert all(map(torch.equal, params, before))
    implementations.build("native", params, "SGD").step()
    assert not any(map(torch.equal, params, before))


def test_a_block_is_interrupted_at_its_limit() -> None:
    with pytest.raises(OutOfTime), at_most(0.05):
        time.sleep(30)
    with at_most(30):
        pass
    time.sleep(0.01)  # and nothing is left behind


class StandIn:
    """What ``CudaDevice`` uses of ``torch.cuda``, in the host's time; it keeps what it was asked for."""

    def __init__(self) -> None:
        self.asked: list[str] = []

    def __getattr__(self, name: str):
        return lambda *_, **__: self.asked.append(name) or self

    def get_device_properties(self, index: object) -> SimpleNamespace:
        return SimpleNamespace(L2_cache_size=100, total_memory=2**26)

    def elapsed_time(self, end: object) -> float:
        assert self.asked[-1] == "synchronize", "read before the device was idle"
        return 2.0

    def max_memory_allocated(self) -> int:
        return 12345

    @contextlib.contextmanager
    def stream(self, stream: object) -> Iterator[None]:
        self.asked.append("on a side stream")
        yield
        self.asked.append("back")

    @contextlib.contextmanager
    def graph(self, graph: object) -> Iterator[None]:
        self.asked.append("capture")
        yield
        self.asked.append("captured")


def test_what_is_asked_of_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    cuda, zeros = StandIn(), torch.zeros
    monkeypatch.setattr(torch, "cuda", cuda)
    monkeypatch.setattr(torch, "zeros", lambda *args, device, **options: zeros(*args, **options))
    device = CudaDevice()
    assert device.copy_elements == 2**20
    assert device._cycles_per_second == pytest.approx(10_000_000 / 2e-3)
    cuda.asked.clear()
    start, end = device.mark(), device.mark()
    assert cuda.asked == ["Event", "record"] * 2
    device.synchronize()
    assert device.seconds(start, end) == 2e-3
    cuda.asked.clear()
    assert device.peak_bytes(lambda: cuda.asked.append("step")) == 12345
    assert cuda.asked == ["synchronize", "reset_peak_memory_stats", "step", "synchronize"]
    cuda.asked.clear()
    replay = device.capture(lambda: cuda.asked.append("step"))
    warm_up = ["Stream", "current_stream", "wait_stream", "on a side stream", "step", "step", "step", "back"]
    assert cuda.asked == [*warm_up, "current_stream", "wait_stream", "CUDAGraph", "capture", "step", "captured"]
    cuda.asked.clear()
    replay()
    assert cuda.asked == ["replay"]
