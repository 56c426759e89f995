"""Walks the input folder in an order that never changes."""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from bcseg_batch.intake.external_sort import ExternalSort
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


# Ends a name, which holds no such byte, in a listing that is being sorted; sorts before all others.
_LINK, _NO_LINK = b"\0l", b"\0"


def of_all(_: str) -> bool:
    """Hold every name."""
    return True


def scan_folder(
    root: Path,
    rules: IgnoreRules,
    *,
    recursive: bool,
    holds: Callable[[str], bool] = of_all,
) -> Iterator[InputFile | IgnoredFile]:
    """Walk a folder, holding a bounded number of names in memory however many there are.

    The files of a folder come sorted by name, before those of its sub-folders. Links to files are
    followed, links to folders are not, since they can lead in a circle. What vanishes meanwhile is
    left out. A folder that cannot be listed is given as ignored, with the reason; a file that
    cannot be looked at is given all the same, so that it ends in a record.

    Args:
        root: the input folder.
        rules: what is an input.
        recursive: enter sub-folders.
        holds: says of files by name which are looked at; others are passed over in silence.

    Raises:
        OSError: the root itself cannot be listed.
        OutputError: a very large folder cannot be sorted, since the disk with passing files is
            full.
    """
    yield from _walk(root, "", rules, recursive=recursive, holds=holds)


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
        yield from _walk(root, folder, rules, recursive=True, holds=of_all)


def _walk(
    root: Path,
    start: str,
    rules: IgnoreRules,
    *,
    recursive: bool,
    holds: Callable[[str], bool],
) -> Iterator[InputFile | IgnoredFile]:
    # A stack and not recursion: folders may be nested deeper than Python's calls.
    ahead: list[Iterator[str]] = [iter([start])]
    while ahead:
        folder = next(ahead[-1], None)
        if folder is None:
            ahead.pop()
            continue
        reason = rules.reason_folder(folder) if folder else None
        if folder and not recursive:
            reason = "a sub-folder, and recursion is off"
        if reason is not None:
            yield IgnoredFile(folder, reason)
            continue
        place = root / folder
        try:
            files, folders = _list(place)
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
        for name, is_link in _names(files):
            if holds(prefix + name):
                path = os.path.join(place, name)  # noqa: PTH118 - a Path only where it is an input
                yield from _look_at(path, prefix + name, rules, is_link=is_link)
        if folders:
            ahead.append(_paths(prefix, folders))


def _list(place: Path) -> tuple[ExternalSort, ExternalSort]:
    """List a folder: its files and its sub-folders, in no order yet."""
    files, folders = ExternalSort(), ExternalSort()
    with os.scandir(place) as listing:
        for entry in listing:
            kind = _LINK if entry.is_symlink() else _NO_LINK
            names = folders if entry.is_dir(follow_symlinks=False) else files
            names.add(entry.name.encode("utf-8", "surrogatepass") + kind)
    return files, folders


def _names(entries: ExternalSort) -> Iterator[tuple[str, bool]]:
    for entry in entries:
        name, _, kind = entry.partition(_NO_LINK)
        yield name.decode("utf-8", "surrogatepass"), bool(kind)


def _paths(prefix: str, folders: ExternalSort) -> Iterator[str]:
    for name, _ in _names(folders):
        yield prefix + name


def _look_at(
    path: str, image: str, rules: IgnoreRules, *, is_link: bool
) -> Iterator[InputFile | IgnoredFile]:
    """Give what a file is; nothing where it has vanished."""
    reason = rules.reason_file(image)
    if reason is not None and not is_link:
        yield IgnoredFile(image, reason)
        return
    try:
        facts = os.stat(path)  # noqa: PTH116 - of what a link leads to; a Path costs more than the call
    except OSError as error:
        if reason is not None:
            yield IgnoredFile(image, reason)
        elif is_link and error.errno in {errno.ENOENT, errno.ELOOP}:
            yield IgnoredFile(image, "a link that leads nowhere", missed=True)
        elif not isinstance(error, FileNotFoundError):
            yield InputFile(Path(path), image, 0, 0)  # reading it will tell what is wrong
        return
    if stat.S_ISDIR(facts.st_mode):
        reason = "a link to a folder"
    elif reason is None and not stat.S_ISREG(facts.st_mode):
        reason = "not a regular file"
    if reason is not None:
        yield IgnoredFile(image, reason)
    else:
        yield InputFile(Path(path), image, facts.st_size, facts.st_mtime_ns)
