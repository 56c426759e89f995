"""What the list of images knows of each one, in a form that a script in a page takes."""

from __future__ import annotations

import json
from typing import Any

from bcseg_batch.items import Outcome, Status
from bcseg_batch.report.links import page_key, shown_url
from bcseg_batch.text import printable

COLUMNS = (
    "key",
    "image",
    "group",
    "status",
    "cells",
    "red",
    "white",
    "platelets",
    "foreground",
    "confidence",
    "flags",
    "error",
    "seconds",
    "finished",
    "before",
    "after",
    "thumbnails",
)
"""Names of a row's entries. `before` and `after` are URLs relative to the output folder, null
where there is nothing that a browser shows; `thumbnails` names those that there are: `b`, `a`."""


def row_of(outcome: Outcome, *, group: str | None, thumbnails: str) -> list[Any]:
    """Give the row of one image, in the order of `COLUMNS`, as JSON takes it."""
    is_done = outcome.status is Status.DONE
    return [
        page_key(outcome.image),
        printable(outcome.image),
        group and printable(group),
        outcome.status.value,
        outcome.cell_count,
        outcome.red_cell_count,
        outcome.white_cell_count,
        outcome.platelet_count,
        _rounded(outcome.foreground_fraction),
        _rounded(outcome.mean_confidence),
        [[flag.name, printable(flag.sentence)] for flag in outcome.flags],
        outcome.error and printable(outcome.error),
        outcome.seconds,
        outcome.finished_at,
        shown_url(outcome.preview) if is_done else None,
        shown_url(outcome.composite) if is_done else None,
        thumbnails,
    ]


def _rounded(value: float | None) -> float | None:
    return None if value is None else round(value, 4)


def script_with(function: str, value: object) -> bytes:
    """Write a script that hands a value to a function of the page.

    A page that was opened from a file may not read other files, but may run their scripts.
    """
    return f"{function}({json.dumps(value, separators=(',', ':'))});\n".encode("ascii")
