"""The daemon's only truth: one row per image, in SQLite.

The life of a row::

    enqueue -> pending -> begin -> processing -> finish -> done | failed
                  ^                    |                      |
                  +----- release ------+     retry (failed), enqueue (what shapes it changed)

**Durability.** Write-ahead log, and `synchronous=FULL`: every commit is on disk when it returns. In
this mode `NORMAL` could not damage the file either, only lose the last commits in a power cut, and
most of those would merely be done again. But three must not be lost: an attempt, or an image that
takes the whole machine down would be tried for ever; a result whose input is deleted right after;
and a claimed name, which outputs already bear. Such commits come once per batch, one fsync against
the seconds of the network, so all are FULL and there is no second rule to remember.

**Names** are kept as bytes: a name that is not UTF-8 reaches Python with surrogate escapes, which
SQLite's text cannot hold. The bytes are those on disk, whatever the locale says.

**Who is to blame.** Several images are in flight when a process dies, and nobody knows which one
did it. So each of them becomes a suspect, to be tried alone; only dying alone counts against it.
"""

from __future__ import annotations

import contextlib
import fnmatch
import json
import sqlite3
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from enum import StrEnum
from pathlib import Path
from typing import Any

from bcseg_batch.items import InputFile, Outcome, Status
from bcseg_batch.store.database import Mode, explained, open_database, transaction
from bcseg_batch.store.dispose import Action, Disposal, Due
from bcseg_batch.store.names import candidates, name_key
from bcseg_batch.store.results import from_record, to_record
from bcseg_batch.version import __version__

LEDGER_NAME = "ledger.sqlite3"

# Names looked up in one statement; an old SQLite takes 999 values at most.
_LOOKUP_CHUNK = 900
# The indices are named, since the planner would sort all that waits to find the first few.
_WAITING = """
    SELECT image, size_bytes, mtime_ns FROM images INDEXED BY images_waiting
    WHERE state = 'pending' AND suspect = 0 ORDER BY queued_at_s, id
"""
_SUSPECTS = """
    SELECT image, size_bytes, mtime_ns FROM images INDEXED BY images_suspect
    WHERE state = 'pending' AND suspect = 1 ORDER BY solo_attempts, queued_at_s, id
"""

Plan = Callable[[Outcome], Disposal | None]
"""Decides what becomes of an input that is through; None leaves it where it is."""


class State(StrEnum):
    """Where an image stands."""

    PENDING = "pending"
    PROCESSING = "processing"
    DONE = "done"
    FAILED = "failed"


@dataclass(frozen=True, slots=True)
class Recovered:
    """What a dead process left.

    Attributes:
        suspects: images to be tried alone, one at a time, the least suspicious first.
        failed: images now failed, since they took the process down alone.
    """

    suspects: tuple[str, ...]
    failed: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Failure:
    """A failed image.

    Attributes:
        outcome: its record.
        attempts: how often it was tried.
    """

    outcome: Outcome
    attempts: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Standing:
    """The ledger in numbers.

    Attributes:
        counts: images by state; each state is there.
        done_since: images done since the time asked for.
        failed_since: images failed since then.
        images_per_s: done and failed ones over the window asked for.
        oldest_pending_s: age of the image that has waited longest; None where none waits.
        last_failure: the latest; None where none failed.
    """

    counts: Mapping[State, int]
    done_since: int
    failed_since: int
    images_per_s: float
    oldest_pending_s: float | None
    last_failure: Failure | None


class Ledger:
    """The ledger, open; used by one thread. It has the pipeline's `claim`, as `OutputNames` has.

    Args:
        path: the file; made where it is missing, brought to this version where it is older. Its
            folder has to be there, on a local file system.
        clock: gives the time, seconds since 1970.

    Raises:
        SettingsError: the file is damaged, of another program or of a newer version, or its folder
            is missing or of a kind that cannot hold it.
        OutputError: the disk is full or may not be written.
    """

    def __init__(self, path: Path, *, clock: Callable[[], float] = time.time) -> None:
        self._open(path, clock, "create")

    @classmethod
    def open_existing(
        cls, path: Path, *, readonly: bool = True, clock: Callable[[], float] = time.time
    ) -> Ledger:
        """Open a ledger beside the daemon that has it, to read, or to `retry`.

        Args:
            path: the file; it has to be there, in this version.
            readonly: write nothing, so that the right to read is enough.
            clock: gives the time, seconds since 1970.

        Raises:
            SettingsError: there is none, or none that this version can read.
            OutputError: it may not be opened.
        """
        ledger = cls.__new__(cls)
        ledger._open(path, clock, "read" if readonly else "write")
        return ledger

    def close(self) -> None:
        """Close the file; the last to do so clears the write-ahead log away."""
        self._db.close()

    def __enter__(self) -> Ledger:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # -- what is known ----------------------------------------------------------------------------

    def settled(
        self, files: Sequence[InputFile], *, model_sha256: str, settings_sha256: str
    ) -> set[str]:
        """Say which files need no work: done, or failed for good, and nothing has changed since.

        Args:
            files: inputs as they are now.
            model_sha256: of the checkpoint in use.
            settings_sha256: of the settings that shape the outputs, as they are now.

        Returns:
            Images with a result of the same size, modification time, model and settings.
        """
        return {
            file.image
            for file, size_bytes, mtime_ns in self._in_state(
                files, model_sha256, settings_sha256, ("done", "failed")
            )
            if (size_bytes, mtime_ns) == (file.size_bytes, file.mtime_ns)
        }

    def candidates_by_content(
        self, files: Sequence[InputFile], *, model_sha256: str, settings_sha256: str
    ) -> set[str]:
        """Say which files may be done although their time differs: hash them, then `touch` them.

        Args:
            files: inputs as they are now.
            model_sha256: of the checkpoint in use.
            settings_sha256: of the settings that shape the outputs, as they are now.

        Returns:
            Images that are done with the same size and another modification time; compare their
            hash with `sha256_of`.
        """
        return {
            file.image
            for file, size_bytes, mtime_ns in self._in_state(
                files, model_sha256, settings_sha256, ("done",)
            )
            if size_bytes == file.size_bytes and mtime_ns != file.mtime_ns
        }

    def queued(
        self, files: Sequence[InputFile], *, model_sha256: str, settings_sha256: str
    ) -> set[str]:
        """Say which files wait in the queue or are in flight, just as they are now.

        Args:
            files: inputs as they are now.
            model_sha256: of the checkpoint in use.
            settings_sha256: of the settings that shape the outputs, as they are now.
        """
        return {
            file.image
            for file, size_bytes, mtime_ns in self._in_state(
                files, model_sha256, settings_sha256, ("pending", "processing")
            )
            if (size_bytes, mtime_ns) == (file.size_bytes, file.mtime_ns)
        }

    def outcome_of(self, image: str) -> Outcome | None:
        """Give the last result of an image; None where it has none yet."""
        row = self._one(
            "SELECT record FROM images JOIN records USING (id) WHERE image = ?", _bytes(image)
        )
        return None if row is None else _outcome(row[0])

    def outcomes(self) -> Iterator[Outcome]:
        """Give the last result of every image that has one, sorted by image."""
        with explained(self._path):
            for (record,) in self._db.execute(
                "SELECT record FROM images JOIN records USING (id) ORDER BY image"
            ):
                yield _outcome(record)

    def sha256_of(self, image: str) -> str | None:
        """Give the hash of the bytes an image was done with."""
        row = self._one("SELECT sha256 FROM images WHERE image = ?", _bytes(image))
        return None if row is None else row[0]

    def touch(self, file: InputFile) -> None:
        """Take over the time of a done file whose content has proved to be the same."""
        with self._writing() as db:
            db.execute(
                "UPDATE images SET mtime_ns = ? WHERE image = ? AND size_bytes = ?"
                " AND state = 'done'",
                (file.mtime_ns, _bytes(file.image), file.size_bytes),
            )

    # -- the life of a row ------------------------------------------------------------------------

    def enqueue(
        self, files: Sequence[InputFile], *, model_sha256: str, settings_sha256: str
    ) -> None:
        """Put files in the queue; one that waits keeps its place, one in flight is left to finish.

        A file with a result goes back into the queue only where its size, time, model or settings
        differ from those of the result; its attempts then count anew.

        Args:
            files: inputs as they are now.
            model_sha256: of the checkpoint in use.
            settings_sha256: of the settings that shape the outputs, as they are now.
        """
        now_s = self._clock()
        with self._writing() as db:
            recipe = _recipe(db, model_sha256, settings_sha256)
            db.executemany(
                """
                INSERT INTO images (image, state, size_bytes, mtime_ns, recipe,
                                    first_seen_s, queued_at_s)
                VALUES (?, 'pending', ?, ?, ?, ?, ?)
                ON CONFLICT (image) DO UPDATE SET
                    state = 'pending', size_bytes = excluded.size_bytes,
                    mtime_ns = excluded.mtime_ns, recipe = excluded.recipe,
                    queued_at_s = CASE state WHEN 'pending' THEN queued_at_s
                                              ELSE excluded.queued_at_s END,
                    attempts = 0, solo_attempts = 0, suspect = 0,
                    action = NULL, target = NULL
                WHERE state <> 'processing'
                  AND (size_bytes, mtime_ns, recipe)
                      <> (excluded.size_bytes, excluded.mtime_ns, excluded.recipe)
                """,
                (
                    (_bytes(file.image), file.size_bytes, file.mtime_ns, recipe, now_s, now_s)
                    for file in files
                ),
            )

    def queue_length(self) -> int:
        """Say how many images wait their turn, suspects included."""
        return int(self._one("SELECT count(*) FROM images WHERE state = 'pending'")[0])

    def pending(self, folder: Path, *, limit: int) -> list[InputFile]:
        """Give what waits, longest first, without the suspects.

        Args:
            folder: the input folder, below which the images lie.
            limit: how many at most.
        """
        rows = self._all(f"{_WAITING} LIMIT ?", limit)
        return [_file(folder, *row) for row in rows]

    def suspects(self, folder: Path) -> list[InputFile]:
        """Give what waits to be tried alone, those with the fewest lonely deaths first.

        Args:
            folder: the input folder, below which the images lie.
        """
        return [_file(folder, *row) for row in self._all(_SUSPECTS)]

    def begin(self, files: Sequence[InputFile], *, solo: bool) -> None:
        """Write down an attempt, before anything is done that could kill the process.

        Args:
            files: what is taken in hand; all must be pending. Each gets its output name.
            solo: the one file is in flight alone, so that a death is its own.

        Raises:
            ValueError: one is not pending, or not alone where it should be.
        """
        with self._writing() as db:
            (in_flight, lonely) = db.execute(
                "SELECT count(*), total(solo) FROM images WHERE state = 'processing'"
            ).fetchone()
            if lonely or (solo and (in_flight or len(files) != 1)):
                raise ValueError("an image that is tried alone must be alone in flight")
            for file in files:
                changed = db.execute(
                    """
                    UPDATE images SET state = 'processing', size_bytes = ?, mtime_ns = ?,
                        attempts = attempts + 1, solo_attempts = solo_attempts + ?, solo = ?,
                        started_at_s = ?
                    WHERE image = ? AND state = 'pending'
                    """,
                    (
                        file.size_bytes,
                        file.mtime_ns,
                        solo,
                        solo,
                        self._clock(),
                        _bytes(file.image),
                    ),
                ).rowcount
                if not changed:
                    raise ValueError(f"{file.image!r} is not pending")
                _claim(db, file.image)

    def release(self, images: Iterable[str]) -> None:
        """Put what is in flight back and take the attempt back, as no image is to blame.

        For a full disk, a shutdown, or a file that has to settle again.
        """
        with self._writing() as db:
            db.executemany(
                """
                UPDATE images SET state = 'pending', attempts = attempts - 1,
                    solo_attempts = solo_attempts - solo, solo = 0
                WHERE image = ? AND state = 'processing'
                """,
                ((_bytes(image),) for image in images),
            )

    def forget(self, images: Iterable[str]) -> None:
        """Take out of the queue what has vanished before it was processed.

        What has an earlier result stands with that result again; what has none is gone, and its
        output name with it.
        """
        with self._writing() as db:
            for image in images:
                row = db.execute(
                    "SELECT id, (SELECT record FROM records WHERE records.id = images.id)"
                    " FROM images WHERE image = ? AND state IN ('pending', 'processing')",
                    (_bytes(image),),
                ).fetchone()
                if row is None:
                    continue
                number, record = row
                if record is None:
                    db.execute("DELETE FROM images WHERE id = ?", (number,))
                else:
                    _stand_as(db, number, _outcome(record))

    def finish(self, outcome: Outcome, plan: Plan | None = None) -> None:
        """Record a result: the commit point of one image.

        Args:
            outcome: done or failed; its outputs are on disk. One that was skipped has no result:
                `release` or `forget` it.
            plan: decides what becomes of the input, committed together with the result.

        Raises:
            ValueError: it was skipped, or it is not in flight.
        """
        self.finish_many([outcome], plan)

    def finish_many(self, outcomes: Iterable[Outcome], plan: Plan | None = None) -> None:
        """Record several results in one commit; see `finish`."""
        with self._writing() as db:
            for outcome in outcomes:
                self._finish(db, outcome, plan)

    def recover(self, *, max_attempts: int, plan: Plan | None = None) -> Recovered:
        """Sort out what was in flight when the last process died; called once, at the start.

        Every such image is tried alone from now on. One is failed, as having crashed the process,
        when it was tried `max_attempts` times and died alone in all of them but one, at least once.

        Args:
            max_attempts: how often an image may take the process down, at least 1.
            plan: as in `finish`, for those that are failed.
        """
        lonely_deaths = max(1, max_attempts - 1)
        with self._writing() as db:
            condemned = db.execute(
                """
                SELECT image, size_bytes, mtime_ns, model_sha256, settings_sha256, attempts
                FROM images JOIN recipes ON recipe = recipes.id
                WHERE state = 'processing' AND solo = 1
                  AND solo_attempts >= ? AND attempts >= ?
                ORDER BY queued_at_s, images.id
                """,
                (lonely_deaths, max_attempts),
            ).fetchall()
            for name, size_bytes, mtime_ns, model_sha256, settings_sha256, attempts in condemned:
                outcome = Outcome(
                    image=_text(name),
                    status=Status.FAILED,
                    error=_crashed(_text(name), attempts),
                    size_bytes=size_bytes,
                    mtime_ns=mtime_ns,
                    model_sha256=model_sha256,
                    settings_sha256=settings_sha256,
                    version=__version__,
                    finished_at=_iso(self._clock()),
                )
                self._finish(db, outcome, plan)
            db.execute(
                "UPDATE images SET state = 'pending', suspect = 1, solo = 0"
                " WHERE state = 'processing'"
            )
            suspects = db.execute(_SUSPECTS).fetchall()
        return Recovered(
            suspects=tuple(_text(row[0]) for row in suspects),
            failed=tuple(_text(row[0]) for row in condemned),
        )

    def retry(self, pattern: str | None = None) -> int:
        """Put failed images back in the queue, with no attempt counted.

        Args:
            pattern: of shell style, case matters, `*` crosses folders; None for all.

        Returns:
            How many.
        """
        with self._writing() as db:
            failed = db.execute("SELECT id, image FROM images WHERE state = 'failed'").fetchall()
            numbers = [
                (self._clock(), number)
                for number, name in failed
                if pattern is None or fnmatch.fnmatchcase(_text(name), pattern)
            ]
            db.executemany(
                """
                UPDATE images SET state = 'pending', queued_at_s = ?, attempts = 0,
                    solo_attempts = 0, action = NULL, target = NULL
                WHERE id = ?
                """,
                numbers,
            )
        return len(numbers)

    def claim(self, image: str) -> str:
        """Give the input's output name, the same each time; see `store.names.OutputNames`.

        Raises:
            ValueError: the image is not in the ledger.
        """
        row = self._one("SELECT name FROM images WHERE image = ?", _bytes(image))
        if row is not None and row[0] is not None:
            return _text(row[0])
        with self._writing() as db:
            return _claim(db, image)

    # -- what follows a result --------------------------------------------------------------------

    def unexported(self, *, limit: int) -> list[Outcome]:
        """Give results that `results.jsonl` may lack, in the order they came.

        A crash between writing there and `mark_exported` gives them once more: compare with the
        last record of the image before it is written again.

        Args:
            limit: how many at most.
        """
        rows = self._all(
            "SELECT record FROM records WHERE exported = 0 ORDER BY finished_at_s, id LIMIT ?",
            limit,
        )
        return [_outcome(record) for (record,) in rows]

    def mark_exported(self, images: Iterable[str]) -> None:
        """Note that the results of these images are in `results.jsonl`."""
        with self._writing() as db:
            db.executemany(
                "UPDATE records SET exported = 1"
                " WHERE id = (SELECT id FROM images WHERE image = ?)",
                ((_bytes(image),) for image in images),
            )

    def disposals_due(self, folder: Path, *, limit: int) -> list[Due]:
        """Give the inputs that are through and still have to be moved or deleted.

        Args:
            folder: the input folder, below which the images lie.
            limit: how many at most.
        """
        rows = self._all(
            """
            SELECT image, size_bytes, mtime_ns, action, target, record, attempts
            FROM images JOIN records USING (id) WHERE action IS NOT NULL ORDER BY id LIMIT ?
            """,
            limit,
        )
        return [
            Due(
                _file(folder, name, size_bytes, mtime_ns),
                Disposal(Action(action), None if target is None else Path(_text(target))),
                _outcome(record),
                attempts,
            )
            for name, size_bytes, mtime_ns, action, target, record, attempts in rows
        ]

    def disposal_done(self, image: str) -> None:
        """Note that nothing is left to do with an input."""
        with self._writing() as db:
            db.execute(
                "UPDATE images SET action = NULL, target = NULL WHERE image = ?", (_bytes(image),)
            )

    # -- what is asked from outside ---------------------------------------------------------------

    def failures(self, *, limit: int | None = None) -> Iterator[Failure]:
        """Give the failed images, the latest first.

        Args:
            limit: how many at most; None for all.
        """
        with explained(self._path):
            for record, attempts in self._db.execute(
                "SELECT record, attempts FROM images JOIN records USING (id)"
                " WHERE state = 'failed' ORDER BY images.finished_at_s DESC, id DESC LIMIT ?",
                (-1 if limit is None else limit,),
            ):
                yield Failure(_outcome(record), attempts)

    def standing(self, *, since_s: float, window_s: float = 300.0) -> Standing:
        """Give the ledger in numbers; counts every row, so it is no question for each tick.

        Args:
            since_s: from when "done" and "failed since" count, such as midnight, seconds since
                1970.
            window_s: over how many last seconds the rate is taken.
        """
        now_s = self._clock()
        with self._reading():
            counts = dict.fromkeys(State, 0)
            for state, count in self._db.execute(
                "SELECT state, count(*) FROM images GROUP BY state"
            ):
                counts[State(state)] = count
            done_since = self._finished(State.DONE, since_s)
            failed_since = self._finished(State.FAILED, since_s)
            recent = sum(
                self._finished(state, now_s - window_s) for state in (State.DONE, State.FAILED)
            )
            oldest = self._db.execute(
                "SELECT queued_at_s FROM images INDEXED BY images_waiting"
                " WHERE state = 'pending' ORDER BY queued_at_s LIMIT 1"
            ).fetchone()
            last_failure = next(self.failures(limit=1), None)
        return Standing(
            counts=counts,
            done_since=done_since,
            failed_since=failed_since,
            images_per_s=recent / window_s,
            oldest_pending_s=None if oldest is None else max(0.0, now_s - oldest[0]),
            last_failure=last_failure,
        )

    # -- inside -----------------------------------------------------------------------------------

    def _open(self, path: Path, clock: Callable[[], float], mode: Mode) -> None:
        self._path = path
        self._clock = clock
        self._db = open_database(path, mode)

    @contextlib.contextmanager
    def _writing(self) -> Iterator[sqlite3.Connection]:
        with explained(self._path), transaction(self._db, "IMMEDIATE"):
            yield self._db

    @contextlib.contextmanager
    def _reading(self) -> Iterator[None]:
        """Let several questions see one and the same state."""
        with explained(self._path), transaction(self._db, "DEFERRED"):
            yield

    def _one(self, query: str, *values: object) -> Any:
        with explained(self._path):
            return self._db.execute(query, values).fetchone()

    def _all(self, query: str, *values: object) -> list[Any]:
        with explained(self._path):
            return self._db.execute(query, values).fetchall()

    def _in_state(
        self,
        files: Sequence[InputFile],
        model_sha256: str,
        settings_sha256: str,
        states: tuple[str, ...],
    ) -> Iterator[tuple[InputFile, int, int]]:
        """Give the files of this recipe in one of these states, with the identity in the ledger."""
        with self._reading():
            recipe = self._db.execute(
                "SELECT id FROM recipes WHERE model_sha256 = ? AND settings_sha256 = ?",
                (model_sha256, settings_sha256),
            ).fetchone()
            if recipe is None:
                return
            for start in range(0, len(files), _LOOKUP_CHUNK):
                chunk = {_bytes(file.image): file for file in files[start : start + _LOOKUP_CHUNK]}
                query = (
                    "SELECT image, state, size_bytes, mtime_ns FROM images WHERE recipe = ?"  # noqa: S608 - only question marks are put in
                    f" AND image IN ({','.join('?' * len(chunk))})"
                )
                for name, state, size_bytes, mtime_ns in self._db.execute(query, (*recipe, *chunk)):
                    if state in states:
                        yield chunk[name], size_bytes, mtime_ns

    def _finished(self, state: State, since_s: float) -> int:
        row = self._db.execute(
            "SELECT count(*) FROM images WHERE state = ? AND finished_at_s >= ?",
            (state.value, since_s),
        ).fetchone()
        return int(row[0])

    def _finish(self, db: sqlite3.Connection, outcome: Outcome, plan: Plan | None) -> None:
        if outcome.status is Status.SKIPPED:
            raise ValueError(f"{outcome.image!r} was skipped and has no result")
        row = db.execute(
            "SELECT id FROM images WHERE image = ? AND state = 'processing'",
            (_bytes(outcome.image),),
        ).fetchone()
        if row is None:
            raise ValueError(f"{outcome.image!r} is not in flight")
        (number,) = row
        now_s = self._clock()
        disposal = plan(outcome) if plan is not None else None
        target = None if disposal is None else disposal.target
        db.execute(
            """
            INSERT INTO records (id, record, finished_at_s) VALUES (?, ?, ?)
            ON CONFLICT (id) DO UPDATE SET record = excluded.record, exported = 0,
                finished_at_s = excluded.finished_at_s
            """,
            (number, json.dumps(to_record(outcome)), now_s),
        )
        db.execute(
            "UPDATE images SET finished_at_s = ?, action = ?, target = ? WHERE id = ?",
            (
                now_s,
                None if disposal is None else disposal.action.value,
                None if target is None else _bytes(str(target)),
                number,
            ),
        )
        _stand_as(db, number, outcome)


def _recipe(db: sqlite3.Connection, model_sha256: str | None, settings_sha256: str | None) -> int:
    values = (model_sha256 or "", settings_sha256 or "")
    db.execute(
        "INSERT INTO recipes (model_sha256, settings_sha256) VALUES (?, ?) ON CONFLICT DO NOTHING",
        values,
    )
    (number,) = db.execute(
        "SELECT id FROM recipes WHERE model_sha256 = ? AND settings_sha256 = ?", values
    ).fetchone()
    return int(number)


def _claim(db: sqlite3.Connection, image: str) -> str:
    row = db.execute("SELECT id, name FROM images WHERE image = ?", (_bytes(image),)).fetchone()
    if row is None:
        raise ValueError(f"{image!r} is not in the ledger")
    number, held = row
    if held is not None:
        return _text(held)
    for name in candidates(image):
        key = _bytes(name_key(name))
        if not db.execute("SELECT 1 FROM images WHERE name_key = ?", (key,)).fetchone():
            db.execute(
                "UPDATE images SET name = ?, name_key = ? WHERE id = ?", (_bytes(name), key, number)
            )
            return name
    raise AssertionError("the candidates never end")


def _stand_as(db: sqlite3.Connection, number: int, outcome: Outcome) -> None:
    """Give a row the state and the identity of a result."""
    db.execute(
        """
        UPDATE images SET state = ?, size_bytes = ifnull(?, size_bytes),
            mtime_ns = ifnull(?, mtime_ns), sha256 = ?, recipe = ?, solo = 0, suspect = 0
        WHERE id = ?
        """,
        (
            outcome.status.value,
            outcome.size_bytes,
            outcome.mtime_ns,
            outcome.sha256,
            _recipe(db, outcome.model_sha256, outcome.settings_sha256),
            number,
        ),
    )


def _outcome(record: str) -> Outcome:
    return from_record(json.loads(record))


def _file(folder: Path, name: bytes, size_bytes: int, mtime_ns: int) -> InputFile:
    image = _text(name)
    return InputFile(folder / image, image, size_bytes, mtime_ns)


def _crashed(image: str, attempts: int) -> str:
    return (
        f"CrashedProcessError: {image!r} crashed the process: it was tried {attempts} times, in "
        "the end alone: it may need more memory than there is, or break a decoder"
    )


def _iso(time_s: float) -> str:
    return datetime.fromtimestamp(time_s, UTC).isoformat(timespec="milliseconds")


def _bytes(text: str) -> bytes:
    return text.encode("utf-8", "surrogateescape")


def _text(data: bytes) -> str:
    return data.decode("utf-8", "surrogateescape")
