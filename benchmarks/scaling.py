"""Whether cost and memory of an image stay the same, however many there are.

    python benchmarks/scaling.py [--images 100 1000 10000] [--photographs 16 64]
        [--files 10000 100000 1000000] [--json FILE]

1. `process-dir` on small images (64x48 PNG) with a network of some hundred weights, so that what a
   file costs by itself is all there is; then once more on the same folder, where nothing is left to
   do.
2. `process-dir` with the shipped model on photographs of 1600x1200 px: the memory it really takes.
3. The scan of a folder, and the ledger, at up to a million files.

Each growth is a ratio to the smallest size, in the same run. Flat is a ratio of 1.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from backlog import RULES, fill
from harness import (
    Figure,
    Finished,
    Report,
    Sections,
    command,
    limits,
    rate_of,
    ratios,
    run,
    some_of,
    write_photographs,
    write_settings,
)
from ledger import measure as measure_ledger

from bcseg_batch.intake.scan import scan_folder
from bcseg_batch.segment.checkpoint import save_checkpoint
from bcseg_batch.segment.spec import ModelSpec
from bcseg_batch.store.encode import encode_png

T = TypeVar("T")

SMALL_HW = (48, 64)
MEMORY_LIMIT_MB = 1200.0
# Each image stretched whole: noise holds no cells whose size could be told.
SMALL = {"images": {"tiling": "never"}}


def write_small_images(folder: Path, count: int) -> list[Path]:
    """Write noise as PNG, no two alike."""
    folder.mkdir(parents=True)
    rng = np.random.default_rng(0)
    paths = []
    for number in range(count):
        paths.append(folder / f"{number:06d}.png")
        pixels = rng.integers(0, 256, (*SMALL_HW, 3), dtype=np.uint8)
        paths[-1].write_bytes(encode_png(pixels))
    return paths


def write_tiny_model(path: Path) -> Path:
    """Write a network of some hundred seeded weights, for inputs of 64 px."""
    torch.manual_seed(0)
    spec = ModelSpec(width=2, depth=2, input_size_px=64)
    save_checkpoint(path, spec.build(), spec)
    return path


def rss_growth(finished: Finished) -> float | None:
    """Divide the memory at the end of a run by that in its middle."""
    sizes = [sample.rss_bytes for sample in finished.samples]
    if len(sizes) < 8:
        return None
    middle, end = sizes[len(sizes) // 2 : 3 * len(sizes) // 4], sizes[3 * len(sizes) // 4 :]
    return statistics.median(end) / statistics.median(middle)


def run_folder(
    source: Path, output: Path, model: Path | None, sections: Sections
) -> dict[str, Any]:
    """Run `process-dir` on a folder, and once more."""
    settings = write_settings(source.with_suffix(".toml"), sections)
    arguments: list[str | Path] = [command(), "process-dir", source, output]
    arguments += ["--settings", settings]
    if model is not None:
        arguments += ["--model", model]
    finished = run(arguments)
    rate = rate_of(output, finished)
    again = run(arguments)
    middle = finished.samples[len(finished.samples) // 2]
    last = finished.samples[-1]
    return asdict(rate) | {
        "ms_per_image": 1000 / rate.whole_per_s,
        "steady_ms_per_image": None if rate.steady_per_s is None else 1000 / rate.steady_per_s,
        "rss_end_to_middle": rss_growth(finished),
        "threads": max(sample.threads for sample in finished.samples),
        "files_in_the_middle": middle.files,
        "files_at_the_end": last.files,
        "again_s": again.wall_s,
        "again_peak_mb": again.peak_bytes / 1e6,
    }


def ends(values: Iterable[T]) -> tuple[T, T]:
    """Give the first and the last."""
    everything = list(values)
    return everything[0], everything[-1]


def measure_sizes(
    paths: Sequence[Path],
    sizes: Sequence[int],
    folder: Path,
    model: Path | None,
    sections: Sections,
) -> dict[int, dict[str, Any]]:
    """Run on the first so many of some images, for each size."""
    found = {}
    for size in sizes:
        source = some_of(paths, size, folder / f"in-{size}")
        found[size] = run_folder(source, folder / f"out-{size}", model, sections)
    return found


def add_sizes(report: Report, title: str, found: dict[int, dict[str, Any]]) -> None:
    """Print what each size costs, and divide the largest by the smallest."""
    keys = {
        "steady ms/image": "steady_ms_per_image",
        "core-ms/image": "core_ms_per_image",
        "ms/image, all": "ms_per_image",
        "peak MB": "peak_mb",
        "RSS end/middle": "rss_end_to_middle",
        "threads": "threads",
        "files open": "files_in_the_middle",
        "again, s": "again_s",
        "again, MB": "again_peak_mb",
    }
    report.parts[title] = found
    report.table(
        title,
        ["images", *keys],
        [[f"{size:,}", *(one[key] for key in keys.values())] for size, one in found.items()],
    )
    (small, large), (first, last) = ends(found), ends(found.values())
    if small != large:
        for name, key in (("cost of an image", "steady_ms_per_image"), ("peak memory", "peak_mb")):
            report.add(
                ratios(f"{title}: {name}, {large:,} / {small:,} images", [last[key]], [first[key]])
            )


def measure_scan(folder: Path, count: int) -> dict[str, float]:
    """Walk a folder of so many files, warm."""
    fill(folder, count)
    took_s = []
    for _ in range(3):
        began_s = time.perf_counter()
        assert sum(1 for _ in scan_folder(folder, RULES, recursive=True)) == count
        took_s.append(time.perf_counter() - began_s)
    return {"scan_s": statistics.median(took_s), "us_per_file": 1e6 * min(took_s) / count}


def add_files(report: Report, sizes: Sequence[int], folder: Path) -> None:
    """Measure the scan and the ledger at each size."""
    found = {}
    for size in sizes:
        known = min(10_000, size)
        place = folder / f"ledger-{size}"
        place.mkdir()
        found[size] = {
            **measure_scan(folder / f"files-{size}", size),
            **{f"ledger_{key}": value for key, value in measure_ledger(place, size, known).items()},
        }
        found[size]["ledger_fill_us_per_row"] = 1e6 * found[size].pop("ledger_fill_s") / size
    keys = {
        "scan s": "scan_s",
        "scan us/file": "us_per_file",
        "fill us/row": "ledger_fill_us_per_row",
        "10,000 known? s": "ledger_known_warm_s",
        "one image s": "ledger_one_image_s",
        "MiB": "ledger_file_mib",
    }
    report.parts["files"] = found
    report.table(
        "Scan and ledger",
        ["files", *keys],
        [[f"{size:,}", *(one[key] for key in keys.values())] for size, one in found.items()],
    )
    (small, large), (first, last) = ends(found), ends(found.values())
    if small != large:
        for name, key in (
            ("scan of a file", "us_per_file"),
            ("a row into the ledger", "ledger_fill_us_per_row"),
            ("an image through the ledger", "ledger_one_image_s"),
        ):
            report.add(ratios(f"{name}, {large:,} / {small:,} files", [last[key]], [first[key]]))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--images", type=int, nargs="*", default=[100, 1000, 10_000])
    parser.add_argument("--photographs", type=int, nargs="*", default=[16, 64])
    parser.add_argument("--files", type=int, nargs="*", default=[10_000, 100_000, 1_000_000])
    parser.add_argument("--model", type=Path, help="for photographs, in place of the shipped one")
    parser.add_argument("--folder", type=Path, help="on the disk to be measured")
    parser.add_argument("--json", type=Path, help="write the figures there too; - prints them")
    options = parser.parse_args()
    report = Report("scaling", vars(options))
    with tempfile.TemporaryDirectory(dir=options.folder) as name:
        folder = Path(name)
        report.limits([limits(folder)])
        if options.images:
            paths = write_small_images(folder / "small", max(options.images))
            tiny = write_tiny_model(folder / "tiny.safetensors")
            found = measure_sizes(paths, options.images, folder / "runs", tiny, SMALL)
            add_sizes(report, "small images", found)
        if options.photographs:
            paths = write_photographs(folder / "photographs", max(options.photographs))
            found = measure_sizes(paths, options.photographs, folder / "real", options.model, {})
            add_sizes(report, "photographs", found)
            report.add(
                Figure(
                    name="photographs: peak memory",
                    values=[max(one["peak_mb"] for one in found.values())],
                    unit="MB",
                    aim=MEMORY_LIMIT_MB,
                    at_least=False,
                )
            )
        if options.files:
            add_files(report, options.files, folder)
    report.finish(options.json)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
