"""The report: pages about an output folder that a browser opens without a server or the network."""

from __future__ import annotations

from importlib.util import find_spec

from bcseg_batch.errors import SettingsError

_NEEDS = ("jinja2", "matplotlib")


def check_report_installed() -> None:
    """Refuse to begin where the report could not be made.

    Raises:
        SettingsError: what it is made with is not installed.
    """
    missing = [name for name in _NEEDS if find_spec(name) is None]
    if missing:
        raise SettingsError(
            f"the report needs {' and '.join(missing)}: install bcseg-batch with the extra "
            "`report`, or leave the report out"
        )
