"""What a service manager hears: read from a real datagram socket."""

from __future__ import annotations

import contextlib
import os
import socket
import time
import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bcseg_batch.service.notify import Notifier, watchdog_interval_s


class Manager:
    """The receiving end, as the service manager has it."""

    def __init__(self, address: str) -> None:
        self.address = address
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._socket.settimeout(5)
        self._socket.bind("\0" + address[1:] if address.startswith("@") else address)

    @property
    def environ(self) -> dict[str, str]:
        return {"NOTIFY_SOCKET": self.address}

    def heard(self) -> list[str]:
        return self._socket.recv(65536).decode().split("\n")

    def hears_nothing(self) -> bool:
        self._socket.setblocking(False)
        try:
            self._socket.recv(1)
        except BlockingIOError:
            return True
        return False

    def close(self) -> None:
        self._socket.close()


@pytest.fixture(params=["file", "abstract"])
def manager(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Manager]:
    abstract = request.param == "abstract"
    end = Manager(f"@bcseg-{uuid.uuid4()}" if abstract else str(tmp_path / "notify"))
    yield end
    end.close()


def test_a_life_is_told_in_order(manager: Manager) -> None:
    notifier = Notifier(manager.environ)
    notifier.status("loading the model")
    notifier.ready("waiting for images")
    notifier.watchdog()
    notifier.stopping()
    assert manager.heard() == ["STATUS=loading the model"]
    assert manager.heard() == ["READY=1", "STATUS=waiting for images"]
    assert manager.heard() == ["WATCHDOG=1"]
    assert manager.heard() == ["STOPPING=1"]


def test_reloading_says_when_it_began_on_the_managers_clock(manager: Manager) -> None:
    before_us = time.clock_gettime_ns(time.CLOCK_MONOTONIC) // 1000
    Notifier(manager.environ).reloading()
    first, second = manager.heard()
    key, _, value = second.partition("=")
    assert (first, key) == ("RELOADING=1", "MONOTONIC_USEC")
    assert before_us <= int(value) <= time.clock_gettime_ns(time.CLOCK_MONOTONIC) // 1000


def test_more_time_is_asked_for_in_microseconds(manager: Manager) -> None:
    Notifier(manager.environ).extend_timeout(2.5)
    assert manager.heard() == ["EXTEND_TIMEOUT_USEC=2500000"]


def test_a_file_name_in_a_status_cannot_forge_an_assignment(manager: Manager) -> None:
    Notifier(manager.environ).status("failed: a\nSTOPPING=1\udcff.jpg")
    assert manager.heard() == ["STATUS=failed: a STOPPING=1\\udcff.jpg"]


def test_an_empty_status_sends_nothing(manager: Manager) -> None:
    Notifier(manager.environ).status("")
    assert manager.hears_nothing()


def test_the_processs_own_environment_is_the_default(
    manager: Manager, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NOTIFY_SOCKET", manager.address)
    Notifier().ready()
    assert manager.heard() == ["READY=1"]


def test_a_manager_that_restarts_is_heard_again(tmp_path: Path) -> None:
    path = tmp_path / "notify"
    notifier = Notifier({"NOTIFY_SOCKET": str(path)})
    first = Manager(str(path))
    notifier.watchdog()
    assert first.heard() == ["WATCHDOG=1"]
    first.close()
    path.unlink()
    notifier.watchdog()  # nobody listens: nothing is raised
    second = Manager(str(path))
    notifier.watchdog()
    assert second.heard() == ["WATCHDOG=1"]
    second.close()


@pytest.mark.parametrize(
    "address", [None, "", "/no/such/socket", "@", "relative", "a\0b", "/" * 300]
)
def test_no_supervisor_is_no_error(address: str | None) -> None:
    notifier = Notifier({} if address is None else {"NOTIFY_SOCKET": address})
    notifier.ready("on")
    notifier.reloading()
    notifier.watchdog()
    notifier.stopping()


def test_a_manager_that_does_not_read_does_not_hold_the_daemon_up(tmp_path: Path) -> None:
    deaf = Manager(str(tmp_path / "notify"))
    filler = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
    filler.setblocking(False)
    with contextlib.suppress(BlockingIOError):
        while True:
            filler.sendto(b"x", deaf.address)
    began_s = time.monotonic()
    Notifier(deaf.environ).watchdog()
    assert time.monotonic() - began_s < 3
    filler.close()
    deaf.close()


@given(st.integers(1, 10**12))
def test_the_interval_is_the_managers_in_seconds(interval_us: int) -> None:
    environ = {"WATCHDOG_USEC": str(interval_us), "WATCHDOG_PID": str(os.getpid())}
    assert watchdog_interval_s(environ) == pytest.approx(interval_us / 1e6)


@pytest.mark.parametrize(
    ("environ", "expected"),
    [
        ({}, None),
        ({"WATCHDOG_USEC": "60000000"}, 60.0),  # the PID may be left out
        ({"WATCHDOG_USEC": "60000000", "WATCHDOG_PID": "7"}, 60.0),
        ({"WATCHDOG_USEC": "60000000", "WATCHDOG_PID": "8"}, None),  # meant for the parent
        ({"WATCHDOG_USEC": "60000000", "WATCHDOG_PID": "seven"}, None),
        ({"WATCHDOG_USEC": "soon"}, None),
        ({"WATCHDOG_USEC": "0"}, None),
        ({"WATCHDOG_USEC": "-5"}, None),
    ],
)
def test_the_watchdog_must_be_meant_for_this_process(
    environ: dict[str, str], expected: float | None
) -> None:
    assert watchdog_interval_s(environ, pid=7) == expected
