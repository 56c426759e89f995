"""The cells of one image, as they are handed to other programs."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from bcseg_batch.segment.cells import CellKind

KIND_COLOURS: Mapping[CellKind, tuple[int, int, int]] = {
    CellKind.RED_CELL: (230, 25, 75),
    CellKind.WHITE_CELL: (0, 130, 200),
    CellKind.PLATELET: (245, 170, 0),
}
"""In which other programs show each kind, RGB: far from each other and from the stain."""


def kind_name(kind: CellKind) -> str:
    """Give a kind's name as it stands in `cells.csv`, such as `red_cell`."""
    return kind.name.lower()


def kind_named(name: str) -> CellKind:
    """Give the kind of a name, however it is spelled: `red_cell`, `Red cell`, `red cells`.

    Raises:
        ValueError: there is no such kind.
    """
    key = "_".join(name.lower().replace("_", " ").replace("-", " ").split())
    for kind in CellKind:
        if key in {kind_name(kind), f"{kind_name(kind)}s"}:
            return kind
    known = ", ".join(map(kind_name, CellKind))
    raise ValueError(f"there is no kind {name!r}: the kinds are {known}")


@dataclass(frozen=True, slots=True, eq=False)
class ImageCells:
    """The cells of one image.

    Attributes:
        image: its name: the path relative to the input folder, with forward slashes.
        labels: integers (H, W), 0 background.
        rows: the rows of its table of cells, as text by the names of the columns.
        pixel_size_um: side of a pixel, where it is known.
        provenance: what they were made by and from, as pictures say it.

    Raises:
        ValueError: the table is not that of these labels.
    """

    image: str
    labels: npt.NDArray[np.integer[Any]]
    rows: tuple[Mapping[str, str], ...]
    pixel_size_um: float | None = None
    provenance: str | None = None

    def __post_init__(self) -> None:
        if any(None in (*row, *row.values()) for row in self.rows):
            raise ValueError("the table of cells is torn: run process-dir again with --overwrite")
        try:
            listed = sorted(int(row["label"]) for row in self.rows)
            for row in self.rows:
                kind_named(row["kind"])
        except KeyError as error:
            raise ValueError(f"the table of cells has no column {error}") from error
        found = np.unique(self.labels)
        if found[:1] < 0:
            raise ValueError("the label image has labels below 0")
        if listed != found[found != 0].tolist():
            raise ValueError("the table of cells and the label image do not name the same cells")

    def items(self) -> Iterator[tuple[int, CellKind, Mapping[str, str]]]:
        """Give each cell's label, kind and row, in the order of the table."""
        for row in self.rows:
            yield int(row["label"]), kind_named(row["kind"]), row
