"""Tiny data sets for the tests of the training side: dark discs on a light ground."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import numpy.typing as npt
from PIL import Image

Pixels = npt.NDArray[np.uint8]


def blots(seed: int, shape_hw: tuple[int, int] = (64, 64)) -> tuple[Pixels, Pixels]:
    """One image uint8 (H, W, 3) and its mask uint8 (H, W), 0 or 255."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[: shape_hw[0], : shape_hw[1]]
    cell = np.zeros(shape_hw, bool)
    for _ in range(3):
        cy, cx = rng.uniform(0, shape_hw[0]), rng.uniform(0, shape_hw[1])
        cell |= np.hypot(y - cy, x - cx) < rng.uniform(5, 12)
    image = np.where(cell[..., np.newaxis], (150, 60, 90), (230, 225, 235))
    image = image + rng.normal(0, 4, image.shape)
    return np.clip(image, 0, 255).astype(np.uint8), (cell * np.uint8(255)).astype(np.uint8)


def write_pair(folder: Path, stem: str, image: Pixels, mask: Pixels) -> None:
    """Write `folder/original/stem.png` and `folder/mask/stem.png`."""
    for kind, pixels in (("original", image), ("mask", mask)):
        (folder / kind).mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(folder / kind / f"{stem}.png")


def write_blots(
    dataset: Path, *, train: int = 5, val: int = 2, val_name: str = "val", side_px: int = 64
) -> Path:
    """Write a whole data set."""
    for number, (name, count) in enumerate((("train", train), (val_name, val))):
        for i in range(count):
            image, mask = blots(100 * number + i, (side_px, side_px))
            write_pair(dataset / name, f"smear{i}", image, mask)
    return dataset
