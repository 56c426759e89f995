"""What a run over very many images takes on very many machines: formulas, no clock.

A run is a chain, and is as fast as its slowest link. `rates` gives what each link lets through,
`predict` the least of them and what follows from it. `scale_simulation.py` plays the same run
through event by event and shares nothing with this module but the dataclasses.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from enum import StrEnum


class Bound(StrEnum):
    """What can hold a run up."""

    PROCESSORS = "processors"
    GPUS = "GPUs"
    LINKS = "machines' links"
    BANDWIDTH = "storage, bytes"
    READS = "storage, reads"
    WRITES = "storage, writes"
    DRIVER = "driver"


@dataclass(frozen=True, slots=True, kw_only=True)
class Image:
    """What one image takes, on the average.

    Attributes:
        input_bytes: read.
        output_bytes: written, all its files together.
        output_files: how many these are; each is one writing request.
        network_core_s: processor time of the network.
        files_core_s: processor time of all the rest: decode, cells, encode, write.
        record_bytes: its line in results.jsonl.
        row_bytes: its line in results.csv.
        cell_rows_bytes: its lines in cells.csv.
    """

    input_bytes: float
    output_bytes: float
    output_files: int
    network_core_s: float
    files_core_s: float
    record_bytes: float
    row_bytes: float
    cell_rows_bytes: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Machine:
    """One of the machines that do the work.

    Attributes:
        cores: of its processor.
        link_bytes_per_s: of its network card, each way.
        gpu_images_per_s: what its GPUs together make of the network; None without a GPU.
        losses_per_hour: how often one is lost.
        repair_s: how long it is away then.
    """

    cores: int
    link_bytes_per_s: float
    gpu_images_per_s: float | None = None
    losses_per_hour: float = 0.0
    repair_s: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Storage:
    """What all machines read from and write to; `math.inf` where nothing limits.

    Attributes:
        bytes_per_s: both ways together.
        reads_per_s: files opened for reading, or GET.
        writes_per_s: files made, or PUT.
    """

    bytes_per_s: float = math.inf
    reads_per_s: float = math.inf
    writes_per_s: float = math.inf


@dataclass(frozen=True, slots=True, kw_only=True)
class Driver:
    """The one process that lists, hands out and records.

    Attributes:
        list_s: for each file that it lists.
        hand_out_s: for each image, to send it away and take its outcome back.
        record_s: for each record.
        table_s: for each image, to put results.csv and cells.csv together when all are done.
    """

    list_s: float
    hand_out_s: float
    record_s: float
    table_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """A run over a folder.

    Attributes:
        images: how many.
        machines: how many.
        drivers: how many; each has its part of the images and of the machines.
        lists_all: whether each driver lists all images and leaves those of others out, as
            `--shard` does; else each has a folder or prefix of its own.
        block: images that are handed out together.
        start_s: until the machines are up.
    """

    images: int
    machines: int
    image: Image
    machine: Machine
    storage: Storage
    driver: Driver
    drivers: int = 1
    lists_all: bool = False
    block: int = 32
    start_s: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Prediction:
    """What a run comes to.

    Attributes:
        bound: what holds it up.
        images_per_s: of all machines together.
        seconds: from start to the last record.
        tables_s: then one process for each output folder puts the tables together, for so long.
        machine_hours: paid for until the last record.
        read_bytes: from storage.
        written_bytes: to storage, without the tables.
        table_bytes: results.jsonl, results.csv and cells.csv.
        reads: requests.
        writes: requests.
    """

    bound: Bound
    images_per_s: float
    seconds: float
    tables_s: float
    machine_hours: float
    read_bytes: float
    written_bytes: float
    table_bytes: float
    reads: float
    writes: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Prices:
    """What the reader pays, in any currency.

    Attributes:
        machine_hour: one machine for an hour.
        stored_terabyte_month: 10^12 bytes for a month.
        thousand_reads: requests.
        thousand_writes: requests.
        read_terabyte: 10^12 bytes out of the storage, where that costs.
    """

    machine_hour: float = 0.0
    stored_terabyte_month: float = 0.0
    thousand_reads: float = 0.0
    thousand_writes: float = 0.0
    read_terabyte: float = 0.0


def images_per_s_of(machine: Machine, image: Image) -> tuple[Bound, float]:
    """Give what one machine makes while it is up, and what bounds it."""
    if machine.gpu_images_per_s is None:
        return Bound.PROCESSORS, machine.cores / (image.network_core_s + image.files_core_s)
    by_cores = machine.cores / image.files_core_s
    if by_cores < machine.gpu_images_per_s:
        return Bound.PROCESSORS, by_cores
    return Bound.GPUS, machine.gpu_images_per_s


def up_share(run: Run) -> float:
    """Give the share of time in which a machine does work that counts.

    A machine that is lost is away for a while, and about a block that it had in hand is done anew.
    """
    per_s = run.machine.losses_per_hour / 3600
    block_s = run.block / images_per_s_of(run.machine, run.image)[1]
    return max(0.0, 1 - per_s * block_s) / (1 + per_s * run.machine.repair_s)


def rates(run: Run) -> dict[Bound, float]:
    """Give the images per second that each link of the chain lets through."""
    image, storage, driver = run.image, run.storage, run.driver
    computing, of_one = images_per_s_of(run.machine, image)
    machines = run.machines * up_share(run)
    # Names that a driver lists for each image that it hands out.
    listed = run.drivers if run.lists_all else 1
    # Links carry both ways at once.
    widest_bytes = max(image.input_bytes, image.output_bytes)
    return {
        computing: machines * of_one,
        Bound.LINKS: machines * run.machine.link_bytes_per_s / widest_bytes,
        Bound.BANDWIDTH: storage.bytes_per_s / (image.input_bytes + image.output_bytes),
        Bound.READS: storage.reads_per_s,
        Bound.WRITES: storage.writes_per_s / image.output_files,
        Bound.DRIVER: run.drivers / (listed * driver.list_s + driver.hand_out_s + driver.record_s),
    }


def predict(run: Run) -> Prediction:
    """Say what a run comes to."""
    image = run.image
    bound, per_s = min(rates(run).items(), key=lambda item: item[1])
    # At the beginning all wait for their first block, and at the end for those with the last ones.
    block_bytes = run.block * (image.input_bytes + image.output_bytes)
    block_s = block_bytes / run.machine.link_bytes_per_s
    block_s += run.block / images_per_s_of(run.machine, image)[1]
    seconds = run.start_s + run.images / per_s + block_s
    return Prediction(
        bound=bound,
        images_per_s=per_s,
        seconds=seconds,
        tables_s=run.images * run.driver.table_s / (1 if run.lists_all else run.drivers),
        machine_hours=run.machines * seconds / 3600,
        read_bytes=run.images * image.input_bytes,
        written_bytes=run.images * image.output_bytes,
        table_bytes=run.images * (image.record_bytes + image.row_bytes + image.cell_rows_bytes),
        reads=run.images,
        writes=run.images * image.output_files,
    )


def drivers_needed(run: Run) -> int | None:
    """Give the number of drivers that never hold a run up; None where no number is enough."""
    others = min(rate for bound, rate in rates(run).items() if bound is not Bound.DRIVER)
    each_s = run.driver.hand_out_s + run.driver.record_s
    if not run.lists_all:
        return math.ceil(others * (run.driver.list_s + each_s))
    left_s = 1 / others - run.driver.list_s
    return math.ceil(each_s / left_s) if left_s > 0 else None


def machines_to_saturate(run: Run, bound: Bound) -> float:
    """Give the number of machines from which on `bound` holds a run up, all else being wide."""
    computing, _ = images_per_s_of(run.machine, run.image)
    return run.machines * rates(run)[bound] / rates(run)[computing]


def cost(prediction: Prediction, prices: Prices, *, months: float) -> float:
    """Work out what a run and its results cost.

    Args:
        prediction: of the run.
        prices: the reader's.
        months: how long the results are kept.
    """
    stored_bytes = prediction.written_bytes + prediction.table_bytes
    return (
        prediction.machine_hours * prices.machine_hour
        + stored_bytes / 1e12 * months * prices.stored_terabyte_month
        + prediction.reads / 1000 * prices.thousand_reads
        + prediction.writes / 1000 * prices.thousand_writes
        + prediction.read_bytes / 1e12 * prices.read_terabyte
    )
