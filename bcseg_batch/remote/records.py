"""The records of a run whose outputs lie in a store, where no object can be appended to.

While the run goes on they are appended to a file of this machine, and every few seconds what is new
is sent as an object of its own: `results.jsonl.parts/<offset>`, named by where its bytes belong in
the whole. A part is written once and never over: two runs cannot both continue the same records. At
the end the whole goes to `results.jsonl`, and the parts, all of it by then, are deleted. A run that
was killed between any two steps leaves a whole and parts that make up the records again: a part
that the whole has already is known by its offset.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

from bcseg_batch.errors import StorageError
from bcseg_batch.remote.bucket import Bucket

COMMIT_EVERY_S = 10.0


class RemoteRecords:
    """One file of records in a store, continued in a folder of this machine.

    Args:
        bucket: the place.
        folder: of this machine.
        name: of the file, such as `results.jsonl`.
        check: called before each commit; raises where this run may write no longer.
        every_s: how often new records are committed.
        clock: gives seconds.
    """

    def __init__(
        self,
        bucket: Bucket,
        folder: Path,
        name: str,
        *,
        check: Callable[[], None] = lambda: None,
        every_s: float = COMMIT_EVERY_S,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._bucket = bucket
        self._path = folder / name
        self._name = name
        self._check = check
        self._every_s = every_s
        self._clock = clock
        self._committed_bytes = 0
        self._committed_s = clock()
        self._parts: list[str] = []

    @property
    def is_whole(self) -> bool:
        """Whether the store's own file holds all records already."""
        return not self._parts and self._path.stat().st_size == self._committed_bytes

    def load(self) -> None:
        """Bring the records here: the whole, and the parts that are not in it yet.

        Raises:
            StorageError: the store cannot be reached or refuses, or a part is missing.
        """
        try:
            self._bucket.download(self._name, self._path)
        except FileNotFoundError:
            self._path.write_bytes(b"")
        with self._path.open("ab") as file:
            for found in self._bucket.list(f"{self._name}.parts/"):
                if isinstance(found, str):
                    continue
                part = self._bucket.url.relative(found.key)
                offset_bytes = _offset(part)
                if offset_bytes is None:
                    continue
                self._parts.append(part)
                if offset_bytes < file.tell():
                    continue  # the whole was sent, and its parts were not deleted any more
                if offset_bytes > file.tell():
                    raise StorageError(
                        f"{self._bucket.url}: records are missing before {part!r}: bring "
                        f"{self._name} back, or delete the parts to have their images done again"
                    )
                file.write(self._bucket.read(part))
            self._committed_bytes = file.tell()

    def commit(self) -> None:
        """Make all records up to now last.

        Raises:
            StorageError: the store cannot be reached or refuses, or another run writes there.
        """
        with self._path.open("rb") as file:
            file.seek(self._committed_bytes)
            new = file.read()
        self._committed_s = self._clock()
        if not new:
            return
        self._check()
        part = f"{self._name}.parts/{self._committed_bytes:015d}"
        try:
            self._bucket.write(part, new, exclusive=True)
        except FileExistsError as error:
            # Our own, where the answer to it was lost and the request sent again.
            if self._bucket.read(part) != new:
                raise StorageError(
                    f"another run writes to {self._bucket.url}: end it, then run again"
                ) from error
        self._parts.append(part)
        self._committed_bytes += len(new)

    def commit_now_and_then(self) -> None:
        """Commit where the last time was long enough ago."""
        if self._clock() - self._committed_s >= self._every_s:
            self.commit()

    def publish(self) -> None:
        """Send the whole, and delete the parts it is made of.

        Raises:
            StorageError: the store cannot be reached or refuses.
        """
        self.commit()
        if not self._parts:
            return
        self._check()
        self._bucket.upload(self._name, self._path)
        for part in self._parts:
            self._bucket.delete(part)
        self._parts.clear()


def _offset(part: str) -> int | None:
    """Read where a part belongs; None where somebody has put another object there."""
    digits = part.rpartition("/")[2]
    return int(digits) if digits.isascii() and digits.isdecimal() else None
