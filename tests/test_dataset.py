"""Pairs by stem, and items that depend on seed, epoch and index alone."""

from __future__ import annotations

import shutil
from typing import TYPE_CHECKING

import numpy as np
import pytest
import torch
from blots import blots, write_blots, write_pair
from PIL import Image
from torchvision import transforms

from bcseg_batch.errors import ImageError, UsageError
from bcseg_training.dataset import (
    EpochSampler,
    SegmentationDataset,
    pair_by_stem,
    read_mask,
    read_pair,
    usable_pairs,
    validation_folder,
)

if TYPE_CHECKING:
    from pathlib import Path

    from bcseg_training.augment import Recipe


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_blots(tmp_path, train=3, val=0) / "train"


def held(
    folder: Path, recipe: Recipe = "standard", *, seed: int = 5, crop_px: int = 64
) -> SegmentationDataset:
    return SegmentationDataset(
        usable_pairs(folder), input_size_px=64, crop_px=crop_px, recipe=recipe, seed=seed
    )


# Pairing ---------------------------------------------------------------------------------------


def test_pairs_are_made_by_stem_whatever_the_suffix(folder: Path) -> None:
    with Image.open(folder / "original" / "smear1.png") as image:
        image.save(folder / "original" / "smear1.JPG", quality=95)
    (folder / "original" / "smear1.png").unlink()
    (folder / "original" / ".hidden.png").touch()
    (folder / "mask" / "Thumbs.db").touch()
    pairs = usable_pairs(folder)
    assert [p.stem for p in pairs] == ["smear0", "smear1", "smear2"]
    assert pairs[1].original.name == "smear1.JPG"
    assert pairs[1].mask.name == "smear1.png"


def test_orphans_are_named_and_never_paired_with_a_neighbour(folder: Path) -> None:
    (folder / "mask" / "smear0.png").unlink()
    (folder / "original" / "smear2.png").unlink()
    pairing = pair_by_stem(folder)
    assert [p.stem for p in pairing.pairs] == ["smear1"]
    assert sorted(pairing.problems) == [
        "mask/smear2.png has no original",
        "original/smear0.png has no mask",
    ]
    with pytest.raises(UsageError, match=r"smear0\.png has no mask"):
        usable_pairs(folder)


def test_a_stem_that_occurs_twice_is_a_problem(folder: Path) -> None:
    shutil.copy(folder / "original" / "smear0.png", folder / "original" / "smear0.tif")
    with pytest.raises(UsageError, match=r"smear0\.tif has the same stem as original/smear0\.png"):
        usable_pairs(folder)


def test_many_problems_are_counted(folder: Path) -> None:
    for i in range(9):
        shutil.copy(folder / "mask" / "smear0.png", folder / "mask" / f"more{i}.png")
    with pytest.raises(UsageError, match="and 4 more"):
        usable_pairs(folder)


def test_missing_and_empty_folders(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="original is not a folder"):
        usable_pairs(tmp_path)
    (tmp_path / "original").mkdir()
    (tmp_path / "mask").mkdir()
    with pytest.raises(UsageError, match="no pair"):
        usable_pairs(tmp_path)


def test_validation_is_val_or_the_originals_test(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="neither a folder val nor a folder test"):
        validation_folder(tmp_path)
    (tmp_path / "test").mkdir()
    assert validation_folder(tmp_path).name == "test"
    (tmp_path / "val").mkdir()
    assert validation_folder(tmp_path).name == "val"


# Reading ---------------------------------------------------------------------------------------


def test_sizes_that_differ_are_refused(tmp_path: Path) -> None:
    write_pair(tmp_path, "odd", blots(0, (64, 80))[0], blots(0, (80, 64))[1])
    with pytest.raises(UsageError, match="odd: the original is 80x64 and the mask 64x80"):
        held(tmp_path)


def test_a_colour_picture_is_no_mask(tmp_path: Path) -> None:
    image, _ = blots(0)
    write_pair(tmp_path, "odd", image, image)
    (pair,) = usable_pairs(tmp_path)
    with pytest.raises(ImageError, match="colour"):
        read_mask(pair)
    with pytest.raises(UsageError, match=r"odd.*colour"):
        read_pair(pair)


def test_a_grey_mask_stored_as_rgb_is_a_mask(tmp_path: Path) -> None:
    image, mask = blots(0)
    write_pair(tmp_path, "rgb", image, np.repeat(mask[..., np.newaxis], 3, axis=2))
    np.testing.assert_array_equal(read_mask(usable_pairs(tmp_path)[0]), mask)


def test_a_damaged_file_is_named(folder: Path) -> None:
    (folder / "original" / "smear1.png").write_bytes(b"no image")
    with pytest.raises(UsageError, match="smear1"):
        held(folder)


# Items -----------------------------------------------------------------------------------------


def test_plain_items_are_the_originals(tmp_path: Path) -> None:
    """`Resize` and `ToTensor` on the image as RGB and on the mask as L."""
    image, mask = blots(3, (70, 90))
    write_pair(tmp_path, "a", image, mask)
    plain = transforms.Compose([transforms.Resize((64, 64)), transforms.ToTensor()])
    x, target, weight = held(tmp_path, "none")[0, 0]
    assert torch.equal(x, plain(Image.fromarray(image)))
    assert torch.equal(target, plain(Image.fromarray(mask)))
    assert torch.equal(weight, torch.ones(1, 64, 64))


@pytest.mark.parametrize("recipe", ["none", "standard"])
def test_items_depend_on_seed_epoch_and_index_alone(folder: Path, recipe: Recipe) -> None:
    keys = [(0, 0), (0, 1), (3, 2), (1, 7)]
    forwards, backwards = held(folder, recipe, crop_px=32), held(folder, recipe, crop_px=32)
    first = {key: forwards[key] for key in keys}
    np.random.default_rng(1).random(10)
    torch.rand(10)
    for key in reversed(keys):
        for ours, theirs in zip(first[key], backwards[key], strict=True):
            assert torch.equal(ours, theirs)
            assert ours.dtype == torch.float32
            assert ours.shape[-2:] == (32, 32)
            assert 0 <= ours.min() <= ours.max() <= 1


def test_epochs_indices_and_seeds_differ(folder: Path) -> None:
    items = [
        held(folder)[0, 0][0],
        held(folder)[1, 0][0],
        held(folder)[0, 3][0],  # the same image, its second crop
        held(folder, seed=6)[0, 0][0],
    ]
    assert len({item.numpy().tobytes() for item in items}) == len(items)


def test_asking_leaves_the_held_images_alone(folder: Path) -> None:
    dataset = held(folder, "none")
    for tensor in dataset[0, 0]:
        tensor.zero_()
    assert all(tensor.any() for tensor in dataset[0, 0])


def test_order_visits_every_item_once_and_changes_with_the_epoch() -> None:
    sampler = EpochSampler(7, repeats=3, seed=1)
    orders = []
    for epoch in range(2):
        sampler.epoch = epoch
        keys = list(sampler)
        assert {e for e, _ in keys} == {epoch}
        orders.append([item for _, item in keys])
        assert sorted(orders[-1]) == list(range(21))
        assert [item for _, item in sampler] == orders[-1]
    assert orders[0] != orders[1]
    assert len(sampler) == 21
