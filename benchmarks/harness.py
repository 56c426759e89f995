"""What the benchmarks share: photographs, real runs, taking turns, the machine's limits, tables.

Every figure is a ratio of two things that were measured in turn (A B A B ...) in one run on one
machine, so that what else the machine does falls on both. A ratio is taken within each round; the
median over the rounds counts, with the smallest and the largest beside it. Aims stand beside the
figures and are never enforced: a busy machine is no bug.
"""

from __future__ import annotations

import json
import math
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import simplejpeg
import torch
from ledger import fsync_s, seconds
from rich.console import Console
from rich.table import Table

from bcseg_batch.segment.placement import available_cores
from bcseg_batch.service.build import SHIPPED_MODEL
from bcseg_batch.settings import Settings
from bcseg_training.synthetic import synthesize_numbered

SHAPE_HW = (1200, 1600)
JPEG_QUALITY = 95
BATCH_SIZE = Settings().processing.batch_size
_SMEARS = 3
_GIVE_UP_S = 3600.0
_SAMPLE_EVERY_S = 0.05


# Photographs -----------------------------------------------------------------------------------


def photographs(
    count: int, shape_hw: tuple[int, int] = SHAPE_HW
) -> Iterator[npt.NDArray[np.uint8]]:
    """Draw a few smears; turn and number them, so that no two photographs are the same.

    Args:
        count: how many.
        shape_hw: (H, W).

    Yields:
        uint8 (H, W, 3) RGB.
    """
    smears = [
        synthesize_numbered(1, index, shape_hw=shape_hw, style="typical").image
        for index in range(min(count, _SMEARS))
    ]
    for number in range(count):
        smear = smears[number % len(smears)]
        turn = number // len(smears) % 4
        smear = smear[:: -1 if turn & 1 else 1, :: -1 if turn & 2 else 1].copy()
        smear[:16, :16] = (number % 256, number // 256 % 256, number // 65536)
        yield smear


def encode_photograph(pixels: npt.NDArray[np.uint8]) -> bytes:
    """Give the JPEG that a camera would."""
    data: bytes = simplejpeg.encode_jpeg(pixels, quality=JPEG_QUALITY, colorsubsampling="420")
    return data


def write_photographs(folder: Path, count: int, shape_hw: tuple[int, int] = SHAPE_HW) -> list[Path]:
    """Write photographs as JPEG into a new folder."""
    folder.mkdir(parents=True)
    paths = []
    for number, pixels in enumerate(photographs(count, shape_hw)):
        paths.append(folder / f"{number:05d}.jpg")
        paths[-1].write_bytes(encode_photograph(pixels))
    return paths


def some_of(paths: Sequence[Path], count: int, folder: Path) -> Path:
    """Make a folder with the first few of some files, without copying them."""
    folder.mkdir(parents=True)
    for path in paths[:count]:
        (folder / path.name).hardlink_to(path)
    return folder


# Real runs -------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Sample:
    """How a process stood at one moment.

    Attributes:
        at_s: seconds since its start.
        rss_bytes: resident memory.
        peak_bytes: the most that it was so far. The kernel's figure for the memory of the program
            itself; that of `wait4` begins with what its parent held.
        threads: how many it has.
        files: how many it has open.
    """

    at_s: float
    rss_bytes: int
    peak_bytes: int
    threads: int
    files: int


@dataclass(frozen=True, slots=True)
class Finished:
    """A process that has ended well.

    Attributes:
        wall_s: from its start to its end.
        cpu_s: processor time of it, user and system.
        samples: every 50 ms.
        output: what it printed.
    """

    wall_s: float
    cpu_s: float
    samples: list[Sample]
    output: str

    @property
    def peak_bytes(self) -> int:
        """The most memory that was resident."""
        return max((sample.peak_bytes for sample in self.samples), default=0)


@dataclass(frozen=True, slots=True, kw_only=True)
class Rate:
    """How fast images came out of one run.

    Attributes:
        images: how many.
        steady_per_s: images per second between the first and the last batch; None where no more
            came out.
        whole_per_s: images per second of the whole process, start and end included.
        core_ms_per_image: processor time of the whole process for each image, milliseconds.
        peak_mb: the most memory that was resident, MB (10^6 bytes).
        runs_on: device and precision of the network.
        tiled: how many of the images were taken in tiles.
    """

    images: int
    steady_per_s: float | None
    whole_per_s: float
    core_ms_per_image: float
    peak_mb: float
    runs_on: str
    tiled: int = 0


def command() -> str:
    """Find the installed command beside this interpreter."""
    found = shutil.which("bcseg-batch", path=str(Path(sys.executable).parent))
    if found is None:
        raise SystemExit("bcseg-batch is not installed beside this Python")
    return found


def environment(changes: Mapping[str, str] | None = None) -> dict[str, str]:
    """Give the environment without settings of ours but those named."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("BCSEG_")}
    return kept | dict(changes or {})


def start(
    arguments: Sequence[str | Path], log: Path, changes: Mapping[str, str] | None = None
) -> subprocess.Popen[bytes]:
    """Start a process whose standard output goes to `log`, and its errors beside that."""
    with log.open("wb") as out, log.with_suffix(".err").open("wb") as errors:
        return subprocess.Popen(
            [str(argument) for argument in arguments],
            stdout=out,
            stderr=errors,
            env=environment(changes),
        )


def _look_at(pid: int, began_s: float) -> Sample | None:
    """Read what the kernel says of a process; None where it is gone, or not yet the program."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
        facts = dict(line.split(":", 1) for line in lines if ":" in line)
        kib = {name: int(facts[name].split()[0]) for name in ("VmRSS", "VmHWM")}
        files = sum(1 for _ in Path(f"/proc/{pid}/fd").iterdir())
        program = Path(f"/proc/{pid}/exe").readlink()
    except (OSError, KeyError, ValueError):
        return None
    if program != Path(sys.executable).resolve():
        return None
    return Sample(
        time.monotonic() - began_s,
        1024 * kib["VmRSS"],
        1024 * kib["VmHWM"],
        int(facts["Threads"]),
        files,
    )


class Watched:
    """A process that is looked at while it runs; `wait` says what it came to.

    Args:
        arguments: the command.
        changes: of the environment.
    """

    def __init__(
        self, arguments: Sequence[str | Path], changes: Mapping[str, str] | None = None
    ) -> None:
        self._folder = tempfile.TemporaryDirectory()
        self._log = Path(self._folder.name, "log.txt")
        self.began_s = time.monotonic()
        self.process = start(arguments, self._log, changes)
        self._ended = threading.Event()
        self._samples: list[Sample] = []
        self._watcher = threading.Thread(target=self._watch, daemon=True)
        self._watcher.start()

    def _watch(self) -> None:
        while not self._ended.wait(_SAMPLE_EVERY_S):
            if (sample := _look_at(self.process.pid, self.began_s)) is not None:
                self._samples.append(sample)

    def wait_until(self, true: Callable[[], bool], what: str) -> float:
        """Look every 5 ms until something is so; give the seconds since the start.

        Raises:
            SystemExit: the process has ended, or it takes too long.
        """
        while not true():
            gone = self.process.poll() is not None
            if gone or time.monotonic() - self.began_s > _GIVE_UP_S:
                self.process.kill()
                raise SystemExit(f"not to be had: {what}\n{self.errors}")
            time.sleep(0.005)
        return time.monotonic() - self.began_s

    @property
    def errors(self) -> str:
        """What the process wrote to standard error."""
        return self._log.with_suffix(".err").read_text(errors="replace")

    def wait(self) -> Finished:
        """Wait for the end.

        Raises:
            SystemExit: it did not end with 0.
        """
        _, status, usage = os.wait4(self.process.pid, 0)
        wall_s = time.monotonic() - self.began_s
        self.process.returncode = os.waitstatus_to_exitcode(status)
        self._ended.set()
        self._watcher.join()
        output, errors = self._log.read_text(errors="replace"), self.errors
        self._folder.cleanup()
        if self.process.returncode != 0:
            raise SystemExit(
                f"{self.process.args!r} ended with {self.process.returncode}:\n{output}{errors}"
            )
        return Finished(wall_s, usage.ru_utime + usage.ru_stime, self._samples, output)


def run(arguments: Sequence[str | Path], changes: Mapping[str, str] | None = None) -> Finished:
    """Run a command to its end, looking at it meanwhile."""
    return Watched(arguments, changes).wait()


def steady_per_s(finished_s: Sequence[float], batch: int) -> float | None:
    """Give the rate between the first batch and the last one.

    When the first batch is through, the next ones are well under way already, as they are in the
    middle of a run; at the end nothing comes after the last. So both ends have to be left out, or
    the rate comes out too high: for a few batches higher than the network can be.

    Args:
        finished_s: when each image was through, in any order, on one clock.
        batch: images at either end that are left out; a quarter where there are fewer than four
            times as many.

    Returns:
        Images per second; None where too few are left.
    """
    times_s = np.sort(np.asarray(finished_s))
    batch = min(batch, times_s.size // 4)
    counted = times_s.size - 2 * batch
    first_s, last_s = times_s[max(0, batch - 1)], times_s[times_s.size - batch - 1]
    if batch == 0:
        counted -= 1
    return float(counted / (last_s - first_s)) if counted > 0 and last_s > first_s else None


def records(output: Path) -> list[dict[str, Any]]:
    """Read the records of the images that are done."""
    lines = (output / "results.jsonl").read_text(encoding="utf-8").splitlines()
    return [record for record in map(json.loads, lines) if record["status"] == "done"]


def rate_of(output: Path, finished: Finished) -> Rate:
    """Work out how fast a run of ours was, from its records and its process.

    Args:
        output: its output folder.
        finished: its process.
    """
    done = records(output)
    times_s = [datetime.fromisoformat(record["finished_at"]).timestamp() for record in done]
    return Rate(
        images=len(done),
        steady_per_s=steady_per_s(times_s, BATCH_SIZE),
        whole_per_s=len(done) / finished.wall_s,
        core_ms_per_image=1000 * finished.cpu_s / max(1, len(done)),
        peak_mb=finished.peak_bytes / 1e6,
        runs_on=f"{done[0]['device']} {done[0]['dtype']}",
        tiled=sum(record["tile_scale"] is not None for record in done),
    )


Sections = Mapping[str, Mapping[str, object]]


def write_settings(path: Path, sections: Sections) -> Path:
    """Write a settings file."""
    path.write_text(
        "\n".join(
            f"[{name}]\n" + "".join(f"{key} = {json.dumps(value)}\n" for key, value in keys.items())
            for name, keys in sections.items()
        )
    )
    return path


def process_dir(source: Path, *options: str | Path, sections: Sections | None = None) -> Rate:
    """Run `bcseg-batch process-dir` into a folder that is thrown away.

    Args:
        source: folder of the photographs.
        options: of the command.
        sections: settings.
    """
    with tempfile.TemporaryDirectory(dir=source.parent) as name:
        output = Path(name, "out")
        settings = write_settings(Path(name, "settings.toml"), sections or {})
        return rate_of(
            output,
            run([command(), "process-dir", source, output, "--settings", settings, *options]),
        )


def daemon(source: Path, *, sections: Sections | None = None) -> Rate:
    """Run a daemon, drop the photographs into its folder once it watches, and end it when done.

    Args:
        source: folder of the photographs.
        sections: settings.
    """
    files = sorted(source.iterdir())
    with tempfile.TemporaryDirectory(dir=source.parent) as name:
        root = Path(name)
        (root / "input").mkdir()
        folders = {place: str(root / place) for place in ("input", "output", "state")}
        settings = write_settings(root / "settings.toml", {"folders": folders, **(sections or {})})
        watched = Watched([command(), "run", "--settings", settings])
        watched.wait_until((root / "state" / "status.json").exists, "a daemon that watches")
        for file in files:
            shutil.copyfile(file, root / "input" / file.name)
        results = root / "output" / "results.jsonl"
        watched.wait_until(
            lambda: results.exists() and results.read_bytes().count(b"\n") >= len(files),
            "a record of each image",
        )
        watched.process.terminate()
        return rate_of(root / "output", watched.wait())


# Taking turns ----------------------------------------------------------------------------------


def in_turn(
    subjects: Mapping[str, Callable[[], Any]], rounds: int, *, console: Console | None = None
) -> dict[str, list[Any]]:
    """Measure things in turn: A B C A B C ...

    Args:
        subjects: what to measure, by name.
        rounds: how often each.
        console: told what is under way.

    Returns:
        For each name its results, one for each round.
    """
    results: dict[str, list[Any]] = {name: [] for name in subjects}
    for number in range(rounds):
        for name, measure in subjects.items():
            if console is not None:
                console.print(f"round {number + 1} of {rounds}: {name}")
            results[name].append(measure())
    return results


@dataclass(frozen=True, slots=True, kw_only=True)
class Figure:
    """One figure, with what it should be.

    Attributes:
        name: what it says.
        values: one for each round.
        unit: `x` for a ratio.
        aim: what it should be; None where nothing is asked.
        at_least: whether more is better.
    """

    name: str
    values: Sequence[float]
    unit: str = "x"
    aim: float | None = None
    at_least: bool = True

    @property
    def median(self) -> float:
        """Over the rounds."""
        return statistics.median(self.values)

    @property
    def is_met(self) -> bool | None:
        """Whether the median is within the aim; None without an aim."""
        if self.aim is None:
            return None
        return self.median >= self.aim if self.at_least else self.median <= self.aim

    def to_json(self) -> dict[str, Any]:
        """Give the figure for a file."""
        return {
            "name": self.name,
            "median": self.median,
            "min": min(self.values),
            "max": max(self.values),
            "unit": self.unit,
            "aim": self.aim,
            "at_least": self.at_least,
            "is_met": self.is_met,
        }


def ratios(
    name: str,
    above: Sequence[float | None],
    below: Sequence[float | None],
    *,
    aim: float | None = None,
    at_least: bool = True,
) -> Figure | None:
    """Divide two series round by round.

    Returns:
        The figure; None where no round has both.
    """
    pairs = zip(above, below, strict=True)
    values = [a / b for a, b in pairs if a is not None and b]
    return Figure(name=name, values=values, aim=aim, at_least=at_least) if values else None


# The machine -----------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """What this machine can do at best, whatever the program.

    Attributes:
        matrix_float32_gflops: product of two matrices in float32, all cores, 10^9 operations a
            second.
        matrix_bfloat16_gflops: the same in bfloat16; slow where the processor only emulates it.
        jpeg_decode_per_s: photographs of 1600x1200 that one core decodes in a second.
        jpeg_encode_per_s: the same, encoded at quality 92.
        disk_mb_per_s: written and forced to disk, files of 1 MB.
        fsync_ms: one small write forced to disk.
    """

    matrix_float32_gflops: float
    matrix_bfloat16_gflops: float
    jpeg_decode_per_s: float
    jpeg_encode_per_s: float
    disk_mb_per_s: float
    fsync_ms: float


def has_bfloat16() -> bool:
    """Say whether the processor has instructions for bfloat16."""
    capabilities = torch.cpu.get_capabilities() if hasattr(torch.cpu, "get_capabilities") else {}
    return bool(capabilities.get("avx512_bf16") or capabilities.get("amx_bf16"))


def matrix_gflops(dtype: torch.dtype, side: int = 2048, *, least_s: float = 0.5) -> float:
    """Measure the rate of a matrix product on all cores, in 10^9 operations a second."""
    torch.set_num_threads(available_cores())
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.rand(side, side, generator=generator).to(dtype) for _ in range(2))
    torch.mm(a, b)
    repeats, began_s = 0, time.perf_counter()
    while (took_s := time.perf_counter() - began_s) < least_s or not repeats:
        torch.mm(a, b)
        repeats += 1
    return 2 * side**3 * repeats / took_s / 1e9


def _disk_mb_per_s(folder: Path) -> float:
    content = os.urandom(1_000_000)

    def once() -> None:
        with (folder / "probe.bin").open("wb", buffering=0) as file:
            file.write(content)
            os.fsync(file.fileno())

    return 1.0 / seconds(once, 9)


def limits(folder: Path) -> Limits:
    """Measure the machine.

    Args:
        folder: on the disk that is meant.
    """
    pixels = next(photographs(1))
    packed = encode_photograph(pixels)
    encode_s = seconds(lambda: simplejpeg.encode_jpeg(pixels, quality=92, colorsubsampling="420"))
    # Products in an emulated precision take seconds at full size.
    bfloat16_side = 2048 if has_bfloat16() else 512
    return Limits(
        matrix_float32_gflops=matrix_gflops(torch.float32),
        matrix_bfloat16_gflops=matrix_gflops(torch.bfloat16, bfloat16_side),
        jpeg_decode_per_s=1.0 / seconds(lambda: simplejpeg.decode_jpeg(packed)),
        jpeg_encode_per_s=1.0 / encode_s,
        disk_mb_per_s=_disk_mb_per_s(folder),
        fsync_ms=1000 * fsync_s(folder),
    )


def machine() -> dict[str, Any]:
    """Say what the figures were measured on."""
    names = [
        line.split(":", 1)[1].strip()
        for line in Path("/proc/cpuinfo").read_text().splitlines()
        if line.startswith("model name")
    ]
    return {
        "processor": names[0] if names else platform.machine(),
        "cores": available_cores(),
        "has_bfloat16": has_bfloat16(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "load_before": round(os.getloadavg()[0], 2),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "model": SHIPPED_MODEL.name,
    }


# Saying it -------------------------------------------------------------------------------------


def _number(value: float | None) -> str:
    if value is None or math.isnan(value):
        return "-"
    if abs(value) >= 1000:
        return f"{value:,.0f}"
    return f"{value:.3g}" if abs(value) < 100 else f"{value:.0f}"


def _cell(value: object) -> str:
    return _number(value) if isinstance(value, float | None) else str(value)


@dataclass(slots=True)
class Report:
    """Gathers what a benchmark found, and says it as tables and as JSON.

    Attributes:
        benchmark: its name.
        options: what it was run with.
        figures: those that count.
        parts: everything else for the JSON, by name.
    """

    benchmark: str
    options: Mapping[str, object]
    figures: list[Figure] = field(default_factory=list)
    parts: dict[str, object] = field(default_factory=dict)
    machine: dict[str, Any] = field(default_factory=machine)
    console: Console = field(default_factory=lambda: Console(width=132, highlight=False))

    def add(self, *figures: Figure | None) -> None:
        """Take up figures; None stands for one that could not be worked out."""
        self.figures += [figure for figure in figures if figure is not None]

    def table(self, title: str, columns: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
        """Print a table: names at the left, numbers at the right."""
        table = Table(title=title, title_justify="left", title_style="bold")
        for number, column in enumerate(columns):
            table.add_column(column, justify="right" if number else "left")
        for row in rows:
            table.add_row(*map(_cell, row))
        self.console.print(table)

    def limits(self, measured: Sequence[Limits]) -> None:
        """Print and keep what the machine can do, the median of several measurements."""
        middle = {
            name: statistics.median(getattr(one, name) for one in measured)
            for name in Limits.__slots__
        }
        self.parts["limits"] = middle
        rows = [[name.replace("_", " "), value] for name, value in middle.items()]
        self.table("The machine's own limits", ["", "median"], rows)

    def rates(self, title: str, rates: Mapping[str, Sequence[Rate]]) -> None:
        """Print and keep the rates of runs, the median of the rounds."""
        self.parts["runs"] = {name: [asdict(rate) for rate in some] for name, some in rates.items()}

        def middle(some: Sequence[Rate], key: str) -> float | None:
            values = [getattr(rate, key) for rate in some]
            known = [value for value in values if value is not None]
            return statistics.median(known) if known else None

        keys = ("steady_per_s", "whole_per_s", "core_ms_per_image", "peak_mb")
        self.table(
            f"{title} (steady: between the first and the last batch; whole: all of the process)",
            ["", "images", "steady/s", "whole/s", "core-ms/image", "peak MB", "on", "tiled"],
            [
                [
                    name,
                    some[0].images,
                    *(middle(some, key) for key in keys),
                    some[0].runs_on,
                    some[0].tiled,
                ]
                for name, some in rates.items()
            ],
        )

    def finish(self, path: Path | None) -> None:
        """Print the figures beside their aims, and write everything as JSON.

        Args:
            path: of the JSON file; `-` prints it; None leaves it out.
        """
        rows = [
            [
                figure.name,
                figure.median,
                min(figure.values),
                max(figure.values),
                figure.unit,
                "" if figure.aim is None else f"{'>=' if figure.at_least else '<='} {figure.aim:g}",
                {True: "yes", False: "NO", None: ""}[figure.is_met],
            ]
            for figure in self.figures
        ]
        self.table("Figures", ["", "median", "min", "max", "unit", "aim", "met"], rows)
        facts = self.machine
        self.console.print(
            f"{facts['processor']}, {facts['cores']} cores, "
            f"{'with' if facts['has_bfloat16'] else 'without'} bfloat16; "
            f"load {facts['load_before']} before, {os.getloadavg()[0]:.2f} after"
        )
        content = json.dumps(
            {
                "benchmark": self.benchmark,
                "machine": facts,
                "options": {key: str(value) for key, value in self.options.items()},
                **self.parts,
                "figures": [figure.to_json() for figure in self.figures],
            },
            indent=2,
        )
        if path is not None and str(path) == "-":
            print(content)
        elif path is not None:
            path.write_text(content + "\n", encoding="utf-8")
