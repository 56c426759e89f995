"""systemd/README.md is followed step by step in a container with a real systemd."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from nspawn import product
from nspawn.container import Container, until, why_not
from nspawn.rootfs import UnavailableError, rootfs
from shown import ROOT, commands

# The first run downloads the container's system, which takes some minutes.
pytestmark = [pytest.mark.slow, pytest.mark.timeout(1200)]

PAGE = ROOT / "systemd/README.md"
PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
LAB = Path("/srv/bcseg/lab")

# The container has no network: `product.install` puts the program there in their place.
NEEDS_A_NETWORK = (
    "apt-get install",
    "python3 -m venv /opt/bcseg-batch",
    "/opt/bcseg-batch/bin/pip install .",
    "/opt/bcseg-batch/bin/pip install --upgrade .",
)


@pytest.fixture
def container(tmp_path: Path) -> Iterator[Container]:
    """A booted system with the program, and nothing else of the page."""
    if reason := why_not():
        pytest.skip(reason)
    try:
        base = rootfs(product.CHECKOUT / ".cache" / "nspawn")
        with Container(base, product.binds(), tmp_path / "boot.log", "page") as running:
            product.install(running)
            for made in ("/etc/sysusers.d/bcseg-batch.conf", f"/etc/systemd/system/{product.UNIT}"):
                running.path(made).unlink()
            # What udev makes on every machine with devices; a container has none.
            running.run("groupadd", "--system", "--force", "render")
            yield running
    except UnavailableError as error:
        pytest.skip(str(error))


def test_the_steps_of_the_page_work_in_order(container: Container) -> None:
    def records() -> dict[str, str]:
        path = container.path(f"{LAB}/out/results.jsonl")
        lines = path.read_text().splitlines() if path.exists() else []
        return {record["image"]: record["status"] for record in map(json.loads, lines)}

    def drop(name: str) -> None:
        into = container.path(f"{LAB}/in") / name
        shutil.copyfile(ROOT / "samples/synth_00000.jpg", into)
        into.chmod(0o644)
        until(lambda: records().get(name) == "done", 90, f"{name} is done")

    said = {}
    shown = commands(PAGE)
    assert all(any(command.startswith(start) for command in shown) for start in NEEDS_A_NETWORK)
    for command in shown:
        if command.startswith(NEEDS_A_NETWORK):
            continue
        # Goes on until Ctrl-C, as `timeout` sends it.
        line = f"timeout --signal=INT 5 {command} || true" if "--follow" in command else command
        ran = container.run(
            *("env", "-i", f"PATH={PATH}", "bash", "-euc", f"cd /opt/checkout; {line}"),
            check=False,
            within_s=120,
        )
        assert not ran.returncode, (
            f"{command}: {ran.stderr}\n{container.journal('bcseg-batch@lab')[-3000:]}"
        )
        said[command] = ran.stdout
        if command == "systemctl enable --now bcseg-batch@lab":
            drop("first.jpg")
        if command in {"systemctl restart bcseg-batch@lab", "systemctl start bcseg-batch@lab"}:
            drop(f"after-{len(said)}.jpg")

    status = said["bcseg-batch status --settings /etc/bcseg-batch/lab.toml"]
    assert "failed" in status
    assert "not running" not in status
    assert "first.jpg" in said["bcseg-batch logs --settings /etc/bcseg-batch/lab.toml --follow"]
    assert "failure" not in said[next(c for c in shown if " check " in c)]
    # Photographs and results stay where they are; nothing else does.
    assert container.path(f"{LAB}/in/first.jpg").exists()
    assert container.path(f"{LAB}/out/masks/first_mask.png").exists()
    assert not container.path("/opt/bcseg-batch").exists()
    assert not container.path(f"/etc/systemd/system/{product.UNIT}").exists()
    assert container.run("id", "bcseg", check=False).returncode
