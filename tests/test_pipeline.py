"""Whatever goes in and whatever fails, each file comes out once and nothing piles up."""

from __future__ import annotations

import csv
import os
import random
import re
import shutil
import threading
from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
import tifffile
from parts import CPU, INPUT_SIZE_PX, OPTIONS, BrightIsCell, input_file, tree, write_smear
from PIL import Image

from bcseg_batch.errors import DeviceError, OutputError
from bcseg_batch.items import InputFile, Outcome, Status
from bcseg_batch.segment.placement import AnyPredictor, OutOfMemoryError
from bcseg_batch.segment.predictor import Predictor
from bcseg_batch.segment.preprocess import preprocess
from bcseg_batch.service.pipeline import Interrupted, Pipeline, PipelineOptions
from bcseg_batch.store import outputs as store_outputs
from bcseg_batch.store.names import OutputNames
from bcseg_batch.store.outputs import OutputFolder

Logits = npt.NDArray[np.float32]


def smears(source: Path, count: int) -> list[InputFile]:
    first = write_smear(source / "000.png")
    for number in range(1, count):
        shutil.copy(first, source / f"{number:03}.png")
    return [input_file(path, source) for path in sorted(source.iterdir())]


def pipeline(
    outputs: OutputFolder,
    predictor: AnyPredictor | None = None,
    options: PipelineOptions = OPTIONS,
    **changes: object,
) -> Pipeline:
    return Pipeline(
        [predictor or BrightIsCell()], outputs, OutputNames(), replace(options, **changes)
    )


def workers_alive() -> list[str]:
    return [t.name for t in threading.enumerate() if t.name.startswith("bcseg-")]


class Feed:
    """Counts what was drawn from it against what came out."""

    def __init__(self, files: Iterable[InputFile | None]) -> None:
        self._files = iter(files)
        self.drawn = 0
        self.given = 0
        self.most_under_way = 0

    def __iter__(self) -> Iterator[InputFile | None]:
        for file in self._files:
            if file is not None:
                self.drawn += 1
            self.most_under_way = max(self.most_under_way, self.drawn - self.given)
            yield file


# What comes out --------------------------------------------------------------------------------


def test_an_outcome_says_everything_and_its_outputs_are_there(
    source: Path, outputs: OutputFolder
) -> None:
    path = write_smear(source / "b/a.png", size_wh=(50, 20))
    (outcome,) = pipeline(outputs).process([input_file(path, source)])
    assert outcome.status is Status.DONE
    assert outcome.error is None
    assert (outcome.image, outcome.width_px, outcome.height_px) == ("b/a.png", 50, 20)
    assert (outcome.mask, outcome.composite) == (
        "masks/b/a_mask.png",
        "composites/b/a_bloodred.jpg",
    )
    assert (outcome.device, outcome.dtype) == ("cpu", "float32")
    assert outcome.seconds is not None
    assert outcome.seconds >= 0
    with Image.open(outputs.root / outcome.mask) as mask:
        assert (mask.mode, mask.size) == ("L", (50, 20))
        values = np.asarray(mask)
    assert set(np.unique(values)) <= {0, 255}
    assert outcome.foreground_fraction == pytest.approx((values == 255).mean(), abs=1e-6)
    with Image.open(outputs.root / outcome.composite) as composite:
        assert (composite.mode, composite.size) == ("RGB", (50, 20))


def test_an_image_without_a_cell_gets_all_its_outputs(source: Path, outputs: OutputFolder) -> None:
    path = source / "black.png"
    Image.new("RGB", (30, 20)).save(path)
    (outcome,) = pipeline(outputs).process([input_file(path, source)])
    assert (outcome.status, outcome.foreground_fraction) == (Status.DONE, 0.0)
    assert {"masks/black_mask.png", "composites/black_bloodred.jpg"} <= set(tree(outputs.root))


def make_bad(path: Path, kind: str) -> Path:
    if kind == "truncated":
        whole = write_smear(path).read_bytes()
        path.write_bytes(whole[: len(whole) // 2])
    elif kind == "text":
        path.write_text("no image")
    elif kind == "empty":
        path.touch()
    elif kind == "long name":
        path = write_smear(path.with_name("n" * 244 + path.name))
    return path


KINDS = ["good", "good", "slow", "truncated", "text", "empty", "long name", "gone"]


@pytest.mark.parametrize("seed", range(12))
def test_every_file_comes_out_exactly_once(source: Path, outputs: OutputFolder, seed: int) -> None:
    seeded = random.Random(seed)
    feed: list[InputFile | None] = []
    expected: dict[str, Status] = {}
    for number in range(seeded.randrange(0, 25)):
        kind = seeded.choice(KINDS)
        path = source / f"{number:02}.png"
        if kind in {"good", "slow", "gone"}:
            write_smear(path, number, (700, 500) if kind == "slow" else (20, 20))
        path = make_bad(path, kind)
        feed.append(input_file(path, source))
        if kind == "gone":
            path.unlink()
            expected[path.name] = Status.SKIPPED
        else:
            expected[path.name] = Status.DONE if kind in {"good", "slow"} else Status.FAILED
        if seeded.random() < 0.2:
            feed.append(None)
    engine = pipeline(
        outputs,
        batch_size=seeded.choice([1, 2, 4]),
        workers=seeded.choice([1, 3]),
        max_wait_s=seeded.choice([0.0, 100.0]),
    )
    outcomes = list(engine.process(feed))
    assert sorted(o.image for o in outcomes) == sorted(expected)
    assert {o.image: o.status for o in outcomes} == expected
    written = {name for name in tree(outputs.root) if not name.startswith(".")}
    assert written == {p for o in outcomes for p in o.outputs}
    for outcome in outcomes:
        assert (outcome.error is None) is (outcome.status is Status.DONE)
        assert not (outcome.error or "").startswith(("Exception", "ValueError", "OSError"))
    assert workers_alive() == []


def test_masks_do_not_get_mixed_up_between_images(source: Path, outputs: OutputFolder) -> None:
    files = []
    for number in range(30):
        path = source / f"{number:02}.png"
        Image.new("RGB", (20, 20), (255, 255, 255) if number % 3 else (0, 0, 0)).save(path)
        files.append(input_file(path, source))
    for outcome in pipeline(outputs, workers=4).process(files):
        assert outcome.foreground_fraction == (1.0 if int(outcome.image[:2]) % 3 else 0.0)


# How much is under way -------------------------------------------------------------------------


@pytest.mark.parametrize("batch_size", [1, 3])
def test_files_are_drawn_only_as_fast_as_outcomes_are_taken(
    source: Path, outputs: OutputFolder, batch_size: int
) -> None:
    feed = Feed(smears(source, 40))
    for _ in pipeline(outputs, batch_size=batch_size).process(feed):
        feed.given += 1
    assert feed.given == 40
    assert feed.most_under_way <= 4 * batch_size


def test_nothing_is_drawn_before_an_outcome_is_asked_for(
    source: Path, outputs: OutputFolder
) -> None:
    feed = Feed(smears(source, 3))
    pipeline(outputs).process(feed)
    assert feed.drawn == 0


def test_a_run_without_ticks_fills_its_batches(source: Path, outputs: OutputFolder) -> None:
    predictor = BrightIsCell()
    engine = pipeline(outputs, predictor, batch_size=4, max_wait_s=100.0)
    assert len(list(engine.process(smears(source, 11)))) == 11
    assert predictor.batches == [4, 4, 3]


def test_a_tick_hands_on_a_partial_batch_that_has_waited(
    source: Path, outputs: OutputFolder
) -> None:
    predictor = BrightIsCell()
    given: list[Outcome] = []

    def feed() -> Iterator[InputFile | None]:
        yield from smears(source, 2)
        # Bounded by pytest's timeout: a pipeline that ignores ticks never gets past this.
        while len(given) < 2:
            yield None
        yield input_file(write_smear(source / "late.png"), source)

    for outcome in pipeline(outputs, predictor, batch_size=8, max_wait_s=0.01).process(feed()):
        given.append(outcome)  # noqa: PERF402 - the feed looks at it meanwhile
    assert [o.image for o in given] == ["000.png", "001.png", "late.png"]
    assert predictor.batches[-1] == 1


def test_a_tick_does_not_hand_on_what_has_not_waited(source: Path, outputs: OutputFolder) -> None:
    predictor = BrightIsCell()

    def feed() -> Iterator[InputFile | None]:
        for file in smears(source, 4):
            yield file
            yield from [None] * 5

    engine = pipeline(outputs, predictor, batch_size=4, max_wait_s=1000.0)
    assert len(list(engine.process(feed()))) == 4
    assert predictor.batches == [4]


def test_the_network_is_called_by_one_thread_that_is_not_the_iterating_one(
    source: Path, outputs: OutputFolder
) -> None:
    callers = set()

    class Watched(BrightIsCell):
        def predict(self, batch: Logits) -> Logits:
            callers.add(threading.current_thread())
            return super().predict(batch)

    list(pipeline(outputs, Watched(), workers=4).process(smears(source, 10)))
    assert len(callers) == 1
    assert threading.current_thread() not in callers


def test_closed_early_it_leaves_no_thread_and_no_half_file(
    source: Path, outputs: OutputFolder
) -> None:
    process = pipeline(outputs).process(smears(source, 20))
    next(process)
    process.close()  # type: ignore[attr-defined]  # a generator, which has it
    assert workers_alive() == []
    assert not [name for name in tree(outputs.root) if name.endswith(".part")]


# What fails ------------------------------------------------------------------------------------


class SmallDevice(BrightIsCell):
    """Has memory for so many images."""

    def __init__(self, room: int) -> None:
        super().__init__()
        self.room = room

    def predict(self, batch: Logits) -> Logits:
        logits = super().predict(batch)
        if len(batch) > self.room:
            raise OutOfMemoryError(f"cpu has no memory for {len(batch)} images")
        return logits


def test_out_of_memory_halves_the_batch_and_remembers(source: Path, outputs: OutputFolder) -> None:
    predictor = SmallDevice(room=2)
    engine = pipeline(outputs, predictor, batch_size=8, max_wait_s=100.0)
    outcomes = list(engine.process(smears(source, 20)))
    assert [o.status for o in outcomes] == [Status.DONE] * 20
    assert predictor.batches == [8, 4, *[2] * 10]
    predictor.batches.clear()
    assert len(list(engine.process(smears(source, 4)))) == 20
    assert max(predictor.batches) == 2


def test_out_of_memory_for_one_image_is_the_device_s_fault(
    source: Path, outputs: OutputFolder
) -> None:
    with pytest.raises(DeviceError, match="no memory for 1 images") as info:
        list(pipeline(outputs, SmallDevice(room=0)).process(smears(source, 6)))
    assert info.value.exit_code == 75
    assert workers_alive() == []


class LostDevice(BrightIsCell):
    def predict(self, batch: Logits) -> Logits:
        raise DeviceError("cuda:0 is lost")


def test_a_lost_device_blames_no_image(source: Path, outputs: OutputFolder) -> None:
    with pytest.raises(DeviceError, match="lost"):
        list(pipeline(outputs, LostDevice()).process(smears(source, 6)))


class LostLater(BrightIsCell):
    def predict(self, batch: Logits) -> Logits:
        if self.batches:
            raise DeviceError("cuda:0 is lost")
        return super().predict(batch)


def test_what_was_done_before_the_device_was_lost_stays_done(
    source: Path, outputs: OutputFolder
) -> None:
    outcomes = []
    with pytest.raises(DeviceError, match="lost"):
        for outcome in pipeline(outputs, LostLater()).process(smears(source, 8)):
            outcomes.append(outcome)  # noqa: PERF402 - what came before the error is looked at
    assert [outcome.image for outcome in outcomes] == [f"{n:03}.png" for n in range(4)]
    assert all(outputs.exists(path) for outcome in outcomes for path in outcome.outputs)


# Memory ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("room_pixels", [1, 1200, 2500, 5000])
def test_no_more_pixels_are_in_hand_than_there_is_room_for(
    source: Path, outputs: OutputFolder, room_pixels: int
) -> None:
    predictor = BrightIsCell()
    files = smears(source, 11)  # of 1200 pixels each
    outcomes = list(pipeline(outputs, predictor, room_pixels=room_pixels).process(files))
    assert sorted(o.image for o in outcomes) == [file.image for file in files]
    assert {o.status for o in outcomes} == {Status.DONE}
    assert max(predictor.batches) <= max(1, room_pixels // 1200)


def test_a_giant_among_small_images_is_taken_alone(source: Path, outputs: OutputFolder) -> None:
    for number in range(9):
        size_wh = (200, 100) if number == 4 else (20, 10)
        write_smear(source / f"{number}.png", size_wh=size_wh)
    files = [input_file(path, source) for path in sorted(source.iterdir())]
    predictor = BrightIsCell()
    outcomes = list(pipeline(outputs, predictor, room_pixels=5000).process(files))
    assert sorted(o.image for o in outcomes) == [file.image for file in files]
    assert {o.status for o in outcomes} == {Status.DONE}
    assert 1 in predictor.batches


def test_ticks_do_not_keep_an_image_from_the_room_it_waits_for(
    source: Path, outputs: OutputFolder
) -> None:
    files = smears(source, 5)
    feed = [item for file in files for item in (file, None)]
    outcomes = list(pipeline(outputs, room_pixels=1, max_wait_s=1000).process(feed))
    assert {o.image for o in outcomes} == {file.image for file in files}


# Cells -----------------------------------------------------------------------------------------


def two_discs(path: Path) -> Path:
    """Write a picture with a white disc within it, and one that its border cuts."""
    y, x = np.ogrid[:96, :128]
    bright = ((y - 40) ** 2 + (x - 40) ** 2 < 20**2) | ((y - 96) ** 2 + (x - 100) ** 2 < 20**2)
    pixels = np.repeat((bright * np.uint8(255))[..., None], 3, axis=2)
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path)
    return path


def test_cells_are_counted_measured_and_labelled(source: Path, outputs: OutputFolder) -> None:
    path = two_discs(source / "b/a.png")
    process = pipeline(outputs, labels=True, pixel_size_um=0.5).process
    (outcome,) = process([input_file(path, source)])
    counts = (outcome.cell_count, outcome.red_cell_count, outcome.white_cell_count)
    assert counts == (2, 2, 0)
    assert (outcome.platelet_count, outcome.border_cell_count) == (0, 1)
    assert outcome.pixel_size_um == 0.5
    assert outcome.labels == "labels/b/a_labels.tif"
    assert outcome.cells == "cells/b/a_cells.csv"
    with tifffile.TiffFile(outputs.root / outcome.labels) as tiff:
        labels = tiff.asarray()
        per_cm = tiff.pages[0].tags["XResolution"].value
    assert labels.dtype == np.uint16
    assert labels.shape == (96, 128)
    assert set(np.unique(labels)) == {0, 1, 2}
    assert per_cm[0] / per_cm[1] == pytest.approx(20_000)
    with (outputs.root / outcome.cells).open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["image"] for row in rows] == ["b/a.png", "b/a.png"]
    assert sorted(row["touches_border"] for row in rows) == ["0", "1"]
    for row in rows:
        area = int((labels == int(row["label"])).sum())
        assert float(row["area"]) == area
        assert float(row["area_um2"]) == pytest.approx(area / 4, rel=1e-5)


def test_without_cells_there_are_masks_and_composites_alone(
    source: Path, outputs: OutputFolder
) -> None:
    path = two_discs(source / "a.png")
    (outcome,) = pipeline(outputs, cells=False).process([input_file(path, source)])
    assert outcome.cell_count is None
    assert outcome.outputs == (outcome.mask, outcome.composite)


def test_a_picture_without_cells_has_a_table_without_rows(
    source: Path, outputs: OutputFolder
) -> None:
    Image.new("RGB", (30, 20)).save(source / "black.png")
    file = input_file(source / "black.png", source)
    (outcome,) = pipeline(outputs, labels=True).process([file])
    assert (outcome.cell_count, outcome.cell_diameter_px) == (0, None)
    assert (outputs.root / outcome.cells).read_text().count("\n") == 1
    assert not tifffile.imread(outputs.root / outcome.labels).any()


# Tiles -----------------------------------------------------------------------------------------


def many_discs(path: Path, size_wh: tuple[int, int]) -> int:
    """Write a picture with a grid of white discs of 20 px on black; gives their number."""
    y, x = np.ogrid[: size_wh[1], : size_wh[0]]
    # The middles lie 40 px apart, the first ones 20 px from the border.
    bright = ((y % 40 - 20) ** 2 + (x % 40 - 20) ** 2 < 10**2) & (y < size_wh[1] // 40 * 40)
    bright &= x < size_wh[0] // 40 * 40
    pixels = np.repeat((bright * np.uint8(255))[..., None], 3, axis=2)
    tifffile.imwrite(path, pixels, photometric="rgb", compression="zlib", rowsperstrip=16)
    return (size_wh[0] // 40) * (size_wh[1] // 40)


def read_rows(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def test_an_image_whose_cells_would_be_too_small_is_taken_in_tiles(
    source: Path, outputs: OutputFolder
) -> None:
    count = many_discs(source / "a.tif", (410, 300))
    file = input_file(source / "a.tif", source)
    predictor = BrightIsCell()
    (outcome,) = pipeline(outputs, predictor, tiling=True, labels=True).process([file])
    assert outcome.status is Status.DONE, outcome.error
    assert outcome.tile_scale == pytest.approx(36 / 20, abs=0.2)
    assert outcome.cell_count == count
    assert outcome.cell_diameter_px == pytest.approx(20, abs=1)
    assert len(predictor.batches) > 1
    assert max(predictor.batches) <= OPTIONS.batch_size
    (plain,) = pipeline(outputs, tiling=False).process([file])
    assert plain.tile_scale is None
    assert plain.cell_count != count


def test_a_picture_without_anything_is_not_taken_in_tiles(
    source: Path, outputs: OutputFolder
) -> None:
    Image.new("RGB", (400, 300)).save(source / "black.png")
    file = input_file(source / "black.png", source)
    (outcome,) = pipeline(outputs, tiling=True).process([file])
    assert (outcome.status, outcome.tile_scale, outcome.cell_count) == (Status.DONE, None, 0)


@pytest.mark.parametrize("tiling", [True, False])
def test_a_large_image_is_written_in_bands(
    source: Path, outputs: OutputFolder, tiling: bool
) -> None:
    count = many_discs(source / "a.tif", (410, 900))
    file = input_file(source / "a.tif", source)
    process = pipeline(
        outputs, large_pixels=100_000, tiling=tiling, labels=True, pixel_size_um=0.5
    ).process
    (outcome,) = process([file])
    assert outcome.status is Status.DONE, outcome.error
    assert (outcome.width_px, outcome.height_px) == (410, 900)
    assert outcome.composite == "composites/a_bloodred.tif"
    assert outcome.cell_count == count
    with Image.open(outputs.root / outcome.mask) as picture:
        mask = np.asarray(picture)
    assert outcome.foreground_fraction == pytest.approx((mask == 255).mean(), abs=1e-6)
    composite = tifffile.imread(outputs.root / outcome.composite)
    assert composite.shape == (900, 410, 3)
    labels = tifffile.imread(outputs.root / outcome.labels)
    assert labels.shape == mask.shape
    rows = read_rows(outputs.root / outcome.cells)
    assert [int(row["label"]) for row in rows] == list(range(1, count + 1))
    areas = np.bincount(labels.ravel())[1:]
    assert [float(row["area"]) for row in rows] == areas.tolist()


class FourChannels(BrightIsCell):
    """Gives four planes, as the shipped model does."""

    def predict(self, batch: Logits) -> Logits:
        logits = super().predict(batch)
        return np.concatenate([logits, logits, -np.abs(logits), -np.abs(logits)], axis=1)


@pytest.mark.parametrize("cells", [True, False])
@pytest.mark.parametrize("tiling", [True, False])
def test_a_large_image_goes_through_a_network_of_several_channels(
    source: Path, outputs: OutputFolder, cells: bool, tiling: bool
) -> None:
    many_discs(source / "a.tif", (410, 900))
    process = pipeline(
        outputs,
        FourChannels(),
        large_pixels=100_000,
        tiling=tiling,
        cells=cells,
        class_names=("cell", "core", "white_cell", "platelet"),
    ).process
    (outcome,) = process([input_file(source / "a.tif", source)])
    assert (outcome.status, outcome.error) == (Status.DONE, None)


def test_a_large_image_of_another_format_is_read_whole_and_written_in_bands(
    source: Path, outputs: OutputFolder
) -> None:
    count = many_discs(source / "a.tif", (410, 300))
    Image.fromarray(tifffile.imread(source / "a.tif")).save(source / "a.png")
    (source / "a.tif").unlink()
    file = input_file(source / "a.png", source)
    (outcome,) = pipeline(outputs, large_pixels=100_000, tiling=True).process([file])
    assert (outcome.cell_count, outcome.composite) == (count, "composites/a_bloodred.tif")


def test_a_large_image_that_has_nothing_in_it_gets_its_outputs(
    source: Path, outputs: OutputFolder
) -> None:
    tifffile.imwrite(source / "a.tif", np.zeros((500, 400, 3), np.uint8), photometric="rgb")
    file = input_file(source / "a.tif", source)
    (outcome,) = pipeline(outputs, large_pixels=100_000, tiling=True).process([file])
    assert (outcome.status, outcome.cell_count) == (Status.DONE, 0)
    assert all(outputs.exists(path) for path in outcome.outputs)


def test_a_large_image_that_is_damaged_costs_no_other(source: Path, outputs: OutputFolder) -> None:
    many_discs(source / "b.tif", (410, 900))
    write_smear(source / "c.png")
    with tifffile.TiffFile(source / "b.tif") as tiff:
        place = tiff.pages[0].dataoffsets[40]
    with (source / "b.tif").open("r+b") as file:
        file.seek(place)
        file.write(b"damaged")
    files = [input_file(source / name, source) for name in ("b.tif", "c.png")]
    outcomes = {
        o.image: o for o in pipeline(outputs, large_pixels=100_000, tiling=True).process(files)
    }
    assert outcomes["b.tif"].status is Status.FAILED
    assert "b.tif" in (outcomes["b.tif"].error or "")
    assert outcomes["c.png"].status is Status.DONE
    assert not [name for name in tree(outputs.root) if "b_" in name or "part" in name]


def test_an_interrupted_large_image_is_left_to_be_done_again(
    source: Path, outputs: OutputFolder
) -> None:
    many_discs(source / "a.tif", (410, 900))
    file = input_file(source / "a.tif", source)

    def stop() -> None:
        raise Interrupted("the process is to end")

    options = replace(OPTIONS, large_pixels=100_000, tiling=True)
    working = Pipeline([BrightIsCell()], outputs, OutputNames(), options, alive=stop)
    (outcome,) = working.process([file])
    assert outcome.status is Status.SKIPPED
    assert not [name for name in tree(outputs.root) if not name.startswith(".")]


class Poisoned(BrightIsCell):
    """Cannot bear a black image, and says so for the whole batch."""

    def predict(self, batch: Logits) -> Logits:
        super().predict(batch)
        if (batch.max(axis=(1, 2, 3)) == 0).any():
            raise RuntimeError("a kernel that nobody expected")
        return batch[:, :1] - 0.5


class NotANumber(BrightIsCell):
    """Gives infinities for a black image, as float16 does when it overflows."""

    def predict(self, batch: Logits) -> Logits:
        logits = super().predict(batch)
        logits[batch.max(axis=(1, 2, 3)) == 0] = np.inf
        return logits


@pytest.mark.parametrize(
    ("predictor", "error"),
    [
        (Poisoned(), "RuntimeError: a kernel that nobody expected"),
        (NotANumber(), "PredictionError: '005.png': .*float32"),
    ],
)
def test_one_image_that_the_network_cannot_take_costs_no_other(
    source: Path, outputs: OutputFolder, predictor: AnyPredictor, error: str
) -> None:
    files = smears(source, 12)
    Image.new("RGB", (20, 20)).save(source / "005.png")
    files[5] = input_file(source / "005.png", source)
    outcomes = {o.image: o for o in pipeline(outputs, predictor).process(files)}
    assert len(outcomes) == 12
    bad = outcomes.pop("005.png")
    assert bad.status is Status.FAILED
    assert bad.mask is None
    assert re.match(error, bad.error or "")
    assert {o.status for o in outcomes.values()} == {Status.DONE}


def test_what_cannot_be_written_ends_the_run_and_blames_no_image(
    source: Path, outputs: OutputFolder
) -> None:
    (outputs.root / "masks").write_text("a file in the way")
    outcomes = []
    with pytest.raises(OutputError, match="masks"):
        for outcome in pipeline(outputs).process(smears(source, 12)):
            outcomes.append(outcome)  # noqa: PERF402 - what came before the error counts
    assert outcomes == []
    assert workers_alive() == []


def test_a_name_too_long_for_an_output_leaves_no_other_output(
    source: Path, outputs: OutputFolder
) -> None:
    # The mask's name would just fit, the composite's does not.
    path = write_smear(source / ("n" * 244 + ".png"))
    (outcome,) = pipeline(outputs).process([input_file(path, source)])
    assert outcome.status is Status.FAILED
    assert "shorter name" in (outcome.error or "")
    assert set(tree(outputs.root)) == {".bcseg.lock"}


def test_a_composite_too_wide_for_jpeg_fails_and_is_fine_as_png(
    source: Path, outputs: OutputFolder
) -> None:
    path = source / "wide.png"
    Image.new("RGB", (66_000, 2), "white").save(path)
    (outcome,) = pipeline(outputs).process([input_file(path, source)])
    assert outcome.status is Status.FAILED
    assert "set outputs.composite_format to png" in (outcome.error or "")
    assert "'wide.png'" in (outcome.error or "")
    (outcome,) = pipeline(outputs, composite_format="png").process([input_file(path, source)])
    assert (outcome.status, outcome.foreground_fraction) == (Status.DONE, 1.0)


def test_a_file_that_is_gone_is_skipped_and_not_failed(source: Path, outputs: OutputFolder) -> None:
    (file,) = smears(source, 1)
    file.path.unlink()
    (outcome,) = pipeline(outputs).process([file])
    assert outcome.status is Status.SKIPPED
    assert (outcome.error or "").startswith("ImageChangedError: '000.png' vanished")


def test_the_record_is_of_the_bytes_that_were_read(source: Path, outputs: OutputFolder) -> None:
    (file,) = smears(source, 1)
    write_smear(file.path, seed=9, size_wh=(60, 60))
    os.utime(file.path, ns=(5, 5))
    (outcome,) = pipeline(outputs).process([file])
    assert (outcome.size_bytes, outcome.mtime_ns) == (file.path.stat().st_size, 5)
    assert outcome.width_px == 60


def test_a_feed_that_fails_ends_the_run_with_its_own_error(
    source: Path, outputs: OutputFolder
) -> None:
    def feed() -> Iterator[InputFile]:
        yield from smears(source, 3)
        raise OSError("the folder is gone")

    with pytest.raises(OSError, match="the folder is gone"):
        list(pipeline(outputs).process(feed()))
    assert workers_alive() == []


def test_the_real_network_gives_the_mask_of_a_plain_forward_pass(
    source: Path, outputs: OutputFolder
) -> None:
    from parts import tiny_network

    model, _ = tiny_network()
    path = write_smear(source / "a.png", size_wh=(INPUT_SIZE_PX, INPUT_SIZE_PX))
    predictor = Predictor(model, CPU, INPUT_SIZE_PX)
    (outcome,) = pipeline(outputs, predictor).process([input_file(path, source)])
    with Image.open(path) as image:
        tensor = preprocess(np.asarray(image), INPUT_SIZE_PX)
    expected = np.where(predictor.predict(tensor[np.newaxis])[0, 0] > 0, 255, 0)
    with Image.open(outputs.root / str(outcome.mask)) as mask:
        np.testing.assert_array_equal(np.asarray(mask), expected)
    assert 0.2 < (outcome.foreground_fraction or 0) < 0.8


def test_the_names_of_an_outcome_s_files_are_on_disk_when_it_is_given_out(
    source: Path, outputs: OutputFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    done: list[tuple[str, Path]] = []
    replace_file, sync_folder = Path.replace, store_outputs.sync_folder

    def renamed(part: Path, path: Path) -> Path:
        result = replace_file(part, path)
        done.append(("named", path))
        return result

    def synced(folder: Path) -> None:
        before = len(done)
        sync_folder(folder)
        # Counts for what was named before it began.
        done.insert(before, ("synced", folder))

    monkeypatch.setattr(Path, "replace", renamed)
    monkeypatch.setattr(store_outputs, "sync_folder", synced)
    count = 0
    for outcome in pipeline(outputs, workers=4).process(smears(source, 25)):
        count += 1
        for relative in outcome.outputs:
            path = outputs.root / relative
            assert ("synced", path.parent) in done[done.index(("named", path)) :]
    assert count == 25
