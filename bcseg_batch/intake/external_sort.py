"""Sorts more names than should be held in memory: sorted pieces on disk, merged again."""

from __future__ import annotations

import heapq
import os
import tempfile
import weakref
from collections.abc import Iterator
from typing import IO

from bcseg_batch.errors import OutputError

_LENGTH_BYTES = 4
_READ_BYTES = 16 * 1024


class ExternalSort:
    """Takes byte strings in any order and gives them sorted, a bounded number of them in memory.

    Up to `held` of them never reach the disk. More go, sorted, to a passing file below TMPDIR that
    has no name, and are merged from there.

    Args:
        held: how many are held in memory.
    """

    def __init__(self, held: int = 20_000) -> None:
        self._held = held
        self._items: list[bytes] = []
        self._file: IO[bytes] | None = None
        self._pieces: list[tuple[int, int]] = []

    def add(self, item: bytes) -> None:
        """Take one in.

        Raises:
            OutputError: the disk with the passing files is full.
        """
        self._items.append(item)
        if len(self._items) > self._held:
            self._spill()

    def __bool__(self) -> bool:
        return bool(self._items or self._pieces)

    def __iter__(self) -> Iterator[bytes]:
        """Give all that was taken in, sorted; equal ones as often as they came."""
        self._items.sort()
        if not self._pieces:
            return iter(self._items)
        return heapq.merge(self._items, *map(self._read, self._pieces))

    def _spill(self) -> None:
        try:
            if self._file is None:
                self._file = tempfile.TemporaryFile(prefix="bcseg-")  # noqa: SIM115 - see below
                weakref.finalize(self, self._file.close)
            start_bytes = self._file.tell()
            for item in sorted(self._items):
                # Lengths and not line ends: a name may hold any byte.
                self._file.write(len(item).to_bytes(_LENGTH_BYTES) + item)
            self._file.flush()
            self._pieces.append((start_bytes, self._file.tell()))
        except OSError as error:
            raise OutputError(
                f"cannot sort the names of a large folder in {tempfile.gettempdir()}: "
                f"{error.strerror}: free some space there, or set TMPDIR to a folder with more, "
                "then run again"
            ) from error
        self._items.clear()

    def _read(self, piece: tuple[int, int]) -> Iterator[bytes]:
        assert self._file is not None
        offset_bytes, end_bytes = piece
        block, at = b"", 0
        while offset_bytes < end_bytes or at < len(block):
            begin = at + _LENGTH_BYTES
            end = begin + int.from_bytes(block[at:begin])
            if begin <= len(block) and end <= len(block):
                yield block[begin:end]
                at = end
            else:
                # Not by the file's own position, which all pieces would move.
                wanted = min(_READ_BYTES, end_bytes - offset_bytes)
                more = os.pread(self._file.fileno(), wanted, offset_bytes)
                assert more, "the file is as long as it was written"
                offset_bytes += len(more)
                block, at = block[at:] + more, 0
