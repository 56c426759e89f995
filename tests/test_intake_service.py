"""Watch, rescan and settle together, on real folders."""

from __future__ import annotations

import errno
import os
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest
from loguru import logger

from bcseg_batch.intake.ignore import IgnoreRules
from bcseg_batch.intake.watch import FolderWatch, WatchMode
from bcseg_batch.items import InputFile
from bcseg_batch.service.intake import Intake

RULES = IgnoreRules({".png"})


@pytest.fixture
def root(tmp_path: Path) -> Path:
    folder = tmp_path / "in"
    folder.mkdir()
    return folder


class Taker:
    """Asks an intake as the daemon does, and keeps what it gave."""

    def __init__(self, root: Path, mode: WatchMode = WatchMode.INOTIFY, **options: float) -> None:
        self.taken: dict[str, int] = {}
        self.intake = Intake(
            root,
            RULES,
            self.known,
            recursive=True,
            mode=mode,
            settle_s=options.get("settle_s", 0.02),
            rescan_interval_s=options.get("rescan_interval_s", 3600.0),
            poll_interval_s=0.1,
        )

    def known(self, files: Sequence[InputFile]) -> set[str]:
        return {file.image for file in files if file.image in self.taken}

    def until(self, true: Callable[[], bool], *, timeout_s: float = 10.0) -> None:
        deadline_s = time.monotonic() + timeout_s
        while not true():
            assert time.monotonic() < deadline_s, (self.intake.trouble, len(self.taken))
            for file in self.intake.poll():
                self.taken[file.image] = self.taken.get(file.image, 0) + 1
            self.intake.wait(0.02)

    def until_taken(self, *images: str, timeout_s: float = 10.0) -> None:
        self.until(lambda: set(images) <= self.taken.keys(), timeout_s=timeout_s)

    def until_quiet(self) -> None:
        self.until(lambda: self.intake.quiet)

    def until_rescans(self, count: int) -> None:
        self.until(lambda: self.intake.rescans >= count)

    @property
    def watch(self) -> FolderWatch:
        watch = self.intake._watch
        assert watch is not None
        return watch


@pytest.fixture
def takers() -> Iterator[Callable[..., Taker]]:
    made: list[Taker] = []

    def make(*args: object, **options: object) -> Taker:
        made.append(Taker(*args, **options))  # type: ignore[arg-type] # as the tests call it
        return made[-1]

    yield make
    for taker in made:
        taker.intake.stop()


def test_finds_what_lay_there_and_what_comes_each_once(
    root: Path, takers: Callable[..., Taker]
) -> None:
    (root / "here.png").write_bytes(b"1")
    (root / "notes.txt").write_bytes(b"1")
    taker = takers(root)
    assert not taker.intake.quiet
    taker.until_quiet()
    assert taker.taken == {"here.png": 1}

    (root / "sub" / "deep").mkdir(parents=True)
    (root / "sub" / "deep" / "comes.png").write_bytes(b"2")
    taker.until_taken("sub/deep/comes.png")
    taker.until_quiet()
    assert taker.taken == {"here.png": 1, "sub/deep/comes.png": 1}


def test_the_rescan_finds_what_no_event_told(root: Path, takers: Callable[..., Taker]) -> None:
    taker = takers(root)
    taker.until_quiet()
    # A deaf watch: its threads live, and nothing arrives.
    taker.watch.put = lambda event: None  # type: ignore[method-assign] # the deafness itself
    (root / "silent.png").write_bytes(b"1")
    rescans = taker.intake.rescans
    taker.intake.rescan()
    taker.until(lambda: taker.intake.rescans > rescans)
    taker.until_taken("silent.png")


def test_lost_events_lead_to_a_rescan(root: Path, takers: Callable[..., Taker]) -> None:
    taker = takers(root)
    taker.until_quiet()
    # As where the kernel's queue was full: nothing but the loss itself is told.
    taker.watch.put = lambda event: None  # type: ignore[method-assign] # the deafness itself
    for number in range(50):
        (root / f"{number}.png").write_bytes(b"1")
    taker.watch.note_overflow()
    taker.until_taken(*(f"{number}.png" for number in range(50)))


def test_a_dead_observer_is_replaced(root: Path, takers: Callable[..., Taker]) -> None:
    taker = takers(root)
    taker.until_quiet()
    dead = taker.watch
    dead.stop()
    (root / "meanwhile.png").write_bytes(b"1")
    taker.until_taken("meanwhile.png")
    assert taker.watch is not dead
    assert taker.intake.trouble is None


@pytest.mark.parametrize("mode", [WatchMode.INOTIFY, WatchMode.POLL])
def test_a_vanished_folder_is_reported_and_waited_for(
    root: Path, takers: Callable[..., Taker], mode: WatchMode
) -> None:
    (root / "a.png").write_bytes(b"1")
    taker = takers(root, mode)
    taker.until_taken("a.png")
    aside = root.with_name("aside")
    root.rename(aside)
    taker.until(lambda: taker.intake.trouble is not None)
    assert str(root) in (taker.intake.trouble or "") or "looked at" in (taker.intake.trouble or "")
    (aside / "b.png").write_bytes(b"1")
    aside.rename(root)
    taker.until_taken("b.png")
    taker.until(lambda: taker.intake.trouble is None)
    (root / "c.png").write_bytes(b"1")
    taker.until_taken("c.png")
    assert taker.taken["a.png"] == 1


def test_a_folder_that_was_replaced_is_watched_anew(
    root: Path, takers: Callable[..., Taker]
) -> None:
    (root / "a.png").write_bytes(b"1")
    taker = takers(root)
    taker.until_taken("a.png")
    root.rename(root.with_name("old"))
    root.mkdir()
    (root / "b.png").write_bytes(b"1")
    taker.until_taken("b.png")
    (root / "c.png").write_bytes(b"1")
    taker.until_taken("c.png")


def test_a_folder_that_is_not_there_at_the_start_is_waited_for(
    root: Path, takers: Callable[..., Taker]
) -> None:
    root.rmdir()
    taker = takers(root)
    taker.until(lambda: taker.intake.trouble is not None)
    assert taker.intake.choice is None
    root.mkdir()
    (root / "a.png").write_bytes(b"1")
    taker.until_taken("a.png")


def test_more_files_than_can_be_held_all_come_out(root: Path, takers: Callable[..., Taker]) -> None:
    for number in range(5000):
        os.close(os.open(root / f"{number:04d}.png", os.O_CREAT | os.O_WRONLY))
    taker = takers(root)
    most = 0

    def all_taken() -> bool:
        nonlocal most
        most = max(most, taker.intake.settling)
        return len(taker.taken) == 5000

    taker.until(all_taken, timeout_s=30)
    assert set(taker.taken.values()) == {1}
    assert most <= 1000 + 500  # the tracker's room and one step of the rescan


def test_more_files_at_once_than_can_be_held_while_watched(
    root: Path, takers: Callable[..., Taker]
) -> None:
    taker = takers(root)
    taker.until_quiet()
    for number in range(3000):
        os.close(os.open(root / f"{number:04d}.png", os.O_CREAT | os.O_WRONLY))
    taker.until(lambda: len(taker.taken) == 3000, timeout_s=30)


def test_a_rescan_of_known_files_settles_nothing(root: Path, takers: Callable[..., Taker]) -> None:
    for number in range(700):
        (root / f"{number}.png").touch()
    taker = takers(root)
    taker.until(lambda: len(taker.taken) == 700)
    rescans = taker.intake.rescans
    taker.intake.rescan()
    taker.until(lambda: taker.intake.rescans > rescans)
    assert taker.intake.settling == 0
    assert set(taker.taken.values()) == {1}


def test_where_inotify_has_nothing_left_auto_polls_and_inotify_waits(
    root: Path, takers: Callable[..., Taker], monkeypatch: pytest.MonkeyPatch
) -> None:
    from watchdog.observers.inotify_c import InotifyFD

    def refuse(*_: object, **__: object) -> int:
        raise OSError(errno.ENOSPC, "inotify watch limit reached")

    monkeypatch.setattr(InotifyFD, "_get_or_create_watch", refuse)
    (root / "a.png").write_bytes(b"1")
    auto = takers(root, WatchMode.AUTO)
    auto.until_taken("a.png")
    assert auto.intake.choice is not None
    assert auto.intake.choice.mode is WatchMode.POLL
    assert auto.intake.trouble is None
    (root / "b.png").write_bytes(b"1")
    auto.until_taken("b.png")

    strict = takers(root, WatchMode.INOTIFY)
    strict.until_taken("a.png")  # by the rescan, which needs no watch
    assert "max_user_watches" in (strict.intake.trouble or "")
    monkeypatch.undo()
    strict.until(lambda: strict.intake.trouble is None)
    (root / "c.png").write_bytes(b"1")
    strict.until_taken("c.png")


def test_a_file_taken_back_comes_again_after_its_wait(
    root: Path, takers: Callable[..., Taker]
) -> None:
    (root / "a.png").write_bytes(b"1")
    taker = takers(root)
    taker.until_taken("a.png")
    began_s = time.monotonic()
    taker.intake.again("a.png", wait_s=0.3)
    assert not taker.intake.quiet
    taker.until(lambda: taker.taken["a.png"] == 2)
    assert time.monotonic() - began_s >= 0.3


def test_a_place_that_cannot_be_looked_into_is_told_once(
    root: Path, takers: Callable[..., Taker]
) -> None:
    (root / "broken.png").symlink_to("nowhere")
    said: list[str] = []
    number = logger.add(said.append, level="WARNING", format="{message}")
    try:
        taker = takers(root)
        taker.until_quiet()
        for expected in (2, 3):
            taker.intake.rescan()
            taker.until_rescans(expected)
    finally:
        logger.remove(number)
    assert len(said) == 1
    assert "broken.png" in said[0]
    assert "leads nowhere" in said[0]
