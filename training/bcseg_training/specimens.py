"""Training images with their targets, from masks, from boxes and from the generator.

Each source says something different about its cells; here they are brought to one form, with a
weight of 0 wherever a source does not know.
"""

from __future__ import annotations

import csv
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np
import numpy.typing as npt
import tifffile
from scipy import ndimage

from bcseg_batch.errors import UsageError
from bcseg_batch.store.images import decode_image
from bcseg_training.dataset import MAX_PIXELS, Pair, read_pair
from bcseg_training.synthetic import Kind
from bcseg_training.voc import Box, BoxedImage, read_boxes

# The channels of target, weight and network, in this order.
CLASS_NAMES = ("cell", "core", "white_cell", "platelet")
CELL, CORE, WHITE, PLATELET = range(4)

# Specks of the annotation in masks of 1600x1200.
MIN_CELL_PX = 200
# Longest side that is kept: large enough to enlarge from, small enough to hold many.
MAX_SIDE_PX = 1024
# Share of an ellipse's radius from which a box may be looser than its cell.
LOOSE_FROM = 0.8

Bytes = npt.NDArray[np.uint8]
Labels = npt.NDArray[np.int32]


@dataclass(frozen=True, slots=True)
class Specimen:
    """One image with what is known of it.

    Attributes:
        image: uint8 (H, W, 3) RGB.
        target: uint8 (H, W, 4), 0..255 for 0..1, channels as `CLASS_NAMES`.
        weight: uint8 (H, W, 4), 0..255 for 0..1; 0 where the source does not know.
        diameter_px: median diameter of its cells (of a disc of equal area).
        background: float64 (3,), RGB of the empty slide, 0..255.
        density: median optical density of the cells against the background, mean of R, G, B.
    """

    image: Bytes
    target: Bytes
    weight: Bytes
    diameter_px: float
    background: npt.NDArray[np.float64]
    density: float


# --- measurements ---------------------------------------------------------------------------------


def background_colour(image: Bytes, cell: npt.NDArray[np.bool_]) -> npt.NDArray[np.float64]:
    """Measure the empty slide: the median colour of what is no cell, or the brightest tenth.

    Args:
        image: uint8 (H, W, 3).
        cell: bool (H, W).

    Returns:
        float64 (3,), 1..255.
    """
    empty = image[~cell]
    if len(empty) < 0.02 * cell.size:
        grey = image.mean(axis=2)
        empty = image[grey >= np.percentile(grey, 90)]
    colour: npt.NDArray[np.float64] = np.maximum(np.median(empty, axis=0), 1.0)
    return colour


def optical_density(image: Bytes, background: npt.NDArray[np.float64]) -> npt.NDArray[np.float32]:
    """Beer-Lambert density against the empty slide, mean of the channels: float32 (H, W), >= 0."""
    light = (image.astype(np.float32) + 1) / (background.astype(np.float32) + 1)
    density: npt.NDArray[np.float32] = np.maximum(-np.log(light).mean(axis=2), np.float32(0))
    return density


def looks_stained(image: Bytes) -> npt.NDArray[np.bool_]:
    """Tell stained from empty slide by Otsu's threshold on the green channel, holes filled.

    Green is where haemoglobin and the dyes of all common stains absorb.

    Args:
        image: uint8 (H, W, 3) RGB.

    Returns:
        bool (H, W).
    """
    green = cv2.GaussianBlur(image[:, :, 1], (0, 0), 1.5)
    _, stained = cv2.threshold(green, 0, 255, cv2.THRESH_BINARY_INV + cv2.THRESH_OTSU)
    # A hole is a piece of the empty slide that does not reach the border.
    _, pieces = cv2.connectedComponents(255 - stained, connectivity=4)
    outside = np.zeros(int(pieces.max()) + 1, dtype=bool)
    for edge in (pieces[0], pieces[-1], pieces[:, 0], pieces[:, -1]):
        outside[edge] = True
    outside[0] = False
    filled: npt.NDArray[np.bool_] = ~outside[pieces]
    return filled


def median_diameter_px(labels: Labels) -> float:
    """Median diameter of the discs that have the labels' areas; 0 where there is no label."""
    areas = np.bincount(labels.ravel())[1:]
    areas = areas[areas > 0]
    return float(np.median(np.sqrt(4 / np.pi * areas))) if areas.size else 0.0


def core_of(labels: Labels) -> npt.NDArray[np.bool_]:
    """Mark the inner half of each label: where the distance to its edge exceeds half its largest.

    Two labels that touch have an edge between them. The image's border is no edge.

    Args:
        labels: int32 (H, W), 0 background.

    Returns:
        bool (H, W).
    """
    core = np.zeros(labels.shape, dtype=bool)
    present = np.unique(labels[labels > 0])
    windows = ndimage.find_objects(labels)
    for index in present.tolist():
        window = windows[index - 1]
        inside = labels[window] == index
        sides = [
            (int(part.start > 0), int(part.stop < length))
            for part, length in zip(window, labels.shape, strict=True)
        ]
        padded = np.pad(np.pad(inside, sides), [(1 - a, 1 - b) for a, b in sides], mode="edge")
        distance = cv2.distanceTransform(padded.astype(np.uint8), cv2.DIST_L2, 5)
        distance = distance[1:-1, 1:-1]
        core[window] |= distance > 0.5 * distance.max(initial=0.0)
    return core


# --- one source each ------------------------------------------------------------------------------


def from_mask(image: Bytes, truth: npt.NDArray[np.bool_]) -> Specimen:
    """Make a specimen of a photograph and a binary mask whose cells are parted.

    Cells are the connected components of the mask. Unknown, and so without weight: what looks
    stained in a frame of 10 % but is no cell in the mask (cells cut by the border are often left
    out there), which of the large cells are white, and where the platelets are.

    Args:
        image: uint8 (H, W, 3).
        truth: bool (H, W).
    """
    labels = components(truth, min_px=MIN_CELL_PX)
    cell = labels > 0
    areas = np.bincount(labels.ravel(), minlength=2).astype(np.float64)
    areas[0] = 0
    shape = cell.shape
    target = np.zeros((*shape, 4), np.uint8)
    target[:, :, CELL] = cell * np.uint8(255)
    target[:, :, CORE] = core_of(labels) * np.uint8(255)
    weight = np.full((*shape, 4), 255, np.uint8)
    omitted = _frame(shape) & looks_stained(image) & ~cell
    # The rim of a cell that is in the mask looks stained too; it is known.
    near = cv2.dilate(cell.astype(np.uint8), np.ones((15, 15), np.uint8)) > 0
    omitted &= ~near
    weight[omitted] = 0
    ordinary = areas < 1.4 * np.median(areas[1:]) if areas.size > 1 else areas < 0
    weight[:, :, WHITE][~ordinary[labels] & cell] = 0
    weight[:, :, PLATELET][~cell] = 0
    return _specimen(image, target, weight, labels)


def components(mask: npt.NDArray[np.bool_], *, min_px: int) -> Labels:
    """Number the connected components (by edges) of at least `min_px`: int32 (H, W)."""
    _, labels, stats, _ = cv2.connectedComponentsWithStats(mask.astype(np.uint8), connectivity=4)
    keep = stats[:, cv2.CC_STAT_AREA] >= min_px
    keep[0] = False
    numbers = np.where(keep, np.cumsum(keep), 0).astype(np.int32)
    kept: Labels = numbers[labels]
    return kept


def _frame(shape_hw: tuple[int, int], share: float = 0.1) -> npt.NDArray[np.bool_]:
    frame = np.ones(shape_hw, dtype=bool)
    y, x = (round(share * side) for side in shape_hw)
    frame[y:-y, x:-x] = False
    return frame


def ellipse_labels(
    boxes: Sequence[Box], shape_hw: tuple[int, int]
) -> tuple[Labels, npt.NDArray[np.float32]]:
    """Draw the ellipse inscribed in each box; where two overlap a pixel goes to the nearer middle.

    Args:
        boxes: box i becomes label i + 1.
        shape_hw: of the image.

    Returns:
        Labels int32 (H, W), and float32 (H, W) the distance from the middle of the pixel's own
        ellipse as a share of its radius, infinite outside.
    """
    labels = np.zeros(shape_hw, np.int32)
    radius = np.full(shape_hw, np.inf, np.float32)
    for number, box in enumerate(boxes, start=1):
        window = (slice(box.top, box.bottom), slice(box.left, box.right))
        y, x = np.ogrid[window]
        across = (x + 0.5 - (box.left + box.right) / 2) / (box.width_px / 2)
        down = (y + 0.5 - (box.top + box.bottom) / 2) / (box.height_px / 2)
        r = np.hypot(across, down).astype(np.float32)[: shape_hw[0], : shape_hw[1]]
        nearer = (r <= 1) & (r < radius[window])
        labels[window][nearer] = number
        radius[window][nearer] = r[nearer]
    return labels, radius


def from_boxes(image: Bytes, boxes: Sequence[Box], white: npt.NDArray[np.bool_] | None) -> Specimen:
    """Make a specimen of a photograph with boxes.

    A red cell becomes the ellipse inscribed in its box, a white cell its mask where there is one,
    else an ellipse too, a platelet an ellipse. Left out of the loss: what looks stained and lies in
    no ellipse (cells without a box are many; the rim of one with a tight box), and the outer fifth
    of an ellipse where it does not look stained, for many boxes are loose; further in, unstained
    counts a third (a pale middle).
    The ellipse of a box that the border cuts is wrong: there only what ellipse and stain agree on
    counts, and nothing is said of the core.

    Args:
        image: uint8 (H, W, 3).
        boxes: its boxes.
        white: bool (H, W), pixels of white cells, or None where they are not known.
    """
    shape = (image.shape[0], image.shape[1])
    boxes = [b for b in boxes if b.left < shape[1] - 3 and b.top < shape[0] - 3]
    cells = [box for box in boxes if box.kind != Kind.PLATELET]
    labels, radius = ellipse_labels(cells, shape)
    is_white = np.array([False, *(box.kind == Kind.WHITE_CELL for box in cells)])
    cut = np.array([False, *(box.touches_border(shape) for box in cells)])
    core = radius < 0.5
    known_white = white is not None and bool(white.any())
    if known_white:
        assert white is not None
        labels, core = _with_white_mask(labels, core, cells, white)
    white_pixels = is_white[labels]
    stained = looks_stained(image)
    platelets, _ = ellipse_labels([b for b in boxes if b.kind == Kind.PLATELET], shape)
    platelet = (platelets > 0) & (labels == 0)
    cell = labels > 0

    target = np.zeros((*shape, 4), np.uint8)
    for channel, plane in ((CELL, cell), (CORE, core), (WHITE, white_pixels), (PLATELET, platelet)):
        target[:, :, channel] = plane * np.uint8(255)
    weight = np.full((*shape, 4), 255, np.uint8)
    edge = cv2.dilate(cell.astype(np.uint8), np.ones((7, 7), np.uint8)) > 0
    # A thin rim of stain around an ellipse is the box's want of precision, not another cell.
    weight[stained & ~edge & ~platelet] = 0
    rim = stained & edge & ~cell
    loose = cell & ~stained & ~white_pixels
    weight[:, :, CELL][loose] = 85
    # Taught as cell, loose rims made every mask too wide, those of the other sources as well;
    # tight ones, taught as background, made them too narrow. Where an edge is, others know better.
    weight[:, :, CELL][rim | (loose & (radius > LOOSE_FROM))] = 0
    in_cut = cut[labels]
    weight[:, :, CELL][in_cut & (cell != stained)] = 0
    weight[:, :, CORE][in_cut] = 0
    return _specimen(image, target, weight, labels)


def _with_white_mask(
    labels: Labels,
    core: npt.NDArray[np.bool_],
    cells: Sequence[Box],
    white: npt.NDArray[np.bool_],
) -> tuple[Labels, npt.NDArray[np.bool_]]:
    """Let the white cells' own mask take the place of their ellipses, within their boxes."""
    labels, core = labels.copy(), core.copy()
    for number, box in enumerate(cells, start=1):
        if box.kind != Kind.WHITE_CELL:
            continue
        window = (slice(box.top, box.bottom), slice(box.left, box.right))
        inside = white[window]
        if inside.mean() < 0.2:  # not this cell: its mask is missing
            continue
        own = labels == number
        labels[own] = 0
        core[own] = False
        labels[window][inside] = number
        alone = np.where(labels == number, np.int32(1), np.int32(0))
        core[labels == number] = False
        core |= core_of(alone)
    return labels, core


def from_labels(image: Bytes, labels: Labels, kinds: npt.NDArray[np.uint8]) -> Specimen:
    """Make a specimen of a picture whose truth is complete, as the generator's.

    Args:
        image: uint8 (H, W, 3).
        labels: int32 (H, W).
        kinds: uint8 (n,), the `Kind` of label i + 1 at index i.
    """
    kind = np.concatenate([[np.uint8(0)], kinds])[labels]
    cells = np.where((kind == Kind.RED_CELL) | (kind == Kind.WHITE_CELL), labels, np.int32(0))
    target = np.zeros((*labels.shape, 4), np.uint8)
    planes = ((CELL, cells > 0), (CORE, core_of(cells)), (WHITE, kind == Kind.WHITE_CELL))
    for channel, plane in (*planes, (PLATELET, kind == Kind.PLATELET)):
        target[:, :, channel] = plane * np.uint8(255)
    weight = np.full((*labels.shape, 4), 255, np.uint8)
    return _specimen(image, target, weight, cells)


def _specimen(image: Bytes, target: Bytes, weight: Bytes, labels: Labels) -> Specimen:
    """Measure, and shrink to `MAX_SIDE_PX`."""
    cell = labels > 0
    few = (slice(None, None, 3), slice(None, None, 3))  # enough for a median
    background = background_colour(image[few], (cell | (weight[:, :, CELL] == 0))[few])
    inside = optical_density(image[few], background)[cell[few]]
    scale = min(1.0, MAX_SIDE_PX / max(cell.shape))
    diameter_px = median_diameter_px(labels) * scale
    if scale < 1:
        size_wh = (round(cell.shape[1] * scale), round(cell.shape[0] * scale))
        image, target, weight = (
            cv2.resize(array, size_wh, interpolation=cv2.INTER_AREA)
            for array in (image, target, weight)
        )
    return Specimen(
        np.ascontiguousarray(image),
        target,
        weight,
        diameter_px or 60.0,
        background,
        float(np.median(inside)) if inside.size else 0.2,
    )


# --- disk -----------------------------------------------------------------------------------------


def read_masked(pair: Pair) -> Specimen:
    """Read an original and its mask.

    Raises:
        UsageError: one of them cannot be used, or they differ in size.
    """
    image, mask = read_pair(pair)
    return from_mask(image, mask > 127)


def read_boxed(item: BoxedImage) -> Specimen:
    """Read an image with its boxes and, where there is one, the mask of its white cells.

    Raises:
        ImageError: a picture cannot be used.
        UsageError: the boxes cannot be read.
    """
    image = decode_image(item.image, max_pixels=MAX_PIXELS).pixels
    white = None
    if item.white_mask is not None:
        # Some masks are JPEG-like greys around 0: cytoplasm is about 155, nucleus 255.
        white = decode_image(item.white_mask, max_pixels=MAX_PIXELS).pixels.max(axis=2) > 80
        if white.shape != image.shape[:2]:
            white = None
    return from_boxes(image, read_boxes(item.annotation), white)


def read_synthetic(folder: Path, stem: str) -> Specimen:
    """Read one smear that `bcseg-train synth` wrote.

    Raises:
        ImageError: the picture cannot be used.
        UsageError: labels or kinds are missing.
    """
    image = decode_image(folder / "original" / f"{stem}.jpg", max_pixels=MAX_PIXELS).pixels
    labels, kinds = read_labels(folder, stem)
    return from_labels(image, labels, kinds)


def read_labels(folder: Path, stem: str) -> tuple[Labels, npt.NDArray[np.uint8]]:
    """Read the truth that `bcseg-train synth` wrote: labels int32 (H, W), kinds uint8 (n,).

    Raises:
        UsageError: a file is missing or is not what the generator writes.
    """
    try:
        labels = tifffile.imread(folder / "labels" / f"{stem}.tif").astype(np.int32)
        with (folder / "kinds" / f"{stem}.csv").open(newline="", encoding="utf-8") as file:
            kinds = [Kind[row["kind"].upper()] for row in csv.DictReader(file)]
    except (OSError, KeyError, ValueError) as error:
        raise UsageError(
            f"{folder} has no labels and kinds for {stem} ({error}): make it with bcseg-train synth"
        ) from error
    return labels, np.array(kinds, dtype=np.uint8)
