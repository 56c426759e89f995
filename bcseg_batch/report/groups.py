"""Totals over the images that belong together: of one slide, say, or one patient."""

from __future__ import annotations

import re
import statistics
from collections.abc import Iterable
from dataclasses import dataclass

from bcseg_batch.items import Outcome, Status


@dataclass(frozen=True, slots=True)
class Totals:
    """What the images of a group come to.

    Attributes:
        group: its name; None for the images whose names do not fit the pattern.
        done: images that are done.
        failed: images that failed or were skipped.
        flagged: images that are done and have a flag.
        red_cells: red cells in all images that are done; None where none of them was counted.
        white_cells: white cells likewise.
        platelets: platelets likewise.
        cells: red and white cells likewise.
        sure_cells: of these, those in images without a flag.
        mean: cells in an image, the mean over those that were counted; None without any.
        deviation: their standard deviation (n - 1); None with fewer than two.
        variation: coefficient of variation, deviation / mean; None where either is missing or the
            mean is 0.
        is_enough: whether as many cells were counted in images without a flag as were asked for;
            None where none were counted.
    """

    group: str | None
    done: int
    failed: int
    flagged: int
    red_cells: int | None
    white_cells: int | None
    platelets: int | None
    cells: int | None
    sure_cells: int | None
    mean: float | None
    deviation: float | None
    variation: float | None
    is_enough: bool | None


def group_of(image: str, pattern: re.Pattern[str] | None) -> str | None:
    """Say which group an image belongs to.

    Args:
        image: its name: the path below the input folder, with forward slashes.
        pattern: searched in the name; its group named `group` is the answer.

    Returns:
        The group; None without a pattern, where it does not fit, and where it finds nothing.
    """
    found = pattern.search(image) if pattern is not None else None
    return (found["group"] or None) if found else None


def totals_by_group(
    outcomes: Iterable[Outcome], pattern: re.Pattern[str] | None, *, min_cells: int
) -> list[Totals]:
    """Sum up each group.

    Args:
        outcomes: of all images.
        pattern: as for `group_of`.
        min_cells: how many red and white cells are enough.

    Returns:
        The groups by name; the images without one last.
    """
    members: dict[str | None, list[Outcome]] = {}
    for outcome in outcomes:
        members.setdefault(group_of(outcome.image, pattern), []).append(outcome)
    names = sorted(members, key=lambda name: (name is None, name or ""))
    return [_totals(name, members[name], min_cells) for name in names]


def _totals(group: str | None, members: list[Outcome], min_cells: int) -> Totals:
    done = [outcome for outcome in members if outcome.status is Status.DONE]
    counts = [outcome.cell_count for outcome in done if outcome.cell_count is not None]
    mean = statistics.fmean(counts) if counts else None
    sure = _sum(outcome.cell_count if not outcome.flags else 0 for outcome in done)
    sure = sure if counts else None
    deviation = statistics.stdev(counts) if len(counts) >= 2 else None
    return Totals(
        group=group,
        done=len(done),
        failed=len(members) - len(done),
        flagged=sum(bool(outcome.flags) for outcome in done),
        red_cells=_sum(outcome.red_cell_count for outcome in done),
        white_cells=_sum(outcome.white_cell_count for outcome in done),
        platelets=_sum(outcome.platelet_count for outcome in done),
        cells=_sum(counts),
        sure_cells=sure,
        mean=mean,
        deviation=deviation,
        variation=deviation / mean if deviation is not None and mean else None,
        is_enough=None if sure is None else sure >= min_cells,
    )


def _sum(counts: Iterable[int | None]) -> int | None:
    """Add up what was counted; None where nothing was, which is not 0."""
    known = [count for count in counts if count is not None]
    return sum(known) if known else None
