"""What runs in each process of a cluster: the pipeline of one machine, fed from afar."""

from __future__ import annotations

import hashlib
import os
import platform
import queue
import tempfile
import threading
import time
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from loguru import logger

from bcseg_batch.errors import BcsegError, OutputError, SettingsError
from bcseg_batch.items import InputFile, Outcome
from bcseg_batch.segment.placement import Placement, limit_cores
from bcseg_batch.service.build import Engine, build_engine
from bcseg_batch.service.dispatch import Task
from bcseg_batch.service.pipeline import Interrupted, Pipeline, PipelineOptions
from bcseg_batch.service.places import Inputs, Outputs
from bcseg_batch.settings import Settings
from bcseg_batch.store.outputs import write_whole
from bcseg_batch.version import __version__

if TYPE_CHECKING:
    from loguru import Message

# An exchange waits so long for a first outcome, and so long for company of it.
_POLL_S = 1.0
_LINGER_S = 0.1
# How long the pipeline waits for a file where it has others in hand, and where it has none.
_TICK_S = 0.02
_IDLE_TICK_S = 0.5
# Batches that are to be had at once, so that the pipeline is never short of files: two before the
# network, one with it and one behind it for each device, and one on the way.
_BATCHES_AROUND = 4
_MAX_MESSAGES = 1000


@dataclass(frozen=True, slots=True)
class Recipe:
    """What a worker is to be like; the same for all.

    Attributes:
        settings: the effective settings.
        version: of the package that asks.
        cores: processor cores that it may use.
        model_files: the model file and what belongs to it, by name; empty for the shipped model,
            which each machine has.
    """

    settings: Settings
    version: str
    cores: int
    model_files: dict[str, bytes] = field(repr=False)

    def digest(self) -> str:
        """Hash the model files."""
        whole = hashlib.sha256()
        for name in sorted(self.model_files):
            whole.update(hashlib.sha256(self.model_files[name]).digest())
        return whole.hexdigest()


@dataclass(frozen=True, slots=True)
class Places:
    """What a worker reads from and writes to; copied to it.

    Attributes:
        inputs: the photographs.
        outputs: of the run, without its lock.
        probe: path below the outputs of a file that the caller has written there.
    """

    inputs: Inputs
    outputs: Outputs
    probe: str

    def check(self) -> None:
        """Refuse a folder that only has the name of the caller's.

        Raises:
            SettingsError: the caller's file is not there.
        """
        if not self.outputs.exists(self.probe):
            raise SettingsError(
                f"{platform.node()} does not see the output folder of this run: mount the shared "
                "folder on each machine under the same path, or write to s3://..."
            )


@dataclass(frozen=True, slots=True)
class Greeting:
    """What a worker says of itself when it is ready.

    Attributes:
        host: name of its machine.
        options: of its pipeline.
        model_name: name of the model file.
        description: model, device and precision, with the reasons.
        placement: where the network runs.
        window: images that it should hold so as never to wait.
    """

    host: str
    options: PipelineOptions
    model_name: str
    description: str
    placement: Placement
    window: int


@dataclass(slots=True)
class Answer:
    """What a worker has to say.

    Attributes:
        outcomes: of images that are through.
        stages: stage, seconds and images of what was done since the last answer.
        messages: level and text of warnings.
        error: why it can go on no longer; None where it can.
        quiet_s: how long nothing has come out of its pipeline though it had images.
    """

    outcomes: list[Outcome] = field(default_factory=list)
    stages: list[tuple[str, float, int]] = field(default_factory=list)
    messages: list[tuple[str, str]] = field(default_factory=list)
    error: BcsegError | None = None
    quiet_s: float = 0.0


class RemoteWorker:
    """One pipeline with a thread of its own; called by one caller, from another machine perhaps."""

    def __init__(self) -> None:
        self._messages: deque[tuple[str, str]] = deque(maxlen=_MAX_MESSAGES)
        self._engine: Engine | None = None
        self._running: _Running | None = None

    def greet(self, recipe: Recipe) -> Greeting | BcsegError:
        """Load the model.

        Returns:
            What came of it; or the error, which would lose its class on the way as an exception.
        """
        logger.remove()
        logger.add(self._hear, level="WARNING", format="{message}")
        host = platform.node()
        try:
            if recipe.version != __version__:
                raise SettingsError(
                    f"{host} has bcseg-batch {__version__}, and this is {recipe.version}: install "
                    "the same version on each machine"
                )
            limit_cores(recipe.cores)
            settings = _with_model(recipe)
            self._engine = engine = build_engine(settings)
        except BcsegError as error:
            return error
        batches = _BATCHES_AROUND + len(engine.predictors)
        return Greeting(
            host,
            engine.options,
            engine.model_name,
            engine.description,
            engine.placement,
            batches * engine.options.batch_size,
        )

    def enter(self, places: Places) -> None:
        """Begin to work for these places; what was begun for others is finished first.

        Where they cannot be used, the next answer says so.
        """
        assert self._engine is not None, "greet() comes first"
        if self._running is not None:
            self._running.stop()
        self._running = _Running(self._engine, places)

    def exchange(self, tasks: Sequence[Task], *, interrupt: bool = False) -> Answer:
        """Take images, and give what is through; waits a moment where nothing is.

        Args:
            tasks: the images.
            interrupt: leave large images in the middle; they come out as skipped.
        """
        assert self._running is not None, "enter() comes first"
        answer = self._running.exchange(tasks, interrupt=interrupt)
        while self._messages:
            answer.messages.append(self._messages.popleft())
        return answer

    def _hear(self, message: Message) -> None:
        self._messages.append((message.record["level"].name, message.record["message"]))


class _Running:
    """A pipeline at work between two places."""

    def __init__(self, engine: Engine, places: Places) -> None:
        self._batch_size = engine.options.batch_size
        self._names: dict[str, str] = {}
        self._in: queue.SimpleQueue[InputFile] = queue.SimpleQueue()
        self._out: queue.SimpleQueue[Outcome | None] = queue.SimpleQueue()
        self._stages: deque[tuple[str, float, int]] = deque()
        self._error: BcsegError | None = None
        self._ended = self._interrupt = False
        self._moved_s = time.monotonic()
        self._thread = threading.Thread(
            target=self._run, args=(engine, places), name="bcseg-pipeline", daemon=True
        )
        self._thread.start()

    def stop(self) -> None:
        """Finish what is in hand and end."""
        self._ended = True
        self._thread.join()

    def exchange(self, tasks: Sequence[Task], *, interrupt: bool) -> Answer:
        if not self._names:
            self._moved_s = time.monotonic()
        self._interrupt = interrupt
        for task in tasks:
            self._names[task.file.image] = task.name
            self._in.put(task.file)
        answer = Answer()
        until_s = time.monotonic() + _POLL_S
        while self._error is None and self._names and len(answer.outcomes) < self._batch_size:
            try:
                outcome = self._out.get(timeout=max(0.0, until_s - time.monotonic()))
            except queue.Empty:
                break
            if outcome is None:
                break
            if not answer.outcomes:
                until_s = time.monotonic() + _LINGER_S
            self._through(outcome, answer)
        if self._error is not None:
            # The pipeline gives out what it has finished before it fails.
            while (outcome := self._next()) is not None:
                self._through(outcome, answer)
            answer.error = self._error
        while self._stages:
            answer.stages.append(self._stages.popleft())
        answer.quiet_s = time.monotonic() - self._moved_s if self._names else 0.0
        return answer

    def claim(self, image: str) -> str:
        """Give the output name that came with an image; the caller has chosen it."""
        return self._names[image]

    def _next(self) -> Outcome | None:
        try:
            return self._out.get_nowait()
        except queue.Empty:
            return None

    def _through(self, outcome: Outcome, answer: Answer) -> None:
        del self._names[outcome.image]
        answer.outcomes.append(outcome)

    def _run(self, engine: Engine, places: Places) -> None:
        """Run the pipeline, and keep the error that ended it."""
        try:
            places.check()
            pipeline = Pipeline(
                engine.predictors,
                places.outputs,
                self,
                engine.options,
                inputs=places.inputs,
                observe=lambda *stage: self._stages.append(stage),
                # The caller sends whole batches, but for the last of them.
                expects_company=lambda: False,
                alive=self._alive,
            )
            for outcome in pipeline.process(self._feed()):
                self._moved_s = time.monotonic()
                self._out.put(outcome)
        except BcsegError as error:
            self._error = error
        finally:
            self._out.put(None)

    def _feed(self) -> Iterator[InputFile | None]:
        while not self._ended:
            try:
                yield self._in.get(timeout=_TICK_S if self._names else _IDLE_TICK_S)
            except queue.Empty:
                yield None

    def _alive(self) -> None:
        self._moved_s = time.monotonic()
        if self._interrupt or self._ended:
            raise Interrupted("the run is to end; taken up again by the next")


def _with_model(recipe: Recipe) -> Settings:
    """Give settings whose model file is on this machine."""
    settings = recipe.settings
    if settings.model.file is None:
        return settings
    # Private to the user, and named by its content: workers of one machine share it.
    folder = Path(tempfile.gettempdir(), f"bcseg-batch-{os.getuid()}", "models")
    folder /= recipe.digest()
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        for name, content in recipe.model_files.items():
            if not (folder / name).exists():
                write_whole(folder / name, content)
    except (OSError, OutputError) as error:
        raise SettingsError(
            f"{platform.node()}: the model cannot be kept in {folder}: {error}: make room there, "
            "or set TMPDIR"
        ) from error
    model = settings.model.model_copy(update={"file": folder / settings.model.file.name})
    return settings.model_copy(update={"model": model})
