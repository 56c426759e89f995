"""How fast and how small the records of an output folder are, at a million images.

    python benchmarks/records.py [--rows 1000000] [--ask 20000] [--json FILE]

What `process-dir` does with records and names beside its images: load those of earlier runs, look
one up, append one, claim a name, write the table. Ratios stand first: each against reading one
line of JSON on the same machine, and the full folder against one of a tenth of the rows, which says
what grows. The lookups are spread over all rows.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from ledger import file_of, outcome_of

from bcseg_batch.store.names import OutputNames, name_of_mask
from bcseg_batch.store.results import ResultsLog, to_record

LIMIT_MIB = 64  # above a run over nothing
LIMIT_SHARE = 0.05  # of a core, at a hundred images a second


def write_records(path: Path, rows: int) -> None:
    with path.open("w", encoding="ascii") as lines:
        for number in range(rows):
            json.dump(to_record(outcome_of(file_of(number))), lines)
            lines.write("\n")


def memory_mib() -> float:
    """The most that this process ever held."""
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) / 1024


def passing_mib() -> float:
    """What lies in passing files of this process."""
    total_bytes = 0
    for link in Path("/proc/self/fd").iterdir():
        try:
            if str(link.readlink()).endswith("(deleted)"):
                total_bytes += link.stat().st_size
        except OSError:  # the listing's own
            continue
    return total_bytes / 2**20


def each_us(count: int, action: Callable[[int], object]) -> float:
    start_s = time.perf_counter()
    for number in range(count):
        action(number)
    return (time.perf_counter() - start_s) / count * 1e6


def measure(folder: Path, rows: int, count: int) -> dict[str, float]:
    """In a process of its own, since the memory is the highest that it ever had."""
    arguments = ["--measure", str(folder), "--rows", str(rows), "--ask", str(count)]
    done = subprocess.run(
        [sys.executable, __file__, *arguments], check=True, capture_output=True, text=True
    )
    figures: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return figures


def measure_here(folder: Path, rows: int, count: int) -> dict[str, float]:
    write_records(folder / "results.jsonl", rows)
    with (folder / "results.jsonl").open("rb") as file:
        lines = [file.readline() for _ in range(min(rows, 2000))]
    json_us = each_us(len(lines), lambda number: json.loads(lines[number]))
    before_mib = memory_mib()
    start_s = time.perf_counter()
    with ResultsLog(folder) as results:
        loaded_s = time.perf_counter()
        names = OutputNames()
        names.hold_all((image, name_of_mask(mask)) for image, mask in results.masks())
        named_s = time.perf_counter()
        known_us = each_us(count, lambda n: results.known(file_of(n * 7919 % rows).image))
        append_us = each_us(count, lambda n: results.append(outcome_of(file_of(rows + n))))
        claim_us = each_us(count, lambda n: names.claim(file_of(rows + n).image))
        table_s = time.perf_counter()
        results.write_csv()
        written_s = time.perf_counter()
        return {
            "memory_mib": memory_mib() - before_mib,
            "passing_files_mib": passing_mib(),
            "json_us": json_us,
            "load_us": (loaded_s - start_s) / rows * 1e6,
            "load_names_us": (named_s - loaded_s) / rows * 1e6,
            "known_us": known_us,
            "append_us": append_us,
            "claim_us": claim_us,
            "table_us": (written_s - table_s) / (rows + count) * 1e6,
        }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--ask", type=int, default=20_000)
    parser.add_argument("--folder", type=Path, help="on the disk to be measured")
    parser.add_argument("--json", type=Path, help="write the figures there too")
    parser.add_argument("--measure", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure:
        print(json.dumps(measure_here(options.measure, options.rows, options.ask)))
        return 0
    small_rows = max(1, options.rows // 10)
    with tempfile.TemporaryDirectory(dir=options.folder) as name:
        folders = [Path(name, "small"), Path(name, "full")]
        for folder in folders:
            folder.mkdir()
        small = measure(folders[0], small_rows, min(options.ask, small_rows))
        full = measure(folders[1], options.rows, min(options.ask, options.rows))
    # Of an image: looked up before and after, named, recorded.
    image_us = 2 * full["known_us"] + full["claim_us"] + full["append_us"]
    figures = {
        "rows": options.rows,
        "load_in_lines_of_json": full["load_us"] / full["json_us"],
        "image_in_lines_of_json": image_us / full["json_us"],
        "share_of_a_core_at_100_images_per_s": image_us * 100 / 1e6,
        "load_s": full["load_us"] * options.rows / 1e6,
        "small": small,
        "full": full,
    }
    print(
        f"{'of each row, or in all':24}{small_rows:>12,} rows{options.rows:>14,} rows{'ratio':>9}"
    )
    for key in small:
        ratio = f"{full[key] / small[key]:.1f}" if small[key] else "-"
        print(f"{key:24}{small[key]:>17.2f}{full[key]:>19.2f}{ratio:>9}")
    print(f"load: {figures['load_in_lines_of_json']:.1f} lines of JSON a record;", end=" ")
    print(f"an image: {image_us:.0f} us, {image_us / 1e4:.1%} of a core at 100 a second")
    met = image_us * 100 / 1e6 < LIMIT_SHARE and full["memory_mib"] < LIMIT_MIB
    print(f"under {LIMIT_SHARE:.0%} of a core and {LIMIT_MIB} MiB: {'yes' if met else 'NO'}")
    print(json.dumps(figures))
    if options.json:
        options.json.write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")
    return 0 if met else 1


if __name__ == "__main__":
    raise SystemExit(main())
