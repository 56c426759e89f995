"""Which names are inputs at all."""

from __future__ import annotations

import fnmatch
from collections.abc import Collection, Sequence
from dataclasses import dataclass

# What copying, syncing and storage programs leave beside the files they handle.
TRANSIENT_PATTERNS: tuple[str, ...] = (
    ".*",
    "*.part",
    "*.tmp",
    "*.crdownload",
    "*.filepart",
    "~$*",
    "@eaDir",
    "Thumbs.db",
)


@dataclass(frozen=True, slots=True)
class IgnoreRules:
    """Decides by name alone; patterns are shell patterns, without regard to case.

    Attributes:
        suffixes: of inputs, lower case with the dot.
        patterns: the user's own, on top of `TRANSIENT_PATTERNS`; held against the name and, where
            they contain a slash, against the path relative to the input folder.
    """

    suffixes: Collection[str]
    patterns: Sequence[str] = ()

    def reason_path(self, image: str) -> str | None:
        """Say why a file is no input, the folders on the way to it included.

        Args:
            image: path relative to the input folder, with forward slashes.
        """
        folders = image.split("/")[:-1]
        for depth in range(1, len(folders) + 1):
            if (reason := self.reason_folder("/".join(folders[:depth]))) is not None:
                return reason
        return self.reason_file(image)

    def reason_file(self, image: str) -> str | None:
        """Say why a file is no input, or None where it is one.

        Args:
            image: path relative to the input folder, with forward slashes.
        """
        name = image.rpartition("/")[2]
        if (pattern := self._match(image)) is not None:
            return f"matches {pattern}"
        _, dot, suffix = name.rpartition(".")
        if dot + suffix.lower() not in self.suffixes:
            return "not the suffix of an image"
        return None

    def reason_folder(self, folder: str) -> str | None:
        """Say why a folder is not entered, or None where it is.

        Args:
            folder: path relative to the input folder, with forward slashes.
        """
        pattern = self._match(folder)
        return None if pattern is None else f"matches {pattern}"

    def _match(self, relative: str) -> str | None:
        name = relative.rpartition("/")[2].lower()
        for pattern in (*TRANSIENT_PATTERNS, *self.patterns):
            subject = relative.lower() if "/" in pattern else name
            if fnmatch.fnmatchcase(subject, pattern.lower()):
                return pattern
        return None
