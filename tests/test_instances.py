"""Scores of single cells, on cases that can be counted by hand."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from bcseg_batch.segment.cells import CellKind, Cells
from bcseg_training.instances import (
    box_iou,
    box_score,
    calibration_error,
    instance_score,
    label_boxes,
    reliability,
)
from bcseg_training.synthetic import Kind
from bcseg_training.voc import Box, held_out_stems, read_boxes


def squares(*places: tuple[int, int], side: int = 10) -> np.ndarray:
    labels = np.zeros((100, 100), np.int32)
    for number, (y, x) in enumerate(places, start=1):
        labels[y : y + side, x : x + side] = number
    return labels


def test_the_truth_itself_is_perfect() -> None:
    truth = squares((20, 20), (40, 40), (60, 60))
    score = instance_score(truth, truth)
    assert (score.f1_50, score.f1_75, score.pq, score.count_error) == (1, 1, 1, 0)


def test_one_missed_one_wrong_one_shifted() -> None:
    truth = squares((20, 20), (40, 40))
    # Shifted by 2 of 10: IoU 80 / 120.
    score = instance_score(squares((20, 22), (70, 70)), truth)
    assert score.f1_50 == 0.5
    assert score.f1_75 == 0
    assert score.ap_50 == pytest.approx(1 / 3)
    assert score.pq == pytest.approx(0.5 * 80 / 120)
    assert score.count_error == 0


def test_merged_cells_are_not_found_cells() -> None:
    truth = squares((40, 40), (40, 50))
    merged = np.minimum(truth, 1)
    assert instance_score(merged, truth).count_error == 0.5


def test_what_the_truth_leaves_out_at_the_frame_can_be_forgiven() -> None:
    truth, found = squares((40, 40)), squares((40, 40), (0, 50))
    assert instance_score(found, truth).f1_50 < 1
    assert instance_score(found, truth, forgive_frame=True).f1_50 == 1
    inside = squares((40, 40), (60, 60))
    assert instance_score(inside, truth, forgive_frame=True).f1_50 < 1


def test_boxes_and_kinds_are_counted() -> None:
    labels = squares((10, 10), (30, 30), (60, 60))
    kinds = np.array([CellKind.RED_CELL, CellKind.RED_CELL, CellKind.PLATELET], np.uint8)
    boxes = [
        Box(Kind.RED_CELL, 10, 10, 20, 20),
        Box(Kind.WHITE_CELL, 30, 30, 40, 40),
        Box(Kind.RED_CELL, 80, 80, 90, 90),
        Box(Kind.PLATELET, 60, 60, 70, 70),
    ]
    score = box_score([(Cells(labels, kinds, np.zeros(3, bool)), boxes)])
    assert score.recall == pytest.approx(2 / 3)
    assert score.precision == 1
    assert score.kind_right == 0.5
    assert (score.white_recall, score.white_right) == (1, 0)
    assert (score.platelet_recall, score.platelet_precision) == (1, 1)


def test_of_nothing_no_share_is_known() -> None:
    nothing = Cells(squares(), np.zeros(0, np.uint8), np.zeros(0, bool))
    score = box_score([(nothing, [Box(Kind.RED_CELL, 10, 10, 20, 20)])])
    assert (score.recall, score.f1) == (0, 0)
    unknown = (score.precision, score.kind_right, score.white_recall, score.platelet_precision)
    assert np.isnan(unknown).all()


def test_box_iou_by_hand() -> None:
    a, b = np.array([[0, 0, 10, 10]]), np.array([[5, 0, 15, 10], [20, 20, 30, 30]])
    assert box_iou(a.astype(float), b.astype(float))[0] == pytest.approx([50 / 150, 0])
    assert label_boxes(squares((3, 4))).tolist() == [[4, 3, 14, 13]]


def test_calibration_of_an_honest_and_a_boastful_map() -> None:
    truth = np.zeros((10, 10), bool)
    truth[:, :3] = True
    honest = reliability(np.full((10, 10), 0.3, np.float32), truth)
    boastful = reliability(np.full((10, 10), 0.9, np.float32), truth)
    assert calibration_error(honest) == pytest.approx(0, abs=1e-6)
    assert calibration_error(boastful) == pytest.approx(0.6)
    assert (honest + boastful)[:, -2:].sum(axis=1) == pytest.approx([100, 90, 30])


def test_voc_boxes_are_read_and_slips_left_out(tmp_path: Path) -> None:
    file = tmp_path / "a.xml"
    one = "<object><name>{}</name><bndbox><xmin>{}</xmin><ymin>{}</ymin><xmax>{}</xmax>"
    one += "<ymax>{}</ymax></bndbox></object>"
    file.write_text(
        f"<annotation>{one.format('RBC', 1, 5, 20, 30)}{one.format('WBC', 7, 7, 7, 7)}</annotation>"
    )
    assert read_boxes(file) == (Box(Kind.RED_CELL, 0, 4, 20, 30),)


def test_a_fifth_is_held_out() -> None:
    assert len(held_out_stems()) == 68
    assert all(stem.startswith("BloodImage_") for stem in held_out_stems())
