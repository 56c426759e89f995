"""Random changes of a training image that a mask survives.

Every function takes the generator that decides, so that an item depends only on its seed.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import cv2
import numpy as np
import numpy.typing as npt

Recipe = Literal["none", "standard", "strong"]


@dataclass(frozen=True, slots=True)
class Sample:
    """One training item before it becomes tensors.

    Attributes:
        image: uint8 (H, W, 3) RGB.
        target: float32 (H, W, C) in [0, 1].
        weight: float32 (H, W, C), 0 where a pixel does not count in the loss.
    """

    image: npt.NDArray[np.uint8]
    target: npt.NDArray[np.float32]
    weight: npt.NDArray[np.float32]


def crop_affine(
    rng: np.random.Generator,
    sample: Sample,
    *,
    size_px: int,
    scale: tuple[float, float],
    aspect: float = 1.15,
) -> Sample:
    """Cut a rotated, flipped and scaled square out of a sample.

    What lies outside the image is mirrored and its weight is 0.

    Args:
        rng: decides.
        sample: the whole image.
        size_px: side of the result.
        scale: least and largest enlargement, drawn evenly on a logarithmic scale.
        aspect: largest stretch of one axis against the other.
    """
    height, width = sample.image.shape[:2]
    zoom = np.exp(rng.uniform(*np.log(scale)))
    stretch = np.sqrt(np.exp(rng.uniform(-1, 1) * np.log(aspect)))
    angle = rng.uniform(0, 2 * np.pi)
    flip = rng.choice([-1.0, 1.0])
    rotation = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
    linear = rotation @ np.diag([zoom * stretch * flip, zoom / stretch])
    # The centre is drawn so that the crop stays inside where the image is large enough.
    reach = 0.5 * size_px / zoom
    centre = np.array([_centre(rng, width, reach), _centre(rng, height, reach)])
    matrix = np.column_stack([linear, 0.5 * size_px - linear @ centre])
    # Shrinking without a blur first would alias.
    blur = max(0.0, 0.5 * (1 / zoom - 1))
    image = cv2.GaussianBlur(sample.image, (0, 0), blur) if blur > 0.2 else sample.image
    size_wh = (size_px, size_px)
    return Sample(
        cv2.warpAffine(image, matrix, size_wh, borderMode=cv2.BORDER_REFLECT_101),
        _planes(cv2.warpAffine(sample.target, matrix, size_wh, borderMode=cv2.BORDER_REFLECT_101)),
        _planes(cv2.warpAffine(sample.weight, matrix, size_wh, borderValue=(0, 0, 0, 0))),
    )


def _centre(rng: np.random.Generator, length_px: int, reach_px: float) -> float:
    low, high = min(reach_px, length_px / 2), max(length_px - reach_px, length_px / 2)
    return float(rng.uniform(low, high))


def _planes(array: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    """Give back the channel axis that OpenCV drops where it is 1."""
    return array if array.ndim == 3 else array[:, :, np.newaxis]


def vary_colour(
    rng: np.random.Generator, image: npt.NDArray[np.uint8], *, strength: float = 1.0
) -> npt.NDArray[np.uint8]:
    """Vary stain strength, stain hue, white balance, exposure and gamma.

    The stain is varied in optical density, where dyes add (Beer-Lambert): OD = -log(I / I0).

    Args:
        rng: decides.
        image: uint8 (H, W, 3) RGB.
        strength: 0 leaves the image as it is, but for one grey level in its darker half.

    Returns:
        uint8 (H, W, 3) RGB.
    """
    density = -np.log((np.arange(256, dtype=np.float64) + 1) / 256)
    table = np.empty((1, 256, 3))
    # Wide on purpose: between two cameras of one data set the stain is four times as faint.
    stain = np.exp(strength * rng.uniform(np.log(0.2), np.log(1.6)))
    exposure = np.exp(strength * rng.uniform(np.log(0.5), np.log(1.15)))
    balance = np.exp(strength * rng.normal(0, 0.06, 3))
    hue = np.exp(strength * rng.normal(0, 0.15, 3))
    gamma = np.exp(strength * rng.normal(0, 0.15))
    for channel in range(3):
        light = np.exp(-density * stain * hue[channel]) * balance[channel] * exposure
        table[0, :, channel] = 255 * np.clip(light, 0, 1) ** gamma
    varied: npt.NDArray[np.uint8] = cv2.LUT(image, table.round().astype(np.uint8))
    return varied


def vary_optics(rng: np.random.Generator, image: npt.NDArray[np.uint8]) -> npt.NDArray[np.uint8]:
    """Sometimes blur, compress as JPEG, and add noise.

    Args:
        rng: decides.
        image: uint8 (H, W, 3) RGB.

    Returns:
        uint8 (H, W, 3) RGB.
    """
    if rng.random() < 0.3:
        image = cv2.GaussianBlur(image, (0, 0), rng.uniform(0.3, 1.8))
    if rng.random() < 0.3:
        noise = rng.normal(0, rng.uniform(1, 8), image.shape)
        image = np.clip(image + noise, 0, 255).astype(np.uint8)
    if rng.random() < 0.3:
        _, data = cv2.imencode(".jpg", image, [cv2.IMWRITE_JPEG_QUALITY, int(rng.integers(30, 95))])
        image = np.asarray(cv2.imdecode(data, cv2.IMREAD_COLOR))
    return image


def augment(rng: np.random.Generator, sample: Sample, recipe: Recipe, *, size_px: int) -> Sample:
    """Apply a recipe.

    Args:
        rng: decides.
        sample: the whole image at the network's scale.
        recipe: `none` gives the sample back where it already has the size, else a plain crop.
        size_px: side of the result.
    """
    if recipe == "none":
        if sample.image.shape[:2] == (size_px, size_px):
            return sample
        y, x = (int(rng.integers(0, side - size_px + 1)) for side in sample.image.shape[:2])
        window = (slice(y, y + size_px), slice(x, x + size_px))
        return Sample(sample.image[window], sample.target[window], sample.weight[window])
    cropped = crop_affine(rng, sample, size_px=size_px, scale=(0.6, 1.7))
    image = vary_optics(rng, vary_colour(rng, cropped.image))
    return Sample(image, cropped.target, cropped.weight)
