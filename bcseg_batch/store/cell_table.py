"""`cells.csv`: the measured cells of all images, one row each; and the table of one image.

Each image has a table of its own, written like its mask: whole or not at all, and before its
record. The one over all images is put together from these, so that it holds each image once.
"""

from __future__ import annotations

import contextlib
import csv
import io
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt

from bcseg_batch.store.outputs import whole_file

CELLS_NAME = "cells.csv"


def encode_cells(
    image: str, columns: Sequence[str], table: Mapping[str, npt.NDArray[np.generic]]
) -> bytes:
    """Write the cells of one image as CSV: UTF-8, one header, one row for each cell.

    Args:
        image: the input's name; the first column.
        columns: names of the others, in their order; one that the table lacks stays empty.
        table: columns of equal length.
    """
    text = io.StringIO(newline="")
    writer = csv.writer(text)
    writer.writerow(["image", *columns])
    count = max((len(column) for column in table.values()), default=0)
    cells = [_texts(table[name]) if name in table else [""] * count for name in columns]
    writer.writerows(zip([image] * count, *cells, strict=True))
    # A name that is not UTF-8 is written with its odd bytes escaped.
    return text.getvalue().encode("utf-8", errors="backslashreplace")


def _texts(column: npt.NDArray[np.generic]) -> list[str]:
    """Write numbers with the digits that mean something, and truth as 0 and 1."""
    if column.dtype.kind == "b":
        return ["1" if value else "0" for value in column.tolist()]
    if column.dtype.kind == "f":
        return [f"{value:.6g}" for value in column.tolist()]
    return [str(value) for value in column.tolist()]


def read_tables(folder: Path, tables: Iterable[str]) -> Iterator[bytes]:
    """Read the tables of images one by one; a missing one is left out.

    Args:
        folder: the output folder.
        tables: paths relative to it.
    """
    for table in tables:
        with contextlib.suppress(OSError):
            yield (folder / table).read_bytes()


def write_cells_table(
    folder: Path, columns: Sequence[str], tables: Iterable[bytes], *, name: str = CELLS_NAME
) -> None:
    """Put `cells.csv` together from the tables of the images.

    Args:
        folder: the output folder.
        columns: as for `encode_cells`.
        tables: content of the images' tables, in the order wanted. One that has other columns (of
            another version) is left out: its image is in the records all the same.
        name: of the file.

    Raises:
        OutputError: it cannot be written.
    """
    header = encode_cells("", columns, {})
    with whole_file(folder / name) as all_cells:
        all_cells.write(header)
        for table in tables:
            if table.startswith(header):
                all_cells.write(memoryview(table)[len(header) :])
