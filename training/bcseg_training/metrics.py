"""How well a mask agrees with the truth."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from scipy import ndimage
from torchmetrics.functional.classification import binary_f1_score, binary_jaccard_index


@dataclass(frozen=True, slots=True)
class MaskScore:
    """Agreement of one mask with its truth, each in [0, 1], 1 is perfect.

    Attributes:
        dice: Dice coefficient, which is F1 of the pixels.
        iou: Jaccard index.
        hausdorff: 1 - hd / ((H - 1) + (W - 1)), hd the city-block Hausdorff distance of the
            outlines, as in the original.
        f8: sqrt(hausdorff * iou), as in the original.
    """

    dice: float
    iou: float
    hausdorff: float
    f8: float


def score_mask(mask: npt.NDArray[np.bool_], truth: npt.NDArray[np.bool_]) -> MaskScore:
    """Compare a mask with the truth.

    Args:
        mask: bool (H, W), True where a cell was found.
        truth: bool (H, W), True where a cell is.

    Raises:
        ValueError: the shapes differ.
    """
    if mask.shape != truth.shape:
        raise ValueError(f"a mask of {mask.shape} cannot be compared with a truth of {truth.shape}")
    preds, target = torch.from_numpy(mask), torch.from_numpy(truth)
    if mask.any() or truth.any():
        dice = float(binary_f1_score(preds, target.int()))
        iou = float(binary_jaccard_index(preds, target.int()))
    else:
        dice = iou = 1.0  # nothing to find and nothing found
    hausdorff = normalised_hausdorff(mask, truth)
    return MaskScore(dice, iou, hausdorff, float(np.sqrt(hausdorff * iou)))


def outline(mask: npt.NDArray[np.bool_]) -> npt.NDArray[np.bool_]:
    """Mark the pixels of a mask that touch the outside by an edge: bool (H, W)."""
    inside: npt.NDArray[np.bool_] = ndimage.binary_erosion(mask, border_value=0)
    return mask & ~inside


def normalised_hausdorff(a: npt.NDArray[np.bool_], b: npt.NDArray[np.bool_]) -> float:
    """Give the original's Hausdorff score, 1 - hd / ((H - 1) + (W - 1)).

    hd is the symmetric Hausdorff distance of the two sets of outline pixels in city-block metric,
    by exact distance transforms. Two empty masks score 1, one empty mask 0.

    Args:
        a: bool (H, W).
        b: bool (H, W).
    """
    if not a.any() or not b.any():
        return float(a.any() == b.any())
    outline_a, outline_b = outline(a), outline(b)
    to_b = ndimage.distance_transform_cdt(~outline_b, metric="taxicab")
    to_a = ndimage.distance_transform_cdt(~outline_a, metric="taxicab")
    distance_px = max(int(to_b[outline_a].max()), int(to_a[outline_b].max()))
    longest_px = (a.shape[0] - 1) + (a.shape[1] - 1)
    return float(1.0 - distance_px / max(longest_px, 1))
