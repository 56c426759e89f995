"""The output of a run: where files and records go, and how what was recorded is made to last."""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Protocol

from bcseg_batch.errors import UsageError
from bcseg_batch.remote.lease import Lease
from bcseg_batch.remote.outputs import RemoteOutputs
from bcseg_batch.remote.records import RemoteRecords
from bcseg_batch.remote.url import Place, Url
from bcseg_batch.service.places import Outputs
from bcseg_batch.service.shards import merge_shards
from bcseg_batch.store.cell_table import CELLS_NAME, read_tables
from bcseg_batch.store.outputs import LOCK_NAME, OutputFolder
from bcseg_batch.store.results import CSV_NAME
from bcseg_batch.store.shards import JSONL_NAME, Shard

_TABLES = (CSV_NAME, CELLS_NAME, "results.parquet", "cells.parquet")


class Destination(Protocol):
    """A place that this run alone writes to.

    Attributes:
        outputs: takes the files of the images.
        folder: of this machine, in which records and tables are kept.
        is_far: whether what lies there has to be fetched.
    """

    outputs: Outputs
    folder: Path
    is_far: bool

    @property
    def is_whole(self) -> bool:
        """Whether the tables that lie there are of the same records already."""
        ...

    def read_tables(self, relatives: Iterable[str]) -> Iterator[bytes]:
        """Give the content of images' tables, in their order; a missing one is left out."""
        ...

    def commit(self) -> None:
        """Make the records up to now last, before their images' files are written over."""
        ...

    def recorded(self) -> None:
        """Be told of one more record."""
        ...

    def publish(self) -> None:
        """Bring the records and the tables in `folder` to where they belong."""
        ...


class _Folder:
    """A folder: what is appended to it is there."""

    is_far = False
    is_whole = False

    def __init__(self, outputs: OutputFolder) -> None:
        self.outputs: Outputs = outputs
        self.folder = outputs.root

    def read_tables(self, relatives: Iterable[str]) -> Iterator[bytes]:
        return read_tables(self.folder, relatives)

    def commit(self) -> None:
        pass

    def recorded(self) -> None:
        pass

    def publish(self) -> None:
        pass


class _Store:
    """A place in a store, and a folder of this machine in which its records are continued."""

    is_far = True

    def __init__(self, outputs: RemoteOutputs, records: RemoteRecords, folder: Path) -> None:
        self.outputs: Outputs = outputs
        self.folder = folder
        self.read_tables = outputs.read_all
        self.commit = records.commit
        self.recorded = records.commit_now_and_then
        self._bucket = outputs.bucket
        self._records = records

    @property
    def is_whole(self) -> bool:
        return self._records.is_whole

    def publish(self) -> None:
        for name in _TABLES:
            if (self.folder / name).exists():
                self._bucket.upload(name, self.folder / name)
        # Last: as long as there are parts, the next run makes the tables again.
        self._records.publish()


@contextlib.contextmanager
def open_destination(output: Place, shard: Shard | None = None) -> Iterator[Destination]:
    """Open a place for the run that writes to it, and close it to all others.

    Args:
        output: the place; a folder is made where it is missing.
        shard: of the run, which lets the other shards in. Without, what shards have recorded there
            is merged first.

    Raises:
        UsageError: another run is writing there.
        OutputError: it cannot be written to.
        SettingsError: the library for this kind of store is not installed.
    """
    if not isinstance(output, Url):
        with OutputFolder(output, shard) as folder:
            if shard is None:
                merge_shards(folder.root)
            yield _Folder(folder)
        return
    if shard is not None:
        raise UsageError(
            f"--shard {shard} needs an output folder that all shards share, and {output} is none: "
            "name a folder of a share that every machine mounts"
        )
    with contextlib.ExitStack() as held:
        lease = Lease(RemoteOutputs(output).bucket, LOCK_NAME)
        held.enter_context(lease)
        outputs = RemoteOutputs(output, lease.check)
        here = Path(held.enter_context(tempfile.TemporaryDirectory(prefix="bcseg-batch-")))
        log = RemoteRecords(outputs.bucket, here, JSONL_NAME, check=lease.check)
        log.load()
        yield _Store(outputs, log, here)
