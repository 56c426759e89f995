"""The installed command, as a shell or a supervisor meets it."""

from __future__ import annotations

import contextlib
import csv
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from parts import command, tree, write_smear
from PIL import Image
from test_outputs import small_disk
from torch import nn

from bcseg_batch import cli

LOG_LINE = re.compile(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d (INFO|WARNING|ERROR) +\S")
CPU = ("--device", "cpu", "--dtype", "float32")


def environment(**more: str) -> dict[str, str]:
    clean = {k: v for k, v in os.environ.items() if not k.startswith(("BCSEG_", "PYTHONWARN"))}
    return {**clean, "OMP_NUM_THREADS": "1", **more}


def run(*arguments: object, **more: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [command(), *map(str, arguments)],
        env=environment(**more),
        capture_output=True,
        text=True,
        errors="surrogateescape",
        timeout=100,
        check=False,
    )


@contextlib.contextmanager
def started(*arguments: object) -> Iterator[subprocess.Popen[str]]:
    process = subprocess.Popen(
        [command(), *map(str, arguments)],
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        with process:
            yield process
            process.kill()
    finally:
        process.kill()


def records(output: Path) -> list[dict[str, object]]:
    return [json.loads(line) for line in (output / "results.jsonl").read_text().splitlines()]


def wait_for_records(process: subprocess.Popen[str], output: Path, count: int) -> bool:
    """Wait until so many records are there; False where the run ended first."""
    path = output / "results.jsonl"
    while process.poll() is None:
        if path.exists() and path.read_bytes().count(b"\n") >= count:
            return True
        time.sleep(0.005)
    return False


@pytest.fixture
def source(tmp_path: Path) -> Path:
    folder = tmp_path / "in"
    folder.mkdir()
    return folder


@pytest.fixture
def output(tmp_path: Path) -> Path:
    return tmp_path / "out"


def fill(source: Path, count: int, size_wh: tuple[int, int] = (60, 40)) -> None:
    first = write_smear(source / "000.png", size_wh=size_wh)
    for number in range(1, count):
        shutil.copy(first, source / f"{number:03}.png")


# Runs that end by themselves -------------------------------------------------------------------


def test_a_run_a_second_run_and_a_bad_image(source: Path, output: Path, tiny_model: Path) -> None:
    fill(source, 3)
    (source / "notes\n.txt").touch()
    first = run("process-dir", source, output, "--model", tiny_model, *CPU)
    assert first.returncode == 0, first.stderr
    assert first.stdout.startswith("3 done, 0 failed, 0 skipped, ")
    assert r"1 ignored: notes\n.txt (not the suffix of an image)" in first.stdout
    assert str(output / "masks") in first.stdout
    assert all(LOG_LINE.match(line) for line in first.stderr.splitlines())
    assert "tiny.safetensors" in first.stderr

    again = run("process-dir", source, output, "--model", tiny_model, *CPU)
    assert again.returncode == 0
    assert again.stdout.startswith("Nothing to do: all 3 images were done before.\n")

    (source / "bad.tif").write_bytes(b"II*\0no image")
    failing = run("process-dir", source, output, "--model", tiny_model, *CPU, "--json")
    assert failing.returncode == 1
    summary = json.loads(failing.stdout)
    assert (summary["done"], summary["failed"], summary["skipped"]) == (0, 1, 3)
    assert summary["failures"][0][0] == "bad.tif"
    assert summary["left"] == 0
    assert summary["output"] == str(output)
    assert all(LOG_LINE.match(line) for line in failing.stderr.splitlines())
    assert "'bad.tif'" in failing.stderr
    assert len(records(output)) == 4


def test_an_empty_folder_is_said_to_be_empty(source: Path, output: Path, tiny_model: Path) -> None:
    result = run("process-dir", source, output, "--model", tiny_model, *CPU)
    assert result.returncode == 0
    assert result.stdout.startswith("Nothing to do: no image in the input folder.\n")


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        ((), 2, "Usage"),
        (("process-dir",), 2, "INPUT"),
        (("process-dir", "{source}"), 2, "OUTPUT"),
        (("process-dir", "{source}", "{output}", "--nonsense"), 2, "--nonsense"),
        (("process-dir", "{source}", "{output}", "--dtype", "int4"), 2, "int4"),
        (("process-dir", "{source}/missing", "{output}"), 2, "does not exist"),
        (("process-dir", "{source}", "{source}/out"), 2, "one in the other"),
        (("process-dir", "{source}", "{output}", "--batch-size", "0"), 78, "batch_size"),
        (("process-dir", "{source}", "{output}", "--threshold", "1.5"), 78, "threshold"),
        (("process-dir", "{source}", "{output}", "--device", "tpu"), 78, "device"),
        (("process-dir", "{source}", "{output}", "--settings", "{source}/no.toml"), 78, "no.toml"),
        (("process-dir", "{source}", "{output}", "--model", "{source}/no.safetensors"), 78, "no.s"),
    ],
)
def test_what_cannot_be_carried_out_is_told_and_nothing_written(
    source: Path, output: Path, arguments: tuple[str, ...], code: int, words: str
) -> None:
    result = run(*(a.format(source=source, output=output) for a in arguments))
    assert result.returncode == code, result.stderr
    assert words in result.stderr + (result.stdout if not arguments else "")
    assert "Traceback" not in result.stderr
    if arguments:
        assert result.stdout == ""
    assert not output.exists()
    assert list(source.iterdir()) == []


def test_a_damaged_model_is_refused_and_no_other_taken(
    source: Path, output: Path, tiny_model: Path, tmp_path: Path
) -> None:
    fill(source, 1)
    damaged = tmp_path / "damaged.safetensors"
    damaged.write_bytes(tiny_model.read_bytes()[:-100])
    result = run("process-dir", source, output, "--model", damaged, *CPU)
    assert result.returncode == 78
    assert "damaged.safetensors" in result.stderr
    assert not output.exists()


def test_a_full_disk_ends_in_74(source: Path, tmp_path: Path, tiny_model: Path) -> None:
    fill(source, 40, (300, 200))
    with small_disk(tmp_path / "disk", "size=400k") as disk:
        result = run("process-dir", source, disk / "out", "--model", tiny_model, *CPU)
        assert result.returncode == 74, result.stderr
        assert "No space left" in result.stderr
        assert "free some space" in result.stderr
        assert "Traceback" not in result.stderr
        assert {record["status"] for record in records(disk / "out")} <= {"done"}
        for record in records(disk / "out"):
            assert (disk / "out" / str(record["mask"])).exists()
        assert not [name for name in tree(disk) if name.endswith(".part")]


def test_names_that_the_terminal_cannot_show_are_escaped(
    source: Path, output: Path, tiny_model: Path
) -> None:
    for name in (b"\xff.png", "é.png".encode(), b"\x1b[31mred.txt"):
        Path(os.fsdecode(os.fsencode(source) + b"/" + name)).touch()
    result = run(
        "process-dir", source, output, "--model", tiny_model, *CPU, PYTHONIOENCODING="ascii"
    )
    assert result.returncode == 1, result.stderr
    assert result.stdout.startswith("0 done, 2 failed")
    assert r"\x1b[31mred.txt" in result.stdout
    assert "\x1b" not in result.stdout + result.stderr
    assert all(LOG_LINE.match(line) for line in result.stderr.splitlines())


def test_help_and_version_need_no_torch() -> None:
    script = (
        "import sys\n"
        "from bcseg_batch.cli import main\n"
        "sys.argv = ['bcseg-batch', *sys.argv[1:]]\n"
        "try:\n"
        "    main()\n"
        "except SystemExit as end:\n"
        "    assert not end.code, end.code\n"
        "print(*sorted({'torch', 'cv2', 'numpy', 'PIL'} & set(sys.modules)), file=sys.stderr)\n"
    )
    for arguments in (["--help"], ["process-dir", "--help"], ["--version"]):
        result = subprocess.run(
            [sys.executable, "-c", script, *arguments], capture_output=True, text=True, check=True
        )
        assert result.stderr.strip() == ""
        assert "bcseg-batch" in result.stdout


def test_every_odd_file_ends_in_a_record_and_nothing_but_the_log_is_on_stderr(
    data_dir: Path, output: Path, tiny_model: Path
) -> None:
    source = data_dir / "oddfiles"
    with (source / "manifest.csv").open(newline="") as manifest:
        names = {row["file"] for row in csv.DictReader(manifest)}
    result = run("process-dir", source, output, "--model", tiny_model, *CPU)
    assert result.returncode == 1
    strange = [line for line in result.stderr.splitlines() if not LOG_LINE.match(line)]
    assert strange == []
    assert "a bug in this program" not in result.stderr
    first = records(output)
    assert Counter(str(record["image"]) for record in first) == dict.fromkeys(names, 1)
    assert {record["status"] for record in first} == {"done", "failed"}
    for record in first:
        if record["status"] == "done":
            with Image.open(output / str(record["mask"])) as mask:
                assert mask.size == (record["width_px"], record["height_px"])
        else:
            assert re.match(
                r"\w*Image\w*Error: .*" + re.escape(str(record["image"])), str(record["error"])
            )
    again = run("process-dir", source, output, "--model", tiny_model, *CPU)
    assert again.returncode == 1
    assert records(output) == first


# The original ----------------------------------------------------------------------------------


class OriginalConv(nn.Module):
    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.c1 = nn.Conv2d(in_channels, out_channels, 3, padding=1)
        self.c2 = nn.Conv2d(out_channels, out_channels, 3, padding=1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.relu(self.c2(torch.relu(self.c1(x))))


class OriginalDown(nn.Module):
    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.c = OriginalConv(in_channels, out_channels)


class OriginalUp(nn.Module):
    def __init__(self, in_channels: int) -> None:
        super().__init__()
        self.up = nn.ConvTranspose2d(in_channels, in_channels // 2, 2, stride=2)
        self.c = OriginalConv(in_channels, in_channels // 2)


class OriginalNetwork(nn.Module):
    """The network as the original's description has it, written apart from ours."""

    def __init__(self, width: int) -> None:
        super().__init__()
        sides = [3, width, 2 * width, 4 * width, 8 * width]
        for step in range(1, 5):
            setattr(self, f"down{step}", OriginalDown(sides[step - 1], sides[step]))
            setattr(self, f"up{step}", OriginalUp(2 * sides[5 - step]))
        self.bottleneck = OriginalConv(8 * width, 16 * width)
        self.out = nn.Conv2d(width, 1, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        skips = []
        for step in range(1, 5):
            skips.append(getattr(self, f"down{step}").c(x))
            x = torch.max_pool2d(skips[-1], 2)
        x = self.bottleneck(x)
        for step in range(1, 5):
            block = getattr(self, f"up{step}")
            x = block.c(torch.cat([block.up(x), skips.pop()], dim=1))
        return self.out(x)


@pytest.mark.parametrize("width", [4, pytest.param(64, marks=pytest.mark.slow)])
def test_a_checkpoint_of_the_original_gives_the_original_s_pictures(
    source: Path, output: Path, tmp_path: Path, width: int
) -> None:
    write_smear(source / "a.png", size_wh=(512, 512))
    with Image.open(source / "a.png") as image:
        pixels = np.array(image)
    torch.manual_seed(3)
    network = OriginalNetwork(width).eval()
    with torch.inference_mode():
        tensor = torch.from_numpy(pixels).permute(2, 0, 1)[None] / 255
        logits = network(tensor)
        # Random weights mark all or nothing; in the middle they mark half.
        middle = logits.median()
        network.out.bias -= middle
        logits = network(tensor)[0, 0].numpy()
    checkpoint = tmp_path / "checkpoint.pth"
    torch.save(network.state_dict(), checkpoint)
    settings = tmp_path / "png.toml"
    settings.write_text('[outputs]\ncomposite_format = "png"\n')
    result = run("process-dir", source, output, "--model", checkpoint, *CPU, "--settings", settings)
    assert result.returncode == 0, result.stderr

    with Image.open(output / "masks/a_mask.png") as image:
        mask = np.asarray(image)
    clear = np.abs(logits) > 1e-6  # nearer to the threshold the order of the sums decides
    assert clear.mean() > 0.99
    np.testing.assert_array_equal(mask[clear], np.where(logits > 0, 255, 0)[clear])

    with Image.open(output / "composites/a_bloodred.png") as image:
        composite = np.asarray(image)
    expected = pixels.copy()
    for y, x in zip(*np.nonzero(mask == 255), strict=True):
        red, green, blue = (int(v) for v in pixels[y, x])
        expected[y, x] = (
            int(0.7 * red + 0.3 * 160),
            int(0.7 * green),
            int(0.7 * blue + 0.3 * 20),
        )
    assert 0.3 < (mask == 255).mean() < 0.7
    np.testing.assert_array_equal(composite, expected)


# Signals ---------------------------------------------------------------------------------------


def assert_whole(output: Path) -> None:
    """Every final name stands for a whole picture, and every record for its pictures."""
    for name in tree(output):
        if name.startswith(("masks/", "composites/")) and not name.endswith(".part"):
            with Image.open(output / name) as picture:
                picture.load()
    for record in records(output):
        assert record["status"] == "done"
        assert (output / str(record["mask"])).exists()
        assert (output / str(record["composite"])).exists()


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_first_signal_finishes_what_is_under_way(
    source: Path, output: Path, tiny_model: Path, number: signal.Signals, code: int
) -> None:
    fill(source, 200, (400, 300))
    arguments = ["process-dir", source, output, "--model", tiny_model, *CPU, "--batch-size", "2"]
    with started(*arguments) as process:
        assert wait_for_records(process, output, 1), "the run ended before the signal"
        process.send_signal(number)
        stdout, stderr = process.communicate(timeout=60)
    assert process.returncode == code, stderr
    done = len(records(output))
    assert 1 <= done < 200
    assert stdout.startswith(f"Interrupted with {200 - done} images left: run again to go on.\n")
    assert all(LOG_LINE.match(line) for line in stderr.splitlines())
    assert not [name for name in tree(output) if name.endswith(".part")]
    # What was drawn was finished: nothing lies there that no record names.
    pictures = {name for name in tree(output) if "/" in name}
    assert pictures == {
        str(r[kind]) for r in records(output) for kind in ("mask", "composite", "cells")
    }
    assert_whole(output)


def test_a_second_signal_ends_at_once(source: Path, output: Path, tiny_model: Path) -> None:
    # Under way are up to 256 images of some 30 ms: the first signal alone takes seconds.
    fill(source, 400, (1200, 900))
    arguments = ["process-dir", source, output, "--model", tiny_model, *CPU, "--batch-size", "64"]
    with started(*arguments) as process:
        assert wait_for_records(process, output, 1), "the run ended before the signal"
        process.send_signal(signal.SIGTERM)
        assert process.stderr is not None
        for line in process.stderr:
            if "stopping" in line:
                break
        process.send_signal(signal.SIGINT)
        process.wait(timeout=60)
        assert process.returncode == 130
        assert process.stdout is not None
        assert process.stdout.read() == ""
    assert len(records(output)) < 400


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(3))
def test_killed_again_and_again_every_image_is_done_once_and_whole(
    source: Path, output: Path, tiny_model: Path, seed: int
) -> None:
    seeded = random.Random(seed)
    fill(source, 60, (300, 200))
    write_smear(source / "000.jpg", 1)
    write_smear(source / "b/000.png", 2)
    arguments = ["process-dir", source, output, "--model", tiny_model, *CPU, "--batch-size", "2"]
    kills = 0
    for _ in range(5):
        with started(*arguments) as process:
            so_far = len(records(output)) if output.exists() else 0
            if wait_for_records(process, output, so_far + seeded.randrange(1, 12)):
                time.sleep(seeded.uniform(0, 0.02))
                process.kill()
                kills += 1
            process.wait()
        path = output / "results.jsonl"
        whole = path.read_bytes().rpartition(b"\n")[0].splitlines()
        for record in map(json.loads, whole):
            assert (output / record["mask"]).stat().st_size > 0
    assert kills >= 3
    result = run(*arguments)
    assert result.returncode == 0, result.stderr
    inputs = {p.relative_to(source).as_posix() for p in source.rglob("*") if p.is_file()}
    assert Counter(str(record["image"]) for record in records(output)) == dict.fromkeys(inputs, 1)
    assert_whole(output)
    pictures = {name for name in tree(output) if "/" in name}
    assert len(pictures) == 3 * len(inputs)
    assert pictures == {
        str(r[kind]) for r in records(output) for kind in ("mask", "composite", "cells")
    }
    tables = {"results.jsonl", "results.csv", "cells.csv"}
    assert set(tree(output)) - pictures == {".bcseg.lock", *tables}


@pytest.mark.slow
def test_shards_at_once_and_one_of_them_killed_make_what_one_run_makes(
    source: Path, output: Path, tmp_path: Path, tiny_model: Path
) -> None:
    for seed in range(60):
        name = f"{seed // 3:02}{('.png', '.jpg', '.PNG')[seed % 3]}"
        write_smear(source / ("b" if seed % 2 else ".") / name, seed, (300, 200))
    (source / "bad.png").write_text("no image")
    arguments = ["--model", tiny_model, *CPU, "--batch-size", "2"]
    assert run("process-dir", source, tmp_path / "whole", *arguments).returncode == 1
    with contextlib.ExitStack() as running:
        shards = [
            running.enter_context(
                started("process-dir", source, output, *arguments, "--shard", f"{number}/4")
            )
            for number in range(1, 5)
        ]
        path = output / "results.2-of-4.jsonl"
        while not (path.exists() and path.read_bytes().count(b"\n") >= 3):
            assert shards[1].poll() is None
            time.sleep(0.005)
        shards[1].kill()
        assert run("verify", output).returncode == 0  # while the others run
        codes = [process.wait() for process in shards]
    assert codes[1] == -9
    assert {codes[0], *codes[2:]} <= {0, 1}
    again = run("process-dir", source, output, *arguments, "--shard", "2/4", "--json")
    assert json.loads(again.stdout)["shard"] == "2/4"
    merged = run("merge", output)
    assert merged.returncode == 0, merged.stderr
    assert "61 records of 4 shards merged" in merged.stdout

    def last(folder: Path) -> dict[object, object]:
        found = {record["image"]: record for record in records(folder)}
        for record in found.values():
            del record["seconds"], record["finished_at"]
        return dict(found)

    assert last(output) == last(tmp_path / "whole")
    assert len(records(output)) == 61
    ours, theirs = tree(output), tree(tmp_path / "whole")
    assert ours.keys() == theirs.keys()
    assert [
        n for n in ours if ours[n] != theirs[n] and not n.startswith(("results.", ".bcseg"))
    ] == []
    whole = run("process-dir", source, output, *arguments, "--json")
    assert json.loads(whole.stdout)["skipped"] == 60


def test_a_shard_says_that_it_is_one_and_what_is_to_be_done_at_the_end(
    source: Path, output: Path, tiny_model: Path
) -> None:
    fill(source, 3)
    arguments = ("process-dir", source, output, "--model", tiny_model, *CPU)
    refused = run(*arguments, "--shard", "0/4")
    assert refused.returncode == 2
    assert "--array=1-4" in refused.stderr
    refused = run(*arguments, "--shard", "1/4", "--report")
    assert refused.returncode == 2
    assert "--no-report" in refused.stderr
    assert not output.exists()
    one = run(*arguments, "--shard", "1/1")
    assert one.returncode == 0, one.stderr
    assert one.stdout.startswith("Shard 1/1:\n3 done, 0 failed")
    assert f"bcseg-batch merge {output}" in one.stdout
    whole = run(*arguments)
    assert "merged 3 records of 1 shards" in whole.stderr
    assert "all 3 images were done before" in whole.stdout
    assert run("merge", output).stdout == "nothing to merge: no shard has left records there\n"


def test_a_merge_names_the_shards_that_have_not_run(
    source: Path, output: Path, tiny_model: Path
) -> None:
    fill(source, 1)
    arguments = ("process-dir", source, output, "--model", tiny_model, *CPU)
    assert run(*arguments, "--shard", "2/3").returncode == 0
    merged = run("merge", output)
    assert merged.returncode == 0
    assert "no records of shards 1/3, 3/3: they have not run" in merged.stdout


def test_a_bug_is_told_whole_and_has_a_code_of_its_own(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def broken() -> None:
        raise ZeroDivisionError("a bug")

    monkeypatch.setattr(cli, "app", broken)
    with pytest.raises(SystemExit) as left:
        cli.main()
    assert left.value.code == 70
    assert "ZeroDivisionError: a bug" in capsys.readouterr().err
