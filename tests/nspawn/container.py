"""Boots the root file system with systemd-nspawn, and speaks to it.

Written for any Linux with root's rights. Where systemd runs the host, nspawn gets a scope from it.
Where it does not (a build container, a micro-VM), there is none to ask: the container then gets
control groups made here, and is not registered anywhere. So `machinectl` and `systemd-run -M`
are of no use; commands enter the namespaces of the container's process 1 with nsenter, and files
go through its root folder under /proc.
"""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Self

from nspawn.rootfs import UnavailableError

_BOOT_S = 60.0
_COMMAND_S = 60.0
_NAMESPACES = ("--mount", "--uts", "--ipc", "--net", "--pid", "--cgroup", "--root")
_TOOLS = {"systemd-nspawn": "systemd-container", "nsenter": "util-linux"}


def why_not() -> str | None:
    """Give the reason why no container can run here, or None."""
    if os.name != "posix" or not Path("/proc/self/ns").is_dir():
        return "nspawn: not on Linux"
    if os.geteuid():
        return "nspawn: needs root"
    for tool, package in _TOOLS.items():
        if not shutil.which(tool):
            return f"nspawn: {tool} is not installed (apt-get install {package})"
    return None


def until(condition: Callable[[], object], within_s: float, what: str) -> None:
    """Wait for a condition.

    Raises:
        AssertionError: it did not come true in time.
    """
    deadline_s = time.monotonic() + within_s
    while not condition():
        if time.monotonic() > deadline_s:
            raise AssertionError(f"not within {within_s} s: {what}")
        time.sleep(0.1)


class Container:
    """A running container; what it writes is gone when it ends.

    Args:
        rootfs: its root file system, which is left as it is.
        binds: folder of the host to the folder in the container where it is seen, read-only.
        log: file of the host for what nspawn and the boot say.
        name: makes it another one than its neighbours.

    Attributes:
        leader: the host's number of the container's process 1.
        groups: the control groups that were made for it.
    """

    def __init__(
        self, rootfs: Path, binds: Mapping[Path, str], log: Path, name: str = "test"
    ) -> None:
        self._rootfs = rootfs
        self._binds = binds
        self._log = log
        self._name = f"bcseg-{name}-{os.getpid()}"
        self.groups: tuple[Path, ...] = ()
        self._nspawn: subprocess.Popen[bytes] | None = None
        self.leader = 0

    def __enter__(self) -> Self:
        try:
            self._boot()
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def run(
        self, *command: str, check: bool = True, within_s: float = _COMMAND_S
    ) -> subprocess.CompletedProcess[str]:
        """Run a command in the container, as its root."""
        ran = subprocess.run(
            ["nsenter", f"--target={self.leader}", *_NAMESPACES, "--wdns=/", "--", *command],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=within_s,
            check=False,
        )
        if check and ran.returncode:
            raise AssertionError(f"{' '.join(command)}: {ran.returncode}\n{ran.stdout}{ran.stderr}")
        return ran

    def path(self, inside: str) -> Path:
        """Give the host's path of a file in the container (no absolute link on the way)."""
        return Path(f"/proc/{self.leader}/root{inside}")

    def write(self, inside: str, text: str, *, mode: int = 0o644) -> None:
        """Write a file in the container, with its folders."""
        path = self.path(inside)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
        path.chmod(mode)

    def show(self, unit: str, key: str) -> str:
        """Give a property of a unit."""
        return self.run("systemctl", "show", f"--property={key}", "--value", unit).stdout.strip()

    def journal(self, unit: str | None = None) -> str:
        """Give the journal of a unit, or the whole."""
        only = [f"--unit={unit}"] if unit else []
        return self.run("journalctl", "--no-pager", "--output=short-monotonic", *only).stdout

    def close(self) -> None:
        """Power off, and leave nothing behind: no process, no control group."""
        if self._nspawn is not None:
            if self.leader:
                self.run("systemctl", "poweroff", "--force", check=False)
            try:
                self._nspawn.wait(30 if self.leader else 0)
            except subprocess.TimeoutExpired:
                for pid in self.processes():
                    os.kill(pid, signal.SIGKILL)
                self._nspawn.kill()
                self._nspawn.wait(30)
            self._nspawn = None
            self.leader = 0
        for top in self.groups:
            until(lambda top=top: _remove(top), 10, f"{top} is empty")  # type: ignore[misc]  # default argument

    def processes(self) -> list[int]:
        """Give what runs in the container, from the outside, nspawn itself left out."""
        assert self._nspawn is not None
        return [pid for pid in _descendants(self._nspawn.pid) if pid != self._nspawn.pid]

    @staticmethod
    def user_of(pid: int) -> int | None:
        """Give the number of a process's user; None where it is gone."""
        found = re.search(r"^Uid:\s+(\d+)", _status(pid), re.MULTILINE)
        return None if found is None else int(found[1])

    def _boot(self) -> None:
        command = ["systemd-nspawn", "--boot", f"--directory={self._rootfs}"]
        command += ["--volatile=overlay", "--tmpfs=/srv:mode=755", "--register=no"]
        command += ["--private-network", f"--machine={self._name}", "--console=pipe"]
        # What systemd closes the network and the devices with; without it the container's has to
        # leave them open, and says nothing.
        command += ["--capability=CAP_BPF,CAP_NET_ADMIN", "--system-call-filter=bpf"]
        command += [f"--bind-ro={outside}:{inside}" for outside, inside in self._binds.items()]
        if not Path("/run/systemd/system").is_dir():
            command.append("--keep-unit")
            self.groups = _make_groups(self._name)

        def join() -> None:
            for group in self.groups:
                (group / "cgroup.procs").write_text(str(os.getpid()))

        with self._log.open("wb") as log:
            self._nspawn = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env={**os.environ, "SYSTEMD_NSPAWN_UNIFIED_HIERARCHY": "1"},
                preexec_fn=join,  # noqa: PLW1509 - no other thread forks or locks here
            )
        until(self._has_booted, _BOOT_S, "the container is up")

    def _has_booted(self) -> bool:
        assert self._nspawn is not None
        if self._nspawn.poll() is not None:
            said = self._log.read_text(errors="replace").strip()[-500:]
            raise UnavailableError(f"nspawn: a container cannot run on this machine: {said}")
        first = [pid for pid in self.processes() if _is_first(pid)]
        if not first:
            return False
        self.leader = first[0]
        return self.run("systemctl", "is-system-running", check=False).stdout.strip() in {
            "running",
            "degraded",
        }


def _make_groups(name: str) -> tuple[Path, ...]:
    """Make a control group below our own, in each hierarchy that a systemd uses."""
    ours = {}
    for line in Path("/proc/self/cgroup").read_text().splitlines():
        number, controllers, path = line.split(":", 2)
        ours["cgroup2" if number == "0" else controllers] = path
    groups = []
    for line in Path("/proc/self/mountinfo").read_text().splitlines():
        mounted, _, kind = line.partition(" - ")
        place = mounted.split()[4]
        fs, _, options = kind.split(" ", 2)
        hierarchy = (
            "cgroup2"
            if fs == "cgroup2"
            else "name=systemd"
            if (fs == "cgroup" and "name=systemd" in options)
            else None
        )
        if hierarchy in ours:
            group = Path(place) / ours[hierarchy].lstrip("/") / name
            try:
                group.mkdir(exist_ok=True)
            except OSError as error:
                raise UnavailableError(
                    f"nspawn: no control group can be made here: {error}"
                ) from None
            groups.append(group)
    return tuple(groups)


def _remove(top: Path) -> bool:
    """Remove a control group and those in it; False while something is in one."""
    for folder, _, _ in os.walk(top, topdown=False):
        try:
            Path(folder).rmdir()
        except OSError:
            return False
    return True


def _status(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/status").read_text()
    except OSError:  # gone
        return ""


def _descendants(root: int) -> Iterator[int]:
    """Give a process and all below it."""
    parents: dict[int, list[int]] = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit() and (
            found := re.search(r"PPid:\s+(\d+)", _status(int(entry.name)))
        ):
            parents.setdefault(int(found[1]), []).append(int(entry.name))
    waiting = [root]
    while waiting:
        pid = waiting.pop()
        yield pid
        waiting += parents.get(pid, [])


def _is_first(pid: int) -> bool:
    """Tell whether a process is number 1 of a process namespace of its own, and an init."""
    status = _status(pid)
    numbers = re.search(r"^NSpid:(.*)$", status, re.MULTILINE)
    return (
        numbers is not None
        and numbers[1].split()[1:] == ["1"]
        and status.startswith("Name:\tsystemd\n")
    )
