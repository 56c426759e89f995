"""The ledger's file: opened, checked, brought to this version, its errors put into sentences."""

from __future__ import annotations

import contextlib
import sqlite3
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Literal

from bcseg_batch.errors import BcsegError, OutputError, SettingsError

# Says in the file's header that it is ours: "BCSG".
_APPLICATION_ID = 0x42435347
_BUSY_TIMEOUT_S = 10.0
_CACHE_KIB = 16 * 1024
_WAL_LIMIT_BYTES = 64 * 1024 * 1024

Mode = Literal["create", "write", "read"]
"""Make or migrate the file; write to one that is there and up to date; or only read that."""


def open_database(path: Path, mode: Mode) -> sqlite3.Connection:
    """Open a ledger's file, checked and in the latest version.

    Args:
        path: the file.
        mode: what may be done to it.

    Returns:
        The file, without implicit transactions: see `transaction`.

    Raises:
        SettingsError: it is missing, damaged, of another program or version, or misplaced.
        OutputError: the disk is full, or it may not be opened or written.
    """
    _check_place(path, mode)
    with explained(path):
        db = _connect(path, mode)
        try:
            _check_owner(db, path)
            if mode == "create":
                _use_write_ahead_log(db, path)
            elif _version(db) < len(MIGRATIONS):
                raise SettingsError(
                    f"{path} is of an older version: start the daemon once, which brings it up "
                    "to date"
                )
            migrate(db, path, MIGRATIONS)
        except BaseException:
            db.close()
            raise
    return db


@contextlib.contextmanager
def explained(path: Path) -> Iterator[None]:
    """Turn the errors of SQLite within into those of `open_database`."""
    try:
        yield
    except sqlite3.DatabaseError as error:
        raise _explain(path, error) from error


@contextlib.contextmanager
def transaction(db: sqlite3.Connection, kind: Literal["IMMEDIATE", "DEFERRED"]) -> Iterator[None]:
    """Do what is within as one, or not at all.

    Args:
        db: the file.
        kind: `IMMEDIATE` to write, `DEFERRED` to read one and the same state throughout.
    """
    db.execute(f"BEGIN {kind}")
    try:
        yield
        db.execute("COMMIT")
    except BaseException:
        # Some errors, such as a full disk, have rolled back by themselves.
        if db.in_transaction:
            db.execute("ROLLBACK")
        raise


def migrate(
    db: sqlite3.Connection,
    path: Path,
    steps: Sequence[Callable[[sqlite3.Connection], None]],
) -> None:
    """Bring a file to the latest version, each step whole or not at all.

    Args:
        db: the file, open.
        path: its path, for the error.
        steps: step number n leads from version n to n + 1; version 0 is an empty file.

    Raises:
        SettingsError: the file is of a newer version.
    """
    while (version := _version(db)) < len(steps):
        with transaction(db, "IMMEDIATE"):
            # Asked again, now that nobody else can be at it.
            if _version(db) == version:
                steps[version](db)
                db.execute(f"PRAGMA user_version = {version + 1}")
    if version > len(steps):
        raise SettingsError(
            f"{path} is of version {version}, written by a newer bcseg-batch; this one knows "
            f"version {len(steps)}: install the newer one, or name another state directory"
        )


def _version_1(db: sqlite3.Connection) -> None:
    db.execute(f"PRAGMA application_id = {_APPLICATION_ID}")
    # What shapes the outputs: a handful of rows, instead of two hashes beside each image.
    db.execute(
        """
        CREATE TABLE recipes (
            id INTEGER PRIMARY KEY,
            model_sha256 TEXT NOT NULL,
            settings_sha256 TEXT NOT NULL,
            UNIQUE (model_sha256, settings_sha256)
        )
        """
    )
    db.execute(
        """
        CREATE TABLE images (
            id INTEGER PRIMARY KEY,
            image BLOB NOT NULL UNIQUE,
            state TEXT NOT NULL CHECK (state IN ('pending', 'processing', 'done', 'failed')),
            size_bytes INTEGER NOT NULL,
            mtime_ns INTEGER NOT NULL,
            sha256 TEXT,
            recipe INTEGER NOT NULL REFERENCES recipes (id),
            attempts INTEGER NOT NULL DEFAULT 0 CHECK (attempts >= 0),
            solo_attempts INTEGER NOT NULL DEFAULT 0
                CHECK (solo_attempts BETWEEN 0 AND attempts),
            solo INTEGER NOT NULL DEFAULT 0,      -- in flight alone
            suspect INTEGER NOT NULL DEFAULT 0,   -- was in flight when a process died
            name BLOB,                            -- output name without its ending
            name_key BLOB UNIQUE,                 -- names of one key are one file somewhere
            first_seen_s REAL NOT NULL,           -- times are seconds since 1970
            queued_at_s REAL NOT NULL,
            started_at_s REAL,
            finished_at_s REAL,
            action TEXT,                          -- what is still to be done with the input
            target BLOB
        )
        """
    )
    # Apart from the images, so that looking those up touches few pages.
    db.execute(
        """
        CREATE TABLE records (
            id INTEGER PRIMARY KEY REFERENCES images (id) ON DELETE CASCADE,
            record TEXT NOT NULL,
            exported INTEGER NOT NULL DEFAULT 0,
            finished_at_s REAL NOT NULL
        )
        """
    )
    db.execute("CREATE INDEX images_by_state ON images (state, finished_at_s)")
    db.execute("CREATE INDEX images_waiting ON images (queued_at_s) WHERE state = 'pending'")
    db.execute(
        "CREATE INDEX images_suspect ON images (solo_attempts, queued_at_s) WHERE suspect = 1"
    )
    db.execute("CREATE INDEX images_to_dispose ON images (id) WHERE action IS NOT NULL")
    db.execute("CREATE INDEX records_to_export ON records (finished_at_s) WHERE exported = 0")


MIGRATIONS: tuple[Callable[[sqlite3.Connection], None], ...] = (_version_1,)
"""What leads from each version of the file to the next; only ever added to."""


def _check_place(path: Path, mode: Mode) -> None:
    try:
        regular = path.is_file()
        missing = not regular and not path.exists()
        housed = path.parent.is_dir()
    except OSError as error:
        raise OutputError(
            f"cannot open the ledger {path}: {error.strerror}: give this user the right to open "
            "it and its folder"
        ) from error
    if missing and mode != "create":
        raise SettingsError(
            f"there is no ledger {path}: name the state directory of a daemon that has run"
        )
    if not housed:
        raise SettingsError(
            f"the state directory {path.parent} does not exist: make it, or name another"
        )
    if not regular and not missing:
        raise SettingsError(f"{path} is no regular file: move it away, or name another directory")


def _connect(path: Path, mode: Mode) -> sqlite3.Connection:
    rights = {"create": "rwc", "write": "rw", "read": "ro"}[mode]
    uri = f"{path.absolute().as_uri()}?mode={rights}"
    if mode == "read" and not path.with_name(f"{path.name}-wal").exists():
        # Nobody has it open. To read it the usual way would need the right to write beside it.
        uri += "&immutable=1"
    db = sqlite3.connect(uri, uri=True, timeout=_BUSY_TIMEOUT_S, isolation_level=None)
    db.execute(f"PRAGMA cache_size = -{_CACHE_KIB}")
    db.execute("PRAGMA synchronous = FULL")
    db.execute("PRAGMA foreign_keys = ON")
    return db


def _check_owner(db: sqlite3.Connection, path: Path) -> None:
    (application,) = db.execute("PRAGMA application_id").fetchone()
    (tables,) = db.execute("SELECT count(*) FROM sqlite_master").fetchone()
    if application != _APPLICATION_ID and tables:
        raise SettingsError(
            f"{path} is the database of another program: name another state directory"
        )


def _use_write_ahead_log(db: sqlite3.Connection, path: Path) -> None:
    (mode,) = db.execute("PRAGMA journal_mode = WAL").fetchone()
    if mode != "wal":
        raise _misplaced(path, f"it stays in mode {mode}")
    db.execute(f"PRAGMA journal_size_limit = {_WAL_LIMIT_BYTES}")


def _version(db: sqlite3.Connection) -> int:
    (version,) = db.execute("PRAGMA user_version").fetchone()
    return int(version)


def _explain(path: Path, error: sqlite3.DatabaseError) -> BcsegError:
    """Turn an error of SQLite into a sentence that says what to do."""
    name = getattr(error, "sqlite_errorname", "")
    if name.startswith(("SQLITE_CORRUPT", "SQLITE_NOTADB")):
        return SettingsError(
            f"{path} is damaged or no ledger ({error}): move it and its -wal and -shm files away "
            "and start again; images are then done anew"
        )
    if name.startswith(("SQLITE_IOERR_LOCK", "SQLITE_IOERR_SHM", "SQLITE_PROTOCOL")):
        return _misplaced(path, str(error))
    advice = {
        "SQLITE_FULL": "free some space",
        "SQLITE_BUSY": "end the program that keeps it locked",
        "SQLITE_READONLY": "give this user the right to write it and its folder",
        "SQLITE_CANTOPEN": "give this user the right to open it and its folder",
        "SQLITE_IOERR": "look at the disk",
    }
    for start, what in advice.items():
        if name.startswith(start):
            return OutputError(f"cannot use the ledger {path}: {error}: {what}")
    raise error  # any other is a mistake in this module, and shows its traceback


def _misplaced(path: Path, cause: str) -> SettingsError:
    return SettingsError(
        f"{path} lies on a file system that cannot hold a ledger, such as a network share "
        f"({cause}): name a state directory on a local disk"
    )
