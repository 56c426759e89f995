"""Outlines drawn in another program, and the pixels that they enclose."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from bcseg_batch.segment.cells import CellKind

Floats = npt.NDArray[np.float64]

# Corners of the polygon that stands for an ellipse: it lies within a hundredth of a pixel of one
# of 500 px.
_ELLIPSE_CORNERS = 512


@dataclass(frozen=True, slots=True, eq=False)
class Shape:
    """One area that somebody has drawn.

    Attributes:
        name: to call it by in messages.
        rings: float64 (k, 2) each, x and y of the corners, where pixel (row 0, column 0) reaches
            from (0, 0) to (1, 1). What an odd number of rings goes around is inside.
        kind: what it was said to be.
    """

    name: str
    rings: tuple[Floats, ...]
    kind: CellKind | None = None


def ellipse(left: float, top: float, right: float, bottom: float) -> Floats:
    """Give the ring of an ellipse that fills a box: float64 (k, 2)."""
    angle = np.arange(_ELLIPSE_CORNERS) * (2 * math.pi / _ELLIPSE_CORNERS)
    x = (left + right) / 2 + (right - left) / 2 * np.cos(angle)
    y = (top + bottom) / 2 + (bottom - top) / 2 * np.sin(angle)
    return np.stack([x, y], axis=1)


def fill(rings: Sequence[Floats], shape_hw: tuple[int, int]) -> npt.NDArray[np.bool_]:
    """Find the pixels whose middle lies within rings, as ImageJ and QuPath do.

    Outlines along the edges of pixels, as `cell_outlines` gives them, enclose exactly these.

    Args:
        rings: float64 (k, 2) each, x and y; closed by a repeated corner or not.
        shape_hw: of the image; what lies outside of it is left out.

    Returns:
        bool (H, W).
    """
    height, width = shape_hw
    crossings = np.zeros((height, width + 1), np.int32)
    for ring in rings:
        start, end = ring, np.roll(ring, -1, axis=0)
        low, high = np.minimum(start[:, 1], end[:, 1]), np.maximum(start[:, 1], end[:, 1])
        # The rows whose middle an edge passes: from `first` to before `last`.
        first, last = (np.clip(np.ceil(y - 0.5), 0, height).astype(int) for y in (low, high))
        edge = np.repeat(np.arange(len(ring)), last - first)
        rows = np.arange(edge.size) - np.repeat(np.cumsum(last - first) - last, last - first)
        along = (rows + 0.5 - start[edge, 1]) / (end[edge, 1] - start[edge, 1])
        x = start[edge, 0] + along * (end[edge, 0] - start[edge, 0])
        np.add.at(crossings, (rows, np.clip(np.ceil(x - 0.5), 0, width).astype(int)), 1)
    inside: npt.NDArray[np.bool_] = (np.cumsum(crossings, axis=1)[:, :-1] % 2).astype(bool)
    return inside


def label_shapes(
    shapes: Sequence[Shape], shape_hw: tuple[int, int]
) -> tuple[npt.NDArray[np.int32], int]:
    """Number the pixels of shapes.

    Args:
        shapes: where they overlap, the later one has the pixel.
        shape_hw: of the image.

    Returns:
        int32 (H, W), i + 1 in shape i, 0 elsewhere; and the number of pixels that two of them
        claim.

    Raises:
        ValueError: a shape encloses no pixel, or reaches outside by more than a pixel: it was
            drawn on another picture.
    """
    height, width = shape_hw
    labels = np.zeros(shape_hw, np.int32)
    shared = 0
    for number, shape in enumerate(shapes, 1):
        corners = np.concatenate(shape.rings)
        low, high = corners.min(axis=0), corners.max(axis=0)
        if not np.isfinite([low, high]).all():
            raise ValueError(f"{shape.name} has corners that are no numbers")
        if low.min() < -1 or high[0] > width + 1 or high[1] > height + 1:
            raise ValueError(
                f"{shape.name} reaches to x {high[0]:.0f}, y {high[1]:.0f} (from {low[0]:.0f}, "
                f"{low[1]:.0f}), outside of the picture of {width}x{height}: it was drawn on "
                "another one"
            )
        left, top = (max(int(v), 0) for v in np.floor(low))
        right, bottom = min(math.ceil(high[0]), width), min(math.ceil(high[1]), height)
        rings = [ring - (left, top) for ring in shape.rings]
        inside = fill(rings, (bottom - top, right - left))
        if not inside.any():
            raise ValueError(f"{shape.name} encloses no pixel")
        window = labels[top:bottom, left:right]
        shared += int(np.count_nonzero(window[inside]))
        window[inside] = number
    return labels, shared
