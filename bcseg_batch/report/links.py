"""How the report names images: in its own files, in links, and for the reader."""

from __future__ import annotations

import hashlib
import os
from pathlib import PurePosixPath
from urllib.parse import quote

# What every browser shows; the composites of very large images are TIFF.
_SHOWN_SUFFIXES = {".jpg", ".jpeg", ".png"}


def page_key(image: str) -> str:
    """Give the name of an image in the report: 16 hexadecimal digits, whatever its own is.

    So it is neither too long nor in need of quoting, and keeps being the same.
    """
    return hashlib.sha256(os.fsencode(image)).hexdigest()[:16]


def url_of(path: str) -> str:
    """Percent-encode a path relative to the output folder, its bytes as they are on disk."""
    return quote(os.fsencode(path))


def shown_url(path: str | None) -> str | None:
    """Give the URL of a picture if there is one, and browsers show its kind."""
    if path is None or PurePosixPath(path).suffix.lower() not in _SHOWN_SUFFIXES:
        return None
    return url_of(path)
