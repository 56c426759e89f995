"""Where the time goes: core-milliseconds per photograph and stage, and how long the network waits.

    python benchmarks/stages.py [--images 24] [--rounds 15] [--json FILE]

Each stage is the product's own function, run alone on one core on a 1600 x 1200 smear with some
hundred cells, and timed by the processor time of its thread. A whole run of the same photographs
then tells what all of that costs together, and for which share of the wall time the network is
running.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import cv2
import numpy as np
from harness import Figure, parser, photographs, report
from throughput import engine

from bcseg_batch.intake.ignore import IgnoreRules
from bcseg_batch.intake.scan import scan_folder
from bcseg_batch.items import InputFile
from bcseg_batch.segment.cells import enlarge_cells, part_cells
from bcseg_batch.segment.measure import measure_cells
from bcseg_batch.segment.postprocess import (
    Blend,
    composite_image,
    mask_from_probability,
    mean_confidence,
    probability,
)
from bcseg_batch.segment.preprocess import resize_rgb, to_network_input
from bcseg_batch.segment.quality import assess, measure_quality
from bcseg_batch.segment.tiling import typical_diameter_px
from bcseg_batch.service.build import Engine
from bcseg_batch.service.finishing import CELL_COLUMNS
from bcseg_batch.service.pipeline import Pipeline
from bcseg_batch.store.cell_table import encode_cells
from bcseg_batch.store.encode import encode_jpeg, encode_png
from bcseg_batch.store.images import SUFFIXES, declared_pixels, decode_image
from bcseg_batch.store.names import OutputNames
from bcseg_batch.store.outputs import OutputFolder
from bcseg_batch.store.pixel_size import pixel_size_um
from bcseg_batch.store.results import ResultsLog


def core_ms(call: Callable[[], object], rounds: int) -> float:
    """Time a call by the processor time of this thread; the median in milliseconds."""
    call()
    spans = []
    for _ in range(rounds):
        begun_s = time.thread_time()
        call()
        spans.append(time.thread_time() - begun_s)
    return 1000 * statistics.median(spans)


def stages(built: Engine, path: Path, rounds: int, root: Path) -> tuple[list[Figure], float, float]:
    """Time each stage alone.

    Returns:
        The figures, the sum of what every run needs, and the sum with cells on top.
    """
    cv2.setNumThreads(1)
    options, size_px = built.options, built.predictors[0].input_size_px
    decoded = decode_image(path, max_pixels=options.max_pixels)
    pixels, shape_hw = decoded.pixels, decoded.pixels.shape[:2]
    thumbnail = resize_rgb(pixels, size_px)
    logits = built.predictors[0].predict(to_network_input(thumbnail)[np.newaxis])[0]
    soft = probability(logits)
    parted = part_cells(soft, options.class_names, threshold=options.threshold)
    mask = mask_from_probability(soft[0], shape_hw, options.threshold)
    cells = enlarge_cells(parted, mask > 0)
    table = measure_cells(cells, pixels)
    blend = Blend.of(options.colour, options.alpha)
    composite = composite_image(pixels, mask, blend)
    jpeg, png = encode_jpeg(composite, quality=options.composite_quality), encode_png(mask)
    diameter_px = typical_diameter_px(parted)
    outcome = run_one(built, path, root / "one")
    always: dict[str, Callable[[], object]] = {
        "look at the header": lambda: (declared_pixels(path), pixel_size_um(path)),
        "decode, with hash": lambda: decode_image(path, max_pixels=options.max_pixels),
        "resize for the network": lambda: resize_rgb(pixels, size_px),
        "to floats": lambda: to_network_input(thumbnail),
        "sigmoid": lambda: probability(logits),
        "upsample and threshold": lambda: mask_from_probability(
            soft[0], shape_hw, options.threshold
        ),
        "confidence": lambda: mean_confidence(soft[0]),
        "composite": lambda: composite_image(pixels, mask, blend),
        "encode composite": lambda: encode_jpeg(composite, quality=options.composite_quality),
        "encode mask": lambda: encode_png(mask),
    }
    with OutputFolder(root / "written") as outputs, ResultsLog(root / "written") as results:

        def write() -> None:
            outputs.write("masks/a_mask.png", png)
            outputs.write("composites/a_bloodred.jpg", jpeg)
            outputs.sync()

        always["write"] = write
        always["record"] = lambda: results.append(outcome)
        figures = {name: core_ms(call, rounds) for name, call in always.items()}
    on_top: dict[str, Callable[[], object]] = {
        "part the cells": lambda: part_cells(
            soft, options.class_names, threshold=options.threshold
        ),
        "bring them to full size": lambda: enlarge_cells(parted, mask > 0),
        "measure cells": lambda: measure_cells(cells, pixels),
        "measure quality": lambda: assess(
            measure_quality(thumbnail, soft[0], diameter_px, solidity=0.9),
            cells.cell_count,
            options.statistics,
        ),
        "table of cells": lambda: encode_cells("a.jpg", CELL_COLUMNS, table),
    }
    cells_figures = {name: core_ms(call, rounds) for name, call in on_top.items()}
    rows = [Figure(name, value, "ms") for name, value in (figures | cells_figures).items()]
    # Whether an image has to be taken in tiles is told by its parted cells, cells asked for or not.
    plain_ms = sum(figures.values()) + cells_figures["part the cells"]
    return rows, plain_ms, sum(figures.values()) + sum(cells_figures.values())


def run_one(built: Engine, path: Path, out: Path) -> object:
    """Process one photograph; its outcome."""
    facts = path.stat()
    file = InputFile(path, path.name, facts.st_size, facts.st_mtime_ns)
    with OutputFolder(out) as outputs:
        (outcome,) = Pipeline(built.predictors, outputs, OutputNames(), built.options).process(
            [file]
        )
    return outcome


class Watched:
    """Notes when a predictor is at work."""

    def __init__(self, predictor: object, spans: list[tuple[float, float]]) -> None:
        self._predictor = predictor
        self._spans = spans
        self.placement = predictor.placement  # type: ignore[attr-defined]
        self.input_size_px = predictor.input_size_px  # type: ignore[attr-defined]

    def predict(self, batch: object) -> object:
        """Pass it on."""
        begun_s = time.perf_counter()
        logits = self._predictor.predict(batch)  # type: ignore[attr-defined]
        self._spans.append((begun_s, time.perf_counter()))
        return logits


def network_share(built: Engine, folder: Path, root: Path) -> tuple[float, float, float]:
    """Process a folder, and see when the network was at work.

    Returns:
        Share of the wall time between its first batch and its last in which at least one predictor
        was at work, core-milliseconds per image of the whole, and images per second.
    """
    spans: list[tuple[float, float]] = []
    predictors = [Watched(predictor, spans) for predictor in built.predictors]
    found = scan_folder(folder, IgnoreRules(SUFFIXES), recursive=True)
    files = [file for file in found if isinstance(file, InputFile)]
    begun_s, begun_cpu_s = time.perf_counter(), time.process_time()
    with OutputFolder(root / "whole") as outputs:
        pipeline = Pipeline(predictors, outputs, OutputNames(), built.options)  # type: ignore[arg-type]
        count = sum(1 for _ in pipeline.process(files))
    wall_s, cpu_s = time.perf_counter() - begun_s, time.process_time() - begun_cpu_s
    busy_s, end_s = 0.0, min(start for start, _ in spans)
    first_s = end_s
    for start, end in sorted(spans):
        busy_s += max(0.0, end - max(start, end_s))
        end_s = max(end_s, end)
    return busy_s / (end_s - first_s), 1000 * cpu_s / count, count / wall_s


def main() -> None:
    """Measure, and print the table."""
    command = parser(__doc__, images=24, rounds=15)
    command.add_argument("--backend", default="auto", help="what runs the network")
    arguments = command.parse_args()
    with tempfile.TemporaryDirectory(prefix="bcseg-bench-") as name:
        root = Path(name)
        paths = photographs(root / "in", arguments.images)
        built = engine(**{"model.backend": arguments.backend})
        rows, plain_ms, with_cells_ms = stages(built, paths[0], arguments.rounds, root)
        share, whole_ms, rate = network_share(built, root / "in", root)
    rows += [
        Figure("all but the network", plain_ms, "ms", aim=35, at_least=False),
        Figure("with cells, measurements, quality", with_cells_ms, "ms", aim=60, at_least=False),
        Figure("a whole run, network and all", whole_ms, "ms"),
        Figure("wall time in which the network runs", 100 * share, "%"),
        Figure(f"images per second, {built.placement.dtype}", rate, "/s"),
    ]
    report("Core-milliseconds per photograph of 1600 x 1200", rows, arguments.json)


if __name__ == "__main__":
    main()
