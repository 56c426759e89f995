"""The processes that share a training: how they start, add up, agree and end.

accelerate joins them and picks the device; what is here makes them come to the result of one
process, and end together. Where there is one process, nothing here does anything.
"""

from __future__ import annotations

import contextlib
import os
import signal
import threading
from collections.abc import Iterator, Mapping
from types import FrameType
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list, gather_object
from loguru import logger
from torch import Tensor

from bcseg_batch.errors import BcsegError, DeviceError, SettingsError, UsageError

T = TypeVar("T")
S = TypeVar("S", bound=Any)  # what can be sliced: a sequence, or a tensor

# What torchrun and `accelerate launch` tell each process that they start.
_LAUNCHED = ("LOCAL_RANK", "RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
# How the libraries below torch put it that the other end of a connection is gone.
_LOST = ("connection closed", "connection reset", "broken pipe", "socket closed", "remote process")


class _Total(torch.autograd.Function):
    """A sum over processes whose gradient is the sum over processes.

    Each process computes the same loss from such sums. The gradients that come out are those of the
    sum of all these losses, of which DistributedDataParallel takes the mean over the processes:
    the gradient of the one loss.
    """

    @staticmethod
    def forward(ctx: Any, tensor: Tensor) -> Tensor:  # noqa: ARG004 - autograd hands it over
        return add_up(tensor)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> Tensor:  # noqa: ARG004 - likewise
        return add_up(grad_outputs[0])


def add_up(tensor: Tensor) -> Tensor:
    """Give a new tensor, the sum over all processes; no gradient flows through it."""
    summed = tensor.detach().clone(memory_format=torch.contiguous_format)
    dist.all_reduce(summed)
    return summed


def total(tensor: Tensor) -> Tensor:
    """Sum a tensor over all processes, with gradients; itself where there is one process."""
    if not (dist.is_available() and dist.is_initialized()):
        return tensor
    summed: Tensor = _Total.apply(tensor)
    return summed


def part_of(items: S, accelerator: Accelerator) -> S:
    """Give this process's part of what all share: parts differ by one item at most."""
    part: S = items[accelerator.process_index :: accelerator.num_processes]
    return part


def check_launch(environ: Mapping[str, str], *, gpus: int) -> bool:
    """Look whether a launcher has started this process as one of several.

    Args:
        environ: environment variables.
        gpus: that this process could use; 0 for the processor.

    Returns:
        Whether it did.

    Raises:
        SettingsError: it did not tell all that is needed, or there are more processes than GPUs.
    """
    if "LOCAL_RANK" not in environ:
        if "MASTER_ADDR" in environ and "RANK" not in environ:
            logger.warning(
                "a launcher has started one process alone, which trains on its own: on processors "
                "several are started by torchrun, or by accelerate launch --multi_gpu"
            )
        return False
    missing = [name for name in _LAUNCHED if name not in environ]
    if missing:
        raise SettingsError(
            f"LOCAL_RANK is set in the environment, but not {', '.join(missing)}: start the "
            "processes with torchrun or accelerate launch, or unset LOCAL_RANK to train in one"
        )
    for name in ("LOCAL_RANK", "RANK", "WORLD_SIZE"):
        if not environ[name].isdecimal():
            raise SettingsError(
                f"{name} is {environ[name]!r} in the environment, which is no number of a process: "
                "start the processes with torchrun or accelerate launch"
            )
    if not dist.is_available():
        raise SettingsError(
            "this torch was built without torch.distributed, which several processes need: install "
            "another build of torch, or train in one process"
        )
    if gpus and int(environ["LOCAL_RANK"]) >= gpus:
        raise SettingsError(
            f"process {environ['RANK']} should have GPU {environ['LOCAL_RANK']} of its machine, "
            f"which shows it {gpus}, counted from 0: start no more than {gpus} processes there, or "
            "all on processors with CUDA_VISIBLE_DEVICES="
        )
    return True


def open_accelerator(environ: Mapping[str, str] | None = None) -> Accelerator:
    """Join the other processes, where a launcher has started several, and take a device.

    Args:
        environ: environment variables; None takes those of the process.

    Raises:
        SettingsError: see `check_launch`; the processes do not find each other, or are set up in a
            way that would not give the result of one process.
    """
    environ = os.environ if environ is None else environ
    on_cpu = environ.get("ACCELERATE_USE_CPU", "").lower() in {"true", "1", "yes"}
    gpus = 0 if on_cpu else torch.cuda.device_count()
    launched = check_launch(environ, gpus=gpus)
    try:
        # Left to itself accelerate takes processes without GPUs for strangers to one another.
        accelerator = Accelerator(cpu=launched and not gpus)
    except (RuntimeError, ValueError) as error:
        if not launched:
            raise
        reason = str(error).splitlines()[0]
        raise SettingsError(
            f"process {environ['RANK']} of {environ['WORLD_SIZE']} cannot join the others at "
            f"{environ['MASTER_ADDR']}:{environ['MASTER_PORT']} ({reason}): look whether the first "
            "one runs there and can be reached"
        ) from error
    kind = str(accelerator.distributed_type.value)
    if kind != "NO" and not kind.startswith("MULTI_"):
        raise SettingsError(
            f"accelerate is set up for {kind}, but here each process has the whole network: "
            "run `accelerate config` again, or give --multi_gpu"
        )
    if accelerator.gradient_accumulation_steps != 1:
        raise SettingsError(
            "accelerate is set up to accumulate gradients, but --batch-size is the whole batch of "
            "a step: set gradient_accumulation_steps to 1"
        )
    if launched and accelerator.num_processes != int(environ["WORLD_SIZE"]):
        raise SettingsError(
            f"a launcher has started {environ['WORLD_SIZE']} processes, but accelerate cannot join "
            f"them on {accelerator.device}: start one"
        )
    return accelerator


def close(accelerator: Accelerator) -> None:
    """Part from the other processes, at the end of a training that went well."""
    accelerator.wait_for_everyone()
    accelerator.state.destroy_process_group()


def gather(mine: list[T], accelerator: Accelerator) -> list[T]:
    """Join the lists of all processes, in the order of the processes; all get the result."""
    if accelerator.num_processes == 1:
        return mine
    return list(gather_object(mine))


def from_main(value: T, accelerator: Accelerator) -> T:
    """Give all processes what the main one has."""
    if accelerator.num_processes == 1:
        return value
    given: list[T] = broadcast_object_list([value])
    return given[0]


@contextlib.contextmanager
def together(accelerator: Accelerator) -> Iterator[None]:
    """Do something that may fail in one process; then all end, with the exit code of that one.

    Nothing within may wait for the other processes.

    Raises:
        Exception: what was raised within, in the first process where something was.
        SystemExit: in all others, which say nothing.
    """
    failure: Exception | None = None
    try:
        yield
    except Exception as error:
        if accelerator.num_processes == 1:
            raise
        failure = error
    codes = gather([_exit_code(failure)], accelerator)
    first = next((rank for rank, code in enumerate(codes) if code), None)
    if first is None:
        return
    if failure is not None and first == accelerator.process_index:
        raise failure
    raise SystemExit(codes[first])


def _exit_code(failure: Exception | None) -> int:
    if failure is None:
        return 0
    return getattr(failure, "exit_code", BcsegError.exit_code)


def check_same(named: Mapping[str, object], accelerator: Accelerator) -> None:
    """Look whether all processes are about to do the same.

    Args:
        named: values that can be compared, each with its name for the message.
        accelerator: of this process.

    Raises:
        UsageError: one of them is about to do something else than the main one.
    """
    everybody = gather([dict(named)], accelerator)
    with together(accelerator):
        theirs = everybody[0]
        other = sorted(name for name, value in named.items() if theirs.get(name) != value)
        if other:
            raise UsageError(
                f"process {accelerator.process_index} differs from process 0 in {', '.join(other)}"
                ": give all processes the same options, and the same files on each machine"
            )


@contextlib.contextmanager
def loss_told(accelerator: Accelerator) -> Iterator[None]:
    """Turn what a process meets with when another one has died into one sentence.

    Raises:
        DeviceError: another process is gone.
    """
    try:
        yield
    except RuntimeError as error:  # of which torch has no finer kind for all ways to lose another
        text = str(error).lower()
        if accelerator.num_processes == 1 or not any(words in text for words in _LOST):
            raise
        raise DeviceError(
            "another process of this training has ended, and what it said tells why: the same "
            "command with --resume goes on after the last whole epoch"
        ) from error


class StopSignals:
    """SIGINT or SIGTERM to any of several processes ends all of them before the next step.

    A process that ended at once would leave the others waiting for it. The second signal does end
    it at once. Where there is one process, signals do what they always did.

    Args:
        accelerator: of this process.
    """

    def __init__(self, accelerator: Accelerator) -> None:
        self._accelerator = accelerator
        self._received = 0
        self._before: dict[int, Any] = {}

    def __enter__(self) -> StopSignals:
        several = self._accelerator.num_processes > 1
        if several and threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._before[number] = signal.signal(number, self._receive)
        return self

    def __exit__(self, *_: object) -> None:
        self._restore()

    def _restore(self) -> None:
        while self._before:
            signal.signal(*self._before.popitem())

    def _receive(self, number: int, _: FrameType | None) -> None:
        self._received = number
        self._restore()

    def check(self) -> None:
        """Ask all processes whether one was told to stop.

        Raises:
            SystemExit: with 128 and the signal's number, in all of them.
        """
        if self._accelerator.num_processes == 1:
            return
        seen = torch.tensor(self._received, device=self._accelerator.device)
        dist.all_reduce(seen, op=dist.ReduceOp.MAX)
        number = int(seen)
        if number:
            if self._accelerator.is_main_process:
                logger.warning(
                    "stopped by {}: the same command with --resume goes on after the last whole "
                    "epoch",
                    signal.Signals(number).name,
                )
            raise SystemExit(128 + number)


def ignore_stop_signals(_: int) -> None:
    """Leave it to the process that trains to stop its loader processes, which share its signals."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
