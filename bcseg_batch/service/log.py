"""Where log lines go. Every library's lines and warnings take the same way as ours."""

from __future__ import annotations

import logging
import sys
from typing import TYPE_CHECKING

from loguru import logger
from rich.console import Console
from rich.text import Text

if TYPE_CHECKING:
    from loguru import Message

_LINE = "{time:YYYY-MM-DD HH:mm:ss} {level: <7} {message}{exception}"
_STYLES = {"WARNING": "yellow", "ERROR": "red", "CRITICAL": "bold red"}


class _ToLoguru(logging.Handler):
    """Hands the lines of the standard library's loggers on."""

    def emit(self, record: logging.LogRecord) -> None:
        level: str | int
        try:
            level = logger.level(record.levelname).name
        except ValueError:
            level = record.levelno
        logger.opt(exception=record.exc_info).log(level, "{}: {}", record.name, record.getMessage())


def log_to_terminal(console: Console, *, level: str = "INFO") -> None:
    """Send all log lines to a console, above a progress bar where one is shown.

    Args:
        console: on standard error.
        level: the least that is shown.
    """

    def write(message: Message) -> None:
        text = str(message).rstrip("\n")
        if console.is_terminal:
            console.print(Text(text, style=_STYLES.get(message.record["level"].name, "")))
        else:
            # Plain and unwrapped, whatever the width is thought to be.
            stream = console.file
            encoding = getattr(stream, "encoding", None) or "utf-8"
            stream.write(text.encode(encoding, "backslashreplace").decode(encoding) + "\n")
            stream.flush()

    logger.remove()
    logger.add(write, level=level, format=_LINE, backtrace=False, diagnose=False)
    logging.basicConfig(handlers=[_ToLoguru()], level=logging.WARNING, force=True)
    # Libraries warn of odd files (a broken EXIF block, say) through this module too.
    logging.captureWarnings(capture=True)
    if not sys.warnoptions:
        logging.getLogger("py.warnings").setLevel(logging.ERROR)
