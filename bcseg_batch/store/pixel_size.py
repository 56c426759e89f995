"""How large a pixel is, where a file says so."""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import TYPE_CHECKING

import tifffile
from PIL import Image

from bcseg_batch.store.images import _PILLOW_FORMATS, _TIFF_MAGIC, _open_regular

if TYPE_CHECKING:
    from io import BufferedReader

SENSIBLE_UM = (0.01, 10.0)
"""What a pixel of a microscope can be. Screens and printers declare 72 to 1,200 dpi, 353 to 21 um,
and cameras write such values into photographs of slides; they say nothing about the slide."""

_INCH_UM = 25400.0
# The values of the tag ResolutionUnit; the last two are a common extension.
_UNIT_UM = {2: _INCH_UM, 3: 1e4, 4: 1e3, 5: 1.0}
_NAMED_UM = {
    "nm": 1e-3,
    "um": 1.0,
    "\u00b5m": 1.0,
    "\u03bcm": 1.0,
    "micron": 1.0,
    "microns": 1.0,
    "micrometer": 1.0,
    "mm": 1e3,
    "cm": 1e4,
    "inch": _INCH_UM,
}
_X_RESOLUTION, _Y_RESOLUTION, _RESOLUTION_UNIT = 282, 283, 296
# Sides that differ by more are no square pixel, and a length means two things.
_SQUARE = 0.02


def pixel_size_um(path: Path) -> float | None:
    """Read the side of a pixel from an image file's metadata; the pixels are not decoded.

    Of a TIFF, the first that there is: OME's PhysicalSizeX and Y, ImageJ's unit with the resolution
    tags, the MPP of a slide scanner, the resolution tags with their unit. Of other formats, the
    density that they declare.

    Args:
        path: the file, of any kind.

    Returns:
        Micrometres, between 0.01 and 10; None where the file does not say, says something else
        (the density of a screen), has oblong pixels, or cannot be read.
    """
    try:
        with _open_regular(path, repr(path.name)) as handle:
            is_tiff = handle.read(4) in _TIFF_MAGIC
            handle.seek(0)
            sides = _of_tiff(handle) if is_tiff else _of_other(handle)
    except Exception:  # noqa: BLE001 - metadata are an extra: no oddness in them may cost an image
        return None
    return None if sides is None else _sensible(*sides)


def _sensible(x_um: float, y_um: float) -> float | None:
    low, high = SENSIBLE_UM
    is_square = math.isclose(x_um, y_um, rel_tol=_SQUARE)
    return x_um if is_square and low <= x_um <= high else None


def _of_other(handle: BufferedReader) -> tuple[float, float] | None:
    with Image.open(handle, formats=_PILLOW_FORMATS) as image:
        density = image.info.get("dpi")
    return None if density is None else (_INCH_UM / density[0], _INCH_UM / density[1])


def _of_tiff(handle: BufferedReader) -> tuple[float, float] | None:
    with tifffile.TiffFile(handle) as tiff:
        page = tiff.pages.first
        by_ome = _of_ome(tiff.ome_metadata) if tiff.ome_metadata else None
        if by_ome is not None:
            return by_ome
        pixels_x, pixels_y = (
            _ratio(page.tags.valueof(tag)) for tag in (_X_RESOLUTION, _Y_RESOLUTION)
        )
        unit_um = _UNIT_UM.get(int(page.tags.valueof(_RESOLUTION_UNIT, default=2)))
        if tiff.imagej_metadata:
            # It may spell the unit as a Python or Java escape.
            name = str(tiff.imagej_metadata.get("unit", "")).replace("\\u00B5", "\u00b5")
            unit_um = _NAMED_UM.get(name.lower(), unit_um)
        per_pixel = re.search(r"\bMPP\s*=\s*([0-9.]+)", page.description)
        if per_pixel is not None:
            return float(per_pixel[1]), float(per_pixel[1])
    if unit_um is None or not pixels_x or not pixels_y:
        return None
    return unit_um / pixels_x, unit_um / pixels_y


def _ratio(value: tuple[int, int] | None) -> float | None:
    return None if value is None or not value[1] else value[0] / value[1]


def _of_ome(text: str) -> tuple[float, float] | None:
    """Read the sizes of the first image's pixels; without a unit they are micrometres."""
    pixels = re.search(r"<(?:\w+:)?Pixels\b[^>]*>", text)
    if pixels is None:
        return None
    sides = []
    for axis in "XY":
        size = re.search(rf'\bPhysicalSize{axis}="([^"]+)"', pixels[0])
        unit = re.search(rf'\bPhysicalSize{axis}Unit="([^"]+)"', pixels[0])
        scale_um = _NAMED_UM.get(unit[1]) if unit else 1.0
        if size is None or scale_um is None:
            return None
        sides.append(float(size[1]) * scale_um)
    return sides[0], sides[1]
