"""Gives each input output names of its own, the same from run to run."""

from __future__ import annotations

import itertools
import re
import unicodedata
from collections.abc import Callable, Collection, Iterable, Iterator

from bcseg_batch.store.scratch import Scratch, as_bytes, as_text

_MASK_FOLDER, _MASK_ENDING = "masks/", "_mask.png"
OUTPUT_FOLDERS = (
    "masks",
    "composites",
    "labels",
    "cells",
    "outlines",
    "probabilities",
    "previews",
)
"""The folders of the output folder in which the images' files lie."""


def mask_path(name: str) -> str:
    """Give the path of a mask, relative to the output folder."""
    return f"{_MASK_FOLDER}{name}{_MASK_ENDING}"


def composite_path(name: str, suffix: str) -> str:
    """Give the path of a composite, relative to the output folder.

    Args:
        name: the output name.
        suffix: `jpg`, `png` or `tif`.
    """
    return f"composites/{name}_bloodred.{suffix}"


def labels_path(name: str) -> str:
    """Give the path of a label image, relative to the output folder."""
    return f"labels/{name}_labels.tif"


def outlines_path(name: str, suffix: str) -> str:
    """Give the path of the photograph with outlines, relative to the output folder.

    Args:
        name: the output name.
        suffix: `jpg`, `png` or `tif`.
    """
    return f"outlines/{name}_outlines.{suffix}"


def probability_path(name: str) -> str:
    """Give the path of a probability map, relative to the output folder."""
    return f"probabilities/{name}_probability.tif"


def preview_path(name: str) -> str:
    """Give the path of a photograph's preview, relative to the output folder."""
    return f"previews/{name}_preview.jpg"


def cells_path(name: str) -> str:
    """Give the path of an image's table of cells, relative to the output folder."""
    return f"cells/{name}_cells.csv"


def name_of_mask(path: str) -> str:
    """Give the output name back from the path of a mask."""
    return path.removeprefix(_MASK_FOLDER).removesuffix(_MASK_ENDING)


_SCHEMA = """
CREATE TABLE names (key BLOB PRIMARY KEY, image BLOB UNIQUE, name BLOB) WITHOUT ROWID
"""


class OutputNames:
    """Which input owns which output name; kept on disk, and not in memory.

    The first input of a stem owns the stem itself; the next is named with its suffix too, so that
    `a.jpg` and `a.tif` become `a` and `a.tif`. What was claimed once stays claimed: claims of
    earlier runs are laid in with `hold` before anything is claimed anew. Names that differ only in
    case or in Unicode form count as one, since they are one file on many file systems.
    """

    def __init__(self) -> None:
        self._names = Scratch(_SCHEMA)

    def hold(self, image: str, name: str) -> None:
        """Lay in a claim of an earlier run.

        Args:
            image: the input's name, relative, with forward slashes.
            name: the output name without its ending, relative, with forward slashes.
        """
        self.hold_all([(image, name)])

    def hold_all(self, claims: Iterable[tuple[str, str]]) -> None:
        """Lay in the claims of earlier runs, as `hold` does; of two for one name the first holds.

        Args:
            claims: image and output name.
        """
        self._names.put_all("INSERT OR IGNORE INTO names VALUES (?, ?, ?)", _rows(claims))

    def claim(self, image: str) -> str:
        """Give the input's output name: the one it has, or the first that is free.

        Args:
            image: the input's name, relative, with forward slashes.

        Returns:
            The output name without its ending, in the same sub-folder.
        """
        held = self._names.row("SELECT name FROM names WHERE image = ?", (as_bytes(image),))
        if held is not None:
            return as_text(held[0])
        for name in candidates(image):
            if not self._names.row("SELECT 1 FROM names WHERE key = ?", (_key(name),)):
                self.hold(image, name)
                return name
        raise AssertionError("the candidates never end")


def _rows(claims: Iterable[tuple[str, str]]) -> Iterator[tuple[bytes, bytes, bytes]]:
    for image, name in claims:
        yield _key(name), as_bytes(image), as_bytes(name)


def _key(name: str) -> bytes:
    return as_bytes(name_key(name))


def candidates(image: str) -> Iterator[str]:
    """Give the output names an input may have, best first, without end.

    Args:
        image: the input's name, relative, with forward slashes.

    Yields:
        The stem, then the whole name, then the whole name with a number; in the same sub-folder.
    """
    folder, slash, file_name = image.rpartition("/")
    stem, dot, _ = file_name.rpartition(".")
    if dot:
        yield folder + slash + stem
    yield image
    for number in itertools.count(2):
        yield f"{image}~{number}"


def name_root(suffixes: Collection[str]) -> Callable[[str], str]:
    """Give what says of a name what is left without suffixes of images and numbers at its end.

    All output names that an input may have share their root with it: each is the input's name or
    its stem, with or without a number. So inputs of different roots never contend for a name.

    Args:
        suffixes: of inputs, lower case with the dot.
    """
    endings = "|".join(re.escape(name_key(suffix)) for suffix in sorted(suffixes))
    ending = re.compile(rf"(?:~[0-9]+{'|' if endings else ''}{endings})+\Z", re.DOTALL)
    return lambda name: ending.sub("", name_key(name))


def name_key(name: str) -> str:
    """Give what two output names share where they would be one file on some file system.

    The canonical caseless matching of the Unicode standard (section 3.13, D145).
    """
    return unicodedata.normalize("NFD", unicodedata.normalize("NFD", name).casefold())
