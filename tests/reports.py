"""Output folders as a run leaves them, drawn in no time, for the tests of the report."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import numpy.typing as npt
from PIL import Image

from bcseg_batch.items import Flag, Outcome, Status
from bcseg_batch.segment.cells import CellKind
from bcseg_batch.store.cell_table import encode_cells
from bcseg_batch.store.encode import encode_jpeg, encode_labels, encode_png
from bcseg_batch.store.names import (
    cells_path,
    composite_path,
    labels_path,
    mask_path,
    preview_path,
)
from bcseg_batch.store.results import to_record
from bcseg_batch.store.shards import JSONL_NAME

SHAPE_HW = (60, 80)
# Row, column and radius of each cell; the first two touch.
CELLS = ((20.0, 20.0, 9.0), (20.0, 37.0, 9.0), (45.0, 60.0, 8.0))
KINDS = (CellKind.RED_CELL, CellKind.RED_CELL, CellKind.WHITE_CELL)
BLUR = Flag(name="out_of_focus", value=0.4, limit=0.25, sentence="the edges are <b>wide</b>")


def labels_of(cells: tuple[tuple[float, float, float], ...] = CELLS) -> npt.NDArray[np.int32]:
    """Draw cells as discs."""
    rows, columns = np.indices(SHAPE_HW)
    labels = np.zeros(SHAPE_HW, np.int32)
    for number, (row, column, radius) in enumerate(cells, 1):
        labels[(rows - row) ** 2 + (columns - column) ** 2 <= radius**2] = number
    return labels


def cell_rows(labels: npt.NDArray[np.int32]) -> dict[str, npt.NDArray[np.generic]]:
    """Measure as much of the cells as the report needs."""
    count = int(labels.max())
    places = [np.nonzero(labels == number) for number in range(1, count + 1)]
    return {
        "label": np.arange(1, count + 1),
        "kind": np.array([KINDS[n % len(KINDS)].name.lower() for n in range(count)]),
        "centroid-0": np.array([rows.mean() for rows, _ in places]),
        "centroid-1": np.array([columns.mean() for _, columns in places]),
        "area": np.array([rows.size for rows, _ in places]),
        "equivalent_diameter_area": np.array([(4 * r.size / np.pi) ** 0.5 for r, _ in places]),
    }


def done(
    folder: Path,
    image: str = "a.jpg",
    *,
    labels: bool = True,
    preview: bool = True,
    cells: bool = True,
    confidence: float = 0.95,
    flags: tuple[Flag, ...] = (),
    seconds: float = 1.5,
) -> Outcome:
    """Write the files of an image that is done, and give its outcome."""
    name = image.rpartition(".")[0]
    drawn = labels_of()
    photograph = np.full((*SHAPE_HW, 3), 230, np.uint8)
    photograph[drawn > 0] = (190, 110, 120)
    composite = photograph.copy()
    composite[drawn > 0] = (160, 0, 20)
    table = cell_rows(drawn)
    files = {
        mask_path(name): encode_png((drawn > 0).view(np.uint8) * np.uint8(255)),
        composite_path(name, "jpg"): encode_jpeg(composite, quality=90),
        **({labels_path(name): encode_labels(drawn)} if labels else {}),
        **({preview_path(name): encode_jpeg(photograph, quality=90)} if preview else {}),
        **({cells_path(name): encode_cells(image, list(table), table)} if cells else {}),
    }
    for path, data in files.items():
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_bytes(data)
    return Outcome(
        image=image,
        status=Status.DONE,
        width_px=SHAPE_HW[1],
        height_px=SHAPE_HW[0],
        foreground_fraction=float((drawn > 0).mean()),
        mean_confidence=confidence,
        cell_count=len(CELLS) if cells else None,
        red_cell_count=2 if cells else None,
        white_cell_count=1 if cells else None,
        platelet_count=0 if cells else None,
        cell_diameter_px=17.5 if cells else None,
        flags=flags,
        mask=mask_path(name),
        composite=composite_path(name, "jpg"),
        labels=labels_path(name) if labels else None,
        cells=cells_path(name) if cells else None,
        preview=preview_path(name) if preview else None,
        version="0.1.0",
        device="cpu",
        dtype="float32",
        seconds=seconds,
        finished_at="2026-03-01T08:30:00.000+00:00",
    )


def failed(image: str, error: str = "UnreadableImageError: 'b' is <i>no</i> image") -> Outcome:
    """Give the outcome of an image that failed."""
    return Outcome(image=image, status=Status.FAILED, error=error)


def record(folder: Path, *outcomes: Outcome) -> Path:
    """Add records to an output folder."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / JSONL_NAME).open("a", encoding="ascii") as lines:
        lines.writelines(json.dumps(to_record(outcome)) + "\n" for outcome in outcomes)
    return folder


def is_picture(path: Path) -> bool:
    """Say whether a file is a picture that opens."""
    with Image.open(path) as picture:
        picture.load()
        return picture.width > 0
