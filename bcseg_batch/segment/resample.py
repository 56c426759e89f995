"""Resizes as Pillow and OpenCV do, in operations that a GPU has.

Both resize one axis after the other, and along an axis each new pixel is a weighted sum of a few
old ones: its taps. So there is one way to apply taps, and a function for each kind of weights.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

# Pillow's 8-bit arithmetic: 32 bits, less those of a pixel and two to spare (Resample.c).
_FRACTION_BITS = 32 - 8 - 2
# Of the sizes of images; a folder has few of them.
_SIZES_KEPT = 64


@dataclass(frozen=True, slots=True, eq=False)
class Taps:
    """Which old pixels make up each new one along an axis, and by what weight.

    Attributes:
        index: int64 (K, n), of the old pixels; those of no weight are any.
        weight: (K, n), int32 in units of 2^-22 for bytes, or float32.
    """

    index: npt.NDArray[np.int64]
    weight: npt.NDArray[np.int32] | npt.NDArray[np.float32]


@functools.lru_cache(maxsize=_SIZES_KEPT)
def pillow_taps(before: int, after: int) -> Taps:
    """Give the taps of Pillow's `BILINEAR`: a triangle, widened where the image shrinks.

    Formulas, rounding and order of `precompute_coeffs` and `normalize_coeffs_8bpc` in Pillow's
    Resample.c.

    Args:
        before: pixels along the axis.
        after: pixels wanted.
    """
    scale = before / after
    support = max(scale, 1.0)
    middle = (np.arange(after) + 0.5) * scale
    first = np.maximum((middle - support + 0.5).astype(np.int64), 0)
    beyond = np.minimum((middle + support + 0.5).astype(np.int64), before)
    taps = np.arange(2 * math.ceil(support) + 1)[:, np.newaxis]
    index = first + taps
    triangle = 1.0 - np.abs((index - middle + 0.5) * (1.0 / support))
    weight = np.where(index < beyond, np.maximum(triangle, 0.0), 0.0)
    # One after the other: numpy's own sum adds in another order.
    weight /= functools.reduce(np.add, weight)
    fixed = (0.5 + weight * (1 << _FRACTION_BITS)).astype(np.int32)
    return Taps(np.minimum(index, before - 1), fixed)


@functools.lru_cache(maxsize=_SIZES_KEPT)
def soft_taps(before: int, after: int) -> Taps:
    """Give the taps of OpenCV's `INTER_AREA` where an axis shrinks, else of its `INTER_LINEAR`.

    Args:
        before: pixels along the axis.
        after: pixels wanted.
    """
    scale = before / after
    if after > before:
        place = (np.arange(after) + 0.5) * scale - 0.5
        left = np.floor(place).astype(np.int64)
        weight = np.stack([1.0 - (place - left), place - left])
        index = np.stack([left, left + 1])
    else:
        # The share of a new pixel's stretch that lies in each old one.
        start = np.arange(after) * scale
        index = np.floor(start).astype(np.int64) + np.arange(math.ceil(scale) + 1)[:, np.newaxis]
        inside = np.minimum(index + 1, start + scale) - np.maximum(index, start)
        weight = np.where(index < before, np.maximum(inside, 0.0), 0.0)
        weight /= weight.sum(axis=0)
    return Taps(np.clip(index, 0, before - 1), weight.astype(np.float32))


def resize_rgb(pixels: Tensor, size_px: int) -> Tensor:
    """Stretch an image to a square as `preprocess.resize_rgb` does, bit for bit.

    Args:
        pixels: uint8 (H, W, 3).
        size_px: S.

    Returns:
        uint8 (S, S, 3) on the same device.
    """
    height, width = pixels.shape[:2]
    # Across first, and rounded in between, as Pillow does.
    if width != size_px:
        pixels = _in_bytes(pixels, pillow_taps(width, size_px), dim=1)
    if height != size_px:
        pixels = _in_bytes(pixels, pillow_taps(height, size_px), dim=0)
    return pixels


def _in_bytes(pixels: Tensor, taps: Taps, dim: int) -> Tensor:
    rounded = _weighted_sum(pixels, taps, dim, torch.int32) + (1 << (_FRACTION_BITS - 1))
    return (rounded >> _FRACTION_BITS).clamp_(0, 255).to(torch.uint8)


def resize_soft(plane: Tensor, shape_hw: tuple[int, int]) -> Tensor:
    """Resize a soft map as `postprocess.resize_probability` does, but for rounding.

    Args:
        plane: float32 (h, w).
        shape_hw: (H, W) wanted.

    Returns:
        float32 (H, W) on the same device.
    """
    for dim, after in enumerate(shape_hw):
        if plane.shape[dim] != after:
            plane = _weighted_sum(plane, soft_taps(plane.shape[dim], after), dim, torch.float32)
    return plane


def _weighted_sum(values: Tensor, taps: Taps, dim: int, dtype: torch.dtype) -> Tensor:
    """Apply taps along an axis, one after the other: all at once would take K times the memory."""
    index = torch.from_numpy(taps.index).to(values.device, non_blocking=True)
    weight = torch.from_numpy(taps.weight).to(values.device, non_blocking=True)
    shape = [1] * values.ndim
    shape[dim] = -1
    total: Tensor | None = None
    for places, weights in zip(index, weight, strict=True):
        part = values.index_select(dim, places).to(dtype).mul_(weights.view(shape))
        total = part if total is None else total.add_(part)
    assert total is not None, "each new pixel has a tap"
    return total
