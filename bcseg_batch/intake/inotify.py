"""Watchdog's inotify observer, made to admit what it would keep to itself. Linux only.

Watchdog reads the kernel's queue in a thread that its observer does not own up to. Three things
happen there that a daemon must hear of: the kernel drops events when its queue is full, a folder
cannot be watched (limit reached, no permission), and the thread dies of an unforeseen exception
while the observer looks alive. Three slips of its book-keeping are mended besides; they need names
that are private to watchdog 7.1, and the tests are what notices when another version differs.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Callable

from watchdog.observers.api import BaseObserver
from watchdog.observers.inotify import InotifyEmitter, InotifyWatchGroup
from watchdog.observers.inotify_c import (
    CallbackId,
    InotifyConstants,
    InotifyEvent,
    InotifyFD,
    Mask,
    WatchCallback,
    WatchDescriptor,
)


class _Reader(InotifyFD):
    """The thread that reads the kernel's queue, and what went wrong in it."""

    def __init__(self, on_overflow: Callable[[], None]) -> None:
        super().__init__()
        self.failure: str | None = None
        self.limit_reached = False
        self._on_overflow = on_overflow

    def run(self) -> None:
        try:
            super().run()
        except Exception as error:  # noqa: BLE001 - any: what matters is that the death is told
            self.failure = f"the thread that reads inotify died: {type(error).__name__}: {error}"
            # Whoever waits for a hint is woken, and finds out.
            self._on_overflow()

    def handle_event(self, event: InotifyEvent) -> None:
        super().handle_event(event)
        if event.is_queue_overflow:
            # Told after watchdog has armed its watches anew: what comes later is seen by them, what
            # came before by the rescan that this leads to.
            self._on_overflow()
        elif event.mask & InotifyConstants.IN_UNMOUNT:
            # A share that is mounted again can have the same device and inode: this alone tells.
            self.failure = "the file system was unmounted"
            self._on_overflow()

    def add_callback(
        self, path: bytes, mask: Mask, callback: WatchCallback, id_: CallbackId
    ) -> WatchDescriptor:
        try:
            wd = super().add_callback(path, mask, callback, id_)
        except OSError as error:
            # For a sub-folder watchdog swallows this, and would be deaf to it without a word.
            if error.errno == errno.ENOSPC:
                self.limit_reached = True
            raise
        if wd == -1:  # no permission: watchdog goes on with a watch that does not exist
            self.remove_callbacks([(wd, id_)])
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), os.fsdecode(path))
        return wd

    def _add_callback(
        self, path: bytes, mask: Mask, callback: WatchCallback, id_: CallbackId
    ) -> WatchDescriptor:
        # A folder made while its parent is walked is met twice, in the ordinary course of things.
        # Watchdog warns of it each time (and dies of the warning where warnings are errors).
        watch = self._get_or_create_watch(path, mask)
        watch.callbacks[id_] = callback
        return watch.wd


class _WatchGroup(InotifyWatchGroup):
    def _remove_watch_internally(self, wd: WatchDescriptor) -> None:
        # A folder moved out of the tree keeps its watch under the old path. Where another folder
        # takes that path, watchdog loses count and dies of a KeyError when either is removed.
        path = self._active_callbacks_by_watch.pop(wd, None)
        if path is not None and self._active_callbacks_by_path.get(path) == wd:
            del self._active_callbacks_by_path[path]

    def _add_callback(self, path: bytes) -> None:
        try:
            wd = self._inotify_fd.add_callback(path, self.event_mask, self, self._id)
        except OSError:
            if path == self.path:
                raise
            return
        # A folder moved out and in again still has its watch: its old path must go, or the next
        # renaming of whatever lies there takes this one's new path with it.
        old_path = self._active_callbacks_by_watch.get(wd, path)
        if old_path != path and self._active_callbacks_by_path.get(old_path) == wd:
            del self._active_callbacks_by_path[old_path]
        self._active_callbacks_by_watch[wd] = path
        self._active_callbacks_by_path[path] = wd


class _Emitter(InotifyEmitter):
    def on_thread_start(self) -> None:
        self._inotify = _WatchGroup(
            self._inotify_fd,
            os.fsencode(self.watch.path),
            event_mask=self.get_event_mask_from_filter(),
            is_recursive=self.watch.is_recursive,
            follow_symlink=self.watch.follow_symlink,
        )


class InotifyObserver(BaseObserver):
    """Watches by inotify, as watchdog's own observer does, and tells what went wrong."""

    def __init__(self, on_overflow: Callable[[], None]) -> None:
        """Open the kernel's queue.

        Args:
            on_overflow: called in the reading thread when events were lost; must only take note.

        Raises:
            OSError: no queue is to be had (EMFILE: the limit of instances).
        """
        self._reader = _Reader(on_overflow)
        self._reader.start()
        super().__init__(_Emitter, inotify_fd=self._reader)

    @property
    def failure(self) -> str | None:
        """Half a sentence where no more events can come, though all threads may live."""
        if self._reader.failure is None and not self._reader.is_alive():
            return "the thread that reads inotify has ended"
        return self._reader.failure

    @property
    def limit_reached(self) -> bool:
        """Some folder is not watched since the kernel's limit of watches is used up."""
        return self._reader.limit_reached

    def close_reader(self, timeout_s: float) -> None:
        """Give the kernel's queue back, also where the observer was never started."""
        self._reader.stop()
        self._reader.join(timeout_s)

    def on_thread_stop(self) -> None:
        """Stop the emitters, then the reading thread; called by watchdog's `stop`."""
        super().on_thread_stop()
        self._reader.stop()
