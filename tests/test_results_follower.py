"""`results.jsonl` behind a ledger: each result once, whatever fails between the two."""

from __future__ import annotations

import errno
import json
import os
from pathlib import Path

import pytest

from bcseg_batch.errors import OutputError
from bcseg_batch.items import Outcome, Status
from bcseg_batch.store import results
from bcseg_batch.store.results import ResultsFollower, to_record
from bcseg_batch.store.shards import JSONL_NAME


def outcome(number: int) -> Outcome:
    return Outcome(image=f"{number}.png", status=Status.DONE, seconds=0.1 * number)


def images(folder: Path) -> list[str]:
    return [json.loads(line)["image"] for line in (folder / JSONL_NAME).read_bytes().splitlines()]


def test_what_was_written_before_a_disk_filled_up_is_not_written_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_line = results._write_line
    room = 3

    def refuse(*arguments: object) -> int:
        nonlocal room
        room -= 1
        if room < 0:
            raise OutputError("the disk is full") from OSError(errno.ENOSPC, "full")
        return write_line(*arguments)  # type: ignore[arg-type] # as they came

    outcomes = [outcome(number) for number in range(5)]
    with ResultsFollower(tmp_path) as follower:
        monkeypatch.setattr(results, "_write_line", refuse)
        with pytest.raises(OutputError):
            follower.append(outcomes)
        monkeypatch.undo()
        follower.append(outcomes)
    assert images(tmp_path) == [f"{number}.png" for number in range(5)]


def test_what_could_not_be_noted_as_written_is_not_written_again(tmp_path: Path) -> None:
    with ResultsFollower(tmp_path) as follower:
        follower.append([outcome(1), outcome(2)])
        follower.append([outcome(1), outcome(2), outcome(3)])  # the note failed, and it asks again
        follower.append([outcome(4)])
    assert images(tmp_path) == ["1.png", "2.png", "3.png", "4.png"]


def test_a_new_process_finds_what_the_dead_one_wrote(tmp_path: Path) -> None:
    lines = [json.dumps(to_record(outcome(number))).encode() + b"\n" for number in range(3)]
    (tmp_path / JSONL_NAME).write_bytes(b"".join(lines)[:-20])
    with ResultsFollower(tmp_path) as follower:
        follower.append([outcome(number) for number in range(3)])
    assert (tmp_path / JSONL_NAME).read_bytes() == b"".join(lines)


def test_the_same_image_done_anew_is_written_again(tmp_path: Path) -> None:
    with ResultsFollower(tmp_path) as follower:
        follower.append([outcome(1)])
        follower.append([Outcome(image="1.png", status=Status.DONE, seconds=7.0)])
    assert images(tmp_path) == ["1.png", "1.png"]


def test_records_are_on_disk_before_they_are_noted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    synced: list[int] = []
    with ResultsFollower(tmp_path) as follower:
        monkeypatch.setattr(os, "fsync", synced.append)
        follower.append([outcome(1), outcome(2)])
    assert len(synced) == 1
