"""Folders of originals and masks, paired by stem."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.utils.data import BatchSampler, Dataset, Sampler, default_collate

from bcseg_batch.errors import ImageError, UsageError
from bcseg_batch.segment.preprocess import resize_rgb, to_network_input
from bcseg_batch.store.images import SUFFIXES, decode_image
from bcseg_training.augment import Recipe, Sample, augment

MAX_PIXELS = 500_000_000

# The original keeps its second set in `test`; many data sets call it `val`.
VALIDATION_NAMES = ("val", "test")


@dataclass(frozen=True, slots=True)
class Pair:
    """One original and its mask.

    Attributes:
        stem: the name both share, without suffix.
        original: path of the photograph.
        mask: path of the mask.
    """

    stem: str
    original: Path
    mask: Path


@dataclass(frozen=True, slots=True)
class Pairing:
    """What lies in a folder of originals and masks.

    Attributes:
        pairs: sorted by stem.
        problems: one sentence for each orphan and each stem that occurs twice.
    """

    pairs: tuple[Pair, ...]
    problems: tuple[str, ...]


def pair_by_stem(folder: Path) -> Pairing:
    """Pair `folder/original` with `folder/mask` by file stem.

    Raises:
        UsageError: one of the two folders is missing.
    """
    problems: list[str] = []
    found: dict[str, dict[str, Path]] = {}
    for kind in ("original", "mask"):
        if not (folder / kind).is_dir():
            raise UsageError(
                f"{folder / kind} is not a folder: a data set has the folders original and mask, "
                "with files that share their stems"
            )
        found[kind] = {}
        for path in sorted((folder / kind).iterdir()):
            if path.suffix.lower() not in SUFFIXES or path.name.startswith("."):
                continue
            first = found[kind].setdefault(path.stem, path)
            if first != path:
                problems.append(f"{kind}/{path.name} has the same stem as {kind}/{first.name}")
    originals, masks = found["original"], found["mask"]
    problems += [f"original/{originals[s].name} has no mask" for s in originals if s not in masks]
    problems += [f"mask/{masks[s].name} has no original" for s in masks if s not in originals]
    pairs = (Pair(s, originals[s], masks[s]) for s in sorted(originals) if s in masks)
    return Pairing(tuple(pairs), tuple(problems))


def usable_pairs(folder: Path) -> tuple[Pair, ...]:
    """Pair a folder for training or judging, where nothing may be amiss.

    Raises:
        UsageError: orphans, a stem that occurs twice, or no pair at all.
    """
    pairing = pair_by_stem(folder)
    if pairing.problems:
        listed = "; ".join(pairing.problems[:5])
        more = f" and {len(pairing.problems) - 5} more" if len(pairing.problems) > 5 else ""
        raise UsageError(
            f"{folder}: {listed}{more}: every original needs one mask of the same stem "
            "(`bcseg-train check` lists them all)"
        )
    if not pairing.pairs:
        raise UsageError(f"{folder} holds no pair of original and mask")
    return pairing.pairs


def pair_files(folder: Path) -> list[Path]:
    """List the files of `usable_pairs`.

    Raises:
        UsageError: as `usable_pairs`.
    """
    return [file for pair in usable_pairs(folder) for file in (pair.original, pair.mask)]


def files_digest(folder: Path, files: Iterable[Path]) -> str:
    """Give a SHA-256 over names and contents of files, hexadecimal, whatever their order.

    The folder's own name and place have no say: a data set may be moved.

    Args:
        folder: that all of them lie in.
        files: at some depth in it.

    Raises:
        UsageError: one cannot be read.
    """
    whole = hashlib.sha256()
    for path in sorted(files):
        try:
            with path.open("rb") as file:
                content = hashlib.file_digest(file, "sha256").hexdigest()
        except OSError as error:
            raise UsageError(f"{path} cannot be read: {error.strerror}") from error
        name = path.relative_to(folder).as_posix().encode(errors="surrogateescape")
        whole.update(b"%s\0%s\n" % (name, content.encode()))
    return whole.hexdigest()


def validation_folder(dataset: Path) -> Path:
    """Find the second set of a data set, `val` or `test`.

    Raises:
        UsageError: there is neither.
    """
    for name in VALIDATION_NAMES:
        if (dataset / name).is_dir():
            return dataset / name
    raise UsageError(f"{dataset} has neither a folder val nor a folder test to validate on")


def read_original(pair: Pair) -> npt.NDArray[np.uint8]:
    """Decode the photograph: uint8 (H, W, 3) RGB.

    Raises:
        ImageError: it cannot be used.
    """
    return decode_image(pair.original, max_pixels=MAX_PIXELS).pixels


def read_mask(pair: Pair) -> npt.NDArray[np.uint8]:
    """Decode the mask: uint8 (H, W), 0..255 grey, as it is in the file.

    Raises:
        ImageError: it cannot be used, or it is a colour picture.
    """
    pixels = decode_image(pair.mask, max_pixels=MAX_PIXELS).pixels
    grey = pixels[:, :, 0]
    if not (np.array_equal(grey, pixels[:, :, 1]) and np.array_equal(grey, pixels[:, :, 2])):
        raise ImageError(f"{pair.mask} is a colour picture: a mask is black and white")
    return grey


def read_pair(pair: Pair) -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.uint8]]:
    """Decode both: photograph uint8 (H, W, 3) RGB and mask uint8 (H, W) grey, of one size.

    Raises:
        UsageError: one of them cannot be used, or their sizes differ.
    """
    try:
        image, mask = read_original(pair), read_mask(pair)
    except ImageError as error:
        raise UsageError(f"{pair.original.parent.parent}: {pair.stem}: {error}") from error
    if image.shape[:2] != mask.shape:
        raise UsageError(
            f"{pair.original.parent.parent}: {pair.stem}: the original is "
            f"{image.shape[1]}x{image.shape[0]} and the mask {mask.shape[1]}x{mask.shape[0]}"
        )
    return image, mask


class SegmentationDataset(Dataset[tuple[Tensor, Tensor, Tensor]]):
    """Images and masks at the network's size, held in memory as 8-bit.

    An item is asked for by `(epoch, index)` and depends on these and the seed alone: not on the
    order of asking, the number of loader processes, or what came before. That is what lets a
    resumed training continue to the same result.

    Args:
        pairs: what to hold.
        input_size_px: images and masks are stretched to this square, as in the original.
        crop_px: side of what is given out.
        recipe: augmentation.
        seed: of the augmentation.

    Raises:
        UsageError: a pair cannot be read, or differs in size.
    """

    def __init__(
        self,
        pairs: tuple[Pair, ...],
        *,
        input_size_px: int,
        crop_px: int,
        recipe: Recipe,
        seed: int,
    ) -> None:
        self._crop_px = crop_px
        self._recipe: Recipe = recipe
        self._seed = seed
        self._images: list[npt.NDArray[np.uint8]] = []
        self._masks: list[npt.NDArray[np.uint8]] = []
        for pair in pairs:
            image, mask = read_pair(pair)
            self._images.append(resize_rgb(image, input_size_px))
            three = np.repeat(mask[:, :, np.newaxis], 3, axis=2)
            self._masks.append(resize_rgb(three, input_size_px)[:, :, :1])

    def __len__(self) -> int:
        return len(self._images)

    def __getitem__(self, key: tuple[int, int]) -> tuple[Tensor, Tensor, Tensor]:
        """Give image (3, S, S) in [0, 1], target and weight (1, S, S), all float32."""
        epoch, item = key
        rng = np.random.default_rng([self._seed, epoch, item])
        index = item % len(self._images)
        target = np.true_divide(self._masks[index], 255, dtype=np.float32)
        sample = Sample(self._images[index], target, np.ones_like(target))
        sample = augment(rng, sample, self._recipe, size_px=self._crop_px)
        return (
            torch.from_numpy(to_network_input(sample.image)),
            torch.from_numpy(np.ascontiguousarray(sample.target.transpose(2, 0, 1))),
            torch.from_numpy(np.ascontiguousarray(sample.weight.transpose(2, 0, 1))),
        )


class EpochSampler(Sampler[Any]):
    """Gives the keys of an epoch in an order that depends on seed and epoch alone.

    Args:
        length: images in the data set.
        repeats: how often each image comes in one epoch.
        seed: of the order.
    """

    def __init__(self, length: int, *, repeats: int, seed: int) -> None:
        self._items = length * repeats
        self._seed = seed
        self.epoch = 0

    def __len__(self) -> int:
        return self._items

    def __iter__(self) -> Any:
        """Yield `(epoch, item)`; the image of an item is `item % length`."""
        order = np.random.default_rng([self._seed, self.epoch]).permutation(self._items)
        return iter([(self.epoch, int(item)) for item in order])


class SharedBatches(Sampler[Any]):
    """Cuts the keys of an epoch into batches, and gives one process's part of each.

    The batches are those of a single process, whatever the number of processes. Parts of a batch
    differ by one item at most, and those of a short last batch may be empty.

    Args:
        sampler: gives the keys.
        batch_size: of the whole batch.
        process: that takes part, counted from 0.
        processes: that share each batch.
    """

    def __init__(
        self, sampler: EpochSampler, *, batch_size: int, process: int, processes: int
    ) -> None:
        self._batches = BatchSampler(sampler, batch_size=batch_size, drop_last=False)
        self._process = process
        self._processes = processes

    def __len__(self) -> int:
        return len(self._batches)

    def __iter__(self) -> Iterator[list[Any]]:
        """Yield the keys of each part."""
        for batch in self._batches:
            yield batch[self._process :: self._processes]


class Collate:
    """Stacks the items of a batch; where there are none, gives tensors of no items.

    Args:
        item_shapes: of image, target and weight.
    """

    def __init__(self, item_shapes: tuple[tuple[int, ...], ...]) -> None:
        self._item_shapes = item_shapes

    def __call__(self, items: list[Any]) -> Any:
        """Give float32 tensors (N, ...)."""
        if items:
            return default_collate(items)
        return [torch.zeros(0, *shape) for shape in self._item_shapes]
