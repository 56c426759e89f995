"""Runs: the stretches of a row that bear one label.

A picture of two million labels has some ten thousand runs, so that what goes over these instead of
the pixels takes next to no time.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TypeVar

import numpy as np
import numpy.typing as npt

Value = TypeVar("Value", bound=np.generic)


@dataclass(frozen=True, slots=True)
class Runs:
    """The runs of a label image, those of the background too, row by row and from left to right.

    Attributes:
        label: int32 (r,), of each.
        start: int64 (r,), index of its first pixel in the flat image.
        length: int64 (r,), in px.
        breaks: bool (H, W), True where a run starts: at each change, and with each row.
    """

    label: npt.NDArray[np.int32]
    start: npt.NDArray[np.int64]
    length: npt.NDArray[np.int64]
    breaks: npt.NDArray[np.bool_]

    @classmethod
    def of(cls, labels: npt.NDArray[np.int32]) -> Runs:
        """Find the runs of int32 (H, W), 0 and above."""
        flat = labels.ravel()
        breaks = np.empty(labels.shape, bool)
        # From end to end, which takes half the time of row by row.
        np.not_equal(flat[1:], flat[:-1], out=breaks.ravel()[1:])
        breaks[:, :1] = True
        start = np.flatnonzero(breaks)
        length = np.empty_like(start)
        np.subtract(start[1:], start[:-1], out=length[:-1])
        length[-1:] = flat.size - start[-1:]
        return cls(flat[start], start, length, breaks)

    def renumbered(self, numbers: npt.NDArray[np.int32]) -> Runs:
        """Put numbers[i] in the place of label i; neighbours may bear one number then."""
        return replace(self, label=numbers[self.label])

    def areas(self) -> npt.NDArray[np.int64]:
        """Count the pixels of each label: int64 (n + 1,), of label i at index i."""
        # Floats are exact up to 2^53.
        return np.bincount(self.label, self.length, minlength=1).astype(np.int64)

    def sums(self, plane: npt.NDArray[np.float32], count: int) -> npt.NDArray[np.float64]:
        """Add up a plane (H, W) over each label: float64 (count + 1,), of label i at index i."""
        over_runs = np.add.reduceat(plane.ravel(), self.start, dtype=np.float64)
        return np.bincount(self.label, over_runs, minlength=count + 1).astype(np.float64)

    def drawn(self, table: npt.NDArray[Value]) -> npt.NDArray[Value]:
        """Draw the image with table[i] in the place of label i: (H, W), the table's dtype."""
        drawn = np.repeat(table[self.label], self.length)
        return drawn.reshape(self.breaks.shape)
