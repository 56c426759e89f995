"""What a run must know of the records of earlier ones, indexed on disk."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from bcseg_batch.items import OUTPUT_FIELDS, Status
from bcseg_batch.store.scratch import Row, Scratch, as_bytes, as_text


@dataclass(frozen=True, slots=True)
class Known:
    """What must be known of a record to decide whether its image is done.

    Attributes:
        offset_bytes: where the record's line begins in the file.
        status: how it ended.
        sha256: of the input's bytes.
        size_bytes: of the input.
        mtime_ns: of the input.
        model_sha256: of the checkpoint.
        settings_sha256: of the settings that shape the outputs.
        mask: path of the mask relative to the output folder; of an earlier record where this one
            has none, since its name is still the image's.
        cells: path of its table of cells.
        outputs: paths of all files that lie there for the image; those of an earlier record where
            this one is of an image that was skipped.
    """

    offset_bytes: int
    status: Status
    sha256: str | None
    size_bytes: int | None
    mtime_ns: int | None
    model_sha256: str | None
    settings_sha256: str | None
    mask: str | None
    cells: str | None
    outputs: tuple[str, ...]


_COLUMNS = (
    "offset_bytes, status, sha256, size_bytes, mtime_ns, model_sha256, settings_sha256, mask, "
    "cells, outputs"
)
_NO_OUTPUTS = "[]"
# Rows keep the number of their image's first record; the names of odd bytes need BLOBs.
_SCHEMA = f"""
CREATE TABLE known (number INTEGER PRIMARY KEY, image BLOB UNIQUE, {_COLUMNS})
"""
_PUT = f"""
INSERT INTO known (image, {_COLUMNS}) VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)
ON CONFLICT (image) DO UPDATE SET
  offset_bytes = excluded.offset_bytes, status = excluded.status, sha256 = excluded.sha256,
  size_bytes = excluded.size_bytes, mtime_ns = excluded.mtime_ns,
  model_sha256 = excluded.model_sha256, settings_sha256 = excluded.settings_sha256,
  mask = coalesce(excluded.mask, mask), cells = excluded.cells,
  outputs = iif(excluded.status = '{Status.SKIPPED.value}' AND excluded.outputs = '{_NO_OUTPUTS}',
                outputs, excluded.outputs)
"""  # noqa: S608 - constants of this file


class KnownIndex:
    """The last record of each image, one row for each on disk.

    Raises:
        OutputError: by any method, where the disk with the passing files is full.
    """

    def __init__(self) -> None:
        self._rows = Scratch(_SCHEMA)

    def close(self) -> None:
        """Drop it."""
        self._rows.close()

    def __len__(self) -> int:
        counted = self._rows.row("SELECT count(*) FROM known")
        return 0 if counted is None else int(counted[0])

    def put(self, record: dict[str, Any], offset_bytes: int) -> None:
        """Take in an image's latest record.

        Args:
            record: as it stands in the file, checked.
            offset_bytes: where its line begins.
        """
        self._rows.put(_PUT, _row(record, offset_bytes))

    def put_all(self, records: Iterable[tuple[dict[str, Any], int]]) -> None:
        """Take in many, as `put` does, in the order of the file."""
        self._rows.put_all(_PUT, (_row(record, offset) for record, offset in records))

    def get(self, image: str) -> Known | None:
        """Look an image up."""
        row = self._rows.row(f"SELECT {_COLUMNS} FROM known WHERE image = ?", (as_bytes(image),))  # noqa: S608 - a constant
        return None if row is None else _known(row)

    def images(self) -> Iterator[tuple[str, Known]]:
        """Give every image in the order of their first records."""
        for image, *row in self._rows.rows(f"SELECT image, {_COLUMNS} FROM known ORDER BY number"):  # noqa: S608 - a constant
            yield as_text(image), _known(tuple(row))

    def offsets(self) -> Iterator[int]:
        """Give where the last record of each image begins, sorted by image."""
        for (offset_bytes,) in self._rows.rows("SELECT offset_bytes FROM known ORDER BY image"):
            yield offset_bytes

    def masks(self) -> Iterator[tuple[str, str]]:
        """Give the images that have a mask, or had one, with its path; in their records' order."""
        query = "SELECT image, mask FROM known WHERE mask IS NOT NULL ORDER BY number"
        for image, mask in self._rows.rows(query):
            yield as_text(image), as_text(mask)

    def cells(self) -> Iterator[str]:
        """Give the path of each image's table of cells, sorted by image."""
        query = "SELECT cells FROM known WHERE cells IS NOT NULL ORDER BY image"
        for (cells,) in self._rows.rows(query):
            yield as_text(cells)


def _row(record: dict[str, Any], offset_bytes: int) -> Row:
    outputs = [record[name] for name in OUTPUT_FIELDS if record.get(name)]
    return (
        as_bytes(record["image"]),
        offset_bytes,
        record["status"],
        _bytes(record.get("sha256")),
        record.get("size_bytes"),
        record.get("mtime_ns"),
        _bytes(record.get("model_sha256")),
        _bytes(record.get("settings_sha256")),
        _bytes(record.get("mask")),
        _bytes(record.get("cells")),
        json.dumps(outputs) if outputs else _NO_OUTPUTS,
    )


def _known(row: Row) -> Known:
    offset_bytes, status, sha256, size_bytes, mtime_ns, model, settings, mask, cells, outputs = row
    return Known(
        offset_bytes,
        Status(status),
        _text(sha256),
        size_bytes,
        mtime_ns,
        _text(model),
        _text(settings),
        _text(mask),
        _text(cells),
        tuple(json.loads(outputs)),
    )


def _bytes(text: str | None) -> bytes | None:
    return as_bytes(text) if text else None


def _text(data: bytes | None) -> str | None:
    return None if data is None else as_text(data)
