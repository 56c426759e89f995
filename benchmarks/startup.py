"""How soon the product is there, and how much memory it takes.

    python benchmarks/startup.py [--images 64] [--rounds 5] [--json FILE]

Whole processes, seen from outside: `bcseg-batch --help`; `process-dir` from its start to the first
result; its resident memory at the default batch size over a folder of 1600 x 1200 photographs, with
each backend; and the rate of the daemon against that of `process-dir`.
"""

from __future__ import annotations

import shutil
import signal
import statistics
import subprocess
import tempfile
import time
from pathlib import Path

from harness import (
    COMMAND,
    Figure,
    finished_at,
    in_turn,
    parser,
    photographs,
    plain,
    ratio,
    report,
    run_command,
    steady_rate,
)

from bcseg_batch.segment import openvino


def first_result_s(source: Path, backend: str) -> float:
    """Run `process-dir` over one image; seconds from its start to the result."""
    with tempfile.TemporaryDirectory(prefix="bcseg-bench-") as out:
        run = run_command(["process-dir", str(source), out, "--backend", backend], Path(out))
    assert run.first_s is not None
    return run.first_s


def daemon_rate(source: Path, backend: str, count: int) -> float:
    """Let the daemon take a folder that is full already; images per second."""
    with tempfile.TemporaryDirectory(prefix="bcseg-bench-") as name:
        root = Path(name)
        for folder in ("out", "state"):
            (root / folder).mkdir()
        (root / "daemon.toml").write_text(
            f'[folders]\ninput = "{source}"\noutput = "{root}/out"\nstate = "{root}/state"\n'
            f'[intake]\nsettle_s = 0.5\n[model]\nbackend = "{backend}"\n'
        )
        process = subprocess.Popen(
            [*COMMAND, "run", "--settings", str(root / "daemon.toml")], stderr=subprocess.DEVNULL
        )
        give_up_s = time.monotonic() + 60 + 5 * count
        ended: list[float] = []
        while len(ended) < count:
            if process.poll() is not None or time.monotonic() > give_up_s:
                process.kill()
                raise RuntimeError(f"the daemon came to {len(ended)} of {count} images")
            time.sleep(0.2)
            if (root / "out/results.jsonl").exists():
                ended = finished_at(root / "out")
        process.send_signal(signal.SIGTERM)
        process.wait(30)
        rate = steady_rate(ended)
        assert rate is not None
        return rate


def main() -> None:
    """Measure, and print the table."""
    arguments = parser(__doc__, images=64, rounds=5).parse_args()
    backends = ["torch", "openvino"] if openvino.is_installed() else ["torch"]
    with tempfile.TemporaryDirectory(prefix="bcseg-bench-") as name:
        root = Path(name)
        paths = photographs(root / "in", arguments.images)
        (root / "one").mkdir()
        shutil.copy(paths[0], root / "one")
        found = in_turn(
            {
                "help": lambda: run_command(["--help"]).wall_s,
                **{
                    f"first result, {backend}": (
                        lambda backend=backend: first_result_s(root / "one", backend)
                    )
                    for backend in backends
                },
            },
            arguments.rounds,
        )
        figures = [plain("--help", found["help"], "s", aim=0.3, at_least=False)]
        for backend in backends:
            times = found[f"first result, {backend}"]
            figures.append(
                plain(f"start to first result, {backend}", times, "s", aim=4, at_least=False)
            )
            figures += whole_runs(root, backend, arguments.images)
    report("Start, memory, daemon", figures, arguments.json)


def whole_runs(root: Path, backend: str, count: int) -> list[Figure]:
    """Take a folder by both ways, and look at memory and rate."""
    out = root / f"out-{backend}"
    run = run_command(["process-dir", str(root / "in"), str(out), "--backend", backend], out)
    tail = run.memory_mb[len(run.memory_mb) // 2 :]
    growth = tail[-1] / max(statistics.median(run.memory_mb[len(run.memory_mb) // 3 :]), 1.0)
    assert run.images_per_s is not None
    daemon = daemon_rate(root / "in", backend, count)
    return [
        Figure(f"resident memory, {backend}", run.peak_mb, "MB", aim=1200, at_least=False),
        Figure(f"memory at the end / in the middle, {backend}", growth, "x"),
        ratio(f"daemon / process-dir, {backend}", [daemon], [run.images_per_s]),
        plain(f"process-dir, {backend}, with cells", [run.images_per_s], "/s"),
    ]


if __name__ == "__main__":
    main()
