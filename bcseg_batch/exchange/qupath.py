"""Cells as QuPath's GeoJSON, and what was drawn in QuPath back from it.

The form is the one that QuPath itself writes and reads since version 0.4, in `QuPathTypeAdapters`,
`ROITypeAdapters` and `GsonTools` (github.com/qupath/qupath, qupath-core/src/main/java/qupath/lib/
io): a FeatureCollection of Features with `id` (a UUID), `geometry` in pixels of the full image with
the origin at its top left corner, and the properties `objectType`, `name`, `classification` (`name`
and `color`) and `measurements` (one object). The older `object_type`, lists of measurements and
`colorRGB` are read with a warning or as another thing, and are not written.
"""

from __future__ import annotations

import json
import math
import uuid
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from bcseg_batch.exchange.cells import KIND_COLOURS, ImageCells, kind_name, kind_named
from bcseg_batch.exchange.shapes import Floats, Shape, ellipse
from bcseg_batch.segment.cells import CellKind
from bcseg_batch.segment.outlines import Points, Polygon, cell_outlines

SUFFIX = ".geojson"

# With units in the names, as QuPath's own measurements have them. Places and boxes are left out:
# QuPath shows those of the outline.
_MEASUREMENTS = {
    "area": "Area px^2",
    "perimeter": "Perimeter px",
    "equivalent_diameter_area": "Equivalent diameter px",
    "area_um2": "Area \u00b5m^2",
    "perimeter_um": "Perimeter \u00b5m",
    "equivalent_diameter_area_um": "Equivalent diameter \u00b5m",
    "eccentricity": "Eccentricity",
    "solidity": "Solidity",
    "form_factor": "Form factor",
    "mean_intensity-0": "Mean red",
    "mean_intensity-1": "Mean green",
    "mean_intensity-2": "Mean blue",
    "touches_border": "Touches border",
}
# The same cell has the same UUID in every export.
_NAMESPACE = uuid.uuid5(uuid.NAMESPACE_URL, "https://qupath.github.io/bcseg-batch")


def encode_geojson(cells: ImageCells, *, editable: bool = False) -> bytes:
    """Write the cells of one image for QuPath.

    Args:
        cells: of the image.
        editable: as annotations, which QuPath lets a hand correct; else as cells and, for
            platelets, as detections, of which it holds many more.

    Returns:
        GeoJSON, ASCII.
    """
    outlines = cell_outlines(cells.labels)
    features = [
        {
            "type": "Feature",
            "id": str(uuid.uuid5(_NAMESPACE, f"{cells.image!a} {label}")),
            "geometry": _geometry(outlines[label]),
            "properties": {
                "objectType": _object_type(kind, editable=editable),
                "name": str(label),
                "classification": {"name": kind_name(kind), "color": list(KIND_COLOURS[kind])},
                "measurements": _measurements(row),
            },
        }
        for label, kind, row in cells.items()
    ]
    collection = {"type": "FeatureCollection", "features": features}
    return json.dumps(collection, separators=(",", ":"), allow_nan=False).encode("ascii")


def _object_type(kind: CellKind, *, editable: bool) -> str:
    if editable:
        return "annotation"
    return "detection" if kind is CellKind.PLATELET else "cell"


def _geometry(polygons: list[Polygon]) -> dict[str, Any]:
    parts = [[_closed(ring) for ring in (p.exterior, *p.holes)] for p in polygons]
    if len(parts) == 1:
        return {"type": "Polygon", "coordinates": parts[0]}
    return {"type": "MultiPolygon", "coordinates": parts}


def _closed(ring: Points) -> list[list[int]]:
    corners: list[list[int]] = ring.tolist()
    return [*corners, corners[0]]


def _measurements(row: Mapping[str, str]) -> dict[str, float]:
    values = {title: row.get(name) for name, title in _MEASUREMENTS.items()}
    numbers = {title: float(text) for title, text in values.items() if text}
    return {title: value for title, value in numbers.items() if math.isfinite(value)}


def decode_geojson(data: bytes) -> list[Shape]:
    """Read the areas that QuPath has saved, by "Export objects as GeoJSON" or a script.

    Objects of every type count (annotations, detections, cells), those within others too. Left out
    are those whose class QuPath ignores, such as `Ignore*` or `Region*`: their names end in `*`.

    Args:
        data: the file.

    Returns:
        Shapes, with their kinds where they are classified.

    Raises:
        ValueError: it is no GeoJSON, or an object is no area or has an unknown class.
    """
    try:
        tree = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"it is no GeoJSON ({error})") from error
    try:
        return [
            shape
            for number, feature in enumerate(_features(tree), 1)
            if (shape := _shape(feature, number)) is not None
        ]
    except (KeyError, TypeError, AttributeError, IndexError, RecursionError) as error:
        raise ValueError(f"it is no GeoJSON of QuPath ({error!r})") from error


def _features(tree: Any) -> Iterator[dict[str, Any]]:
    """Give the features of a collection, a list or one alone, with those within them."""
    if isinstance(tree, dict) and tree.get("type") == "FeatureCollection":
        tree = tree["features"]
    for feature in tree if isinstance(tree, list) else [tree]:
        properties = feature.get("properties") or {}
        if feature.get("geometry") is not None and properties.get("objectType") != "root":
            yield feature
        yield from _features(properties.get("childObjects") or [])


def _shape(feature: dict[str, Any], number: int) -> Shape | None:
    properties = feature.get("properties") or {}
    name = f"object {number}" + (f" ({properties['name']})" if properties.get("name") else "")
    class_name = _class_name(properties.get("classification"))
    if class_name is not None and class_name.endswith("*"):
        return None
    try:
        kind = None if class_name is None else kind_named(class_name)
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from error
    return Shape(name, _rings(feature["geometry"], name), kind)


def _class_name(classification: Any) -> str | None:
    """Give the name of a class, which QuPath writes as a text or an object; None for no class."""
    if isinstance(classification, dict):
        names = classification.get("names") or [classification.get("name")]
        classification = None if names == [None] else ": ".join(names)
    return classification or None


def _rings(geometry: dict[str, Any], name: str) -> tuple[Floats, ...]:
    if geometry["type"] == "Polygon":
        polygons = [geometry["coordinates"]]
    elif geometry["type"] == "MultiPolygon":
        polygons = geometry["coordinates"]
    else:
        raise ValueError(
            f"{name} is a {geometry['type']} and no area: delete it, or draw around it"
        )
    rings = tuple(np.array(ring, np.float64)[:, :2] for rings in polygons for ring in rings)
    if not rings:
        raise ValueError(f"{name} has no outline")
    if geometry.get("isEllipse"):
        (left, top), (right, bottom) = rings[0].min(axis=0), rings[0].max(axis=0)
        return (ellipse(left, top, right, bottom),)
    return rings
