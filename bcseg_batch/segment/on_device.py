"""Runs everything between a decoded image and its mask on a GPU, so that only bytes travel."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any, Self

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from bcseg_batch.segment.placement import Cores, OutOfMemoryError, Placement, Segmented
from bcseg_batch.segment.postprocess import MASK_FOREGROUND
from bcseg_batch.segment.predictor import Predictor
from bcseg_batch.segment.resample import resize_rgb, resize_soft

_WARM_UPS = 3

Run = Callable[[Tensor], Tensor]


class DevicePredictor(Predictor):
    """Holds a network on a GPU, and takes images as they are; one caller at a time.

    What goes over is the image's bytes, and what comes back its mask, the small image and the small
    soft map. Resizing, the network, the logistic function, enlarging and cutting stay there.
    Batches have one shape, for which CUDA records the network once as a graph. Copies are made from
    and to pinned memory in a stream of this predictor's own, so that a twin computes meanwhile.

    Args:
        model: as for `Predictor`.
        placement: likewise.
        input_size_px: S.
        cores: not used; a device's host thread mostly waits.

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
        super().__init__(model, placement, input_size_px, cores)
        self._begin()

    def _begin(self) -> None:
        """Make what no two predictors may share."""
        self._stream = None
        if self._device.type == "cuda":
            self._stream = torch.cuda.Stream(self._device)  # type: ignore[no-untyped-call]
        self._batch_size = 0
        self._recorded: tuple[int, Run] | None = None

    def twin(self) -> Self:
        """Give a second predictor of the same weights, for a second thread."""
        twin = super().twin()
        twin._begin()
        return twin

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
        with self._at_work(len(batch)):
            (logits,) = self._to_host([self._of_one_shape(self._to_device(batch))])
        return logits

    def segment(self, images: Sequence[npt.NDArray[np.uint8]], threshold: float) -> list[Segmented]:
        """Resize, predict, enlarge and cut.

        Args:
            images: uint8 (H, W, 3) RGB, each of its own size.
            threshold: a pixel is foreground where its probability is above it.

        Returns:
            One for each image, its mask of the image's size.

        Raises:
            OutOfMemoryError: they do not fit; fewer may.
            DeviceError: the device is lost.
        """
        with self._at_work(len(images)):
            thumbnails = torch.stack(
                [resize_rgb(self._to_device(image), self.input_size_px) for image in images]
            )
            logits = self._of_one_shape(thumbnails.permute(0, 3, 1, 2).to(torch.float32).div_(255))
            # An infinite logit would make a fine probability, and is none.
            soft = torch.where(logits.isfinite(), logits.sigmoid(), torch.nan)
            masks = [
                (resize_soft(one[0], image.shape[:2]) > threshold).to(torch.uint8) * MASK_FOREGROUND
                for one, image in zip(soft, images, strict=True)
            ]
            small, maps, *cut = self._to_host([thumbnails, soft, *masks])
        return [Segmented(*one) for one in zip(small, maps, cut, strict=True)]

    @contextlib.contextmanager
    def _at_work(self, images: int) -> Iterator[None]:
        stream = (
            contextlib.nullcontext() if self._stream is None else torch.cuda.stream(self._stream)
        )
        try:
            with self._explained(images), torch.inference_mode(), stream:
                yield
        except OutOfMemoryError:
            self._batch_size, self._recorded = 0, None  # the next one is smaller
            raise

    def _to_device(self, array: npt.NDArray[Any]) -> Tensor:
        tensor = torch.from_numpy(np.ascontiguousarray(array))
        if self._stream is None:
            return tensor.to(self._device)
        # From pinned memory a copy need not be waited for.
        return tensor.pin_memory().to(self._device, non_blocking=True)

    def _to_host(self, tensors: Sequence[Tensor]) -> list[npt.NDArray[Any]]:
        if self._stream is None:
            return [tensor.cpu().numpy() for tensor in tensors]
        copies = [torch.empty(t.shape, dtype=t.dtype, pin_memory=True) for t in tensors]
        for copy, tensor in zip(copies, tensors, strict=True):
            copy.copy_(tensor, non_blocking=True)
        self._stream.synchronize()
        return [copy.numpy() for copy in copies]

    def _of_one_shape(self, batch: Tensor) -> Tensor:
        """Run the network on a batch filled up to the largest so far.

        Kernels are chosen anew for each other shape, and a graph is for one.
        """
        images = len(batch)
        self._batch_size = max(self._batch_size, images)
        if images < self._batch_size:
            missing = batch.new_zeros((self._batch_size - images, *batch.shape[1:]))
            batch = torch.cat([batch, missing])
        if self._stream is None:
            return self._network(batch)[:images]
        if self._recorded is None or self._recorded[0] != self._batch_size:
            self._recorded = None  # its memory is free for the new one
            self._recorded = (self._batch_size, self._record(batch))
        return self._recorded[1](batch)[:images]

    def _record(self, batch: Tensor) -> Run:
        try:
            return record(self._network, batch)
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            # The same numbers, a little later: no reason to stop, but one that is told.
            why = f"without a CUDA graph: {str(error).partition(chr(10))[0]}"
            self.placement = replace(self.placement, reason=f"{self.placement.reason}; {why}")
            return self._network


def record(run: Run, example: Tensor) -> Run:
    """Record what a function does on a GPU, to have it done again by a single call.

    Args:
        run: does the same at each call, to tensors of one shape.
        example: such a tensor, on the device; its stream is the current one.

    Returns:
        Does the same as `run` in that stream; each call overwrites the result of the one before.

    Raises:
        RuntimeError: something in it cannot be recorded.
    """
    place = example.clone()
    stream = torch.cuda.current_stream(example.device)
    # The first calls choose kernels and make room to work in, which cannot be recorded.
    for _ in range(_WARM_UPS):
        run(place)
    stream.synchronize()
    graph = torch.cuda.CUDAGraph()
    # Only this thread is held to it: others go on copying and computing in streams of their own.
    with torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"):
        result = run(place)

    def again(batch: Tensor) -> Tensor:
        place.copy_(batch)
        graph.replay()
        return result

    return again
