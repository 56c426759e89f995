"""Photographs per second: the product against the original, and against its own network alone.

    python benchmarks/throughput.py [--images 24] [--rounds 3] [--json FILE]

1600 x 1200 JPEGs in, mask PNG and composite JPEG out. Everything is measured in turn, in one
process and with the models loaded, so that the rates are those of a long run: the original
(`reference.py`), the shipped model by torch and in 8 bits, with and without cells; a width-64
checkpoint of the original's layout; the same network through OpenVINO and ONNX Runtime with the
same files around it; and the network alone, without any files. Needs the extra `bench`.
"""

from __future__ import annotations

import functools
import logging
import statistics
import tempfile
import threading
import time
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from harness import (
    Figure,
    in_turn,
    matrix_rate,
    parser,
    photographs,
    plain,
    ratio,
    report,
)
from reference import Reference, original, save_original
from torch.utils.flop_counter import FlopCounterMode

from bcseg_batch.intake.ignore import IgnoreRules
from bcseg_batch.segment import openvino
from bcseg_batch.segment.checkpoint import load_checkpoint
from bcseg_batch.segment.model import fold_normalisation
from bcseg_batch.segment.placement import AnyPredictor, Placement, available_cores
from bcseg_batch.segment.quantised import quantised_path
from bcseg_batch.service.build import SHIPPED_MODEL, Engine, build_engine
from bcseg_batch.service.process_dir import process_dir
from bcseg_batch.settings import load_settings
from bcseg_batch.store.images import SUFFIXES


class OnnxPredictor:
    """The same network in ONNX Runtime, one thread for each of two."""

    def __init__(self, path: Path, input_size_px: int, threads: int) -> None:
        import onnxruntime  # noqa: PLC0415 - of the extra `bench`

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        self._session = onnxruntime.InferenceSession(
            path, options, providers=["CPUExecutionProvider"]
        )
        self.placement = Placement("cpu", "float32", "ONNX Runtime")
        self.input_size_px = input_size_px

    def predict(self, batch: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
        """Run it image by image."""
        name = self._session.get_inputs()[0].name
        return np.concatenate(
            [self._session.run(None, {name: image})[0] for image in np.split(batch, len(batch))]
        )


def onnx_predictors(model: Path) -> list[AnyPredictor]:
    """Export a model and open it as often as the product opens its own."""
    checkpoint = load_checkpoint(model)
    size_px = checkpoint.spec.input_size_px
    lanes = 2 if available_cores() > 1 else 1
    with tempfile.TemporaryDirectory() as name, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        logging.disable(logging.WARNING)
        path = Path(name, "network.onnx")
        torch.onnx.export(
            fold_normalisation(checkpoint.model),
            (torch.zeros(1, 3, size_px, size_px),),
            path,
            dynamo=True,
            verbose=False,
        )
        logging.disable(logging.NOTSET)
        threads = max(1, available_cores() // lanes)
        return [OnnxPredictor(path, size_px, threads) for _ in range(lanes)]


class Silent:
    """Neither stops a run nor tells how it goes."""

    requested = False

    def start(self, total: int) -> None:
        """Nothing is told."""

    def advance(self, outcome: object) -> None:
        """Nothing is told."""


def engine(**settings: object) -> Engine:
    """Build what `process-dir` would build with such settings."""
    return build_engine(load_settings(None, settings, {}).settings)


def files_rate(
    built: Engine, source: Path, predictors: Sequence[AnyPredictor] | None = None
) -> float:
    """Process a folder; images per second."""
    with tempfile.TemporaryDirectory(prefix="bcseg-bench-") as out:
        summary = process_dir(
            source,
            Path(out),
            predictors=predictors or built.predictors,
            options=built.options,
            rules=IgnoreRules(SUFFIXES, ()),
            recursive=True,
            overwrite=True,
            stop=Silent(),
            progress=Silent(),
        )
    if not summary.is_whole:
        raise RuntimeError(f"not all images were done: {summary.failures[:3]}")
    return summary.images_per_s


def network_rate(predictors: Sequence[AnyPredictor], images: int) -> float:
    """Run the network alone, all predictors at once; images per second."""
    size_px = predictors[0].input_size_px
    batch = np.random.default_rng(0).random((images, 3, size_px, size_px), np.float32)
    parts = np.array_split(batch, len(predictors))
    threads = [
        threading.Thread(target=predictor.predict, args=(part,))
        for predictor, part in zip(predictors, parts, strict=True)
    ]
    begun_s = time.perf_counter()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return images / (time.perf_counter() - begun_s)


def reference_rate(reference: Reference, paths: Sequence[Path], out: Path) -> float:
    """Take images through the original; images per second."""
    torch.set_num_threads(available_cores())
    begun_s = time.perf_counter()
    for path in paths:
        reference.process(path, out)
    return len(paths) / (time.perf_counter() - begun_s)


def flops(model: Path) -> float:
    """Count the floating point operations of one image."""
    checkpoint = load_checkpoint(model)
    size_px = checkpoint.spec.input_size_px
    with FlopCounterMode(display=False) as counter, torch.inference_mode():
        checkpoint.model(torch.zeros(1, 3, size_px, size_px))
    return float(counter.get_total_flops())


def main() -> None:
    """Measure, and print the table."""
    command = parser(__doc__, images=24, rounds=3)
    command.add_argument("--model", type=Path, default=SHIPPED_MODEL, help="the shipped model")
    command.add_argument(
        "--without-wide", action="store_true", help="leave the width-64 checkpoint out"
    )
    arguments = command.parse_args()
    with tempfile.TemporaryDirectory(prefix="bcseg-bench-") as name:
        root = Path(name)
        figures = measure(root, arguments.images, arguments.rounds, arguments.model, arguments)
    report("Throughput, 1600 x 1200 JPEG to mask and composite", figures, arguments.json)


def measure(root: Path, images: int, rounds: int, model: Path, arguments: object) -> list[Figure]:
    """Measure everything in turn."""
    paths = photographs(root / "in", images)
    shown = {"outputs.cells": False, "model.file": str(model)}
    by_torch = engine(**shown, **{"model.backend": "torch"})
    network = original()
    save_original(root / "checkpoint.pth", network)
    few = paths[: max(1, min(2, images))]
    reference = functools.partial(reference_rate, Reference(network), few, root)
    calls: dict[str, Callable[[], float]] = {
        "original": reference,
        "torch": functools.partial(files_rate, by_torch, root / "in"),
        "torch, network alone": functools.partial(network_rate, by_torch.predictors, images),
        "torch, with cells": functools.partial(
            files_rate, engine(**{"model.backend": "torch", "model.file": str(model)}), root / "in"
        ),
        "matrices": lambda: matrix_rate(torch.float32),
    }
    precision = by_torch.placement.dtype
    if openvino.is_installed():
        same = engine(**shown, **{"model.backend": "openvino", "model.dtype": precision})
        calls["OpenVINO"] = functools.partial(files_rate, same, root / "in")
        if quantised_path(model).exists():
            rounded = engine(**shown, **{"model.backend": "openvino"})
            calls["8 bits"] = functools.partial(files_rate, rounded, root / "in")
            calls["8 bits, network alone"] = functools.partial(
                network_rate, rounded.predictors, images
            )
            with_cells = engine(**{"model.backend": "openvino", "model.file": str(model)})
            calls["8 bits, with cells"] = functools.partial(files_rate, with_cells, root / "in")
    calls["ONNX Runtime"] = functools.partial(
        files_rate, by_torch, root / "in", onnx_predictors(model)
    )
    if not getattr(arguments, "without_wide", False):
        (root / "few").mkdir()
        for path in paths[: max(2, images // 4)]:
            (root / "few" / path.name).symlink_to(path)
        wide = engine(
            **{
                "outputs.cells": False,
                "model.backend": "torch",
                "model.file": str(root / "checkpoint.pth"),
                "images.tiling": "never",  # random weights find cells of any size
            }
        )
        calls["width 64"] = functools.partial(files_rate, wide, root / "few")
    for call in calls.values():
        call()  # once for warmth, not counted
    found = in_turn(calls, rounds)
    work = flops(model)
    figures = [
        ratio(f"torch {precision} / original", found["torch"], found["original"], aim=60),
    ]
    if "8 bits" in found:
        figures.append(ratio("8 bits / original", found["8 bits"], found["original"], aim=100))
    if "width 64" in found:
        figures.append(ratio("width 64 / original", found["width 64"], found["original"], aim=6.5))
    figures += [
        ratio(
            "network alone, FLOP/s / matrix rate (float32)",
            [rate * work for rate in found["torch, network alone"]],
            found["matrices"],
            aim=0.9,
        ),
        ratio(
            "torch, with files / network alone",
            found["torch"],
            found["torch, network alone"],
            aim=0.8,
        ),
        ratio("torch, with cells / without", found["torch, with cells"], found["torch"]),
    ]
    if "OpenVINO" in found:
        figures.append(
            ratio(f"torch / OpenVINO, both {precision}", found["torch"], found["OpenVINO"], aim=1)
        )
    if "8 bits" in found:
        figures += [
            ratio(
                "8 bits, with files / network alone",
                found["8 bits"],
                found["8 bits, network alone"],
                aim=0.8,
            ),
            ratio("8 bits, with cells / without", found["8 bits, with cells"], found["8 bits"]),
            ratio("8 bits / torch", found["8 bits"], found["torch"]),
        ]
    figures.append(ratio("torch / ONNX Runtime", found["torch"], found["ONNX Runtime"]))
    figures += [
        plain(f"{name}, images per second", rates, "/s")
        for name, rates in found.items()
        if name != "matrices"
    ]
    figures.append(Figure("one image through the network", work / 1e9, "GFLOP"))
    figures.append(
        Figure("matrix rate while measuring", statistics.median(found["matrices"]) / 1e9, "GFLOP/s")
    )
    return figures


if __name__ == "__main__":
    main()
