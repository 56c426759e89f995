"""Outlines enclose the pixels of a cell, all of them and no others."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from bcseg_batch.segment.outlines import Polygon, cell_outlines, outline

Bools = npt.NDArray[np.bool_]


def filled(polygons: list[Polygon], shape_hw: tuple[int, int]) -> Bools:
    """Fill polygons by counting the edges to the left of each pixel."""
    crossings = np.zeros((shape_hw[0], shape_hw[1] + 1), int)
    for polygon in polygons:
        for ring in (polygon.exterior, *polygon.holes):
            for (x, y), (next_x, next_y) in zip(ring, np.roll(ring, -1, axis=0), strict=True):
                assert (x == next_x) != (y == next_y), "edges run along the pixels"
                crossings[min(y, next_y) : max(y, next_y), x] += 1 if x == next_x else 0
    return (np.cumsum(crossings, axis=1)[:, :-1] % 2).astype(bool)


areas = arrays(bool, st.tuples(st.integers(1, 9), st.integers(1, 9)))


@settings(deadline=None)
@given(areas)
def test_an_outline_encloses_its_pixels_and_no_others(inside: Bools) -> None:
    np.testing.assert_array_equal(filled(outline(inside), inside.shape), inside)


@settings(deadline=None)
@given(areas)
def test_no_ring_touches_itself_and_none_goes_straight_on(inside: Bools) -> None:
    for polygon in outline(inside):
        for ring in (polygon.exterior, *polygon.holes):
            corners = [tuple(corner) for corner in ring.tolist()]
            assert len(set(corners)) == len(corners) >= 4
            steps = np.sign(np.roll(ring, -1, axis=0) - ring)
            assert (steps != np.roll(steps, 1, axis=0)).any(axis=1).all()


@settings(deadline=None)
@given(areas)
def test_exteriors_are_clockwise_and_holes_are_not(inside: Bools) -> None:
    for polygon in outline(inside):
        for ring, sign in ((polygon.exterior, 1), *((hole, -1) for hole in polygon.holes)):
            x, y = ring.T.astype(int)
            assert np.sign((x * np.roll(y, -1) - y * np.roll(x, -1)).sum()) == sign


@settings(deadline=None)
@given(arrays(np.int32, (7, 8), elements=st.integers(0, 4)))
def test_each_label_has_its_own_outline(labels: npt.NDArray[np.int32]) -> None:
    found = cell_outlines(labels)
    assert list(found) == [number for number in np.unique(labels).tolist() if number]
    for number, polygons in found.items():
        np.testing.assert_array_equal(filled(polygons, labels.shape), labels == number)


def test_a_pixel_is_a_square_of_four_corners() -> None:
    inside = np.zeros((3, 4), bool)
    inside[1, 2] = True
    (square,) = outline(inside, origin_xy=(10, 20))
    assert square.exterior.tolist() == [[12, 21], [13, 21], [13, 22], [12, 22]]
    assert square.holes == ()


def test_a_ring_has_a_hole() -> None:
    inside = np.ones((3, 3), bool)
    inside[1, 1] = False
    (ring,) = outline(inside)
    assert ring.exterior.tolist() == [[0, 0], [3, 0], [3, 3], [0, 3]]
    (hole,) = ring.holes
    assert {tuple(corner) for corner in hole.tolist()} == {(1, 1), (1, 2), (2, 2), (2, 1)}


def test_an_island_in_a_hole_is_a_polygon_of_its_own() -> None:
    inside = np.ones((5, 5), bool)
    inside[1:4, 1:4] = False
    inside[2, 2] = True
    ring, island = outline(inside)
    assert len(ring.holes) == 1
    assert island.holes == ()


def test_an_empty_image_has_no_outline() -> None:
    assert cell_outlines(np.zeros((4, 4), np.uint16)) == {}
