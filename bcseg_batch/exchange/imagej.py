"""Cells as ImageJ's ROIs, and what was drawn in ImageJ or Fiji back from them.

Corners of ImageJ's area selections are corners of pixels, as ours are, so that the selections hold
exactly the pixels of the cells.
"""

from __future__ import annotations

import io
import zipfile
from collections.abc import Iterator
from pathlib import PurePosixPath

import numpy as np
from roifile import ROI_OPTIONS, ROI_SUBTYPE, ROI_TYPE, ImagejRoi

from bcseg_batch.exchange.cells import KIND_COLOURS, ImageCells, kind_name
from bcseg_batch.exchange.shapes import Floats, Shape, ellipse
from bcseg_batch.segment.cells import CellKind
from bcseg_batch.segment.outlines import Points, Polygon, cell_outlines

SUFFIX = ".zip"

_OUTLINED = (ROI_TYPE.POLYGON, ROI_TYPE.FREEHAND, ROI_TYPE.TRACED)
# What Java's PathIterator calls SEG_MOVETO, SEG_LINETO and SEG_CLOSE, as ImageJ stores paths.
_MOVE, _LINE, _CLOSE = 0.0, 1.0, 4.0
# The same cells give the same file.
_TIME_OF_ENTRIES = (1980, 1, 1, 0, 0, 0)


def encode_rois(cells: ImageCells) -> bytes:
    """Write the cells of one image as a set of ROIs, which the ROI Manager opens.

    Each is called `<label>-<kind>`, has the kind's number as its group (1 red cell, 2 white cell, 3
    platelet), its colour, and the properties `label` and `kind`. It belongs to no slice, so that
    ImageJ shows it on a photograph and on every page of a file that has more.

    Args:
        cells: of the image.

    Returns:
        A ZIP file with an entry for each cell. A cell in one piece is a traced outline, as the wand
        makes it; one with holes or in pieces is a composite.
    """
    outlines = cell_outlines(cells.labels)
    digits = max(4, len(str(max(outlines, default=0))))
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as archive:
        for label, kind, _ in cells.items():
            roi = _roi(outlines[label])
            roi.name = f"{label:0{digits}}-{kind_name(kind)}"
            roi.group = int(kind)
            roi.stroke_color = bytes((255, *KIND_COLOURS[kind]))
            roi.properties = {"label": label, "kind": kind_name(kind)}
            entry = zipfile.ZipInfo(f"{roi.name}.roi", _TIME_OF_ENTRIES)
            entry.compress_type = zipfile.ZIP_DEFLATED
            archive.writestr(entry, roi.tobytes())
    return packed.getvalue()


def _roi(polygons: list[Polygon]) -> ImagejRoi:
    if len(polygons) == 1 and not polygons[0].holes:
        # It keeps the corners as floats too where the file's integers are too small for them.
        roi = ImagejRoi.frompoints(polygons[0].exterior)
        roi.roitype = ROI_TYPE.TRACED
        roi.options &= ROI_OPTIONS.SUB_PIXEL_RESOLUTION
    else:
        rings = [ring for polygon in polygons for ring in (polygon.exterior, *polygon.holes)]
        path = [number for ring in rings for number in _path(ring)]
        roi = ImagejRoi(
            roitype=ROI_TYPE.RECT,
            multi_coordinates=np.array(path, np.float32),
            shape_roi_size=len(path),
        )
    corners = np.concatenate([polygon.exterior for polygon in polygons])
    (roi.left, roi.top), (roi.right, roi.bottom) = (
        corners.min(axis=0).tolist(),
        corners.max(axis=0).tolist(),
    )
    return roi


def _path(ring: Points) -> Iterator[float]:
    command = _MOVE
    for x, y in ring.tolist():
        yield from (command, float(x), float(y))
        command = _LINE
    yield _CLOSE


def decode_rois(data: bytes) -> list[Shape]:
    """Read the areas of a set of ROIs, as the ROI Manager's "Save..." writes it, or of one ROI.

    Args:
        data: the ZIP file, or the .roi file.

    Returns:
        Shapes in the order of the file. Their kinds follow from their groups, as `encode_rois` has
        set them; ROIs of no group have none.

    Raises:
        ValueError: it is no such file, or a ROI is no area or of an unknown group.
    """
    if not data.startswith(b"PK"):
        return [_shape(data, "the ROI")]
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            rois = [
                (PurePosixPath(entry).stem, archive.read(entry))
                for entry in archive.namelist()
                if entry.lower().endswith(".roi")
            ]
    except Exception as error:  # zipfile answers damaged bytes with exceptions of many kinds
        raise ValueError(f"it is no set of ROIs ({error})") from error
    return [_shape(content, name) for name, content in rois]


def _shape(data: bytes, name: str) -> Shape:
    try:
        roi = ImagejRoi.frombytes(data)
        if roi.group not in {0, *CellKind}:
            groups = ", ".join(f"{kind.value} {kind_name(kind)}" for kind in CellKind)
            raise ValueError(f"its group is {roi.group}: the groups are {groups}, or none")
        return Shape(name, _rings(roi), CellKind(roi.group) if roi.group else None)
    except Exception as error:  # roifile reads without checks: damaged bytes raise anything
        raise ValueError(f"{name}: {error}") from error


def _rings(roi: ImagejRoi) -> tuple[Floats, ...]:
    if roi.composite:
        try:
            return tuple(np.asarray(ring, np.float64) for ring in roi.coordinates(multi=True))
        except NotImplementedError as error:
            raise ValueError(
                "it has curved edges: save it as a mask instead (Edit > Selection > Create Mask)"
            ) from error
    if roi.roitype in {ROI_TYPE.RECT, ROI_TYPE.OVAL} and roi.subtype is not ROI_SUBTYPE.TEXT:
        left, top, right, bottom = map(float, (roi.left, roi.top, roi.right, roi.bottom))
        if roi.subpixelrect:
            left, top, right, bottom = roi.xd, roi.yd, roi.xd + roi.widthd, roi.yd + roi.heightd
        if roi.roitype is ROI_TYPE.OVAL:
            return (ellipse(left, top, right, bottom),)
        return (np.array([[left, top], [right, top], [right, bottom], [left, bottom]]),)
    if roi.roitype in _OUTLINED and roi.n_coordinates > 2:
        return (np.asarray(roi.coordinates(), np.float64),)
    raise ValueError(
        f"it is a {roi.roitype.name.lower()} and no area: delete it, or draw around it"
    )
