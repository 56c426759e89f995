"""Runs a network on batches, on one device in one precision."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator
from typing import Self

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from bcseg_batch.errors import DeviceError
from bcseg_batch.segment.model import fold_normalisation
from bcseg_batch.segment.placement import Cores, OutOfMemoryError, Placement

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
"""Precisions that a network of torch runs in, by their names."""

# How allocators say it that raise a plain RuntimeError: Windows, Linux, Metal or a CUDA call, and
# oneDNN, which has no other word for it where the shapes are those that it took before.
_OUT_OF_MEMORY_SIGNS = (
    "not enough memory",
    "can't allocate memory",
    "out of memory",
    "could not create a memory object",
    "could not create a primitive",
)


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
        self._dtype = DTYPES[placement.dtype]
        if placement.dtype == "float32" and self._device.type == "cuda":
            # cuDNN would compute in TF32, of 10 bits, and call it float32.
            torch.backends.cudnn.allow_tf32 = False
        try:
            self._model = fold_normalisation(model).to(self._device, self._dtype)
            # By name: the overload that takes a memory format takes nothing else in torch's types.
            self._model = self._model.to(memory_format=torch.channels_last)
        except RuntimeError as error:
            raise DeviceError(f"{placement.device} refuses the network: {error}") from error

    def twin(self) -> Self:
        """Give a second predictor of the same weights, for a second thread."""
        return copy.copy(self)

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
        with self._explained(len(batch)), torch.inference_mode():
            if self._device.type == "cpu":
                return self._one_by_one(batch)
            return self._run(batch)

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

    def _run(self, batch: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
        return self._network(torch.from_numpy(batch).to(self._device)).cpu().numpy()

    def _network(self, batch: Tensor) -> Tensor:
        """Map float32 (N, 3, S, S) on the device to float32 logits (N, C, S, S), contiguous."""
        tensor = batch.to(dtype=self._dtype, memory_format=torch.channels_last)
        logits: Tensor = self._model(tensor)
        return logits.float().contiguous()

    @contextlib.contextmanager
    def _explained(self, images: int) -> Iterator[None]:
        """Turn torch's errors into those that say what to do.

        Raises:
            OutOfMemoryError: so many images do not fit; fewer may.
            DeviceError: the device is lost.
        """
        device = self.placement.device
        try:
            yield
        except torch.OutOfMemoryError as error:
            torch.cuda.empty_cache()
            raise OutOfMemoryError(f"{device} has no memory for {images} images") from error
        except RuntimeError as error:
            if any(sign in str(error) for sign in _OUT_OF_MEMORY_SIGNS):
                raise OutOfMemoryError(f"{device} has no memory for {images} images") from error
            if self._device.type == "cuda" and "CUDA error" in str(error):
                raise DeviceError(f"{device} is lost: {error}") from error
            raise
