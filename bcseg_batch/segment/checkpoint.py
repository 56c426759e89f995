"""Model files: safetensors with the model's description in the header, and the original's `.pth`.

A file is either read whole and right or refused with a `CheckpointError` that names what is wrong;
nothing is ever loaded in its place, and no pickled code is ever run.
"""

from __future__ import annotations

import io
import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeGuard

import torch
from pydantic import ValidationError
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from bcseg_batch.errors import CheckpointError
from bcseg_batch.segment.model import UNet
from bcseg_batch.segment.model_file import damaged, problems_of, sha256_of, write_model_file
from bcseg_batch.segment.spec import HEADER_KEY, ModelSpec, read_spec


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A model as it was read.

    Attributes:
        model: the network in float32 on the CPU, in evaluation mode.
        spec: its description.
        sha256: of the file's bytes, hexadecimal.
        path: where it was read.
    """

    model: UNet
    spec: ModelSpec
    sha256: str
    path: Path


def load_checkpoint(path: Path) -> Checkpoint:
    """Read a model file of either kind.

    Raises:
        CheckpointError: missing, unreadable, not a model, or not this network.
    """
    sha256 = sha256_of(path)
    if path.suffix == ".safetensors":
        spec, weights = _read_safetensors(path)
    elif path.suffix in {".pth", ".pt"}:
        spec, weights = _read_original(path)
    else:
        raise CheckpointError(
            f"model file {path} ends in neither .safetensors nor .pth: give a file written by "
            "bcseg-train, or a checkpoint.pth of the original project"
        )
    # Without memory at first: a wrong description may ask for more than the machine has.
    with torch.device("meta"):
        expected = spec.build().state_dict()
    _check_weights(path, expected=expected, found=weights)
    model = spec.build()
    model.load_state_dict(weights)
    return Checkpoint(model.eval(), spec, sha256, path)


def save_checkpoint(path: Path, model: UNet, spec: ModelSpec) -> None:
    """Write a model file; it appears under its name only when it is whole.

    Args:
        path: a name that ends in `.safetensors`, or in `.pth` for the original's layout.
        model: the network that `spec` describes.
        spec: its description; left out of a `.pth`, which has no room for it.

    Raises:
        CheckpointError: a `.pth` is asked for a network the original cannot express.
        OutputError: the file cannot be written.
    """
    weights = {name: tensor.contiguous().cpu() for name, tensor in model.state_dict().items()}
    if path.suffix == ".pth":
        buffer = io.BytesIO()
        torch.save(_to_original_keys(weights, spec), buffer)
        data = buffer.getvalue()
    else:
        data = save(weights, metadata={HEADER_KEY: spec.model_dump_json()})
    write_model_file(path, data)


def _read_safetensors(path: Path) -> tuple[ModelSpec, dict[str, Tensor]]:
    try:
        with safe_open(path, framework="pt") as file:
            weights = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a dict
    except (SafetensorError, OSError) as error:
        raise damaged(path, error) from error
    return read_spec(path), weights


def _read_original(path: Path) -> tuple[ModelSpec, dict[str, Tensor]]:
    try:
        content: Any = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises anything at all for a file that is not its own
        raise CheckpointError(
            f"model file {path} is not a plain state_dict saved by torch.save (pickled objects "
            f"are never run): {str(error).splitlines()[0] if str(error) else type(error).__name__}"
        ) from error
    if not _is_state_dict(content):
        raise CheckpointError(
            f"model file {path} holds no state_dict, that is names with tensors{_inner(content)}"
        )
    for name, tensor in content.items():
        if kind := _odd_kind(tensor):
            raise CheckpointError(
                f"model file {path} has a {kind} tensor {name}: save dense weights with values, "
                "torch.save(model.cpu().state_dict(), ...)"
            )
    # torch.nn.DataParallel calls the network it holds `module`; the weights are the same.
    if all(name.startswith("module.") for name in content):
        content = {name.removeprefix("module."): tensor for name, tensor in content.items()}
    try:
        levels = max(int(m[1]) for name in content if (m := re.match(r"down(\d+)\.c\.c1\.", name)))
        width, in_channels, _, _ = content["down1.c.c1.weight"].shape
        out_channels = content["out.weight"].shape[0]
    except (ValueError, KeyError, IndexError) as error:
        raise CheckpointError(
            f"model file {path} has not the layout of the original's checkpoint.pth "
            "(down1..4, bottleneck, up1..4, out)"
        ) from error
    if in_channels != 3:
        raise CheckpointError(
            f"model file {path} is of a network for images of {in_channels} channels, and "
            "photographs are read as RGB, which has 3: train one on colour images"
        )
    try:
        spec = ModelSpec(
            width=width,
            depth=levels,
            in_channels=in_channels,
            out_channels=out_channels,
            class_names=("cell", *(f"channel{i}" for i in range(1, out_channels))),
            training_data="unknown: a checkpoint of the original layout says nothing of it",
        )
    except ValidationError as error:
        raise CheckpointError(
            f"model file {path} has the layout of the original's checkpoint.pth in a size that is "
            f"not supported: {problems_of(error)}"
        ) from error
    keys = _original_keys(spec.depth)
    # By the file's own names: ours would mean nothing to its owner.
    missing = sorted(set(keys.values()) - set(content))
    if missing:
        raise CheckpointError(
            f"model file {path} lacks weights of the original network: {', '.join(missing[:5])}"
        )
    foreign = sorted(set(content) - set(keys.values()))
    if foreign:
        raise CheckpointError(
            f"model file {path} holds weights the original network has not: "
            f"{', '.join(foreign[:5])}"
        )
    return spec, {ours: content[theirs] for ours, theirs in keys.items()}


def _is_state_dict(content: object) -> TypeGuard[dict[str, Tensor]]:
    return isinstance(content, dict) and all(
        isinstance(name, str) and isinstance(tensor, Tensor) for name, tensor in content.items()
    )


def _inner(content: object) -> str:
    """Say under which keys of a training's checkpoint weights lie, and how to take them out."""
    if not isinstance(content, dict):
        return ""
    keys = [key for key, value in content.items() if value and _is_state_dict(value)]
    if not keys:
        return ""
    return (
        f"; it has one under {' and under '.join(map(repr, keys))}: write that alone with "
        f"torch.save(torch.load(FILE, weights_only=True)[{keys[0]!r}], 'weights.pth')"
    )


def _odd_kind(tensor: Tensor) -> str | None:
    """Name what is no plain array of numbers."""
    if tensor.is_meta:
        return "meta (empty)"
    if tensor.is_nested:
        return "nested"
    if tensor.layout != torch.strided:
        return "sparse"
    return "quantised" if tensor.is_quantized else None


def _original_keys(depth: int) -> dict[str, str]:
    """Map our names of the un-normalised network's weights to the original's."""
    keys: dict[str, str] = {}
    for kind in ("weight", "bias"):
        for conv, c in (("conv1", "c1"), ("conv2", "c2")):
            keys[f"bottleneck.{conv}.{kind}"] = f"bottleneck.{c}.{kind}"
            for level in range(depth):
                keys[f"encoders.{level}.{conv}.{kind}"] = f"down{level + 1}.c.{c}.{kind}"
                keys[f"decoders.{level}.conv.{conv}.{kind}"] = f"up{level + 1}.c.{c}.{kind}"
        for level in range(depth):
            keys[f"decoders.{level}.up.{kind}"] = f"up{level + 1}.up.{kind}"
        keys[f"head.{kind}"] = f"out.{kind}"
    return keys


def _to_original_keys(weights: dict[str, Tensor], spec: ModelSpec) -> dict[str, Tensor]:
    if spec.norm != "none":
        raise CheckpointError(
            f"a network with {spec.norm} normalisation cannot be written as the original's .pth, "
            "which has none: export to .safetensors"
        )
    return {theirs: weights[ours] for ours, theirs in _original_keys(spec.depth).items()}


def _check_weights(path: Path, *, expected: dict[str, Tensor], found: dict[str, Tensor]) -> None:
    problems = [f"{name} is missing" for name in expected if name not in found]
    problems += [f"{name} is not part of the network" for name in found if name not in expected]
    problems += [
        f"{name} is {tuple(found[name].shape)} and should be {tuple(expected[name].shape)}"
        for name in expected
        if name in found and found[name].shape != expected[name].shape
    ]
    problems += [
        f"{name} is {_kind(found[name])} and should be {_kind(expected[name])}"
        for name in expected
        if name in found and _kind(found[name]) != _kind(expected[name])
    ]
    if not problems:
        problems += [
            f"{name} holds values that are not finite"
            for name, tensor in found.items()
            # In the precision it will have: what float64 holds may be infinite in float32.
            if not torch.isfinite(tensor.to(expected[name].dtype)).all()
        ]
    if problems:
        more = f", and {len(problems) - 5} more" if len(problems) > 5 else ""
        raise CheckpointError(
            f"model file {path} does not fit the network it describes: "
            f"{'; '.join(problems[:5])}{more}"
        )


def _kind(tensor: Tensor) -> str:
    """Name what cannot be turned into one another: floats of any precision are of one kind."""
    return "floating point" if tensor.is_floating_point() else str(tensor.dtype)


def read_spec_json(path: Path) -> str:
    """Give the description in a safetensors header as indented JSON, for people.

    Raises:
        CheckpointError: as `load_checkpoint`.
    """
    return json.dumps(read_spec(path).model_dump(mode="json"), indent=2)
