"""A fixed picture by which two forms of one network are held against each other."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt


def check_pattern(size_px: int) -> npt.NDArray[np.float32]:
    """Draw ramps, waves and their product: every level, and edges of every width.

    Args:
        size_px: S, side of the square.

    Returns:
        float32 (1, 3, S, S) in [0, 1], a batch of one.
    """
    ramp = np.linspace(0.0, 1.0, size_px, dtype=np.float32)
    product = np.multiply.outer(ramp, ramp)
    pattern = np.stack([np.add.outer(ramp, ramp) / 2, np.abs(np.sin(40 * product)), product])
    return pattern[np.newaxis]
