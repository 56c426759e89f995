"""One image and what was found in it, side by side in one picture."""

from __future__ import annotations

import importlib.util
import math
import os
import sys
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING

import cv2
import numpy as np
import numpy.typing as npt

from bcseg_batch.api import Segmentation
from bcseg_batch.errors import SettingsError
from bcseg_batch.segment.drawing import heat_map
from bcseg_batch.store.outputs import whole_file
from bcseg_batch.text import printable

if TYPE_CHECKING:
    from matplotlib.figure import Figure

SUFFIXES = (".png", ".jpg", ".svg", ".pdf")
"""Formats that a panel is saved in."""
_PANEL_INCHES = 4.5
_MOST_PX = 1200
_NAMES = {"red_cell": "red", "white_cell": "white", "platelet": "platelets"}


def check_matplotlib() -> None:
    """Refuse where what draws is not installed.

    Raises:
        SettingsError: it is not.
    """
    if importlib.util.find_spec("matplotlib") is None:
        raise SettingsError(
            "this needs matplotlib, which is not installed: pip install 'bcseg-batch[show]'"
        )


def has_screen() -> bool:
    """Say whether a picture that is opened here would be seen."""
    return sys.platform in {"win32", "darwin"} or any(
        os.environ.get(name) for name in ("DISPLAY", "WAYLAND_DISPLAY")
    )


def draw_panel(found: Segmentation) -> Figure:
    """Draw image, probability, mask, composite and outlines side by side.

    Args:
        found: what `Model.segment` gives.
    """
    from matplotlib.figure import Figure  # noqa: PLC0415 - an extra

    height, width = found.mask.shape
    shape = min(max(height / width, 0.25), 4.0)
    figure = Figure(figsize=(5 * _PANEL_INCHES, _PANEL_INCHES * shape + 1.0), layout="constrained")
    panels = {
        "image": found.pixels,
        "probability": heat_map(found.probability),
        f"mask ({found.foreground:.1%} cells)": found.mask,
        "composite": found.composite(),
        "outlines": found.outlined(),
    }
    for axes, (title, pixels) in zip(figure.subplots(1, len(panels)), panels.items(), strict=True):
        axes.imshow(_small(pixels), cmap="gray", vmin=0, vmax=255, interpolation="antialiased")
        axes.set_title(title)
        axes.set_axis_off()
    figure.suptitle("\n".join([_headline(found), *(flag.sentence for flag in found.flags)]))
    return figure


def _small(pixels: npt.NDArray[np.uint8]) -> npt.NDArray[np.uint8]:
    """Shrink what is larger than it is drawn: matplotlib would hold it in floating point."""
    height, width = pixels.shape[:2]
    step = math.ceil(max(height, width) / _MOST_PX)
    if step == 1:
        return pixels
    size_wh = (max(1, width // step), max(1, height // step))
    small: npt.NDArray[np.uint8] = cv2.resize(pixels, size_wh, interpolation=cv2.INTER_AREA)
    return small


def _headline(found: Segmentation) -> str:
    kinds = Counter(found.table["kind"].tolist())
    counts = ", ".join(f"{kinds[kind]} {name}" for kind, name in _NAMES.items())
    # A dollar sign would begin a formula.
    return f"{printable(found.image)}: {counts}, confidence {found.confidence:.2f}".replace(
        "$", r"\$"
    )


def save_panel(figure: Figure, path: Path) -> None:
    """Save a drawing; the format follows the suffix.

    Args:
        figure: of `draw_panel`.
        path: of a `.png`, `.jpg`, `.svg` or `.pdf`.

    Raises:
        OutputError: it cannot be written.
    """
    with whole_file(path) as file:
        figure.savefig(file, format=path.suffix.lstrip(".").lower(), dpi=120)
