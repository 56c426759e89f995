"""The daemon from outside: a real process on real folders."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import textwrap
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest
from daemons import LONG_S, Place, place_fixture, wait_until
from parts import command, tree, write_smear
from PIL import Image

from bcseg_batch.items import Outcome, Status
from bcseg_batch.store.results import ResultsLog
from bcseg_batch.store.shards import Shard

pytestmark = pytest.mark.slow


@pytest.fixture
def place(tmp_path: Path, tiny_model: Path) -> Iterator[Place]:
    yield from place_fixture(tmp_path, tiny_model)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def fetch(port: int, path: str) -> tuple[int, str]:
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}{path}", timeout=5) as answer:
            return answer.status, answer.read().decode()
    except urllib.error.HTTPError as error:
        with error:
            return error.code, error.read().decode()


def launcher(root: Path, body: str) -> Path:
    """Write a program that bends one part of ours and then is the command."""
    path = root / "launcher.py"
    path.write_text(textwrap.dedent(body) + "\nfrom bcseg_batch.cli import main\nmain()\n")
    return path


HANGING_NETWORK = """
    import time
    from bcseg_batch.segment.predictor import Predictor
    Predictor.predict = lambda self, batch: time.sleep(1000)
"""


def test_processes_what_is_there_and_what_comes(place: Place) -> None:
    write_smear(place.input / "here.png", 1)
    write_smear(place.input / "night" / "deep" / "er.jpg", 2)
    (place.input / "notes.txt").write_text("no image")
    daemon = place.start(installed=True)
    place.wait_for("here.png", "night/deep/er.jpg")

    write_smear(place.input / "comes.png", 3)
    write_smear(place.input / "new folder" / "a{b} 'c'\n\u00e9.png", 4)
    write_smear(place.root / "aside.png", 5).rename(place.input / "moved.png")
    odd = os.fsdecode(b"caf\xe9.png")
    write_smear(place.input / "x.png", 6).rename(place.input / odd)
    names = {"comes.png", "new folder/a{b} 'c'\n\u00e9.png", "moved.png", odd}
    place.wait_for(*names)

    assert place.stop(daemon) == 0
    standing = place.standing()
    assert {*names, "here.png", "night/deep/er.jpg"} <= standing.keys()
    assert set(standing.values()) == {"done"}
    for record in place.records():
        if record["image"] in {*names, "here.png"}:
            with Image.open(place.output / record["mask"]) as mask:
                assert mask.size == (40, 30)
            with Image.open(place.output / record["composite"]) as composite:
                assert composite.size == (40, 30)
    assert "Traceback" not in place.log
    rows = (place.output / "results.csv").read_text(errors="replace")
    assert "comes.png" in rows


def test_ends_by_itself_and_never_does_an_image_twice(place: Place) -> None:
    for number in range(6):
        write_smear(place.input / f"{number}.png", number)
    assert place.run_until_idle() == 0
    assert len(place.records()) == 6
    before = tree(place.output / "masks")

    later_ns = time.time_ns()
    os.utime(place.input / "0.png", ns=(later_ns, later_ns))  # touched, not changed
    write_smear(place.input / "1.png", 77)  # changed
    assert place.run_until_idle() == 0

    assert [record["image"] for record in place.records()[6:]] == ["1.png"]
    after = tree(place.output / "masks")
    assert {name for name in after if after[name] != before[name]} == {"1_mask.png"}


def test_what_shards_have_left_is_merged_before_anything_is_recorded(place: Place) -> None:
    place.output.mkdir(exist_ok=True)
    with ResultsLog(place.output, Shard(2, 1)) as results:
        results.append(Outcome(image="before.png", status=Status.FAILED, error="gone"))
    write_smear(place.input / "a.png")
    assert place.run_until_idle() == 0
    assert [record["image"] for record in place.records()] == ["before.png", "a.png"]
    assert not list(place.output.glob("*-of-*"))
    assert "merged 1 records of 1 shards" in place.log


def test_commands_tell_and_retry(place: Place) -> None:
    write_smear(place.input / "good.png", 1)
    (place.input / "bad.jpg").write_bytes(b"no jpeg at all")
    place.ask("status", code=78)  # never started
    daemon = place.start()
    place.wait_for("good.png")
    place.wait_for("bad.jpg", status="failed")
    wait_until(lambda: place.said().get("in_flight") == 0 and place.said()["done"], "told")

    facts = json.loads(place.ask("status", "--json"))
    assert facts["alive"]
    assert (facts["done"], facts["failed"], facts["queue"]) == (1, 1, 0)
    assert facts["daemon"]["pid"] == daemon.pid
    assert facts["daemon"]["watch_mode"] in {"inotify", "poll"}
    assert facts["last_error"]["image"] == "bad.jpg"
    assert str(daemon.pid) in place.ask("status")

    (failure,) = place.ask("failures", "--json").splitlines()
    assert json.loads(failure)["image"] == "bad.jpg"
    assert "bad.jpg" in place.ask("failures")

    assert place.ask("retry", "nothing*", code=1) == (
        "nothing to try again: no failed image is like nothing*\n"
    )
    assert place.ask("retry", "bad*").startswith("1 ")
    wait_until(lambda: len(place.records()) == 3, "tried again")
    assert place.records()[-1]["image"] == "bad.jpg"

    second = subprocess.run(
        [command(), "run", "--settings", str(place.settings)],
        check=False,
        capture_output=True,
        text=True,
        timeout=LONG_S,
    )
    assert second.returncode == 2
    assert str(daemon.pid) in second.stderr
    one_shot = subprocess.run(
        [command(), "process-dir", str(place.input), str(place.output)],
        check=False,
        capture_output=True,
        text=True,
        timeout=LONG_S,
    )
    assert one_shot.returncode == 2
    assert str(daemon.pid) in one_shot.stderr

    assert place.stop(daemon) == 0
    assert not json.loads(place.ask("status", "--json", code=3))["alive"]
    assert "not running" in place.ask("status", code=3)


def test_check_says_what_is_wrong(place: Place) -> None:
    write_smear(place.input / "a.png")
    text = place.ask("check")
    assert "failure" not in text
    assert "one image end to end" in text
    assert "DEBUG" not in text
    assert {path.name for path in place.input.iterdir()} == {"a.png"}

    place.configure(model={"file": str(place.root / "none.safetensors")})
    findings = json.loads(place.ask("check", "--json", code=1))
    assert [f["subject"] for f in findings if f["verdict"] == "failure"] == ["model and device"]


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"state": "in/state"}, "folders.input"),
        ({"state": "out/state"}, "folders.output"),
        ({"output": "in/out"}, "folders.output"),
        ({"archive": "out/kept"}, "folders.archive"),
        ({"input": None}, "folders.input"),
    ],
)
def test_folders_that_cannot_work_are_refused(
    place: Place, changes: dict[str, str | None], told: str
) -> None:
    folders = {key: str(place.root / value) for key, value in changes.items() if value is not None}
    place.configure(folders=folders)
    for key, value in changes.items():
        if value is None:
            lines = place.settings.read_text().splitlines()
            place.settings.write_text("\n".join(x for x in lines if not x.startswith(f"{key} =")))
    before = tree(place.root)
    assert place.start().wait(LONG_S) == 78
    assert told in place.log
    assert {**tree(place.root), "log.txt": b""} == before


def test_a_file_that_ends_too_early_is_waited_for(place: Place) -> None:
    whole = write_smear(place.root / "whole.jpg", 3, (300, 200)).read_bytes()
    (place.input / "slow.jpg").write_bytes(whole[: len(whole) // 2])
    place.configure(intake={"settle_s": 0.1, "rescan_interval_s": 1.0, "truncated_retries": 2})
    daemon = place.start()
    wait_until(lambda: "ends too early" in place.log, "noticed")
    with (place.input / "slow.jpg").open("ab") as file:
        file.write(whole[len(whole) // 2 :])
    place.wait_for("slow.jpg")

    (place.input / "never.jpg").write_bytes(whole[: len(whole) // 2])
    place.wait_for("never.jpg", status="failed")
    assert place.records()[-1]["error"].startswith("TruncatedImageError")
    assert place.log.count("'never.jpg' ends too early") == 2
    # The same bytes have nothing to wait for any more: a retry ends in a result at once.
    assert place.ask("retry", "never*").startswith("1 ")
    wait_until(lambda: len(place.records()) == 3, "tried again")
    assert place.log.count("'never.jpg' ends too early") == 2
    assert place.stop(daemon) == 0
    assert "stopped: 1 done, 2 failed" in place.log
    assert [record["status"] for record in place.records()] == ["done", "failed", "failed"]


def test_an_image_that_is_replaced_by_a_broken_one_leaves_no_mask(place: Place) -> None:
    write_smear(place.input / "a.png", 1)
    write_smear(place.input / "b.png", 2)
    daemon = place.start()
    place.wait_for("a.png")
    place.wait_for("b.png")
    (place.input / "a.png").write_bytes(b"no image any more")
    place.wait_for("a.png", status="failed")
    wait_until(lambda: not (place.output / "masks/a_mask.png").exists(), "removed")
    assert place.stop(daemon) == 0
    left = {name for name in tree(place.output) if "/" in name}
    assert left == {"masks/b_mask.png", "composites/b_bloodred.jpg", "cells/b_cells.csv"}
    assert "b.png" in (place.output / "cells.csv").read_text()
    assert "a.png" not in (place.output / "cells.csv").read_text()


def test_a_stop_drains_and_a_second_leaves(place: Place) -> None:
    slow = launcher(
        place.root,
        """
        import time
        from bcseg_batch.segment.predictor import Predictor
        predict = Predictor.predict
        def slowly(self, batch):
            time.sleep(0.5)
            return predict(self, batch)
        Predictor.predict = slowly
        """,
    )
    for number in range(60):
        write_smear(place.input / f"{number:02d}.png", number)
    daemon = place.start(launcher=slow)
    wait_until(place.records, "under way")
    assert place.stop(daemon) == 0
    first = place.standing()
    assert 1 <= len(first) < 60
    # What was taken back at the stop is no suspect, and nothing is lost or done twice.
    assert place.run_until_idle() == 0
    assert "tried alone" not in place.log
    assert sorted(record["image"] for record in place.records()) == [
        f"{number:02d}.png" for number in range(60)
    ]

    stuck = place.start(launcher=launcher(place.root, HANGING_NETWORK))
    place.wait_ready(stuck)
    write_smear(place.input / "more.png", 99)
    wait_until(lambda: json.loads(place.ask("status", "--json", code=None))["queue"], "taken up")
    time.sleep(0.3)
    stuck.send_signal(signal.SIGTERM)
    time.sleep(0.3)
    assert stuck.poll() is None
    stuck.send_signal(signal.SIGTERM)
    assert stuck.wait(5) == 128 + signal.SIGTERM


def test_reload_takes_new_settings_and_refuses_bad_ones(place: Place) -> None:
    port = free_port()
    place.configure(metrics={"port": port})
    write_smear(place.input / "a.png", 1)
    daemon = place.start()
    place.wait_for("a.png")
    first = place.records()[-1]

    place.configure(metrics={"port": port}, model={"threshold": 0.9})
    daemon.send_signal(signal.SIGHUP)
    wait_until(lambda: len(place.records()) == 2, "done anew")
    second = place.records()[-1]
    assert second["settings_sha256"] != first["settings_sha256"]
    assert second["foreground_fraction"] < first["foreground_fraction"]

    place.settings.write_text("[model]\nthreshold = 7\n")
    daemon.send_signal(signal.SIGHUP)
    wait_until(lambda: "reload refused" in place.log, "refused")
    write_smear(place.input / "b.png", 2)
    place.wait_for("b.png")
    assert place.records()[-1]["settings_sha256"] == second["settings_sha256"]

    # Another model: its name and hash are in the figures at once, and all is done anew.
    from parts import tiny_network

    from bcseg_batch.segment.checkpoint import save_checkpoint

    other = place.root / "other.safetensors"
    save_checkpoint(other, *tiny_network(seed=5))
    place.configure(metrics={"port": port}, model={"file": str(other)})
    daemon.send_signal(signal.SIGHUP)
    wait_until(lambda: len(place.records()) == 5, "both done anew")
    info = [x for x in fetch(port, "/metrics")[1].splitlines() if x.startswith("bcseg_model_info{")]
    assert len(info) == 1
    assert 'model="other.safetensors"' in info[0]
    assert place.stop(daemon) == 0


def test_archive_and_quarantine_never_overwrite(place: Place) -> None:
    archive, quarantine = place.root / "archive", place.root / "quarantine"
    place.configure(
        folders={"archive": str(archive), "quarantine": str(quarantine)},
        intake={
            "settle_s": 0.1,
            "rescan_interval_s": 1.0,
            "after_success": "archive",
            "after_failure": "quarantine",
        },
    )
    write_smear(archive / "night" / "a.png", 50)
    older = (archive / "night" / "a.png").read_bytes()
    newer = write_smear(place.input / "night" / "a.png", 51).read_bytes()
    (place.input / "bad.jpg").write_bytes(b"no jpeg")
    assert place.run_until_idle() == 0
    assert tree(archive) == {"night/a.png": older, "night/a~2.png": newer}
    assert tree(place.input) == {}
    report = json.loads((quarantine / "bad.jpg.error.json").read_bytes())
    assert report["image"] == "bad.jpg"
    assert report["error"].startswith("UnreadableImageError")
    assert (quarantine / "bad.jpg").read_bytes() == b"no jpeg"

    place.configure(intake={"settle_s": 0.1, "after_success": "delete"})
    write_smear(place.input / "b.png", 52)
    assert place.run_until_idle() == 0
    assert tree(place.input) == {}
    assert place.standing() == {"night/a.png": "done", "bad.jpg": "failed", "b.png": "done"}


def test_one_input_that_cannot_be_moved_does_not_keep_the_others(place: Place) -> None:
    archive = place.root / "archive"
    place.configure(
        folders={"archive": str(archive)},
        intake={"settle_s": 0.1, "rescan_interval_s": 1.0, "after_success": "archive"},
    )
    archive.mkdir()
    (archive / "stuck").write_text("a file where a folder must be")
    write_smear(place.input / "stuck" / "a.png", 1)
    daemon = place.start()
    place.wait_for("stuck/a.png")
    wait_until(lambda: "archive" in place.said().get("troubles", {}), "told")
    write_smear(place.input / "b.png", 2)
    place.wait_for("b.png")
    wait_until((archive / "b.png").exists, "moved", timeout_s=10)
    assert "trouble (archive)" in place.ask("status", code=1)

    (archive / "stuck").unlink()
    wait_until((archive / "stuck" / "a.png").exists, "moved too", timeout_s=10)
    wait_until(lambda: not place.said()["troubles"], "well again", timeout_s=10)
    assert place.stop(daemon) == 0


def test_the_records_follow_the_ledger_whatever_was_lost_between(place: Place) -> None:
    for number in range(4):
        write_smear(place.input / f"{number}.png", number)
    assert place.run_until_idle() == 0
    # As after a death between the commit and its note: none is noted, two of four lines are there,
    # one of them torn.
    import sqlite3

    from bcseg_batch.store.ledger import LEDGER_NAME

    results = place.output / "results.jsonl"
    lines = results.read_bytes().splitlines(keepends=True)
    results.write_bytes(b"".join(lines[:2]) + lines[2][:50])
    db = sqlite3.connect(place.state / LEDGER_NAME)
    with db:
        db.execute("UPDATE records SET exported = 0")
    db.close()
    assert place.run_until_idle() == 0
    assert results.read_bytes().splitlines(keepends=True) == lines


def test_figures_and_health(place: Place) -> None:
    port = free_port()
    place.configure(metrics={"port": port})
    write_smear(place.input / "a.png", 1)
    (place.input / "bad.jpg").write_bytes(b"no jpeg")
    daemon = place.start()
    place.wait_for("a.png")
    place.wait_for("bad.jpg", status="failed")
    code, text = fetch(port, "/metrics")
    assert code == 200
    assert 'bcseg_images_total{error="",status="done"} 1.0' in text
    assert 'bcseg_images_total{error="UnreadableImageError",status="failed"} 1.0' in text
    assert 'bcseg_stage_seconds_count{stage="decode"} 1.0' in text
    assert "bcseg_healthy 1.0" in text
    assert fetch(port, "/healthz")[0] == 200
    assert fetch(port, "/else")[0] == 404

    aside = place.root / "aside"
    place.input.rename(aside)
    wait_until(lambda: fetch(port, "/healthz")[0] == 503, "unwell", timeout_s=10)
    assert "input" in json.loads(fetch(port, "/healthz")[1])["troubles"]
    assert "bcseg_healthy 0.0" in fetch(port, "/metrics")[1]
    wait_until(lambda: "input" in place.said()["troubles"], "told", timeout_s=10)
    place.ask("status", code=1)
    write_smear(aside / "b.png", 2)
    aside.rename(place.input)
    place.wait_for("b.png")
    wait_until(lambda: fetch(port, "/healthz")[0] == 200, "well again", timeout_s=10)
    assert len(place.records()) == 3  # a vanished folder deletes nothing

    # The output folder likewise, with nothing to do: it is missed, and found again.
    gone = place.root / "gone"
    place.output.rename(gone)
    wait_until(lambda: fetch(port, "/healthz")[0] == 503, "unwell", timeout_s=10)
    assert "output" in json.loads(fetch(port, "/healthz")[1])["troubles"]
    assert not place.output.exists()
    gone.rename(place.output)
    wait_until(lambda: fetch(port, "/healthz")[0] == 200, "well again", timeout_s=20)
    assert place.stop(daemon) == 0


class Manager:
    """Stands where systemd would, and keeps what it is told."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / "notify"
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._socket.bind(str(self.path))
        self._socket.setblocking(False)
        self.messages: list[str] = []

    @property
    def env(self) -> dict[str, str]:
        return {"NOTIFY_SOCKET": str(self.path), "WATCHDOG_USEC": "60000000"}

    def listen(self) -> list[str]:
        while True:
            try:
                self.messages.append(self._socket.recv(4096).decode())
            except BlockingIOError:
                return self.messages

    def heard(self, line: str) -> int:
        return sum(line in message.split("\n") for message in self.listen())

    def close(self) -> None:
        self._socket.close()


@pytest.fixture
def manager(tmp_path: Path) -> Iterator[Manager]:
    manager = Manager(tmp_path)
    yield manager
    manager.close()


def test_systemd_is_told(place: Place, manager: Manager) -> None:
    daemon = place.start(env=manager.env)
    wait_until(lambda: manager.heard("READY=1") == 1, "READY")
    assert place.said() == {} or place.said()["pid"] == daemon.pid
    wait_until(lambda: manager.heard("WATCHDOG=1") >= 3, "pings of an idle daemon")
    wait_until(lambda: any("STATUS=0 done" in text for text in manager.listen()), "STATUS")

    daemon.send_signal(signal.SIGHUP)
    wait_until(lambda: manager.heard("RELOADING=1") == 1, "RELOADING")
    wait_until(lambda: manager.heard("READY=1") == 2, "READY again")
    assert any("MONOTONIC_USEC=" in text for text in manager.messages)

    # A pause is no hang: with its output gone the daemon waits, and goes on pinging.
    place.output.rename(place.root / "gone")
    wait_until(lambda: any("is gone" in text for text in manager.listen()), "told")
    count = manager.heard("WATCHDOG=1")
    wait_until(lambda: manager.heard("WATCHDOG=1") >= count + 3, "pings in a pause", timeout_s=10)
    (place.root / "gone").rename(place.output)

    assert place.stop(daemon) == 0
    assert manager.heard("STOPPING=1") == 1


@pytest.mark.parametrize("part", ["network", "decoder"])
def test_a_hang_silences_the_watchdog(place: Place, manager: Manager, part: str) -> None:
    hanging = (
        HANGING_NETWORK
        if part == "network"
        else """
        import time
        import bcseg_batch.service.pipeline as pipeline
        decode = pipeline.decode_image
        def hang(path, **options):
            if path.name == "hangs.png":
                time.sleep(1000)
            return decode(path, **options)
        pipeline.decode_image = hang
        """
    )
    port = free_port()
    place.configure(service={"max_wait_s": 0.05, "stall_timeout_s": 5}, metrics={"port": port})
    daemon = place.start(launcher=launcher(place.root, hanging), env=manager.env)
    wait_until(lambda: manager.heard("WATCHDOG=1") >= 2, "pings")
    assert fetch(port, "/healthz")[0] == 200
    write_smear(place.input / "hangs.png", 1)
    wait_until(lambda: fetch(port, "/healthz")[0] == 503, "unwell", timeout_s=20)
    assert "pipeline" in fetch(port, "/healthz")[1]
    count = manager.heard("WATCHDOG=1")
    time.sleep(3)
    assert manager.heard("WATCHDOG=1") <= count + 1
    assert daemon.poll() is None
    # Killed, as systemd does it, and started sound: nothing is lost.
    daemon.kill()
    daemon.wait()
    assert place.run_until_idle() == 0
    assert place.standing() == {"hangs.png": "done"}


def test_an_unforeseen_error_in_the_daemon_itself_is_not_tried_for_ever(place: Place) -> None:
    """Whatever brings the whole daemon down counts against the image that was in flight."""
    broken = launcher(
        place.root,
        """
        from bcseg_batch.store.ledger import Ledger
        finish_many = Ledger.finish_many
        def fail(self, outcomes, plan=None):
            outcomes = list(outcomes)
            if any(outcome.image == "poison.png" for outcome in outcomes):
                raise RuntimeError("a bug")
            finish_many(self, outcomes, plan)
        Ledger.finish_many = fail
        """,
    )
    write_smear(place.input / "poison.png", 1)
    codes = [place.start("--until-idle", "0.5", launcher=broken).wait(LONG_S) for _ in range(4)]
    assert codes == [70, 70, 70, 0]
    assert place.standing() == {"poison.png": "failed"}
    assert place.records()[-1]["error"].startswith("CrashedProcessError")
