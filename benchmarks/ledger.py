"""How fast the ledger answers when it holds a million images.

    python benchmarks/ledger.py [--rows 1000000] [--ask 10000] [--json FILE]

Ratios stand first: a lookup against one fsync of the same disk, and the full ledger against one of
a hundredth of the rows, which says whether it grows with them. Seconds follow. The names asked for
are spread over the whole ledger, half of them changed since.
"""

from __future__ import annotations

import argparse
import json
import os
import sqlite3
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from bcseg_batch.items import InputFile, Outcome, Status
from bcseg_batch.store.ledger import LEDGER_NAME, Ledger

MODEL, SETTINGS = "m" * 64, "s" * 64
LIMIT_S = 1.0
CHUNK = 20_000


def file_of(number: int, *, mtime_ns: int | None = None) -> InputFile:
    image = f"slide-{number // 1000:05d}/field-{number:08d}.jpg"
    time_ns = 1_700_000_000_000_000_000 + number if mtime_ns is None else mtime_ns
    return InputFile(Path("/input", image), image, 250_000 + number % 1000, time_ns)


def outcome_of(file: InputFile) -> Outcome:
    return Outcome(
        image=file.image,
        status=Status.DONE,
        width_px=1600,
        height_px=1200,
        foreground_fraction=0.25,
        mean_confidence=0.98,
        sha256=f"{file.mtime_ns:064x}",
        size_bytes=file.size_bytes,
        mtime_ns=file.mtime_ns,
        model_sha256=MODEL,
        settings_sha256=SETTINGS,
        version="1.0.0",
        device="cpu",
        dtype="bfloat16",
        mask=f"masks/{file.image[:-4]}_mask.png",
        composite=f"composites/{file.image[:-4]}_bloodred.jpg",
        seconds=1.234,
        finished_at="2026-01-01T00:00:00.000+00:00",
    )


def chunks(rows: int) -> Iterator[list[InputFile]]:
    for start in range(0, rows, CHUNK):
        yield [file_of(number) for number in range(start, min(rows, start + CHUNK))]


def fill(ledger: Ledger, rows: int) -> None:
    for files in chunks(rows):
        ledger.enqueue(files, model_sha256=MODEL, settings_sha256=SETTINGS)
        ledger.begin(files, solo=False)
        ledger.finish_many(outcome_of(file) for file in files)
        ledger.mark_exported(file.image for file in files)


def asked(rows: int, count: int) -> list[InputFile]:
    step = max(1, rows // count)
    return [
        file_of(number * step % rows, mtime_ns=1 if number % 2 else None) for number in range(count)
    ]


def seconds(action: Callable[[], object], repeats: int = 5) -> float:
    """The median of several runs."""
    taken: list[float] = []
    for _ in range(repeats):
        start_s = time.perf_counter()
        action()
        taken.append(time.perf_counter() - start_s)
    return sorted(taken)[repeats // 2]


def forget_cache(path: Path) -> None:
    """Drop the file from the page cache, so that the next question finds it cold."""
    with path.open("rb") as file:
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def fsync_s(folder: Path) -> float:
    with (folder / "probe").open("wb", buffering=0) as file:

        def once() -> None:
            file.write(b"x" * 4096)
            os.fsync(file.fileno())

        return seconds(once, 15)


def measure(folder: Path, rows: int, count: int) -> dict[str, float]:
    path = folder / LEDGER_NAME
    start_s = time.perf_counter()
    with Ledger(path) as ledger:
        fill(ledger, rows)
    filled_s = time.perf_counter() - start_s
    files = asked(rows, count)

    def known(ledger: Ledger) -> None:
        found = ledger.settled(files, model_sha256=MODEL, settings_sha256=SETTINGS)
        assert len(found) == (count + 1) // 2

    forget_cache(path)
    with Ledger(path) as ledger:
        cold_s = seconds(lambda: known(ledger), 1)
        warm_s = seconds(lambda: known(ledger))
        standing_s = seconds(lambda: ledger.standing(since_s=time.time() - 3600))

        def one_image() -> None:
            file = file_of(0, mtime_ns=time.time_ns())
            ledger.enqueue([file], model_sha256=MODEL, settings_sha256=SETTINGS)
            ledger.begin([file], solo=True)
            ledger.finish(outcome_of(file))

        image_s = seconds(one_image, 15)
    return {
        "fill_s": filled_s,
        "known_cold_s": cold_s,
        "known_warm_s": warm_s,
        "standing_s": standing_s,
        "one_image_s": image_s,
        "file_mib": path.stat().st_size / 2**20,
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--ask", type=int, default=10_000)
    parser.add_argument("--folder", type=Path, help="on the disk to be measured")
    parser.add_argument("--json", type=Path, help="write the figures there too")
    options = parser.parse_args()
    small_rows = max(options.ask, options.rows // 100)
    with tempfile.TemporaryDirectory(dir=options.folder) as name:
        folders = [Path(name, "small"), Path(name, "full")]
        for folder in folders:
            folder.mkdir()
        sync_s = fsync_s(folders[0])
        small = measure(folders[0], small_rows, options.ask)
        full = measure(folders[1], options.rows, options.ask)
    figures = {
        "rows": options.rows,
        "asked": options.ask,
        "sqlite": sqlite3.sqlite_version,
        "known_warm_full_to_small": full["known_warm_s"] / small["known_warm_s"],
        "known_warm_in_fsyncs": full["known_warm_s"] / sync_s,
        "one_image_in_fsyncs": full["one_image_s"] / sync_s,
        "fsync_s": sync_s,
        "limit_s": LIMIT_S,
        "small": small,
        "full": full,
    }
    print(f"{'':24}{small_rows:>12,} rows{options.rows:>14,} rows{'ratio':>9}")
    for key in small:
        print(f"{key:24}{small[key]:>17.4f}{full[key]:>19.4f}{full[key] / small[key]:>9.1f}")
    print(f"one fsync of this disk {sync_s * 1000:.2f} ms;", end=" ")
    print(f"an image costs {figures['one_image_in_fsyncs']:.1f} of them;", end=" ")
    met = max(full["known_cold_s"], full["known_warm_s"]) < LIMIT_S
    print(f"{options.ask:,} known? in under {LIMIT_S:g} s: {'yes' if met else 'NO'}")
    print(json.dumps(figures))
    if options.json:
        options.json.write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")
    return 0 if met else 1


if __name__ == "__main__":
    raise SystemExit(main())
