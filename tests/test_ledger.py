"""The ledger: nothing lost, nothing twice, nobody blamed without reason."""

import contextlib
import os
import signal
import sqlite3
import subprocess
import sys
import tempfile
import unicodedata
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import hypothesis.strategies as st
import pytest
from hypothesis import given, settings
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
)

from bcseg_batch.errors import BcsegError, OutputError, SettingsError
from bcseg_batch.items import InputFile, Outcome, Status
from bcseg_batch.store import database
from bcseg_batch.store.dispose import Action, Disposal
from bcseg_batch.store.ledger import LEDGER_NAME, Ledger, State
from bcseg_batch.store.names import OutputNames

FOLDER = Path("/input")
MODEL, SETTINGS = "m" * 64, "s" * 64
RECIPE = {"model_sha256": MODEL, "settings_sha256": SETTINGS}
ODD_NAME = os.fsdecode(b"sub/\xff\xfe caf\xc3\xa9.jpg")


class Clock:
    """Moves one second at each look."""

    def __init__(self) -> None:
        self.now_s = 1_000_000.0

    def __call__(self) -> float:
        self.now_s += 1.0
        return self.now_s


def file_of(image: str, *, size_bytes: int = 100, mtime_ns: int = 1) -> InputFile:
    return InputFile(FOLDER / image, image, size_bytes, mtime_ns)


def done(file: InputFile, **changes: Any) -> Outcome:
    values: dict[str, Any] = {
        "image": file.image,
        "status": Status.DONE,
        "sha256": f"{file.size_bytes:064x}",
        "size_bytes": file.size_bytes,
        "mtime_ns": file.mtime_ns,
        "notes": ("orientation applied",),
        **RECIPE,
    }
    return Outcome(**{**values, **changes})


def failed(file: InputFile, error: str = "UnreadableImageError: no image") -> Outcome:
    return done(file, status=Status.FAILED, error=error, sha256=None, notes=())


def run(ledger: Ledger, *outcomes: Outcome) -> None:
    """Take images all the way to their results."""
    files = [
        file_of(one.image, size_bytes=one.size_bytes or 0, mtime_ns=one.mtime_ns or 0)
        for one in outcomes
    ]
    ledger.enqueue(files, **RECIPE)
    ledger.begin(files, solo=False)
    ledger.finish_many(outcomes)


def waiting(ledger: Ledger) -> list[str]:
    return [file.image for file in ledger.pending(FOLDER, limit=1000)]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / LEDGER_NAME


@pytest.fixture
def ledger(path: Path) -> Iterator[Ledger]:
    with Ledger(path, clock=Clock()) as opened:
        yield opened


class TestKnown:
    def test_done_and_failed_are_settled_and_nothing_else(self, ledger: Ledger) -> None:
        good, bad, new, queued = (file_of(name) for name in ("a.jpg", "b.jpg", "c.jpg", "d.jpg"))
        run(ledger, done(good), failed(bad))
        ledger.enqueue([queued], **RECIPE)
        assert ledger.settled([good, bad, new, queued], **RECIPE) == {"a.jpg", "b.jpg"}

    @pytest.mark.parametrize(
        ("file", "recipe"),
        [
            (file_of("a.jpg", size_bytes=101), RECIPE),
            (file_of("a.jpg", mtime_ns=2), RECIPE),
            (file_of("a.jpg"), {**RECIPE, "model_sha256": "x" * 64}),
            (file_of("a.jpg"), {**RECIPE, "settings_sha256": "x" * 64}),
        ],
    )
    def test_whatever_shapes_the_outputs_unsettles(
        self, ledger: Ledger, file: InputFile, recipe: dict[str, str]
    ) -> None:
        run(ledger, done(file_of("a.jpg")))
        assert ledger.settled([file], **recipe) == set()
        ledger.enqueue([file], **recipe)
        assert waiting(ledger) == ["a.jpg"]

    def test_more_files_than_one_statement_can_ask_for(self, ledger: Ledger) -> None:
        files = [file_of(f"{number}.jpg") for number in range(2500)]
        run(ledger, *(done(file) for file in files))
        known = ledger.settled([*files, file_of("new.jpg")], **RECIPE)
        assert known == {file.image for file in files}

    def test_same_content_under_a_new_time_is_accepted_after_hashing(self, ledger: Ledger) -> None:
        run(ledger, done(file_of("a.jpg"), sha256="f" * 64), failed(file_of("b.jpg")))
        touched = [file_of("a.jpg", mtime_ns=9), file_of("b.jpg", mtime_ns=9)]
        longer = file_of("a.jpg", size_bytes=101, mtime_ns=9)
        assert ledger.candidates_by_content(touched, **RECIPE) == {"a.jpg"}
        assert ledger.candidates_by_content([longer], **RECIPE) == set()
        assert ledger.sha256_of("a.jpg") == "f" * 64
        ledger.touch(touched[0])
        assert ledger.settled(touched, **RECIPE) == {"a.jpg"}
        assert ledger.candidates_by_content(touched, **RECIPE) == set()


class TestLife:
    def test_waiting_images_come_longest_first_and_keep_their_place(self, ledger: Ledger) -> None:
        ledger.enqueue([file_of("b.jpg")], **RECIPE)
        ledger.enqueue([file_of("a.jpg")], **RECIPE)
        ledger.enqueue([file_of("b.jpg", mtime_ns=5)], **RECIPE)
        assert ledger.pending(FOLDER, limit=9) == [file_of("b.jpg", mtime_ns=5), file_of("a.jpg")]
        assert ledger.pending(FOLDER, limit=1) == [file_of("b.jpg", mtime_ns=5)]

    def test_in_flight_is_neither_waiting_nor_taken_twice(self, ledger: Ledger) -> None:
        file = file_of("a.jpg")
        ledger.enqueue([file], **RECIPE)
        ledger.begin([file], solo=False)
        ledger.enqueue([file_of("a.jpg", mtime_ns=7)], **RECIPE)
        assert waiting(ledger) == []
        with pytest.raises(ValueError, match="not pending"):
            ledger.begin([file], solo=False)

    def test_a_result_without_an_attempt_is_refused(self, ledger: Ledger) -> None:
        file = file_of("a.jpg")
        run(ledger, done(file))
        with pytest.raises(ValueError, match="not in flight"):
            ledger.finish(done(file))
        ledger.enqueue([file_of("b.jpg")], **RECIPE)
        ledger.begin([file_of("b.jpg")], solo=False)
        with pytest.raises(ValueError, match="no result"):
            ledger.finish(done(file_of("b.jpg"), status=Status.SKIPPED))

    def test_one_wrong_result_of_many_records_none(self, ledger: Ledger) -> None:
        files = [file_of("a.jpg"), file_of("b.jpg")]
        ledger.enqueue(files, **RECIPE)
        ledger.begin(files[:1], solo=False)
        with pytest.raises(ValueError, match="not in flight"):
            ledger.finish_many([done(files[0]), done(files[1])])
        assert ledger.standing(since_s=0).counts[State.DONE] == 0

    def test_release_takes_the_attempt_back(self, ledger: Ledger) -> None:
        file = file_of("a.jpg")
        ledger.enqueue([file], **RECIPE)
        for _ in range(5):  # a full disk, five times
            ledger.begin([file], solo=True)
            ledger.release(["a.jpg"])
        ledger.begin([file], solo=True)
        ledger.finish(failed(file))
        (failure,) = ledger.failures()
        assert failure.attempts == 1

    def test_rewritten_while_in_flight_is_seen_afterwards(self, ledger: Ledger) -> None:
        before, after = file_of("a.jpg"), file_of("a.jpg", mtime_ns=2)
        ledger.enqueue([before], **RECIPE)
        ledger.begin([before], solo=False)
        ledger.enqueue([after], **RECIPE)
        ledger.finish(done(before))
        assert ledger.settled([after], **RECIPE) == set()
        ledger.enqueue([after], **RECIPE)
        assert ledger.pending(FOLDER, limit=1) == [after]

    def test_the_bytes_that_were_read_count_not_those_that_were_seen(self, ledger: Ledger) -> None:
        seen, read = file_of("a.jpg"), file_of("a.jpg", size_bytes=200, mtime_ns=3)
        ledger.enqueue([seen], **RECIPE)
        ledger.begin([seen], solo=False)
        ledger.finish(done(read))
        assert ledger.settled([read], **RECIPE) == {"a.jpg"}

    def test_vanished_before_its_turn(self, ledger: Ledger) -> None:
        old, changed, new = file_of("a.jpg"), file_of("a.jpg", mtime_ns=2), file_of("b.jpg")
        run(ledger, done(old))
        ledger.enqueue([changed, new], **RECIPE)
        ledger.forget(["a.jpg", "b.jpg", "never heard of"])
        assert waiting(ledger) == []
        assert ledger.settled([old, new], **RECIPE) == {"a.jpg"}
        assert ledger.settled([changed], **RECIPE) == set()

    def test_retry_by_pattern(self, ledger: Ledger) -> None:
        run(ledger, *(failed(file_of(name)) for name in ("x/a.jpg", "x/y/b.tif", "c.jpg")))
        run(ledger, done(file_of("x/good.jpg")))
        assert ledger.retry("x/*") == 2
        assert sorted(waiting(ledger)) == ["x/a.jpg", "x/y/b.tif"]
        assert ledger.retry() == 1
        assert ledger.retry() == 0


class TestBlame:
    def test_a_group_makes_suspects_and_no_culprit(self, path: Path) -> None:
        files = [file_of(f"{number}.jpg") for number in range(4)]
        with Ledger(path) as ledger:
            ledger.enqueue(files, **RECIPE)
        for _ in range(20):
            with Ledger(path) as ledger:
                ledger.begin(files, solo=False)
            with Ledger(path) as ledger:
                recovered = ledger.recover(max_attempts=3)
            assert recovered.failed == ()
            assert set(recovered.suspects) == {file.image for file in files}

    @pytest.mark.parametrize(("max_attempts", "deaths"), [(1, 2), (2, 2), (3, 3), (5, 5)])
    def test_dying_alone_often_enough_is_a_failure(
        self, path: Path, max_attempts: int, deaths: int
    ) -> None:
        files = [file_of("culprit.jpg"), file_of("neighbour.jpg")]
        with Ledger(path) as ledger:
            ledger.enqueue(files, **RECIPE)
            ledger.begin(files, solo=False)
        for death in range(1, deaths + 1):
            with Ledger(path) as ledger:
                recovered = ledger.recover(max_attempts=max_attempts)
                assert (recovered.failed == ("culprit.jpg",)) is (death == deaths)
                if death < deaths:
                    ledger.begin([files[0]], solo=True)
        with Ledger(path) as ledger:
            (failure,) = ledger.failures()
            assert failure.attempts == deaths
            assert failure.outcome.error is not None
            assert failure.outcome.error.startswith("CrashedProcessError: 'culprit.jpg' crashed")
            assert [one.image for one in ledger.unexported(limit=9)] == ["culprit.jpg"]
            assert ledger.suspects(FOLDER) == [files[1]]
            assert ledger.settled(files, **RECIPE) == {"culprit.jpg"}

    def test_suspects_are_remembered_and_the_least_suspicious_comes_first(self, path: Path) -> None:
        files = [file_of("a.jpg"), file_of("b.jpg")]
        with Ledger(path) as ledger:
            ledger.enqueue([*files, file_of("c.jpg")], **RECIPE)
            ledger.begin(files, solo=False)
        with Ledger(path) as ledger:
            ledger.recover(max_attempts=3)
            ledger.begin(files[:1], solo=True)
        with Ledger(path) as ledger:
            assert ledger.recover(max_attempts=3).suspects == ("b.jpg", "a.jpg")
            assert waiting(ledger) == ["c.jpg"]
            ledger.begin([files[1]], solo=True)
            ledger.finish(done(files[1]))
            assert ledger.suspects(FOLDER) == [files[0]]

    def test_many_deaths_in_company_and_one_alone_are_no_proof(self, path: Path) -> None:
        files = [file_of("a.jpg"), file_of("b.jpg")]
        with Ledger(path) as ledger:
            ledger.enqueue(files, **RECIPE)
        for taken, solo in ((files, False), (files, False), (files, False), (files[:1], True)):
            with Ledger(path) as ledger:
                ledger.begin(taken, solo=solo)
            with Ledger(path) as ledger:
                assert ledger.recover(max_attempts=3).failed == ()

    def test_the_last_straw_must_be_drawn_alone(self, path: Path) -> None:
        files = [file_of("a.jpg"), file_of("b.jpg")]
        with Ledger(path) as ledger:
            ledger.enqueue(files, **RECIPE)
        for taken, solo in ((files[:1], True), (files[:1], True), (files, False)):
            with Ledger(path) as ledger:
                ledger.begin(taken, solo=solo)
            with Ledger(path) as ledger:
                assert ledger.recover(max_attempts=3).failed == ()

    @pytest.mark.parametrize("anew", ["content", "retry"])
    def test_attempts_count_anew(self, path: Path, anew: str) -> None:
        file = file_of("a.jpg")
        with Ledger(path) as ledger:
            ledger.enqueue([file], **RECIPE)
        for _ in range(3):
            with Ledger(path) as ledger:
                ledger.begin([file], solo=True)
            with Ledger(path) as ledger:
                recovered = ledger.recover(max_attempts=3)
        assert recovered.failed == ("a.jpg",)
        with Ledger(path) as ledger:
            if anew == "retry":
                ledger.retry()
            else:
                file = file_of("a.jpg", mtime_ns=2)
                ledger.enqueue([file], **RECIPE)
            assert waiting(ledger) == ["a.jpg"]
            ledger.begin([file], solo=True)
        with Ledger(path) as ledger:
            assert ledger.recover(max_attempts=3).suspects == ("a.jpg",)
            ledger.begin([file], solo=True)
            ledger.finish(failed(file))
            (failure,) = ledger.failures()
            assert failure.attempts == 2

    def test_alone_means_alone(self, ledger: Ledger) -> None:
        files = [file_of("a.jpg"), file_of("b.jpg")]
        ledger.enqueue(files, **RECIPE)
        with pytest.raises(ValueError, match="alone"):
            ledger.begin(files, solo=True)
        ledger.begin(files[:1], solo=True)
        with pytest.raises(ValueError, match="alone"):
            ledger.begin(files[1:], solo=False)

    def test_new_content_clears_the_suspicion(self, path: Path) -> None:
        with Ledger(path) as ledger:
            ledger.enqueue([file_of("a.jpg")], **RECIPE)
            ledger.begin([file_of("a.jpg")], solo=True)
        with Ledger(path) as ledger:
            ledger.recover(max_attempts=2)
            ledger.enqueue([file_of("a.jpg", mtime_ns=2)], **RECIPE)
            assert ledger.suspects(FOLDER) == []
            assert waiting(ledger) == ["a.jpg"]

    def test_sigkill_between_begin_and_finish(self, path: Path) -> None:
        script = (
            "import sys\n"
            "from pathlib import Path\n"
            "from bcseg_batch.items import InputFile\n"
            "from bcseg_batch.store.ledger import Ledger\n"
            "ledger = Ledger(Path(sys.argv[1]))\n"
            "files = [InputFile(Path('/input', n), n, 100, 1) for n in ('a.jpg', 'b.jpg')]\n"
            "ledger.enqueue(files, model_sha256='m', settings_sha256='s')\n"
            "ledger.begin(files, solo=False)\n"
            "print('begun', flush=True)\n"
            "sys.stdin.read()\n"
        )
        with subprocess.Popen(
            [sys.executable, "-c", script, str(path)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        ) as process:
            assert process.stdout is not None
            assert process.stdout.readline() == "begun\n"
            process.send_signal(signal.SIGKILL)
            assert process.wait() == -signal.SIGKILL
        with Ledger(path) as ledger:
            assert ledger.standing(since_s=0).counts[State.PROCESSING] == 2
            assert ledger.recover(max_attempts=3).suspects == ("a.jpg", "b.jpg")
            assert ledger.standing(since_s=0).counts[State.PROCESSING] == 0


class TestNames:
    def test_two_inputs_of_one_stem_keep_their_names_for_good(self, path: Path) -> None:
        files = [file_of("a.tif"), file_of("a.jpg"), file_of("A.png")]
        with Ledger(path) as ledger:
            ledger.enqueue(files, **RECIPE)
            ledger.begin(files[:2], solo=False)
        with Ledger(path) as ledger:
            assert [ledger.claim(name) for name in ("A.png", "a.jpg", "a.tif")] == [
                "A.png",
                "a.jpg",
                "a",
            ]
        with Ledger(path) as ledger:
            assert ledger.claim("A.png") == "A.png"

    def test_a_name_needs_a_row(self, ledger: Ledger) -> None:
        with pytest.raises(ValueError, match="not in the ledger"):
            ledger.claim("a.jpg")

    @settings(max_examples=30, deadline=None)
    @given(
        st.lists(
            st.builds(
                lambda stem, suffix: os.fsdecode(stem) + suffix,
                st.one_of(
                    st.sampled_from(
                        [
                            b"a",
                            b"A",
                            b"\xff",
                            b"\xc3\xa9",
                            unicodedata.normalize("NFD", "é").encode(),
                        ]
                    ),
                    st.binary(min_size=1, max_size=4),
                ),
                st.sampled_from([".jpg", ".tif", "", ".a.jpg"]),
            ).filter(lambda name: "\0" not in name and "/" not in name),
            unique=True,
            max_size=12,
        )
    )
    def test_any_bytes_make_a_name_and_the_rule_is_that_of_the_one_shot_run(
        self, images: list[str]
    ) -> None:
        files = [file_of(image) for image in images]
        names = OutputNames()
        with tempfile.TemporaryDirectory() as folder, Ledger(Path(folder, "ledger")) as ledger:
            ledger.enqueue(files, **RECIPE)
            assert waiting(ledger) == images
            ledger.begin(files, solo=False)
            assert [ledger.claim(one) for one in images] == [names.claim(one) for one in images]
            outcomes = [done(file, error=file.image, mask=file.image) for file in files]
            ledger.finish_many(outcomes)
            assert ledger.unexported(limit=99) == outcomes
            assert ledger.settled(files, **RECIPE) == set(images)


class TestFollowers:
    def test_results_are_exported_once_in_their_order(self, ledger: Ledger) -> None:
        outcomes = [done(file_of("b.jpg")), failed(file_of("a.jpg")), done(file_of(ODD_NAME))]
        run(ledger, *outcomes)
        assert ledger.unexported(limit=2) == outcomes[:2]
        ledger.mark_exported(["b.jpg", "a.jpg"])
        assert ledger.unexported(limit=9) == outcomes[2:]
        again = done(file_of("b.jpg", mtime_ns=2))
        run(ledger, again)
        assert ledger.unexported(limit=9) == [outcomes[2], again]

    def test_a_disposal_is_planned_with_the_result_and_survives_until_done(
        self, path: Path
    ) -> None:
        moves = {
            ODD_NAME: Disposal(Action.ARCHIVE, Path("/archive", ODD_NAME)),
            "b.jpg": Disposal(Action.DELETE),
            "c.jpg": Disposal(Action.QUARANTINE, Path("/quarantine/c.jpg")),
        }
        outcomes = [
            done(file_of(ODD_NAME)),
            done(file_of("b.jpg")),
            failed(file_of("c.jpg")),
            done(file_of("kept.jpg")),
        ]
        with Ledger(path) as ledger:
            files = [file_of(one.image) for one in outcomes]
            ledger.enqueue(files, **RECIPE)
            ledger.begin(files, solo=False)
            ledger.finish_many(outcomes, lambda outcome: moves.get(outcome.image))
        with Ledger(path) as ledger:
            due = ledger.disposals_due(FOLDER, limit=9)
            assert {one.outcome.image: one.disposal for one in due} == moves
            assert [one.file for one in due] == files[:3]
            assert ledger.disposals_due(FOLDER, limit=1) == due[:1]
            ledger.disposal_done(ODD_NAME)
            assert ledger.disposals_due(FOLDER, limit=9) == due[1:]

    def test_a_new_image_under_the_name_calls_the_disposal_off(self, ledger: Ledger) -> None:
        file = file_of("a.jpg")
        ledger.enqueue([file], **RECIPE)
        ledger.begin([file], solo=False)
        ledger.finish(done(file), lambda _: Disposal(Action.DELETE))
        ledger.enqueue([file_of("a.jpg", mtime_ns=2)], **RECIPE)
        assert ledger.disposals_due(FOLDER, limit=9) == []

    def test_what_crashed_the_process_is_disposed_of_too(self, path: Path) -> None:
        with Ledger(path) as ledger:
            ledger.enqueue([file_of("a.jpg")], **RECIPE)
            ledger.begin([file_of("a.jpg")], solo=True)
        target = Path("/quarantine/a.jpg")
        with Ledger(path) as ledger:
            ledger.recover(max_attempts=1, plan=lambda _: Disposal(Action.QUARANTINE, target))
            (due,) = ledger.disposals_due(FOLDER, limit=9)
            assert (due.disposal.target, due.attempts) == (target, 1)

    def test_standing(self, path: Path) -> None:
        clock = Clock()
        with Ledger(path, clock=clock) as ledger:
            run(ledger, done(file_of("old.jpg")), failed(file_of("old-bad.jpg"), "Old: error"))
            clock.now_s += 10_000
            midnight_s = clock.now_s
            run(ledger, done(file_of("new.jpg")), failed(file_of("bad.jpg"), "New: error"))
            ledger.enqueue([file_of("waits.jpg")], **RECIPE)
            clock.now_s += 30
            standing = ledger.standing(since_s=midnight_s, window_s=100)
        assert standing.counts == {"pending": 1, "processing": 0, "done": 2, "failed": 2}
        assert (standing.done_since, standing.failed_since) == (1, 1)
        assert standing.images_per_s == pytest.approx(2 / 100)
        assert standing.oldest_pending_s == pytest.approx(31)
        assert standing.last_failure is not None
        assert standing.last_failure.outcome.error == "New: error"

    def test_standing_of_an_empty_ledger(self, ledger: Ledger) -> None:
        standing = ledger.standing(since_s=0)
        assert set(standing.counts.values()) == {0}
        assert (standing.oldest_pending_s, standing.last_failure) == (None, None)


class TestOthers:
    def test_a_reader_is_not_held_up_by_a_writer(self, path: Path) -> None:
        files = [file_of("a.jpg"), file_of("b.jpg")]
        seen: list[int] = []

        def results() -> Iterator[Outcome]:
            yield done(files[0])
            with Ledger.open_existing(path) as reader:  # in the middle of the writer's commit
                seen.append(reader.standing(since_s=0).counts[State.DONE])
            yield failed(files[1])

        with Ledger(path) as writer, Ledger.open_existing(path) as reader:
            writer.enqueue(files, **RECIPE)
            writer.begin(files, solo=False)
            writer.finish_many(results())
            assert seen == [0]
            assert reader.standing(since_s=0).counts[State.DONE] == 1
            assert [failure.outcome.image for failure in reader.failures()] == ["b.jpg"]

    def test_retry_reaches_the_daemon_that_runs(self, path: Path) -> None:
        with Ledger(path) as daemon:
            run(daemon, failed(file_of("a.jpg")))
            with Ledger.open_existing(path, readonly=False) as command:
                assert command.retry("*.jpg") == 1
            assert waiting(daemon) == ["a.jpg"]

    def test_reading_leaves_no_trace(self, path: Path) -> None:
        with Ledger(path) as ledger:
            run(ledger, failed(file_of("a.jpg")))
        before = {one.name: one.stat().st_mtime_ns for one in path.parent.iterdir()}
        with Ledger.open_existing(path) as reader:
            assert len(list(reader.failures())) == 1
            with pytest.raises(OutputError, match="readonly"):
                reader.retry()
        assert {one.name: one.stat().st_mtime_ns for one in path.parent.iterdir()} == before


class TestFile:
    def test_an_older_version_is_brought_up_to_date_with_its_rows(
        self, path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        with Ledger(path) as ledger:
            run(ledger, done(file_of("a.jpg")))

        def next_version(db: sqlite3.Connection) -> None:
            db.execute("ALTER TABLE images ADD COLUMN stain TEXT DEFAULT 'Giemsa'")

        monkeypatch.setattr(database, "MIGRATIONS", (*database.MIGRATIONS, next_version))
        with pytest.raises(SettingsError, match="older version: start the daemon once"):
            Ledger.open_existing(path)
        for _ in range(2):  # the second time there is nothing to do
            with Ledger(path) as ledger:
                assert ledger.settled([file_of("a.jpg")], **RECIPE) == {"a.jpg"}
        with contextlib.closing(sqlite3.connect(path)) as db:
            assert db.execute("SELECT image, stain FROM images").fetchall() == [
                (b"a.jpg", "Giemsa")
            ]

    def test_a_migration_that_fails_halfway_changes_nothing(self, path: Path) -> None:
        def breaks(db: sqlite3.Connection) -> None:
            db.execute("CREATE TABLE half (x)")
            raise KeyError("power cut")

        with contextlib.closing(database.open_database(path, "create")) as db:
            with pytest.raises(KeyError):
                database.migrate(db, path, (*database.MIGRATIONS, breaks))
            tables = {name for (name,) in db.execute("SELECT name FROM sqlite_master")}
            assert "half" not in tables
            database.migrate(db, path, database.MIGRATIONS)

    def test_a_newer_version_is_refused_and_left_alone(self, path: Path) -> None:
        Ledger(path).close()
        with contextlib.closing(sqlite3.connect(path)) as db:
            db.execute("PRAGMA user_version = 99")
        before = path.read_bytes()
        for open_it in (Ledger, Ledger.open_existing):
            with pytest.raises(SettingsError, match=r"version 99.*newer bcseg-batch.*install"):
                open_it(path)
        assert path.read_bytes() == before

    @pytest.mark.parametrize("opens", [Ledger, Ledger.open_existing])
    @pytest.mark.parametrize(
        ("content", "text"),
        [
            (b"these are notes about smears, not a ledger\n" * 30, "damaged or no ledger"),
            (b"SQLite format 3\0" + bytes(range(256)) * 16, "damaged or no ledger"),
        ],
    )
    def test_a_damaged_file_is_refused_and_left_alone(
        self, path: Path, opens: Any, content: bytes, text: str
    ) -> None:
        path.write_bytes(content)
        with pytest.raises(SettingsError, match=text) as caught:
            opens(path)
        assert str(path) in str(caught.value)
        assert "move it" in str(caught.value)
        assert path.read_bytes() == content

    def test_damage_in_the_middle_is_told_when_it_is_met(self, path: Path) -> None:
        with Ledger(path) as ledger:
            run(ledger, *(done(file_of(f"{number}.jpg")) for number in range(500)))
        with path.open("r+b") as file:
            file.seek(4096 * 3)
            file.write(b"\xa5" * (path.stat().st_size - 4096 * 4))
        with Ledger(path) as ledger, pytest.raises(SettingsError, match="damaged"):
            ledger.unexported(limit=1000)

    def test_the_database_of_another_program_is_refused(self, path: Path) -> None:
        with contextlib.closing(sqlite3.connect(path)) as db:
            db.execute("CREATE TABLE images (id)")
        with pytest.raises(SettingsError, match="another program"):
            Ledger(path)

    def test_missing_and_misplaced(self, tmp_path: Path) -> None:
        with pytest.raises(SettingsError, match="there is no ledger"):
            Ledger.open_existing(tmp_path / "none")
        assert not (tmp_path / "none").exists()
        with pytest.raises(SettingsError, match="does not exist: make it"):
            Ledger(tmp_path / "no folder" / "ledger")
        with pytest.raises(SettingsError, match="no regular file"):
            Ledger(tmp_path)

    def test_odd_characters_in_the_path(self, tmp_path: Path) -> None:
        folder = tmp_path / os.fsdecode(b"100% \xff?x=1#y")
        folder.mkdir()
        with Ledger(folder / "ledger") as ledger:
            run(ledger, done(file_of("a.jpg")))
        assert (folder / "ledger").stat().st_size > 0
        with Ledger.open_existing(folder / "ledger") as ledger:
            assert ledger.settled([file_of("a.jpg")], **RECIPE) == {"a.jpg"}

    def test_commits_are_forced_to_disk(self, path: Path) -> None:
        with contextlib.closing(database.open_database(path, "create")) as db:
            assert db.execute("PRAGMA journal_mode").fetchone() == ("wal",)
            assert db.execute("PRAGMA synchronous").fetchone() == (2,)

    def test_disk_full_loses_nothing_and_goes_on_with_space(self, tmp_path: Path) -> None:
        with small_disk(tmp_path / "disk") as disk, Ledger(disk / LEDGER_NAME) as ledger:
            kept = [file_of("a.jpg"), file_of("b.jpg")]
            run(ledger, done(kept[0]))
            ledger.enqueue(kept[1:], **RECIPE)
            ledger.begin(kept[1:], solo=False)
            filler = disk / "filler"
            with filler.open("wb", buffering=0) as file, contextlib.suppress(OSError):
                while file.write(b"x" * 4096):
                    pass
            many = [file_of(f"{number:04d}.jpg") for number in range(2000)]
            with pytest.raises(OutputError, match=r"ledger.*free some space"):
                ledger.enqueue(many, **RECIPE)
            assert ledger.settled(kept, **RECIPE) == {"a.jpg"}
            assert waiting(ledger) == []
            filler.unlink()
            ledger.enqueue(many, **RECIPE)
            ledger.finish(done(kept[1]))
            assert ledger.settled([*kept, *many], **RECIPE) == {"a.jpg", "b.jpg"}
            assert len(ledger.pending(FOLDER, limit=9999)) == 2000


@contextlib.contextmanager
def small_disk(folder: Path) -> Iterator[Path]:
    """A disk of 2 MiB of its own."""
    folder.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", str(folder)],
        capture_output=True,
        text=True,
        check=False,
    )
    if mounted.returncode:
        pytest.skip(f"a small disk cannot be mounted here: {mounted.stderr.strip()}")
    try:
        yield folder
    finally:
        subprocess.run(["umount", str(folder)], check=True)


def test_a_full_file_is_told_as_a_full_disk(ledger: Ledger) -> None:
    """The same error where no disk can be mounted: SQLite's own limit of pages."""
    run(ledger, done(file_of("a.jpg")))
    (pages,) = ledger._one("PRAGMA page_count")
    ledger._one(f"PRAGMA max_page_count = {pages}")
    many = [file_of(f"{number}.jpg") for number in range(2000)]
    with pytest.raises(OutputError, match="full: free some space"):
        ledger.enqueue(many, **RECIPE)
    assert waiting(ledger) == []
    ledger._one("PRAGMA max_page_count = 100000")
    ledger.enqueue(many, **RECIPE)
    assert len(ledger.pending(FOLDER, limit=9999)) == 2000


def test_a_writer_that_never_lets_go_is_an_error_to_wait_out(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(database, "_BUSY_TIMEOUT_S", 0.0)
    with Ledger(path) as ledger, contextlib.closing(sqlite3.connect(path)) as other:
        other.execute("BEGIN IMMEDIATE")
        with pytest.raises(OutputError, match="locked: end the program"):
            ledger.enqueue([file_of("a.jpg")], **RECIPE)
        other.rollback()
        ledger.enqueue([file_of("a.jpg")], **RECIPE)


IMAGES = ("a.jpg", "a.tif", "sub/b.jpg", ODD_NAME)
images = st.sampled_from(IMAGES)
groups = st.lists(images, min_size=1, unique=True)


class Life(RuleBasedStateMachine):
    """A model in a dict beside the ledger, with crashes at any moment between two calls."""

    @initialize()
    def start(self) -> None:
        self.folder = tempfile.TemporaryDirectory()
        self.path = Path(self.folder.name, LEDGER_NAME)
        self.ledger = Ledger(self.path, clock=Clock())
        self.state: dict[str, State] = {}
        self.seen: dict[str, InputFile] = {}
        self.results: dict[str, Outcome] = {}
        self.lonely: str | None = None
        self.lonely_deaths: dict[str, int] = {}
        self.names: dict[str, str] = {}

    def teardown(self) -> None:
        if hasattr(self, "ledger"):
            self.ledger.close()
            self.folder.cleanup()

    def flying(self) -> list[str]:
        return [image for image, state in self.state.items() if state is State.PROCESSING]

    def queue(self, image: str) -> None:
        self.state[image] = State.PENDING
        self.lonely_deaths[image] = 0

    @rule(image=images, mtime_ns=st.integers(1, 3))
    def drop(self, image: str, mtime_ns: int) -> None:
        file = file_of(image, mtime_ns=mtime_ns)
        settled = self.ledger.settled([file], **RECIPE)
        self.ledger.enqueue([file], **RECIPE)
        state = self.state.get(image)
        same = self.seen.get(image) == file
        assert settled == ({image} if same and state in {State.DONE, State.FAILED} else set())
        if state is not State.PROCESSING and not same:
            self.queue(image)
            self.seen[image] = file

    @precondition(lambda self: self.lonely is None)
    @rule(wanted=groups)
    def begin(self, wanted: Sequence[str]) -> None:
        files = [self.seen[one] for one in wanted if self.state.get(one) is State.PENDING]
        if files:
            self.ledger.begin(files, solo=False)
            self.state |= dict.fromkeys((file.image for file in files), State.PROCESSING)

    @precondition(lambda self: not self.flying())
    @rule(image=images)
    def begin_alone(self, image: str) -> None:
        if self.state.get(image) is State.PENDING:
            self.ledger.begin([self.seen[image]], solo=True)
            self.state[image] = State.PROCESSING
            self.lonely = image

    @precondition(lambda self: self.flying())
    @rule(data=st.data(), well=st.booleans())
    def finish(self, data: st.DataObject, well: bool) -> None:
        image = data.draw(st.sampled_from(self.flying()))
        file = self.seen[image]
        outcome = done(file) if well else failed(file)
        self.ledger.finish(outcome)
        self.state[image] = State.DONE if well else State.FAILED
        self.results[image] = outcome
        self.lonely = None

    @precondition(lambda self: self.flying())
    @rule(data=st.data())
    def release(self, data: st.DataObject) -> None:
        image = data.draw(st.sampled_from(self.flying()))
        self.ledger.release([image])
        self.state[image] = State.PENDING
        self.lonely = None

    @rule()
    def crash(self) -> None:
        self.ledger.close()
        self.ledger = Ledger(self.path, clock=Clock())
        recovered = self.ledger.recover(max_attempts=3)
        if self.lonely is not None:
            self.lonely_deaths[self.lonely] += 1
        for image in self.flying():
            self.state[image] = State.PENDING
        for image in recovered.failed:
            assert image == self.lonely
            assert self.lonely_deaths[image] >= 2
            self.state[image] = State.FAILED
            self.results[image] = next(
                one.outcome for one in self.ledger.failures() if one.outcome.image == image
            )
        self.lonely = None

    @rule(image=images)
    def retry(self, image: str) -> None:
        escaped = image.replace("[", "[[]")
        expected = self.state.get(image) is State.FAILED
        assert self.ledger.retry(escaped) == int(expected)
        if expected:
            self.queue(image)

    @invariant()
    def one_row_each_in_the_state_of_the_model(self) -> None:
        if not hasattr(self, "ledger"):
            return
        counts = self.ledger.standing(since_s=0).counts
        assert counts == {state: list(self.state.values()).count(state) for state in State}
        exported = self.ledger.unexported(limit=99)
        assert {one.image: one for one in exported} == self.results
        assert len(exported) == len(self.results)

    @invariant()
    def no_name_changes_hands(self) -> None:
        if not hasattr(self, "ledger"):
            return
        now = {image: self.ledger.claim(image) for image in self.state}
        assert len(set(now.values())) == len(now)
        assert {image: now[image] for image in self.names} == self.names
        self.names = now

    @invariant()
    def whatever_waits_is_offered(self) -> None:
        if not hasattr(self, "ledger"):
            return
        offered = self.ledger.pending(FOLDER, limit=99) + self.ledger.suspects(FOLDER)
        expected = [one for one in self.state if self.state[one] is State.PENDING]
        assert sorted(file.image for file in offered) == sorted(expected)
        assert all(file == self.seen[file.image] for file in offered)


Life.TestCase.settings = settings(max_examples=40, stateful_step_count=30, deadline=None)
TestLifeOfRows = Life.TestCase


def test_every_error_is_one_of_ours_with_an_exit_code(path: Path) -> None:
    path.write_bytes(b"x" * 5000)
    with pytest.raises(BcsegError) as caught:
        Ledger(path)
    assert caught.value.exit_code == 78
