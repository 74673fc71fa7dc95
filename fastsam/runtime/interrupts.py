"""Defers signals until an operation that must not be interrupted has ended."""

from __future__ import annotations

import signal
import threading
from types import FrameType, TracebackType
from typing import Any

# The functions of the signal module call these, and spend most of their time converting to enums.
try:
    from _signal import getsignal  # type: ignore[import-not-found]
    from _signal import signal as set_handler
except ImportError:
    from signal import getsignal
    from signal import signal as set_handler

# Those for which Python code may be called: SIGINT, SIGTERM, SIGALRM, SIGUSR1, ... but no real-time signals.
_NUMBERS = sorted(int(number) for number in signal.valid_signals() if number < getattr(signal, "SIGRTMIN", 32))


# What every signal's handler was when last asked, and those in Python: they hardly ever change.
_known: tuple[list[Any], dict[int, Any]] = [], {}


def _find_handlers() -> dict[int, Any]:
    """The handlers in Python, by signal."""
    global _known
    handlers, found = list(map(getsignal, _NUMBERS)), _known[1]
    if handlers != _known[0]:
        found = {number: handler for number, handler in zip(_NUMBERS, handlers, strict=True) if callable(handler)}
        _known = handlers, found
    return found


class DeferredInterrupts:
    """A block during which signals are only recorded; their handlers (KeyboardInterrupt, sys.exit) run at the end.

    That is so for every handler in Python, real-time signals excepted. What is not Python's (SIGKILL, or the default
    of SIGTERM) ends the process at once.
    """

    __slots__ = ("_handlers", "_recorded", "_replaced")

    def __enter__(self) -> None:
        self._replaced: list[int] = []
        # Only the main thread receives signals.
        if threading.get_ident() != threading.main_thread().ident:
            return
        self._recorded: dict[int, FrameType | None] = {}
        self._handlers = _find_handlers()
        try:
            for number in self._handlers:
                self._replaced.append(number)
                set_handler(number, self._record)
        except BaseException:  # the handler of one that is not deferred yet
            self._end()
            raise

    def _record(self, number: int, frame: FrameType | None) -> None:
        self._recorded.setdefault(number, frame)  # once, as a pending signal

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._replaced:
            self._end()

    def _end(self) -> None:
        """Puts the handlers back, all of them even if one that is back already raises; then calls what was recorded."""
        try:
            while self._replaced:
                set_handler(self._replaced[-1], self._handlers[self._replaced[-1]])
                self._replaced.pop()
            while self._recorded:
                number = next(iter(self._recorded))
                self._handlers[number](number, self._recorded.pop(number))
        except BaseException:
            self._end()
            raise
