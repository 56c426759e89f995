"""Shows a training on the terminal, or as lines where there is none."""

from __future__ import annotations

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from bcseg_training.train import EpochResult


class TrainingBar:
    """A bar over the steps of each epoch, and a line for each finished one.

    Args:
        epochs: of the whole training.
        console: on standard error.
    """

    def __init__(self, epochs: int, console: Console) -> None:
        self._epochs = epochs
        self._console = console
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("loss {task.fields[loss]:.4f}"),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            console=self._console,
            disable=not self._console.is_terminal,
        )
        self._task = self._progress.add_task("", total=1, loss=0.0)

    def __enter__(self) -> TrainingBar:
        self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._progress.stop()

    def on_step(self, epoch: int, step: int, steps: int, loss: float) -> None:
        """Move on by a step; epochs are counted from 0 here."""
        self._progress.update(
            self._task,
            description=f"epoch {epoch + 1} of {self._epochs}",
            completed=step,
            total=steps,
            loss=loss,
        )

    def on_epoch(self, result: EpochResult) -> None:
        """Tell how an epoch ended."""
        self._console.print(
            f"epoch {result.epoch} of {self._epochs}: loss {result.loss:.4f}, "
            f"Dice {result.dice:.4f}, IoU {result.iou:.4f}",
            highlight=False,
        )
