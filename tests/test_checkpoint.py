"""A model file is read whole and right, or refused with a sentence that says why."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import pickle
import resource
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from test_model import original_state

from bcseg_batch.errors import CheckpointError, OutputError
from bcseg_batch.segment.checkpoint import load_checkpoint, read_spec_json, save_checkpoint
from bcseg_batch.segment.model import UNet
from bcseg_batch.segment.spec import ModelSpec

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from bcseg_batch.segment.spec import Norm

SPEC = ModelSpec(
    width=4,
    depth=2,
    norm="batch",
    input_size_px=64,
    threshold=0.4,
    training_data="blots",
    metrics={"val_dice": 0.5},
)


def written(path: Path, spec: ModelSpec = SPEC) -> Path:
    torch.manual_seed(0)
    save_checkpoint(path, spec.build(), spec)
    return path


def rewritten(
    path: Path,
    *,
    header: Callable[[dict[str, Any]], object] = lambda _: None,
    weights: Callable[[dict[str, torch.Tensor]], object] = lambda _: None,
) -> Path:
    """A sound file with its description or its weights changed."""
    written(path)
    spec = SPEC.model_dump(mode="json")
    tensors = load_file(path)
    header(spec)
    weights(tensors)
    save_file(tensors, path, metadata={"bcseg": json.dumps(spec)})
    return path


def refusal(path: Path) -> str:
    """What is said of a file; the name always is."""
    with pytest.raises(CheckpointError) as caught:
        load_checkpoint(path)
    assert str(path) in str(caught.value)
    return str(caught.value)


@contextlib.contextmanager
def without_root() -> Iterator[None]:
    """Give up the rights that would read anything, for a while."""
    if os.geteuid():
        yield
        return
    os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(0)


@contextlib.contextmanager
def files_of_at_most(size_bytes: int) -> Iterator[None]:
    """Let no file grow further, as on a disk that is nearly full."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size_bytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


# Sound files -----------------------------------------------------------------------------------


@pytest.mark.parametrize("norm", ["none", "batch", "group"])
def test_safetensors_round_trip(tmp_path: Path, norm: Norm) -> None:
    spec = SPEC.model_copy(update={"norm": norm})
    model = spec.build()
    model(torch.rand(2, 3, 64, 64))  # moves the running statistics of a batch normalisation
    save_checkpoint(tmp_path / "m.safetensors", model, spec)
    loaded = load_checkpoint(tmp_path / "m.safetensors")
    assert loaded.spec == spec
    assert loaded.path == tmp_path / "m.safetensors"
    assert not loaded.model.training
    for name, tensor in model.state_dict().items():
        torch.testing.assert_close(loaded.model.state_dict()[name], tensor, rtol=0, atol=0)
    assert json.loads(read_spec_json(tmp_path / "m.safetensors"))["training_data"] == "blots"


def test_original_round_trip_keeps_names_and_values(tmp_path: Path) -> None:
    state = original_state(4, seed=0)
    torch.save(state, tmp_path / "checkpoint.pth")
    first = load_checkpoint(tmp_path / "checkpoint.pth")
    assert (first.spec.width, first.spec.depth, first.spec.norm) == (4, 4, "none")
    assert (first.spec.input_size_px, first.spec.threshold) == (512, 0.5)
    save_checkpoint(tmp_path / "taken.safetensors", first.model, first.spec)
    taken = load_checkpoint(tmp_path / "taken.safetensors")
    save_checkpoint(tmp_path / "given.pth", taken.model, taken.spec)
    given = torch.load(tmp_path / "given.pth", weights_only=True)
    assert set(given) == set(state)
    assert all(torch.equal(given[name], state[name]) for name in state)


def test_hash_is_that_of_the_bytes(tmp_path: Path) -> None:
    path = written(tmp_path / "m.safetensors")
    assert load_checkpoint(path).sha256 == hashlib.sha256(path.read_bytes()).hexdigest()


def test_half_precision_weights_are_read_as_float32(tmp_path: Path) -> None:
    def halve(weights: dict[str, torch.Tensor]) -> None:
        weights["head.weight"] = weights["head.weight"].bfloat16()

    model = load_checkpoint(rewritten(tmp_path / "m.safetensors", weights=halve)).model
    assert all(p.dtype == torch.float32 for p in model.parameters())


def test_a_network_with_normalisation_has_no_original_layout(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="batch normalisation"):
        written(tmp_path / "m.pth")
    assert list(tmp_path.iterdir()) == []


# Broken files ----------------------------------------------------------------------------------


def test_missing_file(tmp_path: Path) -> None:
    assert "No such file" in refusal(tmp_path / "none.safetensors")


@pytest.mark.parametrize("suffix", [".safetensors", ".pth"])
def test_folder_in_place_of_a_file(tmp_path: Path, suffix: str) -> None:
    (tmp_path / f"m{suffix}").mkdir()
    assert "directory" in refusal(tmp_path / f"m{suffix}")


@pytest.mark.parametrize("suffix", [".safetensors", ".pth"])
@pytest.mark.parametrize("kept", [0.0, 0.001, 0.3, 0.999])
def test_truncated_file(tmp_path: Path, suffix: str, kept: float) -> None:
    spec = SPEC.model_copy(update={"norm": "none"})
    path = written(tmp_path / f"m{suffix}", spec)
    data = path.read_bytes()
    path.write_bytes(data[: int(kept * len(data))])
    refusal(path)


@pytest.mark.parametrize("suffix", [".safetensors", ".pth", ".pt"])
@pytest.mark.parametrize("data", [b"this is a text\n" * 100, b"\x80\x04N.", b"\xff" * 64])
def test_file_that_is_no_model(tmp_path: Path, suffix: str, data: bytes) -> None:
    path = tmp_path / f"m{suffix}"
    path.write_bytes(data)
    refusal(path)


def test_wrong_suffix(tmp_path: Path) -> None:
    path = written(tmp_path / "m.safetensors").rename(tmp_path / "m.onnx")
    assert ".safetensors nor .pth" in refusal(path)


@pytest.mark.parametrize("legacy", [False, True])
def test_pickled_code_is_never_run(tmp_path: Path, legacy: bool) -> None:
    victim = tmp_path / "victim"

    class Payload:
        def __reduce__(self) -> tuple[Any, ...]:
            return Path.touch, (victim,)

    path = tmp_path / "checkpoint.pth"
    if legacy:
        path.write_bytes(pickle.dumps(Payload()))
    else:
        torch.save({"out.weight": Payload()}, path)
    message = refusal(path)
    assert not victim.exists()
    assert "pickled objects are never run" in message


def test_pickled_network_is_refused(tmp_path: Path) -> None:
    torch.save(UNet(width=1, depth=1), tmp_path / "m.pth")
    assert "state_dict" in refusal(tmp_path / "m.pth")


@pytest.mark.parametrize("content", [torch.zeros(3), [1, 2], {"epoch": 3}, {1: torch.zeros(1)}])
def test_pickle_without_weights_is_refused(tmp_path: Path, content: object) -> None:
    torch.save(content, tmp_path / "m.pth")
    assert "state_dict" in refusal(tmp_path / "m.pth")


def test_weights_of_another_network_are_refused(tmp_path: Path) -> None:
    torch.save({"conv.weight": torch.zeros(1, 1, 3, 3)}, tmp_path / "m.pth")
    assert "layout" in refusal(tmp_path / "m.pth")


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (lambda s: s.pop("down2.c.c1.weight"), "down2.c.c1.weight"),
        (lambda s: s.pop("out.bias"), "out.bias"),
        (lambda s: s.update({"down1.bn.weight": torch.zeros(4)}), "down1.bn.weight"),
        (lambda s: s.update({"out.weight": torch.zeros(1, 5, 1, 1)}), r"(1, 5, 1, 1)"),
        (lambda s: s["out.bias"].fill_(float("nan")), "not finite"),
        (lambda s: s.update({"out.bias": torch.zeros(1, dtype=torch.complex64)}), "complex64"),
        (lambda s: s.update({"out.bias": torch.zeros(1).to_sparse()}), "sparse"),
        (lambda s: s.update({"out.bias": torch.tensor([1e300], dtype=torch.float64)}), "finite"),
        (lambda s: s.update({"down1.c.c1.weight": torch.zeros(4)}), "layout"),
        (lambda s: s.update({"down77.c.c1.weight": torch.zeros(4)}), "layout"),
    ],
)
def test_original_with_wrong_weights(
    tmp_path: Path, change: Callable[[dict[str, torch.Tensor]], object], named: str
) -> None:
    state = original_state(4, seed=0)
    change(state)
    torch.save(state, tmp_path / "m.pth")
    assert named in refusal(tmp_path / "m.pth")


@pytest.mark.parametrize("name", ["out.bias", "out.weight", "down1.c.c1.weight"])
@pytest.mark.parametrize(
    ("odd", "named"),
    [
        (lambda tensor: tensor.to("meta"), "meta"),
        (lambda tensor: tensor.to_sparse(), "sparse"),
        (lambda tensor: torch.nested.as_nested_tensor([tensor]), "nested"),
        (lambda tensor: torch.nested.as_nested_tensor([tensor], layout=torch.jagged), "nested"),
        (lambda tensor: torch.quantize_per_tensor(tensor, 0.1, 0, torch.qint8), "quantised"),
    ],
)
@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors:UserWarning")
@pytest.mark.filterwarnings("ignore:torch.quantize_per_tensor:UserWarning")
@pytest.mark.filterwarnings("ignore:TypedStorage is deprecated:UserWarning")  # torch's own use
def test_tensors_that_are_no_plain_arrays_are_named(
    tmp_path: Path, name: str, odd: Callable[[torch.Tensor], torch.Tensor], named: str
) -> None:
    state = original_state(4, seed=0)
    state[name] = odd(state[name])
    torch.save(state, tmp_path / "m.pth")
    message = refusal(tmp_path / "m.pth")
    assert named in message
    assert "\n" not in message


def test_weights_saved_from_data_parallel_are_the_same_network(tmp_path: Path) -> None:
    state = original_state(4, seed=0)
    torch.save(state, tmp_path / "plain.pth")
    parallel = torch.nn.DataParallel(load_checkpoint(tmp_path / "plain.pth").model).state_dict()
    assert all(name.startswith("module.") for name in parallel)  # as this test has it, so torch
    torch.save({f"module.{name}": t for name, t in state.items()}, tmp_path / "parallel.pth")
    plain, same = (load_checkpoint(tmp_path / f"{n}.pth") for n in ("plain", "parallel"))
    assert plain.spec.width == same.spec.width
    weights = same.model.state_dict()
    assert all(torch.equal(t, weights[name]) for name, t in plain.model.state_dict().items())


@pytest.mark.parametrize("key", ["state_dict", "model"])
def test_a_training_s_checkpoint_is_told_where_its_weights_lie(tmp_path: Path, key: str) -> None:
    state = original_state(4, seed=0)
    torch.save({"epoch": 3, key: state, "optimizer": {"state": {}}}, tmp_path / "m.pth")
    message = refusal(tmp_path / "m.pth")
    assert f"has one under '{key}':" in message
    assert f"[{key!r}]" in message
    taken = torch.load(tmp_path / "m.pth", weights_only=True)[key]  # as it says
    torch.save(taken, tmp_path / "weights.pth")
    assert load_checkpoint(tmp_path / "weights.pth").spec.width == 4


def test_a_network_for_grey_images_is_refused_as_such(tmp_path: Path) -> None:
    state = original_state(4, seed=0)
    state["down1.c.c1.weight"] = state["down1.c.c1.weight"][:, :1].clone()
    torch.save(state, tmp_path / "m.pth")
    assert "images of 1 channels" in refusal(tmp_path / "m.pth")


def test_a_size_that_is_not_supported_is_named(tmp_path: Path) -> None:
    state = original_state(4, seed=0)
    state["out.weight"] = torch.zeros(17, 4, 1, 1)
    torch.save(state, tmp_path / "m.pth")
    assert "out_channels" in refusal(tmp_path / "m.pth")


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (lambda w: w.pop("head.bias"), "head.bias is missing"),
        (lambda w: w.update(extra=torch.zeros(1)), "extra is not part"),
        (lambda w: w.update({"head.bias": torch.zeros(2)}), "(2,) and should be (1,)"),
        (lambda w: w["head.bias"].fill_(float("inf")), "not finite"),
        (lambda w: w.update({"head.bias": torch.zeros(1, dtype=torch.int64)}), "int64"),
        (lambda w: w.update({"head.bias": torch.zeros(1, dtype=torch.bool)}), "bool"),
    ],
)
def test_safetensors_with_wrong_weights(
    tmp_path: Path, change: Callable[[dict[str, torch.Tensor]], object], named: str
) -> None:
    assert named in refusal(rewritten(tmp_path / "m.safetensors", weights=change))


def test_eight_bit_floats_are_read_or_refused_in_words(tmp_path: Path) -> None:
    def shorten(weights: dict[str, torch.Tensor]) -> None:
        weights["head.bias"] = torch.tensor([float("nan")]).to(torch.float8_e4m3fn)

    assert "not finite" in refusal(rewritten(tmp_path / "m.safetensors", weights=shorten))


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"colour": "red"}, "colour"),
        ({"width": 8}, "should be"),
        ({"width": "wide"}, "width"),
        ({"threshold": 1.5}, "threshold"),
        ({"architecture": "resnet"}, "architecture"),
        ({"pixel_scaling": "-1..1"}, "pixel_scaling"),
        ({"norm": "layer"}, "norm"),
        ({"class_names": ["cell", "nucleus"]}, "2 names for 1"),
        ({"input_size_px": 66}, "multiple of 4"),
        # A network of 40 GB, which is not to be built before its weights are seen to be missing.
        ({"width": 512, "depth": 6, "input_size_px": 512}, "is missing"),
    ],
)
def test_description_that_is_wrong(tmp_path: Path, change: dict[str, Any], named: str) -> None:
    path = rewritten(tmp_path / "m.safetensors", header=lambda spec: spec.update(change))
    assert named in refusal(path)


@pytest.mark.parametrize("metadata", [None, {"format": "pt"}, {"bcseg": "{"}, {"bcseg": "[]"}])
def test_safetensors_of_somebody_else(tmp_path: Path, metadata: dict[str, str] | None) -> None:
    save_file({"a": torch.zeros(2)}, tmp_path / "m.safetensors", metadata=metadata)
    message = refusal(tmp_path / "m.safetensors")
    assert "bcseg description" in message or "describes itself wrongly" in message


def test_file_without_the_right_to_read(tmp_path: Path) -> None:
    path = written(tmp_path / "m.safetensors")
    path.chmod(0)
    with without_root():
        message = refusal(path)
    assert "cannot be read: Permission denied" in message


# Writing ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", [".safetensors", ".pth"])
def test_missing_folder_is_an_output_error(tmp_path: Path, suffix: str) -> None:
    spec = SPEC.model_copy(update={"norm": "none"})
    with pytest.raises(OutputError, match="No such file"):
        written(tmp_path / "nowhere" / f"m{suffix}", spec)


@pytest.mark.parametrize("suffix", [".safetensors", ".pth"])
def test_failed_writing_leaves_the_old_file_and_no_other(tmp_path: Path, suffix: str) -> None:
    spec = SPEC.model_copy(update={"norm": "none"})
    path = tmp_path / f"m{suffix}"
    path.write_bytes(b"old")
    with files_of_at_most(2000), pytest.raises(OutputError, match="File too large"):
        written(path, spec)
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == {path.name: b"old"}
