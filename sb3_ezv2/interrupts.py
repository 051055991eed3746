"""Ctrl-C without half of a step or of an update."""

from __future__ import annotations

import signal
import threading
from types import FrameType, TracebackType


class DeferredInterrupt:
    """
    Within, the first SIGINT is remembered, and :meth:`check` raises ``KeyboardInterrupt`` for it; the second raises at once.

    Where the process has a handler of its own for SIGINT, and outside of the main thread, nothing is changed.
    """

    def __init__(self) -> None:
        self._requested = False
        self._installed = False

    def __enter__(self) -> DeferredInterrupt:
        main = threading.current_thread() is threading.main_thread()
        if main and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
            signal.signal(signal.SIGINT, self._remember)
            self._installed = True
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        if self._installed:
            signal.signal(signal.SIGINT, signal.default_int_handler)
        # A terminal sends SIGINT to the environments' processes, too, which end by it
        if self._requested and (error is None or isinstance(error, (EOFError, ConnectionError))):
            raise KeyboardInterrupt from error

    def _remember(self, number: int, frame: FrameType | None) -> None:
        if self._requested:
            raise KeyboardInterrupt
        self._requested = True

    def check(self) -> None:
        """:raises KeyboardInterrupt: there was a SIGINT"""
        if self._requested:
            self._requested = False
            raise KeyboardInterrupt
