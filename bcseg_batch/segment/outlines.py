"""From labels to outlines: polygons along the edges of the pixels, which enclose exactly these."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import cv2
import numpy as np
import numpy.typing as npt

Points = npt.NDArray[np.int32]


@dataclass(frozen=True, slots=True, eq=False)
class Polygon:
    """An area without its holes.

    Corners are those of pixels: the pixel in row 0 and column 0 reaches from (0, 0) to (1, 1).
    Rings are not closed by a repeated point, and no ring crosses or touches itself.

    Attributes:
        exterior: int32 (k, 2), x and y of its corners, clockwise as seen on a screen.
        holes: the same of each hole, counter-clockwise.
    """

    exterior: Points
    holes: tuple[Points, ...] = ()


def cell_outlines(labels: npt.NDArray[np.integer]) -> dict[int, list[Polygon]]:
    """Trace the outlines of all cells.

    Args:
        labels: integers (H, W), 0 background.

    Returns:
        For each label that occurs, in ascending order, its polygons: one, unless it is in parts
        that touch by corners at most.
    """
    found: dict[int, list[Polygon]] = {}
    for label, top, left, bottom, right in _boxes(labels):
        inside = labels[top:bottom, left:right] == label
        found[label] = outline(inside, (left, top))
    return found


def _boxes(labels: npt.NDArray[np.integer]) -> Iterator[list[int]]:
    """Give each label, its first row and column, and the row and column after its last ones."""
    rows, columns = np.nonzero(labels)
    numbers, which = np.unique(labels[rows, columns], return_inverse=True)
    count = numbers.size
    low = np.full((2, count), np.iinfo(np.int64).max)
    high = np.zeros((2, count), np.int64)
    for axis, places in enumerate((rows, columns)):
        np.minimum.at(low[axis], which, places)
        np.maximum.at(high[axis], which, places + 1)
    yield from np.concatenate([numbers[np.newaxis].astype(np.int64), low, high]).T.tolist()


def outline(inside: npt.NDArray[np.bool_], origin_xy: tuple[int, int] = (0, 0)) -> list[Polygon]:
    """Trace the outline of one area.

    Args:
        inside: bool (H, W).
        origin_xy: column and row of its first pixel in the whole image.

    Returns:
        Its polygons, from top to bottom by their first corners.
    """
    exteriors: list[Points] = []
    holes: list[Points] = []
    for ring in _rings(inside):
        (exteriors if _signed_area(ring) > 0 else holes).append(ring)
    within: list[list[Points]] = [[] for _ in exteriors]
    for hole in holes:
        within[_owner(hole, exteriors)].append(hole)
    shift = np.asarray(origin_xy, np.int32)
    return [
        Polygon(exterior + shift, tuple(hole + shift for hole in own))
        for exterior, own in zip(exteriors, within, strict=True)
    ]


def _rings(inside: npt.NDArray[np.bool_]) -> Iterator[Points]:
    """Follow the edges between inside and outside, with the inside at the right hand."""
    padded = np.pad(inside, 1)
    here, above, before = padded[1:, 1:], padded[:-1, 1:], padded[1:, :-1]
    following: dict[tuple[int, int], list[tuple[int, int]]] = {}
    for edges, start, step in (
        (here & ~above, (0, 0), (1, 0)),
        (above & ~here, (1, 0), (-1, 0)),
        (before & ~here, (0, 0), (0, 1)),
        (here & ~before, (0, 1), (0, -1)),
    ):
        rows, columns = np.nonzero(edges)
        for x, y in zip((columns + start[0]).tolist(), (rows + start[1]).tolist(), strict=True):
            following.setdefault((x, y), []).append(step)
    for corner in sorted(following, key=lambda xy: (xy[1], xy[0])):
        while following.get(corner):
            for ring in _parted(_followed(corner, following)):
                yield _without_straight(ring)


def _followed(
    start: tuple[int, int], following: dict[tuple[int, int], list[tuple[int, int]]]
) -> list[tuple[int, int]]:
    """Walk once around, using up the edges; where two ways lead on, the right hand's."""
    path = []
    (x, y), right = start, (0, 0)
    while True:
        steps = following[x, y]
        step = steps.pop(steps.index(right) if right in steps else 0)
        path.append((x, y))
        x, y, right = x + step[0], y + step[1], (-step[1], step[0])
        if (x, y) == start:
            return path


def _parted(path: list[tuple[int, int]]) -> Iterator[list[tuple[int, int]]]:
    """Part a way that comes by a corner twice into rings that do not."""
    kept: list[tuple[int, int]] = []
    place: dict[tuple[int, int], int] = {}
    for corner in path:
        if corner in place:
            loop = kept[place[corner] :]
            yield loop
            for passed in loop:
                del place[passed]
            del kept[len(kept) - len(loop) :]
        place[corner] = len(kept)
        kept.append(corner)
    yield kept


def _without_straight(ring: list[tuple[int, int]]) -> Points:
    """Leave out the corners at which the way goes straight on."""
    corners = np.array(ring, np.int32)
    turns = (np.roll(corners, -1, axis=0) - corners) != (corners - np.roll(corners, 1, axis=0))
    kept: Points = corners[turns.any(axis=1)]
    return kept


def _signed_area(ring: Points) -> float:
    """Give twice the area, above 0 for a ring that is clockwise on a screen."""
    x, y = ring.astype(np.int64).T
    return float(np.dot(x, np.roll(y, -1)) - np.dot(y, np.roll(x, -1)))


def _owner(hole: Points, exteriors: list[Points]) -> int:
    """Say which exterior a hole lies in."""
    # The middle of a pixel just within the hole: to the left of its first edge, which has the
    # area at its right hand.
    step = np.sign(hole[1] - hole[0])
    middle = hole[0] + 0.5 * step + 0.5 * np.array([step[1], -step[0]])
    for number, exterior in enumerate(exteriors):
        ring = exterior.astype(np.float32).reshape(-1, 1, 2)
        if cv2.pointPolygonTest(ring, (float(middle[0]), float(middle[1])), measureDist=False) > 0:
            return number
    raise AssertionError("each hole lies in an area")
