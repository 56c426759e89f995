"""Hints about what has changed below a folder, from the kernel or by polling.

Hints, not facts: events can be lost, and what is hinted at may be gone. The periodic rescan is what
makes sure of every file; this only makes it quick.
"""

from __future__ import annotations

import contextlib
import errno
import os
import secrets
import sys
import threading
import time
from collections.abc import Iterable
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING

from watchdog.events import (
    DirCreatedEvent,
    DirMovedEvent,
    FileClosedEvent,
    FileCreatedEvent,
    FileModifiedEvent,
    FileMovedEvent,
    FileSystemEvent,
    FileSystemEventHandler,
)
from watchdog.observers.api import BaseObserver, EventDispatcher
from watchdog.observers.polling import PollingObserverVFS

from bcseg_batch.errors import BcsegError
from bcseg_batch.intake.filesystem import Filesystem, filesystem_of, inotify_limits

if TYPE_CHECKING:
    from bcseg_batch.intake.inotify import InotifyObserver

# All others are not even asked of the kernel, above all those of opening and reading: they would
# come from this program's own reading.
_EVENTS: list[type[FileSystemEvent]] = [
    FileCreatedEvent,
    FileModifiedEvent,
    FileClosedEvent,
    FileMovedEvent,
    DirCreatedEvent,
    DirMovedEvent,
]
_PROBE_PREFIX = ".bcseg-probe-"  # a dotfile, so no input
_STOP_TIMEOUT_S = 5.0


class WatchError(BcsegError):
    """A folder cannot be watched now; the rescan goes on without."""

    exit_code = 75


class WatchMode(StrEnum):
    """How changes are noticed."""

    AUTO = "auto"
    INOTIFY = "inotify"
    POLL = "poll"


@dataclass(frozen=True, slots=True)
class WatchChoice:
    """How a folder is watched.

    Attributes:
        mode: INOTIFY or POLL.
        reason: half a sentence for the log and for `status`.
    """

    mode: WatchMode
    reason: str


def choose_mode(folder: Path, wanted: WatchMode, *, probe_timeout_s: float = 2.0) -> WatchChoice:
    """Decide how to watch a folder: by its file system, then by trying.

    The type comes first, since a try proves too little on a share: the kernel does report what this
    machine writes there, and only that. A try is a dotfile written into the folder, seen, and
    removed; where nothing may be written, the type alone decides. What the user asks for is kept,
    with a warning in the reason where it will not do.

    Args:
        folder: the input folder.
        wanted: what the settings ask for.
        probe_timeout_s: how long to wait for the try to be seen.

    Raises:
        WatchError: the folder is not there.
    """
    if not folder.is_dir():
        raise WatchError(f"{folder} cannot be watched: it is not there, or is no folder.")
    filesystem = filesystem_of(folder)
    choice = choose_by_type(filesystem, wanted)
    if wanted is WatchMode.AUTO and choice.mode is WatchMode.INOTIFY:
        return _probe(folder, choice, probe_timeout_s)
    return choice


def choose_by_type(filesystem: Filesystem, wanted: WatchMode) -> WatchChoice:
    """Decide how to watch by the type of the file system alone.

    Args:
        filesystem: what the input folder lies on.
        wanted: what the settings ask for.
    """
    place = f"{filesystem.type} at {filesystem.mount_point}"
    lack = f"{place} gives no events for what other machines write"
    match wanted:
        case WatchMode.POLL:
            return WatchChoice(WatchMode.POLL, "polling is asked for")
        case WatchMode.INOTIFY if filesystem.gives_events:
            return WatchChoice(WatchMode.INOTIFY, "inotify is asked for")
        case WatchMode.INOTIFY:
            reason = f"inotify is asked for, but {lack}: only the rescan will find that"
            return WatchChoice(WatchMode.INOTIFY, reason)
        case WatchMode.AUTO:
            if not filesystem.gives_events:
                return WatchChoice(WatchMode.POLL, lack)
            if sys.platform != "linux":
                return WatchChoice(WatchMode.POLL, "there is no inotify on this system")
            return WatchChoice(WatchMode.INOTIFY, f"{place} gives events")


class FolderWatch:
    """Hints about what changed below a folder: threads put, one loop takes.

    Every image that is created, written, closed after writing, moved in or renamed gives a hint; so
    does every sub-folder that is created or moved in, whose files must then be scanned for: they
    may be older than the watch on it. A folder's hint comes when it is watched already, so that
    scan and events together miss nothing. Ignore rules are not applied.

    Where events were lost (`take_overflow`), or the watch is dead (`trouble`), the whole input
    folder must be scanned again; a dead watch is stopped, and a new one started.
    """

    def __init__(
        self,
        folder: Path,
        choice: WatchChoice,
        *,
        recursive: bool,
        poll_interval_s: float,
        max_queued: int = 10_000,
    ) -> None:
        """Prepare; nothing is watched yet.

        Args:
            folder: the input folder; links to it are followed, links to folders in it are not.
            choice: how to watch, from `choose_mode`.
            recursive: watch sub-folders too.
            poll_interval_s: between two looks at all files, where polling; seconds.
            max_queued: how many hints may wait to be taken.
        """
        self._folder = folder
        self._choice = choice
        self._recursive = recursive
        self._poll_interval_s = poll_interval_s
        self._max_queued = max_queued
        self._changed = threading.Condition()
        # Ordered sets, guarded by the condition.
        self._images: dict[str, None] = {}
        self._folders: dict[str, None] = {}
        self._overflowed = False
        self._prefix = ""
        self._identity: tuple[int, int] | None = None
        self._observer: BaseObserver | None = None
        self._inotify: InotifyObserver | None = None

    def start(self) -> None:
        """Watch from now on: whatever changes after the return gives a hint.

        Raises:
            WatchError: the folder is gone or may not be read, or the kernel's limits are reached;
                nothing is left running.
        """
        if self._observer is not None:
            raise RuntimeError("already started")
        try:
            self._identity = _identity(self._folder)
            # Watchdog does not follow a link, and would watch the link instead.
            root = os.path.realpath(self._folder, strict=True)
            self._prefix = root.rstrip("/") + "/"
            self._observer = self._make_observer()
            self._observer.schedule(
                _Handler(self), root, recursive=self._recursive, event_filter=_EVENTS
            )
            self._observer.start()
        except OSError as error:
            self.stop()
            raise WatchError(self._explain(error)) from error
        except RecursionError as error:  # watchdog walks by recursion
            self.stop()
            raise WatchError(f"{self._folder} cannot be watched: too deeply nested.") from error
        if self._inotify is not None and self._inotify.limit_reached:
            self.stop()
            raise WatchError(self._explain(OSError(errno.ENOSPC, "watch limit reached")))

    def stop(self) -> None:
        """End the threads, waiting a few seconds at most; may be called again.

        A thread that hangs in a dead share cannot be ended: it is left behind and ends with the
        process.
        """
        observer, self._observer = self._observer, None
        inotify, self._inotify = self._inotify, None
        try:
            if observer is not None:
                _stop_observer(observer, _STOP_TIMEOUT_S)
        finally:
            if inotify is not None:
                inotify.close_reader(_STOP_TIMEOUT_S)

    def take(self) -> list[str]:
        """Give all images hinted at since the last time, each once, in the order of first hints.

        Returns:
            Paths relative to the folder, with forward slashes; what is no UTF-8 is kept by
            surrogates, as `os.fsdecode` does.
        """
        with self._changed:
            images, self._images = self._images, {}
        return list(images)

    def take_folders(self) -> list[str]:
        """Give the sub-folders hinted at since the last time, without those inside others.

        Returns:
            Paths relative to the folder, with forward slashes: to be scanned with all below them.
        """
        with self._changed:
            folders, self._folders = self._folders, {}
        return outermost(folders)

    @property
    def overflowed(self) -> bool:
        """Hints were lost, in the kernel's queue or in this one, since `take_overflow`."""
        with self._changed:
            return self._overflowed

    def take_overflow(self) -> bool:
        """Say whether hints were lost since the last time; then the folder must be rescanned."""
        with self._changed:
            overflowed, self._overflowed = self._overflowed, False
        return overflowed

    def wait(self, timeout_s: float) -> None:
        """Return at once where there is something to take, else when there is, or in time."""
        with self._changed:
            self._changed.wait_for(
                lambda: self._images or self._folders or self._overflowed, timeout_s
            )

    def trouble(self) -> str | None:
        """Say why no more hints can be relied on, in half a sentence; None where they can."""
        if self._observer is None:
            return "not started, or stopped"
        return self._folder_trouble() or self._thread_trouble(self._observer)

    def is_alive(self) -> bool:
        """Say whether hints can be relied on: all threads live, and the folder is the same one."""
        return self.trouble() is None

    def put(self, event: FileSystemEvent) -> None:
        """Note an event; called in a thread of watchdog's, where nothing may be raised."""
        path = os.fsdecode(event.dest_path or event.src_path)
        if not path.startswith(self._prefix):
            return
        relative = path[len(self._prefix) :]
        if event.is_directory and not self._recursive:
            return
        with self._changed:
            hints = self._folders if event.is_directory else self._images
            if relative in hints:
                return
            if len(hints) < self._max_queued:
                hints[relative] = None
            else:
                self._overflowed = True
            self._changed.notify_all()

    def note_overflow(self) -> None:
        """Note that events were lost; called in a thread of watchdog's."""
        with self._changed:
            self._overflowed = True
            self._changed.notify_all()

    def _folder_trouble(self) -> str | None:
        try:
            identity = _identity(self._folder)
        except OSError as error:
            return f"the folder cannot be looked at: {error.strerror}"
        if identity != self._identity:
            return "another folder has taken its place (replaced, mounted over, or unmounted)"
        return None

    def _thread_trouble(self, observer: BaseObserver) -> str | None:
        if self._inotify is not None:
            if self._inotify.failure is not None:
                return self._inotify.failure
            if self._inotify.limit_reached:
                return "a new sub-folder cannot be watched: fs.inotify.max_user_watches is used up"
        emitters = list(observer.emitters)
        if not emitters or not all(emitter.is_alive() for emitter in emitters):
            return "the folder was removed, or the thread that watches it died"
        if not observer.is_alive():
            return "the thread that hands events on died"
        return None

    def _make_observer(self) -> BaseObserver:
        if self._choice.mode is WatchMode.POLL:
            # Links are looked at, not through: a link to a folder above would be walked for ever.
            return PollingObserverVFS(
                os.lstat,
                os.scandir,
                polling_interval=self._poll_interval_s,
            )
        if sys.platform != "linux":
            raise OSError(errno.ENOSYS, "there is no inotify on this system")
        from bcseg_batch.intake.inotify import InotifyObserver  # noqa: PLC0415 - Linux only

        self._inotify = InotifyObserver(self.note_overflow)
        return self._inotify

    def _explain(self, error: OSError) -> str:
        limits = inotify_limits() if self._choice.mode is WatchMode.INOTIFY else None
        if limits is not None and error.errno == errno.ENOSPC:
            needed = _count_folders(self._folder) if self._recursive else 1
            return (
                f"{self._folder} cannot be watched: it takes {needed} inotify watches, and the "
                f"kernel grants {limits.max_user_watches} to all programs of one user. Raise them: "
                f"sysctl fs.inotify.max_user_watches={max(2 * needed, 65536)}, or set "
                "intake.mode = poll."
            )
        if limits is not None and error.errno == errno.EMFILE:
            return (
                f"{self._folder} cannot be watched: no inotify instance is left; the kernel grants "
                f"{limits.max_user_instances} to all programs of one user. Raise them: sysctl "
                f"fs.inotify.max_user_instances={max(2 * limits.max_user_instances, 256)} (or the "
                "limit of open files, ulimit -n), or set intake.mode = poll."
            )
        return f"{self._folder} cannot be watched: {error.strerror or error}."


class _Handler(FileSystemEventHandler):
    """Puts, and nothing else: an exception here would end the thread that hands events on."""

    def __init__(self, watch: FolderWatch) -> None:
        self._watch = watch

    def dispatch(self, event: FileSystemEvent) -> None:
        self._watch.put(event)


def outermost(folders: Iterable[str]) -> list[str]:
    """Leave out the folders that lie in others of the list; the order is kept.

    Args:
        folders: relative paths with forward slashes, each once.
    """
    known = dict.fromkeys(folders)
    return [folder for folder in known if not any(above in known for above in _above(folder))]


def _above(folder: str) -> Iterable[str]:
    while "/" in folder:
        folder = folder.rpartition("/")[0]
        yield folder


def _identity(folder: Path) -> tuple[int, int]:
    facts = folder.stat()
    return facts.st_dev, facts.st_ino


def _count_folders(folder: Path) -> int:
    return sum(1 for _ in os.walk(folder))


def _stop_observer(observer: BaseObserver, timeout_s: float) -> None:
    deadline_s = time.monotonic() + timeout_s
    emitters = list(observer.emitters)
    for emitter in emitters:
        emitter.stop()
    for emitter in emitters:
        if emitter.ident is not None:
            emitter.join(max(0.0, deadline_s - time.monotonic()))
    if any(emitter.is_alive() for emitter in emitters):
        # Its own stop() would wait for them without end.
        observer.stopped_event.set()
        observer.event_queue.put(EventDispatcher.stop_event)
    else:
        observer.stop()
    if observer.ident is not None:
        observer.join(max(0.0, deadline_s - time.monotonic()))


def _probe(folder: Path, by_type: WatchChoice, timeout_s: float) -> WatchChoice:
    """Try what the type promises: write a file and wait until it is seen."""
    watch = FolderWatch(folder, by_type, recursive=False, poll_interval_s=timeout_s)
    try:
        watch.start()
        name = _PROBE_PREFIX + secrets.token_hex(8)
        _write_probe(folder / name)
        seen = _sees(watch, name, timeout_s)
    except WatchError as error:
        return WatchChoice(WatchMode.POLL, f"inotify failed: {error}")
    except OSError as error:
        why = f"not tried, since no file can be written there: {error.strerror}"
        return WatchChoice(WatchMode.INOTIFY, f"{by_type.reason} ({why})")
    finally:
        watch.stop()
    if seen:
        return WatchChoice(WatchMode.INOTIFY, f"{by_type.reason}, and a file written was seen")
    return WatchChoice(WatchMode.POLL, f"{by_type.reason}, but a file written was not seen")


def _write_probe(path: Path) -> None:
    try:
        os.close(os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600))
    finally:
        with contextlib.suppress(OSError):
            path.unlink()


def _sees(watch: FolderWatch, image: str, timeout_s: float) -> bool:
    deadline_s = time.monotonic() + timeout_s
    while (left_s := deadline_s - time.monotonic()) > 0:
        watch.wait(left_s)
        if image in watch.take():
            return True
        # Lost in the crowd of a busy folder: then events do come.
        if watch.take_overflow():
            return True
    return False
