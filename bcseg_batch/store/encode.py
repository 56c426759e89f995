"""From pixels to the bytes of an output file."""

from __future__ import annotations

import io
from typing import Any

import imagecodecs
import numpy as np
import numpy.typing as npt
import simplejpeg
import tifffile

from bcseg_batch.errors import UnsupportedImageError
from bcseg_batch.store.provenance import into_jpeg, into_png
from bcseg_batch.store.tags import NO_TAGS, Tags

# The format's own limit is 65,535; libjpeg stops a little below it.
_JPEG_MAX_SIDE_PX = 65500
# From zlib.h and png.h.
_ZLIB_RLE = 3
_PNG_FILTER_NONE = 0x08
_PNG_FILTER_UP = 0x20


def encode_png(pixels: npt.NDArray[np.uint8], provenance: str | None = None) -> bytes:
    """Encode losslessly, for speed rather than for the last byte.

    Args:
        pixels: uint8 (H, W) grey or (H, W, 3) RGB.
        provenance: ASCII, for the comment.
    """
    # Runs of equal bytes are all there is to find: in a mask as it is, in a photograph among the
    # differences of neighbours. A search for longer patterns takes three times as long for more
    # bytes.
    line_filter = _PNG_FILTER_NONE if pixels.ndim == 2 else _PNG_FILTER_UP
    data: bytes = imagecodecs.png_encode(  # type: ignore[assignment]  # without `out`: bytes
        _in_order(pixels), level=1, strategy=_ZLIB_RLE, filter=line_filter
    )
    return data if provenance is None else into_png(data, provenance)


def _in_order(pixels: npt.NDArray[np.uint8]) -> npt.NDArray[np.uint8]:
    """Give pixels that lie one after the other; numpy takes a mirrored single one for that too."""
    return pixels.copy() if min(pixels.strides) < 0 else np.ascontiguousarray(pixels)


def encode_jpeg(
    pixels: npt.NDArray[np.uint8], *, quality: int, provenance: str | None = None
) -> bytes:
    """Encode as JPEG.

    Args:
        pixels: uint8 (H, W, 3) RGB.
        quality: 1..100.
        provenance: ASCII, for the comment.

    Raises:
        UnsupportedImageError: a side is longer than the format allows.
    """
    if max(pixels.shape) > _JPEG_MAX_SIDE_PX:
        raise UnsupportedImageError(
            f"a composite of {pixels.shape[1]}x{pixels.shape[0]} pixels does not fit into a JPEG: "
            "set outputs.composite_format to png"
        )
    data: bytes = simplejpeg.encode_jpeg(_in_order(pixels), quality=quality, colorsubsampling="420")
    return data if provenance is None else into_jpeg(data, provenance)


def encode_labels(labels: npt.NDArray[np.integer[Any]], tags: Tags = NO_TAGS) -> bytes:
    """Encode labels as TIFF: 16 bit, or 32 where there are more than 65,535.

    Args:
        labels: integers (H, W), 0 background.
        tags: what the file says of itself.
    """
    dtype = np.uint16 if labels.max(initial=0) <= np.iinfo(np.uint16).max else np.uint32
    return encode_grey_tiff(labels.astype(dtype), tags)


def encode_grey_tiff(pixels: npt.NDArray[Any], tags: Tags = NO_TAGS) -> bytes:
    """Encode one channel as TIFF, losslessly.

    One page in strips, Deflate without differences of neighbours: libtiff, ImageJ, Bio-Formats
    (CellProfiler) and tifffile without imagecodecs (ilastik) all have that built in. ImageJ 1.53
    passes over the differences under this compression, and shows stripes.

    Args:
        pixels: uint8, uint16, uint32 or float32 (H, W).
        tags: what the file says of itself.
    """
    arguments: dict[str, Any] = {}
    if tags.pixel_size_um is not None:
        per_cm = 1e4 / tags.pixel_size_um
        arguments |= {"resolution": (per_cm, per_cm), "resolutionunit": "CENTIMETER"}
    buffer = io.BytesIO()
    tifffile.imwrite(
        buffer,
        pixels,
        compression="zlib",
        compressionargs={"level": 1},
        metadata=None,
        description=tags.provenance,
        **arguments,
    )
    return buffer.getvalue()
