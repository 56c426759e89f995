"""The generator of synthetic smears: its truth has to be true, and its pictures repeatable."""

from __future__ import annotations

import csv
import dataclasses
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
import tifffile
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from bcseg_batch.errors import OutputError, UsageError
from bcseg_training.synthetic import (
    Kind,
    SmearStyle,
    SyntheticSmear,
    random_style,
    synthesize_numbered,
    synthesize_smear,
    typical_style,
    write_dataset,
)

SMALL_HW = (120, 160)


def smear(index: int = 0, *, shape_hw: tuple[int, int] = SMALL_HW) -> SyntheticSmear:
    return synthesize_numbered(7, index, shape_hw=shape_hw, style="typical")


def style_with(shape_hw: tuple[int, int] = (384, 512), **changes: object) -> SmearStyle:
    """A clean slide with chosen properties."""
    style = typical_style(np.random.default_rng(3), shape_hw=shape_hw)
    return dataclasses.replace(style, **changes)


def assert_consistent(smear: SyntheticSmear, shape_hw: tuple[int, int]) -> None:
    assert smear.image.shape == (*shape_hw, 3)
    assert smear.image.dtype == np.uint8
    assert smear.labels.shape == shape_hw
    assert smear.labels.dtype == np.int32
    assert smear.kinds.dtype == np.uint8
    seen = np.unique(smear.labels)
    assert np.array_equal(seen[seen > 0], np.arange(1, smear.kinds.size + 1))
    assert set(smear.kinds.tolist()) <= set(Kind)
    platelets = np.flatnonzero(smear.kinds == Kind.PLATELET) + 1
    cells = (smear.labels > 0) & ~np.isin(smear.labels, platelets)
    assert smear.mask.dtype == np.uint8
    assert np.array_equal(smear.mask, np.where(cells, 255, 0))


@settings(max_examples=30, deadline=None, derandomize=True)
@given(
    seed=st.integers(0, 2**32),
    shape_hw=st.tuples(st.integers(64, 200), st.integers(64, 200)),
)
def test_truth_is_consistent_for_any_style_and_shape(seed: int, shape_hw: tuple[int, int]) -> None:
    rng = np.random.default_rng(seed)
    style = random_style(rng, shape_hw=shape_hw)
    assert_consistent(synthesize_smear(rng, shape_hw=shape_hw, style=style), shape_hw)


@settings(max_examples=50, deadline=None, derandomize=True)
@given(seed=st.integers(0, 2**32), side_px=st.integers(64, 2000))
def test_random_magnification_stays_in_its_stated_range(seed: int, side_px: int) -> None:
    style = random_style(np.random.default_rng(seed), shape_hw=(side_px, side_px))
    assert 15 * side_px / 512 * 0.999 <= style.cell_diameter_px <= 250 * side_px / 512 * 1.001
    for stain in (style.red_stain, style.nucleus_stain, style.cytoplasm_stain):
        assert np.linalg.norm(stain) == pytest.approx(1)
        assert min(stain) >= 0


@pytest.mark.parametrize("style", ["typical", "varied"])
def test_same_seed_and_index_give_the_same_picture(style: str) -> None:
    first = synthesize_numbered(5, 2, shape_hw=SMALL_HW, style=style)
    again = synthesize_numbered(5, 2, shape_hw=SMALL_HW, style=style)
    for name in ("image", "labels", "kinds"):
        assert np.array_equal(getattr(first, name), getattr(again, name)), name


def test_other_seed_or_index_gives_another_picture() -> None:
    images = [
        synthesize_numbered(seed, index, shape_hw=SMALL_HW, style="typical").image
        for seed, index in ((5, 2), (5, 3), (6, 2))
    ]
    assert not np.array_equal(images[0], images[1])
    assert not np.array_equal(images[0], images[2])


def test_all_kinds_appear_where_the_style_asks_for_them() -> None:
    style = style_with(red_cells=20, white_cells=2, platelets=8)
    made = synthesize_smear(np.random.default_rng(0), shape_hw=(384, 512), style=style)
    assert set(made.kinds.tolist()) == {Kind.RED_CELL, Kind.WHITE_CELL, Kind.PLATELET}
    assert made.mask.mean() / 255 == pytest.approx(
        np.isin(made.labels, np.flatnonzero(made.kinds != Kind.PLATELET) + 1).mean()
    )


def test_slide_without_cells_is_empty_truth() -> None:
    style = style_with(red_cells=0, white_cells=0, platelets=0)
    made = synthesize_smear(np.random.default_rng(0), shape_hw=SMALL_HW, style=style)
    assert made.kinds.size == 0
    assert not made.labels.any()
    assert not made.mask.any()


def whole_cells(made: SyntheticSmear) -> list[tuple[Kind, float]]:
    """Kind and equal-area diameter of the cells that touch neither the border nor another cell."""
    padded = np.pad(made.labels, 1, mode="edge")
    around = np.stack(
        [
            padded[r : r + made.labels.shape[0], c : c + made.labels.shape[1]]
            for r in range(3)
            for c in range(3)
        ]
    )
    crowded = (around != made.labels) & (around > 0) & (made.labels > 0)
    touching = set(np.unique(made.labels[crowded.any(axis=0)]).tolist())
    rim = np.ones(made.labels.shape, dtype=bool)
    rim[1:-1, 1:-1] = False
    touching |= set(np.unique(made.labels[rim]).tolist())
    area_px = np.bincount(made.labels.ravel(), minlength=made.kinds.size + 1)
    return [
        (Kind(int(made.kinds[label - 1])), float(np.sqrt(4 * area_px[label] / np.pi)))
        for label in range(1, made.kinds.size + 1)
        if label not in touching
    ]


@pytest.mark.parametrize("odd_fraction", [0.0, 1.0])
@pytest.mark.parametrize("crenated_fraction", [0.0, 1.0])
def test_whole_cells_are_of_the_stated_size(odd_fraction: float, crenated_fraction: float) -> None:
    style = style_with(
        red_cells=25,
        white_cells=2,
        platelets=10,
        clumping=0.0,
        cell_diameter_px=44.0,
        odd_fraction=odd_fraction,
        crenated_fraction=crenated_fraction,
    )
    made = synthesize_smear(np.random.default_rng(1), shape_hw=(384, 512), style=style)
    found = whole_cells(made)
    assert sum(kind == Kind.RED_CELL for kind, _ in found) >= 8
    for kind, diameter_px in found:
        low_px, high_px = style.diameter_range_px(kind)
        assert low_px - 1 <= diameter_px <= high_px + 1, kind


def optical_density(image: npt.NDArray[np.uint8], background: npt.NDArray[np.bool_]) -> np.ndarray:
    light = image.astype(np.float64).mean(axis=2) + 1
    return np.asarray(-np.log(light / np.median(light[background])))


@pytest.mark.parametrize("index", range(4))
def test_every_cell_is_darker_than_the_slide(index: int) -> None:
    made = smear(index, shape_hw=(384, 512))
    density = optical_density(made.image, made.labels == 0)
    for label, kind in enumerate(made.kinds.tolist(), start=1):
        inside = density[made.labels == label]
        if inside.size >= 30:
            assert np.median(inside) > 0.08, (label, Kind(kind).name)


def test_overlapping_cells_are_darker_than_single_ones() -> None:
    style = style_with(
        red_cells=2, white_cells=0, platelets=0, clumping=1.0, overlap=0.35, cell_diameter_px=80.0,
        pallor=0.0, odd_fraction=0.0, crenated_fraction=0.0, parasite_fraction=0.0,
        artefact_fraction=0.0, debris=0, red_density_cv=0.0, size_cv=0.0, noise_levels=0.5,
    )  # fmt: skip
    overlaps = 0
    for seed in range(6):
        made = synthesize_smear(np.random.default_rng(seed), shape_hw=(384, 512), style=style)
        density = optical_density(made.image, made.labels == 0)
        single = np.median(density[made.mask > 0])
        overlaps += int((density[made.mask > 0] > 1.6 * single).sum() > 100)
    assert overlaps >= 4


def test_overstained_slide_is_darker_than_a_faded_one() -> None:
    darkness = []
    for red_density in (0.3, 1.6):
        style = style_with(white_cells=0, platelets=0, red_density=red_density)
        made = synthesize_smear(np.random.default_rng(4), shape_hw=(384, 512), style=style)
        darkness.append(np.median(optical_density(made.image, made.labels == 0)[made.mask > 0]))
    assert darkness[1] > 2 * darkness[0]


def test_beyond_the_field_of_view_is_black_and_unlabelled() -> None:
    style = style_with(aperture=0.7, flare=0.0)
    made = synthesize_smear(np.random.default_rng(2), shape_hw=(384, 512), style=style)
    assert_consistent(made, (384, 512))
    for corner in (np.s_[:12, :12], np.s_[-12:, :12], np.s_[:12, -12:], np.s_[-12:, -12:]):
        assert made.image[corner].mean() < 8
        assert not made.labels[corner].any()
    assert made.labels.any()


def test_too_small_a_picture_is_refused() -> None:
    with pytest.raises(ValueError, match="at least 32 px"):
        synthesize_smear(np.random.default_rng(0), shape_hw=(31, 100), style=style_with())


def test_more_cells_than_labels_is_refused() -> None:
    with pytest.raises(ValueError, match="at most 65535"):
        synthesize_smear(
            np.random.default_rng(0), shape_hw=SMALL_HW, style=style_with(red_cells=70_000)
        )


# --- on disk --------------------------------------------------------------------------------------


def all_bytes(out: Path) -> dict[str, bytes]:
    return {
        path.relative_to(out).as_posix(): path.read_bytes()
        for path in sorted(out.rglob("*"))
        if path.is_file()
    }


def test_dataset_pairs_by_stem_and_reads_back(tmp_path: Path) -> None:
    out = tmp_path / "made" / "here"
    write_dataset(out, count=2, seed=7, shape_hw=SMALL_HW)
    folders = {"original": ".jpg", "mask": ".png", "labels": ".tif", "kinds": ".csv"}
    for folder, suffix in folders.items():
        names = sorted(path.name for path in (out / folder).iterdir())
        assert names == [f"synth_00000{suffix}", f"synth_00001{suffix}"]
    for index in range(2):
        made, stem = smear(index), f"synth_{index:05}"
        with Image.open(out / "mask" / f"{stem}.png") as mask:
            assert mask.mode == "L"
            assert np.array_equal(np.asarray(mask), made.mask)
        labels = tifffile.imread(out / "labels" / f"{stem}.tif")
        assert labels.dtype == np.uint16
        assert np.array_equal(labels, made.labels)
        with (out / "kinds" / f"{stem}.csv").open(newline="") as file:
            rows = list(csv.DictReader(file))
        assert [int(row["label"]) for row in rows] == list(range(1, made.kinds.size + 1))
        assert [Kind[row["kind"].upper()] for row in rows] == made.kinds.tolist()
        with Image.open(out / "original" / f"{stem}.jpg") as original:
            assert original.mode == "RGB"
            difference = np.asarray(original).astype(int) - made.image
        assert np.abs(difference).mean() < 2.5


def test_larger_count_leaves_the_earlier_pictures_as_they_were(tmp_path: Path) -> None:
    write_dataset(tmp_path / "one", count=1, seed=9, shape_hw=SMALL_HW, style="varied")
    write_dataset(tmp_path / "three", count=3, seed=9, shape_hw=SMALL_HW, style="varied")
    few, many = all_bytes(tmp_path / "one"), all_bytes(tmp_path / "three")
    assert len(few) == 4
    assert len(many) == 12
    assert few.items() <= many.items()


def test_filled_folder_is_refused_and_left_alone(tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("keep")
    with pytest.raises(UsageError, match="not empty"):
        write_dataset(tmp_path, count=1, seed=0, shape_hw=SMALL_HW)
    assert all_bytes(tmp_path) == {"mine.txt": b"keep"}


def test_file_in_place_of_the_folder_is_refused(tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.write_text("keep")
    with pytest.raises(UsageError, match="is a file"):
        write_dataset(out, count=1, seed=0, shape_hw=SMALL_HW)
    assert out.read_text() == "keep"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"count": 0}, "at least 1 image"),
        ({"seed": -1}, "0 or more"),
        ({"shape_hw": (20, 400)}, "400x20 px is too small"),
        ({"style": "fancy"}, "choose one of typical, varied"),
    ],
)
def test_senseless_requests_are_refused_before_anything_is_written(
    tmp_path: Path, changes: dict[str, object], message: str
) -> None:
    arguments = {"count": 1, "seed": 0, "shape_hw": SMALL_HW, **changes}
    with pytest.raises(UsageError, match=message):
        write_dataset(tmp_path / "out", **arguments)
    assert not (tmp_path / "out").exists()


def test_interrupted_run_leaves_no_half_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The seventh rename never happens, as if the power had gone."""
    rename, calls = Path.replace, []

    def replace(self: Path, target: Path) -> Path:
        calls.append(target)
        if len(calls) == 7:
            raise KeyboardInterrupt
        return rename(self, target)

    monkeypatch.setattr(Path, "replace", replace)
    with pytest.raises(KeyboardInterrupt):
        write_dataset(tmp_path / "cut", count=3, seed=7, shape_hw=SMALL_HW)
    monkeypatch.undo()
    write_dataset(tmp_path / "whole", count=3, seed=7, shape_hw=SMALL_HW)
    left = {k: v for k, v in all_bytes(tmp_path / "cut").items() if not k.endswith(".part")}
    assert len(left) == 6
    assert left.items() <= all_bytes(tmp_path / "whole").items()
    originals = {Path(name).stem for name in left if name.startswith("original/")}
    assert originals <= {Path(name).stem for name in left if name.startswith("mask/")}


def test_unwritable_place_is_an_output_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match="cannot write the data set"):
        write_dataset(tmp_path / "file" / "out", count=1, seed=0, shape_hw=SMALL_HW)
