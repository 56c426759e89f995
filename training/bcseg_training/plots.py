"""Pictures of a training and of its worst cases."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import cv2
import matplotlib as mpl
import numpy as np
import numpy.typing as npt
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from skimage.segmentation import find_boundaries

from bcseg_batch.text import printable
from bcseg_training.voc import Box

mpl.use("agg")  # files only: no window is ever opened

# Okabe and Ito's palette: told apart by colour-blind readers too.
_BLUE, _ORANGE, _GREEN = "#0072B2", "#D55E00", "#009E73"
_RGB_BLUE, _RGB_ORANGE = (0, 90, 220), (235, 100, 0)
_RGB_VIOLET, _RGB_YELLOW = (200, 0, 200), (240, 228, 66)


class EpochLike(Protocol):
    """What a curve needs to know of an epoch."""

    epoch: int
    loss: float
    dice: float
    iou: float


def save_curves(history: Sequence[EpochLike], path: Path) -> None:
    """Draw training loss, and Dice and IoU on the validation set, over the epochs, as PNG."""
    figure = Figure(figsize=(9, 3.6), layout="constrained")
    left, right = figure.subplots(1, 2)
    epochs = [result.epoch for result in history]
    left.plot(epochs, [result.loss for result in history], color=_ORANGE, marker=".")
    left.set(title="Training loss", xlabel="epoch")
    right.plot(epochs, [r.dice for r in history], color=_BLUE, marker=".", label="Dice")
    right.plot(epochs, [r.iou for r in history], color=_GREEN, marker=".", label="IoU")
    right.set(title="Validation, at full image size", xlabel="epoch")
    right.legend()
    for axes in (left, right):
        axes.grid(visible=True, alpha=0.3)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    figure.savefig(path, dpi=120)


@dataclass(frozen=True, slots=True)
class CellsPicture:
    """One image with the cells found in it and what is known of it.

    Attributes:
        title: such as the image's name.
        pixels: uint8 (H, W, 3) RGB.
        found: int32 (H, W), labels.
        kinds: uint8 (n,), of the labels found.
        true: int32 (H, W), labels, where they are known.
        boxes: where these are known.
    """

    title: str
    pixels: npt.NDArray[np.uint8]
    found: npt.NDArray[np.int32]
    kinds: npt.NDArray[np.uint8]
    true: npt.NDArray[np.int32] | None
    boxes: Sequence[Box]


def outlined(picture: CellsPicture, *, side_px: int = 900) -> npt.NDArray[np.uint8]:
    """Draw what was found in orange (white cells violet, platelets yellow), the truth in blue.

    Args:
        picture: the image and its cells.
        side_px: longest side of the result.

    Returns:
        uint8 (h, w, 3) RGB.
    """
    shrink = min(1.0, side_px / max(picture.found.shape))
    size_wh = (round(picture.found.shape[1] * shrink), round(picture.found.shape[0] * shrink))
    canvas = cv2.resize(picture.pixels, size_wh, interpolation=cv2.INTER_AREA)

    def edges(labels: npt.NDArray[np.int32]) -> npt.NDArray[np.bool_]:
        small = cv2.resize(labels, size_wh, interpolation=cv2.INTER_NEAREST_EXACT)
        return np.asarray(find_boundaries(small, mode="inner"))

    if picture.true is not None:
        canvas[edges(picture.true)] = _RGB_BLUE
    for box in picture.boxes:
        corners = [round(v * shrink) for v in (box.left, box.top, box.right, box.bottom)]
        cv2.rectangle(canvas, tuple(corners[:2]), tuple(corners[2:]), _RGB_BLUE, 1)
    kind = np.append(np.uint8(0), picture.kinds)[picture.found]
    for value, colour in ((1, _RGB_ORANGE), (2, _RGB_VIOLET), (3, _RGB_YELLOW)):
        canvas[edges(np.where(kind == value, picture.found, np.int32(0)))] = colour
    return np.asarray(canvas)


def save_cells_page(rows: Sequence[tuple[str, CellsPicture]], path: Path) -> None:
    """Draw a page of images, two in a row, with the outlines of cells found and true.

    Args:
        rows: score in words, and the image.
        path: of the PNG.
    """
    columns = min(2, len(rows))
    lines = -(-len(rows) // columns)
    figure = Figure(figsize=(7 * columns, 5.4 * lines), layout="constrained")
    grid = figure.subplots(lines, columns, squeeze=False).ravel()
    for axes in grid:
        axes.set_axis_off()
    for axes, (score, picture) in zip(grid, rows, strict=False):
        axes.imshow(outlined(picture), interpolation="nearest")
        # A file's name is no formula, whatever dollars are in it.
        title = f"{printable(picture.title)[:40]}  {score}"
        axes.set_title(title, fontsize=9, loc="left", parse_math=False)
    figure.suptitle("blue: truth; orange, violet, yellow: red cells, white cells, platelets found")
    _save(figure, path)


def save_reliability(tables: Mapping[str, npt.NDArray[np.float64]], path: Path) -> None:
    """Draw how often what is said with a probability is true.

    Args:
        tables: by data set, float64 (3, bins), of `instances.reliability`.
        path: of the PNG.
    """
    figure = Figure(figsize=(5, 4.6), layout="constrained")
    axes = figure.subplots()
    axes.plot([0, 1], [0, 1], color="grey", linewidth=1)
    for name, (count, said, happened) in tables.items():
        there = count > 0
        axes.plot(
            said[there] / count[there],
            happened[there] / count[there],
            marker="o",
            label=printable(name),
        )
    axes.set(xlabel="probability", ylabel="share of pixels that are cells", title="Reliability")
    axes.legend(fontsize=8)
    axes.grid(visible=True, alpha=0.3)
    _save(figure, path)


def _save(figure: Figure, path: Path) -> None:
    with warnings.catch_warnings():
        # A name in letters that the font has not is drawn as boxes; nobody can mend that.
        warnings.filterwarnings("ignore", message="Glyph .* missing from font")
        figure.savefig(path, dpi=90)
