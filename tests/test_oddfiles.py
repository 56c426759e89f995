"""Awkward, damaged and hostile files: each ends in pixels or in the right class of error."""

from __future__ import annotations

import csv
import subprocess
import sys
from typing import TYPE_CHECKING

import numpy as np
import pytest
from PIL import Image

from bcseg_batch.errors import (
    ImageError,
    ImageTooLargeError,
    TruncatedImageError,
    UnreadableImageError,
)
from bcseg_batch.store.images import SUFFIXES, decode_image

if TYPE_CHECKING:
    from pathlib import Path

MAX_PIXELS = 100_000_000

# The rest decodes.
BAD_FILES: dict[str, type[ImageError]] = {
    "bmp_b_badpalettesize.bmp": UnreadableImageError,
    "broken.png": UnreadableImageError,
    "broken_data_stream.png": TruncatedImageError,
    "crash-0c7e0e8e11ce787078f00b5b0ca409a167f070e0.tif": TruncatedImageError,
    "crash-2020-10-test.tif": UnreadableImageError,
    "crash-338516dbd2f0e83caddb8ce256c22db3bd6dc40f.tif": TruncatedImageError,
    "decompression_bomb.gif": ImageTooLargeError,
    "oom-225817ca0f8c663be7ab4b9e717b02c661e66834.tif": UnreadableImageError,
    "png_decompression_dos.png": UnreadableImageError,
    "seek_too_large.tif": TruncatedImageError,
    "truncated_end_chunk.png": TruncatedImageError,
    "truncated_image.png": TruncatedImageError,
    "truncated_jpeg.jpg": TruncatedImageError,
    "zero_height.j2k": UnreadableImageError,
    "zero_width.gif": UnreadableImageError,
}

# pytest turns warnings into errors, over the filters that the module sets for itself.
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:PIL")


@pytest.fixture(scope="module")
def folder(data_dir: Path) -> Path:
    return data_dir / "oddfiles"


@pytest.fixture(scope="module")
def manifest(folder: Path) -> list[dict[str, str]]:
    with (folder / "manifest.csv").open(newline="") as lines:
        return list(csv.DictReader(lines))


def pixels_of(path: Path) -> np.ndarray:
    return decode_image(path, max_pixels=MAX_PIXELS).pixels


def test_every_file_ends_as_expected(folder: Path, manifest: list[dict[str, str]]) -> None:
    assert {row["file"] for row in manifest} == {
        path.name for path in folder.iterdir() if path.suffix in SUFFIXES
    }
    errors: dict[str, ImageError] = {}
    for row in manifest:
        path = folder / row["file"]
        try:
            image = decode_image(path, max_pixels=MAX_PIXELS)
        except ImageError as error:
            errors[row["file"]] = error
        else:
            assert image.pixels.dtype == np.uint8
            assert image.pixels.flags.c_contiguous
            shape_hw = tuple(map(int, row["size"].split("x")))[::-1]
            # For TIFF the manifest has the size after turning, for the others before.
            if row["orientation"] in {"5", "6", "7", "8"} and row["format"] != "TIFF":
                shape_hw = shape_hw[::-1]
            assert image.pixels.shape == (*shape_hw, 3), row["file"]
    assert {name: type(error) for name, error in errors.items()} == BAD_FILES
    assert [name for name, error in errors.items() if name not in str(error)] == []
    assert [name for name, error in errors.items() if str(folder) in str(error)] == []


@pytest.mark.parametrize("number", range(2, 9))
def test_each_orientation_shows_the_same_upright_picture(folder: Path, number: int) -> None:
    upright = pixels_of(folder / "hopper.jpg").astype(int)
    image = decode_image(folder / f"hopper_orientation_{number}.jpg", max_pixels=MAX_PIXELS)
    assert image.notes == (f"orientation {number} applied",)
    # Another compression of the same picture: a few levels apart, turned it would be about 80.
    assert np.abs(image.pixels - upright).mean() < 8


@pytest.mark.parametrize(
    "name",
    [
        "avif_hopper.avif",
        "hopper.Lab.tif",
        "hopper.bmp",
        "hopper.gif",
        "hopper.iccprofile.tif",
        "hopper.png",
        "hopper.tif",
        "hopper.webp",
        "hopper_orientation_6.webp",
    ],
)
def test_the_same_picture_in_other_formats_looks_the_same(folder: Path, name: str) -> None:
    upright = pixels_of(folder / "hopper.jpg").astype(int)
    assert np.abs(pixels_of(folder / name) - upright).mean() < 8


@pytest.mark.parametrize(
    "name",
    [
        "g4-multi.tiff",
        "hopper.tif",
        "hopper_gray_4bpp.tif",
        "multipage-lastframe.tif",
        "multipage.tiff",
        "multipage_out_of_order.tiff",
        "tiff_gray_2_4_bpp_hopper2.tif",
        "tiff_strip_cmyk_16l_jpeg.tif",
        "tiff_strip_cmyk_jpeg.tif",
        "tiff_tiled_cmyk_jpeg.tif",
        "total-pages-zero.tif",
    ],
)
def test_tiffs_that_pillow_reads_have_the_same_pixels_there(folder: Path, name: str) -> None:
    with Image.open(folder / name) as image:
        expected = np.asarray(image.convert("RGB"))
    np.testing.assert_array_equal(pixels_of(folder / name), expected)


def test_three_storages_of_one_deep_image_agree(folder: Path) -> None:
    expected = pixels_of(folder / "tiff_16bit_RGB.tiff")
    assert expected.max() == round(39661 / 257)
    for name in ("tiff_strip_planar_16bit_RGB.tiff", "tiff_tiled_planar_16bit_RGB.tiff"):
        np.testing.assert_array_equal(pixels_of(folder / name), expected)
    transparent = pixels_of(folder / "tiff_16bit_RGBa.tiff")
    planar = pixels_of(folder / "tiff_tiled_planar_16bit_RGBa.tiff")
    np.testing.assert_array_equal(transparent, planar)


def test_cmyk_red_is_red_in_jpeg_and_in_tiff(folder: Path) -> None:
    for name in ("pil_sample_cmyk.jpg", "tiff_strip_cmyk_jpeg.tif", "truncated_app14.jpg"):
        red, green, blue = pixels_of(folder / name)[2, 5]
        assert red > 200, name
        assert max(green, blue) < 80, name


def test_nothing_but_our_own_words_reaches_the_terminal(
    folder: Path, manifest: list[dict[str, str]]
) -> None:
    script = (
        "import sys\n"
        "from pathlib import Path\n"
        "from bcseg_batch.errors import ImageError\n"
        "from bcseg_batch.store.images import SUFFIXES, decode_image\n"
        "for path in sorted(Path(sys.argv[1]).iterdir()):\n"
        "    if path.suffix in SUFFIXES:\n"
        "        try:\n"
        "            decode_image(path, max_pixels=100_000_000)\n"
        "            print('done')\n"
        "        except ImageError:\n"
        "            print('failed')\n"
    )
    run = subprocess.run(
        [sys.executable, "-W", "default", "-c", script, str(folder)],
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )
    assert run.stderr == ""
    assert run.returncode == 0
    ends = run.stdout.split()
    assert ends.count("failed") == len(BAD_FILES)
    assert ends.count("done") == len(manifest) - len(BAD_FILES)
