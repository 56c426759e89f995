"""The page and the thumbnails of one image."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import jinja2
import numpy as np

from bcseg_batch.errors import ImageError, OutputError
from bcseg_batch.items import OUTPUT_FIELDS, Outcome, Status
from bcseg_batch.report.links import page_key, shown_url, url_of
from bcseg_batch.report.traces import (
    MOST_OUTLINES,
    Trace,
    fit_within,
    shrink_labels,
    trace_labels,
    trace_mask,
)
from bcseg_batch.store.encode import encode_jpeg
from bcseg_batch.store.outputs import whole_file
from bcseg_batch.store.pictures import read_small
from bcseg_batch.store.read_back import read_cells, read_labels
from bcseg_batch.text import printable

PAGES, THUMBNAILS = "images", "thumbnails"

_THUMBNAIL_PX = 200
_THUMBNAIL_QUALITY = 78
_SHOWN_PX = 1600
# Larger pictures would have to be read whole, which takes more memory than a report is worth.
_LARGE_PIXELS = 64_000_000
_HAS_NO_PICTURE = "There is no picture of this image, because it is not done."


def thumbnail_path(key: str, which: str) -> str:
    """Give the path of a thumbnail, relative to the report.

    Args:
        key: of the image.
        which: `b` for the photograph before, `a` for the composite after.
    """
    return f"{THUMBNAILS}/{key}-{which}.jpg"


def page_path(key: str) -> str:
    """Give the path of an image's page, relative to the report."""
    return f"{PAGES}/{key}.html"


def write_thumbnails(folder: Path, report: Path, outcome: Outcome) -> str:
    """Write what the list shows of an image.

    Args:
        folder: the output folder.
        report: the report's folder.
        outcome: of the image.

    Returns:
        Which there are: `b` the photograph, `a` the composite; a picture that cannot be read is
        left out.

    Raises:
        OutputError: they cannot be written.
    """
    written = ""
    if outcome.status is not Status.DONE:
        return written
    for which, picture in (("b", outcome.preview), ("a", outcome.composite)):
        if picture is None or shown_url(picture) is None:
            continue
        try:
            small = read_small(folder / picture, _THUMBNAIL_PX, max_pixels=_LARGE_PIXELS)
        except ImageError:
            continue
        data = encode_jpeg(small, quality=_THUMBNAIL_QUALITY)
        with whole_file(
            report / thumbnail_path(page_key(outcome.image), which), keep_name=False
        ) as file:
            file.write(data)
        written += which
    return written


def write_page(
    folder: Path, report: Path, outcome: Outcome, template: jinja2.Template
) -> dict[str, int]:
    """Write the page of an image.

    Args:
        folder: the output folder.
        report: the report's folder.
        outcome: of the image.
        template: of the page.

    Returns:
        How many red and white cells have which diameter, in whole pixels.

    Raises:
        OutputError: it cannot be written.
    """
    try:
        facts = page_facts(folder, outcome)
    except Exception as error:  # noqa: BLE001 - one odd image must not cost the report
        bare = replace(outcome, labels=None, mask=None, cells=None)
        facts = page_facts(folder, bare)
        what = printable(f"{type(error).__name__}: {error}")
        facts["remarks"].append(f"Neither outlines nor measurements can be shown: {what}")
    text = template.render(facts)
    with whole_file(report / page_path(page_key(outcome.image)), keep_name=False) as file:
        file.write(text.encode("utf-8", errors="backslashreplace"))
    diameters: dict[str, int] = facts["diameters"]
    return diameters


def page_facts(folder: Path, outcome: Outcome) -> dict[str, Any]:
    """Gather what the page of an image shows; what is missing or damaged is told in `remarks`.

    Args:
        folder: the output folder.
        outcome: of the image.
    """
    remarks: list[str] = []
    is_done = outcome.status is Status.DONE
    before, after = (
        _picture(folder, path, remarks) if is_done else None
        for path in (outcome.preview, outcome.composite)
    )
    if not is_done:
        remarks.append(_HAS_NO_PICTURE)
    else:
        if outcome.preview is None:
            remarks.append(
                "There is no photograph to compare with: the run wrote no preview of it, which the "
                "setting outputs.previews changes."
            )
        if outcome.composite is None:
            remarks.append("The run wrote no composite.")
    rows = _cells(folder, outcome, remarks) if is_done else []
    shape_hw, traces = _traces(folder, outcome, rows, remarks) if is_done else ((1, 1), [])
    return {
        "outcome": outcome,
        "key": page_key(outcome.image),
        "name": printable(outcome.image),
        "error": outcome.error and printable(outcome.error),
        "notes": [printable(note) for note in outcome.notes],
        "flags": [(flag.name, printable(flag.sentence)) for flag in outcome.flags],
        "before": before,
        "after": after,
        "files": {
            name: url_of(path)
            for name in OUTPUT_FIELDS
            if (path := getattr(outcome, name)) is not None
        },
        "remarks": remarks,
        "shape_hw": shape_hw,
        "diameters": _diameters(rows),
        "data": {
            "columns": [name for name in rows[0] if name != "image"] if rows else [],
            "cells": [[value for name, value in row.items() if name != "image"] for row in rows],
            "outlines": [[trace.path, trace.cells] for trace in traces],
        },
    }


def _diameters(rows: list[dict[str, str]]) -> dict[str, int]:
    """Count the red and white cells of each diameter, rounded to pixels."""
    return Counter(
        str(round(float(row["equivalent_diameter_area"])))
        for row in rows
        if row.get("equivalent_diameter_area") and row.get("kind") != "platelet"
    )


def _picture(folder: Path, path: str | None, remarks: list[str]) -> str | None:
    """Give the URL of a picture, or say why it cannot be shown."""
    if path is None:
        return None
    if not (folder / path).is_file():
        remarks.append(f"{printable(path)} is missing.")
        return None
    if (url := shown_url(path)) is None:
        remarks.append(f"Browsers do not show {printable(path)}: other programs open it.")
    return url


def _cells(folder: Path, outcome: Outcome, remarks: list[str]) -> list[dict[str, str]]:
    if outcome.cells is None:
        remarks.append("The run left cells out, so that there are no measurements.")
        return []
    try:
        return read_cells(folder / outcome.cells)
    except OutputError as error:
        remarks.append(f"No measurements: {printable(str(error))}.")
        return []


def _traces(
    folder: Path, outcome: Outcome, rows: list[dict[str, str]], remarks: list[str]
) -> tuple[tuple[int, int], list[Trace]]:
    """Give the shape in which outlines are drawn, and these; say where they come from."""
    full_hw = outcome.height_px or 1, outcome.width_px or 1
    shape_hw = fit_within(full_hw, _SHOWN_PX)
    if full_hw[0] * full_hw[1] > _LARGE_PIXELS:
        remarks.append("The image is too large for outlines to be drawn here.")
        return shape_hw, []
    try:
        if outcome.labels is not None:
            labels = shrink_labels(read_labels(folder / outcome.labels), shape_hw)
            traces = trace_labels(labels, rows)
            remarks.append("Outlines: each cell by itself, from the label image.")
        elif outcome.mask is not None:
            small = read_small(folder / outcome.mask, _SHOWN_PX, max_pixels=_LARGE_PIXELS)
            traces = trace_mask(np.ascontiguousarray(small[:, :, 0] >= 128), rows, full_hw)
            shape_hw = small.shape[0], small.shape[1]
            remarks.append(
                "Outlines: those of the mask, where cells that touch share one. `--labels` writes "
                "label images, which part them."
            )
        else:
            return shape_hw, []
    except (ImageError, OutputError, KeyError, ValueError) as error:
        remarks.append(f"No outlines: {printable(_words(error))}.")
        return shape_hw, []
    if len(traces) == MOST_OUTLINES:
        remarks.append(f"The {MOST_OUTLINES} largest outlines are drawn, and no more.")
    return shape_hw, traces


def _words(error: Exception) -> str:
    if isinstance(error, KeyError):
        return f"the table of cells has no column {error}"
    return str(error).rstrip(".")


def page_values(outcome: Outcome) -> Mapping[str, str]:
    """Give the figures of an image by their names, as they are read."""
    numbers = {
        "Cells": outcome.cell_count,
        "Red cells": outcome.red_cell_count,
        "White cells": outcome.white_cell_count,
        "Platelets": outcome.platelet_count,
        "Cut by the border": outcome.border_cell_count,
    }
    facts = {name: f"{value:,}" for name, value in numbers.items() if value is not None}
    if outcome.cell_diameter_px is not None:
        facts["Typical cell"] = f"{outcome.cell_diameter_px:.1f} px across"
    if outcome.foreground_fraction is not None:
        facts["Foreground"] = f"{outcome.foreground_fraction:.1%}"
    if outcome.mean_confidence is not None:
        facts["Confidence"] = f"{outcome.mean_confidence:.1%}"
    if outcome.width_px is not None:
        facts["Size"] = f"{outcome.width_px} x {outcome.height_px} px"
    if outcome.pixel_size_um is not None:
        facts["Pixel"] = f"{outcome.pixel_size_um:.4g} um"
    if outcome.seconds is not None:
        facts["Time"] = f"{outcome.seconds:.2f} s"
    if outcome.finished_at is not None:
        facts["Finished"] = outcome.finished_at.replace("T", " ")[:19] + " UTC"
    if outcome.device is not None:
        facts["Made by"] = f"{outcome.version} on {outcome.device}, {outcome.dtype}"
    return facts
