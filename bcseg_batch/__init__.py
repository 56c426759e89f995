"""Masks, blood-red composites and counted cells from blood-smear photographs.

In a notebook or another program::

    import bcseg_batch

    model = bcseg_batch.load_model()
    found = model.segment("smear.jpg")
    found.mask, found.labels, found.table, found.flags

The names in `__all__` are the public ones, and no others; docs/python.md tells more.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

from bcseg_batch.errors import BcsegError
from bcseg_batch.version import __version__

if TYPE_CHECKING:
    from bcseg_batch.api import Model, Segmentation, load_model

__all__ = ["BcsegError", "Model", "Segmentation", "__version__", "load_model"]


def __getattr__(name: str) -> object:
    # What is heavy is loaded when it is asked for: the commands' help does without.
    if name in __all__:
        return getattr(importlib.import_module("bcseg_batch.api"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return __all__
