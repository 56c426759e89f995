"""Models go to the original's layout and back without a change."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import torch
from test_model import original_forward, original_state

from bcseg_batch.errors import CheckpointError, OutputError, UsageError
from bcseg_batch.segment.checkpoint import load_checkpoint, save_checkpoint
from bcseg_batch.segment.spec import ModelSpec
from bcseg_training.convert import convert

if TYPE_CHECKING:
    from pathlib import Path


def take(source: Path, target: Path) -> None:
    convert(source, target, source_suffix=".pth", target_suffix=".safetensors")


def give(source: Path, target: Path) -> None:
    convert(source, target, source_suffix=".safetensors", target_suffix=".pth")


@pytest.fixture
def original(tmp_path: Path) -> Path:
    torch.save(original_state(4, seed=1), tmp_path / "checkpoint.pth")
    return tmp_path / "checkpoint.pth"


def test_there_and_back(original: Path, tmp_path: Path) -> None:
    take(original, tmp_path / "m.safetensors")
    give(tmp_path / "m.safetensors", tmp_path / "back.pth")
    before, after = (
        torch.load(path, weights_only=True) for path in (original, tmp_path / "back.pth")
    )
    assert set(before) == set(after)
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_a_network_made_here_runs_in_the_originals_code(tmp_path: Path) -> None:
    torch.manual_seed(0)
    spec = ModelSpec(width=4)
    model = spec.build().eval()
    save_checkpoint(tmp_path / "m.safetensors", model, spec)
    give(tmp_path / "m.safetensors", tmp_path / "m.pth")
    x = torch.rand(1, 3, 64, 64)
    with torch.inference_mode():
        theirs = original_forward(torch.load(tmp_path / "m.pth", weights_only=True), x)
        torch.testing.assert_close(theirs, model(x), rtol=0, atol=0)


def test_what_is_taken_over_says_that_its_data_are_unknown(original: Path, tmp_path: Path) -> None:
    take(original, tmp_path / "m.safetensors")
    assert "unknown" in load_checkpoint(tmp_path / "m.safetensors").spec.training_data


def test_a_target_that_exists_is_left_alone(original: Path, tmp_path: Path) -> None:
    (tmp_path / "m.safetensors").write_bytes(b"dear")
    with pytest.raises(UsageError, match="exists already"):
        take(original, tmp_path / "m.safetensors")
    assert (tmp_path / "m.safetensors").read_bytes() == b"dear"


@pytest.mark.parametrize(
    ("source", "target"), [("m.bin", "m.safetensors"), ("checkpoint.pth", "m.onnx")]
)
def test_wrong_endings(original: Path, tmp_path: Path, source: str, target: str) -> None:
    with pytest.raises(UsageError, match="does not end in"):
        take(tmp_path / source, tmp_path / target)


def test_a_missing_source(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="No such file"):
        take(tmp_path / "none.pth", tmp_path / "m.safetensors")


def test_a_missing_folder(original: Path, tmp_path: Path) -> None:
    with pytest.raises(OutputError, match="No such file"):
        take(original, tmp_path / "nowhere" / "m.safetensors")


def test_a_network_that_the_original_cannot_express(tmp_path: Path) -> None:
    spec = ModelSpec(width=4, depth=2, norm="group", input_size_px=64)
    save_checkpoint(tmp_path / "m.safetensors", spec.build(), spec)
    with pytest.raises(CheckpointError, match=r"group normalisation.*safetensors"):
        give(tmp_path / "m.safetensors", tmp_path / "m.pth")
    assert not list(tmp_path.glob("*.pth*"))
