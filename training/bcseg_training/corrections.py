"""Corrected masks, labels and outlines, checked and added to a data set.

What a hand has corrected in Fiji, napari or QuPath comes back as one file for each photograph. Each
is read, held against its photograph, and becomes a pair of the data set; what is wrong with one
costs no other.
"""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import numpy.typing as npt
from skimage.measure import label as connected

from bcseg_batch.errors import ImageError, UsageError
from bcseg_batch.exchange import imagej, label_images, qupath
from bcseg_batch.exchange.cells import kind_name, kind_named
from bcseg_batch.exchange.shapes import Shape, label_shapes
from bcseg_batch.segment.cells import CellKind
from bcseg_batch.store.drawings import LOSSLESS_SUFFIXES, LOSSY_SUFFIXES, read_drawing
from bcseg_batch.store.encode import encode_png
from bcseg_batch.store.images import SUFFIXES, decode_image
from bcseg_batch.store.outputs import output_error, write_whole
from bcseg_training.dataset import MAX_PIXELS, VALIDATION_NAMES
from bcseg_training.synthetic import encode_kinds

SETS = ("train", *VALIDATION_NAMES)

Bools = npt.NDArray[np.bool_]
Labels = npt.NDArray[np.int32]

_SHAPES: Mapping[str, Callable[[bytes], list[Shape]]] = {
    ".geojson": qupath.decode_geojson,
    ".json": qupath.decode_geojson,
    ".roi": imagej.decode_rois,
    ".zip": imagej.decode_rois,
}
_DRAWINGS = (*LOSSLESS_SUFFIXES, *LOSSY_SUFFIXES)
# What a run, an export, Fiji or napari puts behind the name of the photograph.
_ENDINGS = ("_mask", "_labels", "-labels", "-mask", "_rois", "_cp_masks")
# A mask's values once an anti-aliased brush, a resize or JPEG has been over it: most that are not
# black are still nearly white. Of 255 labels a sixteenth is above this.
_NEARLY_WHITE = 240
# Cells that lie apart in so many pieces each, on average, are no cells but levels of grey.
_PIECES_PER_LABEL = 3
# How much brighter than the ground cells may be, in levels of green, before somebody is asked.
_BRIGHTER = 5.0


@dataclass(frozen=True, slots=True, eq=False)
class Correction:
    """What a file says about a photograph.

    Attributes:
        mask: bool (H, W), red and white cells.
        labels: int32 (H, W), 1..n without gaps; None where the file tells cells from the ground,
            but not from each other.
        kinds: of the labels, in their order.
        notes: what was made of the file, one phrase each.
    """

    mask: Bools
    labels: Labels | None = None
    kinds: tuple[CellKind, ...] = ()
    notes: tuple[str, ...] = ()


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
    files = _files(corrected, (*_SHAPES, *_DRAWINGS))
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


# One file ------------------------------------------------------------------------------------


def read_correction(
    file: Path,
    pixels: npt.NDArray[np.uint8],
    *,
    inverted: bool = False,
    allow_empty: bool = False,
) -> Correction:
    """Read one corrected file and hold it against its photograph.

    Args:
        file: a mask, a label image, GeoJSON or a set of ROIs.
        pixels: uint8 (H, W, 3) RGB, the photograph, upright.
        inverted: cells are black in the masks.
        allow_empty: a file without any cell is meant so.

    Raises:
        ImageError: it cannot be read.
        ValueError: it does not fit the photograph, or is not what a hand would correct.
    """
    shape_hw = (pixels.shape[0], pixels.shape[1])
    decode = _SHAPES.get(file.suffix.lower())
    if decode is not None:
        correction = _of_shapes(decode(_bytes(file)), shape_hw)
    else:
        drawing = read_drawing(file, max_pixels=MAX_PIXELS)
        _check_size(drawing.samples.shape, shape_hw)
        numbers = _whole_numbers(drawing.samples)
        correction = _of_numbers(numbers, _kinds_beside(file), inverted=inverted)
        notes = (*drawing.notes, *correction.notes)
        correction = Correction(correction.mask, correction.labels, correction.kinds, notes)
    _check_mask(correction.mask, pixels, allow_empty=allow_empty)
    covered = f"{correction.mask.mean():.1%} of the picture"
    return Correction(
        correction.mask, correction.labels, correction.kinds, (*correction.notes, covered)
    )


def _bytes(file: Path) -> bytes:
    try:
        return file.read_bytes()
    except OSError as error:
        raise ValueError(f"it cannot be read: {error.strerror}") from error


def _check_size(found_hw: tuple[int, ...], shape_hw: tuple[int, int]) -> None:
    if found_hw == shape_hw:
        return
    turned = (
        ": the photograph is turned by its orientation tag, which other programs may pass over: "
        "correct the upright mask or composite of a run"
        if found_hw == shape_hw[::-1]
        else ": save it at full size"
    )
    raise ValueError(
        f"it is {found_hw[1]}x{found_hw[0]} and its photograph {shape_hw[1]}x{shape_hw[0]}{turned}"
    )


def _whole_numbers(samples: npt.NDArray[np.generic]) -> npt.NDArray[np.int64]:
    """Give samples as whole numbers from 0 on: int64 (H, W).

    Raises:
        ValueError: they are something else, such as probabilities.
    """
    if (
        samples.dtype.kind == "f"
        and not (np.isfinite(samples) & (samples == samples.round())).all()
    ):
        raise ValueError(
            "it holds fractions, as a probability map does: save a mask of 0 and 255, or labels"
        )
    if samples.size and (samples.min() < 0 or samples.max() > np.iinfo(np.int32).max):
        raise ValueError(
            f"its values go from {samples.min()} to {samples.max()}: save a mask of 0 and 255, or "
            "labels from 1 on"
        )
    numbers: npt.NDArray[np.int64] = samples.astype(np.int64)
    return numbers


def _of_numbers(
    numbers: npt.NDArray[np.int64], kinds: Mapping[int, CellKind] | None, *, inverted: bool
) -> Correction:
    """Tell a mask from labels, and either from what is neither."""
    values = np.unique(numbers)
    listed = ", ".join(map(str, values[:6])) + (", ..." if values.size > 6 else "")
    is_mask = set(values.tolist()) <= {0, values[-1]} and values[-1] in {0, 1, 255, 65535}
    if is_mask and values[-1] not in (kinds or {}):  # in a table it is a label, be it the only one
        mask = numbers == 0 if inverted else numbers > 0
        return Correction(mask, notes=(f"mask of {listed}",))
    if inverted:
        raise ValueError(f"its values are {listed}: --inverted is for masks of 0 and 255")
    drawn = numbers[numbers > 0]
    if values[-1] <= 255 and 2 * np.count_nonzero(drawn >= _NEARLY_WHITE) > drawn.size:
        raise ValueError(
            f"its values are {listed}: a mask has 0 and 255 alone. JPEG, a resize or a soft brush "
            "has been over it; cut it (Fiji: Image > Adjust > Threshold, then Apply) and save it "
            "as PNG or TIFF"
        )
    if values[0] != 0:
        raise ValueError(f"its values are {listed}: no pixel is background (0)")
    pieces = int(connected(numbers, connectivity=2, background=0).max(initial=0))
    if pieces > _PIECES_PER_LABEL * (values.size - 1) + 1:
        raise ValueError(
            f"its values are {listed}, in {pieces} pieces: neither a mask of 0 and 255 nor labels, "
            "where each cell has a number of its own"
        )
    numbered = [int(value) for value in values[1:]]
    labels = np.searchsorted(values, numbers).astype(np.int32)
    if kinds is None:
        note = "no table of kinds beside it, all taken as red or white cells"
        return _of_labels(labels, [CellKind.RED_CELL] * len(numbered), (note,))
    new = [value for value in numbered if value not in kinds]
    notes = (f"{len(new)} cells that its table lacks taken as red cells",) if new else ()
    return _of_labels(labels, [kinds.get(v, CellKind.RED_CELL) for v in numbered], notes)


def _kinds_beside(file: Path) -> dict[int, CellKind] | None:
    """Read which kind each label has from the table of a run or an export, if one lies beside."""
    stem = file.stem.removesuffix(Path(label_images.LABELS_ENDING).stem)
    tables = (file.with_name(stem + ending) for ending in label_images.TABLE_ENDINGS)
    table = next((path for path in tables if path.is_file()), None)
    if table is None:
        return None
    try:
        return {n: kind_named(kind) for n, kind in label_images.read_kinds(_bytes(table)).items()}
    except ValueError as error:
        raise ValueError(f"{table.name}: {error}") from error


def _of_shapes(shapes: Sequence[Shape], shape_hw: tuple[int, int]) -> Correction:
    drawn, shared = label_shapes(shapes, shape_hw)
    kept = [number for number in range(1, len(shapes) + 1) if (drawn == number).any()]
    renumbered = np.zeros(len(shapes) + 1, np.int32)
    renumbered[kept] = np.arange(1, len(kept) + 1)
    kinds = [shapes[number - 1].kind for number in kept]
    notes = []
    if kinds.count(None):
        notes.append(f"{kinds.count(None)} without a kind taken as red cells")
    if shared:
        notes.append(f"{shared} pixels belong to two: the later one has them")
    if len(kept) < len(shapes):
        notes.append(f"{len(shapes) - len(kept)} wholly under others left out")
    return _of_labels(
        renumbered[drawn], [kind or CellKind.RED_CELL for kind in kinds], tuple(notes)
    )


def _of_labels(labels: Labels, kinds: Sequence[CellKind], notes: tuple[str, ...]) -> Correction:
    """Make a mask of labels 1..n; platelets are background in it, as in all masks here."""
    is_cell = np.array([False, *(kind is not CellKind.PLATELET for kind in kinds)])
    counted = [f"{kinds.count(kind)} {kind_name(kind)}" for kind in CellKind if kind in kinds]
    return Correction(
        is_cell[labels], labels, tuple(kinds), (f"labels: {', '.join(counted) or 'none'}", *notes)
    )


def _check_mask(mask: Bools, pixels: npt.NDArray[np.uint8], *, allow_empty: bool) -> None:
    """Refuse a mask that shows nothing, everything, or most likely the reverse of the cells."""
    if not mask.any():
        if allow_empty:
            return
        raise ValueError("it shows no cell: if that is right, add --allow-empty")
    if mask.all():
        raise ValueError("every pixel is a cell")
    # Blood cells take away green light, whatever the stain.
    green = pixels[..., 1]
    inside, outside = float(green[mask].mean()), float(green[~mask].mean())
    if inside > outside + _BRIGHTER:
        raise ValueError(
            f"its cells are brighter than the ground (green {inside:.0f} and {outside:.0f}): black "
            "and white may be exchanged (--inverted), or it belongs to another photograph"
        )


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
        content = _bytes(photograph)
        original = self._folder / "original" / f"{stem}{photograph.suffix}"
        self._refuse_twice(content, stem)
        files = {**self._truth(stem, correction), original: content}
        before = {path: _bytes(path) for path in self._of_stem(stem)}
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
        try:
            # What the new truth has no place for must not stand beside it.
            for path in set(before) - set(files):
                path.unlink()
        except OSError as error:
            raise output_error(self._folder, error) from error
        for path, data in files.items():
            if before.get(path) != data:
                write_whole(path, data)

    def _truth(self, stem: str, correction: Correction) -> dict[Path, bytes]:
        files: dict[Path, bytes] = {}
        if correction.labels is not None:
            labels, kinds = self._folder / "labels", self._folder / "kinds"
            files[labels / f"{stem}.tif"] = label_images.encode_label_image(correction.labels)
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
            if hashlib.sha256(_bytes(other)).digest() == digest:
                raise ValueError(f"the data set has this photograph already: {other}")
