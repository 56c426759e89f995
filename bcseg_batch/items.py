"""The frozen values that travel from room to room."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path


@dataclass(frozen=True, slots=True)
class InputFile:
    """One input as it was when it was seen.

    Attributes:
        path: where it lies.
        image: its name: the path relative to the input folder, with forward slashes.
        size_bytes: size at that moment.
        mtime_ns: modification time at that moment, nanoseconds since the epoch.
    """

    path: Path
    image: str
    size_bytes: int
    mtime_ns: int


OUTPUT_FIELDS = (
    "mask",
    "composite",
    "labels",
    "cells",
    "outlines",
    "probability",
    "preview",
)
"""Fields of an `Outcome` that name a file of the image."""


class Status(StrEnum):
    """How one input ended."""

    DONE = "done"
    FAILED = "failed"
    SKIPPED = "skipped"


@dataclass(frozen=True, slots=True)
class Flag:
    """A doubt about one image, for the reader; the image is processed all the same.

    Attributes:
        name: what it is about, such as `out_of_focus`.
        value: what was measured.
        limit: from where it is a doubt.
        sentence: cause, number and what to do.
    """

    name: str
    value: float
    limit: float
    sentence: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """What happened to one input: the record's content.

    Attributes:
        image: the input's name, relative to the input folder, with forward slashes.
        status: done, failed, or skipped (vanished or rewritten while being read).
        error: `Class: sentence` where it is not done.
        notes: what was done to the pixels on reading (orientation applied, first of 3 pages, ...).
        width_px: width after the orientation tag is applied.
        height_px: height likewise.
        foreground_fraction: share of mask pixels that are 255, in [0, 1].
        mean_confidence: mean over the network's pixels of max(p, 1 - p), in [0.5, 1].
        cell_count: red and white cells, those that the border cuts included; None where cells are
            not asked for.
        red_cell_count: of these, the red ones.
        white_cell_count: of these, the white ones.
        platelet_count: platelets, which are no cells.
        border_cell_count: red and white cells that the border cuts.
        cell_diameter_px: median of the red and white cells' equivalent diameters.
        pixel_size_um: side of a pixel, where file or settings tell it.
        tile_scale: network pixels per pixel of the image where it was taken in tiles; None where it
            was stretched whole.
        flags: doubts about the result.
        sha256: of the input's bytes, hexadecimal.
        size_bytes: the input's size when it was processed.
        mtime_ns: the input's modification time when it was processed.
        model_sha256: of the checkpoint file, hexadecimal.
        settings_sha256: of the settings that shape the outputs, hexadecimal.
        version: of the package that made the record.
        device: where the network ran, such as `cpu`.
        dtype: in which precision, such as `bfloat16`.
        mask: path of the mask relative to the output folder, with forward slashes.
        composite: path of the composite likewise.
        labels: path of the label image likewise.
        cells: path of the table of cells likewise.
        outlines: path of the photograph with the outlines drawn likewise.
        probability: path of the probability map likewise.
        preview: path of the photograph as it was, small enough to be looked at, likewise.
        outputs_sha256: of each of these files, hexadecimal, by the field that names it.
        seconds: from the start of reading to the last output written, waiting included.
        finished_at: when, ISO 8601 in UTC.
    """

    image: str
    status: Status
    error: str | None = None
    notes: tuple[str, ...] = ()
    width_px: int | None = None
    height_px: int | None = None
    foreground_fraction: float | None = None
    mean_confidence: float | None = None
    cell_count: int | None = None
    red_cell_count: int | None = None
    white_cell_count: int | None = None
    platelet_count: int | None = None
    border_cell_count: int | None = None
    cell_diameter_px: float | None = None
    pixel_size_um: float | None = None
    tile_scale: float | None = None
    flags: tuple[Flag, ...] = ()
    sha256: str | None = None
    size_bytes: int | None = None
    mtime_ns: int | None = None
    model_sha256: str | None = None
    settings_sha256: str | None = None
    version: str | None = None
    device: str | None = None
    dtype: str | None = None
    mask: str | None = None
    composite: str | None = None
    labels: str | None = None
    cells: str | None = None
    outlines: str | None = None
    probability: str | None = None
    preview: str | None = None
    outputs_sha256: Mapping[str, str] = field(default_factory=dict, hash=False)
    seconds: float | None = None
    finished_at: str | None = None

    @property
    def outputs(self) -> tuple[str, ...]:
        """Paths of the files written for it, relative to the output folder."""
        files = (getattr(self, name) for name in OUTPUT_FIELDS)
        return tuple(file for file in files if file is not None)
