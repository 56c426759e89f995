"""From the network's soft maps to single cells: labels and kinds.

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
from skimage.morphology import h_maxima
from skimage.segmentation import watershed

from bcseg_batch.segment.postprocess import resize_probability
from bcseg_batch.segment.runs import Runs

Floats = npt.NDArray[np.float32]
Labels = npt.NDArray[np.int32]

# A pixel above it may be a white cell's; a cell above it on average is one.
WHITE_THRESHOLD = 0.5
# Below this share of the median cell's area a piece is a speck, not a cell.
SPECK_SHARE = 0.12
# And below this many pixels of the network's input nothing can be called a cell.
SPECK_PX = 20
# A platelet: above this probability, sure enough on average, of the right size beside the median
# cell, and compact. They count tenfold in the training, so that their channel says much.
PLATELET_THRESHOLD = 0.8
PLATELET_MEAN = 0.85
PLATELET_AREA_SHARE = (0.05, 0.4)
PLATELET_EXTENT = 0.55
PLATELET_PX = 6
# Cores are cut at these probabilities in turn: a piece that falls apart at a higher one into pieces
# of at least a share of the typical core was more than one core.
CORE_LEVELS = (0.5, 0.65, 0.8)
SEED_SHARE = 0.16
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


@dataclass(frozen=True, slots=True)
class Parted:
    """The red and white cells of one image, parted at the network's size.

    Attributes:
        labels: int32 (h, w), 0 background, 1..n.
        areas: int64 (n,), in the network's pixels.
        mask: bool (h, w), True where the probability of a cell is above the threshold.
        probability: float32 (h, w) in [0, 1], of a cell.
        planes: float32 (h, w) in [0, 1], of the other channels by their names.
    """

    labels: Labels
    areas: npt.NDArray[np.int64]
    mask: npt.NDArray[np.bool_]
    probability: Floats
    planes: Mapping[str, Floats]
    _runs: Runs

    def means(self, plane: Floats) -> npt.NDArray[np.float64]:
        """Average float32 (h, w) over each cell: float64 (n,)."""
        return self._runs.sums(plane, self.areas.size)[1:] / self.areas


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
    parted = part_cells(probabilities, class_names, threshold=threshold)
    return enlarge_cells(parted, resize_probability(probabilities[0], shape_hw) > threshold)


def part_cells(
    probabilities: Floats, class_names: Sequence[str], *, threshold: float = 0.5
) -> Parted:
    """Part the cells of one image at the network's size: the first half of `find_cells`.

    Args:
        probabilities: as for `find_cells`; not copied.
        class_names: as for `find_cells`.
        threshold: a pixel is a cell above it.

    Raises:
        ValueError: the names do not fit the channels.
    """
    if len(class_names) != len(probabilities):
        raise ValueError(f"{len(probabilities)} channels have {len(class_names)} names")
    probability, planes = (
        probabilities[0],
        dict(zip(class_names[1:], probabilities[1:], strict=True)),
    )
    mask = probability > threshold
    labels, runs = _separate(mask, planes.get("core"), planes.get("white_cell"))
    return Parted(labels, runs.areas()[1:], mask, probability, planes, runs)


def enlarge_cells(parted: Parted, mask: npt.NDArray[np.bool_]) -> Cells:
    """Bring cells to the image's size and name their kinds: the second half of `find_cells`.

    Args:
        parted: the cells at the network's size.
        mask: bool (H, W) at the image's size, the probability resized and cut at the threshold.
    """
    kinds = np.full(parted.areas.size, CellKind.RED_CELL, np.uint8)
    white, platelet = (parted.planes.get(name) for name in ("white_cell", "platelet"))
    if white is not None and (white > WHITE_THRESHOLD).any():
        kinds[parted.means(white) > WHITE_THRESHOLD] = CellKind.WHITE_CELL
    labels = enlarge_labels(parted.labels, mask)
    if platelet is not None:
        platelets, boxes = _platelets(platelet, parted)
        _lay_beside(labels, platelets, boxes, first=len(kinds) + 1)
        kinds = np.concatenate([kinds, np.full(len(boxes), CellKind.PLATELET, np.uint8)])
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
    return _separate(mask, core, white)[0]


def _separate(
    mask: npt.NDArray[np.bool_], core: Floats | None, white: Floats | None
) -> tuple[Labels, Runs]:
    filled = fill_holes(mask)
    if core is None:
        distance = _distance(filled)
        seeds = _seed_the_rest(_distance_seeds(distance), filled)
        labels = watershed(-distance, seeds, mask=filled).astype(np.int32)
    else:
        seeds = _core_seeds(core, filled)
        if white is not None:
            seeds = _join_within(seeds, (white > WHITE_THRESHOLD) & filled)
        labels = _flood(core, seeds, filled)
    runs = Runs.of(labels)
    number = _large_ones(runs.areas(), least_px=SPECK_PX, share=SPECK_SHARE)
    if number[-1] < number.size - 1:
        labels, runs = runs.drawn(number), runs.renumbered(number)
    return labels, runs


def _distance(mask: npt.NDArray[np.bool_]) -> Floats:
    """How far each pixel lies from the background, px: float32 (h, w)."""
    # The frame of the image is no edge of a cell: cells go on beyond it.
    padded = cv2.copyMakeBorder(mask.view(np.uint8), 1, 1, 1, 1, cv2.BORDER_REPLICATE)
    distance = cv2.distanceTransform(padded, cv2.DIST_L2, 5)[1:-1, 1:-1]
    # Where there is no background at all OpenCV's distance to it is no sensible number.
    bounded: Floats = np.minimum(distance, np.float32(max(distance.shape)))
    return bounded


def _flood(core: Floats, seeds: Labels, mask: npt.NDArray[np.bool_]) -> Labels:
    """Part the mask among the seeds of cores, each of which lies within one piece of the mask.

    A piece with one seed is one cell; only those with more are given to the watershed.
    """
    count, pieces = cv2.connectedComponents(mask.view(np.uint8), connectivity=4)
    runs = Runs.of(seeds)
    home = np.zeros(int(seeds.max(initial=0)) + 1, np.int32)
    home[runs.label] = pieces.ravel()[runs.start]
    home[0] = 0
    seeds_in = np.bincount(home, minlength=count)
    unseeded = seeds_in == 0
    unseeded[0] = False
    number = np.where(unseeded, np.cumsum(unseeded) + home.size - 1, 0).astype(np.int32)
    alone = np.flatnonzero((home > 0) & (seeds_in[home] == 1))
    number[home[alone]] = alone
    labels: Labels = number.take(pieces)
    crowded = seeds_in > 1
    crowded[0] = False
    if crowded.any():
        among = mask & (labels == 0)
        # The core says which cell, the distance where its edge is.
        relief = np.float32(-0.02) * _distance(mask) - cv2.GaussianBlur(core, (0, 0), 1.0)
        x, y, width, height = cv2.boundingRect(among.view(np.uint8))
        window = (slice(y, y + height), slice(x, x + width))
        parted = flood_among(relief[window], seeds[window], among[window])
        np.copyto(labels[window], parted, where=among[window])
    return labels


def flood_among(relief: Floats, seeds: Labels, among: npt.NDArray[np.bool_]) -> Labels:
    """Part crowded pieces of the mask as scikit-image's watershed does, most of it without it.

    The flood takes the pixels in the order of their heights, each from the lowest of its four
    neighbours, wherever the way down from it ends in a seed: so it gets the seed at its end. Where
    it ends in a dip without a seed, the flood has to be played through; and so it has everywhere
    if two neighbours of one height lead to two seeds: their order is the flood's own affair.

    Args:
        relief: float32 (h, w).
        seeds: int32 (h, w), 1..n, 0 elsewhere.
        among: bool (h, w), the crowded pieces; each has a seed.

    Returns:
        int32 (h, w), 1..n in the crowded pieces, any number elsewhere.
    """
    framed = cv2.copyMakeBorder(
        np.where(among, relief, np.float32(np.inf)), 1, 1, 1, 1, cv2.BORDER_CONSTANT, value=np.inf
    )
    labels: Labels = cv2.copyMakeBorder(seeds, 1, 1, 1, 1, cv2.BORDER_CONSTANT, value=0)
    heights, flat, stride = framed.ravel(), labels.ravel(), framed.shape[1]
    steps = np.array([0, -stride, -1, 1, stride])
    centre = heights[stride:-stride]
    around = [heights[stride + step : heights.size - stride + step] for step in steps[1:]]
    lowest = np.minimum(np.minimum(around[0], around[1]), np.minimum(around[2], around[3]))
    # Which of the steps leads down, of equal ones the last; none out of a dip.
    step_down, equal = np.zeros(centre.size, np.uint8), np.zeros(centre.size, np.uint8)
    for number, beside in enumerate(around, start=1):
        here = (beside == lowest).view(np.uint8)
        equal += here
        np.maximum(step_down, here * np.uint8(number), out=step_down)
    step_down *= lowest < centre
    free = np.flatnonzero((centre < np.inf) & (flat[stride:-stride] == 0))
    at = free + stride
    # Each looks where the one below it looks, until all look at a seed or into a dip. Seeds are
    # numbered after the pixels.
    nodes = flat.astype(np.int64) + at.size
    nodes[at] = np.arange(at.size)
    below = np.append(
        nodes[at + steps[step_down[free]]], np.arange(at.size, at.size + seeds.max() + 1)
    )
    while not np.array_equal(further := below[below], below):
        below = further
    flat[at] = np.maximum(below[: at.size] - at.size, 0)
    tied = at[(equal[free] > 1) & (step_down[free] > 0)]
    cross = cv2.getStructuringElement(cv2.MORPH_CROSS, (3, 3))
    for step in steps[1:]:
        beside = tied + step
        if ((heights[beside] == lowest[tied - stride]) & (flat[beside] != flat[tied])).any():
            inside = cv2.erode((seeds > 0).view(np.uint8), cross) > 0
            whole: Labels = watershed(relief, seeds, mask=among & ~inside)
            np.copyto(whole, seeds, where=inside)
            return whole
    parted = labels[1:-1, 1:-1]
    left = among & (parted == 0)
    if left.any():
        x, y, width, height = cv2.boundingRect(left.view(np.uint8))
        # The pixels around belong to it, for the flood comes from them.
        window = (slice(max(0, y - 1), y + height + 1), slice(max(0, x - 1), x + width + 1))
        reached = cv2.dilate(left[window].view(np.uint8), cross) > 0
        flooded = watershed(relief[window], parted[window], mask=reached & among[window])
        np.copyto(parted[window], flooded, where=left[window], casting="same_kind")
    return parted


def fill_holes(
    mask: npt.NDArray[np.bool_], *, largest_share: float = 0.01
) -> npt.NDArray[np.bool_]:
    """Fill holes up to a share of the image: larger ones are gaps between cells in a ring.

    Args:
        mask: bool (h, w).
        largest_share: of the image's area.
    """
    _, gaps = cv2.connectedComponents((~mask).view(np.uint8), connectivity=4)
    runs = Runs.of(gaps)
    fill = runs.areas() <= largest_share * mask.size
    # What reaches the frame is no hole, and number 0 is the mask itself.
    for edge in (gaps[0], gaps[-1], gaps[:, 0], gaps[:, -1]):
        fill[edge] = False
    fill[0] = False
    filled: npt.NDArray[np.bool_] = mask | runs.drawn(fill) if fill.any() else mask.copy()
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


def _core_seeds(core: Floats, mask: npt.NDArray[np.bool_]) -> Labels:
    """Number the cores: pieces above the first level, or what they fall into above the others."""
    cores = (core > CORE_LEVELS[0]) & mask
    pieces = _pieces(cores)
    # Nothing happens outside the cores, which are a small part of the picture.
    at = np.flatnonzero(cores)
    own = pieces.ravel()[at]
    own = _large_ones(np.bincount(own), least_px=4, share=SEED_SHARE)[own]
    areas = np.bincount(own)[1:]
    least_px = max(4.0, SEED_SHARE * float(np.median(areas))) if areas.size else 0.0
    for level in CORE_LEVELS[1:]:
        finer = _pieces((core > level) & mask).ravel()[at]
        sizes = np.bincount(finer, minlength=1)
        parents = np.zeros(sizes.size, np.int32)
        parents[finer] = own
        whole = sizes >= least_px
        whole[0] = False
        highest = int(own.max(initial=0))
        split = np.bincount(parents[whole], minlength=highest + 1) > 1
        split[0] = False
        if split.any():
            numbers = np.where(whole, np.arange(sizes.size) + highest, 0).astype(np.int32)
            own = np.where(split[own], numbers[finer], own)
    pieces.ravel()[at] = own
    return pieces


def _pieces(mask: npt.NDArray[np.bool_]) -> Labels:
    _, labels = cv2.connectedComponents(mask.view(np.uint8), connectivity=4)
    return np.asarray(labels, dtype=np.int32)


def _join_within(seeds: Labels, patches: npt.NDArray[np.bool_]) -> Labels:
    """Make the seeds that lie mostly within one patch one seed."""
    if not patches.any():
        return seeds
    count, numbered = cv2.connectedComponents(
        cv2.morphologyEx(patches.view(np.uint8), cv2.MORPH_OPEN, np.ones((5, 5), np.uint8)),
        connectivity=4,
    )
    if count == 1:
        return seeds
    at = np.flatnonzero(seeds > 0)
    seed_count = int(seeds.max(initial=0)) + 1
    pair = seeds.ravel()[at].astype(np.int64) * count + numbered.ravel()[at]
    shared = np.bincount(pair, minlength=seed_count * count).reshape(seed_count, count)
    own = shared.argmax(axis=1)
    numbers = np.arange(seed_count, dtype=np.int32)
    for patch in range(1, count):
        inside = np.flatnonzero(own == patch)
        numbers[inside] = inside.min(initial=seed_count)
    joined: Labels = numbers.take(seeds)
    return joined


def _seed_the_rest(seeds: Labels, mask: npt.NDArray[np.bool_]) -> Labels:
    """Give each piece of the mask without a seed one that fills it."""
    count, pieces = cv2.connectedComponents(mask.astype(np.uint8), connectivity=4)
    seeded = np.zeros(count, dtype=bool)
    seeded[pieces[seeds > 0]] = True
    seeded[0] = True
    numbers = np.where(seeded, 0, np.cumsum(~seeded) + int(seeds.max(initial=0)))
    return np.where(seeds > 0, seeds, numbers[pieces]).astype(np.int32)


def _large_ones(areas: npt.NDArray[np.int64], *, least_px: int, share: float) -> Labels:
    """Number the labels that are not small, by their areas: int32 (n + 1,), 0 for the others."""
    keep = np.arange(areas.size) > 0
    ordered = np.sort(areas[(areas > 0) & keep])
    if ordered.size:
        # The median over area, not over labels: a thousand specks must not become the typical cell.
        typical = ordered[np.searchsorted(np.cumsum(ordered), ordered.sum() / 2)]
        keep &= areas >= max(least_px, share * typical)
    return np.where(keep, np.cumsum(keep), 0).astype(np.int32)


def _platelets(probability: Floats, parted: Parted) -> tuple[Labels, npt.NDArray[np.int64]]:
    """Number the compact patches outside the mask that have a platelet's size.

    Returns:
        Labels int32 (h, w), and int64 (n, 4) for each its first row and column, and those after
        its last.
    """
    candidates = (probability > PLATELET_THRESHOLD) & ~parted.mask
    # OpenCV's own statistics go over the whole picture for the few pixels there are.
    at = np.flatnonzero(candidates)
    if not at.size:
        return np.zeros(candidates.shape, np.int32), np.zeros((0, 4), np.int64)
    count, labels = cv2.connectedComponents(candidates.view(np.uint8), connectivity=4)
    own, (y, x) = labels.ravel()[at], np.divmod(at, labels.shape[1])
    areas = np.bincount(own, minlength=count)
    boxes = np.zeros((count, 4), np.int64)
    boxes[:, :2] = labels.size
    for start, stop, position in ((0, 2, y), (1, 3, x)):
        np.minimum.at(boxes[:, start], own, position)
        np.maximum.at(boxes[:, stop], own, position + 1)
    extent = areas / np.maximum(np.prod(boxes[:, 2:] - boxes[:, :2], axis=1), 1)
    keep = (areas >= PLATELET_PX) & (extent >= PLATELET_EXTENT)
    means = np.bincount(own, probability.ravel()[at], count) / np.maximum(areas, 1)
    keep &= means >= PLATELET_MEAN
    if parted.areas.size:
        low, high = (share * float(np.median(parted.areas)) for share in PLATELET_AREA_SHARE)
        keep &= (areas >= low) & (areas <= high)
    keep[0] = False
    kept = np.zeros(labels.shape, np.int32)
    kept.ravel()[at] = np.where(keep, np.cumsum(keep), 0)[own]
    return kept, boxes[keep]


def _lay_beside(
    labels: Labels, platelets: Labels, boxes: npt.NDArray[np.int64], *, first: int
) -> None:
    """Enlarge platelets, and write each where the labels are free.

    Args:
        labels: int32 (H, W), changed in place.
        platelets: int32 (h, w), 1..n.
        boxes: int64 (n, 4), as `_platelets` gives them.
        first: the label of platelet 1.
    """
    # Which of the small rows and columns OpenCV takes for each large one: so a platelet can be
    # enlarged alone, where enlarging the whole for a few of them would cost more than all else.
    rows, columns = (
        cv2.resize(
            np.arange(small, dtype=np.int32)[np.newaxis],
            (large, 1),
            interpolation=cv2.INTER_NEAREST_EXACT,
        )[0]
        for small, large in zip(platelets.shape, labels.shape, strict=True)
    )
    for number, (top, left, bottom, right) in enumerate(boxes.tolist(), start=1):
        y0, y1 = np.searchsorted(rows, (top, bottom))
        x0, x1 = np.searchsorted(columns, (left, right))
        window = labels[y0:y1, x0:x1]
        own = platelets[rows[y0:y1, np.newaxis], columns[x0:x1]] == number
        window[own & (window == 0)] = first + number - 1


def enlarge_labels(labels: Labels, mask: npt.NDArray[np.bool_]) -> Labels:
    """Bring labels to the size of a finer mask: its outline, the labels' partition.

    Args:
        labels: int32 (h, w).
        mask: bool (H, W), the same scene at the image's size.

    Returns:
        int32 (H, W); pixels of the mask that lie near no label are 0, filled holes stay filled.
    """
    size_wh = (mask.shape[1], mask.shape[0])
    # A step of the coarse grid must not cut the fine outline: labels reach a coarse pixel further.
    reached = cv2.resize(_grown(labels), size_wh, interpolation=cv2.INTER_NEAREST_EXACT)
    # Where the coarse label says cell a whole pixel inside its edge, it is one (a filled hole).
    inside = cv2.erode((labels > 0).view(np.uint8), np.ones((3, 3), np.uint8))
    taken = cv2.resize(inside, size_wh, interpolation=cv2.INTER_NEAREST_EXACT)
    taken |= mask.view(np.uint8)
    reached *= taken
    return np.asarray(reached, dtype=np.int32)


def _grown(labels: Labels) -> Labels:
    """Grow labels by the eight pixels around each, as scikit-image's `expand_labels` by 1.5 px.

    Its distance transform of the whole picture takes ten times as long as a look at the rim.
    """
    here = (labels > 0).view(np.uint8)
    rim = np.flatnonzero(cv2.dilate(here, np.ones((3, 3), np.uint8)) > here)
    framed: Labels = cv2.copyMakeBorder(labels, 1, 1, 1, 1, cv2.BORDER_CONSTANT, value=0)
    flat, stride = framed.ravel(), framed.shape[1]
    rim += stride + 1 + 2 * (rim // labels.shape[1])
    own = np.zeros(rim.size, np.int32)
    # The last one stands: corners give way to sides, and among equals the order is scikit-image's.
    for step in (stride + 1, 1 - stride, stride - 1, -stride - 1, 1, stride, -stride, -1):
        beside = flat[rim + step]
        own = np.where(beside > 0, beside, own)
    flat[rim] = own
    return framed[1:-1, 1:-1]


def _without_gaps(labels: Labels, count: int) -> tuple[Labels, npt.NDArray[np.bool_]]:
    """Renumber the labels that have pixels; tell which of 1..count those are."""
    present = np.zeros(count + 1, bool)
    # All but the smallest show in some rows and columns already.
    for step in (8, 4):
        present[labels[::step, ::step]] = True
        if present[1:].all():
            return labels, present[1:]
    runs = Runs.of(labels)
    present[runs.label] = True
    if present[1:].all():
        return labels, present[1:]
    present[0] = False
    numbers = np.where(present, np.cumsum(present), 0).astype(np.int32)
    return runs.drawn(numbers), present[1:]


def touches_border(labels: Labels, count: int) -> npt.NDArray[np.bool_]:
    """Tell which of the labels 1..count have a pixel in the outermost row or column: bool (n,)."""
    touching = np.zeros(count + 1, dtype=bool)
    for edge in (labels[0], labels[-1], labels[:, 0], labels[:, -1]):
        touching[edge] = True
    return touching[1:]
