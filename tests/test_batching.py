"""When a batch goes, by a clock that the test turns."""

from __future__ import annotations

import pytest

from bcseg_batch.service.batching import Batcher


class Clock:
    def __init__(self) -> None:
        self.now_s = 100.0

    def __call__(self) -> float:
        return self.now_s


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def batcher(clock: Clock) -> Batcher[str]:
    return Batcher(batch_size=3, max_wait_s=2.0, clock=clock)


def test_nothing_is_due_where_nothing_waits(batcher: Batcher[str], clock: Clock) -> None:
    clock.now_s += 1e9
    assert not batcher.due
    assert not batcher.full
    assert batcher.take() == []


def test_a_full_batch_is_due_at_once_and_in_order(batcher: Batcher[str]) -> None:
    for item in "abc":
        assert not batcher.due
        batcher.add(item)
    assert batcher.full
    assert batcher.due
    assert batcher.take() == ["a", "b", "c"]
    assert len(batcher) == 0


def test_a_partial_batch_waits_for_its_oldest_item(batcher: Batcher[str], clock: Clock) -> None:
    batcher.add("a")
    clock.now_s += 1.9
    batcher.add("b")
    assert not batcher.due
    clock.now_s += 0.1
    assert batcher.due
    assert not batcher.full
    assert batcher.take() == ["a", "b"]
    assert not batcher.due


def test_after_a_batch_the_wait_is_that_of_what_stayed(batcher: Batcher[str], clock: Clock) -> None:
    for item in "abc":
        batcher.add(item)
    clock.now_s += 1.5
    batcher.add("d")
    assert batcher.take() == ["a", "b", "c"]
    clock.now_s += 1.5
    assert not batcher.due
    clock.now_s += 0.5
    assert batcher.take() == ["d"]


def test_no_wait_makes_a_single_item_due(clock: Clock) -> None:
    batcher: Batcher[int] = Batcher(batch_size=8, max_wait_s=0.0, clock=clock)
    batcher.add(1)
    assert batcher.due
