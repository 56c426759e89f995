"""Where a network runs, in which precision, and what becomes of the device's errors."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import pytest
import torch
from torch import Tensor, nn

from bcseg_batch.errors import DeviceError, SettingsError
from bcseg_batch.segment.devices import choose_placement, open_predictor, probability_shift
from bcseg_batch.segment.model import UNet
from bcseg_batch.segment.placement import OutOfMemoryError, Placement
from bcseg_batch.segment.predictor import Predictor

FLOAT32 = Placement("cpu", "float32", "")
BFLOAT16 = Placement("cpu", "bfloat16", "")
BRAIN_FLOAT_CPU = {"avx512_bf16": True}

without_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="asks what happens without CUDA")


def network(seed: int = 0) -> UNet:
    torch.manual_seed(seed)
    return UNet(width=4, depth=2)


def batch(count: int, side_px: int = 32) -> npt.NDArray[np.float32]:
    return np.random.default_rng(0).random((count, 3, side_px, side_px), dtype=np.float32)


class Answer(nn.Module):
    """Says the same of every pixel; something else in a low precision."""

    def __init__(self, logit: float, low_precision_logit: float) -> None:
        super().__init__()
        self.logits = (logit, low_precision_logit)

    def forward(self, x: Tensor) -> Tensor:
        return x[:, :1] * 0 + self.logits[x.dtype != torch.float32]


class Failing(nn.Module):
    """Raises what a device would."""

    def __init__(self, error: Exception) -> None:
        super().__init__()
        self.error = error

    def forward(self, x: Tensor) -> Tensor:
        raise self.error


# Placement -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("capabilities", "dtype"),
    [
        ({}, "float32"),
        ({"avx2": True, "avx512_f": True}, "float32"),
        ({"avx512_bf16": True}, "bfloat16"),
        ({"amx_bf16": True}, "bfloat16"),
    ],
)
def test_auto_on_a_processor_follows_its_instructions(
    monkeypatch: pytest.MonkeyPatch, capabilities: dict[str, bool], dtype: str
) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities, raising=False)
    placement = choose_placement("cpu", "auto")
    assert (placement.device, placement.dtype) == ("cpu", dtype)
    assert "asked for" in placement.reason
    assert "bfloat16 instructions" in placement.reason


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_a_named_precision_is_kept(dtype: str) -> None:
    assert choose_placement("cpu", dtype).dtype == dtype
    assert open_predictor(network(), 32, device="cpu", dtype=dtype).placement.dtype == dtype


@without_gpu
def test_auto_finds_the_processor() -> None:
    placement = choose_placement("auto", "float32")
    assert placement.device in {"cpu", "mps"}
    assert "first device found" in placement.reason


@without_gpu
@pytest.mark.parametrize("device", ["cuda", "cuda:0", "cuda:7"])
def test_a_missing_device_is_never_replaced(device: str) -> None:
    with pytest.raises(SettingsError, match=rf"{device}.* 0 CUDA devices"):
        open_predictor(network(), 32, device=device)


@pytest.mark.skipif(torch.backends.mps.is_available(), reason="asks what happens without Metal")
def test_missing_metal_is_a_settings_error() -> None:
    with pytest.raises(SettingsError, match="mps"):
        choose_placement("mps", "auto")


@pytest.mark.parametrize("device", ["gpu", "cuda:x", "cuda:-1", "cuda:", "cpu:1x", "", "CPU"])
def test_a_device_that_does_not_exist_is_a_settings_error(device: str) -> None:
    with pytest.raises(SettingsError, match="no device is called"):
        open_predictor(network(), 32, device=device)


def test_a_precision_that_does_not_exist_is_a_settings_error() -> None:
    with pytest.raises(SettingsError, match="no precision is called 'int8'"):
        open_predictor(network(), 32, device="cpu", dtype="int8")


# Prediction ------------------------------------------------------------------------------------


@pytest.mark.parametrize("placement", [FLOAT32, BFLOAT16], ids=["float32", "bfloat16"])
def test_neighbours_in_a_batch_do_not_matter(placement: Placement) -> None:
    predictor = Predictor(network(), placement, 32)
    images = batch(5)
    together = predictor.predict(images)
    alone = np.concatenate([predictor.predict(images[i : i + 1]) for i in range(5)])
    assert together.shape == (5, 1, 32, 32)
    assert together.dtype == np.float32
    assert together.flags.c_contiguous
    # Kernels may be chosen by batch size, so the last bits may differ.
    tolerance = 1e-5 if placement.dtype == "float32" else 2e-2
    np.testing.assert_allclose(together, alone, rtol=0, atol=tolerance)


def test_float32_is_the_plain_forward_pass() -> None:
    model, images = network(), batch(2)
    with torch.inference_mode():
        plain = model(torch.from_numpy(images)).numpy()
    predicted = open_predictor(model, 32, device="cpu", dtype="float32").predict(images)
    np.testing.assert_allclose(predicted, plain, rtol=0, atol=1e-5)


def test_the_network_that_was_given_stays_as_it_is() -> None:
    model = network().train()
    open_predictor(model, 32, device="cpu", dtype="bfloat16").predict(batch(1))
    assert model.training
    assert {p.dtype for p in model.parameters()} == {torch.float32}


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"),
        RuntimeError("[enforce fail at alloc_cpu.cpp:118] DefaultCPUAllocator: can't allocate me"
                     "mory: you tried to allocate 99 bytes."),
        RuntimeError("DefaultCPUAllocator: not enough memory: you tried to allocate 99 bytes."),
        RuntimeError("MPS backend out of memory (MPS allocated: 9 GB, other allocations: 1 GB)"),
        RuntimeError("CUDA error: out of memory"),
    ],
    ids=["cuda", "linux", "windows", "metal", "cuda call"],
)  # fmt: skip
def test_lack_of_memory_is_told_apart(error: Exception) -> None:
    with pytest.raises(OutOfMemoryError, match="no memory for 3 images"):
        Predictor(Failing(error), FLOAT32, 32).predict(batch(3))


def test_real_lack_of_memory_on_the_processor() -> None:
    class Greedy(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.new_zeros(2**60)

    with pytest.raises(OutOfMemoryError):
        Predictor(Greedy(), FLOAT32, 32).predict(batch(1))


def test_a_fault_of_the_code_is_not_blamed_on_the_device() -> None:
    with pytest.raises(RuntimeError, match="sizes do not match"):
        Predictor(Failing(RuntimeError("sizes do not match")), FLOAT32, 32).predict(batch(1))


def test_a_refused_network_is_a_device_error() -> None:
    class Refused(nn.Module):
        def to(self, *_: object, **__: object) -> Refused:
            raise RuntimeError("no kernel image is available")

    with pytest.raises(DeviceError, match=r"cpu refuses the network: no kernel"):
        Predictor(Refused(), FLOAT32, 32)


# Low precision ---------------------------------------------------------------------------------


def test_a_sound_low_precision_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: BRAIN_FLOAT_CPU, raising=False)
    assert open_predictor(network(), 32, device="cpu").placement.dtype == "bfloat16"


@pytest.mark.parametrize("low_precision_logit", [2.0, -100.0, float("nan")])
def test_a_broken_low_precision_is_dropped_and_told(
    monkeypatch: pytest.MonkeyPatch, low_precision_logit: float
) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: BRAIN_FLOAT_CPU, raising=False)
    predictor = open_predictor(Answer(1.0, low_precision_logit), 32, device="cpu")
    assert predictor.placement.dtype == "float32"
    assert "bfloat16 moved a probability by" in predictor.placement.reason
    np.testing.assert_allclose(predictor.predict(batch(1)), 1.0)


def test_a_named_low_precision_is_not_second_guessed() -> None:
    predictor = open_predictor(Answer(1.0, 9.0), 32, device="cpu", dtype="bfloat16")
    assert predictor.placement.dtype == "bfloat16"


@pytest.mark.parametrize(
    ("logit", "shift"), [(0.0, 0.0), (1.0, 0.2311), (100.0, 0.5), (float("nan"), 1.0)]
)
def test_probability_shift(logit: float, shift: float) -> None:
    zero = Predictor(Answer(0.0, 0.0), FLOAT32, 32)
    other = Predictor(Answer(logit, logit), FLOAT32, 32)
    assert probability_shift(zero, other) == pytest.approx(shift, abs=1e-4)
    assert probability_shift(other, zero) == pytest.approx(shift, abs=1e-4)
