"""Keeps the report of a daemon's output folder up to date, beside the work and never in its way."""

from __future__ import annotations

import threading
import time
from pathlib import Path

from loguru import logger

from bcseg_batch.errors import BcsegError

# The most of the time that goes into the report, where one takes long.
_SHARE = 0.1
# How much longer than it was given a report may take at the end: the image under way.
_GRACE_S = 2.0


class NoReporter:
    """Stands in where no report is wanted."""

    def want(self) -> None:
        """Do nothing."""

    def finish(self, timeout_s: float) -> None:
        """Do nothing."""


class Reporter:
    """Makes the report in a thread of its own, now and then, if there is anything new.

    A report that fails is told in the log and tried again; it neither stops nor delays the work.
    The thread may die with the process at any moment, since files are written whole.

    Args:
        folder: the output folder.
        group_pattern: as in `ReportOptions`.
        min_cells: likewise.
        refresh_s: the time between two reports; longer where one takes long.
    """

    def __init__(
        self, folder: Path, *, group_pattern: str | None, min_cells: int, refresh_s: float
    ) -> None:
        self._folder = folder
        self._group_pattern = group_pattern
        self._min_cells = min_cells
        self._refresh_s = refresh_s
        self._wanted = threading.Event()
        self._wanted.set()  # a dead process may have left one behind the records
        self._ending = threading.Event()
        self._deadline_s = float("inf")
        self._thread = threading.Thread(target=self._work, name="bcseg-report", daemon=True)
        self._thread.start()

    def want(self) -> None:
        """Say that there are new records."""
        self._wanted.set()

    def finish(self, timeout_s: float) -> None:
        """Make the last report if there is anything new, and end.

        Args:
            timeout_s: how long that may take; what is not drawn then is drawn by the next daemon.
        """
        self._deadline_s = time.monotonic() + timeout_s
        self._ending.set()
        self._thread.join(timeout_s + _GRACE_S)

    def _work(self) -> None:
        while not self._ending.is_set():
            began_s = time.monotonic()
            self._refresh()
            took_s = time.monotonic() - began_s
            self._ending.wait(max(self._refresh_s, took_s / _SHARE))
        self._refresh()

    def _refresh(self) -> None:
        if not self._wanted.is_set():
            return
        self._wanted.clear()
        try:
            # Imported here: a plotting library takes a second, which the start need not wait for.
            from bcseg_batch.report.build import ReportOptions, build_report  # noqa: PLC0415

            options = ReportOptions(group_pattern=self._group_pattern, min_cells=self._min_cells)
            build_report(self._folder, options, alive=self._check_time)
        except _OutOfTimeError:
            logger.info("the report is not up to date: there was no time left for it")
        except Exception as error:  # noqa: BLE001 - see below
            # Broad: whatever is wrong with the report, photographs go on being processed.
            self._wanted.set()
            logger.opt(exception=not isinstance(error, BcsegError)).error(
                "the report cannot be made: {}", error
            )

    def _check_time(self) -> None:
        if time.monotonic() >= self._deadline_s:
            raise _OutOfTimeError


class _OutOfTimeError(Exception):
    """The daemon is to end."""
