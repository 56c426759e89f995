"""Turns signals into a question that loops can ask."""

from __future__ import annotations

import os
import signal
import threading
from types import FrameType
from typing import Any


class StopSignals:
    """While entered, SIGINT and SIGTERM set a flag; a second one ends the process at once.

    Leaving at once is safe: outputs get their names only when they are whole, and what has no
    record is done again.

    Args:
        reload: catch SIGHUP too, as a wish to reload.

    Attributes:
        signum: the signal that came, or None.
    """

    _SIGNALS = (signal.SIGINT, signal.SIGTERM)

    def __init__(self, *, reload: bool = False) -> None:
        self.signum: int | None = None
        self._reload = reload
        self._reload_requested = False
        self._came = threading.Event()
        self._previous: dict[signal.Signals, Any] = {}

    def wait(self) -> None:
        """Return when a signal has come; for other threads."""
        self._came.wait()

    @property
    def requested(self) -> bool:
        """Whether to stop taking work."""
        return self.signum is not None

    @property
    def exit_code(self) -> int:
        """The shell's code for a process that a signal ended."""
        return 128 + (self.signum or 0)

    @property
    def reload_requested(self) -> bool:
        """Whether a SIGHUP came since the last `take_reload`."""
        return self._reload_requested

    def take_reload(self) -> bool:
        """Say whether a SIGHUP came since the last time."""
        if not self._reload_requested:
            return False
        # One that comes between these lines is answered by the reload that follows.
        self._reload_requested = False
        return True

    def __enter__(self) -> StopSignals:
        if self._reload:
            self._previous[signal.SIGHUP] = signal.signal(signal.SIGHUP, self._handle_reload)
        for number in self._SIGNALS:
            self._previous[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _handle_reload(self, _signum: int, _frame: FrameType | None) -> None:
        self._reload_requested = True

    def _handle(self, signum: int, _frame: FrameType | None) -> None:
        if self.signum is not None:
            os._exit(128 + signum)
        self.signum = signum
        self._came.set()
