"""How well single cells are found: against instance truth, against boxes, and how surely."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from scipy.ndimage import find_objects
from scipy.optimize import linear_sum_assignment

from bcseg_batch.segment.cells import CellKind, Cells
from bcseg_training.synthetic import Kind
from bcseg_training.voc import Box

Labels = npt.NDArray[np.int32]

FRAME = 0.1


@dataclass(frozen=True, slots=True)
class Matches:
    """Found and true objects, paired one to one.

    Attributes:
        ious: float64 (m,), IoU of each pair, all above the least that was asked for.
        found: int (m,), index of the found object of each pair.
        true: int (m,), index of the true one.
        found_count: how many were found in all.
        true_count: how many there are.
    """

    ious: npt.NDArray[np.float64]
    found: npt.NDArray[np.intp]
    true: npt.NDArray[np.intp]
    found_count: int
    true_count: int

    def at(self, iou: float) -> tuple[int, int, int]:
        """True positives, false positives and false negatives at an IoU."""
        hits = int((self.ious >= iou).sum())
        return hits, self.found_count - hits, self.true_count - hits


def match(iou: npt.NDArray[np.float64], least: float = 0.5) -> Matches:
    """Pair found and true objects one to one, so that the pairs' IoU adds up to the most.

    Args:
        iou: float64 (found, true).
        least: pairs under it do not count.
    """
    rows, columns = linear_sum_assignment(np.where(iou >= least, iou, 0.0), maximize=True)
    values = iou[rows, columns]
    keep = values >= least
    return Matches(values[keep], rows[keep], columns[keep], iou.shape[0], iou.shape[1])


def label_iou(found: Labels, true: Labels) -> npt.NDArray[np.float64]:
    """IoU of each found with each true label: float64 (found, true).

    Args:
        found: int32 (H, W), labels 1..n without gaps.
        true: likewise.
    """
    rows, columns = int(found.max(initial=0)) + 1, int(true.max(initial=0)) + 1
    index = found.astype(np.int64).ravel() * columns + true.ravel()
    overlap = np.bincount(index, minlength=rows * columns).reshape(rows, columns)
    union = overlap.sum(1, keepdims=True) + overlap.sum(0, keepdims=True) - overlap
    result: npt.NDArray[np.float64] = overlap[1:, 1:] / np.maximum(union[1:, 1:], 1)
    return result


def box_iou(
    found: npt.NDArray[np.float64], true: npt.NDArray[np.float64]
) -> npt.NDArray[np.float64]:
    """IoU of boxes: float64 (found, true) of two (n, 4) arrays of left, top, right, bottom."""
    low = np.maximum(found[:, np.newaxis, :2], true[np.newaxis, :, :2])
    high = np.minimum(found[:, np.newaxis, 2:], true[np.newaxis, :, 2:])
    overlap = np.prod(np.clip(high - low, 0, None), axis=2)
    areas = [np.prod(b[:, 2:] - b[:, :2], axis=1) for b in (found, true)]
    union = areas[0][:, np.newaxis] + areas[1][np.newaxis] - overlap
    result: npt.NDArray[np.float64] = overlap / np.maximum(union, 1e-9)
    return result


def label_boxes(labels: Labels) -> npt.NDArray[np.float64]:
    """Bounding boxes of labels 1..n: float64 (n, 4) left, top, right, bottom, the latter after."""
    return np.array(
        [(x.start, y.start, x.stop, y.stop) for y, x in find_objects(labels)], dtype=np.float64
    ).reshape(-1, 4)


def in_frame(labels: Labels) -> npt.NDArray[np.bool_]:
    """Tell which labels 1..n have the middle of their box in the outermost 10 %: bool (n,)."""
    boxes = label_boxes(labels)
    middle = (boxes[:, :2] + boxes[:, 2:]) / 2 / np.array(labels.shape[::-1])
    outside: npt.NDArray[np.bool_] = ((middle < FRAME) | (middle > 1 - FRAME)).any(axis=1)
    return outside


@dataclass(frozen=True, slots=True)
class InstanceScore:
    """Agreement of the cells of one image with instance truth.

    Attributes:
        found, true: number of cells.
        count_difference: |found - true|.
        count_error: |found - true| / true.
        f1_50, f1_75: F1 of the cells at an IoU of 0.5 and 0.75.
        ap_50, ap_75: TP / (TP + FP + FN), what Cellpose and StarDist call average precision.
        pq: panoptic quality (Kirillov et al. 2019, arXiv:1801.00868): mean IoU of the pairs at
            0.5 times F1.
    """

    found: float
    true: float
    count_difference: float
    count_error: float
    f1_50: float
    f1_75: float
    ap_50: float
    ap_75: float
    pq: float


def instance_score(found: Labels, true: Labels, *, forgive_frame: bool = False) -> InstanceScore:
    """Compare labels with labels.

    Args:
        found: int32 (H, W), 1..n without gaps.
        true: likewise.
        forgive_frame: leave out found cells without a partner whose middle lies in the outermost
            10 %: some truths leave out cells that the border cuts.
    """
    matches = match(label_iou(found, true))
    found_count = matches.found_count
    if forgive_frame:
        outside = in_frame(found)
        outside[matches.found] = False
        found_count -= int(outside.sum())
    kept = Matches(matches.ious, matches.found, matches.true, found_count, matches.true_count)
    hits, wrong, missed = kept.at(0.5)
    hits_75, wrong_75, missed_75 = kept.at(0.75)
    f1 = _ratio(2 * hits, 2 * hits + wrong + missed)
    return InstanceScore(
        found=found_count,
        true=kept.true_count,
        count_difference=abs(found_count - kept.true_count),
        count_error=abs(found_count - kept.true_count) / max(kept.true_count, 1),
        f1_50=f1,
        f1_75=_ratio(2 * hits_75, 2 * hits_75 + wrong_75 + missed_75),
        ap_50=_ratio(hits, hits + wrong + missed),
        ap_75=_ratio(hits_75, hits_75 + wrong_75 + missed_75),
        pq=f1 * float(kept.ious.mean()) if hits else f1,
    )


def _ratio(part: int, whole: int) -> float:
    """A share; nothing to find and nothing found is perfect."""
    return part / whole if whole else 1.0


def _share(part: int, whole: int) -> float:
    """A share; of nothing it is not known."""
    return part / whole if whole else math.nan


@dataclass(frozen=True, slots=True)
class BoxScore:
    """Agreement of the cells of many images with boxes, at an IoU of 0.5.

    Attributes:
        recall: share of the boxes of red and white cells that were found.
        precision: share of the found cells that have a box; too low where boxes are missing.
        f1: of the two.
        kind_right: share of the paired cells whose kind is right.
        white_recall: share of the white cells' boxes that were found, as whatever kind.
        white_right: share of those that were called white.
        platelet_recall: share of the platelets' boxes that a found platelet overlaps by 0.3.
        platelet_precision: share of the found platelets that have such a box.

    Where there is nothing to take a share of, it is NaN.
    """

    recall: float
    precision: float
    f1: float
    kind_right: float
    white_recall: float
    white_right: float
    platelet_recall: float
    platelet_precision: float


def box_score(images: Sequence[tuple[Cells, Sequence[Box]]]) -> BoxScore:
    """Compare the cells of each image with its boxes, and add up."""
    hits = found = true = right = white = white_hits = white_right = 0
    platelets = platelet_hits = platelets_found = 0
    for cells, boxes in images:
        extents = label_boxes(cells.labels)
        is_cell = cells.kinds != CellKind.PLATELET
        wanted = [b for b in boxes if b.kind != Kind.PLATELET]
        pairs = match(box_iou(extents[is_cell], box_array(wanted)))
        named = cells.kinds[is_cell][pairs.found]
        kinds = np.array([int(b.kind) for b in wanted], dtype=np.uint8)
        true_kinds = kinds[pairs.true]
        hits += len(pairs.ious)
        found += pairs.found_count
        true += pairs.true_count
        right += int((named == true_kinds).sum())
        white += int((kinds == CellKind.WHITE_CELL).sum())
        white_hits += int((true_kinds == CellKind.WHITE_CELL).sum())
        white_right += int(((named == true_kinds) & (true_kinds == CellKind.WHITE_CELL)).sum())
        small = [b for b in boxes if b.kind == Kind.PLATELET]
        platelets += len(small)
        platelets_found += int((~is_cell).sum())
        platelet_hits += len(match(box_iou(extents[~is_cell], box_array(small)), 0.3).ious)
    return BoxScore(
        _share(hits, true),
        _share(hits, found),
        _ratio(2 * hits, found + true),
        _share(right, hits),
        _share(white_hits, white),
        _share(white_right, white_hits),
        _share(platelet_hits, platelets),
        _share(platelet_hits, platelets_found),
    )


def box_array(boxes: Sequence[Box]) -> npt.NDArray[np.float64]:
    """Put boxes into rows: float64 (n, 4) of left, top, right, bottom."""
    return np.array([(b.left, b.top, b.right, b.bottom) for b in boxes], np.float64).reshape(-1, 4)


def cells_only(cells: Cells) -> Labels:
    """Labels without platelets; those stand last, so no gap opens."""
    labels = cells.labels
    return np.where(labels <= cells.cell_count, labels, np.int32(0))


def reliability(
    probability_map: npt.NDArray[np.float32], truth: npt.NDArray[np.bool_], *, bins: int = 15
) -> npt.NDArray[np.float64]:
    """Count pixels by their probability, for calibration: float64 (3, bins).

    Args:
        probability_map: float32 (H, W), probability of a cell.
        truth: bool (H, W).
        bins: of equal width.

    Returns:
        For each bin the number of pixels, the sum of their probabilities, and how many are cells.
        Of several images they can be added.
    """
    index = np.minimum((probability_map * bins).astype(int), bins - 1).ravel()
    return np.stack(
        [
            np.bincount(index, minlength=bins).astype(np.float64),
            np.bincount(index, probability_map.ravel(), bins),
            np.bincount(index, truth.ravel(), bins),
        ]
    )


def calibration_error(table: npt.NDArray[np.float64]) -> float:
    """Expected calibration error of the pixels (Naeini et al. 2015), in [0, 1].

    Args:
        table: float64 (3, bins), of `reliability`.
    """
    return float(np.abs(table[1] - table[2]).sum() / max(table[0].sum(), 1))
