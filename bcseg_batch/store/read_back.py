"""Reads an output folder back, and changes nothing in it."""

from __future__ import annotations

import csv
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import tifffile

from bcseg_batch.errors import OutputError
from bcseg_batch.items import Outcome, Status
from bcseg_batch.store.results import JSONL_NAME, check_record, from_record


@dataclass(frozen=True, slots=True)
class ReadBack:
    """The records of an output folder.

    Attributes:
        outcomes: the last one of each image, by the image's name.
        earlier: paths of the files of earlier records, of the images that are being done again:
            they lie there until a new record takes their place.
        damaged: numbers of the lines, from 1, that are no records. A run that is going on, or was
            killed, may leave the last line torn; its image is done again by the next one.
    """

    outcomes: dict[str, Outcome]
    earlier: dict[str, tuple[str, ...]]
    damaged: tuple[int, ...]


def read_outcomes(folder: Path) -> ReadBack:
    """Read the records of an output folder; a run may go on in it meanwhile.

    Args:
        folder: as process-dir or the daemon write it.

    Returns:
        The last record of each image, sorted by name.

    Raises:
        OutputError: there are no records, or they cannot be read.
    """
    path = folder / JSONL_NAME
    outcomes: dict[str, Outcome] = {}
    earlier: dict[str, tuple[str, ...]] = {}
    damaged: list[int] = []
    try:
        with path.open("rb") as lines:
            for number, line in enumerate(lines, 1):
                try:
                    record = json.loads(line)
                    check_record(record)
                    outcome = from_record(record)
                except (ValueError, TypeError, KeyError, AttributeError):
                    damaged.append(number)
                else:
                    before = outcomes.get(outcome.image)
                    if outcome.status is not Status.SKIPPED:
                        earlier.pop(outcome.image, None)
                    elif before is not None and before.outputs:
                        earlier[outcome.image] = before.outputs
                    outcomes[outcome.image] = outcome
    except OSError as error:
        raise OutputError(
            f"{path} cannot be read ({error.strerror}): name a folder that process-dir or the "
            "daemon has written to"
        ) from error
    return ReadBack(dict(sorted(outcomes.items())), earlier, tuple(damaged))


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
