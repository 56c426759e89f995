"""What a hand has corrected becomes a pair of a data set, or is refused by name and reason."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
import tifffile
import torch
from blots import blots, write_blots
from PIL import Image
from test_exchange import cells_of

from bcseg_batch.errors import OutputError, UsageError
from bcseg_batch.exchange import imagej, label_images, qupath
from bcseg_batch.exchange.cells import ImageCells
from bcseg_batch.store.encode import encode_labels
from bcseg_training import cli
from bcseg_training.check import check_dataset
from bcseg_training.evaluate import read_items
from bcseg_training.import_corrections import ImportReport, import_corrections

Pixels = npt.NDArray[np.uint8]

SHAPE = (48, 64)


def photograph(seed: int = 0) -> tuple[Pixels, npt.NDArray[np.int32]]:
    """Four dark discs on a light ground, and their labels."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[: SHAPE[0], : SHAPE[1]]
    labels = np.zeros(SHAPE, np.int32)
    for number, (cy, cx) in enumerate(((12, 14), (12, 44), (34, 16), (34, 50)), 1):
        labels[np.hypot(y - cy, x - cx) < rng.uniform(5, 9)] = number
    image = np.where((labels > 0)[..., np.newaxis], (150, 60, 90), (230, 225, 235))
    return (image + rng.integers(-9, 9, image.shape)).astype(np.uint8), labels


class Bench:
    """A folder of photographs, one of corrections, and a data set."""

    def __init__(self, root: Path) -> None:
        self.originals, self.corrected = root / "photographs", root / "corrected"
        self.dataset = root / "set"
        self.corrected.mkdir()

    def photograph(self, name: str = "a.png", seed: int = 0) -> npt.NDArray[np.int32]:
        image, labels = photograph(seed)
        path = self.originals / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(path)
        return labels

    def write(self, name: str, data: bytes) -> None:
        path = self.corrected / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)

    def save(self, name: str, pixels: npt.NDArray[np.generic]) -> None:
        path = self.corrected / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.suffix == ".tif":
            tifffile.imwrite(path, pixels)
        else:
            Image.fromarray(pixels).save(path)

    def run(self, **options: object) -> ImportReport:
        return import_corrections(
            self.corrected, self.dataset, **{"originals": self.originals, **options}
        )

    def refused(self, **options: object) -> str:
        report = self.run(**options)
        assert not report.added
        (problem,) = report.problems
        return problem

    def mask(self, stem: str = "a", folder: str = "train") -> npt.NDArray[np.uint8]:
        return np.asarray(Image.open(self.dataset / folder / "mask" / f"{stem}.png"))

    def labels(self, stem: str = "a") -> npt.NDArray[np.uint16]:
        return tifffile.imread(self.dataset / "train/labels" / f"{stem}.tif")


@pytest.fixture
def bench(tmp_path: Path) -> Bench:
    return Bench(tmp_path)


def white(mask: npt.NDArray[np.bool_]) -> Pixels:
    return np.where(mask, np.uint8(255), np.uint8(0))


# There and back ------------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["qupath", "imagej", "labels"])
def test_what_is_exported_comes_back_as_the_same_cells(bench: Bench, form: str) -> None:
    labels = bench.photograph()
    cells = cells_of(labels)  # red, white, platelet, red
    if form == "qupath":
        bench.write("a.geojson", qupath.encode_geojson(cells, editable=True))
    elif form == "imagej":
        bench.write("a.zip", imagej.encode_rois(cells))
    else:
        bench.write("a_labels.tif", encode_labels(cells.labels))
        bench.write("a_objects.csv", label_images.encode_objects(cells))
    report = bench.run()
    assert not report.problems
    (line,) = report.added
    assert line.startswith("a: labels: 2 red_cell, 1 white_cell, 1 platelet; ")
    np.testing.assert_array_equal(bench.labels(), labels)
    # Platelets are background in masks.
    np.testing.assert_array_equal(bench.mask(), white((labels > 0) & (labels != 3)))
    assert (bench.dataset / "train/kinds/a.csv").read_text().splitlines() == [
        "label,kind",
        "1,red_cell",
        "2,white_cell",
        "3,platelet",
        "4,red_cell",
    ]
    original = bench.dataset / "train/original/a.png"
    assert original.read_bytes() == (bench.originals / "a.png").read_bytes()


def test_a_cell_that_a_hand_added_is_numbered_with_the_others(bench: Bench) -> None:
    labels = bench.photograph()
    cells = cells_of(labels)
    bench.write("a_objects.csv", label_images.encode_objects(cells))
    corrected = labels.astype(np.uint16)
    corrected[labels == 2] = 0
    corrected[20:26, 26:32] = 90
    bench.save("a_labels.tif", corrected)
    (line,) = bench.run().added
    assert "3 red_cell, 1 platelet; 1 cells that its table lacks taken as red cells" in line
    assert np.unique(bench.labels()).tolist() == [0, 1, 2, 3, 4]
    np.testing.assert_array_equal(bench.labels() == 4, corrected == 90)


def test_from_import_to_check_train_and_judge(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The way of docs/corrections.md, small."""
    dataset, originals, corrected = tmp_path / "set", tmp_path / "in", tmp_path / "corrected"
    write_blots(dataset, train=1, val=1)
    originals.mkdir()
    corrected.mkdir()
    for number in range(2):
        image, mask = blots(50 + number)
        Image.fromarray(image).save(originals / f"new{number}.png")
        Image.fromarray(mask).save(corrected / f"new{number}_mask.png")

    def command(*arguments: object) -> tuple[int, str]:
        monkeypatch.setattr(sys, "argv", ["bcseg-train", *map(str, arguments)])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        printed = capsys.readouterr()
        return int(ended.value.code or 0), printed.out + printed.err

    code, text = command("import-corrections", corrected, dataset, "--originals", originals)
    assert code == 0, text
    assert text.splitlines()[-1].endswith("2 added, 0 replaced, 0 unchanged, 0 refused")
    code, text = command("check", dataset)
    assert (code, text.splitlines()[0]) == (0, "train: 3 pairs"), text
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        code, text = command(
            "train", dataset, "--out", tmp_path / "run", "--width", 1, "--epochs", 1,
            "--batch-size", 3,
        )  # fmt: skip
    finally:
        torch.set_num_threads(threads)
    assert code == 0, text
    assert "best epoch 1: Dice" in text
    code, text = command("import-corrections", corrected, dataset, "--originals", originals)
    assert code == 0
    assert text.splitlines()[-1].endswith("0 added, 0 replaced, 2 unchanged, 0 refused")


def test_a_set_with_labels_for_some_is_judged_by_what_each_has(bench: Bench) -> None:
    labels = bench.photograph("a.png")
    bench.photograph("b.png", seed=1)
    bench.write("a.geojson", qupath.encode_geojson(cells_of(labels)))
    bench.save("b.png", white(labels > 0))
    assert len(bench.run(into="val").added) == 2
    items = list(read_items(bench.dataset / "val"))
    assert [(item.stem, item.is_complete) for item in items] == [("a", True), ("b", False)]
    assert items[0].cells is not None
    assert items[0].cells.max() == 3  # without the platelet


# What files say ------------------------------------------------------------------------------


def test_masks_of_every_program(bench: Bench) -> None:
    labels = bench.photograph()
    mask = labels > 0
    grey = white(mask)
    inverting = Image.fromarray(grey).convert("P")
    inverting.putpalette([v for v in range(255, -1, -1) for _ in range(3)])
    for name, write in {
        "a.png": lambda path: Image.fromarray(grey).save(path),
        "a_mask.tif": lambda path: tifffile.imwrite(path, grey),
        "a.bmp": lambda path: Image.fromarray(grey).convert("1").save(path),
        # Fiji: 255 is a cell, shown black.
        "a.tif": lambda path: tifffile.imwrite(path, grey, photometric="miniswhite"),
        "a-mask.png": inverting.save,
        "a_mask.png": lambda path: Image.fromarray(np.dstack([grey] * 3)).save(path),
        "a.tiff": lambda path: tifffile.imwrite(path, mask.astype(np.uint8)),
        "a_mask.tiff": lambda path: tifffile.imwrite(path, mask.astype(np.uint16) * 65535),
        "a-mask.tif": lambda path: tifffile.imwrite(path, grey.astype(np.float32)),
    }.items():
        path = bench.corrected / name
        write(path)
        report = bench.run(overwrite=True)
        assert not report.problems, name
        np.testing.assert_array_equal(bench.mask(), grey, err_msg=name)
        assert not (bench.dataset / "train/labels").exists()
        path.unlink()


def test_labels_of_every_program(bench: Bench) -> None:
    labels = bench.photograph()
    coloured = Image.fromarray(labels.astype(np.uint8)).convert("P")
    coloured.putpalette(np.random.default_rng(0).integers(0, 256, 768, np.uint8).tolist())
    for name, write in {
        "a.png": lambda path: Image.fromarray(labels.astype(np.uint8)).save(path),
        "a_labels.png": lambda path: Image.fromarray(labels.astype(np.uint16)).save(path),
        "a.tif": lambda path: tifffile.imwrite(path, labels.astype(np.int64) * 7),
        "a_labels.tif": lambda path: tifffile.imwrite(path, labels.astype(np.float32)),
        "a-labels.png": coloured.save,
        "a.tiff": lambda path: tifffile.imwrite(path, labels.astype(np.uint32)),
    }.items():
        path = bench.corrected / name
        write(path)
        report = bench.run(overwrite=True)
        assert not report.problems, name
        np.testing.assert_array_equal(bench.labels(), labels, err_msg=name)
        np.testing.assert_array_equal(bench.mask(), white(labels > 0), err_msg=name)
        path.unlink()
    (line,) = (*report.unchanged, *report.replaced)
    assert "no table of kinds beside it, all taken as red or white cells" in line


def test_a_jpeg_mask_is_refused_with_how_to_save_it(bench: Bench) -> None:
    labels = bench.photograph()
    Image.fromarray(white(labels > 0)).save(bench.corrected / "a.jpg")
    assert "'a.jpg' is a JPEG, which changes what is saved. Save it as PNG" in bench.refused()
    opened = np.asarray(Image.open(bench.corrected / "a.jpg"))
    assert np.unique(opened).size > 2
    (bench.corrected / "a.jpg").unlink()
    bench.save("a.png", opened)  # saved once more, with the damage
    problem = bench.refused()
    assert "a mask has 0 and 255 alone. JPEG, a resize or a soft brush" in problem
    assert "Threshold" in problem
    tifffile.imwrite(bench.corrected / "a.png", opened, compression="jpeg")
    (bench.corrected / "a.png").rename(bench.corrected / "a.tif")
    assert "compressed as JPEG" in bench.refused()


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (lambda labels: white(labels > 0)[:, :-1], "is 63x48 and its photograph 64x48: save it at"),
        (lambda labels: white(labels > 0).T, "turned by its orientation tag"),
        (lambda labels: white(labels < 0), "shows no cell: if that is right, add --allow-empty"),
        (lambda labels: white(labels >= 0), "every pixel is a cell"),
        (lambda labels: white(labels == 0), "brighter than the ground"),
        (lambda labels: (labels + 1).astype(np.uint8), "no pixel is background"),
        (lambda labels: labels.astype(np.int16) - 1, "its values go from -1 to 3"),
        (lambda labels: (labels / 5).astype(np.float32), "holds fractions"),
        (
            lambda labels: np.random.default_rng(0).integers(0, 200, SHAPE, np.uint8),
            "neither a mask of 0 and 255 nor labels",
        ),
        (
            lambda labels: np.dstack([white(labels > 0), white(labels > 1), white(labels > 0)]),
            "is a colour picture",
        ),
        (lambda labels: np.stack([white(labels > 0)] * 2), "has 2 pages"),
    ],
)
def test_what_is_no_correction_is_refused(bench: Bench, change: object, match: str) -> None:
    labels = bench.photograph()
    pixels = change(labels)  # type: ignore[operator]
    photometric = "rgb" if pixels.ndim == 3 and pixels.shape[2] == 3 else "minisblack"
    tifffile.imwrite(bench.corrected / "a.tif", pixels, photometric=photometric)
    assert match in bench.refused()
    assert not bench.dataset.exists()


def test_the_choices_for_masks_that_look_wrong(bench: Bench) -> None:
    labels = bench.photograph()
    bench.save("a.png", white(labels == 0))
    assert bench.run(inverted=True).added
    np.testing.assert_array_equal(bench.mask(), white(labels > 0))
    bench.save("a.png", white(labels < 0))
    assert bench.run(allow_empty=True, overwrite=True).replaced
    assert not bench.mask().any()


def test_a_photograph_is_upright_before_it_is_held_against_its_mask(bench: Bench) -> None:
    image, labels = photograph()
    bench.originals.mkdir()
    exif = Image.Exif()
    exif[274] = 6  # to be turned to the right
    Image.fromarray(np.rot90(image)).save(bench.originals / "a.png", exif=exif)
    bench.save("a.png", white(labels > 0))
    assert bench.run().added
    np.testing.assert_array_equal(bench.mask(), white(labels > 0))


def test_outlines_of_another_picture_or_class_are_refused(bench: Bench) -> None:
    bench.photograph()
    ring = [[90, 2], [99, 2], [99, 9], [90, 9], [90, 2]]
    feature = {"type": "Feature", "geometry": {"type": "Polygon", "coordinates": [ring]}}
    bench.write("a.geojson", json.dumps(feature).encode())
    assert "outside of the picture of 64x48" in bench.refused()
    feature["properties"] = {"classification": {"name": "Stroma"}}
    bench.write("a.geojson", json.dumps(feature).encode())
    assert "there is no kind 'Stroma': the kinds are red_cell" in bench.refused()


# Pairs ---------------------------------------------------------------------------------------


def test_orphans_and_names_that_fit_two_are_named(bench: Bench) -> None:
    labels = bench.photograph("a.png")
    for seed, name in enumerate(("b.png", "b.tif", "c.png"), 1):
        bench.photograph(name, seed)
    for name in ("a_mask.png", "b.png", "c.png", "c_mask.tif", "d_mask.png"):
        bench.save(name, white(labels > 0))
    report = bench.run()
    assert len(report.added) == 1
    assert report.problems == [
        (
            "b.png: it fits b.png and b.tif: name it after one of them, folder and suffix "
            "included, such as b.png.png"
        ),
        "d_mask.png: no photograph is called d: name it after its photograph",
        "c.png and c_mask.tif: both are for c.png: leave one",
    ]


def test_the_whole_name_and_the_same_folder_decide(bench: Bench) -> None:
    labels = bench.photograph("a.png")
    for seed, name in enumerate(("a.tif", "night/a.png"), 1):
        bench.photograph(name, seed)
    for name in ("a.tif_mask.png", "night/a_mask.png"):
        bench.save(name, white(labels > 0))
    report = bench.run()
    assert not report.problems
    assert sorted(path.name for path in (bench.dataset / "train/original").iterdir()) == [
        "a.tif",
        "night__a.png",
    ]


def test_nothing_is_overwritten_unasked(bench: Bench) -> None:
    labels = bench.photograph()
    bench.write("a.geojson", qupath.encode_geojson(cells_of(labels)))
    bench.run()
    assert len(bench.run().unchanged) == 1
    (bench.corrected / "a.geojson").unlink()
    bench.save("a.png", white(labels == 1))
    assert "has a already: add --overwrite" in bench.refused()
    assert bench.run(overwrite=True).replaced
    np.testing.assert_array_equal(bench.mask(), white(labels == 1))
    # The labels were those of the earlier correction.
    assert not list((bench.dataset / "train/labels").iterdir())
    assert not list((bench.dataset / "train/kinds").iterdir())


def test_pairs_of_the_set_itself_can_be_corrected(bench: Bench) -> None:
    labels = bench.photograph()
    bench.save("a.png", white(labels > 0))
    bench.run()
    bench.save("a.png", white(labels > 1))
    report = bench.run(originals=None, overwrite=True)
    assert len(report.replaced) == 1
    np.testing.assert_array_equal(bench.mask(), white(labels > 1))
    assert check_dataset(bench.dataset / "train").pairs == {"train": 1}


def test_a_photograph_is_in_a_data_set_once(bench: Bench) -> None:
    labels = bench.photograph("a.png")
    bench.save("a.png", white(labels > 0))
    bench.run(into="val")
    assert "the data set has this photograph already" in bench.refused()
    bench.photograph("b.png")  # the same picture
    (bench.corrected / "a.png").rename(bench.corrected / "b.png")
    assert "val/original/a.png" in bench.refused(into="val")


def test_a_folder_with_original_and_mask_is_a_set_itself(bench: Bench) -> None:
    labels = bench.photograph()
    bench.save("a.png", white(labels > 0))
    write_blots(bench.dataset, train=1, val=1)
    report = import_corrections(bench.corrected, bench.dataset / "val", originals=bench.originals)
    assert report.folder == bench.dataset / "val"
    assert check_dataset(bench.dataset).pairs == {"train": 1, "val": 2}


def test_folders_that_are_not_there(bench: Bench) -> None:
    with pytest.raises(UsageError, match="--originals"):
        bench.run()
    bench.photograph()
    with pytest.raises(UsageError, match="holds nothing to import"):
        bench.run()
    with pytest.raises(UsageError, match="with the corrected files"):
        import_corrections(bench.corrected / "no", bench.dataset, originals=bench.originals)


def test_one_lone_platelet_is_no_mask(bench: Bench) -> None:
    labels = bench.photograph()
    alone = (labels == 3).astype(np.int32)
    row = {"label": "1", "kind": "platelet"}
    cells = ImageCells("a.png", alone, (row,))
    bench.write("a_labels.tif", encode_labels(cells.labels))
    bench.write("a_objects.csv", label_images.encode_objects(cells))
    assert bench.run(allow_empty=True).added
    assert not bench.mask().any()
    np.testing.assert_array_equal(bench.labels(), alone)


def test_a_mask_beside_a_table_is_still_a_mask(bench: Bench) -> None:
    labels = bench.photograph()
    bench.write("a_objects.csv", label_images.encode_objects(cells_of(labels)))
    bench.save("a.png", white(labels > 0))
    assert bench.run().added[0].startswith("a: mask of 0, 255; ")
    assert not (bench.dataset / "train/labels").exists()


def test_a_damaged_table_of_kinds_is_named(bench: Bench) -> None:
    labels = bench.photograph()
    bench.save("a_labels.tif", labels.astype(np.uint16))
    for content, match in (
        (b"a,b\n1,2\n", "a_cells.csv: it is no table of cells"),
        (b"label,kind\n1,lymphocyte\n", "a_cells.csv: there is no kind 'lymphocyte'"),
        (b"label,kind\nx,red_cell\n", "a_cells.csv: "),
    ):
        bench.write("a_cells.csv", content)
        assert match in bench.refused()


def test_a_full_disk_leaves_the_truth_that_was_there(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    labels = bench.photograph()
    cells = cells_of(labels)
    bench.write("a_labels.tif", encode_labels(cells.labels))
    bench.write("a_objects.csv", label_images.encode_objects(cells))
    assert not bench.run().problems
    before = {path: path.read_bytes() for path in bench.dataset.rglob("*") if path.is_file()}
    for path in bench.corrected.iterdir():
        path.unlink()
    bench.save("a_mask.png", white(labels > 1))

    def full(path: Path, data: bytes) -> None:
        raise OutputError(f"{path}: no space left")

    monkeypatch.setattr("bcseg_training.import_corrections.write_whole", full)
    with pytest.raises(OutputError):
        bench.run(overwrite=True)
    assert {p: p.read_bytes() for p in bench.dataset.rglob("*") if p.is_file()} == before
