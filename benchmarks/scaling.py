"""Whether many images cost more each than few: time, memory, threads and files.

    python benchmarks/scaling.py [--counts 100 1000 10000] [--files 10000 100000 1000000] [--json F]

Runs `process-dir` as a process of its own over folders of 64 x 48 pixels with a tiny network, so
that what does not depend on the pixels shows, and once more over the same folder when all is done.
Then times a scan of empty files. The ledger at a million rows is measured by `ledger.py`, and the
daemon's first look at a large backlog by `backlog.py`.
"""

from __future__ import annotations

import argparse
import shutil
import statistics
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from harness import Figure, report, run_command
from PIL import Image

from bcseg_batch.intake.ignore import IgnoreRules
from bcseg_batch.intake.scan import scan_folder
from bcseg_batch.segment.checkpoint import save_checkpoint
from bcseg_batch.segment.spec import ModelSpec
from bcseg_batch.store.images import SUFFIXES


def tiny_model(path: Path) -> None:
    """Write a network of a few hundred weights, drawn at random."""
    spec = ModelSpec(width=2, depth=2, input_size_px=64)
    torch.manual_seed(0)
    save_checkpoint(path, spec.build().eval(), spec)


def small_images(folder: Path, count: int) -> None:
    """Write small photographs, no two alike, a thousand to a folder."""
    generator = np.random.default_rng(0)
    noise = generator.integers(0, 256, (48, 64, 3), np.uint8)
    for number in range(count):
        place = folder / f"{number // 1000:04}"
        if not number % 1000:
            place.mkdir(parents=True)
        noise[0, 0] = (number % 256, number // 256 % 256, number // 65536)
        Image.fromarray(noise).save(place / f"{number:07}.png", compress_level=0)


def process(folder: Path, root: Path, model: Path, count: int) -> list[Figure]:
    """Process a folder twice: once, and once more when all is done."""
    settings = root / "settings.toml"
    settings.write_text(f'[model]\nfile = "{model}"\n[images]\ntiling = "never"\n')
    out = root / f"out-{count}"
    arguments = ["process-dir", str(folder), str(out), "--settings", str(settings), "--no-cells"]
    first, again = run_command(arguments), run_command(arguments)
    lines = sum(1 for _ in (out / "results.jsonl").open())
    if lines != count:
        raise RuntimeError(f"{lines} records of {count} images")
    # The first samples are of a process that is still loading.
    steady = first.memory_mb[len(first.memory_mb) // 3 :]
    growth = steady[-1] / statistics.median(steady)
    shutil.rmtree(out)
    return [
        Figure(f"{count} images: wall time each", 1000 * first.wall_s / count, "ms"),
        Figure(f"{count} images: core time each", 1000 * first.cpu_s / count, "ms"),
        Figure(f"{count} images: largest resident memory", first.peak_mb, "MB"),
        Figure(f"{count} images: memory at the end / median", growth, "x"),
        Figure(f"{count} images: run again, wall time each", 1000 * again.wall_s / count, "ms"),
    ]


def scan(root: Path, count: int) -> Figure:
    """Scan a tree of empty files, a thousand to a folder."""
    tree = root / f"tree-{count}"
    for number in range(count):
        place = tree / f"{number // 1000:04}"
        if not number % 1000:
            place.mkdir(parents=True)
        (place / f"{number:07}.jpg").touch()
    begun_s = time.perf_counter()
    found = sum(1 for _ in scan_folder(tree, IgnoreRules(SUFFIXES), recursive=True))
    seconds = time.perf_counter() - begun_s
    shutil.rmtree(tree)
    if found != count:
        raise RuntimeError(f"{found} of {count} files found")
    return Figure(f"scan of {count} files, each", 1e6 * seconds / count, "us")


def main() -> None:
    """Measure, and print the table."""
    command = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    command.add_argument("--counts", type=int, nargs="+", default=[100, 1000, 10_000])
    command.add_argument("--files", type=int, nargs="+", default=[10_000, 100_000, 1_000_000])
    command.add_argument("--json", type=Path)
    arguments = command.parse_args()
    with tempfile.TemporaryDirectory(prefix="bcseg-bench-") as name:
        root = Path(name)
        tiny_model(root / "tiny.safetensors")
        figures: list[Figure] = []
        for count in arguments.counts:
            small_images(root / f"in-{count}", count)
            figures += process(root / f"in-{count}", root, root / "tiny.safetensors", count)
            shutil.rmtree(root / f"in-{count}")
        figures += [scan(root, count) for count in arguments.files]
    each = {f.name: f.value for f in figures}
    few, many = min(arguments.counts), max(arguments.counts)
    if few < many:
        for what in ("core time each", "largest resident memory"):
            figures.append(
                Figure(
                    f"{what}, {many} / {few} images",
                    each[f"{many} images: {what}"] / each[f"{few} images: {what}"],
                    "x",
                )
            )
    report("Few images and many", figures, arguments.json)


if __name__ == "__main__":
    main()
