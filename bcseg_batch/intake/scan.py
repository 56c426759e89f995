"""Walks the input folder in an order that never changes."""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from bcseg_batch.intake.ignore import IgnoreRules
from bcseg_batch.items import InputFile


@dataclass(frozen=True, slots=True)
class IgnoredFile:
    """A file or folder that is no input, and why.

    Attributes:
        image: path relative to the input folder, with forward slashes.
        reason: half a sentence.
        missed: whether there may be images behind it, which nobody meant to leave out.
    """

    image: str
    reason: str
    missed: bool = False


def scan_folder(
    root: Path, rules: IgnoreRules, *, recursive: bool
) -> Iterator[InputFile | IgnoredFile]:
    """Walk a folder; only the names on the way down to one folder are held in memory at a time.

    The files of a folder come sorted by name, before those of its sub-folders. Links to files are
    followed, links to folders are not, since they can lead in a circle. What vanishes meanwhile is
    left out. A folder that cannot be listed is given as ignored, with the reason; a file that
    cannot be looked at is given all the same, so that it ends in a record.

    Args:
        root: the input folder.
        rules: what is an input.
        recursive: enter sub-folders.

    Raises:
        OSError: the root itself cannot be listed.
    """
    yield from _walk(root, "", rules, recursive=recursive)


def scan_subfolder(
    root: Path, folder: str, rules: IgnoreRules
) -> Iterator[InputFile | IgnoredFile]:
    """Walk one sub-folder and all below it, as `scan_folder` would; nothing where it is gone.

    Args:
        root: the input folder.
        folder: path relative to it, with forward slashes.
        rules: what is an input.
    """
    parts = folder.split("/")
    if not any(rules.reason_folder("/".join(parts[:n])) for n in range(1, len(parts) + 1)):
        yield from _walk(root, folder, rules, recursive=True)


def _walk(
    root: Path, start: str, rules: IgnoreRules, *, recursive: bool
) -> Iterator[InputFile | IgnoredFile]:
    # A stack and not recursion: folders may be nested deeper than Python's calls.
    ahead = [start]
    while ahead:
        folder = ahead.pop()
        reason = rules.reason_folder(folder) if folder else None
        if folder and not recursive:
            reason = "a sub-folder, and recursion is off"
        if reason is not None:
            yield IgnoredFile(folder, reason)
            continue
        try:
            with os.scandir(root / folder) as listing:
                entries = sorted(listing, key=lambda entry: entry.name)
        except FileNotFoundError:
            if not folder:
                raise
            continue
        except OSError as error:
            if not folder:
                raise
            yield IgnoredFile(folder, f"cannot be listed: {error.strerror}", missed=True)
            continue
        prefix = folder and folder + "/"
        folders = []
        for entry in entries:
            if entry.is_dir(follow_symlinks=False):
                folders.append(prefix + entry.name)
            elif (found := _look_at(entry, prefix + entry.name, rules)) is not None:
                yield found
        ahead.extend(reversed(folders))


def _look_at(
    entry: os.DirEntry[str], image: str, rules: IgnoreRules
) -> InputFile | IgnoredFile | None:
    reason = rules.reason_file(image)
    if reason is not None and not entry.is_symlink():
        return IgnoredFile(image, reason)
    try:
        facts = entry.stat()  # of what a link leads to
    except OSError as error:
        if reason is not None:
            return IgnoredFile(image, reason)
        if entry.is_symlink() and error.errno in {errno.ENOENT, errno.ELOOP}:
            return IgnoredFile(image, "a link that leads nowhere", missed=True)
        if isinstance(error, FileNotFoundError):
            return None
        return InputFile(Path(entry.path), image, 0, 0)  # reading it will tell what is wrong
    if stat.S_ISDIR(facts.st_mode):
        reason = "a link to a folder"
    elif reason is None and not stat.S_ISREG(facts.st_mode):
        reason = "not a regular file"
    if reason is not None:
        return IgnoredFile(image, reason)
    return InputFile(Path(entry.path), image, facts.st_size, facts.st_mtime_ns)
