"""A Ctrl-C waits for the end of what must not be left half done."""

import signal
import threading

import pytest
from internals import DeferredInterrupts


@pytest.fixture
def handler():
    """A handler of the program's own, which notes what it is called with."""
    calls = []

    def note(number, frame):
        calls.append((number, frame))

    note.calls = calls
    previous = signal.signal(signal.SIGINT, note)
    yield note
    assert signal.getsignal(signal.SIGINT) is note
    signal.signal(signal.SIGINT, previous)


def test_nothing_happens_without_signal(handler):
    with DeferredInterrupts():
        assert signal.getsignal(signal.SIGINT) is not handler
    assert handler.calls == []


def test_keyboard_interrupt_comes_at_end(interruptible):
    reached = []

    def work():
        with DeferredInterrupts():
            signal.raise_signal(signal.SIGINT)
            reached.append("end of the block")
        reached.append("beyond")

    with pytest.raises(KeyboardInterrupt):
        work()
    assert reached == ["end of the block"]


def test_programs_own_handler_is_called_once_with_what_signal_came_with(handler):
    with DeferredInterrupts():
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)
        assert handler.calls == []
    ((number, frame),) = handler.calls
    assert number == signal.SIGINT
    assert frame.f_code.co_name == "test_programs_own_handler_is_called_once_with_what_signal_came_with"


def test_signals_outside_block_are_programs(handler):
    signal.raise_signal(signal.SIGINT)
    with DeferredInterrupts():
        pass
    signal.raise_signal(signal.SIGINT)
    assert len(handler.calls) == 2


def test_exception_in_block_passes_through(handler):
    error = ValueError("mine")
    with pytest.raises(ValueError, match="mine") as caught, DeferredInterrupts():
        raise error
    assert caught.value is error
    assert handler.calls == []


def test_ctrl_c_and_exception_both_show(interruptible):
    error = ValueError("mine")

    def work():
        with DeferredInterrupts():
            signal.raise_signal(signal.SIGINT)
            raise error

    with pytest.raises(KeyboardInterrupt) as caught:
        work()
    assert caught.value.__context__ is error


def test_blocks_within_blocks_wait_for_outermost(handler):
    with DeferredInterrupts():
        with DeferredInterrupts():
            signal.raise_signal(signal.SIGINT)
        assert handler.calls == []
    assert len(handler.calls) == 1


@pytest.mark.parametrize("disposition", [signal.SIG_IGN, signal.SIG_DFL], ids=["ignored", "default"])
def test_disposition_that_is_not_pythons_stays(disposition):
    previous = signal.signal(signal.SIGINT, disposition)
    try:
        with DeferredInterrupts():
            assert signal.getsignal(signal.SIGINT) is disposition
        assert signal.getsignal(signal.SIGINT) is disposition
    finally:
        signal.signal(signal.SIGINT, previous)


def test_other_threads_neither_get_nor_defer_signals(handler):
    seen = []

    def work():
        with DeferredInterrupts():
            seen.append(signal.getsignal(signal.SIGINT))

    worker = threading.Thread(target=work)
    worker.start()
    worker.join()
    assert seen == [handler]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGALRM, signal.SIGUSR1], ids=lambda number: number.name)
def test_every_python_handler_waits(number):
    """SLURM, time limits: their handlers raise, too."""

    class TimeIsUp(Exception):
        pass

    def handler(*_):
        raise TimeIsUp

    previous = signal.signal(number, handler)
    finished = []

    def block():
        with DeferredInterrupts():
            signal.raise_signal(number)
            finished.append(True)

    try:
        with pytest.raises(TimeIsUp):
            block()
        assert finished
        assert signal.getsignal(number) is handler
    finally:
        signal.signal(number, previous)
