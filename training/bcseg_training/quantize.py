"""Makes the 8-bit form of a network: ranges taken from images, weights rounded (NNCF)."""

from __future__ import annotations

import hashlib
import logging
import os
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from loguru import logger

from bcseg_batch.errors import ImageError, UsageError
from bcseg_batch.segment import openvino as openvino_backend
from bcseg_batch.segment.checkpoint import load_checkpoint
from bcseg_batch.segment.placement import Placement
from bcseg_batch.segment.postprocess import probability
from bcseg_batch.segment.predictor import Predictor
from bcseg_batch.segment.preprocess import preprocess
from bcseg_batch.segment.quantised import Quantised, QuantisedSpec, quantised_path, save_quantised
from bcseg_batch.store.images import decode_image
from bcseg_training.dataset import MAX_PIXELS
from bcseg_training.metrics import score_mask
from bcseg_training.profile import training_images

# Of each folder in turn, so that no laboratory is forgotten, one image in so many is kept back to
# see how far the two forms agree.
_KEEP_BACK = 5


@dataclass(frozen=True, slots=True)
class Agreement:
    """How an 8-bit network agrees with its own in float32, on images it was not made with.

    Attributes:
        path: of the file that was written.
        calibration_images: how many it was made with.
        images: how many it was compared on.
        dice: mean Dice coefficient of the two masks, in [0, 1].
        mean_shift: mean difference of the probabilities.
        largest_shift: the largest.
        size_bytes: of the file.
    """

    path: Path
    calibration_images: int
    images: int
    dice: float
    mean_shift: float
    largest_shift: float
    size_bytes: int


def quantize(
    checkpoint: Path, folders: Sequence[Path], *, out: Path | None = None, count: int, seed: int
) -> Agreement:
    """Write the 8-bit form of a checkpoint, and compare the two.

    Args:
        checkpoint: the model file; stays as it is.
        folders: what it was trained on; see `training_images`.
        out: where to; None writes beside the checkpoint, where the service looks for it.
        count: images to take the ranges from; as many as there are, where there are fewer.
        seed: of the choice of images.

    Raises:
        CheckpointError: the model cannot be loaded.
        UsageError: a folder cannot be used, or there are too few images.
        OutputError: the file cannot be written.
        ModuleNotFoundError: OpenVINO or NNCF is not installed.
    """
    nncf = _silent_nncf()
    import openvino  # noqa: PLC0415 - an extra, and after its telemetry is off

    loaded = load_checkpoint(checkpoint)
    size_px = loaded.spec.input_size_px
    chosen = _choose(folders, count + max(2, count // _KEEP_BACK), seed)
    inputs = [tensor for path in chosen if (tensor := _read(path, size_px)) is not None]
    if len(inputs) < 2:
        raise UsageError(
            f"{len(inputs)} readable images are too few: one is needed to take the ranges from, "
            "and one to compare with"
        )
    # Of few, one in five is kept back all the same.
    used_count = min(count, len(inputs) - max(1, len(inputs) // (_KEEP_BACK + 1)))
    used, others = inputs[:used_count], inputs[used_count:]
    exact = Predictor(loaded.model, Placement("cpu", "float32", "to compare with"), size_px)
    network = openvino_backend.convert(loaded.model, size_px)
    # Where colours come in and probabilities go out, rounding shows most and costs least.
    convolutions = [op for op in network.get_ordered_ops() if op.get_type_name() == "Convolution"]
    ends = [convolutions[0].get_friendly_name(), convolutions[-1].get_friendly_name()]
    network = nncf.quantize(
        network,
        nncf.Dataset([tensor[np.newaxis] for tensor in used]),
        preset=nncf.QuantizationPreset.MIXED,
        target_device=nncf.TargetDevice.CPU,
        subset_size=len(used),
        ignored_scope=nncf.IgnoredScope(names=ends),
    )
    graph, constants = _serialised(network)
    spec = QuantisedSpec(
        checkpoint_sha256=loaded.sha256,
        input_size_px=size_px,
        out_channels=loaded.spec.out_channels,
        constants_sha256=hashlib.sha256(constants).hexdigest(),
        mean_shift=1.0,  # not known yet
        calibration_images=len(used),
        made_by=f"openvino {openvino.__version__}, nncf {nncf.__version__}",
    )
    quantised = Quantised(spec, graph, constants, openvino_backend.pattern_answer(exact))
    rounded = openvino_backend.open_quantised(quantised, "to compare")
    shift = openvino_backend.mean_shift(rounded, quantised)
    quantised = replace(quantised, spec=spec.model_copy(update={"mean_shift": shift}))
    path = out or quantised_path(checkpoint)
    save_quantised(path, quantised)
    shifts, dices = [], []
    for tensor in others:
        ours, theirs = (
            probability(predictor.predict(tensor[np.newaxis])[0]) for predictor in (rounded, exact)
        )
        shifts.append(np.abs(ours - theirs))
        masks = (soft[0] > loaded.spec.threshold for soft in (ours, theirs))
        dices.append(score_mask(*masks).dice)
    return Agreement(
        path,
        len(used),
        len(others),
        float(np.mean(dices)),
        float(np.mean([shift.mean() for shift in shifts])),
        float(max(shift.max() for shift in shifts)),
        path.stat().st_size,
    )


def _silent_nncf() -> Any:
    """Import NNCF without its telemetry, which would be sent unasked, and without its tables."""
    os.environ.setdefault("NNCF_CI", "1")
    import nncf  # noqa: PLC0415 - an extra

    nncf.set_log_level(logging.ERROR)
    return nncf


def _choose(folders: Sequence[Path], count: int, seed: int) -> list[Path]:
    """Choose images, from each folder in turn as long as it has any."""
    generator = np.random.default_rng(seed)
    piles = []
    for folder in folders:
        images = sorted(training_images(folder))
        piles.append([images[i] for i in generator.permutation(len(images))])
    chosen: list[Path] = []
    while len(chosen) < count and any(piles):
        for pile in piles:
            if pile and len(chosen) < count:
                chosen.append(pile.pop())
    return chosen


def _read(path: Path, size_px: int) -> npt.NDArray[np.float32] | None:
    try:
        return preprocess(decode_image(path, max_pixels=MAX_PIXELS).pixels, size_px)
    except ImageError as error:
        logger.warning("{}: left out", error)
        return None


def _serialised(network: object) -> tuple[bytes, bytes]:
    import openvino  # noqa: PLC0415 - an extra

    with tempfile.TemporaryDirectory(prefix="bcseg-quantize-") as name:
        place = Path(name, "network.xml")
        openvino.save_model(network, place)
        return place.read_bytes(), place.with_suffix(".bin").read_bytes()
