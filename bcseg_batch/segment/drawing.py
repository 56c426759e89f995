"""Draws what was found onto the photograph."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

Bytes = npt.NDArray[np.uint8]
Labels = npt.NDArray[np.int32]


def outlined(
    pixels: Bytes, labels: Labels, colour: tuple[int, int, int], above: Labels | None = None
) -> Bytes:
    """Draw the outlines of cells, two pixels wide, between each cell and what it borders on.

    Args:
        pixels: uint8 (H, W, 3) RGB.
        labels: int32 (H, W), 0 background.
        colour: RGB of the lines, 0..255 each.
        above: int32 (1, W), the labels above the first row where the image begins further up.

    Returns:
        uint8 (H, W, 3) RGB, a new array.
    """
    edge = np.zeros(labels.shape, bool)
    down = labels[1:] != labels[:-1]
    edge[1:] |= down
    edge[:-1] |= down
    across = labels[:, 1:] != labels[:, :-1]
    edge[:, 1:] |= across
    edge[:, :-1] |= across
    if above is not None:
        edge[:1] |= labels[:1] != above
    drawn = pixels.copy()
    drawn[edge] = colour
    return drawn


def heat_map(probability: npt.NDArray[np.float32]) -> Bytes:
    """Show probabilities as grey levels.

    Args:
        probability: float32 (H, W) in [0, 1].

    Returns:
        uint8 (H, W), 0 for 0 and 255 for 1.
    """
    levels: Bytes = np.rint(probability * np.float32(255)).astype(np.uint8)
    return levels
