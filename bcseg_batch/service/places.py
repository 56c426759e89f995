"""Where photographs come from and where outputs go, whatever kind of storage that is."""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Protocol

from bcseg_batch.errors import UsageError
from bcseg_batch.intake.ignore import IgnoreRules
from bcseg_batch.intake.scan import IgnoredFile, of_all, scan_folder
from bcseg_batch.items import InputFile
from bcseg_batch.remote.inputs import RemoteInputs
from bcseg_batch.remote.url import Place, Url


class Fetch(Protocol):
    """Brings files to this machine; safe to call from several threads."""

    def fetch(self, file: InputFile) -> InputFile:
        """Give a file that lies on this machine, with the path at which it can be read.

        Raises:
            ImageError: it cannot be had.
            StorageError: none can be had at the moment.
        """
        ...

    def release(self, image: str) -> None:
        """Drop what `fetch` has made of a file; one that was never fetched is no error."""
        ...


class InPlace:
    """Leaves files where they are: on this machine, or on a share that is mounted here."""

    def fetch(self, file: InputFile) -> InputFile:
        """Give the file itself."""
        return file

    def release(self, image: str) -> None:
        """Do nothing: the file stays where it is."""


class Inputs(Fetch, Protocol):
    """A place with photographs."""

    def scan(self, rules: IgnoreRules, *, recursive: bool) -> Iterator[InputFile | IgnoredFile]:
        """Walk the place in an order that is the same from run to run.

        Raises:
            UsageError: it cannot be listed.
        """
        ...

    def look_again(self, image: str) -> InputFile | None:
        """Give a file as it is now; None where it is gone."""
        ...

    def sha256(self, file: InputFile) -> str | None:
        """Give the hash of a file's content, hexadecimal; None where it cannot be read."""
        ...


class Outputs(Protocol):
    """A place for outputs; `store.outputs.OutputFolder` is one. Safe to call from workers."""

    def write(self, relative: str, data: bytes) -> None:
        """Write one output, whole or not at all; `sync` makes its name last."""
        ...

    def open(self, relative: str) -> contextlib.AbstractContextManager[IO[bytes]]:
        """Write one output piece by piece; it has its name when the block ends well."""
        ...

    def sha256(self, relative: str) -> str:
        """Give the SHA-256 of an output, hexadecimal."""
        ...

    def sync(self) -> None:
        """Make the names of all that was written so far last."""
        ...

    def exists(self, relative: str) -> bool:
        """Say whether an output lies there and is not empty."""
        ...

    def remove(self, relative: str) -> None:
        """Take away an output; a missing one is no error."""
        ...


@contextlib.contextmanager
def open_inputs(source: Place, holds: Callable[[str], bool] = of_all) -> Iterator[Inputs]:
    """Open a place with photographs.

    Args:
        source: the place.
        holds: says by name which are wanted. A folder does not look at others; a store lists them
            all the same.

    Raises:
        UsageError: there is no such place in a store, or nothing in it.
        StorageError: the store cannot be reached, or refuses.
        SettingsError: the library for this kind of store is not installed.
    """
    if not isinstance(source, Url):
        yield LocalInputs(source, holds)
        return
    with RemoteInputs(source) as inputs:
        inputs.check()
        yield inputs


class LocalInputs(InPlace):
    """Photographs in a folder of this machine or of a share that is mounted here.

    Args:
        root: the folder.
        holds: says by name which are given; others are passed over.
    """

    def __init__(self, root: Path, holds: Callable[[str], bool] = of_all) -> None:
        self._root = root
        self._holds = holds

    def __reduce__(self) -> tuple[type[LocalInputs], tuple[Path]]:
        return LocalInputs, (self._root.absolute(),)

    def scan(self, rules: IgnoreRules, *, recursive: bool) -> Iterator[InputFile | IgnoredFile]:
        """Walk the folder."""
        try:
            yield from scan_folder(self._root, rules, recursive=recursive, holds=self._holds)
        except OSError as error:
            raise UsageError(
                f"the input folder {str(self._root)!r} cannot be listed: {error.strerror}: give "
                "this user the right to read it"
            ) from error

    def look_again(self, image: str) -> InputFile | None:
        """Give a file as it is now; None where it is gone."""
        path = self._root / image
        try:
            facts = path.stat()
        except OSError:
            return None
        return InputFile(path, image, facts.st_size, facts.st_mtime_ns)

    def sha256(self, file: InputFile) -> str | None:
        """Hash the file's content."""
        try:
            with file.path.open("rb") as content:
                return hashlib.file_digest(content, "sha256").hexdigest()
        except OSError:
            return None
