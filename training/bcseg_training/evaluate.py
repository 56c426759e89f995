"""Judges a model on images whose truth is known: masks, cells or boxes."""

from __future__ import annotations

import csv
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from bcseg_batch.errors import ImageError, UsageError
from bcseg_batch.segment.cells import Cells
from bcseg_batch.segment.checkpoint import Checkpoint, load_checkpoint
from bcseg_batch.segment.devices import open_predictor
from bcseg_batch.segment.openvino import OpenVinoPredictor, open_quantised
from bcseg_batch.segment.postprocess import (
    mask_from_probability,
    probability,
    resize_probability,
)
from bcseg_batch.segment.predictor import Predictor
from bcseg_batch.segment.preprocess import preprocess
from bcseg_batch.segment.quantised import find_quantised, lacks_8_bits
from bcseg_batch.store.images import decode_image
from bcseg_batch.store.outputs import output_error, write_whole
from bcseg_training.dataset import MAX_PIXELS, Pair, read_pair, usable_pairs, validation_folder
from bcseg_training.instances import (
    FRAME,
    Labels,
    box_score,
    calibration_error,
    cells_only,
    instance_score,
    reliability,
)
from bcseg_training.metrics import MaskScore, score_mask
from bcseg_training.plots import CellsPicture, save_cells_page, save_reliability
from bcseg_training.segmenting import Segment, Segmented, by_network, by_otsu
from bcseg_training.specimens import MIN_CELL_PX, components, read_labels
from bcseg_training.synthetic import Kind
from bcseg_training.voc import Box, BoxedImage, boxed_images, held_out_stems, read_boxes


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


# --- data sets -----------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Item:
    """One image to be judged on.

    Attributes:
        stem: its name.
        pixels: uint8 (H, W, 3) RGB.
        truth: bool (H, W), where masks are known.
        cells: int32 (H, W), the true cells, 1..n, where masks are known.
        boxes: where these are all that is known.
        is_complete: whether the truth has the cells that the border cuts.
    """

    stem: str
    pixels: npt.NDArray[np.uint8]
    truth: npt.NDArray[np.bool_] | None
    cells: Labels | None
    boxes: tuple[Box, ...]
    is_complete: bool


def read_items(folder: Path, limit: int | None = None) -> Iterator[Item]:
    """List a folder to judge on, and read its images one by one as they are drawn.

    Args:
        folder: a data set with `val` or `test`; a folder with `original` and `mask`, in which the
            connected components are the cells unless labels lie beside them, as `bcseg-train synth`
            and `import-corrections` write them; or one with `images` and VOC `annotations`, of
            which only the images held out from training are taken, where any of them is there.
        limit: take the first so many images.

    Raises:
        UsageError: it is none of these (told at once), or something in it cannot be used.
    """
    try:
        if (folder / "annotations").is_dir():
            every = boxed_images(folder)
            held_out = held_out_stems()
            chosen = [image for image in every if image.stem in held_out] or list(every)
            return _read_boxed(folder, chosen[:limit])
        if not any((folder / name).is_dir() for name in ("original", "mask")):
            try:
                folder = validation_folder(folder)
            except UsageError as error:
                raise UsageError(
                    f"{folder} is no folder to judge on: give one with original and mask, one with "
                    "images and VOC annotations, or a data set with val"
                ) from error
        return _read_masked(folder, usable_pairs(folder)[:limit])
    except OSError as error:
        raise UsageError(f"{folder} cannot be read: {error.strerror}: mend its rights") from error


def _read_boxed(folder: Path, images: Sequence[BoxedImage]) -> Iterator[Item]:
    for image in images:
        try:
            pixels = decode_image(image.image, max_pixels=MAX_PIXELS).pixels
        except ImageError as error:
            raise UsageError(f"cannot judge on {folder}: {error}") from error
        boxes = read_boxes(image.annotation)
        yield Item(image.stem, pixels, None, None, boxes, is_complete=False)


def _read_masked(folder: Path, pairs: Sequence[Pair]) -> Iterator[Item]:
    for pair in pairs:
        pixels, mask = read_pair(pair)
        truth = mask > 127
        drawn = any(
            (folder / name).is_file()
            for name in (f"labels/{pair.stem}.tif", f"kinds/{pair.stem}.csv")
        )
        if drawn:
            labels, kinds = read_labels(folder, pair.stem)
            if labels.shape != truth.shape or labels.max(initial=0) > len(kinds):
                raise UsageError(
                    f"{folder}: the labels or kinds of {pair.stem} do not fit its mask: make the "
                    "folder anew with bcseg-train synth"
                )
            cells = _without_platelets(labels, kinds)
        else:
            cells = components(truth, min_px=MIN_CELL_PX)
        yield Item(pair.stem, pixels, truth, cells, (), is_complete=drawn)


def _without_platelets(labels: Labels, kinds: npt.NDArray[np.uint8]) -> Labels:
    keep = np.append(False, kinds != Kind.PLATELET)
    return np.where(keep, np.cumsum(keep), 0).astype(np.int32)[labels]


# --- scores --------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Row:
    """What one way of segmenting came to on one image.

    Attributes:
        stem: of the image.
        scores: by name; which there are depends on what is known of the image; NaN where there
            was nothing to judge by.
        tile_scale: of the tiles; None where the image was taken in one piece.
    """

    stem: str
    scores: Mapping[str, float]
    tile_scale: float | None


@dataclass(frozen=True, slots=True)
class Report:
    """What one way of segmenting came to on one folder.

    Attributes:
        scores: means over the images, or for boxes sums over them, by name; NaN where there was
            nothing to judge by.
        rows: one for each image, in order of stem.
        reliability: float64 (3, bins), of `instances.reliability`; zeros where it is not known.
        tiled: how many images were taken in tiles.
    """

    scores: Mapping[str, float]
    rows: tuple[Row, ...]
    reliability: npt.NDArray[np.float64]
    tiled: int


def score_image(found: Segmented, item: Item) -> dict[str, float]:
    """Compare what was found in one image with all that is known of it."""
    if item.truth is None or item.cells is None:
        score = box_score([(found.cells, item.boxes)])
        return {"recall": score.recall, "precision": score.precision, "f1": score.f1}
    scores = asdict(score_mask(found.mask, item.truth))
    y, x = (round(FRAME * side) for side in item.truth.shape)
    inner = (slice(y, -y or None), slice(x, -x or None))
    scores["dice_in_frame"] = score_mask(found.mask[inner], item.truth[inner]).dice
    cells = instance_score(cells_only(found.cells), item.cells, forgive_frame=not item.is_complete)
    return {**scores, **asdict(cells)}


@dataclass(slots=True)
class _Judge:
    """Collects the scores of one way of segmenting over the images of one folder."""

    segment: Segment
    rows: list[Row] = field(default_factory=list)
    reliability: npt.NDArray[np.float64] = field(default_factory=lambda: np.zeros((3, 15)))
    boxed: list[tuple[Cells, tuple[Box, ...]]] = field(default_factory=list)

    def look_at(self, item: Item) -> Segmented:
        try:
            found = self.segment(item.pixels)
        except ImageError as error:
            raise UsageError(f"cannot judge on {item.stem}: {error}") from error
        self.rows.append(Row(item.stem, score_image(found, item), found.tile_scale))
        if item.truth is None:
            self.boxed.append((found.cells, item.boxes))
        elif found.soft is not None:
            soft = resize_probability(found.soft, item.pixels.shape[:2])
            self.reliability = self.reliability + reliability(soft, item.truth)
        return found

    def report(self) -> Report:
        if self.boxed:
            scores = asdict(box_score(self.boxed))
        else:
            names = self.rows[0].scores
            scores = {n: float(np.mean([row.scores[n] for row in self.rows])) for n in names}
        if self.reliability.any():
            scores["calibration_error"] = calibration_error(self.reliability)
        tiled = sum(row.tile_scale is not None for row in self.rows)
        return Report(scores, tuple(self.rows), self.reliability, tiled)


@dataclass(frozen=True, slots=True)
class Judgement:
    """A model and the baseline on one folder.

    Attributes:
        name: of the folder, with that of its parent.
        model: what the model came to.
        baseline: what Otsu's threshold came to; None where it was left out.
    """

    name: str
    model: Report
    baseline: Report | None


def _open_8_bits(loaded: Checkpoint) -> OpenVinoPredictor:
    quantised = find_quantised(loaded.path, loaded.sha256)
    if quantised is None:
        raise lacks_8_bits(loaded.path)
    return open_quantised(quantised, "to be judged")


def evaluate(
    checkpoint: Path,
    folders: Sequence[Path],
    *,
    out: Path | None = None,
    threshold: float | None = None,
    worst: int = 6,
    limit: int | None = None,
    baseline: bool = True,
    tiling: bool = True,
    device: str = "auto",
    in_8_bits: bool = False,
) -> Iterator[Judgement]:
    """Judge a model file on folders whose truth is known, beside Otsu's threshold.

    Args:
        checkpoint: the model file.
        folders: see `read_items`.
        out: where `scores.json`, `scores.csv`, `reliability.png` and for each folder
            `worst-<name>.png` go; None writes nothing.
        threshold: None takes the checkpoint's own.
        worst: how many images the pages of worst cases show.
        limit: the most images of each folder.
        baseline: False leaves Otsu out.
        tiling: False stretches every image in one piece.
        device: where the network runs.
        in_8_bits: judge the model's 8-bit form.

    Yields:
        One judgement for each folder, as soon as it is there.

    Raises:
        CheckpointError: the model cannot be loaded.
        UsageError: a folder cannot be used.
        OutputError: the results cannot be written.
    """
    loaded = load_checkpoint(checkpoint)
    predictor = (
        _open_8_bits(loaded)
        if in_8_bits
        else open_predictor(loaded.model, loaded.spec.input_size_px, device=device, dtype="float32")
    )
    segment = by_network(loaded, predictor, threshold=threshold, tiling=tiling)
    # A slip in the last folder, or in the place for the results, is told before the work begins.
    sources = [read_items(folder, limit) for folder in folders]
    if out is not None:
        try:
            out.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise output_error(out, error) from error
    judgements = []
    for folder, items in zip(folders, sources, strict=True):
        model, other = _Judge(segment), _Judge(by_otsu) if baseline else None
        page: list[tuple[float, CellsPicture]] = []
        for item in items:
            found = model.look_at(item)
            if other is not None:
                other.look_at(item)
            scores = model.rows[-1].scores
            picture = CellsPicture(
                item.stem,
                item.pixels,
                found.cells.labels,
                found.cells.kinds,
                item.cells,
                item.boxes,
                item.is_complete,
            )
            # Only the worst are kept: a large data set must not fill the memory.
            page = sorted([*page, (_goodness(scores), picture)], key=lambda one: one[0])[:worst]
        name = f"{folder.resolve().parent.name}/{folder.resolve().name}"
        judged = Judgement(name, model.report(), None if other is None else other.report())
        judgements.append(judged)
        if out is not None:
            _write(out, judgements, page)
        yield judged


def _goodness(scores: Mapping[str, float]) -> float:
    """Give what pages of worst cases are ordered by: Dice, or for boxes their recall."""
    value = scores.get("dice", scores.get("recall", 0.0))
    # An image without a box has no recall: nothing shows it to be bad, and NaN has no order.
    return 1.0 if np.isnan(value) else value


def _write(
    out: Path, judgements: Sequence[Judgement], page: Sequence[tuple[float, CellsPicture]]
) -> None:
    """Write all that is known so far, and the page of the last folder."""
    try:
        plain = [_plain(judged) for judged in judgements]
        write_whole(out / "scores.json", json.dumps(plain, indent=2).encode())
        _write_csv(out / "scores.csv", judgements)
        number = len(judgements)
        slug = re.sub(r"[^A-Za-z0-9]+", "-", judgements[-1].name).strip("-")
        save_cells_page(
            [(f"{score:.3f}", picture) for score, picture in page],
            out / f"worst-{number}-{slug}.png",
        )
        tables = {j.name: j.model.reliability for j in judgements if j.model.reliability.any()}
        if tables:
            save_reliability(tables, out / "reliability.png")
    except OSError as error:
        raise output_error(out, error) from error


def _plain(judged: Judgement) -> dict[str, Any]:
    """Turn a judgement into what JSON can hold; what is not known is null."""

    def known(scores: Mapping[str, float]) -> dict[str, float | None]:
        return {name: None if np.isnan(value) else value for name, value in scores.items()}

    def images(report: Report) -> list[dict[str, Any]]:
        return [
            {"image": row.stem, "tile_scale": row.tile_scale, **known(row.scores)}
            for row in report.rows
        ]

    other = judged.baseline
    return {
        "data": judged.name,
        "model": known(judged.model.scores),
        "baseline": None if other is None else known(other.scores),
        "images": images(judged.model),
        "baseline_images": None if other is None else images(other),
        "tiled": judged.model.tiled,
        "reliability": judged.model.reliability.tolist(),
    }


def _write_csv(path: Path, judgements: Sequence[Judgement]) -> None:
    """Write one row per folder and image, and one with the scores of the folder.

    The baseline's scores stand in columns of their own, `otsu_` before the name.
    """
    rows: list[dict[str, str]] = []
    for judged in judgements:
        reports = {"": judged.model, "otsu_": judged.baseline}
        for index in range(len(judged.model.rows) + 1):
            whole = index == len(judged.model.rows)
            stem = "all" if whole else judged.model.rows[index].stem
            row = {"data": judged.name, "image": stem}
            for prefix, report in reports.items():
                if report is None:
                    continue
                scores = report.scores if whole else report.rows[index].scores
                row |= {
                    prefix + name: "" if np.isnan(value) else f"{value:.6f}"
                    for name, value in scores.items()
                }
            rows.append(row)
    names = list(dict.fromkeys(name for row in rows for name in row))
    with path.open("w", newline="", encoding="utf-8", errors="surrogateescape") as file:
        writer = csv.DictWriter(file, names)
        writer.writeheader()
        writer.writerows(rows)
