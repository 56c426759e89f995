"""Tells folders of this machine from places in a store of objects."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from bcseg_batch.errors import UsageError

SCHEMES = ("s3", "gs", "az")
NOT_PLAIN = "a control character, '?versionId=', or a part that is empty, '.' or '..'"
"""What no key may have, for errors."""
_SCHEME = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*):(//.*)", re.DOTALL)


@dataclass(frozen=True, slots=True)
class Url:
    """A place in a store of objects: all keys that begin with the prefix and a slash.

    Attributes:
        scheme: `s3`, `gs` or `az`.
        bucket: name of the bucket (Azure: of the container).
        prefix: what all keys of the place begin with, without a slash at either end; empty for the
            whole bucket.
    """

    scheme: str
    bucket: str
    prefix: str

    def __str__(self) -> str:
        return f"{self.scheme}://{self.bucket}" + (self.prefix and f"/{self.prefix}")

    def key(self, relative: str) -> str:
        """Give the key of a path below the place."""
        return f"{self.prefix}/{relative}" if self.prefix else relative

    def relative(self, key: str) -> str:
        """Give the path below the place of one of its keys."""
        return key[len(self.prefix) + 1 :] if self.prefix else key

    def contains(self, other: Url) -> bool:
        """Say whether another place is this one or lies in it."""
        return (self.scheme, self.bucket) == (other.scheme, other.bucket) and (
            other.key("") + "/"
        ).startswith(self.prefix and self.key(""))


Place = Path | Url
"""Where photographs lie or outputs go."""


def parse_place(text: str) -> Place:
    """Read what a user names: a folder, or the URL of a place in a store.

    Raises:
        UsageError: it is the URL of nothing that can be read from or written to.
    """
    match = _SCHEME.fullmatch(text)
    if match is None:
        return Path(text)
    scheme = match[1].lower()
    if scheme not in SCHEMES:
        known = ", ".join(f"{name}://" for name in SCHEMES)
        raise UsageError(
            f"{text!r} begins with {scheme}://, and known are {known}: name one of these, or a "
            "folder by its path"
        )
    bucket, _, prefix = match[2][2:].partition("/")
    prefix = prefix.rstrip("/")
    if not bucket or "@" in bucket:
        raise UsageError(
            f"{text!r} names no bucket: write {scheme}://BUCKET/PREFIX; keys and passwords come "
            "from the environment and never stand in a URL"
        )
    if prefix and not is_plain(prefix):
        raise UsageError(f"the prefix of {text!r} has {NOT_PLAIN}: write it without")
    return Url(scheme, bucket, prefix)


def is_plain(relative: str) -> bool:
    """Say whether a path is one that every store, and every program, takes for the same.

    The libraries drop line breaks, resolve `..`, and take `?versionId=` for their own.
    """
    return (
        relative.isprintable()
        and "?versionid=" not in relative.lower()
        and not {"", ".", ".."} & set(relative.split("/"))
    )
