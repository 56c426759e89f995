"""What the commands do, in three lines of Python."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from parts import run_folder
from PIL import Image
from test_pipeline import many_discs

import bcseg_batch
from bcseg_batch.errors import CheckpointError, SettingsError, UnreadableImageError, UsageError
from bcseg_batch.segment.analysis import CELL_COLUMNS
from bcseg_batch.store.read_back import read_cells, read_labels, read_outcomes

ROOT = Path(__file__).parents[1]
SMEAR = ROOT / "samples/synth_00000.jpg"


@pytest.fixture(scope="module")
def model() -> bcseg_batch.Model:
    return bcseg_batch.load_model(backend="torch", dtype="float32")


def command(*arguments: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [Path(sys.executable).with_name("bcseg-batch"), *map(str, arguments)],
        capture_output=True,
        text=True,
        check=False,
    )


def pipeline_output(model: bcseg_batch.Model, source: Path, output: Path) -> None:
    """Run process_dir with the very network of the model."""
    run_folder(
        source,
        output,
        predictor=model._predictor,
        class_names=model._options.class_names,
        statistics=model._options.statistics,
        threshold=model._options.threshold,
        labels=True,
        tiling=True,
        composite_format="png",
    )


@pytest.mark.parametrize("kind", ["smear", "tiles"])
def test_one_image_comes_out_as_from_process_dir(
    model: bcseg_batch.Model, source: Path, tmp_path: Path, kind: str
) -> None:
    source.mkdir(exist_ok=True)
    path = source / "a.png"
    if kind == "smear":
        Image.open(SMEAR).save(path)
    else:
        # Many small smears side by side have cells that are too small in one piece.
        small = Image.open(SMEAR).resize((600, 450))
        sheet = Image.new("RGB", (2400, 1800))
        for i in range(16):
            sheet.paste(small, (600 * (i % 4), 450 * (i // 4)))
        sheet.save(path)
    found = model.segment(path)
    pipeline_output(model, source, tmp_path / "out")
    (outcome,) = read_outcomes(tmp_path / "out").outcomes.values()
    assert (found.tile_scale is None) == (kind == "smear")
    assert found.tile_scale == outcome.tile_scale
    assert outcome.mask
    assert outcome.composite
    assert outcome.labels
    assert outcome.cells
    for picture, name in ((found.mask, outcome.mask), (found.composite(), outcome.composite)):
        with Image.open(tmp_path / "out" / name) as written:
            np.testing.assert_array_equal(picture, np.asarray(written))
    np.testing.assert_array_equal(found.labels, read_labels(tmp_path / "out" / outcome.labels))
    rows = read_cells(tmp_path / "out" / outcome.cells)
    assert [row["kind"] for row in rows] == found.table["kind"].tolist()
    assert [float(row["area"]) for row in rows] == found.table["area"].tolist()
    assert [flag.name for flag in found.flags] == [flag.name for flag in outcome.flags]
    assert found.foreground == pytest.approx(outcome.foreground_fraction, abs=1e-6)
    assert found.confidence == pytest.approx(outcome.mean_confidence, abs=1e-6)
    np.testing.assert_array_equal(found.probability > 0.5, found.mask == 255)
    assert found.probability.dtype == np.float32
    assert set(found.table) <= set(CELL_COLUMNS)


def test_an_array_is_as_good_as_its_file(model: bcseg_batch.Model) -> None:
    with Image.open(SMEAR) as picture:
        pixels = np.asarray(picture.convert("RGB"))
    of_array, of_file = model.segment(pixels), model.segment(str(SMEAR))
    np.testing.assert_array_equal(of_array.mask, of_file.mask)
    assert of_array.image == "array"
    assert of_file.image == "synth_00000.jpg"
    # A view that is not laid out row by row is taken too.
    np.testing.assert_array_equal(model.segment(pixels[:, ::-1]).pixels, pixels[:, ::-1])


def test_a_pixel_size_measures_in_micrometres(model: bcseg_batch.Model) -> None:
    found = model.segment(SMEAR, pixel_size_um=0.5)
    np.testing.assert_allclose(found.table["area_um2"], np.asarray(found.table["area"]) / 4)
    assert "area_um2" not in model.segment(SMEAR).table


@pytest.mark.parametrize(
    "array",
    [
        np.zeros((4, 4), np.uint8),
        np.zeros((4, 4, 4), np.uint8),
        np.zeros((4, 4, 3), np.float32),
        np.zeros((0, 4, 3), np.uint8),
    ],
)
def test_an_array_of_another_kind_is_refused(
    model: bcseg_batch.Model, array: np.ndarray[tuple[int, ...], np.dtype[np.uint8]]
) -> None:
    with pytest.raises(UsageError, match=r"uint8 \(height, width, 3\)"):
        model.segment(array)


def test_what_cannot_be_read_is_named(model: bcseg_batch.Model, tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(b"no picture")
    with pytest.raises(UnreadableImageError, match=r"a\.png"):
        model.segment(tmp_path / "a.png")
    with pytest.raises(bcseg_batch.BcsegError, match=r"none\.png"):
        model.segment(tmp_path / "none.png")


def test_a_model_that_cannot_be_loaded_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"none\.safetensors"):
        bcseg_batch.load_model(tmp_path / "none.safetensors", backend="torch")
    with pytest.raises(SettingsError, match="cuda"):
        bcseg_batch.load_model(device="cuda:77")
    with pytest.raises(UsageError, match="from 0 to 1"):
        bcseg_batch.load_model(threshold=50)


def test_a_picture_without_a_cell_has_an_empty_table(model: bcseg_batch.Model) -> None:
    found = model.segment(np.full((300, 400, 3), 230, np.uint8))
    assert not found.mask.any()
    assert not found.labels.any()
    assert len(found.table["area"]) == 0
    assert [flag.name for flag in found.flags].count("no_cells") == 1


def test_tiny_images_are_taken(model: bcseg_batch.Model) -> None:
    for shape_hw in ((1, 1), (1, 700), (3, 2)):
        found = model.segment(np.zeros((*shape_hw, 3), np.uint8))
        assert found.mask.shape == found.labels.shape == found.probability.shape == shape_hw


def test_the_public_names_are_these_and_no_more() -> None:
    assert dir(bcseg_batch) == ["BcsegError", "Model", "Segmentation", "__version__", "load_model"]
    assert bcseg_batch.__doc__ is not None
    for name in bcseg_batch.__all__:
        assert getattr(bcseg_batch, name) is not None
    with pytest.raises(AttributeError, match="segment_everything"):
        bcseg_batch.segment_everything  # noqa: B018
    assert (Path(bcseg_batch.__file__).parent / "py.typed").exists()


def test_the_package_is_imported_without_the_heavy_parts() -> None:
    code = "import sys, bcseg_batch; print({'torch', 'numpy', 'cv2'} & sys.modules.keys())"
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert ran.stdout.strip() == "set()"


def test_the_page_about_python_does_what_it_says(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "samples").symlink_to(ROOT / "samples")
    monkeypatch.chdir(tmp_path)
    page = (ROOT / "docs/python.md").read_text(encoding="utf-8")
    blocks = re.findall(r"^```python\n(.*?)^```$", page, flags=re.MULTILINE | re.DOTALL)
    assert len(blocks) == 2
    names: dict[str, object] = {}
    for block in blocks:
        exec(block, names)
    assert re.search(r"^\d\d red cells, \d+ pixels", capsys.readouterr().out)
    with Image.open("composite.png") as picture:
        assert picture.size == (1200, 900)
    attributes = set(re.findall(r"^\| `([^|]*)` \|", page, flags=re.MULTILINE))
    told = {name.removesuffix("()") for names in attributes for name in names.split("`, `")}
    for name in told:
        assert hasattr(names["found"], name), name


# The panel --------------------------------------------------------------------------------------


def test_show_saves_a_panel(tmp_path: Path) -> None:
    picture = tmp_path / "a $dollar$ smear.jpg"
    picture.symlink_to(SMEAR)
    done = command("show", picture, "--save", tmp_path / "p.png", "--no-open")
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == str(tmp_path / "p.png")
    with Image.open(tmp_path / "p.png") as panel:
        pixels = np.asarray(panel.convert("RGB"))
    # Below the titles, five pictures side by side with white between them.
    below = pixels[pixels.shape[0] // 2 :]
    is_picture = np.pad((below != 255).any(axis=(0, 2)), 1)
    assert np.count_nonzero(np.diff(is_picture.astype(int)) == 1) == 5


def test_show_says_what_is_wrong_with_its_arguments(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(b"no picture")
    for arguments, sentence in (
        ((tmp_path / "a.png",), "a.png"),
        ((tmp_path / "none.png",), "none.png"),
        ((SMEAR, "--save", tmp_path / "p.doc"), r"saved as .png, .jpg, .svg, .pdf"),
        ((SMEAR, "--threshold", "7"), "from 0 to 1"),
    ):
        done = command("show", *arguments, "--no-open")
        assert done.returncode == 2, done.stderr
        assert re.search(sentence, done.stderr), done.stderr
        assert "Traceback" not in done.stderr


def test_show_does_not_write_over_the_photograph(tmp_path: Path) -> None:
    photograph = tmp_path / "a.jpg"
    photograph.write_bytes(SMEAR.read_bytes())
    (tmp_path / "b.jpg").symlink_to(photograph)
    for name in ("a.jpg", "b.jpg"):
        done = command("show", photograph, "--save", tmp_path / name, "--no-open")
        assert done.returncode == 2
        assert "the photograph itself" in done.stderr
    assert photograph.read_bytes() == SMEAR.read_bytes()


def test_many_discs_are_counted(model: bcseg_batch.Model, tmp_path: Path) -> None:
    many_discs(tmp_path / "a.png", (200, 150))
    assert model.segment(tmp_path / "a.png").labels.shape == (150, 200)
