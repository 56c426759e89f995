"""Names are sorted alike in memory and by way of the disk, whatever bytes they hold."""

from __future__ import annotations

import errno
import tempfile
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bcseg_batch.errors import OutputError
from bcseg_batch.intake import external_sort
from bcseg_batch.intake.external_sort import ExternalSort

names = st.one_of(st.binary(max_size=6), st.sampled_from([b"a\nb", b"\xed\xb3\xbf", b"\0", b""]))


@given(st.lists(names, max_size=40), st.integers(1, 50))
def test_all_come_back_sorted_however_few_are_held(items: list[bytes], held: int) -> None:
    sort = ExternalSort(held)
    for item in items:
        sort.add(item)
    assert bool(sort) is bool(items)
    assert list(sort) == sorted(items)
    assert list(sort) == sorted(items)


def test_names_longer_than_what_is_read_at_once_come_back_whole() -> None:
    items = [bytes([65 + n]) * (n * 9000) for n in range(20)]
    sort = ExternalSort(3)
    for item in reversed(items):
        sort.add(item)
    assert list(sort) == sorted(items)


def test_few_names_never_reach_the_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", "/nowhere")
    sort = ExternalSort(10)
    for number in range(10):
        sort.add(b"%d" % number)
    assert len(list(sort)) == 10
    with pytest.raises(OutputError, match=r"/nowhere.*set TMPDIR"):
        sort.add(b"one more")


def test_a_full_disk_is_told_in_words(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(**_: object) -> Path:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(external_sort.tempfile, "TemporaryFile", full)
    sort = ExternalSort(0)
    with pytest.raises(OutputError, match="No space left on device: free some space"):
        sort.add(b"a")
