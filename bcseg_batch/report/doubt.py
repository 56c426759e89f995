"""Which images a reader should look at first."""

from __future__ import annotations

from collections.abc import Iterable

from bcseg_batch.items import Outcome, Status

FLAG_WEIGHTS = {
    "not_a_smear": 5.0,  # there is nothing to be counted
    "no_cells": 4.0,  # nothing was
    "unlike_training": 3.0,  # the model was never tried on such
    "out_of_focus": 3.0,  # outlines and measurements are off
    "too_crowded": 2.0,  # the count is too low
    "over_exposed": 2.0,  # some cells are lost
    "under_exposed": 1.0,  # mostly harmless
}
"""How heavily a flag speaks against a result."""

# A flag of a version that this one does not know yet.
_UNKNOWN_FLAG_WEIGHT = 1.0
_STATUS_ORDER = {Status.FAILED: 0, Status.SKIPPED: 1, Status.DONE: 2}


def flag_weight(outcome: Outcome) -> float:
    """Give the weight of all flags of an image together; 0 without any."""
    return sum(FLAG_WEIGHTS.get(flag.name, _UNKNOWN_FLAG_WEIGHT) for flag in outcome.flags)


def most_doubtful_first(outcomes: Iterable[Outcome]) -> list[Outcome]:
    """Order images by how much their results should be doubted.

    Failed images come first, then skipped ones, then those that are done: by the weight of their
    flags, the heaviest first; among these by the network's confidence, the lowest first, and an
    unknown one before all known; at last by name.
    """

    def key(outcome: Outcome) -> tuple[int, float, float, str]:
        confidence = -1.0 if outcome.mean_confidence is None else outcome.mean_confidence
        return _STATUS_ORDER[outcome.status], -flag_weight(outcome), confidence, outcome.image

    return sorted(outcomes, key=key)
