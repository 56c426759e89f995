"""Losses on logits, with a weight for each pixel."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

LossName = Literal["bce", "dice", "bce+dice"]
Loss = Callable[[Tensor, Tensor, Tensor], Tensor]


def bce_loss(logits: Tensor, target: Tensor, weight: Tensor) -> Tensor:
    """Binary cross entropy averaged over the weight; `BCEWithLogitsLoss` where that is 1.

    Args:
        logits: float (N, C, H, W).
        target: float (N, C, H, W) in [0, 1].
        weight: float (N, C, H, W), 0 where a pixel does not count.

    Returns:
        Scalar, at least 0.
    """
    losses = F.binary_cross_entropy_with_logits(logits, target, reduction="none")
    return (losses * weight).sum() / weight.sum().clamp_min(1.0)


def dice_loss(logits: Tensor, target: Tensor, weight: Tensor) -> Tensor:
    """1 - soft Dice over the batch, each channel alone (Milletari et al. 2016, arXiv:1606.04797).

    Args:
        logits: float (N, C, H, W).
        target: float (N, C, H, W) in [0, 1].
        weight: float (N, C, H, W), 0 where a pixel does not count.

    Returns:
        Scalar in [0, 1].
    """
    probability = torch.sigmoid(logits) * weight
    target = target * weight
    overlap = (probability * target).sum(dim=(0, 2, 3))
    total = (probability.square() + target.square()).sum(dim=(0, 2, 3))
    # The 1 makes an empty channel that is predicted empty a perfect one.
    return (1 - (2 * overlap + 1) / (total + 1)).mean()


def loss_function(name: LossName) -> Loss:
    """Look a loss up by its name on the command line."""
    if name == "bce":
        return bce_loss
    if name == "dice":
        return dice_loss
    return lambda logits, target, weight: (
        bce_loss(logits, target, weight) + dice_loss(logits, target, weight)
    )
