"""Separated cells: what a user counts."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import pytest

from bcseg_batch.segment.cells import (
    CellKind,
    enlarge_labels,
    find_cells,
    separate,
)
from bcseg_batch.segment.measure import measure_cells

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
