"""What is written is read back as it was by others, and small enough."""

from __future__ import annotations

import io

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from PIL import Image

from bcseg_batch.errors import UnsupportedImageError
from bcseg_batch.store.encode import encode_jpeg, encode_png


@settings(max_examples=60, deadline=None)
@given(
    pixels=arrays.arrays(
        np.uint8,
        st.one_of(
            st.tuples(st.integers(1, 30), st.integers(1, 30)),
            st.tuples(st.integers(1, 30), st.integers(1, 30), st.just(3)),
        ),
    ),
    is_view=st.booleans(),
)
def test_png_is_lossless(pixels: np.ndarray, is_view: bool) -> None:
    given_pixels = pixels[::-1, ::-1] if is_view else pixels
    with Image.open(io.BytesIO(encode_png(given_pixels))) as image:
        assert image.mode == ("L" if pixels.ndim == 2 else "RGB")
        assert (np.asarray(image) == given_pixels).all()


def test_a_mask_takes_little_room() -> None:
    y, x = np.ogrid[:1200, :1600]
    mask = (((y % 100 - 50) ** 2 + (x % 100 - 50) ** 2 < 40**2) * np.uint8(255)).astype(np.uint8)
    assert len(encode_png(mask)) < mask.size / 40


def distance(data: bytes, pixels: np.ndarray) -> float:
    with Image.open(io.BytesIO(data)) as image:
        assert image.mode == "RGB"
        return float(np.sqrt(np.mean((np.asarray(image, np.float64) - pixels) ** 2)))


@pytest.mark.parametrize("quality", [50, 90, 100])
@pytest.mark.parametrize("size_hw", [(1, 1), (7, 5), (120, 161)])
def test_jpeg_is_as_true_as_pillow_s(size_hw: tuple[int, int], quality: int) -> None:
    rows, columns = np.mgrid[: size_hw[0], : size_hw[1]]
    pixels = np.stack([rows, columns, rows + columns], axis=-1).astype(np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "JPEG", quality=quality)
    ours = encode_jpeg(pixels, quality=quality)
    assert distance(ours, pixels) <= 1.05 * distance(buffer.getvalue(), pixels) + 0.3
    assert len(ours) <= 1.05 * len(buffer.getvalue()) + 50


def test_a_picture_too_wide_for_jpeg_is_refused() -> None:
    with pytest.raises(UnsupportedImageError, match="composite_format to png"):
        encode_jpeg(np.zeros((1, 65_501, 3), np.uint8), quality=90)
