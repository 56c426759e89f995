"""The tables over all images of an output folder, beside `results.csv`."""

from __future__ import annotations

import typing
from collections.abc import Iterable
from pathlib import Path

from bcseg_batch.items import Outcome
from bcseg_batch.segment.analysis import CELL_COLUMNS
from bcseg_batch.store.cell_table import CELLS_NAME, write_cells_table
from bcseg_batch.store.parquet import ColumnTypes, write_parquet
from bcseg_batch.store.results import COLUMNS, CSV_NAME

_WHOLE_NUMBERS = {"label", "bbox-0", "bbox-1", "bbox-2", "bbox-3", "area"}


def write_tables(folder: Path, cell_tables: Iterable[bytes], *, cells: bool, parquet: bool) -> None:
    """Write `cells.csv`, and the tables as Parquet where that is asked for.

    Args:
        folder: the output folder, `results.csv` in it.
        cell_tables: content of the images' own tables, in the order wanted; see
            `store.cell_table.read_tables`.
        cells: write `cells.csv`.
        parquet: write the tables as Parquet too.

    Raises:
        OutputError: something cannot be written.
    """
    if cells:
        write_cells_table(folder, CELL_COLUMNS, cell_tables)
    if parquet:
        write_parquet(folder / CSV_NAME, result_types())
        if cells:
            write_parquet(folder / CELLS_NAME, cell_types())


def result_types() -> ColumnTypes:
    """Give the types of the columns of `results.csv`: those of a record's fields."""
    hints = typing.get_type_hints(Outcome)
    return {name: _plain(hints[name]) for name in COLUMNS}


def _plain(hint: object) -> type:
    members = {hint, *typing.get_args(hint)}
    return next((kind for kind in (bool, int, float) if kind in members), str)


def cell_types() -> ColumnTypes:
    """Give the types of the columns of `cells.csv`."""
    return {"image": str, **{name: _cell_type(name) for name in CELL_COLUMNS}}


def _cell_type(name: str) -> type:
    if name == "kind":
        return str
    if name == "touches_border":
        return bool
    return int if name in _WHOLE_NUMBERS else float
