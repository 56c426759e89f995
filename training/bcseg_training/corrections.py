"""What a corrected file says about its photograph, or why it cannot be used."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import numpy.typing as npt
from skimage.measure import label as connected

from bcseg_batch.exchange import imagej, label_images, qupath
from bcseg_batch.exchange.cells import kind_name, kind_named
from bcseg_batch.exchange.shapes import Shape, label_shapes
from bcseg_batch.segment.cells import CellKind
from bcseg_batch.store.drawings import LOSSLESS_SUFFIXES, LOSSY_SUFFIXES, read_drawing
from bcseg_training.dataset import MAX_PIXELS

Bools = npt.NDArray[np.bool_]
Labels = npt.NDArray[np.int32]

_SHAPES: Mapping[str, Callable[[bytes], list[Shape]]] = {
    ".geojson": qupath.decode_geojson,
    ".json": qupath.decode_geojson,
    ".roi": imagej.decode_rois,
    ".zip": imagej.decode_rois,
}
CORRECTION_SUFFIXES = (*_SHAPES, *LOSSLESS_SUFFIXES, *LOSSY_SUFFIXES)
"""Of the files that are taken for corrections; JPEGs are, to be refused by name."""

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
        correction = _of_shapes(decode(read_bytes(file)), shape_hw)
    else:
        drawing = read_drawing(file, max_pixels=MAX_PIXELS)
        _check_size(drawing.samples.shape, shape_hw)
        numbers = _whole_numbers(drawing.samples)
        correction = _of_numbers(numbers, _kinds_beside(file), inverted=inverted)
        correction = replace(correction, notes=(*drawing.notes, *correction.notes))
    _check_mask(correction.mask, pixels, allow_empty=allow_empty)
    covered = f"{correction.mask.mean():.1%} of the picture"
    return replace(correction, notes=(*correction.notes, covered))


def read_bytes(file: Path) -> bytes:
    """Read a file.

    Raises:
        ValueError: it cannot be read; the sentence is for the one who imports.
    """
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
        return {
            n: kind_named(kind) for n, kind in label_images.read_kinds(read_bytes(table)).items()
        }
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
