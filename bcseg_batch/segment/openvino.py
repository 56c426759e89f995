"""Runs a network through OpenVINO on the processor: in 8 bits, or in its own precision."""

from __future__ import annotations

import importlib.util
import logging
import sys
from typing import TYPE_CHECKING, Self

import numpy as np
import numpy.typing as npt

from bcseg_batch.errors import CheckpointError, DeviceError, SettingsError
from bcseg_batch.segment.pattern import check_pattern
from bcseg_batch.segment.placement import (
    AnyPredictor,
    Cores,
    OutOfMemoryError,
    Placement,
    available_cores,
)
from bcseg_batch.segment.postprocess import probability
from bcseg_batch.segment.quantised import PATTERN_STRIDE, Quantised

if TYPE_CHECKING:
    import openvino
    from torch import nn

# OpenVINO starts its telemetry when it is imported, and sends what it likes unasked; without the
# package it does without. Nothing here may reach for the network, or write to the home folder.
sys.modules.setdefault("openvino_telemetry", None)  # type: ignore[arg-type]  # as import takes it

# How much further the probabilities may move than where the 8-bit form was made, on average:
# rounding differs by a thousandth from one processor to another, and kernels that are not right
# (saturated sums where the instructions are missing) move all of them.
_MAX_FURTHER_SHIFT = 0.02
_PRECISIONS = {"float32": "f32", "bfloat16": "bf16", "int8": "f32"}


def is_installed() -> bool:
    """Say whether OpenVINO is there, without loading it."""
    return importlib.util.find_spec("openvino") is not None


class OpenVinoPredictor:
    """Holds a network that OpenVINO has compiled for the processor; one caller at a time.

    Args:
        network: a graph from float32 (1, 3, S, S) to float32 logits (1, C, S, S).
        placement: on the processor, in the precision that the network has.
        input_size_px: S.
        cores: shared with the other predictors on the processor.

    Raises:
        DeviceError: OpenVINO cannot compile the network.
    """

    def __init__(
        self,
        network: openvino.Model,
        placement: Placement,
        input_size_px: int,
        cores: Cores | None = None,
    ) -> None:
        import openvino  # noqa: PLC0415 - an extra

        self.placement = placement
        self.input_size_px = input_size_px
        self._cores = cores or Cores()
        network.reshape([1, 3, input_size_px, input_size_px])
        core = openvino.Core()
        options = {
            # The threads are ours to spread: bound to cores they would lie upon the workers'.
            "ENABLE_CPU_PINNING": False,
            "INFERENCE_PRECISION_HINT": _PRECISIONS[placement.dtype],
        }
        try:
            # One form for a network that runs alone, and one for two at a time; a form takes
            # threads of its own, but none of its time while the other runs.
            self._forms = [
                core.compile_model(
                    network,
                    "CPU",
                    {
                        **options,
                        "NUM_STREAMS": lanes,
                        "INFERENCE_NUM_THREADS": max(lanes, available_cores()),
                    },
                )
                for lanes in (1, 2)
            ]
        except RuntimeError as error:
            raise DeviceError(f"OpenVINO refuses the network: {error}") from error
        self._make_requests()

    def twin(self) -> Self:
        """Give a second predictor of the same weights, for a second thread."""
        twin = object.__new__(type(self))
        twin.__dict__.update(self.__dict__)
        twin._make_requests()
        return twin

    def _make_requests(self) -> None:
        self._alone, self._shared = (form.create_infer_request() for form in self._forms)

    def predict(self, batch: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
        """Run the network, image by image.

        Args:
            batch: float32 (N, 3, S, S) in [0, 1].

        Returns:
            float32 logits (N, C, S, S).

        Raises:
            OutOfMemoryError: there is no memory for it.
        """
        logits = []
        for image in np.split(batch, len(batch)):
            with self._cores.share() as threads:
                request = self._alone if threads == self._cores.count else self._shared
                try:
                    (answer,) = request.infer([image]).values()
                except (RuntimeError, MemoryError) as error:
                    if isinstance(error, MemoryError) or "alloc" in str(error):
                        raise OutOfMemoryError(
                            f"there is no memory for {len(batch)} images"
                        ) from error
                    raise
                logits.append(np.array(answer, np.float32))  # the request keeps its own
        return np.concatenate(logits)


def open_quantised(quantised: Quantised, reason: str) -> OpenVinoPredictor:
    """Open the 8-bit form of a network, and hold it against what float32 says of a pattern.

    Args:
        quantised: from `read_quantised`.
        reason: why this backend and this precision, for the log.

    Raises:
        CheckpointError: OpenVINO cannot read it.
        DeviceError: OpenVINO cannot run it, or this processor computes something else.
    """
    import openvino  # noqa: PLC0415 - an extra

    try:
        network = openvino.Core().read_model(quantised.graph, quantised.constants)
    except RuntimeError as error:
        raise CheckpointError(
            f"the 8-bit network cannot be read by OpenVINO {openvino.__version__} ({error}): make "
            "it anew with bcseg-train quantize"
        ) from error
    predictor = OpenVinoPredictor(
        network, Placement("cpu", "int8", reason), quantised.spec.input_size_px
    )
    shift = mean_shift(predictor, quantised)
    if not shift <= quantised.spec.mean_shift + _MAX_FURTHER_SHIFT:  # also where it is no number
        raise DeviceError(
            f"8 bits move the probabilities by {shift:.3f} on average on this processor, and by "
            f"{quantised.spec.mean_shift:.3f} where they were made: set model.backend to torch"
        )
    return predictor


def mean_shift(predictor: AnyPredictor, quantised: Quantised) -> float:
    """Say how far a predictor's probabilities for the pattern lie from float32's, on average."""
    return float(np.abs(pattern_answer(predictor) - quantised.answer).mean())


def pattern_answer(predictor: AnyPredictor) -> npt.NDArray[np.float32]:
    """Give a predictor's probabilities for the pattern: float32 (C, s, s), as `Quantised` has."""
    logits = predictor.predict(check_pattern(predictor.input_size_px))[0]
    return np.ascontiguousarray(probability(logits[:, ::PATTERN_STRIDE, ::PATTERN_STRIDE]))


def open_converted(
    model: nn.Module, input_size_px: int, dtype: str, reason: str
) -> OpenVinoPredictor:
    """Convert a network of torch in memory, and open it.

    Args:
        model: maps (N, 3, S, S) to logits (N, C, S, S); stays as it is.
        input_size_px: S.
        dtype: `float32` or `bfloat16`.
        reason: for the log.

    Raises:
        SettingsError: OpenVINO does not compute in this precision on a processor.
        DeviceError: OpenVINO refuses the network.
    """
    if dtype not in {"float32", "bfloat16"}:
        raise SettingsError(
            f"model.dtype is {dtype}, which OpenVINO does not compute in on a processor: set "
            "auto, int8, float32 or bfloat16"
        )
    network = convert(model, input_size_px)
    return OpenVinoPredictor(network, Placement("cpu", dtype, reason), input_size_px)


def convert(model: nn.Module, input_size_px: int) -> openvino.Model:
    """Turn a network of torch into a graph of OpenVINO, its normalisation folded.

    Args:
        model: maps (N, 3, S, S) to logits (N, C, S, S); stays as it is.
        input_size_px: S.

    Returns:
        A graph for batches of one.
    """
    import torch  # noqa: PLC0415 - heavy, and not needed for a quantised network
    from openvino.frontend import FrontEndManager  # noqa: PLC0415 - an extra
    from openvino.frontend.pytorch.fx_decoder import TorchFXPythonDecoder  # noqa: PLC0415

    from bcseg_batch.segment.model import fold_normalisation  # noqa: PLC0415 - brings torch

    # Not by openvino.convert_model, which tells its maker of each conversion over the network.
    example = torch.zeros(1, 3, input_size_px, input_size_px)
    program = torch.export.export(fold_normalisation(model), (example,))
    disabled = logging.root.manager.disable
    logging.disable(logging.WARNING)  # it warns of operations that this version of torch has not
    try:
        decoder = TorchFXPythonDecoder.from_exported_program(program)
    finally:
        logging.disable(disabled)
    frontend = FrontEndManager().load_by_framework("pytorch")
    network = frontend.convert(frontend.load(decoder))
    network.reshape([1, 3, input_size_px, input_size_px])
    return network
