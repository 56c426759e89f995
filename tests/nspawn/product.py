"""Puts the product into a container as the install steps do, without installing it anew.

The `.venv` of the tests is bound in, at other places: its own may lie in a home folder, which the
unit must not see. /opt/bcseg-batch becomes a virtual environment of three small files
that finds the interpreter, the packages and the checkout where they are bound.
"""

from __future__ import annotations

import sys
import sysconfig
from pathlib import Path

from nspawn.container import Container

CHECKOUT = Path(__file__).resolve().parents[2]
UNIT = "bcseg-batch@.service"
_TREE = "/opt/bcseg-batch"
_BASE = Path(sys.base_prefix)
# The system's own Python is in the container already: the same release is the same Python.
_IS_SYSTEM = Path("/usr") == _BASE
_HOME = "/usr" if _IS_SYSTEM else "/opt/python"
_PYTHON = f"python{sys.version_info.major}.{sys.version_info.minor}"

_SCRIPT = f"""\
#!{_TREE}/bin/python
import sys
from bcseg_batch.cli import main
sys.exit(main())
"""


def binds() -> dict[Path, str]:
    """Give what a container needs to see of the host."""
    seen = {Path(sysconfig.get_path("purelib")): "/opt/packages", CHECKOUT: "/opt/checkout"}
    return seen if _IS_SYSTEM else {_BASE: _HOME, **seen}


def install(container: Container) -> None:
    """Follow systemd/README.md: environment, user, unit, folder of settings."""
    container.write(f"{_TREE}/pyvenv.cfg", f"home = {_HOME}/bin\n")
    container.write(f"{_TREE}/bin/bcseg-batch", _SCRIPT, mode=0o755)
    container.path(f"{_TREE}/bin/python").symlink_to(f"{_HOME}/bin/{_PYTHON}")
    container.write(
        f"{_TREE}/lib/{_PYTHON}/site-packages/product.pth", "/opt/checkout\n/opt/packages\n"
    )
    if not _IS_SYSTEM:
        container.write("/etc/ld.so.conf.d/python.conf", f"{_HOME}/lib\n")
        container.run("ldconfig")
    units = CHECKOUT / "systemd"
    container.write("/etc/sysusers.d/bcseg-batch.conf", (units / "sysusers.conf").read_text())
    container.write(f"/etc/systemd/system/{UNIT}", (units / UNIT).read_text())
    container.run("systemd-sysusers")
    container.run("systemctl", "daemon-reload")


def add_instance(container: Container, name: str) -> None:
    """Give an instance its folders and its settings."""
    folder = f"/srv/bcseg/{name}"
    container.run(
        "install", "-d", "-m", "2770", "-o", "bcseg", "-g", "bcseg", f"{folder}/in", f"{folder}/out"
    )
    container.write(
        f"/etc/bcseg-batch/{name}.toml",
        f'[folders]\ninput = "{folder}/in"\noutput = "{folder}/out"\n',
    )


def add_drop_in(container: Container, name: str, text: str) -> None:
    """Change one instance's unit."""
    container.write(f"/etc/systemd/system/bcseg-batch@{name}.service.d/test.conf", text)
    container.run("systemctl", "daemon-reload")


def processes_of_the_account(container: Container) -> list[int]:
    """Give what runs as the service's user."""
    user = container.run("id", "--user", "bcseg").stdout.strip()
    return [pid for pid in container.processes() if container.user_of(pid) == int(user)]
