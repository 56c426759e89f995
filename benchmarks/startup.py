"""How soon the command answers, and how soon the first result is there.

    python benchmarks/startup.py [--rounds 5] [--model FILE] [--json FILE]

In turn: the interpreter alone, `bcseg-batch --help`, the import of torch alone, and `process-dir`
on one photograph of 1600x1200, from its start until its record is written. The network's backend is
the one that the settings choose by themselves.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path

from harness import (
    SHAPE_HW,
    Figure,
    Report,
    Watched,
    command,
    in_turn,
    limits,
    ratios,
    run,
    write_photographs,
)

HELP_LIMIT_S = 0.3
FIRST_LIMIT_S = 4.0


def first_result_s(source: Path, *options: str | Path) -> float:
    """Give the seconds from the start of `process-dir` to the first record."""
    with tempfile.TemporaryDirectory(dir=source.parent) as name:
        results = Path(name, "out", "results.jsonl")
        watched = Watched([command(), "process-dir", source, results.parent, *options])
        try:
            return watched.wait_until(
                lambda: results.exists() and results.stat().st_size > 0, "a first result"
            )
        finally:
            watched.wait()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--model", type=Path, help="the shipped one where left out")
    parser.add_argument("--folder", type=Path, help="on the disk to be measured")
    parser.add_argument("--json", type=Path, help="write the figures there too; - prints them")
    options = parser.parse_args()
    report = Report("startup", vars(options))
    model = [] if options.model is None else ["--model", options.model]
    with tempfile.TemporaryDirectory(dir=options.folder) as name:
        source = Path(name, "in")
        write_photographs(source, 1, SHAPE_HW)
        subjects = {
            "python alone": lambda: run([sys.executable, "-c", "pass"]).wall_s,
            "--help": lambda: run([command(), "--help"]).wall_s,
            "import torch": lambda: run([sys.executable, "-c", "import torch"]).wall_s,
            "first result": lambda: first_result_s(source, *model),
            "limits": lambda: limits(Path(name)),
        }
        took = in_turn(subjects, options.rounds)
    report.limits(took.pop("limits"))
    report.parts["seconds"] = took
    report.add(
        Figure(
            name="bcseg-batch --help",
            values=took["--help"],
            unit="s",
            aim=HELP_LIMIT_S,
            at_least=False,
        ),
        ratios("bcseg-batch --help / python alone", took["--help"], took["python alone"]),
        Figure(
            name="process-dir, start to first result",
            values=took["first result"],
            unit="s",
            aim=FIRST_LIMIT_S,
            at_least=False,
        ),
        ratios("first result / import of torch alone", took["first result"], took["import torch"]),
    )
    report.finish(options.json)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
