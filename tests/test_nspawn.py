"""The service under a real systemd, in a container that is booted for these tests."""

from __future__ import annotations

import json
import re
import shutil
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from nspawn import product
from nspawn.container import Container, until, why_not
from nspawn.rootfs import UnavailableError, rootfs

# The first run downloads the container's system, which takes some minutes.
pytestmark = [pytest.mark.slow, pytest.mark.timeout(1200)]

SAMPLES = sorted((product.CHECKOUT / "samples").glob("*.jpg"))
START_S = 60.0  # torch is read from a cold disk
WORK_S = 60.0

# A shorter watchdog, so that the test need not wait for the real one.
IMPATIENT = """
[Service]
WatchdogSec=15
TimeoutAbortSec=5
RestartSec=1
"""

# The program with one fault: while a file is there, the network does not come back.
HANGING = """
import sys, time
from pathlib import Path
from bcseg_batch.cli import main
from bcseg_batch.segment.predictor import Predictor

predict = Predictor.predict

def hang(self, batch):
    while Path("/opt/hang").exists():
        time.sleep(0.1)
    return predict(self, batch)

Predictor.predict = hang
sys.exit(main())
"""

HANGING_DROP_IN = f"""{IMPATIENT}
Environment=BCSEG_SERVICE__STALL_TIMEOUT_S=5 BCSEG_MODEL__BACKEND=torch
ExecStart=
ExecStart=/opt/bcseg-batch/bin/python /opt/hanging.py run \
--settings /etc/bcseg-batch/%i.toml --state-dir /var/lib/bcseg-batch/%i
"""

SANDBOX = """
import socket
from pathlib import Path
import torch

layer = torch.nn.Conv2d(3, 16, 3).to(dtype=torch.bfloat16, memory_format=torch.channels_last)
layer(torch.zeros(1, 3, 64, 64, dtype=torch.bfloat16))
print("the network runs")

allowed = ("/srv/bcseg/sandbox/out", "/var/lib/bcseg-batch/sandbox", "/var/log/bcseg-batch/sandbox")
forbidden = ("/opt", "/etc", "/srv", "/srv/bcseg/other", "/var/lib/bcseg-batch/other", "/root")
for folder in (*allowed, *forbidden):
    try:
        Path(folder, "probe").write_text("x")
    except OSError:
        print("refused", folder)
    else:
        print("written", folder)

for address in ("127.0.0.1", "192.0.2.1"):
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sender:
        try:
            sender.sendto(b"x", (address, 9))
        except PermissionError:
            print("closed", address)
        else:
            print("open", address)
"""

# Gives the container an address that could be reached, were it not for the unit: what `ip address
# add` does, which a minimal system does not have. netdevice(7), SIOCSIFADDR.
SECOND_ADDRESS = """
import fcntl, socket, struct

with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as any_socket:
    address = struct.pack("HH4s8x", socket.AF_INET, 0, socket.inet_aton("192.0.2.1"))
    fcntl.ioctl(any_socket, 0x8916, struct.pack("16s16s", b"lo:1", address))
    any_socket.sendto(b"x", ("192.0.2.1", 9))
"""


@pytest.fixture(scope="module")
def container(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Container]:
    """A booted system with the product installed."""
    if reason := why_not():
        pytest.skip(reason)
    log = tmp_path_factory.mktemp("nspawn") / "boot.log"
    try:
        running = Container(rootfs(product.CHECKOUT / ".cache" / "nspawn"), product.binds(), log)
        running.__enter__()
    except UnavailableError as error:
        pytest.skip(str(error))
    try:
        product.install(running)
        yield running
    finally:
        running.close()


class Service:
    """One instance of the unit.

    Args:
        container: where it runs.
        name: of the instance.
        drop_in: what to change in its unit.
    """

    def __init__(self, container: Container, name: str, drop_in: str = "") -> None:
        self._container = container
        self.name = name
        self.unit = f"bcseg-batch@{name}.service"
        self.folder = f"/srv/bcseg/{name}"
        product.add_instance(container, name)
        product.add_drop_in(container, name, drop_in)

    def __enter__(self) -> Service:
        self._container.run("systemctl", "start", self.unit, within_s=START_S)
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        if kind is not None:
            print(self._container.journal(self.unit))  # noqa: T201 - pytest shows it
        self._container.run("systemctl", "stop", self.unit, check=False)
        self._container.run("systemctl", "reset-failed", self.unit, check=False)

    def show(self, key: str) -> str:
        return self._container.show(self.unit, key)

    @property
    def pid(self) -> int:
        return int(self.show("MainPID"))

    @property
    def restarts(self) -> int:
        return int(self.show("NRestarts"))

    def kill(self, signal: str) -> None:
        """Send the daemon a signal."""
        self._container.run(
            "systemctl", "kill", "--kill-whom=main", f"--signal={signal}", self.unit
        )

    def drop(self, *names: str) -> None:
        """Copy a photograph into the folder, as root, readable for all."""
        for number, name in enumerate(names):
            into = self._container.path(f"{self.folder}/in") / name
            shutil.copyfile(SAMPLES[number % len(SAMPLES)], into)
            into.chmod(0o644)

    def records(self) -> dict[str, str]:
        """Give each image's status, and see that none has two records."""
        path = self._container.path(f"{self.folder}/out/results.jsonl")
        lines = path.read_text().splitlines(keepends=True) if path.exists() else []
        records = [json.loads(line) for line in lines if line.endswith("\n")]
        names = [record["image"] for record in records]
        assert len(names) == len(set(names)), f"recorded twice: {names}"
        return {record["image"]: record["status"] for record in records}

    def has_done(self, *names: str) -> bool:
        done = self.records()
        return all(done.get(name) == "done" for name in names)

    def masks(self) -> set[str]:
        return {path.name for path in self._container.path(f"{self.folder}/out/masks").iterdir()}

    def is_active_again(self, after: int) -> bool:
        return self.restarts > after and self.show("ActiveState") == "active"


def test_the_sandbox_lets_the_network_run_and_nothing_else_be_written(
    container: Container,
) -> None:
    once = (
        "[Service]\nType=oneshot\nWatchdogSec=0\nRestart=no\nExecStart=\n"
        "ExecStart=/opt/bcseg-batch/bin/python -W error /opt/sandbox.py\n"
    )
    container.write("/opt/sandbox.py", SANDBOX)
    for folder in ("/srv/bcseg/other", "/var/lib/bcseg-batch/other"):
        container.run("install", "-d", "-m", "777", folder)
    container.run("/opt/bcseg-batch/bin/python", "-c", SECOND_ADDRESS)
    with Service(container, "sandbox", once) as service:
        said = re.findall(r"python\[\d+\]: (.*)", container.journal(service.unit))
    assert said == [
        "the network runs",
        "written /srv/bcseg/sandbox/out",
        "written /var/lib/bcseg-batch/sandbox",
        "written /var/log/bcseg-batch/sandbox",
        "refused /opt",
        "refused /etc",
        "refused /srv",
        "refused /srv/bcseg/other",
        "refused /var/lib/bcseg-batch/other",
        "refused /root",
        "open 127.0.0.1",
        "closed 192.0.2.1",
    ]


def test_dropped_photographs_are_processed_and_the_end_is_clean(container: Container) -> None:
    with Service(container, "life") as service:
        assert service.show("ActiveState") == "active"
        assert service.show("StatusText")
        service.drop("a.jpg", "b.jpg", "c.jpg")
        until(lambda: service.has_done("a.jpg", "b.jpg", "c.jpg"), WORK_S, "three are done")
        assert service.masks() == {"a_mask.png", "b_mask.png", "c_mask.png"}
        log = container.path("/var/log/bcseg-batch/life/bcseg-batch.jsonl").read_text()
        assert "b.jpg" in log
        assert product.processes_of_the_account(container)
        began_s = time.monotonic()
        container.run("systemctl", "stop", service.unit)
        assert time.monotonic() - began_s < 30
        assert service.show("Result") == "success"
        assert service.show("ExecMainStatus") == "0"
        assert product.processes_of_the_account(container) == []


def test_results_belong_to_the_account_and_its_group_reads_them(container: Container) -> None:
    with Service(container, "rights") as service:
        service.drop("a.jpg")
        until(lambda: service.has_done("a.jpg"), WORK_S, "one is done")
        ran = container.run("stat", "-c", "%U %G %a", "/srv/bcseg/rights/out/masks/a_mask.png")
    assert ran.stdout.split() == ["bcseg", "bcseg", "640"]


def test_a_killed_daemon_is_back_and_nothing_is_lost_or_done_twice(container: Container) -> None:
    names = [f"{number}.jpg" for number in range(12)]
    with Service(container, "killed", IMPATIENT) as service:
        service.drop(*names[:8])
        until(service.records, WORK_S, "the first is done")
        service.kill("KILL")
        service.drop(*names[8:])
        until(lambda: service.is_active_again(0), START_S, "it is back")
        until(lambda: service.has_done(*names), WORK_S, "all are done")
        assert service.masks() == {f"{number}_mask.png" for number in range(12)}


def test_a_stopped_process_is_ended_by_the_watchdog(container: Container) -> None:
    with Service(container, "frozen", IMPATIENT) as service:
        service.kill("STOP")
        until(lambda: service.is_active_again(0), START_S, "it is back")
        service.drop("a.jpg")
        until(lambda: service.has_done("a.jpg"), WORK_S, "one is done")


def test_a_network_that_hangs_is_ended_by_the_watchdog(container: Container) -> None:
    container.write("/opt/hanging.py", HANGING)
    with Service(container, "hung", HANGING_DROP_IN) as service:
        container.write("/opt/hang", "")
        service.drop("a.jpg", "b.jpg")
        until(lambda: service.restarts, START_S, "it is ended")
        container.path("/opt/hang").unlink()
        until(lambda: service.has_done("a.jpg", "b.jpg"), START_S + WORK_S, "both are done")
        journal = container.journal(service.unit)
    assert "Watchdog timeout" in journal
    assert "hanging.py" in journal  # where it hung: the traceback of each thread


def test_settings_that_are_wrong_are_told_once_and_not_tried_again(container: Container) -> None:
    service = Service(container, "wrong", IMPATIENT)
    container.write("/etc/bcseg-batch/wrong.toml", "[model]\nwidht = 3\n")
    assert container.run("systemctl", "start", service.unit, check=False).returncode
    assert service.show("ActiveState") == "failed"
    assert service.show("ExecMainStatus") == "78"
    assert service.restarts == 0
    assert "widht" in container.journal(service.unit)


def test_a_reload_keeps_the_process_and_refuses_what_is_wrong(container: Container) -> None:
    with Service(container, "reload") as service:
        pid = service.pid
        file = "/etc/bcseg-batch/reload.toml"
        good = container.path(file).read_text()
        container.write(file, good + "\n[model]\nwidht = 3\n")
        container.run("systemctl", "reload", service.unit)
        until(lambda: "widht" in container.journal(service.unit), 30, "it is refused")
        container.write(file, good + "\n[outputs]\ncomposite_format = 'png'\n")
        container.run("systemctl", "reload", service.unit)
        until(lambda: "reloaded" in container.journal(service.unit), 30, "it is taken up")
        service.drop("a.jpg")
        until(lambda: service.has_done("a.jpg"), WORK_S, "one is done")
        composites = container.path("/srv/bcseg/reload/out/composites")
        assert [path.name for path in composites.iterdir()] == ["a_bloodred.png"]
        assert service.pid == pid


def test_a_share_that_is_mounted_after_the_start_is_seen(container: Container) -> None:
    with Service(container, "share", "[Service]\n") as service:
        container.run("mount", "-t", "tmpfs", "-o", "mode=777", "share", "/srv/bcseg/share/in")
        try:
            service.drop("a.jpg")
            # Looks at the folder at once; without, the next rescan would.
            container.run("systemctl", "reload", service.unit)
            until(lambda: service.has_done("a.jpg"), WORK_S + 60, "one is done")
        finally:
            container.run("umount", "--lazy", "/srv/bcseg/share/in")


def test_a_finished_container_leaves_nothing_behind(container: Container, tmp_path: Path) -> None:
    with Container(
        rootfs(product.CHECKOUT / ".cache" / "nspawn"), {}, tmp_path / "boot.log", "second"
    ) as second:
        pids = second.processes()
        groups = second.groups
        assert len(pids) > 2
    assert not any(Path(f"/proc/{pid}").exists() for pid in pids)
    assert not any(group.exists() for group in groups)
