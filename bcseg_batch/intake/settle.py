"""When a file is ready to be read."""

from __future__ import annotations

import heapq
import stat
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from bcseg_batch.items import InputFile


def look_at(root: Path, image: str) -> InputFile | None:
    """Look at a file as it is now, links followed.

    Args:
        root: the input folder.
        image: path relative to it, with forward slashes.

    Returns:
        None where it is gone, is no regular file, or cannot be looked at: the next rescan finds it
        again and says why.
    """
    path = root / image
    try:
        facts = path.stat()
    except (OSError, ValueError):  # ValueError: a name that no file can have
        return None
    if not stat.S_ISREG(facts.st_mode):
        return None
    return InputFile(path, image, facts.st_size, facts.st_mtime_ns)


@dataclass(slots=True, eq=False)
class _Waiting:
    hinted_s: float
    quiet_since_s: float
    not_before_s: float
    turn: int
    seen: InputFile | None = None
    seen_s: float = 0.0


class SettleTracker:
    """Holds the files that may still be growing, and gives each once, when it is ready.

    A file is *ready* when, for `settle_s`,

    1. it has been there, a regular file;
    2. its size and its modification time have been the same at the first and the last look;
    3. no event has told of it; and
    4. any wait that `delay` asked for is over.

    Whatever breaks 2 or 3 starts the time anew. That a program has closed the file is no part of
    this: scanners close, open again and write on, and a file that is moved in is never closed. Nor
    is the age of its modification time, since copies keep it and other machines' clocks differ.
    A file that is gone when it is looked at is forgotten; it is a new one when it comes again.

    A file is looked at by the first `ready` after an event, and when its time may be over: two
    looks and O(log n) for a file that comes at once, however many events tell of it. Asking late
    costs time and no safety, so `ready` should follow each round of hints. Not thread-safe.
    """

    def __init__(
        self,
        settle_s: float,
        *,
        look: Callable[[str], InputFile | None],
        clock: Callable[[], float],
        capacity: int = 1000,
    ) -> None:
        """Start with nothing.

        Args:
            settle_s: how long a file must keep still, seconds.
            look: gives a file as it is now, or None where it is gone; must not raise.
            clock: monotonic, seconds.
            capacity: how many files may wait at a time.
        """
        self._settle_s = settle_s
        self._look = look
        self._clock = clock
        self._capacity = capacity
        self._waiting: dict[str, _Waiting] = {}  # in the order of their first hints
        self._unseen: dict[str, None] = {}  # an ordered set: to be looked at by the next `ready`
        # One item for each that waits, at or before the time it may be ready; items whose turn is
        # not that of a waiting one are dead.
        self._due: list[tuple[float, int, str]] = []
        self._turns = 0

    def hint(self, image: str, *, event: bool) -> bool:
        """Note that a file is there.

        Args:
            image: path relative to the input folder, with forward slashes.
            event: something happened to it, so the time starts anew; False where it was only seen
                (by a rescan), which changes nothing for a file already known.

        Returns:
            False where there is no room: the file is not held, and a later rescan must hint again.
        """
        waiting = self._waiting.get(image)
        if waiting is None:
            if len(self._waiting) >= self._capacity:
                return False
            self._add(image, not_before_s=self._clock())
        elif event:
            waiting.quiet_since_s = self._clock()
            self._unseen[image] = None
        return True

    def delay(self, image: str, wait_s: float) -> None:
        """Take a file back that turned out unfinished; held even where there is no room.

        Args:
            image: path relative to the input folder, with forward slashes.
            wait_s: it is not ready before this time from now, seconds.
        """
        not_before_s = self._clock() + wait_s
        waiting = self._waiting.get(image)
        if waiting is None:
            self._add(image, not_before_s=not_before_s)
        else:
            waiting.not_before_s = max(waiting.not_before_s, not_before_s)

    def ready(self) -> list[InputFile]:
        """Give up those that are ready now, the longest quiet first; forget those that are gone."""
        now_s = self._clock()
        unseen, self._unseen = self._unseen, {}
        for image in unseen:
            self._see(image, now_s)
        ready: list[InputFile] = []
        while self._due and self._due[0][0] <= now_s:
            _, turn, image = heapq.heappop(self._due)
            waiting = self._waiting.get(image)
            if waiting is None or waiting.turn != turn:
                continue
            if self._due_s(waiting) <= now_s:
                before, after = waiting.seen, self._see(image, now_s)
                if after is None:
                    continue
                if before is not None and _is_same(before, after):
                    del self._waiting[image]
                    ready.append(after)
                    continue
            heapq.heappush(self._due, (self._due_s(waiting), turn, image))
        return ready

    def next_due_s(self) -> float | None:
        """Say in how many seconds `ready` should be asked again; None where nothing waits."""
        if self._unseen:
            return 0.0
        while self._due:
            due_s, turn, image = self._due[0]
            waiting = self._waiting.get(image)
            if waiting is not None and waiting.turn == turn:
                return max(0.0, due_s - self._clock())
            heapq.heappop(self._due)
        return None

    def oldest_wait_s(self) -> float | None:
        """Say since how many seconds the first hinted one waits; None where nothing waits."""
        for waiting in self._waiting.values():
            return self._clock() - waiting.hinted_s
        return None

    def __len__(self) -> int:
        return len(self._waiting)

    def __contains__(self, image: str) -> bool:
        return image in self._waiting

    def _add(self, image: str, *, not_before_s: float) -> None:
        now_s = self._clock()
        self._turns += 1
        waiting = _Waiting(now_s, now_s, not_before_s, self._turns)
        self._waiting[image] = waiting
        self._unseen[image] = None
        heapq.heappush(self._due, (self._due_s(waiting), waiting.turn, image))

    def _see(self, image: str, now_s: float) -> InputFile | None:
        """Look at one that waits; one that is gone waits no longer."""
        waiting = self._waiting[image]
        seen = self._look(image)
        if seen is None:
            del self._waiting[image]
        elif waiting.seen is None or not _is_same(waiting.seen, seen):
            waiting.seen, waiting.seen_s = seen, now_s
        return seen

    def _due_s(self, waiting: _Waiting) -> float:
        quiet_since_s = max(waiting.quiet_since_s, waiting.seen_s)
        return max(quiet_since_s + self._settle_s, waiting.not_before_s)


def _is_same(one: InputFile, other: InputFile) -> bool:
    return (one.size_bytes, one.mtime_ns) == (other.size_bytes, other.mtime_ns)
