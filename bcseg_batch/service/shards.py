"""Brings what shards have recorded into the records of the whole folder, and says so."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from loguru import logger

from bcseg_batch.errors import UsageError
from bcseg_batch.service.tables import write_tables
from bcseg_batch.store.cell_table import CELLS_NAME, read_tables
from bcseg_batch.store.merge import Merged, merge_records, remove_shard_files
from bcseg_batch.store.outputs import OutputFolder
from bcseg_batch.store.parquet import check_parquet
from bcseg_batch.store.results import CSV_NAME, ResultsLog
from bcseg_batch.store.shards import JSONL_NAME, shard_files


def merge_folder(folder: Path, *, parquet: bool) -> Merged | None:
    """Merge what shards have recorded in an output folder, and write its tables anew.

    Args:
        folder: the output folder.
        parquet: write the tables as Parquet too; so they are where they lie there already.

    Returns:
        What was merged; None where no shard has left anything.

    Raises:
        UsageError: there is no such folder, or a run is writing there.
        OutputError: something cannot be read, written or removed.
    """
    parquet = parquet or (folder / CSV_NAME).with_suffix(".parquet").exists()
    if parquet:
        check_parquet()
    if not folder.is_dir():
        raise UsageError(f"there is no output folder {str(folder)!r}: name that of the shards")
    with OutputFolder(folder):
        return merge_shards(folder, lambda: _write_tables(folder, parquet=parquet))


def merge_shards(folder: Path, write: Callable[[], None] = lambda: None) -> Merged | None:
    """Merge the records of shards, where there are any, and take their files away.

    Args:
        folder: an output folder that the caller has locked.
        write: makes the tables over all images, of the merged records and before anything is taken
            away; without it they are older than the records afterwards.

    Returns:
        What was merged; None where no shard has left anything.

    Raises:
        OutputError: something cannot be read, written or removed.
    """
    if not shard_files(folder):
        return None
    merged = merge_records(folder)
    for sentence in merged.damaged:
        logger.warning("{}", sentence)
    logger.info(
        "merged {} records of {} shards into {}",
        merged.records,
        len(merged.shards),
        folder / JSONL_NAME,
    )
    write()
    remove_shard_files(folder)
    return merged


def _write_tables(folder: Path, *, parquet: bool) -> None:
    with ResultsLog(folder) as results:
        results.write_csv()
        cells = next(results.cell_tables(), None) is not None or (folder / CELLS_NAME).exists()
        tables = read_tables(folder, results.cell_tables())
        write_tables(folder, tables, cells=cells, parquet=parquet)
