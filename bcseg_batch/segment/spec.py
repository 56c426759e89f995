"""What a model says of itself in the header of its file; read without any network library."""

from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator
from safetensors import SafetensorError, safe_open

from bcseg_batch.errors import CheckpointError
from bcseg_batch.segment.model_file import damaged, problems_of
from bcseg_batch.segment.quality import TrainingStatistics
from bcseg_batch.version import __version__

if TYPE_CHECKING:
    from bcseg_batch.segment.model import UNet

Norm = Literal["none", "batch", "group"]

# The header key under which the description lies, as one JSON text.
HEADER_KEY = "bcseg"


class ModelSpec(BaseModel):
    """Everything needed to build the network and to feed it as it was trained.

    Attributes:
        architecture: always `unet`.
        in_channels: channels of the input.
        out_channels: channels of the logits.
        width: channels of the first encoder step.
        depth: encoder steps.
        norm: normalisation after each 3x3 convolution.
        input_size_px: side of the square input, a multiple of 2 ** depth.
        pixel_scaling: always `0..1`: 8-bit values divided by 255.
        threshold: probability above which a pixel is a cell, in (0, 1).
        class_names: one name for each logit channel.
        training_data: what it was trained on, in words.
        training_statistics: how the training images look, where that was measured.
        metrics: what was measured on data that was not trained on.
        created: ISO 8601 date of making.
        package_version: of the package that wrote the file.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    architecture: str = Field(default="unet", pattern="^unet$")
    in_channels: int = Field(default=3, ge=3, le=3)
    out_channels: int = Field(default=1, ge=1, le=16)
    width: int = Field(default=64, ge=1, le=512)
    depth: int = Field(default=4, ge=1, le=6)
    norm: Norm = "none"
    input_size_px: int = Field(default=512, ge=64, le=4096)
    pixel_scaling: str = Field(default="0..1", pattern=r"^0\.\.1$")
    threshold: float = Field(default=0.5, gt=0, lt=1)
    class_names: tuple[str, ...] = ("cell",)
    training_data: str = ""
    training_statistics: TrainingStatistics | None = None
    metrics: dict[str, float] = {}
    created: str = Field(default_factory=lambda: datetime.now(UTC).isoformat(timespec="seconds"))
    package_version: str = __version__

    @model_validator(mode="after")
    def _must_fit_together(self) -> Self:
        if self.input_size_px % 2**self.depth:
            raise ValueError(
                f"input_size_px is {self.input_size_px}, which {self.depth} encoder steps cannot "
                f"halve: it has to be a multiple of {2**self.depth}"
            )
        if len(self.class_names) != self.out_channels:
            raise ValueError(
                f"class_names has {len(self.class_names)} names for {self.out_channels} output "
                "channels"
            )
        return self

    def build(self) -> UNet:
        """Make the network this describes, with fresh weights."""
        from bcseg_batch.segment.model import UNet  # noqa: PLC0415 - brings all of torch

        return UNet(self.in_channels, self.out_channels, self.width, self.depth, self.norm)


def read_spec(path: Path) -> ModelSpec:
    """Read the description of a safetensors file, and none of its weights.

    Raises:
        CheckpointError: missing, damaged, or not written by bcseg-train.
    """
    try:
        with safe_open(path, framework="numpy") as file:
            header: dict[str, str] = file.metadata() or {}
    except (SafetensorError, OSError) as error:
        raise damaged(path, error) from error
    if HEADER_KEY not in header:
        raise CheckpointError(
            f"model file {path} has no bcseg description in its header: it was not written by "
            "bcseg-train"
        )
    try:
        return ModelSpec.model_validate_json(header[HEADER_KEY])
    except ValidationError as error:
        raise CheckpointError(
            f"model file {path} describes itself wrongly: {problems_of(error)}"
        ) from error
