"""The walk over the input folder: always the same order, and nothing gets it stuck."""

from __future__ import annotations

import os
import socket
import subprocess
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from parts import as_plain_user

from bcseg_batch.intake import scan as scan_module
from bcseg_batch.intake.external_sort import ExternalSort
from bcseg_batch.intake.ignore import IgnoreRules
from bcseg_batch.intake.scan import IgnoredFile, scan_folder
from bcseg_batch.items import InputFile

RULES = IgnoreRules({".jpg", ".tif"})


def touch(*paths: Path) -> None:
    for path in paths:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"x")


def scan(root: Path, *, recursive: bool = True) -> tuple[list[str], dict[str, str]]:
    found = list(scan_folder(root, RULES, recursive=recursive))
    inputs = [f.image for f in found if isinstance(f, InputFile)]
    return inputs, {f.image: f.reason for f in found if isinstance(f, IgnoredFile)}


def test_files_come_sorted_and_before_those_of_sub_folders(tmp_path: Path) -> None:
    names = ["b.jpg", "a.jpg", "B.tif", "a/z.jpg", "a/b/a.jpg", "a/a.jpg", "Z/a.jpg", "a.d/a.jpg"]
    touch(*(tmp_path / name for name in names))
    inputs, ignored = scan(tmp_path)
    assert inputs == [
        "B.tif", "a.jpg", "b.jpg", "Z/a.jpg", "a/a.jpg", "a/z.jpg", "a/b/a.jpg", "a.d/a.jpg",
    ]  # fmt: skip
    assert ignored == {}


def test_an_input_is_described_as_it_lies_there(tmp_path: Path) -> None:
    path = tmp_path / "a/b.jpg"
    touch(path)
    os.utime(path, ns=(1, 1_234_567_891))
    assert list(scan_folder(tmp_path, RULES, recursive=True)) == [
        InputFile(path, "a/b.jpg", size_bytes=1, mtime_ns=1_234_567_891)
    ]


def test_what_is_no_input_is_named_with_its_reason(tmp_path: Path) -> None:
    names = ["a.jpg", "notes.txt", ".hidden.jpg", "a.jpg.part", ".git/a.jpg", "@eaDir/a.jpg"]
    touch(*(tmp_path / name for name in names))
    inputs, ignored = scan(tmp_path)
    assert inputs == ["a.jpg"]
    assert ignored == {
        "notes.txt": "not the suffix of an image",
        ".hidden.jpg": "matches .*",
        "a.jpg.part": "matches *.part",
        ".git": "matches .*",
        "@eaDir": "matches @eaDir",
    }


def test_without_recursion_sub_folders_are_named(tmp_path: Path) -> None:
    touch(tmp_path / "a.jpg", tmp_path / "b/a.jpg")
    inputs, ignored = scan(tmp_path, recursive=False)
    assert inputs == ["a.jpg"]
    assert ignored == {"b": "a sub-folder, and recursion is off"}


def test_a_link_to_a_file_is_an_input_with_the_file_s_own_facts(tmp_path: Path) -> None:
    target = tmp_path / "elsewhere.bin"
    target.write_bytes(b"12345")
    root = tmp_path / "in"
    root.mkdir()
    (root / "a.jpg").symlink_to(target)
    (found,) = scan_folder(root, RULES, recursive=True)
    assert isinstance(found, InputFile)
    assert found.size_bytes == 5
    assert found.path == root / "a.jpg"


def test_links_that_lead_in_circles_to_folders_or_nowhere_are_named(tmp_path: Path) -> None:
    touch(tmp_path / "b/a.jpg")
    (tmp_path / "b/up").symlink_to(tmp_path)
    (tmp_path / "b/up.jpg").symlink_to(tmp_path)
    (tmp_path / "gone.jpg").symlink_to(tmp_path / "nothing")
    (tmp_path / "self.jpg").symlink_to(tmp_path / "self.jpg")
    (tmp_path / "self.txt").symlink_to(tmp_path / "self.txt")
    inputs, ignored = scan(tmp_path)
    assert inputs == ["b/a.jpg"]
    assert ignored == {
        "b/up": "a link to a folder",
        "b/up.jpg": "a link to a folder",
        "gone.jpg": "a link that leads nowhere",
        "self.jpg": "a link that leads nowhere",
        "self.txt": "not the suffix of an image",
    }


def test_pipes_and_sockets_are_named_and_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.jpg")
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(os.path.relpath(tmp_path / "socket.jpg"))
        inputs, ignored = scan(tmp_path)
    assert inputs == []
    assert ignored == dict.fromkeys(["pipe.jpg", "socket.jpg"], "not a regular file")


def test_a_folder_that_cannot_be_listed_is_named_as_missed() -> None:
    with as_plain_user() as root:
        touch(root / "a.jpg", root / "closed/a.jpg", root / "open/a.jpg")
        (root / "closed").chmod(0)
        found = list(scan_folder(root, RULES, recursive=True))
    assert [f.image for f in found] == ["a.jpg", "closed", "open/a.jpg"]
    assert found[1] == IgnoredFile("closed", "cannot be listed: Permission denied", missed=True)


def test_files_that_cannot_be_looked_at_are_still_inputs() -> None:
    with as_plain_user() as root:
        touch(root / "names only/a.jpg", root / "names only/notes.txt")
        (root / "names only").chmod(0o400)
        inputs, ignored = scan(root)
    assert inputs == ["names only/a.jpg"]
    assert ignored == {"names only/notes.txt": "not the suffix of an image"}


def test_the_root_must_be_there_and_open(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        scan(tmp_path / "missing")
    with as_plain_user() as root:
        root.chmod(0)
        with pytest.raises(PermissionError):
            scan(root)


def test_what_vanishes_during_the_walk_is_left_out(tmp_path: Path) -> None:
    touch(tmp_path / "a.jpg", tmp_path / "b.jpg", tmp_path / "c/a.jpg", tmp_path / "d/a.jpg")
    walk = scan_folder(tmp_path, RULES, recursive=True)
    assert next(walk).image == "a.jpg"
    (tmp_path / "b.jpg").unlink()
    (tmp_path / "c/a.jpg").unlink()
    (tmp_path / "c").rmdir()
    assert [found.image for found in walk] == ["d/a.jpg"]


def test_names_that_are_no_text_come_through(tmp_path: Path) -> None:
    name = os.fsencode(tmp_path) + b"/\xff\xe9.jpg"
    with open(name, "wb") as file:  # noqa: PTH123 - a Path holds no bytes
        file.write(b"x")
    (found,) = scan_folder(tmp_path, RULES, recursive=True)
    assert isinstance(found, InputFile)
    assert os.fsencode(found.path) == name
    assert found.image == "\udcff\udce9.jpg"


def test_folders_nested_deeper_than_python_calls_are_walked(tmp_path: Path) -> None:
    depth = 1500
    here = os.open(tmp_path, os.O_RDONLY)
    try:
        for _ in range(depth):
            os.mkdir("d", dir_fd=here)
            deeper = os.open("d", os.O_RDONLY, dir_fd=here)
            os.close(here)
            here = deeper
        os.close(os.open("a.jpg", os.O_CREAT | os.O_WRONLY, dir_fd=here))
        inputs, _ = scan(tmp_path)
    finally:
        os.close(here)
        # pytest's own clearing away goes by recursion.
        subprocess.run(["rm", "-r", str(tmp_path / "d")], check=True)
    assert inputs == ["d/" * depth + "a.jpg"]


@settings(max_examples=40, deadline=None)
@given(
    st.lists(
        st.lists(st.sampled_from(["a", "b", "B", "\u00e9", "a.b"]), min_size=1, max_size=3),
        max_size=8,
    )
)
def test_every_file_is_found_once_in_an_order_that_creation_does_not_change(
    tmp_path_factory: pytest.TempPathFactory, folders: list[list[str]]
) -> None:
    names = {"/".join(parts) + "/x.jpg" for parts in folders}
    orders = []
    for order in (sorted(names), sorted(names, reverse=True)):
        root = tmp_path_factory.mktemp("in")
        touch(*(root / name for name in order))
        inputs, _ = scan(root)
        orders.append(inputs)
    assert orders[0] == orders[1]
    assert set(orders[0]) == names
    assert len(orders[0]) == len(names)


def test_a_folder_too_large_for_memory_comes_in_the_same_order(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    odd = [
        "a\nb.jpg",
        "\u00e9.jpg",
        "e\u0301.jpg",
        "\U0001f9ea.jpg",
        "\ue000.jpg",
        "a.jpg",
        "a b.jpg",
    ]
    names = [f"{folder}{name}" for folder in ("", "x/", "x.y/", "x/z/", "\u00e9/") for name in odd]
    touch(*(tmp_path / name for name in [*names, "x/notes.txt"]))
    for raw in (b"/\xff.jpg", b"/x/\xe9\xff.jpg"):
        with open(os.fsencode(tmp_path) + raw, "wb"):  # noqa: PTH123 - a Path holds no bytes
            pass
    (tmp_path / "x/link.jpg").symlink_to(tmp_path / "a.jpg")
    (tmp_path / "x/nowhere.jpg").symlink_to(tmp_path / "nothing")
    expected = list(scan_folder(tmp_path, RULES, recursive=True))
    assert len([found for found in expected if isinstance(found, InputFile)]) == len(names) + 3
    inner = [f.image for f in expected if f.image.count("/") == 1 and f.image.startswith("x/")]
    assert inner == sorted(inner)
    monkeypatch.setattr(scan_module, "ExternalSort", lambda: ExternalSort(2))
    assert list(scan_folder(tmp_path, RULES, recursive=True)) == expected
    walk = scan_folder(tmp_path, RULES, recursive=True)
    assert next(walk) == expected[0]
    del walk  # what it holds on the disk goes with it, or the leak is an error here
