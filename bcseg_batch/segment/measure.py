"""What is measured of each cell, for all cells of an image at once.

The definitions are those of scikit-image's `regionprops`, which goes cell by cell and builds a new
image for most measures; here the image is gone over a few times, whatever the number of cells. The
means are **runs**, the stretches of a row that bear one label: a picture of two million pixels has
some ten thousand of them, and area, moments, box and hull follow from their ends.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import cv2
import numpy as np
import numpy.typing as npt

from bcseg_batch.segment.cells import CellKind, Cells
from bcseg_batch.segment.runs import Runs

Labels = npt.NDArray[np.int32]
Ints = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]
Bools = npt.NDArray[np.bool_]

COLUMNS = (
    "label",
    "kind",
    "centroid-0",
    "centroid-1",
    "bbox-0",
    "bbox-1",
    "bbox-2",
    "bbox-3",
    "area",
    "perimeter",
    "equivalent_diameter_area",
    "eccentricity",
    "solidity",
    "form_factor",
    "mean_intensity-0",
    "mean_intensity-1",
    "mean_intensity-2",
    "touches_border",
)
"""The columns of every table, in their order."""

UM_COLUMNS = ("area_um2", "perimeter_um", "equivalent_diameter_area_um")
"""The columns that follow them where the size of a pixel is known."""

_KIND_NAMES = np.array(["", *(kind.name.lower() for kind in CellKind)])


def label_dtype(count: int) -> np.dtype[np.uint16] | np.dtype[np.uint32]:
    """Choose the smallest type that numbers so many cells and the background: uint16 or uint32.

    Args:
        count: of the cells, 0 or more.
    """
    return np.dtype(np.uint16) if count <= np.iinfo(np.uint16).max else np.dtype(np.uint32)


def measure_cells(
    cells: Cells, pixels: npt.NDArray[np.uint8], *, pixel_size_um: float | None = None
) -> Mapping[str, npt.NDArray[np.generic]]:
    """Measure each cell.

    Names and values are those of scikit-image's `regionprops_table`. Of its own are `kind`, a
    `CellKind`'s name in small letters, `touches_border`, and `form_factor`, CellProfiler's
    FormFactor: 4 pi area / perimeter^2, at most 1, and 1 for a cell too small to have a perimeter.
    Rows come before columns in `centroid` and `bbox`. Lengths are in px, areas in px^2.

    Args:
        cells: from `find_cells`.
        pixels: uint8 (H, W, 3) RGB, the photograph.
        pixel_size_um: side of a pixel; adds `UM_COLUMNS`.

    Returns:
        Columns of n values, one for each label, named and ordered as `COLUMNS`: int64 for `label`
        and `bbox`, str for `kind`, bool for `touches_border`, float64 for all others.

    Raises:
        ValueError: photograph and labels differ in size, or the labels are not those of the kinds.
    """
    labels, count = np.ascontiguousarray(cells.labels), len(cells.kinds)
    if pixels.shape != (*labels.shape, 3):
        raise ValueError(f"labels of {labels.shape} do not fit pixels of {pixels.shape}")
    runs, colour_sums = _runs(labels, pixels)
    areas = _sum_by(runs.label, runs.length, count)
    if len(areas) != count or not areas.all():
        raise ValueError(f"there are {count} kinds, but the labels are not 1 to {count}")
    weighted = (
        _sum_by(runs.label, runs.length * position, count) for position in (runs.row, runs.middle)
    )
    centroid = np.stack([sums / areas for sums in weighted])
    box = _boxes(runs, count)
    perimeter = _perimeters(labels, runs.breaks, count)
    table: dict[str, npt.NDArray[np.generic]] = {
        "label": np.arange(1, count + 1),
        "kind": _KIND_NAMES[cells.kinds],
        **{f"centroid-{axis}": centroid[axis] for axis in range(2)},
        **{f"bbox-{side}": box[side] for side in range(4)},
        "area": areas,
        "perimeter": perimeter,
        "equivalent_diameter_area": np.sqrt(4 * areas / np.pi),
        "eccentricity": _eccentricities(runs, centroid, areas),
        "solidity": areas / _hull_areas(runs, box),
        # A cell of a few pixels has a perimeter too short to speak of.
        "form_factor": np.minimum(4 * np.pi * areas / np.maximum(perimeter, 1e-9) ** 2, 1.0),
        **{
            f"mean_intensity-{channel}": _sum_by(runs.label, sums, count) / areas
            for channel, sums in enumerate(colour_sums)
        },
        "touches_border": cells.touches_border,
    }
    if pixel_size_um is not None:
        table["area_um2"] = areas * pixel_size_um**2
        table["perimeter_um"] = perimeter * pixel_size_um
        table["equivalent_diameter_area_um"] = np.sqrt(4 * areas / np.pi) * pixel_size_um
    return table


@dataclass(frozen=True, slots=True)
class _Runs:
    """The runs of the cells, from top to bottom and from left to right.

    Attributes:
        label: int32 (r,), 1 and above: the background has no runs.
        row: int64 (r,).
        first: int64 (r,), column of the first pixel.
        length: int64 (r,).
        breaks: bool (H, W), True where a run begins, those of the background too.
    """

    label: Labels
    row: Ints
    first: Ints
    length: Ints
    breaks: Bools

    @property
    def middle(self) -> Floats:
        """Column of the middle of each."""
        return self.first + (self.length - 1) / 2


def _runs(labels: Labels, pixels: npt.NDArray[np.uint8]) -> tuple[_Runs, list[Floats]]:
    """Find the runs, and the sums of the three colours over each."""
    runs = Runs.of(labels)
    cell = np.flatnonzero(runs.label)
    row, first = np.divmod(runs.start[cell], labels.shape[1])
    # A sum from each start to the next: the background is summed with the rest and left out.
    sums = [
        np.add.reduceat(plane.ravel(), runs.start, dtype=np.uint32)[cell].astype(np.float64)
        for plane in cv2.split(pixels)
    ]
    return _Runs(runs.label[cell], row, first, runs.length[cell], runs.breaks), sums


def _sum_by(labels: Labels, values: npt.NDArray[np.generic], count: int) -> Floats:
    """Add up values by label: float64 (count,), the sum of label i + 1 at index i."""
    sums: Floats = np.bincount(labels, values, minlength=count + 1)[1:].astype(np.float64)
    return sums


def _boxes(runs: _Runs, count: int) -> Ints:
    """First row, first column, row after the last, column after the last: int64 (4, count)."""
    box = np.zeros((4, count), np.int64)
    box[:2] = np.iinfo(np.int64).max
    cell = runs.label - 1
    np.minimum.at(box[0], cell, runs.row)
    np.minimum.at(box[1], cell, runs.first)
    np.maximum.at(box[2], cell, runs.row + 1)
    np.maximum.at(box[3], cell, runs.first + runs.length)
    return box


def _eccentricities(runs: _Runs, centroid: Floats, areas: Floats) -> Floats:
    """Eccentricity of the ellipses with the cells' second moments, in [0, 1]."""
    # About the cell's own centroid: far from the origin the squares would lose the digits.
    dy = runs.row - centroid[0, runs.label - 1]
    dx = runs.middle - centroid[1, runs.label - 1]
    size = runs.length.astype(np.float64)
    # The pixels of a run lie about its middle as any row of so many points in a distance of 1.
    spread = size * (size**2 - 1) / 12
    count = len(areas)
    yy = _sum_by(runs.label, size * dy**2, count) / areas
    xx = _sum_by(runs.label, size * dx**2 + spread, count) / areas
    xy = _sum_by(runs.label, size * dy * dx, count) / areas
    root = np.hypot((yy - xx) / 2, xy)
    large = (yy + xx) / 2 + root
    small = np.maximum((yy + xx) / 2 - root, 0)
    one_pixel = large <= 0
    return np.where(one_pixel, 0.0, np.sqrt(1 - small / np.where(one_pixel, 1, large)))


def _perimeter_weights() -> Floats:
    """Lengths by what is around a border pixel: Benkrid and Crookes, as scikit-image has them.

    The index is 1 for the pixel itself, 2 for each border pixel of the same cell beside it, and 10
    for each at a corner: straight on counts 1, a diagonal sqrt(2), a bend half of both.
    """
    weights = np.zeros(50)
    weights[[5, 7, 15, 17, 25, 27]] = 1
    weights[[21, 33]] = np.sqrt(2)
    weights[[13, 23]] = (1 + np.sqrt(2)) / 2
    return weights


_PERIMETER_WEIGHTS = _perimeter_weights()


def _perimeters(labels: Labels, breaks: Bools, count: int) -> Floats:
    """Perimeter of each cell, px: float64 (count,)."""
    height, width = labels.shape
    # A border pixel has a pixel of another label, or the image's end, on one of its four sides.
    edge = breaks.copy()
    edge[0] = edge[-1] = True
    # From end to end again: a row ends where the next one starts with a break.
    flat = edge.ravel()
    flat[:-1] |= breaks.ravel()[1:]
    across = (labels[1:] != labels[:-1]).ravel()
    flat[width:] |= across
    flat[:-width] |= across
    edge &= labels > 0
    at = np.flatnonzero(edge)
    own = labels.ravel()[at]
    # With a frame of background no neighbour needs a look at where the image ends.
    stride = width + 2
    framed = np.zeros((height + 2) * stride, label_dtype(count))
    at += stride + 1 + 2 * (at // width)
    framed[at] = own
    index = np.ones(at.size, np.int8)
    for steps, weight in (((1, stride), 2), ((stride - 1, stride + 1), 10)):
        for step in steps:
            index += np.int8(weight) * (framed[at - step] == own)
            index += np.int8(weight) * (framed[at + step] == own)
    return _sum_by(own, _PERIMETER_WEIGHTS[index], count)


def _hull_areas(runs: _Runs, box: Ints) -> Floats:
    """Pixels within the convex hull of each cell, its edge included: float64 (count,).

    As in scikit-image the hull is that of the middles of the pixels' four sides.
    """
    heights = box[2] - box[0]
    # All cells stand one below the other with an empty row between, so that one pass does all.
    tops = np.cumsum(heights + 1) - heights
    cell_of_row = np.repeat(np.arange(heights.size), heights)
    rows = np.arange(cell_of_row.size) + cell_of_row + 1
    row = runs.row + (tops - box[0])[runs.label - 1]
    left = _hull_side(row, runs.first, rows)
    # The right side is the left one of the mirror image.
    right = -_hull_side(row, 1 - runs.first - runs.length, rows)
    areas: Floats = np.bincount(cell_of_row, right - left + 1, minlength=heights.size).astype(float)
    return areas


def _hull_side(row: Ints, column: Ints, rows: Ints) -> Ints:
    """Where the hulls begin in each row.

    Args:
        row: int64 (r,), of runs; the cells stand one below the other, an empty row between.
        column: int64 (r,), of their first pixels.
        rows: int64 (k,), those within a cell, ascending.

    Returns:
        int64 (k,), the first whole column within the hull, in each of `rows`.
    """
    if not rows.size:
        return rows
    # Counted in half pixels all is whole, and what lies on an edge is found exactly.
    nothing = np.iinfo(np.int64).max // 4
    first = np.full(rows[-1] + 2, nothing)
    np.minimum.at(first, row, 2 * column)
    outline = np.empty(2 * first.size - 1, np.int64)
    outline[::2] = first - 1
    # The middle of a pixel's left side juts out by a half, those of its top and bottom do not.
    outline[1::2] = np.minimum(first[:-1], first[1:])
    y = np.flatnonzero(outline < nothing - 1)
    x = outline[y]
    # A cell begins where the rows leave a gap: there is no point in the empty row between two.
    cell = _count_up_to(rows[np.diff(rows, prepend=-1) > 1] * 2 - 1, outline.size)[y]
    while True:
        # What lies on or right of the line between its neighbours is no corner of the hull. All
        # such points go at once: each lies between two others, so that the hull stays.
        (dy, dx), same = (np.diff(y), np.diff(x)), cell[2:] == cell[:-2]
        corner = np.ones(y.size, bool)
        corner[1:-1] = ~same | (dx[:-1] * dy[1:] < dx[1:] * dy[:-1])
        kept = np.flatnonzero(corner)
        if kept.size == y.size:
            break
        y, x, cell = y[kept], x[kept], cell[kept]
    above = _count_up_to(y, outline.size)[2 * rows] - 1
    y0, y1, x0, x1 = y[above], y[above + 1], x[above], x[above + 1]
    # The column halved and rounded up.
    columns: Ints = -((x0 * (2 * rows - y1) - x1 * (2 * rows - y0)) // (2 * (y1 - y0)))
    return columns


def _count_up_to(positions: Ints, size: int) -> Ints:
    """Count the positions, each there once, up to each of 0..size - 1, itself included."""
    marks = np.zeros(size, np.int64)
    marks[positions] = 1
    return np.cumsum(marks)
