"""Measures how the training images look, so that a model can tell what is unlike them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt

from bcseg_batch.errors import UsageError
from bcseg_batch.segment.cells import CellKind, find_cells
from bcseg_batch.segment.checkpoint import Checkpoint, load_checkpoint, save_checkpoint
from bcseg_batch.segment.devices import open_predictor
from bcseg_batch.segment.measure import measure_cells
from bcseg_batch.segment.postprocess import probability
from bcseg_batch.segment.predictor import Predictor
from bcseg_batch.segment.preprocess import resize_rgb, to_network_input
from bcseg_batch.segment.quality import (
    LOOK_NAMES,
    Measures,
    TrainingStatistics,
    mean_solidity,
    measure_quality,
)
from bcseg_batch.store.images import decode_image
from bcseg_training.dataset import MAX_PIXELS, usable_pairs
from bcseg_training.voc import boxed_images, held_out_stems

# So much further than the hundredth furthest training image is still like them: a new slide of the
# same laboratory is never quite like those before.
_QUANTILE = 0.99
_MARGIN = 1.5
# Keeps the distance finite where the training images hardly differ in a feature.
_LEAST_DEVIATION = 0.05


def measure_image(
    checkpoint: Checkpoint, predictor: Predictor, pixels: npt.NDArray[np.uint8]
) -> tuple[Measures, int]:
    """Measure an image as the service does where it stretches it in one piece.

    Args:
        checkpoint: says what the channels are.
        predictor: of its network.
        pixels: uint8 (H, W, 3) RGB.

    Returns:
        The measures, and how many red and white cells were found.
    """
    size_px = predictor.input_size_px
    thumbnail = resize_rgb(pixels, size_px)
    soft = probability(predictor.predict(to_network_input(thumbnail)[np.newaxis])[0])
    spec = checkpoint.spec
    cells = find_cells(soft, spec.class_names, (size_px, size_px), threshold=spec.threshold)
    table = measure_cells(cells, thumbnail)
    is_cell = cells.kinds != CellKind.PLATELET
    solidity, area, diameter = (
        np.asarray(table[name], np.float64)
        for name in ("solidity", "area", "equivalent_diameter_area")
    )
    measures = measure_quality(
        thumbnail,
        soft[0],
        float(np.median(diameter[is_cell])) if is_cell.any() else None,
        solidity=mean_solidity(solidity, area, is_cell & ~cells.touches_border),
        threshold=spec.threshold,
    )
    return measures, cells.cell_count


def statistics_of(looks: Iterable[Sequence[float]]) -> TrainingStatistics:
    """Describe many images by mean, covariance and the distance that few of them exceed.

    Args:
        looks: the features of each image, as `LOOK_NAMES`.

    Raises:
        UsageError: there are too few to describe.
    """
    table = np.array(list(looks), np.float64)
    least = 2 * len(LOOK_NAMES)
    if len(table) < least:
        raise UsageError(
            f"{len(table)} images with cells are too few to tell how the training images look: "
            f"give at least {least}"
        )
    mean = table.mean(axis=0)
    covariance = np.cov(table, rowvar=False) + _LEAST_DEVIATION**2 * np.eye(len(LOOK_NAMES))
    precision = np.linalg.inv(covariance)
    precision = (precision + precision.T) / 2
    offset = table - mean
    distances = np.sqrt(np.einsum("ij,jk,ik->i", offset, precision, offset))
    return TrainingStatistics(
        mean=tuple(mean.tolist()),
        precision=tuple(tuple(row) for row in precision.tolist()),
        limit=_MARGIN * float(np.quantile(distances, _QUANTILE)),
        count=len(table),
    )


def training_images(folder: Path) -> list[Path]:
    """List the images of a folder that training uses.

    Args:
        folder: a data set with `train`, a folder with `original` and `mask` (what
            `bcseg-train synth` wrote is one), or with `images` and VOC `annotations`, of which
            those held out are left out.

    Raises:
        UsageError: it is none of these, or holds no usable image.
    """
    if (folder / "annotations").is_dir():
        kept_out = held_out_stems()
        return [item.image for item in boxed_images(folder) if item.stem not in kept_out]
    train = folder / "train"
    return [pair.original for pair in usable_pairs(train if train.is_dir() else folder)]


def profile(
    checkpoint: Path, folders: Sequence[Path], out: Path, *, device: str = "auto"
) -> TrainingStatistics:
    """Write a copy of a model file that knows how its training images look.

    Args:
        checkpoint: the model file; stays as it is.
        folders: what it was trained on; see `training_images`.
        out: a new `.safetensors` file.
        device: where the network runs.

    Raises:
        CheckpointError: the model cannot be loaded.
        UsageError: a folder cannot be used, or there are too few images.
        ImageError: an image cannot be read.
        OutputError: the copy cannot be written.
    """
    if out.suffix != ".safetensors":
        raise UsageError(f"{out} does not end in .safetensors, which alone holds such statistics")
    if out.exists():
        raise UsageError(f"{out} exists: name a new file")
    loaded = load_checkpoint(checkpoint)
    predictor = open_predictor(
        loaded.model, loaded.spec.input_size_px, device=device, dtype="float32"
    )

    def looks() -> Iterator[Sequence[float]]:
        for folder in folders:
            for image in training_images(folder):
                pixels = decode_image(image, max_pixels=MAX_PIXELS).pixels
                look = measure_image(loaded, predictor, pixels)[0].look
                if look is not None:
                    yield look

    statistics = statistics_of(looks())
    spec = loaded.spec.model_copy(update={"training_statistics": statistics})
    save_checkpoint(out, loaded.model, spec)
    return statistics
