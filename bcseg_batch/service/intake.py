"""Watch, rescan and settle put together: gives the files that are ready to be processed."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterator, Sequence
from collections.abc import Set as AbstractSet
from pathlib import Path

from loguru import logger

from bcseg_batch.intake.ignore import IgnoreRules
from bcseg_batch.intake.scan import IgnoredFile, scan_folder, scan_subfolder
from bcseg_batch.intake.settle import SettleTracker, look_at
from bcseg_batch.intake.watch import FolderWatch, WatchChoice, WatchError, WatchMode, choose_mode
from bcseg_batch.items import InputFile

# Files looked at in one step of a rescan: a step must not keep the network waiting.
_STEP_FILES = 500
_TEND_EVERY_S = 1.0
_LONGEST_BACKOFF_S = 60.0
_MISSED_KEPT = 100

Known = Callable[[Sequence[InputFile]], AbstractSet[str]]
"""Says which of some files need no further look."""


class Intake:
    """Notices files and gives each when it is ready; one thread calls it.

    Events are hints, the rescan is the truth. A rescan goes step by step between other work, holds
    one folder's names at a time, and rests while as many files as can be held are settling, so that
    neither memory nor the time of a step grows with the input folder.

    Args:
        root: the input folder; need not be there.
        rules: what is an input.
        known: says which files need no work.
        recursive: enter sub-folders.
        mode: how to watch.
        settle_s: how long a file must keep still.
        rescan_interval_s: between two rescans.
        poll_interval_s: between two looks, where there are no events.
        clock: monotonic, seconds.
    """

    def __init__(
        self,
        root: Path,
        rules: IgnoreRules,
        known: Known,
        *,
        recursive: bool,
        mode: WatchMode,
        settle_s: float,
        rescan_interval_s: float,
        poll_interval_s: float,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._root = root
        self._rules = rules
        self._known = known
        self._recursive = recursive
        self._mode = mode
        self._rescan_interval_s = rescan_interval_s
        self._poll_interval_s = poll_interval_s
        self._clock = clock
        self._settling = SettleTracker(
            settle_s, look=lambda image: look_at(root, image), clock=clock
        )
        self._watch: FolderWatch | None = None
        self._choice: WatchChoice | None = None
        self._scan: Iterator[InputFile | IgnoredFile] | None = None
        self._held: list[InputFile] = []  # found by the rescan, waiting for room to settle
        self._next_rescan_s = clock()
        self._next_tend_s = clock()
        self._backoff_s = 0.0
        self._watch_trouble: str | None = None
        self._scan_trouble: str | None = None
        self._missed: dict[str, str] = {}  # by this rescan, and by the one before
        self._missed_before: dict[str, str] = {}
        self.rescans = 0

    @property
    def choice(self) -> WatchChoice | None:
        """How the folder is watched; None while it is not."""
        return self._choice

    @property
    def trouble(self) -> str | None:
        """Why the input folder cannot be watched at the moment; None where all is well."""
        return self._watch_trouble or self._scan_trouble

    @property
    def settling(self) -> int:
        """How many files are waited for to keep still."""
        return len(self._settling) + len(self._held)

    @property
    def oldest_wait_s(self) -> float | None:
        """How long the first of them has waited."""
        return self._settling.oldest_wait_s()

    @property
    def quiet(self) -> bool:
        """Whether nothing settles and at least one rescan is through, with none under way."""
        return self.rescans > 0 and self._scan is None and not self.settling

    @property
    def looked_once(self) -> bool:
        """Whether the folder has been looked at, or as much of it as can be held at a time."""
        return self.rescans > 0 or bool(self._held)

    def stop(self) -> None:
        """End the watch's threads."""
        if self._watch is not None:
            self._watch.stop()
            self._watch = None

    def rescan(self) -> None:
        """Look at the whole folder soon."""
        self._next_rescan_s = self._clock()

    def poll(self) -> list[InputFile]:
        """Do what is due, without waiting, and give the files that are ready now."""
        now_s = self._clock()
        if now_s >= self._next_tend_s:
            self._next_tend_s = now_s + _TEND_EVERY_S
            self._tend(now_s)
        self._take_hints()
        self._rescan_step(now_s)
        return self._settling.ready()

    def wait(self, timeout_s: float) -> None:
        """Return when there is something to do, at latest after `timeout_s`."""
        if self._scan is not None and not self._held:
            return
        due_s = self._settling.next_due_s()
        timeout_s = timeout_s if due_s is None else min(timeout_s, due_s)
        if self._watch is not None:
            self._watch.wait(timeout_s)
        else:
            time.sleep(timeout_s)

    def again(self, image: str, *, wait_s: float = 0.0) -> None:
        """Take a file back that changed or was not whole; it must settle anew.

        Args:
            image: its name.
            wait_s: not before this time from now.
        """
        self._settling.delay(image, wait_s)

    def _tend(self, now_s: float) -> None:
        """Keep the watch alive; where it died, start it again, at growing intervals."""
        if self._watch is not None:
            trouble = self._watch.trouble()
            if trouble is None:
                return
            logger.warning("the watch on the input folder is lost: {}", trouble)
            self._watch.stop()
            self._watch = None
            self._watch_trouble = trouble
            self._backoff_s = 0.0
        try:
            watch, choice = self._arm()
        except WatchError as error:
            if self._watch_trouble != str(error):
                logger.error("{}", error)
            self._watch_trouble = str(error)
            self._backoff_s = min(max(1.0, 2 * self._backoff_s), _LONGEST_BACKOFF_S)
            self._next_tend_s = now_s + self._backoff_s
            return
        logger.info("watching {} by {}: {}", self._root, choice.mode.value, choice.reason)
        self._watch, self._choice, self._watch_trouble = watch, choice, None
        # What happened before the watch was there is found by looking.
        self._scan, self._held = None, []
        self.rescan()

    def _arm(self) -> tuple[FolderWatch, WatchChoice]:
        """Start a watch; by polling where the kernel has no watches left and the choice is ours."""
        choice = choose_mode(self._root, self._mode)
        try:
            return self._start(choice), choice
        except WatchError as error:
            if self._mode is not WatchMode.AUTO or choice.mode is WatchMode.POLL:
                raise
            logger.warning("{}", error)
            polling = WatchChoice(WatchMode.POLL, f"inotify failed: {error}")
            return self._start(polling), polling

    def _start(self, choice: WatchChoice) -> FolderWatch:
        watch = FolderWatch(
            self._root, choice, recursive=self._recursive, poll_interval_s=self._poll_interval_s
        )
        watch.start()
        return watch

    def _take_hints(self) -> None:
        if self._watch is None:
            return
        for image in self._watch.take():
            if self._rules.reason_path(image) is None and not self._hint(image, event=True):
                self.rescan()
        for folder in self._watch.take_folders():
            for found in scan_subfolder(self._root, folder, self._rules):
                if isinstance(found, InputFile) and not self._hint(found.image, event=False):
                    self.rescan()
                    break
        if self._watch.take_overflow():
            logger.warning("events were lost: looking at the whole input folder")
            self.rescan()

    def _hint(self, image: str, *, event: bool) -> bool:
        return self._settling.hint(image, event=event)

    def _rescan_step(self, now_s: float) -> None:
        while self._held:
            if not self._hint(self._held[-1].image, event=False):
                return
            self._held.pop()
        if self._scan is None:
            if now_s < self._next_rescan_s:
                return
            self._next_rescan_s = now_s + self._rescan_interval_s
            self._scan = scan_folder(self._root, self._rules, recursive=self._recursive)
        try:
            step = list(itertools.islice(self._scan, _STEP_FILES))
        except OSError as error:
            # Gone or unmounted: nothing is taken for deleted, and the next rescan will tell.
            self._scan_trouble = f"{self._root} cannot be listed: {error.strerror}"
            self._scan = None
            return
        self._scan_trouble = None
        files = [found for found in step if isinstance(found, InputFile)]
        for found in step:
            if isinstance(found, IgnoredFile) and found.missed:
                self._miss(found)
        known = self._known(files) if files else set()
        # Reversed, so that the oldest names are taken from the end first.
        self._held = [file for file in reversed(files) if file.image not in known]
        if len(step) < _STEP_FILES:
            self._scan = None
            self._missed_before, self._missed = self._missed, {}
            self.rescans += 1

    def _miss(self, found: IgnoredFile) -> None:
        """Tell, once, of a place where images may lie that cannot be looked at."""
        if len(self._missed) < _MISSED_KEPT:
            self._missed[found.image] = found.reason
            if self._missed_before.get(found.image) != found.reason:
                logger.warning("{!r} in the input folder: {}", found.image, found.reason)
