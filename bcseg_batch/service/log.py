"""Where log lines go. Every library's lines and warnings take the same way as ours."""

from __future__ import annotations

import logging
import os
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import IO, TYPE_CHECKING

from loguru import logger
from rich.console import Console
from rich.text import Text

from bcseg_batch.service.logfile import LEVELS, LogFile, LogLine, from_record, render
from bcseg_batch.service.ratelimit import RateLimit, kind_of

if TYPE_CHECKING:
    from loguru import Message

    from bcseg_batch.settings import LogSettings

_LINE = "{time:YYYY-MM-DD HH:mm:ss} {level: <7} {message}{exception}"
_STYLES = {"WARNING": "yellow", "ERROR": "red", "CRITICAL": "bold red"}
# The priorities of syslog(3), which the journal knows.
_PRIORITIES = {
    "TRACE": 7,
    "DEBUG": 7,
    "INFO": 6,
    "SUCCESS": 5,
    "WARNING": 4,
    "ERROR": 3,
    "CRITICAL": 2,
}


class _ToLoguru(logging.Handler):
    """Hands the lines of the standard library's loggers on."""

    def emit(self, record: logging.LogRecord) -> None:
        level: str | int
        try:
            level = logger.level(record.levelname).name
        except ValueError:
            level = record.levelno
        logger.opt(exception=record.exc_info).log(level, "{}: {}", record.name, record.getMessage())


def log_to_terminal(console: Console, *, level: str = "INFO", speaker: str = "") -> None:
    """Send all log lines to a console, above a progress bar where one is shown.

    Args:
        console: on standard error.
        level: the least that is shown.
        speaker: stands before each message, where several processes share the terminal.
    """

    def write(message: Message) -> None:
        _print(console, str(message).rstrip("\n"), message.record["level"].name)

    line = _LINE.replace("{message}", speaker + "{message}")
    logger.remove()
    logger.add(write, level=level, format=line, backtrace=False, diagnose=False)
    _take_in_libraries()


def log_of_the_daemon(
    settings: LogSettings, state_folder: Path, environ: Mapping[str, str] | None = None
) -> None:
    """Send the daemon's log where it is read: the journal or a terminal, and a file.

    Args:
        settings: section `log` of the settings.
        state_folder: holds the log folder where none is set.
        environ: environment variables; None takes those of the process.
    """
    environ = os.environ if environ is None else environ
    file = LogFile(
        log_folder(settings, state_folder, environ),
        rotate_bytes=settings.rotate_bytes,
        keep_files=settings.keep_files,
    )
    console = Console(stderr=True)
    stream = sys.stderr

    def show(line: LogLine) -> None:
        _print(console, render(line), line.level)

    def to_journal(line: LogLine) -> None:
        _write(stream, journal_text(line))

    shown = to_journal if is_journal(stream, environ) else show
    logger.remove()
    sink = LimitedSink([file.write, shown], at_end=file.close)
    logger.add(sink, level=settings.level, format="{message}", backtrace=False, diagnose=False)
    _take_in_libraries()


def log_folder(settings: LogSettings, state_folder: Path, environ: Mapping[str, str]) -> Path:
    """Give the folder of the log files.

    Args:
        settings: section `log` of the settings.
        state_folder: holds it where nothing else is said.
        environ: may have `LOGS_DIRECTORY`, as systemd sets it for the service: paths with colons.
    """
    if settings.folder is not None:
        return settings.folder
    given = environ.get("LOGS_DIRECTORY", "").split(":")[0]
    return Path(given) if given else state_folder / "log"


def is_journal(stream: IO[str], environ: Mapping[str, str]) -> bool:
    """Tell whether a stream goes to the journal; systemd.exec(5), `$JOURNAL_STREAM`."""
    try:
        facts = os.fstat(stream.fileno())
    except (OSError, ValueError):  # no file, or closed
        return False
    return environ.get("JOURNAL_STREAM") == f"{facts.st_dev}:{facts.st_ino}"


def journal_text(line: LogLine) -> str:
    """Write a line for the journal, which has the time; sd-daemon(3) explains the prefix.

    The message is one line, and each line of a traceback has the prefix of its own that the
    journal asks for.
    """
    prefix = f"<{_PRIORITIES.get(line.level, 5)}>"
    lines = [" ".join(line.message.splitlines()), *(line.exception or "").splitlines()]
    return "\n".join(prefix + text for text in lines)


class LimitedSink:
    """Hands log lines to several places, but of warnings and errors that repeat only the first.

    Args:
        places: each takes a line.
        at_end: called after the last line.
        limit: how many of a kind pass.
        clock: gives seconds that only go forward.
    """

    def __init__(
        self,
        places: Sequence[Callable[[LogLine], None]],
        *,
        at_end: Callable[[], None] = lambda: None,
        limit: RateLimit | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._places = places
        self._at_end = at_end
        self._limit = limit or RateLimit()
        self._clock = clock
        self._latest: LogLine | None = None

    def write(self, message: Message) -> None:
        """Take a line from loguru."""
        self.take(from_record(message.record))

    def take(self, line: LogLine) -> None:
        """Take a line; what was held back before it is told first."""
        now_s = self._clock()
        self._latest = line
        self._tell_held_back(self._limit.ended(now_s))
        if LEVELS.get(line.level, 0) < LEVELS["WARNING"] or self._limit.admits(
            kind_of(line.level, line.message), now_s
        ):
            self._put(line)

    def stop(self) -> None:
        """Tell what is still held back; loguru calls it at the end."""
        self._tell_held_back(self._limit.close())
        self._at_end()

    def _tell_held_back(self, held_back: list[tuple[str, int]]) -> None:
        for kind, count in held_back:
            assert self._latest is not None
            level, _, text = kind.partition(" ")
            self._put(
                LogLine(
                    time=self._latest.time, level=level, message=f"{count} more like this: {text}"
                )
            )

    def _put(self, line: LogLine) -> None:
        for place in self._places:
            place(line)


def _take_in_libraries() -> None:
    logging.basicConfig(handlers=[_ToLoguru()], level=logging.WARNING, force=True)
    # Libraries warn of odd files (a broken EXIF block, say) through this module too.
    logging.captureWarnings(capture=True)
    if not sys.warnoptions:
        logging.getLogger("py.warnings").setLevel(logging.ERROR)


def _print(console: Console, text: str, level: str) -> None:
    if console.is_terminal:
        console.print(Text(text, style=_STYLES.get(level, "")))
    else:
        # Plain and unwrapped, whatever the width is thought to be.
        _write(console.file, text)


def _write(stream: IO[str], text: str) -> None:
    encoding = getattr(stream, "encoding", None) or "utf-8"
    stream.write(text.encode(encoding, "backslashreplace").decode(encoding) + "\n")
    stream.flush()
