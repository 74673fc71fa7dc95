"""Signals wait for the end of what must be done as a whole."""

from __future__ import annotations

import signal
import threading
from types import FrameType, TracebackType

# signal's own functions are these and a search for an enum's name, which takes most of their time.
try:
    from _signal import getsignal  # type: ignore[import-not-found]
    from _signal import signal as set_handler
except ImportError:
    from signal import getsignal
    from signal import signal as set_handler

# Those for which Python code may be called: SIGINT, SIGTERM, SIGALRM, SIGUSR1, ... but no real-time signals.
_NUMBERS = sorted(int(number) for number in signal.valid_signals() if number < getattr(signal, "SIGRTMIN", 32))


class DeferredInterrupts:
    """A block during which signals are only noted; their handlers (KeyboardInterrupt, sys.exit) run at the end.

    That is so for every handler in Python, real-time signals excepted. What is not Python's (SIGKILL, or the default
    of SIGTERM) ends the process at once.
    """

    __slots__ = ("_handlers", "_noted", "_replaced")

    def __enter__(self) -> None:
        self._replaced: list[int] = []
        # Only the main thread gets signals.
        if threading.get_ident() != threading.main_thread().ident:
            return
        self._noted: dict[int, FrameType | None] = {}
        found = zip(_NUMBERS, map(getsignal, _NUMBERS), strict=True)
        self._handlers = {number: handler for number, handler in found if callable(handler)}
        try:
            for number in self._handlers:
                self._replaced.append(number)
                set_handler(number, self._note)
        except BaseException:  # the handler of one that is not deferred yet
            self._end()
            raise

    def _note(self, number: int, frame: FrameType | None) -> None:
        self._noted.setdefault(number, frame)  # once, as a pending signal

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._replaced:
            self._end()

    def _end(self) -> None:
        """Puts the handlers back, all of them even if one that is back already raises; then calls what was noted."""
        try:
            while self._replaced:
                set_handler(self._replaced[-1], self._handlers[self._replaced[-1]])
                self._replaced.pop()
            while self._noted:
                number = next(iter(self._noted))
                self._handlers[number](number, self._noted.pop(number))
        except BaseException:
            self._end()
            raise
