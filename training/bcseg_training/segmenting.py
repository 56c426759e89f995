"""Segments one image as the product does, and as was done before there were networks."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import cv2
import numpy as np
import numpy.typing as npt

from bcseg_batch.errors import PredictionError
from bcseg_batch.segment.cells import (
    CellKind,
    Cells,
    enlarge_cells,
    enlarge_labels,
    fill_holes,
    part_cells,
    separate,
)
from bcseg_batch.segment.checkpoint import Checkpoint
from bcseg_batch.segment.placement import AnyPredictor
from bcseg_batch.segment.postprocess import mask_from_probability, probability
from bcseg_batch.segment.preprocess import preprocess
from bcseg_batch.segment.tiling import (
    ArrayRaster,
    choose_scale,
    segment_in_tiles,
    typical_diameter_px,
)

Bytes = npt.NDArray[np.uint8]


@dataclass(frozen=True, slots=True)
class Segmented:
    """What was found in one image.

    Attributes:
        mask: bool (H, W).
        cells: at the image's size.
        soft: float32 (S, S) in [0, 1], probability of a cell; None where the image was taken in
            tiles, or where there is no network.
        tile_scale: of the tiles; None where it was stretched in one piece.
    """

    mask: npt.NDArray[np.bool_]
    cells: Cells
    soft: npt.NDArray[np.float32] | None
    tile_scale: float | None


Segment = Callable[[Bytes], Segmented]


def by_network(
    checkpoint: Checkpoint,
    predictor: AnyPredictor,
    *,
    threshold: float | None = None,
    tiling: bool = True,
) -> Segment:
    """Segment as the service does: in one piece, or in tiles where the cells would be too small.

    Args:
        checkpoint: says what the channels are.
        predictor: of its network.
        threshold: None takes the checkpoint's own.
        tiling: False stretches every image in one piece.

    Returns:
        A function of uint8 (H, W, 3) RGB; it raises `PredictionError` where the network gives
        something that is no number.
    """
    names = checkpoint.spec.class_names
    size_px = predictor.input_size_px
    cut = checkpoint.spec.threshold if threshold is None else threshold

    def segment(pixels: Bytes) -> Segmented:
        shape_hw = (pixels.shape[0], pixels.shape[1])
        logits = predictor.predict(preprocess(pixels, size_px)[np.newaxis])[0]
        if not np.isfinite(logits).all():
            raise PredictionError("the network gave values that are not numbers")
        soft = probability(logits)
        parted = part_cells(soft, names, threshold=cut)
        scale = None
        if tiling:
            scale = choose_scale(
                ArrayRaster(pixels),
                typical_diameter_px(parted),
                predictor.predict,
                names,
                threshold=cut,
                input_size_px=size_px,
            )
        if scale is not None:
            return _in_tiles(pixels, scale, predictor, names, cut)
        mask = mask_from_probability(soft[0], shape_hw, cut) > 0
        return Segmented(mask, enlarge_cells(parted, mask), soft[0], None)

    return segment


def _in_tiles(
    pixels: Bytes, scale: float, predictor: AnyPredictor, names: tuple[str, ...], threshold: float
) -> Segmented:
    bands = list(
        segment_in_tiles(
            ArrayRaster(pixels),
            scale,
            predictor.predict,
            names,
            threshold=threshold,
            input_size_px=predictor.input_size_px,
            measure=False,
        )
    )
    mask, labels = (
        np.concatenate([getattr(band, name) for band in bands]) for name in ("mask", "labels")
    )
    numbers, kinds, border = (
        np.concatenate([getattr(band, name) for band in bands])
        for name in ("numbers", "kinds", "touches_border")
    )
    # Bands number the cells as they come; here cells stand first and platelets last.
    order = np.lexsort((numbers, kinds == CellKind.PLATELET))
    renumbered = np.zeros(len(numbers) + 1, np.int32)
    renumbered[numbers[order]] = np.arange(1, len(numbers) + 1)
    cells = Cells(renumbered[labels], kinds[order], border[order])
    return Segmented(mask > 0, cells, None, scale)


def by_otsu(pixels: Bytes, *, side_px: int = 1024) -> Segmented:
    """Segment without a network: Otsu, holes filled, watershed on the distance transform.

    Args:
        pixels: uint8 (H, W, 3) RGB.
        side_px: larger images are shrunk evenly to it to part their cells: a stretch to the
            network's square or a coarser image makes it worse.
    """
    height, width = pixels.shape[:2]
    shrink = min(1.0, side_px / max(height, width))
    size_wh = (max(1, round(width * shrink)), max(1, round(height * shrink)))
    small = separate(_dark(cv2.resize(pixels, size_wh, interpolation=cv2.INTER_AREA)))
    # A ring of cells is no cell: only small holes are filled, as `separate` does.
    mask = fill_holes(_dark(pixels))
    labels = enlarge_labels(small, mask)
    kept = np.unique(labels[labels > 0])
    numbers = np.zeros(int(labels.max(initial=0)) + 1, np.int32)
    numbers[kept] = np.arange(1, len(kept) + 1)
    kinds = np.full(len(kept), CellKind.RED_CELL, np.uint8)
    return Segmented(mask, Cells(numbers[labels], kinds, np.zeros(len(kept), bool)), None, None)


def _dark(pixels: Bytes) -> npt.NDArray[np.bool_]:
    """Tell stained from empty slide on the green channel, as `looks_stained`, with its holes."""
    green = cv2.GaussianBlur(pixels[:, :, 1], (0, 0), 1.5)
    _, dark = cv2.threshold(green, 0, 255, cv2.THRESH_BINARY_INV + cv2.THRESH_OTSU)
    return np.asarray(dark > 0)
