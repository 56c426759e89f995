"""Walks the input folder in an order that never changes."""

from __future__ import annotations

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
    """

    image: str
    reason: str


def scan_folder(
    root: Path, rules: IgnoreRules, *, recursive: bool
) -> Iterator[InputFile | IgnoredFile]:
    """Walk a folder; only one folder's names are held in memory at a time.

    The files of a folder come sorted by name, before those of its sub-folders. Links to files are
    followed, links to folders are not, since they can lead in a circle. What vanishes meanwhile is
    left out; what cannot be looked into is given as ignored, with the reason.

    Args:
        root: the input folder.
        rules: what is an input.
        recursive: enter sub-folders.

    Raises:
        OSError: the root itself cannot be listed.
    """
    yield from _scan(root, "", rules, recursive=recursive)


def _scan(
    folder: Path, prefix: str, rules: IgnoreRules, *, recursive: bool
) -> Iterator[InputFile | IgnoredFile]:
    try:
        with os.scandir(folder) as listing:
            entries = sorted(listing, key=lambda entry: entry.name)
    except OSError as error:
        if not prefix:
            raise
        if not isinstance(error, FileNotFoundError):
            yield IgnoredFile(prefix.rstrip("/"), f"cannot be listed: {error.strerror}")
        return
    folders: list[os.DirEntry[str]] = []
    for entry in entries:
        if entry.is_dir(follow_symlinks=False):
            folders.append(entry)
        elif (found := _look_at(entry, prefix + entry.name, rules)) is not None:
            yield found
    for entry in folders:
        image = prefix + entry.name
        reason = rules.reason_folder(image) if recursive else "a sub-folder, and recursion is off"
        if reason is not None:
            yield IgnoredFile(image, reason)
        else:
            yield from _scan(Path(entry.path), image + "/", rules, recursive=recursive)


def _look_at(
    entry: os.DirEntry[str], image: str, rules: IgnoreRules
) -> InputFile | IgnoredFile | None:
    reason = rules.reason_file(image)
    if reason is not None:
        return IgnoredFile(image, reason)
    try:
        facts = entry.stat()  # of what a link leads to
    except FileNotFoundError:
        return IgnoredFile(image, "a link that leads nowhere") if entry.is_symlink() else None
    except OSError as error:
        return IgnoredFile(image, f"cannot be looked at: {error.strerror}")
    if stat.S_ISREG(facts.st_mode):
        return InputFile(Path(entry.path), image, facts.st_size, facts.st_mtime_ns)
    if stat.S_ISDIR(facts.st_mode):
        return IgnoredFile(image, "a link to a folder")
    return IgnoredFile(image, "not a regular file")
