"""What is exported for other programs is read back by their libraries as the same cells."""

from __future__ import annotations

import csv
import io
import json
import subprocess
import sys
import uuid
import zipfile
from pathlib import Path

import imageio.v3 as imageio
import numpy as np
import numpy.typing as npt
import pytest
import roifile
import shapely
import tifffile
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from PIL import Image
from pycocotools.coco import COCO
from skimage.draw import polygon2mask
from skimage.io import imread

from bcseg_batch.exchange import coco, imagej, label_images, qupath
from bcseg_batch.exchange.cells import ImageCells, kind_named
from bcseg_batch.exchange.shapes import Shape, ellipse, fill, label_shapes
from bcseg_batch.segment.cells import CellKind, Cells
from bcseg_batch.segment.measure import measure_cells
from bcseg_batch.store.cell_table import encode_cells
from bcseg_batch.store.encode import encode_labels
from bcseg_batch.store.tags import Tags

Labels = npt.NDArray[np.int32]

KINDS = ("red_cell", "white_cell", "platelet")


def cells_of(
    labels: Labels, *, image: str = "night/a.jpg", pixel_size_um: float | None = None
) -> ImageCells:
    """Measure labels as a run does; the kinds take turns."""
    count = int(labels.max(initial=0))
    kinds = np.array([1 + i % 3 for i in range(count)], np.uint8)
    found = Cells(labels, kinds, np.zeros(count, bool))
    pixels = np.random.default_rng(0).integers(0, 256, (*labels.shape, 3), dtype=np.uint8)
    table = measure_cells(found, pixels, pixel_size_um=pixel_size_um)
    text = encode_cells(image, list(table), table).decode()
    rows = tuple(csv.DictReader(io.StringIO(text, newline="")))
    return ImageCells(image, labels, rows, pixel_size_um)


def a_few_cells() -> Labels:
    """A disc with a hole and an island in it, two that touch, one in two pieces, one cut off."""
    labels = np.zeros((60, 90), np.int32)
    y, x = np.mgrid[:60, :90]
    from_middle = np.hypot(y - 25, x - 25)
    labels[from_middle < 18] = 1
    labels[from_middle < 8] = 0
    labels[from_middle < 3] = 1
    labels[5:20, 50:60] = 2
    labels[5:20, 60:75] = 3
    labels[40:44, 50:54] = labels[44:48, 54:58] = 4
    labels[50:, 80:] = 5
    return labels


def without_gaps(labels: Labels) -> Labels:
    return np.unique(labels, return_inverse=True)[1].reshape(labels.shape).astype(np.int32)


any_labels = arrays(np.int32, (8, 9), elements=st.integers(0, 4)).map(
    lambda labels: without_gaps(np.pad(labels, 1))
)


# Shapes --------------------------------------------------------------------------------------


@settings(deadline=None)
@given(any_labels)
def test_pixels_come_back_from_qupath_and_imagej(labels: Labels) -> None:
    cells = cells_of(labels)
    for shapes in (
        qupath.decode_geojson(qupath.encode_geojson(cells)),
        imagej.decode_rois(imagej.encode_rois(cells)),
    ):
        back, shared = label_shapes(shapes, labels.shape)
        np.testing.assert_array_equal(back, labels)
        assert shared == 0
        assert [shape.kind for shape in shapes] == [kind for _, kind, _ in cells.items()]


@settings(deadline=None)
@given(arrays(np.float64, (6, 2), elements=st.floats(-3, 15).map(lambda v: round(v, 2))))
def test_a_pixel_is_inside_where_its_middle_is(corners: npt.NDArray[np.float64]) -> None:
    polygon = shapely.Polygon(corners)
    if not polygon.is_valid:
        return
    y, x = np.mgrid[:12, :14] + 0.5
    # A middle right on an edge may belong to either side.
    is_clear = shapely.distance(polygon.boundary, shapely.points(x, y)) > 1e-9
    expected = shapely.contains_xy(polygon, x, y)
    np.testing.assert_array_equal(fill([corners], (12, 14))[is_clear], expected[is_clear])


def test_an_ellipse_fills_its_box() -> None:
    inside = fill([ellipse(2, 3, 42, 23)], (30, 50))
    rows, columns = np.nonzero(inside)
    assert (rows.min(), rows.max(), columns.min(), columns.max()) == (3, 22, 2, 41)
    assert inside.sum() == pytest.approx(np.pi * 20 * 10, rel=0.01)


def test_what_reaches_outside_was_drawn_on_another_picture() -> None:
    square = np.array([[0.0, 0], [30, 0], [30, 5], [0, 5]])
    with pytest.raises(ValueError, match=r"outside of the picture of 20x10"):
        label_shapes([Shape("object 1", (square,))], (10, 20))
    with pytest.raises(ValueError, match="object 2 encloses no pixel"):
        label_shapes([Shape("object 2", (square / 100,))], (10, 20))


def test_of_two_that_overlap_the_later_has_the_pixels() -> None:
    square = np.array([[0.0, 0], [4, 0], [4, 4], [0, 4]])
    labels, shared = label_shapes([Shape("a", (square,)), Shape("b", (square + 2,))], (8, 8))
    assert shared == 4
    assert (np.count_nonzero(labels == 1), np.count_nonzero(labels == 2)) == (12, 16)


@pytest.mark.parametrize("name", ["red_cell", "Red cell", "RED CELLS", "red-cell"])
def test_kinds_go_by_any_spelling(name: str) -> None:
    assert kind_named(name) is CellKind.RED_CELL


def test_a_table_of_other_cells_is_refused() -> None:
    cells = cells_of(a_few_cells())
    with pytest.raises(ValueError, match="do not name the same cells"):
        ImageCells("a.jpg", cells.labels, cells.rows[:-1])


# QuPath --------------------------------------------------------------------------------------


def test_geojson_has_what_qupath_writes_itself() -> None:
    cells = cells_of(a_few_cells(), pixel_size_um=0.1)
    tree = json.loads(qupath.encode_geojson(cells))
    assert tree["type"] == "FeatureCollection"
    assert len({uuid.UUID(feature["id"]) for feature in tree["features"]}) == 5
    first = tree["features"][0]
    assert set(first) == {"type", "id", "geometry", "properties"}
    assert set(first["properties"]) == {"objectType", "name", "classification", "measurements"}
    assert [f["properties"]["objectType"] for f in tree["features"][:3]] == [
        "cell",
        "cell",
        "detection",
    ]
    assert first["properties"]["classification"] == {"name": "red_cell", "color": [230, 25, 75]}
    measured = first["properties"]["measurements"]
    area = int(np.count_nonzero(cells.labels == 1))
    assert measured["Area px^2"] == area
    assert measured["Area \u00b5m^2"] == pytest.approx(area / 100, rel=1e-4)
    assert all(isinstance(value, float) for value in measured.values())


def test_geometries_are_valid_and_as_large_as_the_cells() -> None:
    cells = cells_of(a_few_cells())
    for feature in json.loads(qupath.encode_geojson(cells))["features"]:
        geometry = shapely.from_geojson(json.dumps(feature["geometry"]))
        assert geometry.is_valid
        label = int(feature["properties"]["name"])
        assert geometry.area == np.count_nonzero(cells.labels == label)
        rings = np.concatenate([np.ravel(geometry.bounds)])
        assert rings.min() >= 0
    kinds = [
        feature["geometry"]["type"]
        for feature in json.loads(qupath.encode_geojson(cells))["features"]
    ]
    assert kinds == ["MultiPolygon", "Polygon", "Polygon", "MultiPolygon", "Polygon"]


def test_annotations_can_be_asked_for_to_correct_them() -> None:
    tree = json.loads(qupath.encode_geojson(cells_of(a_few_cells()), editable=True))
    assert {f["properties"]["objectType"] for f in tree["features"]} == {"annotation"}


def test_without_a_pixel_size_there_are_no_micrometres() -> None:
    tree = json.loads(qupath.encode_geojson(cells_of(a_few_cells())))
    assert not [
        name for name in tree["features"][0]["properties"]["measurements"] if "\u00b5" in name
    ]


def square(left: int = 2, **properties: object) -> dict[str, object]:
    ring = [[left, 2], [left + 4, 2], [left + 4, 6], [left, 6], [left, 2]]
    geometry = {"type": "Polygon", "coordinates": [ring]}
    return {"type": "Feature", "geometry": geometry, "properties": properties}


def test_geojson_is_read_in_every_form_that_qupath_saves() -> None:
    nested = square(1, childObjects=[square(9)])
    for tree, count in (
        ({"type": "FeatureCollection", "features": [square(), square(8)]}, 2),
        ([square(), square(8)], 2),
        (square(), 1),
        ({"type": "FeatureCollection", "features": [nested]}, 2),
        ([{**square(), "geometry": None, "properties": {"objectType": "root"}}], 0),
        ([square(classification={"name": "Ignore*"}), square()], 1),
    ):
        assert len(qupath.decode_geojson(json.dumps(tree).encode())) == count
    for classification, kind in (
        ("White cell", CellKind.WHITE_CELL),
        ({"name": "platelet", "color": [1, 2, 3]}, CellKind.PLATELET),
        ({"names": ["red_cell"]}, CellKind.RED_CELL),
        (None, None),
        ({}, None),
    ):
        (shape,) = qupath.decode_geojson(json.dumps(square(classification=classification)).encode())
        assert shape.kind is kind


def test_an_ellipse_of_qupath_is_one_again() -> None:
    feature = square()
    feature["geometry"]["isEllipse"] = True  # type: ignore[index]
    (shape,) = qupath.decode_geojson(json.dumps(feature).encode())
    assert fill(shape.rings, (10, 10)).sum() == 12  # of 16: without the corners


@pytest.mark.parametrize(
    ("data", "match"),
    [
        (b"\x00\xff", "no GeoJSON"),
        (b"[1]", "no GeoJSON of QuPath"),
        (b'{"type": "FeatureCollection"}', "no GeoJSON of QuPath"),
        (json.dumps(square(classification="Tumor")).encode(), "object 1: there is no kind 'Tumor'"),
        (
            b'{"geometry": {"type": "LineString", "coordinates": [[0, 0], [1, 1]]}}',
            "object 1 is a LineString and no area",
        ),
    ],
)
def test_what_is_no_area_is_refused(data: bytes, match: str) -> None:
    with pytest.raises(ValueError, match=match):
        qupath.decode_geojson(data)


# ImageJ --------------------------------------------------------------------------------------


def rois_of(cells: ImageCells, folder: Path) -> list[roifile.ImagejRoi]:
    path = folder / "set.zip"
    path.write_bytes(imagej.encode_rois(cells))
    rois = roifile.roiread(path)
    assert isinstance(rois, list)
    return rois


def test_rois_have_name_group_colour_and_properties(tmp_path: Path) -> None:
    rois = rois_of(cells_of(a_few_cells()), tmp_path)
    assert [roi.name for roi in rois] == [
        f"{label:04}-{KINDS[(label - 1) % 3]}" for label in range(1, 6)
    ]
    assert [roi.group for roi in rois] == [1, 2, 3, 1, 2]
    assert rois[2].properties == {"label": 3, "kind": "platelet"}
    assert rois[1].hexcolor(rois[1].stroke_color) == "#0082c8"
    with zipfile.ZipFile(tmp_path / "set.zip") as archive:
        assert len(set(archive.namelist())) == 5


def test_scikit_image_fills_the_rois_to_the_same_labels(tmp_path: Path) -> None:
    labels = a_few_cells()
    rois = rois_of(cells_of(labels), tmp_path)
    assert [roi.composite for roi in rois] == [True, False, False, True, False]
    for label, roi in enumerate(rois, 1):
        inside = np.zeros(labels.shape, bool)
        for ring in roi.coordinates(multi=True):
            inside ^= polygon2mask(labels.shape, np.asarray(ring)[:, ::-1] - 0.5)
        np.testing.assert_array_equal(inside, labels == label)


def test_a_cell_far_out_on_a_large_image_keeps_its_place(tmp_path: Path) -> None:
    labels = np.zeros((4, 70_000), np.int32)
    labels[1:3, 65_600:65_610] = 1
    (shape,) = imagej.decode_rois(imagej.encode_rois(cells_of(labels)))
    assert shape.rings[0].min(axis=0).tolist() == [65_600, 1]
    assert shape.rings[0].max(axis=0).tolist() == [65_610, 3]


def roi(kind: roifile.ROI_TYPE, **fields: object) -> bytes:
    return roifile.ImagejRoi(roitype=kind, **fields).tobytes()  # type: ignore[arg-type]


def test_what_a_hand_draws_in_imagej_is_read() -> None:
    box = {"left": 2, "top": 3, "right": 12, "bottom": 8}
    (shape,) = imagej.decode_rois(roi(roifile.ROI_TYPE.RECT, **box))
    assert fill(shape.rings, (20, 20)).sum() == 50
    (shape,) = imagej.decode_rois(roi(roifile.ROI_TYPE.OVAL, **box))
    assert 30 < fill(shape.rings, (20, 20)).sum() < 45
    drawn = roifile.ImagejRoi.frompoints([[1.5, 1.5], [9.5, 1.5], [9.5, 6.5]], name="mine")
    (shape,) = imagej.decode_rois(drawn.tobytes())
    assert shape.kind is None
    assert 12 < fill(shape.rings, (20, 20)).sum() < 28


@pytest.mark.parametrize(
    ("data", "match"),
    [
        (b"PK\x03\x04 and no more", "no set of ROIs"),
        (b"something else", "the ROI: not an ImageJ ROI|data too short"),
        (roi(roifile.ROI_TYPE.LINE, x2=5.0, y2=5.0), "it is a line and no area"),
        (roi(roifile.ROI_TYPE.RECT, right=3, bottom=3, group=7), "its group is 7"),
        (
            roi(
                roifile.ROI_TYPE.RECT,
                shape_roi_size=8,
                multi_coordinates=np.array([0, 1, 1, 2, 3, 3, 4, 4], np.float32),
            ),
            "it has curved edges",
        ),
    ],
)
def test_what_is_no_area_selection_is_refused(data: bytes, match: str) -> None:
    with pytest.raises(ValueError, match=match):
        imagej.decode_rois(data)


# Damaged files ------------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["qupath", "imagej", "roi"])
def test_damaged_files_are_refused_and_bring_nothing_down(form: str) -> None:
    cells = cells_of(a_few_cells())
    whole = {
        "qupath": lambda: qupath.encode_geojson(cells),
        "imagej": lambda: imagej.encode_rois(cells),
        "roi": lambda: zipfile.ZipFile(io.BytesIO(imagej.encode_rois(cells))).read(
            "0004-red_cell.roi"
        ),
    }[form]()
    decode = qupath.decode_geojson if form == "qupath" else imagej.decode_rois
    rng = np.random.default_rng(0)
    refused = 0
    for _ in range(300):
        damaged = bytearray(whole[: rng.integers(len(whole))] if rng.random() < 0.3 else whole)
        for place in rng.integers(0, max(len(damaged), 1), 3):
            damaged[place : place + 1] = rng.bytes(1)
        try:
            label_shapes(decode(bytes(damaged)), (60, 90))
        except ValueError:
            refused += 1
    assert refused > 50


# COCO ----------------------------------------------------------------------------------------


def coco_of(*images: ImageCells) -> bytes:
    file = io.BytesIO()
    writer = coco.CocoWriter(file)
    for cells in images:
        writer.add(cells)
    writer.finish()
    return file.getvalue()


def loaded(data: bytes, folder: Path) -> COCO:
    path = folder / "instances.json"
    path.write_bytes(data)
    return COCO(str(path))


# pycocotools itself hands numpy arrays as numpy 2 no longer wants them.
@pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept:DeprecationWarning")
@settings(deadline=None)
@given(any_labels)
def test_pycocotools_decodes_the_same_labels(
    tmp_path_factory: pytest.TempPathFactory, labels: Labels
) -> None:
    read = loaded(coco_of(cells_of(labels)), tmp_path_factory.mktemp("coco"))
    (image,) = read.loadImgs(read.getImgIds())
    assert (image["file_name"], image["width"], image["height"]) == ("night/a.jpg", 11, 10)
    back = np.zeros_like(labels)
    for number, annotation in enumerate(read.loadAnns(read.getAnnIds(imgIds=image["id"])), 1):
        inside = read.annToMask(annotation).astype(bool)
        assert not back[inside].any()
        back[inside] = number
        rows, columns = np.nonzero(inside)
        assert annotation["area"] == rows.size
        assert annotation["bbox"] == [
            columns.min(),
            rows.min(),
            np.ptp(columns) + 1,
            np.ptp(rows) + 1,
        ]
        assert annotation["category_id"] == 1 + (number - 1) % 3
    np.testing.assert_array_equal(back, labels)


def test_ids_follow_from_the_names_alone(tmp_path: Path) -> None:
    one, other = (cells_of(a_few_cells(), image=name) for name in ("a.jpg", "b.jpg"))
    both = loaded(coco_of(one, other), tmp_path)
    alone = loaded(coco_of(other), tmp_path)
    (image,) = alone.loadImgs(alone.getImgIds())
    assert both.loadImgs([image["id"]]) == [image]
    assert alone.anns == {key: both.anns[key] for key in both.getAnnIds(imgIds=image["id"])}
    assert len(both.anns) == 10
    assert max(both.anns) < 2**53
    assert [category["name"] for category in both.loadCats(both.getCatIds())] == list(KINDS)


# Label images --------------------------------------------------------------------------------


def test_label_images_are_read_by_all_libraries(tmp_path: Path) -> None:
    labels = a_few_cells()
    path = tmp_path / "a_labels.tif"
    path.write_bytes(encode_labels(labels, Tags(0.25)))
    with tifffile.TiffFile(path) as tiff:  # as ilastik does: one series with known axes
        assert len(tiff.series) == 1
        assert tiff.series[0].axes == "YX"
        page = tiff.pages.first
        assert page.compression == 8
        assert page.predictor == 1
        assert page.dtype == np.uint16
        assert page.tags.valueof(282)[0] / page.tags.valueof(282)[1] == pytest.approx(40_000)
        np.testing.assert_array_equal(tiff.asarray(), labels)
    np.testing.assert_array_equal(imageio.imread(path), labels)  # CellProfiler's second reader
    np.testing.assert_array_equal(imread(path), labels)
    np.testing.assert_array_equal(np.asarray(Image.open(path)), labels)  # libtiff
    without_codecs = (
        "import sys; sys.modules['imagecodecs'] = None; import tifffile; "
        "print(tifffile.imread(sys.argv[1]).sum())"
    )
    done = subprocess.run(
        [sys.executable, "-c", without_codecs, path], capture_output=True, text=True, check=True
    )
    assert int(done.stdout) == labels.sum()


def test_more_cells_than_16_bits_number_take_32() -> None:
    labels = np.arange(270 * 270, dtype=np.int32).reshape(270, 270)
    data = encode_labels(labels)
    back = tifffile.imread(io.BytesIO(data))
    assert back.dtype == np.uint32
    np.testing.assert_array_equal(back, labels)


def test_objects_have_cellprofilers_names_and_units() -> None:
    cells = cells_of(a_few_cells(), pixel_size_um=0.1)
    data = label_images.encode_objects(cells)
    rows = list(csv.DictReader(io.StringIO(data.decode(), newline="")))
    assert [row["ObjectNumber"] for row in rows] == ["1", "2", "3", "4", "5"]
    assert {row["FileName"] for row in rows} == {"night/a.jpg"}
    for row, ours in zip(rows, cells.rows, strict=True):
        assert row["AreaShape_Area"] == ours["area"]
        assert row["Location_Center_X"] == ours["centroid-1"]
        assert row["AreaShape_BoundingBoxMaximum_Y"] == ours["bbox-2"]
        assert float(row["Intensity_MeanIntensity_Green"]) == pytest.approx(
            float(ours["mean_intensity-1"]) / 255, rel=1e-5
        )
        assert row["area_um2"] == ours["area_um2"]
    assert label_images.read_kinds(data) == {n: KINDS[(n - 1) % 3] for n in range(1, 6)}


def test_a_name_that_is_not_utf8_is_exported_all_the_same(tmp_path: Path) -> None:
    cells = cells_of(a_few_cells(), image="a\udcff.jpg")
    assert len(qupath.decode_geojson(qupath.encode_geojson(cells))) == 5
    assert len(imagej.decode_rois(imagej.encode_rois(cells))) == 5
    assert len(loaded(coco_of(cells), tmp_path).anns) == 5
    assert rb"a\udcff.jpg,1,red_cell" in label_images.encode_objects(cells)


def test_an_image_without_cells_is_exported_all_the_same(tmp_path: Path) -> None:
    cells = ImageCells("a.jpg", np.zeros((20, 30), np.int32), ())
    assert qupath.decode_geojson(qupath.encode_geojson(cells)) == []
    assert imagej.decode_rois(imagej.encode_rois(cells)) == []
    assert loaded(coco_of(cells), tmp_path).anns == {}
    assert not tifffile.imread(io.BytesIO(encode_labels(cells.labels))).any()
    assert label_images.encode_objects(cells).count(b"\n") == 1
