"""What is found in one image: from the network's answer to mask, labels, measures and doubts."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

import cv2
import numpy as np
import numpy.typing as npt

from bcseg_batch.errors import PredictionError
from bcseg_batch.items import Flag
from bcseg_batch.segment.cells import CellKind, Cells, Parted, enlarge_cells, part_cells
from bcseg_batch.segment.measure import COLUMNS, UM_COLUMNS, measure_cells
from bcseg_batch.segment.placement import Segmented
from bcseg_batch.segment.postprocess import (
    mask_from_probability,
    mean_confidence,
    resize_probability,
)
from bcseg_batch.segment.quality import (
    TrainingStatistics,
    assess,
    mean_solidity,
    measure_light,
    measure_quality,
)
from bcseg_batch.segment.tiling import MIN_DIAMETER_PX, Band, typical_diameter_px

CELL_COLUMNS = (*COLUMNS, *UM_COLUMNS)
"""Measurements of a cell, in their order; those in micrometres need a pixel size."""

Bytes = npt.NDArray[np.uint8]


@dataclass(frozen=True, kw_only=True)  # no slots, which could not be joined with others
class AnalysisOptions:
    """What is looked for, and how.

    Attributes:
        threshold: a pixel is foreground where its probability is above it.
        class_names: one name for each channel of the network.
        cells: part, count and measure the cells.
        tiling: take images in tiles whose cells would be too small in one piece.
        probability: keep the probability at each pixel of the image.
        statistics: of the training images, to tell what is unlike them; None judges nothing by it.
    """

    threshold: float
    class_names: tuple[str, ...]
    cells: bool
    tiling: bool
    probability: bool = False
    statistics: TrainingStatistics | None


@dataclass(frozen=True, slots=True, eq=False)
class Rows:
    """Rows of an image, over its whole width, and what was found in them; or all of its rows.

    Attributes:
        pixels: uint8 (h, W, 3) RGB.
        mask: uint8 (h, W), 0 or 255.
        labels: int32 (h, W), 0 background; None where cells are not looked for.
        probability: float32 (h, W) in [0, 1]; None where it is not kept.
        above: int32 (1, W), the labels of the row above the first one; None at the top.
    """

    pixels: Bytes
    mask: Bytes
    labels: npt.NDArray[np.int32] | None = None
    probability: npt.NDArray[np.float32] | None = None
    above: npt.NDArray[np.int32] | None = None


@dataclass(frozen=True, slots=True, eq=False)
class Found:
    """The cells of an image.

    Attributes:
        kinds: uint8 (n,), `CellKind` of each, in the order of the labels.
        touches_border: bool (n,), whether the image's border cuts it.
        table: measurements, columns of n values.
    """

    kinds: npt.NDArray[np.uint8]
    touches_border: npt.NDArray[np.bool_]
    table: Mapping[str, npt.NDArray[np.generic]]

    @property
    def is_cell(self) -> npt.NDArray[np.bool_]:
        """Tell red and white cells from platelets: bool (n,)."""
        is_cell: npt.NDArray[np.bool_] = self.kinds != CellKind.PLATELET
        return is_cell

    @property
    def diameter_px(self) -> float | None:
        """Median of the red and white cells' equivalent diameters; None without such."""
        diameters = np.asarray(self.table["equivalent_diameter_area"], np.float64)[self.is_cell]
        return float(np.median(diameters)) if diameters.size else None

    @property
    def mean_solidity(self) -> float | None:
        """Of the cells that no border cuts; None without such."""
        solidity, area = (np.asarray(self.table[n], np.float64) for n in ("solidity", "area"))
        return mean_solidity(solidity, area, self.is_cell & ~self.touches_border)


@dataclass(frozen=True, slots=True, eq=False)
class Summary:
    """What is said of an image as a whole.

    Attributes:
        found: its cells; None where they are not looked for.
        foreground: share of the mask's pixels that are 255, in [0, 1].
        confidence: mean over the network's pixels of max(p, 1 - p), in [0.5, 1].
        flags: doubts about the result.
        tile_scale: network pixels per pixel of the image where it was taken in tiles.
    """

    found: Found | None
    foreground: float
    confidence: float
    flags: tuple[Flag, ...]
    tile_scale: float | None = None


@dataclass(frozen=True, slots=True)
class FirstLook:
    """The cells of the stretched image, and whether they can be trusted in that size.

    Attributes:
        parted: the cells at the network's size.
        diameter_px: of its typical cell there; None where that cannot be told.
    """

    parted: Parted
    diameter_px: float | None

    @property
    def is_too_coarse(self) -> bool:
        """Whether tiles have to be tried."""
        return self.diameter_px is None or self.diameter_px < MIN_DIAMETER_PX


def first_look(segmented: Segmented, options: AnalysisOptions) -> FirstLook:
    """Part the cells of the stretched image, and find how large they are.

    Args:
        segmented: what the network says of it.
        options: what is looked for.
    """
    parted = part_cells(segmented.soft, options.class_names, threshold=options.threshold)
    return FirstLook(parted, typical_diameter_px(parted))


def check_numbers(segmented: Segmented, image: str) -> None:
    """Refuse what is no probability.

    Args:
        segmented: what the network says.
        image: the name, for the error.

    Raises:
        PredictionError: the network gave something that is no number.
    """
    if not np.isfinite(segmented.soft).all():
        raise PredictionError(
            f"{image!r}: the network gave values that are not numbers: run it in float32"
        )


def analyse(
    pixels: Bytes,
    segmented: Segmented,
    options: AnalysisOptions,
    *,
    parted: Parted | None = None,
    pixel_size_um: float | None = None,
) -> tuple[Rows, Summary]:
    """Find what is in an image that was stretched in one piece.

    Args:
        pixels: uint8 (H, W, 3) RGB.
        segmented: what the network says of it.
        options: what is looked for.
        parted: its cells at the network's size, if they are at hand.
        pixel_size_um: side of a pixel, for the measurements.
    """
    shape_hw = pixels.shape[:2]
    soft, mask = segmented.soft, segmented.mask
    if mask is None or mask.shape != shape_hw:
        mask = mask_from_probability(soft[0], shape_hw, options.threshold)
    labels = found = None
    if options.cells:
        if parted is None:
            parted = part_cells(soft, options.class_names, threshold=options.threshold)
        cells = enlarge_cells(parted, mask > 0)
        labels = cells.labels
        table = measure_cells(cells, pixels, pixel_size_um=pixel_size_um)
        found = Found(cells.kinds, cells.touches_border, table)
    rows = Rows(
        pixels,
        mask,
        labels,
        resize_probability(soft[0], shape_hw) if options.probability else None,
    )
    foreground = cv2.countNonZero(mask) / mask.size
    flags: tuple[Flag, ...] = ()
    if found is not None:
        diameter_px = found.diameter_px
        if diameter_px is not None:
            diameter_px *= math.sqrt(soft[0].size / math.prod(shape_hw))
        measures = measure_quality(
            segmented.thumbnail,
            soft[0],
            diameter_px,
            solidity=found.mean_solidity,
            threshold=options.threshold,
        )
        flags = assess(measures, int(found.is_cell.sum()), options.statistics)
    return rows, Summary(found, foreground, mean_confidence(soft[0]), flags)


@dataclass(slots=True)
class BandSums:
    """Adds up what the bands of an image say, as they pass."""

    _foreground_px: int = 0
    _px: int = 0
    _confidence_sum: float = 0.0
    _confidence_px: int = 0
    _parts: list[tuple[npt.NDArray[np.int32], Found]] = field(default_factory=list)

    def over(self, bands: Iterator[Band]) -> Iterator[Rows]:
        """Give the rows of bands on, from top to bottom."""
        above = None
        for band in bands:
            self._foreground_px += band.foreground_px
            self._px += band.mask.size
            self._confidence_sum += band.confidence_sum
            self._confidence_px += band.confidence_px
            if band.table is not None and band.numbers.size:
                found = Found(band.kinds, band.touches_border, band.table)
                self._parts.append((band.numbers, found))
            yield Rows(band.pixels, band.mask, band.labels, band.probability, above)
            above = band.labels[-1:].copy()

    def summary(self, thumbnail: Bytes, options: AnalysisOptions, scale: float) -> Summary:
        """Sum up, after the last band.

        Args:
            thumbnail: uint8 (S, S, 3), the image stretched to the network's input.
            options: what was looked for.
            scale: of the tiles.
        """
        foreground = self._foreground_px / max(self._px, 1)
        found = self._found() if options.cells else None
        flags: tuple[Flag, ...] = ()
        if found is not None:
            measures = measure_light(thumbnail, foreground)
            flags = assess(measures, int(found.is_cell.sum()), options.statistics)
        confidence = self._confidence_sum / max(self._confidence_px, 1)
        return Summary(found, foreground, confidence, flags, scale)

    def _found(self) -> Found:
        """Give all cells, in the order of their labels."""
        if not self._parts:
            empty = np.zeros((1, 1), np.int32)
            none = Cells(empty, np.zeros(0, np.uint8), np.zeros(0, bool))
            table = measure_cells(none, np.zeros((1, 1, 3), np.uint8))
            return Found(none.kinds, none.touches_border, table)
        order = np.argsort(np.concatenate([numbers for numbers, _ in self._parts]))
        parts = [found for _, found in self._parts]
        return Found(
            np.concatenate([part.kinds for part in parts])[order],
            np.concatenate([part.touches_border for part in parts])[order],
            {
                name: np.concatenate([part.table[name] for part in parts])[order]
                for name in parts[0].table
            },
        )


def joined(parts: list[Rows]) -> Rows:
    """Put the rows of an image together that fits into memory.

    Args:
        parts: from top to bottom, one or more.
    """
    labels = [part.labels for part in parts if part.labels is not None]
    maps = [part.probability for part in parts if part.probability is not None]
    return Rows(
        np.concatenate([part.pixels for part in parts]),
        np.concatenate([part.mask for part in parts]),
        np.concatenate(labels) if labels else None,
        np.concatenate(maps) if maps else None,
    )
