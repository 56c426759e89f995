"""The daemon's report: made beside the work, now and then, and never in its way."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from daemons import Place, place_fixture, wait_until
from parts import write_smear
from reports import done, record

from bcseg_batch.service.reporting import Reporter


@pytest.fixture
def place(tmp_path: Path, tiny_model: Path) -> Iterator[Place]:
    yield from place_fixture(tmp_path, tiny_model)


def reporter(folder: Path, refresh_s: float = 0.01) -> Reporter:
    return Reporter(folder, group_pattern=None, min_cells=200, refresh_s=refresh_s)


def pages(folder: Path) -> int:
    return len(list((folder / "report/images").glob("*.html")))


def test_it_is_made_at_once_and_again_where_there_is_anything_new(tmp_path: Path) -> None:
    record(tmp_path, done(tmp_path))
    made = reporter(tmp_path)
    index = tmp_path / "report/index.html"
    wait_until(index.exists, "a report")
    record(tmp_path, done(tmp_path, "b.jpg"))
    made.want()
    wait_until(lambda: pages(tmp_path) == 2, "the second image in it")
    made.finish(timeout_s=10.0)


def test_the_end_has_the_last_results_in_it(tmp_path: Path) -> None:
    record(tmp_path, done(tmp_path))
    made = reporter(tmp_path, refresh_s=3600.0)
    wait_until((tmp_path / "report/index.html").exists, "a report")
    record(tmp_path, done(tmp_path, "b.jpg"))
    made.want()
    made.finish(timeout_s=30.0)
    assert pages(tmp_path) == 2


def test_an_end_without_time_leaves_it_to_the_next(tmp_path: Path) -> None:
    record(tmp_path, done(tmp_path))
    made = reporter(tmp_path, refresh_s=3600.0)
    wait_until((tmp_path / "report/index.html").exists, "a report")
    record(tmp_path, done(tmp_path, "b.jpg"))
    made.want()
    made.finish(timeout_s=0.0)
    assert pages(tmp_path) == 1


def test_a_report_that_fails_is_tried_again(tmp_path: Path) -> None:
    made = reporter(tmp_path)  # no records yet
    record(tmp_path, done(tmp_path))
    wait_until((tmp_path / "report/index.html").exists, "a report, after the failure")
    made.finish(timeout_s=10.0)


@pytest.mark.slow
def test_the_daemon_makes_it(place: Place) -> None:
    place.configure(report={"enabled": True, "refresh_s": 1.0})
    write_smear(place.input / "a.png")
    place.run_until_idle()
    assert pages(place.output) == 1


@pytest.mark.slow
def test_a_report_that_cannot_be_written_does_not_stop_the_daemon(place: Place) -> None:
    place.configure(report={"enabled": True, "refresh_s": 1.0})
    (place.output / "report").write_text("in the way")
    write_smear(place.input / "a.png")
    place.run_until_idle()
    assert len(list((place.output / "masks").iterdir())) == 1
    assert "the report cannot be made" in place.log
