"""Holds an output folder's records against its files."""

from __future__ import annotations

import csv
import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from bcseg_batch.errors import UsageError
from bcseg_batch.items import OUTPUT_FIELDS, Outcome, Status
from bcseg_batch.store.names import OUTPUT_FOLDERS
from bcseg_batch.store.outputs import is_part, is_written_to
from bcseg_batch.store.read_back import read_outcomes
from bcseg_batch.store.results import CSV_NAME
from bcseg_batch.store.shards import JSONL_NAME, shard_files


@dataclass(frozen=True, slots=True)
class Finding:
    """Something in an output folder that is not as its records say.

    Attributes:
        image: whose record it is; None where it is nobody's.
        path: of the file, relative to the output folder, or of the input.
        problem: what is wrong, and what to do.
    """

    image: str | None
    path: str
    problem: str


@dataclass(slots=True)
class Verified:
    """How much was looked at.

    Attributes:
        images: records, one for each image.
        files: outputs whose hash was compared.
        unhashed: outputs that are there, and whose record has no hash.
        inputs: photographs whose hash was compared.
        is_running: whether a run is writing there: what it has under way is no finding.
    """

    images: int = 0
    files: int = 0
    unhashed: int = 0
    inputs: int = 0
    is_running: bool = False


def verify(folder: Path, verified: Verified, source: Path | None = None) -> Iterator[Finding]:
    """Look for what is missing, changed or left over.

    Args:
        folder: the output folder; nothing in it is changed.
        verified: is counted up.
        source: the input folder, to see whether the photographs are still those of the records; one
            that is no longer there is no finding, since it may be archived.

    Yields:
        Each finding: torn lines first, then images by name, then files of no record.

    Raises:
        OutputError: there are no records.
        UsageError: there is no such input folder.
    """
    if source is not None and not source.is_dir():
        raise UsageError(f"there is no input folder {str(source)!r}: give the one of these results")
    # Asked first: what a run finishes meanwhile is no finding either.
    verified.is_running = is_written_to(folder)
    read = read_outcomes(folder)
    if not verified.is_running:
        for name, number in read.damaged:
            yield Finding(
                None,
                name,
                f"line {number} is no record: its image is done again by the next run",
            )
    owned = {path for paths in read.earlier.values() for path in paths}
    for outcome in read.outcomes.values():
        verified.images += 1
        owned.update(outcome.outputs)
        if outcome.image in read.earlier and not verified.is_running:
            yield Finding(
                outcome.image,
                JSONL_NAME,
                "was being done again when the run ended: run process-dir again",
            )
        yield from _of_outputs(folder, outcome, verified)
        if source is not None:
            yield from _of_input(source, outcome, verified)
    if not verified.is_running:
        if not shard_files(folder):  # the table is written when they are merged
            yield from _of_table(folder, read.outcomes)
        for path in _files(folder):
            if path not in owned:
                yield Finding(
                    None,
                    path,
                    "is in no record: left by a killed run, or put there by somebody",
                )


def _of_table(folder: Path, outcomes: Mapping[str, Outcome]) -> Iterator[Finding]:
    """Hold `results.csv` against the records; it is written at the end of a run."""
    try:
        with (folder / CSV_NAME).open(encoding="utf-8", newline="") as text:
            rows = [(row["image"], row["status"], row["mask"]) for row in csv.DictReader(text)]
    except FileNotFoundError:
        return
    except (OSError, ValueError, KeyError, csv.Error):
        rows = None
    # A name that is not UTF-8 has its odd bytes escaped in a table.
    expected = [
        (
            outcome.image.encode("utf-8", "backslashreplace").decode(),
            outcome.status.value,
            (outcome.mask or "").encode("utf-8", "backslashreplace").decode(),
        )
        for outcome in outcomes.values()
    ]
    if rows != expected:
        yield Finding(
            None,
            CSV_NAME,
            "does not say what the records say: run process-dir again, which writes it anew",
        )


def _of_outputs(folder: Path, outcome: Outcome, verified: Verified) -> Iterator[Finding]:
    redo = "run process-dir again, which makes it anew"
    if outcome.status is Status.DONE and outcome.mask is None:
        yield Finding(outcome.image, JSONL_NAME, f"is done, but its record names no mask: {redo}")
    for field in OUTPUT_FIELDS:
        path: str | None = getattr(outcome, field)
        if path is None:
            continue
        expected = outcome.outputs_sha256.get(field)
        try:
            found = _sha256(folder / path)
        except FileNotFoundError:
            yield Finding(outcome.image, path, f"is missing: {redo}")
        except OSError as error:
            yield Finding(outcome.image, path, f"cannot be read ({error.strerror})")
        else:
            verified.files += expected is not None
            verified.unhashed += expected is None
            if expected is not None and found != expected:
                yield Finding(
                    outcome.image,
                    path,
                    "is not what was written: it was changed, or is damaged; delete it and run "
                    "process-dir again, or keep it as a correction",
                )


def _of_input(source: Path, outcome: Outcome, verified: Verified) -> Iterator[Finding]:
    if outcome.sha256 is None:
        return
    try:
        found = _sha256(source / outcome.image)
    except OSError:
        return
    verified.inputs += 1
    if found != outcome.sha256:
        yield Finding(
            outcome.image,
            str(source / outcome.image),
            "is another picture than the one that was processed: run process-dir again",
        )


def _sha256(path: Path) -> str:
    with path.open("rb") as content:
        return hashlib.file_digest(content, "sha256").hexdigest()


def _files(folder: Path) -> Iterator[str]:
    for name in OUTPUT_FOLDERS:
        for path in sorted((folder / name).rglob("*")):
            if not path.is_dir() and not is_part(path.name):
                yield path.relative_to(folder).as_posix()
