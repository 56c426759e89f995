"""Cells as COCO instances: one JSON file for all images.

The form is that of cocodataset.org/#format-data. Areas are run lengths over the image's columns,
which any outline and hole fits into exactly; polygons would be approximate.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from typing import IO, Any

import numpy as np
import numpy.typing as npt
from scipy.ndimage import find_objects

from bcseg_batch.exchange.cells import ImageCells, kind_name
from bcseg_batch.segment.cells import CellKind
from bcseg_batch.version import __version__

FILE_NAME = "instances.json"

# An image's id has 31 bits and a cell's 22 more: together they fit into the integers that JSON's
# readers hold exactly (2^53).
_IMAGE_IDS = 2**31 - 1
_CELLS_PER_IMAGE = 2**22


def categories() -> list[dict[str, Any]]:
    """Give COCO's categories: the kinds of cells, with the numbers that stand in the records."""
    return [
        {"id": kind.value, "name": kind_name(kind), "supercategory": "blood"} for kind in CellKind
    ]


def image_annotations(cells: ImageCells, image_id: int) -> list[dict[str, Any]]:
    """Give COCO's annotations of one image.

    Args:
        cells: of the image.
        image_id: of the image; an annotation's follows from it and the cell's label alone.

    Returns:
        For each cell: `id`, `image_id`, `category_id`, `segmentation` (uncompressed RLE), `area` in
        pixels, `bbox` (x, y, width, height) and `iscrowd` 0.

    Raises:
        ValueError: a label is 2^22 or more.
    """
    height, width = cells.labels.shape
    boxes = find_objects(cells.labels)
    found = []
    for label, kind, _ in cells.items():
        if label >= _CELLS_PER_IMAGE:
            raise ValueError(f"it has a cell {label}: COCO ids end at {_CELLS_PER_IMAGE - 1}")
        rows, columns = boxes[label - 1]
        inside = cells.labels[rows, columns] == label
        found.append(
            {
                "id": image_id * _CELLS_PER_IMAGE + label,
                "image_id": image_id,
                "category_id": kind.value,
                "segmentation": {
                    "size": [height, width],
                    "counts": _run_lengths(inside, rows.start, columns.start, (height, width)),
                },
                "area": int(np.count_nonzero(inside)),
                "bbox": [columns.start, rows.start, inside.shape[1], inside.shape[0]],
                "iscrowd": 0,
            }
        )
    return found


def _run_lengths(
    inside: npt.NDArray[np.bool_], top: int, left: int, shape_hw: tuple[int, int]
) -> list[int]:
    """Count pixels outside, inside, outside ... down the columns, from the first one on."""
    height, width = shape_hw
    steps = np.diff(np.pad(inside, ((1, 1), (0, 0))).astype(np.int8), axis=0).T
    starts, ends = (
        (columns + left) * height + rows + top
        for columns, rows in (np.nonzero(steps == 1), np.nonzero(steps == -1))
    )
    # A run that ends with a column goes on where the next one begins with another.
    apart = starts[1:] != ends[:-1]
    starts, ends = starts[np.append(True, apart)], ends[np.append(apart, True)]
    places = np.stack([starts, ends], axis=1).ravel()
    counts: list[int] = np.diff(places, prepend=0, append=height * width).tolist()
    return counts if counts[-1] else counts[:-1]


class CocoWriter:
    """Writes instances image by image; only the list of the images is held.

    Args:
        file: binary, to write to.
    """

    def __init__(self, file: IO[bytes]) -> None:
        self._file = file
        self._images: dict[int, dict[str, Any]] = {}
        self._separator = b""
        self._write(b'{"info":', {"description": "Blood cells", "version": __version__})
        self._write(b',"licenses":', [])
        self._write(b',"categories":', categories())
        self._file.write(b',"annotations":[')

    def add(self, cells: ImageCells) -> None:
        """Add the cells of one image.

        Raises:
            ValueError: they do not fit into the form; nothing is written of them.
        """
        image_id = next(number for number in _image_ids(cells.image) if number not in self._images)
        for annotation in image_annotations(cells, image_id):
            self._write(self._separator, annotation)
            self._separator = b",\n"
        height, width = cells.labels.shape
        self._images[image_id] = {
            "id": image_id,
            "file_name": cells.image,
            "width": width,
            "height": height,
        }

    def finish(self) -> None:
        """Write the images, which ends the file."""
        self._write(b'],"images":', list(self._images.values()))
        self._file.write(b"}\n")

    def _write(self, before: bytes, tree: Any) -> None:
        self._file.write(before + json.dumps(tree, separators=(",", ":")).encode("ascii"))


def _image_ids(image: str) -> Iterator[int]:
    """Give an id that follows from the name alone, then the next ones, should it be taken."""
    digest = hashlib.sha256(image.encode("utf-8", errors="surrogateescape")).digest()
    number = int.from_bytes(digest[:8], "big")
    while True:
        yield number % _IMAGE_IDS + 1
        number += 1
