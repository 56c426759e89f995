"""Images a second: ours against the original's way, other runtimes, and the network alone.

    python benchmarks/throughput.py [--images 40] [--wide-images 12] [--rounds 3]
        [--only PATTERN ...] [--json FILE]

Photographs of 1600x1200 px as JPEG go in; a mask as PNG and a composite as JPEG come out. Each
subject is a process of its own, and all are measured in turn:

    reference                    the original pipeline (`reference.py`), a few images
    process-dir, daemon ...      ours, for each backend there is. `shipped` is the shipped model,
                                 `wide` the checkpoint of width 64 that the reference runs.
                                 `pictures` makes the mask and the composite alone, each image
                                 stretched whole as the original did; `all` are the defaults: cells,
                                 measurements, flags and tables too
    openvino, onnxruntime ...    the same network in another runtime, the same files around it
                                 (`runtimes.py`)
    network ...                  the network alone, as the service runs it (`network.py`)

The rates that are compared are those between the first and the last batch: take ten batches or more
for figures to go by. Without the extra `bench` the other runtimes are left out.
"""

from __future__ import annotations

import argparse
import fnmatch
import importlib.util
import json
import re
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import reference
from harness import (
    BATCH_SIZE,
    Figure,
    Finished,
    Limits,
    Rate,
    Report,
    Sections,
    command,
    daemon,
    environment,
    has_bfloat16,
    in_turn,
    limits,
    photographs,
    process_dir,
    ratios,
    run,
    some_of,
    steady_per_s,
    write_photographs,
)
from runtimes import RUNTIMES

from bcseg_batch.service.build import SHIPPED_MODEL

HERE = Path(__file__).parent
# Each image stretched whole, and nothing but pictures.
AS_THE_ORIGINAL: Sections = {"images": {"tiling": "never"}, "outputs": {"cells": False}}
TO_REFERENCE = {"shipped": 60.0, "wide": 6.5}
TO_NETWORK = 0.8
TO_MATRIX = 0.9
TO_OPENVINO = 1.0
MEMORY_LIMIT_MB = 1200.0


@dataclass(frozen=True, slots=True)
class Subject:
    """One thing that is measured.

    Attributes:
        measure: gives a `Rate`, or what `network.py` prints.
        kind: `reference`, `ours`, `network`, or the name of a runtime.
        weights: `shipped` or `wide`.
        backend: what was asked to run the network; empty where that is left to the settings.
        outputs: `pictures` or `all`.
    """

    measure: Callable[[], Any]
    kind: str
    weights: str
    backend: str = ""
    outputs: str = "pictures"


def backends() -> list[str]:
    """Ask `process-dir` what can run the network; one empty name where there is no choice."""
    shown = subprocess.run(
        [command(), "process-dir", "--help"],
        env=environment({"COLUMNS": "200", "NO_COLOR": "1"}),
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    found = re.search(r"--backend\s+[<\[]?([a-z|]+)", shown)
    names = found[1].split("|") if found else [""]
    has_openvino = importlib.util.find_spec("openvino") is not None
    return [name for name in names if name != "openvino" or has_openvino]


def said_by(finished: Finished) -> dict[str, Any]:
    """Read the last line that a script printed."""
    said: dict[str, Any] = json.loads(finished.output.splitlines()[-1])
    return said


def rate_by(finished: Finished, said: Mapping[str, Any], per_s: float | None) -> Rate:
    """Give the rate of a script that is not ours."""
    return Rate(
        images=said["images"],
        steady_per_s=per_s,
        whole_per_s=said["images"] / finished.wall_s,
        core_ms_per_image=1000 * finished.cpu_s / said["images"],
        peak_mb=finished.peak_bytes / 1e6,
        runs_on=said["runs_on"],
    )


def run_reference(source: Path, model: Path, images: int) -> Rate:
    """Run the original's way on a few images."""
    script = [sys.executable, str(HERE / "reference.py"), "--images", str(images)]
    finished = run([*script, "--input", source, "--model", model])
    said = said_by(finished)
    return rate_by(finished, said, said["images_per_s"])


def run_runtime(runtime: str, source: Path, model: Path) -> Rate:
    """Run the network in another runtime."""
    script = [sys.executable, str(HERE / "runtimes.py"), "--runtime", runtime]
    finished = run([*script, "--input", source, "--model", model])
    said = said_by(finished)
    return rate_by(finished, said, steady_per_s(said["finished_s"], BATCH_SIZE))


def run_network(model: Path, backend: Sequence[str], images: int) -> dict[str, Any]:
    """Run the network alone."""
    script = [sys.executable, str(HERE / "network.py"), "--images", str(images)]
    return said_by(run([*script, "--model", model, *backend]))


def ours(
    images: Path, file: Path, weights: str, backend: str, outputs: Sequence[str]
) -> Iterator[tuple[str, Subject]]:
    """Name our own ways to process a folder, and the network alone."""
    choice = ["--backend", backend] if backend else []
    model: dict[str, object] = {"file": str(file), **({"backend": backend} if backend else {})}
    for made in outputs:
        sections: Sections = AS_THE_ORIGINAL if made == "pictures" else {}
        name = f"{weights} {made} {backend}".rstrip()
        once = partial(process_dir, images, "--model", file, *choice, sections=sections)
        yield f"process-dir {name}", Subject(once, "ours", weights, backend, made)
        # The daemon takes a backend like any other setting: once is enough.
        if backend in {"", "auto"}:
            watching = partial(daemon, images, sections={"model": model, **sections})
            yield f"daemon {name}", Subject(watching, "ours", weights, backend, made)
    alone = partial(run_network, file, choice, sum(1 for _ in images.iterdir()))
    yield f"network {weights} {backend}".rstrip(), Subject(alone, "network", weights, backend)


def subjects(options: argparse.Namespace, folder: Path) -> dict[str, Subject]:
    """Name everything that is measured, in the order in which it is."""
    many, few, wide = folder / "in", folder / "few", folder / "checkpoint.pth"
    some_of(write_photographs(many, options.images), options.wide_images, few)
    reference.write_checkpoint(wide, next(photographs(1)), width=options.width)
    shipped = options.model or SHIPPED_MODEL
    choices = options.backends or backends()
    slow = partial(run_reference, few, wide, options.reference_images)
    found = {"reference": Subject(slow, "reference", "wide")}
    for backend in choices:
        found |= ours(many, shipped, "shipped", backend, ("pictures", "all"))
    found |= ours(few, wide, "wide", choices[0], ("pictures",))
    for runtime in RUNTIMES:
        if all(importlib.util.find_spec(package) for package in (runtime, "onnx", "onnxscript")):
            for images, file, weights in ((many, shipped, "shipped"), (few, wide, "wide")):
                measure = partial(run_runtime, runtime, images, file)
                found[f"{runtime} {weights}"] = Subject(measure, runtime, weights)
    patterns = options.only or ["*"]
    return {
        name: subject
        for name, subject in found.items()
        if any(fnmatch.fnmatch(name, pattern) for pattern in patterns)
    }


def add_rates(report: Report, found: Mapping[str, Subject], results: Mapping[str, Any]) -> None:
    """Divide the rates of ours by those of the others, round by round."""

    def rates(name: str) -> list[float | None]:
        return [one.steady_per_s for one in results[name]]

    for name, subject in found.items():
        if subject.kind != "ours":
            continue
        is_default = subject.backend in {"", "auto"}
        for other, beside in found.items():
            is_same = beside.weights == subject.weights
            if beside.kind == "network" and is_same and beside.backend == subject.backend:
                alone = [one["images_per_s"] for one in results[other]]
                aim = TO_NETWORK if subject.weights == "shipped" else None
                report.add(ratios(f"{name} / {other}", rates(name), alone, aim=aim))
            elif subject.outputs == "pictures" and beside.kind == "reference":
                aim = TO_REFERENCE[subject.weights] if is_default else None
                report.add(ratios(f"{name} / {other}", rates(name), rates(other), aim=aim))
            elif subject.outputs == "pictures" and beside.kind in RUNTIMES and is_same:
                aim = TO_OPENVINO if is_default and beside.kind == "openvino" else None
                text = f"{name} / {other}, {results[other][0].runs_on}"
                report.add(ratios(text, rates(name), rates(other), aim=aim))


def add_operations(
    report: Report, found: Mapping[str, Subject], results: Mapping[str, Any], measured: list[Limits]
) -> None:
    """Divide what the network computes by what the machine computes at best."""
    for name, subject in found.items():
        if subject.kind != "network":
            continue
        runs = results[name]
        for dtype in ("float32", "bfloat16") if has_bfloat16() else ("float32",):
            # Only a precision's own matrix rate bounds it: 8 bits go beyond that of float32.
            is_own = runs[0]["runs_on"] == f"cpu {dtype}"
            report.add(
                ratios(
                    f"{name} ({runs[0]['runs_on']}), operations/s / {dtype} matrix",
                    [one["gflops"] for one in runs],
                    [getattr(one, f"matrix_{dtype}_gflops") for one in measured],
                    aim=TO_MATRIX if is_own else None,
                )
            )


def add_memory(report: Report, found: Mapping[str, Subject], results: Mapping[str, Any]) -> None:
    """Hold the memory of ours against its limit."""
    for name, subject in found.items():
        if subject.kind == "ours" and subject.weights == "shipped":
            report.add(
                Figure(
                    name=f"{name}, peak memory",
                    values=[one.peak_mb for one in results[name]],
                    unit="MB",
                    aim=MEMORY_LIMIT_MB,
                    at_least=False,
                )
            )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--images", type=int, default=40, help="for the shipped model")
    parser.add_argument("--wide-images", type=int, default=12, help="for width 64")
    parser.add_argument("--reference-images", type=int, default=2, help="for the reference")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--only", nargs="+", metavar="PATTERN", help="such as 'process-dir *'")
    parser.add_argument("--backends", nargs="+", help="those of process-dir; all where left out")
    parser.add_argument("--model", type=Path, help="in place of the shipped one")
    parser.add_argument("--width", type=int, default=64, help="of the reference's network")
    parser.add_argument("--folder", type=Path, help="on the disk to be measured")
    parser.add_argument("--json", type=Path, help="write the figures there too; - prints them")
    options = parser.parse_args()
    report = Report("throughput", vars(options))
    with tempfile.TemporaryDirectory(dir=options.folder) as name:
        found = subjects(options, Path(name))
        actions: dict[str, Callable[[], Any]] = {"limits": partial(limits, Path(name))}
        actions |= {name: subject.measure for name, subject in found.items()}
        results = in_turn(actions, options.rounds, console=report.console)
    measured = results.pop("limits")
    report.limits(measured)
    networks = {name: results[name] for name in results if found[name].kind == "network"}
    report.rates(
        "Images a second", {name: results[name] for name in results if name not in networks}
    )
    report.parts["networks"] = networks
    keys = ("images_per_s", "core_ms_per_image", "gflops")
    report.table(
        "The network alone",
        ["", "images/s", "core-ms/image", "10^9 operations/s", "on"],
        [
            [
                name,
                *(statistics.median(one[key] for one in some) for key in keys),
                some[0]["runs_on"],
            ]
            for name, some in networks.items()
        ],
    )
    add_rates(report, found, results)
    add_operations(report, found, results, measured)
    add_memory(report, found, results)
    report.finish(options.json)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
