"""When a result is to be doubted: measures of one image at the network's size, and their limits.

All is measured on the image as the network saw it, and on the network's answer. The limits were
chosen on real smears and on pictures that are none; `benchmarks/quality.py` shows how often each
flag comes on, and MODEL_CARD.md has its table.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Self

import cv2
import numpy as np
import numpy.typing as npt
from pydantic import BaseModel, ConfigDict, Field, model_validator

from bcseg_batch.items import Flag

Bytes = npt.NDArray[np.uint8]
Floats = npt.NDArray[np.float32]
Bools = npt.NDArray[np.bool_]

EDGE_WIDTH_LIMIT = 0.25
BURNT_LIMIT = 0.05
WHITE_LIMIT = 0.9
BRIGHTNESS_LIMIT = 80.0
CROWDED_LIMIT = 0.8

# What no smear has, each as a limit that good smears keep: see `_not_a_smear`.
CERTAINTY_LIMIT = 0.65
FLATNESS_LIMIT = 1.5
BACKGROUND_COLOURS_LIMIT = 0.3
CELL_COLOURS_LIMIT = 1.4
CELL_LIGHT_LIMIT = 2.3
SOLIDITY_LIMIT = 0.85
SAMENESS_LIMIT = 0.63

# A cell of fewer pixels has no edge that could be told from its middle.
_LEAST_DIAMETER_PX = 12.0
_LEAST_CONTRAST = 4.0
# What is as bright as this has lost its differences.
_WHITE = 253
_SURE = 0.8

LOOK_NAMES = (
    "background_red",
    "background_green",
    "background_blue",
    "density_red",
    "density_green",
    "density_blue",
    "diameter",
)
"""What an image looks like: the logarithm of the empty slide's colour (0..255), the cells' median
optical density against it (Beer-Lambert, natural logarithm), and the logarithm of the typical
cell's diameter at the network's size in px."""


class TrainingStatistics(BaseModel):
    """How the training images look, as a normal distribution of the features of `LOOK_NAMES`.

    Attributes:
        names: of the features, in the order of the others.
        mean: of each.
        precision: inverse of their covariance, symmetric and positive definite.
        limit: the distance (Mahalanobis 1936) beyond which an image is unlike them.
        count: how many images were measured.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    names: tuple[str, ...] = LOOK_NAMES
    mean: tuple[float, ...]
    precision: tuple[tuple[float, ...], ...]
    limit: float = Field(gt=0)
    count: int = Field(ge=2)

    @model_validator(mode="after")
    def _must_fit_together(self) -> Self:
        size = len(LOOK_NAMES)
        if self.names != LOOK_NAMES:
            raise ValueError(f"the features are {self.names}, this version knows {LOOK_NAMES}")
        matrix = np.array(self.precision, np.float64) if self.precision else np.zeros((0, 0))
        if len(self.mean) != size or any(len(row) != size for row in self.precision):
            raise ValueError(f"mean and precision are not of {size} features")
        if matrix.shape != (size, size) or not np.allclose(matrix, matrix.T):
            raise ValueError("the precision is not symmetric")
        if np.linalg.eigvalsh(matrix).min() <= 0:
            raise ValueError("the precision is not positive definite")
        return self

    def distance(self, look: Sequence[float]) -> float:
        """Give the Mahalanobis distance of an image's look from the training images."""
        offset = np.asarray(look, np.float64) - np.asarray(self.mean)
        return float(math.sqrt(offset @ np.asarray(self.precision) @ offset))


@dataclass(frozen=True, slots=True, kw_only=True)
class Measures:
    """What is measured of one image; None where there is nothing to measure it on.

    Attributes:
        white: share of the pixels that are white in all colours.
        brightness: of the empty slide, 0..255: the 95th percentile of the mean of R, G and B.
        foreground: share of the pixels that are cells.
        burnt: share of the cells' pixels in which a colour is at its end: cells that are white in
            all colours are no longer found.
        edge_width: width of the cells' edges as a share of the typical diameter: contrast over the
            steepest slope. A step blurred by a Gaussian of sigma has a width of 2.5 sigma.
        certainty: share of the foreground where the network is sure, above 0.8.
        flatness: spread of the background's green (10th to 90th percentile) over the contrast of
            the cells; 0 for an even slide.
        background_colours: spread of the background's colour: 10th to 90th percentile of the
            logarithm of red over green, or of blue over green, whichever is more.
        cell_colours: the same of the cells.
        cell_light: the same of the logarithm of the cells' green.
        solidity: of the cells that no border cuts, mean over their area; as in `measure_cells`.
        sameness: share of the pixels, white and black ones aside, that are the same as those to the
            right and below: photographs have noise, drawings have none.
        look: the features of `LOOK_NAMES`.
    """

    white: float
    brightness: float
    foreground: float
    burnt: float | None = None
    edge_width: float | None = None
    certainty: float | None = None
    flatness: float | None = None
    background_colours: float | None = None
    cell_colours: float | None = None
    cell_light: float | None = None
    solidity: float | None = None
    sameness: float | None = None
    look: tuple[float, ...] | None = None


def measure_light(thumbnail: Bytes, foreground: float) -> Measures:
    """Measure what can be told without looking at the cells: of an image taken in tiles.

    Args:
        thumbnail: uint8 (S, S, 3) RGB, the image stretched to a square.
        foreground: share of the image's pixels that are cells.
    """
    return _light(_split(thumbnail), foreground)


def _light(planes: list[Bytes], foreground: float) -> Measures:
    return Measures(
        white=_share(_darkest([plane[::2, ::2] for plane in planes]) >= _WHITE),
        brightness=_quantiles(_grey([plane[::4, ::4] for plane in planes]), 0.95)[0],
        foreground=foreground,
    )


def measure_quality(
    thumbnail: Bytes,
    cell: Floats,
    diameter_px: float | None,
    *,
    solidity: float | None = None,
    threshold: float = 0.5,
) -> Measures:
    """Measure an image that went through the network in one piece.

    Args:
        thumbnail: uint8 (S, S, 3) RGB, as the network saw it.
        cell: float32 (S, S) in [0, 1], probability of a cell.
        diameter_px: of the typical cell, at the thumbnail's size; None without cells.
        solidity: of the cells that no border cuts, mean over their area; None without such.
        threshold: a pixel is foreground above it.
    """
    mask = cell > threshold
    planes = _split(thumbnail)
    light = _light(planes, _share(mask))
    if diameter_px is None or not mask.any():
        return light
    # A rim around the cells belongs to neither: there the light is bent, and the mask unsure.
    inner = cv2.erode(mask.view(np.uint8), np.ones((3, 3), np.uint8)) > 0
    outer = cv2.dilate(mask.view(np.uint8), np.ones((7, 7), np.uint8)) == 0
    every = (slice(None, None, 3), slice(None, None, 3))  # enough for medians
    small = [plane[every] for plane in planes]
    inside = _picked(small, inner[every] if inner[every].any() else mask[every])
    outside = _picked(small, outer[every])
    if not inside.size:
        return light
    has_background = outside.shape[1] >= 0.02 * small[0].size
    if not has_background:
        # Between crowded cells there is hardly any empty slide: the brightest tenth is the best.
        grey = _grey(small)
        outside = _picked(small, grey >= np.percentile(grey, 90))
    background = [_median(plane) for plane in outside]
    density = [
        _median(np.log(np.float32(empty + 1) / (plane + 1)))
        for empty, plane in zip(background, inside, strict=True)
    ]
    contrast = abs(background[1] - _median(inside[1]))
    logs = np.log(inside + 8)
    return Measures(
        white=light.white,
        brightness=light.brightness,
        foreground=light.foreground,
        burnt=_share(inside.max(axis=0) >= _WHITE),
        edge_width=_edge_width(planes[1], mask, contrast, diameter_px),
        certainty=float(np.count_nonzero((cell >= _SURE) & mask) / np.count_nonzero(mask)),
        flatness=_spread(outside[1]) / max(contrast, 1.0) if has_background else None,
        background_colours=_colours(np.log(outside + 8)) if has_background else None,
        cell_colours=_colours(logs),
        cell_light=_spread(logs[1]),
        solidity=solidity,
        sameness=_sameness(planes),
        look=(
            *(math.log(value + 1) for value in background),
            *density,
            math.log(diameter_px),
        ),
    )


# Colours are held apart, as three planes: what goes over the last axis of an RGB picture, three
# values long, takes numpy ten times as long.


def _split(pixels: Bytes) -> list[Bytes]:
    """Part uint8 (H, W, 3) into three of (H, W)."""
    return list(cv2.split(pixels))


def _picked(planes: list[Bytes], where: Bools) -> Floats:
    """Take the pixels of a mask (H, W): float32 (3, n)."""
    return np.stack([plane[where] for plane in planes]).astype(np.float32)


def _darkest(planes: list[Bytes]) -> Bytes:
    """Give the least of the three colours at each pixel: uint8 (H, W)."""
    darkest: Bytes = np.minimum(np.minimum(planes[0], planes[1]), planes[2])
    return darkest


def _grey(planes: list[Bytes]) -> npt.NDArray[np.float64]:
    """Give the mean of the three colours at each pixel: float64 (H, W)."""
    red, green, blue = planes
    return (red.astype(np.uint16) + green + blue) / 3


def _share(where: Bools) -> float:
    return float(np.count_nonzero(where) / where.size)


def _spread(values: Floats) -> float:
    low, high = _quantiles(values, 0.1, 0.9)
    return high - low


def _median(values: npt.NDArray[np.floating[Any]]) -> float:
    (median,) = _quantiles(values, 0.5)
    return median


def _quantiles(values: npt.NDArray[np.floating[Any]], *shares: float) -> list[float]:
    """Give the values below which shares of all lie, on a line between the two next to each.

    So does `np.percentile`, in several times the time that numpy takes to sort.
    """
    ordered = np.sort(values, axis=None)
    places = np.array(shares) * (ordered.size - 1)
    below = np.floor(places).astype(np.intp)
    low, high = (ordered[at].astype(np.float64) for at in (below, np.ceil(places).astype(np.intp)))
    found: list[float] = (low + (high - low) * (places - below)).tolist()
    return found


def _colours(logs: Floats) -> float:
    return max(_spread(logs[0] - logs[1]), _spread(logs[2] - logs[1]))


def _sameness(planes: list[Bytes]) -> float | None:
    here = [plane[:-1, :-1] for plane in planes]
    brightest = np.maximum(np.maximum(here[0], here[1]), here[2])
    told = (brightest < _WHITE) & (_darkest(here) > 0)
    if _share(told) < 0.1:
        return None
    same = told.copy()
    for plane in planes:
        same &= plane[:-1, :-1] == plane[:-1, 1:]
        same &= plane[:-1, :-1] == plane[1:, :-1]
    return float(np.count_nonzero(same) / np.count_nonzero(told))


def _edge_width(green: Bytes, mask: Bools, contrast: float, diameter_px: float) -> float | None:
    if diameter_px < _LEAST_DIAMETER_PX or contrast < _LEAST_CONTRAST:
        return None
    outline = cv2.morphologyEx(mask.view(np.uint8), cv2.MORPH_GRADIENT, np.ones((3, 3), np.uint8))
    outline[[0, -1]] = outline[:, [0, -1]] = 0
    if not outline.any():
        return None
    # Noise has slopes of its own; a little smoothing hardly widens an edge.
    smooth = cv2.GaussianBlur(green.astype(np.float32), (0, 0), 0.7)
    slope = cv2.magnitude(
        cv2.Scharr(smooth, cv2.CV_32F, 1, 0, scale=1 / 32),
        cv2.Scharr(smooth, cv2.CV_32F, 0, 1, scale=1 / 32),
    )
    # The outline may lie a few pixels beside the edge: the steepest place nearby counts.
    steepest = cv2.dilate(slope, np.ones((7, 7), np.uint8))[outline > 0]
    return float(contrast / max(_median(steepest), 0.1) / diameter_px)


def assess(
    measures: Measures, cell_count: int, statistics: TrainingStatistics | None
) -> tuple[Flag, ...]:
    """Say what is to be doubted about an image.

    Args:
        measures: of the image.
        cell_count: red and white cells that were found.
        statistics: of the training images; None judges nothing by them.

    Returns:
        Flags, each with the number that is beyond its limit; none for an ordinary smear.
    """
    return tuple(_doubts(measures, cell_count, statistics))


def _doubts(
    measures: Measures, cell_count: int, statistics: TrainingStatistics | None
) -> Iterator[Flag]:
    if cell_count == 0:
        yield Flag(
            "no_cells",
            0.0,
            1.0,
            "No cell was found: look whether the image shows a smear, and whether it is sharp.",
        )
    if measures.edge_width is not None and measures.edge_width > EDGE_WIDTH_LIMIT:
        yield Flag(
            "out_of_focus",
            measures.edge_width,
            EDGE_WIDTH_LIMIT,
            f"The image looks out of focus: the edges of the cells are {measures.edge_width:.2f} "
            f"of a cell's diameter wide, more than {EDGE_WIDTH_LIMIT:.2f}. Focus, and take it "
            "again.",
        )
    yield from _exposure(measures)
    if measures.foreground > CROWDED_LIMIT:
        yield Flag(
            "too_crowded",
            measures.foreground,
            CROWDED_LIMIT,
            f"The cells cover {measures.foreground:.0%} of the image, more than "
            f"{CROWDED_LIMIT:.0%}: overlapping ones cannot be told apart, so do not trust the "
            "count. Take a thinner part of the smear.",
        )
    yield from _not_a_smear(measures)
    if statistics is not None and measures.look is not None:
        distance = statistics.distance(measures.look)
        if distance > statistics.limit:
            yield Flag(
                "unlike_training",
                distance,
                statistics.limit,
                f"Colour or size of the cells are unlike those the model was trained on (distance "
                f"{distance:.1f}, more than {statistics.limit:.1f}): look at the composite before "
                "you use the numbers.",
            )


def _exposure(measures: Measures) -> Iterator[Flag]:
    burnt = measures.burnt or 0.0
    if burnt > BURNT_LIMIT:
        yield Flag(
            "over_exposed",
            burnt,
            BURNT_LIMIT,
            f"The image is over-exposed: {burnt:.0%} of the cells' pixels have a colour at its "
            f"end, more than {BURNT_LIMIT:.0%}. Expose it for less time.",
        )
    elif measures.white > WHITE_LIMIT:
        yield Flag(
            "over_exposed",
            measures.white,
            WHITE_LIMIT,
            f"The image is over-exposed: {measures.white:.0%} of it are white, more than "
            f"{WHITE_LIMIT:.0%}. Expose it for less time.",
        )
    if measures.brightness < BRIGHTNESS_LIMIT:
        yield Flag(
            "under_exposed",
            measures.brightness,
            BRIGHTNESS_LIMIT,
            f"The image is under-exposed: its brightest parts reach {measures.brightness:.0f} of "
            f"255, less than {BRIGHTNESS_LIMIT:.0f}. Expose it for longer.",
        )


def _not_a_smear(measures: Measures) -> Iterator[Flag]:
    """Look for what no smear has; the worst of it is told."""
    found: list[tuple[float, float, float, str]] = []

    def judge(value: float | None, limit: float, what: str, *, least: bool = False) -> None:
        if value is not None and (value < limit if least else value > limit):
            excess = limit / max(value, 1e-6) if least else value / limit
            found.append((excess, value, limit, what))

    judge(
        measures.certainty,
        CERTAINTY_LIMIT,
        "the network is sure of too little of what it took for cells (its share",
        least=True,
    )
    judge(measures.flatness, FLATNESS_LIMIT, "the background is too uneven (its spread")
    judge(
        measures.background_colours,
        BACKGROUND_COLOURS_LIMIT,
        "the background has too many colours (their spread",
    )
    judge(
        measures.cell_colours,
        CELL_COLOURS_LIMIT,
        "what was taken for cells has too many colours (their spread",
    )
    judge(
        measures.cell_light,
        CELL_LIGHT_LIMIT,
        "what was taken for cells differs too much in brightness (its spread",
    )
    judge(
        measures.solidity,
        SOLIDITY_LIMIT,
        "what was taken for cells is too jagged (its solidity",
        least=True,
    )
    judge(
        measures.sameness,
        SAMENESS_LIMIT,
        "it is drawn, not photographed (the share of pixels like their neighbours",
    )
    if found:
        _, value, limit, what = max(found)
        yield Flag(
            "not_a_smear",
            value,
            limit,
            f"This does not look like a blood smear: {what} is {value:.2f}, the limit "
            f"{limit:.2f}). Do not use its numbers unless you see cells in the composite.",
        )


def mean_solidity(
    solidity: npt.NDArray[np.float64], area: npt.NDArray[np.float64], counts: Bools
) -> float | None:
    """Average the cells' solidity over their area.

    Args:
        solidity: float64 (n,), of each cell.
        area: float64 (n,), of each cell.
        counts: bool (n,), False for platelets and for cells that the border cuts.

    Returns:
        None where no cell counts.
    """
    if not counts.any():
        return None
    return float(np.average(solidity[counts], weights=area[counts]))
