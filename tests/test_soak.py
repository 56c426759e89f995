"""Five thousand images through one daemon: it holds no more at the end than near the start."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from daemons import Place, place_fixture, wait_until

from bcseg_batch.store.encode import encode_png

pytestmark = [pytest.mark.slow, pytest.mark.timeout(400)]

IMAGES = 5000
WARM = 1000


@pytest.fixture
def place(tmp_path: Path, tiny_model: Path) -> Iterator[Place]:
    yield from place_fixture(tmp_path, tiny_model)


@dataclass(frozen=True)
class Held:
    """What a process holds."""

    resident_bytes: int
    threads: int
    files: int


def held_by(pid: int) -> Held:
    status = dict(
        line.split(":", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines()
    )
    return Held(
        int(status["VmRSS"].split()[0]) * 1024,
        int(status["Threads"]),
        sum(1 for _ in Path(f"/proc/{pid}/fd").iterdir()),
    )


def write_images(place: Place) -> None:
    shared = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    for number in range(IMAGES):
        pixels = shared.copy()
        pixels[0, 0] = number % 256, number // 256, 0  # no two are the same
        target = place.input / f"{number // 500}" / f"{number:04d}.png"
        target.parent.mkdir(exist_ok=True)
        target.write_bytes(encode_png(pixels))


def test_memory_threads_and_files_stay_as_they_are(place: Place) -> None:
    place.configure(processing={"batch_size": 32, "workers": 2})
    write_images(place)
    results = place.output / "results.jsonl"
    daemon = place.start()
    place.wait_ready(daemon)
    samples: list[tuple[int, Held]] = []

    def reached(target: int) -> bool:
        return results.exists() and results.read_bytes().count(b"\n") >= target

    for target in range(WARM, IMAGES + 1, 500):
        wait_until(partial(reached, target), f"{target} done", timeout_s=200)
        samples.append((target, held_by(daemon.pid)))
    assert len(place.standing()) == IMAGES
    assert set(place.standing().values()) == {"done"}
    assert place.stop(daemon) == 0

    first = samples[0][1]
    for target, held in samples[1:]:
        assert held.resident_bytes < 1.05 * first.resident_bytes, (target, samples)
        assert held.threads <= first.threads, (target, samples)
        # An output may be open at one moment and not at another.
        assert abs(held.files - first.files) <= 8, (target, samples)
