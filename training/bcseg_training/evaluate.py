"""Judges a model on images whose masks are known."""

from __future__ import annotations

import csv
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import numpy as np
import numpy.typing as npt

from bcseg_batch.segment.checkpoint import load_checkpoint
from bcseg_batch.segment.postprocess import mask_from_probability, probability
from bcseg_batch.segment.predictor import Predictor, open_predictor
from bcseg_batch.segment.preprocess import preprocess
from bcseg_batch.store.outputs import output_error
from bcseg_training.dataset import Pair, read_pair, usable_pairs
from bcseg_training.metrics import MaskScore, score_mask
from bcseg_training.plots import save_panel


@dataclass(frozen=True, slots=True)
class Judged:
    """One image, what was found in it and how good that is.

    Attributes:
        stem: of the pair.
        pixels: uint8 (H, W, 3) RGB.
        truth: bool (H, W).
        mask: bool (H, W).
        score: agreement at full image size.
    """

    stem: str
    pixels: npt.NDArray[np.uint8]
    truth: npt.NDArray[np.bool_]
    mask: npt.NDArray[np.bool_]
    score: MaskScore


def predict_and_score(
    predictor: Predictor, pairs: Sequence[Pair], *, threshold: float = 0.5
) -> Iterator[Judged]:
    """Segment each original as the product does, and compare at full image size.

    Raises:
        UsageError: an image or mask cannot be read, or their sizes differ.
    """
    for pair in pairs:
        pixels, grey = read_pair(pair)
        truth = grey > 127
        logits = predictor.predict(preprocess(pixels, predictor.input_size_px)[np.newaxis])
        soft = probability(logits[0, 0])
        mask = mask_from_probability(soft, truth.shape, threshold) > 0
        yield Judged(pair.stem, pixels, truth, mask, score_mask(mask, truth))


def mean_scores(scores: Sequence[MaskScore]) -> MaskScore:
    """Average each score over the images."""
    return MaskScore(
        *(float(np.mean([getattr(s, f.name) for s in scores])) for f in fields(MaskScore))
    )


def write_scores_csv(path: Path, scores: Sequence[tuple[str, MaskScore]]) -> None:
    """Write one row per image, and a last row with the means."""
    names = [f.name for f in fields(MaskScore)]
    with path.open("w", newline="", encoding="utf-8", errors="surrogateescape") as file:
        writer = csv.DictWriter(file, ["image", *names])
        writer.writeheader()
        rows = [*scores, ("mean", mean_scores([score for _, score in scores]))]
        for stem, score in rows:
            writer.writerow({"image": stem, **{k: f"{v:.6f}" for k, v in asdict(score).items()}})


def evaluate(
    checkpoint: Path,
    dataset: Path,
    *,
    out: Path | None,
    threshold: float | None,
    worst: int,
    device: str,
) -> tuple[list[tuple[str, MaskScore]], MaskScore]:
    """Judge a model file on a folder of originals and masks.

    Args:
        checkpoint: the model file.
        dataset: folder with `original` and `mask`.
        out: where `scores.csv` and `worst.png` go; None writes nothing.
        threshold: None takes the checkpoint's own.
        worst: how many images the page of worst cases shows.
        device: where the network runs.

    Returns:
        Stem and score of each image in order of stem, and the mean.

    Raises:
        CheckpointError: the model cannot be loaded.
        UsageError: the data set cannot be used.
        OutputError: the results cannot be written.
    """
    loaded = load_checkpoint(checkpoint)
    predictor = open_predictor(
        loaded.model, loaded.spec.input_size_px, device=device, dtype="float32"
    )
    scores: list[tuple[str, MaskScore]] = []
    page: list[Judged] = []
    for judged in predict_and_score(
        predictor,
        usable_pairs(dataset),
        threshold=loaded.spec.threshold if threshold is None else threshold,
    ):
        scores.append((judged.stem, judged.score))
        # Only the worst are kept: a large data set must not fill the memory with its pictures.
        page = sorted([*page, judged], key=lambda j: j.score.dice)[:worst]
    if out is not None:
        try:
            out.mkdir(parents=True, exist_ok=True)
            write_scores_csv(out / "scores.csv", scores)
            save_panel(
                [
                    (f"{j.stem[:24]}  Dice {j.score.dice:.3f}", j.pixels, j.mask, j.truth)
                    for j in page
                ],
                out / "worst.png",
            )
        except OSError as error:
            raise output_error(out, error) from error
    return scores, mean_scores([score for _, score in scores])
