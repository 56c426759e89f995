import os
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bcseg_batch.intake.settle import SettleTracker, look_at
from bcseg_batch.items import InputFile

SETTLE_S = 1.0


@dataclass
class World:
    """Files that are only numbers, a clock that only the test moves, and a tracker on both."""

    capacity: int = 1000
    now_s: float = 100.0
    looks: int = 0
    files: dict[str, tuple[int, int]] = field(default_factory=dict)
    changes: int = 0

    def __post_init__(self):
        self.tracker = SettleTracker(
            SETTLE_S, look=self.look, clock=lambda: self.now_s, capacity=self.capacity
        )

    def look(self, image: str) -> InputFile | None:
        self.looks += 1
        facts = self.files.get(image)
        return None if facts is None else InputFile(Path("in") / image, image, *facts)

    def write(self, image: str) -> None:
        self.changes += 1
        self.files[image] = (self.changes, self.changes)

    def ready(self) -> list[str]:
        return [file.image for file in self.tracker.ready()]

    def ready_after(self, wait_s: float) -> list[str]:
        self.now_s += wait_s
        return self.ready()


@pytest.fixture
def world():
    return World()


def test_a_file_that_keeps_still_is_given_once_with_what_was_seen_last(world):
    world.write("a.jpg")
    assert world.tracker.hint("a.jpg", event=True)
    assert world.ready() == []
    assert world.ready_after(0.99) == []
    world.now_s += 0.01
    assert world.tracker.ready() == [InputFile(Path("in/a.jpg"), "a.jpg", *world.files["a.jpg"])]
    assert world.ready_after(100) == []
    assert len(world.tracker) == 0
    assert world.looks == 2


def test_an_event_starts_the_time_anew_even_where_nothing_seems_changed(world):
    world.write("a.jpg")
    world.tracker.hint("a.jpg", event=True)
    world.ready()
    world.now_s += 0.9
    world.tracker.hint("a.jpg", event=True)
    assert world.ready_after(0.9) == []
    assert world.ready_after(0.1) == ["a.jpg"]


def test_what_is_written_before_the_last_event_does_not_cost_a_second_wait(world):
    # The ordinary case: created, seen empty, written, closed.
    world.write("a.jpg")
    world.tracker.hint("a.jpg", event=True)
    world.ready()
    world.write("a.jpg")
    world.now_s += 0.1
    world.tracker.hint("a.jpg", event=True)
    world.ready()
    assert world.ready_after(1.0) == ["a.jpg"]


def test_being_seen_again_by_a_rescan_changes_nothing(world):
    world.write("a.jpg")
    world.tracker.hint("a.jpg", event=False)
    world.ready()
    world.now_s += 0.9
    assert world.tracker.hint("a.jpg", event=False)
    assert world.ready_after(0.1) == ["a.jpg"]


def test_a_change_without_an_event_starts_the_time_anew(world):
    world.write("a.jpg")
    world.tracker.hint("a.jpg", event=False)
    world.ready()
    world.now_s += 0.5
    world.write("a.jpg")
    assert world.ready_after(0.5) == []
    assert world.ready_after(0.99) == []
    assert world.ready_after(0.01) == ["a.jpg"]


@pytest.mark.parametrize("at_once", [True, False])
def test_what_is_gone_is_forgotten(world, at_once):
    if not at_once:
        world.write("a.jpg")
    world.tracker.hint("a.jpg", event=True)
    world.ready()
    world.files.clear()
    assert world.ready_after(1.0) == []
    assert len(world.tracker) == 0
    assert world.tracker.next_due_s() is None
    world.write("a.jpg")
    world.tracker.hint("a.jpg", event=True)
    assert world.ready() == []
    assert world.ready_after(1.0) == ["a.jpg"]


def test_a_file_sent_back_waits_as_long_as_asked(world):
    world.write("a.jpg")
    world.tracker.delay("a.jpg", 5.0)
    assert world.ready() == []
    assert world.ready_after(4.9) == []
    assert world.ready_after(0.1) == ["a.jpg"]


def test_a_file_sent_back_that_goes_on_growing_settles_first(world):
    world.write("a.jpg")
    world.tracker.delay("a.jpg", 5.0)
    world.ready()
    world.write("a.jpg")
    world.now_s += 4.9
    world.tracker.hint("a.jpg", event=True)
    world.ready()
    assert world.ready_after(0.1) == []
    assert world.ready_after(0.9) == ["a.jpg"]


def test_sent_back_while_an_event_has_brought_it_already(world):
    world.write("a.jpg")
    world.tracker.hint("a.jpg", event=True)
    world.tracker.delay("a.jpg", 3.0)
    assert world.ready() == []
    assert world.ready_after(2.9) == []
    assert world.ready_after(0.1) == ["a.jpg"]
    assert world.ready_after(9) == []


def test_when_full_the_caller_is_told_but_what_is_sent_back_is_kept():
    world = World(capacity=2)
    for image in ("a", "b", "c"):
        world.write(image)
    assert world.tracker.hint("a", event=True)
    assert world.tracker.hint("b", event=True)
    assert not world.tracker.hint("c", event=True)
    assert world.tracker.hint("a", event=True)
    world.write("d")
    world.tracker.delay("d", 0)
    world.ready()
    assert world.ready_after(1.0) == ["a", "b", "d"]
    assert world.tracker.hint("c", event=False)


def test_how_long_to_wait_and_how_long_was_waited(world):
    assert world.tracker.next_due_s() is None
    assert world.tracker.oldest_wait_s() is None
    world.write("a")
    world.tracker.hint("a", event=True)
    assert world.tracker.next_due_s() == 0  # it wants a first look
    world.ready()
    assert world.tracker.next_due_s() == pytest.approx(1.0)
    world.now_s += 0.25
    assert world.tracker.next_due_s() == pytest.approx(0.75)
    assert world.tracker.oldest_wait_s() == pytest.approx(0.25)
    assert "a" in world.tracker
    world.now_s += 5
    assert world.tracker.next_due_s() == 0


def test_thousands_of_events_cost_no_look_each():
    world = World(capacity=5000)
    images = [f"{number}.jpg" for number in range(5000)]
    for image in images:
        world.write(image)
        for _ in range(20):
            world.tracker.hint(image, event=True)
    assert world.ready() == []
    assert world.ready_after(1.0) == images
    assert world.looks == 2 * len(images)


IMAGES = st.sampled_from(["a.jpg", "b.jpg", "sub/c.jpg"])
ACTIONS = st.one_of(
    st.tuples(st.sampled_from(["write+event", "write", "event", "seen", "delete"]), IMAGES),
    st.tuples(st.just("delay"), IMAGES, st.sampled_from([0.0, 0.5, 3.0])),
    st.tuples(st.just("pass"), st.sampled_from([0.0, 0.125, 0.5, 0.875, 1.0, 2.5])),
    st.tuples(st.just("ready")),
)


@given(st.lists(ACTIONS, max_size=60))
def test_never_ready_before_it_was_quiet_and_in_the_end_always(actions):
    world = World()
    quiet_since_s: dict[str, float] = {}
    not_before_s: dict[str, float] = {}
    owed: set[str] = set()  # hinted at since they were last given

    def ask() -> None:
        looks = world.looks
        pending = len(world.tracker)
        for image in world.ready():
            assert world.now_s - quiet_since_s[image] >= SETTLE_S
            assert world.now_s >= not_before_s.get(image, 0)
            assert image in world.files
            not_before_s.pop(image, None)
            owed.remove(image)
        assert world.looks - looks <= 2 * pending

    for action in actions:
        match action:
            case ("pass", float() as wait_s):
                world.now_s += wait_s
            case ("ready",):
                ask()
            case ("delete", image):
                world.files.pop(image, None)
            case ("delay", image, wait_s):
                world.tracker.delay(image, wait_s)
                quiet_since_s.setdefault(image, world.now_s)
                not_before_s[image] = max(world.now_s + wait_s, not_before_s.get(image, 0))
                owed.add(image)
            case (what, image):
                if what.startswith("write"):
                    world.write(image)
                if what != "write":
                    world.tracker.hint(image, event=what != "seen")
                    owed.add(image)
                if what != "seen":
                    quiet_since_s[image] = world.now_s
                quiet_since_s.setdefault(image, world.now_s)
        # One that a look found gone owes nothing until it is hinted at again.
        owed = {image for image in owed if image in world.tracker}
        not_before_s = {image: s for image, s in not_before_s.items() if image in world.tracker}
        assert len(world.tracker) == len(owed)
    rounds = 0
    while (wait_s := world.tracker.next_due_s()) is not None:
        world.now_s += wait_s
        ask()
        owed = {image for image in owed if image in world.tracker}
        rounds += 1
        assert rounds < 50
    assert not owed
    assert len(world.tracker) == 0


def test_looking_at_real_files(tmp_path):
    folder = tmp_path / "sub"
    folder.mkdir()
    (folder / "a.jpg").write_bytes(b"12345")
    os.utime(folder / "a.jpg", ns=(1, 1_700_000_000_123_456_789))
    (tmp_path / "link.jpg").symlink_to("sub/a.jpg")
    (tmp_path / "broken.jpg").symlink_to("nowhere")
    (tmp_path / "folder.jpg").mkdir()
    os.mkfifo(tmp_path / "pipe.jpg")
    mtime_ns = 1_700_000_000_123_456_789
    assert look_at(tmp_path, "sub/a.jpg") == InputFile(folder / "a.jpg", "sub/a.jpg", 5, mtime_ns)
    assert look_at(tmp_path, "link.jpg") == InputFile(
        tmp_path / "link.jpg", "link.jpg", 5, mtime_ns
    )
    for image in ("broken.jpg", "folder.jpg", "pipe.jpg", "absent.jpg", "sub/a.jpg/b", "nul\0.jpg"):
        assert look_at(tmp_path, image) is None
