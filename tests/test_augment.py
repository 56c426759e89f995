"""Augmentation changes image and mask together, or the image alone."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bcseg_training.augment import Recipe, Sample, augment, crop_affine, vary_colour, vary_optics

seeds = st.integers(0, 10_000)


def blocky_sample(shape_hw: tuple[int, int] = (96, 128)) -> Sample:
    """An image that shows its own mask: white where the target is 1."""
    rng = np.random.default_rng(0)
    coarse = rng.integers(0, 2, (shape_hw[0] // 16, shape_hw[1] // 16))
    cell = np.kron(coarse, np.ones((16, 16))).astype(np.float32)
    image = np.repeat((cell * 255).astype(np.uint8)[..., np.newaxis], 3, axis=2)
    target = cell[..., np.newaxis]
    return Sample(image, target, np.ones_like(target))


@settings(max_examples=60, deadline=None)
@given(seed=seeds, size_px=st.sampled_from([32, 64, 160]))
def test_image_and_mask_stay_aligned(seed: int, size_px: int) -> None:
    sample = blocky_sample()
    # Not below 1: there the image is blurred first, on purpose.
    cropped = crop_affine(np.random.default_rng(seed), sample, size_px=size_px, scale=(1.0, 1.7))
    assert cropped.image.shape == (size_px, size_px, 3)
    assert cropped.target.shape == cropped.weight.shape == (size_px, size_px, 1)
    difference = np.abs(cropped.image[..., :1] / 255 - cropped.target)
    assert difference.max() < 0.02


@settings(max_examples=40, deadline=None)
@given(seed=seeds)
def test_shrunken_image_and_mask_stay_aligned(seed: int) -> None:
    cropped = crop_affine(
        np.random.default_rng(seed), blocky_sample((192, 256)), size_px=96, scale=(0.5, 0.8)
    )
    agree = (cropped.image[..., :1] > 127) == (cropped.target > 0.5)
    assert agree.mean() > 0.97


@settings(max_examples=40, deadline=None)
@given(seed=seeds, size_px=st.integers(16, 200))
def test_what_lies_outside_is_mirrored(seed: int, size_px: int) -> None:
    """The target is 1 everywhere in the image, and the ground around it would be seen as 0."""
    ones = np.ones((60, 80, 1), np.float32)
    sample = Sample(np.full((60, 80, 3), 200, np.uint8), ones, ones)
    cropped = crop_affine(np.random.default_rng(seed), sample, size_px=size_px, scale=(0.5, 2.0))
    assert (cropped.target == 1).all()
    assert (cropped.image == 200).all()
    assert 0 <= cropped.weight.min() <= cropped.weight.max() <= 1


def test_a_crop_larger_than_the_image_counts_only_the_image() -> None:
    ones = np.ones((32, 32, 1), np.float32)
    sample = Sample(np.zeros((32, 32, 3), np.uint8), ones, ones)
    rng = np.random.default_rng(0)
    cropped = crop_affine(rng, sample, size_px=128, scale=(1.0, 1.0), aspect=1.0)
    assert cropped.weight.sum() == pytest.approx(32 * 32, rel=0.05)
    assert cropped.weight[0, 0] == 0
    assert cropped.weight[64, 64] == 1


@pytest.mark.parametrize("recipe", ["none", "standard"])
def test_recipes_repeat(recipe: Recipe) -> None:
    sample = blocky_sample()
    first, second = (
        augment(np.random.default_rng([1, 2]), sample, recipe, size_px=64) for _ in range(2)
    )
    for name in ("image", "target", "weight"):
        np.testing.assert_array_equal(getattr(first, name), getattr(second, name))
    assert first.image.dtype == np.uint8
    assert first.image.shape == (64, 64, 3)
    assert first.target.dtype == first.weight.dtype == np.float32
    other = augment(np.random.default_rng([1, 3]), sample, recipe, size_px=64)
    assert not np.array_equal(first.image, other.image)


def test_no_recipe_at_the_full_size_is_the_sample_itself() -> None:
    sample = blocky_sample((96, 96))
    assert augment(np.random.default_rng(0), sample, "none", size_px=96) is sample


@settings(max_examples=60, deadline=None)
@given(seed=seeds)
def test_a_plain_crop_is_a_window(seed: int) -> None:
    y, x = np.mgrid[:40, :50].astype(np.float32)
    target = np.stack([y, x], axis=2)
    image = np.stack([y, x, y], axis=2).astype(np.uint8)
    crop = augment(np.random.default_rng(seed), Sample(image, target, target), "none", size_px=32)
    top, left = crop.target[0, 0]
    np.testing.assert_array_equal(crop.target[..., 0], top + y[:32, :32])
    np.testing.assert_array_equal(crop.target[..., 1], left + x[:32, :32])
    np.testing.assert_array_equal(crop.image[..., :2], crop.target.astype(np.uint8))


@settings(max_examples=40, deadline=None)
@given(seed=seeds)
def test_colour_is_varied_per_value_and_keeps_its_order(seed: int) -> None:
    ramp = np.repeat(np.arange(256, dtype=np.uint8)[np.newaxis, :, np.newaxis], 3, axis=2)
    varied = vary_colour(np.random.default_rng(seed), ramp)
    assert varied.dtype == np.uint8
    assert varied.shape == ramp.shape
    assert (np.diff(varied[0].astype(int), axis=0) >= 0).all()
    assert ramp[0, 7, 0] == 7


def test_colour_of_no_strength_changes_a_level_at_most() -> None:
    ramp = np.repeat(np.arange(256, dtype=np.uint8)[np.newaxis, :, np.newaxis], 3, axis=2)
    same = vary_colour(np.random.default_rng(0), ramp, strength=0)
    assert np.abs(same.astype(int) - ramp).max() <= 1
    np.testing.assert_array_equal(same[0, 128:], ramp[0, 128:])


@settings(max_examples=40, deadline=None)
@given(seed=seeds)
def test_optics_keep_shape_range_and_the_input(seed: int) -> None:
    image = blocky_sample((48, 64)).image
    before = image.copy()
    result = vary_optics(np.random.default_rng(seed), image)
    assert result.shape == image.shape
    assert result.dtype == np.uint8
    np.testing.assert_array_equal(image, before)
    assert np.abs(result.astype(float) - image).mean() < 60
