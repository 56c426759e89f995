"""Whatever happens to an output folder, `verify` finds it, and nothing else."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from parts import run_folder, tree, write_smear
from typer.testing import CliRunner

from bcseg_batch.cli import app
from bcseg_batch.errors import OutputError
from bcseg_batch.store.verify import Finding, Verified, verify


@pytest.fixture
def output(source: Path, tmp_path: Path) -> Path:
    for number, name in enumerate(("a.png", "night/b.png")):
        write_smear(source / name, number)
    (source / "broken.png").write_bytes(b"no picture")
    run_folder(source, tmp_path / "out", labels=True)
    return tmp_path / "out"


def findings(output: Path, source: Path | None = None) -> list[Finding]:
    return list(verify(output, Verified(), source))


def test_a_folder_as_it_was_written_has_no_findings(output: Path, source: Path) -> None:
    before = tree(output)
    verified = Verified()
    assert list(verify(output, verified, source)) == []
    assert (verified.images, verified.files, verified.unhashed, verified.inputs) == (3, 8, 0, 2)
    assert tree(output) == before


def append(path: Path, data: bytes) -> None:
    with path.open("ab") as file:
        file.write(data)


def flip_a_bit(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize(
    ("harm", "image", "path", "problem"),
    [
        (
            lambda out: flip_a_bit(out / "masks/a_mask.png"),
            "a.png",
            "masks/a_mask.png",
            "is not what was written",
        ),
        (
            lambda out: (out / "cells/night/b_cells.csv").unlink(),
            "night/b.png",
            "cells/night/b_cells.csv",
            "is missing",
        ),
        (
            lambda out: (out / "labels/stray.tif").write_bytes(b"x"),
            None,
            "labels/stray.tif",
            "is in no record",
        ),
        (
            lambda out: append(out / "results.jsonl", b'{"image": "c'),
            None,
            "results.jsonl",
            "line 4 is no record",
        ),
    ],
)
def test_each_harm_is_found_alone(
    output: Path,
    harm: Callable[[Path], object],
    image: str | None,
    path: str,
    problem: str,
) -> None:
    harm(output)
    (finding,) = findings(output)
    assert (finding.image, finding.path) == (image, path)
    assert finding.problem.startswith(problem)


def test_a_photograph_that_was_replaced_is_found_and_one_that_is_archived_is_none(
    output: Path, source: Path
) -> None:
    write_smear(source / "a.png", 77)
    (source / "night/b.png").unlink()
    assert findings(output) == []
    (finding,) = findings(output, source)
    assert finding.image == "a.png"
    assert "another picture" in finding.problem


def test_a_file_that_is_being_written_is_no_finding(output: Path) -> None:
    (output / "masks/.bcseg-1234.part").write_bytes(b"half")
    assert findings(output) == []


def test_a_record_without_hashes_is_counted_as_such(output: Path) -> None:
    lines = [json.loads(line) for line in (output / "results.jsonl").read_text().splitlines()]
    for line in lines:
        del line["outputs_sha256"]
    (output / "results.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    verified = Verified()
    assert list(verify(output, verified)) == []
    assert (verified.files, verified.unhashed) == (0, 8)


def test_a_folder_without_records_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(OutputError, match=r"results\.jsonl"):
        findings(tmp_path)


def test_the_command_ends_with_1_where_there_is_a_finding(output: Path, source: Path) -> None:
    runner = CliRunner()
    done = runner.invoke(app, ["verify", str(output), "--input", str(source)])
    assert done.exit_code == 0
    assert done.stdout == "3 images, 8 files compared, 2 photographs compared, 0 findings\n"
    flip_a_bit(output / "composites/a_bloodred.jpg")
    done = runner.invoke(app, ["verify", str(output), "--json"])
    assert done.exit_code == 1
    finding, total = (json.loads(line) for line in done.stdout.splitlines())
    assert finding["path"] == "composites/a_bloodred.jpg"
    assert total == {"images": 3, "files": 8, "unhashed": 0, "inputs": 0, "findings": 1}
    done = runner.invoke(app, ["verify", str(output)])
    assert done.stdout.splitlines()[0].startswith("a.png: composites/a_bloodred.jpg: is not what")
