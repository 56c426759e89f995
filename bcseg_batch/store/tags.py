"""What a picture file says of itself, whatever its format."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Tags:
    """What is written into a picture beside its pixels.

    Attributes:
        pixel_size_um: side of a pixel, where it is known; in TIFF only.
        provenance: ASCII, of `Provenance.text`.
    """

    pixel_size_um: float | None = None
    provenance: str | None = None


NO_TAGS = Tags()
