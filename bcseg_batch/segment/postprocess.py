"""From logits to a mask at the photograph's own size, and to the blood-red composite."""

from __future__ import annotations

import cv2
import numpy as np
import numpy.typing as npt

MASK_FOREGROUND = 255


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


def composite_image(
    pixels: npt.NDArray[np.uint8], mask: npt.NDArray[np.uint8], table: npt.NDArray[np.uint8]
) -> npt.NDArray[np.uint8]:
    """Tint the cells; every other pixel is untouched.

    Args:
        pixels: uint8 (H, W, 3) RGB.
        mask: uint8 (H, W), 0 or 255.
        table: uint8 (256, 3) of `blend_table`.

    Returns:
        uint8 (H, W, 3) RGB, a new array.
    """
    tinted = cv2.LUT(pixels, table[np.newaxis])
    composite: npt.NDArray[np.uint8] = pixels.copy()
    cv2.copyTo(tinted, mask, composite)
    return composite
