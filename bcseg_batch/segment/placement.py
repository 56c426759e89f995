"""Where a network runs, and what it shares there; without the weight of any network library."""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import numpy as np
import numpy.typing as npt

from bcseg_batch.errors import DeviceError


class OutOfMemoryError(DeviceError):
    """The batch does not fit the device; a smaller one may."""


@dataclass(frozen=True, slots=True)
class Placement:
    """Where and how the network runs, with the reason of each choice for the log.

    Attributes:
        device: such as `cpu` or `cuda:0`.
        dtype: `float32`, `bfloat16` or `float16`.
        reason: one sentence that says why this device and this precision.
    """

    device: str
    dtype: str
    reason: str


class AnyPredictor(Protocol):
    """Runs a network, by whatever means; one caller at a time."""

    @property
    def placement(self) -> Placement:
        """Where and how the network runs."""
        ...

    @property
    def input_size_px(self) -> int:
        """S, the side of the network's square input."""
        ...

    def predict(self, batch: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
        """Map float32 (N, 3, S, S) in [0, 1] to float32 logits (N, C, S, S)."""
        ...


@dataclass(frozen=True, slots=True)
class Segmented:
    """What the network says of one image.

    Attributes:
        thumbnail: uint8 (S, S, 3) RGB, the image stretched to the network's input.
        soft: float32 (C, S, S) in [0, 1]; not a number where the network gave none.
        mask: uint8 (H, W), 0 or 255, of the size of the image, where the device has made it.
    """

    thumbnail: npt.NDArray[np.uint8]
    soft: npt.NDArray[np.float32]
    mask: npt.NDArray[np.uint8] | None = None


@runtime_checkable
class TakesImages(AnyPredictor, Protocol):
    """Does on its device what comes before the network and after it, too."""

    def segment(self, images: Sequence[npt.NDArray[np.uint8]], threshold: float) -> list[Segmented]:
        """Map uint8 (H, W, 3) RGB, each of its own size, to what is in them, masks included."""
        ...


class Cores:
    """Splits the processor's cores among the networks that run on it at the moment.

    Two networks of one thread each finish a tenth earlier than one of two threads, which wait for
    one another at every layer, all the more where decoding takes a core from one of them. A network
    that runs alone takes all.

    Args:
        count: cores that this process may use; None asks the system.

    Attributes:
        count: the same.
    """

    def __init__(self, count: int | None = None) -> None:
        self.count = count or available_cores()
        self._running = 0
        self._lock = threading.Lock()

    @contextlib.contextmanager
    def share(self) -> Iterator[int]:
        """Run a network meanwhile.

        Yields:
            How many threads it should take.
        """
        with self._lock:
            self._running += 1
            threads = max(1, self.count // self._running)
        try:
            yield threads
        finally:
            with self._lock:
                self._running -= 1


_limit: int | None = None


def limit_cores(count: int) -> None:
    """Let this process count on no more cores, where it shares its machine with others.

    Args:
        count: at least 1.
    """
    global _limit  # noqa: PLW0603 - of the process, as its cores are
    _limit = count


def available_cores() -> int:
    """Count the cores that this process may run on, `limit_cores` heeded."""
    cores = _system_cores()
    return cores if _limit is None else max(1, min(cores, _limit))


def _system_cores() -> int:
    if hasattr(os, "sched_getaffinity"):
        return max(1, len(os.sched_getaffinity(0)))
    return max(1, os.cpu_count() or 1)
