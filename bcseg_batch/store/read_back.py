"""Reads an output folder back, and changes nothing in it."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import tifffile

from bcseg_batch.errors import OutputError
from bcseg_batch.items import Outcome, Status
from bcseg_batch.store.known import finished_ms
from bcseg_batch.store.results import check_record, from_record
from bcseg_batch.store.shards import JSONL_NAME, record_files


@dataclass(frozen=True, slots=True)
class ReadBack:
    """The records of an output folder.

    Attributes:
        outcomes: the last one of each image, by the image's name.
        earlier: paths of the files of earlier records, of the images that are being done again:
            they lie there until a new record takes their place.
        damaged: file name and number, from 1, of the lines that are no records. A run that is going
            on, or was killed, may leave the last line torn; its image is done again by the next.
    """

    outcomes: dict[str, Outcome]
    earlier: dict[str, tuple[str, ...]]
    damaged: tuple[tuple[str, int], ...]


def read_outcomes(folder: Path) -> ReadBack:
    """Read the records of an output folder, those of shards too; a run may go on meanwhile.

    Args:
        folder: as process-dir or the daemon write it.

    Returns:
        The last record of each image, sorted by name.

    Raises:
        OutputError: there are no records, or they cannot be read.
    """
    read = ReadBack({}, {}, ())
    try:
        # Where there is none, opening that of whole runs fails, and says so.
        for path in record_files(folder) or [folder / JSONL_NAME]:
            with path.open("rb") as lines:
                read = _later(read, _read(path.name, lines))
    except OSError as error:
        raise OutputError(
            f"{error.filename} cannot be read ({error.strerror}): name a folder that process-dir "
            "or the daemon has written to"
        ) from error
    return ReadBack(dict(sorted(read.outcomes.items())), read.earlier, read.damaged)


def _read(name: str, lines: Iterable[bytes]) -> ReadBack:
    """Read one file, in which the last record of an image counts."""
    outcomes: dict[str, Outcome] = {}
    earlier: dict[str, tuple[str, ...]] = {}
    damaged: list[tuple[str, int]] = []
    for number, line in enumerate(lines, 1):
        try:
            record = json.loads(line)
            check_record(record)
            outcome = from_record(record)
        except (ValueError, TypeError, KeyError, AttributeError):
            damaged.append((name, number))
        else:
            before = outcomes.get(outcome.image)
            if outcome.status is not Status.SKIPPED:
                earlier.pop(outcome.image, None)
            elif before is not None and before.outputs:
                earlier[outcome.image] = before.outputs
            outcomes[outcome.image] = outcome
    return ReadBack(outcomes, earlier, tuple(damaged))


def _later(one: ReadBack, other: ReadBack) -> ReadBack:
    """Join what two files say: of two records of an image that which was finished last counts."""
    outcomes, earlier = one.outcomes, one.earlier
    for image, outcome in other.outcomes.items():
        # What lies there by each record: its own files, or those that it was about to replace.
        there = [(outcome, other.earlier.get(image, outcome.outputs))]
        if (before := outcomes.get(image)) is not None:
            there.append((before, earlier.pop(image, before.outputs)))
        there.sort(key=lambda pair: finished_ms(pair[0].finished_at), reverse=True)
        outcomes[image] = there[0][0]
        kept = next((paths for _, paths in there if paths), ())
        if outcomes[image].status is Status.SKIPPED and kept:
            earlier[image] = kept
    return ReadBack(outcomes, earlier, one.damaged + other.damaged)


def read_cells(path: Path) -> list[dict[str, str]]:
    """Read the table of one image's cells.

    Args:
        path: of `cells/<name>_cells.csv`.

    Returns:
        A row for each cell, by the names of the columns, as text; in the order of the labels.

    Raises:
        OutputError: it cannot be read.
    """
    try:
        with path.open(encoding="utf-8", newline="") as text:
            return list(csv.DictReader(text))
    except (OSError, ValueError, csv.Error) as error:
        raise OutputError(f"{path} cannot be read ({error})") from error


def read_labels(path: Path) -> npt.NDArray[np.integer[Any]]:
    """Read a label image.

    Args:
        path: of `labels/<name>_labels.tif`.

    Returns:
        uint16 or uint32 (H, W), 0 background, else the number of the cell in its image's table.

    Raises:
        OutputError: it cannot be read, or is no label image.
    """
    try:
        labels = tifffile.imread(path)
    except Exception as error:  # decoders answer hostile bytes with any exception there is
        raise OutputError(f"{path} cannot be read ({error})") from error
    if labels.ndim != 2 or labels.dtype.kind not in "iu":
        raise OutputError(f"{path} is no label image: {labels.dtype} {labels.shape}")
    return labels
