"""Batch normalisation over the batch that several processes share."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bcseg_training.processes import add_up


class SharedBatchNorm2d(nn.BatchNorm2d):
    """Batch normalisation with the statistics of all processes' parts together.

    The same numbers as `nn.BatchNorm2d` has for the joined batch, but for rounding. Parts may
    differ in size, and may be empty. torch's `SyncBatchNorm` runs on GPUs alone, and in mixed
    precision sends another dtype for an empty part than for the others.
    """

    def forward(self, x: Tensor) -> Tensor:
        """Normalise (N, C, H, W), N >= 0."""
        if not self.training:
            return super().forward(x)
        assert self.running_mean is not None
        assert self.running_var is not None
        assert self.num_batches_tracked is not None
        assert self.momentum is not None
        mean, variance, count = _statistics(x.detach())
        with torch.no_grad():
            self.num_batches_tracked.add_(1)
            # As in one process: the running variance is that of the population.
            unbiased = variance * (count / (count - 1).clamp_min(1))
            self.running_mean.lerp_(mean.to(self.running_mean.dtype), self.momentum)
            self.running_var.lerp_(unbiased.to(self.running_var.dtype), self.momentum)
        normalised: Tensor = _Normalise.apply(
            x,
            self.weight,
            self.bias,
            mean.to(self.weight.dtype),
            variance.to(self.weight.dtype),
            count.to(self.weight.dtype),
            self.eps,
        )
        return normalised


def _statistics(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Give mean (C,), biased variance (C,) and values a channel (), float64, over all processes."""
    channels = x.shape[1]
    sums = x.new_zeros(2 * channels + 1, dtype=torch.float64)
    if x.numel():
        variance, mean = torch.var_mean(_precise(x), dim=(0, 2, 3), correction=0)
        mean, variance = mean.double(), variance.double()
        count = x.numel() // channels
        sums = torch.cat([mean * count, (variance + mean.square()) * count, sums[-1:] + count])
    # In float64 the difference of the squares loses nothing that float32 had.
    sums = add_up(sums)
    count_all = sums[-1]
    mean, square = sums[:-1].div(count_all).chunk(2)
    return mean, (square - mean.square()).clamp_min(0), count_all


def _precise(x: Tensor) -> Tensor:
    """Give float32 for what autocast has made shorter."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


class _Normalise(torch.autograd.Function):
    """The layer with given statistics, and the gradient that flows through these as well.

    Ioffe, Szegedy 2015 (arXiv:1502.03167), section 3; its sums go over all processes.
    """

    @staticmethod
    def forward(  # noqa: PLR0917 - autograd knows no names
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor,
        mean: Tensor,
        variance: Tensor,
        count: Tensor,
        eps: float,
    ) -> Tensor:
        scale = torch.rsqrt(variance + eps)
        ctx.save_for_backward(x, weight, mean, scale, count)
        return F.batch_norm(x, mean, variance, weight, bias, training=False, eps=eps)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, mean, scale, count = ctx.saved_tensors
        grad = _precise(grad_outputs[0])

        def along(channels: Tensor) -> Tensor:
            return channels[:, None, None]

        standard = (_precise(x) - along(mean)) * along(scale)
        grad_bias = grad.sum(dim=(0, 2, 3))
        grad_weight = (grad * standard).sum(dim=(0, 2, 3))
        of_bias, of_weight = (add_up(torch.cat([grad_bias, grad_weight])) / count).chunk(2)
        grad_x = along(weight * scale) * (grad - along(of_bias) - standard * along(of_weight))
        # Of this process's part alone: DistributedDataParallel brings the parts together.
        return grad_x.to(x.dtype), grad_weight, grad_bias, None, None, None, None


def share_batch_norms(model: nn.Module) -> None:
    """Let every `nn.BatchNorm2d` of a network normalise over all processes, in place.

    Parameters and buffers stay the same objects, and keep their names.
    """
    for name, child in model.named_children():
        if type(child) is nn.BatchNorm2d:
            shared = SharedBatchNorm2d(child.num_features, child.eps, child.momentum)
            shared._parameters = child._parameters
            shared._buffers = child._buffers
            setattr(model, name, shared)
        else:
            share_batch_norms(child)
