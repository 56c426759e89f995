"""The tables of cells: of one image, and of all."""

from __future__ import annotations

import csv
import io
from pathlib import Path

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from bcseg_batch.store.cell_table import encode_cells, read_tables, write_cells_table

COLUMNS = ("label", "area", "touches_border", "area_um2")


def rows_of(data: bytes) -> list[dict[str, str]]:
    return list(csv.DictReader(io.StringIO(data.decode(), newline="")))


def table(*areas: float) -> dict[str, np.ndarray]:
    return {
        "label": np.arange(1, len(areas) + 1),
        "area": np.array(areas, dtype=np.float64),
        "touches_border": np.zeros(len(areas), bool),
    }


def test_one_row_for_each_cell_in_the_order_of_the_columns() -> None:
    data = encode_cells("a/b.jpg", COLUMNS, table(12.5, 1e6))
    assert data.splitlines()[0] == b"image,label,area,touches_border,area_um2"
    assert rows_of(data) == [
        {"image": "a/b.jpg", "label": "1", "area": "12.5", "touches_border": "0", "area_um2": ""},
        {"image": "a/b.jpg", "label": "2", "area": "1e+06", "touches_border": "0", "area_um2": ""},
    ]


def test_an_image_without_cells_has_a_header_alone() -> None:
    assert encode_cells("a.jpg", COLUMNS, table()).count(b"\n") == 1


@given(st.text(st.characters(exclude_categories=["Cs"]), min_size=1))
def test_any_name_is_read_back(name: str) -> None:
    (row,) = rows_of(encode_cells(name, COLUMNS, table(1.0)))
    assert row["image"] == name


def test_a_name_that_is_not_utf8_is_written_with_its_bytes_escaped() -> None:
    (row,) = rows_of(encode_cells("a\udcff.jpg", COLUMNS, table(1.0)))
    assert row["image"] == "a\\udcff.jpg"


def test_all_tables_together_have_one_header(tmp_path: Path) -> None:
    names = ["a.jpg", "line\nbreak.jpg", "none.jpg"]
    for number, (name, areas) in enumerate(zip(names, [(1, 2), (3,), ()], strict=True)):
        (tmp_path / f"{number}.csv").write_bytes(encode_cells(name, COLUMNS, table(*areas)))
    write_cells_table(tmp_path, COLUMNS, read_tables(tmp_path, ["0.csv", "1.csv", "2.csv"]))
    rows = rows_of((tmp_path / "cells.csv").read_bytes())
    assert [(row["image"], row["area"]) for row in rows] == [
        ("a.jpg", "1"),
        ("a.jpg", "2"),
        ("line\nbreak.jpg", "3"),
    ]


def test_a_missing_table_or_one_with_other_columns_is_left_out(tmp_path: Path) -> None:
    (tmp_path / "old.csv").write_bytes(encode_cells("old.jpg", ("label",), table(1)))
    (tmp_path / "new.csv").write_bytes(encode_cells("new.jpg", COLUMNS, table(1)))
    tables = read_tables(tmp_path, ["old.csv", "gone.csv", "new.csv"])
    write_cells_table(tmp_path, COLUMNS, tables)
    assert [row["image"] for row in rows_of((tmp_path / "cells.csv").read_bytes())] == ["new.jpg"]
