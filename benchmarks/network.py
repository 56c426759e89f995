"""The network alone, as the service runs it: the same batches, predictors and threads, no files.

    python benchmarks/network.py [--model FILE] [--backend NAME] [--dtype NAME] [--images 32]

Prints as its last line how many images a second go through, how much processor time each takes,
and how many operations a second that comes to. What a layer multiplies and adds counts as two
operations, in 8 bits as in float32.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.flop_counter import FlopCounterMode

from bcseg_batch.segment.checkpoint import load_checkpoint
from bcseg_batch.service.build import SHIPPED_MODEL, Engine, build_engine
from bcseg_batch.settings import load_settings


def open_engine(
    model: Path | None, backend: str | None = None, dtype: str | None = None, **more: object
) -> Engine:
    """Build what a run of the service would: its own settings, but for what is given."""
    flags = {"model.file": model, "model.backend": backend, "model.dtype": dtype, **more}
    return build_engine(load_settings(None, flags, {}).settings)


def operations_per_image(model: Path | None, size_px: int) -> int:
    """Count the floating-point operations of one image, without computing any."""
    network = load_checkpoint(model or SHIPPED_MODEL).model.to("meta")
    with FlopCounterMode(display=False) as counter, torch.inference_mode():
        network(torch.empty(1, 3, size_px, size_px, device="meta"))
    return int(counter.get_total_flops())


def run_network(engine: Engine, images: int) -> dict[str, float]:
    """Take batches through all predictors at once, each in a thread of its own.

    Args:
        engine: of the service.
        images: how many at least; full batches count.

    Returns:
        Images, wall seconds and processor seconds, after one batch of each predictor to warm up.
    """
    predictors, size_px = engine.predictors, engine.predictors[0].input_size_px
    batch = np.random.default_rng(0).random(
        (engine.options.batch_size, 3, size_px, size_px), dtype=np.float32
    )
    batches = math.ceil(images / len(batch) / len(predictors))
    with ThreadPoolExecutor(len(predictors)) as pool:

        def all_of(count: int) -> None:
            def one(number: int) -> None:
                for _ in range(count):
                    predictors[number].predict(batch)

            list(pool.map(one, range(len(predictors))))

        all_of(1)
        began_s, began_cpu_s = time.perf_counter(), time.process_time()
        all_of(batches)
        wall_s, cpu_s = time.perf_counter() - began_s, time.process_time() - began_cpu_s
    return {"images": batches * len(batch) * len(predictors), "wall_s": wall_s, "cpu_s": cpu_s}


def measure(engine: Engine, model: Path | None, images: int) -> dict[str, Any]:
    """Measure the network alone."""
    took = run_network(engine, images)
    operations = operations_per_image(model, engine.predictors[0].input_size_px)
    images_per_s = took["images"] / took["wall_s"]
    return {
        "images": took["images"],
        "images_per_s": images_per_s,
        "core_ms_per_image": 1000 * took["cpu_s"] / took["images"],
        "operations_per_image": operations,
        "gflops": operations * images_per_s / 1e9,
        "batch_size": engine.options.batch_size,
        "predictors": len(engine.predictors),
        "runs_on": f"{engine.placement.device} {engine.placement.dtype}",
        "description": engine.description,
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--model", type=Path, help="the shipped one where left out")
    parser.add_argument("--backend", help="as for process-dir")
    parser.add_argument("--dtype", help="as for process-dir")
    parser.add_argument("--images", type=int, default=32)
    options = parser.parse_args()
    engine = open_engine(options.model, options.backend, options.dtype)
    print(json.dumps(measure(engine, options.model, options.images)))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
