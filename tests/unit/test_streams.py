"""``runtime/streams.py``: memory is kept while another stream than its own may use it. Streams are imitated here."""

import weakref

import pytest
import torch

from fastsam.runtime.streams import StreamGuard, current_stream

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
