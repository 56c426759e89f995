"""`bcseg-batch status`: the daemon's own words and the ledger's numbers, put together."""

from __future__ import annotations

import time
from datetime import datetime
from pathlib import Path
from typing import Any

from bcseg_batch.service.status import is_alive, read_status
from bcseg_batch.store.ledger import LEDGER_NAME, Ledger, State
from bcseg_batch.text import printable

# A living daemon writes its status every two seconds.
_STALE_AFTER_S = 60.0


def overview(state_folder: Path) -> dict[str, Any]:
    """Gather what is known of a daemon, running or not.

    Args:
        state_folder: the daemon's.

    Returns:
        JSON-ready facts: `alive`, `troubles`, `daemon` (its own last words), `queue`, `done_today`,
        `failed_today`, `done`, `failed`, `images_per_s` over five minutes, `oldest_waiting_s`,
        `last_error`.

    Raises:
        SettingsError: there is no ledger.
    """
    alive = is_alive(state_folder)
    said = read_status(state_folder)
    midnight_s = datetime.now().astimezone().replace(hour=0, minute=0, second=0).timestamp()
    with Ledger.open_existing(state_folder / LEDGER_NAME) as ledger:
        standing = ledger.standing(since_s=midnight_s)
    troubles = dict(said["troubles"]) if alive and said else {}
    if alive and said and (age_s := _age_s(said["updated_at"])) > _STALE_AFTER_S:
        troubles["stuck"] = f"nothing has been heard of it for {age_s:.0f} s"
    failure = standing.last_failure
    return {
        "alive": alive,
        "troubles": troubles,
        "daemon": said,
        "queue": standing.counts[State.PENDING] + standing.counts[State.PROCESSING],
        "done_today": standing.done_since,
        "failed_today": standing.failed_since,
        "done": standing.counts[State.DONE],
        "failed": standing.counts[State.FAILED],
        "images_per_s": round(standing.images_per_s, 3),
        "oldest_waiting_s": standing.oldest_pending_s,
        "last_error": None
        if failure is None
        else {
            "image": failure.outcome.image,
            "error": failure.outcome.error,
            "at": failure.outcome.finished_at,
        },
    }


def render_overview(facts: dict[str, Any]) -> str:
    """Put the facts into lines for people."""
    said = facts["daemon"]
    lines = ["not running"]
    if facts["alive"]:
        lines = ["running" if said is None else f"{said['state']}, process {said['pid']}"]
    lines += [f"trouble ({place}): {text}" for place, text in facts["troubles"].items()]
    if said is not None:
        lines += [
            f"watching   {said['input']} by {said['watch_mode'] or 'nothing'}"
            + (f" ({said['watch_reason']})" if said["watch_reason"] else ""),
            f"writing    {said['output']}",
            f"model      {said['model']} ({said['model_sha256'][:12]})",
            f"device     {said['device']} in {said['dtype']}",
        ]
        if facts["alive"]:
            lines.append(f"settling   {said['settling']}, in flight {said['in_flight']}")
    waiting_s = facts["oldest_waiting_s"]
    lines += [
        f"queue      {facts['queue']}"
        + ("" if waiting_s is None else f", the oldest since {waiting_s:.0f} s"),
        f"today      {facts['done_today']} done, {facts['failed_today']} failed",
        f"in all     {facts['done']} done, {facts['failed']} failed",
        f"rate       {facts['images_per_s']:.2f} images/s over five minutes",
    ]
    if error := facts["last_error"]:
        lines.append(f"last error {error['at']} {error['image']}: {error['error']}")
    return "\n".join(printable(line) for line in lines)


def _age_s(time_text: str) -> float:
    return time.time() - datetime.fromisoformat(time_text).timestamp()
