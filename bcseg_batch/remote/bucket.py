"""One place in a store of objects: list, read, write, delete, with errors that say what to do."""

from __future__ import annotations

import errno
import mimetypes
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from bcseg_batch.errors import BcsegError, StorageError, UsageError
from bcseg_batch.remote.dialects import DIALECTS, Page, StoredObject
from bcseg_batch.remote.url import Url

_KINDS = {".jsonl": "application/x-ndjson", ".parquet": "application/vnd.apache.parquet"}
_LOCAL_FULL = {errno.ENOSPC, errno.EDQUOT}


class Bucket:
    """The objects of one place. Safe to call from several threads; copies open it anew.

    Every request is tried again by the store's library where the store is busy or the network
    fails; what fails for good is a `StorageError`, for which no image is to blame.

    Args:
        url: the place.

    Raises:
        SettingsError: the library for this kind of store is not installed.
        StorageError: the environment has no usable credentials.
    """

    def __init__(self, url: Url) -> None:
        self.url = url
        self._dialect = DIALECTS[url.scheme]
        try:
            self._fs = self._dialect.file_system()
        except BcsegError:
            raise
        except Exception as error:
            raise self._explained(error) from error

    def __reduce__(self) -> tuple[type[Bucket], tuple[Url]]:
        return Bucket, (self.url,)

    @property
    def starts_after(self) -> bool:
        """Whether `page` can begin in the middle."""
        return self._dialect.starts_after

    def page(
        self, prefix: str = "", *, delimiter: str = "", token: str | None = None, after: str = ""
    ) -> Page:
        """List some keys; those of the page are whole keys, `prefix` and `after` relative ones.

        Raises:
            UsageError: there is no such bucket.
            StorageError: the store cannot be reached, or refuses.
        """
        url = self.url
        try:
            page: Page = self._call(
                self._dialect.page,
                self._fs,
                url.bucket,
                url.key(prefix),
                delimiter=delimiter,
                token=token,
                after=after and url.key(after),
            )
        except FileNotFoundError as error:
            raise self._no_bucket() from error
        return page

    def list(self, prefix: str = "", *, delimiter: str = "") -> Iterator[StoredObject | str]:
        """List objects, and folders where there is a delimiter, a page in memory at a time."""
        token = None
        while True:
            page = self.page(prefix, delimiter=delimiter, token=token)
            yield from page.folders
            yield from page.objects
            if (token := page.token) is None:
                return

    def head(self, relative: str) -> StoredObject | None:
        """Look at one object; None where there is none.

        Raises:
            StorageError: the store cannot be reached, or refuses.
        """
        key = self.url.key(relative)
        try:
            found: StoredObject = self._call(self._dialect.head, self._fs, self.url.bucket, key)
        except FileNotFoundError:
            return None
        return found

    def read(self, relative: str) -> bytes:
        """Give the content of an object.

        Raises:
            FileNotFoundError: there is none.
            StorageError: the store cannot be reached, or refuses.
        """
        content: bytes = self._call(self._fs.cat_file, self._path(relative))
        return content

    def download(self, relative: str, path: Path) -> None:
        """Write the content of an object to a file of this machine.

        Raises:
            FileNotFoundError: there is none.
            StorageError: the store cannot be reached, refuses, or the file cannot be written.
        """
        self._call(self._fs.get_file, self._path(relative), str(path))

    def write(self, relative: str, data: bytes, *, exclusive: bool = False) -> None:
        """Write an object; it is there whole or not at all.

        Args:
            relative: path below the place.
            data: the whole content.
            exclusive: only where there is none yet.

        Raises:
            FileExistsError: there is one, and `exclusive`.
            StorageError: the store cannot be reached, or refuses.
        """
        try:
            self._call(
                self._fs.pipe_file,
                self._path(relative),
                data,
                mode="create" if exclusive else "overwrite",
                **self._kind(relative),
            )
        except FileNotFoundError as error:
            raise self._gone() from error

    def upload(self, relative: str, path: Path) -> None:
        """Write a file of this machine as an object; it is there whole or not at all.

        Raises:
            StorageError: the store cannot be reached, or refuses.
        """
        try:
            self._call(self._fs.put_file, str(path), self._path(relative), **self._kind(relative))
        except FileNotFoundError as error:
            raise self._gone() from error

    def delete(self, relative: str) -> None:
        """Take away an object; a missing one is no error.

        Raises:
            StorageError: the store cannot be reached, or refuses.
        """
        try:
            self._call(self._fs.rm_file, self._path(relative))
        except FileNotFoundError:
            return

    def _path(self, relative: str) -> str:
        return f"{self.url.bucket}/{self.url.key(relative)}"

    def _kind(self, relative: str) -> dict[str, Any]:
        kind = _KINDS.get(Path(relative).suffix) or mimetypes.guess_type(relative)[0]
        return self._dialect.content_type(kind or "application/octet-stream")

    def _call(self, request: Any, *args: Any, **options: Any) -> Any:
        try:
            return request(*args, **options)
        except (FileNotFoundError, FileExistsError):
            raise
        # Each library, and what it stands on, has errors of its own; a request to a store is all
        # that happens in here.
        except Exception as error:
            if type(error).__name__ in _MISSING:
                raise FileNotFoundError(str(error)) from error
            raise self._explained(error) from error

    def _explained(self, error: Exception) -> StorageError:
        if isinstance(error, OSError) and error.errno in _LOCAL_FULL:
            return StorageError(
                f"no space for what is fetched from {self.url}: {error.strerror}: free some, or "
                "set TMPDIR to a folder with more, then run again"
            )
        name = type(error).__name__
        said = " ".join(str(error).split()).rstrip(".:") or name
        if isinstance(error, PermissionError) or "Credential" in name or "Auth" in name:
            advice = f"check the credentials and their rights ({self._dialect.credentials})"
        elif isinstance(error, ValueError):
            advice = f"look at the environment ({self._dialect.credentials})"
        else:
            advice = "see whether the store and the network are well"
        return StorageError(f"{self.url}: {said}: {advice}, then run again")

    def _no_bucket(self) -> UsageError:
        return UsageError(
            f"{self.url}: there is no bucket {self.url.bucket!r}: make it, or name another"
        )

    def _gone(self) -> StorageError:
        return StorageError(
            f"{self.url}: there is no bucket {self.url.bucket!r} (any more): make it, or name "
            "another, then run again"
        )


_MISSING = {"ResourceNotFoundError", "NoSuchBucket"}
