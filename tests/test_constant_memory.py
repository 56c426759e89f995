"""The memory of a run does not grow with the number of files."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

# An engine without pictures: what is left is all that a run does with names and records.
SCRIPT = """
import functools
import sys
import tracemalloc
from pathlib import Path

from loguru import logger
from parts import OPTIONS, NeverStop

from bcseg_batch.intake import external_sort, scan
from bcseg_batch.intake.external_sort import ExternalSort
from bcseg_batch.intake.ignore import IgnoreRules
from bcseg_batch.items import Outcome, Status
from bcseg_batch.service import process_dir as module
from bcseg_batch.service.listing import Listing
from bcseg_batch.service.process_dir import process_dir
from bcseg_batch.service.progress import ProgressLines

logger.remove()
# The bounds, made small enough to be met by few files.
module.Listing = functools.partial(Listing, ahead=200)
module._NAMED = 100
scan.ExternalSort = functools.partial(ExternalSort, 200)
external_sort._READ_BYTES = 128


class Recorder:
    options = OPTIONS

    def __init__(self, names):
        self.names = names

    def process(self, files):
        for file in files:
            name = self.names.claim(file.image)
            if int(name) % 4 == 0:
                error = "UnreadableImageError: damaged"
                yield Outcome(image=file.image, status=Status.FAILED, error=error)
                continue
            (masks / f"{name}_mask.png").write_bytes(b"x")
            yield Outcome(
                image=file.image,
                status=Status.DONE,
                mask=f"masks/{name}_mask.png",
                size_bytes=file.size_bytes,
                mtime_ns=file.mtime_ns,
                model_sha256=OPTIONS.model_sha256,
                settings_sha256=OPTIONS.settings_sha256,
            )


source, output, count = Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3])
masks = output / "masks"
source.mkdir()
masks.mkdir(parents=True)
for number in range(count):
    (source / f"{number:06}.png").write_bytes(b"x")
    if number % 4 == 1:
        (source / f"{number:06}.txt").touch()
for run in range(2):
    tracemalloc.start()
    summary = process_dir(
        source,
        output,
        engine=lambda inputs, outputs, names: Recorder(names),
        rules=IgnoreRules({".png"}),
        recursive=True,
        overwrite=False,
        stop=NeverStop(),
        progress=ProgressLines(),
    )
    print(tracemalloc.get_traced_memory()[1])
    tracemalloc.stop()
    assert summary.failed == count // 4
    assert (summary.done, summary.skipped) == ((count - count // 4), 0)[:: 1 - 2 * run]
"""


def peaks_bytes(folder: Path, count: int) -> list[int]:
    """Give the highest memory of a first and of a second run over so many files."""
    folder.mkdir()
    arguments = [str(folder / "in"), str(folder / "out"), str(count)]
    result = subprocess.run(
        [sys.executable, "-c", SCRIPT, *arguments],
        env={"PYTHONPATH": ":".join(sys.path), "PATH": "/usr/bin:/bin"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    return [int(line) for line in result.stdout.split()]


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_the_memory_of_a_run_does_not_grow_with_the_number_of_files(tmp_path: Path) -> None:
    few, many = 2_000, 12_000
    small, large = peaks_bytes(tmp_path / "few", few), peaks_bytes(tmp_path / "many", many)
    # The least that Python holds of anything is some fifty bytes.
    allowed_bytes = (many - few) * 20
    for first, second in zip(small, large, strict=True):
        assert second < first + allowed_bytes, (small, large)
