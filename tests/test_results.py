"""Records survive whatever tears the file, and never say a thing twice."""

from __future__ import annotations

import csv
import json
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from test_outputs import small_disk

from bcseg_batch.errors import OutputError
from bcseg_batch.items import Outcome, Status
from bcseg_batch.store.results import ResultsLog


def done(image: str, **changes: object) -> Outcome:
    stem = image.rpartition(".")[0]
    outcome = Outcome(
        image=image,
        status=Status.DONE,
        notes=("orientation 6 applied", "page 1 of 3"),
        width_px=40,
        height_px=30,
        foreground_fraction=0.25,
        mean_confidence=0.9,
        sha256="c" * 64,
        size_bytes=1234,
        mtime_ns=1_700_000_000_123_456_789,
        model_sha256="a" * 64,
        settings_sha256="b" * 64,
        version="0.1.0",
        mask=f"masks/{stem}_mask.png",
        composite=f"composites/{stem}_bloodred.jpg",
        seconds=0.5,
        finished_at="2026-01-01T00:00:00.000+00:00",
    )
    return replace(outcome, **changes)


def failed(
    image: str, error: str = "UnreadableImageError: 'x' is damaged", **changes: object
) -> Outcome:
    return replace(Outcome(image=image, status=Status.FAILED, error=error, size_bytes=5), **changes)


def lines_of(folder: Path) -> list[bytes]:
    return (folder / "results.jsonl").read_bytes().splitlines(keepends=True)


def rows_of(folder: Path) -> list[dict[str, str]]:
    with (folder / "results.csv").open(encoding="utf-8", newline="") as table:
        return list(csv.DictReader(table))


def test_a_record_has_every_field_and_comes_back(tmp_path: Path) -> None:
    with ResultsLog(tmp_path) as results:
        assert results.append(done("b/a.jpg"))
    record = json.loads(lines_of(tmp_path)[0])
    assert record["status"] == "done"
    assert record["error"] is None
    assert record["mtime_ns"] == 1_700_000_000_123_456_789
    with ResultsLog(tmp_path) as results:
        assert list(results.records()) == [record]
        known = results.known("b/a.jpg")
        assert known is not None
        assert (known.status, known.mask) == (Status.DONE, "masks/b/a_mask.png")
        assert results.known("a.jpg") is None
        assert results.repaired == []


def test_a_record_torn_at_any_byte_is_cut_off_and_nothing_else(tmp_path: Path) -> None:
    with ResultsLog(tmp_path) as results:
        results.append(done("a.jpg"))
        results.append(done("b.jpg"))
    first, second = lines_of(tmp_path)
    path = tmp_path / "results.jsonl"
    for length in range(len(second)):
        path.write_bytes(first + second[:length])
        with ResultsLog(tmp_path) as results:
            assert results.known("a.jpg") is not None
            assert results.known("b.jpg") is None
            assert len(results.repaired) == (1 if length else 0)
            assert results.append(done("b.jpg"))
            assert [record["image"] for record in results.records()] == ["a.jpg", "b.jpg"]
        assert path.read_bytes() == first + second


@pytest.mark.parametrize(
    "damage",
    [
        b"\0" * 4096,
        b"\0" * 4096 + b"\n",
        b"\n",
        b"[]\n",
        b"null\n",
        b"{}\n",
        b'{"image": 5, "status": "done"}\n',
        b'{"image": "x.jpg", "status": "perhaps"}\n',
        b'{"image": "x.jpg", "status": "done", "mask": 5}\n',
        b'{"image": "x.jpg", "status": "done", "model_sha256": 5}\n',
        b'{"image": "x.jpg", "sta{"image": "y.jpg", "status": "done"}\n',
        b"\xff\xfe\xfd\n",
        b"[" * 100_000 + b"\n",
        b'{"image": "x.jpg", "status": "done", "size_bytes": 99999999999999999999}\n',
        b'{"image": "x.jpg", "status": "done", "mask": "../x.png"}\n',
        b'{"image": "x.jpg", "status": "done", "width_px": true}\n',
        b'{"image": null, "status": "done"}\n',
    ],
)
def test_damage_costs_its_own_line_only(tmp_path: Path, damage: bytes) -> None:
    with ResultsLog(tmp_path) as results:
        results.append(done("a.jpg"))
        results.append(done("b.jpg"))
    first, second = lines_of(tmp_path)
    path = tmp_path / "results.jsonl"
    for content in (first + damage, damage + first, first + damage + second):
        path.write_bytes(content)
        whole = damage.endswith(b"\n")
        with ResultsLog(tmp_path) as results:
            assert len(results.repaired) == 1
            assert results.known("x.jpg") is None
            assert results.known("y.jpg") is None
            # Where the damage has no line end it takes along the record behind it.
            assert (results.known("a.jpg") is not None) is (whole or content.startswith(first))
            results.append(done("c.jpg"))
        with ResultsLog(tmp_path) as results:
            assert results.known("c.jpg") is not None
            assert all(
                record["image"] in {"a.jpg", "b.jpg", "c.jpg"} for record in results.records()
            )


def test_only_ever_appended_to(tmp_path: Path) -> None:
    before = b""
    for number in range(5):
        with ResultsLog(tmp_path) as results:
            results.append(done("a.jpg", seconds=float(number)))
            results.write_csv()
        content = (tmp_path / "results.jsonl").read_bytes()
        assert content.startswith(before)
        assert content.count(b"\n") == number + 1
        before = content
    assert [row["seconds"] for row in rows_of(tmp_path)] == ["4.0"]


def test_a_failure_that_repeats_itself_is_told_once(tmp_path: Path) -> None:
    with ResultsLog(tmp_path) as results:
        assert results.append(failed("a.jpg"))
        assert not results.append(failed("a.jpg", seconds=3.0, finished_at="later", mtime_ns=7))
    with ResultsLog(tmp_path) as results:
        assert not results.append(failed("a.jpg", device="cuda:0"))
        assert results.append(failed("a.jpg", error="another"))
        assert results.append(done("a.jpg"))
        assert results.append(failed("a.jpg"))
    assert len(lines_of(tmp_path)) == 4


def test_a_failed_redo_keeps_the_image_s_outputs_in_mind(tmp_path: Path) -> None:
    with ResultsLog(tmp_path) as results:
        results.append(done("a.jpg"))
        results.append(failed("a.jpg"))
        live = results.known("a.jpg")
    with ResultsLog(tmp_path) as results:
        loaded = results.known("a.jpg")
        assert next(results.records())["mask"] is None
    assert loaded == live
    assert loaded is not None
    assert loaded.status is Status.FAILED
    assert loaded.mask == "masks/a_mask.png"


def test_images_come_in_the_order_of_their_first_records_and_tables_sorted(tmp_path: Path) -> None:
    with ResultsLog(tmp_path) as results:
        for name in ("c.jpg", "a.jpg", "\udcff.jpg", "\u00e9.jpg"):
            results.append(done(name, cells=f"cells/{name}.csv"))
        results.append(failed("d.jpg"))
        results.append(failed("c.jpg"))
        results.append(done("a.jpg", cells="cells/again.csv"))
    with ResultsLog(tmp_path) as results:
        order = ["c.jpg", "a.jpg", "\udcff.jpg", "\u00e9.jpg", "d.jpg"]
        assert [image for image, _ in results.images()] == order
        assert dict(results.images()) == {image: results.known(image) for image in order}
        assert [image for image, _ in results.masks()] == order[:4]
        assert dict(results.masks())["c.jpg"] == "masks/c_mask.png"
        expected = ["cells/again.csv", "cells/\u00e9.jpg.csv", "cells/\udcff.jpg.csv"]
        assert list(results.cell_tables()) == expected


def test_an_image_that_is_being_done_again_keeps_its_outputs_in_mind(tmp_path: Path) -> None:
    with ResultsLog(tmp_path) as results:
        results.append(done("a.jpg"))
        results.append(failed("a.jpg", status=Status.SKIPPED))
        live = results.known("a.jpg")
    with ResultsLog(tmp_path) as results:
        loaded = results.known("a.jpg")
    assert loaded == live
    assert loaded is not None
    assert loaded.status is Status.SKIPPED
    assert loaded.outputs == ("masks/a_mask.png", "composites/a_bloodred.jpg")
    assert loaded.sha256 is None


ODD_NAMES = [
    "a,b.jpg",
    'a"b.jpg',
    "a\nb.jpg",
    "a\r\nb.jpg",
    "=1+1.jpg",
    " a .jpg",
    "\u00e9.jpg",
    "e\u0301.jpg",
    "\U0001f9ea.jpg",
    "a;b.jpg",
]


def test_the_table_has_one_row_per_image_sorted_with_any_name(tmp_path: Path) -> None:
    with ResultsLog(tmp_path) as results:
        for name in reversed(ODD_NAMES):
            results.append(failed(name))
            results.append(done(name))
        results.append(failed("z.jpg", error='Some: "sentence", with commas'))
        results.write_csv()
    rows = rows_of(tmp_path)
    by_name = {row["image"]: row for row in rows}
    assert [row["image"] for row in rows] == sorted([*ODD_NAMES, "z.jpg"])
    assert rows[0]["notes"] == "orientation 6 applied; page 1 of 3"
    assert rows[0]["foreground_fraction"] == "0.25"
    assert rows[0]["error"] == ""
    assert by_name["z.jpg"]["error"] == 'Some: "sentence", with commas'
    assert by_name["z.jpg"]["mask"] == ""


def test_a_name_that_is_no_text_is_escaped_in_the_table_and_exact_in_the_records(
    tmp_path: Path,
) -> None:
    name = b"\xe9\xff.jpg".decode("utf-8", "surrogateescape")
    with ResultsLog(tmp_path) as results:
        results.append(done(name))
        results.write_csv()
    assert rows_of(tmp_path)[0]["image"] == r"\udce9\udcff.jpg"
    with ResultsLog(tmp_path) as results:
        assert results.known(name) is not None


def test_an_empty_log_gives_a_table_with_a_header(tmp_path: Path) -> None:
    with ResultsLog(tmp_path) as results:
        results.write_csv()
    assert (tmp_path / "results.csv").read_text().startswith("image,status,error,notes,width_px,")
    assert rows_of(tmp_path) == []


def test_a_full_disk_stops_the_run_and_the_records_stay_whole(tmp_path: Path) -> None:
    with small_disk(tmp_path / "disk", "size=64k") as disk:
        results = ResultsLog(disk)
        accepted = 0

        def fill() -> None:
            nonlocal accepted
            for number in range(1000):
                results.append(done(f"{number}.jpg"))
                accepted += 1

        with pytest.raises(OutputError, match=r"results\.jsonl.*No space left.*free some space"):
            fill()
        with pytest.raises(OutputError, match=r"results\.csv.*No space left"):
            results.write_csv()
        assert sum(1 for _ in results.records()) == accepted
        assert results.known(f"{accepted}.jpg") is None
        results.close()
        with ResultsLog(disk) as results:
            assert results.repaired == []
            assert len(results) == accepted


@settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    st.lists(
        st.tuples(st.sampled_from(["a.jpg", "b.jpg", "\udcff.jpg"]), st.sampled_from("dfst")),
        max_size=12,
    )
)
def test_whatever_happens_the_last_word_of_each_image_counts(
    tmp_path_factory: pytest.TempPathFactory, events: list[tuple[str, str]]
) -> None:
    folder = tmp_path_factory.mktemp("log")
    last: dict[str, str] = {}
    for image, kind in events:
        with ResultsLog(folder) as results:
            if kind == "d":
                results.append(done(image))
                last[image] = "done"
            elif kind == "f":
                results.append(failed(image))
                last[image] = "failed"
            elif kind == "s":
                results.append(failed(image, status=Status.SKIPPED))
                last[image] = "skipped"
        if kind == "t":
            with (folder / "results.jsonl").open("ab") as file:
                file.write(b'{"image": "a.jpg", "stat')
    with ResultsLog(folder) as results:
        assert {record["image"]: record["status"] for record in results.records()} == last
        results.write_csv()
    assert len(rows_of(folder)) == len(last)
