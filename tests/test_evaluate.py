"""A model is judged at full image size, as the product would use it."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from blots import blots, write_blots, write_pair
from PIL import Image
from torch import Tensor, nn

from bcseg_batch.errors import CheckpointError, OutputError, UsageError
from bcseg_batch.segment.cells import Cells
from bcseg_batch.segment.checkpoint import Checkpoint, save_checkpoint
from bcseg_batch.segment.placement import Placement
from bcseg_batch.segment.predictor import Predictor
from bcseg_batch.segment.spec import ModelSpec
from bcseg_training.dataset import usable_pairs
from bcseg_training.evaluate import (
    Item,
    Judgement,
    evaluate,
    mean_scores,
    predict_and_score,
    read_items,
    score_image,
)
from bcseg_training.metrics import MaskScore, score_mask
from bcseg_training.plots import LEGEND, CellsPicture, outlined
from bcseg_training.segmenting import Segmented, by_network
from bcseg_training.synthetic import Kind, write_dataset
from bcseg_training.voc import Box, held_out_stems


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


def judge(checkpoint: Path, *folders: Path, **changes: object) -> list[Judgement]:
    options = {"worst": 2, "device": "cpu", "tiling": False, **changes}
    return list(evaluate(checkpoint, folders, **options))  # type: ignore[arg-type]  # by name


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
    (own,) = judge(checkpoint, folder)
    (same,) = judge(checkpoint, folder, threshold=0.4)
    assert own.model.rows == same.model.rows
    (nothing,) = judge(checkpoint, folder, threshold=0.999)
    assert nothing.model.scores["dice"] == 0


def test_scores_are_written_for_each_image_and_each_folder(
    checkpoint: Path, folder: Path, tmp_path: Path
) -> None:
    other = write_blots(tmp_path / "other", train=0, val=2)  # a data set: its val is taken
    out = tmp_path / "new" / "out"
    first, second = judge(checkpoint, folder, other, out=out)
    assert [row.stem for row in first.model.rows] == ["smear0", "smear1", "smear2", "smear3"]
    assert (first.name, second.name) == ("set/val", f"{tmp_path.name}/other")
    for name, mean in first.model.scores.items():
        if name != "calibration_error":
            assert mean == pytest.approx(np.mean([row.scores[name] for row in first.model.rows]))
    with (out / "scores.csv").open(encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert [(row["data"], row["image"]) for row in rows] == [
        (judged.name, stem)
        for judged in (first, second)
        for stem in [*(row.stem for row in judged.model.rows), "all"]
    ]
    assert float(rows[4]["dice"]) == pytest.approx(first.model.scores["dice"], abs=1e-6)
    plain = json.loads((out / "scores.json").read_text())
    assert [one["data"] for one in plain] == [first.name, second.name]
    assert plain[0]["model"] == dict(first.model.scores)
    assert first.baseline is not None
    assert plain[0]["baseline"] == dict(first.baseline.scores)
    assert float(rows[0]["otsu_dice"]) == pytest.approx(
        plain[0]["baseline_images"][0]["dice"], abs=1e-6
    )
    for name in ("reliability.png", "worst-1-set-val.png"):
        with Image.open(out / name) as picture:
            picture.load()


def test_otsu_finds_dark_blots_that_an_untrained_network_does_not(
    checkpoint: Path, folder: Path
) -> None:
    (judged,) = judge(checkpoint, folder)
    assert judged.baseline is not None
    assert judged.baseline.scores["dice"] > 0.9
    assert judged.baseline.scores["dice"] > judged.model.scores["dice"]
    assert "calibration_error" not in judged.baseline.scores
    assert judge(checkpoint, folder, baseline=False)[0].baseline is None


def test_the_frame_is_left_out_of_its_dice(tmp_path: Path) -> None:
    truth = np.zeros((100, 100), bool)
    truth[40:60, 40:60] = True
    mask = truth.copy()
    mask[:8] = True
    cells = Cells(truth.astype(np.int32), np.ones(1, np.uint8), np.zeros(1, bool))
    item = Item("a", np.zeros((100, 100, 3), np.uint8), truth, truth.astype(np.int32), (), True)
    scores = score_image(Segmented(mask, cells, None, None), item)
    assert scores["dice"] < 0.8
    assert (scores["dice_in_frame"], scores["f1_50"], scores["count_error"]) == (1, 1, 0)


def test_boxes_are_judged_over_all_images_together(checkpoint: Path, data_dir: Path) -> None:
    (judged,) = judge(checkpoint, data_dir / "bccd", limit=2)
    assert judged.baseline is not None
    assert len(judged.model.rows) == 2
    assert set(judged.model.rows[0].scores) == {"recall", "precision", "f1"}
    assert judged.baseline.scores["recall"] > 0.3
    assert {"kind_right", "platelet_recall"} <= set(judged.model.scores)
    assert {row.stem for row in judged.model.rows} <= held_out_stems()


def test_what_the_generator_knows_is_taken_for_truth(checkpoint: Path, tmp_path: Path) -> None:
    write_dataset(tmp_path / "drawn", count=1, seed=3, shape_hw=(160, 200), style="typical")
    (item,) = read_items(tmp_path / "drawn")
    assert item.is_complete
    assert item.truth is not None
    assert item.cells is not None
    assert ((item.cells > 0) == item.truth).mean() > 0.99
    assert len(np.unique(item.cells)) == item.cells.max() + 1
    judge(checkpoint, tmp_path / "drawn")


def test_small_cells_are_judged_as_the_service_takes_them(tmp_path: Path) -> None:
    image, mask = blots(4, (700, 900))
    write_pair(tmp_path / "large", "large", image, mask)
    predictor = Predictor(Darkness(), Placement("cpu", "float32", ""), 64)
    spec = ModelSpec(width=4, depth=2, input_size_px=64)
    loaded = Checkpoint(spec.build(), spec, "", tmp_path)
    (item,) = read_items(tmp_path / "large")
    tiled = by_network(loaded, predictor)(item.pixels)
    plain = by_network(loaded, predictor, tiling=False)(item.pixels)
    assert tiled.tile_scale is not None
    assert plain.tile_scale is None
    assert tiled.cells.labels.max() == len(tiled.cells.kinds)
    assert score_image(tiled, item)["dice"] > score_image(plain, item)["dice"]


@pytest.mark.parametrize("worst", [1, 3, 99])
def test_page_of_worst_cases_is_a_picture(
    checkpoint: Path, folder: Path, tmp_path: Path, worst: int
) -> None:
    judge(checkpoint, folder, out=tmp_path, worst=worst)
    with Image.open(tmp_path / "worst-1-set-val.png") as image:
        image.load()
        lines = -(-min(worst, 4) // 2)
        assert image.height == pytest.approx(5.4 * 150 * lines, abs=2)


def square_labels(*places: tuple[int, int]) -> np.ndarray:
    labels = np.zeros((100, 120), np.int32)
    for number, (top, left) in enumerate(places, start=1):
        labels[top : top + 16, left : left + 16] = number
    return labels


def picture_of(
    found: np.ndarray, kinds: list[int], true: np.ndarray | None, *boxes: Box
) -> CellsPicture:
    pixels = np.full((100, 120, 3), 200, np.uint8)
    return CellsPicture("a", pixels, found, np.array(kinds, np.uint8), true, boxes)


def test_outlines_tell_right_from_wrong_from_missed() -> None:
    found = square_labels((20, 20), (20, 70), (0, 45))  # the third lies in the frame
    true = square_labels((20, 20), (60, 70))
    drawn = outlined(picture_of(found, [1, 1, 1], true), side_px=120)
    right, wrong, forgiven, missed, inside = (
        tuple(int(v) for v in drawn[y, x])
        for y, x in ((20, 28), (20, 78), (8, 45), (60, 78), (28, 28))
    )
    assert inside == (200, 200, 200)
    legend = {line.means: line.rgb for line in LEGEND}
    assert right == legend["found, and true"]
    assert tuple(drawn[22, 78].tolist()) == wrong  # thick, where right is thin
    assert tuple(drawn[22, 28].tolist()) == inside
    assert wrong == legend["found, without a true one"]
    assert forgiven == legend["forgiven at the border"]
    assert missed == legend["missed"]


def test_boxes_missed_and_kinds_mistaken_are_seen() -> None:
    found = square_labels((20, 20), (60, 20))
    boxes = (
        Box(Kind.WHITE_CELL, 18, 18, 39, 39),
        Box(Kind.RED_CELL, 80, 60, 110, 90),
        Box(Kind.PLATELET, 20, 60, 36, 76),
    )
    drawn = outlined(picture_of(found, [1, 3], None, *boxes), side_px=120)
    legend = {line.means: line.rgb for line in LEGEND}
    colours = {tuple(int(v) for v in pixel) for pixel in drawn[18:38, 18:38].reshape(-1, 3)}
    assert legend["found, of another kind"] in colours
    assert legend["missed"] not in colours
    assert tuple(drawn[60, 95].tolist()) == legend["missed"]
    assert tuple(drawn[75, 20].tolist()) == legend["true, and found"]


def test_without_truth_outlines_tell_the_kinds() -> None:
    found = square_labels((20, 20), (20, 70), (60, 20))
    drawn = outlined(picture_of(found, [1, 2, 3], None), side_px=120)
    colours = [tuple(drawn[y, x].tolist()) for y, x in ((20, 28), (20, 78), (60, 28))]
    assert len({*colours, (200, 200, 200)}) == 4
    assert tuple(drawn[22, 28].tolist()) == (200, 200, 200)


def test_a_picture_without_any_cell_is_drawn_all_the_same() -> None:
    empty = picture_of(square_labels(), [], square_labels())
    assert (outlined(empty) == 200).all()
    assert outlined(picture_of(square_labels(), [], None)).shape == (200, 240, 3)


def test_nothing_is_written_unless_asked(checkpoint: Path, folder: Path, tmp_path: Path) -> None:
    before = sorted(tmp_path.rglob("*"))
    judge(checkpoint, folder)
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize("stem", ["price $x_{", "a^b$^$", "血液", "two\nlines"])
def test_odd_names_are_no_obstacle(checkpoint: Path, tmp_path: Path, stem: str) -> None:
    write_pair(tmp_path / "odd", stem, *blots(0))
    (judged,) = judge(checkpoint, tmp_path / "odd", out=tmp_path / "out")
    assert [row.stem for row in judged.model.rows] == [stem]
    assert (tmp_path / "out" / f"worst-1-{tmp_path.name.replace('_', '-')}-odd.png").is_file()


def test_a_name_that_is_no_text(checkpoint: Path, tmp_path: Path) -> None:
    stem = b"caf\xe9".decode("utf-8", "surrogateescape")
    write_pair(tmp_path / "odd", stem, *blots(0))
    judge(checkpoint, tmp_path / "odd", out=tmp_path / "out")
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
        judge(checkpoint, folder, out=tmp_path / "out")


def test_a_slip_in_the_last_folder_is_told_before_the_work_begins(
    checkpoint: Path, folder: Path, tmp_path: Path
) -> None:
    other = write_blots(tmp_path / "other", train=0, val=2) / "val"
    (other / "mask" / "smear1.png").unlink()
    # The first folder has an image that cannot be read: it is not even tried.
    (folder / "original" / "smear0.png").write_bytes(b"no image")
    with pytest.raises(UsageError, match=r"other/val: original/smear1\.png has no mask"):
        judge(checkpoint, folder, other)


def test_labels_that_do_not_fit_are_refused(checkpoint: Path, tmp_path: Path) -> None:
    write_dataset(tmp_path / "drawn", count=1, seed=3, shape_hw=(160, 200), style="typical")
    (tmp_path / "drawn" / "kinds" / "synth_00000.csv").write_text("label,kind\n1,red_cell\n")
    with pytest.raises(UsageError, match=r"drawn: the labels or kinds of synth_00000 do not fit"):
        judge(checkpoint, tmp_path / "drawn")


def test_a_folder_of_no_known_kind_is_refused(checkpoint: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    for folder in (tmp_path / "empty", tmp_path / "missing"):
        with pytest.raises(UsageError, match="original and mask"):
            judge(checkpoint, folder)


def test_mean_of_each_score() -> None:
    mean = mean_scores([MaskScore(1.0, 0.5, 0.25, 0.0), MaskScore(0.0, 0.5, 0.75, 1.0)])
    assert mean == MaskScore(0.5, 0.5, 0.5, 0.5)


def test_an_image_without_boxes_takes_no_place_among_the_worst(
    checkpoint: Path, tmp_path: Path
) -> None:
    box = "<object><name>RBC</name><bndbox><xmin>9</xmin><ymin>9</ymin><xmax>30</xmax>"
    box += "<ymax>30</ymax></bndbox></object>"
    pages = []
    for parent, stems in (("both", "ab"), ("alone", "b")):
        folder = tmp_path / parent / "set"
        for kind in ("images", "annotations"):
            (folder / kind).mkdir(parents=True)
        for stem in stems:
            Image.fromarray(blots(ord(stem))[0]).save(folder / "images" / f"{stem}.jpg")
            boxes = box if stem == "b" else ""
            text = f"<annotation>{boxes}</annotation>"
            (folder / "annotations" / f"{stem}.xml").write_text(text)
        judge(checkpoint, folder, out=tmp_path / "out" / parent, worst=1)
        page = tmp_path / "out" / parent / f"worst-1-{parent}-set.png"
        pages.append(page.read_bytes())
    assert pages[0] == pages[1]
