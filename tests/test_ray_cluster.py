"""The engine ray, on real Ray clusters of this machine, bound to 127.0.0.1."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from parts import NeverStop, Quiet, command, tree, write_smear
from stores import BUCKET, ENVIRONMENT, S3Server

from bcseg_batch.errors import DeviceError, SettingsError
from bcseg_batch.intake.ignore import IgnoreRules
from bcseg_batch.service.build import open_cluster
from bcseg_batch.service.process_dir import Summary, process_dir
from bcseg_batch.settings import load_settings
from bcseg_batch.store.images import SUFFIXES

ray = pytest.importorskip("ray", reason="Ray is not installed: pip install 'bcseg-batch[ray]'")
pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]

ROOT = Path(__file__).resolve().parents[1]
LONG_S = 240.0
# When and where, not what: it differs from run to run.
INCIDENTAL = {"seconds", "finished_at", "mtime_ns"}


@pytest.fixture
def home(tmp_path: Path) -> Path:
    """A home of its own, where Ray keeps the token of its clusters."""
    folder = tmp_path / "home"
    folder.mkdir()
    return folder


def environment(home: Path, **more: str) -> dict[str, str]:
    kept = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith(("BCSEG_", "RAY_", "AWS_"))
    }
    # Workers import what the driver has, wherever their cluster was started.
    paths = [str(ROOT), str(ROOT / "training"), str(ROOT / "tests")]
    return {
        **kept,
        "HOME": str(home),
        "PYTHONPATH": os.pathsep.join(paths),
        "RAY_USAGE_STATS_ENABLED": "0",
        # Binds to 127.0.0.1, and finds what is bound there.
        "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
        **more,
    }


@pytest.fixture
def source(tmp_path: Path) -> Path:
    folder = tmp_path / "in"
    for number in range(20):
        write_smear(folder / f"{number:03d}.png", number)
    write_smear(folder / "sub folder/000.png", 100)
    write_smear(folder / "000.tif", 101)
    write_smear(folder / "Blutbild äöü 'quoted'.png", 102)
    (folder / "damaged.jpg").write_bytes(b"\xff\xd8\xff no more")
    (folder / "empty.png").touch()
    return folder


def started(home: Path, log: Path, *arguments: object) -> subprocess.Popen[bytes]:
    with log.open("wb") as file:
        return subprocess.Popen(
            [command(), *map(str, arguments)], env=environment(home), stdout=file, stderr=file
        )


def ran(home: Path, *arguments: object, **more: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [command(), *map(str, arguments)],
        env=environment(home, **more),
        capture_output=True,
        text=True,
        timeout=LONG_S,
        check=False,
    )


def records(output: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (output / "results.jsonl").read_text().splitlines()]


def count_records(output: Path) -> int:
    with contextlib.suppress(OSError):
        return (output / "results.jsonl").read_bytes().count(b"\n")
    return 0


def said(output: Path) -> dict[str, dict[str, Any]]:
    """Give what the records say, by image, without what differs from run to run."""
    return {
        record["image"]: {key: record[key] for key in record if key not in INCIDENTAL}
        for record in records(output)
    }


def written(output: Path) -> dict[str, bytes]:
    """Give the files of the images, and the tables but for the times in them."""
    return {
        name: content
        for name, content in tree(output).items()
        if not name.startswith(("results.", ".bcseg"))
    }


def wait_for(process: subprocess.Popen[bytes], output: Path, count: int) -> None:
    deadline_s = time.monotonic() + LONG_S
    while count_records(output) < count:
        assert process.poll() is None, "it ended too early"
        assert time.monotonic() < deadline_s, f"{count_records(output)} records only"
        time.sleep(0.01)


def assert_same(local: Path, other: Path) -> None:
    assert written(other) == written(local)
    assert said(other) == said(local)
    assert max(Counter(record["image"] for record in records(other)).values()) == 1


def test_outputs_and_records_are_those_of_the_local_engine(
    source: Path, tmp_path: Path, tiny_model: Path, home: Path
) -> None:
    local, other = tmp_path / "local", tmp_path / "ray"
    common = ("--model", tiny_model, "--labels", "--outlines", "--probability")
    assert ran(home, "process-dir", source, local, *common).returncode == 1
    result = ran(home, "process-dir", source, other, *common, "--engine", "ray")
    assert result.returncode == 1, result.stderr
    assert "Traceback" not in result.stderr
    assert "auth" not in result.stderr.lower()
    assert_same(local, other)
    # A second run has nothing to do, whichever engine is asked.
    again = ran(home, "process-dir", source, other, *common, "--json")
    assert json.loads(again.stdout)["done"] == 0


def test_workers_read_from_and_write_to_a_bucket(
    source: Path, tmp_path: Path, tiny_model: Path, home: Path
) -> None:
    local, copy = tmp_path / "local", tmp_path / "copy"
    ran(home, "process-dir", source, local, "--model", tiny_model)
    server = S3Server()
    server.empty()
    try:
        for path in source.rglob("*.*"):
            server.put(f"in/{path.relative_to(source).as_posix()}", path.read_bytes())
        result = ran(
            home,
            *("process-dir", f"s3://{BUCKET}/in", f"s3://{BUCKET}/out", "--model", tiny_model),
            *("--engine", "ray"),
            **{**ENVIRONMENT, "AWS_ENDPOINT_URL": server.url},
        )
        assert result.returncode == 1, result.stderr
        for key, content in server.tree("out").items():
            path = copy / key
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content)
    finally:
        server.close()
    assert_same(local, copy)


@contextlib.contextmanager
def two_nodes(home: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[str, Any]]:
    """Start a head and a node on 127.0.0.1, each with a raylet of its own; gives the second one."""
    from ray.cluster_utils import Cluster

    for name, value in environment(home).items():
        monkeypatch.setenv(name, value)
    one = {"num_cpus": 1, "node_ip_address": "127.0.0.1", "include_dashboard": False}
    cluster = Cluster(initialize_head=True, head_node_args=one)
    try:
        other = cluster.add_node(num_cpus=1, node_ip_address="127.0.0.1")
        cluster.wait_for_nodes()
        yield cluster.address, lambda: cluster.remove_node(other, allow_graceful=False)
    finally:
        cluster.shutdown()


def test_a_node_that_dies_half_way_costs_nothing(
    tmp_path: Path, tiny_model: Path, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, output, local = tmp_path / "in", tmp_path / "out", tmp_path / "local"
    for number in range(400):
        write_smear(source / f"{number:03d}.png", number, (160, 120))
    log = tmp_path / "log"
    with two_nodes(home, monkeypatch) as (address, kill_node):
        process = started(
            home,
            log,
            *("process-dir", source, output, "--model", tiny_model),
            *("--engine", "ray", "--address", address, "--actors", "2"),
        )
        try:
            wait_for(process, output, 150)
            before = count_records(output)
            kill_node()
            code = process.wait(LONG_S)
        finally:
            process.kill()
            process.wait()
    text = log.read_text()
    assert before < 400, "nothing was left to do when the node died"
    assert code == 0, text
    assert "is lost" in text
    done = records(output)
    assert len(done) == 400
    assert {record["image"] for record in done} == {f"{number:03d}.png" for number in range(400)}
    assert {record["status"] for record in done} == {"done"}
    assert ran(home, "process-dir", source, local, "--model", tiny_model).returncode == 0
    assert_same(local, output)


def test_a_driver_that_is_killed_is_resumed_by_running_it_again(
    source: Path, tmp_path: Path, tiny_model: Path, home: Path
) -> None:
    for number in range(200, 400):
        write_smear(source / f"{number}.png", number, (160, 120))
    output, local = tmp_path / "out", tmp_path / "local"
    arguments = ("process-dir", source, output, "--model", tiny_model, "--engine", "ray")
    process = started(home, tmp_path / "log", *arguments)
    wait_for(process, output, 30)
    process.send_signal(signal.SIGKILL)
    process.wait()
    before = count_records(output)
    assert before < 225
    result = ran(home, *arguments, "--json")
    assert result.returncode == 1, result.stderr
    summary = json.loads(result.stdout)
    assert summary["done"] + summary["failed"] + summary["skipped"] == 225
    assert summary["skipped"] > 0
    ran(home, "process-dir", source, local, "--model", tiny_model)
    assert_same(local, output)


def process_by_ray(source: Path, output: Path, model: Path, **flags: object) -> Summary:
    """Run `process_dir` on a cluster of this process, which the fixtures prepare."""
    given = {"model.file": model, "processing.engine": "ray", **flags}
    settings = load_settings(None, given, {}).settings
    with open_cluster(settings, NeverStop()) as cluster:
        return process_dir(
            source,
            output,
            engine=cluster.pipeline,
            rules=IgnoreRules(SUFFIXES),
            recursive=True,
            overwrite=False,
            stop=NeverStop(),
            progress=Quiet(),
        )


@pytest.fixture
def in_process(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in environment(home).items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")


@pytest.mark.usefixtures("in_process")
def test_an_image_that_kills_its_worker_is_failed_and_costs_no_other(
    tmp_path: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from killer_worker import KillerWorker

    monkeypatch.setattr("bcseg_batch.service.cluster.RemoteWorker", KillerWorker)
    source, output = tmp_path / "in", tmp_path / "out"
    for number in range(12):
        write_smear(source / f"{number:02d}.png", number)
    write_smear(source / "05 killer.png", 50)
    summary = process_by_ray(source, output, tiny_model)
    assert (summary.done, summary.failed) == (12, 1)
    ((image, error),) = summary.failures
    assert image == "05 killer.png"
    assert error.startswith("CrashedProcessError: ")
    assert "3 worker processes" in error
    assert not list(output.rglob("*.part"))


@pytest.mark.usefixtures("in_process")
def test_the_driver_holds_no_more_files_than_the_workers_have_in_hand(
    tmp_path: Path, tiny_model: Path
) -> None:
    from bcseg_batch.service.places import LocalInputs
    from bcseg_batch.store.names import OutputNames
    from bcseg_batch.store.outputs import OutputFolder

    source = tmp_path / "in"
    for number in range(200):
        write_smear(source / f"{number:03d}.png", number)
    settings = load_settings(
        None, {"model.file": tiny_model, "processing.batch_size": 2, "ray.actors": "1"}, {}
    ).settings
    inputs = LocalInputs(source)
    drawn = out = most = 0

    def files() -> Iterator[Any]:
        nonlocal drawn
        for file in inputs.scan(IgnoreRules(SUFFIXES), recursive=True):
            drawn += 1
            yield file

    with (
        open_cluster(settings, NeverStop()) as cluster,
        OutputFolder(tmp_path / "out") as outputs,
    ):
        for _ in cluster.pipeline(inputs, outputs, OutputNames()).process(files()):
            most = max(most, drawn - out)
            out += 1
    assert out == 200
    # Two batches before the network, one with each of its two lanes, one behind, one on the way.
    assert most <= 2 * 8


@pytest.mark.usefixtures("in_process")
def test_a_worker_without_the_folders_is_found_out(
    source: Path, tmp_path: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from bcseg_batch.store.outputs import OutputFiles, OutputFolder

    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    # What a machine has where the share is not mounted: another folder of the same name.
    monkeypatch.setattr(OutputFolder, "__reduce__", lambda _: (OutputFiles, (elsewhere,)))
    with pytest.raises(SettingsError, match="mount the shared folder"):
        process_by_ray(source, tmp_path / "out", tiny_model)
    assert not list(elsewhere.iterdir())


@pytest.mark.usefixtures("in_process")
def test_photographs_that_only_the_driver_sees_stop_the_run(
    source: Path, tmp_path: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from killer_worker import BlindInputs

    from bcseg_batch.service.places import LocalInputs

    monkeypatch.setattr(LocalInputs, "__reduce__", lambda _: (BlindInputs, ()))
    with pytest.raises(SettingsError, match="does not find images that are there"):
        process_by_ray(source, tmp_path / "out", tiny_model)


@pytest.mark.usefixtures("in_process")
def test_a_model_that_no_worker_can_load_ends_the_run_at_once(source: Path, tmp_path: Path) -> None:
    from bcseg_batch.errors import CheckpointError

    broken = tmp_path / "broken.safetensors"
    broken.write_bytes(b"no model")
    with pytest.raises(CheckpointError, match=r"broken\.safetensors"):
        process_by_ray(source, tmp_path / "out", broken)


@pytest.mark.usefixtures("in_process")
def test_a_stop_while_no_machine_is_large_enough_is_heeded(tiny_model: Path) -> None:
    class StopSoon:
        asked = 0

        @property
        def requested(self) -> bool:
            self.asked += 1
            return self.asked > 2

    flags = {"model.file": tiny_model, "ray.cpus_per_actor": 500.0}
    settings = load_settings(None, flags, {}).settings
    with pytest.raises(DeviceError, match="stopped"):
        open_cluster(settings, StopSoon())


def test_a_cluster_that_is_not_there_is_said(source: Path, tmp_path: Path, home: Path) -> None:
    for address, said_of_it in (
        ("auto", "the Ray cluster 'auto' cannot be joined"),
        ("ray://127.0.0.1:9", "does not answer"),
        ("127.0.0.1:9", "does not answer"),
    ):
        flags = ("--engine", "ray", "--address", address)
        result = ran(home, "process-dir", source, tmp_path / "out", *flags)
        assert result.returncode == 78
        assert said_of_it in result.stderr
        assert "Traceback" not in result.stderr


def test_the_daemon_works_through_a_cluster(
    source: Path, tmp_path: Path, tiny_model: Path, home: Path
) -> None:
    local, output = tmp_path / "local", tmp_path / "out"
    settings = tmp_path / "settings.toml"
    settings.write_text(
        f"""
        [folders]
        input = "{source}"
        output = "{output}"
        state = "{tmp_path / "state"}"
        [model]
        file = "{tiny_model}"
        [processing]
        engine = "ray"
        [intake]
        settle_s = 0.2
        """
    )
    result = ran(home, "run", "--settings", settings, "--until-idle", "2")
    assert result.returncode == 0, result.stderr
    ran(home, "process-dir", source, local, "--model", tiny_model)
    assert said(output) == said(local)
    assert {n: c for n, c in written(output).items() if n != "cells.csv"} == {
        n: c for n, c in written(local).items() if n != "cells.csv"
    }


@pytest.fixture(autouse=True)
def _no_cluster_left() -> Iterator[None]:
    yield
    if ray.is_initialized():
        ray.shutdown()
    shutil.rmtree("/tmp/ray", ignore_errors=True)
