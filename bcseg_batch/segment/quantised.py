"""The file of a network in 8 bits: OpenVINO's form of it, wrapped so that nothing goes unnoticed.

It lies beside the checkpoint that it was made from, and is of use with that one only: names,
threshold and statistics stay in the checkpoint. The file is a safetensors file with the graph (XML,
compressed) and its constants as bytes, what the network in float32 says of a fixed pattern, and a
header that names the checkpoint by its hash.
"""

from __future__ import annotations

import hashlib
import zlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from bcseg_batch.errors import CheckpointError
from bcseg_batch.segment.model_file import damaged, problems_of, write_model_file
from bcseg_batch.version import __version__

SUFFIX = ".int8.safetensors"
PATTERN_STRIDE = 8
"""Of the answer to the pattern every eighth row and column is kept."""

_HEADER_KEY = "bcseg_int8"


class QuantisedSpec(BaseModel):
    """What a quantised network says of itself.

    Attributes:
        checkpoint_sha256: of the file it was made from.
        input_size_px: side of the square input.
        out_channels: channels of the logits.
        constants_sha256: of the constants' bytes.
        mean_shift: how far its probabilities for the pattern lay from float32's where it was made,
            on average, in [0, 1].
        calibration_images: how many images its ranges were taken from.
        made_by: the programs that made it, with their versions.
        package_version: of the package that wrote the file.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    checkpoint_sha256: str = Field(pattern=r"^[0-9a-f]{64}$")
    input_size_px: int = Field(ge=64, le=4096)
    out_channels: int = Field(ge=1, le=16)
    constants_sha256: str = Field(pattern=r"^[0-9a-f]{64}$")
    mean_shift: float = Field(ge=0, le=1)
    calibration_images: int = Field(ge=1)
    made_by: str = ""
    package_version: str = __version__


@dataclass(frozen=True, slots=True)
class Quantised:
    """A network in 8 bits, as it lies on disk.

    Attributes:
        spec: its description.
        graph: XML in UTF-8.
        constants: the graph's constants.
        answer: float32 (C, s, s) in [0, 1]: the probabilities that the network in float32 gives for
            `check_pattern`, at every eighth row and column.
    """

    spec: QuantisedSpec
    graph: bytes
    constants: bytes
    answer: npt.NDArray[np.float32]


def quantised_path(checkpoint: Path) -> Path:
    """Say where the 8-bit form of a checkpoint lies: beside it."""
    return checkpoint.with_suffix(SUFFIX)


def read_quantised(path: Path) -> Quantised:
    """Read a quantised network.

    Raises:
        CheckpointError: missing, damaged, or no such file.
    """
    try:
        with safe_open(path, framework="numpy") as file:
            header: dict[str, str] = file.metadata() or {}
            found = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a dict
    except (SafetensorError, OSError) as error:
        raise damaged(path, error) from error
    try:
        spec = QuantisedSpec.model_validate_json(header[_HEADER_KEY])
        graph = zlib.decompress(found["graph"].tobytes())
        constants = found["constants"].tobytes()
        answer = found["answer"].astype(np.float32)
    except KeyError as error:
        raise CheckpointError(
            f"model file {path} is no 8-bit form of a network (it has no {error}): make one with "
            "bcseg-train quantize"
        ) from error
    except ValidationError as error:
        raise CheckpointError(
            f"model file {path} describes itself wrongly: {problems_of(error)}"
        ) from error
    except zlib.error as error:
        raise _damaged(path) from error
    side = -(-spec.input_size_px // PATTERN_STRIDE)
    if hashlib.sha256(constants).hexdigest() != spec.constants_sha256 or answer.shape != (
        spec.out_channels,
        side,
        side,
    ):
        raise _damaged(path)
    return Quantised(spec, graph, constants, answer)


def _damaged(path: Path) -> CheckpointError:
    return CheckpointError(f"model file {path} is damaged: make it anew with bcseg-train quantize")


def find_quantised(checkpoint: Path, checkpoint_sha256: str) -> Quantised | None:
    """Read the 8-bit form of a model where it has one.

    Args:
        checkpoint: the model file.
        checkpoint_sha256: of its bytes.

    Raises:
        CheckpointError: it is damaged, or of another model.
    """
    path = quantised_path(checkpoint)
    if not path.exists():
        return None
    quantised = read_quantised(path)
    if quantised.spec.checkpoint_sha256 != checkpoint_sha256:
        raise CheckpointError(
            f"model file {path} was made from another model than {checkpoint.name}: make it anew "
            "with bcseg-train quantize, or remove it"
        )
    return quantised


def lacks_8_bits(checkpoint: Path) -> CheckpointError:
    """Give the error of a model whose 8-bit form is asked for and missing."""
    return CheckpointError(
        f"the model has no 8-bit form {quantised_path(checkpoint)}: make one with bcseg-train "
        "quantize"
    )


def save_quantised(path: Path, quantised: Quantised) -> None:
    """Write a quantised network; it appears under its name only when it is whole.

    Raises:
        OutputError: the file cannot be written.
    """
    data = save(
        {
            "graph": np.frombuffer(zlib.compress(quantised.graph, 9), np.uint8),
            "constants": np.frombuffer(quantised.constants, np.uint8),
            "answer": quantised.answer.astype(np.float16),
        },
        metadata={_HEADER_KEY: quantised.spec.model_dump_json()},
    )
    write_model_file(path, data)
