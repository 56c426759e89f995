"""Moving inputs away: never over another file, and never half, wherever a crash comes."""

import errno
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from bcseg_batch.errors import OutputError
from bcseg_batch.items import InputFile, Outcome, Status
from bcseg_batch.store.dispose import (
    Action,
    Disposal,
    Disposed,
    Due,
    Ending,
    dispose,
    report_path,
)

BYTES = b"a smear" * 1000
MTIME_NS = 1_700_000_000_123_456_789


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return drop(tmp_path / "in" / "slide" / "a.jpg")


@pytest.fixture(params=["same disk", "other disk", "no links"])
def archive(
    request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Path]:
    """A folder to move to, on each kind of disk."""
    if request.param == "other disk":
        shared = Path("/dev/shm")
        if not shared.is_dir() or shared.stat().st_dev == tmp_path.stat().st_dev:
            pytest.skip("there is no second file system here")
        with tempfile.TemporaryDirectory(dir=shared) as name:
            yield Path(name, "archive")
        return
    if request.param == "no links":

        def refuse(*_: object, **__: object) -> None:
            raise PermissionError(errno.EPERM, os.strerror(errno.EPERM))

        monkeypatch.setattr(os, "link", refuse)  # what FAT answers
    yield tmp_path / "archive"


def drop(path: Path, data: bytes = BYTES) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)
    os.utime(path, ns=(MTIME_NS, MTIME_NS))
    return path


def due(source: Path, action: Action, target: Path | None = None, **changes: Any) -> Due:
    facts = source.stat()
    file = InputFile(source, f"slide/{source.name}", facts.st_size, facts.st_mtime_ns)
    values: dict[str, Any] = {
        "image": file.image,
        "status": Status.FAILED,
        "error": "UnreadableImageError: no image",
        "finished_at": "2026-01-01T00:00:00.000+00:00",
    }
    return Due(file, Disposal(action, target), Outcome(**{**values, **changes}), 3)


def names(folder: Path) -> list[str]:
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*.*"))


def test_moves_into_the_same_sub_folder_with_its_time(source: Path, archive: Path) -> None:
    target = archive / "slide" / "a.jpg"
    assert dispose(due(source, Action.ARCHIVE, target)) == Disposed(Ending.MOVED, target)
    assert target.read_bytes() == BYTES
    assert target.stat().st_mtime_ns == MTIME_NS
    assert not source.exists()
    assert names(archive) == ["slide/a.jpg"]


def test_never_overwrites(source: Path, archive: Path) -> None:
    drop(archive / "a.jpg", b"another")
    drop(archive / "a~2.jpg", b"and another")
    assert dispose(due(source, Action.ARCHIVE, archive / "a.jpg")).path == archive / "a~3.jpg"
    assert (archive / "a.jpg").read_bytes() == b"another"
    assert (archive / "a~2.jpg").read_bytes() == b"and another"
    assert (archive / "a~3.jpg").read_bytes() == BYTES


def test_a_folder_or_a_dangling_link_of_the_name_is_left_alone(source: Path, archive: Path) -> None:
    (archive / "a.jpg").mkdir(parents=True)
    (archive / "a~2.jpg").symlink_to("nowhere")
    assert dispose(due(source, Action.ARCHIVE, archive / "a.jpg")).path == archive / "a~3.jpg"
    assert (archive / "a~2.jpg").readlink() == Path("nowhere")


def test_same_size_and_other_bytes_are_another_file(source: Path, archive: Path) -> None:
    drop(archive / "a.jpg", BYTES[:-1] + b"?")
    assert dispose(due(source, Action.ARCHIVE, archive / "a.jpg")).path == archive / "a~2.jpg"


def test_the_same_bytes_are_not_kept_twice(source: Path, archive: Path) -> None:
    drop(archive / "a.jpg")
    assert dispose(due(source, Action.ARCHIVE, archive / "a.jpg")).path == archive / "a.jpg"
    assert not source.exists()
    assert names(archive) == ["a.jpg"]


def test_deletes(source: Path) -> None:
    assert dispose(due(source, Action.DELETE)) == Disposed(Ending.DELETED)
    assert not source.exists()


def test_a_file_that_is_gone_is_done_with(source: Path, archive: Path) -> None:
    job = due(source, Action.ARCHIVE, archive / "a.jpg")
    dispose(job)
    assert dispose(job) == Disposed(Ending.GONE)
    assert names(archive) == ["a.jpg"]


@pytest.mark.parametrize("action", [Action.DELETE, Action.ARCHIVE, Action.QUARANTINE])
def test_a_new_image_under_the_old_name_stays(source: Path, tmp_path: Path, action: Action) -> None:
    job = due(source, action, None if action is Action.DELETE else tmp_path / "away" / "a.jpg")
    source.write_bytes(b"the next smear")
    assert dispose(job) == Disposed(Ending.CHANGED)
    assert source.read_bytes() == b"the next smear"
    assert not (tmp_path / "away").exists()


def test_quarantine_says_why(source: Path, archive: Path) -> None:
    drop(archive / "a.jpg", b"another")
    placed = dispose(due(source, Action.QUARANTINE, archive / "a.jpg")).path
    assert placed == archive / "a~2.jpg"
    assert json.loads((archive / "a~2.jpg.error.json").read_text()) == {
        "image": "slide/a.jpg",
        "error": "UnreadableImageError: no image",
        "sha256": hashlib.sha256(BYTES).hexdigest(),
        "when": "2026-01-01T00:00:00.000+00:00",
        "attempts": 3,
    }


def test_a_hash_that_is_known_is_not_taken_again(source: Path, tmp_path: Path) -> None:
    dispose(due(source, Action.QUARANTINE, tmp_path / "q" / "a.jpg", sha256="f" * 64))
    assert json.loads((tmp_path / "q" / "a.jpg.error.json").read_text())["sha256"] == "f" * 64


def test_a_link_becomes_a_file_and_what_it_leads_to_stays(tmp_path: Path, archive: Path) -> None:
    real = drop(tmp_path / "elsewhere" / "real.jpg")
    link = tmp_path / "in" / "a.jpg"
    link.parent.mkdir()
    link.symlink_to("../elsewhere/real.jpg")
    assert dispose(due(link, Action.ARCHIVE, archive / "a.jpg")).ending is Ending.MOVED
    assert not (archive / "a.jpg").is_symlink()
    assert (archive / "a.jpg").read_bytes() == real.read_bytes() == BYTES
    assert not link.is_symlink()


@pytest.mark.parametrize("stem", ["x" * 251, os.fsdecode(b"\xff" * 251), "é" * 125 + "x"])
def test_the_longest_names_fit_and_stay_apart(tmp_path: Path, stem: str) -> None:
    reports = set()
    for folder in ("one", "two"):
        source = drop(tmp_path / "in" / folder / f"{stem}.jpg", folder.encode())
        target = tmp_path / "quarantine" / source.name
        placed = dispose(due(source, Action.QUARANTINE, target)).path
        assert placed is not None
        assert placed.read_bytes() == folder.encode()
        assert placed.suffix == ".jpg"
        assert report_path(placed).is_file()
        reports.add(report_path(placed))
    assert len(reports) == 2


def test_an_action_and_its_target_belong_together() -> None:
    with pytest.raises(ValueError, match="do not go together"):
        Disposal(Action.ARCHIVE)
    with pytest.raises(ValueError, match="do not go together"):
        Disposal(Action.DELETE, Path("x"))


def test_what_cannot_be_moved_stays_and_says_why(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "archive").write_bytes(b"a file where the folder should be")
    job = due(source, Action.ARCHIVE, tmp_path / "archive" / "a.jpg")
    with pytest.raises(OutputError, match="archive"):
        dispose(job)
    assert source.read_bytes() == BYTES

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "link", full)
    with pytest.raises(OutputError, match="free some space"):
        dispose(due(source, Action.ARCHIVE, tmp_path / "other" / "a.jpg"))
    assert source.read_bytes() == BYTES


class PowerCut(BaseException):
    """Nothing else happens after it, not even cleaning up."""


class Disk:
    """Lets so many changes through, then none."""

    def __init__(self, changes: int) -> None:
        self.left = changes

    def around(self, change: Callable[..., Any]) -> Callable[..., Any]:
        def guarded(*args: Any, **kwargs: Any) -> Any:
            if self.left == 0:
                raise PowerCut
            self.left -= 1
            return change(*args, **kwargs)

        return guarded


@pytest.mark.parametrize("action", [Action.ARCHIVE, Action.QUARANTINE])
@pytest.mark.parametrize("taken", [False, True])
def test_a_crash_after_any_change_is_made_good_by_the_redo(
    tmp_path: Path, archive: Path, action: Action, taken: bool
) -> None:
    cuts = 0
    while True:
        source = drop(tmp_path / "in" / "a.jpg")
        if taken:
            drop(archive / "a.jpg", b"another")
        job = due(source, action, archive / "a.jpg")
        disk = Disk(cuts)
        with pytest.MonkeyPatch.context() as patch:
            for name in ("link", "unlink", "open", "replace", "fsync", "mkdir"):
                patch.setattr(os, name, disk.around(getattr(os, name)))
            patch.setattr(shutil, "copyfileobj", disk.around(shutil.copyfileobj))
            try:
                dispose(job)
            except PowerCut:
                crashed = True
            else:
                crashed = False
        copies = [path for path in archive.rglob("*.jpg") if path.read_bytes() == BYTES]
        assert source.exists() or len(copies) == 1  # the bytes are never nowhere
        dispose(job)
        assert not source.exists()
        placed = archive / ("a~2.jpg" if taken else "a.jpg")
        assert placed.read_bytes() == BYTES
        expected = {"a.jpg", placed.name}
        if action is Action.QUARANTINE:
            expected.add(report_path(placed).name)
            assert json.loads(report_path(placed).read_text())["attempts"] == 3
        left = {name for name in names(archive) if not name.startswith(".bcseg-")}
        assert left == expected
        if not crashed:
            break
        shutil.rmtree(archive)
        cuts += 1
    assert cuts >= 4
