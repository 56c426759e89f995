"""`results.jsonl`, one record a line, and `results.csv`, the same as a table."""

from __future__ import annotations

import csv
import io
import json
import os
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from bcseg_batch.items import Outcome, Status
from bcseg_batch.store.outputs import output_error, sync_folder, write_whole

JSONL_NAME = "results.jsonl"
CSV_NAME = "results.csv"

_FIELDS = tuple(field.name for field in fields(Outcome))
# What may differ between two records that say the same.
_INCIDENTAL = {"seconds", "finished_at", "mtime_ns", "device", "dtype"}


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
        mask: path relative to the output folder.
        composite: likewise.
    """

    offset_bytes: int
    status: Status
    sha256: str | None
    size_bytes: int | None
    mtime_ns: int | None
    model_sha256: str | None
    settings_sha256: str | None
    mask: str | None
    composite: str | None


class ResultsLog:
    """The records of an output folder: appended to, never rewritten; the last of an image counts.

    A torn last line, which a killed or powerless machine leaves, is cut off when the file is
    opened: its image is simply done again. A line that is damaged elsewhere is passed over.

    Args:
        folder: the output folder.

    Attributes:
        repaired: what was found damaged on opening, in words for the log; empty where all is well.

    Raises:
        OutputError: the file cannot be read or written.
    """

    def __init__(self, folder: Path) -> None:
        self._path = folder / JSONL_NAME
        self._csv_path = folder / CSV_NAME
        self._known: dict[str, Known] = {}
        self.repaired: list[str] = []
        try:
            self._file = self._path.open("a+b")
            self._load()
            sync_folder(folder)
        except OSError as error:
            raise output_error(self._path, error) from error

    def close(self) -> None:
        """Force everything to disk and close the file.

        Raises:
            OutputError: the disk is full or gone.
        """
        try:
            os.fsync(self._file.fileno())
            self._file.close()
        except OSError as error:
            raise output_error(self._path, error) from error

    def __enter__(self) -> ResultsLog:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __len__(self) -> int:
        return len(self._known)

    def known(self, image: str) -> Known | None:
        """Look up the last record of an image."""
        return self._known.get(image)

    def images(self) -> Iterator[tuple[str, Known]]:
        """Give every image with what is known of it, in the order of their first records."""
        return iter(self._known.items())

    def append(self, outcome: Outcome) -> bool:
        """Add a record, unless the last one of its image says the same.

        The line reaches the kernel before this returns, so that it survives the death of the
        process; its outputs are on disk already. A power cut may take the last lines, which only
        means that their images are done again.

        Args:
            outcome: what to record.

        Returns:
            Whether a line was written.

        Raises:
            OutputError: it cannot be written.
        """
        record = to_record(outcome)
        previous = self._known.get(outcome.image)
        if previous is not None and outcome.status is not Status.DONE:
            before = self._read(previous.offset_bytes)
            if all(before.get(key) == record[key] for key in _FIELDS if key not in _INCIDENTAL):
                return False
        line = json.dumps(record).encode("ascii") + b"\n"
        try:
            offset_bytes = self._file.seek(0, os.SEEK_END)
            self._file.write(line)
            self._file.flush()
        except OSError as error:
            raise output_error(self._path, error) from error
        self._known[outcome.image] = _known(record, offset_bytes)
        return True

    def records(self) -> Iterator[dict[str, Any]]:
        """Give the last record of each image, sorted by image."""
        for image in sorted(self._known):
            yield self._read(self._known[image].offset_bytes)

    def write_csv(self) -> None:
        """Write `results.csv` anew: UTF-8, one header, one row per image, sorted by image.

        Raises:
            OutputError: it cannot be written.
        """
        table = io.StringIO(newline="")
        writer = csv.DictWriter(table, _FIELDS, extrasaction="ignore")
        writer.writeheader()
        for record in self.records():
            writer.writerow({**record, "notes": "; ".join(record.get("notes") or ())})
        # A name that is not UTF-8 is written with its odd bytes escaped.
        write_whole(self._csv_path, table.getvalue().encode("utf-8", "backslashreplace"))

    def _read(self, offset_bytes: int) -> dict[str, Any]:
        self._file.seek(offset_bytes)
        record: dict[str, Any] = json.loads(self._file.readline())
        return record

    def _load(self) -> None:
        self._file.seek(0)
        offset_bytes = 0
        for number, line in enumerate(self._file, start=1):
            if not line.endswith(b"\n"):
                self._file.truncate(offset_bytes)
                self.repaired.append(f"{self._path} ended in half a record, which was cut off")
                break
            try:
                record = json.loads(line)
                self._known[sys.intern(record["image"])] = _known(record, offset_bytes)
            except (ValueError, KeyError, TypeError):
                self.repaired.append(f"{self._path} line {number} is damaged and was passed over")
            offset_bytes += len(line)
        self._file.seek(0, os.SEEK_END)


def to_record(outcome: Outcome) -> dict[str, Any]:
    """Give an outcome as JSON holds it, in the order of the columns."""
    return {**asdict(outcome), "status": outcome.status.value, "notes": list(outcome.notes)}


def _known(record: dict[str, Any], offset_bytes: int) -> Known:
    model, settings = record.get("model_sha256"), record.get("settings_sha256")
    return Known(
        offset_bytes,
        Status(record["status"]),
        record.get("sha256"),
        record.get("size_bytes"),
        record.get("mtime_ns"),
        # The same few hashes stand in every record: one copy of each is enough.
        model and sys.intern(model),
        settings and sys.intern(settings),
        record.get("mask"),
        record.get("composite"),
    )
