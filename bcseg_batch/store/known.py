"""What a run must know of the records of earlier ones, indexed on disk."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, fields
from datetime import datetime
from typing import Any

from bcseg_batch.items import OUTPUT_FIELDS, Status
from bcseg_batch.store.scratch import Row, Scratch, as_bytes, as_text


@dataclass(frozen=True, slots=True)
class Known:
    """What must be known of a record to decide whether its image is done.

    Attributes:
        source: number of the file in which the record stands.
        offset_bytes: where its line begins there.
        finished_ms: when its image was through, milliseconds since the epoch; 0 where no time
            stands there.
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

    source: int
    offset_bytes: int
    finished_ms: int
    status: Status
    sha256: str | None
    size_bytes: int | None
    mtime_ns: int | None
    model_sha256: str | None
    settings_sha256: str | None
    mask: str | None
    cells: str | None
    outputs: tuple[str, ...]


_COLUMNS = tuple(field.name for field in fields(Known))
_SELECTED = ", ".join(_COLUMNS)
_NO_OUTPUTS = "[]"
# Rows keep the number of their image's first record; the names of odd bytes need BLOBs.
_SCHEMA = f"CREATE TABLE known (number INTEGER PRIMARY KEY, image BLOB UNIQUE, {_SELECTED})"
# Within a file the last record counts, and of several files the one whose image was through last.
_IS_LATER = "excluded.source = known.source OR excluded.finished_ms > known.finished_ms"
_LATEST = ", ".join(
    f"{name} = iif({_IS_LATER}, excluded.{name}, known.{name})"
    for name in _COLUMNS
    if name not in {"mask", "outputs"}
)
_HAS_NONE = f"status = '{Status.SKIPPED.value}' AND {{0}}.outputs = '{_NO_OUTPUTS}'"
_PUT = f"""
INSERT INTO known (image, {_SELECTED}) VALUES (?{", ?" * len(_COLUMNS)})
ON CONFLICT (image) DO UPDATE SET
  {_LATEST},
  mask = CASE WHEN {_IS_LATER}
    THEN coalesce(excluded.mask, known.mask)
    ELSE coalesce(known.mask, excluded.mask) END,
  outputs = CASE WHEN {_IS_LATER}
    THEN iif(excluded.{_HAS_NONE.format("excluded")}, known.outputs, excluded.outputs)
    ELSE iif(known.{_HAS_NONE.format("known")}, excluded.outputs, known.outputs) END
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

    def put(self, record: dict[str, Any], offset_bytes: int, source: int = 0) -> None:
        """Take in an image's latest record.

        Args:
            record: as it stands in the file, checked.
            offset_bytes: where its line begins.
            source: number of the file.
        """
        self._rows.put(_PUT, _row(record, offset_bytes, source))

    def put_all(self, records: Iterable[tuple[dict[str, Any], int]], source: int = 0) -> None:
        """Take in many, as `put` does, in the order of the file."""
        self._rows.put_all(_PUT, (_row(record, offset, source) for record, offset in records))

    def get(self, image: str) -> Known | None:
        """Look an image up."""
        row = self._rows.row(f"SELECT {_SELECTED} FROM known WHERE image = ?", (as_bytes(image),))  # noqa: S608 - a constant
        return None if row is None else _known(row)

    def images(self) -> Iterator[tuple[str, Known]]:
        """Give every image in the order of their first records."""
        for image, *row in self._rows.rows(f"SELECT image, {_SELECTED} FROM known ORDER BY number"):  # noqa: S608 - a constant
            yield as_text(image), _known(tuple(row))

    def places(self) -> Iterator[tuple[int, int]]:
        """Give file and offset of the last record of each image, sorted by image."""
        yield from self._rows.rows("SELECT source, offset_bytes FROM known ORDER BY image")

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


def finished_ms(finished_at: str | None) -> int:
    """Read a record's `finished_at` as milliseconds since the epoch; 0 where it is no time."""
    try:
        return round(datetime.fromisoformat(finished_at or "").timestamp() * 1000)
    except (ValueError, OverflowError):
        return 0


def _row(record: dict[str, Any], offset_bytes: int, source: int) -> Row:
    outputs = [record[name] for name in OUTPUT_FIELDS if record.get(name)]
    return (
        as_bytes(record["image"]),
        source,
        offset_bytes,
        finished_ms(record.get("finished_at")),
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
    source, offset_bytes, ended_ms, status, *texts, outputs = row
    sha256, size_bytes, mtime_ns, model, settings, mask, cells = texts
    return Known(
        source,
        offset_bytes,
        ended_ms,
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
