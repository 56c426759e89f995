"""Small real parts that the tests of the service share."""

from __future__ import annotations

import contextlib
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
import torch
from PIL import Image

from bcseg_batch.intake.ignore import IgnoreRules
from bcseg_batch.items import InputFile, Outcome
from bcseg_batch.remote.url import Place
from bcseg_batch.segment.model import UNet
from bcseg_batch.segment.placement import AnyPredictor, Placement
from bcseg_batch.segment.spec import ModelSpec
from bcseg_batch.service.pipeline import Names, Pipeline, PipelineOptions
from bcseg_batch.service.places import Inputs, Outputs
from bcseg_batch.service.process_dir import OpenEngine, Progress, Stop, Summary, process_dir
from bcseg_batch.store.images import SUFFIXES

INPUT_SIZE_PX = 64
CPU = Placement("cpu", "float32", "for a test")
OPTIONS = PipelineOptions(
    threshold=0.5,
    batch_size=4,
    workers=2,
    max_wait_s=0.05,
    max_pixels=100_000_000,
    page=0,
    pixel_size_um=None,
    class_names=("cell",),
    cells=True,
    labels=False,
    tiling=False,
    statistics=None,
    composite_format="jpg",
    composite_quality=90,
    colour=(160, 0, 20),
    alpha=0.3,
    model_sha256="a" * 64,
    settings_sha256="b" * 64,
)


def tiny_network(seed: int = 0) -> tuple[UNet, ModelSpec]:
    """Make a network of some hundred weights that marks about half of the pixels."""
    spec = ModelSpec(width=2, depth=2, input_size_px=INPUT_SIZE_PX)
    torch.manual_seed(seed)
    model = spec.build().eval()
    noise = torch.rand(1, 3, INPUT_SIZE_PX, INPUT_SIZE_PX)
    with torch.no_grad():
        model.head.weight.mul_(100)
        model.head.bias.sub_(model(noise).median())
    return model, spec


class BrightIsCell:
    """A predictor without a network: a pixel is a cell where it is bright."""

    placement = CPU
    input_size_px = INPUT_SIZE_PX

    def __init__(self) -> None:
        self.batches: list[int] = []

    def predict(self, batch: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
        self.batches.append(len(batch))
        return 20 * (batch.mean(axis=1, keepdims=True) - np.float32(0.5))


class NeverStop:
    requested = False


class Quiet:
    def start(self, total: int, *, is_whole: bool) -> None:
        pass

    def expect(self, total: int, *, is_whole: bool) -> None:
        pass

    def advance(self, outcome: Outcome | None) -> None:
        pass


def write_smear(path: Path, seed: int = 0, size_wh: tuple[int, int] = (40, 30)) -> Path:
    """Write a picture of noise; the format follows the suffix."""
    path.parent.mkdir(parents=True, exist_ok=True)
    shape = (size_wh[1], size_wh[0], 3)
    pixels = np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)
    Image.fromarray(pixels).save(path)
    return path


def input_file(path: Path, root: Path) -> InputFile:
    facts = path.stat()
    return InputFile(path, path.relative_to(root).as_posix(), facts.st_size, facts.st_mtime_ns)


def local_engine(predictor: AnyPredictor, options: PipelineOptions = OPTIONS) -> OpenEngine:
    """Give what makes the pipeline of this machine, for `process_dir`."""

    def open_pipeline(inputs: Inputs, outputs: Outputs, names: Names) -> Pipeline:
        return Pipeline([predictor], outputs, names, options, inputs=inputs)

    return open_pipeline


def run_folder(
    source: Place,
    output: Place,
    *,
    predictor: AnyPredictor | None = None,
    options: PipelineOptions = OPTIONS,
    recursive: bool = True,
    overwrite: bool = False,
    stop: Stop | None = None,
    progress: Progress | None = None,
    **changes: object,
) -> Summary:
    """Run `process_dir` with everything small, and silent unless a progress is given."""
    return process_dir(
        source,
        output,
        engine=local_engine(predictor or BrightIsCell(), replace(options, **changes)),
        rules=IgnoreRules(SUFFIXES),
        recursive=recursive,
        overwrite=overwrite,
        stop=stop or NeverStop(),
        progress=progress or Quiet(),
    )


def tree(root: Path) -> dict[str, bytes]:
    """Give every file below a folder with its content."""
    return {
        path.relative_to(root).as_posix(): path.read_bytes()
        for path in root.rglob("*")
        if path.is_file()
    }


@contextlib.contextmanager
def as_plain_user() -> Iterator[Path]:
    """Go on without root's right to everything; gives a folder that is that user's own."""
    folder = Path(tempfile.mkdtemp(prefix="bcseg-test-"))
    is_root = os.geteuid() == 0
    try:
        if is_root:
            os.chown(folder, 65534, 65534)
            try:
                os.seteuid(65534)
            except OSError:
                pytest.skip("not on this machine: root cannot become another user")
        yield folder
    finally:
        if is_root:
            os.seteuid(0)
        for parent, _, _ in os.walk(folder):
            Path(parent).chmod(0o700)
        shutil.rmtree(folder)


def command() -> str:
    """Find the installed command beside the interpreter that runs the tests."""
    found = shutil.which("bcseg-batch", path=str(Path(sys.executable).parent))
    assert found, "bcseg-batch is not installed beside this Python"
    return found
