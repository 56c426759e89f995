"""The log as JSON lines: one object a line, rotated, compressed, and read back.

The folder holds `bcseg-batch.jsonl`, which is written, and `bcseg-batch-000001.jsonl.gz` and so
on, which are full; the higher the number, the younger. Numbers and not times: a clock that is set
back does not change their order.
"""

from __future__ import annotations

import gzip
import json
import os
import re
import shutil
import time
import traceback
import zlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from fnmatch import fnmatchcase
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from bcseg_batch.errors import UsageError
from bcseg_batch.text import printable

if TYPE_CHECKING:
    from loguru import Record

_CURRENT = "bcseg-batch.jsonl"
_FULL = re.compile(r"bcseg-batch-(\d{6,})\.jsonl(\.gz)?")
_POLL_S = 0.25
_CHUNK_BYTES = 1 << 20
# No line of ours is as long; what is, is damage, and must not fill the memory.
_LONGEST_LINE_BYTES = 1 << 24

LEVELS = {
    "TRACE": 5,
    "DEBUG": 10,
    "INFO": 20,
    "SUCCESS": 25,
    "WARNING": 30,
    "ERROR": 40,
    "CRITICAL": 50,
}

# ---------------------------------------------------------------------- one line


@dataclass(frozen=True, slots=True, kw_only=True)
class LogLine:
    """One event of the log.

    Attributes:
        time: when, in UTC.
        level: a key of `LEVELS`.
        message: a sentence.
        image: the input that it is about: its path relative to the input folder.
        stage: of the pipeline, such as `decode`.
        batch: number of the batch.
        ms: how long it took, milliseconds.
        exception: traceback, for bugs only.
    """

    time: datetime
    level: str
    message: str
    image: str | None = None
    stage: str | None = None
    batch: int | None = None
    ms: float | None = None
    exception: str | None = None


def from_record(record: Record) -> LogLine:
    """Take over what loguru hands to a sink; its `extra` holds image, stage, batch and ms."""
    extra = record["extra"]
    error = record["exception"]
    return LogLine(
        time=record["time"].astimezone(UTC),
        level=record["level"].name,
        message=record["message"],
        image=_typed(extra.get("image"), str),
        stage=_typed(extra.get("stage"), str),
        batch=_typed(extra.get("batch"), int),
        ms=_typed(extra.get("ms"), int, float),
        exception=None
        if error is None or error.value is None
        else "".join(traceback.format_exception(error.value)).rstrip("\n"),
    )


def to_json(line: LogLine) -> str:
    """Write a line; fields that are not known are left out.

    Only ASCII, so that a file name that is no text comes through, and a torn line tears no
    character.
    """
    fields: dict[str, Any] = {
        "time": line.time.astimezone(UTC).isoformat(timespec="milliseconds")[:-6] + "Z",
        "level": line.level,
        "message": line.message,
        "image": line.image,
        "stage": line.stage,
        "batch": line.batch,
        "ms": line.ms,
        "exception": line.exception,
    }
    return json.dumps({key: value for key, value in fields.items() if value is not None})


def from_json(text: str | bytes) -> LogLine | None:
    """Read a line; None where it is damaged or is not one of ours."""
    try:
        fields = json.loads(text)
        return LogLine(
            time=datetime.fromisoformat(fields["time"]).astimezone(UTC),
            level=str(fields["level"]),
            message=str(fields["message"]),
            image=_typed(fields.get("image"), str),
            stage=_typed(fields.get("stage"), str),
            batch=_typed(fields.get("batch"), int),
            ms=_typed(fields.get("ms"), int, float),
            exception=_typed(fields.get("exception"), str),
        )
    except (ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError):
        return None


def _typed(value: Any, *kinds: type) -> Any:
    """Give a value that has one of the types; None in place of another."""
    return value if isinstance(value, kinds) and not isinstance(value, bool) else None


def render(line: LogLine) -> str:
    """Write a line for people: local time, level, message, and where in the pipeline."""
    facts = [
        line.stage,
        None if line.batch is None else f"batch {line.batch}",
        None if line.ms is None else f"{line.ms:.0f} ms",
    ]
    where = ", ".join(fact for fact in facts if fact)
    text = printable(line.message) + (f" ({printable(where)})" if where else "")
    lines = [f"{line.time.astimezone():%Y-%m-%d %H:%M:%S} {printable(line.level):<8} {text}"]
    if line.exception:
        lines += [f"  {printable(part)}" for part in line.exception.splitlines()]
    return "\n".join(lines)


# ---------------------------------------------------------------------- choosing lines


@dataclass(frozen=True, slots=True, kw_only=True)
class LogQuery:
    """Which lines are wanted; None wants all.

    Attributes:
        image: pattern with `*`, `?` and `[...]` for the image's whole name.
        level: the least, in any case.
        since: the earliest time.
        stage: of the pipeline.
    """

    image: str | None = None
    level: str | None = None
    since: datetime | None = None
    stage: str | None = None

    def __post_init__(self) -> None:
        if self.level is not None and self.level.upper() not in LEVELS:
            raise UsageError(f"--level {self.level!r}: must be one of {', '.join(LEVELS)}")

    def wants(self, line: LogLine) -> bool:
        """Tell whether a line is chosen."""
        return (
            (self.since is None or line.time >= self.since)
            and (
                self.level is None
                # A level of somebody else's is shown rather than hidden.
                or LEVELS.get(line.level, LEVELS["CRITICAL"]) >= LEVELS[self.level.upper()]
            )
            and (self.stage is None or line.stage == self.stage)
            and (
                self.image is None
                or (line.image is not None and fnmatchcase(line.image, self.image))
            )
        )


def select(lines: Iterable[str | bytes], query: LogQuery) -> Iterator[LogLine]:
    """Give the wanted lines, in their order; damaged ones are passed over."""
    for text in lines:
        line = from_json(text)
        if line is not None and query.wants(line):
            yield line


_SPAN = re.compile(r"(\d+(?:\.\d+)?)([smhdw])")
_UNIT_S = {"s": 1, "m": 60, "h": 3600, "d": 86400, "w": 604800}


def parse_since(text: str, now: datetime) -> datetime:
    """Read a point in time as `--since` takes it.

    Args:
        text: a span before now in s, m, h, d and w (`90s`, `2h`, `1d12h`), or a date or time as
            ISO 8601 has it (`2026-03-01`, `2026-03-01T08:30`); without a zone it is local.
        now: with its zone.

    Returns:
        The point in time, in UTC.

    Raises:
        UsageError: it is neither, or before the calendar begins.
    """
    wrong = UsageError(
        f"--since {text!r}: write a span such as 90s, 30m, 2h, 1d12h or 2w, or a time such as "
        "2026-03-01 or 2026-03-01T08:30"
    )
    cleaned = text.strip()
    spans = _SPAN.findall(cleaned.lower())
    try:
        if spans and "".join(number + unit for number, unit in spans) == cleaned.lower():
            back_s = sum(float(number) * _UNIT_S[unit] for number, unit in spans)
            return now.astimezone(UTC) - timedelta(seconds=back_s)
        return datetime.fromisoformat(cleaned).astimezone(UTC)
    except (ValueError, OverflowError, OSError):
        raise wrong from None


# ---------------------------------------------------------------------- writing


class LogFile:
    """Appends lines to the folder's current file, and begins a new one when it is full.

    A log that cannot be written stops nobody: its lines are counted, and the file says how many
    are missing when it goes on. Not for several threads or processes at a time.

    Args:
        folder: made if it is missing.
        rotate_bytes: size at which a new file is begun.
        keep_files: how many full files are kept.
    """

    def __init__(self, folder: Path, *, rotate_bytes: int, keep_files: int) -> None:
        self._folder = folder
        self._rotate_bytes = rotate_bytes
        self._keep_files = keep_files
        self._file: BinaryIO | None = None
        self._size_bytes = 0
        self._is_torn = False
        self._lost = 0

    def write(self, line: LogLine) -> None:
        """Append a line; raises nothing."""
        try:
            file = self._open()
            if self._size_bytes >= self._rotate_bytes:
                with suppress(OSError):  # then this one grows on
                    self._rotate()
                file = self._open()
            if self._is_torn:
                self._append(file, b"\n")
            if self._lost:
                self._append(file, _encoded(_lost_line(line.time, self._lost)))
                self._lost = 0
            self._append(file, _encoded(line))
        except OSError:
            self._lost += 1

    def close(self) -> None:
        """Close the current file; a later line opens it again."""
        file, self._file = self._file, None
        if file is not None:
            with suppress(OSError):  # a network disk tells of a failed write here
                file.close()

    def _open(self) -> BinaryIO:
        if self._file is not None and not _is_at(self._file, self._folder / _CURRENT):
            self.close()  # deleted, or rotated by another process
        if self._file is None:
            self._folder.mkdir(parents=True, exist_ok=True)
            # Unbuffered: a line is in the file before the event after it can kill the process.
            self._file = (self._folder / _CURRENT).open("a+b", buffering=0)
            self._size_bytes = self._file.seek(0, os.SEEK_END)
            self._is_torn = False
            if self._size_bytes:
                self._file.seek(-1, os.SEEK_END)
                self._is_torn = self._file.read(1) != b"\n"
        return self._file

    def _append(self, file: BinaryIO, data: bytes) -> None:
        self._is_torn = True
        while data:
            written = file.write(data)
            self._size_bytes += written
            data = data[written:]
        self._is_torn = False

    def _rotate(self) -> None:
        self.close()
        number = max((number for number, _ in _full_files(self._folder)), default=0) + 1
        (self._folder / _CURRENT).rename(self._folder / _full_name(number))
        for full_number, full in _full_files(self._folder):
            with suppress(OSError):  # it stays as it is, and is tried again the next time
                if full_number <= number - self._keep_files:
                    full.unlink()
                elif full.suffix != ".gz":
                    _compress(full)


def _encoded(line: LogLine) -> bytes:
    return to_json(line).encode() + b"\n"


def _lost_line(when: datetime, count: int) -> LogLine:
    message = f"{count} lines before this one could not be written to this log"
    return LogLine(time=when, level="WARNING", message=message)


def _full_name(number: int) -> str:
    return f"bcseg-batch-{number:06}.jsonl"


def _full_files(folder: Path) -> list[tuple[int, Path]]:
    """Give number and path of the full files, the oldest first.

    Where both forms of one are there, compressing was cut off: the plain one is whole.
    """
    found: dict[int, Path] = {}
    for path in sorted(folder.iterdir(), reverse=True):
        if match := _FULL.fullmatch(path.name):
            found[int(match[1])] = path  # reverse: the plain name comes after the .gz
    return sorted(found.items())


def _compress(path: Path) -> None:
    part = path.with_name(path.name + ".gz.part")
    try:
        with path.open("rb") as plain, gzip.open(part, "wb", compresslevel=6) as packed:
            shutil.copyfileobj(plain, packed, _CHUNK_BYTES)
        shutil.copystat(path, part)
        part.rename(path.with_name(path.name + ".gz"))
        path.unlink()
    except OSError:
        part.unlink(missing_ok=True)
        raise


# ---------------------------------------------------------------------- reading


def _sleep() -> bool:
    time.sleep(_POLL_S)
    return True


def read_logs(
    folder: Path,
    query: LogQuery | None = None,
    *,
    follow: bool = False,
    wait: Callable[[], bool] = _sleep,
) -> Iterator[LogLine]:
    """Give the lines of a log folder, the oldest first.

    Args:
        folder: where `LogFile` writes.
        query: which lines; None gives all.
        follow: go on with what comes, across rotations, until `wait` says otherwise.
        wait: called where nothing new is there; returns whether to go on.

    Raises:
        UsageError: there is no such folder, or it may not be read.
    """
    query = query or LogQuery()
    try:
        if not follow:
            lines = _all_lines(folder, query.since)
        else:
            lines = _followed_lines(folder, query.since, wait)
        yield from select(lines, query)
    except OSError as error:
        raise UsageError(f"the log folder {folder} cannot be read: {error.strerror}") from error


def _all_lines(folder: Path, since: datetime | None) -> Iterator[bytes]:
    last, current = _position(folder)
    yield from _full_lines(folder, 0, last, since)
    if current is not None:
        with current:
            lines = _Lines()
            yield from lines.of(current)
            yield lines.rest


def _followed_lines(
    folder: Path, since: datetime | None, wait: Callable[[], bool]
) -> Iterator[bytes]:
    before = 0
    last, current = _position(folder)
    while True:
        yield from _full_lines(folder, before, last, since)
        lines = _Lines()
        if current is not None:
            with current:
                is_current = True
                while is_current:
                    # Asked first: what is written before a rotation is then read below.
                    is_current = _is_at(current, folder / _CURRENT)
                    yield from lines.of(current)
                    if is_current and not wait():
                        return
                yield lines.rest
            # The file just read has got the next number.
            before = last + 1
        elif not wait():
            return
        else:
            before = last
        last, current = _position(folder)


def _position(folder: Path) -> tuple[int, BinaryIO | None]:
    """Open the current file, and give the number of the last full one before it."""
    while True:
        last = max((number for number, _ in _full_files(folder)), default=0)
        try:
            current = (folder / _CURRENT).open("rb")
        except FileNotFoundError:  # none yet, or in the middle of a rotation
            return max((number for number, _ in _full_files(folder)), default=0), None
        if last == max((number for number, _ in _full_files(folder)), default=0):
            return last, current
        current.close()  # rotated in between


def _is_at(file: BinaryIO, path: Path) -> bool:
    try:
        there = path.stat()
    except FileNotFoundError:
        return False
    return os.path.samestat(os.fstat(file.fileno()), there)


def _full_lines(folder: Path, after: int, last: int, since: datetime | None) -> Iterator[bytes]:
    for number, _ in _full_files(folder):
        if after < number <= last:
            with suppress(FileNotFoundError), _open_full(folder, number) as file:
                if since is not None and os.fstat(file.fileno()).st_mtime < since.timestamp():
                    continue  # nothing was written to it since
                lines = _Lines()
                # A damaged end costs what comes after it in this file, not in the next.
                with suppress(EOFError, zlib.error, gzip.BadGzipFile):
                    yield from lines.of(file)
                yield lines.rest


def _open_full(folder: Path, number: int) -> BinaryIO | gzip.GzipFile:
    path = folder / _full_name(number)
    try:
        return path.open("rb")
    except FileNotFoundError:
        return gzip.open(path.with_name(path.name + ".gz"), "rb")


class _Lines:
    """Cuts a file that grows into lines.

    Attributes:
        rest: what stands after the last line break so far.
    """

    def __init__(self) -> None:
        self.rest = b""

    def of(self, file: BinaryIO | gzip.GzipFile) -> Iterator[bytes]:
        """Give the whole lines from where the file stands to its end for now."""
        while chunk := file.read(_CHUNK_BYTES):
            *whole, self.rest = (self.rest + chunk).split(b"\n")
            if len(self.rest) > _LONGEST_LINE_BYTES:
                self.rest = b""
            yield from whole
