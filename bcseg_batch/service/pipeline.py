"""The one seam: files in, outcomes out, with everything between them overlapped and bounded."""

from __future__ import annotations

import os
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from typing import Any, Protocol

import cv2
import numpy as np
import numpy.typing as npt
from loguru import logger

from bcseg_batch.errors import (
    DeviceError,
    ImageChangedError,
    ImageError,
    OutputError,
    PredictionError,
    UnsupportedImageError,
)
from bcseg_batch.items import InputFile, Outcome, Status
from bcseg_batch.segment.postprocess import (
    blend_table,
    composite_image,
    mask_from_probability,
    mean_confidence,
    probability,
)
from bcseg_batch.segment.predictor import OutOfMemoryError, Placement
from bcseg_batch.segment.preprocess import preprocess
from bcseg_batch.service.batching import Batcher
from bcseg_batch.store.encode import encode_jpeg, encode_png
from bcseg_batch.store.images import DecodedImage, decode_image
from bcseg_batch.store.names import composite_path, mask_path
from bcseg_batch.store.outputs import OutputFolder
from bcseg_batch.version import __version__


class BatchPredictor(Protocol):
    """What the pipeline asks of a predictor; `segment.predictor.Predictor` is one."""

    placement: Placement
    input_size_px: int

    def predict(self, batch: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
        """Map float32 (N, 3, S, S) in [0, 1] to float32 logits (N, C, S, S)."""
        ...


Observe = Callable[[str, float, int], None]


class Names(Protocol):
    """Says which output name an input owns; `store.names.OutputNames` is one."""

    def claim(self, image: str) -> str:
        """Give the input's output name without its ending, the same each time."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class PipelineOptions:
    """Everything that decides what the outputs look like, and how much is done at once.

    Attributes:
        threshold: a pixel is foreground where its probability is above it.
        batch_size: images the network takes at once.
        workers: threads that decode and write.
        max_wait_s: how long a partial batch waits for company where the feed ticks.
        max_pixels: larger images are refused.
        page: of a file with several images, counted from 0.
        composite_format: `jpg` or `png`.
        composite_quality: of the JPEG, 1..100.
        colour: RGB laid over the cells.
        alpha: its opacity in [0, 1].
        model_sha256: for the record.
        settings_sha256: for the record.
    """

    threshold: float
    batch_size: int
    workers: int
    max_wait_s: float
    max_pixels: int
    page: int
    composite_format: str
    composite_quality: int
    colour: tuple[int, int, int]
    alpha: float
    model_sha256: str
    settings_sha256: str


@dataclass(frozen=True, slots=True)
class _Prepared:
    """An image on its way: decoded, and as the network wants it."""

    file: InputFile
    name: str
    started_s: float
    decoded: DecodedImage
    tensor: npt.NDArray[np.float32]


class Pipeline:
    """Decodes, predicts and writes, each image at its own pace, the network never waiting long.

    Args:
        predictor: runs the network; called from the thread that iterates, and from no other.
        outputs: where masks and composites go.
        names: which input owns which output name.
        options: the rest.
        observe: told of each stage (`decode`, `network`, `write`) how many seconds it took for how
            many images; called from any thread.
        expects_company: asked, at a tick, whether more files may come within `max_wait_s`; where
            they cannot, a partial batch does not wait for them.
    """

    def __init__(
        self,
        predictor: BatchPredictor,
        outputs: OutputFolder,
        names: Names,
        options: PipelineOptions,
        *,
        observe: Observe = lambda _stage, _seconds, _images: None,
        expects_company: Callable[[], bool] = lambda: True,
    ) -> None:
        self._observe = observe
        self.expects_company = expects_company
        self._batches = 0
        self._predictor = predictor
        self._outputs = outputs
        self.names = names
        self.options = options
        self._table = blend_table(options.colour, options.alpha)
        self._safe_batch_size = options.batch_size
        # The workers are the parallelism; threads of OpenCV's own would only get in their way.
        cv2.setNumThreads(1)

    def process(self, files: Iterable[InputFile | None]) -> Iterator[Outcome]:
        """Process files as they come and give an outcome for each, roughly in their order.

        Files are drawn only as fast as outcomes are taken: at most two batches wait before the
        network and two behind it, however many files there are. The outputs of an outcome are on
        disk when it is given out; to record it is the caller's part.

        Args:
            files: inputs; None is a tick: nothing new at the moment, hand on what has waited long
                enough. A feed that may block for long has to tick, one that ends need not.

        Yields:
            One outcome per file.

        Raises:
            OutputError: outputs cannot be written; files without an outcome are not done.
            DeviceError: the device is lost, or too small for one image.
        """
        with _Flow(self, files) as flow:
            while flow.busy:
                flow.take_in()
                # The network's turn comes first: decoding is waited for only where it is idle.
                yield from flow.collect()
                yield from flow.predict()
                yield from flow.give_out()
                flow.rest()

    def prepare(self, file: InputFile, name: str) -> _Prepared:
        """Decode an image and stretch it to the network's input; runs in a worker.

        Raises:
            ImageError: this image cannot be used.
        """
        started_s = time.monotonic()
        decoded = decode_image(
            file.path, max_pixels=self.options.max_pixels, page=self.options.page
        )
        tensor = preprocess(decoded.pixels, self._predictor.input_size_px)
        self._note("decode", started_s, image=file.image)
        return _Prepared(file, name, started_s, decoded, tensor)

    def predict(
        self, items: list[_Prepared]
    ) -> Iterator[Outcome | tuple[_Prepared, npt.NDArray[np.float32]]]:
        """Run the network; where a batch fails, find the image that makes it fail."""
        position = 0
        while position < len(items):
            part = items[position : position + self._safe_batch_size]
            started_s = time.monotonic()
            try:
                logits = self._predictor.predict(np.stack([item.tensor for item in part]))
            except OutOfMemoryError:
                if len(part) == 1:
                    raise
                self._safe_batch_size = len(part) // 2
                logger.warning(
                    "{} has no memory for a batch of {}: going on with {}",
                    self._predictor.placement.device,
                    len(part),
                    self._safe_batch_size,
                )
                continue
            except DeviceError:
                raise
            except Exception as error:  # noqa: BLE001 - one image must not cost its neighbours
                if len(part) == 1:
                    yield self.failure(part[0].file, error)
                else:
                    logger.warning(
                        "a batch of {} failed ({!r}): trying its images one by one",
                        len(part),
                        error,
                    )
                    for item in part:
                        yield from self.predict([item])
            else:
                self._batches += 1
                self._note("network", started_s, images=len(part))
                yield from zip(part, logits, strict=True)
            position += len(part)

    def finish(self, item: _Prepared, logits: npt.NDArray[np.float32]) -> Outcome:
        """Make mask and composite and write them; runs in a worker.

        Args:
            item: the image.
            logits: float32 (C, S, S), channel 0 is "cell".

        Raises:
            OutputError: nothing can be written.
            ImageError: this image's outputs cannot be made.
        """
        if not np.isfinite(logits).all():
            raise PredictionError(
                f"{item.file.image!r}: the network gave values that are not numbers: "
                "run it in float32"
            )
        started_s = time.monotonic()
        options = self.options
        pixels = item.decoded.pixels
        soft = probability(logits[0])
        mask = mask_from_probability(soft, pixels.shape[:2], options.threshold)
        composite = composite_image(pixels, mask, self._table)
        if options.composite_format == "png":
            encoded = encode_png(composite)
        else:
            try:
                encoded = encode_jpeg(composite, quality=options.composite_quality)
            except UnsupportedImageError as error:
                raise UnsupportedImageError(f"{item.file.image!r}: {error}") from error
        mask_file = mask_path(item.name)
        composite_file = composite_path(item.name, options.composite_format)
        # The longer name first: where it is refused, no mask is left without a record.
        self._outputs.write(composite_file, encoded)
        self._outputs.write(mask_file, encode_png(mask))
        self._note("write", started_s, image=item.file.image)
        return replace(
            self._outcome(item.file, Status.DONE),
            notes=item.decoded.notes,
            width_px=pixels.shape[1],
            height_px=pixels.shape[0],
            foreground_fraction=round(cv2.countNonZero(mask) / mask.size, 6),
            mean_confidence=round(mean_confidence(soft), 6),
            sha256=item.decoded.sha256,
            size_bytes=item.decoded.size_bytes,
            mtime_ns=item.decoded.mtime_ns,
            mask=mask_file,
            composite=composite_file,
            seconds=round(time.monotonic() - item.started_s, 3),
        )

    def _note(
        self, stage: str, started_s: float, *, image: str | None = None, images: int = 1
    ) -> None:
        """Tell figures and log how long a stage took."""
        seconds = time.monotonic() - started_s
        self._observe(stage, seconds, images)
        logger.bind(
            stage=stage, image=image, batch=self._batches or None, ms=round(1000 * seconds)
        ).debug("{} of {} in {:.3f} s", stage, repr(image) if image else images, seconds)

    def failure(self, file: InputFile, error: Exception) -> Outcome:
        """Turn whatever went wrong with one image into its outcome."""
        status = Status.SKIPPED if isinstance(error, ImageChangedError) else Status.FAILED
        if not isinstance(error, ImageError):
            logger.opt(exception=error).error("{!r}: a bug in this program", file.image)
        return replace(self._outcome(file, status), error=f"{type(error).__name__}: {error}")

    def _outcome(self, file: InputFile, status: Status) -> Outcome:
        return Outcome(
            image=file.image,
            status=status,
            size_bytes=file.size_bytes,
            mtime_ns=file.mtime_ns,
            model_sha256=self.options.model_sha256,
            settings_sha256=self.options.settings_sha256,
            version=__version__,
            device=self._predictor.placement.device,
            dtype=self._predictor.placement.dtype,
            finished_at=datetime.now(UTC).isoformat(timespec="milliseconds"),
        )


class _Flow:
    """What is where between the feed and the outcomes, during one `Pipeline.process`.

    Three queues, each bounded: images being decoded, decoded ones that wait for the network, and
    those being written. Only the thread that iterates touches them; workers see single images.
    """

    def __init__(self, pipeline: Pipeline, files: Iterable[InputFile | None]) -> None:
        options = pipeline.options
        self._pipeline = pipeline
        self._window = 2 * options.batch_size
        self._source = iter(files)
        self._open = True
        self._ticked = False
        self._preparing: deque[tuple[InputFile, Future[_Prepared]]] = deque()
        self._waiting: Batcher[_Prepared] = Batcher(
            options.batch_size, options.max_wait_s, clock=time.monotonic
        )
        self._finishing: deque[tuple[InputFile, Future[Outcome]]] = deque()
        self._pool = ThreadPoolExecutor(options.workers, thread_name_prefix="bcseg-worker")

    def __enter__(self) -> _Flow:
        return self

    def __exit__(self, *_: object) -> None:
        self._pool.shutdown(wait=True, cancel_futures=True)

    @property
    def busy(self) -> bool:
        """Whether anything is under way or may still come."""
        return bool(self._open or self._preparing or len(self._waiting) or self._finishing)

    def take_in(self) -> None:
        """Draw files from the feed while there is room, or until it ticks or ends."""
        self._ticked = False
        while self._open and len(self._preparing) + len(self._waiting) < self._window:
            try:
                file = next(self._source)
            except StopIteration:
                self._open = False
                return
            if file is None:
                self._ticked = True
                return
            # Claimed here, in the feed's order, and not when a worker is through.
            name = self._pipeline.names.claim(file.image)
            future = self._pool.submit(self._pipeline.prepare, file, name)
            self._preparing.append((file, future))

    def collect(self) -> Iterator[Outcome]:
        """Bring decoded images to the network's door; give out those that failed."""
        while self._preparing and not self._waiting.full:
            file, prepared = self._preparing[0]
            if not prepared.done() and (self._ticked or self._finishing):
                return
            self._preparing.popleft()
            try:
                self._waiting.add(prepared.result())
            except Exception as error:  # noqa: BLE001 - anything ends in this image's record
                yield self._pipeline.failure(file, error)

    @property
    def _is_due(self) -> bool:
        is_all = not self._preparing and len(self._waiting) > 0
        return self._waiting.due or (is_all and not self._pipeline.expects_company())

    def predict(self) -> Iterator[Outcome]:
        """Run the network on a batch, where one is due, and have the results written."""
        last = not self._open and not self._preparing and len(self._waiting) > 0
        # Without a tick more files are at hand, and a batch need not go before it is full.
        if not (self._waiting.full or last or (self._ticked and self._is_due)):
            return
        for result in self._pipeline.predict(self._waiting.take()):
            if isinstance(result, Outcome):
                yield result
            else:
                item, logits = result
                future = self._pool.submit(self._pipeline.finish, item, logits)
                self._finishing.append((item.file, future))

    def give_out(self) -> Iterator[Outcome]:
        """Give out what is written; wait for it only where nothing else is left to do."""
        while self._finishing:
            file, finished = self._finishing[0]
            last = not (self._open or self._preparing or len(self._waiting))
            if not (finished.done() or last or len(self._finishing) > self._window):
                return
            self._finishing.popleft()
            try:
                yield finished.result()
            except (OutputError, DeviceError):
                raise
            except Exception as error:  # noqa: BLE001 - anything ends in this image's record
                yield self._pipeline.failure(file, error)

    def rest(self) -> None:
        """Wait for a worker where there is nothing to do until one is through."""
        if self._preparing and self._finishing and not self._waiting.full and not self._ticked:
            either: list[Future[Any]] = [self._preparing[0][1], self._finishing[0][1]]
            wait(either, return_when=FIRST_COMPLETED)


def default_workers() -> int:
    """Give one worker for each processor this process may run on."""
    if hasattr(os, "sched_getaffinity"):
        return max(1, len(os.sched_getaffinity(0)))
    return max(1, os.cpu_count() or 1)
