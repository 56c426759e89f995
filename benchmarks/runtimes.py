"""The same network in another runtime, with the same files around it.

    python benchmarks/runtimes.py --runtime openvino|onnxruntime --input DIR [--output DIR]
        [--model FILE] [--images N]

One worker for each core takes images from file to files: decoded, resized, cut, tinted, encoded and
forced to disk by bcseg-batch's own functions, with the network on one thread of the runtime between
them. Nothing waits for anything, so this is what the runtime can do at best around these files; no
records, no cells, no tiles, no order. The network is exported in memory, in the precision of its
weights; a runtime that computes in bfloat16 by itself where the processor can is left to.

Needs the extra `bench`. Prints everything as JSON, as its last line.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeAlias

import cv2
import numpy as np
import numpy.typing as npt
import torch

from bcseg_batch.allocator import keep_freed_memory
from bcseg_batch.segment.checkpoint import Checkpoint, load_checkpoint
from bcseg_batch.segment.placement import available_cores
from bcseg_batch.segment.postprocess import (
    Blend,
    composite_image,
    mask_from_probability,
    probability,
)
from bcseg_batch.segment.preprocess import preprocess
from bcseg_batch.service.build import SHIPPED_MODEL
from bcseg_batch.settings import Settings
from bcseg_batch.store.encode import encode_jpeg, encode_png
from bcseg_batch.store.images import decode_image
from bcseg_batch.store.outputs import OutputFolder

Floats: TypeAlias = npt.NDArray[np.float32]
Infer: TypeAlias = Callable[[Floats], Floats]
RUNTIMES = ("openvino", "onnxruntime")


def export_onnx(checkpoint: Checkpoint) -> bytes:
    """Write the network as ONNX, for one image at a time, from `image` to `logits`."""
    size_px = checkpoint.spec.input_size_px
    program = torch.onnx.export(
        checkpoint.model,
        (torch.zeros(1, 3, size_px, size_px),),
        input_names=["image"],
        output_names=["logits"],
        dynamo=True,
        verbose=False,
    )
    assert program is not None, "an exported program comes back where no file is named"
    network: bytes = program.model_proto.SerializeToString()
    return network


def open_openvino(network: bytes, lanes: int) -> tuple[Callable[[], Infer], str]:
    """Compile for the processor, with as many streams as there are workers."""
    import openvino  # noqa: PLC0415 - of the extra `bench`

    core = openvino.Core()
    compiled = core.compile_model(
        core.read_model(network),
        "CPU",
        {"NUM_STREAMS": lanes, "INFERENCE_NUM_THREADS": lanes, "ENABLE_CPU_PINNING": False},
    )
    precision = str(compiled.get_property("INFERENCE_PRECISION_HINT").to_string())

    def lane() -> Infer:
        request = compiled.create_infer_request()

        def infer(batch: Floats) -> Floats:
            (logits,) = request.infer([batch]).values()
            return np.array(logits, np.float32)

        return infer

    return lane, {"f32": "float32", "bf16": "bfloat16"}.get(precision, precision)


def open_onnxruntime(network: bytes, lanes: int) -> tuple[Callable[[], Infer], str]:
    """Open one session on one thread, which all workers call."""
    import onnxruntime  # noqa: PLC0415 - of the extra `bench`

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(network, options, providers=["CPUExecutionProvider"])
    del lanes  # a session runs in the thread of whoever calls it

    def infer(batch: Floats) -> Floats:
        (logits,) = session.run(["logits"], {"image": batch})
        result: Floats = logits
        return result

    return (lambda: infer), "float32"


OPEN = {"openvino": open_openvino, "onnxruntime": open_onnxruntime}


def run(runtime: str, model: Path, paths: list[Path], output: Path) -> dict[str, Any]:
    """Take all images through; give when each was through."""
    keep_freed_memory()
    cv2.setNumThreads(1)
    settings, lanes = Settings(), available_cores()
    checkpoint = load_checkpoint(model)
    spec = checkpoint.spec
    lane, dtype = OPEN[runtime](export_onnx(checkpoint), lanes)
    table = Blend.of(settings.outputs.colour, settings.outputs.alpha)
    pending = iter(paths)
    finished_s: list[float] = []

    with OutputFolder(output) as outputs:

        def work(infer: Infer) -> None:
            for path in pending:  # a list's iterator is safe to share
                pixels = decode_image(path, max_pixels=settings.images.max_pixels).pixels
                soft = probability(infer(preprocess(pixels, spec.input_size_px)[np.newaxis])[0, 0])
                mask = mask_from_probability(soft, pixels.shape[:2], spec.threshold)
                composite = composite_image(pixels, mask, table)
                jpeg = encode_jpeg(composite, quality=settings.outputs.composite_quality)
                outputs.write(f"composites/{path.stem}_bloodred.jpg", jpeg)
                outputs.write(f"masks/{path.stem}_mask.png", encode_png(mask))
                finished_s.append(time.monotonic())

        with ThreadPoolExecutor(lanes) as pool:
            list(pool.map(work, [lane() for _ in range(lanes)]))
        outputs.sync()
    return {"images": len(paths), "finished_s": finished_s, "runs_on": f"cpu {dtype}"}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--runtime", choices=RUNTIMES, required=True)
    parser.add_argument("--input", type=Path, required=True, help="folder of photographs")
    parser.add_argument("--output", type=Path, help="folder for masks and composites")
    parser.add_argument("--model", type=Path, default=SHIPPED_MODEL)
    parser.add_argument("--images", type=int, help="at most so many")
    options = parser.parse_args()
    paths = sorted(options.input.iterdir())[: options.images]
    with tempfile.TemporaryDirectory(dir=options.input.parent) as name:
        output = options.output or Path(name, "out")
        figures = run(options.runtime, options.model, paths, output)
    print(json.dumps(figures))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
