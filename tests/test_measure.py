"""What is measured of each cell, held against scikit-image."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as npst
from skimage.measure import regionprops_table

from bcseg_batch.segment.cells import CellKind, Cells, touches_border
from bcseg_batch.segment.measure import COLUMNS, UM_COLUMNS, label_dtype, measure_cells
from bcseg_training.synthetic import synthesize_numbered

Labels = npt.NDArray[np.int32]


def cells_of(labels: Labels) -> Cells:
    """Number the labels without gaps."""
    _, dense = np.unique(np.append(0, labels), return_inverse=True)
    labels = dense[1:].reshape(labels.shape).astype(np.int32)
    count = int(labels.max(initial=0))
    kinds = np.full(count, CellKind.RED_CELL, np.uint8)
    return Cells(labels, kinds, touches_border(labels, count))


def colours(labels: Labels, seed: int = 0) -> npt.NDArray[np.uint8]:
    rng = np.random.default_rng(seed)
    return rng.integers(0, 256, (*labels.shape, 3), dtype=np.uint8)


def check_against_scikit_image(labels: Labels) -> None:
    cells = cells_of(labels)
    pixels = colours(labels)
    table = measure_cells(cells, pixels)
    assert tuple(table) == COLUMNS
    names = [n for n in COLUMNS if n not in {"kind", "form_factor", "touches_border"}]
    properties = list(dict.fromkeys(name.split("-")[0] for name in names))
    expected = regionprops_table(cells.labels, pixels, properties=properties)
    for name in names:
        ours, theirs = (np.asarray(source[name], np.float64) for source in (table, expected))
        np.testing.assert_allclose(ours, theirs, rtol=1e-6, atol=1e-6, err_msg=name)


# Few numbers on few pixels: cells that touch, cells in pieces, with holes, cut by the border, of
# one pixel or one row, and none at all, all come up by themselves.
ANY_LABELS = npst.arrays(
    np.int32,
    npst.array_shapes(min_dims=2, max_dims=2, min_side=1, max_side=14),
    elements=st.integers(0, 4),
)


@settings(deadline=None)
@given(ANY_LABELS)
def test_any_labels_are_measured_as_by_scikit_image(labels: Labels) -> None:
    check_against_scikit_image(labels)


@settings(deadline=None, max_examples=40)
@given(ANY_LABELS, st.integers(2, 6), st.integers(2, 6))
def test_coarse_shapes_are_measured_as_by_scikit_image(
    labels: Labels, high: int, wide: int
) -> None:
    check_against_scikit_image(np.kron(labels, np.ones((high, wide), np.int32)))


@pytest.mark.parametrize("offset", [0, 3000])
def test_a_cell_far_from_the_origin_loses_no_digits(offset: int) -> None:
    y, x = np.ogrid[:40, :40]
    labels = np.zeros((40 + offset, 41), np.int32)
    labels[offset:, 1:] = (y - 20) ** 2 + (x - 18) ** 2 * 1.01 <= 15**2
    check_against_scikit_image(labels)


def test_the_cells_of_a_smear_are_measured_as_by_scikit_image() -> None:
    smear = synthesize_numbered(3, 0, shape_hw=(240, 320), style="typical")
    check_against_scikit_image(smear.labels)


def test_a_disc_and_a_bar_are_what_they_are() -> None:
    y, x = np.ogrid[:100, :100]
    labels = ((y - 30) ** 2 + (x - 30) ** 2 <= 20**2).astype(np.int32)
    labels[70:74, 10:90] = 2
    table = measure_cells(cells_of(labels), colours(labels), pixel_size_um=0.5)
    disc, bar = ({name: column[i] for name, column in table.items()} for i in (0, 1))
    assert disc["equivalent_diameter_area"] == pytest.approx(40, abs=0.5)
    assert disc["form_factor"] > 0.85
    assert disc["solidity"] > 0.95
    assert disc["eccentricity"] < 0.05
    assert (bar["area"], bar["area_um2"]) == (320, 80)
    assert bar["eccentricity"] > 0.99
    assert bar["form_factor"] < 0.2
    assert bar["solidity"] == 1
    assert (bar["bbox-0"], bar["bbox-1"], bar["bbox-2"], bar["bbox-3"]) == (70, 10, 74, 90)
    assert bar["perimeter_um"] == bar["perimeter"] / 2


@pytest.mark.parametrize("pixel_size_um", [None, 0.1])
def test_without_a_cell_the_columns_are_empty(pixel_size_um: float | None) -> None:
    labels = np.zeros((5, 7), np.int32)
    table = measure_cells(cells_of(labels), colours(labels), pixel_size_um=pixel_size_um)
    assert tuple(table) == COLUMNS + (UM_COLUMNS if pixel_size_um else ())
    assert all(len(column) == 0 for column in table.values())


def test_a_cell_of_one_pixel_has_measurements_that_are_numbers() -> None:
    labels = np.zeros((5, 7), np.int32)
    labels[2, 3] = 1
    table = measure_cells(cells_of(labels), colours(labels))
    numbers = [float(table[name][0]) for name in COLUMNS if name != "kind"]
    assert np.isfinite(numbers).all()
    assert table["solidity"][0] == 1


def test_kinds_are_named() -> None:
    labels = np.array([[1, 0, 2, 0, 3]], np.int32)
    kinds = np.array([CellKind.RED_CELL, CellKind.WHITE_CELL, CellKind.PLATELET], np.uint8)
    table = measure_cells(Cells(labels, kinds, np.ones(3, bool)), colours(labels))
    assert table["kind"].tolist() == ["red_cell", "white_cell", "platelet"]


def test_labels_and_picture_of_different_sizes_are_refused() -> None:
    with pytest.raises(ValueError, match="do not fit"):
        measure_cells(cells_of(np.ones((2, 2), np.int32)), np.zeros((2, 3, 3), np.uint8))


def test_labels_with_a_gap_are_refused() -> None:
    cells = Cells(np.array([[1, 3]], np.int32), np.ones(2, np.uint8), np.ones(2, bool))
    with pytest.raises(ValueError, match="not 1 to 2"):
        measure_cells(cells, np.zeros((1, 2, 3), np.uint8))


def test_labels_are_stored_in_the_smallest_type_that_holds_them() -> None:
    assert label_dtype(0) == label_dtype(65_535) == np.uint16
    assert label_dtype(65_536) == np.uint32
