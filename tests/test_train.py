"""The training loop: repeatable, resumable, and careful with what is there."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from blots import blots, write_blots, write_pair
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from bcseg_batch.errors import CheckpointError, OutputError, UsageError
from bcseg_batch.segment.checkpoint import load_checkpoint
from bcseg_training.train import (
    EpochResult,
    TrainingPlan,
    WeightAverage,
    check_sizes,
    learning_rate,
    train,
)

TINY = {"width": 4, "depth": 2, "input_size_px": 64, "crop_px": 64, "batch_size": 2}


@pytest.fixture(autouse=True, scope="module")
def _one_thread() -> Iterator[None]:
    """Tiny tensors gain nothing from a second thread, which on a busy machine they wait for."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def tiny_plan(dataset: Path, **changes: object) -> TrainingPlan:
    return TrainingPlan(dataset=dataset, **{**TINY, **changes})  # type: ignore[arg-type]  # by name


def full_plan(dataset: Path) -> TrainingPlan:
    """With everything that a resume could forget."""
    return tiny_plan(
        dataset,
        epochs=3,
        augment="standard",
        norm="batch",
        schedule="cosine",
        ema=0.9,
        loss="bce+dice",
        crops_per_image=2,
        crop_px=32,
        lr=3e-3,
        seed=11,
    )


def state_of(path: Path) -> dict[str, torch.Tensor]:
    return load_checkpoint(path).model.state_dict()


def assert_same_weights(a: Path, b: Path) -> None:
    ours, theirs = state_of(a), state_of(b)
    assert [name for name in ours if not torch.equal(ours[name], theirs[name])] == []


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_blots(tmp_path_factory.mktemp("blots"))


@pytest.fixture(scope="module")
def whole(dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three epochs at one go."""
    out = tmp_path_factory.mktemp("whole")
    train(full_plan(dataset), out)
    return out


class KilledAtStep:
    """Stands for a power cut: leaves no time for anything."""

    def __init__(self, epoch: int, step: int) -> None:
        self.at = (epoch, step)

    def on_step(self, epoch: int, step: int, steps: int, loss: float) -> None:
        if (epoch, step) == self.at:
            os.kill(os.getpid(), signal.SIGKILL)

    def on_epoch(self, result: EpochResult) -> None:
        pass


# The recipe ------------------------------------------------------------------------------------


def test_the_default_plan_is_the_originals_recipe() -> None:
    plan = TrainingPlan(dataset=Path("set"))
    assert plan == TrainingPlan(
        dataset=Path("set"),
        epochs=2,
        lr=3e-4,
        batch_size=8,
        loss="bce",
        width=64,
        depth=4,
        norm="none",
        weight_decay=1e-2,  # the default of AdamW, which the original left alone
        augment="none",
        schedule="constant",
        ema=0.0,
        crop_px=512,
        crops_per_image=1,
        input_size_px=512,
        seed=0,
    )


def test_constant_and_cosine_rates() -> None:
    constant, cosine = (
        TrainingPlan(dataset=Path(), lr=1.0, schedule=name) for name in ("constant", "cosine")
    )
    assert {learning_rate(constant, step, 100) for step in range(100)} == {1.0}
    rates = [learning_rate(cosine, step, 100) for step in range(100)]
    assert max(rates) == 1.0
    assert rates[:5] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0])
    assert np.diff(rates[5:]).max() < 0
    assert rates[-1] < 1e-3
    assert learning_rate(cosine, 0, 1) == 1.0


def test_an_average_without_decay_is_the_network_itself() -> None:
    model = torch.nn.Linear(2, 2)
    average = WeightAverage(model, 0.0)
    with torch.no_grad():
        model.weight.fill_(7)
    average.update(model)
    assert torch.equal(average.model.state_dict()["weight"], model.weight)


def test_an_average_lies_between_what_was() -> None:
    model = torch.nn.Linear(1, 1)
    torch.nn.init.zeros_(model.weight)
    average = WeightAverage(model, 0.5)
    with torch.no_grad():
        model.weight.fill_(1)
    for expected in (1 - 1 / 11, 1 - 1 / 11 * 2 / 12):  # decay is step / (step + 10) early on
        average.update(model)
        assert float(average.model.state_dict()["weight"]) == pytest.approx(expected)


# Resuming --------------------------------------------------------------------------------------


def test_stopped_and_resumed_is_the_same_training(
    dataset: Path, whole: Path, tmp_path: Path
) -> None:
    plan = full_plan(dataset)
    assert len(train(plan, tmp_path, stop_after_epoch=1)) == 1
    torch.rand(3)  # what else the process draws has no say
    history = train(plan, tmp_path, resume=True)
    assert_same_weights(tmp_path / "last.safetensors", whole / "last.safetensors")
    assert_same_weights(tmp_path / "best.safetensors", whole / "best.safetensors")
    assert (tmp_path / "history.json").read_text() == (whole / "history.json").read_text()
    assert [result.epoch for result in history] == [1, 2, 3]


def test_killed_in_an_epoch_and_resumed_is_the_same_training(
    dataset: Path, whole: Path, tmp_path: Path
) -> None:
    code = (
        "import sys; from pathlib import Path; sys.path.insert(0, sys.argv[1])\n"
        "from test_train import KilledAtStep, full_plan, train\n"
        "train(full_plan(Path(sys.argv[2])), Path(sys.argv[3]), progress=KilledAtStep(1, 2))\n"
    )
    here = str(Path(__file__).parent)
    done = subprocess.run(
        [sys.executable, "-c", code, here, str(dataset), str(tmp_path)],
        capture_output=True,
        text=True,
        check=False,
        # The order of a sum depends on the number of threads.
        env={**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads())},
    )
    assert done.returncode == -9, done.stderr
    assert len(json.loads((tmp_path / "history.json").read_text())["epochs"]) == 1
    train(full_plan(dataset), tmp_path, resume=True)
    assert_same_weights(tmp_path / "last.safetensors", whole / "last.safetensors")
    assert_same_weights(tmp_path / "best.safetensors", whole / "best.safetensors")


def test_loader_processes_change_nothing(dataset: Path, whole: Path, tmp_path: Path) -> None:
    train(full_plan(dataset), tmp_path, num_workers=1)
    assert_same_weights(tmp_path / "last.safetensors", whole / "last.safetensors")


def test_another_seed_is_another_training(dataset: Path, whole: Path, tmp_path: Path) -> None:
    train(dataclasses.replace(full_plan(dataset), seed=12), tmp_path)
    ours, theirs = (state_of(out / "last.safetensors") for out in (tmp_path, whole))
    assert not torch.equal(ours["head.weight"], theirs["head.weight"])


def test_a_stop_that_has_passed_trains_no_further(dataset: Path, tmp_path: Path) -> None:
    plan = tiny_plan(dataset, epochs=3)
    train(plan, tmp_path, stop_after_epoch=1)
    before = (tmp_path / "last.safetensors").read_bytes()
    assert len(train(plan, tmp_path, stop_after_epoch=1, resume=True)) == 1
    assert (tmp_path / "last.safetensors").read_bytes() == before


def test_a_finished_training_resumes_to_nothing(dataset: Path, whole: Path) -> None:
    before = (whole / "last.safetensors").read_bytes()
    assert len(train(full_plan(dataset), whole, resume=True)) == 3
    assert (whole / "last.safetensors").read_bytes() == before


def test_resuming_where_nothing_is_starts(dataset: Path, tmp_path: Path) -> None:
    assert len(train(tiny_plan(dataset, epochs=1), tmp_path / "new" / "out", resume=True)) == 1


def test_resuming_with_other_options_is_refused(dataset: Path, whole: Path) -> None:
    plan = dataclasses.replace(full_plan(dataset), lr=1e-3, ema=0.0)
    with pytest.raises(UsageError, match="another ema, lr"):
        train(plan, whole, resume=True)


def test_more_epochs_are_refused_with_a_way_to_train_on(dataset: Path, whole: Path) -> None:
    plan = dataclasses.replace(full_plan(dataset), epochs=5)
    with pytest.raises(UsageError, match=r"another epochs.*--init \S+last\.safetensors"):
        train(plan, whole, resume=True)


def other_smear(folder: Path) -> None:
    write_pair(folder, "smear0", *blots(999))


def one_more(folder: Path) -> None:
    write_pair(folder, "smear9", *blots(9))


def one_less(folder: Path) -> None:
    for kind in ("original", "mask"):
        (folder / kind / "smear0.png").unlink()


@pytest.mark.parametrize("part", ["train", "val"])
@pytest.mark.parametrize("change", [other_smear, one_more, one_less])
def test_other_data_under_the_same_name_are_refused(
    tmp_path: Path, part: str, change: Callable[[Path], None]
) -> None:
    first = write_blots(tmp_path / "first" / "set", train=2, val=2)
    train(tiny_plan(first), tmp_path / "out", stop_after_epoch=1)
    second = write_blots(tmp_path / "second" / "set", train=2, val=2)
    change(second / part)
    before = (tmp_path / "out" / "last.state.pt").read_bytes()
    with pytest.raises(UsageError, match=rf"other files than those now in {second}: "):
        train(tiny_plan(second), tmp_path / "out", resume=True)
    assert (tmp_path / "out" / "last.state.pt").read_bytes() == before


def test_a_data_set_may_be_moved_and_have_files_beside_it(tmp_path: Path) -> None:
    first = write_blots(tmp_path / "first" / "set", train=2, val=1)
    train(tiny_plan(first), tmp_path / "out", stop_after_epoch=1)
    (first / "train" / "original" / "notes.txt").write_text("looked over")
    (tmp_path / "first").rename(tmp_path / "second")
    moved = tmp_path / "second" / "set"
    assert len(train(tiny_plan(moved), tmp_path / "out", resume=True)) == 2


def test_a_state_that_says_nothing_of_the_files_is_resumed(dataset: Path, tmp_path: Path) -> None:
    plan = tiny_plan(dataset)
    train(plan, tmp_path, stop_after_epoch=1)
    state = torch.load(tmp_path / "last.state.pt", weights_only=True)
    del state["sources"]
    torch.save(state, tmp_path / "last.state.pt")
    assert len(train(plan, tmp_path, resume=True)) == 2
    assert torch.load(tmp_path / "last.state.pt", weights_only=True)["sources"]


@pytest.mark.parametrize("damage", ["half", "empty", "text", "list", "no plan", "no weights"])
def test_a_damaged_state_is_told_in_a_sentence(
    dataset: Path, whole: Path, tmp_path: Path, damage: str
) -> None:
    for path in whole.glob("last.*"):
        shutil.copy(path, tmp_path)
    state_file = tmp_path / "last.state.pt"
    data = state_file.read_bytes()
    state = torch.load(state_file, weights_only=True)
    if damage in {"half", "empty", "text"}:
        damaged = {"half": data[: len(data) // 2], "empty": b"", "text": b"no state\n" * 50}
        state_file.write_bytes(damaged[damage])
    elif damage == "list":
        torch.save([1, 2], state_file)
    else:
        del state["plan" if damage == "no plan" else "model"]
        torch.save(state, state_file)
    with pytest.raises(
        CheckpointError, match=rf"{state_file} is damaged.*--init {tmp_path}/last\.safetensors"
    ) as caught:
        train(full_plan(dataset), tmp_path, resume=True)
    assert "\n" not in str(caught.value)


def test_the_scale_of_float16_is_resumed(dataset: Path, tmp_path: Path) -> None:
    def scaled(scale: float) -> Accelerator:
        accelerator = Accelerator()
        # As on a GPU, where alone accelerate makes one.
        accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=scale)
        return accelerator

    plan = tiny_plan(dataset)
    train(plan, tmp_path, stop_after_epoch=1, accelerator=scaled(64.0))
    second = scaled(2.0)
    train(plan, tmp_path, resume=True, accelerator=second)
    assert second.scaler.get_scale() == 64.0
    train(plan, tmp_path, resume=True)  # in float32 nothing is missed
    # Of version 0.1.0 there are states without it.
    state = torch.load(tmp_path / "last.state.pt", weights_only=True)
    del state["scaler"]
    torch.save(state, tmp_path / "last.state.pt")
    third = scaled(2.0)
    train(plan, tmp_path, resume=True, accelerator=third)
    assert third.scaler.get_scale() == 2.0


@pytest.mark.parametrize("left", ["last.state.pt", "last.safetensors", "best.safetensors"])
def test_a_folder_with_a_training_is_not_written_over(
    dataset: Path, tmp_path: Path, left: str
) -> None:
    (tmp_path / left).write_bytes(b"hours of work")
    with pytest.raises(UsageError, match=r"holds a training already.*--resume"):
        train(tiny_plan(dataset), tmp_path)
    assert (tmp_path / left).read_bytes() == b"hours of work"


# What is left ----------------------------------------------------------------------------------


def test_files_that_are_left(whole: Path, dataset: Path) -> None:
    names = {path.name for path in whole.iterdir()}
    assert names == {
        "best.safetensors",
        "last.safetensors",
        "last.state.pt",
        "history.json",
        "curves.png",
        "tensorboard",
    }
    record = json.loads((whole / "history.json").read_text())
    assert [epoch["epoch"] for epoch in record["epochs"]] == [1, 2, 3]
    assert record["plan"]["ema"] == 0.9
    with Image.open(whole / "curves.png") as image:
        image.load()
        assert min(image.size) > 200


def test_description_of_what_was_trained(whole: Path, dataset: Path) -> None:
    epochs = json.loads((whole / "history.json").read_text())["epochs"]
    last, best = (load_checkpoint(whole / f"{name}.safetensors").spec for name in ("last", "best"))
    assert (last.width, last.depth, last.norm, last.input_size_px) == (4, 2, "batch", 64)
    assert last.training_data == f"{dataset.name}/train, augmentation standard, seed 11"
    assert last.metrics["val_dice"] == pytest.approx(epochs[-1]["dice"])
    assert best.metrics["val_dice"] == pytest.approx(max(epoch["dice"] for epoch in epochs))


def test_curves_can_be_read_by_tensorboard(whole: Path) -> None:
    epochs = json.loads((whole / "history.json").read_text())["epochs"]
    events = EventAccumulator(str(whole / "tensorboard")).Reload()
    for name in ("loss", "dice", "iou"):
        scalars = events.Scalars(name)
        assert [scalar.step for scalar in scalars] == [1, 2, 3]
        expected = [epoch[name] for epoch in epochs]
        assert [scalar.value for scalar in scalars] == pytest.approx(expected, abs=1e-6)


def test_it_learns(dataset: Path, tmp_path: Path) -> None:
    history = train(tiny_plan(dataset, epochs=12, lr=1e-2, norm="batch"), tmp_path)
    assert history[-1].loss < 0.6 * history[0].loss
    assert max(result.dice for result in history) > 0.8


def test_each_step_and_epoch_is_told(dataset: Path, tmp_path: Path) -> None:
    told: list[object] = []

    class Listener:
        def on_step(self, epoch: int, step: int, steps: int, loss: float) -> None:
            told.append((epoch, step, steps))
            assert loss > 0

        def on_epoch(self, result: EpochResult) -> None:
            told.append(result.epoch)

    train(tiny_plan(dataset), tmp_path, progress=Listener())
    steps = [(1, 3), (2, 3), (3, 3)]  # 5 images, 2 at a time, the last one alone
    assert told == [(0, *s) for s in steps] + [1] + [(1, *s) for s in steps] + [2]


# Data sets and settings that do not fit ----------------------------------------------------------


def test_fewer_images_than_a_batch(tmp_path: Path) -> None:
    dataset = write_blots(tmp_path / "set", train=2, val=1, val_name="test")
    history = train(tiny_plan(dataset, epochs=1, batch_size=8), tmp_path / "out")
    assert history[0].loss > 0


def test_images_of_any_size_are_trained_and_judged_on(tmp_path: Path) -> None:
    dataset = write_blots(tmp_path / "set", train=2, val=1, side_px=90)
    write_pair(dataset / "val", "wide", *blots(77, (50, 120)))
    assert len(train(tiny_plan(dataset, epochs=1), tmp_path / "out")) == 1


def test_missing_validation_set(tmp_path: Path) -> None:
    dataset = write_blots(tmp_path / "set", val=0)
    with pytest.raises(UsageError, match="neither a folder val nor a folder test"):
        train(tiny_plan(dataset), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_bad_validation_image_is_found_before_the_first_epoch(tmp_path: Path) -> None:
    dataset = write_blots(tmp_path / "set")
    write_pair(dataset / "val", "odd", blots(0, (64, 80))[0], blots(0)[1])
    with pytest.raises(UsageError, match=r"val: odd: the original is 80x64 and the mask 64x64"):
        train(tiny_plan(dataset), tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"crop_px": 66}, "crop_px is 66.*multiple of 4"),
        ({"input_size_px": 70}, "input_size_px is 70"),
        ({"crop_px": 128}, "crop_px is 128.*no crop is larger"),
    ],
)
def test_sizes_that_do_not_fit_together(
    dataset: Path, tmp_path: Path, changes: dict[str, int], said: str
) -> None:
    with pytest.raises(UsageError, match=said):
        train(tiny_plan(dataset, **changes), tmp_path / "out")


def test_a_batch_with_fewer_items_than_processes() -> None:
    plan = TrainingPlan(dataset=Path("set"), batch_size=2)
    with pytest.raises(UsageError, match=r"batch_size is 2, which 3 processes.*at least 3"):
        check_sizes(plan, processes=3)
    check_sizes(plan, processes=2)
    check_sizes(dataclasses.replace(plan, batch_size=4), processes=3)


def test_an_output_folder_that_is_a_file(dataset: Path, tmp_path: Path) -> None:
    (tmp_path / "out").write_text("a file")
    with pytest.raises(OutputError, match="cannot write"):
        train(tiny_plan(dataset), tmp_path / "out")


def test_an_odd_width_with_normalisation(dataset: Path, tmp_path: Path) -> None:
    train(tiny_plan(dataset, epochs=1, width=3, norm="group"), tmp_path / "out")
    assert load_checkpoint(tmp_path / "out" / "best.safetensors").spec.width == 3


def test_a_training_that_diverges_says_so_and_stops(dataset: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"diverged in epoch 1.*lower --lr"):
        train(tiny_plan(dataset, lr=1e30), tmp_path / "out")
    assert not (tmp_path / "out" / "last.safetensors").exists()


def test_a_mixture_is_trained_on_started_from_weights_and_resumed_to_the_same(
    tmp_path: Path,
) -> None:
    from bcseg_training.synthetic import write_dataset

    for part in ("train", "val"):
        write_dataset(tmp_path / "data" / part, count=1, seed=3, shape_hw=(96, 128))
    options = {"width": 2, "depth": 2, "norm": "batch", "input_size_px": 64, "crop_px": 32}
    first = TrainingPlan(dataset=tmp_path / "data", epochs=1, **options)
    train(first, tmp_path / "first")
    plan = TrainingPlan(
        dataset=tmp_path / "data",
        synthetic=(tmp_path / "data" / "train",),
        augment="strong",
        items=4,
        batch_size=2,
        epochs=2,
        loss="bce+dice",
        init=tmp_path / "first" / "last.safetensors",
        **options,
    )
    train(plan, tmp_path / "whole")
    train(plan, tmp_path / "parts", stop_after_epoch=1)
    train(plan, tmp_path / "parts", resume=True)
    whole, parts = (load_checkpoint(tmp_path / n / "last.safetensors") for n in ("whole", "parts"))
    (kinds,) = (tmp_path / "data" / "train" / "kinds").iterdir()
    kinds.write_text(kinds.read_text() + "\n")
    with pytest.raises(UsageError, match=rf"now in {tmp_path}/data/train: "):
        train(plan, tmp_path / "parts", resume=True)
    assert whole.spec.class_names == ("cell", "core", "white_cell", "platelet")
    for name, weight in whole.model.state_dict().items():
        assert weight.equal(parts.model.state_dict()[name]), name


def test_boxes_need_the_strong_augmentation(tmp_path: Path) -> None:
    from bcseg_training.synthetic import write_dataset

    for part in ("train", "val"):
        write_dataset(tmp_path / part, count=1, seed=3, shape_hw=(96, 128))
    with pytest.raises(UsageError, match="strong"):
        train(TrainingPlan(dataset=tmp_path, boxes=tmp_path, crop_px=512), tmp_path / "out")
