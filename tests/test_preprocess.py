"""The network sees what the original's transforms made of an image, bit for bit."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torchvision import transforms

from bcseg_batch.segment.preprocess import preprocess, resize_rgb, to_network_input


def noise(shape_hw: tuple[int, int], seed: int = 0) -> npt.NDArray[np.uint8]:
    return np.random.default_rng(seed).integers(0, 256, (*shape_hw, 3), dtype=np.uint8)


def original_transform(pixels: npt.NDArray[np.uint8], side_px: int) -> npt.NDArray[np.float32]:
    steps = transforms.Compose([transforms.Resize((side_px, side_px)), transforms.ToTensor()])
    result: npt.NDArray[np.float32] = steps(Image.fromarray(pixels)).numpy()
    return result


@pytest.mark.parametrize("shape_hw", [(1, 1), (1, 900), (333, 517), (512, 512), (1201, 1599)])
def test_as_torchvision_at_the_products_size(shape_hw: tuple[int, int]) -> None:
    pixels = noise(shape_hw)
    ours = preprocess(pixels, 512)
    assert ours.dtype == np.float32
    assert ours.flags.c_contiguous
    np.testing.assert_array_equal(ours, original_transform(pixels, 512))


@settings(max_examples=60, deadline=None)
@given(
    shape_hw=st.tuples(st.integers(1, 90), st.integers(1, 90)),
    side_px=st.integers(1, 70),
    seed=st.integers(0, 99),
)
def test_as_torchvision_at_any_size(shape_hw: tuple[int, int], side_px: int, seed: int) -> None:
    pixels = noise(shape_hw, seed)
    # Of what is taller than wide Pillow 13 and later differ from the earlier ones, by one level.
    levels = 1 if shape_hw[0] > shape_hw[1] else 0
    difference = preprocess(pixels, side_px) - original_transform(pixels, side_px)
    assert np.abs(difference).max() <= (levels + 1e-3) / 255


def test_the_pillow_that_is_installed_makes_no_difference() -> None:
    pixels = np.array([[95, 217], [15, 215], [248, 69], [205, 61], [29, 19]], np.uint8)
    # Across: 156, 115, 159, 133, 24; then down with weights 3, 4, 5, 4, 3 of 19.
    resized = resize_rgb(np.repeat(pixels[..., np.newaxis], 3, axis=2), 1)
    assert resized.ravel().tolist() == [122, 122, 122]


def test_every_value_scales_as_totensor_does() -> None:
    ramp = np.repeat(np.arange(256, dtype=np.uint8)[np.newaxis, :, np.newaxis], 3, axis=2)
    expected = transforms.ToTensor()(Image.fromarray(ramp)).numpy()
    np.testing.assert_array_equal(to_network_input(ramp), expected)


def test_channels_stay_red_green_blue() -> None:
    red = np.zeros((5, 9, 3), np.uint8)
    red[..., 0] = 255
    assert resize_rgb(red, 16)[8, 8].tolist() == [255, 0, 0]
    assert preprocess(red, 16).max(axis=(1, 2)).tolist() == [1.0, 0.0, 0.0]


def test_the_image_itself_is_left_alone() -> None:
    pixels = noise((40, 30))
    pixels.flags.writeable = False
    before = pixels.copy()
    preprocess(pixels, 32)[...] = 0
    np.testing.assert_array_equal(pixels, before)
