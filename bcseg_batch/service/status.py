"""What the daemon tells of itself to other processes: one small file in the state folder."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from bcseg_batch.store.lock import is_locked
from bcseg_batch.store.outputs import output_error

STATUS_NAME = "status.json"
LOCK_NAME = "daemon.lock"


@dataclass(frozen=True, slots=True, kw_only=True)
class DaemonStatus:
    """The daemon at one moment.

    Attributes:
        pid: of its process.
        version: of the package.
        started_at: ISO 8601, UTC.
        updated_at: likewise; an old one of a living daemon means that it is stuck.
        state: `starting`, `running`, `paused`, `reloading` or `stopping`.
        troubles: what keeps it from working, by place (`input`, `output`, `archive`,
            `pipeline`); empty where all is well.
        input: the input folder.
        output: the output folder.
        device: where the network runs.
        dtype: in which precision.
        model: name of the model file.
        model_sha256: of the model file.
        watch_mode: `inotify` or `poll`; None while the folder is not watched.
        watch_reason: why.
        settling: files that are waited for to keep still.
        in_flight: images being processed.
        done: images done by this process.
        failed: images failed in this process.
    """

    pid: int
    version: str
    started_at: str
    updated_at: str
    state: str
    troubles: Mapping[str, str]
    input: str
    output: str
    device: str
    dtype: str
    model: str
    model_sha256: str
    watch_mode: str | None
    watch_reason: str | None
    settling: int
    in_flight: int
    done: int
    failed: int


def write_status(state_folder: Path, status: DaemonStatus) -> None:
    """Replace the status file.

    Raises:
        OutputError: the state folder cannot be written.
    """
    text = json.dumps(asdict(status), indent=2)
    path = state_folder / STATUS_NAME
    part = path.with_name(f".{STATUS_NAME}.part")
    try:
        # Whole for every reader, but not forced to disk: no status outlives its process, and a
        # disk should be let sleep.
        part.write_bytes(text.encode("ascii") + b"\n")
        part.replace(path)
    except OSError as error:
        raise output_error(path, error) from error


def read_status(state_folder: Path) -> dict[str, Any] | None:
    """Read the status file; None where there is none, or none that can be read."""
    try:
        content = json.loads((state_folder / STATUS_NAME).read_bytes())
    except (OSError, ValueError):
        return None
    return content if isinstance(content, dict) else None


def is_alive(state_folder: Path) -> bool:
    """Say whether a daemon has the state folder: whether it holds the lock."""
    return is_locked(state_folder / LOCK_NAME)
