"""What parting and measuring the cells costs beside the network, in one run on one machine.

    python benchmarks/cells.py [--images 4] [--repeats 5] [--json FILE]

Photographs of 1600 x 1200 px go through the shipped model, one at a time; then their cells are
found and measured. One more is crowded with some 300 cells. Each step counts with its fastest
repeat: in processor time of its thread for the cells, on the clock for the network, which takes all
cores. A ratio of 0.2 means a fifth of the network's time.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import statistics
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import numpy.typing as npt

from bcseg_batch.allocator import keep_freed_memory
from bcseg_batch.segment.cells import find_cells
from bcseg_batch.segment.checkpoint import load_checkpoint
from bcseg_batch.segment.devices import open_predictor
from bcseg_batch.segment.measure import measure_cells
from bcseg_batch.segment.postprocess import probability
from bcseg_batch.segment.preprocess import preprocess
from bcseg_batch.service.build import SHIPPED_MODEL
from bcseg_training.synthetic import synthesize_numbered, synthesize_smear, typical_style

SHAPE_HW = (1200, 1600)
STEPS = ("network", "find_cells", "measure_cells")


def photographs(count: int) -> dict[str, npt.NDArray[np.uint8]]:
    """Make typical smears, and one with small cells that touch everywhere."""
    smears = {
        f"typical {index}": synthesize_numbered(1, index, shape_hw=SHAPE_HW, style="typical").image
        for index in range(count)
    }
    rng = np.random.default_rng(5)
    crowded = dataclasses.replace(
        typical_style(rng, shape_hw=SHAPE_HW), cell_diameter_px=62.0, red_cells=340
    )
    smears["crowded"] = synthesize_smear(rng, shape_hw=SHAPE_HW, style=crowded).image
    return smears


def fastest_ms(step: Callable[[], object], repeats: int, clock: Callable[[], float]) -> float:
    took_s = []
    for _ in range(repeats):
        begun_s = clock()
        step()
        took_s.append(clock() - begun_s)
    return 1000 * min(took_s)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--images", type=int, default=4)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--json", type=Path, help="write the figures there too")
    options = parser.parse_args()
    keep_freed_memory()
    cv2.setNumThreads(1)
    checkpoint = load_checkpoint(SHIPPED_MODEL)
    spec = checkpoint.spec
    predictor = open_predictor(checkpoint.model, spec.input_size_px)
    rows: list[dict[str, Any]] = []
    for name, pixels in photographs(options.images).items():
        batch = preprocess(pixels, spec.input_size_px)[np.newaxis]
        soft = probability(predictor.predict(batch)[0])
        find = partial(
            find_cells, soft, spec.class_names, pixels.shape[:2], threshold=spec.threshold
        )
        cells = find()
        repeats = options.repeats
        row: dict[str, Any] = {
            "image": name,
            "cells": len(cells.kinds),
            "network_ms": fastest_ms(partial(predictor.predict, batch), repeats, time.monotonic),
            "find_cells_ms": fastest_ms(find, repeats, time.thread_time),
            "measure_cells_ms": fastest_ms(
                partial(measure_cells, cells, pixels), repeats, time.thread_time
            ),
        }
        row["ratio"] = (row["find_cells_ms"] + row["measure_cells_ms"]) / row["network_ms"]
        rows.append(row)
    print(f"{'image':12}{'cells':>7}", *(f"{step + ' ms':>17}" for step in STEPS), f"{'ratio':>7}")
    for row in rows:
        print(f"{row['image']:12}{row['cells']:>7}", end=" ")
        print(*(f"{row[step + '_ms']:>17.1f}" for step in STEPS), f"{row['ratio']:>7.2f}")
    figures = {
        "images": [
            {
                key: round(value, 3) if isinstance(value, float) else value
                for key, value in r.items()
            }
            for r in rows
        ],
        "median_ratio": round(statistics.median(row["ratio"] for row in rows), 3),
        "cores": os.cpu_count(),
        "load": round(os.getloadavg()[0], 2),
        "device": predictor.placement.device,
        "dtype": predictor.placement.dtype,
    }
    print(
        f"median ratio {figures['median_ratio']}; load {figures['load']} "
        f"on {figures['cores']} cores"
    )
    print(json.dumps(figures))
    if options.json:
        options.json.write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
