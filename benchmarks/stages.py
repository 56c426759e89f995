"""Where the time of an image goes: stage by stage, and how much of the time the network runs.

    python benchmarks/stages.py [--images 24] [--repeats 5] [--rounds 3] [--backend NAME]
        [--json FILE]

Two ways. First each step on its own, by the service's own functions, in one thread: processor time
for each image, and wall time where the disk is waited for. Then whole runs of the pipeline, and the
network alone in turn with them: how much processor time an image costs beside the network, and in
what share of the wall time at least one network runs.
"""

from __future__ import annotations

import argparse
import math
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

import cv2
import numpy as np
from harness import (
    BATCH_SIZE,
    Figure,
    Report,
    in_turn,
    limits,
    ratios,
    steady_per_s,
    write_photographs,
)
from ledger import outcome_of
from loguru import logger
from network import open_engine, run_network

from bcseg_batch.intake.ignore import IgnoreRules
from bcseg_batch.intake.scan import scan_folder
from bcseg_batch.items import InputFile
from bcseg_batch.segment.analysis import CELL_COLUMNS
from bcseg_batch.segment.cells import CellKind, find_cells
from bcseg_batch.segment.measure import measure_cells
from bcseg_batch.segment.postprocess import (
    Blend,
    composite_image,
    mask_from_probability,
    mean_confidence,
    probability,
)
from bcseg_batch.segment.preprocess import resize_rgb, to_network_input
from bcseg_batch.segment.quality import assess, mean_solidity, measure_quality
from bcseg_batch.service.build import Engine
from bcseg_batch.service.pipeline import Pipeline
from bcseg_batch.store.cell_table import encode_cells
from bcseg_batch.store.encode import encode_jpeg, encode_png
from bcseg_batch.store.images import decode_image
from bcseg_batch.store.ledger import LEDGER_NAME, Ledger
from bcseg_batch.store.names import OutputNames
from bcseg_batch.store.outputs import OutputFolder
from bcseg_batch.store.results import ResultsLog

T = TypeVar("T")

PICTURES = (
    "decode",
    "resize",
    "upsample and threshold",
    "composite",
    "encode mask",
    "encode composite",
    "write",
    "write: names",
    "record",
    "ledger",
)
CELLS = ("cells", "measure", "quality", "table")
PICTURES_LIMIT_MS = 35.0
ALL_LIMIT_MS = 60.0
TO_NETWORK = 0.8


class Stopwatch:
    """Keeps what each image took of each stage.

    Args:
        repeats: how often each step is done.

    Attributes:
        core_ms: processor time, the least of the repeats.
        wall_ms: wall time, the median of the repeats.
    """

    def __init__(self, repeats: int) -> None:
        self._repeats = repeats
        self.core_ms: dict[str, list[float]] = {}
        self.wall_ms: dict[str, list[float]] = {}

    def time(
        self,
        stage: str,
        action: Callable[[], T],
        clock: Callable[[], float] = time.thread_time,
        *,
        repeats: int | None = None,
        images: int = 1,
    ) -> T:
        """Do something a few times, and count it to a stage.

        Args:
            stage: its name.
            action: what to do.
            clock: of the processor; of this thread, if nothing else is said.
            repeats: how often, in place of what was said at the start.
            images: how many share it.
        """
        core_s, wall_s = [], []
        for _ in range(repeats or self._repeats):
            began_core_s, began_s = clock(), time.perf_counter()
            result = action()
            core_s.append(clock() - began_core_s)
            wall_s.append(time.perf_counter() - began_s)
        self.core_ms.setdefault(stage, []).append(1000 * min(core_s) / images)
        self.wall_ms.setdefault(stage, []).append(1000 * statistics.median(wall_s) / images)
        return result


def inputs(folder: Path) -> Iterator[InputFile]:
    """Give the photographs of a folder as the pipeline takes them."""
    for found in scan_folder(folder, IgnoreRules({".jpg"}), recursive=False):
        assert isinstance(found, InputFile)
        yield found


def take_apart(
    engine: Engine, file: InputFile, outputs: OutputFolder, results: ResultsLog, watch: Stopwatch
) -> None:
    """Call the steps of one image one after the other, in this thread."""
    options, predictor, spec = engine.options, engine.predictors[0], engine.spec
    stem, tint = file.path.stem, Blend.of(options.colour, options.alpha)
    pixels = watch.time(
        "decode", lambda: decode_image(file.path, max_pixels=options.max_pixels)
    ).pixels
    height_px, width_px = shape_hw = pixels.shape[:2]

    def resize() -> tuple[Any, Any]:
        thumbnail = resize_rgb(pixels, spec.input_size_px)
        return thumbnail, to_network_input(thumbnail)[np.newaxis]

    thumbnail, batch = watch.time("resize", resize)
    # The network has threads of its own: what the whole process takes is its time.
    logits = watch.time("network", lambda: predictor.predict(batch), time.process_time)

    def cut() -> tuple[Any, Any]:
        soft = probability(logits[0])
        mean_confidence(soft[0])
        return soft, mask_from_probability(soft[0], shape_hw, options.threshold)

    soft, mask = watch.time("upsample and threshold", cut)
    composite = watch.time("composite", lambda: composite_image(pixels, mask, tint))
    png = watch.time("encode mask", lambda: encode_png(mask))
    jpeg = watch.time(
        "encode composite", lambda: encode_jpeg(composite, quality=options.composite_quality)
    )

    def write() -> None:
        outputs.write(f"composites/{stem}_bloodred.jpg", jpeg)
        outputs.write(f"masks/{stem}_mask.png", png)

    watch.time("write", write)
    cells = watch.time(
        "cells",
        lambda: find_cells(soft, spec.class_names, shape_hw, threshold=options.threshold),
    )
    measured = watch.time("measure", lambda: measure_cells(cells, pixels))

    def judge() -> None:
        is_cell = cells.kinds != CellKind.PLATELET
        areas, solidity = (np.asarray(measured[key], np.float64) for key in ("area", "solidity"))
        diameter_px = None
        if is_cell.any():
            scale = (soft[0].size / (height_px * width_px)) ** 0.5
            diameter_px = scale * float(np.median(2 * np.sqrt(areas[is_cell] / np.pi)))
        measures = measure_quality(
            thumbnail,
            soft[0],
            diameter_px,
            solidity=mean_solidity(solidity, areas, is_cell & ~cells.touches_border),
            threshold=options.threshold,
        )
        assess(measures, int(is_cell.sum()), options.statistics)

    watch.time("quality", judge)
    watch.time(
        "table",
        lambda: outputs.write(
            f"cells/{stem}.csv", encode_cells(file.image, CELL_COLUMNS, measured)
        ),
    )
    watch.time("record", lambda: results.append(outcome_of(file)))


def settle_batch(
    files: Sequence[InputFile], outputs: OutputFolder, ledger: Ledger, watch: Stopwatch
) -> None:
    """Do once what the service does once for a batch: make names last, and the ledger's commits."""
    recipe = {"model_sha256": "m" * 64, "settings_sha256": "s" * 64}

    def commit() -> None:
        ledger.enqueue(files, **recipe)
        ledger.begin(files, solo=False)
        ledger.finish_many(outcome_of(file) for file in files)
        ledger.mark_exported(file.image for file in files)

    # Once: there is nothing left to do for a second time.
    watch.time("write: names", outputs.sync, repeats=1, images=len(files))
    watch.time("ledger", commit, repeats=1, images=len(files))


def one_by_one(engine: Engine, files: Sequence[InputFile], folder: Path, repeats: int) -> Stopwatch:
    """Take the way of each image apart."""
    watch = Stopwatch(repeats)
    size = engine.options.batch_size
    output = folder / "one-by-one"
    with (
        OutputFolder(output) as outputs,
        ResultsLog(output) as results,
        Ledger(folder / LEDGER_NAME) as ledger,
    ):
        # The first call of anything pays for what is made once.
        take_apart(engine, files[0], outputs, results, Stopwatch(1))
        outputs.sync()
        for first in range(0, len(files), size):
            for file in files[first : first + size]:
                take_apart(engine, file, outputs, results, watch)
            settle_batch(files[first : first + size], outputs, ledger, watch)
    return watch


def covered_s(intervals: Sequence[tuple[float, float]]) -> float:
    """Add up intervals; what several cover counts once."""
    total_s, until_s = 0.0, -float("inf")
    for begin_s, end_s in sorted(intervals):
        total_s += max(0.0, end_s - max(begin_s, until_s))
        until_s = max(until_s, end_s)
    return total_s


def whole_run(engine: Engine, files: Sequence[InputFile], folder: Path) -> dict[str, float]:
    """Run the pipeline over all images, and look when the network runs."""
    intervals: list[tuple[float, float]] = []

    def observe(stage: str, took_s: float, _images: int) -> None:
        if stage == "network":
            now_s = time.monotonic()
            intervals.append((now_s - took_s, now_s))

    finished_s: list[float] = []
    began_cpu_s = time.process_time()
    with (
        tempfile.TemporaryDirectory(dir=folder) as name,
        OutputFolder(Path(name)) as outputs,
        ResultsLog(Path(name)) as results,
    ):
        pipeline = Pipeline(
            engine.predictors, outputs, OutputNames(), engine.options, observe=observe
        )
        for outcome in pipeline.process(files):
            results.append(outcome)
            finished_s.append(time.monotonic())
    cpu_s = time.process_time() - began_cpu_s
    # Before the first batch the network has nothing to do yet, and after the last one nothing more.
    span_s = max(end_s for _, end_s in intervals) - min(begin_s for begin_s, _ in intervals)
    return {
        "images": len(finished_s),
        "images_per_s": steady_per_s(finished_s, BATCH_SIZE) or math.nan,
        "core_ms_per_image": 1000 * cpu_s / len(finished_s),
        "network_share": covered_s(intervals) / span_s,
        "networks_at_once": sum(end_s - begin_s for begin_s, end_s in intervals) / span_s,
    }


def network_alone(engine: Engine, images: int) -> dict[str, float]:
    """Run the network on as many images."""
    took = run_network(engine, images)
    return {
        "images": took["images"],
        "images_per_s": took["images"] / took["wall_s"],
        "core_ms_per_image": 1000 * took["cpu_s"] / took["images"],
    }


def add_stages(report: Report, watch: Stopwatch) -> None:
    """Print the stages, and hold their sums against the limits."""
    stages = {
        stage: {
            "core_ms": statistics.mean(watch.core_ms[stage]),
            "wall_ms": statistics.mean(watch.wall_ms[stage]),
            "max_core_ms": max(watch.core_ms[stage]),
        }
        for stage in (*PICTURES, *CELLS, "network")
    }
    report.parts["stages"] = stages
    report.table(
        "One image, step by step, one thread (the mean over the images)",
        ["", "core-ms", "wall ms", "core-ms, worst image"],
        [
            [stage, took["core_ms"], took["wall_ms"], took["max_core_ms"]]
            for stage, took in stages.items()
        ],
    )
    for name, some, limit_ms in (
        ("all but the network, pictures alone", PICTURES, PICTURES_LIMIT_MS),
        ("all but the network, with cells", (*PICTURES, *CELLS), ALL_LIMIT_MS),
    ):
        report.add(
            Figure(
                name=name,
                values=[sum(stages[stage]["core_ms"] for stage in some)],
                unit="core-ms/image",
                aim=limit_ms,
                at_least=False,
            )
        )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--images", type=int, default=24)
    parser.add_argument("--repeats", type=int, default=5, help="of each step")
    parser.add_argument("--rounds", type=int, default=3, help="of the whole runs")
    parser.add_argument("--model", type=Path, help="the shipped one where left out")
    parser.add_argument("--backend", help="as for process-dir")
    parser.add_argument("--folder", type=Path, help="on the disk to be measured")
    parser.add_argument("--json", type=Path, help="write the figures there too; - prints them")
    options = parser.parse_args()
    logger.remove()  # the figures alone
    report = Report("stages", vars(options))
    engine = open_engine(options.model, options.backend)
    cv2.setNumThreads(1)  # as the service does
    with tempfile.TemporaryDirectory(dir=options.folder) as name:
        folder = Path(name)
        write_photographs(folder / "in", options.images)
        files = list(inputs(folder / "in"))
        watch = one_by_one(engine, files, folder, options.repeats)
        results = in_turn(
            {
                "whole pipeline": lambda: whole_run(engine, files, folder),
                "network alone": lambda: network_alone(engine, len(files)),
                "limits": lambda: limits(folder),
            },
            options.rounds,
            console=report.console,
        )
    report.limits(results.pop("limits"))
    add_stages(report, watch)
    report.parts["runs"] = results
    report.parts["description"] = engine.description
    whole, alone = results["whole pipeline"], results["network alone"]
    keys = ("images_per_s", "core_ms_per_image", "network_share", "networks_at_once")
    report.table(
        f"In turn: {engine.description}",
        ["", "images/s", "core-ms/image", "share of time in network", "networks at once"],
        [
            [
                name,
                *(statistics.median(one.get(key, np.nan) for one in some) for key in keys),
            ]
            for name, some in results.items()
        ],
    )
    report.add(
        ratios(
            "whole pipeline / network alone, images/s",
            [one["images_per_s"] for one in whole],
            [one["images_per_s"] for one in alone],
            aim=TO_NETWORK,
        ),
        Figure(
            name="share of wall time in which the network runs",
            values=[one["network_share"] for one in whole],
        ),
        Figure(
            name="whole pipeline less network alone",
            values=[
                one["core_ms_per_image"] - other["core_ms_per_image"]
                for one, other in zip(whole, alone, strict=True)
            ],
            unit="core-ms/image",
            aim=ALL_LIMIT_MS if engine.options.cells else PICTURES_LIMIT_MS,
            at_least=False,
        ),
    )
    report.finish(options.json)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
