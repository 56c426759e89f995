"""The seam on a Ray cluster: files in, outcomes out, the work on whichever machines there are."""

from __future__ import annotations

import contextlib
import importlib.util
import logging
import math
import os
import socket
import time
import uuid
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from loguru import logger

from bcseg_batch.errors import (
    BcsegError,
    CrashedProcessError,
    DeviceError,
    SettingsError,
)
from bcseg_batch.items import InputFile, Outcome, Status
from bcseg_batch.segment.placement import Placement
from bcseg_batch.service.dispatch import Dispatch, Task
from bcseg_batch.service.pipeline import Interrupted, Names, Observe, PipelineOptions
from bcseg_batch.service.places import Inputs, Outputs
from bcseg_batch.service.remote_worker import Answer, Greeting, Places, Recipe, RemoteWorker

_INSTALL = "pip install 'bcseg-batch[ray]'"
# More cores than that are used better by several processes than by the threads of one.
_MAX_CORES = 8
_WAIT_S = 1.0
_REACH_S = 10.0
_COUNT_EVERY_S = 10.0
_SAY_WAITING_EVERY_S = 30.0
# Workers that could not be started, or lost their device, one after the other without an image.
_MAX_MISHAPS = 5
# One whose pipeline gives nothing for so long hangs.
_STALL_S = 600.0
# An idle worker beyond the smallest number is let go after so long.
_IDLE_S = 60.0
# Images that a worker does not find though they are there, before it is taken for blind.
_BLIND = 3


@dataclass(frozen=True, slots=True)
class ClusterOptions:
    """Which cluster, and how much of it.

    Attributes:
        address: `local` starts one on this machine, `auto` joins the one that this machine belongs
            to, `ray://HOST:PORT` or `HOST:PORT` another.
        min_actors: workers that are kept.
        max_actors: workers that there may be; None takes as many as the machines hold.
        gpus_per_actor: of each worker; None takes one where the cluster has GPUs.
        cpus_per_actor: processor cores of each worker; None takes those of the smallest machine,
            at most eight.
        max_deaths: workers that an image may take down, alone with it, before it is failed.
    """

    address: str
    min_actors: int
    max_actors: int | None
    gpus_per_actor: float | None
    cpus_per_actor: float | None
    max_deaths: int


def check_ray() -> None:
    """Say at once where Ray is missing.

    Raises:
        SettingsError: it is not installed.
    """
    if importlib.util.find_spec("ray") is None:
        raise SettingsError(f"the engine ray needs Ray, which is not installed: {_INSTALL}")


class Cluster:
    """Workers on a Ray cluster, held until it is closed.

    Args:
        recipe: makes what the workers are to be like, of the cores each has.
        options: which cluster, and how much of it.
        is_stopping: asked while no worker is there whether to wait for one no longer.

    Raises:
        SettingsError: there is no such cluster, or the workers refuse the settings.
        CheckpointError: they refuse the model.
        DeviceError: no worker comes up.
    """

    def __init__(
        self,
        recipe: Callable[[int], Recipe],
        options: ClusterOptions,
        is_stopping: Callable[[], bool],
    ) -> None:
        check_ray()
        self._max_deaths = options.max_deaths
        self._crew = _Crew(recipe, options, is_stopping)
        try:
            self._greeting = self._crew.first()
        except BaseException:
            self._crew.close()
            raise

    @property
    def options(self) -> PipelineOptions:
        """What decides how outputs look; the same on all workers."""
        return self._greeting.options

    @property
    def model_name(self) -> str:
        """Name of the model file."""
        return self._greeting.model_name

    @property
    def placement(self) -> Placement:
        """Where the network runs; on the first of the workers."""
        return self._greeting.placement

    @property
    def description(self) -> str:
        """One sentence for the log."""
        return f"{self._greeting.description}; {self._crew.description}"

    def pipeline(
        self,
        inputs: Inputs,
        outputs: Outputs,
        names: Names,
        *,
        alone: bool = False,  # noqa: ARG002 - whom an image kills is found out by the dispatch
        observe: Observe = lambda _stage, _seconds, _images: None,
        expects_company: Callable[[], bool] = lambda: True,  # noqa: ARG002 - workers never wait
        alive: Callable[[], None] = lambda: None,
    ) -> ClusterPipeline:
        """Make the pipeline that reads from a place and writes to another, under these names.

        Args:
            inputs: where the photographs come from; copied to the workers.
            outputs: where the outputs go; copied likewise.
            names: which input owns which output name.
            alone: of no effect here, as `build.Engine` has it.
            observe: told of each stage how many seconds it took for how many images.
            expects_company: of no effect here.
            alive: called while there is nothing to give out; may raise `Interrupted`, after which
                nothing more is taken, and large images come out as skipped.
        """
        return ClusterPipeline(
            self._crew,
            Dispatch(self._max_deaths),
            Places(inputs, outputs, f".bcseg-{uuid.uuid4().hex}.part"),
            names,
            self.options,
            observe,
            alive,
        )

    def close(self) -> None:
        """Let the workers go."""
        self._crew.close()

    def __enter__(self) -> Cluster:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


@dataclass(slots=True)
class ClusterPipeline:
    """Gives files to the workers and their outcomes to the caller; `Pipeline` on many machines.

    The caller is the only one who records. It holds no more files than the workers have in hand.
    """

    _crew: _Crew
    _dispatch: Dispatch[_Member]
    _places: Places
    _names: Names
    options: PipelineOptions
    _observe: Observe
    _alive: Callable[[], None]

    def process(self, files: Iterable[InputFile | None]) -> Iterator[Outcome]:
        """Process files as they come and give an outcome for each, in no order.

        Args:
            files: inputs; None is a tick: nothing new at the moment.

        Yields:
            One outcome per file. Its outputs are on disk.

        Raises:
            OutputError: outputs cannot be written; files without an outcome are not done.
            DeviceError: the cluster is lost, or none of its devices works.
            SettingsError: a worker does not see the folders.
        """
        outputs, probe = self._places.outputs, self._places.probe
        outputs.write(probe, b"bcseg-batch\n")
        outputs.sync()
        try:
            yield from self._process(_Feed(files, self._names))
        finally:
            outputs.remove(probe)

    def _process(self, feed: _Feed) -> Iterator[Outcome]:
        crew, dispatch = self._crew, self._dispatch
        failure: BcsegError | None = None
        while feed.is_open or dispatch.busy:
            interrupt = self._interrupted()
            if interrupt:
                feed.is_open = False
            crew.keep_up(has_more=dispatch.waits or (feed.is_open and not feed.has_ticked))
            if (interrupt or crew.is_stopping()) and not crew.ready:
                return  # nobody is there to finish what was taken: it is done another time
            feed.has_ticked = False
            for member in [member for member in crew.ready if member.call is None]:
                tasks = [] if failure else dispatch.next_for(member, member.window, feed.draw)
                if tasks or dispatch.held(member):
                    crew.exchange(member, self._places, tasks, interrupt=interrupt)
            if failure and not crew.calls:
                raise failure
            for member, answer in crew.answers(0.0 if feed.has_ticked else _WAIT_S):
                if answer is None:
                    yield from self._bury(member)
                    continue
                yield from self._take(member, answer)
                if isinstance(answer.error, DeviceError):
                    dispatch.left(member)
                    crew.lose(member, str(answer.error), is_mishap=True)
                elif answer.error is not None:
                    # The others give out what they have finished before this is raised.
                    failure = failure or answer.error
                    feed.is_open = False
                    dispatch.left(member)
                    member.leave()
                elif answer.quiet_s > _STALL_S:
                    crew.lose(member, f"nothing came out of it for {answer.quiet_s:.0f} s")
                    yield from self._bury(member)
        if failure:
            raise failure

    def _take(self, member: _Member, answer: Answer) -> Iterator[Outcome]:
        for stage in answer.stages:
            self._observe(*stage)
        for level, text in answer.messages:
            logger.log(level, "{}: {}", member.host, text)
        for outcome in answer.outcomes:
            if not self._dispatch.through(member, outcome.image):
                continue
            self._check_sight(member, outcome)
            self._crew.mishaps = 0
            yield outcome

    def _check_sight(self, member: _Member, outcome: Outcome) -> None:
        """Find out a machine that does not have the folder of the photographs."""
        if outcome.status is Status.DONE:
            member.not_found = 0
        elif (outcome.error or "").startswith("ImageChangedError"):
            there = self._places.inputs.look_again(outcome.image)
            if there and (there.size_bytes, there.mtime_ns) == (
                outcome.size_bytes,
                outcome.mtime_ns,
            ):
                member.not_found += 1
        if member.not_found >= _BLIND:
            raise SettingsError(
                f"{member.host} does not find images that are there, such as {outcome.image!r}: "
                "mount the shared folder on each machine under the same path, or read from s3://..."
            )

    def _bury(self, member: _Member) -> Iterator[Outcome]:
        """Give out, as failed, what has killed one worker after the other."""
        for task in self._dispatch.died(member):
            error = CrashedProcessError(
                f"{task.file.image!r} took down {task.deaths} worker processes, each of which had "
                "no other image: look at it with another program, and report it"
            )
            logger.error("{}", error)
            yield Outcome(
                image=task.file.image,
                status=Status.FAILED,
                error=f"{type(error).__name__}: {error}",
                size_bytes=task.file.size_bytes,
                mtime_ns=task.file.mtime_ns,
                model_sha256=self.options.model_sha256,
                settings_sha256=self.options.settings_sha256,
            )

    def _interrupted(self) -> bool:
        try:
            self._alive()
        except Interrupted:
            return True
        return False


class _Feed:
    """Draws tasks from the caller's files."""

    def __init__(self, files: Iterable[InputFile | None], names: Names) -> None:
        self._files = iter(files)
        self._names = names
        self.is_open = True
        self.has_ticked = False

    def draw(self) -> Task | None:
        if self.has_ticked or not self.is_open:
            return None
        try:
            file = next(self._files)
        except StopIteration:
            self.is_open = False
            return None
        if file is None:
            self.has_ticked = True
            return None
        # Workers have other working folders.
        return Task(replace(file, path=file.path.absolute()), self._names.claim(file.image))


class _Member:
    """One worker, as it is seen from here; `actor` and `call` are Ray's."""

    def __init__(self, actor: Any, starting: Any) -> None:
        self.actor = actor
        self.starting = starting
        self.call: Any = None
        self.host = "a worker"
        self.window = 0
        self.not_found = 0
        self.idle_since_s = time.monotonic()
        self._places: Places | None = None

    def enter(self, places: Places) -> None:
        """Have it work for these places, if it does not yet."""
        if self._places is not places:
            self.actor.enter.remote(places)  # Ray keeps the order of calls
            self._places = places

    def leave(self) -> None:
        """Have it begin anew at the next call."""
        self._places = None


class _Crew:
    """The workers: started, counted, called, and replaced when they die."""

    def __init__(
        self,
        recipe: Callable[[int], Recipe],
        options: ClusterOptions,
        is_stopping: Callable[[], bool],
    ) -> None:
        self._options = options
        self.is_stopping = is_stopping
        self._ray = _connect(options.address)
        self.mishaps = 0
        self._most = 0
        self._counted_s = -math.inf
        self._said_s = 0.0
        self._members: list[_Member] = []
        self._greeting: Greeting | None = None
        nodes = self._nodes()
        self._gpus = options.gpus_per_actor
        if self._gpus is None:
            self._gpus = 1.0 if any(node.get("GPU") for node in nodes) else 0.0
        self._cpus = options.cpus_per_actor or min(
            (node["CPU"] for node in nodes if node.get("GPU", 0.0) >= self._gpus),
            default=float(_MAX_CORES),
        )
        if options.cpus_per_actor is None:
            self._cpus = min(self._cpus, float(_MAX_CORES))
        self._recipe = self._ray.put(recipe(max(1, math.floor(self._cpus))))
        self._actor_class = self._ray.remote(RemoteWorker).options(
            num_cpus=self._cpus,
            num_gpus=self._gpus,
            max_restarts=0,
            scheduling_strategy="SPREAD",
            runtime_env={"env_vars": {"OMP_NUM_THREADS": str(max(1, math.floor(self._cpus)))}},
        )

    @property
    def ready(self) -> list[_Member]:
        """Those that can work."""
        return [member for member in self._members if member.starting is None]

    @property
    def calls(self) -> list[_Member]:
        """Those that have been asked and have not answered."""
        return [member for member in self._members if member.call is not None]

    @property
    def description(self) -> str:
        """One sentence for the log."""
        gpus = f" and {self._gpus:g} GPU" if self._gpus else ""
        most = self._count_most(time.monotonic())
        return (
            f"up to {most} workers of {self._cpus:g} cores{gpus} on the Ray cluster "
            f"{self._options.address}"
        )

    def first(self) -> Greeting:
        """Start workers and wait for the first.

        Raises:
            BcsegError: none comes up, with the reason that one gave.
        """
        while self._greeting is None:
            if self.is_stopping():
                raise DeviceError("stopped while no worker of the cluster was ready")
            self.keep_up(has_more=False)
            self._wait_for_one(_WAIT_S)
        return self._greeting

    def keep_up(self, *, has_more: bool) -> None:
        """Welcome those that have come up, and start what is missing; returns at once.

        Args:
            has_more: whether there are images that nobody has in hand.
        """
        for member in self._starting:
            self._welcome(member)
        now_s = time.monotonic()
        ready = self.ready
        for member in ready:
            if member.call is not None:
                member.idle_since_s = now_s
            elif (
                len(self._members) > self._options.min_actors
                and now_s - member.idle_since_s > _IDLE_S
            ):
                self._end(member)
        goal = crew_size(
            len(self._members),
            ready=len(ready),
            smallest=self._options.min_actors,
            largest=self._count_most(now_s),
            at_once=self._options.max_actors is None,
            are_too_few=has_more and all(member.call is not None for member in ready),
        )
        for _ in range(goal - len(self._members)):
            actor = self._actor_class.remote()
            self._members.append(_Member(actor, actor.greet.remote(self._recipe)))
        if not ready and now_s - self._said_s > _SAY_WAITING_EVERY_S:
            if self._said_s:
                logger.warning(
                    "{} workers wait for a machine with {:g} free cores{}",
                    len(self._starting),
                    self._cpus,
                    f" and {self._gpus:g} GPU" if self._gpus else "",
                )
            self._said_s = now_s

    def exchange(
        self, member: _Member, places: Places, tasks: list[Task], *, interrupt: bool
    ) -> None:
        """Give a worker images and ask for what is through; the answer comes by `answers`."""
        member.enter(places)
        member.call = member.actor.exchange.remote(tasks, interrupt=interrupt)

    def answers(self, timeout_s: float) -> Iterator[tuple[_Member, Answer | None]]:
        """Give the answers that are there, waiting for a first one; None of one that died."""
        by_call = {member.call: member for member in self.calls}
        if not by_call:
            if not self.ready:
                self._wait_for_one(timeout_s)
            return
        done, _ = self._ray.wait(list(by_call), num_returns=1, timeout=timeout_s)
        if len(by_call) > 1 and done:
            done, _ = self._ray.wait(list(by_call), num_returns=len(by_call), timeout=0)
        for call in done:
            member = by_call[call]
            member.call = None
            try:
                answer = self._ray.get(call)
            except self._ray.exceptions.RayError as error:
                self.lose(member, _first_line(error))
                yield member, None
            else:
                yield member, answer

    def lose(self, member: _Member, reason: str, *, is_mishap: bool = False) -> None:
        """Give a worker up; another takes its place.

        Raises:
            DeviceError: too many in a row have had a mishap.
        """
        logger.warning("{} is lost ({}): its images are done by others", member.host, reason)
        self._end(member)
        if is_mishap:
            self._count_mishap(reason)

    def close(self) -> None:
        """Let all go, and the cluster too, where it was started from here."""
        for member in list(self._members):
            self._end(member)
        with contextlib.suppress(Exception):  # it may be gone already
            self._ray.shutdown()

    @property
    def _starting(self) -> list[_Member]:
        return [member for member in self._members if member.starting is not None]

    def _wait_for_one(self, timeout_s: float) -> None:
        starting = [member.starting for member in self._starting]
        if starting:
            self._ray.wait(starting, num_returns=1, timeout=timeout_s)

    def _end(self, member: _Member) -> None:
        self._members.remove(member)
        with contextlib.suppress(Exception):  # it may be dead already
            self._ray.kill(member.actor)

    def _welcome(self, member: _Member) -> None:
        done, _ = self._ray.wait([member.starting], timeout=0)
        if not done:
            return
        try:
            greeting = self._ray.get(member.starting)
        except self._ray.exceptions.RayError as error:
            greeting = _start_error(error)
        if isinstance(greeting, BcsegError):
            self._end(member)
            if self._greeting is None and not isinstance(greeting, DeviceError):
                raise greeting
            logger.warning("a worker could not be started: {}", greeting)
            self._count_mishap(str(greeting))
            return
        member.starting = None
        member.host, member.window = greeting.host, greeting.window
        member.idle_since_s = time.monotonic()
        first = self._greeting
        if first is None:
            self._greeting = greeting
        elif (greeting.placement.device, greeting.placement.dtype) != (
            first.placement.device,
            first.placement.dtype,
        ):
            logger.warning(
                "{} runs the network on {} in {}, {} on {} in {}: masks may differ by a pixel",
                greeting.host,
                greeting.placement.device,
                greeting.placement.dtype,
                first.host,
                first.placement.device,
                first.placement.dtype,
            )

    def _count_mishap(self, reason: str) -> None:
        self.mishaps += 1
        if self.mishaps >= _MAX_MISHAPS:
            raise DeviceError(
                f"{self.mishaps} workers in a row were of no use, the last one: {reason}"
            )

    def _count_most(self, now_s: float) -> int:
        """Say how many workers there may be; machines come and go, and are asked for now and then.

        Args:
            now_s: on the monotonic clock.
        """
        if self._options.max_actors is not None:
            return self._options.max_actors
        if now_s - self._counted_s > _COUNT_EVERY_S:
            self._counted_s = now_s
            self._most = sum(
                int(
                    min(
                        node["CPU"] // self._cpus,
                        node.get("GPU", 0.0) // self._gpus if self._gpus else math.inf,
                    )
                )
                for node in self._nodes()
            )
        return max(self._options.min_actors, self._most)

    def _nodes(self) -> list[dict[str, float]]:
        """Give the resources of each machine that is there."""
        return [
            node["Resources"]
            for node in self._ray.nodes()
            if node["Alive"] and node["Resources"].get("CPU")
        ]


def crew_size(
    there: int, *, ready: int, smallest: int, largest: int, at_once: bool, are_too_few: bool
) -> int:
    """Say how many workers there should be; fewer than there are is never the answer.

    Args:
        there: how many there are, those included that are being started.
        ready: how many of them can work.
        smallest: how many are kept in any case.
        largest: how many there may be.
        at_once: whether the machines for all of them are there; else twice as many are asked for
            each time, so that a cluster that grows by itself does not grow for nothing.
        are_too_few: whether all that can work do, and there is more to do.
    """
    wanted = smallest
    if are_too_few:
        wanted = min(largest, largest if at_once else max(smallest, 2 * ready))
    return max(there, wanted)


def model_files(path: Path | None, others: Iterable[Path]) -> dict[str, bytes]:
    """Read a model file and those that belong to it, to be sent to the workers.

    Args:
        path: the model file; None for the shipped one, which each machine has.
        others: files that may lie beside it.

    Raises:
        SettingsError: it cannot be read.
    """
    if path is None:
        return {}
    try:
        return {file.name: file.read_bytes() for file in (path, *others) if file.exists()}
    except OSError as error:
        raise SettingsError(f"model file {path} cannot be read: {error.strerror}") from error


def _connect(address: str) -> Any:
    """Join a cluster, or start one on this machine.

    Raises:
        SettingsError: there is none.
    """
    _check_reachable(address)
    if address == "local":
        # Binds what is started here to 127.0.0.1, as Ray does on other systems than Linux.
        os.environ.setdefault("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", "0")
    # Nothing is told to anybody about a run.
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    # What a GPU-less worker sees of GPUs is the same in all versions of Ray.
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "1")
    import ray  # noqa: PLC0415 - takes a second

    common: dict[str, Any] = {
        "configure_logging": False,
        "log_to_driver": False,
        "logging_level": logging.ERROR,
    }
    # Ray speaks to people by a logger of its own.
    logging.getLogger("ray").setLevel(logging.ERROR)
    try:
        if address == "local":
            ray.init(address="local", include_dashboard=False, **common)
        else:
            ray.init(address=address, **common)
    except (ConnectionError, RuntimeError, ValueError, ImportError, ray.exceptions.RayError) as err:
        raise SettingsError(
            f"the Ray cluster {address!r} cannot be joined: {_first_line(err)}: look at "
            "`ray status` on its head, at the address, and at the versions of Ray and Python, "
            "which have to be the same on all machines"
        ) from err
    return ray


def _check_reachable(address: str) -> None:
    """Find out in seconds what Ray would find out in minutes.

    Raises:
        SettingsError: nothing answers there.
    """
    host, colon, port = address.removeprefix("ray://").rpartition(":")
    if not (colon and port.isdecimal()):
        return
    try:
        socket.create_connection((host.strip("[]"), int(port)), _REACH_S).close()
    except (OSError, OverflowError) as error:
        raise SettingsError(
            f"the Ray cluster {address!r} does not answer ({error}): look at the address, at "
            "`ray status` on its head, and at the firewall between"
        ) from error


def _start_error(error: Exception) -> BcsegError:
    text = str(error)
    if "No module named" in text:
        return SettingsError(
            f"a machine of the cluster lacks a module ({_last_line(text)}): install bcseg-batch "
            f"there, the same version as here: {_INSTALL}"
        )
    return DeviceError(f"a worker died while it was started: {_first_line(error)}")


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[0].strip().rstrip(":.") if lines else type(error).__name__


def _last_line(text: str) -> str:
    return text.strip().splitlines()[-1].strip()
