"""What people are told while a run goes on."""

from __future__ import annotations

import io
import re
from collections.abc import Iterator

import pytest
from loguru import logger
from rich.console import Console

from bcseg_batch.items import Outcome, Status
from bcseg_batch.service.progress import DoneRate, ProgressBar, ProgressLines

DONE = Outcome(image="a.png", status=Status.DONE)
FAILED = Outcome(image="b.png", status=Status.FAILED, error="UnreadableImageError: damaged")


class Clock:
    now_s = 1000.0

    def __call__(self) -> float:
        return self.now_s


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def told() -> Iterator[list[str]]:
    """The log lines."""
    lines: list[str] = []
    number = logger.add(lambda message: lines.append(str(message).rstrip()), format="{message}")
    yield lines
    logger.remove(number)


def run_batches(
    clock: Clock, progress: ProgressLines | ProgressBar, batches: int, *, warm_up_s: float = 60
) -> None:
    """Batches of 8 every 4 s, of which the first takes longer."""
    for number in range(batches):
        clock.now_s += 4.0 if number else warm_up_s
        for _ in range(8):
            progress.advance(DONE)


def test_the_warm_up_does_not_slow_the_rate(clock: Clock, told: list[str]) -> None:
    with ProgressLines(clock) as lines:
        lines.start(1000)
        run_batches(clock, lines, 40)
    assert told[0] == "1000 images in the input folder"
    rates = [float(m[1]) for line in told if (m := re.search(r"([\d.]+) images/s", line))]
    assert len(rates) >= 10
    assert all(0.9 * 2 <= rate <= 1.1 * 2 for rate in rates), rates
    assert rates[-1] == pytest.approx(2, rel=0.1)


def test_no_rate_is_told_before_there_is_one(clock: Clock, told: list[str]) -> None:
    with ProgressLines(clock) as lines:
        lines.start(100)
        run_batches(clock, lines, 1)
    assert told[1:] == ["1 of 100, 0 failed"]


def test_what_fails_and_what_was_done_before_is_no_work(clock: Clock) -> None:
    rate = DoneRate(clock)
    for _ in range(100):
        clock.now_s += 1.0
        rate.count(DONE)
        for _ in range(5):
            rate.count(FAILED)
            rate.count(None)
    assert rate.images_per_s() == pytest.approx(1.0)
    assert rate.text(30) == "1.0 images/s, about 30 s left"


def test_a_run_in_which_all_fails_has_no_rate(clock: Clock, told: list[str]) -> None:
    with ProgressLines(clock) as lines:
        lines.start(30)
        for _ in range(30):
            clock.now_s += 1.0
            lines.advance(FAILED)
    assert "20 of 30, 20 failed" in told
    assert not [line for line in told if "images/s" in line]


def test_the_bar_tells_the_same_rate(clock: Clock) -> None:
    console = Console(file=io.StringIO(), force_terminal=True, width=120)
    with ProgressBar(console, clock) as bar:
        bar.start(1000)
        run_batches(clock, bar, 20)
        bar.advance(FAILED)
    assert isinstance(console.file, io.StringIO)
    text = re.sub(r"\x1b\[[\d;?]*[A-Za-z]", "", console.file.getvalue())
    assert "161/1000" in text
    # The rate of 19 batches in 18 intervals, but for the last image: a little high.
    assert re.search(r"2\.[01] images/s, about 4[0-2]\d s left", text), text[-200:]
    assert "1 failed" in text


def test_a_total_that_is_not_known_yet_is_said_to_be_so(clock: Clock, told: list[str]) -> None:
    with ProgressLines(clock) as lines:
        lines.start(1000, is_whole=False)
        run_batches(clock, lines, 20)
        lines.expect(1200, is_whole=False)
        run_batches(clock, lines, 20, warm_up_s=4)
        assert told[0] == "more than 1000 images in the input folder"
        unknown = told[1:]
        lines.expect(1300, is_whole=True)
        run_batches(clock, lines, 20, warm_up_s=4)
    assert all(re.match(r"\d+ of more than 1[02]00, 0 failed", line) for line in unknown)
    assert "of more than 1200" in unknown[-1]
    assert "images/s" in unknown[-1]
    assert not [line for line in unknown if "left" in line]
    assert re.fullmatch(r"\d+ of 1300, 0 failed, 2\.\d images/s, about \d+ s left", told[-1])


def test_the_bar_waits_for_the_total(clock: Clock) -> None:
    console = Console(file=io.StringIO(), force_terminal=True, width=120)
    assert isinstance(console.file, io.StringIO)

    def text() -> str:
        return re.sub(r"\x1b\[[\d;?]*[A-Za-z]", "", console.file.getvalue())  # type: ignore[attr-defined]  # a StringIO

    with ProgressBar(console, clock) as bar:
        bar.start(100, is_whole=False)
        run_batches(clock, bar, 8)
        bar.expect(150, is_whole=False)
    assert "64 of more than 150" in text()
    assert "left" not in text()
    console = Console(file=io.StringIO(), force_terminal=True, width=120)
    with ProgressBar(console, clock) as bar:
        bar.start(100, is_whole=False)
        bar.expect(150, is_whole=True)
        run_batches(clock, bar, 8)
    assert "64/150" in text()
    assert "s left" in text()
