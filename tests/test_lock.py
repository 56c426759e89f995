"""One process at a time."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from bcseg_batch.errors import UsageError
from bcseg_batch.store.lock import take_lock

HOLDER = (
    "import sys\n"
    "from pathlib import Path\n"
    "from bcseg_batch.store.lock import take_lock\n"
    "lock = take_lock(Path(sys.argv[1]), 'state directory')\n"
    "print('held', flush=True)\n"
    "sys.stdin.read()\n"
)


def test_the_second_is_told_who_has_it_until_that_one_is_killed(tmp_path: Path) -> None:
    path = tmp_path / "lock"
    with subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(path)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "held\n"
        with pytest.raises(UsageError) as caught:
            take_lock(path, "state directory")
        assert f"process {process.pid}" in str(caught.value)
        assert "name another state directory" in str(caught.value)
        assert str(tmp_path) in str(caught.value)
        process.kill()
        process.wait()
    with take_lock(path, "state directory"):
        assert path.read_text() == f"{os.getpid()}\n"


def test_closing_lets_the_next_one_in(tmp_path: Path) -> None:
    take_lock(tmp_path / "lock", "output folder").close()
    take_lock(tmp_path / "lock", "output folder").close()


def test_a_folder_that_is_not_there_is_the_callers_error(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        take_lock(tmp_path / "none" / "lock", "output folder")
