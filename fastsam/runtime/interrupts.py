"""A Ctrl-C waits for the end of what must not be left half done."""

from __future__ import annotations

import signal
import threading
from types import FrameType, TracebackType
from typing import Any

# signal's own functions are these and a search for an enum's name, which takes most of their time.
try:
    from _signal import getsignal  # type: ignore[import-not-found]
    from _signal import signal as set_handler
except ImportError:
    from signal import getsignal
    from signal import signal as set_handler


class DeferredInterrupts:
    """A block during which SIGINT is only noted; its handler (usually KeyboardInterrupt) runs at the end."""

    __slots__ = ("_noted", "_previous")

    def __enter__(self) -> None:
        self._previous: Any = None
        # Only the main thread gets signals; a handler that is not Python's cannot interrupt Python code.
        if threading.get_ident() != threading.main_thread().ident:
            return
        previous = getsignal(signal.SIGINT)
        if callable(previous):
            self._noted: list[tuple[int, FrameType | None]] = []
            self._previous = previous
            set_handler(signal.SIGINT, self._note)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self._noted.append((number, frame))

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._previous is None:
            return
        set_handler(signal.SIGINT, self._previous)
        if self._noted:
            self._previous(*self._noted[0])
