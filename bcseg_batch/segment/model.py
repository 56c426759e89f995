"""The U-Net: Ronneberger, Fischer, Brox 2015 (arXiv:1505.04597), with padded convolutions.

Width 64, depth 4 and no normalisation is the network of the original project, with its 31,031,745
parameters.
"""

from __future__ import annotations

import copy
import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import fuse_conv_bn_eval

from bcseg_batch.segment.spec import Norm


def _norm_layer(norm: Norm, channels: int) -> nn.Module:
    if norm == "batch":
        return nn.BatchNorm2d(channels)
    if norm == "group":
        # Eight groups, or as many as divide the channels of an odd width.
        return nn.GroupNorm(math.gcd(8, channels), channels)
    return nn.Identity()


class DoubleConv(nn.Module):
    """Two 3x3 convolutions, each with optional normalisation and a ReLU; the size stays."""

    def __init__(self, in_channels: int, out_channels: int, norm: Norm) -> None:
        super().__init__()
        # A normalisation has a shift of its own, so the convolution before it needs no bias.
        bias = norm == "none"
        self.conv1 = nn.Conv2d(in_channels, out_channels, kernel_size=3, padding=1, bias=bias)
        self.norm1 = _norm_layer(norm, out_channels)
        self.conv2 = nn.Conv2d(out_channels, out_channels, kernel_size=3, padding=1, bias=bias)
        self.norm2 = _norm_layer(norm, out_channels)

    def forward(self, x: Tensor) -> Tensor:
        """Map (N, in_channels, H, W) to (N, out_channels, H, W)."""
        # In place: the convolution's own output is needed by nothing else.
        x = F.relu(self.norm1(self.conv1(x)), inplace=True)
        x = F.relu(self.norm2(self.conv2(x)), inplace=True)
        return x  # noqa: RET504 - both lines alike, as in the paper's figure


class UpBlock(nn.Module):
    """Doubles the size, joins the skip of the encoder, and convolves twice."""

    def __init__(self, in_channels: int, out_channels: int, norm: Norm) -> None:
        super().__init__()
        self.up = nn.ConvTranspose2d(in_channels, out_channels, kernel_size=2, stride=2)
        self.conv = DoubleConv(2 * out_channels, out_channels, norm)

    def forward(self, x: Tensor, skip: Tensor) -> Tensor:
        """Map (N, in_channels, H, W) and the skip to (N, out_channels, 2H, 2W)."""
        # The order [upsampled, skip] is the original's; its weights depend on it.
        joined: Tensor = self.conv(torch.cat([self.up(x), skip], dim=1))
        return joined


class UNet(nn.Module):
    """Encoder, bottleneck and decoder with skips; logits at the input's own size.

    Args:
        in_channels: channels of the input, 3 for RGB.
        out_channels: logit channels; channel 0 is always "cell".
        width: channels of the first encoder step, doubled by each further one.
        depth: encoder steps; the input's sides must be multiples of 2 ** depth.
        norm: normalisation after each 3x3 convolution.
    """

    def __init__(
        self,
        in_channels: int = 3,
        out_channels: int = 1,
        width: int = 64,
        depth: int = 4,
        norm: Norm = "none",
    ) -> None:
        super().__init__()
        channels = [width * 2**level for level in range(depth + 1)]
        self.encoders = nn.ModuleList(
            DoubleConv(in_channels if level == 0 else channels[level - 1], channels[level], norm)
            for level in range(depth)
        )
        self.bottleneck = DoubleConv(channels[depth - 1], channels[depth], norm)
        self.decoders = nn.ModuleList(
            UpBlock(channels[level + 1], channels[level], norm) for level in reversed(range(depth))
        )
        self.head = nn.Conv2d(width, out_channels, kernel_size=1)

    def forward(self, x: Tensor) -> Tensor:
        """Compute logits.

        Args:
            x: float (N, in_channels, H, W), RGB in [0, 1], H and W multiples of 2 ** depth.

        Returns:
            Logits (N, out_channels, H, W) of the same dtype; sigmoid makes them probabilities.
        """
        skips: list[Tensor] = []
        for encoder in self.encoders:
            x = encoder(x)  # (N, width * 2^level, H / 2^level, W / 2^level)
            skips.append(x)
            x = F.max_pool2d(x, kernel_size=2)
        x = self.bottleneck(x)  # (N, width * 2^depth, H / 2^depth, W / 2^depth)
        for decoder in self.decoders:
            x = decoder(x, skips.pop())
        logits: Tensor = self.head(x)  # (N, out_channels, H, W)
        return logits


def fold_normalisation(model: nn.Module) -> nn.Module:
    """Fold each batch normalisation into the convolution before it, for inference.

    In evaluation a batch normalisation is a scale and a shift of each channel, which the weights
    and the bias of a convolution can take over: the same numbers but for rounding, and one pass
    over memory less for each of them.

    Args:
        model: any network; stays as it is. What is not a `DoubleConv` is not changed.

    Returns:
        A copy in evaluation mode without batch normalisation.
    """
    folded = copy.deepcopy(model).eval()
    for block in folded.modules():
        if isinstance(block, DoubleConv):
            block.conv1, block.norm1 = _folded(block.conv1, block.norm1)
            block.conv2, block.norm2 = _folded(block.conv2, block.norm2)
    return folded


def _folded(conv: nn.Conv2d, norm: nn.Module) -> tuple[nn.Conv2d, nn.Module]:
    if isinstance(norm, nn.BatchNorm2d):
        return fuse_conv_bn_eval(conv, norm), nn.Identity()
    return conv, norm
