"""What each of several processes does in tests/test_processes.py."""

from __future__ import annotations

import dataclasses
import multiprocessing
import os
import sys
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from typing import TypeVar, get_args

import torch
from torch import Tensor, nn

from bcseg_batch.segment.model import UNet
from bcseg_batch.segment.spec import Norm
from bcseg_training import cli, processes
from bcseg_training.batchnorm import share_batch_norms
from bcseg_training.losses import LossName, loss_function, of_one_process

T = TypeVar("T")


@dataclasses.dataclass(frozen=True)
class Case:
    """A network, a loss and a batch."""

    norm: Norm
    loss: LossName
    items: int
    seed: int
    channels_last: bool = False

    def batch(self) -> tuple[Tensor, Tensor, Tensor]:
        """Give the joined batch: images far from zero, soft targets, and pixels that do not count.

        Channel 1 does not count in the first item, as where a source does not teach it.
        """
        rng = torch.Generator().manual_seed(self.seed)
        shape = (self.items, 2, 16, 16)
        image = torch.rand((self.items, 3, 16, 16), generator=rng, dtype=torch.float64)
        image = (image * torch.arange(1, self.items + 1)[:, None, None, None]) + 5
        target = torch.rand(shape, generator=rng, dtype=torch.float64)
        weight = (torch.rand(shape, generator=rng) < 0.7).double()
        weight[0, 1] = 0
        return image, target, weight

    def network(self) -> UNet:
        """Give the network with weights of its own."""
        torch.manual_seed(self.seed)
        model = UNet(out_channels=2, width=3, depth=2, norm=self.norm).double()
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                nn.init.uniform_(module.weight, 0.5, 1.5)
                nn.init.uniform_(module.bias, -1, 1)
        return model.to(memory_format=torch.channels_last) if self.channels_last else model


CASES = [
    # Seven items are shared unevenly, and of two the third process gets none.
    *(Case("batch", loss, items, 1) for loss in get_args(LossName) for items in (7, 2)),
    *(Case(norm, "bce+dice", items, 2) for norm in ("none", "group") for items in (7, 2)),
    Case("batch", "bce+dice", 6, 3, channels_last=True),
]


def came_to(
    case: Case,
    model: nn.Module,
    batch: Sequence[Tensor],
    total: Callable[[Tensor], Tensor],
    *,
    steps: int = 2,
) -> dict[str, Tensor]:
    """Give losses, gradients and buffers after some passes over a batch."""
    model.train()
    image, target, weight = batch
    image.requires_grad_()
    found: dict[str, Tensor] = {}
    for step in range(steps):
        model.zero_grad()
        image.grad = None
        loss = loss_function(case.loss, total)(model(image), target, weight)
        loss.backward()
        found[f"loss {step}"] = loss.detach()
    plain = getattr(model, "module", model)
    found |= {f"gradient {name}": p.grad for name, p in plain.named_parameters()}
    return found | {name: buffer.clone() for name, buffer in plain.named_buffers()}


def alone(case: Case) -> dict[str, Tensor]:
    """Give what one process comes to."""
    return came_to(case, case.network(), case.batch(), of_one_process)


def command(arguments: list[str]) -> None:
    """Run `bcseg-train ARGUMENTS`."""
    sys.argv = ["bcseg-train", *arguments]
    cli.main()


def all_cases(out: Path) -> None:
    """Take part in all cases; the first process writes what came out."""
    accelerator = processes.open_accelerator()
    found = []
    for case in CASES:
        model = case.network()
        share_batch_norms(model)
        parts = [processes.part_of(tensor, accelerator) for tensor in case.batch()]
        found.append(came_to(case, accelerator.prepare(model), parts, processes.total))
    if accelerator.is_main_process:
        torch.save(found, out)
    processes.close(accelerator)


def become(environ: dict[str, str], said: Connection, act: Callable[[T], None], given: T) -> None:
    """Do something in a process of its own; what it says goes through a pipe."""
    os.environ.update(environ)
    multiprocessing.set_start_method("fork", force=True)  # of loader processes, as usual
    for number in (1, 2):
        os.dup2(said.fileno(), number)
    said.close()
    # The streams of the process that this one was forked from may have another kind of file.
    sys.stdout, sys.stderr = (open(number, "w", buffering=1, closefd=False) for number in (1, 2))  # noqa: SIM115 - until the process ends
    act(given)
