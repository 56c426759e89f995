"""Synthetic blood-smear photographs with their ground truth.

A picture is built the way light makes it. Every cell adds its optical density to the film
(Beer-Lambert: densities add, so overlapping cells are darker), the lamp shines through
(`transmittance = exp(-density)`), the objective blurs, and the camera adds flare, noise and, in
some styles, JPEG blocks. The truth is drawn beside it from the same contours.

Three layers: a style says what the slide and the microscope are like (`typical_style`,
`random_style`), `synthesize_smear` turns a style into one picture, `write_dataset` puts many of
them on disk.
"""

from __future__ import annotations

import io
import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from enum import IntEnum
from pathlib import Path
from typing import Literal, TypeAlias

import cv2
import numpy as np
import numpy.typing as npt
import tifffile
from PIL import Image

from bcseg_batch.errors import OutputError, UsageError

FloatArray: TypeAlias = npt.NDArray[np.float32]
Vector3: TypeAlias = tuple[float, float, float]
StyleName: TypeAlias = Literal["typical", "varied"]

MIN_SIDE_PX = 32
MAX_CELLS = 65_535  # the label files are uint16

# How far a cell's diameter (of the disc of equal area) may lie from the style's, as a factor.
RED_DIAMETER_RANGE = (0.45, 1.45)
WHITE_DIAMETER_RANGE = (1.1, 2.3)
PLATELET_DIAMETER_RANGE = (0.14, 0.4)


class Kind(IntEnum):
    """What a label is."""

    RED_CELL = 1
    WHITE_CELL = 2
    PLATELET = 3


@dataclass(frozen=True, slots=True, kw_only=True)
class SmearStyle:
    """One slide under one microscope.

    Colours of stains are unit vectors of optical density (natural logarithm) in R, G, B; their
    strengths are the length of the density vector.

    Attributes:
        background_rgb: the empty slide in the middle of the field, each 0 to 255.
        plasma_density: optical density of the mottled protein film between cells, 0 to 0.1.
        red_stain: colour of red cells.
        red_density: density of a red cell where it is thickest, 0.2 to 2.5.
        red_density_cv: coefficient of variation of that from cell to cell, 0 to 0.4.
        nucleus_stain: colour of nuclei, parasites and platelet granules.
        nucleus_density: density of a white cell's nucleus, 0.8 to 3.
        cytoplasm_stain: colour of a white cell's cytoplasm.
        cytoplasm_density: density of it, 0.15 to 1.
        cell_diameter_px: diameter of the mean red cell.
        size_cv: coefficient of variation of that diameter, 0 to 0.25.
        red_cells: how many red cells are laid; those out of frame or buried have no label.
        white_cells: how many white cells.
        platelets: how many platelets.
        clumping: share of red cells laid against another one, 0 to 1.
        overlap: how deep such a cell reaches into the other, as a share of the diameter, 0 to 0.8.
        rouleaux: share of the clumped cells that go on in the direction of the chain, 0 to 1.
        pallor: how much of its density a red cell loses in the middle, 0 to 0.9.
        pallor_radius: radius of that paler middle as a share of the cell's, 0.2 to 0.75.
        odd_fraction: share of oval, tear-shaped, spindle and fragmented red cells, 0 to 1.
        crenated_fraction: share of red cells with a spiny outline, 0 to 1.
        target_fraction: share of red cells with a dark middle in the pallor, 0 to 1.
        parasite_fraction: share of red cells that hold a parasite, 0 to 1.
        artefact_fraction: share of red cells with a refractile drying ring, 0 to 1.
        focus_sigma_px: defocus of the whole picture, standard deviation.
        focus_tilt: how much of the picture goes further out of focus to one side, 0 to 1.
        halo: strength of the bright line around a cell (refraction, camera sharpening), 0 to 1.5.
        chromatic_px: radial shift between the red and the blue picture at the corner.
        vignette: loss of light in the corners, 0 to 0.6.
        gradient: difference of light between two sides, 0 to 0.5.
        aperture: radius of the round field of view as a share of the half diagonal, or None where
            the field is larger than the picture; beyond it the picture is black and unlabelled.
        flare: stray light that reaches every pixel, as a share of the background, 0 to 0.2.
        contrast: exponent on the camera's picture, 0.7 to 1.5; above 1 is harder.
        noise_levels: standard deviation of the sensor noise at full light, in grey levels, 0 to 8.
        debris: how many specks of stain and dust.
        ghosts: how many cells lie far out of focus; they are pale and not labelled.
        jpeg_quality: quality of the camera's own JPEG, or None for none.
    """

    background_rgb: Vector3
    plasma_density: float
    red_stain: Vector3
    red_density: float
    red_density_cv: float
    nucleus_stain: Vector3
    nucleus_density: float
    cytoplasm_stain: Vector3
    cytoplasm_density: float
    cell_diameter_px: float
    size_cv: float
    red_cells: int
    white_cells: int
    platelets: int
    clumping: float
    overlap: float
    rouleaux: float
    pallor: float
    pallor_radius: float
    odd_fraction: float
    crenated_fraction: float
    target_fraction: float
    parasite_fraction: float
    artefact_fraction: float
    focus_sigma_px: float
    focus_tilt: float
    halo: float
    chromatic_px: float
    vignette: float
    gradient: float
    aperture: float | None
    flare: float
    contrast: float
    noise_levels: float
    debris: int
    ghosts: int
    jpeg_quality: int | None

    def diameter_range_px(self, kind: Kind) -> tuple[float, float]:
        """Least and greatest diameter, as of a disc of equal area, of a whole cell of that kind."""
        low, high = _DIAMETER_RANGES[kind]
        return low * self.cell_diameter_px, high * self.cell_diameter_px


_DIAMETER_RANGES = {
    Kind.RED_CELL: RED_DIAMETER_RANGE,
    Kind.WHITE_CELL: WHITE_DIAMETER_RANGE,
    Kind.PLATELET: PLATELET_DIAMETER_RANGE,
}


@dataclass(frozen=True, slots=True)
class SyntheticSmear:
    """One picture and its truth.

    Attributes:
        image: uint8 (H, W, 3), RGB.
        labels: int32 (H, W), 0 background, 1 to n the cells. Where cells overlap the later one is
            on top; platelets lie under all cells, so that a platelet never cuts a hole in one.
        kinds: uint8 (n,), the `Kind` of label i + 1 at index i.
    """

    image: npt.NDArray[np.uint8]
    labels: npt.NDArray[np.int32]
    kinds: npt.NDArray[np.uint8]

    @property
    def mask(self) -> npt.NDArray[np.uint8]:
        """Binary mask, uint8 (H, W), 0 or 255: red and white cells.

        Platelets are background, as in the masks of Depto et al. 2021 (`bbbc041seg`).
        """
        is_cell = np.zeros(self.kinds.size + 1, dtype=bool)
        is_cell[1:] = self.kinds != Kind.PLATELET
        return np.where(is_cell[self.labels], np.uint8(255), np.uint8(0))


# --- styles ---------------------------------------------------------------------------------------

# Density vectors read off photographs: red cells in Wright, Giemsa and faded stains.
_RED_STAINS: dict[str, Vector3] = {
    "salmon": (0.16, 0.70, 0.68),
    "rose": (0.20, 0.83, 0.52),
    "buff": (0.28, 0.55, 0.78),
    "magenta": (0.47, 0.78, 0.42),
    "violet": (0.60, 0.73, 0.31),
    "slate": (0.66, 0.65, 0.38),
    "grey": (0.62, 0.58, 0.53),
}
_NUCLEUS_STAINS: dict[str, Vector3] = {
    "azure": (0.76, 0.64, 0.08),
    "violet": (0.50, 0.86, 0.10),
    "plum": (0.55, 0.79, 0.28),
    "dusk": (0.63, 0.66, 0.40),
}
_CYTOPLASM_STAINS: dict[str, Vector3] = {
    "lilac": (0.42, 0.84, 0.34),
    "sky": (0.80, 0.55, 0.22),
    "pink": (0.20, 0.88, 0.44),
}


def _unit(vector: npt.NDArray[np.float64]) -> Vector3:
    red, green, blue = (vector / np.linalg.norm(vector)).tolist()
    return red, green, blue


def _mixed(rng: np.random.Generator, stains: dict[str, Vector3], *, purity: float) -> Vector3:
    """Blend of stains: one of them for purity -> infinity, an even mix for purity -> 0."""
    weights = rng.dirichlet(np.full(len(stains), 1.0 / (1.0 + purity)))
    return _unit(weights @ np.array(list(stains.values())) + rng.uniform(0.0, 0.06, 3))


def _count(coverage: float, diameter_px: float, shape_hw: tuple[int, int]) -> int:
    """Cells of that diameter whose areas sum to that share of the picture."""
    height, width = shape_hw
    cells = coverage * height * width / (np.pi / 4 * diameter_px**2)
    return int(np.clip(round(cells), 1, 2500))


def _log_uniform(rng: np.random.Generator, low: float, high: float) -> float:
    return float(np.exp(rng.uniform(np.log(low), np.log(high))))


def _sometimes(rng: np.random.Generator, chance: float, low: float, high: float) -> float:
    """A value from the range in that share of draws, else 0."""
    value = rng.uniform(low, high)
    return float(value) if rng.random() < chance else 0.0


def typical_style(rng: np.random.Generator, *, shape_hw: tuple[int, int]) -> SmearStyle:
    """A clean, well-stained, sharp slide: what a laboratory would hand in.

    Args:
        rng: source of every choice.
        shape_hw: the picture's height and width in pixels.
    """
    scale = float(np.sqrt(shape_hw[0] * shape_hw[1]) / 512)
    diameter_px = rng.uniform(36, 50) * scale
    recipe = rng.choice(["pink", "pink", "violet", "slate"])
    if recipe == "pink":
        background = rng.uniform((208, 208, 204), (234, 230, 226))
        red_stain = _mixed(rng, {k: _RED_STAINS[k] for k in ("salmon", "rose", "buff")}, purity=1)
        red_density, nucleus = rng.uniform(0.55, 0.85), ("azure", "violet", "plum")
    else:
        background = rng.uniform((222, 223, 222), (236, 236, 238))
        names = ("violet", "magenta") if recipe == "violet" else ("slate", "violet", "grey")
        red_stain = _mixed(rng, {k: _RED_STAINS[k] for k in names}, purity=1)
        red_density, nucleus = rng.uniform(0.8, 1.35), ("violet", "plum", "dusk")
    return SmearStyle(
        background_rgb=(float(background[0]), float(background[1]), float(background[2])),
        plasma_density=rng.uniform(0.005, 0.02),
        red_stain=red_stain,
        red_density=red_density,
        red_density_cv=rng.uniform(0.07, 0.14),
        nucleus_stain=_mixed(rng, {k: _NUCLEUS_STAINS[k] for k in nucleus}, purity=1),
        nucleus_density=rng.uniform(1.5, 2.1),
        cytoplasm_stain=_mixed(rng, _CYTOPLASM_STAINS, purity=1),
        cytoplasm_density=rng.uniform(0.3, 0.5),
        cell_diameter_px=diameter_px,
        size_cv=rng.uniform(0.05, 0.09),
        red_cells=_count(rng.uniform(0.25, 0.5), diameter_px, shape_hw),
        white_cells=int(rng.integers(1, 4)),
        platelets=int(rng.integers(4, 16)),
        clumping=rng.uniform(0.15, 0.4),
        overlap=rng.uniform(0.05, 0.25),
        rouleaux=rng.uniform(0.1, 0.4),
        pallor=rng.uniform(0.5, 0.75),
        pallor_radius=rng.uniform(0.4, 0.55),
        odd_fraction=rng.uniform(0.05, 0.15),
        crenated_fraction=_sometimes(rng, 0.3, 0.02, 0.15),
        target_fraction=rng.uniform(0.0, 0.06),
        parasite_fraction=_sometimes(rng, 0.3, 0.02, 0.06),
        artefact_fraction=_sometimes(rng, 0.3, 0.02, 0.1),
        focus_sigma_px=rng.uniform(0.35, 0.55) * scale,
        focus_tilt=rng.uniform(0.0, 0.3),
        halo=rng.uniform(0.15, 0.5),
        chromatic_px=rng.uniform(0.0, 0.25) * scale,
        vignette=rng.uniform(0.02, 0.14),
        gradient=rng.uniform(0.0, 0.08),
        aperture=None,
        flare=rng.uniform(0.01, 0.04),
        contrast=1.0,
        noise_levels=rng.uniform(1.4, 2.8),
        debris=int(rng.integers(10, 40)),
        ghosts=0,
        jpeg_quality=None,
    )


def random_style(rng: np.random.Generator, *, shape_hw: tuple[int, int]) -> SmearStyle:
    """Any slide one may meet: faded or overstained, thick or thin, any magnification and camera.

    The red cell's diameter is 15 to 250 px once the picture is resized to 512x512.

    Args:
        rng: source of every choice.
        shape_hw: the picture's height and width in pixels.
    """
    scale = float(np.sqrt(shape_hw[0] * shape_hw[1]) / 512)
    at_512_px = _log_uniform(rng, 15, 250)
    diameter_px = at_512_px * scale
    # White, and tinted towards yellow, blue, green or pink by unbalanced cameras and thick plasma.
    background = rng.uniform(165, 248) * (1 - _sometimes(rng, 0.75, 0.0, 0.2) * rng.random(3) ** 2)
    height, width = shape_hw
    fields = height * width / (diameter_px**2 * 100)  # how many fields of a hundred cells fit
    return SmearStyle(
        background_rgb=(float(background[0]), float(background[1]), float(background[2])),
        plasma_density=float(rng.exponential(0.015)),
        red_stain=_mixed(rng, _RED_STAINS, purity=4),
        red_density=_log_uniform(rng, 0.28, 1.7),
        red_density_cv=rng.uniform(0.04, 0.25),
        nucleus_stain=_mixed(rng, _NUCLEUS_STAINS, purity=4),
        nucleus_density=rng.uniform(1.0, 2.4),
        cytoplasm_stain=_mixed(rng, _CYTOPLASM_STAINS, purity=4),
        cytoplasm_density=rng.uniform(0.2, 0.8),
        cell_diameter_px=diameter_px,
        size_cv=rng.uniform(0.03, 0.18),
        red_cells=_count(_log_uniform(rng, 0.12, 1.1), diameter_px, shape_hw),
        white_cells=int(min(rng.poisson(0.4 + 0.6 * fields), 30)) * int(rng.random() < 0.75),
        platelets=int(min(rng.poisson(1 + 4 * fields * rng.random()), 150)),
        clumping=rng.uniform(0.0, 0.9),
        overlap=rng.uniform(0.0, 0.5),
        rouleaux=_sometimes(rng, 0.6, 0.1, 0.9),
        pallor=rng.uniform(0.0, 0.85),
        pallor_radius=rng.uniform(0.28, 0.68),
        odd_fraction=_sometimes(rng, 0.8, 0.02, 0.6),
        crenated_fraction=_sometimes(rng, 0.4, 0.02, 0.9),
        target_fraction=_sometimes(rng, 0.3, 0.02, 0.4),
        parasite_fraction=_sometimes(rng, 0.4, 0.02, 0.25),
        artefact_fraction=_sometimes(rng, 0.35, 0.03, 0.4),
        # A blur is bound to the optics (a share of the cell) and to the pixel, whichever is more.
        focus_sigma_px=max(0.4, diameter_px * _log_uniform(rng, 0.004, 0.035)),
        focus_tilt=_sometimes(rng, 0.5, 0.1, 1.0),
        halo=_sometimes(rng, 0.7, 0.1, 1.3),
        chromatic_px=_sometimes(rng, 0.4, 0.2, 1.0) * scale,
        vignette=_sometimes(rng, 0.8, 0.0, 0.5),
        gradient=_sometimes(rng, 0.7, 0.0, 0.35),
        aperture=rng.uniform(0.72, 0.95) if rng.random() < 0.06 else None,
        flare=rng.uniform(0.0, 0.15),
        contrast=rng.uniform(0.8, 1.35),
        noise_levels=_log_uniform(rng, 0.4, 6.0),
        debris=int(rng.poisson(20 * rng.random() ** 2 * max(1.0, min(fields, 6.0)))),
        ghosts=int(rng.integers(1, 12)) if rng.random() < 0.2 else 0,
        jpeg_quality=int(rng.integers(45, 96)) if rng.random() < 0.6 else None,
    )


# --- shapes ---------------------------------------------------------------------------------------

_ANGLES = np.linspace(0, 2 * np.pi, 720, endpoint=False, dtype=np.float32)


def _equal_area(radii: FloatArray) -> FloatArray:
    """Contour r(angle), scaled to the area of the unit disc: area = 1/2 integral of r^2."""
    return np.asarray(radii / np.sqrt(np.mean(radii**2)), dtype=np.float32)


def _wavy(rng: np.random.Generator, amplitude: float, *, orders: int = 7) -> FloatArray:
    """Closed random outline: a Fourier series whose higher terms are smaller."""
    order = np.arange(2, orders + 1, dtype=np.float32)
    size = rng.normal(0, amplitude, order.size).astype(np.float32) / (order / 2) ** 1.5
    phase = rng.uniform(0, 2 * np.pi, order.size).astype(np.float32)
    waves = size[:, None] * np.cos(order[:, None] * _ANGLES + phase[:, None])
    radii = np.maximum(1 + waves.sum(axis=0), 0.3)
    return np.asarray(radii, dtype=np.float32)


def _rounded(radii: FloatArray, width: float) -> FloatArray:
    """The outline with its corners smoothed over that angle."""
    near = _bump(0.0, width)
    smooth = np.fft.irfft(np.fft.rfft(radii) * np.fft.rfft(near / near.sum()), radii.size)
    return np.asarray(smooth, dtype=np.float32)


def _bump(angle: float, width: float, *, sharpness: float = 2.0) -> FloatArray:
    """Bump of height 1 at that angle on the circle of angles."""
    turn = np.abs((_ANGLES - angle + np.pi) % (2 * np.pi) - np.pi)
    bump = np.exp(-((turn / np.float32(width)) ** np.float32(sharpness)))
    return np.asarray(bump, dtype=np.float32)


def _ellipse(aspect: float) -> FloatArray:
    """Outline of an ellipse whose long axis lies along angle 0, of unit mean radius."""
    along, across = np.sqrt(aspect), 1 / np.sqrt(aspect)
    radii = 1 / np.hypot(np.cos(_ANGLES) / along, np.sin(_ANGLES) / across)
    return np.asarray(radii, dtype=np.float32)


def _spiny(rng: np.random.Generator) -> FloatArray:
    """Outline of a crenated cell: pointed spicules at uneven steps."""
    radii = _wavy(rng, 0.025)
    spikes = int(rng.integers(9, 22))
    height = rng.uniform(0.04, 0.14)
    for k in range(spikes):
        angle = 2 * np.pi * (k + rng.uniform(-0.3, 0.3)) / spikes
        width = rng.uniform(0.25, 0.42) * 2 * np.pi / spikes
        radii += _bump(angle, width, sharpness=1.2) * np.float32(height * rng.uniform(0.3, 1.2))
    return radii


def _odd(rng: np.random.Generator) -> FloatArray:
    """Outline of an oval, tear-shaped, spindle-shaped or broken red cell."""
    form = rng.choice(
        ["oval", "tear", "spindle", "irregular", "fragment"], p=[0.38, 0.2, 0.1, 0.22, 0.1]
    )
    radii = _wavy(rng, 0.03)
    if form == "oval":
        return radii * _ellipse(rng.uniform(1.25, 1.9))
    if form == "tear":
        tail = _bump(0.0, rng.uniform(0.2, 0.4), sharpness=1.1)
        return radii * _ellipse(rng.uniform(1.0, 1.25)) + tail * np.float32(rng.uniform(0.3, 0.8))
    if form == "spindle":
        return radii * _ellipse(rng.uniform(1.9, 3.0))
    if form == "irregular":
        return _wavy(rng, 0.1)
    # A fragment has lost one side as if cut off; its corners have rounded.
    cut = rng.uniform(0.2, 0.6)
    along = np.cos(_ANGLES)
    limit = np.where(along > 0.05, cut / np.maximum(along, np.float32(0.05)), np.inf)
    helmet = np.minimum(radii, limit).astype(np.float32)
    return _rounded(helmet, rng.uniform(0.06, 0.16))


@dataclass(frozen=True, slots=True)
class _Patch:
    """The window of the picture that one contour touches.

    Attributes:
        rows, columns: slices of the picture.
        x, y: float32 (h, w), offset from the centre in cell radii, turned with the cell.
        radius: float32 (h, w), 0 in the middle, 1 on the contour.
        inside_px: float32 (h, w), about the distance to the contour, positive inside.
    """

    rows: slice
    columns: slice
    x: FloatArray
    y: FloatArray
    radius: FloatArray
    inside_px: FloatArray

    @property
    def window(self) -> tuple[slice, slice]:
        return self.rows, self.columns


@dataclass(frozen=True, slots=True)
class _Cell:
    """Where a cell lies: centre (pixels), radius of the disc of equal area, turn (radians)."""

    x_px: float
    y_px: float
    radius_px: float
    turn: float


def _patch(cell: _Cell, contour: FloatArray, shape_hw: tuple[int, int]) -> _Patch | None:
    """Window and coordinates of a cell, or None where it lies out of the picture."""
    reach = cell.radius_px * float(contour.max()) + 2
    top, bottom = max(0, int(cell.y_px - reach)), min(shape_hw[0], int(cell.y_px + reach) + 2)
    left, right = max(0, int(cell.x_px - reach)), min(shape_hw[1], int(cell.x_px + reach) + 2)
    if top >= bottom or left >= right:
        return None
    down = (np.arange(top, bottom, dtype=np.float32)[:, None] - cell.y_px) / cell.radius_px
    across = (np.arange(left, right, dtype=np.float32)[None, :] - cell.x_px) / cell.radius_px
    cosine, sine = np.float32(np.cos(cell.turn)), np.float32(np.sin(cell.turn))
    x = (across * cosine + down * sine).astype(np.float32)
    y = (down * cosine - across * sine).astype(np.float32)
    distance, angle = cv2.cartToPolar(x, y)
    index = (angle * np.float32(_ANGLES.size / (2 * np.pi))).astype(np.intp) % _ANGLES.size
    limit = contour[index]
    # Across a slanted contour the radial gap is longer than the distance; the slope corrects it.
    step = np.float32(2 * np.pi / _ANGLES.size)
    slope = (np.roll(contour, -1) - np.roll(contour, 1)) / (2 * step * contour)
    straighten = (1 / np.sqrt(1 + slope**2)).astype(np.float32)[index]
    inside_px = (limit - distance) * straighten * np.float32(cell.radius_px)
    return _Patch(
        slice(top, bottom), slice(left, right), x, y, distance / limit, inside_px.astype(np.float32)
    )


def _smoothstep(value: FloatArray) -> FloatArray:
    t = np.clip(value, np.float32(0), np.float32(1))
    return t * t * (3 - 2 * t)


class _Texture:
    """Periodic smooth noise, sampled at any place, scale and turn.

    The bank is float32 (256, 256), mean 0, standard deviation 1, grains about 3 px wide.
    """

    SIDE = 256

    def __init__(self, rng: np.random.Generator) -> None:
        white = rng.standard_normal((self.SIDE, self.SIDE)).astype(np.float32)
        tiled = cv2.GaussianBlur(np.pad(white, 8, mode="wrap"), (0, 0), 1.5)[8:-8, 8:-8]
        self._bank: FloatArray = ((tiled - tiled.mean()) / tiled.std()).astype(np.float32)

    def sample(
        self, rng: np.random.Generator, x: FloatArray, y: FloatArray, *, grains: float
    ) -> FloatArray:
        """Noise at these places with about that many grains to a unit of x and y."""
        shift = rng.uniform(0, self.SIDE, 2).astype(np.float32)
        step = np.float32(3 * grains)
        noise = cv2.remap(
            self._bank,
            np.mod(x * step + shift[0], self.SIDE).astype(np.float32),
            np.mod(y * step + shift[1], self.SIDE).astype(np.float32),
            cv2.INTER_LINEAR,
            borderMode=cv2.BORDER_WRAP,
        )
        return np.asarray(noise, dtype=np.float32)


# --- placement ------------------------------------------------------------------------------------


class _Layout:
    """Places taken so far, and free ones for the next cell."""

    def __init__(self, rng: np.random.Generator, shape_hw: tuple[int, int], capacity: int) -> None:
        self._rng = rng
        self._shape_hw = shape_hw
        self._taken = np.empty((capacity, 3), dtype=np.float64)  # x, y, radius
        self._heading = np.empty(capacity, dtype=np.float64)
        self._size = 0

    def _gaps(self, points: npt.NDArray[np.float64], radius_px: float) -> npt.NDArray[np.float64]:
        """Gap from a cell at each point to its nearest neighbour, in radii; below 0: overlap."""
        taken = self._taken[: self._size]
        if not self._size:
            return np.full(len(points), np.inf)
        apart = np.hypot(points[:, :1] - taken[:, 0], points[:, 1:] - taken[:, 1])
        gaps = (apart - taken[:, 2] - radius_px).min(axis=1) / radius_px
        return np.asarray(gaps, dtype=np.float64)

    def _take(self, x: float, y: float, radius_px: float, heading: float) -> tuple[float, float]:
        self._taken[self._size] = x, y, radius_px
        self._heading[self._size] = heading
        self._size += 1
        return x, y

    def free(self, radius_px: float, *, inset: float = -0.6) -> tuple[float, float]:
        """A place clear of the others, or the clearest of a few tries where the field is full.

        Args:
            radius_px: of the cell to lay.
            inset: how far from the border the centre has to be at least, in radii.
        """
        height, width = self._shape_hw
        margin = np.minimum(inset * radius_px, (np.array([width, height]) - 1) / 2)
        points = self._rng.uniform(margin, np.array([width, height]) - margin, (24, 2))
        gaps = self._gaps(points, radius_px)
        clear = np.flatnonzero(gaps > 0.04)
        best = clear[0] if clear.size else int(np.argmax(gaps))
        x, y = points[best].tolist()
        return self._take(x, y, radius_px, self._rng.uniform(0, 2 * np.pi))

    def beside(
        self, first: int, radius_px: float, *, overlap: float, rouleaux: float
    ) -> tuple[float, float]:
        """A place against a cell laid before, reaching into it by that share of the diameter."""
        if self._size <= first:
            return self.free(radius_px)
        chain = self._rng.random() < rouleaux
        # Chains grow at their end; heaps grow anywhere.
        other = self._size - 1 if chain else int(self._rng.integers(first, self._size))
        x, y, other_radius_px = self._taken[other]
        apart_px = (radius_px + other_radius_px) * (1 - overlap * self._rng.uniform(0.1, 1.4))
        if chain:
            headings = self._heading[other] + self._rng.normal(0, 0.2, 1)
        else:
            headings = self._rng.uniform(0, 2 * np.pi, 6)
        points = np.stack([x + apart_px * np.cos(headings), y + apart_px * np.sin(headings)], 1)
        best = int(np.argmax(self._gaps(points, radius_px)))
        x, y = points[best].tolist()
        return self._take(x, y, radius_px, float(headings[best]))

    @property
    def size(self) -> int:
        return self._size


# --- cells ----------------------------------------------------------------------------------------


class _Canvas:
    """The film that the cells are laid on.

    Attributes:
        density: float32 (H, W, 3), optical density.
        labels: int32 (H, W).
        kinds: the kind of label i + 1 at index i.
    """

    def __init__(self, rng: np.random.Generator, shape_hw: tuple[int, int], style: SmearStyle):
        self.rng = rng
        self.style = style
        self.shape_hw = shape_hw
        self.texture = _Texture(rng)
        self.density: FloatArray = np.zeros((*shape_hw, 3), dtype=np.float32)
        self.labels: npt.NDArray[np.int32] = np.zeros(shape_hw, dtype=np.int32)
        self.kinds: list[Kind] = []

    def patch(self, cell: _Cell, contour: FloatArray) -> _Patch | None:
        return _patch(cell, contour, self.shape_hw)

    def add(self, patch: _Patch, amount: FloatArray, stain: Vector3) -> None:
        """Add density, float32 (h, w), of one stain."""
        self.density[patch.window] += amount[..., None] * np.array(stain, dtype=np.float32)

    def label(self, patch: _Patch, kind: Kind) -> None:
        self.kinds.append(kind)
        self.labels[patch.window][patch.inside_px > 0] = len(self.kinds)


def _tilted(rng: np.random.Generator, stain: Vector3, amount: float) -> Vector3:
    """The same stain, a little off, as from cell to cell."""
    return _unit(np.clip(np.array(stain) + rng.normal(0, amount, 3), 0.02, None))


def _edge(patch: _Patch, radius_px: float, softness: float) -> FloatArray:
    """Thickness towards the contour: 0 outside, 1 inside, steep as in a dried cell."""
    width_px = np.float32(max(1.0, softness * radius_px))
    return np.sqrt(_smoothstep((patch.inside_px + np.float32(0.5)) / width_px))


def _red_profile(
    rng: np.random.Generator, style: SmearStyle, patch: _Patch, *, crenated: bool
) -> FloatArray:
    """Share of the full density over a red cell: a rim around a paler, uneven middle."""
    shift = rng.normal(0, 0.09, 2).astype(np.float32)
    long, wide = np.float32(rng.uniform(1.0, 1.25)), np.float32(rng.uniform(0.75, 1.0))
    if rng.random() < 0.05:
        wide = np.float32(rng.uniform(0.3, 0.5))  # a slit: stomatocyte
    bend = np.float32(rng.normal(0, 0.15))
    from_middle = np.hypot(
        (patch.x - shift[0]) / long, (patch.y - shift[1] - bend * patch.x**2) / wide
    )
    # Far from the middle the contour rules, so that the rim keeps its width on odd shapes.
    from_middle = np.maximum(from_middle, patch.radius**3)
    width = np.float32(style.pallor_radius * rng.uniform(0.75, 1.2))
    steepness = np.float32(rng.uniform(2.0, 4.5))
    depth = style.pallor * np.clip(rng.normal(1.0, 0.25), 0.0, 1.25)
    if crenated or rng.random() < 0.12:
        depth *= rng.uniform(0.0, 0.4)  # spherocytes and spiny cells are full to the middle
    depth = float(min(depth, 0.9))
    profile = 1 - np.float32(depth) * np.exp(-((from_middle / width) ** steepness))
    if rng.random() < style.target_fraction:
        bulge = np.exp(-((from_middle / (width * np.float32(0.45))) ** 2))
        profile += np.float32(depth * rng.uniform(0.6, 1.0)) * bulge
    rim = np.exp(-(((patch.radius - np.float32(0.86)) / np.float32(0.1)) ** 2))
    profile += np.float32(rng.uniform(0.0, 0.16)) * rim
    # Light falls off to the rim on the far side of the doughnut, and one flank is often thicker.
    lean = rng.normal(0, 0.07, 2).astype(np.float32)
    profile *= 1 + lean[0] * patch.x + lean[1] * patch.y
    return np.asarray(profile, dtype=np.float32)


def _spots(
    rng: np.random.Generator, patch: _Patch, *, count: int, reach: float, size: tuple[float, float]
) -> FloatArray:
    """Sum of round spots of height 1 within that radius of the middle."""
    total: FloatArray = np.zeros_like(patch.x)
    for _ in range(count):
        away, angle = reach * np.sqrt(rng.random()), rng.uniform(0, 2 * np.pi)
        width = np.float32(rng.uniform(*size))
        off_x = patch.x - np.float32(away * np.cos(angle))
        off_y = patch.y - np.float32(away * np.sin(angle))
        total += np.exp(-(((off_x**2 + off_y**2) / width**2) ** 2))
    return total


def _add_parasite(canvas: _Canvas, patch: _Patch, edge: FloatArray) -> None:
    """A malaria parasite: a ring with a dot, or an older, ragged one that fills the cell."""
    rng, style = canvas.rng, canvas.style
    stain = _tilted(rng, style.nucleus_stain, 0.06)
    strength = np.float32(0.5 * style.nucleus_density)
    away, angle = rng.uniform(0, 0.45), rng.uniform(0, 2 * np.pi)
    middle_x, middle_y = np.float32(away * np.cos(angle)), np.float32(away * np.sin(angle))
    distance = np.hypot(patch.x - middle_x, patch.y - middle_y)
    if rng.random() < 0.5:
        size = np.float32(rng.uniform(0.16, 0.28))
        ring = np.exp(-(((distance - size) / np.float32(0.05)) ** 2))
        dot_angle = rng.uniform(0, 2 * np.pi)
        dot = np.hypot(
            patch.x - middle_x - size * np.float32(np.cos(dot_angle)),
            patch.y - middle_y - size * np.float32(np.sin(dot_angle)),
        )
        amount = np.float32(0.5) * ring + 2 * np.exp(-((dot / np.float32(0.1)) ** 2))
    else:
        ragged = canvas.texture.sample(rng, patch.x, patch.y, grains=4)
        body = _smoothstep((np.float32(rng.uniform(0.35, 0.7)) - distance) * 3 + ragged * 0.4)
        grains = _spots(rng, patch, count=int(rng.integers(4, 14)), reach=0.6, size=(0.04, 0.1))
        amount = body * np.float32(0.7) + grains * np.float32(0.9)
    canvas.add(patch, (amount * strength * edge).astype(np.float32), stain)


def _add_artefact(canvas: _Canvas, patch: _Patch) -> None:
    """A refractile drying ring: a small dark ring around a bright point."""
    rng = canvas.rng
    off = rng.uniform(-0.4, 0.4, 2).astype(np.float32)
    distance = np.hypot(patch.x - off[0], (patch.y - off[1]) * np.float32(rng.uniform(0.7, 1.4)))
    size = np.float32(rng.uniform(0.08, 0.2))
    ring = np.exp(-(((distance - size) / (size * np.float32(0.35))) ** 2)) * np.float32(0.5)
    bright = np.exp(-((distance / (size * np.float32(0.6))) ** 2))
    local = canvas.density[patch.window]
    local *= 1 - np.float32(0.9) * bright[..., None]
    local += (ring * np.float32(canvas.style.red_density))[..., None] * np.float32(0.5)


def _add_red_cell(canvas: _Canvas, cell: _Cell, *, labelled: bool = True) -> None:
    rng, style = canvas.rng, canvas.style
    crenated = bool(rng.random() < style.crenated_fraction)
    if crenated:
        contour = _spiny(rng)
    elif rng.random() < style.odd_fraction:
        contour = _odd(rng)
    else:
        contour = _wavy(rng, 0.028) * _ellipse(1 + abs(rng.normal(0, 0.09)))
    patch = canvas.patch(cell, _equal_area(contour))
    if patch is None:
        return
    edge = _edge(patch, cell.radius_px, rng.uniform(0.1, 0.22))
    uneven = canvas.texture.sample(rng, patch.x, patch.y, grains=2) * np.float32(0.03)
    uneven += canvas.texture.sample(rng, patch.x, patch.y, grains=14) * np.float32(0.035)
    profile = _red_profile(rng, style, patch, crenated=crenated) * (1 + uneven)
    if crenated and rng.random() < 0.7:
        # Spicules that point at the lens: dark knobs with light between them.
        knobs = canvas.texture.sample(rng, patch.x, patch.y, grains=3)
        profile *= 1 + np.float32(rng.uniform(0.06, 0.16)) * knobs * (1 - patch.radius**4)
    strength = style.red_density * np.clip(rng.normal(1, style.red_density_cv), 0.45, 1.7)
    amount = np.maximum(profile, np.float32(0.05)) * edge * np.float32(strength)
    canvas.add(patch, amount.astype(np.float32), _tilted(rng, style.red_stain, 0.012))
    if not labelled:
        return
    if rng.random() < style.parasite_fraction:
        _add_parasite(canvas, patch, edge)
    if rng.random() < style.artefact_fraction:
        _add_artefact(canvas, patch)
    canvas.label(patch, Kind.RED_CELL)


def _lobes(rng: np.random.Generator, form: str) -> npt.NDArray[np.float64]:
    """Nucleus as discs (x, y, radius) in cell radii.

    Neutrophils have 3 to 5 lobes on an arc, eosinophils two, monocytes a kidney, lymphocytes one
    round nucleus that nearly fills the cell.
    """
    if form == "lymphocyte":
        return np.array([[*rng.normal(0, 0.06, 2), rng.uniform(0.72, 0.88)]])
    count, arc, away, size = {
        "neutrophil": (int(rng.integers(3, 6)), rng.uniform(3.6, 5.2), 0.45, 0.25),
        "eosinophil": (2, rng.uniform(2.2, 3.1), 0.42, 0.34),
        "monocyte": (6, rng.uniform(2.2, 3.2), 0.36, 0.36),
    }[form]
    angles = np.linspace(0, arc, count) + rng.uniform(0, 2 * np.pi)
    ragged = 0.0 if form == "monocyte" else 1.0
    angles += rng.normal(0, 0.15, count) * ragged
    reach = away * (1 + rng.normal(0, 0.18, count) * ragged)
    sizes = size * (1 + rng.normal(0, 0.15, count) * ragged)
    discs = np.stack([reach * np.cos(angles), reach * np.sin(angles), sizes], axis=1)
    # Threads of chromatin join the lobes.
    threads = (discs[1:] + discs[:-1]) / 2
    threads[:, 2] = rng.uniform(0.09, 0.16, count - 1)
    return np.concatenate([discs, threads])


def _nucleus(
    canvas: _Canvas, patch: _Patch, radius_px: float, lobes: npt.NDArray[np.float64]
) -> FloatArray:
    """Share of the nucleus's density, float32 (h, w): lobes melted into one another."""
    field: FloatArray = np.zeros_like(patch.x)
    wobble = canvas.texture.sample(canvas.rng, patch.x, patch.y, grains=1.2) * np.float32(0.1)
    for x, y, size in lobes.astype(np.float32):
        squared = ((patch.x - x) ** 2 + (patch.y - y) ** 2) / size**2
        field += np.exp(np.float32(-np.log(2)) * squared**1.6)
    edge_px = np.float32(max(1.5, 0.07 * radius_px))
    # One lobe's field falls by 1.6 ln 2, about 1.1, per lobe radius where it crosses one half.
    depth_px = (field - np.float32(0.5) + wobble) * np.float32(radius_px * lobes[:, 2].max() / 1.1)
    return _smoothstep(depth_px / edge_px + np.float32(0.5))


def _add_white_cell(canvas: _Canvas, cell: _Cell, form: str) -> None:
    rng, style, texture = canvas.rng, canvas.style, canvas.texture
    contour = _equal_area(_wavy(rng, 0.05, orders=9) * _ellipse(rng.uniform(1.0, 1.2)))
    patch = canvas.patch(cell, contour)
    if patch is None:
        return
    edge = _edge(patch, cell.radius_px, 0.12)
    # A white cell pushes red cells aside rather than lying over them.
    canvas.density[patch.window] *= 1 - np.float32(0.75) * edge[..., None]
    nucleus = _nucleus(canvas, patch, cell.radius_px, _lobes(rng, form)) * edge
    granules = texture.sample(rng, patch.x, patch.y, grains=14)
    clouds = texture.sample(rng, patch.x, patch.y, grains=2.5)
    cytoplasm = 1 + np.float32(0.1) * clouds
    stain = style.cytoplasm_stain
    strength = style.cytoplasm_density
    if form == "neutrophil":
        cytoplasm += np.float32(0.35) * granules
    elif form == "eosinophil":
        cytoplasm += np.float32(0.5) * granules
        stain = _unit(np.array([0.25, 0.85, 0.5]) + 0.5 * np.array(style.red_stain))
        strength *= 1.6
    elif form == "lymphocyte":
        stain = _unit(np.array([0.8, 0.55, 0.15]) + 0.5 * np.array(stain))
        strength *= 1.3
    else:
        cytoplasm += np.float32(0.12) * granules
    body = np.maximum(cytoplasm, np.float32(0.25)) * edge * (1 - np.float32(0.7) * nucleus)
    canvas.add(patch, (body * np.float32(strength)).astype(np.float32), _tilted(rng, stain, 0.03))
    chromatin = 1 + np.float32(0.1) * texture.sample(rng, patch.x, patch.y, grains=4)
    chromatin += np.float32(0.05) * texture.sample(rng, patch.x, patch.y, grains=12)
    amount = nucleus * np.maximum(chromatin, np.float32(0.4))
    amount *= np.float32(style.nucleus_density * rng.uniform(0.85, 1.1))
    canvas.add(patch, amount.astype(np.float32), _tilted(rng, style.nucleus_stain, 0.03))
    canvas.label(patch, Kind.WHITE_CELL)


def _add_platelet(canvas: _Canvas, cell: _Cell) -> None:
    rng, style = canvas.rng, canvas.style
    contour = _equal_area(_wavy(rng, 0.08, orders=8) * _ellipse(rng.uniform(1.0, 1.6)))
    patch = canvas.patch(cell, contour)
    if patch is None:
        return
    edge = _edge(patch, cell.radius_px, 0.5)
    grain = canvas.texture.sample(rng, patch.x, patch.y, grains=3)
    middle = np.exp(-((patch.radius / np.float32(0.7)) ** 2))
    amount = edge * np.maximum(np.float32(0.45) + middle * (1 + np.float32(0.4) * grain), 0.2)
    strength = style.nucleus_density * rng.uniform(0.22, 0.42)
    stain = _tilted(rng, style.nucleus_stain, 0.05)
    canvas.add(patch, (amount * np.float32(strength)).astype(np.float32), stain)
    canvas.label(patch, Kind.PLATELET)


# --- the slide ------------------------------------------------------------------------------------


def _clouds(rng: np.random.Generator, shape_hw: tuple[int, int], *, grain_px: float) -> FloatArray:
    """Smooth noise, float32 (H, W), mean about 0, standard deviation about 1."""
    rows = int(shape_hw[0] / grain_px) + 4
    columns = int(shape_hw[1] / grain_px) + 4
    coarse = rng.standard_normal((rows, columns)).astype(np.float32)
    size_wh = (int(columns * grain_px) + 1, int(rows * grain_px) + 1)
    smooth = cv2.resize(coarse, size_wh, interpolation=cv2.INTER_CUBIC)
    return np.asarray(smooth[: shape_hw[0], : shape_hw[1]], dtype=np.float32)


def _add_plasma(canvas: _Canvas) -> None:
    """The film between the cells: broad clouds of protein and a fine grain of stain."""
    rng, style, diameter_px = canvas.rng, canvas.style, canvas.style.cell_diameter_px
    film = 1 + _clouds(rng, canvas.shape_hw, grain_px=max(4.0, 2.5 * diameter_px))
    film += np.float32(0.5) * _clouds(rng, canvas.shape_hw, grain_px=max(2.0, diameter_px / 4))
    film += np.float32(0.3) * _clouds(rng, canvas.shape_hw, grain_px=max(1.5, diameter_px / 18))
    stain = _unit(np.array(style.red_stain) + np.array(style.cytoplasm_stain))
    canvas.density += (np.maximum(film, np.float32(0)) * np.float32(style.plasma_density))[
        ..., None
    ] * np.array(stain, dtype=np.float32)


def _add_debris(canvas: _Canvas) -> None:
    """Specks: stain precipitate in small swarms, brownish grains, and dust out of focus."""
    rng, style = canvas.rng, canvas.style
    height, width = canvas.shape_hw
    radius_px = style.cell_diameter_px / 2
    round_contour = np.ones(_ANGLES.size, dtype=np.float32)
    for _ in range(style.debris):
        x_px, y_px = rng.uniform(0, width), rng.uniform(0, height)
        form = rng.choice(["speck", "speck", "swarm", "grain", "dust"])
        stain = style.nucleus_stain if form != "grain" else (0.35, 0.5, 0.79)
        stain = _tilted(rng, stain, 0.1)
        pieces = int(rng.integers(3, 9)) if form == "swarm" else 1
        for _ in range(pieces):
            size = rng.uniform(0.5, 1.5) if form == "dust" else rng.uniform(0.04, 0.11)
            strength = rng.uniform(0.02, 0.08) if form == "dust" else rng.uniform(0.15, 0.7)
            jitter = rng.normal(0, 0.2 * radius_px, 2) * (pieces > 1)
            contour = round_contour if form == "dust" else _equal_area(_wavy(rng, 0.2))
            speck = _Cell(x_px + jitter[0], y_px + jitter[1], max(0.8, size * radius_px), 0.0)
            patch = canvas.patch(speck, contour)
            if patch is None:
                continue
            softness = 0.9 if form == "dust" else 0.4
            amount = _edge(patch, speck.radius_px, softness) * np.float32(strength)
            canvas.add(patch, amount, stain)


def _diameters(rng: np.random.Generator, style: SmearStyle) -> npt.NDArray[np.float64]:
    """Diameters of the red cells in units of the style's, within `RED_DIAMETER_RANGE`."""
    factors = rng.normal(1, style.size_cv, style.red_cells)
    # Fragments and small cells beside normal ones, where shapes are odd at all.
    small = rng.random(style.red_cells) < 0.15 * style.odd_fraction
    factors[small] *= rng.uniform(0.5, 0.8, int(small.sum()))
    return np.clip(factors, *RED_DIAMETER_RANGE)


def _add_cells(canvas: _Canvas) -> None:
    """Lay all cells: platelets lowest, then red cells, then white ones."""
    rng, style = canvas.rng, canvas.style
    unit_px = style.cell_diameter_px / 2
    total = style.white_cells + style.red_cells + style.platelets
    layout = _Layout(rng, canvas.shape_hw, total)

    white: list[tuple[_Cell, str]] = []
    for _ in range(style.white_cells):
        form = str(
            rng.choice(
                ["neutrophil", "lymphocyte", "monocyte", "eosinophil"], p=[0.55, 0.28, 0.1, 0.07]
            )
        )
        low, high = (1.1, 1.6) if form == "lymphocyte" else (1.5, 2.1)
        radius_px = unit_px * rng.uniform(low, high)
        place = layout.free(radius_px, inset=-0.3)
        white.append((_Cell(*place, radius_px, rng.uniform(0, 2 * np.pi)), form))

    first_red = layout.size
    red: list[_Cell] = []
    for factor in _diameters(rng, style):
        radius_px = unit_px * float(factor)
        if rng.random() < style.clumping:
            place = layout.beside(
                first_red, radius_px, overlap=style.overlap, rouleaux=style.rouleaux
            )
        else:
            place = layout.free(radius_px)
        red.append(_Cell(*place, radius_px, rng.uniform(0, 2 * np.pi)))

    for _ in range(style.platelets):
        radius_px = unit_px * rng.uniform(0.18, 0.34)
        place = layout.free(radius_px)
        _add_platelet(canvas, _Cell(*place, radius_px, rng.uniform(0, 2 * np.pi)))
    for index in rng.permutation(len(red)):
        _add_red_cell(canvas, red[index])
    for cell, form in white:
        _add_white_cell(canvas, cell, form)


def _add_ghosts(canvas: _Canvas) -> None:
    """Cells far out of focus: a blurred, pale layer over the film."""
    rng, style = canvas.rng, canvas.style
    if not style.ghosts:
        return
    layer = _Canvas(rng, canvas.shape_hw, style)
    height, width = canvas.shape_hw
    for _ in range(style.ghosts):
        place = rng.uniform(0, width), rng.uniform(0, height)
        radius_px = style.cell_diameter_px / 2 * rng.uniform(1.0, 1.4)
        _add_red_cell(layer, _Cell(*place, radius_px, 0.0), labelled=False)
    blurred = _blur(layer.density, 0.12 * style.cell_diameter_px)
    canvas.density += blurred * np.float32(rng.uniform(0.1, 0.25))


def _compact(
    labels: npt.NDArray[np.int32], kinds: list[Kind]
) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.uint8]]:
    """Drop the cells of which nothing is seen, and number the rest from 1 without gaps."""
    visible = np.bincount(labels.ravel(), minlength=len(kinds) + 1) > 0
    visible[0] = False
    renumber = np.where(visible, np.cumsum(visible), 0).astype(np.int32)
    kept = np.array(kinds, dtype=np.uint8)[visible[1:]]
    return renumber[labels], kept


# --- the microscope -------------------------------------------------------------------------------


def _blur(image: FloatArray, sigma_px: float) -> FloatArray:
    """Gaussian blur of float32 (H, W, 3); broad ones on a smaller picture, which looks alike."""
    if sigma_px < 0.2:
        return image
    shrink = int(min(sigma_px // 3, *(side // 8 for side in image.shape[:2])))
    if shrink < 2:
        return np.asarray(cv2.GaussianBlur(image, (0, 0), sigma_px), dtype=np.float32)
    size_wh = (image.shape[1], image.shape[0])
    small_wh = (size_wh[0] // shrink, size_wh[1] // shrink)
    small = cv2.resize(image, small_wh, interpolation=cv2.INTER_AREA)
    small = cv2.GaussianBlur(small, (0, 0), sigma_px / shrink)
    return np.asarray(cv2.resize(small, size_wh, interpolation=cv2.INTER_LINEAR), dtype=np.float32)


def _grid(shape_hw: tuple[int, int]) -> tuple[FloatArray, FloatArray]:
    """Offsets x, y, float32 (1, W) and (H, 1), from the middle, 1 at half the diagonal."""
    height, width = shape_hw
    half = np.float32(np.hypot(height, width) / 2)
    x = (np.arange(width, dtype=np.float32)[None, :] - np.float32((width - 1) / 2)) / half
    y = (np.arange(height, dtype=np.float32)[:, None] - np.float32((height - 1) / 2)) / half
    return x, y


def _focus(rng: np.random.Generator, light: FloatArray, style: SmearStyle) -> FloatArray:
    """Defocus, more of it to one side, and the bright line that refraction draws round a cell."""
    sharp = _blur(light, style.focus_sigma_px)
    angle = rng.uniform(0, 2 * np.pi)
    if style.focus_tilt > 0:
        soft = _blur(light, 2 * style.focus_sigma_px + 0.008 * style.cell_diameter_px)
        x, y = _grid((light.shape[0], light.shape[1]))
        side = x * np.float32(np.cos(angle)) + y * np.float32(np.sin(angle))
        share = _smoothstep(side + np.float32(0.2)) * np.float32(style.focus_tilt)
        sharp = sharp + (soft - sharp) * share[..., None]
    if style.halo > 0:
        around = _blur(sharp, max(1.0, 0.025 * style.cell_diameter_px))
        sharp = sharp + (sharp - around) * np.float32(style.halo)
    return sharp


def _shift_colours(light: FloatArray, shift_px: float) -> FloatArray:
    """Lateral chromatic aberration: red magnified, blue reduced, by that much at the corner."""
    if shift_px < 0.05:
        return light
    height, width = light.shape[:2]
    grow = shift_px / (np.hypot(height, width) / 2)
    planes = list(cv2.split(light))
    for channel, zoom in ((0, 1 + grow), (2, 1 - grow)):
        matrix = np.array(
            [[zoom, 0, (1 - zoom) * (width - 1) / 2], [0, zoom, (1 - zoom) * (height - 1) / 2]]
        )
        planes[channel] = cv2.warpAffine(
            planes[channel], matrix, (width, height), borderMode=cv2.BORDER_REPLICATE
        )
    return np.asarray(cv2.merge(planes), dtype=np.float32)


def _illumination(
    rng: np.random.Generator, shape_hw: tuple[int, int], style: SmearStyle
) -> FloatArray:
    """The lamp's light, float32 (H, W, 3), in grey levels of the empty slide."""
    x, y = _grid(shape_hw)
    off = rng.normal(0, 0.12, 2).astype(np.float32)
    falloff = (x - off[0]) ** 2 + (y - off[1]) ** 2
    angle = rng.uniform(0, 2 * np.pi)
    side = x * np.float32(np.cos(angle)) + y * np.float32(np.sin(angle))
    field: FloatArray = 1 - np.float32(style.vignette) * falloff
    field = field * (1 + np.float32(style.gradient / 2) * side)
    # Lamps and filters are a little uneven in colour too.
    tint = rng.normal(0, 0.012, 3).astype(np.float32) * np.float32(min(1, 10 * style.gradient))
    colour = field[..., None] * (1 + side[..., None] * tint)
    return np.asarray(colour * np.array(style.background_rgb), dtype=np.float32)


def _camera(rng: np.random.Generator, levels: FloatArray, style: SmearStyle) -> FloatArray:
    """Tone curve and sensor noise (shot noise grows as the root of the light)."""
    toned = np.clip(levels / 255, 0, 1) ** np.float32(style.contrast) * np.float32(255)
    noise = rng.standard_normal(levels.shape, dtype=np.float32)
    # Colour sensors fill two of three values from their neighbours: noise is not white.
    noise = np.asarray(cv2.GaussianBlur(noise, (0, 0), 0.6), dtype=np.float32) * np.float32(2.0)
    shot = np.sqrt(np.float32(0.15) + np.float32(0.85) * toned / 255)
    return toned + noise * shot * np.float32(style.noise_levels)


def _jpeg(image: npt.NDArray[np.uint8], quality: int) -> npt.NDArray[np.uint8]:
    """The picture after the camera's own JPEG, uint8 (H, W, 3)."""
    packed = io.BytesIO()
    Image.fromarray(image).save(packed, "JPEG", quality=quality)
    with Image.open(packed) as reread:
        return np.asarray(reread.convert("RGB"), dtype=np.uint8)


def _photograph(
    rng: np.random.Generator, density: FloatArray, style: SmearStyle
) -> npt.NDArray[np.uint8]:
    """Density, float32 (H, W, 3), to picture, uint8 (H, W, 3)."""
    shape_hw = (density.shape[0], density.shape[1])
    light = _focus(rng, np.exp(-density), style)
    light = _shift_colours(light, style.chromatic_px)
    light = np.float32(style.flare) + (1 - np.float32(style.flare)) * light
    levels = light * _illumination(rng, shape_hw, style)
    if style.aperture is not None:
        levels *= _smoothstep(_aperture_depth(shape_hw, style.aperture) * 30)[..., None]
    levels = _camera(rng, levels, style)
    image = np.clip(np.rint(levels), 0, 255).astype(np.uint8)
    return image if style.jpeg_quality is None else _jpeg(image, style.jpeg_quality)


def _aperture_depth(shape_hw: tuple[int, int], aperture: float) -> FloatArray:
    """Distance inside the round field of view, float32 (H, W), in half diagonals."""
    x, y = _grid(shape_hw)
    return (np.float32(aperture) - np.hypot(x, y)).astype(np.float32)


def synthesize_smear(
    rng: np.random.Generator, *, shape_hw: tuple[int, int], style: SmearStyle
) -> SyntheticSmear:
    """One picture in that style, with its truth.

    Args:
        rng: source of every choice; the same state gives the same picture, bit for bit.
        shape_hw: height and width in pixels, each at least `MIN_SIDE_PX`.
        style: the slide and the microscope.

    Raises:
        ValueError: the picture is too small, or the style lays more cells than labels can number.
    """
    if min(shape_hw) < MIN_SIDE_PX:
        raise ValueError(f"shape_hw is {shape_hw}: each side must be at least {MIN_SIDE_PX} px")
    cells = style.red_cells + style.white_cells + style.platelets
    if cells > MAX_CELLS:
        raise ValueError(f"the style lays {cells} cells: at most {MAX_CELLS} can be labelled")
    canvas = _Canvas(rng, shape_hw, style)
    _add_plasma(canvas)
    _add_cells(canvas)
    _add_debris(canvas)
    _add_ghosts(canvas)
    image = _photograph(rng, canvas.density, style)
    if style.aperture is not None:
        canvas.labels[_aperture_depth(shape_hw, style.aperture) <= 0] = 0
    labels, kinds = _compact(canvas.labels, canvas.kinds)
    return SyntheticSmear(image=image, labels=labels, kinds=kinds)


# --- disk -----------------------------------------------------------------------------------------

_STYLES: dict[str, Callable[..., SmearStyle]] = {"typical": typical_style, "varied": random_style}


def synthesize_numbered(
    seed: int, index: int, *, shape_hw: tuple[int, int], style: StyleName
) -> SyntheticSmear:
    """Picture `index` of the data set of that seed: it depends on nothing else.

    Args:
        seed: of the data set, 0 or more.
        index: of the picture, 0 or more.
        shape_hw: height and width in pixels.
        style: `typical` (clean slides) or `varied` (any).
    """
    rng = np.random.default_rng(np.random.SeedSequence([seed, index]))
    return synthesize_smear(rng, shape_hw=shape_hw, style=_STYLES[style](rng, shape_hw=shape_hw))


def _write_whole(path: Path, content: bytes) -> None:
    """Write under a passing name and rename, so that the final name never holds half a file."""
    passing = path.with_name(f".{path.name}.part")
    with passing.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    passing.replace(path)


def _png(mask: npt.NDArray[np.uint8]) -> bytes:
    packed = io.BytesIO()
    Image.fromarray(mask).save(packed, "PNG", optimize=True)
    return packed.getvalue()


def _photo_jpeg(image: npt.NDArray[np.uint8]) -> bytes:
    packed = io.BytesIO()
    # Full colour resolution: thin coloured edges are what a segmenter lives on.
    Image.fromarray(image).save(packed, "JPEG", quality=95, subsampling=0)
    return packed.getvalue()


def _tiff(labels: npt.NDArray[np.int32]) -> bytes:
    packed = io.BytesIO()
    tifffile.imwrite(packed, labels.astype(np.uint16), compression="zlib")
    return packed.getvalue()


def encode_kinds(kinds: Iterable[int]) -> bytes:
    """Write the kinds of labels 1..n as `kinds/<stem>.csv` holds them: columns label and kind."""
    rows = (f"{label},{Kind(kind).name.lower()}\n" for label, kind in enumerate(kinds, start=1))
    return ("label,kind\n" + "".join(rows)).encode()


def write_dataset(
    out: Path,
    *,
    count: int,
    seed: int,
    shape_hw: tuple[int, int] = (1200, 1600),
    style: StyleName = "typical",
) -> None:
    """Write a data set of synthetic smears, paired by stem.

    For picture i there are `out/original/synth_{i:05}.jpg` (quality 95, full colour resolution),
    `out/mask/synth_{i:05}.png` (8-bit, 0 or 255), `out/labels/synth_{i:05}.tif` (uint16) and
    `out/kinds/synth_{i:05}.csv` (columns label and kind: red_cell, white_cell or platelet).

    Picture i depends on the seed, i, the shape and the style only, so that a larger count adds
    pictures and leaves the others as they were. No half-written file ever carries a final name;
    a picture appears after its truth, so that after an interruption none is without.

    Args:
        out: the folder, made if missing; it has to be empty.
        count: how many pictures, at least 1.
        seed: 0 or more.
        shape_hw: height and width in pixels, each at least `MIN_SIDE_PX`.
        style: `typical` (clean slides) or `varied` (any stain, magnification and camera).

    Raises:
        UsageError: an argument cannot be carried out, or `out` is not an empty folder.
        OutputError: the disk is full, or the folder may not be written.
    """
    if style not in _STYLES:
        raise UsageError(f"no style is called {style!r}: choose one of {', '.join(_STYLES)}")
    if count < 1:
        raise UsageError(f"the count is {count}: ask for at least 1 image")
    if seed < 0:
        raise UsageError(f"the seed is {seed}: give a number of 0 or more")
    if min(shape_hw) < MIN_SIDE_PX:
        height, width = shape_hw
        raise UsageError(f"{width}x{height} px is too small: use at least {MIN_SIDE_PX} px a side")
    if out.exists() and not out.is_dir():
        raise UsageError(f"{out} is a file: name a folder that is empty or does not exist")
    if out.is_dir() and any(out.iterdir()):
        raise UsageError(f"{out} is not empty: name another folder, or empty this one first")
    try:
        for folder in ("labels", "kinds", "mask", "original"):
            (out / folder).mkdir(parents=True, exist_ok=True)
        for index in range(count):
            smear = synthesize_numbered(seed, index, shape_hw=shape_hw, style=style)
            stem = f"synth_{index:05}"
            _write_whole(out / "labels" / f"{stem}.tif", _tiff(smear.labels))
            _write_whole(out / "kinds" / f"{stem}.csv", encode_kinds(smear.kinds))
            _write_whole(out / "mask" / f"{stem}.png", _png(smear.mask))
            _write_whole(out / "original" / f"{stem}.jpg", _photo_jpeg(smear.image))
    except OSError as error:
        raise OutputError(f"cannot write the data set into {out}: {error}") from error
