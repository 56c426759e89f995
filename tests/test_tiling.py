"""Large images in tiles: the same cells as in one piece, whatever the size."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

import cv2
import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bcseg_batch.errors import PredictionError
from bcseg_batch.segment.cells import CellKind, find_cells, part_cells
from bcseg_batch.segment.checkpoint import load_checkpoint
from bcseg_batch.segment.devices import open_predictor
from bcseg_batch.segment.measure import measure_cells
from bcseg_batch.segment.postprocess import mask_from_probability, probability, resize_probability
from bcseg_batch.segment.predictor import Predictor
from bcseg_batch.segment.preprocess import preprocess, resize_rgb
from bcseg_batch.segment.tiling import (
    MIN_DIAMETER_PX,
    ArrayRaster,
    Band,
    blend_weights,
    choose_scale,
    segment_in_tiles,
    stretch,
    tile_count,
    tile_starts,
    typical_diameter_px,
)
from bcseg_training.dataset import read_pair, usable_pairs
from bcseg_training.instances import label_iou

Pixels = npt.NDArray[np.uint8]
Floats = npt.NDArray[np.float32]

NAMES = ("cell", "core", "white_cell", "platelet")
# What the channels of a drawn picture stand for: see `predict`.
GROUND, CELL, CORE, PLATELET = 230, 150, 90, 20
SIZE_PX = 64


def predict(batch: Floats) -> Floats:
    """A network that reads a drawn picture: green tells cell and core, blue white cell.

    Platelets are red.
    """
    red, green, blue = 255 * batch[:, 0], 255 * batch[:, 1], 255 * batch[:, 2]
    platelet = (red < 100).astype(np.float32)
    planes = [190 - green - 200 * platelet, 120 - green - 200 * platelet, 100 - blue, 100 - red]
    return np.stack(planes, axis=1).astype(np.float32) / 5


def draw(shape_hw: tuple[int, int], cells: Sequence[tuple[int, int, int, CellKind]]) -> Pixels:
    """Draw round cells: (y, x, radius, kind) each."""
    pixels = np.full((*shape_hw, 3), GROUND, np.uint8)
    for y, x, radius, kind in cells:
        if kind == CellKind.PLATELET:
            cv2.circle(pixels, (x, y), radius, (PLATELET, CELL, GROUND), -1)
            continue
        blue = 40 if kind == CellKind.WHITE_CELL else GROUND
        cv2.circle(pixels, (x, y), radius, (GROUND, CELL, blue), -1)
        cv2.circle(pixels, (x, y), radius // 2, (GROUND, CORE, blue), -1)
    return pixels


def meadow(
    shape_hw: tuple[int, int], *, pitch: int = 17, radius: int = 8, seed: int = 0
) -> tuple[Pixels, int]:
    """A picture full of cells, each touching its neighbour in the row; with how many there are.

    Pairs stand apart, so that no gap between cells is enclosed.
    """
    rng = np.random.default_rng(seed)
    cells = [
        (y, x, radius - 2 * int(rng.random() < 0.2), CellKind.RED_CELL)
        for y in range(radius + 1, shape_hw[0] - radius, pitch + 3)
        for left in range(radius + 1, shape_hw[1] - radius - pitch, 2 * pitch + 4)
        for x in (left, left + pitch)
        if rng.random() < 0.8
    ]
    return draw(shape_hw, cells), len(cells)


def run(pixels: Pixels, scale: float = 1.0, **options: object) -> list[Band]:
    arguments = {"input_size_px": SIZE_PX, "batch_size": 3} | options
    return list(segment_in_tiles(ArrayRaster(pixels), scale, predict, NAMES, **arguments))


def whole(bands: list[Band], name: str) -> npt.NDArray[np.generic]:
    return np.concatenate([getattr(band, name) for band in bands])


# Tiles ---------------------------------------------------------------------------------------


@given(st.integers(1, 3000), st.integers(8, 512), st.floats(0, 0.5))
def test_tiles_cover_every_pixel_and_their_weights_sum_to_one(
    length_px: int, size_px: int, share: float
) -> None:
    overlap_px = int(share * size_px)
    starts = tile_starts(length_px, size_px, overlap_px)
    assert starts[0] == 0
    assert max(starts[-1] + size_px, length_px) == max(size_px, length_px)
    assert all(b - a <= size_px - overlap_px for a, b in pairwise(starts))
    total = np.zeros(max(size_px, length_px))
    for start, weights in zip(starts, blend_weights(starts, size_px), strict=True):
        assert (weights > 0).all()
        total[start : start + size_px] += weights
    assert np.allclose(total, 1, atol=1e-5)


def test_a_seam_shows_neither_of_its_tiles_alone() -> None:
    """Tiles that disagree wholly are blended without a step."""
    answers = iter([-9.0, 9.0, -9.0, 9.0, -9.0, 9.0, -9.0, 9.0, -9.0])

    def moody(batch: Floats) -> Floats:
        return np.stack([np.full((4, SIZE_PX, SIZE_PX), next(answers)) for _ in batch]).astype("f4")

    bands = segment_in_tiles(
        ArrayRaster(np.zeros((SIZE_PX, 160, 3), np.uint8)),
        1.0,
        moody,
        NAMES,
        threshold=0.05,
        input_size_px=SIZE_PX,
    )
    mask = np.concatenate([band.mask for band in bands])
    # Three tiles at 0, 48 and 96; the second alone is foreground, and wins as far as it weighs.
    assert not mask[:, :48].any()
    assert mask[:, 64:96].all()
    assert (np.diff(mask[32].astype(int)) != 0).sum() == 2


def test_progress_counts_every_tile() -> None:
    steps: list[tuple[int, int]] = []
    pixels = np.full((200, 300, 3), GROUND, np.uint8)
    run(pixels, on_progress=lambda done, of: steps.append((done, of)))
    count = tile_count((200, 300), 1.0, SIZE_PX)
    assert steps == [(i + 1, count) for i in range(count)]


def test_a_network_without_numbers_is_said() -> None:
    with pytest.raises(PredictionError, match="float32"):
        list(
            segment_in_tiles(
                ArrayRaster(np.zeros((99, 99, 3), np.uint8)),
                1.0,
                lambda batch: np.full((len(batch), 4, SIZE_PX, SIZE_PX), np.nan, np.float32),
                NAMES,
                input_size_px=SIZE_PX,
            )
        )


# Bands ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("scale", [1.0, 0.75, 0.9, 1.5])
def test_every_cell_is_found_once_wherever_blocks_and_bands_cut(
    monkeypatch: pytest.MonkeyPatch, scale: float
) -> None:
    monkeypatch.setattr("bcseg_batch.segment.tiling._BAND_PX", 4000)
    pixels, count = meadow((331, 283))
    bands = run(pixels, scale)
    assert len(bands) > 4
    assert [band.top for band in bands[1:]] == [band.bottom for band in bands[:-1]]
    assert (bands[0].top, bands[-1].bottom) == (0, 331)
    numbers = whole(bands, "numbers")
    assert sorted(numbers) == list(range(1, count + 1))
    labels = whole(bands, "labels")
    assert labels.shape == (331, 283)
    assert np.array_equal(np.unique(labels), np.arange(count + 1))
    assert np.array_equal(whole(bands, "pixels"), pixels)


@pytest.mark.parametrize("scale", [1.0, 0.8])
def test_labels_are_those_of_an_untiled_run(scale: float) -> None:
    pixels, _ = meadow((300, 310), seed=3)
    tiled, untiled = run(pixels, scale), run(pixels, scale, input_size_px=512)
    assert len({tile_count((300, 310), scale, size) for size in (SIZE_PX, 512)}) == 2
    a, b = whole(tiled, "labels"), whole(untiled, "labels")
    # Where a probability is the threshold but for rounding, a pixel may go either way.
    differs = whole(tiled, "mask") != whole(untiled, "mask")
    assert differs.sum() <= 2
    a, b = (np.where(differs, 0, labels).astype(np.int32) for labels in (a, b))
    assert a.max() == b.max()
    # What two cells share where they overlap is as deep for the one as for the other: there, and
    # nowhere else, the watershed may decide otherwise.
    best = label_iou(a, b).max(axis=1)
    assert best.min() > 0.6
    assert (best == 1).mean() > 0.85


def test_kinds_borders_and_measurements_are_those_of_the_whole_image(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("bcseg_batch.segment.tiling._BAND_PX", 3000)
    cells = [
        (20, 20, 8, CellKind.RED_CELL),
        (60, 55, 9, CellKind.WHITE_CELL),
        (0, 90, 8, CellKind.RED_CELL),
        (150, 199, 8, CellKind.RED_CELL),
        (112, 56, 3, CellKind.PLATELET),
        (190, 100, 8, CellKind.RED_CELL),
    ]
    pixels = draw((200, 200), cells)
    bands = run(pixels, pixel_size_um=0.5)
    labels = whole(bands, "labels").astype(np.int32)
    order = np.argsort(whole(bands, "numbers"))
    kinds, border = whole(bands, "kinds")[order], whole(bands, "touches_border")[order]
    for y, x, _, kind in cells:
        number = int(labels[y, x])
        assert kinds[number - 1] == kind
        assert border[number - 1] == (y == 0 or x == 199)
    tables = [band.table for band in bands if band.table is not None]
    from bcseg_batch.segment.cells import Cells

    direct = measure_cells(Cells(labels, kinds, border), pixels, pixel_size_um=0.5)
    for name, values in direct.items():
        banded = np.concatenate([table[name] for table in tables])[order]
        if values.dtype.kind == "f":
            assert np.allclose(banded, values), name
        else:
            assert np.array_equal(banded, values), name


@pytest.mark.parametrize("shape_hw", [(512, 512), (768, 512)])
def test_one_tile_is_the_ordinary_way(shape_hw: tuple[int, int]) -> None:
    """What the stretch would do evenly is done the same in a tile."""
    pixels, _ = meadow((256, 256), pitch=50, radius=20)
    scale = 0.5
    size_px = 128
    bands = run(pixels, scale, input_size_px=size_px)
    soft = probability(predict(preprocess(pixels, size_px)[np.newaxis]))[0]
    assert np.array_equal(whole(bands, "mask"), mask_from_probability(soft[0], (256, 256), 0.5))
    plain = find_cells(soft, NAMES, (256, 256))
    assert sum(band.numbers.size for band in bands) == plain.cell_count
    assert (whole(bands, "labels") > 0)[plain.labels > 0].mean() > 0.99
    confidence = sum(band.confidence_sum for band in bands) / sum(b.confidence_px for b in bands)
    assert confidence == pytest.approx(np.maximum(soft[0], 1 - soft[0]).mean(), abs=1e-3)


class Watched(ArrayRaster):
    """A raster that notes how much is read at once, and how often each row is."""

    def __init__(self, pixels: Pixels) -> None:
        super().__init__(pixels)
        self.largest_bytes = 0
        self.rows = np.zeros(len(pixels), int)

    def read(self, top: int, bottom: int, left: int, right: int) -> Pixels:
        window = super().read(top, bottom, left, right)
        self.largest_bytes = max(self.largest_bytes, window.nbytes)
        self.rows[top:bottom] += 1
        return window


def test_memory_depends_on_the_width_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("bcseg_batch.segment.tiling._BAND_PX", 20_000)
    monkeypatch.setattr("bcseg_batch.segment.tiling._READ_BYTES", 30_000)
    largest = []
    for height_px in (400, 1600):
        raster = Watched(meadow((height_px, 200))[0])
        sizes = [
            max(band.labels.size, 3 * band.mask.size)
            for band in segment_in_tiles(raster, 1.0, predict, NAMES, input_size_px=SIZE_PX)
        ]
        largest.append((raster.largest_bytes, max(sizes)))
        assert raster.rows.mean() < 2.2
    assert largest[0] == largest[1]
    assert largest[0][0] <= 3 * 20_000


def test_an_empty_image_has_bands_and_no_cell() -> None:
    bands = run(np.full((150, 100, 3), GROUND, np.uint8))
    assert sum(len(band.mask) for band in bands) == 150
    assert not any(band.labels.any() or band.foreground_px or band.numbers.size for band in bands)


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 200), st.integers(1, 200), st.floats(0.02, 2.0))
def test_any_size_and_scale_is_covered(height_px: int, width_px: int, scale: float) -> None:
    pixels = np.full((height_px, width_px, 3), GROUND, np.uint8)
    bands = run(pixels, scale)
    assert whole(bands, "mask").shape == (height_px, width_px)
    assert np.array_equal(whole(bands, "pixels"), pixels)


def test_the_stretch_by_bands_is_the_ordinary_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("bcseg_batch.segment.tiling._READ_BYTES", 20_000)
    pixels = np.random.default_rng(0).integers(0, 256, (431, 257, 3), dtype=np.uint8)
    difference = stretch(ArrayRaster(pixels), 64).astype(int) - resize_rgb(pixels, 64)
    assert np.abs(difference).max() <= 1


# The scale -----------------------------------------------------------------------------------


def first_pass(pixels: Pixels, size_px: int) -> float | None:
    soft = probability(predict(preprocess(pixels, size_px)[np.newaxis]))[0]
    return typical_diameter_px(part_cells(soft, NAMES))


def choose(pixels: Pixels, size_px: int = 256) -> float | None:
    return choose_scale(
        ArrayRaster(pixels), first_pass(pixels, size_px), predict, NAMES, input_size_px=size_px
    )


def test_cells_of_a_good_size_are_not_tiled() -> None:
    pixels, _ = meadow((512, 512), pitch=85, radius=40)
    diameter = first_pass(pixels, 256)
    assert diameter == pytest.approx(40, rel=0.05)
    assert choose(pixels) is None


@pytest.mark.parametrize("radius", [9, 12, 20])
def test_small_cells_are_brought_to_the_network_s_size(radius: int) -> None:
    pixels, _ = meadow((1100, 1300), pitch=2 * radius + 3, radius=radius)
    scale = choose(pixels)
    assert scale is not None
    assert 2 * radius * scale == pytest.approx(36, rel=0.15)


def test_a_huge_image_is_probed_where_there_is_something() -> None:
    """One corner of cells that vanish in the first pass, on much empty ground."""
    pixels = np.full((4000, 4000, 3), GROUND, np.uint8)
    pixels[2600:3600, 200:1200] = meadow((1000, 1000), pitch=25, radius=11)[0]
    scale = choose_scale(ArrayRaster(pixels), None, predict, NAMES, input_size_px=256)
    assert scale is not None
    assert 22 * scale == pytest.approx(36, rel=0.15)


@pytest.mark.parametrize("level", [0, 128, GROUND])
def test_a_blank_image_is_never_tiled_and_costs_nothing(level: int) -> None:
    def never(batch: Floats) -> Floats:
        raise AssertionError("a blank window was given to the network")

    noise = np.random.default_rng(0).integers(-2, 3, (3000, 2000, 3))
    pixels = np.clip(level + noise, 0, 255).astype(np.uint8)
    assert choose_scale(ArrayRaster(pixels), None, never, NAMES) is None


def test_an_image_without_cells_takes_a_bounded_number_of_probes() -> None:
    probes: list[int] = []

    def nothing(batch: Floats) -> Floats:
        probes.append(len(batch))
        return np.full((len(batch), 4, 128, 128), -9, np.float32)

    pixels = np.random.default_rng(0).integers(0, 256, (3000, 4000, 3), dtype=np.uint8)
    assert choose_scale(ArrayRaster(pixels), None, nothing, NAMES, input_size_px=128) is None
    assert 0 < sum(probes) <= 12


def test_a_doubtful_pass_tells_no_size() -> None:
    soft = np.zeros((1, 128, 128), np.float32)
    soft[0, 20:50, 20:50] = soft[0, 60:90, 20:50] = soft[0, 20:50, 60:90] = 0.7
    assert typical_diameter_px(part_cells(soft, ("cell",))) is None
    soft[soft > 0] = 0.95
    assert typical_diameter_px(part_cells(soft, ("cell",))) == pytest.approx(30 * 2 / np.pi**0.5)
    soft[:] = 0
    assert typical_diameter_px(part_cells(soft, ("cell",))) is None


# The shipped model ---------------------------------------------------------------------------


@pytest.fixture(scope="module")
def predictor() -> Predictor:
    path = Path(__file__).parents[1] / "bcseg_batch" / "weights" / "default.safetensors"
    loaded = load_checkpoint(path)
    return open_predictor(loaded.model, loaded.spec.input_size_px, device="cpu", dtype="float32")


def dice(found: npt.NDArray[np.bool_], true: npt.NDArray[np.bool_]) -> float:
    return float(2 * (found & true).sum() / (found.sum() + true.sum()))


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_smears_at_half_their_scale_are_tiled_and_lose_nothing(
    predictor: Predictor, data_dir: Path
) -> None:
    """Photographs as they are take no tiles; mirrored outwards to twice their sides they do."""
    falls = []
    for pair in usable_pairs(data_dir / "bbbc041seg" / "val")[::4]:
        image, mask = read_pair(pair)
        height, width = image.shape[:2]
        soft = probability(predictor.predict(preprocess(image, 512)[np.newaxis])[0])
        diameter = typical_diameter_px(part_cells(soft, NAMES))
        assert diameter is not None
        assert diameter >= MIN_DIAMETER_PX
        plain = resize_probability(soft[0], (height, width)) > 0.5
        y, x = height // 2, width // 2
        wide = cv2.copyMakeBorder(image, y, y, x, x, cv2.BORDER_REFLECT_101)
        small = probability(predictor.predict(preprocess(wide, 512)[np.newaxis])[0])
        raster = ArrayRaster(wide)
        scale = choose_scale(
            raster,
            typical_diameter_px(part_cells(small, NAMES)),
            predictor.predict,
            NAMES,
            batch_size=4,
        )
        assert scale is not None
        bands = segment_in_tiles(
            raster, scale, predictor.predict, NAMES, batch_size=4, measure=False
        )
        found = np.concatenate([band.mask for band in bands])[y : y + height, x : x + width] > 0
        falls.append(dice(plain, mask > 127) - dice(found, mask > 127))
    assert np.mean(falls) < 0.02
