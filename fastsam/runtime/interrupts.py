"""SIGINT (Ctrl-C) is deferred to the end of an operation that must not be interrupted."""

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


class DeferredInterrupts:
    """A block during which SIGINT is only recorded; its handler (usually KeyboardInterrupt) runs at the end."""

    __slots__ = ("_previous", "_recorded")

    def __enter__(self) -> None:
        self._previous: Any = None
        # Only the main thread receives signals, and only a Python handler can interrupt Python code.
        if threading.get_ident() != threading.main_thread().ident:
            return
        previous = getsignal(signal.SIGINT)
        if callable(previous):
            self._recorded: list[tuple[int, FrameType | None]] = []
            self._previous = previous
            set_handler(signal.SIGINT, self._record)

    def _record(self, number: int, frame: FrameType | None) -> None:
        self._recorded.append((number, frame))

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._previous is None:
            return
        set_handler(signal.SIGINT, self._previous)
        if self._recorded:
            self._previous(*self._recorded[0])
