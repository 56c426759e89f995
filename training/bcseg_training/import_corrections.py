"""Corrected masks, labels and outlines, checked and added to a data set.

What a hand has corrected in Fiji, napari or QuPath comes back as one file for each photograph. Each
is read, held against its photograph, and becomes a pair of the data set; what is wrong with one
costs no other.
"""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from bcseg_batch.errors import ImageError, UsageError
from bcseg_batch.store.encode import encode_labels, encode_png
from bcseg_batch.store.images import SUFFIXES, decode_image
from bcseg_batch.store.outputs import output_error, write_whole
from bcseg_training.corrections import CORRECTION_SUFFIXES, Correction, read_bytes, read_correction
from bcseg_training.dataset import MAX_PIXELS, VALIDATION_NAMES
from bcseg_training.synthetic import encode_kinds

SETS = ("train", *VALIDATION_NAMES)

# What a run, an export, Fiji or napari puts behind the name of the photograph.
_ENDINGS = ("_mask", "_labels", "-labels", "-mask", "_rois", "_cp_masks")


@dataclass(slots=True)
class ImportReport:
    """What an import came to.

    Attributes:
        folder: the set that was added to.
        added: a line for each new pair: its name and what was made of the file.
        replaced: likewise for pairs that were there before.
        unchanged: likewise for those that were there just so.
        problems: a line for each file that was not imported, and why.
    """

    folder: Path
    added: list[str] = field(default_factory=list)
    replaced: list[str] = field(default_factory=list)
    unchanged: list[str] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)


def import_corrections(
    corrected: Path,
    dataset: Path,
    *,
    originals: Path | None = None,
    into: str = "train",
    overwrite: bool = False,
    inverted: bool = False,
    allow_empty: bool = False,
) -> ImportReport:
    """Add corrected masks, labels and outlines to a data set.

    For photograph `a` the set gets `original/a.<suffix>`, the photograph's own bytes, `mask/a.png`
    (0 and 255: red and white cells), and where single cells are known `labels/a.tif` and
    `kinds/a.csv`, as `bcseg-train synth` writes them. The photograph comes last, so that after an
    interruption none is without its mask.

    Args:
        corrected: folder with one file for each photograph, sub-folders included: masks and label
            images (PNG, BMP, TIFF), GeoJSON, sets of ROIs.
        dataset: folder with `train` and `val` or `test`, or a new one; or one with `original` and
            `mask` itself, which is then added to whatever `into` says.
        originals: folder with the photographs, sub-folders included; the set's own unless given.
        into: the set: `train`, `val` or `test`.
        overwrite: replace pairs that are there.
        inverted: cells are black in the masks.
        allow_empty: a mask without any cell is meant so.

    Raises:
        UsageError: a folder is missing, or there is no file to import.
        OutputError: the data set cannot be written.
    """
    folder = dataset if (dataset / "original").is_dir() else dataset / into
    sources = originals or folder / "original"
    if not corrected.is_dir():
        raise UsageError(f"{corrected} is not a folder: name the one with the corrected files")
    if not sources.is_dir():
        raise UsageError(
            f"{sources} is not a folder: name the one with the photographs by --originals"
        )
    files = _files(corrected, CORRECTION_SUFFIXES)
    if not files:
        raise UsageError(
            f"{corrected} holds nothing to import: masks and label images (PNG, TIFF), GeoJSON of "
            "QuPath, sets of ROIs of ImageJ (.zip)"
        )
    report = ImportReport(folder)
    target = _DataSet(dataset, folder, overwrite=overwrite)
    for file, photograph in _paired(files, _files(sources, SUFFIXES), report):
        stem = "__".join(photograph.with_suffix("").parts)
        try:
            pixels = decode_image(sources / photograph, max_pixels=MAX_PIXELS).pixels
            correction = read_correction(
                corrected / file, pixels, inverted=inverted, allow_empty=allow_empty
            )
            lines = getattr(report, target.add(stem, sources / photograph, correction))
        except (ImageError, ValueError) as error:
            report.problems.append(f"{file.as_posix()}: {error}")
        else:
            lines.append(f"{stem}: {'; '.join(correction.notes)}")
    return report


def _files(folder: Path, suffixes: Sequence[str]) -> list[Path]:
    """List the files of some kinds below a folder, relative to it; hidden ones are left out."""
    return sorted(
        path.relative_to(folder)
        for path in folder.rglob("*")
        if path.suffix.lower() in suffixes
        and path.is_file()
        and not any(part.startswith(".") for part in path.relative_to(folder).parts)
    )


# Pairs ---------------------------------------------------------------------------------------


def _paired(
    files: Sequence[Path], photographs: Sequence[Path], report: ImportReport
) -> list[tuple[Path, Path]]:
    """Find the photograph of each file by name; a problem for each that has none, or two.

    Args:
        files: relative to their folder.
        photographs: relative to theirs.
        report: takes the problems.
    """
    by_name: dict[str, list[Path]] = defaultdict(list)
    for photograph in photographs:
        for name in {photograph.name, photograph.stem}:
            by_name[name].append(photograph)
    chosen: dict[Path, list[Path]] = defaultdict(list)
    for file in files:
        fitting = _fitting(file, by_name)
        if len(fitting) == 1:
            chosen[fitting[0]].append(file)
        elif fitting:
            listed = " and ".join(path.as_posix() for path in fitting)
            report.problems.append(
                f"{file.as_posix()}: it fits {listed}: name it after one of them, folder and "
                f"suffix included, such as {fitting[0].as_posix()}{file.suffix}"
            )
        else:
            report.problems.append(
                f"{file.as_posix()}: no photograph is called {_bases(file)[-1]}: name it after its "
                "photograph"
            )
    pairs = []
    for photograph, own in chosen.items():
        if len(own) == 1:
            pairs.append((own[0], photograph))
        else:
            listed = " and ".join(file.as_posix() for file in own)
            report.problems.append(f"{listed}: both are for {photograph.as_posix()}: leave one")
    return sorted(pairs)


def _fitting(file: Path, by_name: Mapping[str, list[Path]]) -> list[Path]:
    """Give the photographs that a file may be for.

    The whole name is better than the stem, and the same folder better than another.
    """
    for base in _bases(file):
        fitting = by_name.get(base, [])
        fitting = [path for path in fitting if path.name == base] or fitting
        fitting = [path for path in fitting if path.parent == file.parent] or fitting
        if fitting:
            return fitting
    return []


def _bases(file: Path) -> list[str]:
    """Give what the photograph may be called: the file's stem, and that without an ending."""
    stem = file.stem
    shorter = [stem.removesuffix(ending) for ending in _ENDINGS if stem.endswith(ending)]
    return [stem, *shorter]


# The data set --------------------------------------------------------------------------------


class _DataSet:
    """One set that pairs are added to."""

    def __init__(self, dataset: Path, folder: Path, *, overwrite: bool) -> None:
        self._folder = folder
        self._overwrite = overwrite
        self._added: set[str] = set()
        folders = {folder, *(dataset / name for name in SETS)}
        self._photographs = [
            each / "original" / path
            for each in sorted(folders)
            if (each / "original").is_dir()
            for path in _files(each / "original", SUFFIXES)
        ]

    def add(self, stem: str, photograph: Path, correction: Correction) -> str:
        """Write one pair; gives `added`, `replaced` or `unchanged`.

        Raises:
            ValueError: it is there already, or its photograph is, by another name or in another
                set.
            ImageError: the name is too long.
            OutputError: it cannot be written.
        """
        if stem in self._added:
            raise ValueError(f"another file of this import is called {stem} too: rename one")
        content = read_bytes(photograph)
        original = self._folder / "original" / f"{stem}{photograph.suffix}"
        self._refuse_twice(content, stem)
        files = {**self._truth(stem, correction), original: content}
        before = {path: read_bytes(path) for path in self._of_stem(stem)}
        if before != files:
            if before and not self._overwrite:
                raise ValueError(
                    f"{self._folder} has {stem} already: add --overwrite to replace it"
                )
            self._write(before, files)
        self._added.add(stem)
        self._photographs.append(original)
        if before == files:
            return "unchanged"
        return "replaced" if before else "added"

    def _write(self, before: Mapping[Path, bytes], files: Mapping[Path, bytes]) -> None:
        for path, data in files.items():
            if before.get(path) != data:
                write_whole(path, data)
        try:
            # What the new truth has no place for must not stand beside it; last, since a full disk
            # would leave neither.
            for path in set(before) - set(files):
                path.unlink()
        except OSError as error:
            raise output_error(self._folder, error) from error

    def _truth(self, stem: str, correction: Correction) -> dict[Path, bytes]:
        files: dict[Path, bytes] = {}
        if correction.labels is not None:
            labels, kinds = self._folder / "labels", self._folder / "kinds"
            files[labels / f"{stem}.tif"] = encode_labels(correction.labels)
            files[kinds / f"{stem}.csv"] = encode_kinds(correction.kinds)
        mask = np.where(correction.mask, np.uint8(255), np.uint8(0))
        files[self._folder / "mask" / f"{stem}.png"] = encode_png(mask)
        return files

    def _of_stem(self, stem: str) -> list[Path]:
        """List what the set has under a name."""
        kinds = ("labels", "kinds", "mask", "original")
        return [
            path
            for kind in kinds
            if (self._folder / kind).is_dir()
            for path in (self._folder / kind).iterdir()
            if path.stem == stem and not path.name.startswith(".")
        ]

    def _refuse_twice(self, content: bytes, stem: str) -> None:
        """Refuse a photograph that the data set has elsewhere: it would make every score a lie."""
        digest = hashlib.sha256(content).digest()
        for other in self._photographs:
            is_its_own = other.parent.parent == self._folder and other.stem == stem
            if is_its_own or not other.exists() or other.stat().st_size != len(content):
                continue
            if hashlib.sha256(read_bytes(other)).digest() == digest:
                raise ValueError(f"the data set has this photograph already: {other}")
