"""Outlines as SVG paths that know which cells they belong to."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import cv2
import numpy as np
import numpy.typing as npt

from bcseg_batch.segment.outlines import cell_outlines

# A browser is slow with more, and nobody looks at them one by one.
MOST_OUTLINES = 3000
# How far, in shown pixels, a drawn line may be from the edges of the pixels.
_TOLERANCE_PX = 0.7

Labels = npt.NDArray[np.integer[Any]]


@dataclass(frozen=True, slots=True)
class Trace:
    """One outline.

    Attributes:
        path: SVG path data in pixels of the shown picture, to be filled by the even-odd rule.
        cells: which rows of the table of cells lie within, from 0.
    """

    path: str
    cells: tuple[int, ...]


def fit_within(shape_hw: tuple[int, int], side_px: int) -> tuple[int, int]:
    """Give the shape of a picture that is made smaller until no side is longer than `side_px`."""
    scale = min(1.0, side_px / max(shape_hw))
    return max(1, round(shape_hw[0] * scale)), max(1, round(shape_hw[1] * scale))


def shrink_labels(labels: Labels, shape_hw: tuple[int, int]) -> Labels:
    """Take labels at a smaller shape: of each pixel the label at its middle."""
    rows, columns = (
        ((np.arange(new) + 0.5) * old / new).astype(np.int64)
        for old, new in zip(labels.shape, shape_hw, strict=True)
    )
    small: Labels = labels[rows[:, np.newaxis], columns]
    return small


def trace_labels(labels: Labels, rows: Sequence[Mapping[str, str]]) -> list[Trace]:
    """Trace each cell by itself.

    Args:
        labels: integers (H, W) at the shown size, 0 background.
        rows: the table of cells; `label` is the number in `labels`.
    """
    at = {row["label"]: number for number, row in enumerate(rows)}
    return [
        Trace(path, (at[str(label)],) if str(label) in at else ())
        for label, path in _paths(labels).items()
    ]


def trace_mask(
    mask: npt.NDArray[np.bool_], rows: Sequence[Mapping[str, str]], full_hw: tuple[int, int]
) -> list[Trace]:
    """Trace the connected areas of a mask; cells that touch share an outline.

    Args:
        mask: bool (H, W) at the shown size.
        rows: the table of cells; `centroid-0` and `-1` are row and column at the full size.
        full_hw: the full size.
    """
    _, areas = cv2.connectedComponents(mask.view(np.uint8), connectivity=4)
    within: dict[int, list[int]] = {}
    for number, row in enumerate(rows):
        place = (
            float(row[f"centroid-{axis}"]) * mask.shape[axis] / full_hw[axis] for axis in (0, 1)
        )
        y, x = (min(int(p), side - 1) for p, side in zip(place, mask.shape, strict=True))
        within.setdefault(int(areas[y, x]), []).append(number)
    return [Trace(path, tuple(within.get(area, ()))) for area, path in _paths(areas).items()]


def _paths(labels: Labels) -> dict[int, str]:
    """Give the paths of the largest areas, by label."""
    numbers, sizes = np.unique(labels[labels > 0], return_counts=True)
    if numbers.size > MOST_OUTLINES:
        kept = numbers[np.argsort(-sizes, kind="stable")[:MOST_OUTLINES]]
        labels = np.where(np.isin(labels, kept), labels, 0)
    return {
        label: "".join(
            _ring(ring) for polygon in polygons for ring in (polygon.exterior, *polygon.holes)
        )
        for label, polygons in cell_outlines(labels).items()
    }


def _ring(corners: npt.NDArray[np.int32]) -> str:
    near = cv2.approxPolyDP(corners.reshape(-1, 1, 2), _TOLERANCE_PX, closed=True).reshape(-1, 2)
    points = near if len(near) >= 3 else corners
    return "M" + " ".join(f"{x} {y}" for x, y in points.tolist()) + "z"
