"""Turns signals into a question that loops can ask."""

from __future__ import annotations

import os
import signal
from types import FrameType
from typing import Any


class StopSignals:
    """While entered, SIGINT and SIGTERM set a flag; a second one ends the process at once.

    Leaving at once is safe: outputs get their names only when they are whole, and what has no
    record is done again.

    Attributes:
        signum: the signal that came, or None.
    """

    _SIGNALS = (signal.SIGINT, signal.SIGTERM)

    def __init__(self) -> None:
        self.signum: int | None = None
        self._previous: dict[signal.Signals, Any] = {}

    @property
    def requested(self) -> bool:
        """Whether to stop taking work."""
        return self.signum is not None

    @property
    def exit_code(self) -> int:
        """The shell's code for a process that a signal ended."""
        return 128 + (self.signum or 0)

    def __enter__(self) -> StopSignals:
        for number in self._SIGNALS:
            self._previous[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _handle(self, signum: int, _frame: FrameType | None) -> None:
        if self.signum is not None:
            os._exit(128 + signum)
        self.signum = signum
