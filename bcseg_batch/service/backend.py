"""Chooses what runs the network: torch, or OpenVINO on the processor; and says why."""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from loguru import logger

from bcseg_batch.errors import CheckpointError, DeviceError, SettingsError
from bcseg_batch.segment import openvino
from bcseg_batch.segment.model_file import sha256_of
from bcseg_batch.segment.placement import AnyPredictor, available_cores
from bcseg_batch.segment.quantised import Quantised, find_quantised, lacks_8_bits, quantised_path
from bcseg_batch.segment.spec import ModelSpec, read_spec

if TYPE_CHECKING:
    from bcseg_batch.segment.checkpoint import Checkpoint

_INSTALL = "pip install 'bcseg-batch[openvino]'"


@dataclass(frozen=True, slots=True)
class Network:
    """A model that is ready to run.

    Attributes:
        predictors: hold it on its devices; each may be run by a thread of its own.
        spec: what the model says of itself.
        sha256: of the model file.
        backend: what runs it, with the reason.
    """

    predictors: Sequence[AnyPredictor]
    spec: ModelSpec
    sha256: str
    backend: str


def open_network(path: Path, *, backend: str, devices: Sequence[str], dtype: str) -> Network:
    """Load a model, and place it where and how it runs best, or where and how it was told to.

    Args:
        path: the model file.
        backend: `auto`, `torch` or `openvino`.
        devices: `auto`, `cpu`, `cuda`, `cuda:N` or `mps`; several share the work.
        dtype: `auto`, `float32`, `bfloat16`, `float16` or `int8`.

    Raises:
        CheckpointError: the model cannot be loaded; no other is taken in its place.
        SettingsError: the choices do not go together, or something is not there.
        DeviceError: a device refuses the network.
    """
    if backend == "openvino" or dtype == "int8":
        _check_asked_for(backend, devices)
        quantised = find_quantised(path, sha256_of(path)) if dtype in {"auto", "int8"} else None
        if quantised is not None:
            return _in_8_bits(path, quantised, "asked for")
        if dtype == "int8":
            raise lacks_8_bits(path)
        return _converted(path, dtype)
    why_not = _why_not_8_bits(path, devices, dtype) if backend == "auto" else "asked for"
    if why_not is None:
        try:
            quantised = find_quantised(path, sha256_of(path))
            if quantised is not None:
                return _in_8_bits(path, quantised, "installed, and the model has an 8-bit form")
            why_not = "the model has no 8-bit form"
        except (CheckpointError, DeviceError) as error:
            logger.warning("{}: going on with torch", error)
            why_not = "the 8-bit form is of no use"
    return _by_torch(path, devices, dtype, why_not)


def _check_asked_for(backend: str, devices: Sequence[str]) -> None:
    """Refuse what OpenVINO, which was asked for, cannot do."""
    asked = "model.backend is openvino" if backend == "openvino" else "model.dtype is int8"
    if backend == "torch":
        raise SettingsError(
            "model.dtype is int8, which model.backend torch does not compute in: set one to auto"
        )
    if any(device not in {"auto", "cpu"} for device in devices):
        raise SettingsError(
            f"{asked}, which is for the processor, and the network is to run on "
            f"{', '.join(devices)}: set model.device to cpu"
        )
    if not openvino.is_installed():
        raise SettingsError(f"{asked}, but OpenVINO is not installed: {_INSTALL}")


def _why_not_8_bits(path: Path, devices: Sequence[str], dtype: str) -> str | None:
    """Say why auto does not look for an 8-bit form; None where it does."""
    if dtype != "auto":
        return "a precision is asked for"
    if list(devices) == ["auto"] and _may_have_gpu():
        return "OpenVINO is not for GPUs here"
    if list(devices) not in (["auto"], ["cpu"]):
        return "OpenVINO is for the processor"
    if not quantised_path(path).exists():
        return "the model has no 8-bit form"
    if not openvino.is_installed():
        return f"OpenVINO is not installed: {_INSTALL}"
    return None


def _may_have_gpu() -> bool:
    """Say whether torch has to be asked for a GPU, which takes it a second and more to answer."""
    if sys.platform == "darwin" or Path("/dev/kfd").exists():
        return True
    try:
        cuda = ctypes.CDLL("nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1")
        count = ctypes.c_int()
        answers = cuda.cuInit(0) == 0 and cuda.cuDeviceGetCount(ctypes.byref(count)) == 0
    except OSError:
        return False
    return bool(answers and count.value)


def _in_8_bits(path: Path, quantised: Quantised, why: str) -> Network:
    # A checkpoint of the original's layout says nothing of itself: its weights have to be read.
    spec = read_spec(path) if path.suffix == ".safetensors" else _load(path).spec
    if (spec.input_size_px, spec.out_channels) != (
        quantised.spec.input_size_px,
        quantised.spec.out_channels,
    ):
        raise CheckpointError(
            f"model file {quantised_path(path)} is of another shape than {path.name}: make it anew "
            "with bcseg-train quantize"
        )
    predictor = openvino.open_quantised(quantised, "cpu, int8")
    # Hashed before: the form is of this very file.
    sha256 = quantised.spec.checkpoint_sha256
    return Network(_lanes(predictor), spec, sha256, f"OpenVINO ({why})")


def _converted(path: Path, dtype: str) -> Network:
    from bcseg_batch.segment.devices import choose_placement  # noqa: PLC0415 - brings torch

    checkpoint = _load(path)
    placement = choose_placement("cpu", dtype)
    predictor = openvino.open_converted(
        checkpoint.model,
        checkpoint.spec.input_size_px,
        placement.dtype,
        placement.reason,
    )
    backend = "OpenVINO (asked for)"
    return Network(_lanes(predictor), checkpoint.spec, checkpoint.sha256, backend)


def _lanes(predictor: openvino.OpenVinoPredictor) -> list[AnyPredictor]:
    return [predictor, predictor.twin()] if available_cores() > 1 else [predictor]


def _by_torch(path: Path, devices: Sequence[str], dtype: str, why_not: str) -> Network:
    from bcseg_batch.segment.devices import open_predictors  # noqa: PLC0415 - brings torch

    checkpoint = _load(path)
    predictors = open_predictors(
        checkpoint.model, checkpoint.spec.input_size_px, devices=devices, dtype=dtype
    )
    return Network(predictors, checkpoint.spec, checkpoint.sha256, f"torch ({why_not})")


def _load(path: Path) -> Checkpoint:
    from bcseg_batch.segment.checkpoint import load_checkpoint  # noqa: PLC0415 - brings torch

    return load_checkpoint(path)
