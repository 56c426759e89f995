"""Looks a data set over before hours are spent on it."""

from __future__ import annotations

import hashlib
from collections import Counter, defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from bcseg_batch.errors import ImageError, UsageError
from bcseg_training.dataset import Pair, pair_by_stem, read_mask, read_original


@dataclass(slots=True)
class CheckReport:
    """What a data set is made of, and what is wrong with it.

    Attributes:
        pairs: number of pairs in each set.
        sizes_wh_px: how often each image size occurs, as (width, height).
        foreground_fraction: mean share of cell pixels over all masks, in [0, 1].
        problems: what would stop or spoil a training, one sentence each.
        remarks: what may be as it should be, but is worth a look.
    """

    pairs: dict[str, int] = field(default_factory=dict)
    sizes_wh_px: Counter[tuple[int, int]] = field(default_factory=Counter)
    foreground_fraction: float = 0.0
    problems: list[str] = field(default_factory=list)
    remarks: list[str] = field(default_factory=list)


def check_dataset(dataset: Path) -> CheckReport:
    """Read every pair of every set.

    Found are orphans, stems that occur twice, files that cannot be read, pairs of two sizes, masks
    that are not black and white or show nothing, and images that occur twice, most of all on both
    sides of the split, where they make every score a lie.

    Args:
        dataset: folder with `train` and `val` or `test`, or itself with `original` and `mask`.

    Raises:
        UsageError: there is no data set.
    """
    folders = _sets(dataset)
    report = CheckReport()
    seen: dict[str, list[str]] = defaultdict(list)
    fractions: list[float] = []
    for name, folder in folders.items():
        pairing = pair_by_stem(folder)
        report.pairs[name] = len(pairing.pairs)
        report.problems += [f"{name}: {problem}" for problem in pairing.problems]
        if not pairing.pairs:
            report.problems.append(f"{name}: no pair of original and mask")
        for pair in pairing.pairs:
            label = f"{name}/{pair.stem}"
            try:
                digest, fraction = _look_at(pair, label, report)
            except ImageError as error:
                report.problems.append(f"{label}: {error}")
                continue
            seen[digest].append(label)
            fractions.append(fraction)
    report.problems += list(_repeated(seen))
    report.foreground_fraction = float(np.mean(fractions)) if fractions else 0.0
    if list(folders.values()) == [dataset / "train"]:
        report.problems.append("there is no folder val or test to validate on")
    return report


def _sets(dataset: Path) -> dict[str, Path]:
    if (dataset / "original").is_dir():
        return {dataset.name: dataset}
    folders = {name: dataset / name for name in ("train", "val", "test")}
    there = {name: folder for name, folder in folders.items() if folder.is_dir()}
    if not there:
        raise UsageError(
            f"{dataset} is no data set: it has neither train, val and test nor original and mask"
        )
    return there


def _look_at(pair: Pair, label: str, report: CheckReport) -> tuple[str, float]:
    image, mask = read_original(pair), read_mask(pair)
    height, width = image.shape[:2]
    report.sizes_wh_px[width, height] += 1
    if mask.shape != (height, width):
        report.problems.append(
            f"{label}: the original is {width}x{height} and the mask "
            f"{mask.shape[1]}x{mask.shape[0]}"
        )
    values = np.flatnonzero(np.bincount(mask.ravel(), minlength=256))
    if not set(values.tolist()) <= {0, 255}:
        listed = ", ".join(map(str, values[:6])) + (", ..." if len(values) > 6 else "")
        if values.max() <= 127:
            report.problems.append(
                f"{label}: the mask's values are {listed}: cells must be white (255), or they are "
                "taken for background"
            )
        else:
            report.remarks.append(
                f"{label}: the mask has grey values ({listed}): above 127 counts as cell"
            )
    fraction = float((mask > 127).mean())
    if fraction in {0.0, 1.0}:
        report.remarks.append(f"{label}: the mask is all {'cell' if fraction else 'background'}")
    # With the shape: the bytes of two blank pictures may be the same in another order.
    return hashlib.sha256(f"{image.shape}".encode() + image.tobytes()).hexdigest(), fraction


def _repeated(seen: dict[str, list[str]]) -> Iterator[str]:
    for labels in seen.values():
        if len(labels) > 1:
            yield f"the same picture lies at {' and at '.join(labels)}"
