"""Pictures of a training and of its worst cases."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

import matplotlib as mpl
import numpy as np
import numpy.typing as npt
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from bcseg_batch.text import printable

mpl.use("agg")  # files only: no window is ever opened

# Okabe and Ito's palette: told apart by colour-blind readers too.
_BLUE, _ORANGE, _GREEN = "#0072B2", "#D55E00", "#009E73"


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


def agreement_picture(
    pixels: npt.NDArray[np.uint8], mask: npt.NDArray[np.bool_], truth: npt.NDArray[np.bool_]
) -> npt.NDArray[np.uint8]:
    """Tint what was found wrongly orange and what was missed blue.

    Args:
        pixels: uint8 (H, W, 3) RGB.
        mask: bool (H, W).
        truth: bool (H, W).

    Returns:
        uint8 (H, W, 3) RGB.
    """
    picture = pixels.astype(np.float32)
    for wrong, colour in ((mask & ~truth, (213, 94, 0)), (truth & ~mask, (0, 114, 178))):
        picture[wrong] = 0.25 * picture[wrong] + 0.75 * np.asarray(colour, np.float32)
    return picture.astype(np.uint8)


def save_panel(
    rows: Sequence[tuple[str, npt.NDArray[np.uint8], npt.NDArray[np.bool_], npt.NDArray[np.bool_]]],
    path: Path,
) -> None:
    """Draw a page of images: photograph, truth, mask, agreement.

    Args:
        rows: title, uint8 (H, W, 3) image, bool (H, W) mask, bool (H, W) truth.
        path: of the PNG.
    """
    figure = Figure(figsize=(14, 2.9 * len(rows)), layout="constrained")
    grid = figure.subplots(len(rows), 4, squeeze=False)
    for axes_row, (title, pixels, mask, truth) in zip(grid, rows, strict=True):
        step = max(1, max(pixels.shape) // 800)
        pictures = (pixels, truth, mask, agreement_picture(pixels, mask, truth))
        for axes, picture in zip(axes_row, pictures, strict=True):
            axes.imshow(picture[::step, ::step], cmap="gray", interpolation="nearest")
            axes.set_axis_off()
        # A file's name is no formula, whatever dollars are in it.
        axes_row[0].set_title(printable(title), fontsize=9, loc="left", parse_math=False)
    for axes, name in zip(
        grid[0, 1:], ("truth", "mask", "orange: too much, blue: missed"), strict=True
    ):
        axes.set_title(name, fontsize=9)
    with warnings.catch_warnings():
        # A name in letters that the font has not is drawn as boxes; nobody can mend that.
        warnings.filterwarnings("ignore", message="Glyph .* missing from font")
        figure.savefig(path, dpi=90)
