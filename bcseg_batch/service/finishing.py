"""From the network's answer to files on disk, and the outcome that says so."""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from typing import IO, Any, Protocol

import cv2
import numpy as np
import numpy.typing as npt

from bcseg_batch.errors import PredictionError, UnsupportedImageError
from bcseg_batch.items import InputFile, Outcome, Status
from bcseg_batch.segment.cells import CellKind, Cells, Parted, enlarge_cells, part_cells
from bcseg_batch.segment.measure import COLUMNS, UM_COLUMNS, measure_cells
from bcseg_batch.segment.placement import Placement, Segmented
from bcseg_batch.segment.postprocess import (
    Blend,
    composite_image,
    mask_from_probability,
    mean_confidence,
    probability,
)
from bcseg_batch.segment.quality import (
    TrainingStatistics,
    assess,
    mean_solidity,
    measure_light,
    measure_quality,
)
from bcseg_batch.segment.tiling import MIN_DIAMETER_PX, Band, Raster, typical_diameter_px
from bcseg_batch.store.cell_table import encode_cells
from bcseg_batch.store.encode import encode_jpeg, encode_labels, encode_png
from bcseg_batch.store.names import cells_path, composite_path, labels_path, mask_path
from bcseg_batch.store.outputs import OutputFolder
from bcseg_batch.store.raster import TiffRaster
from bcseg_batch.store.stream import LabelTiffWriter, MaskPngWriter, RgbTiffWriter, RowWriter
from bcseg_batch.version import __version__

CELL_COLUMNS = (*COLUMNS, *UM_COLUMNS)
"""Columns of `cells.csv` after `image`; those in micrometres are empty without a pixel size."""


# From here on an image is held in memory in part only: some 20 bytes a pixel would be too much.
_LARGE_PIXELS = 64_000_000


@dataclass(frozen=True, slots=True, kw_only=True)
class FinishOptions:
    """Everything that decides what the outputs look like.

    Attributes:
        threshold: a pixel is foreground where its probability is above it.
        class_names: one name for each channel of the logits.
        composite_format: `jpg` or `png`.
        composite_quality: of the JPEG, 1..100.
        colour: RGB laid over the cells.
        alpha: its opacity in [0, 1].
        cells: part, count and measure the cells.
        labels: write a label image too.
        tiling: take images in tiles whose cells would be too small in one piece.
        statistics: of the training images, to tell what is unlike them; None judges nothing by it.
        model_sha256: for the record.
        settings_sha256: for the record.
        large_pixels: images of more pixels are taken in tiles and written in bands, whatever their
            cells.
    """

    threshold: float
    class_names: tuple[str, ...]
    composite_format: str
    composite_quality: int
    colour: tuple[int, int, int]
    alpha: float
    cells: bool
    labels: bool
    tiling: bool
    statistics: TrainingStatistics | None
    model_sha256: str
    settings_sha256: str
    large_pixels: int = _LARGE_PIXELS


class Source(Protocol):
    """Which bytes an image was made of; `DecodedImage` and `TiffRaster` say so."""

    @property
    def sha256(self) -> str:
        """Of the file's bytes, hexadecimal."""
        ...

    @property
    def size_bytes(self) -> int:
        """The file's size."""
        ...

    @property
    def mtime_ns(self) -> int:
        """The file's modification time."""
        ...

    @property
    def notes(self) -> tuple[str, ...]:
        """What was done to the pixels on reading."""
        ...


@dataclass(frozen=True, slots=True)
class Prepared:
    """An image on its way: readable, and as the network wants it.

    Attributes:
        file: the input.
        name: its output name.
        started_s: when reading it began, on the monotonic clock.
        source: which bytes it is made of.
        raster: its pixels, in memory or read by windows.
        pixel_size_um: side of a pixel, where it is known.
        thumbnail: uint8 (S, S, 3), stretched to the network's input; None where a device is to do
            that.
    """

    file: InputFile
    name: str
    started_s: float
    source: Source
    raster: Raster
    pixel_size_um: float | None
    thumbnail: npt.NDArray[np.uint8] | None


@dataclass(frozen=True, slots=True)
class Undersized:
    """The first pass says that the stretched image may not be right: tiles have to be tried.

    Attributes:
        item: the image.
        segmented: by the first pass.
        parted: its cells.
        diameter_px: of its typical cell at the network's size; None where that cannot be told.
    """

    item: Prepared
    segmented: Segmented
    parted: Parted
    diameter_px: float | None


@dataclass(frozen=True, slots=True)
class _Found:
    """What was found in an image.

    Attributes:
        kinds: uint8 (n,), `CellKind` of each cell.
        touches_border: bool (n,).
        table: measurements, in the order of the labels.
    """

    kinds: npt.NDArray[np.uint8]
    touches_border: npt.NDArray[np.bool_]
    table: Mapping[str, npt.NDArray[np.generic]]

    @property
    def is_cell(self) -> npt.NDArray[np.bool_]:
        """Tell red and white cells from platelets: bool (n,)."""
        is_cell: npt.NDArray[np.bool_] = self.kinds != CellKind.PLATELET
        return is_cell

    @property
    def mean_solidity(self) -> float | None:
        """Of the cells that no border cuts; None without such."""
        solidity, area = (np.asarray(self.table[n], np.float64) for n in ("solidity", "area"))
        return mean_solidity(solidity, area, self.is_cell & ~self.touches_border)


class Finisher:
    """Makes the outputs of one image after the other and writes them; safe to call from workers.

    Args:
        outputs: where they go.
        options: what they look like.
        placement: where the network ran, for the record.
    """

    def __init__(self, outputs: OutputFolder, options: FinishOptions, placement: Placement) -> None:
        self._outputs = outputs
        self._options = options
        self._placement = placement
        self._blend = Blend.of(options.colour, options.alpha)

    def is_large(self, item: Prepared) -> bool:
        """Say whether no array of the image's own size may be made of it."""
        return math.prod(item.raster.shape_hw) > self._options.large_pixels

    def segmented(
        self,
        item: Prepared,
        thumbnail: npt.NDArray[np.uint8],
        logits: npt.NDArray[np.float32],
    ) -> Segmented:
        """Bring a network's answer into the form in which a device gives it.

        Args:
            item: the image.
            thumbnail: uint8 (S, S, 3), what it was given.
            logits: float32 (C, S, S), channel 0 is "cell".
        """
        if not np.isfinite(logits).all():
            return Segmented(thumbnail, np.full_like(logits, np.nan))
        needs_all = self._options.cells or self._options.tiling or self.is_large(item)
        return Segmented(thumbnail, probability(logits if needs_all else logits[:1]))

    def finish(self, item: Prepared, segmented: Segmented) -> Outcome | Undersized:
        """Make and write the outputs of one image, unless it should be taken in tiles.

        Args:
            item: the image.
            segmented: what the network says of it.

        Raises:
            OutputError: nothing can be written.
            ImageError: this image's outputs cannot be made.
        """
        if not np.isfinite(segmented.soft).all():
            raise PredictionError(
                f"{item.file.image!r}: the network gave values that are not numbers: "
                "run it in float32"
            )
        parted = None
        if self._options.tiling or self.is_large(item):
            parted = self._parted(segmented.soft)
            diameter_px = typical_diameter_px(parted)
            if self.is_large(item) or diameter_px is None or diameter_px < MIN_DIAMETER_PX:
                return Undersized(item, segmented, parted, diameter_px)
        return self.finish_whole(item, segmented, parted)

    def finish_whole(
        self, item: Prepared, segmented: Segmented, parted: Parted | None = None
    ) -> Outcome:
        """Make and write the outputs of an image that was stretched in one piece.

        Args:
            item: the image, not a large one.
            segmented: what the network says of it.
            parted: its cells at the network's size, if they are at hand.

        Raises:
            OutputError: nothing can be written.
            ImageError: this image's outputs cannot be made.
        """
        options = self._options
        shape_hw = item.raster.shape_hw
        pixels = item.raster.read(0, shape_hw[0], 0, shape_hw[1])
        soft, mask = segmented.soft, segmented.mask
        if mask is None or mask.shape != shape_hw:
            mask = mask_from_probability(soft[0], shape_hw, options.threshold)
        labels = found = None
        if options.cells:
            cells = enlarge_cells(parted or self._parted(soft), mask > 0)
            labels = cells.labels
            table = measure_cells(cells, pixels, pixel_size_um=item.pixel_size_um)
            found = _Found(cells.kinds, cells.touches_border, table)
        composite = composite_image(pixels, mask, self._blend)
        self._write_arrays(item, mask, composite, labels)
        foreground = cv2.countNonZero(mask) / mask.size
        outcome = replace(
            self._done(item, found, foreground, segmented.thumbnail, soft),
            mean_confidence=round(mean_confidence(soft[0]), 6),
        )
        return self._with_table(item, outcome, found)

    def _parted(self, soft: npt.NDArray[np.float32]) -> Parted:
        return part_cells(soft, self._options.class_names, threshold=self._options.threshold)

    def finish_bands(
        self,
        item: Prepared,
        thumbnail: npt.NDArray[np.uint8],
        bands: Iterator[Band],
        scale: float,
    ) -> Outcome:
        """Make and write the outputs of an image that is taken in tiles.

        Args:
            item: the image.
            thumbnail: uint8 (S, S, 3), the image stretched to the network's input.
            bands: of the image, from top to bottom; the network runs as they are drawn.
            scale: of the tiles.

        Raises:
            OutputError: nothing can be written.
            ImageError: this image's outputs cannot be made.
        """
        options = self._options
        sums = _Sums()
        if self.is_large(item):
            self._stream(item, sums.over(bands))
        else:
            parts = list(sums.over(bands))
            pixels, mask, labels = (
                np.concatenate([getattr(band, name) for band in parts])
                for name in ("pixels", "mask", "labels")
            )
            composite = composite_image(pixels, mask, self._blend)
            self._write_arrays(item, mask, composite, labels)
        found = sums.found if options.cells else None
        foreground = sums.foreground_px / math.prod(item.raster.shape_hw)
        outcome = replace(
            self._done(item, found, foreground, thumbnail),
            mean_confidence=round(sums.confidence, 6),
            tile_scale=scale,
        )
        return self._with_table(item, outcome, found)

    def _write_arrays(
        self,
        item: Prepared,
        mask: npt.NDArray[np.uint8],
        composite: npt.NDArray[np.uint8],
        labels: npt.NDArray[np.int32] | None,
    ) -> None:
        # The longest name first: where it is refused, no mask is left without a record.
        suffix = self._options.composite_format
        self._outputs.write(composite_path(item.name, suffix), self._encoded(item, composite))
        if labels is not None and self._options.labels:
            data = encode_labels(labels, pixel_size_um=item.pixel_size_um)
            self._outputs.write(labels_path(item.name), data)
        self._outputs.write(mask_path(item.name), encode_png(mask))

    def _stream(self, item: Prepared, bands: Iterator[Band]) -> None:
        """Write the pictures of a large image band by band."""
        shape_hw = item.raster.shape_hw
        with contextlib.ExitStack() as files:

            def begin(path: str) -> IO[bytes]:
                return files.enter_context(self._outputs.open(path))

            picture = begin(composite_path(item.name, "tif"))
            writers: list[tuple[RowWriter, Callable[[Band], npt.NDArray[Any]]]] = [
                (
                    RgbTiffWriter(
                        picture,
                        shape_hw,
                        quality=self._options.composite_quality,
                        pixel_size_um=item.pixel_size_um,
                    ),
                    lambda band: composite_image(band.pixels, band.mask, self._blend),
                ),
                (MaskPngWriter(begin(mask_path(item.name)), shape_hw), lambda band: band.mask),
            ]
            if self._options.cells and self._options.labels:
                # How many cells there are is known at the end only: 32 bit hold any number.
                labels = LabelTiffWriter(
                    begin(labels_path(item.name)),
                    shape_hw,
                    dtype=np.uint32,
                    pixel_size_um=item.pixel_size_um,
                )
                writers.append((labels, lambda band: band.labels))
            for writer, _ in writers:
                files.enter_context(writer)
            for band in bands:
                for writer, rows_of in writers:
                    writer.write(rows_of(band))
            if isinstance(item.raster, TiffRaster):
                item.raster.check_unchanged()  # before anything has its name

    def _done(
        self,
        item: Prepared,
        found: _Found | None,
        foreground: float,
        thumbnail: npt.NDArray[np.uint8],
        soft: npt.NDArray[np.float32] | None = None,
    ) -> Outcome:
        """Begin the outcome of an image whose pictures are written.

        Args:
            item: the image.
            found: its cells, where they are asked for.
            foreground: share of the mask's pixels that are 255.
            thumbnail: uint8 (S, S, 3), the image stretched to the network's input.
            soft: float32 (C, S, S) in [0, 1], where it was stretched in one piece.
        """
        options = self._options
        counted: dict[str, Any] = {}
        if found is not None:
            counted = count_cells(found)
            measures = measure_light(thumbnail, foreground)
            if soft is not None:
                diameter_px = counted["cell_diameter_px"]
                if diameter_px is not None:
                    diameter_px *= math.sqrt(soft[0].size / math.prod(item.raster.shape_hw))
                measures = measure_quality(
                    thumbnail,
                    soft[0],
                    diameter_px,
                    solidity=found.mean_solidity,
                    threshold=options.threshold,
                )
            counted["flags"] = assess(measures, counted["cell_count"], options.statistics)
            counted["cells"] = cells_path(item.name)
            if options.labels:
                counted["labels"] = labels_path(item.name)
        suffix = "tif" if self.is_large(item) else options.composite_format
        return replace(
            self.outcome(item.file, Status.DONE),
            notes=item.source.notes,
            width_px=item.raster.shape_hw[1],
            height_px=item.raster.shape_hw[0],
            foreground_fraction=round(foreground, 6),
            pixel_size_um=item.pixel_size_um,
            sha256=item.source.sha256,
            size_bytes=item.source.size_bytes,
            mtime_ns=item.source.mtime_ns,
            mask=mask_path(item.name),
            composite=composite_path(item.name, suffix),
            **counted,
        )

    def _with_table(self, item: Prepared, outcome: Outcome, found: _Found | None) -> Outcome:
        """Write the table of cells, the last file of an image, and note the time."""
        if found is not None and outcome.cells is not None:
            data = encode_cells(item.file.image, CELL_COLUMNS, found.table)
            self._outputs.write(outcome.cells, data)
        return replace(outcome, seconds=round(time.monotonic() - item.started_s, 3))

    def _encoded(self, item: Prepared, composite: npt.NDArray[np.uint8]) -> bytes:
        if self._options.composite_format == "png":
            return encode_png(composite)
        try:
            return encode_jpeg(composite, quality=self._options.composite_quality)
        except UnsupportedImageError as error:
            raise UnsupportedImageError(f"{item.file.image!r}: {error}") from error

    def outcome(self, file: InputFile, status: Status) -> Outcome:
        """Begin the outcome of an image with what every record says."""
        return Outcome(
            image=file.image,
            status=status,
            size_bytes=file.size_bytes,
            mtime_ns=file.mtime_ns,
            model_sha256=self._options.model_sha256,
            settings_sha256=self._options.settings_sha256,
            version=__version__,
            device=self._placement.device,
            dtype=self._placement.dtype,
            finished_at=datetime.now(UTC).isoformat(timespec="milliseconds"),
        )


@dataclass(slots=True)
class _Sums:
    """Adds up what bands say, as they pass.

    Attributes:
        foreground_px: pixels of the mask that are 255.
    """

    foreground_px: int = 0
    _confidence_sum: float = 0.0
    _confidence_px: int = 0
    _parts: list[tuple[npt.NDArray[np.int32], _Found]] = field(default_factory=list)

    def over(self, bands: Iterator[Band]) -> Iterator[Band]:
        """Give the bands on."""
        for band in bands:
            self.foreground_px += band.foreground_px
            self._confidence_sum += band.confidence_sum
            self._confidence_px += band.confidence_px
            if band.table is not None and band.numbers.size:
                found = _Found(band.kinds, band.touches_border, band.table)
                self._parts.append((band.numbers, found))
            yield band

    @property
    def confidence(self) -> float:
        """Mean of max(p, 1 - p)."""
        return self._confidence_sum / max(self._confidence_px, 1)

    @property
    def found(self) -> _Found:
        """All cells, in the order of their labels."""
        if not self._parts:
            empty = np.zeros((1, 1), np.int32)
            none = Cells(empty, np.zeros(0, np.uint8), np.zeros(0, bool))
            table = measure_cells(none, np.zeros((1, 1, 3), np.uint8))
            return _Found(none.kinds, none.touches_border, table)
        order = np.argsort(np.concatenate([numbers for numbers, _ in self._parts]))
        parts = [found for _, found in self._parts]
        return _Found(
            np.concatenate([part.kinds for part in parts])[order],
            np.concatenate([part.touches_border for part in parts])[order],
            {
                name: np.concatenate([part.table[name] for part in parts])[order]
                for name in parts[0].table
            },
        )


def count_cells(found: _Found) -> dict[str, Any]:
    """Give the fields of a record that count cells."""
    is_cell = found.is_cell
    diameters = np.asarray(found.table["equivalent_diameter_area"], np.float64)[is_cell]
    return {
        "cell_count": int(is_cell.sum()),
        "red_cell_count": int((found.kinds == CellKind.RED_CELL).sum()),
        "white_cell_count": int((found.kinds == CellKind.WHITE_CELL).sum()),
        "platelet_count": int((~is_cell).sum()),
        "border_cell_count": int((found.touches_border & is_cell).sum()),
        "cell_diameter_px": round(float(np.median(diameters)), 2) if diameters.size else None,
    }
