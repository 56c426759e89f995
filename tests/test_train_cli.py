"""The command line of the training side: what it says, and how it ends."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import torch
from blots import write_blots
from test_model import original_state
from typer.testing import CliRunner

from bcseg_batch.version import __version__
from bcseg_training import cli
from bcseg_training.cli import app, main

if TYPE_CHECKING:
    from collections.abc import Iterator


@pytest.fixture(autouse=True, scope="module")
def _one_thread() -> Iterator[None]:
    """Tiny tensors gain nothing from a second thread, which on a busy machine they wait for."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def run(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *arguments: object
) -> tuple[int, str, str]:
    """What `bcseg-train ARGUMENTS` gives: exit code, output, errors."""
    monkeypatch.setattr(sys, "argv", ["bcseg-train", *map(str, arguments)])
    with pytest.raises(SystemExit) as ended:
        main()
    output, errors = capsys.readouterr()
    code = ended.value.code
    assert "Traceback" not in errors
    return (code if isinstance(code, int) else 0), output, errors


def test_help_names_every_command() -> None:
    text = CliRunner().invoke(app, ["--help"], env={"COLUMNS": "120"}).output
    for command in ("check", "train", "evaluate", "export", "import", "synth"):
        assert command in text


def test_help_of_train_names_the_recipe_and_the_way_to_many_gpus() -> None:
    env = {"COLUMNS": "200", "TERM": "dumb", "NO_COLOR": "1"}
    text = CliRunner().invoke(app, ["train", "--help"], env=env).output
    for option in (
        "--out", "--epochs", "--width", "--lr", "--batch-size", "--loss", "--augment", "--seed",
        "--resume",
    ):  # fmt: skip
        assert option in text
    for default in ("default: 2", "default: 64", "default: 0.0003", "default: 8", "default: bce"):
        assert default in text
    assert "accelerate launch -m bcseg_training.cli train" in text


def test_version() -> None:
    assert CliRunner().invoke(app, ["--version"]).output == f"bcseg-train {__version__}\n"


def test_help_needs_no_heavy_import() -> None:
    code = (
        "import sys; from typer.testing import CliRunner; from bcseg_training.cli import app\n"
        "assert CliRunner().invoke(app, ['train', '--help']).exit_code == 0\n"
        "print(sorted({'torch', 'accelerate', 'matplotlib', 'scipy'} & set(sys.modules)))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


def test_a_whole_way(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Check, train, stop, resume, judge, take out."""
    dataset, out = write_blots(tmp_path / "set", train=2, val=1), tmp_path / "out"

    def command(*arguments: object) -> tuple[int, str, str]:
        return run(monkeypatch, capsys, *arguments)

    code, text, _ = command("check", dataset)
    lines = text.splitlines()
    assert code == 0
    assert lines[:3] == ["train: 2 pairs", "val: 1 pairs", "3 of 64x64"]
    assert lines[-1] == "0 problems, 0 remarks"
    training = ("train", dataset, "--out", out, "--width", 1, "--batch-size", 2, "--epochs", 2)
    code, text, errors = command(*training, "--stop-after-epoch", 1)
    assert code == 0
    assert text.startswith("best epoch 1: Dice ")
    assert "epoch 1 of 2: loss " in errors

    code, _, errors = command(*training)
    assert code == 2
    assert "--resume" in errors

    code, _, errors = command(*training, "--resume")
    assert code == 0
    assert "epoch 1 of 2: loss " not in errors
    assert "epoch 2 of 2: loss " in errors

    code, text, _ = command(
        "evaluate", out / "best.safetensors", dataset / "val", "--out", tmp_path / "judged"
    )
    assert code == 0
    assert {"dice", "count_error", "f1_50", "pq"} <= set(re.findall(r"[a-z0-9_]+", text))
    assert "set/val" in text
    assert {path.suffix for path in (tmp_path / "judged").iterdir()} == {".json", ".csv", ".png"}

    assert command("export", out / "best.safetensors", tmp_path / "m.pth")[0] == 0
    assert command("import", tmp_path / "m.pth", tmp_path / "m.safetensors")[0] == 0


def test_exit_codes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    dataset = write_blots(tmp_path / "set", train=1, val=1)
    torch.save(original_state(1, seed=0), tmp_path / "m.pth")
    (tmp_path / "broken.safetensors").write_bytes(b"no model")
    expected = {
        ("nonsense",): 2,
        ("train", dataset): 2,
        ("train", dataset, "--out", tmp_path / "o", "--loss", "mse"): 2,
        ("train", tmp_path / "none", "--out", tmp_path / "o"): 2,
        ("train", dataset, "--out", tmp_path / "o", "--crop-px", 1024): 2,
        ("check", tmp_path / "none"): 2,
        ("evaluate", tmp_path / "none.safetensors", dataset / "val"): 78,
        ("evaluate", tmp_path / "broken.safetensors", dataset / "val"): 78,
        ("evaluate", tmp_path / "m.pth", dataset / "val", "--device", "abacus"): 78,
        ("evaluate", tmp_path / "m.pth", tmp_path): 2,
        ("evaluate", tmp_path / "m.pth", dataset, "--threshold", 1): 2,
        ("evaluate", tmp_path / "m.pth", dataset, "--threshold", 0): 2,
        ("import", tmp_path / "m.pth", tmp_path / "nowhere" / "m.safetensors"): 74,
        ("import", tmp_path / "m.pth", tmp_path / "broken.safetensors"): 2,
    }
    found = {}
    for arguments in expected:
        found[arguments], _, errors = run(monkeypatch, capsys, *arguments)
        assert errors.strip()
    assert found == expected


def test_a_problem_in_the_data_set_is_exit_code_1(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    dataset = write_blots(tmp_path, train=2, val=1)
    (dataset / "train" / "mask" / "smear1.png").unlink()
    code, text, _ = run(monkeypatch, capsys, "check", dataset)
    assert code == 1
    assert "problem: train: original/smear1.png has no mask\n" in text


def test_a_resumed_training_says_so_as_the_service_would(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    training = ("train", write_blots(tmp_path / "set", train=2, val=1), "--out", tmp_path / "out")
    options = ("--width", 1, "--batch-size", 2, "--epochs", 2, "--resume")
    run(monkeypatch, capsys, *training, *options, "--stop-after-epoch", 1)
    code, _, errors = run(monkeypatch, capsys, *training, *options)
    assert code == 0
    (line,) = [line for line in errors.splitlines() if "resuming" in line]
    assert re.fullmatch(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d INFO    resuming after epoch 1 of 2", line)


def test_a_damaged_state_is_exit_code_78(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    dataset, out = write_blots(tmp_path / "set", train=1, val=1), tmp_path / "out"
    out.mkdir()
    (out / "last.state.pt").write_bytes(b"PK")
    code, _, errors = run(
        monkeypatch, capsys, "train", dataset, "--out", out, "--width", 1, "--resume"
    )
    assert code == 78
    assert errors.startswith(f"bcseg-train: training state {out / 'last.state.pt'} is damaged")


def test_a_bug_is_told_whole_and_has_a_code_of_its_own(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def broken() -> None:
        raise ZeroDivisionError("a bug")

    monkeypatch.setattr(cli, "app", broken)
    with pytest.raises(SystemExit) as left:
        main()
    assert left.value.code == 70
    assert "ZeroDivisionError: a bug" in capsys.readouterr().err


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="only Linux has a disk that is full")
def test_a_full_standard_output_is_told(tmp_path: Path) -> None:
    dataset = write_blots(tmp_path, train=1, val=1)
    code = "from bcseg_training.cli import main; main()"
    with Path("/dev/full").open("w") as full:
        done = subprocess.run(
            [sys.executable, "-c", code, "check", str(dataset)],
            stdout=full,
            stderr=subprocess.PIPE,
            text=True,
            check=False,
        )
    assert done.returncode == 74
    assert done.stderr == "bcseg-train: cannot print: [Errno 28] No space left on device\n"


def test_no_type_is_shown_beside_a_flag() -> None:
    env = {"COLUMNS": "200", "TERM": "dumb", "NO_COLOR": "1"}
    for arguments in (["--help"], ["train", "--help"]):
        text = CliRunner().invoke(app, arguments, env=env).output
        assert "--help" in text
        assert "bool" not in text.lower()


def test_a_missing_part_names_the_extra(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in [n for n in sys.modules if n.startswith("bcseg_training.train")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.delitem(sys.modules, "bcseg_training.progress", raising=False)

    class NotInstalled:
        def find_spec(self, name: str, *_: object) -> None:
            if name.split(".", maxsplit=1)[0] == "accelerate":
                raise ModuleNotFoundError("No module named 'accelerate'", name="accelerate")

    for name in [n for n in sys.modules if n.split(".")[0] == "accelerate"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setattr(sys, "meta_path", [NotInstalled(), *sys.meta_path])
    code, _, errors = run(monkeypatch, capsys, "train", tmp_path, "--out", tmp_path / "o")
    assert code == 78
    assert errors == (
        "bcseg-train: accelerate is not installed: pip install 'bcseg-batch[train]'\n"
    )
