"""Runs the daemon as a user does: a process of its own, with a settings file.

Most of a start is the import of torch. So a server imports it once and forks for each daemon; a
test that wants the installed command itself asks for it.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import runpy
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
from parts import command

LONG_S = 60.0

PRELOADED = ["bcseg_batch.cli", "bcseg_batch.service.daemon"]
_FORKS = multiprocessing.get_context("forkserver")
_FORKS.set_forkserver_preload(PRELOADED)


def _become_daemon(
    arguments: list[str], launcher: Path | None, log: Path, env: Mapping[str, str]
) -> None:
    handle = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    for stream in (1, 2):
        os.dup2(handle, stream)
    os.setsid()
    os.environ.update(env)
    sys.argv = ["bcseg-batch", *arguments]
    if launcher is not None:
        runpy.run_path(str(launcher), run_name="__main__")
    else:
        from bcseg_batch.cli import main

        main()


class Forked:
    """A process from the server, with as much of `subprocess.Popen` as the tests use."""

    def __init__(
        self, arguments: list[str], launcher: Path | None, log: Path, env: Mapping[str, str]
    ) -> None:
        self._process = _FORKS.Process(target=_become_daemon, args=(arguments, launcher, log, env))
        self._process.start()
        assert self._process.pid is not None
        self.pid = self._process.pid

    def poll(self) -> int | None:
        return self._process.exitcode

    def wait(self, timeout_s: float | None = None) -> int:
        self._process.join(timeout_s)
        code = self._process.exitcode
        assert code is not None, f"process {self.pid} still runs"
        return code

    def send_signal(self, signum: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, signum)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)


DaemonProcess = Forked | subprocess.Popen[bytes]


def wait_until(true: Callable[[], object], what: str, *, timeout_s: float = LONG_S) -> None:
    """Look again and again until something is so."""
    deadline_s = time.monotonic() + timeout_s
    while not true():
        if time.monotonic() > deadline_s:
            pytest.fail(f"not within {timeout_s:.0f} s: {what}")
        time.sleep(0.02)


class Place:
    """The folders of one daemon, its settings file, and the processes that ran on them."""

    def __init__(self, root: Path, model: Path) -> None:
        self.root = root
        self.model = model
        self.input = root / "in"
        self.output = root / "out"
        self.state = root / "state"
        self.settings = root / "daemon.toml"
        self.running: list[DaemonProcess] = []
        self.input.mkdir(parents=True)
        self.output.mkdir()
        (root / "log.txt").touch()
        self.configure()

    def configure(self, **sections: Mapping[str, object]) -> None:
        """Write the settings: quick ones, with what the test wants on top."""
        everything: dict[str, dict[str, object]] = {
            "model": {"file": str(self.model), "device": "cpu", "dtype": "float32"},
            "processing": {"batch_size": 4, "workers": 2},
            "folders": {
                "input": str(self.input),
                "output": str(self.output),
                "state": str(self.state),
            },
            "intake": {"settle_s": 0.1, "rescan_interval_s": 1.0},
            "service": {"max_wait_s": 0.05},
        }
        for name, values in sections.items():
            everything[name] = {**everything.get(name, {}), **values}
        self.settings.write_text(
            "\n".join(
                f"[{name}]\n" + "".join(f"{key} = {json.dumps(v)}\n" for key, v in values.items())
                for name, values in everything.items()
            )
        )

    def start(
        self,
        *options: str,
        launcher: Path | None = None,
        env: Mapping[str, str] | None = None,
        installed: bool = False,
    ) -> DaemonProcess:
        """Start a daemon; it is killed at the end of the test if it still runs.

        Args:
            options: further arguments.
            launcher: a program that bends something and then is the command.
            env: on top of the environment.
            installed: run the installed command.
        """
        arguments = ["run", "--settings", str(self.settings), *options]
        log_path = self.root / "log.txt"
        process: DaemonProcess
        if installed:
            with log_path.open("ab") as log:
                process = subprocess.Popen(
                    [command(), *arguments],
                    stderr=log,
                    stdout=log,
                    env={**os.environ, **(env or {})},
                    start_new_session=True,
                )
        else:
            process = Forked(arguments, launcher, log_path, env or {})
        self.running.append(process)
        return process

    def stop(self, process: DaemonProcess, *, timeout_s: float = LONG_S) -> int:
        """Ask a daemon to end, and give its exit code."""
        process.send_signal(signal.SIGTERM)
        return process.wait(timeout_s)

    def close(self) -> None:
        for process in self.running:
            if process.poll() is None:
                process.kill()
            process.wait()

    def run_until_idle(self, seconds: float = 0.5, *options: str) -> int:
        return self.start("--until-idle", str(seconds), *options).wait(LONG_S)

    def ask(self, name: str, *options: str, code: int | None = 0) -> str:
        """Run another command on these settings, and give what it prints."""
        done = subprocess.run(
            [command(), name, *options, "--settings", str(self.settings)],
            check=False,
            capture_output=True,
            text=True,
            timeout=LONG_S,
        )
        assert code is None or done.returncode == code, (done.returncode, done.stdout, done.stderr)
        return done.stdout + done.stderr

    @property
    def log(self) -> str:
        return (self.root / "log.txt").read_text(errors="replace")

    def said(self) -> dict[str, Any]:
        """Give the daemon's status file; empty where there is none yet."""
        try:
            content: dict[str, Any] = json.loads((self.state / "status.json").read_bytes())
        except FileNotFoundError:
            return {}
        return content

    def records(self) -> list[dict[str, Any]]:
        """Give all records in the order they were written."""
        try:
            lines = (self.output / "results.jsonl").read_bytes().split(b"\n")
        except FileNotFoundError:
            return []
        return [json.loads(line) for line in lines[:-1]]

    def standing(self) -> dict[str, str]:
        """Give the status of each image by its last record."""
        return {record["image"]: record["status"] for record in self.records()}

    def wait_for(self, *images: str, status: str = "done", timeout_s: float = LONG_S) -> None:
        def is_so() -> bool:
            standing = self.standing()
            return all(standing.get(image) == status for image in images)

        wait_until(is_so, f"{images} {status}: {self.standing()}", timeout_s=timeout_s)

    def wait_ready(self, process: DaemonProcess) -> None:
        """Wait until this very process watches."""

        def is_ready() -> bool:
            assert process.poll() is None, self.log
            said = self.said()
            return said.get("pid") == process.pid and said.get("watch_mode") is not None

        wait_until(is_ready, "ready")


def place_fixture(root: Path, model: Path) -> Iterator[Place]:
    place = Place(root, model)
    yield place
    place.close()
