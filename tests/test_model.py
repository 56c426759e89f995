"""The network is the original's, and its other shapes hold together."""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from bcseg_batch.segment.checkpoint import load_checkpoint
from bcseg_batch.segment.model import UNet, fold_normalisation
from bcseg_batch.segment.spec import Norm

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from torch import Tensor

State = dict[str, torch.Tensor]


@pytest.fixture(autouse=True, scope="module")
def _one_thread() -> Iterator[None]:
    """Tiny tensors gain nothing from a second thread, which on a busy machine they wait for."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def original_state(width: int, *, seed: int, depth: int = 4, out_channels: int = 1) -> State:
    """Random weights under the original's names, at the scale of a trained network."""
    torch.manual_seed(seed)
    state: State = {}

    def add(name: str, *shape: int, fan_in: int) -> None:
        state[f"{name}.weight"] = torch.randn(*shape) * (2 / fan_in) ** 0.5
        channels = shape[1] if ".up" in name else shape[0]
        state[f"{name}.bias"] = torch.randn(channels) * 0.1

    def add_pair(prefix: str, c_in: int, c_out: int) -> None:
        add(f"{prefix}.c1", c_out, c_in, 3, 3, fan_in=9 * c_in)
        add(f"{prefix}.c2", c_out, c_out, 3, 3, fan_in=9 * c_out)

    channels = [3] + [width * 2**level for level in range(depth + 1)]
    for level, (c_in, c_out) in enumerate(itertools.pairwise(channels[:-1]), start=1):
        add_pair(f"down{level}.c", c_in, c_out)
    add_pair("bottleneck", channels[-2], channels[-1])
    for level, (c_in, c_out) in enumerate(itertools.pairwise(channels[:0:-1]), start=1):
        add(f"up{level}.up", c_in, c_out, 2, 2, fan_in=c_in)
        add_pair(f"up{level}.c", 2 * c_out, c_out)
    add("out", out_channels, width, 1, 1, fan_in=width)
    return state


def original_forward(state: State, x: Tensor) -> Tensor:
    """The original's forward pass, written down from its description."""

    def conv(x: Tensor, name: str) -> Tensor:
        return F.relu(F.conv2d(x, state[f"{name}.weight"], state[f"{name}.bias"], padding=1))

    def double(x: Tensor, name: str) -> Tensor:
        return conv(conv(x, f"{name}.c1"), f"{name}.c2")

    s1 = double(x, "down1.c")
    s2 = double(F.max_pool2d(s1, 2), "down2.c")
    s3 = double(F.max_pool2d(s2, 2), "down3.c")
    s4 = double(F.max_pool2d(s3, 2), "down4.c")
    x = double(F.max_pool2d(s4, 2), "bottleneck")
    for level, skip in enumerate((s4, s3, s2, s1), start=1):
        up, bias = state[f"up{level}.up.weight"], state[f"up{level}.up.bias"]
        x = torch.cat([F.conv_transpose2d(x, up, bias, stride=2), skip], dim=1)
        x = double(x, f"up{level}.c")
    return F.conv2d(x, state["out.weight"], state["out.bias"])


def test_default_network_has_the_originals_parameters() -> None:
    with torch.device("meta"):
        model = UNet()
    assert sum(p.numel() for p in model.parameters()) == 31_031_745


@pytest.mark.parametrize(("width", "side_px", "seed"), [(4, 64, 1), (6, 96, 2), (64, 64, 3)])
def test_original_checkpoint_computes_what_the_original_does(
    tmp_path: Path, width: int, side_px: int, seed: int
) -> None:
    state = original_state(width, seed=seed)
    torch.save(state, tmp_path / "checkpoint.pth")
    model = load_checkpoint(tmp_path / "checkpoint.pth").model
    x = torch.rand(1, 3, side_px, side_px)
    with torch.inference_mode():
        ours, theirs = model(x), original_forward(state, x)
    assert theirs.std() > 0.01  # a network that says something
    torch.testing.assert_close(ours, theirs, rtol=0, atol=0)


@settings(max_examples=40, deadline=None)
@given(
    width=st.integers(1, 13),
    depth=st.integers(1, 3),
    norm=st.sampled_from(["none", "batch", "group"]),
    blocks_hw=st.tuples(st.integers(1, 3), st.integers(2, 3)),
    count=st.integers(1, 3),
    out_channels=st.integers(1, 3),
)
def test_logits_have_the_inputs_size(
    width: int, depth: int, norm: Norm, blocks_hw: tuple[int, int], count: int, out_channels: int
) -> None:
    shape_hw = tuple(2**depth * blocks for blocks in blocks_hw)
    model = UNet(out_channels=out_channels, width=width, depth=depth, norm=norm).eval()
    with torch.inference_mode():
        logits = model(torch.rand(count, 3, *shape_hw))
    assert logits.shape == (count, out_channels, *shape_hw)
    assert torch.isfinite(logits).all()


def test_the_far_skip_reaches_the_output() -> None:
    """A change of one pixel shows at that pixel, which only the first skip can carry so sharply."""
    torch.manual_seed(0)
    model = UNet(width=4, depth=2).eval()
    x = torch.rand(1, 3, 32, 32)
    changed = x.clone()
    changed[0, :, 10, 20] = 1 - changed[0, :, 10, 20]
    with torch.inference_mode():
        difference = (model(x) - model(changed)).abs()[0, 0]
    assert difference[10, 20] > 0
    assert difference[10, 20] > 10 * difference[28:, :4].max()


@pytest.mark.parametrize("norm", ["none", "batch", "group"])
def test_folding_keeps_the_answer_and_the_network(norm: Norm) -> None:
    torch.manual_seed(3)
    model = UNet(out_channels=2, width=4, depth=2, norm=norm)
    with torch.no_grad():  # running statistics and scales as a training leaves them
        for module in model.modules():
            if isinstance(module, torch.nn.BatchNorm2d):
                module.weight.uniform_(0.5, 2)
                module.bias.uniform_(-1, 1)
                module.running_mean.uniform_(-1, 1)
                module.running_var.uniform_(0.5, 2)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    images = torch.rand(2, 3, 32, 32)
    folded = fold_normalisation(model)
    with torch.inference_mode():
        expected = model.eval()(images)
        torch.testing.assert_close(folded(images), expected, rtol=1e-4, atol=1e-4)
    assert not any(isinstance(module, torch.nn.BatchNorm2d) for module in folded.modules())
    for name, tensor in model.state_dict().items():
        torch.testing.assert_close(tensor, before[name], rtol=0, atol=0)
