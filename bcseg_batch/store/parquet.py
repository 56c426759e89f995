"""Writes a table of CSV as Parquet, however long it is, with a type for each column."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from bcseg_batch.errors import OutputError, SettingsError
from bcseg_batch.store.outputs import output_error, whole_file

if TYPE_CHECKING:
    import pyarrow

ColumnTypes = Mapping[str, type]
"""`str`, `int`, `float` or `bool` for each column, in the order of the columns."""


def check_parquet() -> None:
    """Refuse where what writes Parquet is not installed.

    Raises:
        SettingsError: it is not.
    """
    if importlib.util.find_spec("pyarrow") is None:
        raise SettingsError(
            "outputs.parquet needs pyarrow, which is not installed: "
            "pip install 'bcseg-batch[parquet]'"
        )


def write_parquet(table: Path, types: ColumnTypes) -> Path:
    """Write a table beside its CSV, block by block.

    Args:
        table: in CSV: UTF-8, one header; an empty field of a number is none.
        types: of its columns.

    Returns:
        The file, named like the table.

    Raises:
        OutputError: it cannot be read or written.
    """
    import pyarrow.csv  # noqa: PLC0415 - an extra
    import pyarrow.parquet  # noqa: PLC0415

    schema = pyarrow.schema([(name, _arrow_type(kind)) for name, kind in types.items()])
    path = table.with_suffix(".parquet")
    try:
        blocks = pyarrow.csv.open_csv(
            table,
            # A name may hold a line break.
            parse_options=pyarrow.csv.ParseOptions(newlines_in_values=True),
            convert_options=pyarrow.csv.ConvertOptions(
                column_types=schema, strings_can_be_null=True, quoted_strings_can_be_null=False
            ),
        )
        with (
            blocks,
            whole_file(path) as file,
            pyarrow.parquet.ParquetWriter(file, schema, compression="zstd") as writer,
        ):
            for block in blocks:
                writer.write_batch(block)
    except OSError as error:
        raise output_error(path, error) from error
    except pyarrow.ArrowInvalid as error:
        raise OutputError(f"{table} cannot be made into {path.name}: {error}") from error
    return path


def _arrow_type(kind: type) -> pyarrow.DataType:
    import pyarrow  # noqa: PLC0415 - an extra

    return {
        str: pyarrow.string(),
        int: pyarrow.int64(),
        float: pyarrow.float64(),
        bool: pyarrow.bool_(),
    }[kind]
