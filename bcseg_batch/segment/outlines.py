"""From labels to outlines: polygons along the edges of the pixels, which enclose exactly these."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

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


def cell_outlines(labels: npt.NDArray[np.integer[Any]]) -> dict[int, list[Polygon]]:
    """Trace the outlines of all cells.

    Args:
        labels: integers (H, W), 0 background.

    Returns:
        For each label that occurs, in ascending order, its polygons, from top to bottom by their
        first corners: one, unless it is in parts that touch by corners at most.
    """
    rings: dict[int, list[Points]] = {}
    for label, ring in _rings(_Corners.of(labels)):
        rings.setdefault(label, []).append(ring)
    return {label: _polygons(rings[label]) for label in sorted(rings)}


def outline(inside: npt.NDArray[np.bool_], origin_xy: tuple[int, int] = (0, 0)) -> list[Polygon]:
    """Trace the outline of one area.

    Args:
        inside: bool (H, W).
        origin_xy: column and row of its first pixel in the whole image.

    Returns:
        Its polygons, from top to bottom by their first corners.
    """
    shift = np.asarray(origin_xy, np.int32)
    return [
        Polygon(polygon.exterior + shift, tuple(hole + shift for hole in polygon.holes))
        for polygon in cell_outlines(inside.astype(np.uint8)).get(1, [])
    ]


def _polygons(rings: list[Points]) -> list[Polygon]:
    exteriors = [ring for ring in rings if _signed_area(ring) > 0]
    within: list[list[Points]] = [[] for _ in exteriors]
    for ring in rings:
        if _signed_area(ring) < 0:
            within[_owner(ring, exteriors)].append(ring)
    return [Polygon(exterior, tuple(own)) for exterior, own in zip(exteriors, within, strict=True)]


@dataclass(frozen=True, slots=True, eq=False)
class _Corners:
    """The corners of all areas, sorted by label, then from top to bottom and from left to right.

    Where two pixels of one label touch by a corner alone, it counts twice, once for each.

    Attributes:
        label: int64 (n,).
        x: int64 (n,).
        y: int64 (n,).
        following: int64 (n,), index of the next one on the way around, with the area at the right
            hand.
    """

    label: npt.NDArray[np.int64]
    x: npt.NDArray[np.int64]
    y: npt.NDArray[np.int64]
    following: npt.NDArray[np.int64]

    @classmethod
    def of(cls, labels: npt.NDArray[np.integer[Any]]) -> _Corners:
        """Find them, and who is next to whom, for all labels at once."""
        padded = np.pad(labels, 1)
        # The four pixels around each place at which not all of them are alike.
        around = (padded[:-1, :-1], padded[:-1, 1:], padded[1:, :-1], padded[1:, 1:])
        mixed = (around[0] != around[1]) | (around[0] != around[2]) | (around[0] != around[3])
        y, x = np.nonzero(mixed)
        four = np.stack([pixels[mixed] for pixels in around]).astype(np.int64)
        found = []
        for place in range(4):
            same = four == four[place]
            # Each label once, and not the background's.
            own = (four[place] != 0) & ~same[:place].any(axis=0)
            # By bits: top left 1, top right 2, bottom left 4, bottom right 8.
            shape = np.where(own, (same * np.array([[1], [2], [4], [8]])).sum(axis=0), 0)
            for one_shape, turns in _TURNS.items():
                at = np.flatnonzero(shape == one_shape)
                for turn in turns:
                    row = np.empty((6, at.size), np.int64)
                    row[:3] = four[place, at], y[at], x[at]
                    row[3:] = np.array(turn)[:, np.newaxis]
                    found.append(row)
        corners = np.concatenate(found, axis=1)
        # Two at one place: the one whose edge goes to the left comes first along the row.
        corners = corners[:, np.lexsort((corners[3], corners[2], corners[1], corners[0]))]
        label, y, x, _, down, leaves_across = corners
        # Along a row, and down a column, edges join the first with the second, the third ...
        across = np.arange(label.size) ^ 1
        by_column = np.lexsort((down, y, x, label))
        along = np.empty_like(across)
        along[by_column] = by_column[across]
        return cls(label, x, y, np.where(leaves_across == 1, across, along))


# The turns at a place, by which of the four pixels around it are the label's: whether the edge
# across goes to the right, whether the one along goes down, and whether the way leaves by the one
# across. Two opposite pixels make two turns, each around its own pixel.
_TURNS = {
    1: [(0, 0, 1)],
    2: [(1, 0, 0)],
    4: [(0, 1, 0)],
    8: [(1, 1, 1)],
    14: [(0, 0, 0)],
    13: [(1, 0, 1)],
    11: [(0, 1, 1)],
    7: [(1, 1, 0)],
    9: [(0, 0, 1), (1, 1, 1)],
    6: [(1, 0, 0), (0, 1, 0)],
}


def _rings(corners: _Corners) -> Iterator[tuple[int, Points]]:
    """Follow the ways around; gives each with its label."""
    following = corners.following.tolist()
    places = list(zip(corners.x.tolist(), corners.y.tolist(), strict=True))
    labels = corners.label.tolist()
    is_through = bytearray(len(following))
    for start in range(len(following)):
        if is_through[start]:
            continue
        path = []
        at = start
        while not is_through[at]:
            is_through[at] = 1
            path.append(places[at])
            at = following[at]
        if len(set(path)) == len(path):
            yield labels[start], np.array(path, np.int32)
            continue
        for ring in _parted(path):
            yield labels[start], _without_straight(ring)


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
