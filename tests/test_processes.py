"""Training over several processes: the result of one, written by one, and ended by any."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from datetime import timedelta
from multiprocessing import forkserver
from multiprocessing.context import ForkServerContext
from pathlib import Path
from types import SimpleNamespace
from typing import IO, TypeVar

import daemons
import in_company
import numpy as np
import pytest
import torch
from blots import blots, write_blots, write_pair
from in_company import CASES, Case, alone
from loguru import logger
from torch.distributed import TCPStore

from bcseg_batch.errors import SettingsError
from bcseg_batch.segment.checkpoint import load_checkpoint
from bcseg_batch.segment.model import UNet
from bcseg_training import processes
from bcseg_training.batchnorm import share_batch_norms
from bcseg_training.dataset import Collate, EpochSampler, SharedBatches
from bcseg_training.train import TrainingPlan, train

LAUNCHED = {
    "LOCAL_RANK": "1",
    "RANK": "1",
    "WORLD_SIZE": "2",
    "MASTER_ADDR": "127.0.0.1",
    "MASTER_PORT": "29500",
}
T = TypeVar("T")
BIN = Path(sys.executable).parent
# Rounding differs from the first step on, and AdamW turns a gradient that is almost 0 into a whole
# step in either direction. Another order of the sums in one process moves a loss by 5e-4; batch
# statistics of each part alone, or the mean of the parts' losses, by 1e-2 and more.
CURVE = 2e-3
OPTIONS = {
    "epochs": 4,
    "width": 4,
    "depth": 2,
    "norm": "batch",
    "lr": 1e-3,
    "batch_size": 4,
    "loss": "bce+dice",
    "augment": "standard",
    "crop_px": 64,
    "schedule": "cosine",
    "ema": 0.9,
    "seed": 7,
}


def command(dataset: Path, out: Path, **changes: object) -> list[str]:
    """Give `train DATASET --out OUT` with the options of all trainings here."""
    options = {**OPTIONS, **changes}
    named = [f"--{name.replace('_', '-')}={value}" for name, value in options.items()]
    return ["train", str(dataset), "--out", str(out), *named]


def environment(**more: str) -> dict[str, str]:
    """Give the environment of a process that a launcher starts."""
    # accelerate reads its settings in the home folder of its maker's tools.
    own = {name: value for name, value in os.environ.items() if name not in LAUNCHED}
    return {**own, "OMP_NUM_THREADS": "1", "HF_HOME": "nowhere", **more}


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Nine images: with four a step, the last one of an epoch is alone."""
    return write_blots(tmp_path_factory.mktemp("blots"), train=9, val=3, side_px=72)


@pytest.fixture(scope="module")
def nursery() -> Iterator[ForkServerContext]:
    """Processes are forked from one that has already imported all, which takes seconds each."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["in_company", "bcseg_training.train", "torch._dynamo"])
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OMP_NUM_THREADS", "1")  # and no thread that a fork would lose
        patch.setenv("OPENBLAS_NUM_THREADS", "1")
        # Other tests may have started it, with what they need; there is one for all.
        forkserver._forkserver._stop()  # type: ignore[attr-defined]  # there is no public way
        forkserver.ensure_running()
    yield context
    forkserver._forkserver._stop()  # type: ignore[attr-defined]  # as above
    context.set_forkserver_preload(daemons.PRELOADED)


class Ranks:
    """Processes that are started one by one, as a cluster's own launcher does.

    Args:
        nursery: where they come from.
        act: what they do, of `in_company`.
        given: to `act`, for each process.
    """

    def __init__(
        self, nursery: ForkServerContext, act: Callable[[T], None], given: list[T]
    ) -> None:
        # Held here, and so on a port that is surely free.
        self._store = TCPStore(
            "127.0.0.1", 0, is_master=True, wait_for_workers=False, timeout=timedelta(seconds=90)
        )
        self.processes = []
        self._said: list[IO[str]] = []
        for rank, one in enumerate(given):
            environ = {
                **LAUNCHED,
                "LOCAL_RANK": str(rank),
                "RANK": str(rank),
                "WORLD_SIZE": str(len(given)),
                "MASTER_PORT": str(self._store.port),
                "TORCHELASTIC_USE_AGENT_STORE": "True",
                # accelerate warns where the launcher has left it out.
                "OMP_NUM_THREADS": "1",
            }
            reader, writer = nursery.Pipe(duplex=False)
            process = nursery.Process(target=in_company.become, args=(environ, writer, act, one))
            process.start()
            writer.close()
            self.processes.append(process)
            self._said.append(os.fdopen(os.dup(reader.fileno()), encoding="utf-8"))
            reader.close()

    def wait_for(self, words: str) -> None:
        """Wait until the first process says something."""
        before = []
        for line in self._said[0]:
            before.append(line)
            if words in line:
                return
        pytest.fail("".join(before))

    def end(self) -> tuple[list[int | None], list[str]]:
        """Wait for all; give their exit codes, and what each has said since `wait_for`."""
        said = [stream.read() for stream in self._said]
        for process in self.processes:
            process.join()
        return [process.exitcode for process in self.processes], said

    def __enter__(self) -> Ranks:
        return self

    def __exit__(self, *_: object) -> None:
        for process in self.processes:
            process.kill()
            process.join()
        for stream in self._said:
            stream.close()


def epochs_of(out: Path) -> list[dict[str, float]]:
    """Give the epochs of a history."""
    found: list[dict[str, float]] = json.loads((out / "history.json").read_text())["epochs"]
    return found


def assert_same_curve(out: Path, whole: Path) -> None:
    ours, theirs = epochs_of(out), epochs_of(whole)
    assert [one["epoch"] for one in ours] == [one["epoch"] for one in theirs]
    for name in ("loss", "dice", "iou"):
        assert [one[name] for one in ours] == pytest.approx(
            [one[name] for one in theirs], abs=CURVE
        ), name


def assert_same_weights(out: Path, whole: Path) -> None:
    ours, theirs = (
        load_checkpoint(folder / "last.safetensors").model.state_dict() for folder in (out, whole)
    )
    assert ours.keys() == theirs.keys()
    for name, weight in theirs.items():
        # A step of AdamW is about as long as the learning rate, whatever the gradient.
        assert (ours[name] - weight).abs().max() <= max(1e-3, 2e-2 * float(weight.abs().max())), (
            name
        )


# Starting --------------------------------------------------------------------------------------


@pytest.fixture
def told() -> Iterator[list[str]]:
    """The log lines."""
    lines: list[str] = []
    number = logger.add(lambda message: lines.append(str(message).rstrip()), format="{message}")
    yield lines
    logger.remove(number)


def test_a_process_that_nobody_launched_is_alone(told: list[str]) -> None:
    assert not processes.check_launch({}, gpus=0)
    # What a cluster's own scheduler may leave in the environment.
    assert not processes.check_launch({"WORLD_SIZE": "4", "RANK": "0", "MASTER_ADDR": "x"}, gpus=0)
    assert told == []


def test_a_launcher_that_starts_one_process_where_several_were_meant_is_told_of(
    told: list[str],
) -> None:
    # As `accelerate launch --cpu --num_processes 2` does.
    environ = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500", "ACCELERATE_USE_CPU": "True"}
    assert not processes.check_launch(environ, gpus=0)
    assert "torchrun" in told[0]


def test_a_launched_process_knows_it() -> None:
    assert processes.check_launch(LAUNCHED, gpus=0)
    assert processes.check_launch(LAUNCHED, gpus=2)


@pytest.mark.parametrize(
    ("changes", "gpus", "said"),
    [
        ({"RANK": None, "MASTER_PORT": None}, 0, r"but not RANK, MASTER_PORT: .*torchrun"),
        ({"WORLD_SIZE": "two"}, 0, r"WORLD_SIZE is 'two'"),
        ({"LOCAL_RANK": "-1"}, 0, r"LOCAL_RANK is '-1'"),
        ({}, 1, r"process 1 should have GPU 1.*shows it 1.*no more than 1"),
    ],
)
def test_a_launch_that_cannot_be_followed_is_refused(
    changes: dict[str, str | None], gpus: int, said: str
) -> None:
    environ = {name: value for name, value in {**LAUNCHED, **changes}.items() if value is not None}
    with pytest.raises(SettingsError, match=said):
        processes.check_launch(environ, gpus=gpus)


def test_a_torch_without_its_distributed_part(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.distributed, "is_available", lambda: False)
    with pytest.raises(SettingsError, match=r"without torch\.distributed"):
        processes.check_launch(LAUNCHED, gpus=0)


@pytest.mark.parametrize(
    ("set_up", "environ", "said"),
    [
        ({"distributed_type": "FSDP"}, {}, "set up for FSDP"),
        ({"distributed_type": "DEEPSPEED"}, {}, "set up for DEEPSPEED"),
        ({"gradient_accumulation_steps": 2}, {}, "accumulate gradients"),
        ({}, LAUNCHED, "has started 2 processes, but accelerate cannot join them"),
    ],
)
def test_a_set_up_that_would_give_another_result_is_refused(
    monkeypatch: pytest.MonkeyPatch,
    set_up: dict[str, object],
    environ: dict[str, str],
    said: str,
) -> None:
    given = {"distributed_type": "NO", "gradient_accumulation_steps": 1, **set_up}
    given["distributed_type"] = SimpleNamespace(value=given["distributed_type"])
    made = SimpleNamespace(**given, num_processes=1, device="cpu")
    monkeypatch.setattr(processes, "Accelerator", lambda **_: made)
    with pytest.raises(SettingsError, match=said):
        processes.open_accelerator(environ)


def test_processes_that_do_not_find_each_other(monkeypatch: pytest.MonkeyPatch) -> None:
    def lost(**_: object) -> None:
        raise torch.distributed.DistNetworkError("The client socket has timed out\nframe #0")

    monkeypatch.setattr(processes, "Accelerator", lost)
    with pytest.raises(
        SettingsError, match=r"process 1 of 2 cannot join.*127\.0\.0\.1:29500 \(.*timed out\)"
    ):
        processes.open_accelerator(LAUNCHED)


# Sharing -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [1, 2, 3, 5])
@pytest.mark.parametrize("items", [1, 5, 8, 13])
def test_parts_make_up_the_batches_of_one_process(items: int, count: int) -> None:
    def batches(process: int, processes: int) -> list[list[tuple[int, int]]]:
        sampler = EpochSampler(items, repeats=1, seed=3)
        shared = SharedBatches(sampler, batch_size=5, process=process, processes=processes)
        assert len(list(shared)) == len(shared)
        return list(shared)

    parts = [batches(process, count) for process in range(count)]
    for batch, *shares in zip(batches(0, 1), *parts, strict=True):
        assert sorted(item for share in shares for item in share) == sorted(batch)
        sizes = [len(share) for share in shares]
        assert max(sizes) - min(sizes) <= 1


def test_a_part_without_items_has_the_shapes_of_one_with() -> None:
    collate = Collate(((3, 4, 4), (1, 4, 4), (1, 4, 4)))
    item = (torch.ones(3, 4, 4), torch.ones(1, 4, 4), torch.ones(1, 4, 4))
    for full, empty in zip(collate([item, item]), collate([]), strict=True):
        assert empty.shape == (0, *full.shape[1:])
        assert empty.dtype == full.dtype


def test_a_shared_batch_norm_keeps_weights_and_names() -> None:
    model = UNet(width=2, depth=1, norm="batch")
    before = model.state_dict(keep_vars=True)
    share_batch_norms(model)
    after = model.state_dict(keep_vars=True)
    assert list(before) == list(after)
    assert all(after[name] is before[name] for name in before)


def test_a_shared_batch_norm_judges_as_a_plain_one() -> None:
    model = UNet(width=2, depth=1, norm="batch").eval()
    x = torch.rand(2, 3, 8, 8)
    before = model(x)
    share_batch_norms(model)
    assert torch.equal(model.eval()(x), before)


# Real processes ----------------------------------------------------------------------------------


@pytest.mark.slow
def test_losses_gradients_and_batch_statistics_are_those_of_the_joined_batch(
    nursery: ForkServerContext, tmp_path: Path
) -> None:
    with Ranks(nursery, in_company.all_cases, [tmp_path / "found"] * 3) as ranks:
        codes, said = ranks.end()
    assert codes == [0, 0, 0], said
    found = torch.load(tmp_path / "found")

    def difference(case: Case, ours: dict[str, torch.Tensor]) -> float:
        theirs = alone(case)
        assert ours.keys() == theirs.keys()
        return max(
            float((ours[name] - value).abs().max() / value.abs().max().clamp_min(1e-9))
            for name, value in theirs.items()
        )

    worst = {case: difference(case, ours) for case, ours in zip(CASES, found, strict=True)}
    # In float64, where rounding is 1e-16.
    assert max(worst.values()) < 1e-11, worst


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_two_then_one_then_three_processes_train_as_one(
    nursery: ForkServerContext, dataset: Path, tmp_path: Path
) -> None:
    plan = TrainingPlan(dataset=dataset, **OPTIONS)  # type: ignore[arg-type]  # by name
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        train(plan, tmp_path / "whole")
        out = tmp_path / "out"
        launch = [BIN / "accelerate", "launch", "--multi_gpu", "--num_processes=2"]
        launch += ["--main_process_port=0", "-m", "bcseg_training.cli"]
        said = launched([*launch, *command(dataset, out, stop_after_epoch=2)])
        assert said.count("best epoch ") == 1
        assert said.count("epoch 2 of 4: loss ") == 1
        train(plan, out, resume=True, stop_after_epoch=3)
    finally:
        torch.set_num_threads(threads)
    with Ranks(
        nursery, in_company.command, [[*command(dataset, out), "--resume"] for _ in range(3)]
    ) as ranks:
        codes, told = ranks.end()
    assert codes == [0, 0, 0], told
    assert "resuming after epoch 3 of 4" in told[0]
    assert told[1:] == ["", ""]
    assert_same_curve(out, tmp_path / "whole")
    assert_same_weights(out, tmp_path / "whole")
    names = [sorted(p.name for p in folder.iterdir()) for folder in (out, tmp_path / "whole")]
    assert names[0] == names[1]
    assert len(list((out / "tensorboard").iterdir())) == 4  # one for each epoch


def launched(arguments: list[object]) -> str:
    """Run a launcher to its good end, and give all that was said."""
    done = subprocess.run(
        [str(argument) for argument in arguments],
        env=environment(),
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout + done.stderr


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_a_stop_or_a_death_of_one_ends_all_and_is_resumed(
    nursery: ForkServerContext, dataset: Path, tmp_path: Path
) -> None:
    out, elsewhere = tmp_path / "out", tmp_path / "elsewhere"
    # Long enough to be met in the middle; the second process has another folder to write to.
    options = {"epochs": 500, "crops_per_image": 4, "loader_processes": 1}
    arguments = [command(dataset, folder, **options) for folder in (out, elsewhere)]
    with Ranks(nursery, in_company.command, arguments) as ranks:
        ranks.wait_for("epoch 1 of 500")
        pid = ranks.processes[1].pid
        loaders = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
        for each in (*loaders, pid):  # as torchrun does
            os.kill(int(each or 0), signal.SIGTERM)
        codes, said = ranks.end()
    assert codes == [128 + signal.SIGTERM] * 2, said
    assert "stopped by SIGTERM: the same command with --resume" in said[0]
    assert said[1] == ""
    stopped = len(epochs_of(out))

    with Ranks(nursery, in_company.command, [[*given, "--resume"] for given in arguments]) as ranks:
        ranks.wait_for(f"epoch {stopped + 1} of 500")
        ranks.processes[1].kill()
        codes, said = ranks.end()
    assert codes == [75, -signal.SIGKILL], said
    assert "bcseg-train: another process of this training has ended" in said[0]
    assert "Traceback" not in said[0]
    killed = len(epochs_of(out))
    assert killed > stopped
    assert not elsewhere.exists()

    del options["loader_processes"]
    plan = TrainingPlan(dataset=dataset, **{**OPTIONS, **options})  # type: ignore[arg-type]  # by name
    history = train(plan, out, resume=True, stop_after_epoch=killed + 1)
    assert [result.epoch for result in history] == list(range(1, killed + 2))
    assert np.isfinite([result.loss for result in history]).all()


@pytest.mark.slow
def test_what_one_process_finds_amiss_ends_all_and_is_told_once(
    nursery: ForkServerContext, dataset: Path, tmp_path: Path
) -> None:
    other = write_blots(tmp_path / dataset.name, train=9, val=3, side_px=72)
    write_pair(other / "train", "smear0", *blots(99, (72, 72)))
    arguments = [command(folder, tmp_path / "out", epochs=1) for folder in (dataset, other)]
    with Ranks(nursery, in_company.command, arguments) as ranks:
        codes, said = ranks.end()
    assert codes == [2, 2], said
    assert said[0] == ""
    assert said[1].startswith("bcseg-train (process 1): process 1 differs from process 0 in files:")
    assert not (tmp_path / "out").exists()
