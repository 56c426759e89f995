"""Parquet holds what CSV holds, with a type for each column."""

from __future__ import annotations

import csv
from pathlib import Path

import pyarrow.parquet
import pytest
from parts import run_folder, write_smear
from test_pipeline import two_discs

from bcseg_batch.errors import SettingsError
from bcseg_batch.service.tables import cell_types, result_types
from bcseg_batch.store import parquet
from bcseg_batch.store.cell_table import CELLS_NAME
from bcseg_batch.store.results import CSV_NAME


def rows(path: Path) -> list[dict[str, str]]:
    with path.open(encoding="utf-8", newline="") as text:
        return list(csv.DictReader(text))


@pytest.mark.parametrize("name", ["a.png", 'ü "quoted", and\na new line.png', "-a;b.png"])
def test_both_tables_say_the_same(source: Path, tmp_path: Path, name: str) -> None:
    two_discs(source / name)
    (source / "broken.png").write_bytes(b"no picture")
    output = tmp_path / "out"
    run_folder(source, output, parquet=True, pixel_size_um=None)
    for table, types in ((CSV_NAME, result_types()), (CELLS_NAME, cell_types())):
        expected = rows(output / table)
        found = pyarrow.parquet.read_table((output / table).with_suffix(".parquet"))
        assert found.column_names == list(expected[0]) == list(types)
        for one, other in zip(found.to_pylist(), expected, strict=True):
            for column, text in other.items():
                value = one[column]
                if text == "":
                    assert value is None, column
                elif types[column] is float:
                    assert value == pytest.approx(float(text))
                elif types[column] is bool:
                    assert value is (text == "1")
                elif types[column] is int:
                    assert value == int(text)
                else:
                    assert value == text


def test_without_a_cell_the_table_has_no_row(source: Path, tmp_path: Path) -> None:
    write_smear(source / "a.png", size_wh=(8, 8))
    run_folder(source, tmp_path / "out", parquet=True, threshold=1.0)
    table = pyarrow.parquet.read_table(tmp_path / "out/cells.parquet")
    assert table.num_rows == 0
    assert table.column_names == list(cell_types())


def test_without_the_extra_it_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parquet.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(SettingsError, match=r"bcseg-batch\[parquet\]"):
        parquet.check_parquet()
