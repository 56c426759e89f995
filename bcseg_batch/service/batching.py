"""When a batch is ready."""

from __future__ import annotations

from collections.abc import Callable
from typing import Generic, TypeVar

T = TypeVar("T")


class Batcher(Generic[T]):
    """Collects items until there is a full batch, or the oldest has waited long enough.

    Args:
        batch_size: items of a full batch.
        max_wait_s: how long a partial batch waits for company.
        clock: gives seconds that only go forward.
    """

    def __init__(self, batch_size: int, max_wait_s: float, clock: Callable[[], float]) -> None:
        self._batch_size = batch_size
        self._max_wait_s = max_wait_s
        self._clock = clock
        self._items: list[tuple[float, T]] = []

    def __len__(self) -> int:
        return len(self._items)

    def add(self, item: T) -> None:
        """Put an item in."""
        self._items.append((self._clock(), item))

    @property
    def full(self) -> bool:
        """Whether a full batch is there."""
        return len(self._items) >= self._batch_size

    @property
    def due(self) -> bool:
        """Whether a batch should go now: it is full, or its oldest item has waited long enough."""
        if not self._items:
            return False
        return self.full or self._clock() - self._items[0][0] >= self._max_wait_s

    def take(self) -> list[T]:
        """Take out the oldest items, at most a full batch."""
        taken = [item for _, item in self._items[: self._batch_size]]
        del self._items[: self._batch_size]
        return taken
