"""One image at a time, for a notebook or another program; the public names of the package."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from os import PathLike
from pathlib import Path

import numpy as np
import numpy.typing as npt

from bcseg_batch.errors import UsageError
from bcseg_batch.items import Flag
from bcseg_batch.segment.analysis import (
    AnalysisOptions,
    BandSums,
    Rows,
    Summary,
    analyse,
    check_numbers,
    first_look,
    joined,
)
from bcseg_batch.segment.drawing import outlined
from bcseg_batch.segment.placement import AnyPredictor, Segmented, TakesImages
from bcseg_batch.segment.postprocess import Blend, composite_image, probability
from bcseg_batch.segment.preprocess import resize_rgb, to_network_input
from bcseg_batch.segment.tiling import ArrayRaster, choose_scale, segment_in_tiles
from bcseg_batch.service.backend import Network, open_network
from bcseg_batch.service.build import SHIPPED_MODEL
from bcseg_batch.store.images import decode_image
from bcseg_batch.store.pixel_size import pixel_size_um as pixel_size_of

_MAX_PIXELS = 500_000_000


@dataclass(frozen=True, slots=True, eq=False)
class Segmentation:
    """What was found in one image.

    Attributes:
        image: name of the file, or `array`.
        pixels: uint8 (H, W, 3) RGB, 0..255, upright: the image as it was read.
        mask: uint8 (H, W), 255 where a cell is and 0 elsewhere.
        probability: float32 (H, W) in [0, 1], of each pixel to be a cell's.
        labels: int32 (H, W), 0 background, else the number of the cell, from 1.
        table: measurements of the cells, columns of n values in the order of the labels, named as
            in `cells.csv`; `pandas.DataFrame(table)` takes it. Lengths are in pixels.
        foreground: share of the mask's pixels that are 255, in [0, 1].
        confidence: mean of max(p, 1 - p), in [0.5, 1].
        flags: doubts about the result, each with a sentence; none where all is well.
        notes: what was done to the pixels on reading.
        tile_scale: network pixels per pixel of the image where it was taken in tiles; None where it
            was stretched to the network's input in one piece.
    """

    image: str
    pixels: npt.NDArray[np.uint8]
    mask: npt.NDArray[np.uint8]
    probability: npt.NDArray[np.float32]
    labels: npt.NDArray[np.int32]
    table: Mapping[str, npt.NDArray[np.generic]]
    foreground: float
    confidence: float
    flags: tuple[Flag, ...]
    notes: tuple[str, ...]
    tile_scale: float | None

    def composite(
        self, colour: tuple[int, int, int] = (160, 0, 20), alpha: float = 0.3
    ) -> npt.NDArray[np.uint8]:
        """Lay a colour over the cells: uint8 (H, W, 3) RGB.

        Args:
            colour: RGB, 0..255 each.
            alpha: its opacity in [0, 1].
        """
        return composite_image(self.pixels, self.mask, Blend.of(colour, alpha))

    def outlined(self, colour: tuple[int, int, int] = (255, 220, 0)) -> npt.NDArray[np.uint8]:
        """Draw a line around each cell: uint8 (H, W, 3) RGB.

        Args:
            colour: RGB of the lines, 0..255 each.
        """
        return outlined(self.pixels, self.labels, colour)


class Model:
    """A network that is ready to segment; made by `load_model`. One caller at a time."""

    def __init__(self, network: Network, threshold: float | None) -> None:
        self._predictor: AnyPredictor = network.predictors[0]
        self._size_px = network.spec.input_size_px
        self._options = AnalysisOptions(
            threshold=network.spec.threshold if threshold is None else threshold,
            class_names=network.spec.class_names,
            cells=True,
            tiling=True,
            probability=True,
            statistics=network.spec.training_statistics,
        )
        self._description = f"{network.backend}, on {self._predictor.placement.reason}"
        self.sha256 = network.sha256

    def __repr__(self) -> str:
        return f"<Model {self.sha256[:12]} by {self._description}>"

    def segment(
        self,
        image: str | PathLike[str] | npt.NDArray[np.uint8],
        *,
        pixel_size_um: float | None = None,
        page: int = 0,
    ) -> Segmentation:
        """Segment one image, as `process-dir` does.

        Args:
            image: path of a file of any format that `process-dir` reads, or uint8 (H, W, 3) RGB,
                0..255.
            pixel_size_um: side of a pixel, for measurements in micrometres; None takes what the
                file says of itself.
            page: of a file with several images, counted from 0.

        Raises:
            ImageError: the file cannot be read, or is no image.
            UsageError: the array is none of that shape and type.
            DeviceError: the device is lost, or has no memory for it.
        """
        notes: tuple[str, ...] = ()
        if isinstance(image, np.ndarray):
            name, pixels = "array", _checked(image)
        else:
            path = Path(image)
            decoded = decode_image(path, max_pixels=_MAX_PIXELS, page=page)
            name, pixels, notes = path.name, decoded.pixels, decoded.notes
            pixel_size_um = pixel_size_um or pixel_size_of(path)
        rows, summary = self._analysed(name, pixels, pixel_size_um)
        assert rows.labels is not None, "cells are asked for"
        assert rows.probability is not None, "it is asked for"
        assert summary.found is not None, "cells are asked for"
        return Segmentation(
            name,
            pixels,
            rows.mask,
            rows.probability,
            rows.labels,
            summary.found.table,
            summary.foreground,
            summary.confidence,
            summary.flags,
            notes,
            summary.tile_scale,
        )

    def _analysed(
        self, name: str, pixels: npt.NDArray[np.uint8], pixel_size_um: float | None
    ) -> tuple[Rows, Summary]:
        options = self._options
        segmented = self._segmented(pixels)
        check_numbers(segmented, name)
        look = first_look(segmented, options)
        if look.is_too_coarse:
            raster = ArrayRaster(pixels)
            scale = choose_scale(
                raster,
                look.diameter_px,
                self._predictor.predict,
                options.class_names,
                threshold=options.threshold,
                input_size_px=self._size_px,
                thumbnail=segmented.thumbnail,
            )
            if scale is not None:
                sums = BandSums()
                bands = segment_in_tiles(
                    raster,
                    scale,
                    self._predictor.predict,
                    options.class_names,
                    threshold=options.threshold,
                    input_size_px=self._size_px,
                    pixel_size_um=pixel_size_um,
                    probability=True,
                )
                rows = joined(list(sums.over(bands)))
                return rows, sums.summary(segmented.thumbnail, options, scale)
        return analyse(pixels, segmented, options, parted=look.parted, pixel_size_um=pixel_size_um)

    def _segmented(self, pixels: npt.NDArray[np.uint8]) -> Segmented:
        if isinstance(self._predictor, TakesImages):
            return self._predictor.segment([pixels], self._options.threshold)[0]
        thumbnail = resize_rgb(pixels, self._size_px)
        logits = self._predictor.predict(to_network_input(thumbnail)[np.newaxis])[0]
        # What is infinite would make a fine probability, and is none.
        soft = np.where(np.isfinite(logits), probability(logits), np.float32(np.nan))
        return Segmented(thumbnail, soft)


def load_model(
    file: str | PathLike[str] | None = None,
    *,
    device: str = "auto",
    backend: str = "auto",
    dtype: str = "auto",
    threshold: float | None = None,
) -> Model:
    """Load a model and place it where it runs best, or where it is told to.

    Args:
        file: the model file; None takes the one that comes with the package.
        device: `auto`, `cpu`, `cuda`, `cuda:N` or `mps`.
        backend: `auto`, `torch` or `openvino`.
        dtype: `auto`, `float32`, `bfloat16`, `float16` or `int8`.
        threshold: a pixel is a cell's where its probability is above it; None takes the model's.

    Raises:
        CheckpointError: the file is missing, or is no model.
        SettingsError: the choices do not go together, or something is not there.
        DeviceError: the device refuses the network.
    """
    if threshold is not None and not 0 <= threshold <= 1:
        raise UsageError(f"a threshold is a probability from 0 to 1, not {threshold}")
    path = SHIPPED_MODEL if file is None else Path(file)
    devices: Sequence[str] = (device,)
    return Model(open_network(path, backend=backend, devices=devices, dtype=dtype), threshold)


def _checked(array: npt.NDArray[np.uint8]) -> npt.NDArray[np.uint8]:
    if array.dtype != np.uint8 or array.ndim != 3 or array.shape[2] != 3 or not array.size:
        raise UsageError(
            f"an image is uint8 (height, width, 3), not {array.dtype} {array.shape}: convert it, "
            "or give the path of its file, which is read as process-dir reads it"
        )
    return np.ascontiguousarray(array)
