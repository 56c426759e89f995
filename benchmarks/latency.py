"""How long after a photograph is closed its mask and composite are on disk, the daemon idle.

    python benchmarks/latency.py [--images 15] [--settle 1.0] [--json FILE]

Drops photographs of 1600 x 1200 px, one at a time, into the folder of a real daemon with the
shipped model, and looks every two milliseconds for both outputs. Ends with 1 where the median is
above the settle time and half a second. The load of the machine stands beside the figures: another
program on the same cores is part of what is measured.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import tempfile
import time
from pathlib import Path

from harness import command, encode_photograph, photographs

ALLOWED_S = 0.5
GIVE_UP_S = 60.0


def start(root: Path, settle_s: float) -> subprocess.Popen[bytes]:
    for name in ("in", "out", "state"):
        (root / name).mkdir()
    (root / "daemon.toml").write_text(
        f'[folders]\ninput = "{root}/in"\noutput = "{root}/out"\nstate = "{root}/state"\n'
        f"[intake]\nsettle_s = {settle_s}\n"
    )
    with (root / "log.txt").open("wb") as log:
        return subprocess.Popen(
            [command(), "run", "--settings", str(root / "daemon.toml")], stderr=log, stdout=log
        )


def wait_for(*paths: Path, daemon: subprocess.Popen[bytes]) -> None:
    deadline_s = time.monotonic() + GIVE_UP_S
    while not all(path.exists() for path in paths):
        if daemon.poll() is not None or time.monotonic() > deadline_s:
            raise SystemExit(f"the daemon did not write {paths[0].name}")
        time.sleep(0.002)


def measure(root: Path, files: list[bytes], daemon: subprocess.Popen[bytes]) -> list[float]:
    """Give seconds from close to both outputs, one per photograph."""
    took_s = []
    for number, content in enumerate(files):
        path = root / "in" / f"{number:03d}.jpg"
        with path.open("wb") as file:
            file.write(content)
        closed_s = time.monotonic()
        wait_for(
            root / "out" / "masks" / f"{path.stem}_mask.png",
            root / "out" / "composites" / f"{path.stem}_bloodred.jpg",
            daemon=daemon,
        )
        took_s.append(time.monotonic() - closed_s)
        time.sleep(0.5)  # idle again
    return took_s


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--images", type=int, default=15)
    parser.add_argument("--settle", type=float, default=1.0, help="seconds")
    parser.add_argument("--folder", type=Path, help="on the disk to be measured")
    parser.add_argument("--json", type=Path, help="write the figures there too")
    options = parser.parse_args()
    files = [encode_photograph(pixels) for pixels in photographs(options.images + 1)]
    with tempfile.TemporaryDirectory(dir=options.folder) as name:
        root = Path(name)
        daemon = start(root, options.settle)
        try:
            wait_for(root / "state" / "status.json", daemon=daemon)
            load_before = os.getloadavg()[0]
            # The first warms the network up and does not count.
            took_s = measure(root, files, daemon)[1:]
        finally:
            daemon.terminate()
            daemon.wait()
        records = [json.loads(line) for line in (root / "out" / "results.jsonl").open()][1:]
    limit_s = options.settle + ALLOWED_S
    median_s = statistics.median(took_s)
    figures = {
        "images": options.images,
        "settle_s": options.settle,
        "limit_s": limit_s,
        "median_s": round(median_s, 3),
        "min_s": round(min(took_s), 3),
        "max_s": round(max(took_s), 3),
        "processing_median_s": statistics.median(record["seconds"] for record in records),
        "cores": os.cpu_count(),
        "load_before": round(load_before, 2),
        "device": records[-1]["device"],
        "dtype": records[-1]["dtype"],
    }
    print(f"{'':12}{'median':>9}{'min':>9}{'max':>9}")
    print(f"{'seconds':12}{median_s:>9.3f}{min(took_s):>9.3f}{max(took_s):>9.3f}")
    print(f"{'over settle':12}{median_s - options.settle:>9.3f}", end="")
    print(f"{min(took_s) - options.settle:>9.3f}{max(took_s) - options.settle:>9.3f}")
    met = median_s < limit_s
    print(f"load {load_before:.1f} on {os.cpu_count()} cores; ", end="")
    print(f"median under {limit_s:g} s: {'yes' if met else 'NO'}")
    print(json.dumps(figures))
    if options.json:
        options.json.write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")
    return 0 if met else 1


if __name__ == "__main__":
    raise SystemExit(main())
