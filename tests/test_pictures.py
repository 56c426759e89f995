"""The pictures of an image: which are written, what they show, and what they say of themselves."""

from __future__ import annotations

import hashlib
import io
import itertools
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import tifffile
from hypothesis import given, settings
from hypothesis import strategies as st
from parts import OPTIONS, BrightIsCell, input_file
from PIL import Image
from test_pipeline import many_discs, two_discs

from bcseg_batch.items import OUTPUT_FIELDS, Outcome, Status
from bcseg_batch.segment.drawing import heat_map, outlined
from bcseg_batch.segment.postprocess import mask_from_probability
from bcseg_batch.service.pictures import PictureOptions, pictures
from bcseg_batch.service.pipeline import Pipeline
from bcseg_batch.store.encode import encode_grey_tiff, encode_jpeg, encode_png
from bcseg_batch.store.names import OutputNames
from bcseg_batch.store.outputs import OutputFolder
from bcseg_batch.store.provenance import Provenance, read_provenance
from bcseg_batch.store.stream import PREVIEW_PX, PreviewWriter, preview_step, reduced
from bcseg_batch.store.tags import Tags
from bcseg_batch.version import __version__

ALL = {"labels": True, "outlines": True, "probability": True, "previews": True}


def one(source: Path, outputs: OutputFolder, path: Path, **changes: object) -> Outcome:
    pipeline = Pipeline([BrightIsCell()], outputs, OutputNames(), replace(OPTIONS, **changes))
    (outcome,) = pipeline.process([input_file(path, source)])
    assert outcome.status is Status.DONE, outcome.error
    return outcome


def read(outputs: OutputFolder, path: str | None) -> np.ndarray:
    assert path is not None
    if path.endswith(".tif"):
        return np.asarray(tifffile.imread(outputs.root / path))
    with Image.open(outputs.root / path) as picture:
        return np.asarray(picture)


@pytest.mark.parametrize("large", [False, True])
def test_all_pictures_show_the_same_cells(source: Path, outputs: OutputFolder, large: bool) -> None:
    size_wh = (410, 900)
    many_discs(source / "a.tif", size_wh)
    limit = 100_000 if large else 10**7
    outcome = one(source, outputs, source / "a.tif", large_pixels=limit, tiling=True, **ALL)
    mask, labels = read(outputs, outcome.mask), read(outputs, outcome.labels)
    probability = read(outputs, outcome.probability)
    assert probability.dtype == np.float32
    np.testing.assert_array_equal((probability > 0.5), mask == 255)
    outlines = read(outputs, outcome.outlines).astype(int)
    yellow = (outlines[..., 0] > 140) & (outlines[..., 1] > 120) & (outlines[..., 2] < 110)
    edge = np.zeros(labels.shape, bool)
    edge[:, 1:] |= labels[:, 1:] != labels[:, :-1]
    # JPEG blurs a line of two pixels; where cells are uniform there is none.
    assert yellow[edge].mean() > 0.8
    far = ~edge
    for axis in (0, 1):
        for step in (-4, -3, -2, -1, 1, 2, 3, 4):
            far &= ~np.roll(edge, step, axis)
    assert yellow[far].mean() < 0.1
    preview = read(outputs, outcome.preview)
    assert preview.shape == (900, 410, 3)
    assert set(outcome.outputs) == {getattr(outcome, name) for name in OUTPUT_FIELDS}


def test_the_record_holds_the_hash_of_each_file(source: Path, outputs: OutputFolder) -> None:
    for limit in (1_000, 10**7):
        path = two_discs(source / f"{limit}.png")
        outcome = one(source, outputs, path, large_pixels=limit, **ALL)
        assert set(outcome.outputs_sha256) == set(OUTPUT_FIELDS)
        for name, digest in outcome.outputs_sha256.items():
            data = (outputs.root / getattr(outcome, name)).read_bytes()
            assert hashlib.sha256(data).hexdigest() == digest


@pytest.mark.parametrize("large", [False, True])
@pytest.mark.parametrize("suffix", ["jpg", "png"])
def test_every_picture_says_what_it_was_made_from(
    source: Path, outputs: OutputFolder, large: bool, suffix: str
) -> None:
    path = two_discs(source / "nächtlich; 1.png")
    limit = 1_000 if large else 10**7
    outcome = one(
        source, outputs, path, large_pixels=limit, composite_format=suffix, pixel_size_um=0.5, **ALL
    )
    expected = Provenance(
        "nächtlich; 1.png",
        hashlib.sha256(path.read_bytes()).hexdigest(),
        OPTIONS.model_sha256,
        OPTIONS.settings_sha256,
        __version__,
    )
    for output in outcome.outputs:
        if not output.endswith(".csv"):
            assert read_provenance(outputs.root / output) == expected, output


def test_a_run_without_composites_writes_none(source: Path, outputs: OutputFolder) -> None:
    outcome = one(source, outputs, two_discs(source / "a.png"), composite=False, cells=False)
    assert outcome.outputs == ("masks/a_mask.png",)
    assert not (outputs.root / "composites").exists()


def test_the_mask_is_written_last() -> None:
    options = PictureOptions(
        composite_format="jpg",
        composite_quality=90,
        colour=(1, 2, 3),
        alpha=0.3,
        labels=True,
        outlines=True,
        probability=True,
        previews=True,
    )
    for is_large in (False, True):
        fields = [picture.field for picture in pictures(options, is_large=is_large)]
        assert fields[-1] == "mask"
        assert len(set(fields)) == len(fields) == 6


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.uint32, np.float32])
def test_grey_tiff_keeps_every_value(dtype: type[np.generic]) -> None:
    pixels = (np.random.default_rng(0).random((37, 53)) * 250).astype(dtype)
    data = encode_grey_tiff(pixels, Tags(0.25, "text"))
    with tifffile.TiffFile(io.BytesIO(data)) as tiff:
        np.testing.assert_array_equal(tiff.asarray(), pixels)
        assert tiff.pages.first.description == "text"


def test_comments_leave_the_pixels_alone(tmp_path: Path) -> None:
    pixels = np.random.default_rng(1).integers(0, 256, (20, 30, 3), dtype=np.uint8)
    text = Provenance("a", "1", "2", "3", "4").text()
    for plain, told, name in (
        (encode_png(pixels), encode_png(pixels, text), "a.png"),
        (
            encode_jpeg(pixels, quality=90),
            encode_jpeg(pixels, quality=90, provenance=text),
            "a.jpg",
        ),
    ):
        with Image.open(io.BytesIO(plain)) as one_, Image.open(io.BytesIO(told)) as other:
            np.testing.assert_array_equal(np.asarray(one_), np.asarray(other))
        (tmp_path / name).write_bytes(told)
        assert read_provenance(tmp_path / name) == Provenance("a", "1", "2", "3", "4")
        (tmp_path / name).write_bytes(plain)
        assert read_provenance(tmp_path / name) is None


def test_a_name_too_long_for_a_comment_costs_no_picture() -> None:
    pixels = np.zeros((8, 8, 3), np.uint8)
    data = encode_jpeg(pixels, quality=90, provenance="x" * 70_000)
    with Image.open(io.BytesIO(data)) as picture:
        picture.load()


@pytest.mark.parametrize("text", ["", "{}", "[1]", '{"software": "other"}', '{"software": 1'])
def test_a_comment_of_others_is_none_of_ours(tmp_path: Path, text: str) -> None:
    (tmp_path / "a.png").write_bytes(encode_png(np.zeros((4, 4), np.uint8), text))
    assert read_provenance(tmp_path / "a.png") is None


@settings(deadline=None)
@given(
    height=st.integers(1, 40),
    width=st.integers(1, 40),
    step=st.integers(1, 9),
    cuts=st.lists(st.integers(0, 40), max_size=5),
)
def test_a_preview_row_by_row_is_that_of_the_whole(
    height: int, width: int, step: int, cuts: list[int]
) -> None:
    pixels = np.random.default_rng(2).integers(0, 256, (height, width, 3), dtype=np.uint8)
    whole = reduced(pixels, step)
    assert whole.shape == (-(-height // step), -(-width // step), 3)
    file = io.BytesIO()
    writer = PreviewWriter(file, (height, width))
    writer._step = step
    places = sorted({0, height, *(cut for cut in cuts if cut < height)})
    for top, bottom in itertools.pairwise(places):
        writer.write(pixels[top:bottom])
    writer.close()
    assert file.getvalue() == encode_jpeg(whole, quality=90)


def test_a_preview_is_never_longer_than_that() -> None:
    for shape_hw in ((1, 1), (1600, 1200), (1601, 3), (99_999, 2)):
        assert -(-max(shape_hw) // preview_step(shape_hw)) <= PREVIEW_PX
    assert preview_step((1200, 1600)) == 1


def test_outlines_lie_on_both_sides_of_each_edge_and_nowhere_else() -> None:
    labels = np.zeros((6, 9), np.int32)
    labels[1:5, 1:4] = 1
    labels[1:5, 4:8] = 2
    pixels = np.full((6, 9, 3), 90, np.uint8)
    drawn = outlined(pixels, labels, (255, 0, 0))
    changed = (drawn != pixels).any(axis=2)
    expected = np.zeros((6, 9), bool)
    expected[0:6, 1:8] = True  # a line on both sides of each edge ...
    expected[2:4, 2] = False  # ... and the middles of both cells
    expected[2:4, 5:7] = False
    expected[1:5, [0, 8]] = True
    np.testing.assert_array_equal(changed, expected)
    assert (pixels == 90).all()
    # Cut into bands, the line between two bands is missing on one side at most.
    below = outlined(pixels[1:], labels[1:], (255, 0, 0), labels[:1])
    np.testing.assert_array_equal(below, drawn[1:])


def test_a_heat_map_spans_all_grey_levels() -> None:
    levels = heat_map(np.array([[0.0, 0.5, 1.0]], np.float32))
    assert levels.tolist() == [[0, 128, 255]]
    assert mask_from_probability(np.ones((2, 2), np.float32), (3, 3), 0.5).max() == 255
