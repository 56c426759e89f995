"""Exports an output folder: reads its records, labels and tables, and writes what others open."""

from __future__ import annotations

import fnmatch
import itertools
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path

from bcseg_batch.errors import BcsegError, OutputError
from bcseg_batch.exchange import coco, imagej, label_images, qupath
from bcseg_batch.exchange.cells import ImageCells
from bcseg_batch.items import Outcome, Status
from bcseg_batch.store.encode import encode_labels
from bcseg_batch.store.names import name_of_mask
from bcseg_batch.store.outputs import whole_file, write_whole
from bcseg_batch.store.provenance import Provenance
from bcseg_batch.store.read_back import read_cells, read_labels, read_outcomes
from bcseg_batch.store.tags import Tags

EXPORTS_FOLDER = "exports"


class ExportFormat(StrEnum):
    """What cells are exported to."""

    QUPATH = "qupath"
    IMAGEJ = "imagej"
    COCO = "coco"
    LABELS = "labels"


@dataclass(frozen=True, slots=True)
class ExportSummary:
    """What an export came to.

    Attributes:
        folder: where it went.
        exported: number of images.
        problems: the name of each image that could not be exported, and why.
    """

    folder: Path
    exported: int
    problems: tuple[tuple[str, str], ...]


class _Export:
    """Goes through the images and keeps count; what one of them lacks costs no other."""

    def __init__(self, output: Path) -> None:
        self._output = output
        self.exported = 0
        self.problems: list[tuple[str, str]] = []

    def sound(self, outcomes: Iterable[Outcome]) -> Iterator[tuple[str, ImageCells]]:
        """Give the output name and the cells of each image that has them."""
        for outcome in outcomes:
            try:
                yield name_of_mask(outcome.mask or ""), _cells_of(self._output, outcome)
            except Exception as error:  # noqa: BLE001 - whatever one has, the others are exported
                self.problems.append((outcome.image, _words(error)))

    def each(self, cells: ImageCells, write: Iterable[tuple[Path, bytes]]) -> None:
        """Write the files of one image as they are made."""
        try:
            for path, data in write:
                write_whole(path, data)
        except OutputError:
            raise
        except Exception as error:  # noqa: BLE001 - whatever one has, the others are exported
            self.problems.append((cells.image, _words(error)))
        else:
            self.exported += 1


def _words(error: Exception) -> str:
    expected = isinstance(error, BcsegError | ValueError)
    return str(error) if expected else f"{type(error).__name__}: {error}"


def export_folder(
    output: Path,
    to: ExportFormat,
    *,
    folder: Path | None = None,
    pattern: str | None = None,
    editable: bool = False,
) -> ExportSummary:
    """Export the cells of the images of an output folder.

    Every file has its name only when it is whole. Sub-folders are those of the output folder; an
    image's file bears its output name: `<name>.geojson`, `<name>.zip`, `<name>_labels.tif` with
    `<name>_objects.csv`. COCO is one file for all, written image by image.

    Args:
        output: as process-dir or the daemon wrote it, with label images and tables of cells.
        to: what to.
        folder: where to write; `exports/<format>` in the output folder unless given.
        pattern: of the images' names, such as `night/*.jpg`; all without it.
        editable: for QuPath, objects that can be corrected by hand.

    Raises:
        OutputError: the records cannot be read, or nothing can be written.
    """
    target = folder or output / EXPORTS_FOLDER / to.value
    outcomes = [
        outcome
        for name, outcome in read_outcomes(output).outcomes.items()
        if pattern is None or fnmatch.fnmatchcase(name, pattern)
    ]
    export = _Export(output)
    images = export.sound(outcomes)
    if to is ExportFormat.COCO:
        _write_coco(target / coco.FILE_NAME, images, export)
    else:
        for name, cells in images:
            export.each(cells, _files(target / name, cells, to, editable=editable))
    return ExportSummary(target, export.exported, tuple(export.problems))


def _files(
    base: Path, cells: ImageCells, to: ExportFormat, *, editable: bool
) -> Iterator[tuple[Path, bytes]]:
    """Give the path and content of each file of one image."""

    def named(ending: str) -> Path:
        return base.with_name(base.name + ending)

    if to is ExportFormat.QUPATH:
        yield named(qupath.SUFFIX), qupath.encode_geojson(cells, editable=editable)
    elif to is ExportFormat.IMAGEJ:
        yield named(imagej.SUFFIX), imagej.encode_rois(cells)
    else:
        yield named(label_images.OBJECTS_ENDING), label_images.encode_objects(cells)
        data = encode_labels(cells.labels, Tags(cells.pixel_size_um, cells.provenance))
        yield named(label_images.LABELS_ENDING), data


def _write_coco(path: Path, images: Iterator[tuple[str, ImageCells]], export: _Export) -> None:
    first = next(images, None)
    if first is None:
        return
    with whole_file(path) as file:
        writer = coco.CocoWriter(file)
        for _, cells in itertools.chain([first], images):
            try:
                writer.add(cells)
            except ValueError as error:
                export.problems.append((cells.image, _words(error)))
            else:
                export.exported += 1
        writer.finish()


def _cells_of(output: Path, outcome: Outcome) -> ImageCells:
    """Read what a run has left of an image's cells.

    Raises:
        OutputError: something cannot be read.
        ValueError: it has no cells to export, or they do not fit together.
    """
    if outcome.status is not Status.DONE:
        raise ValueError(f"it is not done: {outcome.error}")
    if outcome.labels is None or outcome.cells is None:
        raise ValueError("it has no label image: run process-dir again with --labels")
    labels = read_labels(output / outcome.labels)
    if labels.shape != (outcome.height_px, outcome.width_px):
        raise ValueError(
            f"its label image is {labels.shape[1]}x{labels.shape[0]} and its record says "
            f"{outcome.width_px}x{outcome.height_px}: run process-dir again with --overwrite"
        )
    rows = read_cells(output / outcome.cells)
    origin = Provenance(
        outcome.image,
        outcome.sha256 or "",
        outcome.model_sha256 or "",
        outcome.settings_sha256 or "",
        outcome.version or "",
    )
    return ImageCells(outcome.image, labels, tuple(rows), outcome.pixel_size_um, origin.text())
