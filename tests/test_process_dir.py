"""One folder, once and again: what is redone, what is left alone, and what is refused."""

from __future__ import annotations

import csv
import functools
import json
import os
import shutil
from collections import Counter
from pathlib import Path

import pytest
from parts import (
    BrightIsCell,
    as_plain_user,
    run_folder,
    tree,
    write_smear,
)
from PIL import Image

from bcseg_batch.errors import DeviceError, OutputError, UsageError
from bcseg_batch.items import Outcome, Status
from bcseg_batch.service import process_dir as process_dir_module
from bcseg_batch.service.listing import Listing
from bcseg_batch.service.process_dir import Summary, check_folders
from bcseg_batch.store.outputs import OutputFolder
from bcseg_batch.store.results import ResultsLog


@pytest.fixture
def source(tmp_path: Path) -> Path:
    folder = tmp_path / "in"
    folder.mkdir()
    return folder


@pytest.fixture
def output(tmp_path: Path) -> Path:
    return tmp_path / "out"


def lines(output: Path) -> list[dict[str, object]]:
    return [json.loads(line) for line in (output / "results.jsonl").read_text().splitlines()]


def pictures(output: Path) -> set[str]:
    return {name for name in tree(output) if name.startswith(("masks/", "composites/"))}


def counts(summary: Summary) -> tuple[int, int, int]:
    return summary.done, summary.failed, summary.skipped


# A first run -----------------------------------------------------------------------------------


def test_sub_folders_are_mirrored_and_every_input_has_a_record(source: Path, output: Path) -> None:
    write_smear(source / "a.png")
    write_smear(source / "b/c/a.jpg")
    (source / "bad.tif").write_text("no image")
    (source / "notes.txt").write_text("no input")
    summary = run_folder(source, output)
    assert counts(summary) == (2, 1, 0)
    assert summary.ignored == 1
    assert summary.ignored_names[0].image == "notes.txt"
    assert [image for image, _ in summary.failures] == ["bad.tif"]
    assert summary.left == 0
    assert pictures(output) == {
        "masks/a_mask.png",
        "masks/b/c/a_mask.png",
        "composites/a_bloodred.jpg",
        "composites/b/c/a_bloodred.jpg",
    }
    records = {record["image"]: record for record in lines(output)}
    assert set(records) == {"a.png", "b/c/a.jpg", "bad.tif"}
    assert records["bad.tif"]["error"].startswith("UnreadableImageError: 'bad.tif'")  # type: ignore[union-attr]  # a text
    assert (output / "results.csv").read_text().count("\n") == 4


def test_two_inputs_of_one_stem_keep_both_outputs_in_every_run(source: Path, output: Path) -> None:
    write_smear(source / "a.tif", 1)
    run_folder(source, output)
    first = tree(output)
    write_smear(source / "a.jpg", 2)
    assert counts(run_folder(source, output)) == (1, 0, 1)
    assert pictures(output) == {
        "masks/a_mask.png",
        "masks/a.jpg_mask.png",
        "composites/a_bloodred.jpg",
        "composites/a.jpg_bloodred.jpg",
    }
    assert tree(output)["masks/a_mask.png"] == first["masks/a_mask.png"]
    assert counts(run_folder(source, output, overwrite=True)) == (2, 0, 0)
    assert tree(output)["masks/a_mask.png"] == first["masks/a_mask.png"]
    assert len(pictures(output)) == 4


def test_deleting_the_outputs_of_one_namesake_confuses_no_other(source: Path, output: Path) -> None:
    write_smear(source / "a.jpg", 1)
    write_smear(source / "a.tif", 2)
    run_folder(source, output)
    before = tree(output)
    for name in ("masks/a_mask.png", "composites/a_bloodred.jpg"):
        (output / name).unlink()
    assert counts(run_folder(source, output)) == (1, 0, 1)
    assert {name: tree(output)[name] for name in pictures(output)} == {
        name: content for name, content in before.items() if name in pictures(output)
    }


def test_an_input_that_failed_again_keeps_its_name_from_newcomers(
    source: Path, output: Path
) -> None:
    write_smear(source / "a.tif", 1)
    run_folder(source, output)
    (source / "a.tif").write_text("damaged")
    assert counts(run_folder(source, output)) == (0, 1, 0)
    write_smear(source / "a.jpg", 2)
    run_folder(source, output)
    write_smear(source / "a.tif", 3)
    run_folder(source, output, composite_format="png", settings_sha256="d" * 64)
    last = {record["image"]: record["mask"] for record in lines(output)}
    assert last == {"a.tif": "masks/a_mask.png", "a.jpg": "masks/a.jpg_mask.png"}
    assert not [name for name in pictures(output) if name.endswith(".jpg")]


def test_an_empty_folder_is_nothing_to_do(source: Path, output: Path) -> None:
    assert counts(run_folder(source, output)) == (0, 0, 0)
    assert lines(output) == []


def test_without_recursion_only_the_folder_itself(source: Path, output: Path) -> None:
    write_smear(source / "a.png")
    write_smear(source / "b/a.png")
    summary = run_folder(source, output, recursive=False)
    assert (summary.done, summary.ignored) == (1, 1)


ODD_NAMES = [
    "a b.png", "a\nb.png", "é.png", "e\u0301.png", "\udcff.png", "%s{0}.png", "-rf.png", "A.png",
    "a.png",
]  # fmt: skip


def test_any_name_gets_its_outputs_and_is_done_once(source: Path, output: Path) -> None:
    write_smear(source / ODD_NAMES[0])
    for name in ODD_NAMES[1:]:
        shutil.copy(source / ODD_NAMES[0], source / name)
    assert counts(run_folder(source, output)) == (len(ODD_NAMES), 0, 0)
    assert len(pictures(output)) == 2 * len(ODD_NAMES)
    assert {record["image"] for record in lines(output)} == set(ODD_NAMES)
    assert counts(run_folder(source, output)) == (0, 0, len(ODD_NAMES))


def test_a_folder_named_like_a_mask_costs_no_other_image(source: Path, output: Path) -> None:
    for name in ("a.png", "a_mask.png/b.png", "c.png", "d/a.png"):
        write_smear(source / name)
    summary = run_folder(source, output)
    assert counts(summary) == (3, 1, 0)
    assert summary.failures[0][0] == "a_mask.png/b.png"


def test_files_that_may_not_be_read_fail_and_cost_no_other() -> None:
    with as_plain_user() as home:
        source = home / "in"
        for name in ("a.png", "closed.png", "names only/a.png"):
            write_smear(source / name)
        (source / "closed.png").chmod(0)
        (source / "names only").chmod(0o400)
        summary = run_folder(source, home / "out")
        assert counts(summary) == (1, 2, 0)
        assert all("Permission denied" in error for _, error in summary.failures)


# A second run ----------------------------------------------------------------------------------


@pytest.fixture
def once_done(source: Path, output: Path) -> dict[str, bytes]:
    """Run over two good images and a bad one; gives the output folder as it is then."""
    write_smear(source / "a.png", 1)
    write_smear(source / "b/c.png", 2)
    (source / "bad.png").write_text("no image")
    run_folder(source, output)
    return tree(output)


def test_a_second_run_does_nothing_but_try_the_failed(
    source: Path, output: Path, once_done: dict[str, bytes]
) -> None:
    predictor = BrightIsCell()
    for _ in range(3):
        assert counts(run_folder(source, output, predictor=predictor)) == (0, 1, 2)
    assert predictor.batches == []
    assert tree(output)["results.jsonl"] == once_done["results.jsonl"]
    assert {n: tree(output)[n] for n in pictures(output)} == {
        n: c for n, c in once_done.items() if n in pictures(output)
    }


def test_a_failed_image_that_was_mended_is_done(
    source: Path, output: Path, once_done: dict[str, bytes]
) -> None:
    write_smear(source / "bad.png")
    assert counts(run_folder(source, output)) == (1, 0, 2)


def test_changed_content_is_redone(source: Path, output: Path, once_done: dict[str, bytes]) -> None:
    write_smear(source / "a.png", 5)
    assert counts(run_folder(source, output)) == (1, 1, 1)
    assert tree(output)["masks/a_mask.png"] != once_done["masks/a_mask.png"]


def test_changed_content_of_the_same_size_is_redone(source: Path, output: Path) -> None:
    path = write_smear(source / "a.bmp", 1)
    run_folder(source, output)
    size_bytes = path.stat().st_size
    write_smear(path, 2)
    os.utime(path, ns=(7, 7))
    assert path.stat().st_size == size_bytes
    assert counts(run_folder(source, output)) == (1, 0, 0)


def test_a_touched_file_of_the_same_content_is_not_redone(
    source: Path, output: Path, once_done: dict[str, bytes]
) -> None:
    os.utime(source / "a.png", ns=(7, 7))
    assert counts(run_folder(source, output)) == (0, 1, 2)


@pytest.mark.parametrize("change", [{"model_sha256": "e" * 64}, {"settings_sha256": "e" * 64}])
def test_another_model_or_other_settings_redo_everything(
    source: Path, output: Path, once_done: dict[str, bytes], change: dict[str, object]
) -> None:
    assert counts(run_folder(source, output, **change)) == (2, 1, 0)  # type: ignore[arg-type]  # only options
    assert counts(run_folder(source, output, **change)) == (0, 1, 2)  # type: ignore[arg-type]  # only options
    assert counts(run_folder(source, output)) == (2, 1, 0)


@pytest.mark.parametrize("name", ["masks/a_mask.png", "composites/b/c_bloodred.jpg"])
@pytest.mark.parametrize("emptied", [False, True])
def test_a_missing_or_empty_output_is_redone(
    source: Path, output: Path, once_done: dict[str, bytes], name: str, emptied: bool
) -> None:
    (output / name).unlink()
    if emptied:
        (output / name).touch()
    assert counts(run_folder(source, output)) == (1, 1, 1)
    assert tree(output)[name] == once_done[name]


def test_what_was_made_of_an_image_goes_when_it_is_replaced_by_a_broken_one(
    source: Path, output: Path, once_done: dict[str, bytes]
) -> None:
    assert pictures(output) >= {"masks/a_mask.png", "composites/a_bloodred.jpg"}
    (source / "a.png").write_bytes(b"not an image any more")
    assert counts(run_folder(source, output)) == (0, 2, 1)
    left = {name for name in tree(output) if "/" in name}
    assert not [name for name in left if "/a_" in name]
    assert [name for name in left if "/b/c_" in name]
    assert "a.png" not in (output / "cells.csv").read_text()
    write_smear(source / "a.png", seed=5)
    assert counts(run_folder(source, output)) == (1, 1, 1)
    assert "masks/a_mask.png" in pictures(output)


def test_all_cells_stand_in_one_table_once(source: Path, output: Path) -> None:
    for name in ("b.png", "a.png", "sub/c.png"):
        write_smear(source / name, seed=len(name))
    for _ in range(2):
        run_folder(source, output, overwrite=True)
        with (output / "cells.csv").open(newline="") as file:
            rows = [(row["image"], row["label"]) for row in csv.DictReader(file)]
        assert len(rows) == len(set(rows))
        images = [image for image, _ in rows]
        assert images == sorted(images)
        for record in lines(output):
            count = record["cell_count"] + record["platelet_count"] if record["mask"] else 0
            assert record["mask"] is None or images.count(record["image"]) == count


def test_labels_that_are_asked_for_later_are_made(
    source: Path, output: Path, once_done: dict[str, bytes]
) -> None:
    run_folder(source, output, labels=True, settings_sha256="c" * 64)
    assert (output / "labels/a_labels.tif").exists()
    run_folder(source, output, labels=False, settings_sha256="b" * 64)
    assert not (output / "labels/a_labels.tif").exists()


@pytest.mark.parametrize(
    "damage",
    [
        {"notes": 5},
        {"flags": [{"name": "x"}]},
        {"mask": "/etc/passwd"},
        {"composite": "../elsewhere.jpg"},
        {"size_bytes": "many"},
        {"sha256": 1},
    ],
)
def test_a_record_that_somebody_edited_is_passed_over_and_its_image_done_again(
    source: Path, output: Path, once_done: dict[str, bytes], damage: dict[str, object]
) -> None:
    records = lines(output)
    records[-1].update(damage)
    (output / "results.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))
    summary = run_folder(source, output)
    assert summary.done == 1
    assert run_folder(source, output).done == 0


def test_overwrite_redoes_everything(
    source: Path, output: Path, once_done: dict[str, bytes]
) -> None:
    assert counts(run_folder(source, output, overwrite=True)) == (2, 1, 0)


def test_the_composite_of_the_former_format_goes(
    source: Path, output: Path, once_done: dict[str, bytes]
) -> None:
    run_folder(source, output, composite_format="png", settings_sha256="f" * 64)
    composites = {name for name in pictures(output) if name.startswith("composites")}
    assert composites == {"composites/a_bloodred.png", "composites/b/c_bloodred.png"}


def test_without_its_records_a_folder_is_done_again_to_the_same(
    source: Path, output: Path, once_done: dict[str, bytes]
) -> None:
    (output / "results.jsonl").unlink()
    assert counts(run_folder(source, output)) == (2, 1, 0)
    assert {name for name in tree(output) if "/" in name} == {n for n in once_done if "/" in n}
    assert len(lines(output)) == 3


def test_torn_records_are_mended_and_done_again(
    source: Path, output: Path, once_done: dict[str, bytes]
) -> None:
    path = output / "results.jsonl"
    path.write_bytes(path.read_bytes()[:-10])
    summary = run_folder(source, output)
    assert summary.done + summary.failed + summary.skipped == 3
    assert Counter(record["image"] for record in lines(output)) == {
        "a.png": 1, "b/c.png": 1, "bad.png": 1,
    }  # fmt: skip


# A run that is stopped -------------------------------------------------------------------------


class StopAfter:
    """Asks for a stop after so many files were taken."""

    def __init__(self, files: int) -> None:
        self._left = files

    @property
    def requested(self) -> bool:
        self._left -= 1
        return self._left < 0


def stopped_run(source: Path, output: Path, after: int) -> Summary:
    return run_folder(source, output, stop=StopAfter(after))


@pytest.mark.parametrize("after", [0, 1, 7, 11])
def test_a_stopped_run_finishes_what_it_took_and_the_next_does_the_rest(
    source: Path, output: Path, after: int
) -> None:
    for number in range(12):
        write_smear(source / f"{number}.png", number, (10, 10))
    summary = stopped_run(source, output, after)
    assert (summary.done, summary.left) == (after, 12 - after)
    assert len(lines(output)) == after
    summary = run_folder(source, output)
    assert (summary.done, summary.skipped, summary.left) == (12 - after, after, 0)
    assert Counter(record["image"] for record in lines(output)).most_common(1)[0][1] == 1


def test_a_stop_is_heard_while_finished_images_are_passed_over(source: Path, output: Path) -> None:
    for number in range(12):
        write_smear(source / f"{number}.png", number, (10, 10))
    run_folder(source, output)
    summary = stopped_run(source, output, after=5)
    assert (summary.skipped, summary.left) == (5, 7)


class Told:
    """What the progress was told of the total."""

    def __init__(self) -> None:
        self.totals: list[tuple[int, bool]] = []

    def start(self, total: int, *, is_whole: bool) -> None:
        self.totals.append((total, is_whole))

    def expect(self, total: int, *, is_whole: bool) -> None:
        self.totals.append((total, is_whole))

    def advance(self, outcome: Outcome | None) -> None:
        pass


def test_a_folder_beyond_what_is_looked_ahead_is_done_whole_or_said_to_be_left(
    source: Path, output: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(process_dir_module, "Listing", functools.partial(Listing, ahead=5))
    for number in range(12):
        write_smear(source / f"{number:02}.png", number, (10, 10))
    summary = stopped_run(source, output, after=3)
    assert (summary.done, summary.left, summary.unlisted) == (3, 5, True)
    assert not summary.is_whole
    told = Told()
    summary = run_folder(source, output, progress=told)
    assert (summary.done, summary.skipped, summary.left, summary.unlisted) == (9, 3, 0, False)
    assert summary.is_whole
    assert told.totals[0] == (5, False)
    assert told.totals[-1] == (12, True)
    assert told.totals == sorted(told.totals)
    assert [whole for _, whole in told.totals].count(True) == 1
    assert summary.left == stopped_run(source, output, after=12).left == 0


def test_beyond_a_thousand_what_fails_and_is_ignored_is_counted(
    source: Path, output: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(process_dir_module, "_NAMED", 3)
    for number in range(7):
        (source / f"{number}.png").touch()
        (source / f"{number}.txt").touch()
        (source / f"{number}.jpg").symlink_to(source / "nothing")
    summary = run_folder(source, output)
    assert (summary.failed, len(summary.failures)) == (7, 3)
    assert (summary.ignored, summary.missed, len(summary.ignored_names)) == (14, 7, 3)


class TakesAllAway(BrightIsCell):
    """Everything that was not read yet vanishes while the first batch is computed."""

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self._folder = folder

    def predict(self, batch):  # type: ignore[no-untyped-def]  # as its base
        for path in self._folder.iterdir():
            path.unlink()
        return super().predict(batch)


def test_beyond_a_thousand_what_vanishes_is_counted(
    source: Path, output: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(process_dir_module, "_NAMED", 3)
    for number in range(60):
        write_smear(source / f"{number:02}.png", number, (10, 10))
    summary = run_folder(source, output, predictor=TakesAllAway(source))
    assert summary.done + summary.changed == 60
    assert summary.changed == summary.skipped > 3
    assert len(summary.unsettled) == 3
    assert len({str(line["image"]) for line in lines(output)}) == 60
    assert not summary.is_whole


class BreaksAfter(BrightIsCell):
    """The device is lost after one batch."""

    def predict(self, batch):  # type: ignore[no-untyped-def]  # as its base
        if self.batches:
            raise DeviceError("cuda:0 is lost")
        return super().predict(batch)


def test_a_lost_device_leaves_a_folder_that_the_next_run_completes(
    source: Path, output: Path
) -> None:
    for number in range(20):
        write_smear(source / f"{number:02}.png", number, (10, 10))
    with pytest.raises(DeviceError):
        run_folder(source, output, predictor=BreaksAfter())
    summary = run_folder(source, output)
    assert summary.done + summary.skipped == 20
    assert {record["status"] for record in lines(output)} == {"done"}
    assert len(lines(output)) == 20


class Replaces(BrightIsCell):
    """Somebody writes over an input, or takes it away, while the first batch is computed."""

    def __init__(self, path: Path, content: bytes | None) -> None:
        super().__init__()
        self._path, self._content = path, content

    def predict(self, batch):  # type: ignore[no-untyped-def]  # as its base
        if not self.batches and self._content is None:
            self._path.unlink()
        return super().predict(batch)


def test_an_image_that_vanishes_is_named_and_not_failed(source: Path, output: Path) -> None:
    for number in range(30):
        write_smear(source / f"{number:02}.png", number, (10, 10))
    summary = run_folder(source, output, predictor=Replaces(source / "29.png", None))
    assert counts(summary) == (29, 0, 1)
    assert summary.unsettled == ["29.png"]
    assert lines(output)[-1]["status"] == "skipped"
    write_smear(source / "29.png", 29, (10, 10))
    assert counts(run_folder(source, output)) == (1, 0, 29)


# What is refused -------------------------------------------------------------------------------


def test_folders_within_each_other_are_refused_before_anything_is_written(tmp_path: Path) -> None:
    write_smear(tmp_path / "in/a.png")
    (tmp_path / "other").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "in")
    (tmp_path / "in/back").symlink_to(tmp_path / "other")
    before = sorted(path for path in tmp_path.rglob("*"))
    for source, output in [
        ("in", "in"),
        ("in", "in/out"),
        ("in", "in/deep/out"),
        ("in", "."),
        ("in", "link"),
        ("in", "link/out"),
        ("link", "in/out"),
        ("in", "other/../in/out"),
        ("in/back", "other/out"),
        ("other", "in/back"),
    ]:
        with pytest.raises(UsageError, match="one in the other"):
            run_folder(tmp_path / source, tmp_path / output)
        assert sorted(path for path in tmp_path.rglob("*")) == before


@pytest.mark.parametrize("name", ["masks", "composites", "labels", "cells"])
def test_a_link_in_the_output_folder_that_leads_into_the_input_is_refused(
    tmp_path: Path, name: str
) -> None:
    write_smear(tmp_path / "in/a.png")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / name).symlink_to(tmp_path / "in")
    with pytest.raises(UsageError, match="one in the other"):
        run_folder(tmp_path / "in", tmp_path / "out")
    assert [path.name for path in (tmp_path / "in").iterdir()] == ["a.png"]


def test_neighbours_whose_names_begin_alike_are_fine(tmp_path: Path) -> None:
    write_smear(tmp_path / "in/a.png")
    assert counts(run_folder(tmp_path / "in", tmp_path / "in-out")) == (1, 0, 0)


def test_a_missing_or_wrong_folder_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "in").mkdir()
    (tmp_path / "circle").symlink_to(tmp_path / "circle")
    for source, output, words in [
        ("missing", "out", "does not exist"),
        ("file", "out", "is not a folder"),
        ("in", "file", "is a file"),
        ("in", "circle", "circle"),
        ("in", "n" * 300, "too long"),
        ("circle", "out", "circle"),
    ]:
        with pytest.raises(UsageError, match=words):
            run_folder(tmp_path / source, tmp_path / output)
    assert not (tmp_path / "out").exists()


def test_folders_behind_a_closed_door_are_refused_in_words() -> None:
    with as_plain_user() as home:
        (home / "in").mkdir()
        (home / "closed").mkdir()
        (home / "closed").chmod(0)
        for source, output in [("in", "closed/out"), ("closed/in", "out")]:
            with pytest.raises(UsageError, match="Permission denied"):
                check_folders(home / source, home / output)
        with pytest.raises(UsageError, match=r"cannot be listed: Permission denied"):
            run_folder(home / "closed", home / "out")


def test_an_output_folder_in_use_is_refused(source: Path, output: Path) -> None:
    write_smear(source / "a.png")
    with OutputFolder(output), pytest.raises(UsageError, match="another run"):
        run_folder(source, output)
    assert counts(run_folder(source, output)) == (1, 0, 0)


def test_what_cannot_be_written_leaves_no_record(source: Path, output: Path) -> None:
    write_smear(source / "a.png")
    output.mkdir()
    (output / "composites").write_text("in the way")
    with pytest.raises(OutputError, match="composites"):
        run_folder(source, output)
    assert lines(output) == []
    (output / "composites").unlink()
    assert counts(run_folder(source, output)) == (1, 0, 0)


def test_progress_hears_of_every_input_once(source: Path, output: Path) -> None:
    class Counting:
        total = 0

        def __init__(self) -> None:
            self.heard: list[str | None] = []

        def start(self, total: int, *, is_whole: bool) -> None:
            assert is_whole
            self.total = total

        def expect(self, total: int, *, is_whole: bool) -> None:
            raise AssertionError("the total is known from the start")

        def advance(self, outcome: Outcome | None) -> None:
            self.heard.append(outcome and outcome.image)

    write_smear(source / "a.png")
    run_folder(source, output)
    write_smear(source / "b.png")
    (source / "c.png").touch()
    progress = Counting()
    run_folder(source, output, progress=progress)
    assert progress.total == 3
    assert Counter(progress.heard) == {None: 1, "b.png": 1, "c.png": 1}


def test_the_mask_has_the_size_after_orientation(source: Path, output: Path) -> None:
    exif = Image.Exif()
    exif[274] = 6
    Image.new("RGB", (40, 20), "white").save(source / "a.jpg", exif=exif)
    run_folder(source, output)
    (record,) = lines(output)
    assert (record["width_px"], record["height_px"]) == (20, 40)
    assert record["notes"] == ["orientation 6 applied"]
    for name in (str(record["mask"]), str(record["composite"])):
        with Image.open(output / name) as picture:
            assert picture.size == (20, 40)
            assert not picture.getexif()


def test_outputs_of_a_run_that_died_are_not_taken_for_those_of_an_earlier_one(
    source: Path, output: Path, once_done: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    append = ResultsLog.append

    def die_before_the_record(log: ResultsLog, outcome: Outcome) -> bool:
        if outcome.status is Status.DONE:
            raise SystemExit
        return append(log, outcome)

    with monkeypatch.context() as dying:
        dying.setattr(ResultsLog, "append", die_before_the_record)
        with pytest.raises(SystemExit):
            run_folder(source, output, threshold=0.999, settings_sha256="f" * 64)
    assert counts(run_folder(source, output))[2] < 2
    for name in ("masks/a_mask.png", "masks/b/c_mask.png"):
        assert tree(output)[name] == once_done[name]
