"""From a file to RGB pixels: the only module that knows image formats.

TIFF is read by `tifffile`, which tells sample type, declared bit depth and colour space exactly
and whose failures are exceptions; libtiff inside Pillow writes them to the terminal instead. All
other formats are read by Pillow, but for JPEG without any fault or peculiarity, which `simplejpeg`
decodes to the same pixels in half the time. What becomes of each kind of pixel is written in
`docs/inputs.md`; the functions here follow it in the same order.
"""

from __future__ import annotations

import errno
import hashlib
import logging
import os
import stat
import warnings
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import numpy.typing as npt
import simplejpeg
import tifffile
from PIL import Image, ImageCms, UnidentifiedImageError

from bcseg_batch.errors import (
    ImageChangedError,
    ImageError,
    ImageTooLargeError,
    TruncatedImageError,
    UnreadableImageError,
    UnsupportedImageError,
)

if TYPE_CHECKING:
    from io import BufferedReader
    from pathlib import Path

# Decoding runs in a pool of threads, so everything that is global to the process is set here, once.
# Pillow's own pixel limit warns and has one value for all; `max_pixels` takes its place.
Image.MAX_IMAGE_PIXELS = None
Image.init()
# What the libraries remark about an odd file either changes nothing or becomes our note or error.
warnings.filterwarnings("ignore", module=r"PIL\.")
logging.getLogger("PIL").setLevel(logging.CRITICAL)

# In the order in which they are tried. Left out on purpose, see docs/inputs.md: formats that start
# another program, that Pillow only names or is about to drop, and that wrap a second image of
# undeclared size.
_PILLOW_FORMATS = tuple(
    name
    for name in (
        "JPEG", "PNG", "BMP", "WEBP", "JPEG2000", "GIF", "AVIF", "PPM", "DIB", "DCX", "DDS",
        "FITS", "FLI", "FTEX", "GBR", "MSP", "PCD", "PCX", "PIXAR", "PSD", "QOI", "SGI",
        "SUN", "XBM", "XPM", "TGA",
    )
    if name in Image.OPEN
)  # fmt: skip

SUFFIXES: tuple[str, ...] = (
    ".apng", ".avif", ".avifs", ".avs", ".bif", ".bmp", ".btf", ".bw", ".dcx", ".dds", ".dib",
    ".eer", ".fit", ".fits", ".flc", ".fli", ".ftc", ".ftu", ".gbr", ".gel", ".gif", ".icb",
    ".j2c", ".j2k", ".jfif", ".jp2", ".jpc", ".jpe", ".jpeg", ".jpf", ".jpg", ".jpx",
    ".lsm", ".mpo", ".msp", ".ndpi", ".pbm", ".pcd", ".pcoraw", ".pcx", ".pfm", ".pgm", ".png",
    ".pnm", ".ppm", ".psd", ".ptif", ".ptiff", ".pxr", ".qoi", ".qpi", ".qptiff", ".ras", ".rgb",
    ".rgba", ".scn", ".seq", ".sgi", ".stk", ".svs", ".tf2", ".tf8", ".tga", ".tif", ".tiff",
    ".vda", ".vst", ".webp", ".xbm", ".xpm", ".zif",
)  # fmt: skip
"""Every suffix that is taken for an image by default: lower case, sorted, with its dot."""

_TIFF_MAGIC = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")
# Formats for which Pillow stretches deep grey samples to the full 16 bits when it reads them.
_FULL_SCALE_65535 = ("PNG", "PPM", "JPEG2000")
_TIFF_JPEG = (6, 7, 33007, 34892)
_TIFF_PLAIN = (1, 5, 8, 32773, 32946, 34925, 50000)  # compressions that keep the colour space
_MAX_OUTSIDE_SHARE = 0.01
_ORIENTATION = 274
_BITS_PER_SAMPLE = 258


@dataclass(frozen=True, slots=True)
class DecodedImage:
    """The pixels of one file, and which bytes they came from.

    Attributes:
        pixels: uint8 (H, W, 3) RGB, 0..255, C-contiguous, upright (orientation tag applied).
        sha256: of exactly the bytes that were decoded, hexadecimal.
        size_bytes: the file's size.
        mtime_ns: the file's modification time, nanoseconds since the epoch.
        notes: what was done to the pixels beyond plain decoding, one phrase each.
    """

    pixels: npt.NDArray[np.uint8]
    sha256: str
    size_bytes: int
    mtime_ns: int
    notes: tuple[str, ...]


def decode_image(path: Path, *, max_pixels: int, page: int = 0) -> DecodedImage:
    """Read one image file as 8-bit RGB. Safe to call from several threads.

    Args:
        path: the file.
        max_pixels: the most pixels (width times height) that are decoded; the file's header is
            held against it before any pixel is.
        page: which page, frame or picture of a file that has several, counted from 0.

    Returns:
        The pixels with the hash, size and time of the bytes they were decoded from.

    Raises:
        UnreadableImageError: not an image, damaged, not a regular file, or not permitted.
        TruncatedImageError: the file ends before its image does.
        UnsupportedImageError: a sound image without a rule in docs/inputs.md, or no such page.
        ImageTooLargeError: more than `max_pixels`, or more than memory holds.
        ImageChangedError: the file vanished or was written to while being read.
    """
    # repr() keeps any name printable: quotes, line breaks and bytes that are not UTF-8 included.
    name = repr(path.name)
    with _open_regular(path, name) as handle:
        before = os.fstat(handle.fileno())
        try:
            if before.st_size == 0:
                raise TruncatedImageError(
                    f"{name} is empty: perhaps its copy never finished. Copy it again."
                )
            sha256 = hashlib.file_digest(handle, "sha256").hexdigest()
            pixels, notes = _decode(handle, name, max_pixels, page)
        except Exception as error:
            # Broad, because decoders answer hostile bytes with any exception there is (TypeError,
            # struct.error, ZeroDivisionError, ...); each becomes the one record of this file.
            _refuse_if_changed(path, name, handle, before)
            raise _as_image_error(error, name, handle, before.st_size) from error
        _refuse_if_changed(path, name, handle, before)
    return DecodedImage(pixels, sha256, before.st_size, before.st_mtime_ns, tuple(notes))


def declared_pixels(path: Path, *, page: int = 0) -> int:
    """Read from a file's header how many pixels its image has, to know before it is decoded.

    Args:
        path: the file.
        page: as for `decode_image`.

    Returns:
        Width times height; 0 where the header cannot be read, which `decode_image` will explain.
    """
    try:
        with _open_regular(path, repr(path.name)) as handle:
            if handle.read(4) in _TIFF_MAGIC:
                handle.seek(0)
                with tifffile.TiffFile(handle) as tiff:
                    ifd = cast("tifffile.TiffPage", tiff.pages[page])
                    return int(ifd.imagewidth * ifd.imagelength)
            handle.seek(0)
            with Image.open(handle, formats=_PILLOW_FORMATS) as image:
                return int(image.width * image.height)
    except Exception:  # noqa: BLE001 - decoders answer hostile bytes with any exception there is
        return 0


# The file ------------------------------------------------------------------------------------


def _open_regular(path: Path, name: str) -> BufferedReader:
    """Open a regular file for reading; never waits on a pipe or a device."""

    def open_without_waiting(target: str, flags: int) -> int:
        return os.open(target, flags | getattr(os, "O_NONBLOCK", 0))

    try:
        handle = open(path, "rb", opener=open_without_waiting)  # noqa: SIM115 - the caller closes it; Path.open knows no opener
    except (FileNotFoundError, NotADirectoryError) as error:
        raise _vanished(name) from error
    except OSError as error:
        raise _not_readable(error, name) from error
    if not stat.S_ISREG(os.fstat(handle.fileno()).st_mode):
        handle.close()
        raise UnreadableImageError(
            f"{name} is not a regular file but a pipe, device or the like. Put image files here."
        )
    return handle


def _refuse_if_changed(
    path: Path, name: str, handle: BufferedReader, before: os.stat_result
) -> None:
    """Raise ImageChangedError unless the path still leads to the bytes that were opened."""
    try:
        after = (os.fstat(handle.fileno()), path.stat())
    except OSError as error:
        raise _vanished(name) from error
    for now in after:
        if _identity(now) != _identity(before):
            raise ImageChangedError(
                f"{name} was written to while it was being read. "
                "It is read again once it has settled."
            )


def _identity(status: os.stat_result) -> tuple[int, int, int, int]:
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns


def _vanished(name: str) -> ImageChangedError:
    return ImageChangedError(
        f"{name} vanished before it was read. If that was not intended, put it back."
    )


def _not_readable(error: OSError, name: str) -> UnreadableImageError:
    reason = error.strerror or str(error)
    return UnreadableImageError(
        f"{name} cannot be read: {reason}. Check the file, its permissions and its disk."
    )


def _as_image_error(
    error: Exception, name: str, handle: BufferedReader, size_bytes: int
) -> ImageError:
    """Turn whatever a decoder raised into the error of this file."""
    if isinstance(error, ImageError):
        return error
    if isinstance(error, MemoryError):
        return ImageTooLargeError(
            f"{name} does not fit into memory. Make it smaller, lower the number of workers, "
            "or lower the pixel limit so that such files are refused at once."
        )
    if isinstance(error, OSError) and error.errno not in {None, errno.EINVAL}:
        return _not_readable(error, name)
    return _decoder_error(error, name, ends_early=_ends_early(handle, size_bytes))


def _decoder_error(error: Exception, name: str, *, ends_early: bool) -> ImageError:
    """Sort a decoder's complaint into damaged, cut off, or not supported."""
    # Pillow's own sentence for this one spells out the path that it was given.
    is_unknown = isinstance(error, UnidentifiedImageError)
    text = "its beginning is not recognised" if is_unknown else f"{type(error).__name__}: {error}"
    cause = " ".join(text.split())[:200]
    if ends_early or "truncated" in cause.lower():
        return TruncatedImageError(
            f"{name} ends before its image does ({cause}). "
            "If it is still being copied, wait; otherwise copy it again."
        )
    if isinstance(error, NotImplementedError) or "not supported" in cause:
        return UnsupportedImageError(
            f"{name} is stored in a way that is not read here ({cause}). "
            "Save it as 8-bit RGB PNG, TIFF or JPEG."
        )
    if is_unknown:
        return UnreadableImageError(
            f"{name} is not an image in any format that is read here, or its beginning is "
            "damaged. Export it again, or move it out of the folder."
        )
    return UnreadableImageError(
        f"{name} is damaged and cannot be decoded ({cause}). Export it again from its source."
    )


def _ends_early(handle: BufferedReader, size_bytes: int) -> bool:
    """Whether a file that failed to decode lacks the end that its format prescribes."""
    try:
        handle.seek(0)
        head = handle.read(16)
        handle.seek(max(0, size_bytes - 64))
        tail = handle.read(64)
    except (OSError, ValueError):
        return False
    if head.startswith(b"\xff\xd8\xff"):
        return b"\xff\xd9" not in tail
    if head.startswith(b"\x89PNG") and head[12:] in b"IHDR":
        return b"IEND" not in tail
    if head.startswith(b"RIFF"):
        return int.from_bytes(head[4:8], "little") + 8 > size_bytes
    if head[:4] in _TIFF_MAGIC:
        # The place of the first page: 4 bytes at 4, or in BigTIFF ("+" for "*") 8 bytes at 8.
        place = head[8:16] if b"+" in head[:4] else head[4:8]
        return int.from_bytes(place, "little" if head.startswith(b"I") else "big") >= size_bytes
    return False


# The pixels ----------------------------------------------------------------------------------


def _decode(
    handle: BufferedReader, name: str, max_pixels: int, page: int
) -> tuple[npt.NDArray[np.uint8], list[str]]:
    """Decode one page; returns uint8 (H, W, 3) RGB, upright, C-contiguous, and the notes."""
    handle.seek(0)
    is_tiff = handle.read(4) in _TIFF_MAGIC
    handle.seek(0)
    read = _read_tiff if is_tiff else _read_by_pillow
    notes: list[str] = []
    pixels, orientation = read(handle, name, max_pixels, page, notes)
    if orientation in range(2, 9):
        notes.append(f"orientation {orientation} applied")
    elif orientation != 1:
        notes.append("orientation tag unreadable, taken as upright")
    return np.ascontiguousarray(_upright(pixels, orientation)), notes


def _upright(pixels: npt.NDArray[np.uint8], orientation: int | None) -> npt.NDArray[np.uint8]:
    """Undo the orientation of EXIF tag 274 (1 is upright; 5 to 8 exchange the sides)."""
    if orientation in {5, 6, 7, 8}:
        pixels = pixels.transpose(1, 0, 2)
    if orientation in {2, 3, 6, 7}:
        pixels = pixels[:, ::-1]
    if orientation in {3, 4, 7, 8}:
        pixels = pixels[::-1]
    return pixels


def _check_size(name: str, width_px: int, height_px: int, max_pixels: int) -> None:
    """Hold the size that a header declares against the limit, before any pixel is decoded."""
    if width_px <= 0 or height_px <= 0:
        raise UnreadableImageError(
            f"{name} is damaged: it declares {width_px} x {height_px} pixels. Export it again."
        )
    if width_px * height_px > max_pixels:
        raise ImageTooLargeError(
            f"{name} declares {width_px} x {height_px} pixels, more than the limit of "
            f"{max_pixels}. Cut or shrink it, or raise the pixel limit in the settings."
        )


def _check_page(name: str, page: int, page_count: int, notes: list[str]) -> None:
    """Refuse a page that is not there; note which of several is read."""
    if not 0 <= page < page_count:
        raise UnsupportedImageError(
            f"{name} has {page_count} page(s), so there is no page {page + 1}. "
            "Ask for a page that it has."
        )
    if page_count > 1:
        notes.append(f"page {page + 1} of {page_count}")


def _unsupported(name: str, what: str) -> UnsupportedImageError:
    return UnsupportedImageError(
        f"{name} holds {what}, for which there is no rule. Save it as 8-bit RGB PNG, TIFF or JPEG."
    )


# Samples to 8 bits ---------------------------------------------------------------------------


def _stretch(samples: npt.NDArray[Any], low: float, high: float) -> npt.NDArray[np.uint8]:
    """Map [low, high] to 0..255, rounded to nearest, the rest clipped.

    Args:
        samples: any shape, any real dtype, finite.
        low: what becomes 0.
        high: what becomes 255.

    Returns:
        uint8 of the same shape, 0..255.
    """
    # Single precision holds 16-bit floats exactly and 8-bit results safely; integers of 32 bits
    # and double precision need more.
    is_small = samples.dtype in (np.float16, np.float32)
    wide: npt.NDArray[Any] = samples.astype(np.float32 if is_small else np.float64)
    # Plain Python numbers leave single precision single.
    scaled = (wide - float(low)) * (255 / (high - low))
    levels: npt.NDArray[np.uint8] = np.rint(scaled.clip(0, 255)).astype(np.uint8)
    return levels


def _integers_to_uint8(
    samples: npt.NDArray[Any], bits: int, notes: list[str]
) -> npt.NDArray[np.uint8]:
    """Scale integers by their declared bit depth, never by what they contain.

    Args:
        samples: any shape; bool, unsigned or signed integers.
        bits: the declared bits of a sample.
        notes: extended by what was done.

    Returns:
        uint8 of the same shape, 0..255.
    """
    if samples.dtype.kind == "i":
        full_scale = 2 ** (bits - 1) - 1
        notes.append(f"signed {bits}-bit samples scaled by {full_scale}, negative ones black")
        return _stretch(samples, 0, full_scale)
    if bits == 8:
        return cast("npt.NDArray[np.uint8]", samples.astype(np.uint8, copy=False))
    full_scale = 2**bits - 1
    if bits > 8:
        notes.append(f"{bits}-bit samples scaled by {full_scale}")
    if bits > 16:
        return _stretch(samples, 0, full_scale)
    # A table of all values is exact and several times as fast as arithmetic on the image.
    table = _stretch(np.arange(full_scale + 1), 0, full_scale)
    return table[samples.astype(np.uint16, copy=False)]


def _floats_to_uint8(
    samples: npt.NDArray[Any], low: float, high: float, name: str, notes: list[str]
) -> npt.NDArray[np.uint8]:
    """Scale floating point samples from a range that is declared or assumed.

    Args:
        samples: any shape, float16, float32 or float64.
        low: black.
        high: white.
        name: of the file, for the error.
        notes: extended by what was done.

    Returns:
        uint8 of the same shape, 0..255; what is not a number is 0.

    Raises:
        UnsupportedImageError: more than 1 % of the samples lie outside by more than half a level,
            or are not finite: the range is another, and guessing it would falsify the image.
    """
    slack = (high - low) / 510
    outside_share = float(np.mean(~((samples >= low - slack) & (samples <= high + slack))))
    if outside_share > _MAX_OUTSIDE_SHARE:
        raise UnsupportedImageError(
            f"{name} holds floating point samples of which {outside_share:.0%} lie outside "
            f"{low:g} to {high:g} or are not finite, so its black and white are unknown. Save it "
            "with samples from 0 to 1, with SMinSampleValue and SMaxSampleValue tags, or as 8-bit."
        )
    notes.append(f"floating point samples scaled from {low:g} to {high:g}")
    if outside_share > 0:
        notes.append(f"{outside_share:.2%} of the samples were outside and are clipped")
    finite = np.nan_to_num(samples, nan=low, posinf=high, neginf=low)
    return _stretch(finite, low, high)


# Colours to RGB ------------------------------------------------------------------------------


def _over_white(
    colour: npt.NDArray[np.uint8], alpha: npt.NDArray[np.uint8], *, premultiplied: bool = False
) -> npt.NDArray[np.uint8]:
    """Lay a transparent image over white, the background of a smear.

    Args:
        colour: uint8 (H, W, 3), 0..255.
        alpha: uint8 (H, W), 0 is transparent.
        premultiplied: whether the colour is already multiplied by alpha.

    Returns:
        uint8 (H, W, 3), 0..255, rounded to nearest.
    """
    opacity = alpha[..., None].astype(np.uint16)
    blended: npt.NDArray[np.uint16]
    if premultiplied:
        blended = np.minimum(colour + (255 - opacity), 255)
    else:
        # At most 255 * 255 + 127, which 16 bits hold.
        blended = (colour * opacity + 255 * (255 - opacity) + 127) // 255
    return blended.astype(np.uint8)


def _to_rgb(image: Image.Image, notes: list[str]) -> npt.NDArray[np.uint8]:
    """Convert a loaded 8-bit Pillow image of any mode to uint8 (H, W, 3) RGB."""
    mode = image.mode
    has_alpha = mode in {"LA", "La", "PA", "RGBA", "RGBa"}
    if has_alpha or "transparency" in image.info:
        straight = {"La": "LA", "RGBa": "RGBA"}.get(mode, mode)
        rgba = np.asarray(image.convert(straight).convert("RGBA"))
        notes.append("transparency laid over white")
        return _over_white(rgba[..., :3], rgba[..., 3])
    if mode == "RGB":
        return np.asarray(image)
    if mode == "CMYK":
        notes.append("CMYK converted to RGB without a colour profile")
    if mode == "LAB":
        notes.append("CIELAB converted to sRGB")
        converted = ImageCms.profileToProfile(
            image,
            ImageCms.createProfile("LAB"),
            ImageCms.createProfile("sRGB"),
            outputMode="RGB",
        )
        assert converted is not None  # None only when converting in place
        return np.asarray(converted)
    return np.asarray(image.convert("RGB"))


def _grey_to_rgb(grey: npt.NDArray[np.uint8]) -> npt.NDArray[np.uint8]:
    """Repeat uint8 (H, W) to (H, W, 3)."""
    return np.repeat(grey[..., None], 3, axis=2)


# All formats but TIFF ------------------------------------------------------------------------


def _read_by_pillow(
    handle: BufferedReader, name: str, max_pixels: int, page: int, notes: list[str]
) -> tuple[npt.NDArray[np.uint8], int | None]:
    """Read one frame through Pillow; returns uint8 (H, W, 3) RGB as stored, and its orientation."""
    with Image.open(handle, formats=_PILLOW_FORMATS) as image:
        _check_size(name, *image.size, max_pixels)
        # What Pillow calls the frames of a PSD are its layers; its first image is all of them.
        frame_count = 1 if image.format == "PSD" else getattr(image, "n_frames", 1)
        _check_page(name, page, frame_count, notes)
        if page:
            image.seek(page)
            _check_size(name, *image.size, max_pixels)
        if image.format == "JPEG" and image.mode == "RGB":
            handle.seek(0)
            if (rgb := _plain_jpeg(handle.read(), image.size)) is not None:
                return rgb, _orientation(image)
        image.load()
        orientation = _orientation(image)
        return _pillow_to_rgb(image, name, notes), orientation


def _plain_jpeg(data: bytes, size_wh: tuple[int, int]) -> npt.NDArray[np.uint8] | None:
    """Decode the JPEG that cameras write, in half of Pillow's time and to the same pixels.

    Args:
        data: the file.
        size_wh: what its header says of its size.

    Returns:
        uint8 (H, W, 3) RGB as stored; None for all that is not quite in order or ordinary, which
        Pillow then takes or refuses.
    """
    try:
        if simplejpeg.decode_jpeg_header(data)[2] != "YCbCr":
            return None
        rgb: npt.NDArray[np.uint8] = simplejpeg.decode_jpeg(data)
    except ValueError:
        return None
    return rgb if rgb.shape[1::-1] == size_wh else None


def _pillow_to_rgb(image: Image.Image, name: str, notes: list[str]) -> npt.NDArray[np.uint8]:
    """Turn a loaded Pillow image into uint8 (H, W, 3) RGB, deep samples scaled."""
    if image.mode == "F":
        return _grey_to_rgb(_floats_to_uint8(np.asarray(image), 0.0, 1.0, name, notes))
    if image.mode.startswith("I"):
        if image.format not in _FULL_SCALE_65535:
            raise _unsupported(name, f"deep integer samples in the format {image.format}")
        samples = np.asarray(image).astype(np.uint16)
        return _grey_to_rgb(_integers_to_uint8(samples, 16, notes))
    return _to_rgb(image, notes)


def _orientation(image: Image.Image) -> int | None:
    """The orientation that the metadata declare: 1 if none, None if they cannot be read."""
    try:
        exif = image.getexif()
        value = exif.get(_ORIENTATION, 1)
        is_damaged = bool(image.info.get("exif")) and not exif
    except Exception:  # noqa: BLE001 - damaged metadata raise anything; the pixels are still sound
        return None
    return int(value) if not is_damaged and value in range(1, 9) else None


# TIFF ----------------------------------------------------------------------------------------


def _read_tiff(
    handle: BufferedReader, name: str, max_pixels: int, page: int, notes: list[str]
) -> tuple[npt.NDArray[np.uint8], int | None]:
    """Read one page of a TIFF; returns uint8 (H, W, 3) RGB as stored, and its orientation."""
    with tifffile.TiffFile(handle) as tiff:
        if not len(tiff.pages):
            raise tifffile.TiffFileError("it has no page")
        _check_page(name, page, len(tiff.pages), notes)
        ifd = cast("tifffile.TiffPage", tiff.pages[page])
        _check_size(name, ifd.imagewidth, ifd.imagelength, max_pixels)
        _check_layout(ifd, name, max_pixels, os.fstat(handle.fileno()).st_size)
        # (planes, depth, H, W, samples): one of planes and samples is 1.
        stored = ifd.asarray(squeeze=False, maxworkers=1)[:, 0]
        samples = np.moveaxis(stored, 0, -1).reshape(*stored.shape[1:3], -1)
        rgb = _tiff_to_rgb(ifd, samples, name, notes)
        orientation = ifd.tags.valueof(_ORIENTATION, default=1)
    return rgb, orientation if orientation in range(1, 9) else None


def _check_layout(ifd: tifffile.TiffPage, name: str, max_pixels: int, size_bytes: int) -> None:
    """Refuse what would be decoded wrongly, in part, or at a size that nobody declared."""
    if ifd.samplesperpixel > 5:
        raise _unsupported(name, f"{ifd.samplesperpixel} samples per pixel")
    if ifd.imagedepth != 1:
        raise _unsupported(name, f"a volume of {ifd.imagedepth} planes in one page")
    if ifd.dtype is None or np.ndim(ifd.bitspersample):  # such as (5, 6, 5)
        raise _unsupported(name, f"samples of {ifd.bitspersample} bits, format {ifd.sampleformat}")
    if ifd.samplesperpixel > 1 and _BITS_PER_SAMPLE not in ifd.tags:
        raise UnreadableImageError(
            f"{name} is damaged: the tag with its bit depth cannot be read. Export it again."
        )
    if ifd.is_tiled:
        _check_size(name, ifd.tilewidth, ifd.tilelength, max(max_pixels, 2**20))
    spans = list(zip(ifd.dataoffsets, ifd.databytecounts, strict=False))
    if ifd.is_contiguous:
        spans = [(ifd.dataoffsets[0], ifd.nbytes)]
    elif len(spans) < np.prod(ifd.chunked) or not all(offset and count for offset, count in spans):
        raise UnreadableImageError(
            f"{name} is damaged: some of its strips or tiles are missing. Export it again."
        )
    if any(offset + count > size_bytes for offset, count in spans):
        raise TruncatedImageError(
            f"{name} ends before its image does. "
            "If it is still being copied, wait; otherwise copy it again."
        )


def _tiff_to_rgb(
    ifd: tifffile.TiffPage, samples: npt.NDArray[Any], name: str, notes: list[str]
) -> npt.NDArray[np.uint8]:
    """Turn the samples of a page into RGB by its photometric interpretation.

    Args:
        ifd: the page.
        samples: (H, W, S) as stored.
        name: of the file, for errors.
        notes: extended by what was done.

    Returns:
        uint8 (H, W, 3) RGB, 0..255, as stored (orientation not yet applied).

    Raises:
        UnsupportedImageError: there is no rule for the combination.
    """
    photometric = ifd.photometric
    colour_count = {0: 1, 1: 1, 2: 3, 3: 1, 5: 4, 6: 3, 8: 3}.get(int(photometric))
    kind = f"{samples.shape[2]} samples of {ifd.bitspersample} bits as {_label(photometric)}"
    if colour_count is None or samples.dtype.kind not in "buif":
        raise _unsupported(name, kind)
    if photometric == 3:
        return _palette_to_rgb(ifd, samples, name)
    levels = _samples_to_uint8(ifd, samples, name, notes)
    colour, extra = levels[..., :colour_count], levels[..., colour_count:]
    has_alpha = extra.shape[2] == 1 and ifd.extrasamples[:1] in {(1,), (2,)}
    # A fourth channel beside RGB leaves the colours what they are; a second grey channel is
    # another image, and nobody says which of the two is meant.
    is_ignorable = extra.shape[2] == 1 and photometric == 2
    if colour.shape[2] != colour_count or (extra.shape[2] and not (has_alpha or is_ignorable)):
        raise _unsupported(name, kind)
    if photometric in {5, 6, 8}:
        if has_alpha or samples.dtype.kind != "u":
            raise _unsupported(name, kind)
        return _colour_space_to_rgb(ifd, colour, name, kind, notes)
    if photometric == 0:
        colour = 255 - colour
    rgb = colour if colour_count == 3 else _grey_to_rgb(colour[..., 0])
    if has_alpha:
        notes.append("transparency laid over white")
        return _over_white(rgb, extra[..., 0], premultiplied=ifd.extrasamples[0] == 1)
    if extra.shape[2]:
        notes.append("an extra channel left out")
    return rgb


def _samples_to_uint8(
    ifd: tifffile.TiffPage, samples: npt.NDArray[Any], name: str, notes: list[str]
) -> npt.NDArray[np.uint8]:
    """Scale samples of any shape to uint8, 0..255, by the type and range that the tags declare."""
    if samples.dtype.kind != "f":
        return _integers_to_uint8(samples, int(ifd.bitspersample), notes)
    low, high = 0.0, 1.0
    declared = [np.atleast_1d(ifd.tags.valueof(tag, default=np.nan)) for tag in (340, 341)]
    smallest, largest = float(np.min(declared[0])), float(np.max(declared[1]))
    if np.isfinite(smallest) and np.isfinite(largest) and smallest < largest:
        low, high = smallest, largest
    return _floats_to_uint8(samples, low, high, name, notes)


def _palette_to_rgb(
    ifd: tifffile.TiffPage, samples: npt.NDArray[Any], name: str
) -> npt.NDArray[np.uint8]:
    """Look up (H, W, 1) indices in the page's colour map of 16-bit entries."""
    if ifd.colormap is None or samples.shape[2] != 1 or samples.dtype.kind not in "bu":
        raise _unsupported(name, "palette indices without a usable palette")
    # The upper byte: writers make the 16 bits by 256 * v as often as by 257 * v, and this is v
    # for both.
    palette = (ifd.colormap // 256).astype(np.uint8).T
    return palette[samples[..., 0].astype(np.intp)]


def _colour_space_to_rgb(
    ifd: tifffile.TiffPage,
    levels: npt.NDArray[np.uint8],
    name: str,
    kind: str,
    notes: list[str],
) -> npt.NDArray[np.uint8]:
    """Convert uint8 (H, W, 3 or 4) CMYK, YCbCr or CIELAB samples to RGB through Pillow."""
    if ifd.photometric == 6 and ifd.compression in _TIFF_JPEG:
        return levels  # the JPEG decoder has converted it
    if ifd.photometric == 6 and ifd.compression not in _TIFF_PLAIN:
        raise _unsupported(name, f"{kind}, compressed as {_label(ifd.compression)}")
    if ifd.photometric == 5 and ifd.tags.valueof(332, default=1) != 1:
        raise _unsupported(name, "four inks that are not CMYK")
    if ifd.photometric == 8 and ifd.bitspersample != 8:
        raise _unsupported(name, kind)
    mode = {5: "CMYK", 6: "YCbCr", 8: "LAB"}[int(ifd.photometric)]
    height_px, width_px = levels.shape[:2]
    image = Image.frombytes(mode, (width_px, height_px), levels.tobytes(), "raw", mode)
    return _to_rgb(image, notes)


def _label(code: int) -> str:
    """The name of a TIFF constant where it has one."""
    return str(getattr(code, "name", code))
