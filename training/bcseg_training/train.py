"""The training loop: seeded, resumable, one process or many."""

from __future__ import annotations

import contextlib
import copy
import io
import json
import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from loguru import logger
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from bcseg_batch.errors import CheckpointError, UsageError
from bcseg_batch.segment.checkpoint import load_checkpoint, save_checkpoint
from bcseg_batch.segment.model import UNet
from bcseg_batch.segment.placement import Placement
from bcseg_batch.segment.predictor import Predictor
from bcseg_batch.segment.spec import ModelSpec, Norm
from bcseg_batch.store.outputs import output_error, write_whole
from bcseg_training import processes
from bcseg_training.augment import Recipe
from bcseg_training.batchnorm import share_batch_norms
from bcseg_training.dataset import (
    Collate,
    EpochSampler,
    Pair,
    SegmentationDataset,
    SharedBatches,
    files_digest,
    pair_files,
    read_pair,
    usable_pairs,
    validation_folder,
)
from bcseg_training.evaluate import mean_scores, predict_and_score
from bcseg_training.losses import Loss, LossName, loss_function
from bcseg_training.mixture import (
    MixtureDataset,
    boxed_files,
    boxed_source,
    masked_source,
    synthetic_files,
    synthetic_source,
)
from bcseg_training.plots import save_curves
from bcseg_training.specimens import CLASS_NAMES

Schedule = Literal["constant", "cosine"]

BEST, LAST, STATE, HISTORY = "best.safetensors", "last.safetensors", "last.state.pt", "history.json"


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainingPlan:
    """Everything that decides the result of a training; the defaults are the original's recipe.

    Attributes:
        dataset: folder with `train` and `val` (or `test`), each with `original` and `mask`.
        epochs: passes over the training set.
        width: channels of the network's first step.
        depth: encoder steps.
        norm: normalisation of the network.
        lr: AdamW's learning rate, at its peak.
        weight_decay: AdamW's.
        batch_size: items a step, over all processes.
        loss: name of the loss.
        augment: name of the augmentation.
        crop_px: side of the training items; the input size means the whole image.
        crops_per_image: items drawn from each image in an epoch.
        schedule: of the learning rate; `cosine` warms up over the first 5 % and falls to 0.
        ema: decay of the running average of the weights, 0 for none; the average is what is saved.
        seed: of the weights, the order and the augmentation.
        input_size_px: side of the network's input.
        boxes: folder of images with VOC boxes to learn from besides (`strong` only).
        synthetic: folders that `bcseg-train synth` wrote, likewise.
        shares: of `dataset`, `boxes` and `synthetic` among the items.
        items: in an epoch (`strong` only, where `crops_per_image` means nothing).
        init: checkpoint whose weights the training starts from; a head with fewer channels fills
            the first ones.
    """

    dataset: Path
    epochs: int = 2
    width: int = 64
    depth: int = 4
    norm: Norm = "none"
    lr: float = 3e-4
    weight_decay: float = 1e-2
    batch_size: int = 8
    loss: LossName = "bce"
    augment: Recipe = "none"
    crop_px: int = 512
    crops_per_image: int = 1
    schedule: Schedule = "constant"
    ema: float = 0.0
    seed: int = 0
    input_size_px: int = 512
    boxes: Path | None = None
    synthetic: tuple[Path, ...] = ()
    shares: tuple[float, float, float] = (0.45, 0.35, 0.2)
    items: int = 800
    init: Path | None = None

    @property
    def class_names(self) -> tuple[str, ...]:
        """Channels of the network: all that the sources teach, or the mask alone."""
        return CLASS_NAMES if self.augment == "strong" else ("cell",)

    def as_json(self) -> dict[str, Any]:
        """Give the plan as JSON can hold it, for the state file and the history."""
        return {
            **asdict(self),
            "dataset": _name(self.dataset),
            "boxes": self.boxes and _name(self.boxes),
            "synthetic": [_name(folder) for folder in self.synthetic],
            "shares": list(self.shares),
            "init": self.init and _name(self.init),
        }


def _name(path: Path) -> str:
    return path.absolute().name  # `.` has none of its own


@dataclass(slots=True)
class EpochResult:
    """What one epoch came to.

    Attributes:
        epoch: counted from 1.
        loss: mean training loss.
        dice: mean Dice on the validation set, at full image size.
        iou: mean IoU likewise.
    """

    epoch: int
    loss: float
    dice: float
    iou: float


class Progress(Protocol):
    """What is told while a training runs."""

    def on_step(self, epoch: int, step: int, steps: int, loss: float) -> None:
        """A step is through: epoch counted from 0, step from 1, mean loss of the epoch so far."""

    def on_epoch(self, result: EpochResult) -> None:
        """An epoch is through and saved."""


class _Stateful(Protocol):
    """A part of the training that a resumed one needs as it was."""

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state_dict: dict[str, Any], /) -> Any: ...


class Silent:
    """Tells nobody."""

    def on_step(self, epoch: int, step: int, steps: int, loss: float) -> None:
        """Say nothing."""

    def on_epoch(self, result: EpochResult) -> None:
        """Say nothing."""


def learning_rate(plan: TrainingPlan, step: int, steps: int) -> float:
    """Give the learning rate of a step.

    Args:
        plan: names schedule and peak.
        step: counted from 0 over the whole training.
        steps: of the whole training.
    """
    if plan.schedule == "constant":
        return plan.lr
    warmup = max(1, steps // 20)
    if step < warmup:
        return plan.lr * (step + 1) / warmup
    done = (step - warmup) / max(1, steps - warmup)
    return plan.lr * 0.5 * (1 + math.cos(math.pi * done))


class WeightAverage:
    """A running average of a network's weights (Polyak averaging), better than the last step's.

    Args:
        model: the network that is trained.
        decay: share of the average that stays at each step; 0 makes it a plain copy.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.model = copy.deepcopy(model).requires_grad_(requires_grad=False)
        self._decay = decay
        self._steps = 0

    @torch.no_grad()
    def update(self, model: nn.Module) -> None:
        """Move the average towards the network's present weights."""
        self._steps += 1
        # Early on the average would be dominated by the random start.
        decay = min(self._decay, self._steps / (self._steps + 10)) if self._decay else 0.0
        current = model.state_dict()
        for name, average in self.model.state_dict().items():
            if average.is_floating_point():
                average.lerp_(current[name].to(average.device), 1 - decay)
            else:
                average.copy_(current[name])

    def state_dict(self) -> dict[str, Any]:
        """Give what a resumed training needs."""
        return {"model": self.model.state_dict(), "steps": self._steps}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take up where `state_dict` was given."""
        self.model.load_state_dict(state_dict["model"])
        self._steps = state_dict["steps"]


def train(
    plan: TrainingPlan,
    out: Path,
    *,
    resume: bool = False,
    stop_after_epoch: int | None = None,
    num_workers: int = 0,
    progress: Progress | None = None,
    accelerator: Accelerator | None = None,
) -> list[EpochResult]:
    """Train a network and leave the best and the last checkpoint in `out`.

    The same plan gives the same weights, run at one go or interrupted and resumed: weights, order
    and augmentation are drawn from the seed, and state is kept at the end of each epoch.

    Args:
        plan: what to do.
        out: folder for `best.safetensors`, `last.safetensors`, the state to resume from, the
            history, the curves and TensorBoard's event files.
        resume: continue what lies in `out`; from the start where there is nothing yet.
        stop_after_epoch: stop early, to be resumed later.
        num_workers: processes that augment; 0 does it between the steps.
        progress: told of each step and epoch.
        accelerator: of this process; made here where it is not given. Where a launcher has started
            several processes, the plan's batch is shared among them, which changes the result by
            rounding alone; only the first one writes and tells.

    Returns:
        One result for each epoch, those before a resume included.

    Raises:
        UsageError: the data set cannot be used, sizes do not fit together, or `out` holds another
            training, or one on other files.
        CheckpointError: the state to resume from is damaged, or `init` cannot be loaded.
        OutputError: `out` cannot be written.
        SettingsError: a launcher has started several processes that cannot work together.
        DeviceError: one of several processes has died.
        SystemExit: one of several processes was told to stop, or has raised one of the above; that
            one alone raises it.
    """
    accelerator = accelerator or processes.open_accelerator()
    if progress is None or not accelerator.is_main_process:
        progress = Silent()
    with processes.loss_told(accelerator), processes.StopSignals(accelerator) as stop:
        return _train(
            plan,
            out,
            resume=resume,
            stop_after_epoch=stop_after_epoch,
            num_workers=num_workers,
            progress=progress,
            accelerator=accelerator,
            stop=stop,
        )


def _train(
    plan: TrainingPlan,
    out: Path,
    *,
    resume: bool,
    stop_after_epoch: int | None,
    num_workers: int,
    progress: Progress,
    accelerator: Accelerator,
    stop: processes.StopSignals,
) -> list[EpochResult]:
    with processes.together(accelerator):
        check_sizes(plan, processes=accelerator.num_processes)
        set_seed(plan.seed)
        validation = _sound_pairs(validation_folder(plan.dataset))
        dataset, sampler = _items_of(plan)
        model = UNet(
            out_channels=len(plan.class_names), width=plan.width, depth=plan.depth, norm=plan.norm
        )
        if plan.init is not None:
            start_from(model, plan.init)
        sources = source_digests(plan)
    processes.check_same(
        {**plan.as_json(), "files": [digest for _, digest in sources]}, accelerator
    )
    loader = _loader_of(plan, dataset, sampler, accelerator, num_workers)
    model.to(memory_format=torch.channels_last)
    optimizer = torch.optim.AdamW(model.parameters(), lr=plan.lr, weight_decay=plan.weight_decay)
    average = WeightAverage(model, plan.ema)
    parts: dict[str, _Stateful] = {
        "model": model,
        "optimizer": optimizer,
        "average": average,
        # Of float16 alone, whose gradients would vanish without it.
        **({} if accelerator.scaler is None else {"scaler": accelerator.scaler}),
    }

    state: dict[str, Any] | None = None
    with processes.together(accelerator):
        if accelerator.is_main_process:
            state = _read_state(out, plan, resume, sources)
    state = processes.from_main(state, accelerator)
    with processes.together(accelerator):
        history = _take_up(out, state, parts)
    if history:
        logger.info("resuming after epoch {} of {}", len(history), plan.epochs)
    if accelerator.num_processes > 1:
        share_batch_norms(model)
    model, optimizer = accelerator.prepare(model, optimizer)
    average.model.to(accelerator.device)
    loss_of = loss_function(plan.loss, processes.total)

    last_epoch = min(plan.epochs, stop_after_epoch or plan.epochs)
    for epoch in range(len(history), last_epoch):
        sampler.epoch = epoch
        model.train()
        total = 0.0
        for step, batch in enumerate(loader):
            stop.check()
            rate = learning_rate(plan, epoch * len(loader) + step, plan.epochs * len(loader))
            for group in optimizer.param_groups:
                group["lr"] = rate
            loss = _step(model, optimizer, accelerator, loss_of, batch)
            average.update(accelerator.unwrap_model(model))
            # All processes have the same loss, and so the same opinion of it.
            if not math.isfinite(loss):
                with processes.together(accelerator):
                    raise UsageError(
                        f"the training diverged in epoch {epoch + 1}: the loss is {loss}: lower "
                        "--lr; the checkpoints of the epochs before are whole"
                    )
            total += loss
            progress.on_step(epoch, step + 1, len(loader), total / (step + 1))
        dice, iou = _validate(average.model, accelerator, plan, validation)
        history.append(EpochResult(epoch + 1, total / len(loader), dice, iou))
        with processes.together(accelerator):
            if accelerator.is_main_process:
                _save_epoch(out, plan, history, average.model, sources, parts)
                progress.on_epoch(history[-1])
    return history


def _step(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    accelerator: Accelerator,
    loss_of: Loss,
    batch: list[Tensor],
) -> float:
    """Take one step, and give the loss of the whole batch before it."""
    image, target, weight = (tensor.to(accelerator.device) for tensor in batch)
    image = image.to(memory_format=torch.channels_last)
    with accelerator.autocast():
        logits = model(image)
    loss = loss_of(logits.float(), target, weight)
    accelerator.backward(loss)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return float(loss.detach())


def _loader_of(
    plan: TrainingPlan,
    dataset: Dataset[Any],
    sampler: EpochSampler,
    accelerator: Accelerator,
    num_workers: int,
) -> DataLoader[Any]:
    batches = SharedBatches(
        sampler,
        batch_size=plan.batch_size,
        process=accelerator.process_index,
        processes=accelerator.num_processes,
    )
    size, channels = (plan.crop_px, plan.crop_px), len(plan.class_names)
    return DataLoader(
        dataset,
        batch_sampler=batches,
        collate_fn=Collate(((3, *size), (channels, *size), (channels, *size))),
        num_workers=num_workers,
        worker_init_fn=(processes.ignore_stop_signals if accelerator.num_processes > 1 else None),
    )


def _validate(
    model: nn.Module, accelerator: Accelerator, plan: TrainingPlan, pairs: tuple[Pair, ...]
) -> tuple[float, float]:
    """Give mean Dice and IoU; each process judges its part, and all get the same means."""
    with processes.together(accelerator):
        mine = processes.part_of(range(len(pairs)), accelerator)
        predictor = _validation_predictor(model, accelerator, plan)
        judged = predict_and_score(predictor, [pairs[index] for index in mine])
        scored = [(index, one.score) for index, one in zip(mine, judged, strict=True)]
    by_index = dict(processes.gather(scored, accelerator))
    # Summed in the order of one process, to the last bit of the mean.
    scores = mean_scores([by_index[index] for index in range(len(pairs))])
    return scores.dice, scores.iou


def _sound_pairs(folder: Path) -> tuple[Pair, ...]:
    pairs = usable_pairs(folder)
    for pair in pairs:  # a bad one is better found now than after the first epoch
        read_pair(pair)
    return pairs


def source_digests(plan: TrainingPlan) -> list[tuple[Path, str]]:
    """List the folders that a training reads, each with a digest of the files it takes there.

    Raises:
        UsageError: a folder or a file cannot be read.
    """
    folders = (plan.dataset / "train", validation_folder(plan.dataset))
    files = [file for folder in folders for file in pair_files(folder)]
    digests = [(plan.dataset, files_digest(plan.dataset, files))]
    if plan.boxes is not None:
        digests.append((plan.boxes, files_digest(plan.boxes, boxed_files(plan.boxes))))
    return digests + [(f, files_digest(f, synthetic_files(f))) for f in plan.synthetic]


def _items_of(plan: TrainingPlan) -> tuple[Dataset[Any], EpochSampler]:
    if plan.augment == "strong":
        sources = [masked_source(plan.dataset, plan.shares[0])]
        if plan.boxes is not None:
            sources.append(boxed_source(plan.boxes, plan.shares[1]))
        if plan.synthetic:
            sources.append(synthetic_source(plan.synthetic, plan.shares[2]))
        mixture = MixtureDataset(sources, crop_px=plan.crop_px, items=plan.items, seed=plan.seed)
        return mixture, EpochSampler(plan.items, repeats=1, seed=plan.seed)
    if plan.boxes is not None or plan.synthetic:
        raise UsageError("boxes and synthetic smears need the strong augmentation")
    dataset = SegmentationDataset(
        usable_pairs(plan.dataset / "train"),
        input_size_px=plan.input_size_px,
        crop_px=plan.crop_px,
        recipe=plan.augment,
        seed=plan.seed,
    )
    return dataset, EpochSampler(len(dataset), repeats=plan.crops_per_image, seed=plan.seed)


def start_from(model: UNet, checkpoint: Path) -> None:
    """Copy a checkpoint's weights into a network that may have more channels in its head.

    Raises:
        CheckpointError: the checkpoint cannot be loaded.
        UsageError: it is another network.
    """
    known = load_checkpoint(checkpoint).model.state_dict()
    weights = model.state_dict()
    for name, tensor in weights.items():
        given = known.get(name)
        head = name.startswith("head.")
        if given is None or (given.shape != tensor.shape and not head):
            raise UsageError(f"{checkpoint} is another network: its {name} does not fit")
        shared = min(len(given), len(tensor)) if head else None
        if tensor.ndim:
            tensor[:shared] = given[:shared]
        else:  # BatchNorm counts its batches in a number
            tensor.copy_(given)
    model.load_state_dict(weights)


def check_sizes(plan: TrainingPlan, *, processes: int = 1) -> None:
    """Look whether the sizes of a plan fit together.

    Args:
        plan: to be carried out.
        processes: that share each batch.

    Raises:
        UsageError: they do not.
    """
    if plan.batch_size < processes:
        raise UsageError(
            f"batch_size is {plan.batch_size}, which {processes} processes cannot share: give at "
            f"least {processes}, or start fewer processes"
        )
    halved = 2**plan.depth
    for name in ("input_size_px", "crop_px"):
        size_px = getattr(plan, name)
        if size_px % halved:
            raise UsageError(
                f"{name} is {size_px}, which {plan.depth} encoder steps cannot halve: give a "
                f"multiple of {halved}"
            )
    if plan.augment == "none" and plan.crop_px > plan.input_size_px:
        raise UsageError(
            f"crop_px is {plan.crop_px}, but without augmentation no crop is larger than the "
            f"image, which is {plan.input_size_px} pixels here"
        )


def _validation_predictor(
    model: nn.Module, accelerator: Accelerator, plan: TrainingPlan
) -> Predictor:
    device = str(accelerator.device)
    placement = Placement(device, "float32", "validation")
    return Predictor(copy.deepcopy(model), placement, plan.input_size_px)


def _read_state(
    out: Path, plan: TrainingPlan, resume: bool, sources: list[tuple[Path, str]]
) -> dict[str, Any] | None:
    """Look whether `out` may be written to, and read the state that lies there."""
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise output_error(out, error) from error
    if not resume and any((out / name).exists() for name in (STATE, LAST, BEST)):
        raise UsageError(
            f"{out} holds a training already: continue it with --resume, or name another folder"
        )
    if not (out / STATE).exists():
        return None
    with _damage_told(out):
        state: dict[str, Any] = torch.load(out / STATE, map_location="cpu", weights_only=True)
        before: dict[str, Any] = state["plan"]
        # A state of version 0.1.0 says nothing of the files.
        trained_on: list[str] = state.get("sources", [digest for _, digest in sources])
    _check_same_training(out, plan, before)
    _check_same_files(out, sources, trained_on)
    return state


def _take_up(
    out: Path, state: dict[str, Any] | None, parts: dict[str, _Stateful]
) -> list[EpochResult]:
    """Load a state into the parts of the training, and give the epochs before it."""
    if state is None:
        return []
    with _damage_told(out):
        history = [EpochResult(**epoch) for epoch in state["history"]]
        for name, part in parts.items():
            if name != "scaler" or name in state:  # which 0.1.0 did not keep
                part.load_state_dict(state[name])
    return history


def _check_same_training(out: Path, plan: TrainingPlan, before: dict[str, Any]) -> None:
    now = plan.as_json()
    changed = sorted(key for key in now.keys() | before.keys() if now.get(key) != before.get(key))
    if not changed:
        return
    advice = ""
    if "epochs" in changed:
        advice = (
            "; the course of the learning rate belongs to its length: to train longer, start a "
            f"new training in another folder with --init {out / LAST}"
        )
    raise UsageError(
        f"{out} holds a training with another {', '.join(changed)}: resume it with the same "
        f"options, or name another folder{advice}"
    )


def _check_same_files(out: Path, now: list[tuple[Path, str]], before: list[str]) -> None:
    changed = [str(folder) for (folder, is_), was in zip(now, before, strict=True) if is_ != was]
    if changed:
        raise UsageError(
            f"{out} holds a training on other files than those now in {', '.join(changed)}: resume "
            "it with the data as they were, or name another folder"
        )


@contextlib.contextmanager
def _damage_told(out: Path) -> Iterator[None]:
    """Turn whatever a damaged state raises into one sentence."""
    try:
        yield
    except Exception as error:  # torch raises anything at all for a file that is not its own
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        weights = f", with --init {out / LAST} from its weights" if (out / LAST).exists() else ""
        raise CheckpointError(
            f"training state {out / STATE} is damaged or cannot be read ({reason}): start a new "
            f"training in another folder{weights}; or delete the file, and --resume begins again "
            f"at the first epoch and writes over what lies in {out}"
        ) from error


def _save_epoch(  # noqa: PLR0917 - the parts of one state
    out: Path,
    plan: TrainingPlan,
    history: list[EpochResult],
    average: nn.Module,
    sources: list[tuple[Path, str]],
    parts: dict[str, _Stateful],
) -> None:
    latest = history[-1]
    spec = ModelSpec(
        out_channels=len(plan.class_names),
        class_names=plan.class_names,
        width=plan.width,
        depth=plan.depth,
        norm=plan.norm,
        input_size_px=plan.input_size_px,
        training_data=_training_data(plan),
        metrics={"val_dice": latest.dice, "val_iou": latest.iou, "epoch": float(latest.epoch)},
    )
    weights = copy.deepcopy(average).cpu()
    save_checkpoint(out / LAST, weights, spec)  # type: ignore[arg-type]  # deepcopy of a UNet
    if latest.dice >= max(result.dice for result in history):
        save_checkpoint(out / BEST, weights, spec)  # type: ignore[arg-type]  # deepcopy of a UNet
    record = {"plan": plan.as_json(), "epochs": [asdict(result) for result in history]}
    write_whole(out / HISTORY, json.dumps(record, indent=2).encode())
    try:
        save_curves(history, out / "curves.png")
        _log_tensorboard(out, latest)
    except OSError as error:
        raise output_error(out, error) from error
    # The state goes last: an epoch counts as done only when all of the above lies on disk.
    buffer = io.BytesIO()
    torch.save(
        {
            "plan": plan.as_json(),
            "sources": [digest for _, digest in sources],
            "history": [asdict(result) for result in history],
            **{name: part.state_dict() for name, part in parts.items()},
        },
        buffer,
    )
    write_whole(out / STATE, buffer.getvalue())


def _training_data(plan: TrainingPlan) -> str:
    names = [f"{_name(plan.dataset)}/train"]
    if plan.boxes is not None:
        names.append(f"{_name(plan.boxes)} without its held-out fifth")
    if plan.synthetic:
        names.append("synthetic smears")
    return f"{' + '.join(names)}, augmentation {plan.augment}, seed {plan.seed}"


def _log_tensorboard(out: Path, result: EpochResult) -> None:
    from torch.utils.tensorboard import SummaryWriter  # noqa: PLC0415 - slow to import

    with SummaryWriter(log_dir=str(out / "tensorboard")) as writer:
        for name in ("loss", "dice", "iou"):
            writer.add_scalar(name, getattr(result, name), result.epoch)
