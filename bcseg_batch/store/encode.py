"""From pixels to the bytes of an output file."""

from __future__ import annotations

import io

import numpy as np
import numpy.typing as npt
from PIL import Image

from bcseg_batch.errors import UnsupportedImageError

# The format's own limit is 65,535; libjpeg stops a little below it.
_JPEG_MAX_SIDE_PX = 65500


def encode_png(pixels: npt.NDArray[np.uint8]) -> bytes:
    """Encode losslessly, for speed rather than for the last byte.

    Args:
        pixels: uint8 (H, W) grey or (H, W, 3) RGB.
    """
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG", compress_level=1)
    return buffer.getvalue()


def encode_jpeg(pixels: npt.NDArray[np.uint8], *, quality: int) -> bytes:
    """Encode as JPEG.

    Args:
        pixels: uint8 (H, W, 3) RGB.
        quality: 1..100.

    Raises:
        UnsupportedImageError: a side is longer than the format allows.
    """
    if max(pixels.shape) > _JPEG_MAX_SIDE_PX:
        raise UnsupportedImageError(
            f"a composite of {pixels.shape[1]}x{pixels.shape[0]} pixels does not fit into a JPEG: "
            "set outputs.composite_format to png"
        )
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "JPEG", quality=quality)
    return buffer.getvalue()
