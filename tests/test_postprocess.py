"""From logits to the mask and the composite: the original's pixels, and soft maps cut last."""

from __future__ import annotations

import cv2
import numpy as np
import numpy.typing as npt
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from bcseg_batch.segment.postprocess import (
    Blend,
    blend_table,
    composite_image,
    mask_from_probability,
    mean_confidence,
    probability,
    resize_probability,
)

ORIGINAL = Blend.of((160, 0, 20), 0.3)
Shape = tuple[int, int]
shapes = st.tuples(st.integers(1, 70), st.integers(1, 70))


def soft_map(shape_hw: Shape, seed: int = 0) -> npt.NDArray[np.float32]:
    return np.random.default_rng(seed).random(shape_hw, dtype=np.float32)


def original_blood_red(
    pixels: npt.NDArray[np.uint8], mask: npt.NDArray[np.uint8]
) -> npt.NDArray[np.uint8]:
    """The original's loop over pixels."""
    result = pixels.copy()
    for y in range(pixels.shape[0]):
        for x in range(pixels.shape[1]):
            if mask[y, x] == 255:
                r, g, b = (int(value) for value in pixels[y, x])
                result[y, x] = (
                    int(0.7 * r + 0.3 * 160),
                    int(0.7 * g),
                    int(0.7 * b + 0.3 * 20),
                )
    return result


# Composite -------------------------------------------------------------------------------------


def test_blood_red_of_every_value_is_the_originals() -> None:
    ramp = np.repeat(np.arange(256, dtype=np.uint8)[np.newaxis, :, np.newaxis], 3, axis=2)
    mask = np.full((1, 256), 255, np.uint8)
    np.testing.assert_array_equal(
        composite_image(ramp, mask, ORIGINAL), original_blood_red(ramp, mask)
    )


@settings(max_examples=40, deadline=None)
@given(shape_hw=shapes, seed=st.integers(0, 999))
def test_blood_red_of_an_image_is_the_originals(shape_hw: Shape, seed: int) -> None:
    rng = np.random.default_rng(seed)
    pixels = rng.integers(0, 256, (*shape_hw, 3), dtype=np.uint8)
    mask = rng.choice(np.array([0, 255], np.uint8), shape_hw)
    before = pixels.copy()
    composite = composite_image(pixels, mask, ORIGINAL)
    np.testing.assert_array_equal(composite, original_blood_red(pixels, mask))
    np.testing.assert_array_equal(pixels, before)


def test_composite_of_a_view_and_of_read_only_pixels() -> None:
    pixels = np.random.default_rng(1).integers(0, 256, (20, 30, 3), dtype=np.uint8)
    mask = np.zeros((20, 30), np.uint8)
    mask[5:10] = 255
    turned = np.rot90(pixels)
    turned.flags.writeable = False
    expected = np.rot90(composite_image(pixels, mask, ORIGINAL))
    result = composite_image(turned, np.rot90(mask), ORIGINAL)
    np.testing.assert_array_equal(result, expected)


@settings(deadline=None)
@given(
    colour=st.tuples(*[st.integers(0, 255)] * 3),
    alpha=st.floats(0, 1),
    value=st.integers(0, 255),
)
def test_table_is_the_truncated_blend(
    colour: tuple[int, int, int], alpha: float, value: int
) -> None:
    row = blend_table(colour, alpha)[value]
    assert row.tolist() == [int((1 - alpha) * value + alpha * c) for c in colour]


@settings(deadline=None, max_examples=150)
@given(
    colour=st.tuples(*[st.integers(0, 255)] * 3),
    alpha=st.one_of(st.integers(0, 100).map(lambda percent: percent / 100), st.floats(0, 1)),
    width=st.integers(1, 40),
    seed=st.integers(0, 99),
)
def test_every_blend_is_that_of_its_table(
    colour: tuple[int, int, int], alpha: float, width: int, seed: int
) -> None:
    rng = np.random.default_rng(seed)
    values = rng.permuted(np.repeat(np.arange(256, dtype=np.uint8)[:, np.newaxis], 3, 1), axis=0)
    pixels = np.resize(values, (256, width, 3))
    table = blend_table(colour, alpha)
    expected = np.stack([table[:, c][pixels[..., c]] for c in range(3)], axis=2)
    mask = np.full(pixels.shape[:2], 255, np.uint8)
    composite = composite_image(pixels, mask, Blend.of(colour, alpha))
    np.testing.assert_array_equal(composite, expected)


def test_the_original_s_blend_is_a_line_with_exceptions_and_others_are_looked_up() -> None:
    assert ORIGINAL.line is not None
    assert len(ORIGINAL.short) > 0
    lines = [Blend.of((7, 100, 211), percent / 1000).line is not None for percent in range(1000)]
    assert 0 < sum(lines) < 1000


def test_ends_of_the_table() -> None:
    identity = np.repeat(np.arange(256)[:, np.newaxis], 3, axis=1)
    np.testing.assert_array_equal(blend_table((9, 8, 7), 0.0), identity)
    assert (blend_table((9, 8, 7), 1.0) == (9, 8, 7)).all()


# Probability -----------------------------------------------------------------------------------


def test_probability_is_the_sigmoid_without_overflow() -> None:
    logits = np.array(
        [-3e38, -1e4, -100, -20, -1, -1e-3, 0, 1e-3, 1, 20, 100, 1e4, 3e38, np.inf, -np.inf],
        np.float32,
    )
    result = probability(logits)
    assert result.dtype == np.float32
    np.testing.assert_allclose(result, torch.sigmoid(torch.from_numpy(logits)), atol=1e-7)
    assert result.min() == 0.0
    assert result.max() == 1.0
    assert (np.diff(result[:-2]) >= 0).all()


def test_cut_at_a_half_falls_where_the_originals_does() -> None:
    """On either side of logit 0; within one float32 step of it no arithmetic is defined."""
    magnitude = np.geomspace(2e-7, 50, 4000, dtype=np.float32)
    logits = np.concatenate([-magnitude, [np.float32(0)], magnitude])
    ours = probability(logits) > np.float32(0.5)
    np.testing.assert_array_equal(ours, (torch.sigmoid(torch.from_numpy(logits)) > 0.5).numpy())


def test_a_number_that_is_none_stays_none() -> None:
    assert np.isnan(probability(np.array([np.nan], np.float32))[0])


@given(shape_hw=shapes, seed=st.integers(0, 99))
def test_confidence_is_bounded(shape_hw: Shape, seed: int) -> None:
    assert 0.5 <= mean_confidence(soft_map(shape_hw, seed)) <= 1.0


def test_confidence_at_its_ends() -> None:
    assert mean_confidence(np.full((4, 4), 0.5, np.float32)) == 0.5
    assert mean_confidence(np.array([[0.0, 1.0]], np.float32)) == 1.0
    assert mean_confidence(np.array([[0.25, 0.75]], np.float32)) == pytest.approx(0.75)


# Resizing --------------------------------------------------------------------------------------


def test_same_size_is_the_map_itself() -> None:
    soft = soft_map((31, 17))
    assert resize_probability(soft, (31, 17)) is soft


@settings(max_examples=150, deadline=None)
@given(before=shapes, after=shapes, seed=st.integers(0, 99))
def test_resizing_gives_the_size_and_stays_in_range(before: Shape, after: Shape, seed: int) -> None:
    soft = soft_map(before, seed)
    result = resize_probability(soft, after)
    assert result.shape == after
    assert result.dtype == np.float32
    assert result.min() >= soft.min() - 1e-6
    assert result.max() <= soft.max() + 1e-6


@settings(max_examples=100, deadline=None)
@given(before=shapes, after=shapes, seed=st.integers(0, 99))
def test_shrinking_keeps_the_mean(before: Shape, after: Shape, seed: int) -> None:
    after = (min(before[0], after[0]), min(before[1], after[1]))
    soft = soft_map(before, seed)
    assert resize_probability(soft, after).mean() == pytest.approx(soft.mean(), abs=1e-4)


@settings(max_examples=60, deadline=None)
@given(before=shapes, factors=st.tuples(st.integers(1, 4), st.integers(1, 4)))
def test_growing_keeps_the_mean_roughly(before: Shape, factors: Shape) -> None:
    soft = cv2.GaussianBlur(soft_map(before), (0, 0), 2)
    after = (before[0] * factors[0], before[1] * factors[1])
    assert resize_probability(soft, after).mean() == pytest.approx(soft.mean(), abs=0.03)


@pytest.mark.parametrize("after", [(30, 200), (200, 30)])
def test_an_axis_that_shrinks_is_averaged_while_the_other_grows(after: Shape) -> None:
    """Stripes of one pixel across the shrinking axis have to vanish, not to alias."""
    stripes = np.zeros((100, 100), np.float32)
    if after[0] < after[1]:
        stripes[::2] = 1
    else:
        stripes[:, ::2] = 1
    result = resize_probability(stripes, after)
    assert np.abs(result - 0.5).max() < 0.2
    assert result.mean() == pytest.approx(0.5, abs=0.01)


def test_height_and_width_are_not_exchanged() -> None:
    soft = np.zeros((40, 60), np.float32)
    soft[:10, :] = 1
    result = resize_probability(soft, (80, 30))
    assert result[:18].min() > 0.9
    assert result[22:].max() < 0.1


# Mask ------------------------------------------------------------------------------------------


def test_soft_map_is_resized_before_it_is_cut() -> None:
    """A faint pixel beside a sure one moves the edge; after a cut it could not."""
    soft = np.zeros((8, 8), np.float32)
    soft[:, 3] = 0.51
    soft[:, 4:] = 1.0
    mask = mask_from_probability(soft, (128, 128), 0.5)
    cut_first = resize_probability((soft > 0.5).astype(np.float32), (128, 128)) > 0.5
    np.testing.assert_array_equal(mask > 0, resize_probability(soft, (128, 128)) > 0.5)
    assert (mask > 0).sum() < cut_first.sum()


def test_cells_are_not_dilated() -> None:
    """A disc keeps its area when its soft map is enlarged; a resized 0-255 mask cut low does not.

    The soft edge is a logistic one, whose half lies on the circle.
    """
    y, x = np.mgrid[:128, :128]
    radius_px = 20.3
    logits = (radius_px - np.hypot(y - 63.5, x - 63.5)).astype(np.float32)
    mask = mask_from_probability(probability(logits), (384, 512), 0.5)
    area_px = np.pi * radius_px**2 * 3 * 4
    assert (mask > 0).sum() == pytest.approx(area_px, rel=0.01)


@pytest.mark.parametrize("shape_hw", [(1, 1), (33, 700), (512, 512), (600, 800)])
@pytest.mark.parametrize(("value", "expected"), [(0.0, 0), (0.5, 0), (0.5001, 255), (1.0, 255)])
def test_empty_and_full_masks(shape_hw: Shape, value: float, expected: int) -> None:
    mask = mask_from_probability(np.full((512, 512), value, np.float32), shape_hw, 0.5)
    assert mask.shape == shape_hw
    assert mask.dtype == np.uint8
    assert (mask == expected).all()


@given(shape_hw=shapes, threshold=st.floats(0.01, 0.99))
def test_a_higher_threshold_never_adds_pixels(shape_hw: Shape, threshold: float) -> None:
    soft = soft_map(shape_hw)
    low = mask_from_probability(soft, (50, 40), threshold / 2)
    high = mask_from_probability(soft, (50, 40), threshold)
    assert set(np.unique(low)) <= {0, 255}
    assert not ((high > 0) & (low == 0)).any()
