"""Builds the report of an output folder, and later only what is new or has changed."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from functools import cache
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
from markupsafe import Markup

from bcseg_batch.items import Outcome, Status
from bcseg_batch.report.doubt import most_doubtful_first
from bcseg_batch.report.groups import Totals, group_of, totals_by_group
from bcseg_batch.report.image_page import (
    PAGES,
    THUMBNAILS,
    page_path,
    page_values,
    thumbnail_path,
    write_page,
    write_thumbnails,
)
from bcseg_batch.report.links import page_key
from bcseg_batch.report.plots import histogram
from bcseg_batch.report.rows import COLUMNS, row_of, script_with
from bcseg_batch.store.lock import take_lock
from bcseg_batch.store.outputs import output_error, sync_folder, write_whole
from bcseg_batch.store.read_back import read_outcomes
from bcseg_batch.text import printable
from bcseg_batch.version import __version__

REPORT_FOLDER = "report"
INDEX_NAME = "index.html"

_DATA, _ASSETS = "data", "assets"
_STATE_NAME = "state.json"
_LOCK_NAME = ".bcseg.lock"
_HERE = Path(__file__).parent
_ROWS_AT_ONCE = 1000
# What is drawn is noted this often, so that an interrupted first report is not begun anew.
_NOTE_EVERY = 500


@dataclass(frozen=True, slots=True, kw_only=True)
class ReportOptions:
    """What the report depends on besides the records.

    Attributes:
        group_pattern: regular expression with a group named `group`, searched in the images'
            names; None sums up all images together.
        min_cells: how many red and white cells are enough for a group.
    """

    group_pattern: str | None = None
    min_cells: int = 200


@dataclass(frozen=True, slots=True)
class Report:
    """What came of it.

    Attributes:
        index: the page to open.
        images: how many are listed.
        drawn: how many of these were new or had changed.
    """

    index: Path
    images: int
    drawn: int


@dataclass(frozen=True, slots=True)
class _Drawn:
    """What is known of an image's page: of what it was made, its thumbnails, its cells' sizes."""

    fingerprint: str
    thumbnails: str
    diameters: Mapping[str, int]


def build_report(
    folder: Path, options: ReportOptions, *, alive: Callable[[], None] = lambda: None
) -> Report:
    """Make or refresh `report/index.html` of an output folder; a run may go on in it meanwhile.

    Args:
        folder: the output folder.
        options: of the report.
        alive: called between images; what it raises ends the work, and the next call goes on.

    Returns:
        Where it is and what it holds.

    Raises:
        OutputError: the records cannot be read, or the report cannot be written.
        UsageError: another process is writing the report.
    """
    outcomes = most_doubtful_first(read_outcomes(folder).outcomes.values())
    report = folder / REPORT_FOLDER
    try:
        for name in (_DATA, _ASSETS, PAGES, THUMBNAILS):
            (report / name).mkdir(parents=True, exist_ok=True)
        lock = take_lock(report / _LOCK_NAME, "output folder")
    except OSError as error:
        raise output_error(report, error) from error
    with lock:
        return _Builder(folder, report, options, alive).build(outcomes)


class _Builder:
    def __init__(
        self, folder: Path, report: Path, options: ReportOptions, alive: Callable[[], None]
    ) -> None:
        self._folder = folder
        self._report = report
        self._min_cells = options.min_cells
        self._pattern = re.compile(options.group_pattern) if options.group_pattern else None
        self._alive = alive
        self._templates = jinja2.Environment(
            loader=jinja2.FileSystemLoader(_HERE / "templates"),
            autoescape=True,
            undefined=jinja2.StrictUndefined,
            trim_blocks=True,
            lstrip_blocks=True,
        )
        self._templates.globals["page_values"] = page_values
        self._state = _read_state(report / _STATE_NAME)

    def build(self, outcomes: Sequence[Outcome]) -> Report:
        for asset in _assets():
            self._write(f"{_ASSETS}/{asset.name}", asset.read_bytes())
        drawn = self._draw(outcomes)
        order = [page_key(outcome.image) for outcome in outcomes]
        self._write(f"{_DATA}/order.js", script_with("bcsegOrder", order))
        parts = self._write_rows(outcomes)
        self._write(INDEX_NAME, self._index(outcomes, parts).encode("utf-8", "backslashreplace"))
        self._forget(set(order), parts)
        self._note()
        for name in (PAGES, THUMBNAILS):
            sync_folder(self._report / name)
        return Report(self._report / INDEX_NAME, len(outcomes), drawn)

    def _draw(self, outcomes: Iterable[Outcome]) -> int:
        """Draw pages and thumbnails of what is new or has changed."""
        template = self._templates.get_template("image.html.j2")
        count = 0
        for outcome in outcomes:
            self._alive()
            key = page_key(outcome.image)
            fingerprint = _fingerprint(self._folder, outcome)
            known = self._state.get(key)
            if (
                known is not None
                and known.fingerprint == fingerprint
                and (self._report / page_path(key)).is_file()
            ):
                continue
            thumbnails = write_thumbnails(self._folder, self._report, outcome)
            diameters = write_page(self._folder, self._report, outcome, template)
            self._remove(thumbnail_path(key, which) for which in "ba" if which not in thumbnails)
            self._state[key] = _Drawn(fingerprint, thumbnails, diameters)
            count += 1
            if count % _NOTE_EVERY == 0:
                self._note()
        return count

    def _write_rows(self, outcomes: Sequence[Outcome]) -> list[str]:
        """Write the rows in parts, each named by its content; unchanged ones are left alone.

        A page that is open keeps the parts that it began with.
        """
        names = []
        for begin in range(0, len(outcomes), _ROWS_AT_ONCE):
            rows = [
                row_of(
                    outcome,
                    group=group_of(outcome.image, self._pattern),
                    thumbnails=self._state[page_key(outcome.image)].thumbnails,
                )
                for outcome in outcomes[begin : begin + _ROWS_AT_ONCE]
            ]
            part = {"part": begin // _ROWS_AT_ONCE, "rows": rows}
            data = script_with("bcsegRows", part)
            name = f"rows-{hashlib.sha256(data).hexdigest()[:16]}.js"
            self._write(f"{_DATA}/{name}", data)
            names.append(name)
        return names

    def _index(self, outcomes: Sequence[Outcome], parts: list[str]) -> str:
        groups = totals_by_group(outcomes, self._pattern, min_cells=self._min_cells)
        whole = totals_by_group(outcomes, None, min_cells=self._min_cells)
        flags = sorted({flag.name for outcome in outcomes for flag in outcome.flags})
        return self._templates.get_template("index.html.j2").render(
            name=printable(self._folder.resolve().name),
            made_at=datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
            version=__version__,
            whole=whole[0] if whole else None,
            groups=[_printable_group(totals) for totals in groups] if self._pattern else [],
            min_cells=self._min_cells,
            flags=flags,
            histograms=self._histograms(outcomes),
            columns=COLUMNS,
            parts=parts,
            count=len(outcomes),
        )

    def _histograms(self, outcomes: Iterable[Outcome]) -> list[Markup]:
        done = [outcome for outcome in outcomes if outcome.status is Status.DONE]
        counts = [o.cell_count for o in done if o.cell_count is not None]
        confidences = [o.mean_confidence for o in done if o.mean_confidence is not None]
        counted = [(self._state[page_key(o.image)].diameters, o.pixel_size_um) for o in done]
        in_um = all(pixel_um is not None for diameters, pixel_um in counted if diameters)
        sizes = [
            np.repeat(
                np.array(list(diameters), np.float64) * ((pixel_um or 1.0) if in_um else 1.0),
                list(diameters.values()),
            )
            for diameters, pixel_um in counted
            if diameters
        ]
        return [
            histogram(counts, label="cells per image"),
            histogram(
                np.concatenate(sizes).tolist() if sizes else [],
                label="diameter of a cell",
                unit="um" if in_um else "px",
                of="cells",
            ),
            histogram(confidences, label="confidence"),
        ]

    def _forget(self, keys: set[str], parts: list[str]) -> None:
        """Remove what belongs to images that are no longer in the records, and old rows.

        The rows of the last report stay: somebody may have it open.
        """
        gone = [key for key in self._state if key not in keys]
        for key in gone:
            self._remove([page_path(key), *(thumbnail_path(key, which) for which in "ba")])
            del self._state[key]
        kept = {*parts, *self._read_parts()}
        for path in (self._report / _DATA).glob("rows-*.js"):
            if path.name not in kept:
                path.unlink(missing_ok=True)
        self._write(f"{_DATA}/parts.json", json.dumps(parts).encode("ascii"))

    def _read_parts(self) -> list[str]:
        try:
            parts = json.loads((self._report / _DATA / "parts.json").read_bytes())
        except (OSError, ValueError):
            return []
        return parts if isinstance(parts, list) else []

    def _note(self) -> None:
        state = {
            key: [drawn.fingerprint, drawn.thumbnails, drawn.diameters]
            for key, drawn in self._state.items()
        }
        self._write(_STATE_NAME, json.dumps(state, separators=(",", ":")).encode("ascii"))

    def _write(self, name: str, data: bytes) -> None:
        path = self._report / name
        try:
            if path.read_bytes() == data:
                return
        except OSError:
            pass
        write_whole(path, data)

    def _remove(self, names: Iterable[str]) -> None:
        for name in names:
            try:
                (self._report / name).unlink(missing_ok=True)
            except OSError as error:
                raise output_error(self._report / name, error) from error


def _read_state(path: Path) -> dict[str, _Drawn]:
    """Read what is drawn already; where that is not known, all is drawn again."""
    try:
        state: dict[str, Any] = json.loads(path.read_bytes())
        return {
            str(key): _Drawn(str(f), str(t), {str(int(d)): int(n) for d, n in sizes.items()})
            for key, (f, t, sizes) in state.items()
        }
    except (OSError, ValueError, TypeError, AttributeError):
        return {}


def _fingerprint(folder: Path, outcome: Outcome) -> str:
    """Tell two states of an image's page apart: by record, files that are there, and version."""
    files = [(folder / path).is_file() for path in outcome.outputs]
    content = f"{_recipe()}{outcome!r}{files}"
    return hashlib.sha256(content.encode()).hexdigest()[:16]


@cache
def _recipe() -> str:
    content = [path.read_bytes() for path in sorted((_HERE / "templates").iterdir())]
    return hashlib.sha256(b"".join([__version__.encode(), *content])).hexdigest()


def _assets() -> list[Path]:
    return sorted(path for path in (_HERE / "assets").iterdir() if path.suffix in {".css", ".js"})


def _printable_group(totals: Totals) -> Totals:
    return replace(totals, group=totals.group and printable(totals.group))
