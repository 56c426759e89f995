"""A hundred thousand files lie in the folder already: how soon, how fast, how big.

    python benchmarks/backlog.py [--files 100000] [--watch 30] [--json FILE]

1. From the start of a daemon with the shipped model to its first result, and its memory then and
   `--watch` seconds later, while it works through them.
2. A rescan of the folder when all of it is done: the daemon's own intake, on a ledger that knows
   every file.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
from harness import command
from loguru import logger

from bcseg_batch.intake.ignore import IgnoreRules
from bcseg_batch.intake.scan import scan_folder
from bcseg_batch.intake.watch import WatchMode
from bcseg_batch.items import InputFile, Outcome, Status
from bcseg_batch.service.intake import Intake
from bcseg_batch.store.encode import encode_png
from bcseg_batch.store.ledger import LEDGER_NAME, Ledger

RULES = IgnoreRules({".png"})
RECIPE = {"model_sha256": "m" * 64, "settings_sha256": "s" * 64}
PER_FOLDER = 5000
FIRST_LIMIT_S = 10.0
RESCAN_LIMIT_S = 3.0
GIVE_UP_S = 120.0


def fill(folder: Path, count: int) -> None:
    """Lay out photographs: hard links, since their content does not matter."""
    pixels = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    for first in range(0, count, PER_FOLDER):
        slide = folder / f"slide-{first // PER_FOLDER:03d}"
        slide.mkdir(parents=True)
        one = slide / f"{first:06d}.png"
        one.write_bytes(encode_png(pixels))
        for number in range(first + 1, min(first + PER_FOLDER, count)):
            os.link(one, slide / f"{number:06d}.png")


def resident_mb(pid: int) -> float:
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("VmRSS:"):
            return int(line.split()[1]) / 1024
    raise ValueError("no VmRSS")


def measure_start(root: Path, watch_s: float) -> dict[str, float]:
    """Start a daemon on the full folder."""
    settings = root / "daemon.toml"
    settings.write_text(
        f'[folders]\ninput = "{root}/in"\noutput = "{root}/out"\nstate = "{root}/state"\n'
    )
    results = root / "out" / "results.jsonl"
    began_s = time.monotonic()
    with (root / "log.txt").open("wb") as log:
        daemon = subprocess.Popen(
            [command(), "run", "--settings", settings], stderr=log, stdout=log
        )
    try:
        while not (results.exists() and results.stat().st_size):
            if daemon.poll() is not None or time.monotonic() - began_s > GIVE_UP_S:
                raise SystemExit((root / "log.txt").read_text())
            time.sleep(0.01)
        first_s = time.monotonic() - began_s
        # Two seconds later the network has seen full batches, and has all the memory it takes.
        time.sleep(2)
        early_mb = resident_mb(daemon.pid)
        time.sleep(watch_s)
        late_mb = resident_mb(daemon.pid)
        done = results.read_bytes().count(b"\n")
    finally:
        daemon.terminate()
        daemon.wait()
    with Ledger.open_existing(root / "state" / LEDGER_NAME) as ledger:
        noticed = sum(ledger.standing(since_s=0.0).counts.values())
    return {
        "first_result_s": first_s,
        "resident_early_mb": early_mb,
        "resident_late_mb": late_mb,
        "done": done,
        "noticed": noticed,
    }


def outcomes(files: Sequence[InputFile]) -> Iterator[Outcome]:
    for file in files:
        yield Outcome(
            image=file.image,
            status=Status.DONE,
            size_bytes=file.size_bytes,
            mtime_ns=file.mtime_ns,
            sha256="0" * 64,
            mask=f"masks/{file.image}_mask.png",
            model_sha256=RECIPE["model_sha256"],
            settings_sha256=RECIPE["settings_sha256"],
        )


def measure_rescan(root: Path) -> dict[str, float]:
    """Rescan the folder with a ledger that has all of it as done."""
    folder = root / "in"
    state = root / "state-done"
    state.mkdir()
    files = [f for f in scan_folder(folder, RULES, recursive=True) if isinstance(f, InputFile)]
    with Ledger(state / LEDGER_NAME) as ledger:
        for first in range(0, len(files), 5000):
            chunk = files[first : first + 5000]
            ledger.enqueue(chunk, **RECIPE)
            ledger.begin(chunk, solo=False)
            ledger.finish_many(outcomes(chunk))
        del files, chunk

        def known(some: Sequence[InputFile]) -> set[str]:
            return ledger.settled(some, **RECIPE) | ledger.queued(some, **RECIPE)

        intake = Intake(
            folder,
            RULES,
            known,
            recursive=True,
            mode=WatchMode.AUTO,
            settle_s=1.0,
            rescan_interval_s=3600.0,
            poll_interval_s=5.0,
        )
        try:
            took_s = []
            for number in range(4):
                intake.rescan()
                began_s = time.monotonic()
                while intake.rescans <= number:
                    assert not intake.poll()
                    intake.wait(0.02)
                took_s.append(time.monotonic() - began_s)
                if number == 0:
                    early_mb = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
        finally:
            intake.stop()
    late_mb = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    return {"rescan_s": sorted(took_s[1:])[1], "rescan_peak_growth_mb": late_mb - early_mb}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--files", type=int, default=100_000)
    parser.add_argument("--watch", type=float, default=30.0, help="seconds")
    parser.add_argument("--folder", type=Path, help="on the disk to be measured")
    parser.add_argument("--json", type=Path, help="write the figures there too")
    options = parser.parse_args()
    logger.remove()  # the figures alone
    load = os.getloadavg()[0]
    with tempfile.TemporaryDirectory(dir=options.folder) as name:
        root = Path(name)
        fill(root / "in", options.files)
        figures: dict[str, float] = {"files": options.files, "load_before": round(load, 2)}
        figures |= measure_start(root, options.watch)
        figures |= measure_rescan(root)
    rows = (
        ("start to first result, s", "first_result_s", FIRST_LIMIT_S),
        ("rescan, nothing changed, s", "rescan_s", RESCAN_LIMIT_S),
    )
    for text, key, limit in rows:
        print(f"{text:28}{figures[key]:>9.2f}  limit {limit:g}")
    print(f"{'daemon, MB resident':28}{figures['resident_early_mb']:>9.1f}  then", end=" ")
    print(f"{figures['resident_late_mb']:.1f} with {figures['noticed']:,.0f} noticed")
    print(json.dumps({key: round(value, 3) for key, value in figures.items()}))
    if options.json:
        options.json.write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")
    met = all(figures[key] < limit for _, key, limit in rows)
    print(f"all within their limits: {'yes' if met else 'NO'}")
    return 0 if met else 1


if __name__ == "__main__":
    raise SystemExit(main())
