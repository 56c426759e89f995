"""Networks by OpenVINO: the same answer, in 8 bits nearly so, and nothing taken silently."""

from __future__ import annotations

import logging
import shutil
import socket
import subprocess
import sys
import threading
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
import torch
from loguru import logger
from parts import INPUT_SIZE_PX, tiny_network
from safetensors.numpy import save_file
from typer.testing import CliRunner

from bcseg_batch.errors import CheckpointError, DeviceError, SettingsError, UsageError
from bcseg_batch.segment import openvino
from bcseg_batch.segment.checkpoint import load_checkpoint, save_checkpoint
from bcseg_batch.segment.model import UNet
from bcseg_batch.segment.pattern import check_pattern
from bcseg_batch.segment.placement import Cores
from bcseg_batch.segment.postprocess import probability
from bcseg_batch.segment.preprocess import preprocess
from bcseg_batch.segment.quantised import (
    find_quantised,
    quantised_path,
    read_quantised,
    save_quantised,
)
from bcseg_batch.segment.spec import ModelSpec, Norm
from bcseg_batch.service import backend
from bcseg_batch.service.backend import Network, open_network
from bcseg_batch.service.build import SHIPPED_MODEL
from bcseg_batch.store.images import decode_image
from bcseg_training import quantize as quantize_module
from bcseg_training.quantize import Agreement, quantize
from bcseg_training.synthetic import write_dataset

pytest.importorskip("openvino", reason="the extra openvino is not installed")
pytest.importorskip("nncf", reason="the extra quantize is not installed")

Logits = npt.NDArray[np.float32]

# What the other packages say of themselves while a network is quantised.
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")


def images(count: int, side_px: int = INPUT_SIZE_PX) -> Logits:
    return np.random.default_rng(1).random((count, 3, side_px, side_px), dtype=np.float32)


@dataclass(frozen=True)
class Made:
    """A tiny model with its 8-bit form beside it."""

    folder: Path
    agreement: Agreement

    @property
    def checkpoint(self) -> Path:
        return self.folder / "tiny.safetensors"

    @property
    def rounded(self) -> Path:
        return quantised_path(self.checkpoint)


@pytest.fixture(scope="module")
def smears(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("smears") / "set"
    write_dataset(folder, count=6, seed=1, shape_hw=(96, 128))
    return folder


def lifelike_network(paths: Sequence[Path]) -> tuple[UNet, ModelSpec]:
    """Make a network whose layers vary as much as a trained one's: rounding is felt by that."""
    spec = ModelSpec(width=8, depth=2, norm="batch", input_size_px=INPUT_SIZE_PX)
    torch.manual_seed(0)
    model = spec.build().train()
    batch = torch.from_numpy(
        np.stack(
            [preprocess(decode_image(p, max_pixels=10**6).pixels, INPUT_SIZE_PX) for p in paths]
        )
    )
    with torch.no_grad():
        for _ in range(50):  # until the running statistics are those of the images
            logits = model(batch)
        model.head.weight.mul_(3 / logits.std())
        model.head.bias.sub_(model.eval()(batch).median())
    return model, spec


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory, smears: Path) -> Made:
    folder = tmp_path_factory.mktemp("model")
    model, spec = lifelike_network(sorted((smears / "original").iterdir()))
    save_checkpoint(folder / "tiny.safetensors", model, spec)
    return Made(folder, quantize(folder / "tiny.safetensors", [smears], count=4, seed=0))


@pytest.fixture
def own(made: Made, tmp_path: Path) -> Made:
    """A copy that a test may spoil."""
    shutil.copytree(made.folder, tmp_path / "own")
    return replace(made, folder=tmp_path / "own")


def opened(path: Path, **choices: object) -> Network:
    asked: dict[str, object] = {"backend": "auto", "devices": ["cpu"], "dtype": "auto"}
    return open_network(path, **{**asked, **choices})  # type: ignore[arg-type]


# The same answer -------------------------------------------------------------------------------


@pytest.mark.parametrize("norm", ["none", "batch", "group"])
@pytest.mark.parametrize("channels", [1, 4])
def test_openvino_gives_the_logits_of_torch(norm: Norm, channels: int) -> None:
    torch.manual_seed(5)
    model = UNet(out_channels=channels, width=4, depth=2, norm=norm).eval()
    predictor = openvino.open_converted(model, INPUT_SIZE_PX, "float32", "for a test")
    batch = images(3)
    with torch.inference_mode():
        expected = model(torch.from_numpy(batch)).numpy()
    found = predictor.predict(batch)
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-4)
    assert (predictor.placement.device, predictor.placement.dtype) == ("cpu", "float32")


def test_neighbours_in_a_batch_do_not_matter(made: Made) -> None:
    (predictor, *_) = opened(made.checkpoint).predictors
    batch = images(5)
    together = predictor.predict(batch)
    alone = np.concatenate([predictor.predict(batch[i : i + 1]) for i in range(5)])
    assert (together == alone).all()


def test_an_answer_outlives_the_next_question(made: Made) -> None:
    (predictor, *_) = opened(made.checkpoint).predictors
    first = predictor.predict(images(1))
    kept = first.copy()
    predictor.predict(1 - images(1))
    assert (first == kept).all()


def test_twins_answer_at_the_same_time_as_one_does_alone(made: Made) -> None:
    quantised_network = read_quantised(made.rounded)
    predictor = openvino.open_quantised(quantised_network, "for a test")
    predictor._cores = Cores(4)
    twin = predictor.twin()
    batch = images(6)
    expected = predictor.predict(batch)
    found: dict[int, Logits] = {}

    def ask(number: int, which: openvino.OpenVinoPredictor) -> None:
        found[number] = which.predict(batch)

    threads = [
        threading.Thread(target=ask, args=(number, which))
        for number, which in enumerate([predictor, twin])
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for answer in found.values():
        np.testing.assert_allclose(answer, expected, rtol=0, atol=1e-4)
    assert len(found) == 2


def test_8_bits_are_near_to_float32_on_images_they_were_not_made_with(made: Made) -> None:
    assert made.agreement.calibration_images == 4
    assert made.agreement.images == 2
    assert made.agreement.dice > 0.9
    assert made.agreement.mean_shift < 0.02
    assert made.agreement.size_bytes == made.rounded.stat().st_size


def test_the_shipped_8_bit_form_belongs_to_the_shipped_model() -> None:
    network = opened(SHIPPED_MODEL)
    assert network.predictors[0].placement.dtype == "int8"
    exact = opened(SHIPPED_MODEL, backend="torch", dtype="float32")
    assert (network.spec, network.sha256) == (exact.spec, exact.sha256)
    pattern = check_pattern(network.spec.input_size_px)
    ours, theirs = (probability(which.predictors[0].predict(pattern)) for which in (network, exact))
    assert np.abs(ours - theirs).mean() < 0.01
    files = SHIPPED_MODEL.parent.glob("*.safetensors")
    assert sum(path.stat().st_size for path in files) < 10_000_000


# What is taken, and why ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("choices", "dtype", "told"),
    [
        ({}, "int8", "OpenVINO (installed"),
        ({"devices": ["auto"]}, "int8", "OpenVINO (installed"),
        ({"backend": "openvino"}, "int8", "OpenVINO (asked for)"),
        ({"dtype": "int8"}, "int8", "OpenVINO (asked for)"),
        ({"backend": "openvino", "dtype": "float32"}, "float32", "OpenVINO (asked for)"),
        ({"backend": "torch", "dtype": "float32"}, "float32", "torch (asked for)"),
        ({"dtype": "float32"}, "float32", "torch (a precision is asked for)"),
    ],
)
def test_the_backend_is_chosen_for_a_reason(
    made: Made,
    monkeypatch: pytest.MonkeyPatch,
    choices: dict[str, object],
    dtype: str,
    told: str,
) -> None:
    monkeypatch.setattr(backend, "_may_have_gpu", lambda: False)
    network = opened(made.checkpoint, **choices)
    assert {p.placement.dtype for p in network.predictors} == {dtype}
    assert network.backend.startswith(told)
    assert network.sha256 == load_checkpoint(made.checkpoint).sha256


def test_auto_leaves_a_gpu_to_torch(made: Made, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backend, "_may_have_gpu", lambda: True)
    network = opened(made.checkpoint, devices=["auto"])
    assert network.backend.startswith("torch (OpenVINO is not for GPUs")


def test_auto_takes_torch_where_there_is_no_8_bit_form(own: Made) -> None:
    own.rounded.unlink()
    assert opened(own.checkpoint).backend == "torch (the model has no 8-bit form)"


def test_auto_takes_torch_where_openvino_is_not_installed(
    made: Made, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(openvino, "is_installed", lambda: False)
    network = opened(made.checkpoint)
    assert network.backend.startswith("torch (OpenVINO is not installed: pip install")


def test_by_name_openvino_converts_a_model_without_an_8_bit_form(own: Made) -> None:
    own.rounded.unlink()
    network = opened(own.checkpoint, backend="openvino", dtype="float32")
    exact = opened(own.checkpoint, backend="torch", dtype="float32")
    batch = images(2)
    np.testing.assert_allclose(
        network.predictors[0].predict(batch),
        exact.predictors[0].predict(batch),
        rtol=0,
        atol=1e-4,
    )


@pytest.mark.parametrize(
    ("choices", "told"),
    [
        ({"backend": "torch", "dtype": "int8"}, "set one to auto"),
        ({"backend": "openvino", "devices": ["cuda:0"]}, "set model.device to cpu"),
        ({"dtype": "int8", "devices": ["cpu", "cuda:0"]}, "set model.device to cpu"),
        ({"backend": "openvino", "dtype": "float16"}, "float16, which OpenVINO does not"),
    ],
)
def test_what_does_not_go_together_is_refused(
    made: Made, choices: dict[str, object], told: str
) -> None:
    with pytest.raises(SettingsError, match=told):
        opened(made.checkpoint, **choices)


@pytest.mark.parametrize("choices", [{"backend": "openvino"}, {"dtype": "int8"}])
def test_openvino_by_name_has_to_be_installed(
    made: Made, monkeypatch: pytest.MonkeyPatch, choices: dict[str, object]
) -> None:
    monkeypatch.setattr(openvino, "is_installed", lambda: False)
    with pytest.raises(SettingsError, match=r"pip install 'bcseg-batch\[openvino\]'"):
        opened(made.checkpoint, **choices)


def test_8_bits_by_name_need_the_8_bit_form(own: Made) -> None:
    own.rounded.unlink()
    with pytest.raises(CheckpointError, match=r"tiny\.int8\.safetensors.*bcseg-train quantize"):
        opened(own.checkpoint, dtype="int8")


# Files that are not right ----------------------------------------------------------------------


def spoil(made: Made, how: str) -> None:
    data = made.rounded.read_bytes()
    if how == "truncated":
        made.rounded.write_bytes(data[: len(data) // 2])
    elif how == "empty":
        made.rounded.write_bytes(b"")
    elif how == "no safetensors":
        made.rounded.write_bytes(b"a mask" * 1000)
    elif how == "a byte of the constants":
        at = data.rindex(read_quantised(made.rounded).constants[:64])
        made.rounded.write_bytes(data[: at + 7] + bytes([data[at + 7] ^ 1]) + data[at + 8 :])
    elif how == "another kind of file":
        shutil.copy(made.checkpoint, made.rounded)
    elif how == "of another model":
        model, spec = tiny_network(seed=9)
        save_checkpoint(made.checkpoint, model, spec)
    elif how == "a graph that is none":
        whole = read_quantised(made.rounded)
        save_quantised(made.rounded, replace(whole, graph=b"<net>nothing</net>"))
    elif how == "a folder":
        made.rounded.unlink()
        made.rounded.mkdir()
    else:
        raise AssertionError(how)


KINDS_OF_DAMAGE = [
    "truncated",
    "empty",
    "no safetensors",
    "a byte of the constants",
    "another kind of file",
    "of another model",
    "a graph that is none",
    "a folder",
]


@pytest.mark.parametrize("how", KINDS_OF_DAMAGE)
def test_a_damaged_8_bit_form_is_refused_by_name_and_passed_over_by_auto(
    own: Made, how: str
) -> None:
    spoil(own, how)
    with pytest.raises(CheckpointError) as told:
        opened(own.checkpoint, dtype="int8")
    assert "8-bit network" in str(told.value) or str(own.rounded) in str(told.value)
    said: list[str] = []
    sink = logger.add(lambda message: said.append(str(message)), level="WARNING")
    try:
        network = opened(own.checkpoint)
    finally:
        logger.remove(sink)
    assert network.backend == "torch (the 8-bit form is of no use)"
    assert any("going on with torch" in line for line in said)


def test_a_processor_that_computes_something_else_is_noticed(
    own: Made, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain_predict = openvino.OpenVinoPredictor.predict

    def saturated(self: openvino.OpenVinoPredictor, batch: Logits) -> Logits:
        return plain_predict(self, batch) * 0.3

    monkeypatch.setattr(openvino.OpenVinoPredictor, "predict", saturated)
    with pytest.raises(DeviceError, match=r"set model\.backend to torch"):
        opened(own.checkpoint, dtype="int8")
    assert opened(own.checkpoint).backend == "torch (the 8-bit form is of no use)"


def test_a_description_from_elsewhere_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.int8.safetensors"
    save_file({"graph": np.zeros(3, np.uint8)}, path, metadata={"bcseg_int8": '{"odd": 1}'})
    with pytest.raises(CheckpointError, match="describes itself wrongly"):
        read_quantised(path)


def test_what_is_saved_is_read_back(tmp_path: Path, made: Made) -> None:
    whole = read_quantised(made.rounded)
    save_quantised(tmp_path / "b.int8.safetensors", whole)
    again = read_quantised(tmp_path / "b.int8.safetensors")
    assert (again.spec, again.graph, again.constants) == (whole.spec, whole.graph, whole.constants)
    assert (again.answer == whole.answer).all()
    assert find_quantised(tmp_path / "none.safetensors", "0" * 64) is None


# bcseg-train quantize --------------------------------------------------------------------------


def test_the_command_makes_the_form_and_tells_how_near_it_is(own: Made, smears: Path) -> None:
    from bcseg_training.cli import app

    own.rounded.unlink()
    result = CliRunner().invoke(
        app, ["quantize", str(own.checkpoint), str(smears), "--images", "3"]
    )
    assert result.exit_code == 0, result.output
    assert "from 3 images" in result.output
    assert "Dice" in result.output
    assert opened(own.checkpoint, dtype="int8").predictors


def test_a_network_of_the_original_s_layout_can_be_quantised(tmp_path: Path, smears: Path) -> None:
    torch.manual_seed(0)
    spec = ModelSpec(width=2, depth=3, input_size_px=512)
    save_checkpoint(tmp_path / "checkpoint.pth", spec.build(), spec)
    made = quantize(tmp_path / "checkpoint.pth", [smears], count=2, seed=0)
    assert made.path == tmp_path / "checkpoint.int8.safetensors"
    network = opened(tmp_path / "checkpoint.pth")
    assert network.predictors[0].placement.dtype == "int8"
    assert network.spec.class_names == ("cell",)


def test_an_unreadable_image_is_left_out(own: Made, smears: Path, tmp_path: Path) -> None:
    shutil.copytree(smears, tmp_path / "set")
    first = min((tmp_path / "set/original").iterdir())
    first.write_bytes(b"no image")
    made = quantize(own.checkpoint, [tmp_path / "set"], count=100, seed=0)
    assert made.calibration_images + made.images == 5


def test_without_images_there_is_nothing_to_make_it_from(own: Made, tmp_path: Path) -> None:
    with pytest.raises(UsageError):
        quantize(own.checkpoint, [tmp_path], count=4, seed=0)


def test_the_choice_of_images_repeats_and_takes_from_each_folder(smears: Path) -> None:
    first = quantize_module._choose([smears, smears], 4, seed=4)
    assert first == quantize_module._choose([smears, smears], 4, seed=4)
    assert len(first) == 4
    assert len(quantize_module._choose([smears], 100, seed=0)) == 6


# Nothing reaches for the network ---------------------------------------------------------------


def test_no_connection_is_tried(own: Made, smears: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tried: list[object] = []

    def refuse(self: socket.socket, address: object) -> None:
        tried.append(address)
        raise OSError("no network here")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    quantize(own.checkpoint, [smears], count=2, seed=0)
    opened(own.checkpoint, backend="openvino", dtype="float32").predictors[0].predict(images(1))
    opened(own.checkpoint, dtype="int8").predictors[0].predict(images(1))
    for thread in threading.enumerate():
        if thread is not threading.current_thread() and not thread.daemon:
            thread.join(5)
    assert tried == []


def test_a_run_in_8_bits_does_without_torch(made: Made) -> None:
    code = (
        "import sys; from pathlib import Path\n"
        "from bcseg_batch.service.backend import open_network\n"
        "network = open_network(Path(sys.argv[1]), backend='auto', devices=['cpu'], dtype='auto')\n"
        "assert network.predictors[0].placement.dtype == 'int8'\n"
        "assert 'torch' not in sys.modules\n"
        "assert sys.modules['openvino_telemetry'] is None\n"
    )
    subprocess.run([sys.executable, "-c", code, made.checkpoint], check=True)


def test_the_log_is_as_it_was_after_a_conversion(made: Made) -> None:
    before = logging.root.manager.disable
    opened(made.checkpoint, backend="openvino", dtype="float32")
    assert logging.root.manager.disable == before
