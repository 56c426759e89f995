"""Lets one process at a time into a folder."""

from __future__ import annotations

import errno
import fcntl
import os
import time
from pathlib import Path
from typing import IO

from bcseg_batch.errors import UsageError


def take_lock(path: Path, what: str, *, shared: bool = False) -> IO[str]:
    """Lock a folder by a file in it, until the file given back is closed or the process dies.

    The kernel lets go of the lock however the process ends, so that none is ever left behind. The
    file itself stays: to remove it would let a third process lock a file that nobody else sees.

    Args:
        path: the lock file; made where it is missing.
        what: the kind of folder it stands in, for the error, such as `output folder`.
        shared: let others in that share it too, and keep out those that do not.

    Returns:
        The open file, which holds the number of this process; nothing where it is shared.

    Raises:
        UsageError: another process has it.
        OSError: the file cannot be made or written.
    """
    file = path.open("a+", encoding="utf-8")
    try:
        _lock(file, fcntl.LOCK_SH if shared else fcntl.LOCK_EX)
    except BlockingIOError as error:
        file.seek(0)
        number = file.read().strip()
        file.close()
        holder = f"another run (process {number})" if number else "other runs"
        raise UsageError(
            f"{path.parent} is being written by {holder}: wait for it, or name another {what}"
        ) from error
    except OSError as error:
        # Without locks (some network file systems) two runs are the user's own lookout.
        if error.errno not in {errno.ENOTSUP, errno.ENOLCK, errno.ENOSYS}:
            file.close()
            raise
    file.seek(0)
    file.truncate()
    if not shared:
        file.write(f"{os.getpid()}\n")
    file.flush()
    return file


def _lock(file: IO[str], kind: int) -> None:
    """Lock, trying for a moment: `is_locked` holds the lock for microseconds."""
    for _ in range(4):
        try:
            fcntl.flock(file, kind | fcntl.LOCK_NB)
        except BlockingIOError:
            time.sleep(0.05)
        else:
            return
    fcntl.flock(file, kind | fcntl.LOCK_NB)


def is_locked(path: Path) -> bool:
    """Say whether a process has a lock file; it is left as it is."""
    try:
        with path.open("rb") as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:
        return False
    return False
