"""The report: its order, totals, outlines and pages, whatever the images are called."""

from __future__ import annotations

import html.parser
import json
import os
import re
import subprocess
from dataclasses import replace
from pathlib import Path
from urllib.parse import unquote_to_bytes

import cv2
import numpy as np
import pytest
import tifffile
from parts import command, run_folder, tree, write_smear
from PIL import Image
from reports import BLUR, CELLS, SHAPE_HW, cell_rows, done, failed, is_picture, labels_of, record

from bcseg_batch.errors import OutputError, SettingsError, UnreadableImageError, UsageError
from bcseg_batch.items import Flag, Outcome, Status
from bcseg_batch.report import check_report_installed
from bcseg_batch.report.build import Report, ReportOptions, build_report
from bcseg_batch.report.doubt import FLAG_WEIGHTS, most_doubtful_first
from bcseg_batch.report.groups import group_of, totals_by_group
from bcseg_batch.report.links import page_key, shown_url, url_of
from bcseg_batch.report.plots import histogram
from bcseg_batch.report.rows import COLUMNS
from bcseg_batch.report.traces import (
    MOST_OUTLINES,
    fit_within,
    shrink_labels,
    trace_labels,
    trace_mask,
)
from bcseg_batch.settings import load_settings
from bcseg_batch.store.lock import take_lock
from bcseg_batch.store.pictures import read_small
from bcseg_batch.store.read_back import read_outcomes

ODD_NAMES = (
    "<script>alert(1)<!--.png",
    "\"quoted\" 'names' & such.png",
    "two\nlines.png",
    "-it.png",
    "ü/日本 #1?%41.png",
    "</title><img src=x onerror=alert(1)>.png",
    "{{ 7 * 7 }}.png",
    "right\u202eleft.png",
    os.fsdecode(b"latin-\xfc.png"),
)


class Page(html.parser.HTMLParser):
    """What a browser makes of a page, as far as a test asks."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.path = path
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.data: dict[str, object] = {}
        self._inside = ""
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        self._inside = "json" if dict(attrs).get("type") == "application/json" else ""

    def handle_data(self, data: str) -> None:
        if self._inside == "json":
            self.data = json.loads(data)
            self._inside = ""
        else:
            self.text += data

    def addresses(self) -> list[str]:
        named = ("src", "href")
        return [v for _, a in self.tags for k, v in a.items() if k in named and v is not None]

    def files(self) -> list[Path]:
        """The files that it leads to."""
        return [
            self.path.parent / os.fsdecode(unquote_to_bytes(address.partition("#")[0]))
            for address in self.addresses()
            if not address.startswith(("data:", "#"))
        ]


def page_of(report: Report, image: str) -> Page:
    return Page(report.index.parent / "images" / f"{page_key(image)}.html")


def rows_of(report: Report) -> list[dict[str, object]]:
    """Read the rows as the page does, in its order."""
    setup = Page(report.index).data
    rows = []
    for number, part in enumerate(setup["parts"]):  # type: ignore[arg-type,var-annotated]  # a list
        text = (report.index.parent / "data" / part).read_text(encoding="ascii")
        found = re.fullmatch(r"bcsegRows\((.*)\);\n", text, flags=re.DOTALL)
        assert found
        content = json.loads(found[1])
        assert content["part"] == number
        rows += [dict(zip(COLUMNS, row, strict=True)) for row in content["rows"]]
    return rows


def build(folder: Path, **options: object) -> Report:
    return build_report(folder, ReportOptions(**options))  # type: ignore[arg-type]  # by name


# Most doubtful first ---------------------------------------------------------------------------


def plain(image: str, confidence: float | None = 0.9, *flags: str) -> Outcome:
    doubts = tuple(Flag(name=name, value=1.0, limit=0.0, sentence="why") for name in flags)
    return Outcome(image=image, status=Status.DONE, mean_confidence=confidence, flags=doubts)


def test_the_most_doubtful_come_first() -> None:
    expected = [
        failed("failed a"),
        failed("failed b"),
        Outcome(image="skipped", status=Status.SKIPPED),
        plain("two heavy", 0.99, "not_a_smear", "out_of_focus"),
        plain("one heavy", 0.99, "not_a_smear"),
        plain("light", 0.6, "under_exposed"),
        plain("light, surer", 0.7, "under_exposed"),
        plain("unknown confidence", None),
        plain("unsure", 0.6),
        plain("sure a", 0.99),
        plain("sure b", 0.99),
    ]
    assert most_doubtful_first(reversed(expected)) == expected


def test_a_flag_of_a_later_version_is_a_doubt_too() -> None:
    later, sure = plain("z", 0.99, "from_the_future"), plain("a", 0.6)
    assert most_doubtful_first([sure, later]) == [later, sure]


def test_every_flag_that_there_is_has_a_weight() -> None:
    documented = re.findall(
        r"^\| `(\w+)` \|",
        (Path(__file__).parents[1] / "docs/outputs.md").read_text().partition("### Flags")[2],
        flags=re.MULTILINE,
    )
    assert set(documented) == set(FLAG_WEIGHTS)


# Groups ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("image", "group"),
    [("s1_a.jpg", "s1"), ("night/s2_b.jpg", "s2"), ("alone.jpg", None), ("_x.jpg", None)],
)
def test_a_pattern_finds_the_group_in_the_name(image: str, group: str | None) -> None:
    assert group_of(image, re.compile("(?P<group>[^/_]*)_")) == group
    assert group_of(image, None) is None


def counted(image: str, cells: int | None) -> Outcome:
    return Outcome(
        image=image,
        status=Status.DONE,
        cell_count=cells,
        red_cell_count=None if cells is None else cells - 1,
        white_cell_count=None if cells is None else 1,
        platelet_count=None if cells is None else 2,
    )


def test_totals_have_their_spread_and_say_whether_they_are_enough() -> None:
    outcomes = [
        *(counted(f"a_{number}", cells) for number, cells in enumerate((90, 100, 110))),
        failed("a_bad"),
        counted("b_1", 5),
        counted("c_1", None),
        failed("d_1"),
        counted("none", 7),
    ]
    a, b, c, d, rest = totals_by_group(outcomes, re.compile("(?P<group>.)_"), min_cells=300)
    assert (a.group, a.done, a.failed, a.red_cells, a.white_cells) == ("a", 3, 1, 297, 3)
    assert (a.platelets, a.cells, a.is_enough) == (6, 300, True)
    assert (a.mean, a.deviation) == (pytest.approx(100), pytest.approx(10))
    assert a.variation == pytest.approx(0.1)
    assert (b.mean, b.deviation, b.variation, b.is_enough) == (5, None, None, False)
    assert (c.cells, c.mean) == (None, None)
    assert (d.done, d.failed, d.mean) == (0, 1, None)
    assert (rest.group, rest.cells) == (None, 7)
    assert totals_by_group([], None, min_cells=1) == []


def test_images_without_cells_have_no_variation() -> None:
    (none,) = totals_by_group([counted("a", 1), counted("b", 1)], None, min_cells=1)
    assert (none.deviation, none.variation) == (0, 0)
    empty = [replace(counted(name, 1), cell_count=0) for name in "ab"]
    assert totals_by_group(empty, None, min_cells=1)[0].variation is None


@pytest.mark.parametrize("pattern", ["(", "slide", "(?P<slide>.)"])
def test_a_pattern_that_cannot_group_is_refused(pattern: str) -> None:
    with pytest.raises(SettingsError, match=r"report\.group_pattern .*\(\?P<group>\.\.\.\)"):
        load_settings(None, {"report.group_pattern": pattern}, {})


# Plots -----------------------------------------------------------------------------------------


def test_a_histogram_takes_the_pages_colours_and_has_its_figures_as_text() -> None:
    svg = str(histogram([3, 4, 5, 200], label="cells <per> image"))
    assert svg.startswith("<svg ")
    assert "#000000" not in svg.replace("stroke: #000000", "")
    assert "currentColor" in svg
    assert "var(--accent)" in svg
    assert 'role="img"' in svg
    assert "cells &lt;per&gt; image over 4 images: median 4.5, from 3 to 200" in svg
    assert "cells <per>" not in svg
    assert str(histogram([3, 4, 5, 200], label="cells <per> image")) == svg


def test_a_histogram_of_one_value_or_none() -> None:
    assert "over 1 images" in histogram([0.5], label="confidence")
    assert "<svg" not in histogram([], label="confidence")


# Outlines --------------------------------------------------------------------------------------


def filled(paths: list[str]) -> np.ndarray:
    """Fill SVG paths again, by the even-odd rule."""
    rings = [
        np.array([pair.split() for pair in re.findall(r"\d+ \d+", ring)], np.int32)
        for path in paths
        for ring in re.findall(r"M([^z]+)z", path)
    ]
    return cv2.fillPoly(np.zeros(SHAPE_HW, np.uint8), rings, 1)


def table(labels: np.ndarray) -> list[dict[str, str]]:
    columns = cell_rows(labels)
    return [
        {name: str(values[number]) for name, values in columns.items()}
        for number in range(len(columns["label"]))
    ]


def test_each_cell_of_a_label_image_has_its_outline_and_row() -> None:
    labels = labels_of()
    rows = list(reversed(table(labels)))  # found by their numbers, whatever their order
    traces = trace_labels(labels, rows)
    assert [trace.cells for trace in traces] == [(2,), (1,), (0,)]
    for number, trace in enumerate(traces, 1):
        inside = filled([trace.path]) > 0
        wrong = np.count_nonzero(inside != (labels == number))
        assert wrong < 0.35 * np.count_nonzero(labels == number)  # filling takes the rim along
    assert trace_labels(labels, [])[0].cells == ()


def test_cells_that_touch_share_an_outline_of_the_mask() -> None:
    labels = labels_of()
    traces = trace_mask(labels > 0, table(labels), SHAPE_HW)
    assert [trace.cells for trace in traces] == [(0, 1), (2,)]
    larger = [
        {**row, **{f"centroid-{a}": str(3 * float(row[f"centroid-{a}"])) for a in (0, 1)}}
        for row in table(labels)
    ]
    again = trace_mask(labels > 0, larger, (3 * SHAPE_HW[0], 3 * SHAPE_HW[1]))
    assert [trace.cells for trace in again] == [(0, 1), (2,)]


def test_an_outline_has_its_hole() -> None:
    labels = np.zeros(SHAPE_HW, np.int32)
    labels[10:40, 10:40] = 1
    labels[20:30, 20:30] = 0
    (trace,) = trace_labels(labels, [])
    assert trace.path == "M10 10 40 10 40 40 10 40zM20 20 20 30 30 30 30 20z"


def test_no_more_outlines_than_a_browser_bears() -> None:
    labels = np.zeros((200, 200), np.int32)
    labels[::2, ::2] = np.arange(1, 10_001).reshape(100, 100)
    labels[50:52, 50:52] = 20_000
    traces = trace_labels(labels, [{"label": "20000"}])
    assert len(traces) == MOST_OUTLINES
    assert (0,) in [trace.cells for trace in traces]


def test_shrunk_labels_keep_their_places() -> None:
    labels = labels_of()
    large = labels.repeat(4, axis=0).repeat(4, axis=1)
    assert fit_within(large.shape, 80) == SHAPE_HW
    np.testing.assert_array_equal(shrink_labels(large, SHAPE_HW), labels)
    assert fit_within((30, 40), 1600) == (30, 40)
    assert fit_within((1, 100_000), 1600) == (1, 1600)


# Pictures --------------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", ["jpg", "png"])
def test_pictures_are_read_small(tmp_path: Path, suffix: str) -> None:
    pixels = np.zeros((300, 400, 3), np.uint8)
    pixels[:, 200:] = (200, 100, 50)
    path = tmp_path / f"a.{suffix}"
    Image.fromarray(pixels).save(path)
    small = read_small(path, 100, max_pixels=10**6)
    assert small.shape == (75, 100, 3)
    np.testing.assert_allclose(small[:, :45].mean(axis=(0, 1)), 0, atol=3)
    np.testing.assert_allclose(small[:, 55:].mean(axis=(0, 1)), (200, 100, 50), atol=3)
    assert read_small(path, 1000, max_pixels=10**6).shape == pixels.shape


@pytest.mark.parametrize("content", [b"", b"\xff\xd8\xff\xe0 no", b"text", None])
def test_a_picture_that_cannot_be_read_is_named(tmp_path: Path, content: bytes | None) -> None:
    path = tmp_path / "a.jpg"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(UnreadableImageError, match=r"a\.jpg"):
        read_small(path, 100, max_pixels=10**6)


# Pages -----------------------------------------------------------------------------------------


def test_odd_names_are_text_and_lead_to_their_files(tmp_path: Path) -> None:
    outcomes = [done(tmp_path, image, flags=(BLUR,)) for image in ODD_NAMES]
    report = build(record(tmp_path, *outcomes), group_pattern=r"(?P<group><?\w+)")
    index = Page(report.index)
    for image in ODD_NAMES:
        page = page_of(report, image)
        for each in (index, page):
            scripts = [attributes for tag, attributes in each.tags if tag == "script"]
            assert all(a.get("src") or a["type"] == "application/json" for a in scripts)
            assert not [a for _, a in each.tags if "onerror" in a]
            assert all(path.exists() for path in each.files()), each.path
        assert len([tag for tag, _ in page.tags if tag == "img"]) == 2
        assert BLUR.sentence in page.text
    rows = rows_of(report)
    assert len(rows) == len(ODD_NAMES)
    for row in rows:
        assert "\n" not in str(row["image"])
        for which in ("before", "after"):
            assert (tmp_path / os.fsdecode(unquote_to_bytes(str(row[which])))).is_file()
    assert "<script>alert(1)<!--.png" in page_of(report, ODD_NAMES[0]).text
    assert "\\u202e" in page_of(report, "right\u202eleft.png").text
    assert "{{ 7 * 7 }}.png" in page_of(report, "{{ 7 * 7 }}.png").text


def test_the_folders_own_name_is_escaped(tmp_path: Path) -> None:
    folder = record(tmp_path / "<b>out", done(tmp_path / "<b>out"))
    assert "<b>" not in build(folder).index.read_text()


def test_a_row_says_what_the_record_says(tmp_path: Path) -> None:
    report = build(record(tmp_path, done(tmp_path, flags=(BLUR,)), failed("b.tif")))
    bad, good = rows_of(report)
    assert (bad["image"], bad["status"], bad["thumbnails"]) == ("b.tif", "failed", "")
    assert bad["error"] == "UnreadableImageError: 'b' is <i>no</i> image"
    assert (bad["cells"], bad["before"], bad["after"]) == (None, None, None)
    assert (good["cells"], good["red"], good["white"], good["platelets"]) == (3, 2, 1, 0)
    assert good["flags"] == [[BLUR.name, BLUR.sentence]]
    assert (good["confidence"], good["seconds"], good["thumbnails"]) == (0.95, 1.5, "ba")
    for which in "ba":
        assert is_picture(report.index.parent / "thumbnails" / f"{page_key('a.jpg')}-{which}.jpg")


def test_an_image_page_has_each_cell_with_its_measurements(tmp_path: Path) -> None:
    page = page_of(build(record(tmp_path, done(tmp_path))), "a.jpg")
    assert page.data["columns"] == [
        *("label", "kind", "centroid-0", "centroid-1", "area", "equivalent_diameter_area")
    ]
    cells = page.data["cells"]
    outlines = page.data["outlines"]
    assert isinstance(cells, list)
    assert isinstance(outlines, list)
    assert [cell[1] for cell in cells] == ["red_cell", "red_cell", "white_cell"]
    assert [numbers for _, numbers in outlines] == [[0], [1], [2]]
    assert "each cell by itself, from the label image" in page.text


def test_without_labels_the_outlines_are_the_masks_and_the_page_says_so(tmp_path: Path) -> None:
    page = page_of(build(record(tmp_path, done(tmp_path, labels=False))), "a.jpg")
    assert [numbers for _, numbers in page.data["outlines"]] == [[0, 1], [2]]  # type: ignore[attr-defined]  # a list
    assert "those of the mask, where cells that touch share one" in page.text


def test_without_a_preview_the_composite_stands_alone_and_the_page_says_why(
    tmp_path: Path,
) -> None:
    report = build(record(tmp_path, done(tmp_path, preview=False)))
    page = page_of(report, "a.jpg")
    assert [a["alt"] for tag, a in page.tags if tag == "img"] == [
        "Composite: the photograph with its cells tinted"
    ]
    assert not [a for _, a in page.tags if a.get("type") == "range"]
    assert "the run wrote no preview of it" in page.text
    assert rows_of(report)[0]["thumbnails"] == "a"


def test_without_a_composite_the_photograph_stands_alone(tmp_path: Path) -> None:
    report = build(record(tmp_path, replace(done(tmp_path), composite=None)))
    page = page_of(report, "a.jpg")
    assert [a["alt"] for tag, a in page.tags if tag == "img"] == ["Photograph"]
    assert "no composite" in page.text
    assert rows_of(report)[0]["thumbnails"] == "b"


def test_without_cells_there_are_outlines_and_no_measurements(tmp_path: Path) -> None:
    outcome = done(tmp_path, labels=False, cells=False)
    report = build(record(tmp_path, outcome))
    page = page_of(report, "a.jpg")
    assert "The run left cells out" in page.text
    assert [numbers for _, numbers in page.data["outlines"]] == [[], []]  # type: ignore[attr-defined]  # a list
    assert "No cells per image to be shown" in Page(report.index).text


def test_an_image_in_which_nothing_was_found(tmp_path: Path) -> None:
    outcome = replace(done(tmp_path), cell_count=0, red_cell_count=0, white_cell_count=0)
    assert outcome.labels
    assert outcome.mask
    assert outcome.cells
    tifffile.imwrite(tmp_path / outcome.labels, np.zeros(SHAPE_HW, np.uint16))
    header = (tmp_path / outcome.cells).read_text().splitlines()[0]
    (tmp_path / outcome.cells).write_text(header + "\n")
    page = page_of(build(record(tmp_path, outcome)), "a.jpg")
    assert page.data == {"columns": [], "cells": [], "outlines": []}


def test_a_composite_that_no_browser_shows_is_said_to_be_so(tmp_path: Path) -> None:
    outcome = replace(done(tmp_path), composite="composites/a_bloodred.tif")
    tifffile.imwrite(tmp_path / "composites/a_bloodred.tif", np.zeros((*SHAPE_HW, 3), np.uint8))
    report = build(record(tmp_path, outcome))
    page = page_of(report, "a.jpg")
    assert "Browsers do not show composites/a_bloodred.tif" in page.text
    assert [a["alt"] for tag, a in page.tags if tag == "img"] == ["Photograph"]
    assert rows_of(report)[0]["thumbnails"] == "b"


@pytest.mark.parametrize("harm", ["missing", "empty", "nonsense"])
@pytest.mark.parametrize("kind", ["mask", "composite", "labels", "cells", "preview"])
def test_what_is_missing_or_damaged_costs_no_page(tmp_path: Path, kind: str, harm: str) -> None:
    outcome = done(tmp_path, labels=kind != "mask")
    path = tmp_path / getattr(outcome, kind)
    path.unlink()
    if harm != "missing":
        path.write_bytes(b"" if harm == "empty" else b"\xff\xd8 nonsense \x80")
    report = build(record(tmp_path, outcome, done(tmp_path, "b.jpg")))
    assert report.images == 2
    page = page_of(report, "a.jpg")
    told = ("is missing", "No outlines", "No measurements")
    shown_as_they_are = kind in {"composite", "preview"} and harm != "missing"
    seen_nowhere = kind == "mask" and harm == "missing"
    empty_table = kind == "cells" and harm != "missing"
    if not (shown_as_they_are or seen_nowhere or empty_table):
        assert any(words in page.text for words in told)
    assert rows_of(report)[0]["cells"] == len(CELLS)


def test_an_image_too_large_has_no_outlines(tmp_path: Path) -> None:
    outcome = replace(done(tmp_path), width_px=20_000, height_px=15_000)
    page = page_of(build(record(tmp_path, outcome)), "a.jpg")
    assert "too large for outlines" in page.text


def test_a_failed_image_has_a_page_with_its_error(tmp_path: Path) -> None:
    page = page_of(build(record(tmp_path, failed("b.tif"))), "b.tif")
    assert "UnreadableImageError: 'b' is <i>no</i> image" in page.text
    assert not [tag for tag, _ in page.tags if tag == "img"]


def test_nothing_leads_to_the_network(tmp_path: Path) -> None:
    report = build(record(tmp_path, done(tmp_path), failed("b.tif")))
    for path in report.index.parent.rglob("*"):
        if path.suffix in {".html", ".js", ".css"}:
            text = path.read_text(encoding="utf-8").replace("http://www.w3.org/", "")
            assert "://" not in text, path
            assert "fetch(" not in text, path


def test_groups_and_doubts_stand_in_the_index(tmp_path: Path) -> None:
    images = [done(tmp_path, name) for name in ("s1_a.jpg", "s1_b.jpg", "s2_a.jpg", "x.jpg")]
    report = build(
        record(tmp_path, *images), group_pattern="(?P<group>[^_]+)_", min_cells=2 * len(CELLS)
    )
    lines = [line for line in report.index.read_text().splitlines() if line.startswith("<tr><th")]
    words = [re.sub("<[^>]+>", " ", line).split() for line in lines if "row" in line]
    assert words[0] == ["s1", "2", "0", "0", "4", "2", "0", "6", "3.0", "0.0", "0%", "yes"]
    assert words[1][:9] == ["s2", "1", "0", "0", "2", "1", "0", "3", "3.0"]
    assert words[1][-3:] == ["no,", "too", "few"]
    assert words[2][:2] == ["no", "group"]
    assert {row["group"] for row in rows_of(report)} == {"s1", "s2", None}


# Refreshing ------------------------------------------------------------------------------------


def stamps(report: Report) -> dict[str, int]:
    root = report.index.parent
    return {
        path.relative_to(root).as_posix(): path.stat().st_ino
        for path in root.rglob("*")
        if path.is_file()
    }


def test_only_what_is_new_or_changed_is_drawn_again(tmp_path: Path) -> None:
    outcomes = [done(tmp_path, f"{number}.jpg") for number in range(4)]
    first = build(record(tmp_path, *outcomes[:3]))
    before = stamps(first)
    assert (first.images, first.drawn) == (3, 3)
    again = build(tmp_path)
    assert again.drawn == 0
    after = stamps(again)
    changed = {name for name in before if before[name] != after[name]}
    assert changed <= {"index.html"}  # which says when it was made
    third = build(record(tmp_path, outcomes[3], replace(outcomes[0], seconds=9.0)))
    assert (third.images, third.drawn) == (4, 2)
    keys = {page_key("0.jpg"), page_key("3.jpg")}
    later = stamps(third)
    drawn = {n for n in later if n.startswith(("images", "thumb")) and later[n] != after.get(n)}
    assert {re.split(r"[-./]", name)[1] for name in drawn} == keys


def test_a_file_that_comes_back_is_shown_again(tmp_path: Path) -> None:
    outcome = done(tmp_path)
    assert outcome.composite
    path = tmp_path / outcome.composite
    content = path.read_bytes()
    path.unlink()
    assert "is missing" in page_of(build(record(tmp_path, outcome)), "a.jpg").text
    path.write_bytes(content)
    report = build(tmp_path)
    assert report.drawn == 1
    assert "is missing" not in page_of(report, "a.jpg").text


def test_an_image_that_fails_later_loses_its_thumbnails(tmp_path: Path) -> None:
    first = build(record(tmp_path, done(tmp_path)))
    assert len(list((first.index.parent / "thumbnails").iterdir())) == 2
    build(record(tmp_path, failed("a.jpg")))
    assert list((first.index.parent / "thumbnails").iterdir()) == []


def test_what_has_left_the_records_leaves_the_report(tmp_path: Path) -> None:
    build(record(tmp_path, done(tmp_path), done(tmp_path, "b.jpg")))
    (tmp_path / "results.jsonl").unlink()
    report = build(record(tmp_path, done(tmp_path, "b.jpg")))
    assert [path.stem for path in (report.index.parent / "images").iterdir()] == [page_key("b.jpg")]
    assert len(list((report.index.parent / "thumbnails").iterdir())) == 2


@pytest.mark.parametrize("state", [b"", b"{", b"[1]", b'{"a": 1}', b"\xff"])
def test_a_damaged_state_means_that_all_is_drawn_again(tmp_path: Path, state: bytes) -> None:
    report = build(record(tmp_path, done(tmp_path)))
    (report.index.parent / "state.json").write_bytes(state)
    assert build(tmp_path).drawn == 1


def test_one_who_has_the_page_open_keeps_the_rows_of_it(tmp_path: Path) -> None:
    def parts(report: Report) -> list[str]:
        found = Page(report.index).data["parts"]
        assert isinstance(found, list)
        return found

    first = build(record(tmp_path, done(tmp_path)))
    open_parts = parts(first)
    second = build(record(tmp_path, done(tmp_path, seconds=2.0)))
    second_parts = parts(second)
    there = {path.name for path in (second.index.parent / "data").glob("rows-*")}
    assert there == {*open_parts, *second_parts}
    third = build(record(tmp_path, done(tmp_path, seconds=3.0)))
    there = {path.name for path in (third.index.parent / "data").glob("rows-*")}
    assert there == {*second_parts, *parts(third)}


def test_rows_come_in_parts_in_the_order_of_doubt(tmp_path: Path) -> None:
    outcomes = [failed(f"{number:04d}.jpg") for number in range(2001)]
    report = build(record(tmp_path, *reversed(outcomes)))
    assert len(Page(report.index).data["parts"]) == 3  # type: ignore[arg-type]  # a list
    assert [row["image"] for row in rows_of(report)] == [outcome.image for outcome in outcomes]


def test_an_interrupted_report_is_gone_on_with(tmp_path: Path) -> None:
    record(tmp_path, *(failed(f"{number:04d}.jpg") for number in range(600)))
    looks = iter(range(1000))

    def stop_late() -> None:
        if next(looks) == 550:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        build_report(tmp_path, ReportOptions(), alive=stop_late)
    assert build(tmp_path).drawn == 100  # what was drawn is noted at every 500


def test_the_records_are_left_alone(tmp_path: Path) -> None:
    record(tmp_path, done(tmp_path))
    before = tree(tmp_path)
    build(tmp_path)
    after = tree(tmp_path)
    assert {n: c for n, c in after.items() if not n.startswith("report/")} == before


# What cannot be reported -----------------------------------------------------------------------


def test_a_folder_without_records_is_refused(tmp_path: Path) -> None:
    with pytest.raises(OutputError, match="name a folder that process-dir or the daemon"):
        build(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_no_records_yet(tmp_path: Path) -> None:
    report = build(record(tmp_path))
    assert (report.images, report.drawn) == (0, 0)
    assert "There are no images in the records yet" in Page(report.index).text


def test_two_at_once_are_refused(tmp_path: Path) -> None:
    report = build(record(tmp_path, done(tmp_path)))
    with (
        take_lock(report.index.parent / ".bcseg.lock", "output folder"),
        pytest.raises(UsageError, match="written by another run"),
    ):
        build(tmp_path)


def test_a_missing_library_is_named_before_the_work(monkeypatch: pytest.MonkeyPatch) -> None:
    check_report_installed()
    monkeypatch.setattr("bcseg_batch.report.find_spec", lambda name: None)
    with pytest.raises(SettingsError, match=r"needs jinja2 and matplotlib: install .* `report`"):
        check_report_installed()


def test_urls_are_made_of_bytes() -> None:
    assert url_of("masks/ü #1?.png") == "masks/%C3%BC%20%231%3F.png"
    assert url_of(os.fsdecode(b"\xfc.png")) == "%FC.png"
    assert shown_url("a.TIF") is None
    assert shown_url(None) is None
    assert shown_url("a.JPG") == "a.JPG"


# Commands --------------------------------------------------------------------------------------


def run(*arguments: object) -> subprocess.CompletedProcess[str]:
    clean = {k: v for k, v in os.environ.items() if not k.startswith("BCSEG_")}
    return subprocess.run(
        [command(), *map(str, arguments)],
        env=clean,
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )


def test_the_command_makes_it_and_says_where(tmp_path: Path) -> None:
    record(tmp_path, done(tmp_path, "s_1.jpg"))
    ran = run("report", tmp_path, "--group-pattern", "(?P<group>.)_", "--min-cells", 3)
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout == f"1 images, 1 of them drawn: {tmp_path}/report/index.html\n"
    assert "At least 3 cells" in (tmp_path / "report/index.html").read_text()
    assert run("report", tmp_path / "nowhere").returncode == 74
    assert run("report", tmp_path, "--group-pattern", "(").returncode == 78


def test_process_dir_makes_it_at_the_end(source: Path, tmp_path: Path, tiny_model: Path) -> None:
    Image.new("RGB", (80, 60), (200, 180, 190)).save(source / "a.png")
    output = tmp_path / "out"
    options = ("--model", tiny_model, "--device", "cpu", "--dtype", "float32")
    ran = run("process-dir", source, output, *options)
    assert ran.returncode == 0, ran.stderr
    assert not (output / "report").exists()
    ran = run("process-dir", source, output, *options, "--report")
    assert ran.returncode == 0, ran.stderr
    assert "report" in ran.stdout
    assert len(list((output / "report/images").iterdir())) == 1


@pytest.mark.parametrize("place", ["inf", "-99999", "nan", "1e300", "x"])
def test_one_odd_table_costs_its_own_outlines_alone(tmp_path: Path, place: str) -> None:
    outcomes = [done(tmp_path, "a.jpg", labels=False), done(tmp_path, "b.jpg", labels=False)]
    record(tmp_path, *outcomes)
    table = tmp_path / "cells/a_cells.csv"
    lines = table.read_text().splitlines()
    fields = lines[1].split(",")
    fields[lines[0].split(",").index("centroid-0")] = place
    table.write_text("\n".join([lines[0], ",".join(fields), *lines[2:]]))
    assert build_report(tmp_path, ReportOptions()).images == 2
    odd, sound = (
        (tmp_path / "report/images" / f"{page_key(o.image)}.html").read_text() for o in outcomes
    )
    assert "outlines" in sound
    assert "No outlines" in odd or "Neither outlines" in odd or '"outlines": [[' in odd


def test_nothing_counted_is_not_none_found(tmp_path: Path) -> None:
    outcome = replace(done(tmp_path, cells=False), cell_count=None, red_cell_count=None)
    outcome = replace(outcome, white_cell_count=None, platelet_count=None)
    (totals,) = totals_by_group([outcome], None, min_cells=200)
    assert (totals.cells, totals.red_cells, totals.is_enough) == (None, None, None)
    record(tmp_path, outcome)
    build_report(tmp_path, ReportOptions())
    assert "No cells were counted." in (tmp_path / "report/index.html").read_text()


def test_cells_of_a_doubtful_image_do_not_make_it_enough(tmp_path: Path) -> None:
    sure = replace(done(tmp_path, "a.jpg"), cell_count=150)
    doubtful = replace(done(tmp_path, "b.jpg", flags=(BLUR,)), cell_count=150)
    (totals,) = totals_by_group([sure, doubtful], None, min_cells=200)
    assert (totals.cells, totals.sure_cells, totals.is_enough) == (300, 150, False)
    (totals,) = totals_by_group([sure, replace(sure, image="c.jpg")], None, min_cells=200)
    assert totals.is_enough


def test_the_sizes_of_single_cells_are_plotted(source: Path, tmp_path: Path) -> None:
    for number in range(2):
        write_smear(source / f"{number}.png", number)
    run_folder(source, tmp_path / "out", labels=True)
    outcomes = read_outcomes(tmp_path / "out").outcomes.values()
    count = sum(outcome.cell_count or 0 for outcome in outcomes)
    for _ in range(2):  # the second time from what was noted
        build_report(tmp_path / "out", ReportOptions())
        index = (tmp_path / "out/report/index.html").read_text()
        assert f"Histogram of diameter of a cell over {count} cells" in index


def test_a_report_that_fails_spoils_no_run(source: Path, tmp_path: Path, tiny_model: Path) -> None:
    write_smear(source / "a.png")
    (tmp_path / "out/report").mkdir(parents=True)
    with take_lock(tmp_path / "out/report/.bcseg.lock", "report"):
        ran = run(
            *("process-dir", source, tmp_path / "out", "--model", tiny_model, "--report", "--json")
        )
    assert ran.returncode == 1
    assert json.loads(ran.stdout)["done"] == 1
    assert "the images are done, and the report is not" in ran.stderr
