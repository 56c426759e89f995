"""Writes into each picture what it was made by and from, and reads it back."""

from __future__ import annotations

import json
import struct
import zlib
from dataclasses import asdict, dataclass
from pathlib import Path

import tifffile
from PIL import Image

_PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"
# Signature, and the one header chunk that always comes first: length, kind, 13 bytes, checksum.
_PNG_HEAD = len(_PNG_SIGNATURE) + 4 + 4 + 13 + 4
_JPEG_START = b"\xff\xd8"
_JPEG_COMMENT = b"\xff\xfe"
_MAX_COMMENT_BYTES = 2**16 - 3


@dataclass(frozen=True, slots=True)
class Provenance:
    """What a picture was made by and from.

    Attributes:
        image: name of the input.
        input_sha256: of the input's bytes, hexadecimal.
        model_sha256: of the model file.
        settings_sha256: of the settings that shape the outputs.
        version: of bcseg-batch.
    """

    image: str
    input_sha256: str
    model_sha256: str
    settings_sha256: str
    version: str

    def text(self) -> str:
        """Give it as JSON in ASCII, whatever characters the name has."""
        return json.dumps({"software": "bcseg-batch", **asdict(self)})


def png_chunk(kind: bytes, content: bytes) -> bytes:
    """Pack a chunk of a PNG.

    Args:
        kind: four letters.
        content: any bytes.
    """
    checksum = zlib.crc32(content, zlib.crc32(kind))
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", checksum)


def png_comment(text: str) -> bytes:
    """Pack an ASCII text as the chunk that image viewers show as comment."""
    return png_chunk(b"tEXt", b"Comment\0" + text.encode("ascii"))


def into_png(data: bytes, text: str) -> bytes:
    """Add a comment to a PNG.

    Args:
        data: the file.
        text: ASCII.
    """
    return data[:_PNG_HEAD] + png_comment(text) + data[_PNG_HEAD:]


def into_jpeg(data: bytes, text: str) -> bytes:
    """Add a comment to a JPEG, behind the first segment where that says what kind of JPEG it is.

    Args:
        data: the file.
        text: ASCII; an overlong one is left out, since half of it would say nothing.
    """
    comment = text.encode("ascii")
    if len(comment) > _MAX_COMMENT_BYTES:
        return data
    place = len(_JPEG_START)
    if data[place : place + 2] == b"\xff\xe0":
        place += 2 + int.from_bytes(data[place + 2 : place + 4], "big")
    segment = _JPEG_COMMENT + struct.pack(">H", len(comment) + 2) + comment
    return data[:place] + segment + data[place:]


def read_provenance(path: Path) -> Provenance | None:
    """Read what a picture was made by and from.

    Args:
        path: of a PNG, JPEG or TIFF.

    Returns:
        None where the picture does not say.

    Raises:
        OSError: it cannot be read, or is no picture.
    """
    text: object
    if path.suffix.lower() in {".tif", ".tiff"}:
        try:
            with tifffile.TiffFile(path) as tiff:
                text = tiff.pages.first.description
        except tifffile.TiffFileError as error:
            raise OSError(f"{path}: {error}") from error
    else:
        with Image.open(path) as picture:
            text = picture.info.get("Comment") or picture.info.get("comment") or ""
    try:
        values = json.loads(text if isinstance(text, str | bytes) else "")
        if values.pop("software", None) != "bcseg-batch":
            return None
        return Provenance(**values)
    except (ValueError, TypeError, AttributeError):
        return None
