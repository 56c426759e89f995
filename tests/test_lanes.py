"""Several devices share the work, whatever their speed, and whichever of them fails."""

from __future__ import annotations

import threading
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from parts import INPUT_SIZE_PX, OPTIONS, BrightIsCell, input_file, tiny_network, tree, write_smear
from PIL import Image
from test_pipeline import Logits, smears, workers_alive

from bcseg_batch.errors import DeviceError
from bcseg_batch.items import InputFile, Outcome, Status
from bcseg_batch.segment.devices import open_predictors
from bcseg_batch.segment.placement import AnyPredictor, Cores, OutOfMemoryError, Placement
from bcseg_batch.segment.predictor import Predictor
from bcseg_batch.service.pipeline import Pipeline
from bcseg_batch.store.names import OutputNames
from bcseg_batch.store.outputs import OutputFolder


class Device(BrightIsCell):
    """A predictor with a name, one caller at a time, that can be told to fail.

    Args:
        number: of the device.
        fails_at: which of its calls, counted from 0, and all after it, raise `error`.
        error: what they raise.
    """

    def __init__(
        self, number: int, *, fails_at: int | None = None, error: Exception | None = None
    ) -> None:
        super().__init__()
        self.placement = Placement(f"cuda:{number}", "float32", "for a test")
        self._fails_at = fails_at
        self._error = error or DeviceError(f"cuda:{number} is lost")
        self._inside = threading.Lock()

    def predict(self, batch: Logits) -> Logits:
        assert self._inside.acquire(blocking=False), "two callers at once"
        try:
            if self._fails_at is not None and len(self.batches) >= self._fails_at:
                raise self._error
            return super().predict(batch)
        finally:
            self._inside.release()


class Waiting(Device):
    """Answers only once another device has answered so often."""

    def __init__(self, number: int, other: Device, until: int) -> None:
        super().__init__(number)
        self._other, self._until = other, until
        self.enough = threading.Event()

    def predict(self, batch: Logits) -> Logits:
        assert self.enough.wait(60)
        return super().predict(batch)


class Telling(Device):
    """Tells a waiting device when it has answered often enough."""

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.listener: Waiting | None = None

    def predict(self, batch: Logits) -> Logits:
        logits = super().predict(batch)
        if self.listener is not None and len(self.batches) >= self.listener._until:
            self.listener.enough.set()
        return logits


def run(
    predictors: list[AnyPredictor], outputs: OutputFolder, files: list[InputFile]
) -> list[Outcome]:
    options = replace(OPTIONS, batch_size=2, max_wait_s=100.0)
    return list(Pipeline(predictors, outputs, OutputNames(), options).process(files))


def test_two_devices_share_one_queue(source: Path, outputs: OutputFolder) -> None:
    both = threading.Barrier(2)

    class Meeting(Device):
        def predict(self, batch: Logits) -> Logits:
            if not self.batches:
                both.wait(60)  # passes only where both are at work at the same time
            return super().predict(batch)

    devices = [Meeting(0), Meeting(1)]
    outcomes = run([*devices], outputs, smears(source, 12))
    assert sorted(o.image for o in outcomes) == [f"{n:03}.png" for n in range(12)]
    assert sum(sum(device.batches) for device in devices) == 12
    assert {o.device for o in outcomes} == {"cuda:0", "cuda:1"}
    assert workers_alive() == []


def test_a_slow_device_does_not_hold_up_a_fast_one(source: Path, outputs: OutputFolder) -> None:
    fast = Telling(0)
    slow = Waiting(1, fast, until=3)
    fast.listener = slow
    outcomes = run([fast, slow], outputs, smears(source, 16))
    assert len(outcomes) == 16
    assert {o.status for o in outcomes} == {Status.DONE}
    assert sum(fast.batches) >= 6


def test_a_lost_device_leaves_its_work_to_the_others(source: Path, outputs: OutputFolder) -> None:
    sound, lost = Device(0), Device(1, fails_at=0)
    outcomes = run([lost, sound], outputs, smears(source, 12))
    assert sorted(o.image for o in outcomes) == [f"{n:03}.png" for n in range(12)]
    assert {(o.status, o.device) for o in outcomes} == {(Status.DONE, "cuda:0")}
    assert sum(sound.batches) == 12


def test_a_device_without_memory_for_one_image_leaves_its_work_to_the_others(
    source: Path, outputs: OutputFolder
) -> None:
    small = Device(1, fails_at=0, error=OutOfMemoryError("cuda:1 has no memory"))
    outcomes = run([small, Device(0)], outputs, smears(source, 8))
    assert {(o.status, o.device) for o in outcomes} == {(Status.DONE, "cuda:0")}


def test_when_all_devices_are_lost_the_error_comes_out_after_what_is_done(
    source: Path, outputs: OutputFolder
) -> None:
    devices: list[AnyPredictor] = [Device(0, fails_at=1), Device(1, fails_at=2)]
    options = replace(OPTIONS, batch_size=2, max_wait_s=100.0)
    outcomes = []
    with pytest.raises(DeviceError, match=r"cuda:[01] is lost"):
        process = Pipeline(devices, outputs, OutputNames(), options).process(smears(source, 20))
        for outcome in process:
            outcomes.append(outcome)  # noqa: PERF402 - what came before the error counts
    assert len(outcomes) == 6
    assert all(outputs.exists(path) for outcome in outcomes for path in outcome.outputs)
    assert workers_alive() == []


def test_a_device_learns_of_its_own_memory_only(source: Path, outputs: OutputFolder) -> None:
    class Small(Device):
        def predict(self, batch: Logits) -> Logits:
            if len(batch) > 1:
                raise OutOfMemoryError("cuda:1 has no memory for 2 images")
            return super().predict(batch)

    small, large = Small(1), Device(0)
    outcomes = run([small, large], outputs, smears(source, 16))
    assert {o.status for o in outcomes} == {Status.DONE}
    assert len(outcomes) == 16
    assert set(small.batches) <= {1}
    assert set(large.batches) <= {2}


@settings(
    max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    count=st.integers(0, 14),
    failing=st.lists(st.none() | st.integers(0, 4), min_size=1, max_size=3),
    batch_size=st.integers(1, 3),
)
def test_whatever_is_lost_each_image_comes_out_once_or_is_left_whole(
    tmp_path_factory: pytest.TempPathFactory,
    count: int,
    failing: list[int | None],
    batch_size: int,
) -> None:
    root = tmp_path_factory.mktemp("lanes")
    (root / "in").mkdir()
    files = smears(root / "in", count) if count else []
    devices: list[AnyPredictor] = [Device(n, fails_at=at) for n, at in enumerate(failing)]
    options = replace(OPTIONS, batch_size=batch_size, max_wait_s=100.0, cells=False)
    outcomes = []
    with OutputFolder(root / "out") as outputs:
        try:
            for outcome in Pipeline(devices, outputs, OutputNames(), options).process(files):
                outcomes.append(outcome)  # noqa: PERF402 - also what came before an error
        except DeviceError:
            assert None not in failing
        else:
            assert len(outcomes) == count
        assert len({o.image for o in outcomes}) == len(outcomes)
        assert {o.status for o in outcomes} <= {Status.DONE}
        written = {name for name in tree(outputs.root) if not name.startswith(".")}
        assert written == {path for o in outcomes for path in o.outputs}
    assert workers_alive() == []


def test_tiles_of_an_image_go_to_whichever_device_is_left(
    source: Path, outputs: OutputFolder
) -> None:
    # Small bright squares on black, too small for one pass.
    pixels = np.zeros((300, 300, 3), np.uint8)
    pixels.reshape(20, 15, 20, 15, 3)[:, 3:12, :, 3:12] = 255
    Image.fromarray(pixels).save(source / "a.png")
    options = replace(OPTIONS, batch_size=2, tiling=True)
    devices: list[AnyPredictor] = [Device(0, fails_at=2), Device(1)]
    process = Pipeline(devices, outputs, OutputNames(), options).process
    (outcome,) = process([input_file(source / "a.png", source)])
    assert (outcome.status, outcome.cell_count) == (Status.DONE, 400)


# The processor ---------------------------------------------------------------------------------


def test_networks_that_run_at_once_share_the_cores() -> None:
    cores = Cores(5)
    with cores.share() as alone:
        with cores.share() as second, cores.share() as third:
            assert (alone, second, third) == (5, 2, 1)
        with cores.share() as again:
            assert again == 2
    with cores.share() as alone_again:
        assert alone_again == 5


def test_there_is_always_a_core() -> None:
    cores = Cores(1)
    with cores.share(), cores.share() as threads:
        assert threads == 1


def test_two_predictors_of_the_processor_share_their_weights_and_agree(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("bcseg_batch.segment.devices.available_cores", lambda: 4)
    model, spec = tiny_network()
    predictors = open_predictors(model, spec.input_size_px, devices=["cpu"], dtype="float32")
    assert len(predictors) == 2
    assert [p.placement.device for p in predictors] == ["cpu", "cpu"]
    images = np.random.default_rng(0).random((3, 3, INPUT_SIZE_PX, INPUT_SIZE_PX), np.float32)
    results: list[Logits | None] = [None, None]

    def predict(number: int, predictor: Predictor) -> None:
        results[number] = predictor.predict(images)

    threads = [
        threading.Thread(target=predict, args=(n, predictor))
        for n, predictor in enumerate(predictors)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results[0] is not None
    assert results[1] is not None
    np.testing.assert_allclose(results[0], results[1], rtol=0, atol=1e-5)


def test_a_smear_is_done_by_real_networks_on_two_lanes(
    source: Path, outputs: OutputFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("bcseg_batch.segment.devices.available_cores", lambda: 2)
    model, spec = tiny_network()
    for number in range(9):
        write_smear(source / f"{number}.png", number)
    files = [input_file(path, source) for path in sorted(source.iterdir())]
    alone = Predictor(model, Placement("cpu", "float32", "alone"), spec.input_size_px)
    plain = {o.image: o for o in run([alone], outputs, files)}
    lanes = [*open_predictors(model, spec.input_size_px, devices=["cpu"], dtype="float32")]
    shared = {o.image: o for o in run([*lanes], outputs, files)}
    assert {i: o.foreground_fraction for i, o in shared.items()} == pytest.approx(
        {i: o.foreground_fraction for i, o in plain.items()}, abs=1e-3
    )
