"""Keeps a thousand lines of the same kind from burying the one that matters."""

from __future__ import annotations

import re
from dataclasses import dataclass

# What differs between lines of one kind: names in quotes, and numbers.
_PARTICULAR = re.compile(r"'(?:[^'\\]|\\.)*'|\"(?:[^\"\\]|\\.)*\"|\d+")


def kind_of(level: str, message: str) -> str:
    """Give what lines of one kind have in common.

    Args:
        level: of the line.
        message: with file names in quotes, as `repr` writes them.
    """
    return f"{level} {_PARTICULAR.sub('*', message)[:200]}"


@dataclass(slots=True)
class _Window:
    began_s: float
    passed: int = 0
    held_back: int = 0


class RateLimit:
    """Lets the first lines of a kind pass in each window, and counts the others.

    A window begins with a kind's first line, and ends `window_s` later.

    Args:
        first: how many lines of a kind pass in a window.
        window_s: its length.
    """

    def __init__(self, first: int = 20, window_s: float = 60.0) -> None:
        self._first = first
        self._window_s = window_s
        self._windows: dict[str, _Window] = {}

    def admits(self, kind: str, now_s: float) -> bool:
        """Tell whether a line passes; call `ended` first, with the same time.

        Args:
            kind: of the line.
            now_s: from a clock that only goes forward.
        """
        window = self._windows.setdefault(kind, _Window(now_s))
        if window.passed < self._first:
            window.passed += 1
            return True
        window.held_back += 1
        return False

    def ended(self, now_s: float) -> list[tuple[str, int]]:
        """Close the windows that are over.

        Args:
            now_s: as for `admits`.

        Returns:
            Kind and number of its lines that were held back, for each that had some.
        """
        over = [
            kind
            for kind, window in self._windows.items()
            if now_s - window.began_s >= self._window_s
        ]
        closed = [(kind, self._windows.pop(kind).held_back) for kind in over]
        return [(kind, count) for kind, count in closed if count]

    def close(self) -> list[tuple[str, int]]:
        """Close all windows, as `ended` does."""
        return self.ended(float("inf"))
