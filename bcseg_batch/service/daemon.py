"""The daemon: watches, processes, records, for as long as the machine lives.

One thread does it all but the network, decoding and writing, which have threads of their own. What
hangs in it stops the pings to systemd, and so does an image that is in hand for
`service.stall_timeout_s` while nothing comes out; the daemon is killed and started again, which is
safe at any moment: an attempt is written down before the work, a result after it.
"""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import os
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING

from loguru import logger

from bcseg_batch.errors import BcsegError, DeviceError, OutputError, SettingsError
from bcseg_batch.intake.filesystem import filesystem_of
from bcseg_batch.intake.ignore import IgnoreRules
from bcseg_batch.intake.settle import look_at
from bcseg_batch.intake.watch import WatchMode
from bcseg_batch.items import InputFile, Outcome, Status
from bcseg_batch.service.build import Engine, build_engine, open_cluster
from bcseg_batch.service.intake import Intake
from bcseg_batch.service.metrics import Metrics, NoMetrics
from bcseg_batch.service.notify import Notifier
from bcseg_batch.service.pipeline import Interrupted
from bcseg_batch.service.places import LocalInputs
from bcseg_batch.service.reporting import NoReporter, Reporter
from bcseg_batch.service.shards import merge_shards
from bcseg_batch.service.status import LOCK_NAME, DaemonStatus, write_status
from bcseg_batch.service.stop import StopSignals
from bcseg_batch.service.tables import write_tables
from bcseg_batch.settings import Settings
from bcseg_batch.store.cell_table import read_tables
from bcseg_batch.store.dispose import Action, Disposal, Ending, dispose
from bcseg_batch.store.images import SUFFIXES
from bcseg_batch.store.ledger import LEDGER_NAME, Ledger
from bcseg_batch.store.lock import take_lock
from bcseg_batch.store.outputs import OutputFolder, is_output_folder
from bcseg_batch.store.results import ResultsFollower
from bcseg_batch.version import __version__

if TYPE_CHECKING:
    from bcseg_batch.service.cluster import Cluster

_TICK_S = 0.02  # with images in flight: how long a finished one waits to be recorded
_IDLE_TICK_S = 0.25  # without: how long a stop signal waits to be seen
_PING_EVERY_S = 1.0
_STATUS_EVERY_S = 2.0
_TABLE_DELAY_S = 5.0
# A table of a million rows takes seconds to write: this share of the time at most goes into it.
_TABLE_SHARE = 0.02
_TABLES_AT_STOP_S = 5.0
_REPORT_AT_STOP_S = 5.0
_LONGEST_BACKOFF_S = 60.0
_EXPORT_AT_ONCE = 1000
_DISPOSE_AT_ONCE = 100


@dataclass(frozen=True, slots=True)
class DaemonFolders:
    """Where a daemon works; absolute.

    Attributes:
        input: the photographs.
        output: masks, composites and records.
        state: ledger, lock and status.
    """

    input: Path
    output: Path
    state: Path


def daemon_folders(settings: Settings) -> DaemonFolders:
    """Check the folders of the settings against each other, before anything is written.

    Raises:
        SettingsError: one is missing in the settings, or they cannot work together.
    """
    folders = settings.folders
    state = folders.state
    if state is None and (given := os.environ.get("STATE_DIRECTORY")):
        state = Path(given.split(":")[0])
    wanted = {"input": folders.input, "output": folders.output, "state": state}
    missing = [f"folders.{name}" for name, path in wanted.items() if path is None]
    if missing or folders.input is None or folders.output is None or state is None:
        raise SettingsError(
            f"{', '.join(missing)} must be set: the daemon needs to know its folders"
        )
    places = {
        name: path
        for name, path in {
            **wanted,
            "archive": folders.archive,
            "quarantine": folders.quarantine,
        }.items()
        if path is not None
    }
    for one, other in (
        ("input", "output"),
        ("input", "state"),
        ("output", "state"),
        ("input", "archive"),
        ("input", "quarantine"),
        ("output", "archive"),
        ("output", "quarantine"),
    ):
        if one in places and other in places:
            _check_apart(one, places[one], other, places[other])
    for action, folder, key in (
        (settings.intake.after_success, folders.archive, "archive"),
        (settings.intake.after_failure, folders.quarantine, "quarantine"),
    ):
        if action == key and folder is None:
            raise SettingsError(f"folders.{key} must be set: the settings say that files go there")
    try:
        state.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise SettingsError(
            f"the state folder {state} cannot be made: {error.strerror}: make it for this user, "
            "or name another"
        ) from error
    filesystem = filesystem_of(state)
    if filesystem.is_network:
        raise SettingsError(
            f"the state folder {state} lies on {filesystem.type}, a network file system, where a "
            "ledger would be damaged: name a folder on a local disk"
        )
    return DaemonFolders(folders.input, folders.output, state)


def _check_apart(one: str, first: Path, other: str, second: Path) -> None:
    a, b = first.resolve(), second.resolve()
    if a == b or a.is_relative_to(b) or b.is_relative_to(a):
        raise SettingsError(
            f"folders.{one} ({first}) and folders.{other} ({second}) lie one in the other (links "
            "resolved): give each a place of its own"
        )


class Daemon:
    """One daemon on its folders.

    Args:
        settings: the effective settings.
        reload: reads the settings again, for SIGHUP.
        signals: asked between images whether to stop or to reload.
        until_idle_s: end by itself after this long without work; None never does.
        notifier: speaks to systemd.

    Raises:
        SettingsError: the settings or the ledger cannot be used.
        CheckpointError: the model cannot be loaded.
        UsageError: another daemon has the state folder, or another run the output folder.
        OutputError: the state or output folder cannot be written.
    """

    def __init__(
        self,
        settings: Settings,
        *,
        reload: Callable[[], Settings],
        signals: StopSignals,
        until_idle_s: float | None = None,
        notifier: Notifier | None = None,
    ) -> None:
        self._settings = settings
        self._reload_settings = reload
        self._signals = signals
        self._until_idle_s = until_idle_s
        self._notifier = notifier or Notifier()
        self._folders = daemon_folders(settings)
        self._lock = take_lock(self._folders.state / LOCK_NAME, "state folder")
        self._engine: Engine | Cluster = (
            open_cluster(settings, signals)
            if settings.processing.engine == "ray"
            else build_engine(settings)
        )
        self._metrics: Metrics | NoMetrics = NoMetrics()
        self._reporter: Reporter | NoReporter = NoReporter()
        self._state = "starting"
        self._troubles: dict[str, str] = {}
        self._started_at = _now()
        # In flight from `begin` to the commit of its result; unrecorded between outcome and commit.
        self._in_flight: dict[str, InputFile] = {}
        self._unrecorded: list[Outcome] = []
        self._truncated: dict[str, int] = {}
        self._has_suspects = self._is_careful = False
        self._done = self._failed = 0
        self._backoff_s = 0.0
        self._announced = False
        self._undisposed = True
        now_s = time.monotonic()
        self._progress_s = now_s  # when anything last came out, or went in
        self._ping_s = self._status_s = 0.0
        self._busy_s = now_s  # when there was last anything to do
        self._table_due_s: float | None = None
        self._no_table_before_s = self._tables_took_s = 0.0
        self._dispose_s = now_s

    def run(self) -> None:
        """Work until told to stop; then finish what is under way.

        Raises:
            DeviceError: the device is lost; the supervisor starts the daemon again.
            OutputError: the folders cannot be opened at the start.
        """
        self._notifier.status("opening the ledger and the output folder")
        with (
            self._lock,
            contextlib.ExitStack() as self._output_files,
            Ledger(self._folders.state / LEDGER_NAME) as self._ledger,
        ):
            self._open_output()
            self._recover()
            self._table_due_s = time.monotonic() + _TABLE_DELAY_S
            self._intake = self._make_intake()
            self._metrics = self._make_metrics()
            self._reporter = self._make_reporter()
            logger.info("{}", self._engine.description)
            try:
                while not self._ending:
                    self._work()
                    if self._signals.take_reload():
                        self._reload()
                self._say_stopping()
            finally:
                self._intake.stop()
                self._metrics.stop()
                self._close()
                self._engine.close()
                logger.info("stopped: {} done, {} failed", self._done, self._failed)

    # -- the main loop ----------------------------------------------------------------------------

    def _work(self) -> None:
        """Process until a stop or a reload is asked for; pause where nothing can be written."""
        self._state = "running"
        self._is_careful = self._has_suspects
        try:
            self._settle_accounts()
            pipeline = self._engine.pipeline(
                LocalInputs(self._folders.input),
                self._outputs,
                self._ledger,
                alone=self._is_careful,
                observe=self._metrics.observe_stage,
                expects_company=self._expects_company,
                alive=self._go_on_with_large_image,
            )
            for outcome in pipeline.process(self._feed()):
                self._take(outcome)
            self._commit()
            self._give_back()  # what the feed was interrupted with
        except OutputError as error:
            self._pause(error)
        except DeviceError:
            self._give_back()
            raise

    def _feed(self) -> Iterator[InputFile | None]:
        """Give files to the pipeline as they become ready; a tick where there is none."""
        while not self._interrupted:
            self._commit()
            self._beat()
            self._admit(self._intake.poll())
            files = self._next_files()
            yield from itertools.takewhile(lambda _: not self._interrupted, files)
            if not files:
                if not self._in_flight:
                    self._forgive_output()
                self._intake.wait(_TICK_S if self._in_flight else _IDLE_TICK_S)
                yield None
        if self._ending:
            self._say_stopping()

    def _go_on_with_large_image(self) -> None:
        """Between two tiles: all is well, unless the daemon is to end; it would take too long."""
        self._progress_s = time.monotonic()
        self._beat()
        if self._ending:
            raise Interrupted("the daemon is to end; taken up again by the next")

    def _say_stopping(self) -> None:
        if self._state != "stopping":
            self._state = "stopping"
            logger.info("stopping: {} images under way are finished", len(self._in_flight))
            self._notifier.stopping("finishing what is under way")

    def _expects_company(self) -> bool:
        """Say whether an image may become ready before one that waits for it has to go.

        What is not even settling yet takes longer than that, unless the settings say otherwise.
        """
        settings = self._settings
        is_quick = settings.intake.settle_s < settings.service.max_wait_s
        return is_quick or self._intake.settling > 0

    @property
    def _ending(self) -> bool:
        return self._signals.requested or self._idle_long_enough

    @property
    def _interrupted(self) -> bool:
        suspects_are_through = self._is_careful and not self._has_suspects
        return self._ending or self._signals.reload_requested or suspects_are_through

    @property
    def _idle_long_enough(self) -> bool:
        return (
            self._until_idle_s is not None and time.monotonic() - self._busy_s >= self._until_idle_s
        )

    # -- in ---------------------------------------------------------------------------------------

    def _known(self, files: Sequence[InputFile]) -> set[str]:
        return self._ledger.settled(files, **self._recipe) | self._ledger.queued(
            files, **self._recipe
        )

    @property
    def _recipe(self) -> dict[str, str]:
        options = self._engine.options
        return {
            "model_sha256": options.model_sha256,
            "settings_sha256": options.settings_sha256,
        }

    def _admit(self, ready: Sequence[InputFile]) -> None:
        """Put into the queue what is ready and new."""
        if not ready:
            return
        settled = self._ledger.settled(ready, **self._recipe)
        fresh = [file for file in ready if file.image not in settled]
        same_size = self._ledger.candidates_by_content(fresh, **self._recipe)
        queue = []
        for file in fresh:
            if file.image in same_size and self._is_unchanged(file):
                self._ledger.touch(file)
            else:
                queue.append(file)
        if queue:
            self._ledger.enqueue(queue, **self._recipe)

    def _is_unchanged(self, file: InputFile) -> bool:
        try:
            with file.path.open("rb") as content:
                digest = hashlib.file_digest(content, "sha256").hexdigest()
        except OSError:
            return False  # the pipeline finds out, and says, what is wrong with it
        self._notifier.watchdog()  # a restored backup has thousands of these
        return digest == self._ledger.sha256_of(file.image)

    def _next_files(self) -> list[InputFile]:
        """Take the next files in hand: written down as tried before they are touched."""
        if self._has_suspects:
            return self._next_suspect()
        waiting = self._ledger.pending(self._folders.input, limit=self._engine.options.batch_size)
        return self._begin(waiting, solo=False)

    def _next_suspect(self) -> list[InputFile]:
        """One that was in flight when a process died is tried with no other beside it."""
        if self._in_flight:
            return []
        while suspects := self._ledger.suspects(self._folders.input):
            if begun := self._begin(suspects[:1], solo=True):
                logger.info("{!r} is tried alone, since a process died with it", begun[0].image)
                return begun
        self._has_suspects = False
        return []

    def _begin(self, waiting: Sequence[InputFile], *, solo: bool) -> list[InputFile]:
        files, gone = [], []
        for file in waiting:
            now = look_at(self._folders.input, file.image)
            if now == file:
                files.append(file)
            else:
                gone.append(file.image)
                if now is not None:
                    self._intake.again(file.image)
        if gone:
            self._ledger.forget(gone)
        if files:
            self._ledger.begin(files, solo=solo)
            self._in_flight.update((file.image, file) for file in files)
            self._progress_s = self._busy_s = time.monotonic()
        return files

    # -- out --------------------------------------------------------------------------------------

    def _take(self, outcome: Outcome) -> None:
        """Keep an outcome for the next commit, or send its file back to settle."""
        self._progress_s = time.monotonic()
        self._notifier.watchdog()
        if outcome.status is Status.DONE:  # others wrote nothing, and prove nothing of the disk
            self._forgive_output()
        if outcome.status is Status.SKIPPED:
            self._send_back(outcome.image, wait_s=0.0)
            return
        if (outcome.error or "").startswith("TruncatedImageError"):
            tries = self._truncated.get(outcome.image, 0)
            if tries < self._settings.intake.truncated_retries and not self._failed_before(outcome):
                self._truncated[outcome.image] = tries + 1
                wait_s = max(1.0, self._settings.intake.settle_s) * 2**tries
                logger.bind(image=outcome.image, stage="decode").info(
                    "{!r} ends too early; looking again in {:.0f} s", outcome.image, wait_s
                )
                self._send_back(outcome.image, wait_s=wait_s)
                return
        self._unrecorded.append(outcome)
        if len(self._unrecorded) >= self._engine.options.batch_size:
            self._commit()

    def _failed_before(self, outcome: Outcome) -> bool:
        """Say whether the same bytes failed already: a retry of them has nothing to wait for."""
        before = self._ledger.outcome_of(outcome.image)
        return (
            before is not None
            and before.status is Status.FAILED
            and (before.size_bytes, before.mtime_ns) == (outcome.size_bytes, outcome.mtime_ns)
        )

    def _send_back(self, image: str, *, wait_s: float) -> None:
        self._ledger.release([image])
        self._ledger.forget([image])
        self._in_flight.pop(image, None)
        self._intake.again(image, wait_s=wait_s)

    def _commit(self) -> None:
        """Record what is finished: the ledger first, then all that follows from it."""
        if not self._unrecorded:
            return
        try:
            self._check_output()
        except OutputError:
            # What was written just now may lie somewhere else, and is done again.
            self._unrecorded.clear()
            raise
        replaced = [self._ledger.outcome_of(outcome.image) for outcome in self._unrecorded]
        self._ledger.finish_many(self._unrecorded, self._plan)
        outcomes, self._unrecorded = self._unrecorded, []
        for outcome, before in zip(outcomes, replaced, strict=True):
            self._in_flight.pop(outcome.image, None)
            self._truncated.pop(outcome.image, None)
            self._tell(outcome)
            if before is not None:
                # One that failed has none: a mask must not stand beside another picture.
                for old in set(before.outputs) - set(outcome.outputs):
                    self._outputs.remove(old)
        self._busy_s = time.monotonic()
        if self._table_due_s is None:
            self._table_due_s = max(self._busy_s + _TABLE_DELAY_S, self._no_table_before_s)
        self._export()
        self._reporter.want()
        self._dispose()

    def _tell(self, outcome: Outcome) -> None:
        self._metrics.count(outcome)
        line = logger.bind(
            image=outcome.image,
            stage="record",
            ms=None if outcome.seconds is None else round(1000 * outcome.seconds),
        )
        if outcome.status is Status.DONE:
            self._done += 1
            doubts = ", ".join(flag.name for flag in outcome.flags)
            line.info(
                "{!r} done in {:.2f} s{}",
                outcome.image,
                outcome.seconds or 0.0,
                f", to be doubted: {doubts}" if doubts else "",
            )
        else:
            self._failed += 1
            line.warning("{!r} failed: {}", outcome.image, outcome.error)

    def _export(self) -> None:
        """Let `results.jsonl` follow the ledger."""
        while outcomes := self._ledger.unexported(limit=_EXPORT_AT_ONCE):
            self._results.append(outcomes)
            self._ledger.mark_exported([outcome.image for outcome in outcomes])

    def _plan(self, outcome: Outcome) -> Disposal | None:
        """Decide what becomes of an input that is through."""
        intake, folders = self._settings.intake, self._settings.folders
        if outcome.status is Status.DONE:
            if intake.after_success == "delete":
                return Disposal(Action.DELETE)
            if intake.after_success == "archive" and folders.archive is not None:
                return Disposal(Action.ARCHIVE, folders.archive / outcome.image)
        elif intake.after_failure == "quarantine" and folders.quarantine is not None:
            return Disposal(Action.QUARANTINE, folders.quarantine / outcome.image)
        return None

    def _dispose(self) -> None:
        """Move or delete inputs that are through; where that fails, the images still go on."""
        self._undisposed = True
        if "archive" in self._troubles and time.monotonic() < self._dispose_s:
            return
        if not self._folders.input.is_dir() or self._intake.trouble is not None:
            return  # an unmounted folder would look as if all had been moved already
        while due := self._ledger.disposals_due(self._folders.input, limit=_DISPOSE_AT_ONCE):
            refused: OutputError | None = None
            for one in due:
                try:
                    disposed = dispose(one)
                except OutputError as error:
                    refused = refused or error  # the next may lie elsewhere, and go
                    continue
                self._ledger.disposal_done(one.file.image)
                if disposed.ending is Ending.CHANGED:
                    self._intake.again(one.file.image)
            if refused is not None:
                if self._troubles.get("archive") != str(refused):
                    logger.error("{}", refused)
                self._troubles["archive"] = str(refused)
                self._dispose_s = time.monotonic() + self._settings.intake.rescan_interval_s
                return
        self._undisposed = False
        self._troubles.pop("archive", None)

    # -- trouble ----------------------------------------------------------------------------------

    def _pause(self, error: OutputError) -> None:
        """Stop taking work until the disk is back; no image is to blame for it."""
        self._state = "paused"
        self._troubles["output"] = str(error)
        self._backoff_s = min(max(1.0, 2 * self._backoff_s), _LONGEST_BACKOFF_S)
        logger.error("{}; trying again in {:.0f} s", error, self._backoff_s)
        try:
            self._give_back()
        except OutputError:
            logger.warning("the ledger cannot be written either")
        until_s = time.monotonic() + self._backoff_s
        while time.monotonic() < until_s and not self._interrupted:
            try:
                self._beat()
            except OutputError as still:
                self._troubles["output"] = str(still)
            time.sleep(min(_IDLE_TICK_S, self._backoff_s))

    def _give_back(self) -> None:
        """Put back into the queue what is in flight and has no outcome; nothing is tried twice."""
        have_outcome = {outcome.image for outcome in self._unrecorded}
        images = [image for image in self._in_flight if image not in have_outcome]
        if images:
            self._ledger.release(images)
            for image in images:
                del self._in_flight[image]

    def _settle_accounts(self) -> None:
        """Catch up on what an earlier failure or a dead process left undone."""
        if "output" in self._troubles:
            self._return_to_output()
            self._write_status()  # the state folder's disk can be the full one
        self._give_back()
        self._commit()
        self._export()
        self._dispose()

    def _recover(self) -> None:
        recovered = self._ledger.recover(
            max_attempts=self._settings.service.max_attempts, plan=self._plan
        )
        self._has_suspects = bool(recovered.suspects)
        for image in recovered.failed:
            logger.error("{!r} crashed the process and is failed", image)
        if recovered.suspects:
            logger.warning(
                "{} images were in flight when the last process died: each is tried alone",
                len(recovered.suspects),
            )

    def _reload(self) -> None:
        """Take up changed settings and model; where they are wrong, keep the old ones."""
        self._notifier.reloading()
        self._state = "reloading"
        try:
            settings = self._reload_settings()
            if daemon_folders(settings) != self._folders:
                raise SettingsError("the folders cannot be changed by a reload: restart the daemon")
            if "ray" in {settings.processing.engine, self._settings.processing.engine}:
                raise SettingsError("with the engine ray nothing is reloaded: restart the daemon")
            engine = build_engine(settings)
        except BcsegError as error:
            logger.error("reload refused, the old settings stay: {}", error)
        else:
            self._settings, self._engine = settings, engine
            self._intake.stop()
            self._intake = self._make_intake()
            self._reporter.finish(timeout_s=0.0)
            self._reporter = self._make_reporter()
            placement = engine.placement
            self._metrics.describe(engine.model_name, engine.options.model_sha256, placement.device)
            logger.info("reloaded: {}", engine.description)
        self._notifier.ready()

    def _close(self) -> None:
        """Finish the books; what cannot be written now is caught up on at the next start."""
        self._state = "stopping"
        try:
            # What has no outcome is not given back here: where the end is an unforeseen one, its
            # attempt counts, or an image that brings the daemon down would do so for ever.
            self._commit()
            self._export()
            self._dispose()
            # Long tables wait for the next start: the time to stop in is for images.
            if self._table_due_s is not None and self._tables_took_s < _TABLES_AT_STOP_S:
                self._write_tables()
            self._write_status()
        except OutputError as error:
            logger.error("{}", error)
        finally:
            self._reporter.finish(timeout_s=_REPORT_AT_STOP_S)

    # -- telling ----------------------------------------------------------------------------------

    def _beat(self) -> None:
        """Tell the world how things are, each at its own pace."""
        now_s = time.monotonic()
        if (
            self._in_flight
            or self._unrecorded
            or not self._intake.quiet
            or "output" in self._troubles
        ):
            self._busy_s = now_s
        stalled = (
            bool(self._in_flight)
            and now_s - self._progress_s > self._settings.service.stall_timeout_s
        )
        if now_s - self._ping_s >= _PING_EVERY_S:
            self._ping_s = now_s
            if not stalled:
                self._notifier.watchdog()
            self._note("input", self._intake.trouble)
            self._note(
                "pipeline",
                f"nothing has come out for {now_s - self._progress_s:.0f} s" if stalled else None,
            )
            self._metrics.gauge(
                in_flight=len(self._in_flight),
                settling=self._intake.settling,
                queued=self._ledger.queue_length() if self._metrics.are_served else 0,
                troubles=self._troubles,
            )
            self._check_output()
            if self._undisposed:
                self._dispose()
        if now_s - self._status_s >= _STATUS_EVERY_S:
            self._status_s = now_s
            self._write_status()
            self._notifier.status(self._one_line())
        if not self._announced and (self._intake.looked_once or self._intake.trouble):
            self._announced = True
            logger.info("ready")
            self._notifier.ready(self._one_line())
        is_due = self._table_due_s is not None and now_s >= self._table_due_s
        if is_due and "output" not in self._troubles:
            self._check_output()
            self._write_tables()

    def _note(self, place: str, trouble: str | None) -> None:
        if trouble is None:
            self._troubles.pop(place, None)
        else:
            self._troubles[place] = trouble

    def _forgive_output(self) -> None:
        """Take the output for sound again: something was written, or nothing is left to write."""
        self._backoff_s = 0.0
        self._troubles.pop("output", None)

    def _open_output(self) -> None:
        self._outputs = self._output_files.enter_context(OutputFolder(self._folders.output))
        # Not refused: the service would stay down for what is mended by itself.
        merge_shards(self._folders.output)
        self._results = self._output_files.enter_context(ResultsFollower(self._folders.output))
        self._output_identity = _identity(self._folders.output)

    def _return_to_output(self) -> None:
        """Go on in the output folder; in one that came back under another number, afresh.

        A share that is mounted again may be another device to the kernel. The mark of an earlier
        run tells it from the empty folder below its mount point.
        """
        folder = self._folders.output
        with contextlib.suppress(OSError):
            if _identity(folder) != self._output_identity and is_output_folder(folder):
                with contextlib.suppress(OSError):  # closing what is gone
                    self._output_files.close()
                self._open_output()
        self._check_output()

    def _check_output(self) -> None:
        """Notice an output share that was unmounted: writing would fill the disk beneath it."""
        try:
            identity = _identity(self._folders.output)
        except OSError as error:
            raise OutputError(
                f"the output folder {self._folders.output} is gone: {error.strerror}: bring it back"
            ) from error
        if identity != self._output_identity:
            raise OutputError(
                f"another folder has taken the place of the output folder {self._folders.output} "
                "(unmounted or replaced): mount it again, or restart the daemon to use this one"
            )

    def _write_status(self) -> None:
        choice = self._intake.choice
        placement = self._engine.placement
        write_status(
            self._folders.state,
            DaemonStatus(
                pid=os.getpid(),
                version=__version__,
                started_at=self._started_at,
                updated_at=_now(),
                state=self._state,
                troubles=dict(self._troubles),
                input=str(self._folders.input),
                output=str(self._folders.output),
                device=placement.device,
                dtype=placement.dtype,
                model=self._engine.model_name,
                model_sha256=self._engine.options.model_sha256,
                watch_mode=choice.mode.value if choice is not None else None,
                watch_reason=choice.reason if choice is not None else None,
                settling=self._intake.settling,
                in_flight=len(self._in_flight),
                done=self._done,
                failed=self._failed,
            ),
        )

    def _one_line(self) -> str:
        troubles = "; ".join(self._troubles.values())
        return (
            f"{self._done} done, {self._failed} failed, {len(self._in_flight)} in flight, "
            f"{self._intake.settling} settling{'; ' + troubles if troubles else ''}"
        )

    def _write_tables(self) -> None:
        began_s = time.monotonic()
        self._results.write_csv(self._ledger.outcomes())
        output = self._folders.output
        options = self._engine.options
        tables = read_tables(output, self._cell_tables())
        write_tables(output, tables, cells=options.cells, parquet=options.parquet)
        self._tables_took_s = time.monotonic() - began_s
        self._table_due_s = None
        # The next one waits so long that tables never take more than their share of the time.
        self._no_table_before_s = began_s + self._tables_took_s / _TABLE_SHARE

    def _cell_tables(self) -> Iterator[str]:
        for outcome in self._ledger.outcomes():
            if outcome.cells is not None:
                self._notifier.watchdog()  # there may be a million
                yield outcome.cells

    # -- parts ------------------------------------------------------------------------------------

    def _make_intake(self) -> Intake:
        settings = self._settings
        return Intake(
            self._folders.input,
            IgnoreRules(settings.images.suffixes or SUFFIXES, settings.images.ignore),
            self._known,
            recursive=settings.images.recursive,
            mode=WatchMode(settings.intake.mode),
            settle_s=settings.intake.settle_s,
            rescan_interval_s=settings.intake.rescan_interval_s,
            poll_interval_s=settings.intake.poll_interval_s,
        )

    def _make_reporter(self) -> Reporter | NoReporter:
        report = self._settings.report
        if not report.enabled:
            return NoReporter()
        return Reporter(
            self._folders.output,
            group_pattern=report.group_pattern,
            min_cells=report.min_cells,
            refresh_s=report.refresh_s,
        )

    def _make_metrics(self) -> Metrics | NoMetrics:
        metrics = self._settings.metrics
        if metrics.port is None:
            return NoMetrics()
        return Metrics(
            metrics.address,
            metrics.port,
            model=self._engine.model_name,
            model_sha256=self._engine.options.model_sha256,
            device=self._engine.placement.device,
            stale_after_s=self._settings.service.stall_timeout_s,
        )


def leave_in_time(signals: StopSignals, timeout_s: float) -> None:
    """Watch the stop from beside: a drain that takes too long is ended.

    What is in flight then is tried again by the next process.

    Args:
        signals: asked whether a stop has begun.
        timeout_s: how long the images under way may take.
    """

    def wait() -> None:
        signals.wait()
        time.sleep(timeout_s)
        logger.error("the images under way took longer than {:.0f} s: leaving", timeout_s)
        os._exit(DeviceError.exit_code)

    threading.Thread(target=wait, name="bcseg-stop", daemon=True).start()


def _identity(folder: Path) -> tuple[int, int]:
    facts = folder.stat()
    return facts.st_dev, facts.st_ino


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
