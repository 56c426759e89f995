"""Writes outputs that are larger than memory, band by band.

Each writer takes consecutive rows of any number and holds at most one row of tiles. The files are
plain: TIFF 6.0 (BigTIFF where 32 bits do not reach) in tiles of 512 px, and PNG.
"""

from __future__ import annotations

import io
import math
import struct
import zlib
from abc import ABC, abstractmethod
from types import TracebackType
from typing import IO

import cv2
import numpy as np
import numpy.typing as npt
from PIL import Image

from bcseg_batch.store.encode import encode_jpeg
from bcseg_batch.store.provenance import png_chunk, png_comment
from bcseg_batch.store.tags import NO_TAGS, Tags

PREVIEW_PX = 1600
"""Longest side of a preview."""
TILE_PX = 512
# What a classic TIFF can address, with room for its directory.
_CLASSIC_BYTES = 2**32 - 2**26
_ZLIB_LEVEL = 1
_CHUNK_BYTES = 2**18


class RowWriter(ABC):
    """Takes the rows of one image from top to bottom.

    As a context manager it is closed at the end of the block, unless the block failed.

    Args:
        file: open for writing, seekable, at its beginning; stays open.
        shape_hw: of the whole image.
        tags: what the file says of itself.
    """

    def __init__(self, file: IO[bytes], shape_hw: tuple[int, int], tags: Tags = NO_TAGS) -> None:
        self._file = file
        self._file_tags = tags
        self.shape_hw = shape_hw
        self.rows_written = 0

    def write(self, rows: npt.NDArray[np.generic]) -> None:
        """Write the next rows.

        Args:
            rows: (h, W) or (h, W, 3), any h, of the writer's dtype.

        Raises:
            ValueError: they are wider or narrower than the image, or too many.
            OSError: the file cannot be written.
        """
        height_px, width_px = self.shape_hw
        if rows.shape[1] != width_px or self.rows_written + len(rows) > height_px:
            raise ValueError(
                f"{len(rows)} rows of {rows.shape[1]} px after {self.rows_written} do not fit into "
                f"an image of {width_px} x {height_px} px"
            )
        self.rows_written += len(rows)
        self._write(rows)

    def close(self) -> None:
        """Finish the file.

        Raises:
            ValueError: rows are missing.
            OSError: the file cannot be written.
        """
        if self.rows_written != self.shape_hw[0]:
            raise ValueError(f"{self.rows_written} of {self.shape_hw[0]} rows were written")
        self._finish()

    def __enter__(self) -> RowWriter:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if kind is None:
            self.close()

    @abstractmethod
    def _write(self, rows: npt.NDArray[np.generic]) -> None: ...

    @abstractmethod
    def _finish(self) -> None: ...


class MaskPngWriter(RowWriter):
    """8-bit grey PNG: rows uint8 (h, W)."""

    def __init__(self, file: IO[bytes], shape_hw: tuple[int, int], tags: Tags = NO_TAGS) -> None:
        super().__init__(file, shape_hw, tags)
        self._packer = zlib.compressobj(_ZLIB_LEVEL)
        self._above = np.zeros((1, shape_hw[1]), np.uint8)
        self._packed = bytearray()
        file.write(b"\x89PNG\r\n\x1a\n")
        # Bit depth 8, grey, and the only compression, filter set and order there are.
        self._chunk(b"IHDR", struct.pack(">IIBBBBB", shape_hw[1], shape_hw[0], 8, 0, 0, 0, 0))
        if tags.provenance is not None:
            file.write(png_comment(tags.provenance))

    def _write(self, rows: npt.NDArray[np.generic]) -> None:
        levels = rows.astype(np.uint8, copy=False)
        if not len(levels):
            return
        # Filter 2, the difference to the row above: next to nothing is left of a mask.
        lines = np.full((len(levels), levels.shape[1] + 1), 2, np.uint8)
        lines[:, 1:] = levels - np.concatenate([self._above, levels[:-1]])
        self._above = levels[-1:].copy()
        self._packed += self._packer.compress(lines.tobytes())
        if len(self._packed) >= _CHUNK_BYTES:
            self._flush()

    def _finish(self) -> None:
        self._packed += self._packer.flush()
        self._flush()
        self._chunk(b"IEND", b"")

    def _flush(self) -> None:
        self._chunk(b"IDAT", bytes(self._packed))
        self._packed.clear()

    def _chunk(self, kind: bytes, content: bytes) -> None:
        self._file.write(png_chunk(kind, content))


class TiledTiffWriter(RowWriter):
    """What both kinds of tiled TIFF share: little-endian, one directory, at the end of the file.

    Args:
        file: open for writing, seekable, at its beginning; stays open.
        shape_hw: of the whole image.
        sample_shape: of a pixel: () or (3,).
        dtype: of a sample.
        tags: what the file says of itself.
    """

    def __init__(
        self,
        file: IO[bytes],
        shape_hw: tuple[int, int],
        sample_shape: tuple[int, ...],
        dtype: npt.DTypeLike,
        tags: Tags,
    ) -> None:
        super().__init__(file, shape_hw, tags)
        width_px = math.ceil(shape_hw[1] / TILE_PX) * TILE_PX
        self._rows = np.zeros((TILE_PX, width_px, *sample_shape), dtype)
        self._filled = 0
        self._offsets: list[int] = []
        self._counts: list[int] = []
        padded = math.ceil(shape_hw[0] / TILE_PX) * TILE_PX
        # Neither compression makes a tile larger than its pixels by more than a trifle.
        largest_bytes = padded * self._rows[0].nbytes + 2**20
        self._is_big = largest_bytes > _CLASSIC_BYTES
        file.write(self._header(0))

    def _write(self, rows: npt.NDArray[np.generic]) -> None:
        width_px = self.shape_hw[1]
        done = 0
        while done < len(rows):
            part = rows[done : done + TILE_PX - self._filled]
            self._rows[self._filled : self._filled + len(part), :width_px] = part
            done += len(part)
            self._filled += len(part)
            if self._filled == TILE_PX:
                self._flush()

    def _flush(self) -> None:
        """Write the row of tiles; what lies beyond the image repeats its last row and column."""
        width_px = self.shape_hw[1]
        self._rows[self._filled :] = self._rows[self._filled - 1]
        self._rows[:, width_px:] = self._rows[:, width_px - 1 : width_px]
        for left in range(0, width_px, TILE_PX):
            packed = self._pack(self._rows[:, left : left + TILE_PX])
            self._offsets.append(self._file.tell())
            self._counts.append(len(packed))
            # A tile begins on an even byte.
            self._file.write(packed + b"\0" * (len(packed) % 2))
        self._filled = 0

    def _finish(self) -> None:
        if self._filled:
            self._flush()
        place = self._write_directory()
        end = self._file.tell()
        self._file.seek(0)
        self._file.write(self._header(place))
        self._file.seek(end)

    @abstractmethod
    def _pack(self, tile: npt.NDArray[np.generic]) -> bytes: ...

    @abstractmethod
    def _tags(self) -> dict[int, tuple[str, tuple[int, ...] | bytes]]:
        """Tags of this kind of picture: by number the type (`H` or `I`) and the values."""

    def _header(self, directory: int) -> bytes:
        if self._is_big:
            return struct.pack("<2sHHHQ", b"II", 43, 8, 0, directory)
        return struct.pack("<2sHI", b"II", 42, directory)

    def _write_directory(self) -> int:
        """Write the directory and what does not fit into it; gives where it begins."""
        place = "Q" if self._is_big else "I"
        tags: dict[int, tuple[str, tuple[int, ...] | bytes]] = {
            256: ("I", (self.shape_hw[1],)),
            257: ("I", (self.shape_hw[0],)),
            284: ("H", (1,)),  # samples of a pixel side by side
            322: ("I", (TILE_PX,)),
            323: ("I", (TILE_PX,)),
            324: (place, tuple(self._offsets)),
            325: ("I", tuple(self._counts)),
            **self._tags(),
        }
        if self._file_tags.provenance is not None:
            tags[270] = ("s", self._file_tags.provenance.encode("ascii") + b"\0")
        if self._file_tags.pixel_size_um is not None:
            per_cm = (round(1e10 / self._file_tags.pixel_size_um), 10**6)
            while max(per_cm) >= 2**32:
                per_cm = (per_cm[0] // 10, per_cm[1] // 10)
            tags |= {282: ("R", per_cm), 283: ("R", per_cm), 296: ("H", (3,))}
        entries = b"".join(self._entry(number, *tags[number]) for number in sorted(tags))
        directory = self._file.tell()
        count, last = ("<Q", b"\0" * 8) if self._is_big else ("<H", b"\0" * 4)
        self._file.write(struct.pack(count, len(tags)) + entries + last)
        return directory

    def _entry(self, number: int, kind: str, values: tuple[int, ...] | bytes) -> bytes:
        """Pack one entry, its values written before the directory where they need more room."""
        code = {"s": 2, "H": 3, "I": 4, "R": 5, "Q": 16}[kind]
        if isinstance(values, bytes):
            content = values
        else:
            content = struct.pack(f"<{len(values)}{'I' if kind == 'R' else kind}", *values)
        count = len(values) // 2 if kind == "R" else len(values)
        room = 8 if self._is_big else 4
        if len(content) > room:
            place = self._file.tell()
            self._file.write(content + b"\0" * (len(content) % 2))
            content = struct.pack("<Q" if self._is_big else "<I", place)
        head = struct.pack("<HHQ" if self._is_big else "<HHI", number, code, count)
        return head + content.ljust(room, b"\0")


class RgbTiffWriter(TiledTiffWriter):
    """RGB as tiled, JPEG-compressed TIFF: rows uint8 (h, W, 3).

    Args:
        file: open for writing, seekable, at its beginning; stays open.
        shape_hw: of the whole image.
        quality: of the JPEG tiles, 1..100.
        tags: what the file says of itself.
    """

    def __init__(
        self,
        file: IO[bytes],
        shape_hw: tuple[int, int],
        *,
        quality: int = 90,
        tags: Tags = NO_TAGS,
    ) -> None:
        super().__init__(file, shape_hw, (3,), np.uint8, tags)
        self._quality = quality

    def _pack(self, tile: npt.NDArray[np.generic]) -> bytes:
        # Each tile is a JPEG of its own, with its tables, colour at half the resolution.
        packed = io.BytesIO()
        image = Image.fromarray(np.ascontiguousarray(tile))
        image.save(packed, "JPEG", quality=self._quality, subsampling="4:2:0")
        return packed.getvalue()

    def _tags(self) -> dict[int, tuple[str, tuple[int, ...] | bytes]]:
        return {
            258: ("H", (8, 8, 8)),
            259: ("H", (7,)),  # JPEG
            262: ("H", (6,)),  # YCbCr, as inside the JPEG; readers give RGB
            277: ("H", (3,)),
            530: ("H", (2, 2)),
        }


class LabelTiffWriter(TiledTiffWriter):
    """Labels as tiled, zlib-compressed TIFF: rows of any integer dtype (h, W).

    Args:
        file: open for writing, seekable, at its beginning; stays open.
        shape_hw: of the whole image.
        dtype: uint16 or uint32, what is stored.
        tags: what the file says of itself.
    """

    def __init__(
        self,
        file: IO[bytes],
        shape_hw: tuple[int, int],
        *,
        dtype: type[np.uint16 | np.uint32],
        tags: Tags = NO_TAGS,
    ) -> None:
        super().__init__(file, shape_hw, (), np.dtype(dtype).newbyteorder("<"), tags)

    def _pack(self, tile: npt.NDArray[np.generic]) -> bytes:
        return zlib.compress(np.ascontiguousarray(tile).tobytes(), _ZLIB_LEVEL)

    def _tags(self) -> dict[int, tuple[str, tuple[int, ...] | bytes]]:
        return {
            258: ("H", (8 * self._rows.dtype.itemsize,)),
            259: ("H", (8,)),  # zlib
            262: ("H", (1,)),  # 0 is black
            277: ("H", (1,)),
            339: ("H", (1,)),  # unsigned
        }


class ProbabilityTiffWriter(TiledTiffWriter):
    """Probabilities as tiled, zlib-compressed TIFF: rows float32 (h, W) in [0, 1].

    Args:
        file: open for writing, seekable, at its beginning; stays open.
        shape_hw: of the whole image.
        tags: what the file says of itself.
    """

    def __init__(self, file: IO[bytes], shape_hw: tuple[int, int], tags: Tags = NO_TAGS) -> None:
        super().__init__(file, shape_hw, (), np.dtype("<f4"), tags)

    def _pack(self, tile: npt.NDArray[np.generic]) -> bytes:
        return zlib.compress(np.ascontiguousarray(tile).tobytes(), _ZLIB_LEVEL)

    def _tags(self) -> dict[int, tuple[str, tuple[int, ...] | bytes]]:
        return {
            258: ("H", (32,)),
            259: ("H", (8,)),  # zlib
            262: ("H", (1,)),  # 0 is black
            277: ("H", (1,)),
            339: ("H", (3,)),  # floating point
        }


def preview_step(shape_hw: tuple[int, int]) -> int:
    """Say how many pixels of an image, along each axis, make one of its preview."""
    return math.ceil(max(shape_hw) / PREVIEW_PX)


def reduced(pixels: npt.NDArray[np.uint8], step: int | None = None) -> npt.NDArray[np.uint8]:
    """Average squares of pixels.

    Args:
        pixels: uint8 (H, W, 3).
        step: side of a square; None makes a preview's.

    Returns:
        uint8 (ceil(H / step), ceil(W / step), 3); the last ones repeat the image's edge.
    """
    height, width = pixels.shape[:2]
    step = preview_step((height, width)) if step is None else step
    if step == 1:
        return pixels
    rows, columns = math.ceil(height / step), math.ceil(width / step)
    below, right = rows * step - height, columns * step - width
    whole = cv2.copyMakeBorder(pixels, 0, below, 0, right, cv2.BORDER_REPLICATE)
    small: npt.NDArray[np.uint8] = cv2.resize(whole, (columns, rows), interpolation=cv2.INTER_AREA)
    return small


class PreviewWriter(RowWriter):
    """A small JPEG of a large image: rows uint8 (h, W, 3).

    Args:
        file: open for writing, at its beginning; stays open.
        shape_hw: of the whole image.
        quality: 1..100.
        tags: what the file says of itself.
    """

    def __init__(
        self,
        file: IO[bytes],
        shape_hw: tuple[int, int],
        *,
        quality: int = 90,
        tags: Tags = NO_TAGS,
    ) -> None:
        super().__init__(file, shape_hw, tags)
        self._quality = quality
        self._step = preview_step(shape_hw)
        self._left: npt.NDArray[np.uint8] = np.zeros((0, shape_hw[1], 3), np.uint8)
        self._small: list[npt.NDArray[np.uint8]] = []

    def _write(self, rows: npt.NDArray[np.generic]) -> None:
        ready = np.concatenate([self._left, rows.astype(np.uint8, copy=False)])
        whole = len(ready) // self._step * self._step
        if whole:
            self._small.append(reduced(ready[:whole], self._step))
        self._left = ready[whole:].copy()

    def _finish(self) -> None:
        if len(self._left):
            self._small.append(reduced(self._left, self._step))
        small = np.concatenate(self._small)
        self._file.write(
            encode_jpeg(small, quality=self._quality, provenance=self._file_tags.provenance)
        )
