"""The shipped model under other light, tone and magnification, on images it was not trained on."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import cv2
import numpy as np
import numpy.typing as npt
import pytest

from bcseg_batch.segment.checkpoint import load_checkpoint
from bcseg_batch.segment.devices import open_predictor
from bcseg_training.dataset import read_pair, usable_pairs
from bcseg_training.segmenting import Segment, by_network

pytestmark = pytest.mark.slow

Image = npt.NDArray[np.uint8]
Mask = npt.NDArray[np.bool_]

IMAGES = 5
LARGEST_FALL = 0.02


def dice(found: Mask, true: Mask) -> float:
    return float(2 * (found & true).sum() / max(found.sum() + true.sum(), 1))


@pytest.fixture(scope="module")
def segment() -> Segment:
    """The shipped model as the service uses it: in tiles where cells would be too small."""
    path = Path(__file__).parents[1] / "bcseg_batch" / "weights" / "default.safetensors"
    loaded = load_checkpoint(path)
    predictor = open_predictor(
        loaded.model, loaded.spec.input_size_px, device="cpu", dtype="float32"
    )
    return by_network(loaded, predictor)


@pytest.fixture(scope="module")
def images(data_dir: Path) -> list[tuple[Image, Mask]]:
    pairs = usable_pairs(data_dir / "bbbc041seg" / "val")
    read = [read_pair(pair) for pair in pairs[:: len(pairs) // IMAGES][:IMAGES]]
    return [(image, mask > 127) for image, mask in read]


def mean_fall(
    segment: Segment,
    images: list[tuple[Image, Mask]],
    change: Callable[[npt.NDArray[np.float64]], npt.NDArray[np.float64]],
) -> float:
    falls = []
    for image, truth in images:
        changed = np.clip(255 * change(image / 255), 0, 255).astype(np.uint8)
        plain, varied = (dice(segment(i).mask, truth) for i in (image, changed))
        falls.append(plain - varied)
    return float(np.mean(falls))


@pytest.mark.parametrize("seed", range(3))
def test_gains_per_channel(segment: Segment, images: list[tuple[Image, Mask]], seed: int) -> None:
    gains = np.random.default_rng(seed).uniform(0.7, 1.3, 3)
    assert mean_fall(segment, images, lambda light: light * gains) < LARGEST_FALL


@pytest.mark.parametrize("gamma", [0.7, 1.4])
def test_tone_curves(segment: Segment, images: list[tuple[Image, Mask]], gamma: float) -> None:
    assert mean_fall(segment, images, lambda light: light**gamma) < LARGEST_FALL


def middle(array: npt.NDArray[np.uint8], share: float) -> npt.NDArray[np.uint8]:
    y, x = (round(side * (1 - share) / 2) for side in array.shape[:2])
    return array[y : array.shape[0] - y, x : array.shape[1] - x]


@pytest.mark.parametrize("scale", [0.5, 0.7, 1.4, 2.0])
def test_magnifications(segment: Segment, images: list[tuple[Image, Mask]], scale: float) -> None:
    """Above 1 the middle is cut out and fills the input; below 1 the image is mirrored outwards."""
    falls = []
    for image, truth in images:
        plain = segment(image).mask
        if scale > 1:
            share = 1 / scale
            found = segment(np.ascontiguousarray(middle(image, share))).mask
            was, true = (middle(m.view(np.uint8), share) > 0 for m in (plain, truth))
        else:
            y, x = (round(side * (1 / scale - 1) / 2) for side in image.shape[:2])
            wide = cv2.copyMakeBorder(image, y, y, x, x, cv2.BORDER_REFLECT_101)
            found = segment(wide).mask[y : y + image.shape[0], x : x + image.shape[1]]
            was, true = plain, truth
        falls.append(dice(was, true) - dice(found, true))
    assert np.mean(falls) < LARGEST_FALL
