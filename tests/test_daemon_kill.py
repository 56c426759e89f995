"""The daemon is killed again and again, and no image is lost, doubled or half written."""

from __future__ import annotations

import collections
import random
import sqlite3
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest
from daemons import LONG_S, Place, place_fixture, wait_until
from parts import command, tree, write_smear

from bcseg_batch.store.ledger import LEDGER_NAME

pytestmark = [pytest.mark.slow, pytest.mark.timeout(400)]

KILLS = 30
IMAGES = 300


@pytest.fixture
def place(tmp_path: Path, tiny_model: Path) -> Iterator[Place]:
    yield from place_fixture(tmp_path, tiny_model)


def fill(place: Place, stop: threading.Event) -> None:
    """Drop images as people do: written slowly, moved in, into new sub-folders."""
    dice = random.Random(7)
    for number in range(IMAGES):
        made = write_smear(place.root / "aside" / f"{number}.png", number, (60, 50))
        target = place.input / f"slide{number % 5}" / f"{number:03d}.png"
        target.parent.mkdir(exist_ok=True)
        if dice.random() < 0.5:
            made.rename(target)
        else:
            data = made.read_bytes()
            with target.open("wb", buffering=0) as file:
                file.write(data[: len(data) // 2])
                time.sleep(dice.random() * 0.05)
                file.write(data[len(data) // 2 :])
        if stop.wait(dice.random() * 0.5):
            return


def test_kills_at_random_moments_cost_nothing(place: Place) -> None:
    # These deaths are nobody's fault, and should condemn no image.
    place.configure(
        service={"max_wait_s": 0.05, "max_attempts": 20},
        processing={"batch_size": 4, "workers": 2},
    )
    dice = random.Random(3)
    stop = threading.Event()
    filler = threading.Thread(target=fill, args=(place, stop))
    filler.start()
    killed_at_work = 0

    def at_work(done_before: int) -> bool:
        return len(place.records()) > done_before or not filler.is_alive()

    try:
        for _ in range(KILLS):
            daemon = place.start()
            done_before = len(place.records())
            if dice.random() < 0.2:
                time.sleep(dice.random() * 3)  # while it starts
            else:
                wait_until(partial(at_work, done_before), "at work")
                time.sleep(dice.random() * 0.5)
            assert daemon.poll() is None, place.log
            daemon.kill()
            daemon.wait()
            killed_at_work += len(place.records()) > done_before
    finally:
        if sys.exc_info()[0] is not None:
            stop.set()
        filler.join()
    assert place.run_until_idle(2) == 0
    assert killed_at_work > KILLS / 2  # or the test proves little

    wanted = {
        path.relative_to(place.input).as_posix()
        for path in place.input.rglob("*")
        if path.is_file()
    }
    assert len(wanted) == IMAGES
    db = sqlite3.connect(place.state / LEDGER_NAME)
    rows = db.execute("SELECT CAST(image AS TEXT), state FROM images").fetchall()
    db.close()
    assert sorted(rows) == sorted((image, "done") for image in wanted)
    counts = collections.Counter(record["image"] for record in place.records())
    assert set(counts) == wanted
    # A file caught half written may have been tried in that state; none is done more than once.
    assert all(record["status"] == "done" for record in place.records())
    assert set(counts.values()) == {1}

    once = place.root / "once"
    subprocess.run(
        [
            *(command(), "process-dir", "--model", str(place.model), "--device", "cpu"),
            *("--dtype", "float32", str(place.input), str(once)),
        ],
        check=True,
        capture_output=True,
        timeout=LONG_S,
    )
    for kind in ("masks", "composites", "cells"):
        assert tree(place.output / kind) == tree(once / kind)
    assert not [name for name in tree(place.output) if name.endswith(".part")]
    assert "Traceback" not in place.log


def test_an_image_that_kills_the_process_is_failed_and_the_rest_is_done(place: Place) -> None:
    launcher = place.root / "launcher.py"
    launcher.write_text(
        textwrap.dedent(
            """
            import os, signal
            import bcseg_batch.service.pipeline as pipeline
            decode = pipeline.decode_image
            def deadly(path, **options):
                if path.name == "killer.png":
                    os.kill(os.getpid(), signal.SIGKILL)
                return decode(path, **options)
            pipeline.decode_image = deadly
            from bcseg_batch.cli import main
            main()
            """
        )
    )
    for number in range(12):
        write_smear(place.input / f"{number:02d}.png", number)
    write_smear(place.input / "05" / "killer.png", 99)
    place.configure(service={"max_wait_s": 0.05, "max_attempts": 3})
    deaths = 0
    while True:
        daemon = place.start("--until-idle", "1", launcher=launcher)
        if daemon.wait(LONG_S) == 0:
            break
        deaths += 1
        assert deaths <= 3, place.log
    assert deaths == 3
    standing = place.standing()
    assert standing.pop("05/killer.png") == "failed"
    assert set(standing.values()) == {"done"}
    assert len(standing) == 12
    (failed,) = (record for record in place.records() if record["status"] == "failed")
    assert failed["error"].startswith("CrashedProcessError: ")
    assert "crashed the process" in failed["error"]

    # It stays failed, and the daemon lives with it.
    daemon = place.start(launcher=launcher)
    write_smear(place.input / "more.png", 50)
    place.wait_for("more.png")
    assert place.stop(daemon) == 0
