"""The container's root file system: a minimal system of the host's own release, made once."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
from pathlib import Path

# Python comes along for its libraries (libffi, libssl, ...), and as the base of a .venv that was
# made with the system's Python.
_PACKAGES = ("systemd", "systemd-sysv", "dbus", "python3")
_VERSION = 1
_LIMIT_S = 900


class UnavailableError(Exception):
    """No container on this machine; the text is the reason."""


def rootfs(cache: Path) -> Path:
    """Give the root file system; the first time it is downloaded, which takes two minutes.

    Args:
        cache: folder for about 300 MB; git is told to ignore it.

    Raises:
        UnavailableError: it cannot be made here.
    """
    suite = platform.freedesktop_os_release().get("VERSION_CODENAME")
    if not suite:
        raise UnavailableError(
            "nspawn: /etc/os-release names no Debian release to make a container of"
        )
    folder = cache / f"{suite}-{_VERSION}"
    if folder.is_dir():
        return folder
    if not shutil.which("debootstrap"):
        raise UnavailableError("nspawn: debootstrap is not installed (apt-get install debootstrap)")
    cache.mkdir(parents=True, exist_ok=True)
    (cache / ".gitignore").write_text("*\n")
    part = cache / f"{folder.name}.part-{os.getpid()}"
    made = subprocess.run(
        ["debootstrap", "--variant=minbase", f"--include={','.join(_PACKAGES)}", suite, part],
        capture_output=True,
        text=True,
        errors="replace",
        timeout=_LIMIT_S,
        check=False,
    )
    if made.returncode:
        shutil.rmtree(part, ignore_errors=True)
        raise UnavailableError(f"nspawn: debootstrap {suite} failed: {made.stdout.strip()[-500:]}")
    for folder_of_downloads in ("var/cache/apt/archives", "var/lib/apt/lists"):
        shutil.rmtree(part / folder_of_downloads)
    part.rename(folder)
    return folder
