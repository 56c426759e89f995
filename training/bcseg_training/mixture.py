"""Several sources of specimens in one training, in given shares."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from bcseg_batch.errors import ImageError, UsageError
from bcseg_batch.segment.preprocess import to_network_input
from bcseg_training.dataset import pair_files, usable_pairs
from bcseg_training.specimens import Specimen, read_boxed, read_masked, read_synthetic
from bcseg_training.strong import augment_strong, pyramid
from bcseg_training.voc import BoxedImage, boxed_images, held_out_stems


@dataclass(frozen=True, slots=True)
class Source:
    """Specimens of one origin.

    Attributes:
        name: for messages.
        share: of all items, in any unit; the shares of all sources are added up.
        specimens: at least one.
    """

    name: str
    share: float
    specimens: tuple[Specimen, ...]


class MixtureDataset(Dataset[tuple[Tensor, Tensor, Tensor]]):
    """Crops of specimens under the strong augmentation.

    An item depends on the seed and its `(epoch, index)` alone, as in `SegmentationDataset`.

    Args:
        sources: what to draw from; the source is drawn by share, the specimen evenly.
        crop_px: side of the items.
        items: how many an epoch has.
        seed: of all draws.

    Raises:
        UsageError: there is no source, or one is empty or has no positive share.
    """

    def __init__(self, sources: Sequence[Source], *, crop_px: int, items: int, seed: int) -> None:
        for source in sources:
            if not source.specimens or source.share <= 0:
                raise UsageError(f"the source {source.name} is empty or has a share of 0")
        if not sources:
            raise UsageError("there is no source to train on")
        shares = np.array([source.share for source in sources], dtype=np.float64)
        self._shares = shares / shares.sum()
        self._sources = [[pyramid(one) for one in source.specimens] for source in sources]
        self._crop_px = crop_px
        self._items = items
        self._seed = seed

    def __len__(self) -> int:
        return self._items

    def __getitem__(self, key: tuple[int, int]) -> tuple[Tensor, Tensor, Tensor]:
        """Give image (3, S, S) in [0, 1], target and weight (4, S, S), all float32."""
        epoch, item = key
        rng = np.random.default_rng([self._seed, epoch, item])
        source = self._sources[int(rng.choice(len(self._shares), p=self._shares))]
        sample = augment_strong(rng, source[int(rng.integers(len(source)))], size_px=self._crop_px)
        return (
            torch.from_numpy(to_network_input(sample.image)),
            torch.from_numpy(np.ascontiguousarray(sample.target.transpose(2, 0, 1))),
            torch.from_numpy(np.ascontiguousarray(sample.weight.transpose(2, 0, 1))),
        )


def masked_source(dataset: Path, share: float) -> Source:
    """Read `train` of a data set of originals and masks.

    Raises:
        UsageError: it cannot be used.
    """
    found = tuple(read_masked(pair) for pair in usable_pairs(dataset / "train"))
    return Source(str(dataset), share, found)


def boxed_source(folder: Path, share: float) -> Source:
    """Read a folder of images and VOC boxes, but for the images held out (`held_out_stems`).

    Raises:
        UsageError: it cannot be used.
    """
    try:
        found = tuple(read_boxed(image) for image in _trained_on(folder))
    except ImageError as error:
        raise UsageError(f"cannot train on {folder}: {error}") from error
    return Source(str(folder), share, found)


def boxed_files(folder: Path) -> list[Path]:
    """List the files that `boxed_source` reads.

    Raises:
        UsageError: the folder cannot be used.
    """
    return [
        file
        for image in _trained_on(folder)
        for file in (image.image, image.annotation, image.white_mask)
        if file is not None
    ]


def _trained_on(folder: Path) -> list[BoxedImage]:
    kept_out = held_out_stems()
    return [image for image in boxed_images(folder) if image.stem not in kept_out]


def synthetic_source(folders: Sequence[Path], share: float) -> Source:
    """Read folders that `bcseg-train synth` wrote.

    Raises:
        UsageError: one cannot be used.
    """
    try:
        found = tuple(
            read_synthetic(folder, pair.stem) for folder in folders for pair in usable_pairs(folder)
        )
    except ImageError as error:
        raise UsageError(f"cannot train on synthetic smears: {error}") from error
    return Source("synthetic", share, found)


def synthetic_files(folder: Path) -> list[Path]:
    """List the files that make up one folder of `synthetic_source`.

    Raises:
        UsageError: the folder cannot be used.
    """
    stems = [pair.stem for pair in usable_pairs(folder)]
    return [
        *pair_files(folder),
        *(folder / "labels" / f"{stem}.tif" for stem in stems),
        *(folder / "kinds" / f"{stem}.csv" for stem in stems),
    ]
