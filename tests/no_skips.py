"""With TESTS_MUST_NOT_SKIP set, a test that skips fails the run: CI has all the real parts.

Only what no machine of ours can have may be missing; such a reason begins with ALLOWED.
"""

from __future__ import annotations

import pytest

ALLOWED = "not on this machine:"


class NoSkips:
    """Collects the skips of a run and fails it for them."""

    def __init__(self) -> None:
        self.skipped: list[str] = []

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.skipped and isinstance(report.longrepr, tuple):
            reason = report.longrepr[2].removeprefix("Skipped: ")
            if not reason.startswith(ALLOWED):
                self.skipped.append(f"{report.nodeid}: {reason}")

    @pytest.hookimpl(trylast=True)
    def pytest_sessionfinish(self, session: pytest.Session) -> None:
        if self.skipped and session.exitstatus == pytest.ExitCode.OK:
            session.exitstatus = pytest.ExitCode.TESTS_FAILED

    def pytest_terminal_summary(self, terminalreporter: pytest.TerminalReporter) -> None:
        for line in self.skipped:
            terminalreporter.write_line(
                f"skipped, and TESTS_MUST_NOT_SKIP is set: {line}", red=True
            )
