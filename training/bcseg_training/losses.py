"""Losses on logits, with a weight for each pixel, over a batch that processes may share.

What `total` does not change is a loss of this process's own items. With
`processes.total`, each process gets the loss of all items, and its gradient.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

LossName = Literal["bce", "dice", "bce+dice"]
Loss = Callable[[Tensor, Tensor, Tensor], Tensor]
Total = Callable[[Tensor], Tensor]


def of_one_process(tensor: Tensor) -> Tensor:
    """Give the sum over processes where there is one."""
    return tensor


def bce_loss(
    logits: Tensor, target: Tensor, weight: Tensor, total: Total = of_one_process
) -> Tensor:
    """Binary cross entropy averaged over the weight; `BCEWithLogitsLoss` where that is 1.

    Args:
        logits: float (N, C, H, W).
        target: float (N, C, H, W) in [0, 1].
        weight: float (N, C, H, W), 0 where a pixel does not count.
        total: sums a tensor over all processes.

    Returns:
        Scalar, at least 0.
    """
    losses = F.binary_cross_entropy_with_logits(logits, target, reduction="none")
    return total((losses * weight).sum()) / total(weight.sum()).clamp_min(1.0)


def dice_loss(
    logits: Tensor, target: Tensor, weight: Tensor, total: Total = of_one_process
) -> Tensor:
    """1 - soft Dice over the batch, each channel alone (Milletari et al. 2016, arXiv:1606.04797).

    Args:
        logits: float (N, C, H, W).
        target: float (N, C, H, W) in [0, 1].
        weight: float (N, C, H, W), 0 where a pixel does not count.
        total: sums a tensor over all processes.

    Returns:
        Scalar in [0, 1].
    """
    probability = torch.sigmoid(logits) * weight
    target = target * weight
    # Over the whole batch: a mean of several batches' Dice is another number.
    overlap = total((probability * target).sum(dim=(0, 2, 3)))
    area = total((probability.square() + target.square()).sum(dim=(0, 2, 3)))
    # The 1 makes an empty channel that is predicted empty a perfect one.
    return (1 - (2 * overlap + 1) / (area + 1)).mean()


def loss_function(name: LossName, total: Total = of_one_process) -> Loss:
    """Look a loss up by its name on the command line.

    Args:
        name: of the loss.
        total: sums a tensor over all processes.
    """

    def loss(logits: Tensor, target: Tensor, weight: Tensor) -> Tensor:
        if name == "bce":
            return bce_loss(logits, target, weight, total)
        if name == "dice":
            return dice_loss(logits, target, weight, total)
        return bce_loss(logits, target, weight, total) + dice_loss(logits, target, weight, total)

    return loss
