"""Parts of a folder: each image in one of them, and together as if there had been none."""

from __future__ import annotations

import itertools
import json
import random
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from parts import (
    OPTIONS,
    BrightIsCell,
    NeverStop,
    Quiet,
    local_engine,
    run_folder,
    tree,
    write_smear,
)
from test_names import caseless
from test_results import done, failed

from bcseg_batch.errors import OutputError, UsageError
from bcseg_batch.intake.ignore import IgnoreRules
from bcseg_batch.items import Outcome, Status
from bcseg_batch.service import shards as service_shards
from bcseg_batch.service.process_dir import Summary, process_dir
from bcseg_batch.service.shards import merge_folder
from bcseg_batch.store import merge
from bcseg_batch.store.images import SUFFIXES
from bcseg_batch.store.names import OutputNames, candidates, name_key, name_root
from bcseg_batch.store.outputs import OutputFolder, is_written_to
from bcseg_batch.store.read_back import read_outcomes
from bcseg_batch.store.results import ResultsLog
from bcseg_batch.store.shards import Shard, record_files
from bcseg_batch.store.verify import Verified, verify

RULES = IgnoreRules({".jpg", ".tif", ".png"})
DIVISION = [Shard(4, number) for number in range(1, 5)]

# Names ----------------------------------------------------------------------------------------

stems = st.one_of(
    st.sampled_from(
        ["a", "A", "\u00e9", "e\u0301", "\u00c9", "\u00df", "ss", "\u0345", "\udcff", "a~2"]
    ),
    st.text(st.characters(exclude_characters="/\0", codec=None), max_size=3),
)
endings = st.lists(
    st.sampled_from([".jpg", ".tif", ".PNG", "~2", "~3", "~12", ".x", ".0001", ".J\u0050G", "\n"]),
    max_size=4,
).map("".join)
images = st.builds(
    lambda folder, stem, middle, suffix: folder + stem + middle + suffix,
    st.sampled_from(["", "b/", "B/", "b.jpg/"]),
    stems,
    endings,
    st.sampled_from([".jpg", ".tif", ".PNG", ".Tif"]),
).filter(lambda image: RULES.reason_path(image) is None)
image_lists = st.lists(images, unique=True, max_size=12)


@settings(max_examples=300)
@given(image_lists, st.integers(1, 5))
@example(["a.jpg", "a.jpg.tif", "a.tif", "a.tif~2.png", "A.TIF", "a~2.jpg"], 5)
def test_every_image_is_in_one_part_and_gets_the_name_it_has_without_parts(
    names: list[str], count: int
) -> None:
    whole = OutputNames()
    expected = {image: whole.claim(image) for image in names}
    claimed: list[tuple[str, str]] = []
    for number in range(1, count + 1):
        holds = Shard(count, number).part(RULES.suffixes)
        owned = OutputNames()
        claimed += [(image, owned.claim(image)) for image in names if holds(image)]
    assert len(claimed) == len(names)
    assert dict(claimed) == expected
    assert len({caseless(name) for _, name in claimed}) == len(names)


@settings(max_examples=300)
@given(images)
def test_an_image_shares_its_root_with_every_name_it_may_ever_get(image: str) -> None:
    root = name_root(RULES.suffixes)
    for name in itertools.islice(candidates(image), 12):
        assert root(name) == root(image) == root(name_key(name))


def test_a_name_without_a_suffix_shares_its_root_too() -> None:
    root = name_root({"", ".jpg"})
    assert {root(name) for name in itertools.islice(candidates("b/a"), 4)} == {"b/a"}


def test_frames_that_differ_behind_a_dot_are_in_different_parts() -> None:
    names = [f"slide.{number:04}.tif" for number in range(400)]
    sizes = [sum(map(shard.part(RULES.suffixes), names)) for shard in DIVISION]
    assert sum(sizes) == 400
    assert min(sizes) > 70


def test_the_parts_are_the_same_for_ever() -> None:
    names = ["a.jpg", "b/c.tif", "B/C.PNG", "\u00e9.jpg", "\udcff.jpg", "slide.0001.tif", ".jpg"]
    parts = [
        next(shard.number for shard in DIVISION if shard.part(RULES.suffixes)(name))
        for name in names
    ]
    assert parts == [4, 4, 4, 2, 3, 3, 1]
    assert parts[1] == parts[2]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "takes K/N, such as 3/16"),
        ("/", "job array"),
        ("3", "takes K/N"),
        ("3/x", "takes K/N"),
        ("-1/4", "takes K/N"),
        ("1/4/2", "takes K/N"),
        ("\u0661/4", "takes K/N"),
        ("0/16", r"numbered from 1.*--array=1-16.*add 1"),
        ("0/0", "numbered from 1"),
        ("17/16", "there are 16 parts.*started again"),
        ("1/0", "there are 0 parts"),
    ],
)
def test_what_is_no_part_is_refused_with_what_to_do(text: str, words: str) -> None:
    with pytest.raises(UsageError, match=words):
        Shard.parse(text)


def test_a_part_is_read_and_named() -> None:
    shard = Shard.parse(" 03/16 ")
    assert shard == Shard(16, 3)
    assert str(shard) == "3/16"
    assert shard.records_name == "results.3-of-16.jsonl"


# Runs -----------------------------------------------------------------------------------------


@pytest.fixture
def source(tmp_path: Path) -> Path:
    folder = tmp_path / "in"
    folder.mkdir()
    names = [
        "a.jpg", "a.tif", "A.png", "a.tif.png", "b/a.png", "b/a.jpg", "B/a.png", "\u00e9.png",
        "e\u0301.png", *(f"{number:02}.png" for number in range(12)),
    ]  # fmt: skip
    for seed, name in enumerate(names):
        write_smear(folder / name, seed, (16, 12))
    (folder / "bad.jpg").write_text("no image")
    (folder / "notes.txt").touch()
    return folder


def run_shard(source: Path, output: Path, shard: Shard, **changes: object) -> Summary:
    return process_dir(
        source,
        output,
        engine=local_engine(BrightIsCell(), replace(OPTIONS, **changes)),
        rules=IgnoreRules(SUFFIXES),
        recursive=True,
        overwrite=False,
        stop=NeverStop(),
        progress=Quiet(),
        shard=shard,
    )


def timeless(outcome: Outcome) -> Outcome:
    return replace(outcome, seconds=None, finished_at=None)


def last_records(output: Path) -> dict[str, Outcome]:
    return {i: timeless(outcome) for i, outcome in read_outcomes(output).outcomes.items()}


def files_of(output: Path) -> dict[str, bytes]:
    """Give what is to be the same, byte for byte, however the work was divided."""
    return {n: c for n, c in tree(output).items() if "/" in n or n == "cells.csv"}


def names_in(output: Path) -> set[str]:
    return {path.name for path in output.iterdir() if path.is_file()}


def records_of(output: Path) -> list[dict[str, object]]:
    return [json.loads(line) for line in (output / "results.jsonl").read_text().splitlines()]


def lines_of(output: Path) -> list[object]:
    return [record["image"] for record in records_of(output)]


def test_all_parts_together_are_what_one_run_makes(source: Path, tmp_path: Path) -> None:
    whole, output = tmp_path / "whole", tmp_path / "out"
    one = run_folder(source, whole)
    summaries = [run_shard(source, output, shard) for shard in reversed(DIVISION)]
    for name in ("done", "failed", "skipped", "ignored"):
        assert sum(getattr(part, name) for part in summaries) == getattr(one, name)
    assert [part.shard for part in summaries] == ["4/4", "3/4", "2/4", "1/4"]
    assert one.shard is None
    assert sum(len(part.failures) for part in summaries) == 1
    assert not names_in(output) & {"results.jsonl", "results.csv", "cells.csv"}

    # What reads an output folder needs no merge.
    assert last_records(output) == last_records(whole)
    verified = Verified()
    assert list(verify(output, verified, source)) == []
    assert (verified.images, verified.is_running) == (22, False)

    merged = merge_folder(output, parquet=False)
    assert merged is not None
    assert (merged.records, merged.shards, merged.absent) == (22, ["1/4", "2/4", "3/4", "4/4"], [])
    assert names_in(output) == {".bcseg.lock", "results.jsonl", "results.csv", "cells.csv"}
    assert last_records(output) == last_records(whole)
    assert files_of(output) == files_of(whole)
    assert Counter(lines_of(output)) == dict.fromkeys(last_records(whole), 1)
    assert list(verify(output, Verified(), source)) == []
    assert merge_folder(output, parquet=False) is None


def test_what_any_run_has_done_no_shard_does_again(source: Path, output: Path) -> None:
    (source / "bad.jpg").unlink()
    (source / "01.png").rename(source.parent / "01.png")
    run_folder(source, output)
    (source.parent / "01.png").rename(source / "01.png")
    done_of_four = [run_shard(source, output, shard).done for shard in DIVISION[:2]]
    everything = {shard: run_shard(source, output, shard) for shard in [Shard(2, 1), Shard(2, 2)]}
    again = [run_shard(source, output, Shard(3, number)) for number in (1, 2, 3)]
    assert sum(done_of_four) + sum(part.done for part in everything.values()) == 1
    assert sum(part.done for part in again) == 0
    assert sum(part.skipped for part in again) == 21
    summary = run_folder(source, output)  # merges
    assert (summary.done, summary.skipped) == (0, 21)
    assert Counter(lines_of(output)).most_common(1)[0][1] == 1
    assert not [name for name in names_in(output) if "-of-" in name]


def test_a_shard_run_again_tries_its_failures_and_nothing_else(source: Path, output: Path) -> None:
    first = [run_shard(source, output, shard) for shard in DIVISION]
    before = tree(output)
    again = [run_shard(source, output, shard) for shard in DIVISION]
    assert [part.failed for part in again] == [part.failed for part in first]
    assert sum(part.failed for part in again) == 1
    assert sum(part.done for part in again) == 0
    assert tree(output) == before


@pytest.fixture
def output(tmp_path: Path) -> Path:
    return tmp_path / "out"


def test_a_machine_whose_clock_is_behind_has_the_last_word_all_the_same(
    source: Path, output: Path
) -> None:
    run_folder(source, output)
    records = records_of(output)
    for record in records:
        record["finished_at"] = "2190-01-01T00:00:00.000+00:00"
    (output / "results.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))
    for shard in DIVISION:
        run_shard(source, output, shard, settings_sha256="d" * 64)
    found = read_outcomes(output).outcomes.values()
    assert {outcome.settings_sha256 for outcome in found} == {"d" * 64}
    expected = last_records(output)
    merge_folder(output, parquet=False)
    assert last_records(output) == expected
    assert run_folder(source, output, settings_sha256="d" * 64).done == 0


def test_an_interrupted_redo_is_known_to_every_reader(source: Path, output: Path) -> None:
    run_folder(source, output)
    found = read_outcomes(output).outcomes.values()
    (image,) = [o.image for o in found if o.mask == "masks/A_mask.png"]
    shard = next(shard for shard in DIVISION if shard.part(SUFFIXES)(image))
    with ResultsLog(output, shard) as results:
        results.append(failed(image, "ImageChangedError: being done again", status=Status.SKIPPED))
        known = results.known(image)
        assert known is not None
        assert known.mask == "masks/A_mask.png"
        assert "masks/A_mask.png" in known.outputs
    read = read_outcomes(output)
    assert read.outcomes[image].status is Status.SKIPPED
    assert "masks/A_mask.png" in read.earlier[image]
    assert [f.image for f in verify(output, Verified())] == [image]
    merge_folder(output, parquet=False)
    assert read_outcomes(output).earlier == read.earlier
    assert run_folder(source, output).done == 1


def test_a_shard_that_was_killed_leaves_no_half_file_behind_after_the_merge(
    source: Path, output: Path
) -> None:
    run_shard(source, output, DIVISION[0])
    part = output / "masks/.bcseg-0123.part"
    part.write_bytes(b"half")
    with (output / DIVISION[0].records_name).open("ab") as file:
        file.write(b'{"image": "torn')
    run_shard(source, output, DIVISION[1])
    assert part.exists()  # another shard may be writing it
    merged = merge_folder(output, parquet=False)
    assert merged is not None
    assert len(merged.damaged) == 1
    assert merged.absent == ["3/4", "4/4"]
    assert not part.exists()


def test_parquet_is_written_again_where_it_is_there(source: Path, output: Path) -> None:
    pytest.importorskip("pyarrow", reason="the extra parquet is not installed")
    import pyarrow.parquet

    run_shard(source, output, Shard(1, 1))
    merge_folder(output, parquet=True)
    assert pyarrow.parquet.read_table(output / "results.parquet").num_rows == 22
    write_smear(source / "new.png", 99)
    run_shard(source, output, Shard(1, 1))
    merge_folder(output, parquet=False)
    assert pyarrow.parquet.read_table(output / "results.parquet").num_rows == 23


# Who may be there at once ---------------------------------------------------------------------


def test_shards_of_one_division_run_at_once_and_nobody_else(output: Path) -> None:
    with OutputFolder(output, Shard(4, 1)):
        assert is_written_to(output)
        with OutputFolder(output, Shard(4, 3)):
            with pytest.raises(UsageError, match="another run"):
                OutputFolder(output, Shard(4, 3))
            with pytest.raises(UsageError, match=r"shard 1/4, whose.*4 parts as well"):
                OutputFolder(output, Shard(5, 3))
            with pytest.raises(UsageError, match="being written by other runs"):
                OutputFolder(output)
            with pytest.raises(UsageError, match="being written by other runs"):
                merge_folder(output, parquet=False)
        assert is_written_to(output)
    assert not is_written_to(output)
    with OutputFolder(output, Shard(5, 3)):
        pass
    with OutputFolder(output):
        assert is_written_to(output)
        with pytest.raises(UsageError, match="another run"):
            OutputFolder(output, Shard(4, 1))


def test_merging_what_is_not_there_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no output folder"):
        merge_folder(tmp_path / "nothing", parquet=False)
    assert not (tmp_path / "nothing").exists()


def test_a_store_is_no_folder_that_shards_share(source: Path) -> None:
    from bcseg_batch.remote.url import parse_place

    with pytest.raises(UsageError, match="needs an output folder"):
        process_dir(
            source,
            parse_place("s3://bucket/out"),
            engine=local_engine(BrightIsCell()),
            rules=RULES,
            recursive=True,
            overwrite=False,
            stop=NeverStop(),
            progress=Quiet(),
            shard=Shard(4, 1),
        )


# Merging, killed anywhere ---------------------------------------------------------------------

NAMES = [f"{letter}.png" for letter in "abcdefgh"]
LOGS = [None, Shard(2, 1), Shard(2, 2), Shard(3, 1), Shard(3, 2), Shard(3, 3)]


class Killed(BaseException):
    """The process dies here."""


def dies(*_: object) -> None:
    raise Killed


def killed_merge(output: Path, step: int) -> None:
    """Merge, and die at one of its steps; at none of them it is through."""
    with pytest.MonkeyPatch.context() as dying:
        if step == 0:
            dying.setattr(merge, "whole_file", dies)
        elif step == 1:
            dying.setattr(service_shards, "_write_tables", lambda *_, **__: dies())
        elif step == 2:
            dying.setattr(service_shards, "remove_shard_files", dies)
        elif step == 3:
            # One of the files is gone.
            unlink, gone = Path.unlink, itertools.count()

            def one_only(path: Path, **options: bool) -> None:
                if "-of-" in path.name and next(gone):
                    raise Killed
                unlink(path, **options)

            dying.setattr(Path, "unlink", one_only)
        try:
            merge_folder(output, parquet=False)
        except Killed:
            assert step < 4


event = st.one_of(
    st.tuples(st.sampled_from(NAMES), st.sampled_from([2, 3, 0]), st.sampled_from("dfs")),
    st.tuples(st.just("merge"), st.integers(0, 4), st.just("")),
)


@settings(max_examples=80, deadline=None)
@given(st.lists(event, max_size=14), st.integers(0, 4))
def test_the_last_word_of_each_image_survives_every_merge_and_every_death(
    tmp_path_factory: pytest.TempPathFactory, events: list[tuple[str, int, str]], last_step: int
) -> None:
    output = tmp_path_factory.mktemp("out")
    words: dict[str, list[tuple[str, str | None]]] = {}
    for number, (what, which, kind) in enumerate(events):
        if what == "merge":
            killed_merge(output, which)
            continue
        shard = None
        if which:
            parts = [Shard(which, k) for k in range(1, which + 1)]
            shard = next(part for part in parts if part.part({".png"})(what))
        else:
            merge_folder(output, parquet=False)
        make: Callable[..., Outcome] = done if kind == "d" else failed
        changes: dict[str, object] = {"sha256": f"{number:064x}", "finished_at": None}
        if kind == "s":
            changes["status"] = Status.SKIPPED
        with ResultsLog(
            output, shard, shard.part({".png"}) if shard else lambda _: True
        ) as results:
            assert results.append(make(what, **changes))
        words.setdefault(what, []).append((f"{number:064x}", make(what).mask))
    killed_merge(output, last_step)
    if words:
        read = read_outcomes(output).outcomes
        assert {i: o.sha256 for i, o in read.items()} == {i: w[-1][0] for i, w in words.items()}
    merge_folder(output, parquet=False)
    assert [path.name for path in record_files(output)] in ([], ["results.jsonl"])
    if words:
        lines = records_of(output)
        found = {i: [r["sha256"] for r in lines if r["image"] == i] for i in words}
        assert found == {i: [sha256 for sha256, _ in w] for i, w in words.items()}
        assert len(lines) == sum(map(len, words.values()))
        with ResultsLog(output) as results:
            masks = dict(results.masks())
        expected = {i: next((m for _, m in reversed(w) if m), None) for i, w in words.items()}
        assert masks == {i: mask for i, mask in expected.items() if mask}


def test_records_are_joined_in_the_order_of_time_from_more_files_than_are_held_open(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(merge, "_OPEN_FILES", 2)
    seeded = random.Random(0)
    times = list(range(40))
    seeded.shuffle(times)
    for number, second in enumerate(times):
        shard = Shard(5, number % 5 + 1)
        at = f"2026-01-01T00:00:{second:02}.000+00:00"
        with ResultsLog(tmp_path, shard) as results:
            results.append(done(f"{number}.png", finished_at=at))
    merge_folder(tmp_path, parquet=False)
    found = [record["finished_at"] for record in records_of(tmp_path)]
    assert found == sorted(found)
    assert len(found) == 40


def test_a_disk_that_refuses_the_merge_loses_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with ResultsLog(tmp_path, Shard(2, 1)) as results:
        results.append(done("a.png"))
    before = tree(tmp_path)

    def full(self: Path, target: Path) -> Path:
        raise OSError(28, "No space left on device", str(self))

    with monkeypatch.context() as refusing:
        refusing.setattr(Path, "replace", full)
        with pytest.raises(OutputError, match="free some space"):
            merge_folder(tmp_path, parquet=False)
    after = tree(tmp_path)
    assert after["results.1-of-2.jsonl"] == before["results.1-of-2.jsonl"]
    assert after.get("results.jsonl") in (None, b"")
    merge_folder(tmp_path, parquet=False)
    assert [o.image for o in read_outcomes(tmp_path).outcomes.values()] == ["a.png"]
