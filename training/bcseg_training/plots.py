"""Pictures of a training and of its worst cases."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol

import cv2
import matplotlib as mpl
import numpy as np
import numpy.typing as npt
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator
from skimage.segmentation import find_boundaries

from bcseg_batch.segment.cells import CellKind
from bcseg_batch.text import printable
from bcseg_training.instances import (
    Labels,
    box_array,
    box_iou,
    in_frame,
    label_boxes,
    label_iou,
    match,
)
from bcseg_training.voc import Box

mpl.use("agg")  # files only: no window is ever opened

# Okabe and Ito's palette: told apart by colour-blind readers too.
_BLUE, _ORANGE, _GREEN = "#0072B2", "#D55E00", "#009E73"


@dataclass(frozen=True, slots=True)
class _Line:
    """How something is outlined.

    Attributes:
        rgb: 0..255 each.
        is_thick: three pixels, not one.
        means: in words.
    """

    rgb: tuple[int, int, int]
    is_thick: bool
    means: str

    @property
    def hex(self) -> str:
        """The colour as `#rrggbb`."""
        return "#{:02x}{:02x}{:02x}".format(*self.rgb)


_RIGHT = _Line((0, 170, 60), is_thick=False, means="found, and true")
_TRUE = _Line((86, 180, 233), is_thick=False, means="true, and found")
_MISSED = _Line((0, 70, 230), is_thick=True, means="missed")
_WRONG = _Line((235, 100, 0), is_thick=True, means="found, without a true one")
_WRONG_KIND = _Line((200, 0, 200), is_thick=True, means="found, of another kind")
_PLATELET = _Line((240, 228, 66), is_thick=False, means="platelet, without a true one")
_FORGIVEN = _Line((110, 110, 110), is_thick=False, means="forgiven at the border")

_BY_KIND = {
    CellKind.RED_CELL: replace(_WRONG, is_thick=False),
    CellKind.WHITE_CELL: replace(_WRONG_KIND, is_thick=False),
    CellKind.PLATELET: _PLATELET,
}

LEGEND = (_RIGHT, _TRUE, _MISSED, _WRONG, _WRONG_KIND, _PLATELET, _FORGIVEN)
"""All kinds of outlines in the pictures of cells."""


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
        found: int32 (H, W), labels 1..n; cells first, platelets last.
        kinds: uint8 (n,), of the labels found.
        true: int32 (H, W), labels 1..m of the true cells, where they are known.
        boxes: where these are known.
        is_complete: whether the truth has the cells that the border cuts.
    """

    title: str
    pixels: npt.NDArray[np.uint8]
    found: Labels
    kinds: npt.NDArray[np.uint8]
    true: Labels | None
    boxes: Sequence[Box]
    is_complete: bool = False


def outlined(picture: CellsPicture, *, side_px: int = 900) -> npt.NDArray[np.uint8]:
    """Outline what was found and what is true; what is wrong is thick, as `LEGEND` says.

    Where nothing is known to be true, red cells are orange, white cells violet and platelets
    yellow, all thin.

    Args:
        picture: the image and its cells.
        side_px: longest side of the result, if that is at most twice that of the image.

    Returns:
        uint8 (h, w, 3) RGB.
    """
    scale = min(2.0, side_px / max(picture.found.shape))
    height, width = (max(1, round(side * scale)) for side in picture.found.shape)
    shrinks = cv2.INTER_AREA if scale < 1 else cv2.INTER_LINEAR
    canvas = np.asarray(cv2.resize(picture.pixels, (width, height), interpolation=shrinks))
    found, missed = _verdicts(picture)
    if picture.true is not None:
        truths = [_MISSED if is_missed else _TRUE for is_missed in missed]
        _outline(canvas, picture.true, truths)
    _outline(canvas, picture.found, found)
    if picture.true is None:
        # Above the cells: a thin line drawn first would be lost where it runs along an outline.
        for box, is_missed in zip(picture.boxes, missed, strict=True):
            left, top, right, bottom = (
                round(v * scale) for v in (box.left, box.top, box.right, box.bottom)
            )
            line = _MISSED if is_missed else _TRUE
            low, high = (left, top), (min(right, width) - 1, min(bottom, height) - 1)
            cv2.rectangle(canvas, low, high, line.rgb, 3 if line.is_thick else 1)
    return canvas


def _verdicts(picture: CellsPicture) -> tuple[list[_Line], npt.NDArray[np.bool_]]:
    """Say how each label found is drawn, and which true cells or boxes were missed: bool (n,)."""
    kinds = picture.kinds
    if picture.true is None and not picture.boxes:
        return [_BY_KIND[CellKind(kind)] for kind in kinds], np.zeros(0, dtype=bool)
    lines = [_PLATELET if kind == CellKind.PLATELET else _WRONG for kind in kinds]
    if picture.true is not None:
        # Platelets stand last, so that no gap opens.
        cell_count = np.count_nonzero(kinds != CellKind.PLATELET)
        labels = np.where(picture.found <= cell_count, picture.found, np.int32(0))
        pairs = match(label_iou(labels, picture.true))
        if not picture.is_complete:
            for index in np.flatnonzero(in_frame(labels)):
                lines[index] = _FORGIVEN
        for index in pairs.found:
            lines[index] = _RIGHT
        missed = np.ones(pairs.true_count, dtype=bool)
        missed[pairs.true] = False
        return lines, missed
    extents = label_boxes(picture.found)
    true_kinds = np.array([int(box.kind) for box in picture.boxes], dtype=np.uint8)
    missed = np.ones(len(true_kinds), dtype=bool)
    for is_small, least in ((False, 0.5), (True, 0.3)):
        own = np.flatnonzero((kinds == CellKind.PLATELET) == is_small)
        wanted = np.flatnonzero((true_kinds == CellKind.PLATELET) == is_small)
        boxes = box_array([picture.boxes[int(i)] for i in wanted])
        pairs = match(box_iou(extents[own], boxes), least)
        missed[wanted[pairs.true]] = False
        for i, j in zip(own[pairs.found], wanted[pairs.true], strict=True):
            lines[i] = _RIGHT if kinds[i] == true_kinds[j] else _WRONG_KIND
    return lines, missed


def _outline(canvas: npt.NDArray[np.uint8], labels: Labels, lines: Sequence[_Line]) -> None:
    """Draw the inner edge of each label into uint8 (h, w, 3), label i + 1 with line i."""
    colours = np.array([(0, 0, 0), *(line.rgb for line in lines)], np.uint8)
    thick = np.array([False, *(line.is_thick for line in lines)])
    size_wh = (canvas.shape[1], canvas.shape[0])
    small = cv2.resize(labels, size_wh, interpolation=cv2.INTER_NEAREST_EXACT)
    edge = find_boundaries(small, mode="inner")
    for _ in range(2):  # two more pixels inwards
        edge |= find_boundaries(np.where(edge, 0, small), mode="inner") & thick[small]
    canvas[edge] = colours[small[edge]]


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
    handles = [
        Line2D([], [], color=line.hex, linewidth=3 if line.is_thick else 1) for line in LEGEND
    ]
    figure.legend(
        handles, [line.means for line in LEGEND], loc="outside upper center", ncols=2 + columns
    )
    # Finer than the pictures drawn: a line of one pixel must not be lost.
    _save(figure, path, dpi=150)


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


def _save(figure: Figure, path: Path, *, dpi: int = 90) -> None:
    with warnings.catch_warnings():
        # A name in letters that the font has not is drawn as boxes; nobody can mend that.
        warnings.filterwarnings("ignore", message="Glyph .* missing from font")
        figure.savefig(path, dpi=dpi)
