"""The table beside a label image that CellProfiler takes; the image is `store.encode`'s."""

from __future__ import annotations

import csv
import io

from bcseg_batch.exchange.cells import ImageCells

LABELS_ENDING = "_labels.tif"
OBJECTS_ENDING = "_objects.csv"
TABLE_ENDINGS = (OBJECTS_ENDING, "_cells.csv")
"""Of the tables that `read_kinds` reads: an export's and a run's own."""

# By the names that CellProfiler's ExportToSpreadsheet gives them; docs/outputs.md says what they
# are. What CellProfiler does not measure keeps its own name.
_COLUMNS = {
    "image": "FileName",
    "label": "ObjectNumber",
    "kind": "kind",
    "centroid-1": "Location_Center_X",
    "centroid-0": "Location_Center_Y",
    "bbox-1": "AreaShape_BoundingBoxMinimum_X",
    "bbox-3": "AreaShape_BoundingBoxMaximum_X",
    "bbox-0": "AreaShape_BoundingBoxMinimum_Y",
    "bbox-2": "AreaShape_BoundingBoxMaximum_Y",
    "area": "AreaShape_Area",
    "perimeter": "AreaShape_Perimeter",
    "equivalent_diameter_area": "AreaShape_EquivalentDiameter",
    "eccentricity": "AreaShape_Eccentricity",
    "solidity": "AreaShape_Solidity",
    "form_factor": "AreaShape_FormFactor",
    "mean_intensity-0": "Intensity_MeanIntensity_Red",
    "mean_intensity-1": "Intensity_MeanIntensity_Green",
    "mean_intensity-2": "Intensity_MeanIntensity_Blue",
    "touches_border": "touches_border",
    "area_um2": "area_um2",
    "perimeter_um": "perimeter_um",
    "equivalent_diameter_area_um": "equivalent_diameter_area_um",
}
# CellProfiler's intensities go from 0 to 1.
_INTENSITIES = ("mean_intensity-0", "mean_intensity-1", "mean_intensity-2")


def encode_objects(cells: ImageCells) -> bytes:
    """Write the table of one image's cells with CellProfiler's names for the columns.

    `ObjectNumber` is the number in the label image, and CellProfiler's where it loads that as
    objects; with `FileName` it joins this table to CellProfiler's.

    Args:
        cells: of the image.

    Returns:
        CSV, UTF-8, one header.
    """
    text = io.StringIO(newline="")
    writer = csv.writer(text)
    writer.writerow(_COLUMNS.values())
    for row in cells.rows:
        scaled = {name: f"{float(row[name]) / 255:.6g}" for name in _INTENSITIES if row.get(name)}
        values = {**row, "image": cells.image, **scaled}
        writer.writerow([values.get(name, "") for name in _COLUMNS])
    return text.getvalue().encode("utf-8", errors="backslashreplace")


def read_kinds(data: bytes) -> dict[int, str]:
    """Read each cell's kind back from a table, that of a run or of `encode_objects`.

    Args:
        data: the CSV file.

    Returns:
        The name of its kind for each label.

    Raises:
        ValueError: it is no such table.
    """
    rows = csv.DictReader(io.StringIO(data.decode("utf-8"), newline=""))
    try:
        return {int(row.get("ObjectNumber") or row["label"]): row["kind"] for row in rows}
    except (KeyError, csv.Error) as error:
        raise ValueError(f"it is no table of cells ({error})") from error
