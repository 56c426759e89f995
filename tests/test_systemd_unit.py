"""The unit files, as systemd's own tools judge them."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest

SYSTEMD = Path(__file__).resolve().parents[1] / "systemd"
UNIT = SYSTEMD / "bcseg-batch@.service"
PROGRAM = "/opt/bcseg-batch/bin/bcseg-batch"

needs_analyze = pytest.mark.skipif(
    shutil.which("systemd-analyze") is None,
    reason="systemd-analyze is not installed (apt-get install systemd)",
)


@pytest.fixture(params=["plain", "gpu"])
def unit(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """The template, with a program that exists, and with or without the drop-in for a GPU."""
    path = tmp_path / UNIT.name
    path.write_text(UNIT.read_text().replace(PROGRAM, "/bin/true"))
    if request.param == "gpu":
        folder = tmp_path / f"{UNIT.name}.d"
        folder.mkdir()
        shutil.copy(SYSTEMD / "gpu.conf", folder)
    return path


def analyze(verb: str, *arguments: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["systemd-analyze", verb, *arguments], capture_output=True, text=True, check=False
    )


def exposure(unit: Path) -> float:
    ran = analyze("security", "--offline=true", "--no-pager", unit)
    found = re.search(r"Overall exposure level for \S+: ([0-9.]+)", ran.stdout)
    assert found, ran.stdout + ran.stderr
    return float(found[1])


@needs_analyze
def test_systemd_has_nothing_to_say_against_the_unit(unit: Path) -> None:
    ran = analyze("verify", unit)
    assert (ran.returncode, ran.stdout + ran.stderr) == (0, "")


@needs_analyze
def test_the_service_is_hardly_exposed(unit: Path) -> None:
    gpu = unit.with_name(f"{unit.name}.d").exists()
    assert exposure(unit) <= (1.4 if gpu else 1.2)


@needs_analyze
def test_the_comment_tells_the_exposure(tmp_path: Path) -> None:
    said = re.search(r"--offline=true` says (\d\.\d)", UNIT.read_text())
    assert said
    # The weights differ a little between versions of systemd.
    assert exposure(Path(shutil.copy(UNIT, tmp_path))) == pytest.approx(float(said[1]), abs=0.2)


def test_what_no_restart_can_mend_is_not_restarted() -> None:
    from bcseg_batch.errors import CheckpointError, DeviceError, OutputError, SettingsError

    line = re.search(r"^RestartPreventExitStatus=(.*)$", UNIT.read_text(), re.MULTILINE)
    assert line
    never = {int(code) for code in line[1].split()}
    assert {SettingsError.exit_code, CheckpointError.exit_code} <= never
    assert not {OutputError.exit_code, DeviceError.exit_code} & never


def test_the_unit_waits_longer_for_the_end_than_the_daemon_does() -> None:
    from bcseg_batch.settings import Settings

    line = re.search(r"^TimeoutStopSec=(\d+)$", UNIT.read_text(), re.MULTILINE)
    assert line
    assert int(line[1]) > Settings().service.shutdown_timeout_s + 30


def test_the_settings_in_the_install_steps_are_accepted(tmp_path: Path) -> None:
    from bcseg_batch.settings import load_settings

    steps = (SYSTEMD / "README.md").read_text()
    found = re.search(r"<<'EOF'\n(.*?)EOF\n", steps, re.DOTALL)
    assert found
    file = tmp_path / "lab.toml"
    file.write_text(found[1])
    folders = load_settings(file, {}, {}).settings.folders
    assert folders.input == Path("/srv/bcseg/lab/in")
    assert folders.state == Path("/var/lib/bcseg-batch/lab")
