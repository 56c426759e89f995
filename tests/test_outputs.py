"""A final name always stands for a whole file, and what cannot be written is said plainly."""

from __future__ import annotations

import contextlib
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from parts import as_plain_user, tree

from bcseg_batch.errors import OutputError, UnsupportedImageError, UsageError
from bcseg_batch.store.outputs import OutputFolder, write_whole

LOCK = ".bcseg.lock"

WRITER = """
import sys
from pathlib import Path
from bcseg_batch.store.outputs import OutputFolder
with OutputFolder(Path(sys.argv[1])) as outputs:
    print("ready", flush=True)
    number = 0
    while True:
        outputs.write(f"masks/{number % 7}.png", bytes([number % 256]) * 3_000_000)
        number += 1
"""


@contextlib.contextmanager
def small_disk(folder: Path, options: str) -> Iterator[Path]:
    """Mount a file system of its own, or skip where that is not allowed."""
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(folder)]
    try:
        made = subprocess.run(mount, capture_output=True, text=True, check=False)
    except FileNotFoundError:
        pytest.skip("not on this machine: there is no mount command")
    if made.returncode:
        pytest.skip(f"not on this machine: no right to mount ({made.stderr.strip()})")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


def remount_read_only(folder: Path) -> None:
    subprocess.run(["mount", "-o", "remount,ro", str(folder)], check=True)


def test_a_file_is_written_with_its_folders_and_nothing_else(tmp_path: Path) -> None:
    with OutputFolder(tmp_path / "out") as outputs:
        outputs.write("masks/a/b_mask.png", b"content")
        assert outputs.exists("masks/a/b_mask.png")
    assert set(tree(tmp_path)) == {"out/masks/a/b_mask.png", f"out/{LOCK}"}
    assert (tmp_path / "out/masks/a/b_mask.png").read_bytes() == b"content"


def test_a_file_is_replaced_as_a_whole(tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    write_whole(path, b"old and long")
    with path.open("rb") as reader:
        write_whole(path, b"new")
        assert reader.read() == b"old and long"
    assert tree(tmp_path) == {"a.png": b"new"}


def test_missing_and_empty_files_do_not_exist(tmp_path: Path) -> None:
    with OutputFolder(tmp_path) as outputs:
        assert not outputs.exists("masks/a.png")
        (tmp_path / "empty").touch()
        assert not outputs.exists("empty")
        outputs.remove("nothing here")


@pytest.mark.slow
def test_a_killed_writer_leaves_whole_files_and_the_next_run_clears_the_rest(
    tmp_path: Path,
) -> None:
    seeded = random.Random(5)
    seen_part = False
    for _ in range(8):
        writer = subprocess.Popen(
            [sys.executable, "-c", WRITER, str(tmp_path)], stdout=subprocess.PIPE
        )
        assert writer.stdout is not None
        assert writer.stdout.readline() == b"ready\n"
        time.sleep(seeded.uniform(0.0, 0.3))
        writer.send_signal(signal.SIGKILL)
        writer.wait()
        writer.stdout.close()
        files = tree(tmp_path)
        seen_part |= any(name.endswith(".part") for name in files)
        for name, content in files.items():
            if name.endswith(".png"):
                assert len(content) == 3_000_000
                assert len(set(content)) == 1
    assert seen_part, "no kill fell into a write: the test shows nothing"
    OutputFolder(tmp_path).close()
    assert not [name for name in tree(tmp_path) if name.endswith(".part")]


def test_leftovers_are_cleared_but_nothing_of_the_user(tmp_path: Path) -> None:
    deep = tmp_path / "masks/a/b"
    deep.mkdir(parents=True)
    leftover = deep / ".bcseg-0123.part"
    kept = [deep / "a.part", deep / ".bcseg-notes", deep / "a.png"]
    for path in (leftover, *kept):
        path.write_bytes(b"x")
    OutputFolder(tmp_path).close()
    assert not leftover.exists()
    assert all(path.exists() for path in kept)


def test_a_full_disk_is_named_and_leaves_nothing_half(tmp_path: Path) -> None:
    with small_disk(tmp_path / "disk", "size=1m") as disk, OutputFolder(disk) as outputs:
        outputs.write("masks/a.png", b"a" * 600_000)
        with pytest.raises(OutputError, match=r"b\.png.*No space left.*free some space") as info:
            outputs.write("masks/b.png", b"b" * 600_000)
        assert info.value.exit_code == 74
        with pytest.raises(OutputError):
            outputs.write("masks/a.png", b"c" * 600_000)
        assert set(tree(disk)) == {"masks/a.png", LOCK}
        assert (disk / "masks/a.png").read_bytes() == b"a" * 600_000
        outputs.write("masks/b.png", b"b" * 100_000)


def test_a_read_only_disk_is_named(tmp_path: Path) -> None:
    with small_disk(tmp_path / "disk", "size=1m") as disk:
        with OutputFolder(disk) as outputs:
            outputs.write("masks/a.png", b"a")
        remount_read_only(disk)
        with pytest.raises(OutputError, match=r"Read-only.*mount it for writing"):
            OutputFolder(disk)
        with pytest.raises(OutputError, match=r"Read-only.*mount it for writing"):
            write_whole(disk / "masks/b.png", b"b")


def test_a_folder_without_permission_is_named() -> None:
    with as_plain_user() as home:
        closed = home / "closed"
        closed.mkdir()
        closed.chmod(0o500)
        with pytest.raises(OutputError, match=r"Permission denied.*right to write"):
            OutputFolder(closed)
        with pytest.raises(OutputError, match=r"Permission denied.*right to write"):
            OutputFolder(closed / "below")


def test_a_name_that_is_too_long_is_the_image_s_fault(tmp_path: Path) -> None:
    with OutputFolder(tmp_path) as outputs:
        with pytest.raises(UnsupportedImageError, match=r"longer than .* shorter name"):
            outputs.write(f"masks/{'a' * 250}_mask.png", b"a")
        outputs.write(f"masks/{'a' * 246}_mask.png", b"a")
    assert set(tree(tmp_path)) == {f"masks/{'a' * 246}_mask.png", LOCK}


def test_a_folder_named_like_another_image_s_mask_stops_only_that_image(tmp_path: Path) -> None:
    with OutputFolder(tmp_path) as outputs:
        outputs.write("masks/a_mask.png", b"a")
        with pytest.raises(UnsupportedImageError, match=r"'masks/a_mask\.png'.*rename"):
            outputs.write("masks/a_mask.png/b/c_mask.png", b"b")
        outputs.write("masks/d_mask.png/b_mask.png", b"b")
        with pytest.raises(UnsupportedImageError, match=r"'masks/d_mask\.png'.*rename"):
            outputs.write("masks/d_mask.png", b"a")
    assert set(tree(tmp_path)) == {"masks/a_mask.png", "masks/d_mask.png/b_mask.png", LOCK}


def test_a_file_called_masks_is_the_output_folder_s_fault(tmp_path: Path) -> None:
    (tmp_path / "masks").touch()
    with OutputFolder(tmp_path) as outputs, pytest.raises(OutputError, match="masks"):
        outputs.write("masks/a_mask.png", b"a")


def test_a_file_in_place_of_the_folder_is_named(tmp_path: Path) -> None:
    path = tmp_path / "out"
    path.touch()
    with pytest.raises(OutputError, match="out"):
        OutputFolder(path)


def test_a_second_run_is_refused_until_the_first_has_gone(tmp_path: Path) -> None:
    holder = subprocess.Popen([sys.executable, "-c", WRITER, str(tmp_path)], stdout=subprocess.PIPE)
    assert holder.stdout is not None
    try:
        assert holder.stdout.readline() == b"ready\n"
        with pytest.raises(UsageError, match=rf"another run \(process {holder.pid}\)"):
            OutputFolder(tmp_path)
    finally:
        holder.kill()
        holder.wait()
        holder.stdout.close()
    with OutputFolder(tmp_path):
        assert (tmp_path / LOCK).read_text() == f"{os.getpid()}\n"
