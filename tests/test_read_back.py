"""An output folder is read back as it is, and nothing in it is changed or trusted blindly."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import tifffile
from parts import run_folder, tree, write_smear

from bcseg_batch.errors import OutputError
from bcseg_batch.items import Status
from bcseg_batch.store.read_back import read_cells, read_labels, read_outcomes


def test_the_last_record_of_each_image_counts(source: Path, tmp_path: Path) -> None:
    output = tmp_path / "out"
    for name in ("b.png", "a.png"):
        write_smear(source / name)
    (source / "c.png").write_bytes(b"no picture")
    run_folder(source, output)
    run_folder(source, output, threshold=0.4, settings_sha256="c" * 64)
    before = tree(output)
    read = read_outcomes(output)
    assert list(read.outcomes) == ["a.png", "b.png", "c.png"]
    assert read.outcomes["a.png"].settings_sha256 == "c" * 64
    assert read.outcomes["c.png"].status is Status.FAILED
    assert read.damaged == ()
    assert tree(output) == before


@pytest.mark.parametrize(
    "line",
    [
        b'{"image": "a.png", "sta',
        b"\xff\xfe",
        b"[]",
        b'{"image": "x.png", "status": "lost"}',
        b'{"image": "x.png", "status": "done", "notes": [], "cell_diameter_px": Infinity}',
        b'{"image": "x.png", "status": "done", "notes": [], "cell_count": "7"}',
        b'{"image": "x.png", "status": "done", "notes": [], "finished_at": 7}',
        b'{"image": "x.png", "status": "done", "notes": [], "mask": "../../etc/passwd"}',
    ],
)
def test_a_line_that_is_no_record_is_told_and_passed_over(
    source: Path, tmp_path: Path, line: bytes
) -> None:
    write_smear(source / "a.png")
    run_folder(source, tmp_path / "out")
    with (tmp_path / "out/results.jsonl").open("ab") as file:
        file.write(line)
    read = read_outcomes(tmp_path / "out")
    assert list(read.outcomes) == ["a.png"]
    number = len((tmp_path / "out/results.jsonl").read_bytes().splitlines())
    assert read.damaged == (("results.jsonl", number),)


def test_a_folder_that_nobody_has_written_to_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(OutputError, match=r"results\.jsonl cannot be read .*process-dir"):
        read_outcomes(tmp_path)


def test_cells_and_labels_agree(source: Path, tmp_path: Path) -> None:
    write_smear(source / "a.png")
    run_folder(source, tmp_path / "out", labels=True)
    (outcome,) = read_outcomes(tmp_path / "out").outcomes.values()
    assert outcome.cells
    assert outcome.labels
    rows = read_cells(tmp_path / "out" / outcome.cells)
    labels = read_labels(tmp_path / "out" / outcome.labels)
    assert [int(row["label"]) for row in rows] == [n for n in np.unique(labels).tolist() if n]


@pytest.mark.parametrize("content", [None, b"", b"II*\0 and no more"])
def test_labels_that_cannot_be_read_are_named(tmp_path: Path, content: bytes | None) -> None:
    path = tmp_path / "a_labels.tif"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(OutputError, match="a_labels"):
        read_labels(path)
    with pytest.raises(OutputError, match="a_labels"):
        tifffile.imwrite(path, np.zeros((4, 4, 3), np.uint8), photometric="rgb")
        read_labels(path)


def test_a_table_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(OutputError, match="a_cells"):
        read_cells(tmp_path / "a_cells.csv")


def test_records_survive_json(source: Path, tmp_path: Path) -> None:
    write_smear(source / "a.png")
    run_folder(source, tmp_path / "out")
    record = json.loads((tmp_path / "out/results.jsonl").read_text().splitlines()[-1])
    assert record["outputs_sha256"].keys() == {"mask", "composite", "cells"}
    (outcome,) = read_outcomes(tmp_path / "out").outcomes.values()
    assert dict(outcome.outputs_sha256) == record["outputs_sha256"]
