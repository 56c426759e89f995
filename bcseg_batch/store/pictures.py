"""Reads the pictures of an output folder back at the size at which they are shown."""

from __future__ import annotations

import math
from pathlib import Path

import cv2
import numpy as np
import numpy.typing as npt
import simplejpeg

from bcseg_batch.errors import UnreadableImageError
from bcseg_batch.store.images import decode_image

_JPEG_START = b"\xff\xd8"


def read_small(path: Path, side_px: int, *, max_pixels: int) -> npt.NDArray[np.uint8]:
    """Read a picture, made smaller until no side is longer than `side_px`.

    A JPEG is decoded at a fraction of its size, which takes a fraction of the time.

    Args:
        path: the picture.
        side_px: the longest side that is wanted; a smaller picture keeps its size.
        max_pixels: the most pixels that any other kind of picture may have.

    Returns:
        uint8 (H, W, 3) RGB.

    Raises:
        ImageError: it is missing, damaged, or too large.
    """
    try:
        with path.open("rb") as file:
            data = file.read(2)
            if data == _JPEG_START:
                data += file.read()
    except OSError as error:
        raise UnreadableImageError(f"{path} cannot be read: {error.strerror}") from error
    if data[:2] == _JPEG_START:
        pixels = _read_jpeg(path, data, side_px)
    else:
        pixels = decode_image(path, max_pixels=max_pixels).pixels
    height, width = pixels.shape[:2]
    scale = side_px / max(height, width)
    if scale >= 1:
        return pixels
    size_wh = max(1, round(width * scale)), max(1, round(height * scale))
    return np.asarray(cv2.resize(pixels, size_wh, interpolation=cv2.INTER_AREA), np.uint8)


def _read_jpeg(path: Path, data: bytes, side_px: int) -> npt.NDArray[np.uint8]:
    try:
        height, width, *_ = simplejpeg.decode_jpeg_header(data)
        scale = min(1.0, side_px / max(height, width))
        pixels: npt.NDArray[np.uint8] = simplejpeg.decode_jpeg(
            data, "RGB", min_height=math.ceil(height * scale), min_width=math.ceil(width * scale)
        )
    except ValueError as error:
        raise UnreadableImageError(f"{path} is a damaged JPEG: {error}") from error
    return pixels
