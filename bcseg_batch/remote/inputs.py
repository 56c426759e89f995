"""Photographs in a store of objects: listed page by page, fetched one by one."""

from __future__ import annotations

import hashlib
import os
import shutil
import tempfile
import threading
import weakref
from collections.abc import Iterator
from pathlib import Path

from bcseg_batch.errors import ImageChangedError, StorageError, UsageError
from bcseg_batch.intake.ignore import IgnoreRules
from bcseg_batch.intake.scan import IgnoredFile
from bcseg_batch.items import InputFile
from bcseg_batch.remote.bucket import Bucket
from bcseg_batch.remote.dialects import StoredObject
from bcseg_batch.remote.url import NOT_PLAIN, Url, is_plain

# Of names on the file systems in use; keys may be longer.
_NAME_BYTES = 255


class RemoteInputs:
    """Photographs in a store of objects. Safe to call from workers; copies open it anew.

    What is fetched lies in a passing folder of this process (below TMPDIR) until it is released:
    never more than the pipeline has in hand.

    Args:
        url: the place.

    Raises:
        SettingsError: the library for this kind of store is not installed.
        StorageError: the environment has no usable credentials.
    """

    def __init__(self, url: Url) -> None:
        self._bucket = Bucket(url)
        self._spool: Path | None = None
        self._lock = threading.Lock()

    def __reduce__(self) -> tuple[type[RemoteInputs], tuple[Url]]:
        return RemoteInputs, (self._bucket.url,)

    def check(self) -> None:
        """Refuse a place with nothing in it: a store does not tell an empty one from a slip.

        Raises:
            UsageError: there is no such bucket, or no object in the place.
            StorageError: the store cannot be reached, or refuses.
        """
        page = self._bucket.page()
        if not page.objects:
            raise UsageError(
                f"{self._bucket.url}: no object has a key that begins so: look at bucket and prefix"
            )

    def scan(self, rules: IgnoreRules, *, recursive: bool) -> Iterator[InputFile | IgnoredFile]:
        """List the place in the order of the keys, holding a page of them at a time.

        Raises:
            UsageError: there is no such bucket.
            StorageError: the store cannot be reached, or refuses.
        """
        url, told = self._bucket.url, ""
        for found in self._bucket.list(delimiter="" if recursive else "/"):
            if isinstance(found, str):
                folder = url.relative(found).rstrip("/")
                reason = rules.reason_folder(folder) or "a sub-folder, and recursion is off"
                yield IgnoredFile(folder, reason)
                continue
            image = url.relative(found.key)
            if not image or (image.endswith("/") and not found.size_bytes):
                continue  # what some programs write to show an empty folder
            if not is_plain(image):
                reason = f"its key has {NOT_PLAIN}: give it another"
                yield IgnoredFile(image, reason, missed=True)
            elif (refused := _ignored_folder(image, rules)) is not None:
                # Keys come in order, so that those of one folder come together: named once.
                if refused.image != told:
                    told = refused.image
                    yield refused
            elif (reason_file := rules.reason_file(image)) is not None:
                yield IgnoredFile(image, reason_file)
            else:
                yield _file(Path(image), image, found)

    def look_again(self, image: str) -> InputFile | None:
        """Give an object as it is now; None where it is gone."""
        found = self._bucket.head(image)
        return None if found is None else _file(Path(image), image, found)

    def sha256(self, file: InputFile) -> str | None:
        """Give the hash of an object's content; None where it has changed or is gone."""
        try:
            with self.fetch(file).path.open("rb") as content:
                return hashlib.file_digest(content, "sha256").hexdigest()
        except ImageChangedError:
            return None
        finally:
            self.release(file.image)

    def fetch(self, file: InputFile) -> InputFile:
        """Bring an object to this machine, with its time as the file's.

        Raises:
            ImageChangedError: it is gone, or another than was listed.
            StorageError: the store cannot be reached or refuses, or there is no space here.
        """
        path = self._path(file.image)
        fetched = InputFile(path, file.image, file.size_bytes, file.mtime_ns)
        if path.exists():  # of a fetch before this one that waited for room in memory
            return fetched
        part = path.with_name(".part")
        try:
            path.parent.mkdir(exist_ok=True)
            self._bucket.download(file.image, part)
            is_whole = part.stat().st_size == file.size_bytes
            os.utime(part, ns=(file.mtime_ns, file.mtime_ns))
        except FileNotFoundError as error:
            raise ImageChangedError(
                f"{file.image!r} vanished after it was listed: run again when it is there"
            ) from error
        except OSError as error:
            raise StorageError(
                f"cannot write to {path.parent}: {error.strerror}: set TMPDIR to another folder, "
                "then run again"
            ) from error
        # Asked afterwards: what was written over meanwhile, or twice within the same download.
        now = self._bucket.head(file.image)
        if not is_whole or now is None or _facts(now) != (file.size_bytes, file.mtime_ns):
            raise ImageChangedError(
                f"{file.image!r} was written over after it was listed: run again when it is whole"
            )
        part.rename(path)
        return fetched

    def release(self, image: str) -> None:
        """Delete what `fetch` brought here."""
        if self._spool is not None:
            shutil.rmtree(self._path(image).parent, ignore_errors=True)

    def close(self) -> None:
        """Delete all that `fetch` brought here."""
        with self._lock:
            if self._spool is not None:
                self._remove()
                self._spool = None

    def __enter__(self) -> RemoteInputs:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _path(self, image: str) -> Path:
        """Give where an object comes to lie: in a folder of its own, two keys may end alike."""
        with self._lock:
            if self._spool is None:
                try:
                    self._spool = Path(tempfile.mkdtemp(prefix="bcseg-batch-"))
                except OSError as error:
                    raise StorageError(
                        f"cannot make a passing folder: {error}: set TMPDIR to another folder"
                    ) from error
                self._remove = weakref.finalize(self, shutil.rmtree, self._spool, True)
        name = image.rpartition("/")[2]
        while len(name.encode()) > _NAME_BYTES:
            name = name[1:]  # the suffix says what it is
        return self._spool / hashlib.sha256(image.encode()).hexdigest()[:32] / name


def _facts(found: StoredObject) -> tuple[int, int]:
    return found.size_bytes, found.mtime_ns


def _file(path: Path, image: str, found: StoredObject) -> InputFile:
    return InputFile(path, image, *_facts(found))


def _ignored_folder(image: str, rules: IgnoreRules) -> IgnoredFile | None:
    """Give the first folder on the way to an image that is not to be entered."""
    parts = image.split("/")[:-1]
    for depth in range(1, len(parts) + 1):
        folder = "/".join(parts[:depth])
        if (reason := rules.reason_folder(folder)) is not None:
            return IgnoredFile(folder, reason)
    return None
