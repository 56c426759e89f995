"""Plays a run on a cluster through, event by event, to check the formulas of `scale_model.py`.

Nothing here divides images by rates. Drivers, storage, links and cores are things that one block of
images holds for a while and the next one waits for; images differ in size; machines are lost. What
holds the run up is not computed but seen: it is the thing that was busy for the largest share of
the time.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Generator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import simpy
from scale_model import Bound, Machine, Run

Steps = Generator[simpy.Event, Any, None]

BLOCKS_IN_HAND = 4
"""Blocks that a machine has at once: read, waiting, computed, written."""
SIZE_SIGMA = 0.5
"""Of the logarithm of an image's size: two of three lie within a factor of 1.6 of the middle."""


@dataclass(frozen=True, slots=True)
class Played:
    """What was seen.

    Attributes:
        seconds: from start to end.
        done: images with a record.
        redone: images that were lost with a machine and done again.
        losses: of machines.
        busy: share of the time in which each thing was in use, 0 to 1.
    """

    seconds: float
    done: int
    redone: int
    losses: int
    busy: dict[Bound, float]

    @property
    def bound(self) -> Bound:
        """What held the run up."""
        return max(self.busy, key=lambda bound: self.busy[bound])


@dataclass(slots=True)
class _Line:
    """One thing that serves one block at a time, in the order in which they come."""

    env: simpy.Environment
    resource: simpy.Resource
    busy_s: float = 0.0

    def serve(self, seconds: float) -> Steps:
        if seconds > 0:
            with self.resource.request() as turn:
                yield turn
                yield self.env.timeout(seconds)
                self.busy_s += seconds


@dataclass(slots=True)
class _Shard:
    driver: _Line
    blocks: simpy.Store


@dataclass(slots=True)
class _Worker:
    shard: _Shard
    down: _Line
    up: _Line
    door: simpy.Resource
    room: simpy.Container
    back: simpy.Event
    cores: list[float]
    gpu_free_s: float = 0.0
    core_busy_s: float = 0.0
    gpu_busy_s: float = 0.0
    in_hand: set[simpy.Process] = field(default_factory=set)


class Simulation:
    """One run.

    Args:
        run: what to play.
        seed: of sizes and losses.
    """

    def __init__(self, run: Run, seed: int) -> None:
        self._run = run
        self._rng = np.random.default_rng(seed)
        self._env = simpy.Environment()
        self._done = self._redone = self._losses = 0
        self._finished = self._env.event()
        self._bandwidth, self._reads, self._writes = (self._line() for _ in range(3))
        self._shards = [self._shard(number) for number in range(run.drivers)]
        self._workers = [
            self._worker(self._shards[number % run.drivers]) for number in range(run.machines)
        ]

    def play(self) -> Played:
        """Play it to the end."""
        for worker in self._workers:
            self._env.process(self._take_blocks(worker))
            if self._run.machine.losses_per_hour:
                self._env.process(self._lose(worker))
        self._env.run(until=self._finished)
        return Played(self._env.now, self._done, self._redone, self._losses, self._busy())

    def _line(self) -> _Line:
        return _Line(self._env, simpy.Resource(self._env))

    def _shard(self, number: int) -> _Shard:
        run = self._run
        count = len(range(number, run.images, run.drivers))
        shard = _Shard(self._line(), simpy.Store(self._env))
        for first in range(0, count, run.block):
            shard.blocks.put(min(run.block, count - first))
        return shard

    def _worker(self, shard: _Shard) -> _Worker:
        return _Worker(
            shard=shard,
            down=self._line(),
            up=self._line(),
            door=simpy.Resource(self._env),
            room=simpy.Container(self._env, init=BLOCKS_IN_HAND),
            back=self._env.event().succeed(),
            cores=[0.0] * self._run.machine.cores,
        )

    def _take_blocks(self, worker: _Worker) -> Steps:
        driver = self._run.driver
        # Names of other shards go by between two of its own.
        listed = self._run.drivers if self._run.lists_all else 1
        yield self._env.timeout(self._run.start_s)
        while True:
            yield worker.room.get(1)
            yield worker.back
            count = yield worker.shard.blocks.get()
            yield from worker.shard.driver.serve(
                count * (listed * driver.list_s + driver.hand_out_s)
            )
            if not worker.back.triggered:
                # Another machine takes it.
                worker.shard.blocks.put(count)
                worker.room.put(1)
                yield worker.back
                continue
            block = self._env.process(self._process(worker, count))
            worker.in_hand.add(block)

    def _process(self, worker: _Worker, count: int) -> Steps:
        run, image = self._run, self._run.image
        sizes = self._rng.lognormal(-(SIZE_SIGMA**2) / 2, SIZE_SIGMA, count)
        total = float(sizes.sum())
        this = self._env.active_process
        assert this is not None
        try:
            read_bytes, written_bytes = total * image.input_bytes, total * image.output_bytes
            yield from self._reads.serve(count / run.storage.reads_per_s)
            yield from self._bandwidth.serve(read_bytes / run.storage.bytes_per_s)
            yield from worker.down.serve(read_bytes / run.machine.link_bytes_per_s)
            yield from self._compute(worker, sizes)
            yield from worker.up.serve(written_bytes / run.machine.link_bytes_per_s)
            yield from self._bandwidth.serve(written_bytes / run.storage.bytes_per_s)
            yield from self._writes.serve(count * image.output_files / run.storage.writes_per_s)
        except simpy.Interrupt:
            # The machine is lost, and the block is handed out again.
            self._redone += count
            worker.shard.blocks.put(count)
            worker.room.put(1)
            return
        # From here on the files are there, whatever becomes of the machine.
        worker.in_hand.discard(this)
        worker.room.put(1)
        yield from worker.shard.driver.serve(count * run.driver.record_s)
        self._done += count
        if self._done == run.images:
            self._finished.succeed()

    def _compute(self, worker: _Worker, sizes: np.ndarray[Any, np.dtype[np.float64]]) -> Steps:
        """Each image takes the core that is free first; with a GPU, then that."""
        machine, image = self._run.machine, self._run.image
        with worker.door.request() as turn:
            yield turn
            yield self._env.timeout(max(0.0, worker.cores[0] - self._env.now))
            ends_s = []
            for size in sizes:
                took_s = float(size) * image.files_core_s
                if machine.gpu_images_per_s is None:
                    took_s += image.network_core_s
                end_s = max(worker.cores[0], self._env.now) + took_s
                heapq.heapreplace(worker.cores, end_s)
                worker.core_busy_s += took_s
                ends_s.append(end_s)
        if machine.gpu_images_per_s is not None:
            ends_s.sort()
            for place, end_s in enumerate(ends_s):
                worker.gpu_free_s = max(worker.gpu_free_s, end_s) + 1 / machine.gpu_images_per_s
                ends_s[place] = worker.gpu_free_s
            worker.gpu_busy_s += len(ends_s) / machine.gpu_images_per_s
        yield self._env.timeout(max(ends_s) - self._env.now)

    def _lose(self, worker: _Worker) -> Steps:
        machine: Machine = self._run.machine
        while True:
            yield self._env.timeout(self._rng.exponential(3600 / machine.losses_per_hour))
            self._losses += 1
            worker.back = self._env.event()
            for block in sorted(worker.in_hand, key=id):
                if block.is_alive:
                    block.interrupt()
            worker.in_hand.clear()
            yield self._env.timeout(machine.repair_s)
            worker.cores = [self._env.now] * machine.cores
            worker.gpu_free_s = self._env.now
            worker.back.succeed()

    def _busy(self) -> dict[Bound, float]:
        run, workers, seconds = self._run, self._workers, self._env.now
        of_all_s = seconds * len(workers)

        def share(busy_s: float, out_of_s: float) -> float:
            return 0.0 if math.isinf(out_of_s) else busy_s / out_of_s

        found = {
            Bound.PROCESSORS: share(
                sum(w.core_busy_s for w in workers), of_all_s * run.machine.cores
            ),
            Bound.LINKS: share(
                max(sum(w.up.busy_s for w in workers), sum(w.down.busy_s for w in workers)),
                of_all_s,
            ),
            Bound.BANDWIDTH: self._bandwidth.busy_s / seconds,
            Bound.READS: self._reads.busy_s / seconds,
            Bound.WRITES: self._writes.busy_s / seconds,
            Bound.DRIVER: sum(s.driver.busy_s for s in self._shards)
            / (seconds * len(self._shards)),
        }
        if run.machine.gpu_images_per_s is not None:
            found[Bound.GPUS] = share(sum(w.gpu_busy_s for w in workers), of_all_s)
        return found


def play(run: Run, *, seed: int = 0) -> Played:
    """Play a run through.

    Args:
        run: so small that a few hundred blocks for each machine go through it; what it comes to
            does not depend on the number of images.
        seed: of sizes and losses.
    """
    return Simulation(run, seed).play()
