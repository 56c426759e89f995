"""Real folders, real inotify, real threads. Only the settle clock is the test's own.

No test sleeps for a fixed time: a barrier file is written and waited for, and since events come in
order, whatever was done before it has been told of by then.
"""

import contextlib
import dataclasses
import itertools
import os
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from bcseg_batch.intake.filesystem import Filesystem, inotify_limits
from bcseg_batch.intake.ignore import IgnoreRules
from bcseg_batch.intake.scan import scan_folder
from bcseg_batch.intake.settle import SettleTracker, look_at
from bcseg_batch.intake.watch import (
    FolderWatch,
    WatchChoice,
    WatchError,
    WatchMode,
    choose_by_type,
    choose_mode,
    outermost,
)
from bcseg_batch.items import InputFile

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="inotify is Linux's")

SETTLE_S = 1.0
DEADLINE_S = 20.0
INOTIFY = WatchChoice(WatchMode.INOTIFY, "test")
POLL = WatchChoice(WatchMode.POLL, "test")


def wait_until(condition: Callable[[], bool]) -> None:
    deadline_s = time.monotonic() + DEADLINE_S
    pause = threading.Event()
    while not condition():
        assert time.monotonic() < deadline_s, "waited in vain"
        pause.wait(0.005)


class Intake:
    """What the daemon's loop does with a watch and a tracker, one step at a time."""

    def __init__(self, root: Path, watch: FolderWatch, capacity: int = 10_000):
        self.root = root
        self.watch = watch
        self.rules = IgnoreRules(suffixes=frozenset({".jpg"}))
        self.now_s = 0.0
        self.tracker = SettleTracker(
            SETTLE_S,
            look=lambda image: look_at(root, image),
            clock=lambda: self.now_s,
            capacity=capacity,
        )
        self.given: list[str] = []
        self._barriers = itertools.count()

    def settle(self, wait_s: float) -> list[InputFile]:
        """Hear all that has happened so far, let time pass, and ask."""
        self.hear()
        files = self.tracker.ready()
        self.now_s += wait_s
        files += self.tracker.ready()
        self.given += [file.image for file in files]
        return files

    def hear(self) -> None:
        barrier = f".barrier-{next(self._barriers)}"
        (self.root / barrier).touch()
        deadline_s = time.monotonic() + DEADLINE_S
        passed = False
        while not passed:
            assert time.monotonic() < deadline_s, "the barrier was not seen"
            self.watch.wait(0.1)
            for image in self.watch.take():
                passed = passed or image == barrier
                if self.rules.reason_file(image) is None:
                    self.tracker.hint(image, event=True)
            for folder in self.watch.take_folders():
                self.scan(folder)

    def scan(self, folder: str = "") -> None:
        prefix = folder + "/" if folder else ""
        with contextlib.suppress(FileNotFoundError, PermissionError):
            for found in scan_folder(self.root / folder, self.rules, recursive=True):
                if isinstance(found, InputFile):
                    self.tracker.hint(prefix + found.image, event=False)


def images(files: list[InputFile]) -> list[str]:
    return sorted(file.image for file in files)


@pytest.fixture
def inbox(tmp_path) -> Path:
    folder = tmp_path / "in"
    folder.mkdir()
    return folder


@pytest.fixture
def outside(tmp_path) -> Path:
    folder = tmp_path / "outside"
    folder.mkdir()
    return folder


@contextlib.contextmanager
def watching(
    folder: Path, choice: WatchChoice = INOTIFY, *, recursive: bool = True, max_queued: int = 10_000
) -> Iterator[FolderWatch]:
    watch = FolderWatch(
        folder, choice, recursive=recursive, poll_interval_s=0.02, max_queued=max_queued
    )
    watch.start()
    try:
        yield watch
    finally:
        watch.stop()


@pytest.fixture
def intake(inbox) -> Iterator[Intake]:
    with watching(inbox) as watch:
        yield Intake(inbox, watch)
        assert watch.is_alive()


@pytest.fixture(autouse=True)
def _no_leak():
    threads, files = threading.active_count(), open_files()
    yield
    wait_until(lambda: threading.active_count() <= threads)
    assert open_files() <= files


def open_files() -> int:
    return sum(1 for _ in Path("/proc/self/fd").iterdir())


# How files come


def test_moved_in(intake, outside):
    (outside / "a.jpg").write_bytes(b"whole")
    (outside / "a.jpg").rename(intake.root / "a.jpg")
    assert intake.settle(0.9) == []
    assert images(intake.settle(0.1)) == ["a.jpg"]
    assert intake.settle(10) == []


def test_renamed_into_place(intake):
    part = intake.root / "a.jpg.part"
    part.write_bytes(b"half")
    assert intake.settle(5) == []
    with part.open("ab") as file:
        file.write(b"whole")
    part.rename(intake.root / "a.jpg")
    assert intake.settle(0.9) == []
    (file,) = intake.settle(0.1)
    assert (file.image, file.size_bytes) == ("a.jpg", 9)
    assert intake.settle(10) == []


def test_copied_over_another(intake, outside):
    (intake.root / "a.jpg").write_bytes(b"old")
    assert images(intake.settle(1)) == ["a.jpg"]
    (outside / "b").write_bytes(b"newer")
    shutil.copyfile(outside / "b", intake.root / "a.jpg")
    assert intake.settle(0.9) == []
    (file,) = intake.settle(0.1)
    assert (file.image, file.size_bytes) == ("a.jpg", 5)


def test_hard_link(intake, outside):
    (outside / "a").write_bytes(b"whole")
    (intake.root / "a.jpg").hardlink_to(outside / "a")
    assert images(intake.settle(1)) == ["a.jpg"]


def test_link_to_a_file(intake, outside):
    (outside / "a").write_bytes(b"whole")
    (intake.root / "a.jpg").symlink_to(outside / "a")
    (file,) = intake.settle(1)
    assert file.size_bytes == 5


def test_written_slowly(intake):
    with (intake.root / "a.jpg").open("wb", buffering=0) as file:
        for _ in range(10):
            file.write(b"0123456789")
            assert intake.settle(0.9) == []
    assert intake.settle(0.9) == []
    (found,) = intake.settle(0.1)
    assert found.size_bytes == 100
    assert intake.given == ["a.jpg"]


def test_written_closed_opened_again_and_written_on(intake):
    for _ in range(5):
        with (intake.root / "a.jpg").open("ab") as file:
            file.write(b"0123456789")
        assert intake.settle(0.9) == []
    (found,) = intake.settle(0.1)
    assert found.size_bytes == 50
    assert intake.settle(10) == []


def test_vanished_before_it_was_ready(intake):
    (intake.root / "a.jpg").write_bytes(b"whole")
    assert intake.settle(0.5) == []
    (intake.root / "a.jpg").unlink()
    assert intake.settle(5) == []
    assert len(intake.tracker) == 0


def test_thousands_at_once(intake):
    names = [f"{number:04}.jpg" for number in range(3000)]
    for name in names:
        (intake.root / name).write_bytes(b"whole")
    assert images(intake.settle(1)) == names
    assert not intake.watch.overflowed


def test_thousands_at_once_with_little_room(inbox):
    names = [f"{number:04}.jpg" for number in range(3000)]
    with watching(inbox, max_queued=100) as watch:
        intake = Intake(inbox, watch, capacity=500)
        for name in names:
            (inbox / name).write_bytes(b"whole")
        wait_until(lambda: watch.overflowed)
        assert watch.take_overflow()
        rounds = 0
        # The rescan finds the rest; what is done is moved away here, where the ledger would know.
        while len(intake.given) < len(names):
            intake.scan()
            for file in intake.settle(1):
                file.path.unlink()
            rounds += 1
            assert rounds < 100
        assert sorted(intake.given) == names


def test_renamed_from_one_name_to_another(intake):
    (intake.root / "a.jpg").write_bytes(b"whole")
    (intake.root / "a.jpg").rename(intake.root / "b.jpg")
    assert images(intake.settle(1)) == ["b.jpg"]


def test_awkward_names(intake):
    names = [
        b"caf\xe9.jpg",
        b"two\nlines.jpg",
        b" .jpg",
        "Ü€\N{SNOWMAN}.jpg".encode(),
        b"\xff\xfe.jpg",
    ]
    folder = os.fsdecode(b"sub\xff\n")
    (intake.root / folder).mkdir()
    wanted = [prefix + os.fsdecode(name) for name in names for prefix in ("", folder + "/")]
    for image in wanted:
        (intake.root / image).write_bytes(b"whole")
    found = intake.settle(1)
    assert images(found) == sorted(wanted)
    assert all(file.path.read_bytes() == b"whole" for file in found)


def test_reading_gives_no_hint(intake):
    (intake.root / "a.jpg").write_bytes(b"whole")
    intake.settle(1)
    (intake.root / "a.jpg").read_bytes()
    list(intake.root.iterdir())
    intake.hear()
    assert len(intake.tracker) == 0


# Sub-folders


def test_folders_created_and_filled_at_once(intake):
    wanted = []
    for number in range(100):
        folder = intake.root / f"day{number:02}"
        folder.mkdir()
        (folder / "a.jpg").write_bytes(b"whole")
        (folder / "deeper").mkdir()
        (folder / "deeper" / "b.jpg").write_bytes(b"whole")
        wanted += [f"day{number:02}/a.jpg", f"day{number:02}/deeper/b.jpg"]
    assert images(intake.settle(1)) == sorted(wanted)
    # And later on, when nothing but the watch on the new folder can tell.
    (intake.root / "day07" / "deeper" / "c.jpg").write_bytes(b"whole")
    assert images(intake.settle(1)) == ["day07/deeper/c.jpg"]


def test_nested_folders_made_at_once_by_another_process(intake):
    deep = "a/b/c/d/e/f"
    command = 'mkdir -p "$0" && printf whole > "$0/x.jpg" && printf whole > "$0/../y.jpg"'
    subprocess.run(["sh", "-c", command, str(intake.root / deep)], check=True)
    assert images(intake.settle(1)) == ["a/b/c/d/e/f/x.jpg", "a/b/c/d/e/y.jpg"]


def test_tree_moved_in(intake, outside):
    tree = outside / "tree"
    (tree / "left" / "deep").mkdir(parents=True)
    (tree / "a.jpg").write_bytes(b"whole")
    (tree / "left" / "deep" / "b.jpg").write_bytes(b"whole")
    tree.rename(intake.root / "tree")
    assert images(intake.settle(1)) == ["tree/a.jpg", "tree/left/deep/b.jpg"]
    (intake.root / "tree" / "left" / "deep" / "c.jpg").write_bytes(b"whole")
    assert images(intake.settle(1)) == ["tree/left/deep/c.jpg"]


def test_tree_renamed_inside(intake):
    (intake.root / "old" / "deep").mkdir(parents=True)
    (intake.root / "old" / "deep" / "a.jpg").write_bytes(b"whole")
    assert images(intake.settle(1)) == ["old/deep/a.jpg"]
    (intake.root / "old").rename(intake.root / "new")
    assert images(intake.settle(1)) == ["new/deep/a.jpg"]
    (intake.root / "new" / "deep" / "b.jpg").write_bytes(b"whole")
    assert images(intake.settle(1)) == ["new/deep/b.jpg"]


def test_tree_copied_in_while_watched(intake, outside):
    wanted = []
    for folder in ("", "x", "x/y", "z"):
        (outside / "tree" / folder).mkdir(parents=True, exist_ok=True)
        for number in range(20):
            (outside / "tree" / folder / f"{number}.jpg").write_bytes(b"whole")
            wanted.append(str(Path("tree", folder, f"{number}.jpg")))
    shutil.copytree(outside / "tree", intake.root / "tree")
    assert images(intake.settle(1)) == sorted(wanted)


def test_folders_that_come_and_go(intake):
    for _ in range(200):
        (intake.root / "sub").mkdir()
        (intake.root / "sub" / "a.jpg").write_bytes(b"")
        shutil.rmtree(intake.root / "sub")
    (intake.root / "sub").mkdir()
    (intake.root / "sub" / "a.jpg").write_bytes(b"whole")
    assert images(intake.settle(1)) == ["sub/a.jpg"]


def test_a_folder_moved_out_whose_name_is_taken_again(intake, outside):
    # As when the day's folder is archived, and made anew on the same day.
    (intake.root / "day").mkdir()
    intake.hear()
    (intake.root / "day").rename(outside / "archived")
    (intake.root / "day").mkdir()
    intake.hear()
    (intake.root / "day").rmdir()
    (outside / "archived").rmdir()
    (intake.root / "day").mkdir()
    (intake.root / "day" / "a.jpg").write_bytes(b"whole")
    assert images(intake.settle(1)) == ["day/a.jpg"]


def test_a_folder_moved_out_and_in_again_under_another_name(intake, outside):
    (intake.root / "one" / "deep").mkdir(parents=True)
    intake.hear()
    (intake.root / "one").rename(outside / "one")
    intake.hear()
    (outside / "one").rename(intake.root / "two")
    intake.hear()
    (intake.root / "one").mkdir()
    (intake.root / "one").rename(intake.root / "three")
    intake.hear()
    (intake.root / "two" / "deep" / "a.jpg").write_bytes(b"whole")
    assert images(intake.settle(1)) == ["two/deep/a.jpg"]


def test_sub_folders_are_left_alone_without_recursion(inbox, outside):
    (inbox / "before").mkdir()
    (outside / "tree").mkdir()
    with watching(inbox, recursive=False) as watch:
        intake = Intake(inbox, watch)
        (inbox / "before" / "a.jpg").write_bytes(b"whole")
        (inbox / "after").mkdir()
        (inbox / "after" / "a.jpg").write_bytes(b"whole")
        (outside / "tree").rename(inbox / "tree")
        (inbox / "a.jpg").write_bytes(b"whole")
        assert images(intake.settle(1)) == ["a.jpg"]


def test_only_the_outermost_folders_need_a_scan():
    assert outermost(["b/c", "a", "a/x/y", "ab", "b/c/d"]) == ["b/c", "a", "ab"]
    assert outermost([]) == []


# Taking


def test_hints_come_once_in_order_and_without_blocking(inbox):
    with watching(inbox) as watch:
        assert watch.take() == []
        assert watch.take_folders() == []
        for name in ("b", "a", "b", "c"):
            with (inbox / name).open("a") as file:
                file.write("x")
        seen: list[str] = []

        def seen_last() -> bool:
            watch.wait(0.1)
            seen.extend(watch.take())
            return "c" in seen

        wait_until(seen_last)
        assert list(dict.fromkeys(seen)) == ["b", "a", "c"]


def test_waiting_ends_with_the_first_hint_or_in_time(inbox):
    with watching(inbox) as watch:
        started_s = time.monotonic()
        watch.wait(0.01)
        assert time.monotonic() - started_s < DEADLINE_S
        (inbox / "a.jpg").touch()
        watch.wait(DEADLINE_S)
        assert time.monotonic() - started_s < DEADLINE_S
        assert watch.take() == ["a.jpg"]


def test_more_than_fits_is_told_once(inbox):
    with watching(inbox, max_queued=10) as watch:
        for number in range(50):
            (inbox / f"{number}.jpg").touch()
        wait_until(lambda: watch.overflowed)
        assert len(watch.take()) <= 10
        # Hints may still be on their way; in the end it is quiet.
        wait_until(lambda: not watch.take() and not watch.take_overflow())
        assert watch.is_alive()


def test_events_that_the_kernel_drops_are_told(inbox):
    limits = inotify_limits()
    if limits is None or limits.max_queued_events > 200_000:
        pytest.skip("the kernel's queue is too large to fill")
    with watching(inbox) as watch:
        intake = Intake(inbox, watch)
        # The reading thread takes this lock for every read: it stands still meanwhile.
        with watch._inotify._reader._lock:
            for number in range(limits.max_queued_events // 4 + 100):
                for name in "ab":
                    (inbox / name).write_text(str(number))
            (inbox / "lost").mkdir()
            (inbox / "lost" / "a.jpg").write_bytes(b"whole")
        wait_until(lambda: watch.overflowed)
        assert watch.take_overflow()
        assert watch.is_alive()
        intake.scan()
        assert images(intake.settle(1)) == ["lost/a.jpg"]
        # The folder that nobody told of is watched all the same.
        (inbox / "lost" / "b.jpg").write_bytes(b"whole")
        assert images(intake.settle(1)) == ["lost/b.jpg"]


# Life


def test_start_and_stop_leave_nothing_behind(inbox):
    (inbox / "sub").mkdir()
    with watching(inbox):
        pass
    threads, files = threading.active_count(), open_files()
    for choice in [INOTIFY] * 20 + [POLL] * 3:
        with watching(inbox, choice) as watch:
            (inbox / "a.jpg").touch()
            assert watch.is_alive()
        assert not watch.is_alive()
        assert watch.trouble() == "not started, or stopped"
        watch.stop()
        assert (threading.active_count(), open_files()) == (threads, files)


def test_what_was_heard_before_the_stop_can_be_taken_after(inbox):
    with watching(inbox) as watch:
        (inbox / "a.jpg").touch()
        watch.wait(DEADLINE_S)
    assert watch.take() == ["a.jpg"]


# Polling goes by the path and does not care where the same folder comes back between two looks.
@pytest.mark.parametrize(
    ("choice", "comes_back"), [(INOTIFY, True), (INOTIFY, False), (POLL, False)]
)
def test_a_folder_removed_is_noticed(inbox, choice, comes_back):
    with watching(inbox, choice) as watch:
        assert watch.is_alive()
        inbox.rmdir()
        if comes_back:
            inbox.mkdir()
        wait_until(lambda: not watch.is_alive())
        assert watch.trouble()
    inbox.mkdir(exist_ok=True)
    with watching(inbox, choice) as watch:
        (inbox / "a.jpg").touch()
        watch.wait(DEADLINE_S)
        assert watch.take() == ["a.jpg"]


@pytest.mark.parametrize("choice", [INOTIFY, POLL])
def test_a_folder_replaced_is_noticed_at_once(inbox, outside, choice):
    with watching(inbox, choice) as watch:
        inbox.rename(inbox.with_name("aside"))
        outside.rename(inbox)
        assert not watch.is_alive()
        assert "taken its place" in watch.trouble()


def test_a_link_that_leads_elsewhere_is_noticed(inbox, outside, tmp_path):
    link = tmp_path / "link"
    link.symlink_to(inbox)
    with watching(link) as watch:
        intake = Intake(link, watch)
        (inbox / "a.jpg").write_bytes(b"whole")
        assert images(intake.settle(1)) == ["a.jpg"]
        assert watch.is_alive()
        link.unlink()
        link.symlink_to(outside)
        assert not watch.is_alive()


def test_a_share_unmounted_and_mounted_again_is_noticed(inbox):
    mount = ["mount", "-t", "tmpfs", "none", str(inbox)]
    if os.geteuid() != 0 or subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("mounting is not permitted here")
    unmount = ["umount", str(inbox)]
    try:
        with watching(inbox) as watch:
            assert watch.is_alive()
            subprocess.run(unmount, check=True)
            # Often with the same device and inode as before.
            subprocess.run(mount, check=True)
            wait_until(lambda: not watch.is_alive())
            assert watch.trouble()
    finally:
        subprocess.run(unmount, check=True)


def test_a_share_mounted_over_is_noticed(inbox):
    mount = ["mount", "-t", "tmpfs", "none", str(inbox)]
    with watching(inbox) as watch:
        if os.geteuid() != 0 or subprocess.run(mount, capture_output=True, check=False).returncode:
            pytest.skip("mounting is not permitted here")
        try:
            assert "taken its place" in watch.trouble()
        finally:
            subprocess.run(["umount", str(inbox)], check=True)


def test_the_death_of_the_reading_thread_is_told(inbox, monkeypatch):
    def fail(*_: object) -> None:
        raise KeyError(731)  # as watchdog's book-keeping did more than once in its history

    with watching(inbox) as watch:
        monkeypatch.setattr("watchdog.observers.inotify_c.InotifyFD.handle_event", fail)
        (inbox / "a.jpg").touch()
        watch.wait(DEADLINE_S)
        assert watch.take_overflow()
        assert not watch.is_alive()
        assert "KeyError: 731" in watch.trouble()


def test_a_thread_that_hangs_does_not_hang_the_stop(inbox, monkeypatch):
    hang, hung = threading.Event(), threading.Event()

    def hanging_stat(path: str) -> os.stat_result:
        if threading.current_thread() is not threading.main_thread():
            hung.set()
            hang.wait(DEADLINE_S)  # as a call into a dead share does
        return Path(path).stat()

    monkeypatch.setattr("bcseg_batch.intake.watch.os.lstat", hanging_stat)
    monkeypatch.setattr("bcseg_batch.intake.watch._STOP_TIMEOUT_S", 0.1)
    with watching(inbox, POLL) as watch:
        assert hung.wait(DEADLINE_S)
        started_s = time.monotonic()
        watch.stop()
        assert time.monotonic() - started_s < 5
        hang.set()


@pytest.mark.parametrize("choice", [INOTIFY, POLL])
def test_a_folder_that_is_gone_cannot_be_watched(inbox, choice):
    inbox.rmdir()
    watch = FolderWatch(inbox, choice, recursive=True, poll_interval_s=1)
    with pytest.raises(WatchError, match="No such file"):
        watch.start()
    assert not watch.is_alive()
    inbox.mkdir()
    watch.start()
    assert watch.is_alive()
    watch.stop()


LIMITED = """
import sys
from pathlib import Path
from bcseg_batch.intake.watch import FolderWatch, WatchChoice, WatchError, WatchMode, choose_mode
root = Path(sys.argv[1])
Path("/proc/sys/user", sys.argv[2]).write_text(sys.argv[3])
choice = WatchChoice(WatchMode.INOTIFY, "test")
watch = FolderWatch(root, choice, recursive=True, poll_interval_s=1)
try:
    watch.start()
except WatchError as error:
    print("refused", error)
    print(choose_mode(root, WatchMode.AUTO))
else:
    print("started", watch.trouble())
    for number in range(10):
        (root / f"new{number}").mkdir()
    for _ in range(1000):
        watch.wait(0.02)
        watch.take_folders()
        if watch.trouble():
            break
    print("then", watch.trouble())
watch.stop()
"""


@pytest.mark.parametrize(
    ("limit", "granted", "wanted"),
    [
        ("max_inotify_watches", 3, ["refused", "takes 6 inotify watches", "max_user_watches="]),
        ("max_inotify_watches", 9, ["started None", "then a new sub-folder cannot be watched"]),
        ("max_inotify_instances", 0, ["refused", "max_user_instances=", "<WatchMode.POLL"]),
    ],
)
def test_the_kernels_limits_are_named(inbox, limit, granted, wanted):
    # A user namespace has limits of its own, so nobody else is hurt.
    unshare = ["unshare", "--user", "--map-root-user"]
    if not shutil.which("unshare") or subprocess.run([*unshare, "true"], check=False).returncode:
        pytest.skip("user namespaces are not permitted here")
    for name in "abcde":
        (inbox / name).mkdir()
    command = [*unshare, sys.executable, "-c", LIMITED, str(inbox), limit, str(granted)]
    answer = subprocess.run(command, capture_output=True, text=True, check=False)
    assert answer.returncode == 0, answer.stderr
    for words in wanted:
        assert words in answer.stdout


@pytest.fixture
def private_inbox() -> Iterator[Path]:
    """A folder of an ordinary user, who the test is meanwhile."""
    folder = Path(tempfile.mkdtemp(dir="/tmp"))
    is_root = os.geteuid() == 0
    if is_root:
        os.chown(folder, 65534, 65534)
        os.seteuid(65534)
    try:
        yield folder
    finally:
        if is_root:
            os.seteuid(0)
        subprocess.run(["chmod", "-R", "u+rwx", str(folder)], check=True)
        shutil.rmtree(folder)


def test_folders_without_permission(private_inbox):
    for name in ("a", "b"):
        (private_inbox / name).mkdir(mode=0o000)
    with watching(private_inbox) as watch:
        intake = Intake(private_inbox, watch)
        (private_inbox / "c").mkdir(mode=0o000)
        (private_inbox / "x.jpg").write_bytes(b"whole")
        assert images(intake.settle(1)) == ["x.jpg"]
        assert watch.is_alive()
    private_inbox.chmod(0o300)
    watch = FolderWatch(private_inbox, INOTIFY, recursive=True, poll_interval_s=1)
    with pytest.raises(WatchError, match="Permission denied"):
        watch.start()


# Polling


def test_polling_finds_what_comes(inbox, outside):
    (inbox / "old.jpg").write_bytes(b"old")
    (inbox / "sub").mkdir()
    (inbox / "sub" / "circle").symlink_to(inbox)
    with watching(inbox, POLL) as watch:
        intake = Intake(inbox, watch)
        (inbox / "a.jpg").write_bytes(b"whole")
        (outside / "b").write_bytes(b"whole")
        (outside / "b").rename(inbox / "sub" / "b.jpg")
        (inbox / "old.jpg").write_bytes(b"newer")
        (outside / "tree" / "deep").mkdir(parents=True)
        (outside / "tree" / "deep" / "c.jpg").write_bytes(b"whole")
        (outside / "tree").rename(inbox / "tree")
        wanted = ["a.jpg", "old.jpg", "sub/b.jpg", "tree/deep/c.jpg"]

        def heard_all() -> bool:
            intake.hear()
            return all(image in intake.tracker for image in wanted)

        wait_until(heard_all)
        given: list[str] = []

        def given_all() -> bool:
            given.extend(images(intake.settle(1)))
            return len(given) >= len(wanted)

        wait_until(given_all)
        assert sorted(given) == wanted
        assert watch.is_alive()


# Choosing


def test_by_trying(inbox):
    choice = choose_mode(inbox, WatchMode.AUTO)
    assert choice.mode is WatchMode.INOTIFY
    assert "was seen" in choice.reason
    assert list(inbox.iterdir()) == []


def test_the_try_is_no_input_and_is_not_needed_where_a_mode_is_asked_for(inbox):
    with watching(inbox) as watch:
        intake = Intake(inbox, watch)
        choose_mode(inbox, WatchMode.AUTO)
        assert intake.settle(1) == []
        watch.take()
        assert choose_mode(inbox, WatchMode.POLL).mode is WatchMode.POLL
        assert choose_mode(inbox, WatchMode.INOTIFY).mode is WatchMode.INOTIFY
        watch.wait(0.01)
        assert [name for name in watch.take() if not name.startswith(".barrier")] == []


def test_a_try_that_is_not_seen_in_time_leads_to_polling(inbox):
    choice = choose_mode(inbox, WatchMode.AUTO, probe_timeout_s=0)
    assert choice.mode is WatchMode.POLL
    assert "not seen" in choice.reason
    assert list(inbox.iterdir()) == []


def test_where_nothing_may_be_written_the_type_decides(private_inbox):
    private_inbox.chmod(0o500)
    choice = choose_mode(private_inbox, WatchMode.AUTO)
    assert choice.mode is WatchMode.INOTIFY
    assert "no file can be written there: Permission denied" in choice.reason


def test_by_type():
    local = Filesystem("ext4", Path("/"), is_network=False, gives_events=True)
    share = Filesystem("nfs4", Path("/srv"), is_network=True, gives_events=False)
    assert choose_by_type(local, WatchMode.AUTO).mode is WatchMode.INOTIFY
    assert choose_by_type(share, WatchMode.AUTO) == WatchChoice(
        WatchMode.POLL, "nfs4 at /srv gives no events for what other machines write"
    )
    assert choose_by_type(local, WatchMode.POLL).mode is WatchMode.POLL
    asked = choose_by_type(share, WatchMode.INOTIFY)
    assert asked.mode is WatchMode.INOTIFY
    assert "only the rescan" in asked.reason
    local = dataclasses.replace(local, type="xfs")
    assert "xfs" in choose_by_type(local, WatchMode.AUTO).reason


def test_nothing_is_chosen_for_a_folder_that_is_not_there(tmp_path):
    with pytest.raises(WatchError, match="not there"):
        choose_mode(tmp_path / "absent", WatchMode.AUTO)
