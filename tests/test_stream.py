"""Outputs written band by band: what ordinary readers make of them."""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path

import cv2
import numpy as np
import numpy.typing as npt
import pytest
import tifffile
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from bcseg_batch.store import stream
from bcseg_batch.store.pixel_size import pixel_size_um
from bcseg_batch.store.stream import LabelTiffWriter, MaskPngWriter, RgbTiffWriter, RowWriter
from bcseg_batch.store.tags import Tags


def mask_of(shape_hw: tuple[int, int]) -> npt.NDArray[np.uint8]:
    noise = np.random.default_rng(0).normal(size=shape_hw).astype(np.float32)
    return np.where(cv2.GaussianBlur(noise, (0, 0), 5) > 0, np.uint8(255), np.uint8(0))


def write(
    make: Callable[[io.BytesIO], RowWriter], rows: npt.NDArray[np.generic], step: int
) -> io.BytesIO:
    file = io.BytesIO()
    with make(file) as writer:
        for top in range(0, len(rows), step):
            writer.write(rows[top : top + step])
    file.seek(0)
    return file


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 90), st.integers(1, 90), st.integers(1, 40))
def test_a_mask_is_read_back(height_px: int, width_px: int, step: int) -> None:
    mask = mask_of((height_px, width_px))
    file = write(lambda f: MaskPngWriter(f, mask.shape), mask, step)
    with Image.open(file) as image:
        assert (image.format, image.mode) == ("PNG", "L")
        assert np.array_equal(np.asarray(image), mask)
    decoded = cv2.imdecode(np.frombuffer(file.getvalue(), np.uint8), cv2.IMREAD_UNCHANGED)
    assert np.array_equal(decoded, mask)


def test_a_large_mask_is_small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stream, "_CHUNK_BYTES", 1000)  # several chunks of data
    mask = mask_of((1500, 1200))
    file = write(lambda f: MaskPngWriter(f, mask.shape), mask, 100)
    assert file.getvalue().count(b"IDAT") > 3
    assert len(file.getvalue()) < mask.size / 10
    with Image.open(file) as image:
        assert np.array_equal(np.asarray(image), mask)


@pytest.mark.parametrize("is_big", [False, True])
@pytest.mark.parametrize("dtype", [np.uint16, np.uint32])
@pytest.mark.parametrize("shape_hw", [(1, 1), (700, 1300), (512, 512), (513, 511)])
def test_labels_are_read_back(
    monkeypatch: pytest.MonkeyPatch,
    shape_hw: tuple[int, int],
    dtype: type[np.uint16 | np.uint32],
    is_big: bool,
) -> None:
    if is_big:
        monkeypatch.setattr(stream, "_CLASSIC_BYTES", 0)
    top = np.iinfo(dtype).max + 1
    labels = np.random.default_rng(0).integers(0, top, shape_hw).astype(np.int64)
    file = write(lambda f: LabelTiffWriter(f, shape_hw, dtype=dtype), labels, 99)
    with tifffile.TiffFile(file) as tiff:
        page = tiff.pages.first
        assert tiff.is_bigtiff == is_big
        assert page.is_tiled
        assert page.dtype == dtype
        assert np.array_equal(page.asarray(), labels)
    if dtype is np.uint16 and not is_big:
        file.seek(0)
        with Image.open(file) as image:
            assert np.array_equal(np.asarray(image), labels)


@pytest.mark.parametrize("is_big", [False, True])
def test_a_composite_is_read_back(monkeypatch: pytest.MonkeyPatch, is_big: bool) -> None:
    if is_big:
        monkeypatch.setattr(stream, "_CLASSIC_BYTES", 0)
    y, x = np.mgrid[:900, :1100]
    waves = [127 + 120 * np.sin(y / 90 + i) * np.cos(x / 70) for i in range(3)]
    pixels = np.stack(waves, axis=-1).astype(np.uint8)
    file = write(lambda f: RgbTiffWriter(f, (900, 1100), quality=95), pixels, 130)
    assert len(file.getvalue()) < pixels.nbytes / 10
    with tifffile.TiffFile(file) as tiff:
        page = tiff.pages.first
        assert (page.is_tiled, int(page.compression), int(page.photometric)) == (True, 7, 6)
        read = page.asarray()
    assert read.shape == pixels.shape
    assert np.abs(read.astype(int) - pixels).mean() < 2
    if not is_big:
        # libtiff, on which most viewers stand
        file.seek(0)
        with Image.open(file) as image:
            assert np.abs(np.asarray(image.convert("RGB")).astype(int) - pixels).mean() < 2


def test_the_pixel_size_is_passed_on(tmp_path: Path) -> None:
    path = tmp_path / "labels.tif"
    for size_um in (0.0123, 0.25, 9.9):
        with path.open("wb") as file:
            writer = LabelTiffWriter(file, (5, 5), dtype=np.uint16, tags=Tags(size_um))
            writer.write(np.zeros((5, 5), np.uint16))
            writer.close()
        assert pixel_size_um(path) == pytest.approx(size_um, rel=1e-4)


def test_a_row_of_tiles_is_all_that_is_held() -> None:
    """Tiles are on their way to the disk as soon as their row is full."""
    file = io.BytesIO()
    writer = LabelTiffWriter(file, (5000, 600), dtype=np.uint32)
    sizes = []
    rng = np.random.default_rng(0)
    for _ in range(50):
        writer.write(rng.integers(0, 2**32, (100, 600)))
        sizes.append(len(file.getvalue()))
    raw = 4 * 600 * np.arange(100, 5001, 100)
    assert (raw - sizes < 1.1 * 4 * 600 * stream.TILE_PX).all()


@pytest.mark.parametrize(
    "make",
    [
        lambda f: MaskPngWriter(f, (10, 20)),
        lambda f: LabelTiffWriter(f, (10, 20), dtype=np.uint16),
        lambda f: RgbTiffWriter(f, (10, 20)),
    ],
)
def test_rows_that_do_not_fit_are_refused(make: Callable[[io.BytesIO], RowWriter]) -> None:
    depth = (3,) if isinstance(make(io.BytesIO()), RgbTiffWriter) else ()
    writer = make(io.BytesIO())
    with pytest.raises(ValueError, match="5 rows of 19 px after 0"):
        writer.write(np.zeros((5, 19, *depth), np.uint8))
    writer.write(np.zeros((9, 20, *depth), np.uint8))
    with pytest.raises(ValueError, match="9 of 10 rows"):
        writer.close()
    with pytest.raises(ValueError, match="2 rows of 20 px after 9"):
        writer.write(np.zeros((2, 20, *depth), np.uint8))


def test_a_failed_block_keeps_its_own_error() -> None:
    with (
        pytest.raises(RuntimeError, match="elsewhere"),
        MaskPngWriter(io.BytesIO(), (10, 20)),
    ):
        raise RuntimeError("elsewhere")
