"""`results.jsonl`, one record a line, and `results.csv`, the same as a table."""

from __future__ import annotations

import contextlib
import csv
import functools
import io
import json
import math
import os
import time
import types
import typing
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, fields
from datetime import UTC, datetime
from pathlib import Path, PurePosixPath
from typing import IO, Any

from bcseg_batch.items import OUTPUT_FIELDS, Flag, Outcome, Status
from bcseg_batch.store.known import Known, KnownIndex, finished_ms
from bcseg_batch.store.outputs import output_error, sync_folder, whole_file
from bcseg_batch.store.shards import JSONL_NAME, Shard, record_files

CSV_NAME = "results.csv"

_FIELDS = tuple(field.name for field in fields(Outcome))
# Of no use in a table that people read; they stand in the records.
COLUMNS = tuple(name for name in _FIELDS if name != "outputs_sha256")
"""Columns of `results.csv`, in their order."""
# What the index of the records and Parquet hold.
_INTEGER_BITS = 63
# What may differ between two records that say the same.
_INCIDENTAL = {"seconds", "finished_at", "mtime_ns", "device", "dtype"}


class ResultsLog:
    """The records of an output folder: appended to, never rewritten; the last of an image counts.

    A torn last line, which a killed or powerless machine leaves, is cut off when the file is
    opened: its image is simply done again. A line that is damaged elsewhere is passed over.

    A shard appends to a file of its own, and knows what stands in all files of the folder: of
    several records of an image the one counts that was finished last.

    Args:
        folder: the output folder.
        shard: whose file is appended to; that of all where it is None.
        holds: which images are asked about; the records of others are left out.

    Attributes:
        repaired: what was found damaged on opening, in words for the log; empty where all is well.

    Raises:
        OutputError: a file cannot be read or written.
    """

    def __init__(
        self,
        folder: Path,
        shard: Shard | None = None,
        holds: Callable[[str], bool] = lambda _: True,
    ) -> None:
        self._path = folder / (JSONL_NAME if shard is None else shard.records_name)
        self._csv_path = folder / CSV_NAME
        self._known = KnownIndex()
        self._holds = holds
        self.repaired: list[str] = []
        try:
            with contextlib.ExitStack() as files:
                files.callback(self._known.close)
                # Unbuffered: what a full disk refused must not be tried again at every later call.
                self._file = files.enter_context(self._path.open("ab", buffering=0))
                self._reader = files.enter_context(self._path.open("rb"))
                # This run's own is number 0, and read last.
                others = [] if shard is None else record_files(folder)
                self._others = [path for path in others if path != self._path]
                for source, path in enumerate(self._others, start=1):
                    with path.open("rb") as lines:
                        self._known.put_all(self._whole_records(path, lines), source)
                self._known.put_all(self._whole_records(self._path, self._reader))
                sync_folder(folder)
                self._files = files.pop_all()
        except OSError as error:
            raise output_error(self._path, error) from error

    def close(self) -> None:
        """Force everything to disk and close the file.

        Raises:
            OutputError: the disk is full or gone.
        """
        try:
            with self._files:
                os.fsync(self._file.fileno())
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
        return self._known.images()

    def masks(self) -> Iterator[tuple[str, str]]:
        """Give the images that have a mask, or had one, with its path; in their records' order."""
        return self._known.masks()

    def cell_tables(self) -> Iterator[str]:
        """Give the path of each image's table of cells, sorted by image."""
        return self._known.cells()

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
            before = self._read(previous.source, previous.offset_bytes)
            if all(before.get(key) == record[key] for key in _FIELDS if key not in _INCIDENTAL):
                return False
        ended_ms = finished_ms(outcome.finished_at) or time.time_ns() // 1_000_000
        if previous is not None:
            # Always later than the one before, which a machine may have made whose clock is fast.
            ended_ms = max(ended_ms, previous.finished_ms + 1)
        ended = datetime.fromtimestamp(ended_ms / 1000, UTC)
        record["finished_at"] = ended.isoformat(timespec="milliseconds")
        self._known.put(record, _write_line(self._file, self._path, record))
        return True

    def records(self) -> Iterator[dict[str, Any]]:
        """Give the last record of each image, sorted by image."""
        for source, offset_bytes in self._known.places():
            yield self._read(source, offset_bytes)

    def write_csv(self) -> None:
        """Write `results.csv` anew: UTF-8, one header, one row per image, sorted by image.

        Raises:
            OutputError: it cannot be written.
        """
        write_table(self._csv_path, self.records())

    def _read(self, source: int, offset_bytes: int) -> dict[str, Any]:
        if source:
            # Opened each time: there may be more shards than a process may hold files.
            with self._others[source - 1].open("rb") as other:
                return _record_at(other, offset_bytes)
        return _record_at(self._reader, offset_bytes)

    def _whole_records(
        self, path: Path, lines: Iterable[bytes]
    ) -> Iterator[tuple[dict[str, Any], int]]:
        offset_bytes = 0
        for number, line in enumerate(lines, start=1):
            if not line.endswith(b"\n"):
                if path == self._path:
                    self._file.truncate(offset_bytes)
                    self.repaired.append(f"{path} ended in half a record, which was cut off")
                break
            try:
                record = json.loads(line)
                is_wanted = self._holds(record["image"])
                if is_wanted:
                    check_record(record)
            except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
                self.repaired.append(f"{path} line {number} is damaged and was passed over")
            else:
                if is_wanted:
                    yield record, offset_bytes
            offset_bytes += len(line)


class ResultsFollower:
    """Appends to the records of an output folder without holding them, for a long life.

    What decides whether an image is done lies in the ledger; this file only follows it.

    Args:
        folder: the output folder.

    Raises:
        OutputError: the file cannot be read or written.
    """

    # As much of the file's end as is looked through for what a crash may have written already.
    _TAIL_BYTES = 4 * 1024 * 1024

    def __init__(self, folder: Path) -> None:
        self._path = folder / JSONL_NAME
        self._csv_path = folder / CSV_NAME
        try:
            self._file = self._path.open("ab", buffering=0)
            self._recent: set[bytes] = set(self._repaired_tail())
            sync_folder(folder)
        except OSError as error:
            raise output_error(self._path, error) from error

    def __enter__(self) -> ResultsFollower:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def append(self, outcomes: Iterable[Outcome]) -> None:
        """Add records, but for those that stand here already since noting them as added failed.

        They are on disk when this returns.

        Raises:
            OutputError: they cannot be written.
        """
        given: set[bytes] = set()
        for outcome in outcomes:
            record = to_record(outcome)
            line = _line(record)
            if line not in self._recent:
                _write_line(self._file, self._path, record)
                self._recent.add(line)
            given.add(line)
        try:
            # The ledger is about to note for good that they are here.
            os.fsync(self._file.fileno())
        except OSError as error:
            raise output_error(self._path, error) from error
        # Only the last ones can be given again: where noting them failed.
        self._recent = given

    def write_csv(self, outcomes: Iterable[Outcome]) -> None:
        """Write `results.csv` anew from the last outcome of each image.

        Raises:
            OutputError: it cannot be written.
        """
        write_table(self._csv_path, map(to_record, outcomes))

    def _repaired_tail(self) -> list[bytes]:
        with self._path.open("rb") as reader:
            size_bytes = reader.seek(0, os.SEEK_END)
            start_bytes = max(0, size_bytes - self._TAIL_BYTES)
            reader.seek(start_bytes)
            tail = reader.read()
        whole, newline, torn = tail.rpartition(b"\n")
        if torn:
            self._file.truncate(size_bytes - len(torn))
        return [line + b"\n" for line in whole.split(b"\n")] if newline else []


def write_table(path: Path, records: Iterable[dict[str, Any]]) -> None:
    """Write records as CSV: UTF-8, one header, however many there are.

    Args:
        path: of the file.
        records: as `to_record` gives them, in the order of the rows.

    Raises:
        OutputError: it cannot be written.
    """
    with whole_file(path) as file:
        # A name that is not UTF-8 is written with its odd bytes escaped.
        text = io.TextIOWrapper(file, "utf-8", errors="backslashreplace", newline="")
        writer = csv.DictWriter(text, COLUMNS, extrasaction="ignore")
        writer.writeheader()
        for record in records:
            writer.writerow(_as_row(record))
        text.flush()
        text.detach()


def _record_at(file: IO[bytes], offset_bytes: int) -> dict[str, Any]:
    file.seek(offset_bytes)
    record: dict[str, Any] = json.loads(file.readline())
    return record


def _line(record: dict[str, Any]) -> bytes:
    return json.dumps(record).encode("ascii") + b"\n"


def _write_line(file: io.RawIOBase, path: Path, record: dict[str, Any]) -> int:
    """Add a whole line or nothing; gives the place where it begins."""
    line = _line(record)
    try:
        offset_bytes = file.seek(0, os.SEEK_END)
        try:
            # A nearly full disk takes a part, and refuses only the rest.
            while line:
                line = line[file.write(line) :]
        except OSError:
            file.truncate(offset_bytes)
            raise
    except OSError as error:
        raise output_error(path, error) from error
    return offset_bytes


def to_record(outcome: Outcome) -> dict[str, Any]:
    """Give an outcome as JSON holds it, in the order of the columns."""
    record = asdict(outcome)
    return record | {
        "status": outcome.status.value,
        "notes": list(outcome.notes),
        "flags": list(record["flags"]),
    }


def from_record(record: dict[str, Any]) -> Outcome:
    """Give the outcome of a record; what a later version added to it is left out.

    Raises:
        TypeError, KeyError, ValueError: it is none.
    """
    values = {key: value for key, value in record.items() if key in _FIELDS}
    return Outcome(
        **{
            **values,
            "status": Status(values["status"]),
            "notes": tuple(values["notes"]),
            "flags": tuple(Flag(**flag) for flag in values.get("flags") or ()),
        }
    )


def _as_row(record: dict[str, Any]) -> dict[str, Any]:
    """Give a record as a table holds it: one text or number in each field."""
    return {
        **record,
        "notes": "; ".join(record.get("notes") or ()),
        "flags": "; ".join(f"{f['name']}={f['value']:.4g}" for f in record.get("flags") or ()),
    }


@functools.cache
def _kinds() -> dict[str, frozenset[type]]:
    """Give the types that the numbers and texts of a record may have."""
    kinds = {}
    for name, hint in typing.get_type_hints(Outcome).items():
        members = set(typing.get_args(hint)) if isinstance(hint, types.UnionType) else {hint}
        if members <= {int, float, str, type(None)}:
            # Any may be missing, but for those that are asked for by name.
            whole = {int} if float in members else set()
            kinds[name] = frozenset(members | whole | {type(None)})
    return kinds


def check_record(record: dict[str, Any]) -> None:
    """Refuse a line that somebody has edited into something else.

    Raises:
        TypeError, ValueError, KeyError, AttributeError: it is no record, or names a file outside
            the output folder.
    """
    if record["image"] is None:
        raise TypeError("image is no text")
    Status(record["status"])
    for name, kinds in _kinds().items():
        value = record.get(name)
        if type(value) not in kinds:  # not by isinstance, for which true is a number
            raise TypeError(f"{name} is of another type")
        if isinstance(value, float) and not math.isfinite(value):
            raise ValueError(f"{name} is no number")
        if isinstance(value, int) and value.bit_length() > _INTEGER_BITS:
            raise ValueError(f"{name} is larger than any file, picture or time")
    hashes = record.get("outputs_sha256", {})
    if not isinstance(hashes, dict) or not all(isinstance(h, str) for h in hashes.values()):
        raise TypeError("outputs_sha256 are no texts by name")
    notes, flags = record.get("notes", []), record.get("flags", [])
    if not isinstance(notes, list) or not all(isinstance(note, str) for note in notes):
        raise TypeError("notes are no list of texts")
    if not isinstance(flags, list):
        raise TypeError("flags are no list")
    for flag in flags:
        Flag(**flag)
        float(flag["value"])
    for name in OUTPUT_FIELDS:
        path = record.get(name) or ""
        if path.startswith("/") or (".." in path and ".." in PurePosixPath(path).parts):
            raise ValueError(f"{name} lies outside the output folder")
