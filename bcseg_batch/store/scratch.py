"""A private database on disk for what would otherwise be one object in memory for each image."""

from __future__ import annotations

import contextlib
import sqlite3
import weakref
from collections.abc import Iterable, Iterator
from typing import Any

from bcseg_batch.errors import OutputError

Row = tuple[Any, ...]


class Scratch:
    """An SQLite database in a passing file that no other process sees, gone when it is closed.

    What fits into its small cache never reaches the disk; the rest goes to a file below TMPDIR, or
    where the system keeps such files. It is of no use after the run, and so never forced to disk.
    Safe to call from several threads.

    Args:
        schema: the statements that make its tables.

    Raises:
        OutputError: here and at every call, where the disk with the passing files is full.
    """

    _CACHE_KIB = 8 * 1024

    def __init__(self, schema: str) -> None:
        # The module serialises its calls; who feeds a run and who records it may be two threads.
        self._db = sqlite3.connect("", isolation_level=None, check_same_thread=False)
        self.close = weakref.finalize(self, self._db.close)
        with _explained():
            self._db.executescript(
                f"PRAGMA journal_mode = OFF; PRAGMA synchronous = OFF; "
                f"PRAGMA cache_size = -{self._CACHE_KIB}; {schema}"
            )

    def put(self, statement: str, row: Row) -> None:
        """Carry a statement out."""
        with _explained():
            self._db.execute(statement, row)

    def put_all(self, statement: str, rows: Iterable[Row]) -> None:
        """Carry a statement out for each of many rows, which are drawn one by one."""
        with _explained():
            self._db.execute("BEGIN")
            self._db.executemany(statement, rows)
            self._db.execute("COMMIT")

    def row(self, query: str, values: Row = ()) -> Row | None:
        """Give the first row of a query, or None."""
        with _explained():
            found: Row | None = self._db.execute(query, values).fetchone()
        return found

    def rows(self, query: str, values: Row = ()) -> Iterator[Row]:
        """Give the rows of a query one by one."""
        with _explained():
            yield from self._db.execute(query, values)


def as_bytes(text: str) -> bytes:
    """Encode a name: any that Python holds, unlike SQLite's own text; bytes sort as names do."""
    return text.encode("utf-8", "surrogatepass")


def as_text(data: bytes) -> str:
    """Give back the name that `as_bytes` encoded."""
    return data.decode("utf-8", "surrogatepass")


@contextlib.contextmanager
def _explained() -> Iterator[None]:
    try:
        yield
    except sqlite3.OperationalError as error:
        raise OutputError(
            f"cannot keep the list of what is done in a passing file: {error}: set TMPDIR to a "
            "folder with more space, then run again"
        ) from error
