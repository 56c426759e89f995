"""Scores against their definitions, counted by hand."""

from __future__ import annotations

import cv2
import numpy as np
import numpy.typing as npt
import pytest
import torch
import torch.nn.functional as F
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from bcseg_training.losses import bce_loss, dice_loss, loss_function
from bcseg_training.metrics import normalised_hausdorff, outline, score_mask

Mask = npt.NDArray[np.bool_]
Points = set[tuple[int, int]]
shapes = st.tuples(st.integers(1, 9), st.integers(1, 9))


def masks(shape_hw: tuple[int, int]) -> st.SearchStrategy[Mask]:
    return hnp.arrays(np.bool_, shape_hw)


two_masks = shapes.flatmap(lambda shape_hw: st.tuples(masks(shape_hw), masks(shape_hw)))


def outline_points(mask: Mask) -> Points:
    """Pixels of the mask with one of the four neighbours outside it, or outside the image."""
    inside = {(int(y), int(x)) for y, x in np.argwhere(mask)}
    return {
        (y, x) for y, x in inside if not {(y - 1, x), (y + 1, x), (y, x - 1), (y, x + 1)} <= inside
    }


def city_block_hausdorff(a: Points, b: Points) -> int:
    def one_way(a: Points, b: Points) -> int:
        return max(min(abs(y - v) + abs(x - u) for v, u in b) for y, x in a)

    return max(one_way(a, b), one_way(b, a))


@settings(max_examples=150, deadline=None)
@given(both=two_masks)
def test_scores_are_their_definitions(both: tuple[Mask, Mask]) -> None:
    mask, truth = both
    assume(mask.any() and truth.any())
    overlap, union = (mask & truth).sum(), (mask | truth).sum()
    distance_px = city_block_hausdorff(outline_points(mask), outline_points(truth))
    longest_px = mask.shape[0] - 1 + mask.shape[1] - 1
    hausdorff = 1 - distance_px / longest_px if longest_px else 1.0
    score = score_mask(mask, truth)
    assert score.dice == pytest.approx(2 * overlap / (mask.sum() + truth.sum()), abs=1e-6)
    assert score.iou == pytest.approx(overlap / union, abs=1e-6)
    assert score.hausdorff == pytest.approx(hausdorff, abs=1e-12)
    assert score.f8 == pytest.approx((hausdorff * overlap / union) ** 0.5, abs=1e-6)


@settings(max_examples=60, deadline=None)
@given(mask=shapes.flatmap(masks))
def test_outline_is_that_of_the_field(mask: Mask) -> None:
    """The pixels on OpenCV's contours, holes included, are those with an outer neighbour."""
    assert {(int(y), int(x)) for y, x in np.argwhere(outline(mask))} == outline_points(mask)
    drawn: Points = set()
    contours, _ = cv2.findContours(mask.astype(np.uint8), cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_NONE)
    for contour in contours:
        drawn |= {(int(y), int(x)) for x, y in contour.reshape(-1, 2)}
    assert drawn <= outline_points(mask)


@settings(max_examples=60, deadline=None)
@given(both=two_masks)
def test_scores_are_symmetric_and_bounded(both: tuple[Mask, Mask]) -> None:
    one, other = score_mask(*both), score_mask(*both[::-1])
    for name in ("dice", "iou", "hausdorff", "f8"):
        assert 0 <= getattr(one, name) <= 1
        assert getattr(one, name) == pytest.approx(getattr(other, name), abs=1e-6)


@given(mask=shapes.flatmap(masks))
def test_a_mask_agrees_with_itself(mask: Mask) -> None:
    score = score_mask(mask, mask.copy())
    assert (score.dice, score.iou, score.hausdorff, score.f8) == (1, 1, 1, 1)


def test_empty_masks() -> None:
    nothing, something = np.zeros((5, 7), bool), np.zeros((5, 7), bool)
    something[2, 3] = True
    perfect, missed = score_mask(nothing, nothing), score_mask(nothing, something)
    assert (perfect.dice, perfect.iou, perfect.hausdorff, perfect.f8) == (1, 1, 1, 1)
    assert (missed.dice, missed.iou, missed.hausdorff, missed.f8) == (0, 0, 0, 0)


def test_opposite_corners_are_the_longest_distance() -> None:
    a, b = np.zeros((5, 7), bool), np.zeros((5, 7), bool)
    a[0, 0] = b[-1, -1] = True
    assert normalised_hausdorff(a, b) == 0


def test_masks_of_two_sizes_cannot_be_compared() -> None:
    with pytest.raises(ValueError, match=r"\(2, 3\).*\(3, 2\)"):
        score_mask(np.zeros((2, 3), bool), np.zeros((3, 2), bool))


# Losses ----------------------------------------------------------------------------------------


def example() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(2, 1, 6, 5, generator=generator)
    target = torch.rand(2, 1, 6, 5, generator=generator)
    return logits, target, torch.ones_like(target)


def test_default_loss_is_the_originals() -> None:
    logits, target, weight = example()
    expected = torch.nn.BCEWithLogitsLoss()(logits, target)
    torch.testing.assert_close(loss_function("bce")(logits, target, weight), expected)


@pytest.mark.parametrize("name", ["bce", "dice", "bce+dice"])
def test_pixels_of_weight_zero_do_not_count(name: str) -> None:
    logits, target, weight = example()
    weight[:, :, :, 3:] = 0
    loss = loss_function(name)  # type: ignore[arg-type]  # a str of the three
    changed = torch.where(weight > 0, logits, 9.0)
    torch.testing.assert_close(loss(logits, target, weight), loss(changed, target, weight))
    cut = (logits[..., :3], target[..., :3], weight[..., :3])
    torch.testing.assert_close(loss(logits, target, weight), loss(*cut))


def test_losses_at_their_ends() -> None:
    target = torch.zeros(1, 1, 4, 4)
    target[..., :2] = 1
    weight = torch.ones_like(target)
    sure = (target - 0.5) * 200
    assert dice_loss(sure, target, weight) == pytest.approx(0, abs=1e-6)
    assert bce_loss(sure, target, weight) == pytest.approx(0, abs=1e-6)
    assert dice_loss(-sure, target, weight) > 0.9
    assert dice_loss(torch.full_like(target, -100), target * 0, weight) == pytest.approx(0)
    assert bce_loss(sure, target, weight * 0) == 0
    both = loss_function("bce+dice")(-sure, target, weight)
    expected = F.binary_cross_entropy_with_logits(-sure, target) + dice_loss(-sure, target, weight)
    torch.testing.assert_close(both, expected)
