"""Reads windows of a large TIFF without decoding it whole.

What is read, and what becomes of its samples, is what `images.py` says; this module only leaves out
what cannot be had by windows. Then `open_raster` gives None, and the image is decoded whole.
"""

from __future__ import annotations

import hashlib
import os
from collections import OrderedDict
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import numpy.typing as npt
import tifffile

from bcseg_batch.errors import ImageError
from bcseg_batch.store.images import (
    _ORIENTATION,
    _TIFF_MAGIC,
    _as_image_error,
    _check_layout,
    _check_page,
    _check_size,
    _open_regular,
    _refuse_if_changed,
    _tiff_to_rgb,
)

if TYPE_CHECKING:
    from io import BufferedReader

Pixels = npt.NDArray[np.uint8]

# A strip or tile of more pixels than this is decoded in one piece anyway: nothing is saved.
_MAX_SEGMENT_PX = 2**24
# Decoded strips and tiles that are kept: two rows of them, for two readers that go down the image.
_CACHE_BYTES = (2**24, 2**27)


class TiffRaster:
    """One page of a TIFF, read by windows; for one thread.

    Attributes:
        shape_hw: height and width in pixels.
        sha256: of the file's bytes when it was opened, hexadecimal.
        size_bytes: the file's size.
        mtime_ns: the file's modification time, nanoseconds since the epoch.
        decoded_segments: how many strips and tiles have been decoded so far.
    """

    def __init__(
        self,
        path: Path,
        handle: BufferedReader,
        tiff: tifffile.TiffFile,
        ifd: tifffile.TiffPage,
        notes: list[str],
    ) -> None:
        self._path, self._handle, self._tiff, self._ifd = path, handle, tiff, ifd
        self._name = repr(path.name)
        self._notes = notes
        self._before = os.fstat(handle.fileno())
        self.shape_hw: tuple[int, int] = (ifd.imagelength, ifd.imagewidth)
        self.size_bytes = self._before.st_size
        self.mtime_ns = self._before.st_mtime_ns
        self.decoded_segments = 0
        self._cache: OrderedDict[int, npt.NDArray[Any]] = OrderedDict()
        self._cached_bytes = 0
        self._planes = ifd.samplesperpixel if ifd.planarconfig == 2 else 1
        if ifd.is_tiled:
            self._segment_hw = (ifd.tilelength, ifd.tilewidth)
        else:
            self._segment_hw = (min(ifd.rowsperstrip, ifd.imagelength), ifd.imagewidth)
        sample_bytes = ifd.samplesperpixel * np.dtype(ifd.dtype).itemsize
        row_bytes = self._segment_hw[0] * ifd.imagewidth * sample_bytes
        self._cache_bytes = min(max(_CACHE_BYTES[0], 2 * row_bytes), _CACHE_BYTES[1])
        handle.seek(0)
        self.sha256 = hashlib.file_digest(handle, "sha256").hexdigest()

    @property
    def notes(self) -> tuple[str, ...]:
        """What was done to the pixels read so far beyond plain decoding, one phrase each."""
        return tuple(self._notes)

    def read(self, top: int, bottom: int, left: int, right: int) -> Pixels:
        """Read rows top..bottom - 1 and columns left..right - 1.

        Returns:
            uint8 (h, w, 3) RGB, 0..255, the same as that part of the whole decoded image.

        Raises:
            ImageError: as `decode_image`; most often the file is damaged.
        """
        try:
            if self._ifd.is_contiguous:
                samples = self._read_rows(top, bottom)[:, left:right]
            else:
                samples = self._read_segments(top, bottom, left, right)
            notes: list[str] = []
            pixels = _tiff_to_rgb(self._ifd, samples, self._name, notes)
        except Exception as error:
            # Broad for the reason that `decode_image` gives.
            self.check_unchanged()
            raise _as_image_error(error, self._name, self._handle, self.size_bytes) from error
        self._notes.extend(note for note in notes if note not in self._notes)
        return np.ascontiguousarray(pixels)

    def check_unchanged(self) -> None:
        """Make sure, at the end, that all windows were of the file that was hashed.

        Raises:
            ImageChangedError: the file vanished or was written to meanwhile.
        """
        _refuse_if_changed(self._path, self._name, self._handle, self._before)

    def close(self) -> None:
        """Close the file."""
        self._cache.clear()
        self._tiff.close()
        self._handle.close()

    def __enter__(self) -> TiffRaster:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def _read_rows(self, top: int, bottom: int) -> npt.NDArray[Any]:
        """Read whole rows of uncompressed samples that lie one after the other: (h, W, S)."""
        ifd = self._ifd
        dtype = np.dtype(ifd.dtype).newbyteorder(self._tiff.byteorder)
        height, width = self.shape_hw
        per_pixel = ifd.samplesperpixel // self._planes
        row_bytes = width * per_pixel * dtype.itemsize
        planes = []
        for plane in range(self._planes):
            self._handle.seek(ifd.dataoffsets[0] + (plane * height + top) * row_bytes)
            content = self._handle.read((bottom - top) * row_bytes)
            stored = np.frombuffer(content, dtype).reshape(bottom - top, width, per_pixel)
            planes.append(stored.astype(dtype.newbyteorder("="), copy=False))
        return planes[0] if len(planes) == 1 else np.concatenate(planes, axis=2)

    def _read_segments(self, top: int, bottom: int, left: int, right: int) -> npt.NDArray[Any]:
        """Put a window together from the strips or tiles that it touches: (h, w, S)."""
        ifd = self._ifd
        height, width = self._segment_hw
        down, across = (-(-self.shape_hw[i] // self._segment_hw[i]) for i in (0, 1))
        shape = (bottom - top, right - left, ifd.samplesperpixel)
        window = np.zeros(shape, ifd.dtype)
        for plane in range(self._planes):
            samples = slice(plane, plane + 1) if self._planes > 1 else slice(None)
            for row in range(top // height, -(-bottom // height)):
                for column in range(left // width, -(-right // width)):
                    segment = self._segment((plane * down + row) * across + column)
                    y, x = row * height, column * width
                    inner = segment[max(0, top - y) : bottom - y, max(0, left - x) : right - x]
                    to_y, to_x = max(y, top) - top, max(x, left) - left
                    part = window[to_y : to_y + len(inner), to_x : to_x + inner.shape[1]]
                    part[..., samples] = inner[: len(part), : part.shape[1]]
        return window

    def _segment(self, index: int) -> npt.NDArray[Any]:
        """Decode a strip or tile, or take it from those kept: (h, w, S), padding included."""
        if index in self._cache:
            self._cache.move_to_end(index)
            return self._cache[index]
        ifd = self._ifd
        self._handle.seek(ifd.dataoffsets[index])
        content = self._handle.read(ifd.databytecounts[index])
        decoded, _, _ = ifd.decode(content, index, jpegtables=ifd.jpegtables)
        assert decoded is not None  # only where there is no content, which is refused at opening
        segment: npt.NDArray[Any] = decoded[0]
        self.decoded_segments += 1
        self._cache[index] = segment
        self._cached_bytes += segment.nbytes
        while self._cached_bytes > self._cache_bytes and len(self._cache) > 1:
            self._cached_bytes -= self._cache.popitem(last=False)[1].nbytes
        return segment


def open_raster(path: Path, *, max_pixels: int, page: int = 0) -> TiffRaster | None:
    """Open a TIFF for reading by windows.

    Args:
        path: the file.
        max_pixels: as for `decode_image`.
        page: which page, counted from 0.

    Returns:
        The page, or None where it has to be decoded whole: other formats, other orientations than
        upright, floating point (whose rule looks at all samples), one huge strip, and whatever
        `decode_image` would refuse, which then tells why.

    Raises:
        ImageChangedError: the file vanished, or was written to while it was being hashed.
    """
    name = repr(path.name)
    with _open_regular(path, name) as handle:
        if handle.read(4) not in _TIFF_MAGIC:
            return None
    handle = _open_regular(path, name)
    raster = None
    try:
        raster = _open(path, handle, max_pixels, page)
        if raster is not None:
            raster.check_unchanged()
    except ImageError:
        raster = None
        raise
    finally:
        if raster is None:
            handle.close()
    return raster


def _open(path: Path, handle: BufferedReader, max_pixels: int, page: int) -> TiffRaster | None:
    name = repr(path.name)
    notes: list[str] = []
    try:
        tiff = tifffile.TiffFile(handle)
        _check_page(name, page, len(tiff.pages), notes)
        ifd = cast("tifffile.TiffPage", tiff.pages[page])
        _check_size(name, ifd.imagewidth, ifd.imagelength, max_pixels)
        _check_layout(ifd, name, max_pixels, os.fstat(handle.fileno()).st_size)
        if not _is_windowed(ifd):
            return None
        raster = TiffRaster(path, handle, tiff, ifd, notes)
        # What is not supported shows at the first pixel.
        raster.read(0, 1, 0, 1)
    except Exception:  # noqa: BLE001 - decoders answer hostile bytes with any exception there is; whole decoding names it
        return None
    return raster


def _is_windowed(ifd: tifffile.TiffPage) -> bool:
    """Tell whether parts of a page can be decoded by themselves, and mean what they do in it."""
    if ifd.tags.valueof(_ORIENTATION, default=1) != 1 or np.dtype(ifd.dtype).kind == "f":
        return False
    if ifd.is_contiguous:
        return bool(ifd.predictor == 1 and ifd.fillorder == 1 and not ifd.is_subsampled)
    if ifd.jpegheader is not None:  # one JPEG that only looks like tiles
        return False
    if ifd.is_tiled:
        return bool(ifd.tilewidth * ifd.tilelength <= _MAX_SEGMENT_PX)
    return bool(min(ifd.rowsperstrip, ifd.imagelength) * ifd.imagewidth <= _MAX_SEGMENT_PX)
