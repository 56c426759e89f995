"""A model is told how its training images look."""

from __future__ import annotations

from pathlib import Path

import pytest
from parts import write_smear
from PIL import Image

from bcseg_batch.errors import UsageError
from bcseg_batch.segment.checkpoint import load_checkpoint
from bcseg_training.profile import profile, training_images


def data_set(root: Path, count: int) -> Path:
    for number in range(count):
        write_smear(root / f"original/{number:02}.png", seed=number, size_wh=(80, 60))
        (root / "mask").mkdir(exist_ok=True)
        Image.new("L", (80, 60), 255).save(root / f"mask/{number:02}.png")
    return root


def test_a_copy_knows_how_the_images_look(tmp_path: Path, tiny_model: Path) -> None:
    folder = data_set(tmp_path / "set/train", 16)
    before = tiny_model.read_bytes()
    statistics = profile(tiny_model, [tmp_path / "set", folder], tmp_path / "new.safetensors")
    assert statistics.count == 32
    assert tiny_model.read_bytes() == before
    old, new = (load_checkpoint(path) for path in (tiny_model, tmp_path / "new.safetensors"))
    assert old.spec.training_statistics is None
    assert new.spec.training_statistics == statistics
    weights = new.model.state_dict()
    assert all(weights[name].equal(tensor) for name, tensor in old.model.state_dict().items())


@pytest.mark.parametrize(
    ("count", "out", "told"),
    [(3, "new.safetensors", "too few"), (16, "new.pth", "safetensors"), (16, "old", "exists")],
)
def test_what_cannot_be_measured_or_written_is_refused(
    tmp_path: Path, tiny_model: Path, count: int, out: str, told: str
) -> None:
    target = tiny_model if out == "old" else tmp_path / out
    with pytest.raises(UsageError, match=told):
        profile(tiny_model, [data_set(tmp_path / "set", count)], target)
    assert not (tmp_path / "new.safetensors").exists()


def test_images_that_are_held_out_are_left_out(data_dir: Path) -> None:
    listed = training_images(data_dir / "bccd")
    assert 200 < len(listed) < len(list((data_dir / "bccd/images").iterdir()))
