"""The original pipeline, written anew and plainly: what bcseg-batch is compared with.

    python benchmarks/reference.py [--images 3] [--input DIR] [--output DIR] [--model FILE.pth]

One image at a time, as the original scripts did it: read it as RGB, resize it to 512x512, run the
network of width 64 in float32 with gradients on, sigmoid, cut at 0.5, bring the mask to the
image's size, tint the cells in a loop over pixels, save the mask as PNG and the composite as JPEG.
Prints the seconds of each stage, and as its last line everything as JSON.

Without `--input` it draws photographs; without a file at `--model` it writes a checkpoint of the
original's layout there, with seeded weights: they find no cells, but take as long as those that do.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image
from torch import Tensor, nn

SIZE_PX = 512
WIDTH = 64
# Of the photograph that the seeded weights are set by, this share is cells.
FOREGROUND = 0.35

T = TypeVar("T")


class TwoConvolutions(nn.Module):
    """Two 3x3 convolutions with bias, each with a ReLU; no normalisation."""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.c1 = nn.Conv2d(in_channels, out_channels, 3, padding=1)
        self.c2 = nn.Conv2d(out_channels, out_channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        """Map (N, in_channels, H, W) to (N, out_channels, H, W)."""
        return torch.relu(self.c2(torch.relu(self.c1(x))))


class Down(nn.Module):
    """A step of the encoder."""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.c = TwoConvolutions(in_channels, out_channels)
        self.pool = nn.MaxPool2d(2)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Give the skip (N, out_channels, H, W), and the same at half the size."""
        skip = self.c(x)
        return skip, self.pool(skip)


class Up(nn.Module):
    """A step of the decoder."""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.up = nn.ConvTranspose2d(in_channels, out_channels, 2, stride=2)
        self.c = TwoConvolutions(in_channels, out_channels)

    def forward(self, x: Tensor, skip: Tensor) -> Tensor:
        """Map (N, in_channels, H, W) and the skip to (N, out_channels, 2H, 2W)."""
        joined: Tensor = self.c(torch.cat([self.up(x), skip], dim=1))
        return joined


class ReferenceUNet(nn.Module):
    """The original's network; its `state_dict` has the keys of `checkpoint.pth`."""

    def __init__(self, in_channels: int = 3, out_channels: int = 1, width: int = WIDTH) -> None:
        super().__init__()
        self.down1 = Down(in_channels, width)
        self.down2 = Down(width, 2 * width)
        self.down3 = Down(2 * width, 4 * width)
        self.down4 = Down(4 * width, 8 * width)
        self.bottleneck = TwoConvolutions(8 * width, 16 * width)
        self.up1 = Up(16 * width, 8 * width)
        self.up2 = Up(8 * width, 4 * width)
        self.up3 = Up(4 * width, 2 * width)
        self.up4 = Up(2 * width, width)
        self.out = nn.Conv2d(width, out_channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        """Map float32 (N, 3, H, W) in [0, 1] to logits (N, 1, H, W)."""
        skip1, x = self.down1(x)
        skip2, x = self.down2(x)
        skip3, x = self.down3(x)
        skip4, x = self.down4(x)
        x = self.bottleneck(x)
        x = self.up1(x, skip4)
        x = self.up2(x, skip3)
        x = self.up3(x, skip2)
        x = self.up4(x, skip1)
        logits: Tensor = self.out(x)
        return logits


def seeded_network(pixels: npt.NDArray[np.uint8], *, width: int = WIDTH) -> ReferenceUNet:
    """Make a network of random weights whose mask covers about a third of a photograph.

    Weights as torch draws them fade from layer to layer, until the last bias alone decides and the
    mask is all or nothing, which costs other time than one with cells in it.

    Args:
        pixels: uint8 (H, W, 3) RGB, the photograph.
        width: channels of the first step.
    """
    torch.manual_seed(0)
    network = ReferenceUNet(width=width)
    for layer in network.modules():
        if isinstance(layer, nn.Conv2d | nn.ConvTranspose2d):
            nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")
    with torch.no_grad():
        logits = network(to_tensor(Image.fromarray(pixels))[None])
        network.out.bias -= logits.quantile(1 - FOREGROUND)
    return network


def write_checkpoint(path: Path, pixels: npt.NDArray[np.uint8], *, width: int = WIDTH) -> None:
    """Write seeded weights as the original's `checkpoint.pth`: a plain state_dict."""
    torch.save(seeded_network(pixels, width=width).state_dict(), path)


def load_network(path: Path) -> ReferenceUNet:
    """Read a `checkpoint.pth` of any width."""
    weights = torch.load(path, map_location="cpu", weights_only=True)
    network = ReferenceUNet(width=len(weights["out.weight"][0]))
    network.load_state_dict(weights)
    return network


def to_tensor(image: Image.Image) -> Tensor:
    """Resize an image and scale it to [0, 1]: float32 (3, 512, 512).

    torchvision's `Resize` on a PIL image is Pillow's own bilinear filter, and `ToTensor` this
    division.
    """
    resized = np.asarray(image.resize((SIZE_PX, SIZE_PX), Image.Resampling.BILINEAR))
    return torch.from_numpy(resized.copy()).permute(2, 0, 1).contiguous().float() / 255


def blood_red(pixels: npt.NDArray[np.uint8], mask: npt.NDArray[np.uint8]) -> npt.NDArray[np.uint8]:
    """Tint the cells, pixel by pixel.

    Args:
        pixels: uint8 (H, W, 3) RGB.
        mask: uint8 (H, W), 255 where a cell is.

    Returns:
        uint8 (H, W, 3) RGB, a new array.
    """
    tinted = pixels.copy()
    height_px, width_px = mask.shape
    for y in range(height_px):
        for x in range(width_px):
            if mask[y, x] == 255:
                red, green, blue = pixels[y, x].tolist()
                tinted[y, x] = (
                    int(0.7 * red + 0.3 * 160),
                    int(0.7 * green),
                    int(0.7 * blue + 0.3 * 20),
                )
    return tinted


class Stages:
    """Adds up the seconds of each stage."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    def time(self, stage: str, action: Callable[[], T]) -> T:
        """Do something, and count its time to a stage."""
        began_s = time.perf_counter()
        result = action()
        self.seconds[stage] = self.seconds.get(stage, 0.0) + time.perf_counter() - began_s
        return result


def process(network: ReferenceUNet, path: Path, output: Path, stages: Stages) -> None:
    """Take one image from file to files."""

    def read() -> tuple[Image.Image, Tensor]:
        image = Image.open(path).convert("RGB")
        return image, to_tensor(image)

    def cut() -> npt.NDArray[np.uint8]:
        found = (torch.sigmoid(logits)[0, 0] > 0.5).numpy().astype(np.uint8) * 255
        # Not smoothed on the way: a mask has two values.
        return np.asarray(Image.fromarray(found).resize(image.size, Image.Resampling.NEAREST))

    def save() -> None:
        Image.fromarray(mask).save(output / f"{path.stem}_mask.png")
        Image.fromarray(tinted).save(output / f"{path.stem}_bloodred.jpg")

    image, tensor = stages.time("read and resize", read)
    # The original leaves gradients on.
    logits = stages.time("network", lambda: network(tensor[None]))
    mask = stages.time("mask", cut)
    tinted = stages.time("blood red", lambda: blood_red(np.asarray(image), mask))
    stages.time("save", save)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--images", type=int, default=3, help="at most so many")
    parser.add_argument("--input", type=Path, help="folder of photographs; drawn where left out")
    parser.add_argument("--output", type=Path, help="folder for masks and composites")
    parser.add_argument("--model", type=Path, help="checkpoint.pth; written where it is missing")
    parser.add_argument("--width", type=int, default=WIDTH, help="of weights to be written")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        source = options.input
        if source is None:
            from harness import write_photographs  # noqa: PLC0415 - brings all of ours

            source = folder / "in"
            write_photographs(source, options.images)
        paths = sorted(source.iterdir())[: options.images]
        model = options.model or folder / "checkpoint.pth"
        if not model.exists():
            write_checkpoint(
                model, np.asarray(Image.open(paths[0]).convert("RGB")), width=options.width
            )
        output = options.output or folder / "out"
        output.mkdir(parents=True, exist_ok=True)
        network = load_network(model)
        stages = Stages()
        began_s = time.perf_counter()
        for path in paths:
            process(network, path, output, stages)
        took_s = time.perf_counter() - began_s
    for stage, stage_s in stages.seconds.items():
        print(f"{stage:16}{stage_s / len(paths):>9.3f} s an image")
    print(f"{'all':16}{took_s / len(paths):>9.3f} s an image, {torch.get_num_threads()} threads")
    figures = {
        "images": len(paths),
        "images_per_s": len(paths) / took_s,
        "stages_s": {stage: total_s / len(paths) for stage, total_s in stages.seconds.items()},
        "runs_on": "cpu float32",
    }
    print(json.dumps(figures))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
