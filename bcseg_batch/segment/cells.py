"""From the network's soft maps to single cells: labels, kinds and measurements.

Pure functions of arrays. Cells are parted at the network's size, where a watershed takes
milliseconds, and brought to the photograph's size afterwards.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import IntEnum

import cv2
import numpy as np
import numpy.typing as npt
from scipy import ndimage
from skimage.measure import regionprops_table
from skimage.morphology import h_maxima
from skimage.segmentation import expand_labels, watershed

from bcseg_batch.segment.postprocess import resize_probability

Floats = npt.NDArray[np.float32]
Labels = npt.NDArray[np.int32]

# Below this share of the median cell's area a piece is a speck, not a cell.
SPECK_SHARE = 0.12
# And below this many pixels of the network's input nothing can be called a cell.
SPECK_PX = 20
# A platelet: above this probability, sure enough on average, of the right size beside the median
# cell, and compact. They are few in any training, so that their channel stays below a half.
PLATELET_THRESHOLD = 0.3
PLATELET_MEAN = 0.42
PLATELET_AREA_SHARE = (0.045, 0.4)
PLATELET_EXTENT = 0.55
PLATELET_PX = 6
# Cores are cut at these probabilities in turn: a piece that falls apart at a higher one into pieces
# of at least a share of the typical core was more than one core.
CORE_LEVELS = (0.5, 0.65, 0.8)
SEED_SHARE = 0.12
# A dip of this share of the distance parts two cells where there is no channel of cores.
_DIP = 0.12


class CellKind(IntEnum):
    """What a label is; the values are those of the record and of `cells.csv`."""

    RED_CELL = 1
    WHITE_CELL = 2
    PLATELET = 3


@dataclass(frozen=True, slots=True)
class Cells:
    """The single cells of one image.

    Attributes:
        labels: int32 (H, W), 0 background, 1..n; cells first, platelets last.
        kinds: uint8 (n,), the `CellKind` of label i + 1 at index i. Without a channel for it
            everything is a red cell.
        touches_border: bool (n,), True where the image's border cuts the cell.
    """

    labels: Labels
    kinds: npt.NDArray[np.uint8]
    touches_border: npt.NDArray[np.bool_]

    def count(self, kind: CellKind) -> int:
        """How many of a kind there are."""
        return int(np.count_nonzero(self.kinds == kind))

    @property
    def cell_count(self) -> int:
        """Red and white cells; platelets are fragments and are counted alone."""
        return int(np.count_nonzero(self.kinds != CellKind.PLATELET))


def find_cells(
    probabilities: Floats,
    class_names: Sequence[str],
    shape_hw: tuple[int, int],
    *,
    threshold: float = 0.5,
) -> Cells:
    """Part the cells of one image, and name their kinds.

    Args:
        probabilities: float32 (C, h, w) in [0, 1] at the network's size. Channel 0 is the mask;
            of the others those named `core`, `white_cell` and `platelet` are used.
        class_names: one name for each channel.
        shape_hw: (H, W) of the image.
        threshold: a pixel is a cell above it.

    Returns:
        Cells at the image's size.

    Raises:
        ValueError: the names do not fit the channels.
    """
    if len(class_names) != len(probabilities):
        raise ValueError(f"{len(probabilities)} channels have {len(class_names)} names")
    soft = dict(zip(class_names[1:], probabilities[1:], strict=True))
    mask = probabilities[0] > threshold
    small = separate(mask, soft.get("core"), soft.get("white_cell"))
    whites = _mean_of(soft.get("white_cell"), small, int(small.max(initial=0))) > 0.5
    kinds = np.where(whites, np.uint8(CellKind.WHITE_CELL), np.uint8(CellKind.RED_CELL))
    labels = enlarge_labels(small, resize_probability(probabilities[0], shape_hw) > threshold)
    if "platelet" in soft:
        platelets = _platelets(soft["platelet"], small, mask)
        number = int(platelets.max(initial=0))
        large = cv2.resize(platelets, shape_hw[::-1], interpolation=cv2.INTER_NEAREST_EXACT)
        free = (labels == 0) & (large > 0)
        labels[free] = large[free] + np.int32(len(kinds))
        kinds = np.concatenate([kinds, np.full(number, CellKind.PLATELET, np.uint8)])
    labels, kept = _without_gaps(labels, len(kinds))
    return Cells(labels, kinds[kept], touches_border(labels, int(kept.sum())))


def separate(
    mask: npt.NDArray[np.bool_], core: Floats | None = None, white: Floats | None = None
) -> Labels:
    """Part touching cells by a watershed on the distance to the background.

    Seeds are the connected pieces of the cores where the network gives them, else the maxima of the
    distance transform that stand out by a share of the typical radius (h-maxima). A piece of the
    mask without a seed is a cell of its own. Holes are filled first and specks dropped last.
    White cells seldom touch, but the lobes of their nuclei look like cores: the seeds within one
    patch of white cell are one seed.

    Args:
        mask: bool (h, w).
        core: float32 (h, w) in [0, 1], probability of a cell's inner half, or None.
        white: float32 (h, w) in [0, 1], probability of a white cell, or None.

    Returns:
        int32 (h, w), 0 background, 1..n without gaps.
    """
    filled = fill_holes(mask)
    # The frame of the image is no edge of a cell: cells go on beyond it.
    padded = np.pad(filled, 1, mode="edge").astype(np.uint8)
    distance = cv2.distanceTransform(padded, cv2.DIST_L2, 5)[1:-1, 1:-1]
    if core is None:
        seeds = _distance_seeds(distance)
        relief = -distance
    else:
        seeds = _core_seeds(np.where(filled, core, np.float32(0)))
        if white is not None:
            seeds = _join_within(seeds, (white > 0.5) & filled)
        # The core says which cell, the distance where its edge is.
        relief = -cv2.GaussianBlur(core, (0, 0), 1.0) - 0.02 * distance
    seeds = _seed_the_rest(seeds, filled)
    labels = watershed(relief, seeds, mask=filled).astype(np.int32)
    return _drop_small(labels, least_px=SPECK_PX, share=SPECK_SHARE)


def fill_holes(
    mask: npt.NDArray[np.bool_], *, largest_share: float = 0.01
) -> npt.NDArray[np.bool_]:
    """Fill holes up to a share of the image: larger ones are gaps between cells in a ring.

    Args:
        mask: bool (h, w).
        largest_share: of the image's area.
    """
    holes = ndimage.binary_fill_holes(mask) & ~mask
    _, numbered, stats, _ = cv2.connectedComponentsWithStats(holes.astype(np.uint8), connectivity=4)
    fill = stats[:, cv2.CC_STAT_AREA] <= largest_share * mask.size
    fill[0] = False
    filled: npt.NDArray[np.bool_] = mask | fill[numbered]
    return filled


def _distance_seeds(distance: Floats) -> Labels:
    inside = distance[distance > 0]
    if not inside.size:
        return np.zeros(distance.shape, np.int32)
    # The largest radii are those of cells, whatever lies beside them in specks.
    dip = max(0.75, _DIP * float(np.percentile(distance[distance > 0], 90)))
    peaks = h_maxima(cv2.GaussianBlur(distance, (0, 0), 1.0), dip)
    _, seeds = cv2.connectedComponents(peaks.astype(np.uint8), connectivity=8)
    return np.asarray(seeds, dtype=np.int32)


def _core_seeds(core: Floats) -> Labels:
    """Number the cores: pieces above the first level, or what they fall into above the others."""
    seeds = _drop_small(_pieces(core > CORE_LEVELS[0]), least_px=4, share=SEED_SHARE)
    areas = np.bincount(seeds.ravel())[1:]
    if not areas.size:
        return seeds
    least_px = max(4.0, SEED_SHARE * float(np.median(areas)))
    for level in CORE_LEVELS[1:]:
        finer = _pieces(core > level)
        sizes = np.bincount(finer.ravel())
        sizes[0] = 0
        parents = np.zeros(sizes.size, np.int32)
        parents[finer] = seeds
        whole = sizes >= least_px
        children = np.bincount(parents[whole], minlength=int(seeds.max()) + 1)
        split = children > 1
        split[0] = False
        taken = whole[finer] & split[parents[finer]]
        numbers = finer + np.int32(seeds.max())
        seeds = np.where(split[seeds], np.where(taken, numbers, 0), seeds).astype(np.int32)
    return seeds


def _pieces(mask: npt.NDArray[np.bool_]) -> Labels:
    _, labels = cv2.connectedComponents(mask.astype(np.uint8), connectivity=4)
    return np.asarray(labels, dtype=np.int32)


def _join_within(seeds: Labels, patches: npt.NDArray[np.bool_]) -> Labels:
    """Make the seeds that lie mostly within one patch one seed."""
    count, numbered = cv2.connectedComponents(
        cv2.morphologyEx(patches.astype(np.uint8), cv2.MORPH_OPEN, np.ones((5, 5), np.uint8)),
        connectivity=4,
    )
    seed_count = int(seeds.max(initial=0)) + 1
    pair = seeds.astype(np.int64).ravel() * count + numbered.ravel()
    shared = np.bincount(pair, minlength=seed_count * count).reshape(seed_count, count)
    own = shared.argmax(axis=1)
    numbers = np.arange(seed_count, dtype=np.int32)
    for patch in range(1, count):
        inside = np.flatnonzero(own == patch)
        inside = inside[inside > 0]
        numbers[inside] = inside.min(initial=seed_count)
    joined: Labels = numbers[seeds]
    return joined


def _seed_the_rest(seeds: Labels, mask: npt.NDArray[np.bool_]) -> Labels:
    """Give each piece of the mask without a seed one that fills it."""
    count, pieces = cv2.connectedComponents(mask.astype(np.uint8), connectivity=4)
    seeded = np.zeros(count, dtype=bool)
    seeded[pieces[seeds > 0]] = True
    seeded[0] = True
    numbers = np.where(seeded, 0, np.cumsum(~seeded) + int(seeds.max(initial=0)))
    return np.where(seeds > 0, seeds, numbers[pieces]).astype(np.int32)


def _drop_small(labels: Labels, *, least_px: int, share: float) -> Labels:
    """Drop labels under a number of pixels or a share of the median label; close the gaps."""
    areas = np.bincount(labels.ravel())
    areas[0] = 0
    if not areas.any():
        return labels.astype(np.int32)
    # The median over area, not over labels: a thousand specks must not become the typical cell.
    ordered = np.sort(areas[areas > 0])
    typical = ordered[np.searchsorted(np.cumsum(ordered), ordered.sum() / 2)]
    keep = areas >= max(least_px, share * typical)
    keep[0] = False
    return np.where(keep, np.cumsum(keep), 0).astype(np.int32)[labels]


def _platelets(probability: Floats, cells: Labels, mask: npt.NDArray[np.bool_]) -> Labels:
    """Number the compact patches outside the mask that have a platelet's size."""
    found = ((probability > PLATELET_THRESHOLD) & ~mask).astype(np.uint8)
    _, labels, stats, _ = cv2.connectedComponentsWithStats(found, connectivity=4)
    labels = labels.astype(np.int32)
    areas = stats[:, cv2.CC_STAT_AREA]
    extent = areas / (stats[:, cv2.CC_STAT_WIDTH] * stats[:, cv2.CC_STAT_HEIGHT])
    keep = (areas >= PLATELET_PX) & (extent >= PLATELET_EXTENT)
    keep[1:] &= _mean_of(probability, labels, len(areas) - 1) >= PLATELET_MEAN
    cell_areas = np.bincount(cells.ravel())[1:]
    if cell_areas.size:
        low, high = (share * float(np.median(cell_areas)) for share in PLATELET_AREA_SHARE)
        keep &= (areas >= low) & (areas <= high)
    keep[0] = False
    kept: Labels = np.where(keep, np.cumsum(keep), 0).astype(np.int32)[labels]
    return kept


def _mean_of(plane: Floats | None, labels: Labels, count: int) -> npt.NDArray[np.float64]:
    """Mean of a plane in each of the labels 1..count; zeros where there is no plane."""
    if plane is None:
        return np.zeros(count)
    areas = np.bincount(labels.ravel(), minlength=count + 1)[1:]
    return np.bincount(labels.ravel(), plane.ravel(), count + 1)[1:] / np.maximum(areas, 1)


def enlarge_labels(labels: Labels, mask: npt.NDArray[np.bool_]) -> Labels:
    """Bring labels to the size of a finer mask: its outline, the labels' partition.

    Args:
        labels: int32 (h, w).
        mask: bool (H, W), the same scene at the image's size.

    Returns:
        int32 (H, W); pixels of the mask that lie near no label are 0, filled holes stay filled.
    """
    shape_hw = mask.shape
    size_wh = (shape_hw[1], shape_hw[0])
    # A step of the coarse grid must not cut the fine outline: labels reach a coarse pixel further.
    reached = cv2.resize(expand_labels(labels, 1.5), size_wh, interpolation=cv2.INTER_NEAREST_EXACT)
    # Where the coarse label says cell a whole pixel inside its edge, it is one (a filled hole).
    core = cv2.resize(_eroded(labels), size_wh, interpolation=cv2.INTER_NEAREST_EXACT)
    result: Labels = np.where(mask, reached, core).astype(np.int32)
    return result


def _eroded(labels: Labels) -> Labels:
    inside = cv2.erode((labels > 0).astype(np.uint8), np.ones((3, 3), np.uint8)) > 0
    return np.where(inside, labels, np.int32(0))


def _without_gaps(labels: Labels, count: int) -> tuple[Labels, npt.NDArray[np.bool_]]:
    """Renumber the labels that have pixels; tell which of 1..count those are."""
    present = np.bincount(labels.ravel(), minlength=count + 1) > 0
    present[0] = False
    numbers = np.where(present, np.cumsum(present), 0).astype(np.int32)
    return numbers[labels], present[1:]


def touches_border(labels: Labels, count: int) -> npt.NDArray[np.bool_]:
    """Tell which of the labels 1..count have a pixel in the outermost row or column: bool (n,)."""
    touching = np.zeros(count + 1, dtype=bool)
    for edge in (labels[0], labels[-1], labels[:, 0], labels[:, -1]):
        touching[edge] = True
    return touching[1:]


def measure_cells(
    cells: Cells, pixels: npt.NDArray[np.uint8], *, pixel_size_um: float | None = None
) -> Mapping[str, npt.NDArray[np.generic]]:
    """Measure each cell.

    Names are those of scikit-image's `regionprops_table`; `form_factor`, 4 pi area / perimeter^2,
    is CellProfiler's FormFactor. Lengths are in px, areas in px^2.

    Args:
        cells: from `find_cells`.
        pixels: uint8 (H, W, 3) RGB, the photograph.
        pixel_size_um: side of a pixel; adds `area_um2`, `perimeter_um` and
            `equivalent_diameter_area_um`.

    Returns:
        Columns of equal length, one row for each label.
    """
    table: dict[str, npt.NDArray[np.generic]] = regionprops_table(
        cells.labels,
        pixels,
        properties=(
            "label",
            "centroid",
            "bbox",
            "area",
            "perimeter",
            "equivalent_diameter_area",
            "eccentricity",
            "solidity",
            "mean_intensity",
        ),
    )
    area, perimeter = (np.asarray(table[name], np.float64) for name in ("area", "perimeter"))
    round_ = 4 * np.pi * area / np.maximum(perimeter, 1e-9) ** 2
    # A cell of a few pixels has a perimeter too short to speak of.
    table["form_factor"] = np.where(perimeter > 0, np.minimum(round_, 1.0), 1.0)
    names = {kind.value: kind.name.lower() for kind in CellKind}
    table["kind"] = np.array([names[int(kind)] for kind in cells.kinds], dtype=object)
    table["touches_border"] = cells.touches_border
    if pixel_size_um is not None:
        table["area_um2"] = area * pixel_size_um**2
        table["perimeter_um"] = perimeter * pixel_size_um
        diameter = np.asarray(table["equivalent_diameter_area"], np.float64)
        table["equivalent_diameter_area_um"] = diameter * pixel_size_um
    return table
