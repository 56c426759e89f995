"""A disk that fills up, or may no longer be written, costs time and no image."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from daemons import Place, place_fixture, wait_until
from parts import write_smear

pytestmark = [pytest.mark.slow, pytest.mark.timeout(240)]

IMAGES = 12


@contextlib.contextmanager
def small_disk(path: Path, size: str) -> Iterator[Path]:
    if os.geteuid() != 0:
        pytest.skip("needs root: mounts a small disk")
    path.mkdir(exist_ok=True)
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(path)],
        check=False,
        capture_output=True,
        text=True,
    )
    if mounted.returncode:
        pytest.skip(f"no disk can be mounted here: {mounted.stderr.strip()}")
    try:
        yield path
    finally:
        subprocess.run(["umount", "--lazy", str(path)], check=True)


def fill_up(folder: Path) -> Path:
    filler = folder / "filler.bin"
    with filler.open("wb", buffering=0) as file, contextlib.suppress(OSError):
        while True:
            file.write(b"x" * 4096)
    return filler


@pytest.fixture
def place(tmp_path: Path, tiny_model: Path) -> Iterator[Place]:
    yield from place_fixture(tmp_path, tiny_model)


def write_images(place: Place, first: int = 0) -> list[str]:
    names = [f"{number:02d}.png" for number in range(first, first + IMAGES)]
    for number, name in enumerate(names, start=first):
        write_smear(place.input / name, number)
    return names


def trouble(place: Place) -> str:
    return str(place.said().get("troubles", {}).get("output", ""))


def assert_all_done_once(place: Place, names: list[str]) -> None:
    records = place.records()
    assert sorted(record["image"] for record in records) == sorted(names)
    assert {record["status"] for record in records} == {"done"}
    for record in records:
        assert (place.output / record["mask"]).stat().st_size > 0
        assert (place.output / record["composite"]).stat().st_size > 0
    assert not list(place.output.rglob("*.part"))
    assert "Traceback" not in place.log
    facts = json.loads(place.ask("status", "--json", code=None))
    assert (facts["done"], facts["failed"], facts["queue"]) == (len(names), 0, 0)


def test_a_full_output_disk_is_waited_for(place: Place) -> None:
    with small_disk(place.output, "1M"):
        daemon = place.start("--until-idle", "3")
        place.wait_ready(daemon)
        names = write_images(place)
        place.wait_for(*names)
        filler = fill_up(place.output)
        names += write_images(place, first=IMAGES)
        # What cannot even be decoded needs no disk, and must not pass for good news of it.
        (place.input / "bad.jpg").write_bytes(b"no jpeg")
        wait_until(lambda: "No space left" in trouble(place), "told")
        text = place.ask("status", code=1)
        assert "No space left" in text
        assert "free some space" in text
        assert "failed" not in place.standing().values()
        assert daemon.poll() is None  # with work waiting, it is not idle
        filler.unlink()
        place.wait_for(*names)
        place.wait_for("bad.jpg", status="failed")
        wait_until(lambda: not place.said()["troubles"], "well again")
        (place.input / "bad.jpg").unlink()
        assert daemon.wait(60) == 0
        records = [record for record in place.records() if record["image"] != "bad.jpg"]
        assert sorted(record["image"] for record in records) == sorted(names)
        assert {record["status"] for record in records} == {"done"}
        assert not list(place.output.rglob("*.part"))
        assert "Traceback" not in place.log


def test_an_output_that_turns_read_only_is_waited_for(place: Place) -> None:
    with small_disk(place.output, "4M"):
        daemon = place.start()
        place.wait_ready(daemon)
        # Nothing may be open for writing when the kernel takes the right away.
        subprocess.run(["mount", "--bind", str(place.output), str(place.output)], check=True)
        try:
            names = write_images(place)
            place.wait_for(*names[:1])
            subprocess.run(
                ["mount", "-o", "remount,bind,ro", str(place.output)],
                check=True,
            )
            more = write_images(place, first=IMAGES)
            wait_until(lambda: "Read-only" in trouble(place), "told")
            assert "failed" not in place.standing().values()
            subprocess.run(["mount", "-o", "remount,bind,rw", str(place.output)], check=True)
            place.wait_for(*names, *more)
            assert place.stop(daemon) == 0
            assert_all_done_once(place, names + more)
        finally:
            subprocess.run(["umount", "--lazy", str(place.output)], check=True)


def test_a_full_state_disk_is_waited_for(place: Place) -> None:
    place.state.mkdir()
    with small_disk(place.state, "2M"):
        daemon = place.start()
        place.wait_ready(daemon)
        names = write_images(place)
        place.wait_for(*names)
        filler = fill_up(place.state)
        names += write_images(place, first=IMAGES)
        wait_until(lambda: str(place.state) in place.log, "told")
        assert daemon.poll() is None
        filler.unlink()
        place.wait_for(*names)
        wait_until(lambda: not place.said()["troubles"], "well again")
        assert place.stop(daemon) == 0
        assert_all_done_once(place, names)


def test_an_output_share_that_is_lost_and_mounted_again_is_gone_on_with(place: Place) -> None:
    disk = place.root / "disk.img"
    if os.geteuid() != 0:
        pytest.skip("needs root: mounts a small disk")
    disk.write_bytes(b"")
    os.truncate(disk, 8 << 20)
    # An image of a disk, so that the files are still there when it comes back.
    made = subprocess.run(["mkfs.ext4", "-q", "-F", str(disk)], check=False, capture_output=True)
    mount = ["mount", "-o", "loop", str(disk), str(place.output)]
    if made.returncode or subprocess.run(mount, check=False, capture_output=True).returncode:
        pytest.skip("no disk image can be mounted here")
    try:
        daemon = place.start()
        place.wait_ready(daemon)
        names = write_images(place)
        place.wait_for(*names)
        subprocess.run(["umount", "--lazy", str(place.output)], check=True)
        wait_until(lambda: "another folder" in trouble(place), "noticed")
        names += write_images(place, first=IMAGES)
        assert not list(place.output.iterdir())  # nothing goes below the mount point
        subprocess.run(mount, check=True)
        place.wait_for(*names)
        assert place.stop(daemon) == 0
        assert_all_done_once(place, names)
    finally:
        subprocess.run(["umount", "--lazy", str(place.output)], check=False)
