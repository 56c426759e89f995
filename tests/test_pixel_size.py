"""The size of a pixel: taken where a file tells it, and only if a microscope could have made it."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tifffile
from PIL import Image

from bcseg_batch.store.pixel_size import pixel_size_um

PIXELS = np.zeros((20, 30, 3), np.uint8)


def tiff(tmp_path: Path, **options: Any) -> Path:
    path = tmp_path / "image.tif"
    tifffile.imwrite(path, PIXELS, photometric="rgb", **options)
    return path


@pytest.mark.parametrize(
    ("unit", "per_unit"),
    [("CENTIMETER", 40_000.0), ("INCH", 101_600.0), ("MILLIMETER", 4_000.0), ("MICROMETER", 4.0)],
)
def test_resolution_tags(tmp_path: Path, unit: str, per_unit: float) -> None:
    path = tiff(tmp_path, resolution=(per_unit, per_unit), resolutionunit=unit, metadata=None)
    assert pixel_size_um(path) == pytest.approx(0.25)


@pytest.mark.parametrize(("unit", "size"), [("µm", 0.25), ("nm", 250.0), (None, 0.25)])
def test_ome(tmp_path: Path, unit: str | None, size: float) -> None:
    units = {f"PhysicalSize{axis}Unit": unit for axis in "XY"} if unit else {}
    path = tmp_path / "image.ome.tif"
    metadata = {"axes": "YXS", "PhysicalSizeX": size, "PhysicalSizeY": size, **units}
    tifffile.imwrite(path, PIXELS, photometric="rgb", ome=True, metadata=metadata)
    assert pixel_size_um(path) == pytest.approx(0.25)


@pytest.mark.parametrize("unit", ["um", "micron", "\\u00B5m"])
def test_imagej(tmp_path: Path, unit: str) -> None:
    path = tiff(tmp_path, imagej=True, resolution=(4.0, 4.0), metadata={"unit": unit})
    assert pixel_size_um(path) == pytest.approx(0.25)


def test_slide_scanners(tmp_path: Path) -> None:
    description = "Aperio Image Library v10\r\n20x30|AppMag = 40|MPP = 0.2498"
    assert pixel_size_um(tiff(tmp_path, description=description, metadata=None)) == 0.2498


@pytest.mark.parametrize("dpi", [72, 96, 300, 1200])
@pytest.mark.parametrize("suffix", [".png", ".jpg", ".tif", ".bmp"])
def test_the_density_of_a_screen_is_no_pixel_size(tmp_path: Path, suffix: str, dpi: int) -> None:
    path = tmp_path / f"image{suffix}"
    Image.fromarray(PIXELS).save(path, dpi=(dpi, dpi))
    assert pixel_size_um(path) is None


def test_a_png_that_tells(tmp_path: Path) -> None:
    path = tmp_path / "image.png"
    Image.fromarray(PIXELS).save(path, dpi=(101_600, 101_600))
    assert pixel_size_um(path) == pytest.approx(0.25, rel=1e-3)


def test_oblong_pixels_have_no_size(tmp_path: Path) -> None:
    path = tiff(tmp_path, resolution=(40_000.0, 30_000.0), resolutionunit="CENTIMETER")
    assert pixel_size_um(path) is None


def test_no_unit_is_no_size(tmp_path: Path) -> None:
    assert pixel_size_um(tiff(tmp_path, resolution=(4.0, 4.0), resolutionunit="NONE")) is None
    assert pixel_size_um(tiff(tmp_path)) is None


def test_nothing_odd_is_an_error(tmp_path: Path) -> None:
    text, cut, pipe = tmp_path / "text.tif", tmp_path / "cut.tif", tmp_path / "pipe.tif"
    text.write_text("no image")
    cut.write_bytes(tiff(tmp_path).read_bytes()[:30])
    os.mkfifo(pipe)
    for path in (text, cut, pipe, tmp_path, tmp_path / "never.tif"):
        assert pixel_size_um(path) is None


def test_odd_files(data_dir: Path) -> None:
    """Of all of these one declares a density that a microscope could have: 6153 to the cm."""
    sizes = {path.name: pixel_size_um(path) for path in (data_dir / "oddfiles").iterdir()}
    told = {name: size for name, size in sizes.items() if size is not None}
    assert told == {"16_bit_noise.tif": pytest.approx(1e4 / 6153)}
