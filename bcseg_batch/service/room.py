"""Bounds how many pixels are in memory at once, since images differ in size a thousandfold."""

from __future__ import annotations

import threading


class NoRoom(Exception):  # noqa: N818 - no error: the image is taken up again a little later
    """There is no room for an image now; it has to wait until others are through.

    Args:
        pixels: what it needs.
    """

    def __init__(self, pixels: int) -> None:
        super().__init__(pixels)
        self.pixels = pixels


class Room:
    """Counts the pixels of the images in hand; used by all workers.

    Args:
        pixels: how many may be in hand at once. A single larger image is let in when it is alone.
    """

    def __init__(self, pixels: int) -> None:
        self._limit = pixels
        self._taken: dict[str, int] = {}
        self._lock = threading.Lock()

    def take(self, image: str, pixels: int) -> None:
        """Let an image in.

        Raises:
            NoRoom: not now.
        """
        with self._lock:
            if not self._fits(pixels):
                raise NoRoom(pixels)
            self._taken[image] = pixels

    def fits(self, pixels: int) -> bool:
        """Say whether an image would be let in."""
        with self._lock:
            return self._fits(pixels)

    def _fits(self, pixels: int) -> bool:
        others = sum(self._taken.values())
        return not others or others + pixels <= self._limit

    def leave(self, image: str) -> None:
        """Let an image out; one that was never let in is no error."""
        with self._lock:
            self._taken.pop(image, None)
