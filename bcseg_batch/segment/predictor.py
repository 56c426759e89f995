"""Runs a network on batches, on one device in one precision."""

from __future__ import annotations

import copy
import re
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from bcseg_batch.errors import DeviceError, SettingsError
from bcseg_batch.segment.model import fold_normalisation
from bcseg_batch.segment.pattern import check_pattern
from bcseg_batch.segment.placement import Cores, OutOfMemoryError, Placement, available_cores
from bcseg_batch.segment.postprocess import probability

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}

# A low precision is used by itself only where it hardly moves the probabilities: bfloat16 keeps
# 8 bits, and over some twenty layers sound kernels stay well below this; broken ones do not.
_MAX_PROBABILITY_SHIFT = 0.05

# How allocators say it that raise a plain RuntimeError: Windows, Linux, Metal or a CUDA call, and
# oneDNN, which has no other word for it where the shapes are those that it took before.
_OUT_OF_MEMORY_SIGNS = (
    "not enough memory",
    "can't allocate memory",
    "out of memory",
    "could not create a memory object",
    "could not create a primitive",
)


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
    if dtype != "auto" and dtype not in _DTYPES:
        raise SettingsError(f"no precision is called {dtype!r}: give auto, {', '.join(_DTYPES)}")
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


class Predictor:
    """Holds a network on its device; one caller at a time.

    Args:
        model: a network that maps (N, 3, S, S) to logits (N, C, S, S). Batch normalisation is
            folded into its convolutions.
        placement: from `choose_placement`.
        input_size_px: S, the side of the network's square input.
        cores: shared with the other predictors on the processor; None leaves the number of threads
            as it is.

    Raises:
        DeviceError: the device refuses the network.
    """

    def __init__(
        self,
        model: nn.Module,
        placement: Placement,
        input_size_px: int,
        cores: Cores | None = None,
    ) -> None:
        self.placement = placement
        self.input_size_px = input_size_px
        self._cores = cores
        self._device = torch.device(placement.device)
        self._dtype = _DTYPES[placement.dtype]
        self._stream = self._new_stream()
        self._batch_size = 0
        if placement.dtype == "float32" and self._device.type == "cuda":
            # cuDNN would compute in TF32, of 10 bits, and call it float32.
            torch.backends.cudnn.allow_tf32 = False
        try:
            self._model = fold_normalisation(model).to(self._device, self._dtype)
            # By name: the overload that takes a memory format takes nothing else in torch's types.
            self._model = self._model.to(memory_format=torch.channels_last)
        except RuntimeError as error:
            raise DeviceError(f"{placement.device} refuses the network: {error}") from error

    def twin(self) -> Predictor:
        """Give a second predictor of the same weights, for a second thread.

        On a GPU it works in a stream of its own, so that one copies while the other computes.
        """
        twin = copy.copy(self)
        twin._stream = twin._new_stream()
        return twin

    def _new_stream(self) -> torch.cuda.Stream | None:
        if self._device.type != "cuda":
            return None
        return torch.cuda.Stream(self._device)  # type: ignore[no-untyped-call]  # it has no types

    def predict(self, batch: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
        """Run the network once.

        Args:
            batch: float32 (N, 3, S, S) in [0, 1].

        Returns:
            float32 logits (N, C, S, S).

        Raises:
            OutOfMemoryError: the batch does not fit; a smaller one may.
            DeviceError: the device is lost.
        """
        try:
            with torch.inference_mode():
                if self._device.type == "cpu":
                    return self._one_by_one(batch)
                return self._run(self._padded(batch))[: len(batch)]
        except torch.OutOfMemoryError as error:
            self._batch_size = 0  # the next one is smaller
            torch.cuda.empty_cache()
            raise OutOfMemoryError(
                f"{self.placement.device} has no memory for {len(batch)} images"
            ) from error
        except RuntimeError as error:
            if any(sign in str(error) for sign in _OUT_OF_MEMORY_SIGNS):
                self._batch_size = 0
                raise OutOfMemoryError(
                    f"{self.placement.device} has no memory for {len(batch)} images"
                ) from error
            if self._device.type == "cuda" and "CUDA error" in str(error):
                raise DeviceError(f"{self.placement.device} is lost: {error}") from error
            raise

    def _one_by_one(self, batch: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
        """Run a processor's batch image by image.

        It is as fast as the whole in a part of the memory, and the cores are split anew at each.
        """
        return np.concatenate([self._on_its_share(image) for image in np.split(batch, len(batch))])

    def _on_its_share(self, image: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
        if self._cores is None:
            return self._run(image)
        before = torch.get_num_threads()
        with self._cores.share() as threads:
            torch.set_num_threads(threads)
            try:
                return self._run(image)
            finally:
                torch.set_num_threads(before)

    def _padded(self, batch: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
        """Fill a batch up to the largest so far: kernels are chosen anew for each other shape."""
        self._batch_size = max(self._batch_size, len(batch))
        missing = self._batch_size - len(batch)
        if not missing:
            return batch
        return np.concatenate([batch, np.zeros((missing, *batch.shape[1:]), np.float32)])

    def _run(self, batch: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
        if self._stream is None:
            tensor = torch.from_numpy(batch).to(
                device=self._device, dtype=self._dtype, memory_format=torch.channels_last
            )
            logits: torch.Tensor = self._model(tensor)
            return logits.float().contiguous().cpu().numpy()
        with torch.cuda.stream(self._stream):
            # From pinned memory a copy need not be waited for, and a twin computes meanwhile.
            tensor = torch.from_numpy(batch).pin_memory().to(self._device, non_blocking=True)
            tensor = tensor.to(dtype=self._dtype, memory_format=torch.channels_last)
            on_device = self._model(tensor).float().contiguous()
            logits = torch.empty(on_device.shape, dtype=torch.float32, pin_memory=True)
            logits.copy_(on_device, non_blocking=True)
        self._stream.synchronize()
        return logits.numpy()


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
    predictor = Predictor(model, placement, input_size_px, cores)
    if dtype != "auto" or placement.dtype == "float32":
        return predictor
    exact = Predictor(
        model, Placement(placement.device, "float32", "to compare"), input_size_px, cores
    )
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
