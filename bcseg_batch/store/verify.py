"""Holds an output folder's records against its files."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from bcseg_batch.items import OUTPUT_FIELDS, Outcome, Status
from bcseg_batch.store.names import OUTPUT_FOLDERS
from bcseg_batch.store.outputs import is_part
from bcseg_batch.store.read_back import read_outcomes
from bcseg_batch.store.results import JSONL_NAME


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
    """

    images: int = 0
    files: int = 0
    unhashed: int = 0
    inputs: int = 0


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
    """
    read = read_outcomes(folder)
    for number in read.damaged:
        yield Finding(
            None,
            JSONL_NAME,
            f"line {number} is no record: its image is done again by the next run",
        )
    owned: set[str] = set()
    for outcome in read.outcomes.values():
        verified.images += 1
        owned.update(outcome.outputs)
        yield from _of_outputs(folder, outcome, verified)
        if source is not None:
            yield from _of_input(source, outcome, verified)
    for path in _files(folder):
        if path not in owned:
            yield Finding(None, path, "is in no record: delete it, unless you have put it there")


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
            if not path.is_dir() and not is_part(path):
                yield path.relative_to(folder).as_posix()
