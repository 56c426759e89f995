"""From the network's answer to files on disk, and the outcome that says so."""

from __future__ import annotations

import contextlib
import hashlib
import math
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from bcseg_batch.errors import UnsupportedImageError
from bcseg_batch.items import InputFile, Outcome, Status
from bcseg_batch.segment.analysis import (
    CELL_COLUMNS,
    AnalysisOptions,
    BandSums,
    FirstLook,
    Found,
    Rows,
    Summary,
    analyse,
    check_numbers,
    first_look,
    joined,
)
from bcseg_batch.segment.cells import CellKind, Parted
from bcseg_batch.segment.placement import Placement, Segmented
from bcseg_batch.segment.postprocess import probability
from bcseg_batch.segment.tiling import Band, Raster
from bcseg_batch.service.pictures import PictureOptions, pictures
from bcseg_batch.service.places import Outputs
from bcseg_batch.store.cell_table import encode_cells
from bcseg_batch.store.names import cells_path
from bcseg_batch.store.provenance import Provenance
from bcseg_batch.store.raster import TiffRaster
from bcseg_batch.store.tags import Tags
from bcseg_batch.version import __version__

# From here on an image is held in memory in part only: some 20 bytes a pixel would be too much.
_LARGE_PIXELS = 64_000_000


@dataclass(frozen=True, slots=True, kw_only=True)
class FinishOptions(AnalysisOptions, PictureOptions):
    """Everything that decides what the outputs look like.

    Attributes:
        model_sha256: for the record.
        settings_sha256: for the record.
        large_pixels: images of more pixels are taken in tiles and written in bands, whatever their
            cells.
    """

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
        look: what that found.
    """

    item: Prepared
    segmented: Segmented
    look: FirstLook


class Finisher:
    """Makes the outputs of one image after the other and writes them; safe to call from workers.

    Args:
        outputs: where they go.
        options: what they look like.
        placement: where the network ran, for the record.
    """

    def __init__(self, outputs: Outputs, options: FinishOptions, placement: Placement) -> None:
        self._outputs = outputs
        self._options = options
        self._placement = placement
        self._pictures = {
            is_large: pictures(options, is_large=is_large) for is_large in (False, True)
        }

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
        check_numbers(segmented, item.file.image)
        parted = None
        if self._options.tiling or self.is_large(item):
            look = first_look(segmented, self._options)
            if self.is_large(item) or look.is_too_coarse:
                return Undersized(item, segmented, look)
            parted = look.parted
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
        height, width = item.raster.shape_hw
        rows, summary = analyse(
            item.raster.read(0, height, 0, width),
            segmented,
            self._options,
            parted=parted,
            pixel_size_um=item.pixel_size_um,
        )
        return self._done(item, summary, self._write(item, rows))

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
        sums = BandSums()
        rows = sums.over(bands)
        if self.is_large(item):
            hashes = self._stream(item, rows)
        else:
            hashes = self._write(item, joined(list(rows)))
        return self._done(item, sums.summary(thumbnail, self._options, scale), hashes)

    def _tags(self, item: Prepared) -> Tags:
        origin = Provenance(
            item.file.image,
            item.source.sha256,
            self._options.model_sha256,
            self._options.settings_sha256,
            __version__,
        )
        return Tags(item.pixel_size_um, origin.text())

    def _write(self, item: Prepared, rows: Rows) -> dict[str, str]:
        """Write the pictures of an image in memory; gives their hashes by their fields."""
        tags = self._tags(item)
        hashes = {}
        for picture in self._pictures[False]:
            try:
                data = picture.encode(picture.rows_of(rows), tags)
            except UnsupportedImageError as error:
                raise UnsupportedImageError(f"{item.file.image!r}: {error}") from error
            self._outputs.write(picture.path(item.name), data)
            hashes[picture.field] = hashlib.sha256(data).hexdigest()
        return hashes

    def _stream(self, item: Prepared, bands: Iterator[Rows]) -> dict[str, str]:
        """Write the pictures of a large image band by band; gives their hashes by their fields."""
        tags = self._tags(item)
        chosen = self._pictures[True]
        with contextlib.ExitStack() as files:
            writers = [
                picture.writer(
                    files.enter_context(self._outputs.open(picture.path(item.name))),
                    item.raster.shape_hw,
                    tags,
                )
                for picture in chosen
            ]
            for writer in writers:
                files.enter_context(writer)
            for rows in bands:
                for picture, writer in zip(chosen, writers, strict=True):
                    writer.write(picture.rows_of(rows))
            if isinstance(item.raster, TiffRaster):
                item.raster.check_unchanged()  # before anything has its name
        return {p.field: self._outputs.sha256(p.path(item.name)) for p in chosen}

    def _done(self, item: Prepared, summary: Summary, hashes: dict[str, str]) -> Outcome:
        """Write the table of cells, the last file of an image, and give the outcome."""
        found, cells = summary.found, None
        counts: dict[str, Any] = {}
        if found is not None:
            cells = cells_path(item.name)
            data = encode_cells(item.file.image, CELL_COLUMNS, found.table)
            self._outputs.write(cells, data)
            hashes = hashes | {"cells": hashlib.sha256(data).hexdigest()}
            counts = count_cells(found)
        chosen = self._pictures[self.is_large(item)]
        paths: dict[str, Any] = {picture.field: picture.path(item.name) for picture in chosen}
        return replace(
            self.outcome(item.file, Status.DONE),
            notes=item.source.notes,
            width_px=item.raster.shape_hw[1],
            height_px=item.raster.shape_hw[0],
            foreground_fraction=round(summary.foreground, 6),
            mean_confidence=round(summary.confidence, 6),
            pixel_size_um=item.pixel_size_um,
            tile_scale=summary.tile_scale,
            flags=summary.flags,
            sha256=item.source.sha256,
            size_bytes=item.source.size_bytes,
            mtime_ns=item.source.mtime_ns,
            cells=cells,
            outputs_sha256=hashes,
            seconds=round(time.monotonic() - item.started_s, 3),
            **counts,
            **paths,
        )

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


def count_cells(found: Found) -> dict[str, Any]:
    """Give the fields of a record that count cells."""
    is_cell, diameter_px = found.is_cell, found.diameter_px
    return {
        "cell_count": int(is_cell.sum()),
        "red_cell_count": int((found.kinds == CellKind.RED_CELL).sum()),
        "white_cell_count": int((found.kinds == CellKind.WHITE_CELL).sum()),
        "platelet_count": int((~is_cell).sum()),
        "border_cell_count": int((found.touches_border & is_cell).sum()),
        "cell_diameter_px": None if diameter_px is None else round(diameter_px, 2),
    }
