"""What a GPU resizes is what Pillow and OpenCV make of the same image."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from bcseg_batch.segment import postprocess, preprocess
from bcseg_batch.segment.resample import pillow_taps, resize_rgb, resize_soft

SIDES = st.integers(1, 300)


@settings(deadline=None)
@given(height=SIDES, width=SIDES, size=st.integers(1, 130), seed=st.integers(0, 2**32 - 1))
def test_bytes_are_those_of_pillow(height: int, width: int, size: int, seed: int) -> None:
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    ours = resize_rgb(torch.from_numpy(pixels), size).numpy()
    np.testing.assert_array_equal(ours, preprocess.resize_rgb(pixels, size))


@pytest.mark.parametrize(
    "shape_hw", [(1200, 1600), (960, 1280), (512, 512), (513, 511), (37, 2000)]
)
def test_bytes_of_photographs_are_those_of_pillow(shape_hw: tuple[int, int]) -> None:
    pixels = np.random.default_rng(3).integers(0, 256, (*shape_hw, 3), dtype=np.uint8)
    # Plain white and black are where rounding and clipping would show.
    pixels[: shape_hw[0] // 3] = 255
    pixels[-shape_hw[0] // 3 :] = 0
    ours = resize_rgb(torch.from_numpy(pixels), 512).numpy()
    np.testing.assert_array_equal(ours, preprocess.resize_rgb(pixels, 512))


@given(before=st.integers(1, 5000), after=st.integers(1, 600))
def test_the_taps_of_a_pixel_add_up_to_one(before: int, after: int) -> None:
    taps = pillow_taps(before, after)
    assert ((taps.index >= 0) & (taps.index < before)).all()
    total = taps.weight.astype(np.int64).sum(axis=0)
    assert np.abs(total - 2**22).max() <= len(taps.weight)


@settings(deadline=None)
@given(
    shape_hw=st.tuples(st.integers(1, 90), st.integers(1, 90)),
    wanted_hw=st.tuples(SIDES, SIDES),
    seed=st.integers(0, 2**32 - 1),
)
def test_soft_maps_are_those_of_opencv(
    shape_hw: tuple[int, int], wanted_hw: tuple[int, int], seed: int
) -> None:
    soft = np.random.default_rng(seed).random(shape_hw, dtype=np.float32)
    ours = resize_soft(torch.from_numpy(soft), wanted_hw).numpy()
    theirs = postprocess.resize_probability(soft, wanted_hw)
    # OpenCV's own weights are float32, and its sums in another order.
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=2e-5)
