"""Moves or deletes an input that is through, so that neither a crash nor a namesake loses it.

A move is three steps, each on disk before the next: the bytes stand under the new name (a hard
link, or a copy across file systems), the report of a failure stands beside them, the old name goes.
A crash leaves both names; the redo finds its own bytes under the new name and only takes the old
name away. So a target that holds the same bytes already counts as moved, and one that holds others
is passed over for `name~2.ext`, `name~3.ext` and so on.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import itertools
import json
import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path

from bcseg_batch.items import InputFile, Outcome
from bcseg_batch.store.outputs import output_error, sync_folder, write_whole

_REPORT_ENDING = ".error.json"
_NAME_LIMIT_BYTES = 255
_CHUNK_BYTES = 1 << 20
# What link(2) answers where it cannot link at all: other file system, none that has links, a file
# of another user, one with too many links, a layer that knows no links.
_NO_LINK = {errno.EXDEV, errno.EPERM, errno.EMLINK, errno.ENOTSUP, errno.ENOSYS, errno.EACCES}


class Action(StrEnum):
    """What becomes of an input that is through."""

    ARCHIVE = "archive"
    DELETE = "delete"
    QUARANTINE = "quarantine"


@dataclass(frozen=True, slots=True)
class Disposal:
    """What is to be done with one input.

    Attributes:
        action: archive and quarantine move it, and quarantine leaves a report beside it.
        target: where it goes unless the name is taken; None to delete it.
    """

    action: Action
    target: Path | None = None

    def __post_init__(self) -> None:
        if (self.target is None) is not (self.action is Action.DELETE):
            raise ValueError(f"{self.action} and target {self.target} do not go together")


@dataclass(frozen=True, slots=True)
class Due:
    """A disposal that is still to be carried out.

    Attributes:
        file: the input as it was processed.
        disposal: what to do with it.
        outcome: its record.
        attempts: how often it was tried.
    """

    file: InputFile
    disposal: Disposal
    outcome: Outcome
    attempts: int


class Ending(StrEnum):
    """How a disposal ended."""

    MOVED = "moved"
    DELETED = "deleted"
    GONE = "gone"
    CHANGED = "changed"


@dataclass(frozen=True, slots=True)
class Disposed:
    """What was done.

    Attributes:
        ending: moved; deleted; gone, where an earlier try or somebody else took the file away; or
            changed, where another image has taken its name and was left alone.
        path: where it lies now, if it was moved.
    """

    ending: Ending
    path: Path | None = None


def dispose(due: Due) -> Disposed:
    """Carry out a disposal; to do so again after a crash at any point is safe.

    A link is replaced by a copy of what it leads to; deleting takes the link and not the file
    behind it.

    Args:
        due: what to do; the file must still have the size and modification time it was processed
            with, or it is a new image and stays.

    Returns:
        How it ended; each ending means that nothing is left to do.

    Raises:
        OutputError: the file cannot be read, moved or deleted; it lies where it was.
    """
    source = due.file.path
    try:
        try:
            facts = source.stat()
        except FileNotFoundError:
            return Disposed(Ending.GONE)
        if (facts.st_size, facts.st_mtime_ns) != (due.file.size_bytes, due.file.mtime_ns):
            return Disposed(Ending.CHANGED)
        target = due.disposal.target
        if target is None:
            _remove(source)
            return Disposed(Ending.DELETED)
        placed = _place(source, target)
        if due.disposal.action is Action.QUARANTINE:
            _write_report(placed, due)
        _remove(source)
    except OSError as error:
        raise output_error(_culprit(error, source), error) from error
    return Disposed(Ending.MOVED, placed)


def report_path(path: Path) -> Path:
    """Give the path of the report beside a quarantined file."""
    return path.with_name(_fitted(path.name, _REPORT_ENDING) + _REPORT_ENDING)


def _place(source: Path, target: Path) -> Path:
    """Put the bytes of a file under the first name that is free or holds them already."""
    target.parent.mkdir(parents=True, exist_ok=True)
    for path in _free_names(target):
        try:
            _link_or_copy(source, path)
        except FileExistsError:
            if not _same_bytes(source, path):
                continue
        sync_folder(path.parent)
        return path
    raise AssertionError("the names never end")


def _free_names(target: Path) -> Iterator[Path]:
    yield target
    for number in itertools.count(2):
        ending = f"~{number}{target.suffix}"
        yield target.with_name(_fitted(target.stem, ending) + ending)


def _fitted(name: str, ending: str) -> str:
    """Cut a name so that it can take an ending, with its hash so that it stays its own."""
    room_bytes = _NAME_LIMIT_BYTES - len(os.fsencode(ending))
    data = os.fsencode(name)
    if len(data) <= room_bytes:
        return name
    digest = hashlib.sha256(data).hexdigest()[:8]
    return os.fsdecode(data[: room_bytes - len(digest) - 1]) + "~" + digest


def _link_or_copy(source: Path, path: Path) -> None:
    """Put the bytes of a file under a name.

    Raises:
        FileExistsError: the name is taken.
    """
    if not source.is_symlink():
        try:
            path.hardlink_to(source)
        except OSError as error:
            if error.errno not in _NO_LINK:
                raise
        else:
            return
    # The same passing name at each try, so that a redo takes up what a crash left.
    digest = hashlib.sha256(os.fsencode(path.name)).hexdigest()[:32]
    part = path.with_name(f".bcseg-{digest}.part")
    reserved = _reserved(path, part)
    if os.path.lexists(path) and not reserved:
        raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(path))
    try:
        with source.open("rb") as reader, part.open("wb") as writer:
            shutil.copyfileobj(reader, writer, _CHUNK_BYTES)
            writer.flush()
            with contextlib.suppress(OSError):  # times and rights, as far as they go there
                shutil.copystat(source, part)
            os.fsync(writer.fileno())
        if reserved:
            part.replace(path)
        else:
            _rename_without_overwriting(part, path)
    finally:
        with contextlib.suppress(OSError):
            part.unlink(missing_ok=True)


def _rename_without_overwriting(part: Path, path: Path) -> None:
    try:
        path.hardlink_to(part)
    except OSError as error:
        if error.errno not in _NO_LINK:
            raise
        # No links here (FAT, some shares): take the name first, and rename over one's own file.
        os.close(os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666))
        part.replace(path)


def _reserved(path: Path, part: Path) -> bool:
    """Whether a crash came between taking the name and renaming: an empty file beside its part."""
    return part.exists() and path.is_file() and path.stat().st_size == 0


def _same_bytes(one: Path, other: Path) -> bool:
    """Whether two paths are one file, or files of the same content."""
    if not other.is_file():
        return False
    if one.samefile(other):
        return True
    if one.stat().st_size != other.stat().st_size:
        return False
    with one.open("rb") as left, other.open("rb") as right:
        while chunk := left.read(_CHUNK_BYTES):
            if chunk != right.read(_CHUNK_BYTES):
                return False
    return True


def _write_report(path: Path, due: Due) -> None:
    outcome = due.outcome
    sha256 = outcome.sha256
    if sha256 is None:  # an image that failed early was never hashed
        with path.open("rb") as file:
            sha256 = hashlib.file_digest(file, "sha256").hexdigest()
    report = {
        "image": outcome.image,
        "error": outcome.error,
        "sha256": sha256,
        "when": outcome.finished_at,
        "attempts": due.attempts,
    }
    write_whole(report_path(path), json.dumps(report, indent=2).encode("ascii") + b"\n")


def _remove(source: Path) -> None:
    source.unlink(missing_ok=True)
    sync_folder(source.parent)


def _culprit(error: OSError, source: Path) -> Path:
    name = error.filename2 or error.filename
    return Path(os.fsdecode(name)) if isinstance(name, (str, bytes)) else source
