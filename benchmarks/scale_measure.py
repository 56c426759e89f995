"""Measures the figures that docs/scale.md starts from, into scale_figures.json.

    python benchmarks/scale_measure.py [--photographs 24] [--records 100000] [--files 100000]
        [--out FILE] [--folder DIR]

Sizes and processor time are those of photographs that the generator draws, through the whole
pipeline with the defaults; listing, recording and the tables those of a local disk. Then
`benchmarks/scale.py --simulate --write` puts what follows from them into the page.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import json
import os
import statistics
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import ray
from harness import command, machine, run, write_photographs, write_settings
from loguru import logger
from network import open_engine
from scale_figures import FIGURES_PATH, Figures, save_figures
from scaling import measure_scan
from stages import inputs, network_alone, whole_run

from bcseg_batch.items import InputFile
from bcseg_batch.segment.analysis import CELL_COLUMNS
from bcseg_batch.store.cell_table import read_tables, write_cells_table
from bcseg_batch.store.results import ResultsLog, from_record
from bcseg_batch.version import __version__

BLOCK = 32


def measure(
    *, photographs: int, records: int, files: int, model: Path | None, folder: Path | None
) -> Figures:
    """Measure all figures.

    Args:
        photographs: drawn ones of 1600x1200 px that go through the pipeline.
        records: how many are added to a log.
        files: how many are listed.
        model: the shipped one where left out.
        folder: on the disk to be measured.
    """
    with tempfile.TemporaryDirectory(dir=folder) as name:
        root = Path(name)
        write_photographs(root / "in", photographs)
        sizes = measure_sizes(root / "in", root / "out", model)
        lines = (root / "out" / "results.jsonl").read_text(encoding="utf-8").splitlines()
        found = [json.loads(line) for line in lines]
        return Figures(
            machine=machine()["processor"],
            version=__version__,
            **sizes,
            **measure_cores(root / "in", root, model),
            list_us=measure_listing(root / "files", files),
            record_us=measure_recording(found, root / "log", records),
            hand_out_us=measure_hand_out(found),
            table_us=measure_tables(found, root / "out", root / "tables", min(records, 10_000)),
        )


def measure_sizes(source: Path, output: Path, model: Path | None) -> dict[str, int]:
    """Run `process-dir` with all pictures, and look at what lies there then."""
    settings = write_settings(
        source.with_suffix(".toml"), {"outputs": {"labels": True, "previews": True}}
    )
    options = [] if model is None else ["--model", model]
    run([command(), "process-dir", source, output, "--settings", settings, *options])
    count = sum(1 for _ in source.iterdir())

    def mean_bytes(folder: Path) -> int:
        paths = [path for path in folder.rglob("*") if path.is_file()]
        assert len(paths) == count, folder
        return round(sum(path.stat().st_size for path in paths) / count)

    folders = {
        "input": source,
        "mask": output / "masks",
        "composite": output / "composites",
        "cells": output / "cells",
        "labels": output / "labels",
        "preview": output / "previews",
    }
    tables = {"record": "results.jsonl", "row": "results.csv", "cell_rows": "cells.csv"}
    return {f"{name}_bytes": mean_bytes(place) for name, place in folders.items()} | {
        f"{name}_bytes": round((output / file).stat().st_size / count)
        for name, file in tables.items()
    }


def measure_cores(source: Path, folder: Path, model: Path | None) -> dict[str, float]:
    """Give the processor time of an image in the whole pipeline, and the network's part of it."""
    logger.remove()
    engine = open_engine(model, None)
    images = list(inputs(source))
    whole_run(engine, images[:2], folder)  # pays for what is made once
    whole, alone = [], []
    for _ in range(3):
        whole.append(whole_run(engine, images, folder)["core_ms_per_image"])
        alone.append(network_alone(engine, len(images))["core_ms_per_image"])
    network_ms = statistics.median(alone)
    rest = [both - network for both, network in zip(whole, alone, strict=True)]
    return {
        "network_core_ms": round(network_ms, 1),
        "files_core_ms": round(max(0.1, statistics.median(rest)), 1),
    }


def measure_listing(folder: Path, count: int) -> float:
    """Give the microseconds that a file of a local folder takes to be listed."""
    return round(measure_scan(folder, count)["us_per_file"], 1)


def measure_recording(found: Sequence[dict[str, Any]], folder: Path, count: int) -> float:
    """Give the microseconds that a record takes, when many are there already."""
    folder.mkdir()
    outcomes = [from_record(record) for record in found]
    took_us = []
    with ResultsLog(folder) as log:
        numbered = (
            dataclasses.replace(outcome, image=f"{number // 5000:06d}/{number:09d}.jpg")
            for number, outcome in zip(range(count), itertools.cycle(outcomes), strict=False)
        )
        while some := list(itertools.islice(numbered, max(1, count // 10))):
            began_s = time.perf_counter()
            for outcome in some:
                log.append(outcome)
            took_us.append(1e6 * (time.perf_counter() - began_s) / len(some))
    return round(statistics.median(took_us[len(took_us) // 2 :]), 1)


def measure_tables(
    found: Sequence[dict[str, Any]], output: Path, folder: Path, count: int
) -> float:
    """Give the microseconds of an image when results.csv and cells.csv are put together.

    The images' own tables are many names of a few files, so that the disk is not what is measured.
    """
    (folder / "cells").mkdir(parents=True)
    outcomes = [from_record(record) for record in found]
    names = []
    with ResultsLog(folder) as log:
        for number, outcome in zip(range(count), itertools.cycle(outcomes), strict=False):
            assert outcome.cells is not None
            names.append(f"cells/{number:09d}_cells.csv")
            (folder / names[-1]).hardlink_to(output / outcome.cells)
            log.append(dataclasses.replace(outcome, image=f"{number:09d}.jpg", cells=names[-1]))
        began_s = time.perf_counter()
        log.write_csv()
        write_cells_table(folder, CELL_COLUMNS, read_tables(folder, names))
    return round(1e6 * (time.perf_counter() - began_s) / count, 1)


def measure_hand_out(found: Sequence[dict[str, Any]], *, blocks: int = 200) -> float:
    """Give the driver's microseconds for an image that goes to a Ray actor and comes back.

    The actor gives back ready outcomes: what is measured is the driver's own processor time, all
    its threads together.
    """
    outcomes = list(
        itertools.islice(itertools.cycle([from_record(record) for record in found]), BLOCK)
    )
    files = [InputFile(Path("in", f"{n:09d}.jpg"), f"{n:09d}.jpg", 1, 1) for n in range(BLOCK)]

    class Worker:
        def process(self, files: list[InputFile]) -> list[Any]:
            return outcomes[: len(files)]

    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    ray.init(num_cpus=1, include_dashboard=False, log_to_driver=False, _node_ip_address="127.0.0.1")
    try:
        worker = ray.remote(Worker).remote()
        ray.get(worker.process.remote(files))
        waiting = [worker.process.remote(files) for _ in range(4)]
        began_s = time.process_time()
        for _ in range(blocks):
            ready, waiting = ray.wait(waiting, num_returns=1)
            ray.get(ready)
            waiting.append(worker.process.remote(files))
        ray.get(waiting)
        return round(1e6 * (time.process_time() - began_s) / ((blocks + 4) * BLOCK), 1)
    finally:
        ray.shutdown()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--photographs", type=int, default=24)
    parser.add_argument("--records", type=int, default=100_000)
    parser.add_argument("--files", type=int, default=100_000, help="that are listed")
    parser.add_argument("--model", type=Path, help="the shipped one where left out")
    parser.add_argument("--folder", type=Path, help="on the disk to be measured")
    parser.add_argument("--out", type=Path, default=FIGURES_PATH, help="where the figures go")
    options = parser.parse_args()
    figures = measure(
        photographs=options.photographs,
        records=options.records,
        files=options.files,
        model=options.model,
        folder=options.folder,
    )
    save_figures(figures, options.out)
    print(options.out.read_text(encoding="utf-8"), end="")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
