"""Each rule of docs/inputs.md, on files made for it."""

from __future__ import annotations

import hashlib
import io
import os
import socket
import struct
import warnings
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import tifffile
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from PIL import Image

from bcseg_batch.errors import (
    ImageChangedError,
    ImageError,
    ImageTooLargeError,
    TruncatedImageError,
    UnreadableImageError,
    UnsupportedImageError,
)
from bcseg_batch.store import images
from bcseg_batch.store.images import SUFFIXES, DecodedImage, decode_image

RGB = np.random.default_rng(7).integers(0, 256, (12, 17, 3), dtype=np.uint8)
GREY = RGB[..., 0]


def read(path: Path, **options: Any) -> DecodedImage:
    return decode_image(path, **({"max_pixels": 1_000_000} | options))


def repeated(grey: Any) -> npt.NDArray[np.uint8]:
    return np.repeat(np.asarray(grey, dtype=np.uint8)[..., None], 3, axis=2)


def save_tiff(path: Path, samples: Any, **options: Any) -> Path:
    tifffile.imwrite(path, samples, metadata=None, **options)
    return path


def expect(image: DecodedImage, pixels: Any) -> None:
    np.testing.assert_array_equal(image.pixels, pixels)
    assert image.pixels.dtype == np.uint8
    assert image.pixels.flags.c_contiguous


# What comes back -----------------------------------------------------------------------------


def test_the_identity_is_that_of_the_bytes_on_disk(tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    Image.fromarray(RGB).save(path)
    image = read(path)
    expect(image, RGB)
    assert image.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()
    assert (image.size_bytes, image.mtime_ns) == (path.stat().st_size, path.stat().st_mtime_ns)
    assert image.notes == ()


@pytest.mark.parametrize("suffix", [".png", ".bmp", ".ppm", ".tif", ".tga", ".webp", ".pcx"])
def test_lossless_formats_give_the_exact_pixels(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"a{suffix}"
    Image.fromarray(RGB).save(path, **({"lossless": True} if suffix == ".webp" else {}))
    expect(read(path), RGB)


@settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    size_wh=st.tuples(st.integers(1, 40), st.integers(1, 40)),
    mode=st.sampled_from(["RGB", "RGB", "L", "CMYK", "YCbCr"]),
    quality=st.integers(1, 100),
    subsampling=st.sampled_from(["4:4:4", "4:2:2", "4:2:0"]),
    progressive=st.booleans(),
    keep_rgb=st.booleans(),
    orientation=st.sampled_from([None, 1, 3, 6]),
    cut_bytes=st.sampled_from([0, 0, 1, 2, 3, 40]),
    tail=st.sampled_from([b"", b"", b"behind the end"]),
    flipped=st.none() | st.integers(0, 10_000),
    seed=st.integers(0, 100),
)
def test_no_jpeg_is_read_otherwise_than_by_pillow(
    tmp_path_factory: pytest.TempPathFactory,
    size_wh: tuple[int, int],
    mode: str,
    quality: int,
    subsampling: str,
    progressive: bool,
    keep_rgb: bool,
    orientation: int | None,
    cut_bytes: int,
    tail: bytes,
    flipped: int | None,
    seed: int,
) -> None:
    generator = np.random.default_rng(seed)
    pixels = generator.integers(0, 256, (*size_wh[::-1], 3), np.uint8)
    exif = Image.Exif()
    if orientation is not None:
        exif[274] = orientation
    buffer = io.BytesIO()
    Image.fromarray(pixels).convert(mode).save(
        buffer,
        "JPEG",
        quality=quality,
        subsampling=subsampling,
        progressive=progressive,
        keep_rgb=keep_rgb and mode == "RGB" and subsampling == "4:4:4",
        exif=exif,
    )
    data = bytearray(buffer.getvalue())
    del data[len(data) - cut_bytes :]
    if flipped is not None:
        data[2 + flipped % (len(data) - 2)] ^= 0x11
    path = tmp_path_factory.mktemp("jpeg") / "a.jpg"
    path.write_bytes(data + tail)

    def told(fast: bool) -> tuple[str, bytes]:
        with pytest.MonkeyPatch.context() as patch:
            if not fast:
                patch.setattr(images, "_plain_jpeg", lambda _data, _size: None)
            try:
                image = decode_image(path, max_pixels=10_000)
            except ImageError as error:
                return f"{type(error).__name__}: {error}", b""
            return f"{image.pixels.shape} {image.notes}", image.pixels.tobytes()

    assert told(fast=True) == told(fast=False)


def test_an_ordinary_jpeg_takes_the_fast_way(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (30, 40, 3), np.uint8)
    Image.fromarray(pixels).save(tmp_path / "a.jpg", quality=90)
    expected = np.asarray(Image.open(tmp_path / "a.jpg"))
    monkeypatch.setattr(Image.Image, "load", None)
    assert (decode_image(tmp_path / "a.jpg", max_pixels=10_000).pixels == expected).all()


def test_jpeg_gives_the_pixels_that_pillow_gives(tmp_path: Path) -> None:
    path = tmp_path / "a.jpg"
    Image.fromarray(RGB).save(path)
    expect(read(path), np.asarray(Image.open(path)))


def test_the_content_decides_not_the_suffix(tmp_path: Path) -> None:
    path = tmp_path / "png.jpg"
    Image.fromarray(RGB).save(path, format="PNG")
    expect(read(path), RGB)


def test_many_threads_at_once_read_the_same(tmp_path: Path) -> None:
    paths = []
    for number in range(6):
        paths.append(tmp_path / f"{number}{('.png', '.tif', '.webp')[number % 3]}")
        options = {"lossless": True} if number % 3 == 2 else {}
        Image.fromarray(RGB + np.uint8(number)).save(paths[-1], **options)
    with ThreadPoolExecutor(4) as pool:
        for number, image in zip(list(range(6)) * 5, pool.map(read, paths * 5), strict=True):
            expect(image, RGB + np.uint8(number))


def test_suffixes_are_sorted_and_cover_the_ordinary_formats() -> None:
    assert list(SUFFIXES) == sorted(set(SUFFIXES))
    assert all(suffix == suffix.lower() and suffix[0] == "." for suffix in SUFFIXES)
    assert {".jpg", ".jpeg", ".png", ".tif", ".tiff", ".bmp", ".webp"} <= set(SUFFIXES)
    assert not {".eps", ".ps", ".pdf", ".wmf", ".mpg", ".h5", ".ico"} & set(SUFFIXES)


def test_suffixes_are_all_that_the_libraries_read_but_for_the_named_exceptions() -> None:
    pillow = {
        suffix for suffix, name in Image.registered_extensions().items() if name in Image.OPEN
    }
    left_out = {
        ".blp", ".bufr", ".cur", ".emf", ".eps", ".grib", ".h5", ".hdf", ".icns", ".ico", ".iim",
        ".im", ".mpeg", ".mpg", ".ps", ".wmf",
    }  # fmt: skip
    assert pillow - set(SUFFIXES) <= left_out
    rules = (Path(__file__).parents[1] / "docs" / "inputs.md").read_text(encoding="utf-8")
    assert [suffix for suffix in left_out if f"`{suffix}`" not in rules] == []


# Modes ---------------------------------------------------------------------------------------


def test_one_bit_becomes_black_and_white(tmp_path: Path) -> None:
    bits = GREY > 127
    path = tmp_path / "a.png"
    Image.fromarray(bits).save(path)
    expect(read(path), repeated(bits * 255))


def test_grey_is_repeated(tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    Image.fromarray(GREY).save(path)
    expect(read(path), repeated(GREY))


def test_palette_is_looked_up(tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    image = Image.new("P", (2, 1))
    image.putpalette([10, 20, 30, 40, 50, 60])
    image.putpixel((1, 0), 1)
    image.save(path)
    expect(read(path), [[[10, 20, 30], [40, 50, 60]]])


def test_transparent_palette_entry_is_white(tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    image = Image.new("P", (2, 1))
    image.putpalette([10, 20, 30, 40, 50, 60])
    image.putpixel((1, 0), 1)
    image.save(path, transparency=1)
    decoded = read(path)
    expect(decoded, [[[10, 20, 30], [255, 255, 255]]])
    assert decoded.notes == ("transparency laid over white",)


@pytest.mark.parametrize("mode", ["L", "RGB"])
def test_transparent_colour_is_white(tmp_path: Path, mode: str) -> None:
    path = tmp_path / "a.png"
    colour: Any = 9 if mode == "L" else (9, 9, 9)
    image = Image.new(mode, (2, 1), colour)
    image.putpixel((0, 0), 7 if mode == "L" else (7, 7, 7))
    image.save(path, transparency=colour)
    expect(read(path), [[[7, 7, 7], [255, 255, 255]]])


@pytest.mark.parametrize("suffix", [".png", ".tif"])
def test_alpha_is_laid_over_white(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"a{suffix}"
    pixels = np.array([[[100, 0, 200, 255], [100, 0, 200, 0], [100, 0, 200, 51]]], dtype=np.uint8)
    Image.fromarray(pixels).save(path)
    decoded = read(path)
    expect(decoded, [[[100, 0, 200], [255, 255, 255], [224, 204, 244]]])
    assert decoded.notes == ("transparency laid over white",)


@pytest.mark.parametrize("suffix", [".png", ".tif"])
def test_grey_with_alpha_is_laid_over_white(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"a{suffix}"
    image = Image.new("LA", (2, 1), (100, 255))
    image.putpixel((1, 0), (100, 51))
    image.save(path)
    expect(read(path), repeated([[100, 224]]))


def test_premultiplied_alpha_of_tiff_is_not_multiplied_again(tmp_path: Path) -> None:
    pixels = np.array([[[20, 0, 40, 51], [0, 0, 0, 0]]], dtype=np.uint8)
    path = save_tiff(tmp_path / "a.tif", pixels, photometric="rgb", extrasamples=["assocalpha"])
    expect(read(path), [[[224, 204, 244], [255, 255, 255]]])


@pytest.mark.parametrize("suffix", [".tif", ".jpg"])
def test_cmyk_is_converted_plainly(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"a{suffix}"
    Image.new("CMYK", (16, 8), (0, 255, 255, 0)).save(path, quality=100)
    decoded = read(path)
    assert np.abs(decoded.pixels.astype(int) - (255, 0, 0)).max() <= 2
    assert decoded.notes == ("CMYK converted to RGB without a colour profile",)


def test_ycbcr_tiff_is_converted(tmp_path: Path) -> None:
    path = tmp_path / "a.tif"
    image = Image.fromarray(RGB).convert("YCbCr")
    image.save(path)
    expect(read(path), np.asarray(image.convert("RGB")))


def test_jpeg_inside_tiff_is_converted_once(tmp_path: Path) -> None:
    path = tmp_path / "a.tif"
    Image.new("RGB", (32, 16), (200, 40, 90)).save(path, compression="jpeg", quality=95)
    assert np.abs(read(path).pixels.astype(int) - (200, 40, 90)).max() <= 3


def test_lab_is_converted_to_srgb(tmp_path: Path) -> None:
    path = tmp_path / "a.tif"
    # L* 100, a* 0, b* 0 is white; L* 54.3, a* 80.8, b* 69.9 is the red of sRGB under D50,
    # which whole numbers meet to a few levels.
    lab = Image.frombytes("LAB", (2, 1), bytes([255, 0, 0, 138, 81, 70]))
    lab.save(path)
    decoded = read(path)
    assert np.abs(decoded.pixels.astype(int) - [[[255, 255, 255], [255, 0, 0]]]).max() <= 6
    assert decoded.notes == ("CIELAB converted to sRGB",)


# Deep samples --------------------------------------------------------------------------------


def test_sixteen_bits_scale_by_their_depth_not_by_what_is_there(tmp_path: Path) -> None:
    samples = np.array([[0, 128, 129, 4095, 65535 // 2, 65535]], dtype=np.uint16)
    expected = repeated([[0, 0, 1, 16, 127, 255]])
    for path in (tmp_path / "a.tif", tmp_path / "a.png", tmp_path / "a.pgm"):
        Image.fromarray(samples).save(path)
        decoded = read(path)
        expect(decoded, expected)
        assert decoded.notes == ("16-bit samples scaled by 65535",)


def test_declared_twelve_bits_have_full_scale_4095(tmp_path: Path) -> None:
    samples = np.array([[0, 8, 9, 2048, 4095, 4094]], dtype=np.uint16)
    path = save_tiff(
        tmp_path / "a.tif", samples, photometric="minisblack", bitspersample=12, compression="jpeg",
        compressionargs={"level": 100, "lossless": True},
    )  # fmt: skip
    with tifffile.TiffFile(path) as tiff:
        assert tiff.pages[0].tags[258].value == 12
    decoded = read(path)
    assert decoded.notes == ("12-bit samples scaled by 4095",)
    expect(decoded, repeated([[0, 0, 1, 128, 255, 255]]))


@pytest.mark.parametrize("bits", [2, 4])
def test_fewer_than_eight_bits_reach_white(tmp_path: Path, bits: int) -> None:
    full = 2**bits - 1
    samples = np.arange(full + 1, dtype=np.uint8)[None]
    path = save_tiff(tmp_path / "a.tif", samples, photometric="minisblack", bitspersample=bits)
    expect(read(path), repeated(samples * (255 // full)))


def test_deep_colour_is_rounded_to_nearest(tmp_path: Path) -> None:
    samples = np.array([[[0, 128, 129], [255, 65406, 65407]]], dtype=np.uint16)
    path = save_tiff(tmp_path / "a.tif", samples, photometric="rgb")
    expect(read(path), [[[0, 0, 1], [1, 254, 255]]])


def test_sixteen_bit_colour_png_is_within_a_level(tmp_path: Path) -> None:
    levels = np.array([[[0, 4, 250], [255, 128, 127]]], dtype=np.uint16)
    raw = b"".join(b"\0" + row.astype(">u2").tobytes() for row in levels * 257)
    path = tmp_path / "a.png"
    path.write_bytes(png(2, 1, depth=16, colour=2, raw=raw))
    expect(read(path), levels)


def test_thirty_two_bits(tmp_path: Path) -> None:
    samples = np.array([[0, 2**31, 2**32 - 1]], dtype=np.uint32)
    path = save_tiff(tmp_path / "a.tif", samples, photometric="minisblack")
    expect(read(path), repeated([[0, 128, 255]]))


def test_signed_samples_clip_below_zero(tmp_path: Path) -> None:
    samples = np.array([[-32768, -1, 0, 16384, 32767]], dtype=np.int16)
    path = save_tiff(tmp_path / "a.tif", samples, photometric="minisblack")
    decoded = read(path)
    expect(decoded, repeated([[0, 0, 0, 128, 255]]))
    assert decoded.notes == ("signed 16-bit samples scaled by 32767, negative ones black",)


@pytest.mark.parametrize("dtype", ["float16", "float32", "float64"])
def test_floats_run_from_zero_to_one(tmp_path: Path, dtype: str) -> None:
    samples = np.array([[0, 0.25, 0.5, 1]], dtype=dtype)
    path = save_tiff(tmp_path / "a.tif", samples, photometric="minisblack")
    decoded = read(path)
    expect(decoded, repeated([[0, 64, 128, 255]]))
    assert decoded.notes == ("floating point samples scaled from 0 to 1",)


def test_dark_floats_stay_dark(tmp_path: Path) -> None:
    path = save_tiff(tmp_path / "a.tif", np.full((4, 4), 0.1, np.float32), photometric="minisblack")
    expect(read(path), np.full((4, 4, 3), 26))


def test_declared_range_of_floats_is_used(tmp_path: Path) -> None:
    path = save_tiff(
        tmp_path / "a.tif",
        np.array([[0, 50, 200]], dtype=np.float32),
        photometric="minisblack",
        extratags=[(340, "f", 1, 0.0, True), (341, "f", 1, 200.0, True)],
    )
    decoded = read(path)
    expect(decoded, repeated([[0, 64, 255]]))
    assert decoded.notes == ("floating point samples scaled from 0 to 200",)


@pytest.mark.parametrize("stranger", [255.0, -3.0, np.nan, np.inf])
def test_floats_outside_are_refused_beyond_a_hundredth(tmp_path: Path, stranger: float) -> None:
    samples = np.full((20, 20), 0.5, dtype=np.float32)
    samples[0, :4] = stranger  # 1 % exactly
    expected = {255.0: 255, -3.0: 0, np.inf: 255}.get(stranger, 0)
    decoded = read(save_tiff(tmp_path / "few.tif", samples, photometric="minisblack"))
    assert decoded.pixels[0, 0].tolist() == [expected] * 3
    assert "1.00% of the samples were outside and are clipped" in decoded.notes
    samples[0, 4] = stranger
    with pytest.raises(UnsupportedImageError, match="SMinSampleValue"):
        read(save_tiff(tmp_path / "many.tif", samples, photometric="minisblack"))


def test_float_pfm_follows_the_same_rule(tmp_path: Path) -> None:
    path = tmp_path / "a.pfm"
    Image.fromarray(np.array([[0, 0.5, 1]], dtype=np.float32)).save(path)
    expect(read(path), repeated([[0, 128, 255]]))
    Image.fromarray(np.array([[0, 128, 255]], dtype=np.float32)).save(path)
    with pytest.raises(UnsupportedImageError, match=r"a\.pfm"):
        read(path)


def test_deep_samples_of_unknown_scale_are_refused(tmp_path: Path) -> None:
    cards = ("SIMPLE  = T", "BITPIX  = 16", "NAXIS   = 2", "NAXIS1  = 2", "NAXIS2  = 1", "END")
    header = "".join(card.ljust(80) for card in cards).ljust(2880).encode()
    path = tmp_path / "a.fits"
    path.write_bytes(header + b"\0\1\2\3".ljust(2880, b"\0"))
    with pytest.raises(UnsupportedImageError, match="deep integer samples"):
        read(path)


def test_complex_samples_are_refused(tmp_path: Path) -> None:
    path = save_tiff(tmp_path / "a.tif", np.ones((3, 4), np.complex64), photometric="minisblack")
    with pytest.raises(UnsupportedImageError, match=r"a\.tif"):
        read(path)


# TIFF layouts --------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["uint8", "uint16"])
def test_miniswhite_is_inverted(tmp_path: Path, dtype: str) -> None:
    samples = np.array([[0, np.iinfo(dtype).max]], dtype=dtype)
    path = save_tiff(tmp_path / "a.tif", samples, photometric="miniswhite")
    expect(read(path), repeated([[255, 0]]))


@pytest.mark.parametrize(
    "options",
    [
        {"planarconfig": "separate"},
        {"tile": (16, 16)},
        {"rowsperstrip": 5},
        {"compression": "lzw"},
        {"compression": "lzw", "predictor": True},
        {"compression": "zlib", "tile": (16, 32)},
        {"compression": "packbits"},
        {"compression": "zstd"},
        {"byteorder": ">"},
        {"bigtiff": True},
        {"bigtiff": True, "byteorder": ">"},
    ],
)
def test_storage_makes_no_difference(tmp_path: Path, options: dict[str, Any]) -> None:
    stored = RGB.transpose(2, 0, 1) if options.get("planarconfig") else RGB
    path = save_tiff(tmp_path / "a.tif", stored, photometric="rgb", **options)
    expect(read(path), RGB)


def test_planar_tiles_of_sixteen_bits(tmp_path: Path) -> None:
    stored = RGB.transpose(2, 0, 1).astype(np.uint16) * 257
    path = save_tiff(
        tmp_path / "a.tif", stored, photometric="rgb", planarconfig="separate", tile=(16, 16)
    )
    expect(read(path), RGB)


@pytest.mark.parametrize("factor", [256, 257])
def test_tiff_palettes_of_both_conventions(tmp_path: Path, factor: int) -> None:
    colours = np.random.default_rng(3).integers(0, 256, (3, 256), dtype=np.uint16)
    path = save_tiff(
        tmp_path / "a.tif", GREY, photometric="palette", colormap=(colours * factor).astype("u2")
    )
    expect(read(path), colours.T[GREY])


def test_the_first_page_is_read_and_noted_and_another_on_demand(tmp_path: Path) -> None:
    for suffix in (".tif", ".gif", ".webp"):
        path = tmp_path / f"a{suffix}"
        pages = [Image.new("RGB", (9, 5), colour) for colour in ("black", "white", "black")]
        options = {"lossless": True} if suffix == ".webp" else {}
        pages[0].save(path, save_all=True, append_images=pages[1:], **options)
        first, second = read(path), read(path, page=1)
        expect(first, np.zeros((5, 9, 3)))
        expect(second, np.full((5, 9, 3), 255))
        assert (first.notes[0], second.notes[0]) == ("page 1 of 3", "page 2 of 3")
        for page in (3, -1):
            with pytest.raises(UnsupportedImageError, match=r"3 page\(s\)"):
                read(path, page=page)


def test_a_single_image_has_no_second_page(tmp_path: Path) -> None:
    for suffix in (".jpg", ".tif"):
        path = tmp_path / f"a{suffix}"
        Image.fromarray(RGB).save(path)
        with pytest.raises(UnsupportedImageError, match="no page 2"):
            read(path, page=1)


@pytest.mark.parametrize("count", [2, 5, 7])
def test_sample_counts_without_a_meaning_are_refused(tmp_path: Path, count: int) -> None:
    path = save_tiff(
        tmp_path / "a.tif", np.zeros((4, 6, count), np.uint8), photometric="minisblack",
        planarconfig="contig",
    )  # fmt: skip
    with pytest.raises(UnsupportedImageError, match=f"{count} samples"):
        read(path)


def test_an_undeclared_fourth_channel_leaves_the_colours(tmp_path: Path) -> None:
    path = save_tiff(
        tmp_path / "a.tif", np.dstack([RGB, GREY]), photometric="rgb", extrasamples=["unspecified"]
    )
    decoded = read(path)
    expect(decoded, RGB)
    assert decoded.notes == ("an extra channel left out",)


def test_missing_tiles_are_damage_not_black(tmp_path: Path) -> None:
    path = save_tiff(tmp_path / "a.tif", RGB, photometric="rgb", tile=(16, 16))
    with tifffile.TiffFile(path, mode="r+") as tiff:
        tags = tiff.pages[0].tags
        tags["TileByteCounts"].overwrite(0 if tags["TileByteCounts"].count == 1 else (0, 0))
    with pytest.raises(UnreadableImageError, match="missing"):
        read(path)


# Orientation ---------------------------------------------------------------------------------

TURNS: dict[int, Any] = {
    1: lambda a: a,
    2: np.fliplr,
    3: lambda a: np.rot90(a, 2),
    4: np.flipud,
    5: lambda a: np.fliplr(np.rot90(a, -1)),
    6: lambda a: np.rot90(a, -1),
    7: lambda a: np.fliplr(np.rot90(a, 1)),
    8: lambda a: np.rot90(a, 1),
}


@pytest.mark.parametrize("suffix", [".png", ".tif", ".webp"])
@pytest.mark.parametrize("number", range(1, 9))
def test_orientation_is_applied(tmp_path: Path, suffix: str, number: int) -> None:
    path = tmp_path / f"a{suffix}"
    exif = Image.Exif()
    exif[274] = number
    options = {"lossless": True} if suffix == ".webp" else {}
    Image.fromarray(RGB).save(path, exif=exif, **options)
    decoded = read(path)
    expect(decoded, TURNS[number](RGB))
    assert decoded.notes == (() if number == 1 else (f"orientation {number} applied",))


@pytest.mark.parametrize("exif", [b"Exif\0\0MM\0*\0\0\0\x99", b"Exif\0\0nonsense", b"Exif\0\0"])
@pytest.mark.filterwarnings("ignore::UserWarning:PIL")  # as the module itself does when imported
def test_broken_exif_means_upright(tmp_path: Path, exif: bytes) -> None:
    path = tmp_path / "a.jpg"
    Image.fromarray(RGB).save(path, exif=exif)
    decoded = read(path)
    assert decoded.pixels.shape == RGB.shape
    assert decoded.notes == ("orientation tag unreadable, taken as upright",)


@pytest.mark.parametrize("suffix", [".png", ".tif"])
def test_a_number_that_is_no_orientation_means_upright(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"a{suffix}"
    exif = Image.Exif()
    exif[274] = 9
    Image.fromarray(RGB).save(path, exif=exif)
    decoded = read(path)
    expect(decoded, RGB)
    assert decoded.notes == ("orientation tag unreadable, taken as upright",)


# Sizes ---------------------------------------------------------------------------------------


def png(width: int, height: int, *, depth: int = 8, colour: int = 0, raw: bytes = b"") -> bytes:
    def chunk(kind: bytes, body: bytes) -> bytes:
        return (
            struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))
        )

    header = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)
    parts = (chunk(b"IHDR", header), chunk(b"IDAT", zlib.compress(raw)), chunk(b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


def test_a_bomb_is_refused_by_its_header_without_a_warning(tmp_path: Path) -> None:
    path = tmp_path / "bomb.png"
    path.write_bytes(png(60_000, 60_000))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        with pytest.raises(ImageTooLargeError, match=r"60000 x 60000.*pixel limit"):
            read(path)
    assert caught == []


@pytest.mark.parametrize("suffix", [".png", ".tif", ".jpg"])
def test_the_limit_itself_is_allowed(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"a{suffix}"
    Image.fromarray(RGB).save(path)
    assert read(path, max_pixels=12 * 17).pixels.shape == RGB.shape
    with pytest.raises(ImageTooLargeError, match="17 x 12"):
        read(path, max_pixels=12 * 17 - 1)


def test_a_tiff_bomb_is_refused_by_its_header(tmp_path: Path) -> None:
    path = save_tiff(tmp_path / "a.tif", RGB, photometric="rgb")
    with tifffile.TiffFile(path, mode="r+") as tiff:
        tiff.pages[0].tags["ImageWidth"].overwrite(60_000)
        tiff.pages[0].tags["ImageLength"].overwrite(60_000)
    with pytest.raises(ImageTooLargeError, match="60000 x 60000"):
        read(path)
    # Under a limit that lets it pass, the file is far too short for what it declares.
    with pytest.raises(TruncatedImageError):
        read(path, max_pixels=10**12)


def test_zero_pixels_are_damage(tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    path.write_bytes(png(0, 5))
    with pytest.raises(UnreadableImageError, match=r"a\.png"):
        read(path)


def test_no_memory_is_too_large(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.png"
    Image.fromarray(RGB).save(path)

    def exhausted(*_: object) -> None:
        raise MemoryError

    monkeypatch.setattr(Image.Image, "load", exhausted)
    with pytest.raises(ImageTooLargeError, match="memory"):
        read(path)


# The file itself -----------------------------------------------------------------------------


def test_a_missing_file_has_vanished(tmp_path: Path) -> None:
    with pytest.raises(ImageChangedError, match=r"gone\.png.*vanished"):
        read(tmp_path / "gone.png")
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(ImageChangedError):
        read(tmp_path / "file" / "below.png")


@pytest.mark.timeout(20)
def test_a_pipe_is_refused_without_waiting(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.jpg")
    with pytest.raises(UnreadableImageError, match="not a regular file"):
        read(tmp_path / "pipe.jpg")


def test_folders_and_sockets_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "folder.jpg").mkdir()
    with pytest.raises(UnreadableImageError, match="directory"):
        read(tmp_path / "folder.jpg")
    monkeypatch.chdir(tmp_path)  # the name of a socket must be short
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind("socket.jpg")
        with pytest.raises(UnreadableImageError, match=r"socket\.jpg"):
            read(tmp_path / "socket.jpg")


def test_a_file_that_the_system_refuses_is_unreadable(tmp_path: Path) -> None:
    # A link to itself: refused to everybody, as a missing permission is refused to all but root.
    path = tmp_path / "a.png"
    path.symlink_to(path)
    with pytest.raises(UnreadableImageError, match=r"a\.png.*permissions"):
        read(path)


def test_an_empty_file_never_finished(tmp_path: Path) -> None:
    (tmp_path / "a.jpg").touch()
    with pytest.raises(TruncatedImageError, match="is empty"):
        read(tmp_path / "a.jpg")


@pytest.mark.parametrize("content", [b"x", b"hello, I am a text", bytes(4000), b"%!PS-Adobe-3.0\n"])
def test_other_content_is_unreadable(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "a.jpg").write_bytes(content)
    with pytest.raises(UnreadableImageError, match="not an image"):
        read(tmp_path / "a.jpg")


@pytest.mark.parametrize("change", ["append", "replace", "delete", "touch"])
@pytest.mark.parametrize("suffix", [".png", ".tif"])
def test_a_file_that_changes_while_it_is_read_is_not_a_failure(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: str, suffix: str
) -> None:
    path = tmp_path / f"a{suffix}"
    Image.fromarray(RGB).save(path)
    copy = tmp_path / "copy"
    copy.write_bytes(path.read_bytes())

    def interfere(*_: object) -> None:
        if change == "append":
            path.write_bytes(path.read_bytes() + b"more")
        elif change == "replace":
            copy.rename(path)
        elif change == "delete":
            path.unlink()
        else:
            os.utime(path, ns=(1, 1))

    # The header's size is checked in the middle of reading: the moment for another program.
    check = images._check_size
    monkeypatch.setattr(images, "_check_size", lambda *a: (check(*a), interfere())[0])
    with pytest.raises(ImageChangedError):
        read(path)


def test_a_change_outranks_the_damage_it_causes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "a.png"
    Image.fromarray(RGB).save(path)
    check = images._check_size
    monkeypatch.setattr(images, "_check_size", lambda *a: (check(*a), path.write_bytes(b"x"))[0])
    with pytest.raises(ImageChangedError):
        read(path)


@pytest.mark.parametrize(
    "name",
    [
        b"with space.png",
        b'it\'s "quoted".png',
        b"line\nbreak.png",
        b"-rf.png",
        "mañana 血.png".encode(),
        b"\xff\xfe latin.png",
    ],
)
def test_any_name_is_read_and_can_be_printed(tmp_path: Path, name: bytes) -> None:
    path = tmp_path / os.fsdecode(name)
    Image.fromarray(RGB).save(path)
    expect(read(path), RGB)
    tiff = path.with_suffix(".tif")
    Image.fromarray(RGB).save(tiff)
    expect(read(tiff), RGB)
    path.write_bytes(b"no longer an image")
    with pytest.raises(UnreadableImageError) as caught:
        read(path)
    sentence = str(caught.value)
    sentence.encode("utf-8")
    assert "\n" not in sentence
    assert str(tmp_path) not in sentence


def test_files_are_closed_again(tmp_path: Path) -> None:
    good, bad = tmp_path / "a.tif", tmp_path / "b.png"
    Image.fromarray(RGB).save(good)
    bad.write_bytes(b"\x89PNG\r\n\x1a\n")
    before = len(list(Path("/proc/self/fd").iterdir()))
    for _ in range(5):
        read(good)
        with pytest.raises(ImageError):
            read(bad)
    assert len(list(Path("/proc/self/fd").iterdir())) == before


def test_a_keyboard_interrupt_passes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.png"
    Image.fromarray(RGB).save(path)

    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(Image.Image, "load", interrupted)
    with pytest.raises(KeyboardInterrupt):
        read(path)


# Damage --------------------------------------------------------------------------------------


def encoded(kind: str) -> bytes:
    stream = io.BytesIO()
    smooth = Image.fromarray(RGB).resize((40, 30), Image.Resampling.BICUBIC)
    if kind == "tiff-lzw":
        smooth.save(stream, format="TIFF", compression="tiff_lzw")
    elif kind == "tiff-tiled":
        tifffile.imwrite(stream, np.asarray(smooth), photometric="rgb", tile=(16, 16))
    elif kind == "jpeg-progressive":
        smooth.save(stream, format="JPEG", progressive=True)
    else:
        smooth.save(stream, format=kind)
    return stream.getvalue()


KINDS = ["JPEG", "jpeg-progressive", "PNG", "TIFF", "tiff-lzw", "tiff-tiled", "BMP", "WEBP", "GIF"]
SOUND = {kind: encoded(kind) for kind in KINDS}


@pytest.mark.filterwarnings("ignore::UserWarning:PIL")  # as the module itself does when imported
@settings(
    max_examples=250,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(kind=st.sampled_from(KINDS), share=st.floats(0, 1, exclude_max=True))
@example(kind="JPEG", share=0.999)
@example(kind="PNG", share=0.999)
def test_a_file_cut_anywhere_is_an_image_error_or_complete(
    tmp_path: Path, kind: str, share: float
) -> None:
    path = tmp_path / "a.img"
    whole = SOUND[kind]
    path.write_bytes(whole)
    complete = read(path).pixels
    path.write_bytes(whole[: int(share * len(whole))])
    try:
        pixels = read(path).pixels
    except (UnreadableImageError, UnsupportedImageError, ImageTooLargeError):
        return
    np.testing.assert_array_equal(pixels, complete)


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "TIFF", "tiff-lzw", "tiff-tiled", "WEBP"])
def test_a_file_cut_in_its_pixels_may_still_be_being_written(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "a.img"
    path.write_bytes(SOUND[kind][: len(SOUND[kind]) * 9 // 10])
    with pytest.raises(TruncatedImageError, match="still being copied"):
        read(path)


@pytest.mark.filterwarnings("ignore::UserWarning:PIL")  # as the module itself does when imported
@settings(
    max_examples=250,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(
    kind=st.sampled_from(KINDS),
    damage=st.lists(st.tuples(st.floats(0, 1, exclude_max=True), st.integers(0, 255)), max_size=6),
)
def test_flipped_bytes_raise_nothing_but_image_errors(
    tmp_path: Path, kind: str, damage: list[tuple[float, int]]
) -> None:
    path = tmp_path / "a.img"
    content = bytearray(SOUND[kind])
    for place, value in damage:
        # Most flips belong into the header, where they do harm.
        content[int(place**3 * len(content))] = value
    path.write_bytes(content)
    try:
        pixels = read(path).pixels
    except (UnreadableImageError, UnsupportedImageError, ImageTooLargeError):
        return
    assert pixels.dtype == np.uint8
    assert pixels.shape[2:] == (3,)
