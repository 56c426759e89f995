"""The original pipeline, plainly re-written from its facts: what the product is compared with.

    python benchmarks/reference.py [--images 3] [--json FILE]

Width 64, float32, one image at a time, gradients on, and a Python loop over the pixels for the
composite; weights are drawn at random, with a third of each picture called cells. Prints seconds
per image and step.
"""

from __future__ import annotations

import tempfile
import time
from collections import defaultdict
from pathlib import Path

import numpy as np
import torch
from harness import parser, photographs, plain, report
from PIL import Image
from torch import Tensor, nn
from torchvision import transforms


class Pair(nn.Module):
    """Two 3x3 convolutions with ReLU."""

    def __init__(self, a: int, b: int) -> None:
        super().__init__()
        self.c1 = nn.Conv2d(a, b, 3, padding=1)
        self.c2 = nn.Conv2d(b, b, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        """Map (N, a, H, W) to (N, b, H, W)."""
        return torch.relu(self.c2(torch.relu(self.c1(x))))


class Down(nn.Module):
    """An encoder step."""

    def __init__(self, a: int, b: int) -> None:
        super().__init__()
        self.c = Pair(a, b)
        self.p = nn.MaxPool2d(2)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Give the skip and what is handed down."""
        skip = self.c(x)
        return skip, self.p(skip)


class Up(nn.Module):
    """A decoder step."""

    def __init__(self, a: int, b: int) -> None:
        super().__init__()
        self.up = nn.ConvTranspose2d(a, b, 2, stride=2)
        self.c = Pair(2 * b, b)

    def forward(self, x: Tensor, skip: Tensor) -> Tensor:
        """Join what comes up with the skip."""
        joined: Tensor = self.c(torch.cat([self.up(x), skip], dim=1))
        return joined


class Original(nn.Module):
    """The original's network, under the names of its checkpoint."""

    def __init__(self) -> None:
        super().__init__()
        self.down1, self.down2 = Down(3, 64), Down(64, 128)
        self.down3, self.down4 = Down(128, 256), Down(256, 512)
        self.bottleneck = Pair(512, 1024)
        self.up1, self.up2 = Up(1024, 512), Up(512, 256)
        self.up3, self.up4 = Up(256, 128), Up(128, 64)
        self.out = nn.Conv2d(64, 1, 1)

    def forward(self, x: Tensor) -> Tensor:
        """Map (N, 3, H, W) to logits (N, 1, H, W)."""
        s1, x = self.down1(x)
        s2, x = self.down2(x)
        s3, x = self.down3(x)
        s4, x = self.down4(x)
        x = self.bottleneck(x)
        x = self.up4(self.up3(self.up2(self.up1(x, s4), s3), s2), s1)
        logits: Tensor = self.out(x)
        return logits


def original(seed: int = 0, *, foreground: float = 0.3) -> Original:
    """Make the network with weights drawn at random, that calls a share of a picture cells.

    The share decides how long the loop over the pixels takes; a third is what smears have.
    """
    torch.manual_seed(seed)
    network = Original().eval()
    with torch.no_grad():
        logits = network(torch.rand(1, 3, 128, 128))
        network.out.bias -= logits.flatten().quantile(1 - foreground)
    return network


def save_original(path: Path, network: Original) -> None:
    """Write the network as the original's `checkpoint.pth`."""
    torch.save(network.state_dict(), path)


class Reference:
    """Takes images through the original's steps, one at a time.

    Args:
        network: the original's.
    """

    def __init__(self, network: Original) -> None:
        self._network = network
        self._shape = transforms.Compose([transforms.Resize((512, 512)), transforms.ToTensor()])
        self.seconds: dict[str, list[float]] = defaultdict(list)

    def process(self, path: Path, out: Path) -> None:
        """Write mask and composite of an image."""
        marks = [time.perf_counter()]
        image = Image.open(path).convert("RGB")
        tensor = self._shape(image).unsqueeze(0)
        marks.append(time.perf_counter())
        soft = torch.sigmoid(self._network(tensor))  # gradients on, as in the original
        marks.append(time.perf_counter())
        small = (soft[0, 0].detach().numpy() > 0.5).astype(np.uint8) * 255
        mask = Image.fromarray(small).resize(image.size, Image.Resampling.NEAREST)
        mask.save(out / f"{path.stem}_mask.png")
        marks.append(time.perf_counter())
        blood_red(image, mask).save(out / f"{path.stem}_bloodred.jpg")
        marks.append(time.perf_counter())
        for step, begun_s, ended_s in zip(
            ("read and resize", "network", "mask", "blood red"), marks, marks[1:], strict=False
        ):
            self.seconds[step].append(ended_s - begun_s)
        self.seconds["all"].append(marks[-1] - marks[0])


def blood_red(image: Image.Image, mask: Image.Image) -> Image.Image:
    """Tint pixel by pixel, in a loop, as the original does."""
    pixels, cells = np.array(image), np.array(mask)
    height, width = cells.shape
    for y in range(height):
        for x in range(width):
            if cells[y, x] == 255:
                r, g, b = pixels[y, x]
                pixels[y, x] = (
                    int(0.7 * r + 0.3 * 160),
                    int(0.7 * g),
                    int(0.7 * b + 0.3 * 20),
                )
    return Image.fromarray(pixels)


def main() -> None:
    """Time the original's steps."""
    arguments = parser(__doc__, images=3, rounds=1).parse_args()
    with tempfile.TemporaryDirectory(prefix="bcseg-bench-") as name:
        paths = photographs(Path(name, "in"), arguments.images)
        reference = Reference(original())
        for _ in range(arguments.rounds):
            for path in paths:
                reference.process(path, Path(name))
    figures = [plain(step, seconds, "s") for step, seconds in reference.seconds.items()]
    report("The original pipeline, seconds per image", figures, arguments.json)


if __name__ == "__main__":
    main()
