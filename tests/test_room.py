"""How many pixels may be in hand at once."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bcseg_batch.service.room import NoRoom, Room


def test_lets_images_in_up_to_its_limit() -> None:
    room = Room(100)
    room.take("a", 60)
    with pytest.raises(NoRoom) as refused:
        room.take("b", 41)
    assert refused.value.pixels == 41
    room.take("c", 40)
    assert not room.fits(1)


def test_an_image_larger_than_all_room_is_let_in_alone() -> None:
    room = Room(100)
    room.take("small", 1)
    with pytest.raises(NoRoom):
        room.take("giant", 1000)
    room.leave("small")
    room.take("giant", 1000)
    assert not room.fits(1)


def test_leaving_twice_frees_no_more_than_was_taken() -> None:
    room = Room(100)
    room.take("a", 60)
    room.take("b", 40)
    room.leave("a")
    room.leave("a")
    room.leave("never came")
    assert room.fits(60)
    assert not room.fits(61)


@given(st.lists(st.integers(0, 150), max_size=20))
def test_never_holds_more_than_its_limit_but_for_one_alone(sizes: list[int]) -> None:
    room, held = Room(100), dict[str, int]()
    for number, pixels in enumerate(sizes):
        image = str(number)
        try:
            room.take(image, pixels)
        except NoRoom:
            assert sum(held.values()) + pixels > 100
            assert held
            oldest = next(iter(held))
            room.leave(oldest)
            del held[oldest]
        else:
            held[image] = pixels
        large = [pixels for pixels in held.values() if pixels]
        assert sum(large) <= 100 or len(large) == 1
