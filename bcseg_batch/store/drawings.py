"""Reads masks and label images as other programs save them: the numbers, not how they look."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
import numpy.typing as npt
import tifffile
from PIL import Image

from bcseg_batch.errors import (
    ImageError,
    ImageTooLargeError,
    UnreadableImageError,
    UnsupportedImageError,
)

LOSSLESS_SUFFIXES = (".bmp", ".png", ".tif", ".tiff")
LOSSY_SUFFIXES = (".jfif", ".jpeg", ".jpg")

_TIFF_SUFFIXES = (".tif", ".tiff")
_TIFF_JPEG = (6, 7, 33007, 34892)
_WHITE_IS_ZERO, _PALETTE = 0, 3
_INVERTED = "its display is inverted (an inverting LUT): its numbers are taken, not its looks"
_COLOURED = "its colours are those of a look-up table: its numbers are taken"
_SAVE_AS = "Save it as PNG or TIFF."


@dataclass(frozen=True, slots=True, eq=False)
class Drawing:
    """The numbers of one mask or label image.

    Attributes:
        samples: integers or floats (H, W); a picture of three equal channels is one of one channel.
        notes: what was done beyond plain reading, one phrase each.
    """

    samples: npt.NDArray[Any]
    notes: tuple[str, ...] = ()


def read_drawing(path: Path, *, max_pixels: int) -> Drawing:
    """Read a mask or label image, whatever its display.

    Fiji shows masks through an inverting look-up table and labels through one of colours, and saves
    both; the numbers below are what was drawn.

    Args:
        path: PNG, BMP or TIFF of one page.
        max_pixels: the most pixels that are decoded.

    Raises:
        UnsupportedImageError: a JPEG, which changes numbers; a colour picture; several pages.
        ImageTooLargeError: more than `max_pixels`.
        UnreadableImageError: it is missing, damaged, or no image.
    """
    name = repr(path.name)
    if path.suffix.lower() in LOSSY_SUFFIXES:
        raise UnsupportedImageError(f"{name} is a JPEG, which changes what is saved. {_SAVE_AS}")
    read = _read_tiff if path.suffix.lower() in _TIFF_SUFFIXES else _read_by_pillow
    try:
        samples, notes = read(path, name, max_pixels)
    except ImageError:
        raise
    except Exception as error:  # decoders answer hostile bytes with any exception there is
        cause = " ".join(f"{type(error).__name__}: {error}".split())[:200]
        raise UnreadableImageError(f"{name} cannot be read ({cause}). {_SAVE_AS}") from error
    return Drawing(_one_channel(samples, name), tuple(notes))


def _check_size(name: str, width_px: int, height_px: int, max_pixels: int) -> None:
    if width_px * height_px > max_pixels:
        raise ImageTooLargeError(f"{name} has {width_px}x{height_px} pixels, above {max_pixels}.")


def _read_tiff(path: Path, name: str, max_pixels: int) -> tuple[npt.NDArray[Any], list[str]]:
    """Read the samples (H, W) or (H, W, S) of a TIFF."""
    with tifffile.TiffFile(path) as tiff:
        if len(tiff.pages) != 1:
            raise UnsupportedImageError(
                f"{name} has {len(tiff.pages)} pages. Save the one with the mask or labels alone."
            )
        page = cast("tifffile.TiffPage", tiff.pages[0])
        _check_size(name, page.imagewidth, page.imagelength, max_pixels)
        if page.compression in _TIFF_JPEG:
            raise UnsupportedImageError(
                f"{name} is compressed as JPEG, which changes what is saved. {_SAVE_AS}"
            )
        # (planes, depth, H, W, samples): one of planes and samples is 1.
        stored = page.asarray(squeeze=False, maxworkers=1)[:, 0]
        samples = np.moveaxis(stored, 0, -1).reshape(*stored.shape[1:3], -1)
        if samples.dtype == np.bool_:
            # A picture of one bit has no look-up table: its tag says what its bits mean.
            white = samples ^ (page.photometric == _WHITE_IS_ZERO)
            return white * np.uint8(255), []
        notes = {_WHITE_IS_ZERO: [_INVERTED], _PALETTE: [_COLOURED]}.get(int(page.photometric), [])
        return samples, notes


def _read_by_pillow(path: Path, name: str, max_pixels: int) -> tuple[npt.NDArray[Any], list[str]]:
    """Read the samples (H, W) or (H, W, S) of a PNG or BMP."""
    with Image.open(path, formats=("PNG", "BMP")) as image:
        _check_size(name, *image.size, max_pixels)
        image.load()
        if image.mode == "P":
            return _of_palette(image)
        samples = np.asarray(image)
    return (samples * np.uint8(255) if samples.dtype == np.bool_ else samples), []


def _of_palette(image: Image.Image) -> tuple[npt.NDArray[Any], list[str]]:
    """Tell a palette that is a display from one that merely lists the values that occur."""
    indices = np.asarray(image)
    palette = np.asarray(image.getpalette("RGB"), np.uint8).reshape(-1, 3)
    grey = palette[:, 0]
    if not (palette == grey[:, np.newaxis]).all():
        return indices, [_COLOURED]
    if len(grey) == 256 and (grey == 255 - np.arange(256)).all():
        return indices, [_INVERTED]
    return grey[indices], []


def _one_channel(samples: npt.NDArray[Any], name: str) -> npt.NDArray[Any]:
    """Take grey (H, W) from (H, W) or (H, W, S); an alpha channel has to be opaque."""
    if samples.ndim == 2:
        return samples
    colours, alpha = samples, None
    if samples.shape[2] in {2, 4}:
        colours, alpha = samples[..., :-1], samples[..., -1]
    grey = colours[..., 0]
    is_opaque = alpha is None or (alpha == alpha.max(initial=0)).all()
    if not is_opaque or not (colours == grey[..., np.newaxis]).all():
        raise UnsupportedImageError(
            f"{name} is a colour picture, perhaps an overlay or a screenshot. Save the mask or the "
            "labels themselves: in Fiji by Edit > Selection > Create Mask, in napari by selecting "
            "the labels layer and File > Save Selected Layers."
        )
    return grey
