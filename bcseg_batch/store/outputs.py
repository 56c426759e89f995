"""Writes output files so that a final name always stands for a whole file."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import threading
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import IO

from bcseg_batch.errors import OutputError, UnsupportedImageError, UsageError
from bcseg_batch.store.lock import is_locked, take_lock
from bcseg_batch.store.shards import Shard, shard_locks

_PART_PREFIX = ".bcseg-"
_PART_SUFFIX = ".part"
LOCK_NAME = ".bcseg.lock"
# A file where a folder has to be, or the reverse.
_IN_THE_WAY = {errno.EEXIST, errno.EISDIR, errno.ENOTDIR}


def write_whole(path: Path, data: bytes) -> None:
    """Write a file so that its name always stands for the whole of it; see `whole_file`.

    Args:
        path: where to; missing folders are made.
        data: the content.

    Raises:
        OutputError: the disk is full, read-only, or may not be written.
        UnsupportedImageError: the name is longer than the file system allows.
    """
    with whole_file(path) as file:
        file.write(data)


@contextlib.contextmanager
def whole_file(path: Path, *, keep_name: bool = True) -> Iterator[IO[bytes]]:
    """Write a file under a passing name, force it to disk, then give it its own.

    After a crash at any point the path holds either what it held before or all that was written.

    Args:
        path: where to; missing folders are made.
        keep_name: force the name to disk too, so that a power cut leaves what was written; else
            that is the caller's part, by `sync_folder`.

    Yields:
        A binary file to write to.

    Raises:
        OutputError: the disk is full, read-only, or may not be written.
        UnsupportedImageError: the name is longer than the file system allows, which is the
            input's doing and not the disk's.
    """
    part = path.parent / f"{_PART_PREFIX}{uuid.uuid4().hex}{_PART_SUFFIX}"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with part.open("wb") as file:
                yield file
                file.flush()
                os.fsync(file.fileno())
            part.replace(path)
        except BaseException:
            with contextlib.suppress(OSError):
                part.unlink(missing_ok=True)
            raise
        if keep_name:
            sync_folder(path.parent)
    except OSError as error:
        if error.errno == errno.ENAMETOOLONG:
            raise UnsupportedImageError(
                f"the output name {path.name!r} is longer than the output's file system allows: "
                "give the input a shorter name"
            ) from error
        raise output_error(path, error) from error


def output_error(path: Path, error: OSError) -> OutputError:
    """Turn an error of the file system into a sentence that says what to do."""
    advice = {
        errno.ENOSPC: "free some space",
        errno.EDQUOT: "free some space or raise the quota",
        errno.EROFS: "mount it for writing",
        errno.EACCES: "give this user the right to write there",
        errno.EPERM: "give this user the right to write there",
    }.get(error.errno or 0, "mend the output folder")
    cause = error.strerror or str(error)
    return OutputError(f"cannot write {str(path)!r}: {cause}: {advice}, then run again")


def sync_folder(folder: Path) -> None:
    """Force the names in a folder to disk, so that a rename survives a power cut."""
    handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(handle)
    except OSError as error:
        # Some network file systems cannot sync a folder, and do so by themselves.
        if error.errno not in {errno.EINVAL, errno.ENOTSUP}:
            raise
    finally:
        os.close(handle)


def is_part(name: str) -> bool:
    """Say by its name whether a file is one that is not whole yet."""
    return name.startswith(_PART_PREFIX) and name.endswith(_PART_SUFFIX)


def is_written_to(root: Path) -> bool:
    """Say whether a run is writing to an output folder at the moment."""
    try:
        return is_locked(root / LOCK_NAME) or any(map(is_locked, shard_locks(root).values()))
    except OSError:
        return False


def is_output_folder(root: Path) -> bool:
    """Say whether a run has had a folder as its output folder."""
    return (root / LOCK_NAME).is_file()


class OutputFiles:
    """The files of an output folder; by itself for processes that write for the run that holds it.

    Args:
        root: the folder, which is there.
    """

    def __init__(self, root: Path) -> None:
        self.root = root
        self._unsynced: set[Path] = set()
        self._unsynced_lock = threading.Lock()

    def write(self, relative: str, data: bytes) -> None:
        """Write one output; `sync` makes its name last.

        Args:
            relative: path below the root, with forward slashes.
            data: the whole content.

        Raises:
            OutputError: nothing can be written there.
            UnsupportedImageError: the name is too long, or the outputs of another image take it.
        """
        with self.open(relative) as file:
            file.write(data)

    @contextlib.contextmanager
    def open(self, relative: str) -> Iterator[IO[bytes]]:
        """Write one output piece by piece; it has its name when the block ends well.

        The content is on disk by then, and the name after the next `sync`.

        Args:
            relative: path below the root, with forward slashes.

        Yields:
            A binary file to write to.

        Raises:
            OutputError: nothing can be written there.
            UnsupportedImageError: the name is too long, or the outputs of another image take it.
        """
        path = self.root / relative
        if not self.root.is_dir():  # to be made by none but `__init__`: a share may be lost
            raise OutputError(f"the output folder {str(self.root)!r} is gone: bring it back")
        try:
            with whole_file(path, keep_name=False) as file:
                yield file
            with self._unsynced_lock:
                self._unsynced.add(path.parent)
        except OutputError as error:
            cause = error.__cause__
            if not (isinstance(cause, OSError) and cause.errno in _IN_THE_WAY):
                raise
            if (taken := self._taken(path)) is None:
                raise
            raise UnsupportedImageError(
                f"the output {relative!r} needs the name of {taken!r}, which is another image's: "
                "rename the input or its folder"
            ) from error

    def sha256(self, relative: str) -> str:
        """Give the SHA-256 of a file, hexadecimal.

        Raises:
            OutputError: it cannot be read.
        """
        path = self.root / relative
        try:
            with path.open("rb") as content:
                return hashlib.file_digest(content, "sha256").hexdigest()
        except OSError as error:
            raise output_error(path, error) from error

    def sync(self) -> None:
        """Force the names of all that was written so far to disk: once for many files.

        Raises:
            OutputError: that failed; what was written since the last time may be lost in a power
                cut.
        """
        with self._unsynced_lock:
            folders, self._unsynced = self._unsynced, set()
        for folder in folders:
            try:
                sync_folder(folder)
            except OSError as error:
                raise output_error(folder, error) from error

    def exists(self, relative: str) -> bool:
        """Say whether an output lies there and is not empty."""
        try:
            return (self.root / relative).stat().st_size > 0
        except OSError:
            return False

    def remove(self, relative: str) -> None:
        """Take away an output that another has taken the place of; a missing one is no error."""
        with contextlib.suppress(OSError):
            (self.root / relative).unlink(missing_ok=True)

    def _taken(self, path: Path) -> str | None:
        """Give what stands in the way: a folder with this name, or a file where a folder must be.

        An input folder may be called just like the mask of an image beside it.
        """
        if path.is_dir():
            return path.relative_to(self.root).as_posix()
        # Not the topmost (`masks` itself): where that is a file, no image is to blame.
        folders = path.relative_to(self.root).parents[:-2]
        return next((f.as_posix() for f in folders if (self.root / f).is_file()), None)


class OutputFolder(OutputFiles):
    """One output folder, held by one run at a time, or by the shards of one division.

    Args:
        root: the folder; made where it is missing.
        shard: lets the other shards in at the same time, and nobody else.

    Raises:
        OutputError: it cannot be made or written.
        UsageError: another run is writing there.
    """

    def __init__(self, root: Path, shard: Shard | None = None) -> None:
        super().__init__(root)
        try:
            root.mkdir(parents=True, exist_ok=True)
            with contextlib.ExitStack() as locks:
                is_shared = shard is not None
                locks.enter_context(take_lock(root / LOCK_NAME, "output folder", shared=is_shared))
                if shard is not None:
                    # Its own lock first: of two that begin at once, one at least sees the other.
                    locks.enter_context(take_lock(root / shard.lock_name, "output folder"))
                    _refuse_other_divisions(root, shard)
                self._locks = locks.pop_all()
        except OSError as error:
            raise output_error(root, error) from error
        if shard is None:
            self._remove_parts()

    def __reduce__(self) -> tuple[type[OutputFiles], tuple[Path]]:
        """Be copied to another process as what writes there for the run that holds the folder."""
        return OutputFiles, (self.root.absolute(),)

    def close(self) -> None:
        """Let the next run in."""
        self._locks.close()

    def __enter__(self) -> OutputFolder:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _remove_parts(self) -> None:
        """Clear away what killed runs left half written; the lock says nobody else is at it."""
        for part in list(_parts(self.root)):
            with contextlib.suppress(OSError):
                part.unlink()


def _refuse_other_divisions(root: Path, shard: Shard) -> None:
    for other, path in shard_locks(root).items():
        if other.count != shard.count and is_locked(path):
            raise UsageError(
                f"{root} is being written by shard {other}, whose part overlaps with that of "
                f"{shard}: wait until it is through, or take {other.count} parts as well"
            )


def _parts(root: Path) -> Iterator[Path]:
    ahead = [root]
    while ahead:
        # Entry by entry: a folder may hold millions of outputs.
        with contextlib.suppress(OSError), os.scandir(ahead.pop()) as listing:
            for entry in listing:
                if entry.is_dir(follow_symlinks=False):
                    ahead.append(Path(entry.path))
                elif is_part(entry.name):
                    yield Path(entry.path)
