"""CUDA streams, imitated: memory that another stream may still use is kept; captured steps count on."""

import weakref
from types import SimpleNamespace

import pytest
import torch
from checks import assert_same_bits

from fastsam import FastSAM, methods
from fastsam.runtime import streams
from fastsam.runtime.step_number import StepNumber
from fastsam.runtime.streams import StreamGuard, current_stream
from fastsam.tables import table

CUDA = torch.device("cuda")


class Event:
    passed = False

    def query(self):
        return self.passed


class Stream:
    def __init__(self, handle):
        self.cuda_stream, self.events = handle, []

    def record_event(self):
        self.events.append(Event())
        return self.events[-1]


class Memory:
    pass


@pytest.fixture
def use(monkeypatch):
    """Makes a stream the current one."""
    return lambda stream: monkeypatch.setattr(torch.cuda, "current_stream", lambda device: stream)


def test_memory_waits_for_the_stream_that_used_it_last(use):
    guard, mine, other = StreamGuard(), Stream(1), Stream(2)
    use(mine)
    made_on, memory = current_stream(CUDA), Memory()
    alive = weakref.ref(memory)
    use(other)
    guard.keep(CUDA, made_on, memory)
    del memory
    guard.free()
    assert alive() is not None
    other.events[0].passed = True
    guard.free()
    assert alive() is None


def test_on_its_own_stream_it_goes_at_once(use):
    guard, mine = StreamGuard(), Stream(1)
    use(mine)
    memory = Memory()
    alive = weakref.ref(memory)
    guard.keep(CUDA, current_stream(CUDA), memory)
    del memory
    assert alive() is None
    assert mine.events == []


def test_a_cpu_has_no_streams():
    guard = StreamGuard()
    memory = Memory()
    alive = weakref.ref(memory)
    guard.keep(torch.device("cpu"), current_stream(torch.device("cpu")), memory)
    del memory
    assert alive() is None


def test_dropped_tables_wait_for_the_stream_that_used_them_last(monkeypatch, use):
    """With all that they have on the device; new ones are made meanwhile."""
    mine, other = Stream(1), Stream(2)
    monkeypatch.setattr(streams, "current_stream", lambda device: torch.cuda.current_stream(device).cuda_stream)
    monkeypatch.setattr(table, "current_stream", streams.current_stream)
    param = torch.nn.Parameter(torch.ones(3))
    optimizer = FastSAM([param], lr=0.1, backend="reference")

    def step():
        param.grad = torch.ones_like(param)
        optimizer.first_step(zero_grad=False)
        optimizer.second_step()

    use(mine)
    step()
    tables = optimizer._engine.tables
    alive = [weakref.ref(memory) for one in tables for memory in (one, one.values[0])]
    use(other)
    step()
    tables.drop()
    step()
    assert all(memory() is not None for memory in alive)
    other.events[0].passed = True
    step()
    assert alive[0]() is None


def test_a_captured_step_counts_on(monkeypatch):
    """In a CUDA graph the number is not written but increased, so that each replay has its own."""
    table = SimpleNamespace(device=torch.device("cpu"))
    number = StepNumber(table)
    assert int(number.of(7)) == 7
    monkeypatch.setattr(streams, "is_capturing", lambda device: True)
    # What has been captured has not happened on a device; here it has, as in the first replay.
    number.begin_step()
    assert int(number.of(30)) == 8
    assert int(number.of(30)) == 8, "several draws of one step"
    number.begin_step()
    assert int(number.of(30)) == 9, "a capture that begins once more counts once more"
    monkeypatch.setattr(streams, "is_capturing", lambda device: False)
    number.begin_step()
    assert int(number.of(30)) == 30, "what was captured has not happened"


def test_a_count_cannot_begin_in_a_graph(monkeypatch):
    """Each replay would begin it anew."""
    monkeypatch.setattr(streams, "is_capturing", lambda device: True)
    with pytest.raises(RuntimeError, match="run a step outside the capture first"):
        StepNumber(SimpleNamespace(device=torch.device("cpu")))


@pytest.mark.parametrize("method", [methods.RandomSAM(), methods.ESAM()], ids=str)
def test_replays_draw_anew(monkeypatch, method):
    """The captured operators, run again, perturb as the next step would."""
    param = torch.nn.Parameter(torch.zeros(50, 2))
    params = [param, *(torch.nn.Parameter(torch.ones(3)) for _ in range(20))]
    optimizer = FastSAM(params, lr=0.0, method=method, backend="reference")

    def perturbed():
        for p in params:
            p.grad = torch.ones_like(p)
        optimizer.first_step(zero_grad=False)
        result = [p.detach().clone() for p in params]
        optimizer.second_step()
        return result

    eager = [perturbed() for _ in range(4)]
    again = FastSAM(params, lr=0.0, method=method, backend="reference")
    optimizer = again
    start = [perturbed()]
    monkeypatch.setattr(streams, "is_capturing", lambda device: True)
    assert_same_bits([*start, *(perturbed() for _ in range(3))], eager)
