"""Which pictures are written of an image, each in one place: its path, its pixels, its file."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import IO, Any

import numpy as np
import numpy.typing as npt

from bcseg_batch.segment.analysis import Rows
from bcseg_batch.segment.drawing import outlined
from bcseg_batch.segment.postprocess import Blend, composite_image
from bcseg_batch.store.encode import encode_grey_tiff, encode_jpeg, encode_labels, encode_png
from bcseg_batch.store.names import (
    composite_path,
    labels_path,
    mask_path,
    outlines_path,
    preview_path,
    probability_path,
)
from bcseg_batch.store.stream import (
    LabelTiffWriter,
    MaskPngWriter,
    PreviewWriter,
    ProbabilityTiffWriter,
    RgbTiffWriter,
    RowWriter,
    reduced,
)
from bcseg_batch.store.tags import Tags

Array = npt.NDArray[Any]


@dataclass(frozen=True, kw_only=True)  # no slots, which could not be joined with others
class PictureOptions:
    """Which pictures are written, and what they look like.

    Attributes:
        composite: write the composite.
        composite_format: `jpg` or `png`, of all pictures in colour.
        composite_quality: of a JPEG, 1..100.
        colour: RGB laid over the cells.
        alpha: its opacity in [0, 1].
        labels: write a label image.
        outlines: write the photograph with the outlines of its cells.
        outline_colour: RGB of these.
        probability: write the probability of each pixel.
        previews: write a copy of the photograph that is small enough to look at.
    """

    composite: bool = True
    composite_format: str
    composite_quality: int
    colour: tuple[int, int, int]
    alpha: float
    labels: bool
    outlines: bool = False
    outline_colour: tuple[int, int, int] = (255, 220, 0)
    probability: bool = False
    previews: bool = False


@dataclass(frozen=True, slots=True)
class Picture:
    """One kind of picture.

    Attributes:
        field: of the record, for its path.
        path: gives it for an output name.
        rows_of: gives the rows to be written, of some rows of the image.
        encode: makes the file of an image that lies in memory.
        writer: takes the rows of a large one.
    """

    field: str
    path: Callable[[str], str]
    rows_of: Callable[[Rows], Array]
    encode: Callable[[Array, Tags], bytes]
    writer: Callable[[IO[bytes], tuple[int, int], Tags], RowWriter]


def pictures(options: PictureOptions, *, is_large: bool) -> list[Picture]:
    """List the pictures of an image in the order in which they are written, the mask last.

    The longest name comes early: where it is refused, no mask is left without a record.

    Args:
        options: which, and what they look like.
        is_large: whether they are written row by row, in formats that allow that.
    """
    suffix = "tif" if is_large else options.composite_format
    quality = options.composite_quality

    def in_colour(pixels: Array, tags: Tags) -> bytes:
        if options.composite_format == "png":
            return encode_png(pixels, tags.provenance)
        return encode_jpeg(pixels, quality=quality, provenance=tags.provenance)

    def rows_in_colour(file: IO[bytes], shape_hw: tuple[int, int], tags: Tags) -> RowWriter:
        return RgbTiffWriter(file, shape_hw, quality=quality, tags=tags)

    chosen = []
    if options.composite:
        blend = Blend.of(options.colour, options.alpha)
        chosen.append(
            Picture(
                "composite",
                lambda name: composite_path(name, suffix),
                lambda rows: composite_image(rows.pixels, rows.mask, blend),
                in_colour,
                rows_in_colour,
            )
        )
    if options.outlines:
        colour = options.outline_colour
        chosen.append(
            Picture(
                "outlines",
                lambda name: outlines_path(name, suffix),
                lambda rows: outlined(rows.pixels, _labels(rows), colour, rows.above),
                in_colour,
                rows_in_colour,
            )
        )
    if options.probability:
        chosen.append(
            Picture(
                "probability",
                probability_path,
                _probability,
                encode_grey_tiff,
                ProbabilityTiffWriter,
            )
        )
    if options.previews:
        chosen.append(
            Picture(
                "preview",
                preview_path,
                lambda rows: rows.pixels,
                lambda pixels, tags: encode_jpeg(
                    reduced(pixels), quality=quality, provenance=tags.provenance
                ),
                lambda file, shape_hw, tags: PreviewWriter(
                    file, shape_hw, quality=quality, tags=tags
                ),
            )
        )
    if options.labels:
        chosen.append(
            Picture(
                "labels",
                labels_path,
                _labels,
                encode_labels,
                # How many cells there are is known at the end only: 32 bit hold any number.
                lambda file, shape_hw, tags: LabelTiffWriter(
                    file, shape_hw, dtype=np.uint32, tags=tags
                ),
            )
        )
    chosen.append(
        Picture(
            "mask",
            mask_path,
            lambda rows: rows.mask,
            lambda mask, tags: encode_png(mask, tags.provenance),
            lambda file, shape_hw, tags: MaskPngWriter(file, shape_hw, tags=tags),
        )
    )
    return chosen


def _labels(rows: Rows) -> npt.NDArray[np.int32]:
    assert rows.labels is not None, "labels and outlines need cells"
    return rows.labels


def _probability(rows: Rows) -> npt.NDArray[np.float32]:
    assert rows.probability is not None, "it is asked for"
    return rows.probability
