"""Several predictors that share one queue: what is free takes the next batch."""

from __future__ import annotations

import contextlib
import queue
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

import numpy as np
import numpy.typing as npt
from loguru import logger

from bcseg_batch.errors import DeviceError
from bcseg_batch.segment.placement import (
    AnyPredictor,
    OutOfMemoryError,
    Placement,
    Segmented,
    TakesImages,
)

T = TypeVar("T")


class Lane:
    """One predictor, and what was learnt of its memory; used by one thread at a time.

    Args:
        predictor: runs the network.
        batch_size: images that it is given at once, until its memory turns out too small for them.
    """

    def __init__(self, predictor: AnyPredictor, batch_size: int) -> None:
        self._predictor = predictor
        self._batch_size = batch_size
        self._told = predictor.placement

    @property
    def placement(self) -> Placement:
        """Where the network runs."""
        return self._predictor.placement

    @property
    def batch_size(self) -> int:
        """Images that fit into the device's memory, as far as is known."""
        return self._batch_size

    def predict(self, batch: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
        """Run the network on at most `batch_size` images.

        Args:
            batch: float32 (N, 3, S, S) in [0, 1].

        Returns:
            float32 logits (N, C, S, S).

        Raises:
            OutOfMemoryError: not even one image fits.
            DeviceError: the device is lost.
            SmallerBatch: they do not fit, and `batch_size` is smaller now.
        """
        with self._learning(len(batch)):
            return self._predictor.predict(batch)

    def segment(
        self, images: Sequence[npt.NDArray[np.uint8]], threshold: float
    ) -> list[Segmented] | None:
        """Have at most `batch_size` images segmented whole, where the device does that.

        Args:
            images: uint8 (H, W, 3) RGB, each of its own size.
            threshold: a pixel is foreground where its probability is above it.

        Returns:
            One for each image; None where the device takes batches only.

        Raises:
            OutOfMemoryError, DeviceError, SmallerBatch: as for `predict`.
        """
        if not isinstance(self._predictor, TakesImages):
            return None
        with self._learning(len(images)):
            return self._predictor.segment(images, threshold)

    @contextlib.contextmanager
    def _learning(self, images: int) -> Iterator[None]:
        """Remember where the memory is too small for so many."""
        try:
            yield
            if self.placement != self._told:
                # Found out at work, such as that a network cannot be recorded.
                self._told = self.placement
                logger.warning("the network runs on {}", self.placement.reason)
        except OutOfMemoryError as error:
            if images == 1:
                raise
            self._batch_size = images // 2
            logger.warning(
                "{} has no memory for a batch of {}: going on with {}",
                self.placement.device,
                images,
                self._batch_size,
            )
            raise SmallerBatch from error


class SmallerBatch(Exception):  # noqa: N818 - no error: the same is tried again in parts
    """A batch was too large for its device's memory."""


class Lanes:
    """Runs work on whichever predictor is free, each in a thread of its own.

    A device that is lost is left out from then on, and its work goes to another; where there is no
    other, the error comes out.

    Args:
        predictors: one or more, of networks that are alike.
        batch_size: images that each is given at once.
    """

    def __init__(self, predictors: Sequence[AnyPredictor], batch_size: int) -> None:
        self._lanes = [Lane(predictor, batch_size) for predictor in predictors]
        self._idle: queue.SimpleQueue[Lane | None] = queue.SimpleQueue()
        for lane in self._lanes:
            self._idle.put(lane)
        self._lock = threading.Lock()
        self._lost: DeviceError | None = None
        self._pool: ThreadPoolExecutor | None = None

    def __len__(self) -> int:
        with self._lock:
            return len(self._lanes)

    def start(self) -> None:
        """Make the threads."""
        self._pool = ThreadPoolExecutor(max(1, len(self)), thread_name_prefix="bcseg-network")

    def stop(self) -> None:
        """Wait for what is running, drop what is not, and end the threads."""
        if self._pool is not None:
            self._pool.shutdown(wait=True, cancel_futures=True)
            self._pool = None

    def submit(self, work: Callable[[Lane], T]) -> Future[T]:
        """Have some work done by the next lane that is free.

        Args:
            work: does it; called again with another lane where the first one's device is lost.

        Returns:
            Its result, or the DeviceError of the last device.
        """
        assert self._pool is not None, "start() comes first"
        return self._pool.submit(self._run, work)

    def _run(self, work: Callable[[Lane], T]) -> T:
        while (lane := self._idle.get()) is not None:
            try:
                result = work(lane)
            except DeviceError as error:
                self._retire(lane, error)
            except BaseException:
                self._idle.put(lane)
                raise
            else:
                self._idle.put(lane)
                return result
        self._idle.put(None)  # for the next one that waits
        assert self._lost is not None, "lanes end by errors only"
        raise self._lost

    def _retire(self, lane: Lane, error: DeviceError) -> None:
        with self._lock:
            self._lanes.remove(lane)
            left = len(self._lanes)
            if not left:
                self._lost = error
        if left:
            logger.error("{}: going on with {} others", error, left)
        else:
            self._idle.put(None)
