"""The look over a data set finds each thing that would spoil a training."""

from __future__ import annotations

import shutil
from typing import TYPE_CHECKING

import numpy as np
import pytest
from blots import blots, write_blots, write_pair
from PIL import Image

from bcseg_batch.errors import UsageError
from bcseg_training.check import CheckReport, check_dataset

if TYPE_CHECKING:
    from pathlib import Path


@pytest.fixture
def dataset(tmp_path: Path) -> Path:
    return write_blots(tmp_path / "set", train=3, val=2)


def only_problem(dataset: Path) -> str:
    report = check_dataset(dataset)
    assert len(report.problems) == 1, report.problems
    return report.problems[0]


def repaint(path: Path, mask: np.ndarray) -> None:
    Image.fromarray(mask).save(path)


def test_a_sound_data_set(dataset: Path) -> None:
    report = check_dataset(dataset)
    masks = [np.asarray(Image.open(p)) for p in sorted(dataset.glob("*/mask/*.png"))]
    assert report == CheckReport(
        pairs={"train": 3, "val": 2},
        sizes_wh_px=report.sizes_wh_px,
        foreground_fraction=pytest.approx(np.mean([(m > 0).mean() for m in masks])),
    )
    assert dict(report.sizes_wh_px) == {(64, 64): 5}


def test_no_data_set(tmp_path: Path) -> None:
    for folder in (tmp_path, tmp_path / "missing"):
        with pytest.raises(UsageError, match="is no data set"):
            check_dataset(folder)


def test_one_set_by_itself(dataset: Path) -> None:
    assert check_dataset(dataset / "val").pairs == {"val": 2}
    assert check_dataset(dataset / "train").problems == []


def test_nothing_to_validate_on(dataset: Path) -> None:
    shutil.rmtree(dataset / "val")
    assert "no folder val or test" in only_problem(dataset)


def test_orphans_and_repeated_stems(dataset: Path) -> None:
    (dataset / "train" / "mask" / "smear0.png").unlink()
    (dataset / "val" / "original" / "smear0.png").unlink()
    shutil.copy(dataset / "val/mask/smear1.png", dataset / "val/mask/smear1.bmp")
    problems = " | ".join(check_dataset(dataset).problems)
    assert "train: original/smear0.png has no mask" in problems
    assert "val: mask/smear0.png has no original" in problems
    assert "has the same stem as mask/smear1" in problems


def test_a_set_without_a_pair(dataset: Path) -> None:
    for path in (dataset / "val").glob("*/*"):
        path.unlink()
    assert only_problem(dataset) == "val: no pair of original and mask"


def test_a_damaged_file_does_not_end_the_look(dataset: Path) -> None:
    (dataset / "train" / "original" / "smear0.png").write_bytes(b"no image")
    assert "train/smear0" in only_problem(dataset)
    assert check_dataset(dataset).sizes_wh_px.total() == 4


def test_pair_of_two_sizes(dataset: Path) -> None:
    repaint(dataset / "train/mask/smear0.png", blots(0, (64, 80))[1])
    assert only_problem(dataset) == "train/smear0: the original is 64x64 and the mask 80x64"


def test_mask_of_zeros_and_ones(dataset: Path) -> None:
    repaint(dataset / "train/mask/smear0.png", blots(0)[1] // 255)
    assert "the mask's values are 0, 1: cells must be white" in only_problem(dataset)


def test_colour_mask(dataset: Path) -> None:
    repaint(dataset / "train/mask/smear0.png", blots(0)[0])
    assert "colour picture" in only_problem(dataset)


def test_grey_and_empty_masks_are_remarked(dataset: Path) -> None:
    ramp = np.tile(np.arange(64, dtype=np.uint8) * 4, (64, 1))
    repaint(dataset / "train/mask/smear0.png", ramp)
    repaint(dataset / "train/mask/smear1.png", np.zeros((64, 64), np.uint8))
    repaint(dataset / "train/mask/smear2.png", np.full((64, 64), 255, np.uint8))
    report = check_dataset(dataset)
    assert report.problems == []
    values = "(0, 4, 8, 12, 16, 20, ...)"
    assert report.remarks == [
        f"train/smear0: the mask has grey values {values}: above 127 counts as cell",
        "train/smear1: the mask is all background",
        "train/smear2: the mask is all cell",
    ]


def test_the_same_picture_on_both_sides_of_the_split(dataset: Path) -> None:
    shutil.copy(dataset / "train/original/smear2.png", dataset / "val/original/smear0.png")
    assert only_problem(dataset) == "the same picture lies at train/smear2 and at val/smear0"


def test_the_same_picture_in_another_format(dataset: Path) -> None:
    with Image.open(dataset / "train/original/smear2.png") as image:
        image.save(dataset / "train/original/copy.bmp")
    shutil.copy(dataset / "train/mask/smear2.png", dataset / "train/mask/copy.png")
    assert "train/copy and at train/smear2" in only_problem(dataset)


def test_blank_pictures_of_two_shapes_are_not_the_same(dataset: Path) -> None:
    for stem, shape_hw in (("wide", (32, 64)), ("tall", (64, 32))):
        blank = np.full((*shape_hw, 3), 255, np.uint8)
        write_pair(dataset / "train", stem, blank, np.zeros(shape_hw, np.uint8))
    assert check_dataset(dataset).problems == []
