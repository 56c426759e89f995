"""Lets one run at a time write to a place in a store, which has no locks.

The run keeps a small object there and writes it anew now and then. One that has not been renewed
for the time of a lease is of a dead run, and is taken over; on the same machine at once.
Clocks may differ by less than that time. Should two runs hold it all the same (a machine that slept
through its lease), neither can commit records that the other has: see `remote.records`.
"""

from __future__ import annotations

import json
import os
import platform
import threading
import time
import uuid
from pathlib import Path
from typing import Any

from bcseg_batch.errors import StorageError, UsageError
from bcseg_batch.remote.bucket import Bucket

LEASE_S = 120.0
_RENEWALS = 6


class Lease:
    """The right to write to a place, held from `take` to `close`.

    Args:
        bucket: the place.
        name: of the object.
        lease_s: how long a holder that says nothing is waited for.
    """

    def __init__(self, bucket: Bucket, name: str, *, lease_s: float = LEASE_S) -> None:
        self._bucket = bucket
        self._name = name
        self._lease_s = lease_s
        self._mine = {"machine": _machine(), "process": os.getpid(), "token": uuid.uuid4().hex}
        self._renewed_s = 0.0
        self._is_taken_away = False
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._keep, name="bcseg-lease", daemon=True)

    def take(self) -> None:
        """Take the place, and keep it.

        Raises:
            UsageError: another run has it.
            StorageError: the store cannot be reached, or refuses.
        """
        # Looked at first, for stores that write over what is there even where they are told not to.
        self._clear_away()
        try:
            self._bucket.write(self._name, self._content, exclusive=True)
        except FileExistsError as error:
            raise UsageError(
                f"{self._bucket.url} is being written by another run, which began with this one: "
                "wait for it"
            ) from error
        self._renewed_s = time.monotonic()
        self._thread.start()

    def check(self) -> None:
        """Make sure that the place is still held.

        Raises:
            StorageError: it is not: another run may be writing there.
        """
        if self._is_taken_away or time.monotonic() - self._renewed_s > self._lease_s:
            raise StorageError(
                f"{self._bucket.url} is no longer held by this run, since another has taken it or "
                "the store was away for too long: run again when no other does"
            )

    def close(self) -> None:
        """Let the next run in."""
        self._over.set()
        if self._thread.is_alive():
            self._thread.join()
        try:
            if self._is_mine():
                self._bucket.delete(self._name)
        except StorageError:
            pass  # it runs out by itself

    def __enter__(self) -> Lease:
        self.take()
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def _content(self) -> bytes:
        return (json.dumps(self._mine) + "\n").encode()

    def _keep(self) -> None:
        while not self._over.wait(self._lease_s / _RENEWALS):
            try:
                if not self._is_mine():
                    self._is_taken_away = True
                    return
                self._bucket.write(self._name, self._content)
            except StorageError:
                continue  # `check` says so, where it goes on for too long
            self._renewed_s = time.monotonic()

    def _is_mine(self) -> bool:
        return self._holder().get("token") == self._mine["token"]

    def _holder(self) -> dict[str, Any]:
        try:
            holder = json.loads(self._bucket.read(self._name))
        except (FileNotFoundError, ValueError):
            return {}
        return holder if isinstance(holder, dict) else {}

    def _clear_away(self) -> None:
        """Delete what a dead run has left.

        Raises:
            UsageError: the holder lives, as far as can be seen.
        """
        holder, found = self._holder(), self._bucket.head(self._name)
        if found is None:
            return
        silent_s = time.time() - found.mtime_ns / 1e9
        here = holder.get("machine") == self._mine["machine"]
        if silent_s <= self._lease_s and not (here and not _lives(holder.get("process"))):
            host = str(holder.get("machine", "unknown")).partition(" ")[0]
            raise UsageError(
                f"{self._bucket.url} is being written by another run (process "
                f"{holder.get('process')} on {host}, heard of {max(0, silent_s):.0f} s ago): wait "
                f"for it, or {self._lease_s:.0f} s after it has died, or name another output"
            )
        self._bucket.delete(self._name)


def _machine() -> str:
    """Name what process numbers are unique in: host, boot, and container."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
        space = str(Path("/proc/self/ns/pid").readlink())
    except OSError:
        boot = space = "unknown"
    return f"{platform.node()} {boot} {space}"


def _lives(process: object) -> bool:
    if not isinstance(process, int) or process <= 0:
        return True
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return True
