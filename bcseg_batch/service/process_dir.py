"""One folder, once: what `bcseg-batch process-dir` does."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Protocol

from loguru import logger

from bcseg_batch.errors import StorageError
from bcseg_batch.intake.ignore import IgnoreRules
from bcseg_batch.intake.scan import IgnoredFile, of_all
from bcseg_batch.items import InputFile, Outcome, Status
from bcseg_batch.remote.url import Place
from bcseg_batch.service.destination import Destination, open_destination
from bcseg_batch.service.folders import check_folders
from bcseg_batch.service.listing import Listing
from bcseg_batch.service.pipeline import Names, PipelineOptions
from bcseg_batch.service.places import Inputs, Outputs, open_inputs
from bcseg_batch.service.tables import write_tables
from bcseg_batch.store.known import Known
from bcseg_batch.store.names import OutputNames, name_of_mask
from bcseg_batch.store.results import ResultsLog
from bcseg_batch.store.shards import Shard

# How often a file that changed while it was read is tried again before it is left for another run.
_CHANGED_ROUNDS = 2
_CHANGED_PAUSE_S = 1.0
# Beyond this many, what failed, changed or was ignored is counted and no longer named.
_NAMED = 1000
# Records taken back together before their images are done again.
_DISOWNED_AT_ONCE = 32


class Engine(Protocol):
    """Maps inputs to outcomes: the pipeline on this machine, or the cluster."""

    @property
    def options(self) -> PipelineOptions:
        """What decides how outputs look."""
        ...

    def process(self, files: Iterable[InputFile | None]) -> Iterator[Outcome]:
        """Process files as they come and give an outcome for each."""
        ...


OpenEngine = Callable[[Inputs, Outputs, Names], Engine]
"""Makes the engine that reads from a place and writes to another, under these names."""


class Stop(Protocol):
    """Asked between files whether to take another one."""

    @property
    def requested(self) -> bool:
        """Whether to stop taking work."""
        ...


class Progress(Protocol):
    """Told how a run goes; the command line shows it as a bar or as lines."""

    def start(self, total: int, *, is_whole: bool) -> None:
        """A run begins over so many inputs, or over more where the listing is not whole yet."""

    def expect(self, total: int, *, is_whole: bool) -> None:
        """So many are known by now; told again and again until the listing is whole."""

    def advance(self, outcome: Outcome | None) -> None:
        """One more is through; None for one that was done in an earlier run."""


@dataclass(slots=True)
class Summary:
    """What a run came to.

    Attributes:
        done: images processed.
        failed: images that could not be.
        skipped: images done by an earlier run, or gone or still being written.
        ignored: files that are no inputs, in number.
        ignored_names: the first thousand of them with the reason.
        failures: image and error of the first thousand that failed.
        flagged: images done whose record holds a doubt.
        changed: images that vanished or changed while they were read, in number.
        unsettled: the first thousand of them.
        missed: how many folders and links could not be followed, with images behind them perhaps.
        left: images not come to, because the run was stopped.
        unlisted: whether it was stopped before the input folder was listed to its end: more than
            `left` are left then.
        shard: of the input, as `K/N`, where only that part was to be done.
        seconds: wall time.
    """

    done: int = 0
    failed: int = 0
    skipped: int = 0
    ignored: int = 0
    ignored_names: list[IgnoredFile] = field(default_factory=list)
    failures: list[tuple[str, str]] = field(default_factory=list)
    flagged: int = 0
    changed: int = 0
    unsettled: list[str] = field(default_factory=list)
    missed: int = 0
    left: int = 0
    unlisted: bool = False
    shard: str | None = None
    seconds: float = 0.0

    @property
    def is_whole(self) -> bool:
        """Whether every image that there is has been done, now or earlier."""
        return not (self.failed or self.changed or self.missed or self.left or self.unlisted)

    @property
    def images_per_s(self) -> float:
        """Images processed per second of wall time."""
        return (self.done + self.failed) / self.seconds if self.seconds else 0.0


def process_dir(
    source: Place,
    output: Place,
    *,
    engine: OpenEngine,
    rules: IgnoreRules,
    recursive: bool,
    overwrite: bool,
    stop: Stop,
    progress: Progress,
    shard: Shard | None = None,
    pause: Callable[[float], None] = time.sleep,
) -> Summary:
    """Process what is new or changed in a folder, and record it.

    Args:
        source: where the photographs are.
        output: where the outputs go; a folder is made where it is missing.
        engine: does the work.
        rules: what is an input.
        recursive: enter sub-folders.
        overwrite: do again what is done.
        stop: once it says so, nothing more is taken, and what is under way is finished.
        progress: told of each image.
        shard: process this part of the input alone, beside the runs of other shards.
        pause: waits so many seconds before what changed while it was read is looked at again.

    Returns:
        What it came to; also where it was stopped early.

    Raises:
        UsageError: the places cannot work together, or another run writes there.
        OutputError: outputs cannot be written, or a store cannot be reached; what has no record
            will be done by the next run.
        DeviceError: the device is lost.
    """
    started_s = time.monotonic()
    check_folders(source, output)
    holds = of_all if shard is None else shard.part(rules.suffixes)
    with (
        open_inputs(source, holds) as inputs,
        open_destination(output, shard) as destination,
        ResultsLog(destination.folder, shard, holds) as results,
    ):
        for sentence in results.repaired:
            logger.warning("{}", sentence)
        names = OutputNames()
        names.hold_all((image, name_of_mask(mask)) for image, mask in results.masks())
        run = _Run(
            inputs,
            engine(inputs, destination.outputs, names),
            destination,
            results,
            stop=stop,
            progress=progress,
            shard=shard,
        )
        files = Listing(_listed(inputs, rules, recursive, holds, run.summary))
        files.look_ahead()
        progress.start(files.count, is_whole=files.is_whole)
        try:
            changed = run.drain(run.told(files), skip_current=not overwrite)
            for _ in range(_CHANGED_ROUNDS):
                if stop.requested or not changed:
                    break
                pause(_CHANGED_PAUSE_S)
                # Seen anew: what has settled meanwhile is done now, what has gone stays behind.
                there = {o.image: f for o in changed if (f := inputs.look_again(o.image))}
                gone = [outcome for outcome in changed if outcome.image not in there]
                changed = gone + (run.drain(there.values()) if there else [])
            for outcome in changed:
                run.record(outcome)
        except StorageError:
            raise  # it is away: what is committed is enough for the next run to go on
        except BaseException:
            run.finish()
            raise
        run.finish()
        run.summary.left = files.count - run.through
        run.summary.unlisted = not files.is_whole
    run.summary.seconds = time.monotonic() - started_s
    return run.summary


class _Run:
    """Feeds the engine, records what comes out of it, and counts."""

    def __init__(
        self,
        inputs: Inputs,
        engine: Engine,
        destination: Destination,
        results: ResultsLog,
        *,
        stop: Stop,
        progress: Progress,
        shard: Shard | None,
    ) -> None:
        self.summary = Summary(shard=None if shard is None else str(shard))
        self._is_shard = shard is not None
        self.through = 0
        self.options = engine.options
        self._inputs = inputs
        self._engine = engine
        self._destination = destination
        self._outputs = destination.outputs
        self._results = results
        self._stop = stop
        self._progress = progress

    def told(self, files: Listing) -> Iterator[InputFile]:
        """Give what is listed, and tell the progress how much there is as that becomes known."""
        is_told = files.is_whole
        for file in files:
            if not is_told:
                self._progress.expect(files.count, is_whole=files.is_whole)
                is_told = files.is_whole
            yield file

    def _not_current(self, files: Iterable[InputFile]) -> Iterator[InputFile]:
        for file in files:
            known = self._results.known(file.image)
            if known and is_current(file, known, self.options, self._inputs, self._outputs):
                self.summary.skipped += 1
                self.through += 1
                self._progress.advance(None)
            else:
                yield file

    def drain(self, files: Iterable[InputFile], *, skip_current: bool = False) -> list[Outcome]:
        """Process and record files; give back those that changed while they were read.

        A thousand of them at most: further ones are recorded as they are, for the next run.

        Args:
            files: the inputs.
            skip_current: leave out what an earlier run has done.
        """
        changed: list[Outcome] = []
        # The stop is asked before each look at an earlier record, which may read the whole file.
        wanted = self._until_stopped(files)
        wanted = self._not_current(wanted) if skip_current else wanted
        for outcome in self._engine.process(self._disowning(wanted)):
            if outcome.status is Status.SKIPPED and len(changed) < _NAMED:
                changed.append(outcome)
            else:
                self.record(outcome)
        return changed

    def _disowning(self, files: Iterable[InputFile]) -> Iterator[InputFile]:
        """Take back the record of what is done again, before its outputs are written over.

        Dying after that would leave new outputs under a record of other settings, and a run with
        those settings would trust it. Several at once, since a store takes as long for many.
        """
        coming = iter(files)
        while ahead := list(itertools.islice(coming, 1)):
            if self._disown(ahead[0]):
                ahead += itertools.islice(coming, _DISOWNED_AT_ONCE - 1)
                for file in ahead[1:]:
                    self._disown(file)
                self._destination.commit()
            yield ahead[0]
            for file in ahead[1:]:
                if self._stop.requested:
                    return
                yield file

    def _disown(self, file: InputFile) -> bool:
        known = self._results.known(file.image)
        if known is None or known.status is not Status.DONE:
            return False
        return self._results.append(
            Outcome(
                image=file.image,
                status=Status.SKIPPED,
                error="ImageChangedError: being done again; run again if this is left",
            )
        )

    def finish(self) -> None:
        """Make the tables over all images, and bring all to where it belongs."""
        destination = self._destination
        if destination.is_whole or self._is_shard:
            return  # the tables are made when the shards are merged
        if self._stop.requested and destination.is_far:
            destination.commit()  # the images' tables would have to be fetched, and the user waits
            return
        self._results.write_csv()
        tables = destination.read_tables(self._results.cell_tables())
        options = self.options
        write_tables(destination.folder, tables, cells=options.cells, parquet=options.parquet)
        destination.publish()

    def record(self, outcome: Outcome) -> None:
        """Make an outcome final: the point from which a next run trusts it."""
        before = self._results.known(outcome.image)
        if outcome.status is not Status.SKIPPED and before:
            # Before the new record: dying between the two is a safe redo, after it a file is left.
            # One that failed has none: a mask must not stand beside a picture it was not made of.
            for old in set(before.outputs) - set(outcome.outputs):
                self._outputs.remove(old)
        self._results.append(outcome)
        self._destination.recorded()
        _count(self.summary, outcome)
        self.through += 1
        self._progress.advance(outcome)

    def _until_stopped(self, files: Iterable[InputFile]) -> Iterator[InputFile]:
        for file in files:
            if self._stop.requested:
                logger.info("stopping: finishing what is under way; a second signal ends at once")
                return
            yield file


def is_current(
    file: InputFile, known: Known, options: PipelineOptions, inputs: Inputs, outputs: Outputs
) -> bool:
    """Decide whether an earlier record still holds.

    It does where model and settings are the same, all outputs lie there, and the input is
    unchanged: same size and time, or same size and, looked at closely, the same content.
    """
    if (
        known.status is not Status.DONE
        or known.model_sha256 != options.model_sha256
        or known.settings_sha256 != options.settings_sha256
        or known.size_bytes != file.size_bytes
        or not known.outputs
        or not all(outputs.exists(path) for path in known.outputs)
    ):
        return False
    # One that cannot be read is not current: the engine finds out, and says, what is wrong.
    return known.mtime_ns == file.mtime_ns or inputs.sha256(file) == known.sha256


def _listed(
    inputs: Inputs,
    rules: IgnoreRules,
    recursive: bool,
    holds: Callable[[str], bool],
    summary: Summary,
) -> Iterator[InputFile]:
    for found in inputs.scan(rules, recursive=recursive):
        if not holds(found.image):
            continue
        if isinstance(found, InputFile):
            yield found
            continue
        summary.ignored += 1
        summary.missed += found.missed
        if found.missed and summary.missed <= _NAMED:
            logger.warning("ignored: {!r}: {}", found.image, found.reason)
        if len(summary.ignored_names) < _NAMED:
            summary.ignored_names.append(found)


def _count(summary: Summary, outcome: Outcome) -> None:
    match outcome.status:
        case Status.DONE:
            summary.done += 1
            summary.flagged += bool(outcome.flags)
        case Status.FAILED:
            summary.failed += 1
            if len(summary.failures) < _NAMED:
                summary.failures.append((outcome.image, outcome.error or ""))
        case Status.SKIPPED:
            summary.skipped += 1
            summary.changed += 1
            if len(summary.unsettled) < _NAMED:
                summary.unsettled.append(outcome.image)
