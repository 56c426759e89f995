"""The inputs of a run as they are listed: a bounded number of them known ahead."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator

from bcseg_batch.items import InputFile

AHEAD = 20_000


class Listing:
    """Draws inputs from a walk, so far ahead of who takes them that most totals are known at once.

    Args:
        found: the walk.
        ahead: how many are held that nobody has taken yet.

    Attributes:
        count: inputs found so far.
        is_whole: whether the walk has come to its end, so that `count` is the total.
    """

    def __init__(self, found: Iterable[InputFile], *, ahead: int = AHEAD) -> None:
        self.count = 0
        self.is_whole = False
        self._found = iter(found)
        self._ahead = ahead
        self._held: deque[InputFile] = deque()

    def look_ahead(self) -> None:
        """Draw as many as may be held."""
        while not self.is_whole and len(self._held) < self._ahead:
            file = next(self._found, None)
            if file is None:
                self.is_whole = True
            else:
                self.count += 1
                self._held.append(file)

    def __iter__(self) -> Iterator[InputFile]:
        """Give the inputs, each once, in the order of the walk."""
        while True:
            self.look_ahead()
            if not self._held:
                return
            yield self._held.popleft()
