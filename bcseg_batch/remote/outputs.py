"""Outputs in a store of objects, each written whole by one request."""

from __future__ import annotations

import contextlib
import hashlib
import tempfile
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from pathlib import Path
from typing import IO

from bcseg_batch.errors import StorageError, UnsupportedImageError
from bcseg_batch.remote.bucket import Bucket
from bcseg_batch.remote.url import NOT_PLAIN, Url, is_plain

# Of keys in all three stores.
_KEY_BYTES = 1024
# Small files that are read at once: the time goes into waiting for the store.
_READ_AT_ONCE = 16


class RemoteOutputs:
    """Outputs in a store of objects. Safe to call from workers; copies open it anew.

    Args:
        url: the place.
        check: called before each write; raises where this run may write no longer.

    Raises:
        SettingsError: the library for this kind of store is not installed.
        StorageError: the environment has no usable credentials.
    """

    def __init__(self, url: Url, check: Callable[[], None] = lambda: None) -> None:
        self.bucket = Bucket(url)
        self._check = check
        self._there = _Existing(self.bucket)
        self._hashes: dict[str, str] = {}

    def __reduce__(self) -> tuple[type[RemoteOutputs], tuple[Url]]:
        return RemoteOutputs, (self.bucket.url,)

    def write(self, relative: str, data: bytes) -> None:
        """Write one output, whole or not at all.

        Raises:
            StorageError: the store cannot be reached, or refuses.
            UnsupportedImageError: the name is too long.
        """
        self._check_name(relative)
        self._check()
        self.bucket.write(relative, data)
        self._there.note(relative, is_there=bool(data))

    @contextlib.contextmanager
    def open(self, relative: str) -> Iterator[IO[bytes]]:
        """Write one output piece by piece; it is sent when the block ends well.

        Raises:
            StorageError: the store cannot be reached or refuses, or there is no space here.
            UnsupportedImageError: the name is too long.
        """
        self._check_name(relative)
        with contextlib.ExitStack() as files:
            try:
                file = files.enter_context(tempfile.NamedTemporaryFile(prefix="bcseg-batch-"))
                yield file
                file.flush()
                file.seek(0)
                digest = hashlib.file_digest(file, "sha256").hexdigest()
            except OSError as error:
                raise StorageError(
                    f"cannot write to the passing folder {tempfile.gettempdir()!r}: "
                    f"{error.strerror}: free some space, or set TMPDIR to another folder"
                ) from error
            self._check()
            self.bucket.upload(relative, Path(file.name))
        self._hashes[relative] = digest
        self._there.note(relative, is_there=True)

    def sha256(self, relative: str) -> str:
        """Give the SHA-256 of an output, hexadecimal: of what was sent, or else of what is there.

        Raises:
            StorageError: it cannot be read.
        """
        known = self._hashes.pop(relative, None)
        if known is not None:
            return known
        try:
            return hashlib.sha256(self.bucket.read(relative)).hexdigest()
        except FileNotFoundError as error:
            raise StorageError(
                f"{self.bucket.url}: {relative!r} is gone: run again to make it anew"
            ) from error

    def sync(self) -> None:
        """Do nothing: a store has what it has answered for."""

    def exists(self, relative: str) -> bool:
        """Say whether an output is there and is not empty."""
        return relative in self._there

    def remove(self, relative: str) -> None:
        """Take away an output; a missing one is no error."""
        self._check()
        self.bucket.delete(relative)
        self._there.note(relative, is_there=False)

    def read_all(self, relatives: Iterable[str]) -> Iterator[bytes]:
        """Give the content of many small outputs in their order; a missing one is left out.

        Raises:
            StorageError: the store cannot be reached, or refuses.
        """
        wanted = iter(relatives)
        with ThreadPoolExecutor(_READ_AT_ONCE, thread_name_prefix="bcseg-read") as pool:
            while ahead := list(islice(wanted, 4 * _READ_AT_ONCE)):
                for content in pool.map(self._read, ahead):
                    if content is not None:
                        yield content

    def _read(self, relative: str) -> bytes | None:
        try:
            return self.bucket.read(relative)
        except FileNotFoundError:
            return None

    def _check_name(self, relative: str) -> None:
        if len(self.bucket.url.key(relative).encode()) > _KEY_BYTES:
            raise UnsupportedImageError(
                f"the output name {relative!r} is longer than the {_KEY_BYTES} bytes of a key: "
                "give the input a shorter name"
            )
        if not is_plain(relative):
            raise UnsupportedImageError(
                f"the output name {relative!r} has {NOT_PLAIN}: rename the input"
            )


class _Existing:
    """Answers whether outputs exist, of which a run asks one after the other, for every image.

    Names are asked for nearly in the order of the keys, so that one page of a listing answers for
    some hundred images: a thousandth of the requests.
    """

    def __init__(self, bucket: Bucket) -> None:
        self._bucket = bucket
        self._windows: dict[str, _Window] = {}
        self._lock = threading.Lock()

    def __contains__(self, relative: str) -> bool:
        if not self._bucket.starts_after:
            return self._is_full(relative)
        folder = relative.partition("/")[0]
        with self._lock:
            window = self._windows.get(folder)
            if window is None or not window.covers(relative):
                window = self._windows[folder] = self._window(folder, relative)
            if window.covers(relative):
                return relative in window.names
        # A store that begins its listings at the beginning, whatever it is asked.
        return self._is_full(relative)

    def _is_full(self, relative: str) -> bool:
        found = self._bucket.head(relative)
        return found is not None and found.size_bytes > 0

    def note(self, relative: str, *, is_there: bool) -> None:
        """Take down what this run has written or removed."""
        with self._lock:
            window = self._windows.get(relative.partition("/")[0])
            if window is not None:
                (window.names.add if is_there else window.names.discard)(relative)

    def _window(self, folder: str, relative: str) -> _Window:
        # What is without its last letter comes just before it.
        page = self._bucket.page(folder, after=relative[:-1])
        names = [self._bucket.url.relative(found.key) for found in page.objects]
        full = {n for n, found in zip(names, page.objects, strict=True) if found.size_bytes > 0}
        return _Window(relative[:-1], names[-1] if page.token and names else None, full)


class _Window:
    """The names between two, the first excluded; up to the end where there is no last."""

    def __init__(self, after: str, last: str | None, names: set[str]) -> None:
        self._after = after
        self._last = last
        self.names = names

    def covers(self, relative: str) -> bool:
        """Say whether the window knows of a name."""
        return self._after < relative and (self._last is None or relative <= self._last)
