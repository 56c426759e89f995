"""A predictor of a device takes images as they are; driven here on the processor."""

from __future__ import annotations

import contextlib
from dataclasses import replace
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
import torch
from parts import INPUT_SIZE_PX, OPTIONS, input_file, tiny_network, write_smear
from PIL import Image
from torch import Tensor, nn

from bcseg_batch.items import Outcome, Status
from bcseg_batch.segment import on_device
from bcseg_batch.segment.on_device import DevicePredictor
from bcseg_batch.segment.placement import (
    AnyPredictor,
    OutOfMemoryError,
    Placement,
    Segmented,
    TakesImages,
)
from bcseg_batch.segment.postprocess import mask_from_probability, probability
from bcseg_batch.segment.predictor import Predictor
from bcseg_batch.segment.preprocess import preprocess, resize_rgb
from bcseg_batch.service.pipeline import Pipeline
from bcseg_batch.store.names import OutputNames
from bcseg_batch.store.outputs import OutputFolder

FLOAT32 = Placement("cpu", "float32", "for a test")
Bytes = npt.NDArray[np.uint8]


def photographs(*shapes_hw: tuple[int, int]) -> list[Bytes]:
    rng = np.random.default_rng(5)
    return [rng.integers(0, 256, (*shape, 3), dtype=np.uint8) for shape in shapes_hw]


def on_a_device(model: nn.Module | None = None, placement: Placement = FLOAT32) -> DevicePredictor:
    return DevicePredictor(model or tiny_network()[0], placement, INPUT_SIZE_PX)


def test_images_come_out_as_by_the_single_steps() -> None:
    images = photographs((90, 120), (64, 64), (40, 30), (61, 200))
    predictor = on_a_device()
    plain = Predictor(tiny_network()[0], FLOAT32, INPUT_SIZE_PX)
    for image, one in zip(images, predictor.segment(images, 0.5), strict=True):
        np.testing.assert_array_equal(one.thumbnail, resize_rgb(image, INPUT_SIZE_PX))
        logits = plain.predict(preprocess(image, INPUT_SIZE_PX)[np.newaxis])[0]
        np.testing.assert_allclose(one.soft, probability(logits), rtol=0, atol=1e-5)
        assert one.mask is not None
        assert one.mask.dtype == np.uint8
        assert set(np.unique(one.mask)) == {0, 255}
        expected = mask_from_probability(one.soft[0], image.shape[:2], 0.5)
        # A pixel that lies on the threshold may fall to either side by rounding.
        assert np.count_nonzero(one.mask != expected) <= 1


def test_a_batch_has_one_shape_whatever_is_asked_for() -> None:
    class Shapes(nn.Module):
        seen: list[int] = []  # noqa: RUF012 - of this test alone

        def forward(self, x: Tensor) -> Tensor:
            self.seen.append(len(x))
            return x[:, :1] - 0.5

    predictor = on_a_device(Shapes())
    for count in (4, 1, 3, 4):
        images = photographs(*[(20, 30)] * count)
        assert len(predictor.segment(images, 0.5)) == count
        batch = np.stack([preprocess(image, INPUT_SIZE_PX) for image in images])
        np.testing.assert_allclose(predictor.predict(batch), batch[:, :1] - 0.5, rtol=0, atol=1e-6)
    assert Shapes.seen == [4] * 8


def test_a_batch_that_was_too_large_is_not_filled_up_to_again() -> None:
    class Small(nn.Module):
        seen: list[int] = []  # noqa: RUF012 - of this test alone

        def forward(self, x: Tensor) -> Tensor:
            self.seen.append(len(x))
            if len(x) > 2:
                raise torch.OutOfMemoryError("for a test")
            return x[:, :1]

    predictor = on_a_device(Small())
    images = photographs(*[(20, 30)] * 4)
    with pytest.raises(OutOfMemoryError, match="4 images"):
        predictor.segment(images, 0.5)
    assert len(predictor.segment(images[:2], 0.5)) == 2
    assert len(predictor.segment(images[:1], 0.5)) == 1
    assert Small.seen == [4, 2, 2]


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_what_is_no_number_is_not_made_into_a_probability(value: float) -> None:
    class Broken(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            logits = x[:, :1] - 0.5
            logits[0, 0, 3, 3] = value
            return logits

    broken, sound = on_a_device(Broken()).segment(photographs((40, 40), (40, 40)), 0.5)
    assert np.isnan(broken.soft).sum() == 1
    assert np.isfinite(sound.soft).all()


def test_two_predictors_of_a_device_share_the_weights_and_nothing_else() -> None:
    predictor = on_a_device()
    predictor.predict(np.zeros((3, 3, INPUT_SIZE_PX, INPUT_SIZE_PX), np.float32))
    twin = predictor.twin()
    assert twin._model is predictor._model
    assert twin._batch_size == 0
    images = photographs((50, 70))
    (one,), (other,) = predictor.segment(images, 0.5), twin.segment(images, 0.5)
    # A batch filled up to three is summed in another order than one of one.
    np.testing.assert_allclose(one.soft, other.soft, rtol=0, atol=1e-5)


def test_a_network_that_cannot_be_recorded_runs_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(run: on_device.Run, example: Tensor) -> on_device.Run:
        raise RuntimeError("operation not permitted when stream is capturing\nand much more")

    monkeypatch.setattr(on_device, "record", refuse)
    predictor = on_a_device()
    batch = torch.rand(2, 3, INPUT_SIZE_PX, INPUT_SIZE_PX)
    run = predictor._record(batch)
    torch.testing.assert_close(run(batch), predictor._network(batch))
    assert predictor.placement.reason == (
        "for a test; without a CUDA graph: operation not permitted when stream is capturing"
    )


def test_a_lack_of_memory_while_recording_is_one(monkeypatch: pytest.MonkeyPatch) -> None:
    def run_out(run: on_device.Run, example: Tensor) -> on_device.Run:
        raise torch.OutOfMemoryError("for a test")

    monkeypatch.setattr(on_device, "record", run_out)
    with pytest.raises(torch.OutOfMemoryError):
        on_a_device()._record(torch.zeros(1, 3, INPUT_SIZE_PX, INPUT_SIZE_PX))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="not on this machine: a CUDA device")
def test_on_a_gpu_images_come_out_as_on_the_processor() -> None:
    images = photographs((900, 1200), (480, 640), (1200, 1600))
    gpu = on_a_device(placement=Placement("cuda:0", "float32", "for a test"))
    cpu = on_a_device()
    for _ in range(3):  # the first records, the others replay
        for one, other in zip(gpu.segment(images, 0.5), cpu.segment(images, 0.5), strict=True):
            np.testing.assert_array_equal(one.thumbnail, other.thumbnail)
            np.testing.assert_allclose(one.soft, other.soft, rtol=0, atol=1e-3)
    assert "without a CUDA graph" not in gpu.placement.reason


# In the pipeline --------------------------------------------------------------------------------


def outcomes(
    folder: Path, output: Path, predictors: list[AnyPredictor], count: int, **changes: object
) -> dict[str, Outcome]:
    files = [
        input_file(write_smear(folder / f"{i}.png", i, (120 + i, 90 - i)), folder)
        for i in range(count)
    ]
    with contextlib.closing(OutputFolder(output)) as folders:
        pipeline = Pipeline(predictors, folders, OutputNames(), replace(OPTIONS, **changes))
        return {outcome.image: outcome for outcome in pipeline.process(files)}


@pytest.mark.parametrize("cells", [True, False])
def test_files_are_the_same_whoever_resizes_and_cuts(tmp_path: Path, cells: bool) -> None:
    plain = Predictor(tiny_network()[0], FLOAT32, INPUT_SIZE_PX)
    first = outcomes(tmp_path / "in", tmp_path / "a", [plain], 7, cells=cells)
    device = on_a_device()
    second = outcomes(tmp_path / "in", tmp_path / "b", [device, device.twin()], 7, cells=cells)
    assert first.keys() == second.keys()
    for image, outcome in first.items():
        assert outcome.mask is not None
        one, other = (
            np.asarray(Image.open(tmp_path / folder / outcome.mask)).astype(int) for folder in "ab"
        )
        assert np.count_nonzero(one != other) <= 2, image
        assert second[image].status is Status.DONE
        assert second[image].outputs == outcome.outputs


class OwnMask:
    """Gives a mask that no soft map would make, and never a batch."""

    placement = FLOAT32
    input_size_px = INPUT_SIZE_PX

    def __init__(self) -> None:
        self.sizes: list[tuple[int, int]] = []

    def predict(self, batch: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
        raise AssertionError("images are to be given as they are")

    def segment(self, images: list[Bytes], threshold: float) -> list[Segmented]:
        self.sizes += [image.shape[:2] for image in images]
        found = []
        for image in images:
            mask = np.zeros(image.shape[:2], np.uint8)
            mask[::2] = 255
            soft = np.full((1, INPUT_SIZE_PX, INPUT_SIZE_PX), 0.1, np.float32)
            found.append(Segmented(resize_rgb(image, INPUT_SIZE_PX), soft, mask))
        return found


def test_the_mask_of_the_device_is_the_one_that_is_written(tmp_path: Path) -> None:
    device = OwnMask()
    assert isinstance(device, TakesImages)
    done = outcomes(tmp_path / "in", tmp_path / "out", [device], 3, cells=False)
    assert sorted(device.sizes) == [(88, 122), (89, 121), (90, 120)]
    for outcome in done.values():
        assert outcome.mask is not None
        mask = np.asarray(Image.open(tmp_path / "out" / outcome.mask))
        assert (mask[::2] == 255).all()
        assert not mask[1::2].any()


def test_devices_of_both_kinds_share_the_work(tmp_path: Path) -> None:
    plain = Predictor(tiny_network()[0], FLOAT32, INPUT_SIZE_PX)
    alone = outcomes(tmp_path / "in", tmp_path / "a", [plain], 12, batch_size=2)
    mixed = outcomes(
        tmp_path / "in", tmp_path / "b", [plain.twin(), on_a_device()], 12, batch_size=2
    )
    for image, outcome in alone.items():
        assert outcome.mask is not None
        one, other = (
            np.asarray(Image.open(tmp_path / folder / outcome.mask)).astype(int) for folder in "ab"
        )
        assert np.count_nonzero(one != other) <= 2, image
        assert mixed[image].status is Status.DONE
