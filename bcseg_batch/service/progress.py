"""How a run is told to people: a bar on a terminal, a line now and then elsewhere."""

from __future__ import annotations

import time
from collections.abc import Callable

from loguru import logger
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn

from bcseg_batch.items import Outcome, Status

_LINE_EVERY_S = 10.0
_WARM_UP_S = 5.0


class DoneRate:
    """Images done a second.

    The first seconds are left out: in them the network warms up, and all of a batch arrive at once.
    So is what failed or was done before, which the network never saw.

    Args:
        clock: gives seconds that only go forward.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._first_s: float | None = None
        self._since_s = self._latest_s = 0.0
        self._done = 0
        self._rate: float | None = None

    def count(self, outcome: Outcome | None) -> None:
        """Take note of one that is through; None for one that was done in an earlier run."""
        if outcome is None or outcome.status is not Status.DONE:
            return
        now_s = self._clock()
        if self._first_s is None:
            self._first_s = now_s
        if now_s - self._first_s < _WARM_UP_S:
            self._since_s = self._latest_s = now_s
            return
        # Up to the one before: this one may be the first of a batch that took its time.
        if self._done and self._latest_s > self._since_s:
            self._rate = self._done / (self._latest_s - self._since_s)
        self._done += 1
        self._latest_s = now_s

    def images_per_s(self) -> float | None:
        """Give the rate, or None while it cannot be told."""
        return self._rate

    def text(self, left: int | None) -> str:
        """Say how fast it goes and how long the rest takes, or nothing while it cannot be told.

        Args:
            left: images still to do; None where that is not known yet.
        """
        rate = self.images_per_s()
        if rate is None:
            return ""
        return f"{rate:.1f} images/s" + (
            "" if left is None else f", about {left / rate:.0f} s left"
        )


class _Count:
    """How many are through, and of how many as far as that is known."""

    def __init__(self) -> None:
        self.through = self.total = 0
        self.is_whole = True

    def expect(self, total: int, *, is_whole: bool) -> None:
        """Take note of how many there are, or are at least."""
        self.total, self.is_whole = total, is_whole

    @property
    def left(self) -> int | None:
        """How many are still to do; None where that is not known yet."""
        return self.total - self.through if self.is_whole else None

    def of(self) -> str:
        """Say of how many."""
        return f"{self.total}" if self.is_whole else f"more than {self.total}"


class ProgressBar:
    """A bar with count, rate and time left.

    Args:
        console: on standard error, a terminal.
        clock: gives seconds that only go forward.
    """

    def __init__(self, console: Console, clock: Callable[[], float] = time.monotonic) -> None:
        self._progress = Progress(
            TextColumn("[progress.description]{task.description}"),
            BarColumn(),
            TextColumn("{task.fields[count]}"),
            TextColumn("{task.fields[rate]}"),
            TextColumn("{task.fields[failed]}"),
            console=console,
        )
        self._task: TaskID | None = None
        self._rate = DoneRate(clock)
        self._count = _Count()
        self._failed = 0

    def __enter__(self) -> ProgressBar:
        return self

    def __exit__(self, *_: object) -> None:
        self._progress.stop()

    def start(self, total: int, *, is_whole: bool = True) -> None:
        """Show the bar; one that only moves to and fro while the total is not known."""
        self._task = self._progress.add_task("images", total=None, rate="", failed="", count="")
        self.expect(total, is_whole=is_whole)
        self._progress.start()

    def expect(self, total: int, *, is_whole: bool) -> None:
        """Take note of how many there are."""
        assert self._task is not None
        self._count.expect(total, is_whole=is_whole)
        self._progress.update(self._task, total=total if is_whole else None, count=self._counted())

    def advance(self, outcome: Outcome | None) -> None:
        """Move on by one."""
        assert self._task is not None
        self._count.through += 1
        self._rate.count(outcome)
        if outcome is not None and outcome.status is Status.FAILED:
            self._failed += 1
            logger.warning("failed: {}", outcome.error)
        failed = f"[red]{self._failed} failed" if self._failed else ""
        rate = self._rate.text(self._count.left)
        self._progress.update(
            self._task, advance=1, rate=rate, failed=failed, count=self._counted()
        )

    def _counted(self) -> str:
        slash = "/" if self._count.is_whole else " of "
        return f"{self._count.through}{slash}{self._count.of()}"


class ProgressLines:
    """A log line every ten seconds.

    Args:
        clock: gives seconds that only go forward.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._rate = DoneRate(clock)
        self._count = _Count()
        self._failed = self._worked = 0
        self._told_s = 0.0

    def __enter__(self) -> ProgressLines:
        return self

    def __exit__(self, *_: object) -> None:
        return None

    def start(self, total: int, *, is_whole: bool = True) -> None:
        """Say how much there is."""
        self.expect(total, is_whole=is_whole)
        self._told_s = self._clock()
        logger.info("{} images in the input folder", self._count.of())

    def expect(self, total: int, *, is_whole: bool) -> None:
        """Take note of how many there are."""
        self._count.expect(total, is_whole=is_whole)

    def advance(self, outcome: Outcome | None) -> None:
        """Count one, and say so where the last line is ten seconds old."""
        self._count.through += 1
        self._rate.count(outcome)
        if outcome is not None:
            self._worked += 1
            if outcome.status is Status.FAILED:
                self._failed += 1
                logger.warning("failed: {}", outcome.error)
        now_s = self._clock()
        if now_s - self._told_s < _LINE_EVERY_S or not self._worked:
            return
        self._told_s = now_s
        rate = self._rate.text(self._count.left)
        logger.info(
            "{} of {}, {} failed{}",
            self._count.through,
            self._count.of(),
            self._failed,
            f", {rate}" if rate else "",
        )
