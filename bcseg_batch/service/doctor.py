"""`bcseg-batch check`: looks a set-up over before a night depends on it."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path

import numpy as np

from bcseg_batch.errors import BcsegError
from bcseg_batch.intake.filesystem import filesystem_of, inotify_limits
from bcseg_batch.intake.ignore import IgnoreRules
from bcseg_batch.intake.watch import WatchError, WatchMode, choose_mode
from bcseg_batch.items import InputFile, Status
from bcseg_batch.service.build import Engine, build_engine
from bcseg_batch.service.daemon import daemon_folders
from bcseg_batch.service.pipeline import Pipeline
from bcseg_batch.service.status import is_alive
from bcseg_batch.settings import Settings
from bcseg_batch.store.encode import encode_png
from bcseg_batch.store.images import SUFFIXES
from bcseg_batch.store.ledger import LEDGER_NAME, Ledger
from bcseg_batch.store.names import OutputNames
from bcseg_batch.store.outputs import OutputFolder

_LOW_SPACE_BYTES = 2 * 1024**3
_FOLDERS_COUNTED = 200_000


class Verdict(StrEnum):
    """How a check came out."""

    OK = "ok"
    WARNING = "warning"
    FAILURE = "failure"


@dataclass(frozen=True, slots=True)
class Finding:
    """One line of the report.

    Attributes:
        verdict: how it came out.
        subject: what was looked at.
        text: what was found, and what to do where it is not ok.
    """

    verdict: Verdict
    subject: str
    text: str


def examine(settings: Settings) -> Iterator[Finding]:
    """Look at folders, rights, space, file systems, kernel limits, ledger, model and device.

    The last check takes a made-up image all the way through. Nothing is left behind but the state
    folder, which is made where it is missing.
    """
    folders = settings.folders
    try:
        places = daemon_folders(settings)
    except BcsegError as error:
        yield Finding(Verdict.FAILURE, "folders", str(error))
        places = None
    else:
        yield Finding(Verdict.OK, "folders", "apart from each other")
    for subject, path, writable in (
        ("input folder", folders.input, False),
        ("output folder", folders.output, True),
        ("state folder", places.state if places else folders.state, True),
        ("archive folder", folders.archive, True),
        ("quarantine folder", folders.quarantine, True),
    ):
        if path is not None:
            yield from _folder(subject, path, writable=writable)
    if folders.input is not None and folders.input.is_dir():
        yield _watch(folders.input, settings)
    if places is not None:
        yield _ledger(places.state)
    engine: Engine | None = None
    try:
        engine = build_engine(settings)
    except BcsegError as error:
        yield Finding(Verdict.FAILURE, "model and device", str(error))
    else:
        yield Finding(Verdict.OK, "model and device", engine.description)
        yield _end_to_end(engine)


def _folder(subject: str, path: Path, *, writable: bool) -> Iterator[Finding]:
    if not path.is_dir():
        what = "is a file" if path.exists() else "does not exist"
        yield Finding(Verdict.FAILURE, subject, f"{path} {what}: make the folder")
        return
    needed = os.R_OK | os.X_OK | (os.W_OK if writable else 0)
    if not os.access(path, needed):
        right = "write" if writable else "read"
        yield Finding(
            Verdict.FAILURE, subject, f"this user may not {right} {path}: give it the right"
        )
        return
    filesystem = filesystem_of(path)
    text = f"{path} on {filesystem.type}"
    if writable:
        free_bytes = shutil.disk_usage(path).free
        text += f", {free_bytes / 1e9:.1f} GB free"
        if free_bytes < _LOW_SPACE_BYTES:
            yield Finding(Verdict.WARNING, subject, f"{text}: free some space")
            return
    yield Finding(Verdict.OK, subject, text)


def _watch(folder: Path, settings: Settings) -> Finding:
    try:
        choice = choose_mode(folder, WatchMode(settings.intake.mode))
    except WatchError as error:
        return Finding(Verdict.FAILURE, "watching", str(error))
    text = f"{choice.mode.value}: {choice.reason}"
    limits = inotify_limits()
    if choice.mode is WatchMode.INOTIFY and limits is not None:
        rules = IgnoreRules(settings.images.suffixes or SUFFIXES, settings.images.ignore)
        count = _count_folders(folder, rules) if settings.images.recursive else 1
        text += f"; {count} folders, {limits.max_user_watches} inotify watches"
        if count > 0.8 * limits.max_user_watches:
            wanted = max(2 * count, 65536)
            return Finding(
                Verdict.WARNING,
                "watching",
                f"{text}: raise the limit with sysctl fs.inotify.max_user_watches={wanted}, or set "
                "intake.mode to poll",
            )
    return Finding(Verdict.OK, "watching", text)


def _count_folders(folder: Path, rules: IgnoreRules) -> int:
    count = 0
    for _, names, _ in os.walk(folder):
        names[:] = [name for name in names if rules.reason_folder(name) is None]
        count += 1
        if count >= _FOLDERS_COUNTED:
            break
    return count


def _ledger(state: Path) -> Finding:
    path = state / LEDGER_NAME
    running = " (a daemon is running)" if is_alive(state) else ""
    if not path.exists():
        return Finding(Verdict.OK, "ledger", f"none yet in {state}: the first start makes it")
    try:
        with Ledger.open_existing(path) as ledger:
            counts = ledger.standing(since_s=0.0).counts
    except BcsegError as error:
        return Finding(Verdict.FAILURE, "ledger", str(error))
    listed = ", ".join(f"{count} {state.value}" for state, count in counts.items())
    return Finding(Verdict.OK, "ledger", f"{listed}{running}")


def _end_to_end(engine: Engine) -> Finding:
    """Take a pale field with dark discs through decoding, network and writing."""
    subject = "one image end to end"
    pixels = np.full((480, 640, 3), 230, np.uint8)
    rows, columns = np.mgrid[:480, :640]
    for y, x in ((120, 160), (240, 400), (360, 200)):
        pixels[(rows - y) ** 2 + (columns - x) ** 2 < 40**2] = (170, 90, 120)
    with tempfile.TemporaryDirectory(prefix="bcseg-check-") as name:
        source = Path(name, "in.png")
        source.write_bytes(encode_png(pixels))
        facts = source.stat()
        file = InputFile(source, source.name, facts.st_size, facts.st_mtime_ns)
        try:
            with OutputFolder(Path(name, "out")) as outputs:
                pipeline = Pipeline(engine.predictors, outputs, OutputNames(), engine.options)
                (outcome,) = pipeline.process([file])
        except BcsegError as error:
            return Finding(Verdict.FAILURE, subject, str(error))
    if outcome.status is not Status.DONE:
        return Finding(Verdict.FAILURE, subject, outcome.error or "")
    return Finding(
        Verdict.OK, subject, f"{outcome.seconds:.2f} s, {outcome.foreground_fraction:.1%} cells"
    )
