"""The strong augmentation: what differs between laboratories, drawn anew for each crop.

Scale and stain are drawn as targets, not as changes: a crop is brought to a drawn cell diameter and
a drawn optical density whatever the image had, so that every source covers the whole range.
"""

from __future__ import annotations

from dataclasses import dataclass

import cv2
import numpy as np
import numpy.typing as npt

from bcseg_training.augment import Sample
from bcseg_training.specimens import CELL, PLATELET, Specimen

Bytes = npt.NDArray[np.uint8]
Floats = npt.NDArray[np.float32]

# Diameter of the median cell in the 512x512 input: where most images lie, and all that is covered.
USUAL_DIAMETER_PX = (17.0, 110.0)
ANY_DIAMETER_PX = (15.0, 250.0)
# Mean optical density of the cells: from ghosts on a faint camera to overstained.
DENSITY = (0.06, 0.75)
ASPECT = 1.4
# Of the crops, to keep what laboratories usually hand in common.
MILD_SHARE = 0.35
PLATELET_WEIGHT = 10.0


@dataclass(frozen=True, slots=True)
class Pyramid:
    """A specimen at 1, 1/2, 1/4 ... of its size, so that shrinking neither aliases nor is slow."""

    specimen: Specimen
    levels: tuple[tuple[Bytes, Bytes, Bytes], ...]


def pyramid(specimen: Specimen, *, smallest_px: int = 96) -> Pyramid:
    """Halve a specimen until its short side is at `smallest_px`."""
    levels = [(specimen.image, specimen.target, specimen.weight)]
    while min(levels[-1][0].shape[:2]) >= 2 * smallest_px:
        height, width = levels[-1][0].shape[:2]
        size_wh = (width // 2, height // 2)
        image, target, weight = (
            cv2.resize(array, size_wh, interpolation=cv2.INTER_AREA) for array in levels[-1]
        )
        levels.append((image, target, weight))
    return Pyramid(specimen, tuple(levels))


def _log_uniform(rng: np.random.Generator, low: float, high: float) -> float:
    return float(np.exp(rng.uniform(np.log(low), np.log(high))))


def crop(
    rng: np.random.Generator, source: Pyramid, *, size_px: int, diameter_px: float
) -> tuple[Bytes, Bytes, Bytes]:
    """Cut a rotated, flipped, stretched square in which the median cell has a given diameter.

    Outside the image the picture is mirrored and the weight is 0.

    Returns:
        Image (S, S, 3), target and weight (S, S, 4), all uint8.
    """
    full = source.specimen
    zoom = diameter_px / full.diameter_px
    # A crop should not be mostly mirror images: not much wider than the picture.
    zoom = max(zoom, 0.75 * size_px / min(full.image.shape[:2]))
    level = int(np.clip(np.floor(-np.log2(zoom)), 0, len(source.levels) - 1))
    image, target, weight = source.levels[level]
    height, width = image.shape[:2]
    zoom *= full.image.shape[1] / width
    stretch = np.exp(0.5 * rng.uniform(-1, 1) * np.log(ASPECT))
    # Photographs lie square: many crops keep their stretch along the axes, as the input does.
    if rng.random() < 0.4:
        angle = float(rng.choice([0, 0.5, 1, 1.5])) * np.pi
    else:
        angle = rng.uniform(0, 2 * np.pi)
    flip = rng.choice([-1.0, 1.0])
    rotation = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
    linear = rotation @ np.diag([zoom * stretch * flip, zoom / stretch])
    reach = 0.5 * size_px / zoom
    centre = np.array(
        [rng.uniform(min(reach, side / 2), max(side - reach, side / 2)) for side in (width, height)]
    )
    matrix = np.column_stack([linear, 0.5 * size_px - linear @ centre])
    size_wh = (size_px, size_px)
    mirror = cv2.BORDER_REFLECT_101
    smooth = cv2.INTER_CUBIC if zoom > 1.2 else cv2.INTER_LINEAR
    return (
        cv2.warpAffine(image, matrix, size_wh, flags=smooth, borderMode=mirror),
        cv2.warpAffine(target, matrix, size_wh, borderMode=mirror),
        cv2.warpAffine(weight, matrix, size_wh, borderValue=(0, 0, 0, 0)),
    )


def stain_matrix(rng: np.random.Generator) -> npt.NDArray[np.float64]:
    """Draw a 3x3 matrix that turns the hue and saturation of optical densities.

    The density vector is turned about the grey axis, by up to half a circle at worst, its colour
    part is scaled (to grey at 0), and each channel gets a factor.
    """
    wide = rng.random() < 0.35
    angle = rng.uniform(-np.pi, np.pi) if wide else rng.normal(0, 0.35)
    saturation = rng.uniform(0.0, 1.5) if rng.random() < 0.5 else 1.0
    grey = np.full((3, 3), 1 / 3)
    turn = np.cos(angle) * (np.eye(3) - grey) + np.sin(angle) / np.sqrt(3) * np.array(
        [[0, -1, 1], [1, 0, -1], [-1, 1, 0]]
    )
    matrix: npt.NDArray[np.float64] = (grey + saturation * turn) * np.exp(
        rng.normal(0, 0.15, (3, 1))
    )
    return matrix


def restain(rng: np.random.Generator, image: Bytes, specimen: Specimen) -> Floats:
    """Draw stain, strength of stain and light anew: float32 (H, W, 3), 0..255, not clipped."""
    table = np.log((np.arange(256, dtype=np.float32)[:, np.newaxis] + 1) / 256)
    table = (np.log((specimen.background + 1) / 256) - table).astype(np.float32)
    density = np.stack([table[:, c][image[:, :, c]] for c in range(3)], axis=-1)
    mild = rng.random() < MILD_SHARE
    wanted = _log_uniform(rng, *DENSITY)
    factor = np.clip(wanted / max(specimen.density, 0.02), 0.2, 3.0)
    if mild:
        factor = _log_uniform(rng, 0.75, 1.35)
        matrix = np.diag(np.exp(rng.normal(0, 0.08, 3)))
    else:
        matrix = stain_matrix(rng)
    density = density @ (factor * matrix).T.astype(np.float32)
    # A slide has no negative density but for noise and bright halos.
    density = np.maximum(density, -0.3)
    if mild:
        light = specimen.background * np.exp(rng.normal(0, 0.05, 3)) * _log_uniform(rng, 0.8, 1.1)
    else:
        light = rng.uniform(90, 250) * np.exp(rng.normal(0, 0.1, 3))
        light *= np.exp(-np.abs(rng.normal(0, 0.12, 3)) * (rng.random() < 0.4))
    lit: Floats = np.exp(-density) * np.minimum(light, 255).astype(np.float32)
    return lit


def relight(rng: np.random.Generator, lit: Floats) -> Floats:
    """Sometimes an uneven lamp, out-of-focus debris, stray light and a tone curve."""
    size_wh = (lit.shape[1], lit.shape[0])
    if rng.random() < 0.5:
        coarse = rng.normal(0, rng.uniform(0.02, 0.15), (3, 3)).astype(np.float32)
        lit = lit * np.exp(cv2.resize(coarse, size_wh, interpolation=cv2.INTER_CUBIC))[..., None]
    if rng.random() < 0.2:
        y, x = np.ogrid[: size_wh[1], : size_wh[0]]
        for _ in range(rng.integers(1, 4)):
            middle = rng.uniform(0, 1, 2) * size_wh
            sigma = _log_uniform(rng, 2, 40)
            shape = np.exp(
                -((x - middle[0]) ** 2 + (y - middle[1]) ** 2) / np.float32(2 * sigma**2)
            ).astype(np.float32)
            strength = (rng.uniform(-0.35, 0.15) * rng.uniform(0.6, 1, 3)).astype(np.float32)
            lit = lit * np.exp(shape[..., None] * strength)
    if rng.random() < 0.3:
        flare = np.float32(rng.uniform(0, 0.25))
        lit = lit * (1 - flare) + flare * np.float32(rng.uniform(80, 230))
    if rng.random() < 0.5:
        gamma = np.exp(rng.normal(0, 0.22))
        lit = (255 * np.clip(lit / 255, 0, 1) ** gamma).astype(np.float32)
    return lit


def refocus(rng: np.random.Generator, image: Floats, diameter_px: float) -> Bytes:
    """Sometimes blur, sharpen, pixelate, add noise and compress."""
    if rng.random() < 0.4:
        sigma = min(_log_uniform(rng, 0.3, 2.5), 0.05 * diameter_px + 0.3)
        image = cv2.GaussianBlur(image, (0, 0), sigma)
    if rng.random() < 0.2:
        soft = cv2.GaussianBlur(image, (0, 0), _log_uniform(rng, 0.7, 3.0))
        image = image + np.float32(rng.uniform(0.3, 1.5)) * (image - soft)
    if rng.random() < 0.1 and diameter_px > 25:
        side = image.shape[0]
        small = cv2.resize(image, None, fx=0.5, fy=0.5, interpolation=cv2.INTER_AREA)
        image = cv2.resize(small, (side, side), interpolation=cv2.INTER_LINEAR)
    if rng.random() < 0.5:
        noise = rng.standard_normal(image.shape, dtype=np.float32)
        if rng.random() < 0.5:
            noise = 2 * cv2.GaussianBlur(noise, (0, 0), 0.7)
        image = image + noise * np.float32(_log_uniform(rng, 0.7, 9))
    result = np.clip(np.rint(image), 0, 255).astype(np.uint8)
    if rng.random() < 0.03:
        result = np.repeat(result.mean(axis=2, keepdims=True).astype(np.uint8), 3, axis=2)
    if rng.random() < 0.35:
        _, data = cv2.imencode(
            ".jpg", result[:, :, ::-1], [cv2.IMWRITE_JPEG_QUALITY, int(rng.integers(35, 95))]
        )
        result = np.asarray(cv2.imdecode(data, cv2.IMREAD_COLOR))[:, :, ::-1]
    return np.ascontiguousarray(result)


def augment_strong(rng: np.random.Generator, source: Pyramid, *, size_px: int) -> Sample:
    """Make one training item of a specimen.

    Args:
        rng: decides all.
        source: the specimen.
        size_px: side of the item.
    """
    wanted = USUAL_DIAMETER_PX if rng.random() < 0.75 else ANY_DIAMETER_PX
    diameter_px = _log_uniform(rng, *wanted)
    image, target, weight = crop(rng, source, size_px=size_px, diameter_px=diameter_px)
    lit = relight(rng, restain(rng, image, source.specimen))
    target_share = np.true_divide(target, 255, dtype=np.float32)
    weight_share = np.true_divide(weight, 255, dtype=np.float32)
    # Platelets are few and small: unless they count more, they pass for background or for cells.
    weight_share[:, :, [CELL, PLATELET]] *= (
        1 + (PLATELET_WEIGHT - 1) * target_share[:, :, [PLATELET]]
    )
    return Sample(refocus(rng, lit, diameter_px), target_share, weight_share)
