"""What the report of many images costs to make, to refresh and to open, beside that of few.

    python benchmarks/report.py [--images 100 10000] [--no-outlines] [--json FILE] [--folder DIR]

The samples go through the shipped model; their files stand for all images, under other names (hard
links), so that pictures, outlines and tables are real. A report is made, refreshed with nothing
new, and refreshed with ten new images; then it is opened in Chromium, where that and Playwright are
installed. Ratios compare the larger number of images with the smaller one, in one run.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from bcseg_batch.items import OUTPUT_FIELDS, Outcome, Status
from bcseg_batch.report.build import ReportOptions, build_report
from bcseg_batch.store.read_back import read_outcomes
from bcseg_batch.store.results import to_record
from bcseg_batch.store.shards import JSONL_NAME

SAMPLES = Path(__file__).parents[1] / "samples"
NEW = 10
_OPTIONS = ReportOptions(group_pattern="(?P<group>s[0-9]+)_")


def process_samples(output: Path) -> list[Outcome]:
    """Take the samples through the shipped model."""
    code = "from bcseg_batch.cli import main; main()"
    arguments = ["process-dir", str(SAMPLES), str(output), "--labels"]
    environment = {**os.environ, "BCSEG_OUTPUTS__PREVIEWS": "true"}
    subprocess.run(
        [sys.executable, "-c", code, *arguments], env=environment, check=True, capture_output=True
    )
    return [
        outcome
        for outcome in read_outcomes(output).outcomes.values()
        if outcome.status is Status.DONE
    ]


def copy_of(outcome: Outcome, number: int, source: Path, folder: Path) -> Outcome:
    """Give an image's files other names, and its outcome with these."""
    stem = f"s{number // 50:04d}_{number:06d}"
    names: dict[str, Any] = {}
    for field in OUTPUT_FIELDS:
        path = getattr(outcome, field)
        if path is not None:
            old = Path(path)
            names[field] = f"{old.parts[0]}/{stem}_{old.name.rpartition('_')[2]}"
            (folder / names[field]).parent.mkdir(parents=True, exist_ok=True)
            (folder / names[field]).hardlink_to(source / path)
    return replace(
        outcome,
        image=f"{stem}.jpg",
        cell_count=(outcome.cell_count or 0) + number % 41,
        mean_confidence=(outcome.mean_confidence or 0.9) - number % 997 / 10_000,
        **names,
    )


def add(folder: Path, outcomes: list[Outcome]) -> None:
    with (folder / JSONL_NAME).open("a", encoding="ascii") as lines:
        lines.writelines(json.dumps(to_record(outcome)) + "\n" for outcome in outcomes)


def took_s(step: Callable[[], object]) -> float:
    began_s = time.monotonic()
    step()
    return time.monotonic() - began_s


def opened_s(index: Path, count: int) -> dict[str, float]:
    """Open the list in Chromium: until its first rows are there, and until all have been read."""
    chromium = shutil.which("chromium")
    if chromium is None:
        return {}
    try:
        from playwright.sync_api import sync_playwright  # noqa: PLC0415 - there or not
    except ImportError:
        return {}
    with sync_playwright() as started:
        browser = started.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        page = browser.new_page()
        page.goto("about:blank")
        began_s = time.monotonic()
        page.goto(index.as_uri(), wait_until="commit")
        page.wait_for_selector("#list tbody tr")
        first_s = time.monotonic() - began_s
        page.wait_for_function(f"all.length === {count}")
        all_s = time.monotonic() - began_s
        sort_s = page.evaluate(
            "() => { const t = performance.now(); order = 'image'; sort();"
            " return (performance.now() - t) / 1000; }"
        )
        search_s = page.evaluate(
            "() => { const t = performance.now(); byId('search').value = '7'; find();"
            " return (performance.now() - t) / 1000; }"
        )
        browser.close()
    return {"first_rows_s": first_s, "all_rows_s": all_s, "sort_s": sort_s, "search_s": search_s}


def measure(count: int, samples: list[Outcome], source: Path, folder: Path) -> dict[str, float]:
    folder.mkdir(parents=True)
    outcomes = [
        copy_of(samples[number % len(samples)], number, source, folder)
        for number in range(count + NEW)
    ]
    add(folder, outcomes[:count])
    figures = {"images": float(count)}
    figures["first_s"] = took_s(lambda: build_report(folder, _OPTIONS))
    figures["unchanged_s"] = took_s(lambda: build_report(folder, _OPTIONS))
    add(folder, outcomes[count:])
    figures["ten_new_s"] = took_s(lambda: build_report(folder, _OPTIONS))
    report = folder / "report"
    figures["first_ms_per_image"] = 1000 * figures["first_s"] / count
    figures["list_megabytes"] = sum(p.stat().st_size for p in (report / "data").iterdir()) / 1e6
    figures["report_kilobytes_per_image"] = (
        sum(p.stat().st_size for p in report.rglob("*") if p.is_file()) / 1e3 / count
    )
    return figures | opened_s(report / "index.html", count + NEW)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--images", type=int, nargs="+", default=[100, 10_000])
    parser.add_argument(
        "--no-outlines", action="store_true", help="trace none, which takes longest"
    )
    parser.add_argument("--json", type=Path, help="write the figures there too")
    parser.add_argument("--folder", type=Path, help="work there, on the disk that is meant")
    options = parser.parse_args()
    root = Path(tempfile.mkdtemp(prefix="bcseg-report-", dir=options.folder))
    try:
        samples = process_samples(root / "samples")
        if options.no_outlines:
            samples = [replace(outcome, mask=None, labels=None) for outcome in samples]
        rows = [
            measure(count, samples, root / "samples", root / str(count))
            for count in sorted(options.images)
        ]
    finally:
        shutil.rmtree(root)
    print(f"{'':28}", *(f"{row['images']:>10.0f}" for row in rows), f"{'ratio':>10}")
    for name in rows[0]:
        values = [row[name] for row in rows]
        ratio = f"{values[-1] / values[0]:10.2f}" if values[0] else ""
        print(f"{name:28}", *(f"{value:>10.3f}" for value in values), ratio)
    if options.json:
        figures = {"rows": rows, "cores": os.cpu_count(), "load": round(os.getloadavg()[0], 2)}
        options.json.write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
