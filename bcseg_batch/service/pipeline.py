"""The one seam: files in, outcomes out, with everything between them overlapped and bounded."""

from __future__ import annotations

import contextlib
import functools
import itertools
import math
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, replace
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
)
from bcseg_batch.items import InputFile, Outcome, Status
from bcseg_batch.segment.placement import AnyPredictor, Placement, Segmented, TakesImages
from bcseg_batch.segment.preprocess import resize_rgb, to_network_input
from bcseg_batch.segment.tiling import ArrayRaster, Raster, choose_scale, segment_in_tiles, stretch
from bcseg_batch.service.batching import Batcher
from bcseg_batch.service.finishing import (
    Finisher,
    FinishOptions,
    Prepared,
    Source,
    Undersized,
)
from bcseg_batch.service.lanes import Lane, Lanes, SmallerBatch
from bcseg_batch.service.places import Fetch, InPlace, Outputs
from bcseg_batch.service.room import NoRoom, Room
from bcseg_batch.store.images import declared_pixels, decode_image
from bcseg_batch.store.pixel_size import pixel_size_um
from bcseg_batch.store.raster import TiffRaster, open_raster

Observe = Callable[[str, float, int], None]


class Names(Protocol):
    """Says which output name an input owns; `store.names.OutputNames` is one."""

    def claim(self, image: str) -> str:
        """Give the input's output name without its ending, the same each time."""
        ...


# Pixels in hand at once, between decoding and the outcome: a photograph takes 3 bytes for each
# while it waits and some 20 while its outputs are made.
_ROOM_PIXELS = 150_000_000
_CPU_TILES = 2


@dataclass(frozen=True, slots=True)
class Predicted:
    """An image that has been through the network.

    Attributes:
        item: the image.
        answer: what a device says of it, or float32 logits (C, S, S) to be made into that.
        placement: where the network ran.
    """

    item: Prepared
    answer: Segmented | npt.NDArray[np.float32]
    placement: Placement


@dataclass(frozen=True, slots=True, kw_only=True)
class PipelineOptions(FinishOptions):
    """Everything that decides what the outputs look like, and how much is done at once.

    Attributes:
        batch_size: images the network takes at once.
        workers: threads that decode and write.
        max_wait_s: how long a partial batch waits for company where the feed ticks.
        max_pixels: larger images are refused.
        page: of a file with several images, counted from 0.
        pixel_size_um: side of a pixel of all images; None takes what a file says of itself.
        room_pixels: pixels of all images in hand at once; a larger image is taken alone.
        parquet: write the tables as Parquet too.
    """

    batch_size: int
    workers: int
    max_wait_s: float
    max_pixels: int
    page: int
    pixel_size_um: float | None
    room_pixels: int = _ROOM_PIXELS
    parquet: bool = False


class Pipeline:
    """Decodes, predicts and writes, each image at its own pace, the network never waiting long.

    Args:
        predictors: run the network, each in a thread of its own; they share the batches.
        outputs: where masks and composites go.
        names: which input owns which output name.
        options: the rest.
        inputs: brings the files to this machine.
        observe: told of each stage (`decode`, `network`, `write`) how many seconds it took for how
            many images; called from any thread.
        expects_company: asked, at a tick, whether more files may come within `max_wait_s`; where
            they cannot, a partial batch does not wait for them.
        alive: called now and then while a large image is under way; may raise `Interrupted`, after
            which the image comes out as skipped.
    """

    def __init__(
        self,
        predictors: Sequence[AnyPredictor],
        outputs: Outputs,
        names: Names,
        options: PipelineOptions,
        *,
        inputs: Fetch | None = None,
        observe: Observe = lambda _stage, _seconds, _images: None,
        expects_company: Callable[[], bool] = lambda: True,
        alive: Callable[[], None] = lambda: None,
    ) -> None:
        self._observe = observe
        self.expects_company = expects_company
        self._alive = alive
        self._batches = itertools.count(1)
        self._input_size_px = predictors[0].input_size_px
        # A processor gains nothing by many tiles at once, which lie in memory beside the batch.
        is_cpu = predictors[0].placement.device == "cpu"
        self._tile_batch = min(options.batch_size, _CPU_TILES) if is_cpu else options.batch_size
        # Where one device takes batches only, it may be any image's.
        self._devices_resize = all(isinstance(one, TakesImages) for one in predictors)
        self.lanes = Lanes(predictors, options.batch_size)
        self._inputs = inputs or InPlace()
        self.outputs = outputs
        self.names = names
        self.options = options
        self._finisher = Finisher(outputs, options, predictors[0].placement)
        self.room = Room(options.room_pixels)
        self._rasters: dict[str, TiffRaster] = {}
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
            try:
                while flow.busy:
                    flow.take_in()
                    # The network's turn comes first: decoding is waited for only where it is idle.
                    yield from flow.hand_on()
                    yield from flow.collect()
                    flow.predict()
                    yield from flow.give_out()
                    flow.rest()
            except (OutputError, DeviceError):
                # Whatever is on disk by now is done, and need not be done again.
                yield from flow.rescue()
                raise

    def prepare(self, file: InputFile, name: str) -> Prepared:
        """Decode an image, and stretch it to the network's input; runs in a worker.

        Raises:
            NoRoom: too much is in memory already.
            ImageError: this image cannot be used.
        """
        started_s = time.monotonic()
        options, size_px = self.options, self._input_size_px
        file = self._inputs.fetch(file)
        pixels = declared_pixels(file.path, page=options.page)
        source: Source
        raster: Raster
        thumbnail = windows = None
        if options.large_pixels < pixels <= options.max_pixels:
            self.room.take(file.image, options.large_pixels)
            windows = open_raster(file.path, max_pixels=options.max_pixels, page=options.page)
        if windows is not None:
            self._rasters[file.image] = windows
            source = raster = windows
            thumbnail = stretch(windows, size_px)
        else:
            self.room.leave(file.image)
            # What is refused for its size is never in memory.
            self.room.take(file.image, pixels if pixels <= options.max_pixels else 0)
            decoded = decode_image(file.path, max_pixels=options.max_pixels, page=options.page)
            source, raster = decoded, ArrayRaster(decoded.pixels)
            if not self._devices_resize:
                thumbnail = resize_rgb(decoded.pixels, size_px)
        prepared = Prepared(
            file,
            name,
            started_s,
            source,
            raster,
            options.pixel_size_um or pixel_size_um(file.path),
            thumbnail,
        )
        self._note("decode", started_s, image=file.image)
        return prepared

    def let_go(self, image: str) -> None:
        """Give back what an image held, however it ended."""
        self.room.leave(image)
        self._inputs.release(image)
        if (raster := self._rasters.pop(image, None)) is not None:
            raster.close()

    def let_all_go(self) -> None:
        """Give back what all images held that did not come to an end."""
        for image in list(self._rasters):
            self.let_go(image)

    def predict(self, items: list[Prepared], lane: Lane) -> list[Outcome | Predicted]:
        """Run the network; where a batch fails, find the image that makes it fail.

        Raises:
            DeviceError: the lane's device is lost, or too small for one image.
        """
        results: list[Outcome | Predicted] = []
        while len(results) < len(items):
            part = items[len(results) : len(results) + lane.batch_size]
            started_s = time.monotonic()
            try:
                answers = self._answers(part, lane)
            except SmallerBatch:
                continue
            except DeviceError:
                raise
            except Exception as error:  # noqa: BLE001 - one image must not cost its neighbours
                if len(part) == 1:
                    results.append(self.failure(part[0].file, error))
                    continue
                logger.warning(
                    "a batch of {} failed ({!r}): trying its images one by one", len(part), error
                )
                for item in part:
                    results += self.predict([item], lane)
            else:
                batch = next(self._batches)
                self._note("network", started_s, images=len(part), batch=batch)
                results += (
                    Predicted(item, answer, lane.placement)
                    for item, answer in zip(part, answers, strict=True)
                )
        return results

    def _answers(
        self, items: Sequence[Prepared], lane: Lane
    ) -> Sequence[Segmented] | npt.NDArray[np.float32]:
        """Have images segmented whole, or the small ones predicted where a device takes batches."""
        whole = [_for_the_device(item) for item in items]
        segmented = lane.segment(whole, self.options.threshold)
        if segmented is not None:
            return segmented
        return lane.predict(np.stack([to_network_input(image) for image in whole]))

    def finish(self, predicted: Predicted) -> Outcome | Undersized:
        """Make the outputs of an image and write them; runs in a worker.

        Raises:
            OutputError: nothing can be written.
            ImageError: this image's outputs cannot be made.
        """
        started_s = time.monotonic()
        item, placement = predicted.item, predicted.placement
        answer = predicted.answer
        if not isinstance(answer, Segmented):
            answer = self._finisher.segmented(item, _for_the_device(item), answer)
        result = self._finisher.finish(item, answer)
        self._note("write", started_s, image=item.file.image)
        if isinstance(result, Outcome):
            return replace(result, device=placement.device, dtype=placement.dtype)
        return result

    def finish_in_tiles(self, first: Undersized) -> Outcome:
        """Find the scale that an image needs, and take it in tiles; in the thread that iterates.

        Raises:
            OutputError: nothing can be written.
            DeviceError: the device is lost.
            ImageError: this image's outputs cannot be made.
        """
        item, thumbnail, options = first.item, first.segmented.thumbnail, self.options
        started_s = time.monotonic()
        size_px, batch_size = self._input_size_px, self._tile_batch
        scale = choose_scale(
            item.raster,
            first.look.diameter_px,
            self._predict_tiles,
            options.class_names,
            threshold=options.threshold,
            batch_size=batch_size,
            input_size_px=size_px,
            thumbnail=thumbnail,
        )
        if scale is None and not self._finisher.is_large(item):
            return self._finisher.finish_whole(item, first.segmented, first.look.parted)
        # Of a large image without a cell at any scale the outputs are made all the same.
        scale = scale or size_px / math.sqrt(math.prod(item.raster.shape_hw))
        bands = segment_in_tiles(
            item.raster,
            scale,
            self._predict_tiles,
            options.class_names,
            threshold=options.threshold,
            batch_size=batch_size,
            input_size_px=size_px,
            measure=options.cells,
            pixel_size_um=item.pixel_size_um,
            probability=options.probability,
            on_progress=_TileProgress(item.file.image, self._alive),
        )
        outcome = self._finisher.finish_bands(item, thumbnail, bands, scale)
        self._note("tiles", started_s, image=item.file.image)
        return outcome

    def _predict_tiles(self, batch: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
        """Run the network on tiles, as many at once as the device has memory for."""

        def predict(lane: Lane) -> npt.NDArray[np.float32]:
            while True:
                size = lane.batch_size
                parts = [batch[i : i + size] for i in range(0, len(batch), size)]
                try:
                    return np.concatenate([lane.predict(part) for part in parts])
                except SmallerBatch:
                    continue

        return self.lanes.submit(predict).result()

    def _note(
        self,
        stage: str,
        started_s: float,
        *,
        image: str | None = None,
        images: int = 1,
        batch: int | None = None,
    ) -> None:
        """Tell figures and log how long a stage took."""
        seconds = time.monotonic() - started_s
        self._observe(stage, seconds, images)
        logger.bind(stage=stage, image=image, batch=batch, ms=round(1000 * seconds)).debug(
            "{} of {} in {:.3f} s", stage, repr(image) if image else images, seconds
        )

    def failure(self, file: InputFile, error: Exception) -> Outcome:
        """Turn whatever went wrong with one image into its outcome."""
        is_to_be_redone = isinstance(error, ImageChangedError | Interrupted)
        status = Status.SKIPPED if is_to_be_redone else Status.FAILED
        if not isinstance(error, ImageError | Interrupted):
            logger.opt(exception=error).error("{!r}: a bug in this program", file.image)
        return replace(
            self._finisher.outcome(file, status), error=f"{type(error).__name__}: {error}"
        )


def _for_the_device(item: Prepared) -> npt.NDArray[np.uint8]:
    """Give uint8 (S, S, 3) where that was made, else (H, W, 3), an image in memory."""
    if item.thumbnail is not None:
        return item.thumbnail
    height, width = item.raster.shape_hw
    return item.raster.read(0, height, 0, width)


class Interrupted(Exception):  # noqa: N818 - no error: the image is taken up again later
    """A large image is left in the middle, because the process is to end."""


class _TileProgress:
    """Tells the log every ten seconds how far a large image is, and the owner that it goes on."""

    _EVERY_S = 10.0

    def __init__(self, image: str, alive: Callable[[], None]) -> None:
        self._image = image
        self._alive = alive
        self._told_s = time.monotonic()

    def __call__(self, done: int, total: int) -> None:
        self._alive()
        now_s = time.monotonic()
        if now_s - self._told_s >= self._EVERY_S:
            self._told_s = now_s
            logger.bind(image=self._image, stage="network").info(
                "{!r}: {} of {} tiles", self._image, done, total
            )


class _Flow:
    """What is where between the feed and the outcomes, during one `Pipeline.process`.

    Four queues, each bounded: images being decoded, decoded ones that wait for the network, those
    that are with it, and those being written. Only the thread that iterates touches them; workers
    see single images, and the network batches.
    """

    def __init__(self, pipeline: Pipeline, files: Iterable[InputFile | None]) -> None:
        options = pipeline.options
        self._pipeline = pipeline
        self._window = 2 * options.batch_size
        # Behind the door of the network: a batch for each predictor, and one that is next or is
        # being written.
        self._window_behind = (len(pipeline.lanes) + 1) * options.batch_size
        self._source = iter(files)
        self._open = True
        self._ticked = False
        self._preparing: deque[tuple[InputFile, str, Future[Prepared]]] = deque()
        self._waiting: Batcher[Prepared] = Batcher(
            options.batch_size, options.max_wait_s, clock=time.monotonic
        )
        self._predicting: list[tuple[int, Future[list[Outcome | Predicted]]]] = []
        self._finishing: deque[tuple[InputFile, Future[Outcome | Undersized]]] = deque()
        self._written: deque[Outcome] = deque()
        # Decoding was put off until there is room: taken up again before anything new.
        self._put_off: deque[tuple[InputFile, str, int]] = deque()
        self._pool = ThreadPoolExecutor(options.workers, thread_name_prefix="bcseg-worker")

    def __enter__(self) -> _Flow:
        self._pipeline.lanes.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._pipeline.lanes.stop()
        self._pool.shutdown(wait=True, cancel_futures=True)
        self._pipeline.let_all_go()

    @property
    def busy(self) -> bool:
        """Whether anything is under way or may still come."""
        return bool(self._open or self._has_more or len(self._waiting) or self._behind)

    @property
    def _has_more(self) -> bool:
        """Whether images that were taken in have still to come to the network's door."""
        return bool(self._preparing or self._put_off)

    @property
    def _behind(self) -> int:
        """How many images the network has taken, and are not through."""
        return sum(count for count, _ in self._predicting) + len(self._finishing)

    def take_in(self) -> None:
        """Draw files from the feed while there is room, or until it ticks or ends."""
        self._ticked = False
        while self._put_off:
            put_off, name, pixels = self._put_off[0]
            if not self._pipeline.room.fits(pixels):
                return
            self._put_off.popleft()
            self._prepare(put_off, name)
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
            self._prepare(file, self._pipeline.names.claim(file.image))

    def _prepare(self, file: InputFile, name: str) -> None:
        future = self._pool.submit(self._pipeline.prepare, file, name)
        self._preparing.append((file, name, future))

    def collect(self) -> Iterator[Outcome]:
        """Bring decoded images to the network's door; give out those that failed."""
        while self._preparing and not self._waiting.full:
            file, name, prepared = self._preparing[0]
            if not prepared.done() and (self._ticked or self._behind):
                return
            self._preparing.popleft()
            try:
                self._waiting.add(prepared.result())
            except NoRoom as full:
                self._put_off.append((file, name, full.pixels))
            except OutputError:  # the store that it lies in is away: no image is to blame
                raise
            except Exception as error:  # noqa: BLE001 - anything ends in this image's record
                yield self._through(self._pipeline.failure(file, error))

    def _through(self, outcome: Outcome) -> Outcome:
        self._pipeline.let_go(outcome.image)
        return outcome

    @property
    def _is_due(self) -> bool:
        is_all = not self._has_more and len(self._waiting) > 0
        return self._waiting.due or (is_all and not self._pipeline.expects_company())

    def predict(self) -> None:
        """Give the network a batch, where one is due and it is not behind."""
        last = not self._open and not self._has_more and len(self._waiting) > 0
        # The next one will come in only when these are through.
        alone = bool(self._put_off) and not self._preparing and len(self._waiting) > 0
        # Without a tick more files are at hand, and a batch need not go before it is full.
        if not (self._waiting.full or last or alone or (self._ticked and self._is_due)):
            return
        size = min(len(self._waiting), self._pipeline.options.batch_size)
        if self._behind and self._behind + size > self._window_behind:
            return
        items = self._waiting.take()
        predict = functools.partial(self._pipeline.predict, items)
        self._predicting.append((len(items), self._pipeline.lanes.submit(predict)))

    def hand_on(self) -> Iterator[Outcome]:
        """Have written what the network is through with, whichever device was first."""
        for batch in [batch for batch in self._predicting if batch[1].done()]:
            self._predicting.remove(batch)
            for result in batch[1].result():
                if isinstance(result, Outcome):
                    yield self._through(result)
                else:
                    future = self._pool.submit(self._pipeline.finish, result)
                    self._finishing.append((result.item.file, future))

    def give_out(self) -> Iterator[Outcome]:
        """Give out what is written, in the order in which it went in."""
        while self._finishing and self._finishing[0][1].done():
            file, finished = self._finishing.popleft()
            try:
                result = finished.result()
                if isinstance(result, Undersized):
                    result = self._pipeline.finish_in_tiles(result)
            except (OutputError, DeviceError):
                raise
            except Exception as error:  # noqa: BLE001 - anything ends in this image's record
                result = self._pipeline.failure(file, error)
            self._written.append(result)
        yield from self._give_written()

    def _give_written(self) -> Iterator[Outcome]:
        """Give out outcomes once the names of their files are on disk, together."""
        if self._written:
            self._pipeline.outputs.sync()
        while self._written:
            yield self._through(self._written.popleft())

    def rescue(self) -> Iterator[Outcome]:
        """Give out what is finished after the network or the disk has failed."""
        wait([predicted for _, predicted in self._predicting])
        while self._predicting:
            # Of several batches that failed each says so, and the first one's error is under way.
            with contextlib.suppress(Exception):
                yield from self.hand_on()
        while self._finishing:
            _, finished = self._finishing.popleft()
            try:
                result = finished.result()
            except Exception as error:  # noqa: BLE001 - what is not done is tried again
                logger.debug("not done: {!r}", error)
                continue
            if isinstance(result, Outcome):
                self._written.append(result)
        try:
            yield from self._give_written()
        except OutputError as error:
            logger.debug("not done: {!r}", error)

    def rest(self) -> None:
        """Wait where there is nothing to do until something is through."""
        if self._ticked or not self.busy:
            return
        under_way: list[Future[Any]] = [finished for _, finished in self._finishing][:1]
        under_way += [predicted for _, predicted in self._predicting]
        # A full door takes nothing in: what is decoded behind it is no news.
        if not self._waiting.full:
            under_way += [prepared for _, _, prepared in itertools.islice(self._preparing, 1)]
        if under_way:
            wait(under_way, return_when=FIRST_COMPLETED)
