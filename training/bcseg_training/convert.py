"""Takes models to and from the original's `checkpoint.pth`."""

from __future__ import annotations

from pathlib import Path

from bcseg_batch.errors import UsageError
from bcseg_batch.segment.checkpoint import load_checkpoint, save_checkpoint


def convert(source: Path, target: Path, *, source_suffix: str, target_suffix: str) -> None:
    """Write a model under the other layout.

    Args:
        source: the model to read.
        target: the file to write; never one that exists.
        source_suffix: what `source` must end in.
        target_suffix: what `target` must end in.

    Raises:
        UsageError: wrong endings, or the target exists.
        CheckpointError: the source is no model, or the target's layout cannot express it.
    """
    for path, suffix in ((source, source_suffix), (target, target_suffix)):
        if path.suffix != suffix:
            raise UsageError(f"{path} does not end in {suffix}")
    if target.exists():
        raise UsageError(f"{target} exists already: name another file, or remove it")
    checkpoint = load_checkpoint(source)
    save_checkpoint(target, checkpoint.model, checkpoint.spec)
