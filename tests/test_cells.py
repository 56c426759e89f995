"""Separated cells: what a user counts."""

from __future__ import annotations

import cv2
import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as npst
from scipy import ndimage
from skimage.segmentation import expand_labels, watershed

from bcseg_batch.segment.cells import (
    CellKind,
    enlarge_cells,
    enlarge_labels,
    fill_holes,
    find_cells,
    flood_among,
    part_cells,
    separate,
)
from bcseg_batch.segment.measure import measure_cells
from bcseg_batch.segment.postprocess import mask_from_probability
from bcseg_batch.segment.runs import Runs

NAMES = ("cell", "core", "white_cell", "platelet")


def disc(shape_hw: tuple[int, int], y: float, x: float, radius: float) -> npt.NDArray[np.bool_]:
    rows, columns = np.ogrid[: shape_hw[0], : shape_hw[1]]
    inside: npt.NDArray[np.bool_] = (rows - y) ** 2 + (columns - x) ** 2 <= radius**2
    return inside


def soft(mask: npt.NDArray[np.bool_]) -> npt.NDArray[np.float32]:
    return np.where(mask, np.float32(0.95), np.float32(0.02))


TOUCHING = disc((128, 128), 64, 44, 20) | disc((128, 128), 64, 80, 20)


def test_touching_cells_are_parted_without_a_core_channel() -> None:
    labels = separate(TOUCHING)
    assert labels.max() == 2
    areas = np.bincount(labels.ravel())[1:]
    assert abs(int(areas[0]) - int(areas[1])) < 0.05 * areas.sum()


def test_cores_decide_where_they_are_given() -> None:
    one = soft(disc((128, 128), 64, 62, 12))
    assert separate(TOUCHING, one).max() == 1
    three = soft(disc((128, 128), 64, 36, 6) | disc((128, 128), 64, 60, 6)) + soft(
        disc((128, 128), 64, 88, 6)
    )
    assert separate(TOUCHING, three).max() == 3


def test_a_cell_without_a_core_is_still_a_cell() -> None:
    mask = disc((128, 128), 30, 30, 15) | disc((128, 128), 90, 90, 15)
    assert separate(mask, soft(disc((128, 128), 30, 30, 7))).max() == 2


def test_holes_are_filled_and_specks_dropped() -> None:
    ring = disc((128, 128), 60, 60, 20) & ~disc((128, 128), 60, 60, 6)
    labels = separate(ring | disc((128, 128), 110, 110, 2))
    assert labels.max() == 1
    assert labels[60, 60] == 1


def test_an_empty_mask_has_no_cell() -> None:
    assert separate(np.zeros((64, 64), bool)).max() == 0
    cells = find_cells(np.zeros((4, 64, 64), np.float32), NAMES, (100, 150))
    assert cells.labels.shape == (100, 150)
    assert cells.cell_count == 0
    assert len(measure_cells(cells, np.zeros((100, 150, 3), np.uint8))["label"]) == 0


def planes() -> npt.NDArray[np.float32]:
    shape = (128, 128)
    red, white, cut = disc(shape, 40, 40, 14), disc(shape, 80, 84, 20), disc(shape, 125, 30, 14)
    platelet = disc(shape, 20, 100, 4)
    core = disc(shape, 40, 40, 7) | disc(shape, 80, 84, 10) | disc(shape, 125, 30, 7)
    return np.stack([soft(red | white | cut), soft(core), soft(white), soft(platelet)])


def test_kinds_are_named_and_border_cells_flagged_at_the_image_s_size() -> None:
    cells = find_cells(planes(), NAMES, (300, 400))
    assert cells.labels.shape == (300, 400)
    assert (cells.count(CellKind.RED_CELL), cells.count(CellKind.WHITE_CELL)) == (2, 1)
    assert cells.count(CellKind.PLATELET) == 1
    assert cells.cell_count == 3
    white = int(cells.labels[int(80 * 300 / 128), int(84 * 400 / 128)])
    assert cells.kinds[white - 1] == CellKind.WHITE_CELL
    assert cells.touches_border.sum() == 1
    assert cells.touches_border[int(cells.labels[299, int(30 * 400 / 128)]) - 1]
    assert set(np.unique(cells.labels)) == set(range(5))


def test_one_channel_gives_red_cells_only() -> None:
    cells = find_cells(planes()[:1], ("cell",), (128, 128))
    assert cells.cell_count == 3
    assert set(cells.kinds) == {CellKind.RED_CELL}


def test_names_must_fit_the_channels() -> None:
    with pytest.raises(ValueError, match="4 channels have 1 names"):
        find_cells(planes(), ("cell",), (128, 128))


def test_the_outline_of_enlarged_labels_is_the_fine_mask_s() -> None:
    coarse = separate(disc((64, 64), 32, 32, 12))
    fine = disc((256, 256), 129.5, 129.5, 49)
    labels = enlarge_labels(coarse, fine)
    assert ((labels > 0) != fine).mean() < 0.005


def test_measurements_of_a_disc() -> None:
    cells = find_cells(soft(disc((200, 200), 100, 80, 30))[np.newaxis], ("cell",), (200, 200))
    pixels = np.full((200, 200, 3), (200, 100, 50), np.uint8)
    table = measure_cells(cells, pixels, pixel_size_um=0.5)
    row = {name: values[0] for name, values in table.items()}
    assert row["area"] == pytest.approx(np.pi * 30**2, rel=0.01)
    assert row["equivalent_diameter_area_um"] == pytest.approx(30, rel=0.01)
    assert (row["centroid-0"], row["centroid-1"]) == pytest.approx((100, 80))
    assert row["form_factor"] > 0.9
    assert row["eccentricity"] < 0.1
    assert row["solidity"] > 0.95
    assert [row[f"mean_intensity-{c}"] for c in range(3)] == [200, 100, 50]
    assert row["kind"] == "red_cell"
    assert not row["touches_border"]


@settings(deadline=None)
@given(
    npst.arrays(
        np.int32,
        npst.array_shapes(min_dims=2, max_dims=2, min_side=1, max_side=12),
        elements=st.integers(0, 4),
    ),
    st.booleans(),
)
def test_enlarged_labels_reach_as_far_as_scikit_image_grows_them(
    labels: npt.NDArray[np.int32], everywhere: bool
) -> None:
    mask = np.full(labels.shape, everywhere)
    inside = ndimage.binary_erosion(labels > 0, np.ones((3, 3), bool), border_value=1)
    expected = expand_labels(labels, 1.5) if everywhere else np.where(inside, labels, 0)
    assert np.array_equal(enlarge_labels(labels, mask), expected)


@settings(deadline=None)
@given(npst.arrays(bool, npst.array_shapes(min_dims=2, max_dims=2, min_side=1, max_side=12)))
def test_holes_are_those_that_scipy_fills(mask: npt.NDArray[np.bool_]) -> None:
    assert np.array_equal(fill_holes(mask, largest_share=1), ndimage.binary_fill_holes(mask))
    assert np.array_equal(fill_holes(mask, largest_share=0), mask)


def random_planes(seed: int, *, steps: int | None = None) -> npt.NDArray[np.float32]:
    """Smooth random maps; of a few steps only they are full of plateaus and of ties."""
    rng = np.random.default_rng(seed)
    maps = [
        cv2.GaussianBlur(rng.normal(size=(120, 150)).astype(np.float32), (0, 0), sigma)
        for sigma in (6, 3, 8, 3)
    ]
    soft = np.stack([1 / (1 + np.exp(-4 * plane / plane.std())) for plane in maps])
    if steps is not None:
        soft = np.round(soft * steps) / steps
    return soft.astype(np.float32)


@pytest.mark.parametrize("steps", [None, 8, 4])
@pytest.mark.parametrize("seed", range(8))
def test_crowded_pieces_are_flooded_as_by_scikit_image(seed: int, steps: int | None) -> None:
    mask, core = random_planes(seed, steps=steps)[:2]
    filled = fill_holes(mask > 0.3)
    _, pieces = cv2.connectedComponents(filled.astype(np.uint8), connectivity=4)
    seeds, _ = ndimage.label((core > 0.7) & filled)
    seeds = seeds.astype(np.int32)
    seeds_in = [np.unique(seeds[(pieces == piece) & (seeds > 0)]).size for piece in range(999)]
    among = filled & (np.array(seeds_in)[pieces] > 1)
    assert among.any()
    relief = -core - np.float32(0.02) * ndimage.distance_transform_edt(filled).astype(np.float32)
    found = np.where(among, flood_among(relief, seeds, among), 0)
    if steps is None:
        assert np.array_equal(found, watershed(relief, seeds, mask=among))
    # Where heights are equal there is more than one answer, but always a whole one.
    assert np.array_equal(found > 0, among)
    assert np.array_equal(found[among & (seeds > 0)], seeds[among & (seeds > 0)])
    for number in np.unique(found[among]):
        assert ndimage.label(found == number)[1] == 1


@pytest.mark.parametrize("threshold", [0.5, 0.3])
@pytest.mark.parametrize("seed", range(4))
def test_cells_parted_first_and_enlarged_later_are_those_found_at_once(
    seed: int, threshold: float
) -> None:
    planes, shape_hw = random_planes(seed), (333, 401)
    at_once = find_cells(planes, NAMES, shape_hw, threshold=threshold)
    parted = part_cells(planes, NAMES, threshold=threshold)
    assert np.array_equal(parted.labels, separate(planes[0] > threshold, planes[1], planes[2]))
    assert np.array_equal(parted.areas, np.bincount(parted.labels.ravel())[1:])
    np.testing.assert_allclose(
        parted.means(planes[0]),
        ndimage.mean(planes[0], parted.labels, range(1, parted.areas.size + 1)),
        rtol=1e-6,
    )
    later = enlarge_cells(parted, mask_from_probability(planes[0], shape_hw, threshold) > 0)
    for name in ("labels", "kinds", "touches_border"):
        assert np.array_equal(getattr(later, name), getattr(at_once, name))


@settings(deadline=None)
@given(
    npst.arrays(
        np.int32,
        npst.array_shapes(min_dims=2, max_dims=2, min_side=1, max_side=9),
        elements=st.integers(0, 3),
    )
)
def test_runs_say_what_the_labels_say(labels: npt.NDArray[np.int32]) -> None:
    runs = Runs.of(labels)
    assert np.array_equal(runs.drawn(np.arange(4)), labels)
    assert np.array_equal(runs.areas(), np.bincount(labels.ravel()))
    plane = np.arange(labels.size, dtype=np.float32).reshape(labels.shape)
    assert np.array_equal(runs.sums(plane, 3), np.bincount(labels.ravel(), plane.ravel(), 4))
    swapped = np.array([0, 2, 1, 0], np.int32)
    assert np.array_equal(runs.renumbered(swapped).drawn(np.arange(4)), swapped[labels])


@pytest.mark.parametrize("seed", range(6))
def test_cells_are_parted_as_by_one_watershed_over_everything(seed: int) -> None:
    rng = np.random.default_rng(seed)
    mask, core = np.zeros((160, 200), bool), np.zeros((160, 200), np.float32)
    for _ in range(25):
        y, x = rng.uniform(0, 160), rng.uniform(0, 200)
        mask |= disc(mask.shape, y, x, 14)
        core = np.maximum(core, 0.9 * disc(mask.shape, y, x, 7))
    noise = rng.random(core.shape, dtype=np.float32)
    core = (core + 0.05 * noise).astype(np.float32)
    found = separate(mask, core)
    filled = fill_holes(mask)
    seeds, _ = ndimage.label((core > 0.5) & filled)
    padded = np.pad(filled, 1, mode="edge").astype(np.uint8)
    distance = cv2.distanceTransform(padded, cv2.DIST_L2, 5)[1:-1, 1:-1]
    relief = -cv2.GaussianBlur(core, (0, 0), 1.0) - 0.02 * distance
    whole = watershed(relief, seeds, mask=filled)
    # Specks are dropped and numbers may differ: each cell found is one of the watershed's.
    assert found.max() > 5
    for label in range(1, int(found.max()) + 1):
        number = whole[found == label][0]
        if number:
            assert np.array_equal(whole == number, found == label)


def test_a_platelet_beside_a_cell_takes_no_pixel_of_it() -> None:
    alone = planes()
    alone[3] = 0
    beside = planes()
    beside[3] = np.maximum(beside[3], soft(disc((128, 128), 40, 57, 3.5)))
    without = find_cells(alone, NAMES, (333, 401))
    cells = find_cells(beside, NAMES, (333, 401))
    assert cells.count(CellKind.PLATELET) == 2
    assert np.array_equal(np.where(cells.labels <= 3, cells.labels, 0), without.labels)
