"""Tells systemd how the daemon is: the notify protocol, over one datagram socket.

The protocol is that of sd_notify(3). Without systemd there is no `NOTIFY_SOCKET`, and every call
does nothing. No call raises: a supervisor that cannot be told is no reason to stop working.
"""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Mapping


class Notifier:
    """Speaks to the service manager that started the process.

    Args:
        environ: holds `NOTIFY_SOCKET`; None takes the process's own environment.
    """

    def __init__(self, environ: Mapping[str, str] | None = None) -> None:
        address = (os.environ if environ is None else environ).get("NOTIFY_SOCKET", "")
        # "@" stands for the zero byte that begins a name outside the file system.
        self._address = "\0" + address[1:] if address.startswith("@") else address

    def ready(self, status: str = "") -> None:
        """Say that start-up, or a reload, is over."""
        self._send("READY=1", *_status(status))

    def status(self, text: str) -> None:
        """Show one line in `systemctl status`."""
        self._send(*_status(text))

    def reloading(self) -> None:
        """Say that a reload begins; `ready` ends it."""
        now_us = time.clock_gettime_ns(time.CLOCK_MONOTONIC) // 1_000
        self._send("RELOADING=1", f"MONOTONIC_USEC={now_us}")

    def stopping(self, status: str = "") -> None:
        """Say that the end has begun."""
        self._send("STOPPING=1", *_status(status))

    def watchdog(self) -> None:
        """Say that the work goes on; to be called where it does, never by a timer."""
        self._send("WATCHDOG=1")

    def extend_timeout(self, seconds: float) -> None:
        """Ask for more time to start, to reload or to stop, from now on."""
        self._send(f"EXTEND_TIMEOUT_USEC={round(seconds * 1e6)}")

    def _send(self, *lines: str) -> None:
        if not self._address or not lines:
            return
        message = "\n".join(lines).encode(errors="backslashreplace")
        try:
            # A new socket each time: it costs microseconds, and survives a restarted manager.
            with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as sender:
                sender.settimeout(1.0)
                sender.sendto(message, self._address)
        except (OSError, ValueError):
            pass  # full, gone, or no address at all: see the module's text


def _status(text: str) -> tuple[str, ...]:
    """Keep a status on its one line; a second would be read as another assignment."""
    return (f"STATUS={' '.join(text.split())}",) if text else ()


def watchdog_interval_s(
    environ: Mapping[str, str] | None = None, pid: int | None = None
) -> float | None:
    """Give the time within which the manager wants to hear from this process.

    Ping at half of it, as sd_watchdog_enabled(3) advises.

    Args:
        environ: holds `WATCHDOG_USEC` and `WATCHDOG_PID`; None takes the process's own.
        pid: this process; None asks the system.

    Returns:
        Seconds, or None where no watchdog waits for this process.
    """
    environ = os.environ if environ is None else environ
    meant_for = environ.get("WATCHDOG_PID")
    if meant_for is not None and meant_for != str(os.getpid() if pid is None else pid):
        return None
    try:
        interval_us = int(environ.get("WATCHDOG_USEC", ""))
    except ValueError:
        return None
    return interval_us / 1e6 if interval_us > 0 else None
