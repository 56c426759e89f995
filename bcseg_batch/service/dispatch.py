"""Which worker has which image, and what becomes of the images of a worker that died.

No cluster, no clock, no thread: what is decided here can be tested in microseconds.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Hashable
from dataclasses import dataclass, replace
from typing import Generic, TypeVar

from bcseg_batch.items import InputFile

W = TypeVar("W", bound=Hashable)


@dataclass(frozen=True, slots=True)
class Task:
    """One image to be done by whichever worker is given it.

    Attributes:
        file: the input.
        name: its output name.
        deaths: workers that died while they had this image and no other.
    """

    file: InputFile
    name: str
    deaths: int = 0


class Dispatch(Generic[W]):
    """Gives images to workers, and takes them back from those that die.

    When a worker dies, any of the images that it held may have killed it. Each of them becomes a
    suspect, which is tried alone: by a worker that holds nothing else meanwhile. A suspect that
    kills its worker is to blame, unless the machine died by chance in that moment: only after
    several such deaths it is given up. All others are done as if nothing had been.

    Args:
        max_deaths: from how many deaths on an image is given up.
    """

    def __init__(self, max_deaths: int) -> None:
        self._max_deaths = max_deaths
        self._held: dict[W, dict[str, Task]] = {}
        self._suspects: deque[Task] = deque()
        self._returned: deque[Task] = deque()
        self._alone: set[W] = set()

    @property
    def busy(self) -> bool:
        """Whether any image is with a worker, or waits to be given to another one."""
        return self.waits or any(self._held.values())

    @property
    def waits(self) -> bool:
        """Whether images wait to be given to another worker than the one that had them."""
        return bool(self._suspects or self._returned)

    def held(self, worker: W) -> int:
        """Count the images that a worker has."""
        return len(self._held.get(worker, ()))

    def next_for(self, worker: W, window: int, draw: Callable[[], Task | None]) -> list[Task]:
        """Choose what a worker is given now, and note that it has it.

        Args:
            worker: which one.
            window: images that it may hold at once.
            draw: gives a new image; None where there is none at the moment.

        Returns:
            The images, none where it has enough.
        """
        held = self._held.setdefault(worker, {})
        if worker in self._alone or (self._suspects and held):
            return []
        chosen: list[Task] = []
        if self._suspects:
            chosen.append(self._suspects.popleft())
            self._alone.add(worker)
        else:
            while len(held) + len(chosen) < window:
                task = self._returned.popleft() if self._returned else draw()
                if task is None:
                    break
                chosen.append(task)
        held.update((task.file.image, task) for task in chosen)
        return chosen

    def through(self, worker: W, image: str) -> bool:
        """Note that a worker has done an image.

        Returns:
            Whether it had it: the outcome of one that was taken from it does not count.
        """
        was_held = self._held.get(worker, {}).pop(image, None) is not None
        if not self._held.get(worker):
            self._alone.discard(worker)
        return was_held

    def died(self, worker: W) -> list[Task]:
        """Take back the images of a worker that died.

        Returns:
            Those that are given up, as the ones that killed it.
        """
        held = list(self._held.pop(worker, {}).values())
        self._alone.discard(worker)
        if len(held) != 1:
            self._suspects.extend(held)
            return []
        (task,) = held
        task = replace(task, deaths=task.deaths + 1)
        if task.deaths >= self._max_deaths:
            return [task]
        self._suspects.append(task)
        return []

    def left(self, worker: W) -> None:
        """Take back the images of a worker that can do no more, through no fault of theirs."""
        self._returned.extend(self._held.pop(worker, {}).values())
        self._alone.discard(worker)
