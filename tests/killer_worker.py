"""A worker of a cluster that some images take down, for the tests; imported by its process."""

from __future__ import annotations

import os
import signal
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from bcseg_batch.items import InputFile
from bcseg_batch.service.dispatch import Task
from bcseg_batch.service.places import InPlace
from bcseg_batch.service.remote_worker import Answer, RemoteWorker


class KillerWorker(RemoteWorker):
    """Dies as of a fault in a decoder when it is given an image whose name says so."""

    def exchange(self, tasks: Sequence[Task], *, interrupt: bool = False) -> Answer:
        if any("killer" in task.file.image for task in tasks):
            os.kill(os.getpid(), signal.SIGKILL)
        return super().exchange(tasks, interrupt=interrupt)


class BlindInputs(InPlace):
    """What a machine sees where the share with the photographs is not mounted."""

    def fetch(self, file: InputFile) -> InputFile:
        return replace(file, path=Path("/nowhere", file.image))
