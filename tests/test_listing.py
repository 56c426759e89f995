"""How far a run looks ahead, and what it knows of the total meanwhile."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bcseg_batch.items import InputFile
from bcseg_batch.service.listing import Listing


def files(count: int, drawn: list[int]) -> Iterator[InputFile]:
    for number in range(count):
        drawn.append(number)
        yield InputFile(Path(f"{number}.png"), f"{number}.png", 1, 1)


@given(st.integers(0, 30), st.integers(1, 30))
def test_each_file_comes_once_and_never_more_are_held_than_asked(count: int, ahead: int) -> None:
    drawn: list[int] = []
    listing = Listing(files(count, drawn), ahead=ahead)
    listing.look_ahead()
    assert listing.is_whole is (count < ahead)
    given_out = 0
    for file in listing:
        assert file.image == f"{given_out}.png"
        assert len(drawn) - given_out <= ahead
        given_out += 1
        assert listing.count == len(drawn)
    assert given_out == count == listing.count
    assert listing.is_whole


def test_a_total_within_reach_is_known_at_once() -> None:
    listing = Listing(files(5, []), ahead=6)
    listing.look_ahead()
    assert (listing.count, listing.is_whole) == (5, True)


def test_what_the_walk_cannot_do_reaches_who_takes_the_files() -> None:
    def broken() -> Iterator[InputFile]:
        yield from files(3, [])
        raise PermissionError("no longer")

    listing = Listing(broken(), ahead=1)
    with pytest.raises(PermissionError):
        list(listing)
    assert not listing.is_whole
