"""Large images, and small cells: overlapping tiles at a fitting scale instead of one stretch.

An image that is stretched to the network's square loses its cells where they become too small for
the network. Such an image is scaled evenly, so that a typical cell is as large as the network knows
it best, and goes through the network in tiles that overlap. The whole work is done going down the
image in bands, so that memory depends on its width alone.

Three pixels are spoken of: those of the image; those of the network (`scale` of them to a pixel of
the image); and `first pass` means the whole image stretched to one input of the network.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import cv2
import numpy as np
import numpy.typing as npt
from PIL import Image
from scipy import ndimage

from bcseg_batch.errors import PredictionError
from bcseg_batch.segment.cells import (
    CellKind,
    Cells,
    Parted,
    enlarge_labels,
    find_cells,
    part_cells,
)
from bcseg_batch.segment.measure import measure_cells
from bcseg_batch.segment.postprocess import MASK_FOREGROUND, probability, resize_probability
from bcseg_batch.segment.preprocess import to_network_input

Pixels = npt.NDArray[np.uint8]
Floats = npt.NDArray[np.float32]
Labels = npt.NDArray[np.int32]
Predict = Callable[[Floats], Floats]
Progress = Callable[[int, int], None]

# The typical cell at the network's size from which a stretched image is good enough. Measured on
# bbbc041seg/val mirrored outwards, with the diameters as the network finds them: 33 px (true 32)
# cost 0.002 of Dice, 28 px (26) 0.012, 27 px (24) 0.020, 25 px (21) 0.056, 24 px (19) 0.092.
MIN_DIAMETER_PX = 26.0
# Where the network is best on those images, and what a tile is scaled for.
TARGET_DIAMETER_PX = 36.0
# A probe whose typical cell lies between MIN_DIAMETER_PX and this tells its size well.
_PROBE_DIAMETER_PX = 60.0
# A pass is believed where cells this sure on average have at least this share of all cells' area:
# too small cells run together into patches that look large, but that the network is unsure of.
SURE_MEAN = 0.85
SURE_SHARE = 0.5
# Fewer sure cells than this tell a typical size only if they cover this share of the picture.
_FEW_CELLS = 3
_FEW_CELLS_COVER = 0.05

MAX_SCALE = 2.0
"""Pixels that were never photographed are invented no further than this."""
MAX_TILES = 4096
"""No image takes more tiles: a coarser scale is taken instead."""
_PROBE_SCALES = 4
_PROBE_WINDOWS = 3
# A window whose green values span less has nothing in it.
_BLANK_SPAN = 12
_BLACK = 25
# Tiling is worth its price from this gain in scale.
_LEAST_GAIN = 1.15

# Scales are multiples of 1 / 64, so that bands end on whole pixels of both the image and the
# network, and each band is resized exactly as the whole would be.
_STEPS = 64
# Shares of the network's input: overlap of two tiles; core and margin of the blocks in which cells
# are parted. The margin is more than half of any cell; core and margins together are the input that
# the parting is tuned on, whose shares of the area (for holes) and medians (for specks) they keep.
_OVERLAP_SHARE = 1 / 4
_CORE_SHARE = 5 / 8
_MARGIN_SHARE = 3 / 16
# Rows of the network that the outline of a cell may depend on, or reach beyond its coarse label.
_REACH_PX = 4
_BAND_PX = 2**22
_READ_BYTES = 2**24


class Raster(Protocol):
    """An image that is read by windows."""

    @property
    def shape_hw(self) -> tuple[int, int]:
        """Height and width in pixels."""
        ...

    def read(self, top: int, bottom: int, left: int, right: int) -> Pixels:
        """Read rows top..bottom - 1 and columns left..right - 1: uint8 (h, w, 3) RGB."""
        ...


class ArrayRaster:
    """An image in memory.

    Args:
        pixels: uint8 (H, W, 3) RGB.
    """

    def __init__(self, pixels: Pixels) -> None:
        self._pixels = pixels

    @property
    def shape_hw(self) -> tuple[int, int]:
        """Height and width in pixels."""
        height_px, width_px = self._pixels.shape[:2]
        return height_px, width_px

    def read(self, top: int, bottom: int, left: int, right: int) -> Pixels:
        """Give a window of the array, not a copy: uint8 (h, w, 3) RGB."""
        return self._pixels[top:bottom, left:right]


@dataclass(frozen=True, slots=True)
class Band:
    """Rows of the image that are done, over its whole width, and the cells that end in them.

    Attributes:
        top: first row.
        bottom: row after the last; the next band begins there.
        pixels: uint8 (h, W, 3) RGB of the image.
        mask: uint8 (h, W), 0 or 255.
        labels: int32 (h, W), 0 background. Numbers are given in the order in which bands meet the
            cells, so that after the last band they are 1..n without a gap; a number once given
            means the same cell in all bands, and each has at least one pixel.
        numbers: int32 (k,), ascending, the labels of the cells whose last pixel is in this band or
            before. Over all bands each label comes once.
        kinds: uint8 (k,), their `CellKind`.
        touches_border: bool (k,), whether the border of the image cuts them.
        table: their measurements, columns of k values as `measure_cells` names them, positions in
            pixels of the whole image; None where none were asked for.
        confidence_sum: of max(p, 1 - p) over the network's pixels of the band.
        confidence_px: how many these are; both summed over all bands give the mean confidence.
        foreground_px: pixels of the mask that are 255.
        probability: float32 (h, W) in [0, 1] of channel 0; None where it is not asked for.
    """

    top: int
    bottom: int
    pixels: Pixels
    mask: Pixels
    labels: Labels
    numbers: Labels
    kinds: npt.NDArray[np.uint8]
    touches_border: npt.NDArray[np.bool_]
    table: Mapping[str, npt.NDArray[np.generic]] | None
    confidence_sum: float
    confidence_px: int
    foreground_px: int
    probability: Floats | None = None


# The scale -----------------------------------------------------------------------------------


def typical_diameter_px(parted: Parted) -> float | None:
    """Find how large the typical cell of a pass is, if the pass can be believed.

    Args:
        parted: the cells of the pass.

    Returns:
        Diameter in the network's pixels of the circle of the area-weighted median cell; None where
        there are hardly any cells, or most are too doubtful to tell.
    """
    return _typical([_sized_cells(parted)], parted.mask.size)


def _sized_cells(parted: Parted) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.bool_]]:
    """Give the area of each cell, and whether the network is sure of it."""
    return parted.areas.astype(np.float64), parted.means(parted.probability) >= SURE_MEAN


def _typical(
    passes: Sequence[tuple[npt.NDArray[np.float64], npt.NDArray[np.bool_]]], all_px: int
) -> float | None:
    """Put passes at one scale together; None where they cannot be believed."""
    areas = np.concatenate([areas for areas, _ in passes])
    sure = np.sort(areas[np.concatenate([sure for _, sure in passes])])
    few = sure.size < _FEW_CELLS and sure.sum() < _FEW_CELLS_COVER * all_px
    if few or sure.size == 0 or sure.sum() < SURE_SHARE * areas.sum():
        return None
    # Over area, not over cells: as in `cells.py`, many specks must not become the typical cell.
    median = sure[np.searchsorted(np.cumsum(sure), sure.sum() / 2)]
    return float(2 * math.sqrt(median / math.pi))


def choose_scale(
    raster: Raster,
    first_pass_diameter_px: float | None,
    predict: Predict,
    class_names: Sequence[str],
    *,
    threshold: float = 0.5,
    batch_size: int = 1,
    input_size_px: int = 512,
    thumbnail: Pixels | None = None,
) -> float | None:
    """Decide whether an image is taken in tiles, and at which scale.

    Where the first pass did not show cells of a good size, a few windows with most structure are
    tried at finer scales: at the one that the first pass suggests, else doubled from scale to
    scale, until their typical cell is of a size that can be believed. At most 4 scales of 3
    windows are tried.

    Args:
        raster: the image.
        first_pass_diameter_px: `typical_diameter_px` of the whole image stretched to the network's
            input.
        predict: maps float32 (N, 3, S, S) in [0, 1] to float32 logits (N, C, S, S).
        class_names: one name for each of the C channels.
        threshold: a pixel is a cell above it.
        batch_size: the most windows that `predict` is given at once.
        input_size_px: S.
        thumbnail: uint8 (S', S', 3), the image stretched to a square, if it is at hand.

    Returns:
        Pixels of the network to a pixel of the image, a multiple of 1 / 64; None where the ordinary
        stretch is right, or nothing was found at any scale.

    Raises:
        PredictionError: the network gave something that is no number.
    """
    if first_pass_diameter_px is not None and first_pass_diameter_px >= MIN_DIAMETER_PX:
        return None
    height_px, width_px = raster.shape_hw
    stretched = input_size_px / math.sqrt(height_px * width_px)
    finest = _finest_scale(raster.shape_hw, input_size_px)
    if finest < _LEAST_GAIN * stretched:
        return None
    # From a gigapixel the finest scale is more than four doublings away.
    step = max(2.0, (finest / stretched) ** (1 / _PROBE_SCALES))
    structure = _structure(stretch(raster, input_size_px) if thumbnail is None else thumbnail)
    found = first_pass_diameter_px
    scale = stretched
    for _ in range(_PROBE_SCALES):
        if scale >= finest and (found is None or found <= TARGET_DIAMETER_PX):
            # Nothing finer is left to try: better a little too small than stretched.
            break
        scale = min(finest, scale * (step if found is None else TARGET_DIAMETER_PX / found))
        windows = [
            _read_scaled(raster, corner, scale, input_size_px)
            for corner in _probe_corners(structure, raster.shape_hw, input_size_px / scale)
        ]
        windows = [window for window in windows if not _is_blank(window)]
        passes = [
            _sized_cells(part_cells(soft, class_names, threshold=threshold))
            for soft in _predict_windows(windows, predict, batch_size)
        ]
        found = _typical(passes, len(passes) * input_size_px**2) if passes else None
        if found is not None and MIN_DIAMETER_PX <= found <= _PROBE_DIAMETER_PX:
            break
    else:
        found = None  # one scale contradicts the other: these are no cells
    if found is None:
        return None
    wanted = min(finest, scale * TARGET_DIAMETER_PX / found)
    steps = max(1, math.floor(wanted * _STEPS + 0.5))
    while steps > 1 and tile_count(raster.shape_hw, steps / _STEPS, input_size_px) > MAX_TILES:
        steps -= 1
    return steps / _STEPS if steps / _STEPS >= _LEAST_GAIN * stretched else None


def tile_count(shape_hw: tuple[int, int], scale: float, input_size_px: int = 512) -> int:
    """Tell how many tiles an image of that size takes at that scale."""
    rows, columns = _Grid.of(shape_hw, scale, input_size_px).tile_starts
    return len(rows) * len(columns)


def _finest_scale(shape_hw: tuple[int, int], input_size_px: int) -> float:
    """The finest scale that is allowed for an image of that size."""
    stride_px = input_size_px * (1 - _OVERLAP_SHARE)
    return min(MAX_SCALE, stride_px * math.sqrt(MAX_TILES / (shape_hw[0] * shape_hw[1])))


def _structure(thumbnail: Pixels) -> Floats:
    """Show where cells may be: float32 (S', S'), larger where there is stain and fine structure.

    Both are capped, so that a clot or the edge of a shadow is no better than many cells; what is
    black lies outside the aperture.
    """
    green = thumbnail[..., 1].astype(np.float32)
    stain = np.clip(np.percentile(green, 95) - green, 0, None)
    fine = np.abs(green - cv2.GaussianBlur(green, (0, 0), 3.0))
    cap = max(np.percentile(stain, 90), _BLANK_SPAN / 2)
    structure = np.minimum(stain, cap) + np.minimum(fine, cap) / 2
    return np.where(green < _BLACK, np.float32(0), structure.astype(np.float32))


def _probe_corners(
    structure: Floats, shape_hw: tuple[int, int], side_px: float
) -> list[tuple[float, float]]:
    """Choose where to look: the windows with most structure that do not overlap.

    Args:
        structure: float32 (S', S'), of the image stretched to a square.
        shape_hw: of the image.
        side_px: of a window, in pixels of the image.

    Returns:
        (top, left) of up to 3 windows, in pixels of the image, the best first.
    """
    size_px = structure.shape[0]
    height, width = (min(size_px, max(1, round(side_px * size_px / side))) for side in shape_hw)
    sums = cv2.boxFilter(structure, cv2.CV_32F, (width, height), anchor=(0, 0), normalize=False)
    sums = sums[: size_px - height + 1, : size_px - width + 1]
    corners = []
    for _ in range(_PROBE_WINDOWS):
        top, left = np.unravel_index(int(sums.argmax()), sums.shape)
        if sums[top, left] < 0:
            break
        sums[max(0, top - height + 1) : top + height, max(0, left - width + 1) : left + width] = -1
        corners.append(
            (
                max(0.0, min(top * shape_hw[0] / size_px, shape_hw[0] - side_px)),
                max(0.0, min(left * shape_hw[1] / size_px, shape_hw[1] - side_px)),
            )
        )
    return corners


@dataclass(frozen=True, slots=True)
class _Cut:
    """A window of a raster, as a raster."""

    raster: Raster
    corner: tuple[int, int]
    shape_hw: tuple[int, int]

    def read(self, top: int, bottom: int, left: int, right: int) -> Pixels:
        y, x = self.corner
        return self.raster.read(y + top, y + bottom, x + left, x + right)


def _read_scaled(raster: Raster, corner: tuple[float, float], scale: float, size_px: int) -> Pixels:
    """Read one window at a scale, mirrored where the image is too small: uint8 (S, S, 3)."""
    top, left = (math.floor(start) for start in corner)
    height, width = (
        min(side, math.ceil(start + size_px / scale)) - math.floor(start)
        for start, side in zip(corner, raster.shape_hw, strict=True)
    )
    cut = _Cut(raster, (top, left), (height, width))
    rows, columns = (min(size_px, max(1, round(side * scale))) for side in (height, width))
    parts = _resized_rows(cut, 0, rows, (height / rows, width / columns), columns)
    return _mirrored(np.concatenate(list(parts)), (size_px, size_px))


def _is_blank(window: Pixels) -> bool:
    low, high = np.percentile(window[..., 1], (1, 99))
    return bool(high - low < _BLANK_SPAN)


def _predict_windows(
    windows: Sequence[Pixels], predict: Predict, batch_size: int
) -> Iterator[Floats]:
    """Run the network on uint8 (S, S, 3) windows; gives float32 (C, S, S) in [0, 1] for each.

    Raises:
        PredictionError: the network gave something that is no number.
    """
    for start in range(0, len(windows), batch_size):
        part = windows[start : start + batch_size]
        logits = predict(np.stack([to_network_input(window) for window in part]))
        if not np.isfinite(logits).all():
            raise PredictionError("the network gave values that are not numbers: run it in float32")
        yield from probability(logits)


# Pixels of the network -----------------------------------------------------------------------


def stretch(raster: Raster, size_px: int) -> Pixels:
    """Stretch the whole image to a square, as `preprocess.resize_rgb` does, reading it by bands.

    Args:
        raster: the image.
        size_px: side of the square.

    Returns:
        uint8 (size_px, size_px, 3) RGB.
    """
    height_px, width_px = raster.shape_hw
    factors = (height_px / size_px, width_px / size_px)
    rows = _resized_rows(raster, 0, size_px, factors, size_px)
    return np.concatenate(list(rows))


def _resized_rows(
    raster: Raster, top: int, bottom: int, factors_yx: tuple[float, float], width_px: int
) -> Iterator[Pixels]:
    """Resize rows of the image, a bounded part at a time, each as in the whole resized image.

    Args:
        raster: the image.
        top: first row wanted, of the resized image.
        bottom: row after the last.
        factors_yx: pixels of the image to a pixel of the resized one.
        width_px: of the resized image.

    Yields:
        uint8 (h, width_px, 3): pieces from top to bottom. Beyond its end the image repeats its
        last row and column.
    """
    factor_y, factor_x = factors_yx
    image_h, image_w = raster.shape_hw
    step = max(1, int(_READ_BYTES / (3 * image_w * factor_y)))
    # Pillow's filter reaches this far, and uses what lies outside the box as well.
    reach_px = max(1.0, factor_y)
    for start in range(top, bottom, step):
        end = min(bottom, start + step)
        first = max(0, math.floor(start * factor_y - reach_px))
        last = min(image_h, math.ceil(end * factor_y + reach_px))
        box = (0.0, start * factor_y - first, width_px * factor_x, end * factor_y - first)
        window = raster.read(first, last, 0, image_w)
        missing = [max(0, math.ceil(box[3]) - (last - first)), math.ceil(box[2]) - image_w]
        if any(missing):
            window = np.pad(window, ((0, missing[0]), (0, missing[1]), (0, 0)), mode="edge")
        image = Image.fromarray(np.ascontiguousarray(window))
        yield np.asarray(image.resize((width_px, end - start), Image.Resampling.BILINEAR, box=box))


def _mirrored(window: Pixels, shape_hw: tuple[int, int]) -> Pixels:
    """Mirror a window downwards and to the right up to a size."""
    height, width = (shape_hw[i] - window.shape[i] for i in (0, 1))
    if not height and not width:
        return window
    return np.pad(window, ((0, height), (0, width), (0, 0)), mode="reflect")


def tile_starts(length_px: int, size_px: int, overlap_px: int) -> list[int]:
    """Lay tiles evenly along one side; those at the ends are shifted inwards.

    Args:
        length_px: of the side.
        size_px: of a tile.
        overlap_px: the least overlap of two neighbours.

    Returns:
        Where tiles begin, ascending; 0 alone where one tile is enough.
    """
    if length_px <= size_px:
        return [0]
    count = math.ceil((length_px - overlap_px) / (size_px - overlap_px))
    return [round(i * (length_px - size_px) / (count - 1)) for i in range(count)]


def blend_weights(starts: Sequence[int], size_px: int) -> Floats:
    """Weigh each tile along one side: a raised cosine, scaled so that all sum to 1 at each pixel.

    The weights of a tile are those of its row times those of its column.

    Args:
        starts: where tiles begin.
        size_px: of a tile.

    Returns:
        float32 (len(starts), size_px) in (0, 1].
    """
    bell = np.sin(np.pi * (np.arange(size_px) + 0.5) / size_px) ** 2
    total = np.zeros(starts[-1] + size_px)
    for start in starts:
        total[start : start + size_px] += bell
    return np.stack([bell / total[start : start + size_px] for start in starts]).astype(np.float32)


@dataclass(frozen=True, slots=True)
class _Grid:
    """How the pixels of an image and those of the network lie upon each other.

    Attributes:
        image_hw: of the image.
        work_hw: of the image at the network's scale; its last row and column may reach beyond.
        steps: the scale times 64.
        size_px: side of the network's input.
    """

    image_hw: tuple[int, int]
    work_hw: tuple[int, int]
    steps: int
    size_px: int

    @classmethod
    def of(cls, image_hw: tuple[int, int], scale: float, size_px: int) -> _Grid:
        """Lay the grid at the nearest scale that is a multiple of 1 / 64."""
        steps = max(1, math.floor(scale * _STEPS + 0.5))
        height, width = (math.ceil(side * steps / _STEPS) for side in image_hw)
        return cls(image_hw, (height, width), steps, size_px)

    @property
    def unit_px(self) -> int:
        """Pixels of the network after which both grids meet again."""
        return self.steps // math.gcd(self.steps, _STEPS)

    @property
    def tile_starts(self) -> tuple[list[int], list[int]]:
        """Where tiles begin, along rows and along columns."""
        overlap_px = round(_OVERLAP_SHARE * self.size_px)
        rows, columns = (tile_starts(side, self.size_px, overlap_px) for side in self.work_hw)
        return rows, columns

    def up(self, length_px: float) -> int:
        """Round a length up to where both grids meet."""
        return math.ceil(length_px / self.unit_px) * self.unit_px

    def image_row(self, row: int) -> int:
        """Give the row of the image in which a row of the network begins; at most the height."""
        return min(self.image_hw[0], row * _STEPS // self.steps)


@dataclass(slots=True)
class _Rows:
    """Consecutive rows of something, new ones below and old ones dropped above.

    Attributes:
        array: (C, capacity, W).
        top: the row that `array[:, 0]` is.
        bottom: row after the last.
    """

    array: npt.NDArray[Any]
    top: int = 0
    bottom: int = 0

    def view(self, top: int, bottom: int) -> npt.NDArray[Any]:
        """Rows top..bottom - 1: (C, h, W), not a copy."""
        assert self.top <= top <= bottom <= self.bottom
        return self.array[:, top - self.top : bottom - self.top]

    def extend_to(self, bottom: int) -> None:
        """Add rows of zeros below."""
        missing = bottom - self.top - self.array.shape[1]
        if missing > 0:
            more = np.zeros((len(self.array), missing, self.array.shape[2]), self.array.dtype)
            self.array = np.concatenate([self.array, more], axis=1)
        self.bottom = max(self.bottom, bottom)

    def drop_above(self, top: int) -> None:
        """Forget rows, and use their memory for those that come."""
        count = top - self.top
        if count <= 0:
            return
        kept = self.bottom - top
        for plane in self.array:  # one after the other: numpy copies what overlaps
            plane[:kept] = plane[count : count + kept]
            plane[kept:] = 0
        self.top = top


def _predict_rows(
    raster: Raster,
    grid: _Grid,
    predict: Predict,
    soft: _Rows,
    *,
    batch_size: int,
    on_progress: Progress | None,
) -> Iterator[int]:
    """Add the blended probability of one row of tiles after the other to `soft`.

    Yields:
        After each row of tiles the row of the network above which all is final.
    """
    size_px = grid.size_px
    rows, columns = grid.tile_starts
    down, along = blend_weights(rows, size_px), blend_weights(columns, size_px)
    height, width = grid.work_hw
    factor = _STEPS / grid.steps
    strip = np.zeros((0, width, 3), np.uint8)
    done, read_to = 0, 0
    for i, top in enumerate(rows):
        bottom = min(height, top + size_px)
        new = _resized_rows(raster, read_to, bottom, (factor, factor), width)
        strip = np.concatenate([strip[len(strip) - (read_to - top) :], *new])
        read_to = bottom
        soft.extend_to(bottom)
        rows_of_tiles = soft.view(top, bottom)
        windows = [
            _mirrored(strip[:, left : left + size_px], (size_px, size_px)) for left in columns
        ]
        for j, tile in enumerate(_predict_windows(windows, predict, batch_size)):
            part = rows_of_tiles[:, :, columns[j] : columns[j] + size_px]
            weights = np.multiply.outer(down[i], along[j])
            part += (tile * weights)[:, : part.shape[1], : part.shape[2]]
            done += 1
            if on_progress is not None:
                on_progress(done, len(rows) * len(columns))
        yield rows[i + 1] if i + 1 < len(rows) else height


# Cells ---------------------------------------------------------------------------------------


@dataclass(slots=True)
class _Finder:
    """Parts the cells at the network's size, block by block.

    A cell belongs to the block in whose core its centroid lies. The margin around the core shows
    each block its neighbours' cells whole. Should two blocks see a cell differently (each leaving
    it to the other, or both taking it), pixels decide: what is taken stays taken, and a cell that
    an earlier block should have taken but did not is taken later.

    Attributes:
        canvas: int32 rows of cells by a preliminary number, 1 for `kinds[1]`.
        settled: the row above which the canvas changes no more.
        kinds: `CellKind` by preliminary number; 0 stands for the background.
        spans: first row and row after the last, by preliminary number.
    """

    grid: _Grid
    class_names: Sequence[str]
    threshold: float
    canvas: _Rows
    settled: int = 0
    kinds: list[int] = field(default_factory=lambda: [0])
    spans: list[tuple[int, int]] = field(default_factory=lambda: [(0, 0)])
    _block_top: int = 0

    def advance(self, soft: _Rows, final: int) -> None:
        """Part the cells of all blocks whose rows are final, down to that row."""
        grid = self.grid
        height, width = grid.work_hw
        core_px = grid.up(_CORE_SHARE * grid.size_px)
        margin_px = grid.up(_MARGIN_SHARE * grid.size_px)
        while self.settled < height:
            top, bottom = self._block_top, min(height, self._block_top + core_px)
            reach = (max(0, top - margin_px), min(height, bottom + margin_px))
            if reach[1] > final:
                return
            self.canvas.extend_to(reach[1])
            for left in range(0, width, core_px):
                right = min(width, left + core_px)
                sides = (max(0, left - margin_px), min(width, right + margin_px))
                window = soft.view(*reach)[:, :, sides[0] : sides[1]]
                drawn = self.canvas.view(*reach)[0, :, sides[0] : sides[1]]
                core = (
                    slice(0 if top == 0 else top - reach[0], bottom - reach[0]),
                    slice(left - sides[0], right - sides[0]),
                )
                self._take(np.ascontiguousarray(window), drawn, core, (reach[0], sides[0]))
            self._block_top = bottom
            self.settled = height if bottom == height else bottom - margin_px

    def _take(
        self,
        window: Floats,
        drawn: Labels,
        core: tuple[slice, slice],
        corner: tuple[int, int],
    ) -> None:
        """Draw the cells of one block that are its own, or that should have been drawn before."""
        cells = find_cells(window, self.class_names, drawn.shape, threshold=self.threshold)
        labels, count = cells.labels, len(cells.kinds)
        if count == 0:
            return
        areas = np.bincount(labels.ravel(), minlength=count + 1)
        taken = np.bincount(labels[drawn > 0], minlength=count + 1)
        y, x = (
            np.bincount(labels.ravel(), where.ravel(), count + 1) / np.maximum(areas, 1)
            for where in np.indices(labels.shape, np.float32)
        )
        own = (y >= core[0].start) & (y < core[0].stop) & (x >= core[1].start) & (x < core[1].stop)
        later = (y >= core[0].stop) | ((y >= core[0].start) & (x >= core[1].stop))
        keep = (own | ~(later | self._is_cut(labels, count, corner))) & (2 * taken <= areas)
        keep[0] = False
        numbers = np.where(keep, np.cumsum(keep) + len(self.kinds) - 1, 0).astype(np.int32)
        free = keep[labels] & (drawn == 0)
        drawn[free] = numbers[labels[free]]
        self.kinds.extend(cells.kinds[keep[1:]].tolist())
        places = ndimage.find_objects(labels)
        self.spans.extend(
            (corner[0] + places[i][0].start, corner[0] + places[i][0].stop)
            for i in np.flatnonzero(keep[1:]).tolist()
        )

    def _is_cut(self, labels: Labels, count: int, corner: tuple[int, int]) -> npt.NDArray[np.bool_]:
        """Tell which labels 0..count the window cuts, where it does not end with the image."""
        height, width = labels.shape
        cut = np.zeros(count + 1, dtype=bool)
        if corner[0] > 0:
            cut[labels[0]] = True
        if corner[0] + height < self.grid.work_hw[0]:
            cut[labels[-1]] = True
        if corner[1] > 0:
            cut[labels[:, 0]] = True
        if corner[1] + width < self.grid.work_hw[1]:
            cut[labels[:, -1]] = True
        return cut


@dataclass(slots=True)
class _Bander:
    """Brings settled rows to the image's size, numbers the cells, and measures those that end.

    Attributes:
        done: row of the network down to which bands were given.
        numbers: final number by preliminary number, 0 where there is none yet.
        tail_labels: rows above `done` that cells which go on below have begun in.
        tail_pixels: the same rows of the image.
        open: preliminary numbers of the cells that go on below.
    """

    grid: _Grid
    raster: Raster
    finder: _Finder
    threshold: float
    measure: bool
    pixel_size_um: float | None
    probability: bool
    tail_labels: Labels
    tail_pixels: Pixels
    done: int = 0
    count: int = 0
    numbers: Labels = field(default_factory=lambda: np.zeros(1, np.int32))
    open: Labels = field(default_factory=lambda: np.zeros(0, np.int32))
    cut: npt.NDArray[np.bool_] = field(default_factory=lambda: np.zeros(1, bool))

    def give(self, soft: _Rows) -> Iterator[Band]:
        """Give bands of a bounded size down to the last row that can no longer change."""
        grid = self.grid
        height, width = grid.work_hw
        reach_px = grid.up(_REACH_PX)
        settled = self.finder.settled
        end = height if settled == height else (settled - reach_px) // grid.unit_px * grid.unit_px
        # A row of the network is so many pixels of the image, or of its own where these are more.
        row_px = max(grid.image_hw[1] * _STEPS / grid.steps, width)
        step = max(grid.unit_px, int(_BAND_PX / row_px) // grid.unit_px * grid.unit_px)
        while self.done < end:
            yield self._band(soft, self.done, min(end, self.done + step))

    def _band(self, soft: _Rows, top: int, bottom: int) -> Band:
        grid, finder = self.grid, self.finder
        probability, large = self._enlarged(soft, top, bottom)
        fine = probability > np.float32(self.threshold)
        mask = fine.view(np.uint8) * np.uint8(MASK_FOREGROUND)
        first, last = grid.image_row(top), grid.image_row(bottom)
        pixels = np.ascontiguousarray(self.raster.read(first, last, 0, grid.image_hw[1]))
        self._number(large, is_first=first == 0, is_last=last == grid.image_hw[0])
        labels = self.numbers[large]
        self.done = bottom
        ends = np.array([finder.spans[i][1] for i in self.open.tolist()], np.int64)
        ended = (ends + _REACH_PX <= bottom) | (bottom == grid.work_hw[0])
        finished, self.open = self.open[ended], self.open[~ended]
        finished = finished[np.argsort(self.numbers[finished])]
        kinds = np.array([finder.kinds[i] for i in finished.tolist()], np.uint8)
        numbers, border = self.numbers[finished], self.cut[finished]
        table = None
        if self.measure:
            cells = (numbers, kinds, border)
            table = self._measured(labels, pixels, first, cells)
        soft_mask = soft.view(top, bottom)[0]
        return Band(
            top=first,
            bottom=last,
            pixels=pixels,
            mask=mask,
            labels=labels,
            numbers=numbers,
            kinds=kinds,
            touches_border=border,
            table=table,
            confidence_sum=float(np.maximum(soft_mask, 1 - soft_mask).sum(dtype=np.float64)),
            confidence_px=soft_mask.size,
            foreground_px=int(np.count_nonzero(mask)),
            probability=probability if self.probability else None,
        )

    def _enlarged(self, soft: _Rows, top: int, bottom: int) -> tuple[Floats, Labels]:
        """Bring rows top..bottom - 1 to the image's size: probability, preliminary labels (h, W).

        The rows around them are enlarged with them and cut off, so that bands fit together.
        """
        grid, finder = self.grid, self.finder
        reach_px = grid.up(_REACH_PX)
        above, below = max(0, top - reach_px), min(grid.work_hw[0], bottom + reach_px)
        pad = ((0, grid.up(below) - below), (0, grid.up(grid.work_hw[1]) - grid.work_hw[1]))
        coarse = np.pad(soft.view(above, below)[0], pad, mode="edge")
        labels = np.pad(finder.canvas.view(above, below)[0], pad, mode="edge")
        shape_hw = (
            coarse.shape[0] * _STEPS // grid.steps,
            coarse.shape[1] * _STEPS // grid.steps,
        )
        enlarged = resize_probability(coarse, shape_hw)
        fine = enlarged > np.float32(self.threshold)
        platelet = (np.array(finder.kinds) == CellKind.PLATELET)[labels]
        large = enlarge_labels(np.where(platelet, np.int32(0), labels), fine)
        if platelet.any():
            # Platelets lie outside the mask, and keep their coarse outline, as in `find_cells`.
            only = np.where(platelet, labels, np.int32(0))
            only = cv2.resize(only, shape_hw[::-1], interpolation=cv2.INTER_NEAREST_EXACT)
            large = np.where(large == 0, only, large)
        skip = (top - above) * _STEPS // grid.steps
        rows = slice(skip, skip + grid.image_row(bottom) - grid.image_row(top))
        columns = slice(0, grid.image_hw[1])
        return np.ascontiguousarray(enlarged[rows, columns]), large[rows, columns]

    def _number(self, large: Labels, *, is_first: bool, is_last: bool) -> None:
        """Give numbers to the cells that these rows show first; see which the border cuts."""
        missing = len(self.finder.kinds) - len(self.numbers)
        self.numbers = np.pad(self.numbers, (0, missing))
        self.cut = np.pad(self.cut, (0, missing))
        present = np.bincount(large.ravel(), minlength=len(self.numbers)) > 0
        present[0] = False
        new = np.flatnonzero(present & (self.numbers == 0)).astype(np.int32)
        self.numbers[new] = np.arange(self.count + 1, self.count + 1 + new.size)
        self.count += new.size
        self.open = np.concatenate([self.open, new])
        edges = [large[:, 0], large[:, -1]]
        edges += [large[0]] * is_first + [large[-1]] * is_last
        for edge in edges:
            self.cut[edge] = True

    def _measured(
        self,
        labels: Labels,
        pixels: Pixels,
        top: int,
        cells: tuple[Labels, npt.NDArray[np.uint8], npt.NDArray[np.bool_]],
    ) -> Mapping[str, npt.NDArray[np.generic]]:
        """Measure the finished cells in the band and the tail, then make the next tail."""
        numbers, kinds, border = cells
        start = top - len(self.tail_labels)
        labels = np.concatenate([self.tail_labels, labels])
        pixels = np.concatenate([self.tail_pixels, pixels])
        local = np.zeros(self.count + 1, np.int32)
        local[numbers] = np.arange(1, numbers.size + 1)
        table = dict(
            measure_cells(
                Cells(local[labels], kinds, border), pixels, pixel_size_um=self.pixel_size_um
            )
        )
        table["label"] = numbers
        for name in ("centroid-0", "bbox-0", "bbox-2"):
            table[name] = np.asarray(table[name]) + start
        tops = [self.finder.spans[i][0] - _REACH_PX for i in self.open.tolist()]
        keep_from = self.grid.image_row(max(0, min(tops, default=self.done)))
        keep_from = min(max(keep_from, start), start + len(labels))
        self.tail_labels = labels[keep_from - start :].copy()
        self.tail_pixels = pixels[keep_from - start :].copy()
        return table


def segment_in_tiles(
    raster: Raster,
    scale: float,
    predict: Predict,
    class_names: Sequence[str],
    *,
    threshold: float = 0.5,
    batch_size: int = 1,
    input_size_px: int = 512,
    measure: bool = True,
    pixel_size_um: float | None = None,
    probability: bool = False,
    on_progress: Progress | None = None,
) -> Iterator[Band]:
    """Segment an image in tiles, from top to bottom.

    Memory is bounded by the width of the image: some 1,200 rows of the network's pixels with 4
    bytes for each channel, and bands of about 4 million pixels. Each row of the image is read
    twice, once for the network and later for its band.

    Args:
        raster: the image.
        scale: pixels of the network to a pixel of the image; rounded to a multiple of 1 / 64.
        predict: maps float32 (N, 3, S, S) in [0, 1] to float32 logits (N, C, S, S).
        class_names: one name for each of the C channels; channel 0 is the mask.
        threshold: a pixel is foreground above it.
        batch_size: the most tiles that `predict` is given at once.
        input_size_px: S.
        measure: whether to measure the cells.
        pixel_size_um: side of a pixel of the image, for the measurements.
        probability: give the enlarged probability with each band.
        on_progress: called after each tile with the number done and the number of all.

    Yields:
        Bands that follow upon each other and cover the image.

    Raises:
        PredictionError: the network gave something that is no number.
    """
    grid = _Grid.of(raster.shape_hw, scale, input_size_px)
    width_px = grid.work_hw[1]
    soft = _Rows(np.zeros((len(class_names), 0, width_px), np.float32))
    finder = _Finder(grid, class_names, threshold, _Rows(np.zeros((1, 0, width_px), np.int32)))
    bander = _Bander(
        grid,
        raster,
        finder,
        threshold,
        measure,
        pixel_size_um,
        probability,
        np.zeros((0, raster.shape_hw[1]), np.int32),
        np.zeros((0, raster.shape_hw[1], 3), np.uint8),
    )
    reach_px = grid.up(_REACH_PX)
    for final in _predict_rows(
        raster, grid, predict, soft, batch_size=batch_size, on_progress=on_progress
    ):
        finder.advance(soft, final)
        yield from bander.give(soft)
        needed = max(0, bander.done - reach_px)
        soft.drop_above(needed)
        finder.canvas.drop_above(min(needed, finder.canvas.bottom))
