"""Windows of large TIFFs: the same pixels as the whole image."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import tifffile
from hypothesis import given, settings
from hypothesis import strategies as st

from bcseg_batch.errors import ImageChangedError, ImageError
from bcseg_batch.store.images import decode_image
from bcseg_batch.store.raster import TiffRaster, open_raster

MAX_PIXELS = 10**8
SHAPE_HW = (331, 277)


def samples(*shape: int, dtype: npt.DTypeLike = np.uint8, seed: int = 0) -> npt.NDArray[Any]:
    limit = np.iinfo(dtype).max + 1
    return np.random.default_rng(seed).integers(0, limit, shape, dtype=dtype)


def smooth() -> npt.NDArray[np.uint8]:
    y, x = np.mgrid[: SHAPE_HW[0], : SHAPE_HW[1]]
    waves = [127 + 120 * np.sin(y / 40 + i) * np.cos(x / 50) for i in range(3)]
    return np.stack(waves, axis=-1).astype(np.uint8)


RGB = {"photometric": "rgb"}
STORED: dict[str, tuple[npt.NDArray[Any], dict[str, Any]]] = {
    "contiguous": (samples(*SHAPE_HW, 3), RGB),
    "contiguous planar": (samples(3, *SHAPE_HW), RGB | {"planarconfig": "separate"}),
    "contiguous 16 bit": (samples(*SHAPE_HW, 3, dtype=np.uint16), RGB),
    "grey": (samples(*SHAPE_HW), {"photometric": "minisblack"}),
    "inverted grey strips": (
        samples(*SHAPE_HW),
        {"photometric": "miniswhite", "compression": "lzw", "rowsperstrip": 7},
    ),
    "alpha": (samples(*SHAPE_HW, 4), RGB | {"extrasamples": ["unassalpha"]}),
    "strips": (samples(*SHAPE_HW, 3), RGB | {"compression": "zlib", "rowsperstrip": 16}),
    "predicted strips": (
        samples(*SHAPE_HW, 3, dtype=np.uint16),
        RGB | {"compression": "lzw", "rowsperstrip": 10, "predictor": True},
    ),
    "tiles": (samples(*SHAPE_HW, 3), RGB | {"compression": "zlib", "tile": (64, 48)}),
    "plain tiles": (samples(*SHAPE_HW, 3), RGB | {"tile": (32, 64)}),
    "planar tiles": (
        samples(3, *SHAPE_HW),
        RGB | {"planarconfig": "separate", "compression": "lzw", "tile": (64, 64)},
    ),
    "jpeg tiles": (smooth(), {"photometric": "ycbcr", "compression": "jpeg", "tile": (64, 64)}),
    "palette": (
        samples(*SHAPE_HW),
        {
            "photometric": "palette",
            "colormap": samples(3, 256, dtype=np.uint16),
            "compression": "zlib",
            "tile": (64, 64),
        },
    ),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tiffs")
    for name, (pixels, options) in STORED.items():
        for byteorder in "<>":
            path = folder / f"{name}{byteorder}.tif"
            tifffile.imwrite(path, pixels, byteorder=byteorder, bigtiff=byteorder == ">", **options)
    return folder


def opened(path: Path, **options: int) -> TiffRaster:
    raster = open_raster(path, **({"max_pixels": MAX_PIXELS} | options))
    assert raster is not None
    return raster


@pytest.mark.parametrize("byteorder", ["<", ">"])
@pytest.mark.parametrize("name", STORED)
def test_windows_are_those_of_the_whole_image(folder: Path, name: str, byteorder: str) -> None:
    path = folder / f"{name}{byteorder}.tif"
    whole = decode_image(path, max_pixels=MAX_PIXELS)
    with opened(path) as raster:
        assert raster.shape_hw == whole.pixels.shape[:2]
        for window in ((0, 331, 0, 277), (0, 1, 0, 1), (330, 331, 276, 277), (60, 70, 40, 200)):
            top, bottom, left, right = window
            pixels = raster.read(*window)
            assert np.array_equal(pixels, whole.pixels[top:bottom, left:right]), window
        assert raster.notes == whole.notes
        assert (raster.sha256, raster.size_bytes, raster.mtime_ns) == (
            whole.sha256,
            whole.size_bytes,
            whole.mtime_ns,
        )
        raster.check_unchanged()


@settings(max_examples=40, deadline=None)
@given(data=st.data(), name=st.sampled_from(["strips", "tiles", "planar tiles", "contiguous"]))
def test_any_window(folder: Path, data: st.DataObject, name: str) -> None:
    top, left = data.draw(st.integers(0, 330)), data.draw(st.integers(0, 276))
    bottom, right = data.draw(st.integers(top + 1, 331)), data.draw(st.integers(left + 1, 277))
    path = folder / f"{name}<.tif"
    stored = STORED[name][0]
    whole = np.moveaxis(stored, 0, -1) if stored.shape[0] == 3 else stored
    with opened(path) as raster:
        window = raster.read(top, bottom, left, right)
        assert np.array_equal(window, whole[top:bottom, left:right])


@pytest.mark.parametrize(("name", "segments"), [("strips", 21), ("tiles", 6 * 6)])
def test_reading_down_the_image_decodes_each_segment_once(
    folder: Path, name: str, segments: int
) -> None:
    with opened(folder / f"{name}<.tif") as raster:
        for top in range(0, 331, 10):
            raster.read(top, min(331, top + 13), 0, 277)
        assert raster.decoded_segments == segments


def test_what_is_kept_is_bounded(tmp_path: Path) -> None:
    """A second pass over an image that is larger than the cache decodes it again."""
    path = tmp_path / "large.tif"
    tifffile.imwrite(
        path, np.zeros((4096, 2048, 3), np.uint8), compression="zlib", tile=(256, 256), **RGB
    )
    with opened(path) as raster:
        for _ in range(2):
            for top in range(0, 4096, 256):
                raster.read(top, top + 256, 0, 2048)
        assert raster.decoded_segments == 2 * 16 * 8


def test_pages(tmp_path: Path) -> None:
    path = tmp_path / "pages.tif"
    pages = [samples(40, 50, 3, seed=i) for i in range(3)]
    with tifffile.TiffWriter(path) as writer:
        for page in pages:
            writer.write(page, compression="zlib", **RGB)
    with opened(path, page=2) as raster:
        assert np.array_equal(raster.read(0, 40, 0, 50), pages[2])
        assert raster.notes == ("page 3 of 3",)
    assert open_raster(path, max_pixels=MAX_PIXELS, page=3) is None


def test_what_is_decoded_whole(folder: Path, tmp_path: Path) -> None:
    """No window without a rule: None, and `decode_image` says what is to be said."""
    whole = {
        "png.png": b"\x89PNG\r\n\x1a\n",
        "empty.tif": b"",
        "cut.tif": (folder / "tiles<.tif").read_bytes()[:5000],
    }
    for name, content in whole.items():
        (tmp_path / name).write_bytes(content)
        assert open_raster(tmp_path / name, max_pixels=MAX_PIXELS) is None, name
    turned = tmp_path / "turned.tif"
    tifffile.imwrite(turned, samples(20, 30, 3), extratags=[(274, "H", 1, 6, True)], **RGB)
    assert open_raster(turned, max_pixels=MAX_PIXELS) is None
    floats = tmp_path / "floats.tif"
    tifffile.imwrite(floats, np.zeros((20, 30), np.float32))
    assert open_raster(floats, max_pixels=MAX_PIXELS) is None
    assert open_raster(folder / "tiles<.tif", max_pixels=331 * 277 - 1) is None
    huge = tmp_path / "huge_strip.tif"
    tifffile.imwrite(huge, np.zeros((4200, 4200), np.uint8), compression="zlib", rowsperstrip=4200)
    assert open_raster(huge, max_pixels=MAX_PIXELS) is None


def test_odd_files_are_read_alike_or_left_to_the_whole_decoder(data_dir: Path) -> None:
    read = 0
    for path in sorted((data_dir / "oddfiles").glob("*.tif*")):
        raster = open_raster(path, max_pixels=MAX_PIXELS)
        if raster is None:
            continue
        with raster:
            height, width = raster.shape_hw
            try:
                pixels = raster.read(0, height, 0, width)
            except ImageError as error:
                with pytest.raises(type(error)):
                    decode_image(path, max_pixels=MAX_PIXELS)
                continue
        assert np.array_equal(pixels, decode_image(path, max_pixels=MAX_PIXELS).pixels), path.name
        read += 1
    assert read >= 5


def test_a_damaged_segment_is_an_error_of_the_image(tmp_path: Path, folder: Path) -> None:
    content = bytearray((folder / "tiles<.tif").read_bytes())
    with tifffile.TiffFile(folder / "tiles<.tif") as tiff:
        offset = tiff.pages.first.dataoffsets[20]
    content[offset : offset + 40] = b"\xff" * 40
    path = tmp_path / "damaged.tif"
    path.write_bytes(content)
    with opened(path) as raster:
        raster.read(0, 10, 0, 277)
        with pytest.raises(ImageError, match=r"damaged\.tif"):
            raster.read(0, 331, 0, 277)


def test_a_file_that_changes_is_seen(tmp_path: Path, folder: Path) -> None:
    path = tmp_path / "changing.tif"
    path.write_bytes((folder / "tiles<.tif").read_bytes())
    with opened(path) as raster:
        assert raster.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()
        os.utime(path, ns=(0, 0))
        with pytest.raises(ImageChangedError, match=r"changing\.tif"):
            raster.check_unchanged()
    with pytest.raises(ImageChangedError, match="vanished"):
        open_raster(tmp_path / "never.tif", max_pixels=MAX_PIXELS)
