"""An output folder is exported image by image, and what one lacks costs no other."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import pytest
from parts import run_folder, tree, write_smear

from bcseg_batch import cli
from bcseg_batch.errors import OutputError
from bcseg_batch.exchange import imagej, label_images, qupath
from bcseg_batch.exchange.folder import ExportFormat, export_folder
from bcseg_batch.exchange.shapes import label_shapes
from bcseg_batch.store.provenance import read_provenance
from bcseg_batch.store.read_back import read_labels


@pytest.fixture
def output(source: Path, tmp_path: Path) -> Path:
    """Three images in two folders, with labels."""
    for number, name in enumerate(("a.png", "night/a.png", "night/b.png")):
        write_smear(source / name, number)
    run_folder(source, tmp_path / "out", labels=True)
    return tmp_path / "out"


def test_every_format_mirrors_the_sub_folders(output: Path) -> None:
    for to, files in {
        ExportFormat.QUPATH: ["a.geojson", "night/a.geojson", "night/b.geojson"],
        ExportFormat.IMAGEJ: ["a.zip", "night/a.zip", "night/b.zip"],
        ExportFormat.COCO: ["instances.json"],
        ExportFormat.LABELS: sorted(
            f"{name}_{kind}"
            for name in ("a", "night/a", "night/b")
            for kind in ("labels.tif", "objects.csv")
        ),
    }.items():
        summary = export_folder(output, to)
        assert summary.folder == output / "exports" / to.value
        assert (summary.exported, summary.problems) == (3, ())
        assert sorted(tree(summary.folder)) == files


def test_the_exports_hold_the_labels_of_the_run(output: Path, tmp_path: Path) -> None:
    labels = read_labels(output / "labels/night/b_labels.tif")
    assert labels.any()
    for to, decode, ending in (
        (ExportFormat.QUPATH, qupath.decode_geojson, qupath.SUFFIX),
        (ExportFormat.IMAGEJ, imagej.decode_rois, imagej.SUFFIX),
    ):
        export_folder(output, to, folder=tmp_path / to)
        shapes = decode((tmp_path / to / f"night/b{ending}").read_bytes())
        assert (label_shapes(shapes, labels.shape)[0] == labels).all()
    export_folder(output, ExportFormat.LABELS)
    plain = output / "exports/labels/night/b_labels.tif"
    assert (read_labels(plain) == labels).all()
    assert len(label_images.read_kinds(plain.with_name("b_objects.csv").read_bytes())) == len(
        {*labels.flat} - {0}
    )


@pytest.mark.parametrize("to", list(ExportFormat))
def test_a_second_export_is_the_same_to_the_byte(output: Path, to: ExportFormat) -> None:
    first = tree(export_folder(output, to).folder)
    assert tree(export_folder(output, to).folder) == first


@pytest.mark.parametrize("to", list(ExportFormat))
def test_one_bad_image_costs_no_other(output: Path, to: ExportFormat) -> None:
    damaged = bytearray((output / "labels/a_labels.tif").read_bytes())
    damaged[-40:] = bytes(40)
    (output / "labels/a_labels.tif").write_bytes(damaged)
    (output / "cells/night/b_cells.csv").unlink()
    summary = export_folder(output, to)
    assert summary.exported == 1
    assert [image for image, _ in summary.problems] == ["a.png", "night/b.png"]
    assert all("cannot be read" in reason for _, reason in summary.problems)
    assert not [name for name in tree(summary.folder) if name.endswith(".part")]


@pytest.mark.parametrize("to", list(ExportFormat))
@pytest.mark.parametrize("harm", ["torn", "text"])
def test_a_damaged_table_costs_no_other_image(output: Path, to: ExportFormat, harm: str) -> None:
    table = output / "cells/night/a_cells.csv"
    lines = table.read_text().splitlines()
    lines[1] = lines[1][: len(lines[1]) // 4] if harm == "torn" else "a,b,c"
    table.write_text("\n".join(lines))
    summary = export_folder(output, to)
    assert summary.exported == 2
    ((image, _),) = summary.problems
    assert image == "night/a.png"


def test_an_exported_label_image_says_what_it_was_made_from(output: Path) -> None:
    export_folder(output, ExportFormat.LABELS)
    found = read_provenance(output / "exports/labels/a_labels.tif")
    assert found == read_provenance(output / "labels/a_labels.tif")
    assert found is not None
    assert found.image == "a.png"


def test_labels_of_another_size_are_not_exported(output: Path) -> None:
    shutil.copy(output / "labels/a_labels.tif", output / "labels/night/a_labels.tif")
    lines = (output / "results.jsonl").read_text().splitlines()
    changed = [line.replace('"width_px": 40', '"width_px": 41', 1) for line in lines]
    (output / "results.jsonl").write_text("\n".join(changed) + "\n")
    summary = export_folder(output, ExportFormat.QUPATH, pattern="a.png")
    ((image, reason),) = summary.problems
    assert image == "a.png"
    assert "40x30 and its record says 41x30" in reason


def test_images_without_labels_are_named_with_what_to_do(source: Path, tmp_path: Path) -> None:
    write_smear(source / "a.png")
    (source / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\n")
    run_folder(source, tmp_path / "out", labels=False)
    summary = export_folder(tmp_path / "out", ExportFormat.COCO)
    assert summary.exported == 0
    assert dict(summary.problems)["a.png"].endswith("run process-dir again with --labels")
    assert dict(summary.problems)["broken.png"].startswith("it is not done: ")
    assert not summary.folder.exists()


def test_a_folder_that_is_no_output_folder(tmp_path: Path) -> None:
    with pytest.raises(OutputError, match="name a folder that process-dir"):
        export_folder(tmp_path, ExportFormat.QUPATH)


# The command ---------------------------------------------------------------------------------


def run(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *arguments: object
) -> tuple[int, str, str]:
    monkeypatch.setattr(sys, "argv", ["bcseg-batch", "export", *map(str, arguments)])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    printed = capsys.readouterr()
    return int(ended.value.code or 0), printed.out, printed.err


def test_the_command_says_what_it_did(
    output: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    code, text, _ = run(
        monkeypatch, capsys, output, "--to", "qupath", "--images", "night/*", "--editable"
    )
    assert (code, text) == (0, f"2 images exported to {output}/exports/qupath\n")
    features = json.loads((output / "exports/qupath/night/a.geojson").read_bytes())["features"]
    assert {f["properties"]["objectType"] for f in features} == {"annotation"}


def test_the_command_ends_with_1_where_something_is_left(
    output: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (output / "labels/a_labels.tif").unlink()
    code, text, _ = run(monkeypatch, capsys, output, "--to", "labels")
    assert code == 1
    assert text.splitlines()[:2] == [
        f"2 images exported to {output}/exports/labels",
        "1 not exported:",
    ]
    assert text.splitlines()[2].startswith("  a.png: ")
    code, text, _ = run(monkeypatch, capsys, output, "--to", "coco", "--images", "day/*")
    assert code == 1
    assert "no image is like day/*" in text


def test_what_cannot_be_carried_out(
    output: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    code, _, errors = run(monkeypatch, capsys, output, "--to", "coco", "--editable")
    assert code == 2
    assert "--editable is for --to qupath" in errors
    code, _, errors = run(monkeypatch, capsys, output / "masks", "--to", "coco")
    assert code == 74
    assert "results.jsonl cannot be read" in errors
