"""Places a network on the devices of this machine, in the precision that suits each."""

from __future__ import annotations

import re
from collections.abc import Sequence

import numpy as np
import torch
from torch import nn

from bcseg_batch.errors import SettingsError
from bcseg_batch.segment.on_device import DevicePredictor
from bcseg_batch.segment.pattern import check_pattern
from bcseg_batch.segment.placement import Cores, Placement, available_cores
from bcseg_batch.segment.postprocess import probability
from bcseg_batch.segment.predictor import DTYPES, Predictor

# A low precision is used by itself only where it hardly moves the probabilities: bfloat16 keeps
# 8 bits, and over some twenty layers sound kernels stay well below this; broken ones do not.
_MAX_PROBABILITY_SHIFT = 0.05


def choose_placement(device: str, dtype: str) -> Placement:
    """Resolve `auto`, and refuse what this machine has not.

    Args:
        device: `auto`, `cpu`, `cuda`, `cuda:N` or `mps`.
        dtype: `auto`, `float32`, `bfloat16` or `float16`.

    Raises:
        SettingsError: there is no such device or precision, or not on this machine. Nothing is
            substituted for a device or precision that was asked for by name.
    """
    if not re.fullmatch(r"auto|cpu|mps|cuda(:\d+)?", device, re.ASCII):
        raise SettingsError(f"no device is called {device!r}: give auto, cpu, cuda, cuda:N or mps")
    if dtype != "auto" and dtype not in DTYPES:
        raise SettingsError(f"no precision is called {dtype!r}: give auto, {', '.join(DTYPES)}")
    chosen = _auto_device() if device == "auto" else device
    why_device = "first device found" if device == "auto" else "asked for"
    kind, _, index = chosen.partition(":")
    if kind == "cuda":
        count = torch.cuda.device_count()
        if int(index or 0) >= count:
            raise SettingsError(
                f"model.device is {device}, but torch finds {count} CUDA devices here: "
                "set another device, or auto"
            )
        chosen = f"cuda:{index or 0}"
    elif kind == "mps" and not torch.backends.mps.is_available():
        raise SettingsError(
            "model.device is mps, but torch finds no Metal device here: set another device, or auto"
        )
    if dtype == "auto":
        precision, why_dtype = _auto_dtype(kind)
    else:
        precision, why_dtype = dtype, "asked for"
    return Placement(chosen, precision, f"{chosen} ({why_device}), {precision} ({why_dtype})")


def _auto_device() -> str:
    if torch.cuda.is_available():
        return "cuda:0"
    return "mps" if torch.backends.mps.is_available() else "cpu"


def _auto_dtype(kind: str) -> tuple[str, str]:
    if kind == "cuda":
        if torch.cuda.is_bf16_supported(including_emulation=False):
            return "bfloat16", "the GPU computes in it"
        return "float16", "the GPU has no bfloat16"
    if kind == "mps":
        return "float32", "the safe choice on Metal"
    capabilities = torch.cpu.get_capabilities() if hasattr(torch.cpu, "get_capabilities") else {}
    if capabilities.get("avx512_bf16") or capabilities.get("amx_bf16"):
        return "bfloat16", "the processor has bfloat16 instructions"
    return "float32", "the processor has no bfloat16 instructions"


def open_predictor(
    model: nn.Module,
    input_size_px: int,
    *,
    device: str = "auto",
    dtype: str = "auto",
    cores: Cores | None = None,
) -> Predictor:
    """Place a network where it runs best, or where it was told to.

    A low precision that `auto` picks is held against float32 once, on a fixed pattern, and dropped
    where it moves a probability by more than 0.05: kernels have been wrong before.

    Args:
        model: maps (N, 3, S, S) to logits (N, C, S, S); stays as it is.
        input_size_px: S.
        device: `auto`, `cpu`, `cuda`, `cuda:N` or `mps`.
        dtype: `auto`, `float32`, `bfloat16` or `float16`.
        cores: as for `Predictor`.

    Raises:
        SettingsError: the device is not there.
        DeviceError: the device refuses the network.
    """
    placement = choose_placement(device, dtype)
    kind = Predictor if placement.device == "cpu" else DevicePredictor
    predictor = kind(model, placement, input_size_px, cores)
    if dtype != "auto" or placement.dtype == "float32":
        return predictor
    exact = kind(model, Placement(placement.device, "float32", "to compare"), input_size_px, cores)
    shift = probability_shift(exact, predictor)
    if shift <= _MAX_PROBABILITY_SHIFT:
        return predictor
    reason = (
        f"{placement.device}, float32 ({placement.dtype} moved a probability by {shift:.2f} here)"
    )
    exact.placement = Placement(placement.device, "float32", reason)
    return exact


def open_predictors(
    model: nn.Module, input_size_px: int, *, devices: Sequence[str] = ("auto",), dtype: str = "auto"
) -> list[Predictor]:
    """Place a network on one device or several, ready to be run by a thread each.

    On a processor of several cores two predictors share the cores and the weights; see `Cores`. On
    a GPU two share the weights, and one copies while the other computes.

    Args:
        model: as for `open_predictor`.
        input_size_px: S.
        devices: as for `open_predictor`, each once.
        dtype: as for `open_predictor`.

    Raises:
        SettingsError: a device is not there, or is named twice.
        DeviceError: a device refuses the network.
    """
    predictors: list[Predictor] = []
    for device in devices:
        predictor = open_predictor(model, input_size_px, device=device, dtype=dtype, cores=Cores())
        if any(predictor.placement.device == other.placement.device for other in predictors):
            raise SettingsError(
                f"model.devices names {predictor.placement.device} more than once: name each "
                "device once"
            )
        predictors.append(predictor)
        kind = predictor.placement.device.partition(":")[0]
        if kind == "cuda" or (kind == "cpu" and available_cores() > 1):
            predictors.append(predictor.twin())
    return predictors


def probability_shift(exact: Predictor, other: Predictor) -> float:
    """Measure how far two predictors of one network disagree.

    Args:
        exact: the one to go by.
        other: the one in question.

    Returns:
        Largest difference of a probability on a fixed pattern of ramps and waves, in [0, 1]; 1
        where one of them gives something that is not a number.
    """
    pattern = check_pattern(exact.input_size_px)
    difference = probability(exact.predict(pattern)) - probability(other.predict(pattern))
    return float(np.abs(difference).max()) if np.isfinite(difference).all() else 1.0
