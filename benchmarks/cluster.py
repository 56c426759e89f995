"""How fast the engine ray is on one machine, beside the local one.

    python benchmarks/cluster.py [--images 1000] [--rounds 3] [--shape-px H W] [--check]

In turn: `process-dir` as it is, and with `--engine ray --address local`. Both rates are those
between the first batch and the last one: starting Ray takes seconds, which are told beside. Then
the hashes of all outputs are held against each other: what is faster and wrong is not faster.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path
from typing import Any

from harness import (
    SHAPE_HW,
    Report,
    command,
    in_turn,
    rate_of,
    ratios,
    records,
    run,
    write_photographs,
)

_AIM = 0.85


def hashes(output: Path) -> dict[str, Any]:
    """Give the hashes of the outputs of each image."""
    return {record["image"]: record["outputs_sha256"] for record in records(output)}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--images", type=int, default=1000)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--shape-px", type=int, nargs=2, default=SHAPE_HW, metavar=("H", "W"))
    parser.add_argument("--check", action="store_true", help="exit with 1 where the aim is missed")
    parser.add_argument("--model", type=Path, help="the shipped one where left out")
    parser.add_argument("--folder", type=Path, help="on the disk to be measured")
    parser.add_argument("--json", type=Path, help="write the figures there too; - prints them")
    options = parser.parse_args()
    report = Report("cluster", vars(options))
    model = [] if options.model is None else ["--model", options.model]
    with tempfile.TemporaryDirectory(dir=options.folder) as name:
        source = Path(name, "in")
        write_photographs(source, options.images, tuple(options.shape_px))
        written: list[dict[str, Any]] = []

        def engine(*flags: str) -> Any:
            with tempfile.TemporaryDirectory(dir=name) as folder:
                output = Path(folder, "out")
                finished = run([command(), "process-dir", source, output, *model, *flags])
                written.append(hashes(output))
                return rate_of(output, finished)

        rates = in_turn(
            {"local": engine, "ray": lambda: engine("--engine", "ray", "--address", "local")},
            options.rounds,
        )
    report.rates("process-dir", rates)
    steady = {key: [rate.steady_per_s for rate in some] for key, some in rates.items()}
    ratio = ratios("ray / local, after the start", steady["ray"], steady["local"], aim=_AIM)
    report.add(ratio)
    report.finish(options.json)
    if any(one != written[0] for one in written):
        raise SystemExit("the engines' outputs differ")
    return 1 if options.check and not (ratio and ratio.is_met) else 0


if __name__ == "__main__":
    raise SystemExit(main())
