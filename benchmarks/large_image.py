"""What a large image costs: peak memory and tiles per second of the tiled way.

    python benchmarks/large_image.py [--size-px 20000] [--height-px H] [--batch-size 2]
        [--image FILE] [--json FILE]

Makes one RGB TIFF of that size (tiled, zlib) out of a few synthetic smears, and takes it through
the shipped model in a process of its own: first pass, choice of the scale, tiles, cells with their
measurements, and mask, composite and labels written band by band. The peak is that of the whole
process as the kernel counts it, torch included. Ends with 1 where it is above 2 GB.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import numpy.typing as npt
import tifffile

from bcseg_batch.allocator import keep_freed_memory
from bcseg_batch.segment.cells import part_cells
from bcseg_batch.segment.checkpoint import load_checkpoint
from bcseg_batch.segment.devices import open_predictor
from bcseg_batch.segment.postprocess import Blend, composite_image, probability
from bcseg_batch.segment.preprocess import to_network_input
from bcseg_batch.segment.tiling import (
    choose_scale,
    segment_in_tiles,
    stretch,
    tile_count,
    typical_diameter_px,
)
from bcseg_batch.store.raster import open_raster
from bcseg_batch.store.stream import LabelTiffWriter, MaskPngWriter, RgbTiffWriter
from bcseg_training.synthetic import synthesize_numbered

ALLOWED_BYTES = 2e9
SMEAR_PX = 1024
MODEL = Path(__file__).parents[1] / "bcseg_batch" / "weights" / "default.safetensors"


def tiles_of_smears(shape_hw: tuple[int, int]) -> Iterator[npt.NDArray[np.uint8]]:
    """Give the tiles of a large picture, row by row: a few smears, turned and mirrored."""
    smears = [
        synthesize_numbered(1, index, shape_hw=(SMEAR_PX, SMEAR_PX), style="typical").image
        for index in range(2)
    ]
    smears = [np.ascontiguousarray(np.rot90(s, turn)) for s in smears for turn in range(4)]
    number = 0
    for _ in range(0, shape_hw[0], SMEAR_PX):
        for _ in range(0, shape_hw[1], SMEAR_PX):
            yield smears[number % len(smears)]
            number += 3


def make(path: Path, shape_hw: tuple[int, int]) -> None:
    tifffile.imwrite(
        path,
        tiles_of_smears(shape_hw),
        shape=(*shape_hw, 3),
        dtype=np.uint8,
        tile=(SMEAR_PX, SMEAR_PX),
        photometric="rgb",
        compression="zlib",
        compressionargs={"level": 1},
        resolution=(100_000.0, 100_000.0),
        resolutionunit="CENTIMETER",
    )


def peak_bytes() -> int:
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def run(path: Path, folder: Path, batch_size: int) -> dict[str, float]:
    """Do what the service does with a large image; runs in the child."""
    keep_freed_memory()
    loaded = load_checkpoint(MODEL)
    names = loaded.spec.class_names
    predictor = open_predictor(loaded.model, loaded.spec.input_size_px)
    raster = open_raster(path, max_pixels=10**10)
    assert raster is not None
    figures = {"before_bytes": peak_bytes()}
    started_s = time.perf_counter()
    thumbnail = stretch(raster, 512)
    soft = probability(predictor.predict(to_network_input(thumbnail)[np.newaxis])[0])
    scale = choose_scale(
        raster,
        typical_diameter_px(part_cells(soft, names)),
        predictor.predict,
        names,
        batch_size=batch_size,
        thumbnail=thumbnail,
    )
    if scale is None:
        raise SystemExit("the model finds no cells at any scale, so nothing is tiled")
    figures |= {"choice_s": time.perf_counter() - started_s, "scale": scale}
    started_s = time.perf_counter()

    def show(done: int, of: int) -> None:
        if done % 20 == 0 or done == of:
            print(f"\r{done} of {of} tiles, {peak_bytes() / 1e9:.2f} GB", end="", file=sys.stderr)

    blend = Blend.of((160, 0, 20), 0.3)
    cells = 0
    shape = raster.shape_hw
    with (
        (folder / "mask.png").open("wb") as mask_file,
        (folder / "composite.tif").open("wb") as composite_file,
        (folder / "labels.tif").open("wb") as labels_file,
        MaskPngWriter(mask_file, shape) as mask,
        RgbTiffWriter(composite_file, shape) as composite,
        LabelTiffWriter(labels_file, shape, dtype=np.uint32) as labels,
    ):
        for band in segment_in_tiles(
            raster,
            scale,
            predictor.predict,
            names,
            batch_size=batch_size,
            pixel_size_um=0.1,
            on_progress=show,
        ):
            mask.write(band.mask)
            composite.write(composite_image(band.pixels, band.mask, blend))
            labels.write(band.labels)
            cells += len(band.numbers)
    print(file=sys.stderr)
    raster.check_unchanged()
    tiles = tile_count(shape, scale)
    took_s = time.perf_counter() - started_s
    return figures | {
        "tiles": tiles,
        "tiling_s": took_s,
        "tiles_per_s": tiles / took_s,
        "cells": cells,
        "output_bytes": sum(file.stat().st_size for file in folder.iterdir()),
        "peak_bytes": peak_bytes(),
    }


def main() -> int:
    parser = argparse.ArgumentParser(description="Peak memory and speed of a large image.")
    parser.add_argument("--size-px", type=int, default=20_000)
    parser.add_argument("--height-px", type=int, help="where it is not square")
    parser.add_argument("--batch-size", type=int, default=2)
    parser.add_argument("--json", type=Path, help="write the figures there as well")
    parser.add_argument("--image", type=Path, help="take this TIFF instead of making one")
    parser.add_argument("--child", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child is not None:
        print(json.dumps(run(arguments.image, arguments.child, arguments.batch_size)))
        return 0
    shape_hw = (arguments.height_px or arguments.size_px, arguments.size_px)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        image = arguments.image or folder / "large.tif"
        if arguments.image is None:
            make(image, shape_hw)
        outputs = folder / "outputs"
        outputs.mkdir()
        command = [sys.executable, __file__, "--image", str(image), "--child", str(outputs)]
        command += ["--batch-size", str(arguments.batch_size)]
        child = subprocess.run(command, stdout=subprocess.PIPE, check=True, text=True)
        figures = {"width_px": shape_hw[1], "height_px": shape_hw[0]} | json.loads(child.stdout)
    for key, value in figures.items():
        is_size = key.endswith("_bytes")
        print(f"{key:>14}  {value / 1e9:.3f} GB" if is_size else f"{key:>14}  {value:.6g}")
    if arguments.json is not None:
        arguments.json.write_text(json.dumps(figures, indent=2) + "\n")
    return int(figures["peak_bytes"] > ALLOWED_BYTES)


if __name__ == "__main__":
    raise SystemExit(main())
