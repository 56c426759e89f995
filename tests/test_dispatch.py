"""Which worker has which image: every image comes out once, whatever workers die of."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from hypothesis import given
from hypothesis import strategies as st

from bcseg_batch.items import InputFile
from bcseg_batch.service.cluster import crew_size
from bcseg_batch.service.dispatch import Dispatch, Task

MAX_DEATHS = 3


def task(image: str) -> Task:
    return Task(InputFile(Path(image), image, 1, 1), image)


def drawing(images: Iterator[str]) -> Task | None:
    image = next(images, None)
    return None if image is None else task(image)


def names(tasks: list[Task]) -> list[str]:
    return [one.file.image for one in tasks]


def test_a_worker_is_given_no_more_than_its_window() -> None:
    dispatch: Dispatch[str] = Dispatch(MAX_DEATHS)
    images = iter("abcdef")
    assert names(dispatch.next_for("w", 3, lambda: drawing(images))) == ["a", "b", "c"]
    assert dispatch.next_for("w", 3, lambda: drawing(images)) == []
    assert dispatch.through("w", "b")
    assert names(dispatch.next_for("w", 3, lambda: drawing(images))) == ["d"]


def test_the_images_of_a_dead_worker_are_tried_alone_before_anything_new() -> None:
    dispatch: Dispatch[str] = Dispatch(MAX_DEATHS)
    images = iter("abcdef")
    dispatch.next_for("w", 2, lambda: drawing(images))
    assert dispatch.died("w") == []
    assert names(dispatch.next_for("x", 2, lambda: drawing(images))) == ["a"]
    assert dispatch.next_for("x", 2, lambda: drawing(images)) == []
    dispatch.through("x", "a")
    assert names(dispatch.next_for("x", 2, lambda: drawing(images))) == ["b"]
    dispatch.through("x", "b")
    assert names(dispatch.next_for("x", 2, lambda: drawing(images))) == ["c", "d"]


def test_a_worker_with_images_in_hand_finishes_them_before_it_takes_a_suspect() -> None:
    dispatch: Dispatch[str] = Dispatch(MAX_DEATHS)
    images = iter("abcdef")
    dispatch.next_for("w", 2, lambda: drawing(images))
    dispatch.next_for("x", 2, lambda: drawing(images))
    dispatch.died("w")
    dispatch.through("x", "c")
    assert dispatch.next_for("x", 2, lambda: drawing(images)) == []
    dispatch.through("x", "d")
    assert names(dispatch.next_for("x", 2, lambda: drawing(images))) == ["a"]


def test_only_an_image_that_kills_alone_and_again_is_given_up() -> None:
    dispatch: Dispatch[str] = Dispatch(MAX_DEATHS)
    images = iter("k")
    for _ in range(MAX_DEATHS - 1):
        assert names(dispatch.next_for("w", 2, lambda: drawing(images))) == ["k"]
        assert dispatch.died("w") == []
    dispatch.next_for("w", 2, lambda: drawing(images))
    assert names(dispatch.died("w")) == ["k"]
    assert not dispatch.busy


def test_a_lost_device_is_no_images_fault() -> None:
    dispatch: Dispatch[str] = Dispatch(1)
    images = iter("ab")
    dispatch.next_for("w", 2, lambda: drawing(images))
    dispatch.left("w")
    assert names(dispatch.next_for("x", 2, lambda: drawing(images))) == ["a", "b"]


def test_the_outcome_of_an_image_that_was_taken_away_does_not_count() -> None:
    dispatch: Dispatch[str] = Dispatch(MAX_DEATHS)
    images = iter("a")
    dispatch.next_for("w", 2, lambda: drawing(images))
    dispatch.died("w")
    assert not dispatch.through("w", "a")
    assert dispatch.busy


@given(
    count=st.integers(0, 40),
    killers=st.sets(st.integers(0, 39), max_size=3),
    chance=st.lists(st.sampled_from(["through", "died", "left"]), max_size=60),
    window=st.integers(1, 6),
)
def test_each_image_comes_out_once_and_only_killers_are_given_up(
    count: int, killers: set[int], chance: list[str], window: int
) -> None:
    dispatch: Dispatch[int] = Dispatch(MAX_DEATHS)
    images = iter([str(number) for number in range(count)])
    open_, done, given_up = True, [], []
    held: dict[int, list[str]] = {0: [], 1: [], 2: []}
    deadly = {str(number) for number in killers if number < count}
    lucky = iter(chance)

    def draw() -> Task | None:
        nonlocal open_
        drawn = drawing(images)
        open_ = drawn is not None
        return drawn

    for _ in range(10_000):
        if not (open_ or dispatch.busy):
            break
        for worker, having in held.items():
            having.extend(names(dispatch.next_for(worker, window, draw)))
            assert len(having) <= window
            if not having:
                continue
            event = "died" if deadly.intersection(having) else next(lucky, "through")
            # A machine that dies by chance while an image is alone on it counts against it.
            if event == "died" and len(having) == 1 and having[0] not in deadly:
                event = "left"
            if event == "through":
                image = having.pop(0)
                assert dispatch.through(worker, image)
                done.append(image)
            elif event == "died":
                given_up += names(dispatch.died(worker))
                having.clear()
            else:
                dispatch.left(worker)
                having.clear()
    assert Counter(done + given_up) == Counter(str(number) for number in range(count))
    assert set(given_up) == deadly


@given(
    there=st.integers(0, 50),
    ready=st.integers(0, 50),
    smallest=st.integers(1, 20),
    more=st.integers(0, 20),
    at_once=st.booleans(),
    are_too_few=st.booleans(),
)
def test_a_crew_grows_only_where_it_is_too_small_and_never_beyond_its_limit(
    *, there: int, ready: int, smallest: int, more: int, at_once: bool, are_too_few: bool
) -> None:
    goal = crew_size(
        there,
        ready=min(ready, there),
        smallest=smallest,
        largest=smallest + more,
        at_once=at_once,
        are_too_few=are_too_few,
    )
    assert goal >= there
    assert smallest <= goal <= max(there, smallest + more)
    if not are_too_few:
        # Idle workers that were let go are not started again.
        assert goal == max(there, smallest)
    elif at_once:
        assert goal == max(there, smallest + more)
