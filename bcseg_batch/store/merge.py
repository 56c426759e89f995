"""Joins the records of shards to those of the whole folder."""

from __future__ import annotations

import contextlib
import json
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from bcseg_batch.store.known import finished_ms
from bcseg_batch.store.outputs import output_error, sync_folder, whole_file
from bcseg_batch.store.results import ResultsLog, check_record
from bcseg_batch.store.scratch import Row, Scratch
from bcseg_batch.store.shards import JSONL_NAME, shard_files, shard_locks, shard_of

# A process may hold a thousand files on many systems, and there may be more shards.
_OPEN_FILES = 200
_SCHEMA = "CREATE TABLE lines (finished_ms INTEGER, source INTEGER, offset_bytes INTEGER)"


@dataclass(slots=True)
class Merged:
    """What was joined.

    Attributes:
        shards: those whose records were found, such as `3/16`.
        absent: those of the same divisions that have left none.
        records: how many were added.
        damaged: lines that are no records, in words.
    """

    shards: list[str]
    absent: list[str]
    records: int
    damaged: list[str]


def merge_records(folder: Path) -> Merged:
    """Add the records of shards to `results.jsonl`; their files stay until `remove_shard_files`.

    `results.jsonl` is replaced as a whole, and afterwards has no record less and none twice,
    wherever this was interrupted before: a record is added only where it was finished later than
    the last one of its image there, and within an image records are added in the order of time.

    Args:
        folder: an output folder that the caller has locked.

    Raises:
        OutputError: the records cannot be read or written.
    """
    path = folder / JSONL_NAME
    try:
        files = shard_files(folder)
        merged = _found(files)
        lines = Scratch(_SCHEMA)
        with ResultsLog(folder) as whole:
            merged.damaged += whole.repaired
            for source, file in enumerate(files):
                with file.open("rb") as content:
                    lines.put_all(
                        "INSERT INTO lines VALUES (?, ?, ?)",
                        _new_lines(source, file, content, whole, merged),
                    )
        with whole_file(path) as joined, path.open("rb") as before:
            shutil.copyfileobj(before, joined)
            for line in _in_order(lines, files):
                joined.write(line)
                merged.records += 1
        lines.close()
    except OSError as error:
        raise output_error(path, error) from error
    return merged


def remove_shard_files(folder: Path) -> None:
    """Take away what shards have left beside the outputs, when all of it is in `results.jsonl`.

    Args:
        folder: an output folder that the caller has locked.

    Raises:
        OutputError: something cannot be removed.
    """
    try:
        for path in (*shard_files(folder), *shard_locks(folder).values()):
            path.unlink()
        sync_folder(folder)
    except OSError as error:
        raise output_error(folder, error) from error


def _found(files: list[Path]) -> Merged:
    there = sorted(shard for shard in map(shard_of, files) if shard is not None)
    absent = [
        f"{number}/{count}"
        for count in sorted({shard.count for shard in there})
        for number in range(1, count + 1)
        if number not in {shard.number for shard in there if shard.count == count}
    ]
    return Merged([str(shard) for shard in there], absent, 0, [])


def _new_lines(
    source: int, file: Path, lines: IO[bytes], whole: ResultsLog, merged: Merged
) -> Iterator[Row]:
    """Give time and place of each record that is later than what is known of its image."""
    offset_bytes = 0
    for number, line in enumerate(lines, 1):
        if not line.endswith(b"\n"):
            merged.damaged.append(f"{file} ends in half a record, which is left out")
            return
        try:
            record = json.loads(line)
            check_record(record)
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
            merged.damaged.append(f"{file} line {number} is damaged and is left out")
        else:
            ended_ms = finished_ms(record.get("finished_at"))
            known = whole.known(record["image"])
            if known is None or ended_ms > known.finished_ms:
                yield ended_ms, source, offset_bytes
        offset_bytes += len(line)


def _in_order(lines: Scratch, files: list[Path]) -> Iterator[bytes]:
    """Give the records in the order of time; within a file it is that of the lines."""
    query = "SELECT source, offset_bytes FROM lines ORDER BY finished_ms, source, offset_bytes"
    with contextlib.ExitStack() as opened:
        contents: dict[int, IO[bytes]] = {}
        for source, offset_bytes in lines.rows(query):
            if source not in contents:
                if len(contents) == _OPEN_FILES:
                    opened.close()
                    contents.clear()
                contents[source] = opened.enter_context(files[source].open("rb"))
            contents[source].seek(offset_bytes)
            yield contents[source].readline()
