"""Photographs and outputs in a store of objects: a real S3 server, killed and restarted at will."""

from __future__ import annotations

import gc
import json
import os
import pickle
import signal
import subprocess
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from parts import OPTIONS, BrightIsCell, NeverStop, Quiet, command, local_engine, tree, write_smear
from stores import BUCKET, ENVIRONMENT, S3Server

from bcseg_batch.errors import ImageChangedError, StorageError, UsageError
from bcseg_batch.intake.ignore import IgnoreRules
from bcseg_batch.intake.scan import IgnoredFile
from bcseg_batch.items import InputFile, Outcome
from bcseg_batch.remote.bucket import Bucket
from bcseg_batch.remote.inputs import RemoteInputs
from bcseg_batch.remote.lease import Lease
from bcseg_batch.remote.outputs import RemoteOutputs
from bcseg_batch.remote.records import RemoteRecords
from bcseg_batch.remote.url import Place, Url, parse_place
from bcseg_batch.service.folders import check_folders
from bcseg_batch.service.process_dir import Progress, Stop, Summary, process_dir
from bcseg_batch.store.images import SUFFIXES

RULES = IgnoreRules(SUFFIXES)
SOURCE = Url("s3", BUCKET, "in")
OUTPUT = Url("s3", BUCKET, "out")


@pytest.fixture(scope="module")
def running() -> Iterator[S3Server]:
    server = S3Server()
    yield server
    server.close()


@pytest.fixture
def server(running: S3Server, monkeypatch: pytest.MonkeyPatch) -> Iterator[S3Server]:
    """An S3 server with one empty bucket, and an environment that leads to it."""
    for name in [name for name in os.environ if name.startswith("AWS_")]:
        monkeypatch.delenv(name)
    for name, value in {**ENVIRONMENT, "AWS_ENDPOINT_URL": running.url}.items():
        monkeypatch.setenv(name, value)
    running.empty()
    yield running
    gc.collect()  # what a client has left open is told here, and not in the next test


def run(
    source: Place,
    output: Place,
    *,
    stop: Stop | None = None,
    progress: Progress | None = None,
    overwrite: bool = False,
    **changes: object,
) -> Summary:
    return process_dir(
        source,
        output,
        engine=local_engine(BrightIsCell(), replace(OPTIONS, **changes)),
        rules=RULES,
        recursive=True,
        overwrite=overwrite,
        stop=stop or NeverStop(),
        progress=progress or Quiet(),
        pause=lambda _seconds: None,
    )


def counts(summary: Summary) -> tuple[int, int, int]:
    return summary.done, summary.failed, summary.skipped


def records(jsonl: bytes) -> dict[str, dict[str, object]]:
    """Give the last record of each image without what differs from run to run."""
    found = {}
    for line in jsonl.splitlines():
        record = json.loads(line)
        for name in ("seconds", "finished_at", "mtime_ns"):
            record.pop(name)
        found[record["image"]] = record
    return found


def smears(folder: Path, count: int) -> Path:
    for number in range(count):
        write_smear(folder / f"{number:03}.png", number, (10, 10))
    return folder


def upload(server: S3Server, folder: Path, prefix: str = "in") -> None:
    for name, content in tree(folder).items():
        server.put(f"{prefix}/{name}", content)


class After:
    """Calls something once so many images are through."""

    def __init__(self, count: int, call: object) -> None:
        self._left = count
        self._call = call
        self.requested = False

    def start(self, total: int, *, is_whole: bool) -> None:
        pass

    def expect(self, total: int, *, is_whole: bool) -> None:
        pass

    def advance(self, outcome: Outcome | None) -> None:
        self._left -= 1
        if self._left == 0:
            assert callable(self._call)
            self._call()


# Places ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "place"),
    [
        ("s3://box", Url("s3", "box", "")),
        ("S3://box/", Url("s3", "box", "")),
        ("gs://box/a/b/", Url("gs", "box", "a/b")),
        ("az://box/ü #?%25*[1]", Url("az", "box", "ü #?%25*[1]")),
        ("folder/s3:x", Path("folder/s3:x")),
        ("in", Path("in")),
    ],
)
def test_a_place_is_read_as_it_is_written(text: str, place: Place) -> None:
    assert parse_place(text) == place


@pytest.mark.parametrize(
    "text",
    ["http://box/a", "s3://", "s3:///a", "s3://key:word@box/a", "s3://box/a//b", "s3://box/../b"],
)
def test_what_is_no_place_is_refused(text: str) -> None:
    with pytest.raises(UsageError):
        parse_place(text)


@pytest.mark.parametrize(
    ("one", "other", "is_refused"),
    [
        ("s3://box/a", "s3://box/a", True),
        ("s3://box/a", "s3://box/a/b", True),
        ("s3://box", "s3://box/a", True),
        ("s3://box/a", "s3://box/ab", False),
        ("s3://box/a", "s3://other/a", False),
        ("s3://box/a", "gs://box/a", False),
    ],
)
def test_places_one_in_the_other_are_refused(one: str, other: str, is_refused: bool) -> None:
    for source, output in ((one, other), (other, one)):
        if is_refused:
            with pytest.raises(UsageError, match="one in the other"):
                check_folders(parse_place(source), parse_place(output))
        else:
            check_folders(parse_place(source), parse_place(output))


# Whole runs ------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("is_source_far", [True, False])
@pytest.mark.parametrize("is_output_far", [True, False])
def test_outputs_and_records_are_those_of_folders(
    server: S3Server, tmp_path: Path, is_source_far: bool, is_output_far: bool
) -> None:
    folder = smears(tmp_path / "in", 3)
    write_smear(folder / "sub/ü #?%25*[x].jpg", 7)
    write_smear(folder / "sub/a.tif", 8)
    write_smear(folder / "sub/a.jpg", 9)
    (folder / "bad.png").write_text("no image")
    (folder / "notes.txt").write_text("no input")
    upload(server, folder)
    output = tmp_path / "out"
    assert counts(run(folder, output)) == (6, 1, 0)
    expected = tree(output)

    source: Place = SOURCE if is_source_far else folder
    target: Place = OUTPUT if is_output_far else tmp_path / "second"
    summary = run(source, target)
    assert (counts(summary), summary.ignored) == ((6, 1, 0), 1)
    found = server.tree("out") if is_output_far else tree(tmp_path / "second")
    found.setdefault(".bcseg.lock", b"")
    assert found.keys() == expected.keys()
    assert records(found["results.jsonl"]) == records(expected["results.jsonl"])
    differs = {".bcseg.lock", "results.jsonl", "results.csv"}
    assert all(found[name] == expected[name] for name in expected.keys() - differs)

    again = run(source, target)
    assert counts(again) == (0, 1, 6)


def test_an_object_says_what_kind_of_file_it_is(server: S3Server, tmp_path: Path) -> None:
    run(smears(tmp_path, 1), OUTPUT)
    for name, kind in (
        ("masks/000_mask.png", "image/png"),
        ("composites/000_bloodred.jpg", "image/jpeg"),
        ("results.csv", "text/csv"),
        ("results.jsonl", "application/x-ndjson"),
    ):
        assert server.head(f"out/{name}")["ContentType"] == kind


@pytest.mark.slow
def test_what_is_missing_or_changed_is_done_again(server: S3Server, tmp_path: Path) -> None:
    upload(server, smears(tmp_path, 4))
    run(SOURCE, OUTPUT)
    server.delete("out/masks/001_mask.png")
    server.put("in/002.png", write_smear(tmp_path / "new.png", 99, (12, 12)).read_bytes())
    assert counts(run(SOURCE, OUTPUT)) == (2, 0, 2)
    assert "masks/001_mask.png" in server.tree("out")
    assert counts(run(SOURCE, OUTPUT, settings_sha256="c" * 64)) == (4, 0, 0)
    # What was the first time only uploaded anew has another time, and the same content.
    server.put("in/003.png", (tmp_path / "003.png").read_bytes())
    assert counts(run(SOURCE, OUTPUT, settings_sha256="c" * 64)) == (0, 0, 4)


@pytest.mark.slow
def test_a_run_that_is_stopped_keeps_its_records_and_the_next_ends_it(
    server: S3Server, tmp_path: Path
) -> None:
    upload(server, smears(tmp_path, 20))
    stop = After(3, lambda: setattr(stop, "requested", True))
    first = run(SOURCE, OUTPUT, stop=stop, progress=stop, batch_size=1)
    assert first.left
    there = server.tree("out")
    assert "results.jsonl" not in there
    assert any(name.startswith("results.jsonl.parts/") for name in there)
    second = run(SOURCE, OUTPUT)
    assert counts(second) == (20 - first.done, 0, first.done)
    there = server.tree("out")
    assert len(there["results.jsonl"].splitlines()) == 20
    assert not [name for name in there if name.startswith("results.jsonl.parts/")]


@pytest.mark.slow
def test_a_store_that_dies_fails_no_image(server: S3Server, tmp_path: Path) -> None:
    upload(server, smears(tmp_path, 30))
    dies = After(5, server.stop)
    with pytest.raises(StorageError, match="run again"):
        run(SOURCE, OUTPUT, progress=dies, batch_size=1)
    server.start()
    # The lock of the dead run is of this very process: it would be waited for.
    server.delete("out/.bcseg.lock")
    summary = run(SOURCE, OUTPUT)
    assert (summary.failed, summary.done + summary.skipped) == (0, 30)
    assert {json.loads(x)["status"] for x in server.tree("out")["results.jsonl"].splitlines()} == {
        "done"
    }


@pytest.mark.slow
def test_a_killed_run_is_resumed_and_does_nothing_twice(server: S3Server, tmp_path: Path) -> None:
    upload(server, smears(tmp_path, 16))
    asked = ["process-dir", str(SOURCE), str(OUTPUT), "--device", "cpu", "--batch-size", "1"]
    killed = subprocess.Popen([command(), *asked], stderr=subprocess.PIPE)
    deadline_s = time.monotonic() + 110
    while len([n for n in server.tree("out") if n.startswith("masks/")]) < 3:
        assert killed.poll() is None
        assert time.monotonic() < deadline_s
        time.sleep(0.1)
    killed.send_signal(signal.SIGKILL)
    killed.communicate()
    done = subprocess.run([command(), *asked], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    there = server.tree("out")
    lines = [json.loads(line) for line in there["results.jsonl"].splitlines()]
    final = {line["image"]: line["status"] for line in lines}
    assert final == {f"{number:03}.png": "done" for number in range(16)}
    assert len([name for name in there if name.startswith("masks/")]) == 16
    assert there["results.csv"].count(b"\n") == 17


def test_two_runs_on_one_output_are_refused(server: S3Server, tmp_path: Path) -> None:
    folder = smears(tmp_path, 1)
    with Lease(Bucket(OUTPUT), ".bcseg.lock"), pytest.raises(UsageError, match="another run"):
        run(folder, OUTPUT)
    assert counts(run(folder, OUTPUT)) == (1, 0, 0)
    assert ".bcseg.lock" not in server.tree("out")


# Errors ----------------------------------------------------------------------------------------


def test_a_bucket_that_is_not_there_is_named(server: S3Server, tmp_path: Path) -> None:
    folder = smears(tmp_path, 1)
    with pytest.raises(UsageError, match="'nowhere'"):
        run(Url("s3", "nowhere", "in"), tmp_path / "out")
    with pytest.raises(StorageError, match="'nowhere'"):
        run(folder, Url("s3", "nowhere", "out"))
    with pytest.raises(UsageError, match="look at bucket and prefix"):
        run(SOURCE, tmp_path / "out")


def test_credentials_that_are_missing_are_asked_for(
    server: S3Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    with pytest.raises(StorageError, match="AWS_ACCESS_KEY_ID"):
        run(SOURCE, tmp_path / "out")


def test_credentials_that_are_refused_are_named(
    server: S3Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from moto.core import set_initial_no_auth_action_count

    upload(server, smears(tmp_path / "in", 1))

    @set_initial_no_auth_action_count(0)
    def refused() -> None:
        run(SOURCE, tmp_path / "out")

    with pytest.raises(StorageError, match="check the credentials") as told:
        refused()
    assert "secret" not in str(told.value)


@pytest.mark.slow
def test_a_server_that_is_not_there_is_told_in_a_sentence(
    server: S3Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:1")
    done = subprocess.run(
        [command(), "process-dir", str(SOURCE), str(tmp_path / "out")],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 74
    assert "Traceback" not in done.stderr
    assert "s3://box/in" in done.stderr


@pytest.mark.parametrize("name", ["report", "export", "verify"])
def test_commands_that_want_a_folder_say_so(name: str) -> None:
    more = ["--to", "coco"] if name == "export" else []
    done = subprocess.run(
        [command(), name, "s3://box/out", *more], capture_output=True, text=True, check=False
    )
    assert done.returncode == 2
    assert "copy it here first" in done.stderr


# Inputs ----------------------------------------------------------------------------------------


def test_odd_keys_are_taken_or_named(server: S3Server) -> None:
    fine = ["-a.png", "a b'\".png", "b/ü%25 #?*[x]{y}.png", "c~$.png"]
    odd = ["d//e.png", "d/../e.png", "./f.png", "g\nh.png", "i.png?versionId=3"]
    for key in (*fine, *odd, "folder/", ".hidden/x.png", ".hidden/y.png", "k.txt"):
        server.put_within(f"in/{key}", b"" if key.endswith("/") else b"content")
    found = list(RemoteInputs(SOURCE).scan(RULES, recursive=True))
    assert sorted(f.image for f in found if isinstance(f, InputFile)) == sorted(fine)
    ignored = {f.image: f for f in found if isinstance(f, IgnoredFile)}
    assert ignored.keys() == {*odd[:4], odd[4], ".hidden", "k.txt"}
    assert {name for name, f in ignored.items() if f.missed} == set(odd)
    for image in fine:
        server.put(f"in/{image}", image.encode())
    with RemoteInputs(SOURCE) as inputs:
        for file in inputs.scan(RULES, recursive=True):
            if isinstance(file, InputFile):
                assert inputs.fetch(file).path.read_bytes() == file.image.encode()


def test_sub_folders_are_named_where_they_are_left_out(server: S3Server) -> None:
    for key in ("a.png", "sub/b.png", "sub/c.png"):
        server.put(f"in/{key}", b"content")
    found = {f.image: f for f in RemoteInputs(SOURCE).scan(RULES, recursive=False)}
    assert found.keys() == {"a.png", "sub"}
    assert isinstance(found["sub"], IgnoredFile)


def test_a_listing_is_streamed(server: S3Server) -> None:
    for number in range(2500):
        server.put_within(f"in/{number:04}.png", b"")
    names = RemoteInputs(SOURCE).scan(RULES, recursive=True)
    first = [next(names).image for _ in range(10)]
    # Of pages that come later nothing is known yet.
    server.delete("in/2400.png")
    rest = [found.image for found in names]
    assert first + rest == [f"{number:04}.png" for number in range(2500) if number != 2400]


def test_what_is_fetched_is_the_object_that_was_listed(server: S3Server) -> None:
    server.put("in/a.png", b"first")
    with RemoteInputs(SOURCE) as inputs:
        (file,) = inputs.scan(RULES, recursive=True)
        assert isinstance(file, InputFile)
        fetched = inputs.fetch(file)
        assert fetched.path.name == "a.png"
        assert fetched.path.read_bytes() == b"first"
        assert fetched.path.stat().st_mtime_ns == file.mtime_ns
        inputs.release("a.png")
        assert not fetched.path.exists()
        server.put("in/a.png", b"another")
        with pytest.raises(ImageChangedError, match="written over"):
            inputs.fetch(file)
        server.delete("in/a.png")
        with pytest.raises(ImageChangedError, match="vanished"):
            inputs.fetch(file)
        spool = fetched.path.parents[1]
    assert not spool.exists()


def test_places_travel_to_other_processes_without_what_they_hold(server: S3Server) -> None:
    server.put("in/a.png", b"content")
    inputs = pickle.loads(pickle.dumps(RemoteInputs(SOURCE)))
    assert [f.image for f in inputs.scan(RULES, recursive=True)] == ["a.png"]
    outputs = pickle.loads(pickle.dumps(RemoteOutputs(OUTPUT)))
    outputs.write("b.png", b"mask")
    assert server.tree("out") == {"b.png": b"mask"}


# Outputs, records, lease -----------------------------------------------------------------------


def test_an_output_that_ends_badly_is_not_there(server: S3Server) -> None:
    outputs = RemoteOutputs(OUTPUT)
    with pytest.raises(RuntimeError), outputs.open("a.tif") as file:
        file.write(b"half")
        raise RuntimeError
    assert server.tree("out") == {}
    with outputs.open("a.tif") as file:
        file.write(b"whole")
    assert server.tree("out") == {"a.tif": b"whole"}
    assert outputs.sha256("a.tif") == RemoteOutputs(OUTPUT).sha256("a.tif")


def test_outputs_are_found_in_whatever_order_they_are_asked_for(
    server: S3Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    from bcseg_batch.remote import dialects

    monkeypatch.setattr(dialects, "PAGE_KEYS", 3)
    there = [f"masks/{name}_mask.png" for name in ("1", "10", "100", "11", "2", "é", "z")]
    for name in there:
        server.put(f"out/{name}", b"mask")
    server.put("out/masks/empty_mask.png", b"")
    outputs = RemoteOutputs(OUTPUT)
    for order in (there, there[::-1]):
        assert all(outputs.exists(name) for name in order)
    for name in ("masks/0_mask.png", "masks/empty_mask.png", "masks/zz_mask.png", "labels/1.tif"):
        assert not outputs.exists(name)
    outputs.remove(there[0])
    outputs.write("masks/zz_mask.png", b"mask")
    assert not outputs.exists(there[0])
    assert outputs.exists("masks/zz_mask.png")


def log(tmp_path: Path, name: str) -> tuple[RemoteRecords, Path]:
    folder = tmp_path / name
    folder.mkdir(exist_ok=True)
    records = RemoteRecords(Bucket(OUTPUT), folder, "results.jsonl")
    records.load()
    return records, folder / "results.jsonl"


def append(path: Path, line: str) -> None:
    with path.open("a") as file:
        file.write(line + "\n")


def test_records_are_whole_whenever_a_run_ends(server: S3Server, tmp_path: Path) -> None:
    first, path = log(tmp_path, "first")
    for line in ("one", "two"):
        append(path, line)
        first.commit()
    append(path, "lost, since it is not committed")
    second, path = log(tmp_path, "second")
    assert path.read_text() == "one\ntwo\n"
    append(path, "three")
    second.publish()
    assert second.is_whole
    assert server.tree("out") == {"results.jsonl": b"one\ntwo\nthree\n"}
    # Killed after the whole was sent and before all parts were deleted.
    server.put("out/results.jsonl.parts/000000000000004", b"two\n")
    third, path = log(tmp_path, "third")
    assert path.read_text() == "one\ntwo\nthree\n"
    append(path, "four")
    third.publish()
    assert server.tree("out") == {"results.jsonl": b"one\ntwo\nthree\nfour\n"}
    server.put("out/results.jsonl.parts/000000000000099", b"far\n")
    with pytest.raises(StorageError, match="missing"):
        log(tmp_path, "fourth")


def test_two_runs_cannot_continue_the_same_records(server: S3Server, tmp_path: Path) -> None:
    one, path = log(tmp_path, "one")
    append(path, "of one")
    other, path = log(tmp_path, "other")
    append(path, "of the other")
    one.commit()
    with pytest.raises(StorageError, match="another run"):
        other.commit()


def test_a_dead_run_is_succeeded_and_notices(server: S3Server) -> None:
    bucket = Bucket(OUTPUT)
    with Lease(bucket, "lock", lease_s=0.6) as dead:
        holder = json.loads(server.tree("out")["lock"])
        # Nothing runs under this number: the kernel gives none so high.
        server.put("out/lock", json.dumps({**holder, "process": 2**30, "token": "x"}).encode())
        with Lease(bucket, "lock") as successor:
            successor.check()
            deadline_s = time.monotonic() + 5
            with pytest.raises(StorageError, match="no longer held"):
                while time.monotonic() < deadline_s:
                    dead.check()
                    time.sleep(0.02)
        assert server.tree("out") == {}


def test_a_run_elsewhere_is_waited_for_until_its_lease_is_over(server: S3Server) -> None:
    server.put("out/lock", b'{"machine": "elsewhere 1 2", "process": 1, "token": "x"}')
    bucket = Bucket(OUTPUT)
    with pytest.raises(UsageError, match="process 1 on elsewhere"):
        Lease(bucket, "lock").take()
    with Lease(bucket, "lock", lease_s=-10):
        pass
