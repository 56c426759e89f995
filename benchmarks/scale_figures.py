"""The figures that the model of large runs starts from; `scale_measure.py` makes them."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import asdict, dataclass
from pathlib import Path

from scale_model import Driver, Image

FIGURES_PATH = Path(__file__).with_suffix(".json")


@dataclass(frozen=True, slots=True, kw_only=True)
class Figures:
    """What was measured, and on what.

    Attributes:
        machine: the processor, in words.
        version: of bcseg-batch.
        input_bytes: of a photograph.
        mask_bytes: of its mask.
        composite_bytes: of its composite.
        cells_bytes: of its table of cells.
        labels_bytes: of its label image, where that is asked for.
        preview_bytes: of its preview, where that is asked for.
        record_bytes: of its line in results.jsonl.
        row_bytes: of its line in results.csv.
        cell_rows_bytes: of its lines in cells.csv.
        network_core_ms: processor time of the network.
        files_core_ms: processor time of all the rest.
        list_us: to list a file.
        record_us: to record an image.
        hand_out_us: driver's processor time to send an image to a Ray actor and take its outcome.
        table_us: to put a row of results.csv and an image's rows of cells.csv into them.
    """

    machine: str
    version: str
    input_bytes: int
    mask_bytes: int
    composite_bytes: int
    cells_bytes: int
    labels_bytes: int
    preview_bytes: int
    record_bytes: int
    row_bytes: int
    cell_rows_bytes: int
    network_core_ms: float
    files_core_ms: float
    list_us: float
    record_us: float
    hand_out_us: float
    table_us: float

    @property
    def image(self) -> Image:
        """What an image takes with the defaults: mask, composite, cells."""
        return Image(
            input_bytes=self.input_bytes,
            output_bytes=self.mask_bytes + self.composite_bytes + self.cells_bytes,
            output_files=3,
            network_core_s=self.network_core_ms / 1000,
            files_core_s=self.files_core_ms / 1000,
            record_bytes=self.record_bytes,
            row_bytes=self.row_bytes,
            cell_rows_bytes=self.cell_rows_bytes,
        )

    @property
    def without_composites(self) -> Image:
        """What an image takes with `--no-composite`; the time is left as it was."""
        return dataclasses.replace(
            self.image, output_bytes=self.mask_bytes + self.cells_bytes, output_files=2
        )

    @property
    def driver(self) -> Driver:
        """What the driver does for an image of a local or shared folder."""
        return Driver(
            list_s=self.list_us / 1e6,
            hand_out_s=self.hand_out_us / 1e6,
            record_s=self.record_us / 1e6,
            table_s=self.table_us / 1e6,
        )


def load_figures(path: Path = FIGURES_PATH) -> Figures:
    """Read figures back."""
    return Figures(**json.loads(path.read_text(encoding="utf-8")))


def save_figures(figures: Figures, path: Path = FIGURES_PATH) -> None:
    """Keep figures."""
    path.write_text(json.dumps(asdict(figures), indent=2) + "\n", encoding="utf-8")
