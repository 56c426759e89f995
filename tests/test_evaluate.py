"""A model is judged at full image size, as the product would use it."""

from __future__ import annotations

import csv
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from blots import blots, write_blots, write_pair
from PIL import Image
from torch import Tensor, nn

from bcseg_batch.errors import CheckpointError, OutputError, UsageError
from bcseg_batch.segment.checkpoint import ModelSpec, save_checkpoint
from bcseg_batch.segment.predictor import Placement, Predictor
from bcseg_training.dataset import usable_pairs
from bcseg_training.evaluate import evaluate, mean_scores, predict_and_score
from bcseg_training.metrics import MaskScore, score_mask
from bcseg_training.plots import agreement_picture


@pytest.fixture(autouse=True, scope="module")
def _one_thread() -> Iterator[None]:
    """Tiny tensors gain nothing from a second thread, which on a busy machine they wait for."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


class Darkness(nn.Module):
    """Takes what is darker than half grey in green for a cell."""

    def forward(self, x: Tensor) -> Tensor:
        return 20 * (0.55 - x[:, 1:2])


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_blots(tmp_path / "set", train=0, val=4) / "val"


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    torch.manual_seed(0)
    spec = ModelSpec(width=4, depth=2, input_size_px=64, threshold=0.4)
    save_checkpoint(tmp_path / "m.safetensors", spec.build(), spec)
    return tmp_path / "m.safetensors"


def judge(
    checkpoint: Path, folder: Path, out: Path | None = None, **changes: object
) -> tuple[list[tuple[str, MaskScore]], MaskScore]:
    options = {"threshold": None, "worst": 2, "device": "cpu", **changes}
    return evaluate(checkpoint, folder, out=out, **options)  # type: ignore[arg-type]  # by name


def test_masks_are_judged_at_the_images_own_size(tmp_path: Path) -> None:
    image, mask = blots(4, (150, 220))
    write_pair(tmp_path, "large", image, mask)
    predictor = Predictor(Darkness(), Placement("cpu", "float32", ""), 64)
    (judged,) = predict_and_score(predictor, usable_pairs(tmp_path))
    assert judged.mask.shape == judged.truth.shape == (150, 220)
    assert judged.score == score_mask(judged.mask, mask > 0)
    assert judged.score.dice > 0.95


def test_threshold_is_the_checkpoints_unless_another_is_given(
    checkpoint: Path, folder: Path
) -> None:
    own = judge(checkpoint, folder)
    assert own == judge(checkpoint, folder, threshold=0.4)
    nothing, _ = judge(checkpoint, folder, threshold=1.0)
    assert {score.dice for _, score in nothing} == {0.0}


def test_scores_and_their_mean_are_written(checkpoint: Path, folder: Path, tmp_path: Path) -> None:
    scores, mean = judge(checkpoint, folder, tmp_path / "new" / "out")
    assert [stem for stem, _ in scores] == ["smear0", "smear1", "smear2", "smear3"]
    assert mean == mean_scores([score for _, score in scores])
    assert mean.dice == pytest.approx(np.mean([score.dice for _, score in scores]))
    with (tmp_path / "new" / "out" / "scores.csv").open(encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert [row["image"] for row in rows] == [stem for stem, _ in scores] + ["mean"]
    for row, (_, score) in zip(rows, [*scores, ("mean", mean)], strict=True):
        for name in ("dice", "iou", "hausdorff", "f8"):
            assert float(row[name]) == pytest.approx(getattr(score, name), abs=1e-6)


@pytest.mark.parametrize("worst", [1, 2, 99])
def test_page_of_worst_cases_is_a_picture(
    checkpoint: Path, folder: Path, tmp_path: Path, worst: int
) -> None:
    judge(checkpoint, folder, tmp_path, worst=worst)
    with Image.open(tmp_path / "worst.png") as image:
        image.load()
        assert image.height == pytest.approx(2.9 * 90 * min(worst, 4), abs=2)


def test_nothing_is_written_unless_asked(checkpoint: Path, folder: Path, tmp_path: Path) -> None:
    before = sorted(tmp_path.rglob("*"))
    judge(checkpoint, folder)
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize("stem", ["price $x_{", "a^b$^$", "血液", "two\nlines"])
def test_odd_names_are_no_obstacle(checkpoint: Path, tmp_path: Path, stem: str) -> None:
    write_pair(tmp_path / "odd", stem, *blots(0))
    scores, _ = judge(checkpoint, tmp_path / "odd", tmp_path / "out")
    assert [name for name, _ in scores] == [stem]
    assert (tmp_path / "out" / "worst.png").is_file()


def test_a_name_that_is_no_text(checkpoint: Path, tmp_path: Path) -> None:
    stem = b"caf\xe9".decode("utf-8", "surrogateescape")
    write_pair(tmp_path / "odd", stem, *blots(0))
    judge(checkpoint, tmp_path / "odd", tmp_path / "out")
    assert b"caf\xe9," in (tmp_path / "out" / "scores.csv").read_bytes()


def test_a_mask_of_another_size_is_refused(checkpoint: Path, tmp_path: Path) -> None:
    write_pair(tmp_path / "odd", "a", blots(0, (64, 80))[0], blots(0, (64, 64))[1])
    with pytest.raises(UsageError, match="a: the original is 80x64 and the mask 64x64"):
        judge(checkpoint, tmp_path / "odd")


def test_a_damaged_image_is_refused_by_name(checkpoint: Path, folder: Path) -> None:
    (folder / "original" / "smear2.png").write_bytes(b"no image")
    with pytest.raises(UsageError, match="smear2"):
        judge(checkpoint, folder)


def test_a_broken_model_is_refused(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "m.safetensors").write_bytes(b"no model")
    with pytest.raises(CheckpointError):
        judge(tmp_path / "m.safetensors", folder)


def test_results_that_cannot_be_written(checkpoint: Path, folder: Path, tmp_path: Path) -> None:
    (tmp_path / "out").write_text("a file")
    with pytest.raises(OutputError, match="cannot write"):
        judge(checkpoint, folder, tmp_path / "out")


def test_mean_of_each_score() -> None:
    mean = mean_scores([MaskScore(1.0, 0.5, 0.25, 0.0), MaskScore(0.0, 0.5, 0.75, 1.0)])
    assert mean == MaskScore(0.5, 0.5, 0.5, 0.5)


def test_agreement_tints_what_is_wrong_and_nothing_else() -> None:
    pixels = np.full((1, 4, 3), 100, np.uint8)
    mask = np.array([[True, True, False, False]])
    truth = np.array([[True, False, True, False]])
    right, too_much, missed, ground = agreement_picture(pixels, mask, truth)[0].tolist()
    assert right == ground == [100, 100, 100]
    assert too_much[0] > too_much[2]  # orange
    assert missed[2] > missed[0]  # blue
