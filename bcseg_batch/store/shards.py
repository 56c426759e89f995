"""Parts of one input folder, each done by a run of its own: which images are whose, which files."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Collection
from dataclasses import dataclass
from pathlib import Path

from bcseg_batch.errors import UsageError
from bcseg_batch.store.names import name_root

JSONL_NAME = "results.jsonl"
_RECORDS = re.compile(r"results\.([1-9][0-9]*)-of-([1-9][0-9]*)\.jsonl")
_LOCK = re.compile(r"\.bcseg\.([1-9][0-9]*)-of-([1-9][0-9]*)\.lock")


@dataclass(frozen=True, slots=True, order=True)
class Shard:
    """One of `count` parts, numbered from 1.

    Attributes:
        count: how many parts there are.
        number: which of them this is, from 1 to `count`.
    """

    count: int
    number: int

    @classmethod
    def parse(cls, text: str) -> Shard:
        """Read `K/N`.

        Raises:
            UsageError: it is none.
        """
        parsed = re.fullmatch(r"\s*([0-9]+)\s*/\s*([0-9]+)\s*", text, re.ASCII)
        if parsed is None:
            raise UsageError(
                f"--shard takes K/N, such as 3/16 for the third of sixteen parts, not {text!r}: in "
                "a job array give this task's number and how many tasks there are"
            )
        number, count = map(int, parsed.groups())
        if number == 0:
            raise UsageError(
                f"--shard {number}/{count}: parts are numbered from 1: begin the job array at 1 "
                f"(--array=1-{max(1, count)}), or add 1 to its number in the script"
            )
        if number > count:
            raise UsageError(
                f"--shard {number}/{count}: there are {count} parts, and this would be the "
                f"{number}th: where only some tasks of a job array are started again, their number "
                "is no longer that of the parts: write it out"
            )
        return cls(count, number)

    def __str__(self) -> str:
        return f"{self.number}/{self.count}"

    @property
    def records_name(self) -> str:
        """Name of the file of its records."""
        return f"results.{self.number}-of-{self.count}.jsonl"

    @property
    def lock_name(self) -> str:
        """Name of the file that keeps a second run of it out."""
        return f".bcseg.{self.number}-of-{self.count}.lock"

    def part(self, suffixes: Collection[str]) -> Callable[[str], bool]:
        """Give what says of an image, by its name alone, whether it is in this part.

        Each image is in one part, the same on every machine and in every run. Images that could
        contend for an output name (`a.jpg`, `A.tif`, `a.jpg.tif`) are in one part, so that they
        get the names that a run without parts gives them.

        Args:
            suffixes: of inputs, as in `intake.ignore.IgnoreRules`.
        """
        root = name_root(suffixes)

        def holds(image: str) -> bool:
            key = root(image).encode("utf-8", "surrogatepass")
            digest = hashlib.blake2b(key, digest_size=8).digest()
            return int.from_bytes(digest) % self.count == self.number - 1

        return holds


def record_files(folder: Path) -> list[Path]:
    """Give the files of records that lie in an output folder: of whole runs first, then of shards.

    Raises:
        OSError: the folder cannot be listed.
    """
    whole = folder / JSONL_NAME
    return [whole, *shard_files(folder)] if whole.exists() else shard_files(folder)


def shard_files(folder: Path) -> list[Path]:
    """Give the files of shards' records, those first that were first written to the end.

    Raises:
        OSError: the folder cannot be listed.
    """
    found = [path for path in folder.iterdir() if shard_of(path) is not None]
    return sorted(found, key=lambda path: (path.stat().st_mtime_ns, path.name))


def shard_of(path: Path) -> Shard | None:
    """Tell by its name whose records a file holds; None where it holds no shard's."""
    return _shard(_RECORDS, path.name)


def shard_locks(folder: Path) -> dict[Shard, Path]:
    """Give the lock files of shards that have ever run.

    Raises:
        OSError: the folder cannot be listed.
    """
    found = {_shard(_LOCK, path.name): path for path in folder.iterdir()}
    return {shard: path for shard, path in sorted(found.items(), key=str) if shard is not None}


def _shard(pattern: re.Pattern[str], name: str) -> Shard | None:
    named = pattern.fullmatch(name)
    return None if named is None else Shard(int(named[2]), int(named[1]))
