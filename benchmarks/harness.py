"""What the benchmarks share: the machine's own limits, two things in turn, tables and JSON.

Figures are ratios of things that were measured in turn in one run on one machine, so that they hold
when the machine is slower tomorrow. Aims stand beside the figures and are never asserted.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path

import numpy as np
import numpy.typing as npt
import simplejpeg
import torch
from loguru import logger
from PIL import Image
from rich.console import Console
from rich.table import Table

from bcseg_batch.segment.placement import available_cores
from bcseg_training.synthetic import synthesize_numbered

SHAPE_HW = (1200, 1600)
logger.remove()  # what the product tells of its stages is no figure
COMMAND = [str(Path(sys.executable).with_name("bcseg-batch"))]


@dataclass(frozen=True)
class Figure:
    """One row of a table.

    Attributes:
        name: what was measured.
        value: the median.
        unit: `x` for a ratio.
        aim: the limit, where there is one.
        at_least: whether the aim is a lower limit.
        spread: smallest and largest, where it was measured more than once.
    """

    name: str
    value: float
    unit: str
    aim: float | None = None
    at_least: bool = True
    spread: tuple[float, float] | None = None

    @property
    def reached(self) -> bool | None:
        """Whether the aim is reached; None without one."""
        if self.aim is None:
            return None
        return self.value >= self.aim if self.at_least else self.value <= self.aim


def parser(text: str | None, *, images: int, rounds: int) -> argparse.ArgumentParser:
    """Make the command line that all benchmarks have."""
    made = argparse.ArgumentParser(
        description=text, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    made.add_argument("--images", type=int, default=images, help="photographs in the folder")
    made.add_argument("--rounds", type=int, default=rounds, help="times that each is measured")
    made.add_argument("--json", type=Path, help="file for the figures")
    return made


def report(title: str, figures: Sequence[Figure], json_file: Path | None) -> None:
    """Print figures as a table and as JSON, with the machine's limits beside them."""
    limits = machine_limits()
    table = Table("figure", "value", "spread", "aim", title=title, title_justify="left")
    for one in figures:
        aim = ""
        if one.aim is not None:
            sign = "at least" if one.at_least else "at most"
            aim = f"{sign} {one.aim:g}: {'reached' if one.reached else 'missed'}"
        spread = f"{one.spread[0]:.3g} to {one.spread[1]:.3g}" if one.spread else ""
        table.add_row(one.name, f"{one.value:.4g} {one.unit}", spread, aim)
    for name, value in limits.items():
        table.add_row(f"[dim]{name}", f"[dim]{value}")
    Console(width=150).print(table)
    text = json.dumps(
        {
            "title": title,
            "measured_at": datetime.now().astimezone().isoformat(timespec="seconds"),
            "figures": {
                one.name: {
                    "value": one.value,
                    "unit": one.unit,
                    "aim": one.aim,
                    "spread": one.spread,
                    "reached": one.reached,
                }
                for one in figures
            },
            "machine": limits,
        },
        indent=2,
    )
    print(text)
    if json_file is not None:
        json_file.write_text(text + "\n")


def machine_limits() -> dict[str, str | float]:
    """Measure what the machine can do at best: matrices, JPEG, disk."""
    pixels = synthesize_numbered(1, 0, shape_hw=SHAPE_HW, style="typical").image
    jpeg = simplejpeg.encode_jpeg(pixels, quality=90, colorsubsampling="420")
    has_bf16 = any(torch.cpu.get_capabilities().get(k) for k in ("avx512_bf16", "amx_bf16"))
    return {
        "processor": _processor(),
        "cores": available_cores(),
        "bfloat16 instructions": "yes" if has_bf16 else "no",
        "load before": round(os.getloadavg()[0], 2),
        "float32 matrices, GFLOP/s": round(matrix_rate(torch.float32) / 1e9, 1),
        # Without instructions for it this takes minutes for large ones.
        "bfloat16 matrices, GFLOP/s": round(
            matrix_rate(torch.bfloat16, 2048 if has_bf16 else 256) / 1e9, 1
        ),
        "JPEG decoded per second and core": round(
            1 / best_s(lambda: simplejpeg.decode_jpeg(jpeg)), 1
        ),
        "JPEG encoded per second and core": round(
            1 / best_s(lambda: simplejpeg.encode_jpeg(pixels, quality=90)), 1
        ),
        "disk, MB/s written and synced": round(_disk_rate() / 1e6, 1),
    }


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    names = [
        line.partition(":")[2].strip()
        for line in (info.read_text().splitlines() if info.exists() else [])
        if line.startswith("model name")
    ]
    return names[0] if names else platform.processor()


def matrix_rate(dtype: torch.dtype, side: int = 2048) -> float:
    """Multiply two matrices with all cores; FLOP per second at best."""
    torch.set_num_threads(available_cores())
    left, right = (torch.rand(side, side).to(dtype) for _ in range(2))
    return float(2 * side**3 / best_s(lambda: left @ right))


def _disk_rate() -> float:
    block = os.urandom(1 << 20)
    with tempfile.NamedTemporaryFile(dir=".") as file:
        begun_s = time.perf_counter()
        for _ in range(64):
            file.write(block)
        file.flush()
        os.fsync(file.fileno())
        return float(64 * len(block) / (time.perf_counter() - begun_s))


def best_s(call: Callable[[], object], *, times: int = 5) -> float:
    """Time a call at its best, after one that is not counted; seconds."""
    call()
    spans = []
    for _ in range(times):
        begun_s = time.perf_counter()
        call()
        spans.append(time.perf_counter() - begun_s)
    return min(spans)


def in_turn(calls: dict[str, Callable[[], float]], rounds: int) -> dict[str, list[float]]:
    """Measure several things in turn, so that a slow minute hits all of them.

    Args:
        calls: each gives its own figure.
        rounds: how often.

    Returns:
        The figures of each, one for each round.
    """
    found: dict[str, list[float]] = {name: [] for name in calls}
    for number in range(rounds):
        for name, call in calls.items():
            found[name].append(call())
            print(f"round {number + 1}: {name}: {found[name][-1]:.4g}", file=sys.stderr, flush=True)
    return found


def ratio(
    name: str,
    over: Sequence[float],
    under: Sequence[float],
    *,
    aim: float | None = None,
    at_least: bool = True,
) -> Figure:
    """Compare two things that were measured in turn: the median of the pairs."""
    pairs = [a / b for a, b in zip(over, under, strict=True)]
    return Figure(name, statistics.median(pairs), "x", aim, at_least, (min(pairs), max(pairs)))


def plain(
    name: str,
    values: Sequence[float],
    unit: str,
    *,
    aim: float | None = None,
    at_least: bool = True,
) -> Figure:
    """Give the median of something that is no ratio."""
    return Figure(name, statistics.median(values), unit, aim, at_least, (min(values), max(values)))


def photographs(folder: Path, count: int, *, quality: int = 90) -> list[Path]:
    """Write smears of 1600 x 1200 px as JPEG: a few are drawn, the others are these, shifted."""
    folder.mkdir(parents=True, exist_ok=True)
    drawn = [
        synthesize_numbered(1, number, shape_hw=SHAPE_HW, style="typical").image
        for number in range(min(count, 4))
    ]
    paths = []
    for number in range(count):
        pixels = np.roll(drawn[number % len(drawn)], 31 * (number // len(drawn)), axis=(0, 1))
        paths.append(folder / f"{number:05}.jpg")
        Image.fromarray(pixels).save(paths[-1], "JPEG", quality=quality)
    return paths


@dataclass
class Run:
    """What a whole run of a command came to.

    Attributes:
        wall_s: from start to end.
        cpu_s: of all cores.
        peak_mb: largest resident memory.
        first_s: from the start to the first result; None where there was none.
        images_per_s: between the first results and the last one; None with too few of them.
        memory_mb: resident memory over the run, sampled.
    """

    wall_s: float
    cpu_s: float
    peak_mb: float
    first_s: float | None = None
    images_per_s: float | None = None
    memory_mb: list[float] = field(default_factory=list)


def run_command(arguments: Sequence[str], output: Path | None = None) -> Run:
    """Run a command of the product as a user would, and look at it from outside."""
    begun, begun_s = time.time(), time.perf_counter()
    process = subprocess.Popen(
        [*COMMAND, *arguments], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE
    )
    samples = []
    status = Path(f"/proc/{process.pid}/status")
    while True:
        done, code, usage = os.wait4(process.pid, os.WNOHANG)
        if done:
            break
        samples += (
            int(line.split()[1]) / 1024
            for line in status.read_text().splitlines()
            if line.startswith("VmRSS")
        )
        time.sleep(0.02 if len(samples) < 500 else 0.5)
    wall_s = time.perf_counter() - begun_s
    process.returncode = os.waitstatus_to_exitcode(code)
    said = process.stderr.read().decode() if process.stderr else ""
    if process.returncode:
        raise RuntimeError(f"{arguments} ended with {process.returncode}: {said}")
    run = Run(wall_s, usage.ru_utime + usage.ru_stime, usage.ru_maxrss / 1024, memory_mb=samples)
    if output is not None:
        ended = finished_at(output)
        if ended:
            run.first_s = ended[0] - begun
            run.images_per_s = steady_rate(ended)
    return run


def finished_at(output: Path) -> list[float]:
    """Read when each image of an output folder was through, as Unix time, in order."""
    lines = (output / "results.jsonl").read_text().splitlines()
    return sorted(
        datetime.fromisoformat(json.loads(line)["finished_at"]).timestamp() for line in lines
    )


def steady_rate(ended: Sequence[float]) -> float | None:
    """Count images per second between the tenth part of them and the last."""
    skipped = max(1, len(ended) // 10)
    if len(ended) <= skipped or ended[-1] <= ended[skipped - 1]:
        return None
    return (len(ended) - skipped) / (ended[-1] - ended[skipped - 1])


def jpeg_bytes(pixels: npt.NDArray[np.uint8]) -> bytes:
    """Encode as Pillow does."""
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "JPEG", quality=90)
    return buffer.getvalue()
