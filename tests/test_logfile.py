"""The log: what is written, what survives, and what is found again."""

from __future__ import annotations

import gzip
import io
import json
import logging
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import suppress
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from loguru import logger

from bcseg_batch.errors import UsageError
from bcseg_batch.service.log import (
    LimitedSink,
    is_journal,
    journal_text,
    log_folder,
    log_of_the_daemon,
)
from bcseg_batch.service.logfile import (
    LEVELS,
    LogFile,
    LogLine,
    LogQuery,
    from_json,
    parse_since,
    read_logs,
    render,
    select,
    to_json,
)
from bcseg_batch.service.ratelimit import RateLimit, kind_of
from bcseg_batch.settings import LogSettings

NOW = datetime(2026, 3, 1, 12, 0, tzinfo=UTC)
CURRENT = "bcseg-batch.jsonl"


def line(message: str = "done", **fields: object) -> LogLine:
    return LogLine(**{"time": NOW, "level": "INFO", "message": message, **fields})  # type: ignore[arg-type]


@pytest.fixture
def restored_logging() -> Iterator[None]:
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    yield
    logger.remove()
    logging.captureWarnings(capture=False)
    root.handlers[:] = handlers
    root.setLevel(level)


def messages(folder: Path, query: LogQuery | None = None) -> list[str]:
    return [found.message for found in read_logs(folder, query)]


def write(folder: Path, *texts: str, rotate_bytes: int = 10**9, keep_files: int = 100) -> None:
    log = LogFile(folder, rotate_bytes=rotate_bytes, keep_files=keep_files)
    for text in texts:
        log.write(line(text))
    log.close()


# ---------------------------------------------------------------------- one line

lines = st.builds(
    LogLine,
    time=st.datetimes(
        min_value=datetime(1970, 1, 2),  # noqa: DTZ001 - hypothesis adds the zone
        max_value=datetime(2999, 1, 1),  # noqa: DTZ001 - likewise
        timezones=st.just(UTC),
    ).map(lambda time: time.replace(microsecond=time.microsecond // 1000 * 1000)),
    level=st.sampled_from(list(LEVELS)),
    message=st.text(st.characters(codec=None)),
    image=st.none() | st.text(st.characters(codec=None)),
    stage=st.none() | st.sampled_from(["decode", "infer", "write"]),
    batch=st.none() | st.integers(0, 10**9),
    ms=st.none() | st.integers(0, 10**6) | st.floats(0, 10**6),
    exception=st.none() | st.text(),
)


@given(lines)
def test_a_line_is_read_back_as_it_was_written(one: LogLine) -> None:
    text = to_json(one)
    assert text.isascii()
    assert "\n" not in text
    assert from_json(text) == one


@given(lines, st.data())
def test_a_torn_line_is_no_line_and_costs_only_itself(one: LogLine, data: st.DataObject) -> None:
    whole = to_json(one).encode()
    torn = whole[: data.draw(st.integers(0, len(whole) - 1))]
    assert list(select([whole, torn, whole], LogQuery())) == [one, one]


@given(st.binary() | st.text() | st.recursive(st.none() | st.integers(), st.lists).map(json.dumps))
def test_what_is_no_line_of_ours_is_none(text: str | bytes) -> None:
    assert from_json(text) is None


def test_nesting_that_is_too_deep_is_damage_too() -> None:
    assert from_json("[" * 100_000) is None


def test_people_read_one_line_with_the_place_in_the_pipeline() -> None:
    text = render(line("'a\n.jpg' done", stage="record", batch=3, ms=123.4))
    assert text.endswith("INFO     'a\\n.jpg' done (record, batch 3, 123 ms)")
    assert "\n" not in text


def test_people_see_a_traceback_indented_below() -> None:
    assert render(line("bug", exception="Traceback\n  ValueError: \x1b[31m")).splitlines()[1:] == [
        "  Traceback",
        "    ValueError: \\x1b[31m",
    ]


# ---------------------------------------------------------------------- choosing


@pytest.mark.parametrize(
    ("query", "expected"),
    [
        (LogQuery(), ["a", "b", "c"]),
        (LogQuery(image="night/*.jpg"), ["b"]),
        (LogQuery(image="*"), ["a", "b"]),
        (LogQuery(level="warning"), ["b", "c"]),
        (LogQuery(level="ERROR"), ["c"]),
        (LogQuery(stage="decode"), ["a"]),
        (LogQuery(since=NOW - timedelta(hours=1)), ["b", "c"]),
        (LogQuery(since=NOW - timedelta(hours=1), level="ERROR"), ["c"]),
    ],
)
def test_a_query_gives_what_was_asked_for(query: LogQuery, expected: list[str]) -> None:
    log = [
        line("a", image="day/1.jpg", stage="decode", time=NOW - timedelta(hours=2)),
        line("b", image="night/1.jpg", stage="record", level="WARNING"),
        line("c", level="ERROR"),
    ]
    assert [found.message for found in select(map(to_json, log), query)] == expected


def test_an_unknown_level_is_told_with_the_known_ones() -> None:
    with pytest.raises(UsageError, match="'loud': must be one of TRACE, DEBUG, INFO"):
        LogQuery(level="loud")


@given(st.lists(st.tuples(st.integers(0, 1000), st.sampled_from("smhdw")), min_size=1, max_size=4))
def test_a_span_goes_back_by_the_sum_of_its_parts(parts: list[tuple[int, str]]) -> None:
    unit = {"s": "seconds", "m": "minutes", "h": "hours", "d": "days", "w": "weeks"}
    back = sum((timedelta(**{unit[letter]: n}) for n, letter in parts), timedelta())
    assert parse_since("".join(f"{n}{letter}" for n, letter in parts), NOW) == NOW - back


@given(st.datetimes(min_value=datetime(1971, 1, 1), timezones=st.just(UTC)))  # noqa: DTZ001 - hypothesis adds the zone
def test_a_time_with_a_zone_is_that_time(time: datetime) -> None:
    assert parse_since(time.isoformat(), NOW) == time


def test_a_time_without_a_zone_is_local() -> None:
    local = datetime(2026, 2, 28, 8, 30).astimezone()
    assert parse_since("2026-02-28T08:30", NOW) == local
    assert parse_since(" 1D12H ", NOW) == NOW - timedelta(hours=36)


@given(st.text())
def test_any_text_is_a_time_or_a_usage_error(text: str) -> None:
    with suppress(UsageError):
        assert parse_since(text, NOW).tzinfo is UTC


@pytest.mark.parametrize("text", ["", "2", "h", "2x", "2h ago", "-2h", "9" * 30 + "w", "9999999w"])
def test_these_are_no_times(text: str) -> None:
    with pytest.raises(UsageError, match="--since"):
        parse_since(text, NOW)


# ---------------------------------------------------------------------- the files


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 60), st.integers(1, 600), st.integers(1, 8))
def test_the_newest_lines_are_kept_in_order_through_rotation_and_compression(
    count: int, rotate_bytes: int, keep_files: int
) -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        texts = [f"line {number}" for number in range(count)]
        write(folder, *texts, rotate_bytes=rotate_bytes, keep_files=keep_files)
        found = messages(folder)
        assert found == texts[count - len(found) :]
        full = [path.name for path in folder.iterdir() if path.name != CURRENT]
        assert len(full) <= keep_files
        assert all(name.endswith(".jsonl.gz") for name in full)
        if len(full) < keep_files:
            assert found == texts


def test_a_rotated_log_goes_on_where_the_last_process_left_it(tmp_path: Path) -> None:
    for number in range(5):
        write(tmp_path, f"run {number}", rotate_bytes=1)
    assert messages(tmp_path) == [f"run {number}" for number in range(5)]


def test_a_line_torn_by_a_dead_process_does_not_damage_the_next(tmp_path: Path) -> None:
    write(tmp_path, "before")
    with (tmp_path / CURRENT).open("a") as file:
        file.write('{"time": "2026-03-0')
    write(tmp_path, "after")
    assert messages(tmp_path) == ["before", "after"]


def test_a_damaged_archive_costs_its_own_end_only(tmp_path: Path) -> None:
    write(tmp_path, "a", "b", "c", rotate_bytes=1)
    first, second = sorted(tmp_path.glob("*.gz"))
    first.write_bytes(first.read_bytes()[:-9])
    second.write_bytes(b"no gzip at all")
    assert messages(tmp_path)[-1] == "c"
    assert "b" not in messages(tmp_path)


def test_compressing_that_was_cut_off_shows_no_line_twice(tmp_path: Path) -> None:
    write(tmp_path, "a", "b", rotate_bytes=1)
    packed = tmp_path / "bcseg-batch-000001.jsonl.gz"
    (tmp_path / "bcseg-batch-000001.jsonl").write_bytes(gzip.decompress(packed.read_bytes()))
    packed.write_bytes(packed.read_bytes()[:20])
    assert messages(tmp_path) == ["a", "b"]
    write(tmp_path, "c", rotate_bytes=1)  # and it is made up for
    assert messages(tmp_path) == ["a", "b", "c"]
    assert not (tmp_path / "bcseg-batch-000001.jsonl").exists()


def test_old_files_are_not_read_for_new_lines(tmp_path: Path) -> None:
    write(tmp_path, "old", "new", rotate_bytes=1)
    packed = tmp_path / "bcseg-batch-000001.jsonl.gz"
    packed.write_bytes(b"would be told as damaged if it were read")
    os.utime(packed, (0, 0))
    assert messages(tmp_path, LogQuery(since=NOW)) == ["new"]


def test_a_log_that_cannot_be_written_stops_nobody_and_says_so_later(tmp_path: Path) -> None:
    folder = tmp_path / "log"
    folder.write_text("a file is in the way")
    log = LogFile(folder, rotate_bytes=10**9, keep_files=1)
    log.write(line("lost"))
    log.write(line("lost too"))
    folder.unlink()
    log.write(line("kept"))
    log.close()
    assert messages(folder) == [
        "2 lines before this one could not be written to this log",
        "kept",
    ]


@pytest.mark.skipif(
    not Path("/dev/full").exists(), reason="not on this machine: /dev/full, a disk that is full"
)
def test_a_full_disk_stops_nobody(tmp_path: Path) -> None:
    (tmp_path / CURRENT).symlink_to("/dev/full")
    log = LogFile(tmp_path, rotate_bytes=10**9, keep_files=1)
    log.write(line("lost"))
    (tmp_path / CURRENT).unlink()
    log.write(line("kept"))
    log.close()
    assert messages(tmp_path)[-1] == "kept"
    assert "1 lines" in messages(tmp_path)[0]


def test_a_deleted_log_is_begun_anew(tmp_path: Path) -> None:
    log = LogFile(tmp_path, rotate_bytes=10**9, keep_files=1)
    log.write(line("a"))
    (tmp_path / CURRENT).unlink()
    log.write(line("b"))
    log.close()
    assert messages(tmp_path) == ["b"]


def test_a_folder_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no-such"):
        messages(tmp_path / "no-such")


def test_an_empty_folder_has_no_lines(tmp_path: Path) -> None:
    assert messages(tmp_path) == []


# ---------------------------------------------------------------------- following


class Writer:
    """Writes some lines each time that a reader has nothing more to read."""

    def __init__(self, folder: Path, *steps: list[str], rotate_bytes: int = 10**9) -> None:
        self._log = LogFile(folder, rotate_bytes=rotate_bytes, keep_files=100)
        self._steps = list(steps)

    def __call__(self) -> bool:
        if not self._steps:
            self._log.close()
            return False
        for text in self._steps.pop(0):
            self._log.write(line(text))
        return True


@settings(max_examples=40, deadline=None)
@given(
    st.lists(st.lists(st.just("x"), max_size=5), max_size=8),
    st.integers(1, 500),
    st.integers(0, 4),
)
def test_following_misses_nothing_across_rotations(
    steps: list[list[str]], rotate_bytes: int, before: int
) -> None:
    numbers = iter(range(1000))
    first = [f"line {next(numbers)}" for _ in range(before)]
    texts = [[f"line {next(numbers)}" for _ in step] for step in steps]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write(folder, *first, rotate_bytes=rotate_bytes)
        # Once more nothing: a reader that has just seen a rotation looks at the new file then.
        writer = Writer(folder, *texts, [], [], rotate_bytes=rotate_bytes)
        found = [one.message for one in read_logs(folder, follow=True, wait=writer)]
    assert found == first + [text for step in texts for text in step]


def test_following_waits_for_the_end_of_a_line(tmp_path: Path) -> None:
    whole = to_json(line("in two parts")).encode() + b"\n"
    parts = [whole[:20], whole[20:]]

    def wait() -> bool:
        if not parts:
            return False
        with (tmp_path / CURRENT).open("ab") as file:
            file.write(parts.pop(0))
        return True

    assert [found.message for found in read_logs(tmp_path, follow=True, wait=wait)] == [
        "in two parts"
    ]


# ---------------------------------------------------------------------- the rate


def test_names_and_numbers_make_no_new_kind() -> None:
    assert kind_of("ERROR", "'a b.jpg' failed at 12") == kind_of("ERROR", "'it\\'s' failed at 3")
    assert kind_of("ERROR", "'a' failed: torn") != kind_of("ERROR", "'a' failed: too large")
    assert kind_of("ERROR", "same") != kind_of("WARNING", "same")


@given(st.lists(st.tuples(st.sampled_from("ab"), st.floats(0, 30)), max_size=200))
def test_every_line_passes_or_is_counted_and_few_of_a_kind_pass_in_a_window(
    events: list[tuple[str, float]],
) -> None:
    limit = RateLimit(first=3, window_s=60)
    now_s = 0.0
    passed: list[tuple[str, float]] = []
    counted = 0
    for kind, later_s in events:
        now_s += later_s
        counted += sum(count for _, count in limit.ended(now_s))
        if limit.admits(kind, now_s):
            passed.append((kind, now_s))
    counted += sum(count for _, count in limit.close())
    assert len(passed) + counted == len(events)
    for kind, began_s in passed:
        inside = [at_s for other, at_s in passed if other == kind and 0 <= at_s - began_s < 60]
        assert len(inside) <= 2 * 3  # the end of one window and the start of the next


def test_repeated_errors_become_one_line_and_other_lines_pass() -> None:
    taken: list[str] = []
    now_s = 0.0
    sink = LimitedSink(
        [lambda one: taken.append(f"{one.level} {one.message}")],
        limit=RateLimit(first=2, window_s=60),
        clock=lambda: now_s,
    )
    for number in range(5):
        sink.take(line(f"'{number}.jpg' failed", level="WARNING"))
        sink.take(line("fine"))
    now_s = 61.0
    sink.take(line("next minute"))
    assert [text for text in taken if text != "INFO fine"] == [
        "WARNING '0.jpg' failed",
        "WARNING '1.jpg' failed",
        "WARNING 3 more like this: * failed",
        "INFO next minute",
    ]
    assert taken.count("INFO fine") == 5


def test_what_is_held_back_is_told_at_the_end() -> None:
    taken: list[str] = []
    sink = LimitedSink([lambda one: taken.append(one.message)], limit=RateLimit(first=1))
    for _ in range(3):
        sink.take(line("disk full", level="ERROR"))
    sink.stop()
    assert taken == ["disk full", "2 more like this: disk full"]


# ---------------------------------------------------------------------- all together


def test_the_journal_gets_priorities_and_no_time() -> None:
    assert journal_text(line("two\nlines", level="WARNING")) == "<4>two lines"
    assert journal_text(line("bug", level="ERROR", exception="Traceback\n  x")) == (
        "<3>bug\n<3>Traceback\n<3>  x"
    )


def test_only_the_very_stream_that_systemd_named_is_the_journal(tmp_path: Path) -> None:
    with (tmp_path / "a").open("w") as stream, (tmp_path / "b").open("w") as other:
        facts = os.fstat(stream.fileno())
        environ = {"JOURNAL_STREAM": f"{facts.st_dev}:{facts.st_ino}"}
        assert is_journal(stream, environ)
        assert not is_journal(other, environ)
        assert not is_journal(stream, {})
        assert not is_journal(io.StringIO(), environ)


def test_the_folder_is_the_setting_then_systemds_then_the_states(tmp_path: Path) -> None:
    state = tmp_path / "state"
    given = LogSettings(folder=tmp_path / "given")
    environ = {"LOGS_DIRECTORY": "/var/log/a:/var/log/b"}
    assert log_folder(given, state, environ) == tmp_path / "given"
    assert log_folder(LogSettings(), state, environ) == Path("/var/log/a")
    assert log_folder(LogSettings(), state, {}) == state / "log"


@pytest.mark.usefixtures("restored_logging")
def test_a_bug_is_in_the_file_with_its_traceback_and_an_error_is_not(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    log_of_the_daemon(LogSettings(), tmp_path, {})
    logger.bind(image="a.jpg", stage="decode", batch=7, ms=12).warning("{!r} failed", "a.jpg")
    try:
        raise ValueError("poison")
    except ValueError:
        logger.exception("a bug")
    logging.getLogger("library").error("of somebody else")
    logger.remove()
    failed, bug, other = read_logs(tmp_path / "log")
    assert (failed.image, failed.stage, failed.batch, failed.ms) == ("a.jpg", "decode", 7, 12)
    assert failed.exception is None
    assert bug.exception is not None
    assert bug.exception.splitlines()[-1] == "ValueError: poison"
    assert other.message == "library: of somebody else"
    shown = capsys.readouterr().err
    assert "WARNING  'a.jpg' failed (decode, batch 7, 12 ms)" in shown
    assert "ValueError: poison" in shown


_UNDER_SYSTEMD = """
import os, sys
from pathlib import Path
from loguru import logger
from bcseg_batch.service.log import log_of_the_daemon
from bcseg_batch.settings import LogSettings
facts = os.fstat(2)
os.environ["JOURNAL_STREAM"] = f"{facts.st_dev}:{facts.st_ino}"
log_of_the_daemon(LogSettings(), Path(sys.argv[1]))
for number in range(30):
    logger.error("{!r} failed", f"{number}\\udcff.jpg")
"""


def test_under_systemd_the_journal_gets_plain_lines_and_the_end_is_told(tmp_path: Path) -> None:
    ran = subprocess.run(
        [sys.executable, "-c", _UNDER_SYSTEMD, tmp_path],
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, "LOGS_DIRECTORY": str(tmp_path / "logs")},
    )
    shown = ran.stderr.splitlines()
    assert shown[0] == "<3>'0\\udcff.jpg' failed"
    assert shown[-1] == "<3>10 more like this: * failed"
    assert len(shown) == 21
    assert len(messages(tmp_path / "logs")) == 21
