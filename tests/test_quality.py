"""What makes a result doubtful, and what does not."""

from __future__ import annotations

from pathlib import Path

import cv2
import numpy as np
import numpy.typing as npt
import pytest
from PIL import Image, ImageDraw, ImageFont
from pydantic import ValidationError

import bcseg_batch.weights
from bcseg_batch.items import Flag
from bcseg_batch.segment.checkpoint import Checkpoint, load_checkpoint
from bcseg_batch.segment.devices import open_predictor
from bcseg_batch.segment.predictor import Predictor
from bcseg_batch.segment.quality import (
    LOOK_NAMES,
    Measures,
    TrainingStatistics,
    assess,
    mean_solidity,
    measure_light,
    measure_quality,
)
from bcseg_batch.store.images import decode_image
from bcseg_training.profile import measure_image, statistics_of

Bytes = npt.NDArray[np.uint8]
SIZE = len(LOOK_NAMES)


def discs(radius_px: int = 20, *, slide: int = 230, cell: int = 120) -> tuple[Bytes, npt.NDArray]:
    """A grey picture of discs with noise, and the probability that a sure network gives of it."""
    y, x = np.ogrid[:512, :512]
    inside = ((y % 64 - 32) ** 2 + (x % 64 - 32) ** 2) < radius_px**2
    grey = np.where(inside, np.uint8(cell), np.uint8(slide))
    noise = np.random.default_rng(0).integers(-3, 4, (512, 512), dtype=np.int16)
    grey = (grey + noise).astype(np.uint8)
    return np.repeat(grey[..., None], 3, axis=2), inside.astype(np.float32)


def names(flags: tuple[Flag, ...]) -> set[str]:
    return {flag.name for flag in flags}


def flags_of(picture: Bytes, cell: npt.NDArray, diameter_px: float | None = 40.0) -> set[str]:
    return names(assess(measure_quality(picture, cell, diameter_px), 64, None))


# Measures ----------------------------------------------------------------------------------------


def test_an_ordinary_picture_has_no_flag() -> None:
    assert flags_of(*discs()) == set()


def test_the_width_of_an_edge_grows_with_blur_as_the_formula_says() -> None:
    picture, cell = discs()
    widths = []
    for sigma in (2, 4, 8):
        blurred = cv2.GaussianBlur(picture, (0, 0), sigma)
        width = measure_quality(blurred, cell, 40.0).edge_width
        assert width is not None
        widths.append(width)
        if sigma == 4:  # the smoothing within adds 0.7 px in square
            expected = np.sqrt(2 * np.pi) * np.hypot(4, 0.7) / 40
            assert width == pytest.approx(expected, rel=0.15)
    assert widths == sorted(widths)


@pytest.mark.parametrize("radius_px", [12, 20, 31, 60])
def test_measures_are_those_of_their_definitions(radius_px: int) -> None:
    """In plain numpy, over whole pixels."""
    picture, cell = discs(radius_px)
    rng = np.random.default_rng(radius_px)
    picture = np.clip(picture + rng.normal(0, 12, picture.shape), 0, 255).astype(np.uint8)
    picture[40:90, 40:200] = rng.choice(np.array([0, 254, 255], np.uint8), (50, 160, 1))
    cell = np.clip(cell * rng.normal(0.9, 0.1, cell.shape), 0, 1).astype(np.float32)
    found = measure_quality(picture, cell, 40.0)
    mask = cell > 0.5
    inner = cv2.erode(mask.astype(np.uint8), np.ones((3, 3), np.uint8)) > 0
    outer = cv2.dilate(mask.astype(np.uint8), np.ones((7, 7), np.uint8)) == 0
    small = picture[::3, ::3].astype(np.float64)
    inside, outside = small[inner[::3, ::3]], small[outer[::3, ::3]]
    even = len(outside) >= 0.02 * small[..., 0].size
    if not even:
        grey = small.mean(axis=2)
        outside = small[grey >= np.percentile(grey, 90)]
    background = np.median(outside, axis=0)
    contrast = abs(background[1] - np.median(inside[:, 1]))

    def spread(values: npt.NDArray) -> float:
        return float(np.subtract(*np.percentile(values, (90, 10))))

    def colours(pixels: npt.NDArray) -> float:
        logs = np.log(pixels + 8)
        return max(spread(logs[:, 0] - logs[:, 1]), spread(logs[:, 2] - logs[:, 1]))

    here = picture[:-1, :-1]
    told = (here.max(axis=2) < 253) & (here.min(axis=2) > 0)
    same = (here == picture[:-1, 1:]).all(axis=2) & (here == picture[1:, :-1]).all(axis=2)
    expected = {
        "white": (picture[::2, ::2].min(axis=2) >= 253).mean(),
        "brightness": np.percentile(picture[::4, ::4].mean(axis=2), 95),
        "foreground": mask.mean(),
        "burnt": (inside.max(axis=1) >= 253).mean(),
        "certainty": (cell[mask] >= 0.8).mean(),
        "flatness": spread(outside[:, 1]) / contrast if even else None,
        "background_colours": colours(outside) if even else None,
        "cell_colours": colours(inside),
        "cell_light": spread(np.log(inside[:, 1] + 8)),
        "sameness": same[told].mean(),
    }
    for name, value in expected.items():
        measured = getattr(found, name)
        assert measured == (None if value is None else pytest.approx(value, rel=1e-5)), name
    density = np.median(np.log((background + 1) / (inside + 1)), axis=0)
    assert found.look == pytest.approx((*np.log(background + 1), *density, np.log(40)), rel=1e-5)


def test_blur_is_told_in_cells_and_not_in_pixels() -> None:
    picture, cell = discs()
    blurred = cv2.GaussianBlur(picture, (0, 0), 5)
    assert "out_of_focus" in flags_of(blurred, cell)
    assert flags_of(picture, cell) == set()
    # The same blur on cells three times as large.
    grown = [cv2.resize(a, None, fx=3, fy=3)[:512, :512] for a in (picture, cell)]
    grown[0] = cv2.GaussianBlur(grown[0], (0, 0), 5)
    assert "out_of_focus" not in flags_of(grown[0], grown[1], 120.0)


def test_exposure() -> None:
    picture, cell = discs()
    assert "under_exposed" in flags_of((picture * 0.3).astype(np.uint8), cell)
    white = np.clip(picture * 2.2, 0, 255).astype(np.uint8)
    assert "over_exposed" in flags_of(white, cell)
    assert flags_of(np.clip(picture * 1.2, 0, 255).astype(np.uint8), cell) == set()


def test_crowding_is_the_share_that_cells_cover() -> None:
    picture, cell = discs(radius_px=35)
    assert flags_of(picture, cell, 70.0) >= {"too_crowded"}
    (flag,) = assess(measure_quality(picture, cell, 70.0), 64, None)
    assert flag.value == pytest.approx(cell.mean(), abs=0.01)
    assert f"{cell.mean():.0%}" in flag.sentence


def test_a_doubtful_network_and_a_colourful_background_are_no_smear() -> None:
    picture, cell = discs()
    assert "not_a_smear" in flags_of(picture, cell * np.float32(0.6))
    colourful = picture.copy()
    colourful[:, ::2, 0] //= 2
    assert "not_a_smear" in flags_of(colourful, cell)
    jagged = measure_quality(picture, cell, 40.0, solidity=0.7)
    assert names(assess(jagged, 64, None)) == {"not_a_smear"}
    drawn = np.where(cell[..., None] > 0, np.uint8(120), np.uint8(230)).repeat(3, axis=2)
    assert "not_a_smear" in flags_of(drawn, cell)


def test_solidity_is_that_of_whole_cells_by_their_area() -> None:
    solidity, area = np.array([1.0, 0.5, 0.1]), np.array([30.0, 10.0, 1000.0])
    assert mean_solidity(solidity, area, np.array([True, True, False])) == pytest.approx(0.875)
    assert mean_solidity(solidity, area, np.zeros(3, bool)) is None


@pytest.mark.parametrize("value", [0, 255])
def test_an_empty_picture_is_measured_without_a_warning(value: int) -> None:
    picture = np.full((512, 512, 3), value, np.uint8)
    for cell in (np.zeros((512, 512), np.float32), np.ones((512, 512), np.float32)):
        for diameter_px in (None, 30.0):
            measures = measure_quality(picture, cell, diameter_px)
            for flag in assess(measures, 0, None):
                assert np.isfinite([flag.value, flag.limit]).all()
                assert flag.sentence.endswith(".")


def test_no_cells_is_said() -> None:
    picture, _ = discs()
    assert names(assess(measure_light(picture, 0.0), 0, None)) == {"no_cells"}


def test_an_image_in_tiles_is_judged_by_its_light_and_its_crowding() -> None:
    picture, _ = discs()
    assert assess(measure_light(picture, 0.3), 5000, None) == ()
    assert names(assess(measure_light(picture // 8, 0.9), 5, None)) == {
        "under_exposed",
        "too_crowded",
    }


# The training images -----------------------------------------------------------------------------


def looks(count: int = 200, seed: int = 0) -> npt.NDArray[np.float64]:
    return np.random.default_rng(seed).normal(3, 0.5, (count, SIZE))


def test_training_images_are_like_themselves_and_others_are_not() -> None:
    statistics = statistics_of(looks())
    distances = [statistics.distance(look) for look in looks(500, seed=1)]
    assert np.mean(np.array(distances) > statistics.limit) < 0.01
    strange = Measures(white=0, brightness=200, foreground=0.3, look=(9.0,) * SIZE)
    (flag,) = assess(strange, 50, statistics)
    assert (flag.name, flag.limit) == ("unlike_training", statistics.limit)
    assert flag.value == pytest.approx(statistics.distance((9.0,) * SIZE))


def test_statistics_survive_their_way_through_json() -> None:
    statistics = statistics_of(looks())
    again = TrainingStatistics.model_validate_json(statistics.model_dump_json())
    assert again == statistics


@pytest.mark.parametrize(
    "change",
    [
        {"mean": (0.0,)},
        {"precision": ()},
        {"precision": ((-1.0,) * SIZE,) * SIZE},
        {"precision": tuple(tuple(-float(i == j) for j in range(SIZE)) for i in range(SIZE))},
        {"limit": 0.0},
        {"limit": float("nan")},
        {"names": ("other",) * SIZE},
    ],
)
def test_statistics_that_are_none_are_refused(change: dict[str, object]) -> None:
    whole = statistics_of(looks()).model_dump()
    with pytest.raises(ValidationError):
        TrainingStatistics.model_validate(whole | change)


# The shipped model -------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def shipped() -> tuple[Checkpoint, Predictor]:
    loaded = load_checkpoint(Path(bcseg_batch.weights.__file__).with_name("default.safetensors"))
    return loaded, open_predictor(loaded.model, loaded.spec.input_size_px, dtype="float32")


def judge(shipped: tuple[Checkpoint, Predictor], pixels: Bytes) -> set[str]:
    measures, count = measure_image(*shipped, pixels)
    return names(assess(measures, count, shipped[0].spec.training_statistics))


def test_the_samples_have_no_flag(shipped: tuple[Checkpoint, Predictor]) -> None:
    samples = sorted((Path(__file__).parents[1] / "samples").rglob("*.jpg"))[:2]
    assert samples
    for path in samples:
        assert judge(shipped, decode_image(path, max_pixels=10**8).pixels) == set(), path


def test_a_text_page_is_no_smear(shipped: tuple[Checkpoint, Predictor]) -> None:
    page = Image.new("RGB", (1240, 1754), "white")
    font = ImageFont.load_default(size=28)
    for y in range(60, 1700, 42):
        ImageDraw.Draw(page).text(
            (60, y), "A page of a report, and no smear at all.", "black", font
        )
    assert judge(shipped, np.asarray(page)) & {"not_a_smear", "no_cells"}


@pytest.mark.slow
def test_real_smears_seldom_have_a_flag_and_spoilt_ones_do(
    shipped: tuple[Checkpoint, Predictor], data_dir: Path
) -> None:
    paths = sorted((data_dir / "bbbc041seg/val/original").iterdir())
    paths += sorted((data_dir / "bccd/images").iterdir())[::15]
    images = [decode_image(path, max_pixels=10**8).pixels for path in paths]
    good = [judge(shipped, image) for image in images]
    assert sum(map(bool, good)) <= 0.05 * len(good), good
    for image in images[:3]:
        width = image.shape[1]
        assert "out_of_focus" in judge(shipped, cv2.GaussianBlur(image, (0, 0), width / 100))
        assert "under_exposed" in judge(shipped, (image * 0.25).astype(np.uint8))
        over = np.clip(image * 2.2, 0, 255).astype(np.uint8)
        assert judge(shipped, over) & {"over_exposed", "no_cells"}


@pytest.mark.slow
def test_a_photograph_is_no_smear(shipped: tuple[Checkpoint, Predictor], data_dir: Path) -> None:
    hopper = decode_image(data_dir / "oddfiles/hopper.jpg", max_pixels=10**8).pixels
    assert "not_a_smear" in judge(shipped, hopper)
