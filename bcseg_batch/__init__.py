"""Masks and blood-red composites for folders of blood-smear photographs."""

from bcseg_batch.version import __version__

__all__ = ["__version__"]
