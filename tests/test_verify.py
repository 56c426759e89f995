"""Whatever happens to an output folder, `verify` finds it, and nothing else."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from parts import run_folder, tree, write_smear
from typer.testing import CliRunner

from bcseg_batch.cli import app
from bcseg_batch.errors import OutputError, UsageError
from bcseg_batch.items import Outcome, Status
from bcseg_batch.store.outputs import OutputFolder
from bcseg_batch.store.results import ResultsLog
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
    rest = {"is_running": False, "findings": 1}
    assert total == {"images": 3, "files": 8, "unhashed": 0, "inputs": 0, **rest}
    done = runner.invoke(app, ["verify", str(output)])
    assert done.stdout.splitlines()[0].startswith("a.png: composites/a_bloodred.jpg: is not what")


def begin_again(output: Path) -> None:
    """Leave what a run leaves that is killed while it does an image again."""
    with ResultsLog(output) as log:
        log.append(Outcome(image="a.png", status=Status.SKIPPED, error="ImageChangedError: x"))


def test_what_is_being_done_again_is_not_said_to_be_a_stray(output: Path) -> None:
    begin_again(output)
    with OutputFolder(output):  # a run is going on
        verified = Verified()
        assert list(verify(output, verified)) == []
        assert verified.is_running
    again, table = findings(output)
    assert (again.image, again.path) == ("a.png", "results.jsonl")
    assert again.problem == "was being done again when the run ended: run process-dir again"
    assert table.path == "results.csv"


def test_an_image_that_was_done_again_is_as_good_as_any(output: Path, source: Path) -> None:
    begin_again(output)
    run_folder(source, output, labels=True)
    assert findings(output, source) == []


def test_a_table_that_says_something_else_is_found(output: Path) -> None:
    table = output / "results.csv"
    table.write_text(table.read_text().replace("failed", "done"))
    (finding,) = findings(output)
    assert finding.path == "results.csv"
    table.write_bytes(b"\xff\xfe junk")
    assert [finding.path for finding in findings(output)] == ["results.csv"]


def test_names_that_are_not_utf8_agree_with_the_table(source: Path, tmp_path: Path) -> None:
    write_smear(source / "plain.png").rename(source / "odd\udcff.png")
    run_folder(source, tmp_path / "out")
    assert findings(tmp_path / "out", source) == []


def test_an_input_folder_that_is_not_there_is_an_error(output: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="nowhere"):
        findings(output, tmp_path / "nowhere")
