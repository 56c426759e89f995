"""How a run is told to people: a bar on a terminal, a line now and then elsewhere."""

from __future__ import annotations

import time
from collections.abc import Callable

from loguru import logger
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    TaskID,
    TextColumn,
    TimeRemainingColumn,
)
from rich.progress import Task as RichTask
from rich.text import Text

from bcseg_batch.items import Outcome, Status

_LINE_EVERY_S = 10.0


class _RateColumn(ProgressColumn):
    """Images a second, over the last half minute."""

    def render(self, task: RichTask) -> Text:
        speed = task.finished_speed or task.speed
        return Text("" if speed is None else f"{speed:.1f} images/s")


class ProgressBar:
    """A bar with count, rate and time left.

    Args:
        console: on standard error, a terminal.
    """

    def __init__(self, console: Console) -> None:
        self._progress = Progress(
            TextColumn("[progress.description]{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            _RateColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[failed]}"),
            console=console,
        )
        self._task: TaskID | None = None
        self._failed = 0

    def __enter__(self) -> ProgressBar:
        return self

    def __exit__(self, *_: object) -> None:
        self._progress.stop()

    def start(self, total: int) -> None:
        """Show the bar."""
        self._task = self._progress.add_task("images", total=total, failed="")
        self._progress.start()

    def advance(self, outcome: Outcome | None) -> None:
        """Move on by one."""
        assert self._task is not None
        if outcome is not None and outcome.status is Status.FAILED:
            self._failed += 1
            logger.warning("failed: {}", outcome.error)
        failed = f"[red]{self._failed} failed" if self._failed else ""
        self._progress.update(self._task, advance=1, failed=failed)


class ProgressLines:
    """A log line every ten seconds.

    Args:
        clock: gives seconds that only go forward.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._total = self._through = self._failed = self._worked = 0
        self._began_s = self._told_s = 0.0

    def __enter__(self) -> ProgressLines:
        return self

    def __exit__(self, *_: object) -> None:
        return None

    def start(self, total: int) -> None:
        """Say how much there is."""
        self._total = total
        self._began_s = self._told_s = self._clock()
        logger.info("{} images in the input folder", total)

    def advance(self, outcome: Outcome | None) -> None:
        """Count one, and say so where the last line is ten seconds old."""
        self._through += 1
        if outcome is not None:
            self._worked += 1
            if outcome.status is Status.FAILED:
                self._failed += 1
                logger.warning("failed: {}", outcome.error)
        now_s = self._clock()
        if now_s - self._told_s < _LINE_EVERY_S or not self._worked:
            return
        self._told_s = now_s
        rate = self._worked / (now_s - self._began_s)
        logger.info(
            "{} of {}, {} failed, {:.1f} images/s, about {:.0f} s left",
            self._through,
            self._total,
            self._failed,
            rate,
            (self._total - self._through) / rate,
        )
