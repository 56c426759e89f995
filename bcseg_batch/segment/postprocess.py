"""From logits to a mask at the photograph's own size, and to the blood-red composite."""

from __future__ import annotations

from dataclasses import dataclass

import cv2
import numpy as np
import numpy.typing as npt

Bytes = npt.NDArray[np.uint8]

MASK_FOREGROUND = 255
# A value so close below a whole number is whole but for rounding.
_WHOLE = 1e-3
# With more exceptions than these the look-up is faster.
_MOST_SHORT = 4
_BAND_BYTES = 2**19


def probability(logits: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    """Apply the logistic function.

    Args:
        logits: float32, any shape.

    Returns:
        float32 of the same shape in [0, 1].
    """
    result: npt.NDArray[np.float32] = np.negative(logits)
    # Where the exponential is too large for float32 the probability is 0, as it should be.
    with np.errstate(over="ignore"):
        np.exp(result, out=result)
    result += 1
    return np.reciprocal(result, out=result)


def mean_confidence(probability_map: npt.NDArray[np.float32]) -> float:
    """Average how sure the network is of its choice at each pixel.

    Args:
        probability_map: float32 (h, w) in [0, 1].

    Returns:
        Mean of max(p, 1 - p), in [0.5, 1].
    """
    return float(np.maximum(probability_map, 1.0 - probability_map).mean(dtype=np.float64))


def resize_probability(
    probability_map: npt.NDArray[np.float32], shape_hw: tuple[int, int]
) -> npt.NDArray[np.float32]:
    """Resize a soft map; each axis is averaged where it shrinks and interpolated where it grows.

    Args:
        probability_map: float32 (h, w) in [0, 1].
        shape_hw: (H, W) wanted.

    Returns:
        float32 (H, W) in [0, 1]; the map itself where the size is already right.
    """
    (in_h, in_w), (out_h, out_w) = probability_map.shape, shape_hw
    result: npt.NDArray[np.float32] = probability_map
    # Two steps, since OpenCV's area filter is an average only where both axes shrink.
    shrunk = (min(in_h, out_h), min(in_w, out_w))
    if shrunk != result.shape:
        result = cv2.resize(result, shrunk[::-1], interpolation=cv2.INTER_AREA)
    if shape_hw != result.shape:
        result = cv2.resize(result, shape_hw[::-1], interpolation=cv2.INTER_LINEAR)
    return result


def mask_from_probability(
    probability_map: npt.NDArray[np.float32], shape_hw: tuple[int, int], threshold: float
) -> npt.NDArray[np.uint8]:
    """Resize the soft map to the image's size, then cut it.

    In this order, because a mask that is resized after the cut has its cells dilated.

    Args:
        probability_map: float32 (h, w) in [0, 1], as the network gives it.
        shape_hw: (H, W) of the image.
        threshold: a pixel is foreground where its probability is above it, as in the original.

    Returns:
        uint8 (H, W), 0 or 255.
    """
    foreground = resize_probability(probability_map, shape_hw) > np.float32(threshold)
    return foreground.view(np.uint8) * np.uint8(MASK_FOREGROUND)


def blend_table(colour: tuple[int, int, int], alpha: float) -> npt.NDArray[np.uint8]:
    """Tabulate the blend for all 256 values of each channel.

    With colour (160, 0, 20) and alpha 0.3 this is the original's
    R = int(0.7 R + 0.3 * 160), G = int(0.7 G), B = int(0.7 B + 0.3 * 20), in the same double
    precision and with the same truncation.

    Args:
        colour: RGB laid over the cells, 0..255 each.
        alpha: its opacity in [0, 1].

    Returns:
        uint8 (256, 3): entry [v, c] is what value v becomes in channel c.
    """
    values = np.arange(256, dtype=np.float64)[:, np.newaxis]
    blended = (1 - alpha) * values + alpha * np.asarray(colour, dtype=np.float64)
    return blended.astype(np.uint8)


@dataclass(frozen=True, slots=True, eq=False)
class Blend:
    """A blend as a straight line, which OpenCV draws in a quarter of the time of its look-up.

    The table says what is right: it is computed in double precision and truncated, so that it falls
    one short of the line where that is whole. Where it differs otherwise, there is no line.

    Attributes:
        table: uint8 (256, 3) of `blend_table`.
        line: float64 (3, 4) for OpenCV's `transform`, which rounds; None if the table is no line.
        short: uint8 (k, 3), values of each channel for which the table is one less than the line.
        has_short: uint8 (3,), 1 for the channels that have such values; the others are filled up.
    """

    table: Bytes
    line: npt.NDArray[np.float64] | None
    short: Bytes
    has_short: Bytes

    @classmethod
    def of(cls, colour: tuple[int, int, int], alpha: float) -> Blend:
        """Find the line of a blend, and try it on all values.

        Args:
            colour: RGB laid over the cells, 0..255 each.
            alpha: its opacity in [0, 1].
        """
        table = blend_table(colour, alpha)
        line = np.zeros((3, 4))
        np.fill_diagonal(line, 1 - alpha)
        line[:, 3] = alpha * np.asarray(colour, np.float64) - 0.5 + _WHOLE
        ramp = np.repeat(np.arange(256, dtype=np.uint8)[:, np.newaxis], 3, axis=1)
        # Along a row OpenCV takes many pixels at once, in a column one by one.
        along, down = (
            cv2.transform(ramp.reshape(shape), line).reshape(256, 3).astype(np.int16)
            for shape in ((1, 256, 3), (256, 1, 3))
        )
        excess = along - table
        short = [np.flatnonzero(excess[:, channel]).astype(np.uint8) for channel in range(3)]
        most = max(values.size for values in short)
        if (along != down).any() or not np.isin(excess, (0, 1)).all() or most > _MOST_SHORT:
            return cls(table, None, np.zeros((0, 3), np.uint8), np.zeros(3, np.uint8))
        filled = [np.resize(values, most) for values in short]
        has_short = np.array([values.size > 0 for values in short], np.uint8)
        return cls(table, line, np.stack(filled, axis=1), has_short)


def composite_image(pixels: Bytes, mask: Bytes, blend: Blend) -> Bytes:
    """Tint the cells; every other pixel is untouched.

    Args:
        pixels: uint8 (H, W, 3) RGB.
        mask: uint8 (H, W), 0 or 255.
        blend: what becomes of the cells' pixels.

    Returns:
        uint8 (H, W, 3) RGB, a new array.
    """
    height, width = mask.shape
    composite = np.empty((height, width, 3), np.uint8)
    # As rows of bytes: over a last axis of three numpy takes ten times as long.
    short = np.tile(blend.short, width)
    has_short = np.tile(blend.has_short, width)
    # Band by band everything stays in the processor's cache.
    rows = max(1, _BAND_BYTES // (3 * max(1, width)))
    for top in range(0, height, rows):
        band = composite[top : top + rows]
        band[:] = pixels[top : top + rows]
        if blend.line is None:
            tinted = cv2.LUT(band, blend.table[np.newaxis])
        else:
            tinted = cv2.transform(band, blend.line)
            if len(short):
                values = band.reshape(len(band), -1)
                is_short = values == short[0]
                for row in short[1:]:
                    is_short |= values == row
                less = is_short.view(np.uint8)
                less &= has_short
                np.subtract(tinted, less.reshape(tinted.shape), out=tinted)
        cv2.copyTo(tinted, mask[top : top + rows], band)
    return composite
