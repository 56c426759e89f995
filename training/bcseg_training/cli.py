"""The command line of the training side: parse, call, and turn errors into exit codes."""

# No `from __future__ import annotations` here: typer reads the annotations as they are.
import math
import os
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from bcseg_batch.command_line import new_app, run
from bcseg_batch.errors import SettingsError
from bcseg_batch.text import printable

app = new_app("bcseg-train", "Make and judge the models that bcseg-batch runs.")

Dataset = Annotated[
    Path, typer.Argument(metavar="DATASET", help="Folder with train and val, or test.")
]


class LossChoice(StrEnum):
    """Choices of --loss."""

    BCE = "bce"
    DICE = "dice"
    BOTH = "bce+dice"


class AugmentChoice(StrEnum):
    """Choices of --augment."""

    NONE = "none"
    STANDARD = "standard"
    STRONG = "strong"


class NormChoice(StrEnum):
    """Choices of --norm."""

    NONE = "none"
    BATCH = "batch"
    GROUP = "group"


class ScheduleChoice(StrEnum):
    """Choices of --schedule."""

    CONSTANT = "constant"
    COSINE = "cosine"


class SetChoice(StrEnum):
    """Choices of --set."""

    TRAIN = "train"
    VAL = "val"
    TEST = "test"


class StyleChoice(StrEnum):
    """Choices of --style."""

    TYPICAL = "typical"
    VARIED = "varied"


@app.command("check")
def check_command(dataset: Dataset) -> None:
    """Look a data set over: pairs, sizes, mask values, duplicates. Exit code 1 on a problem."""
    from bcseg_training.check import check_dataset

    report = check_dataset(dataset)
    for name, count in report.pairs.items():
        typer.echo(f"{name}: {count} pairs")
    for (width, height), count in report.sizes_wh_px.most_common():
        typer.echo(f"{count} of {width}x{height}")
    typer.echo(f"cells cover {report.foreground_fraction:.1%} on average")
    for remark in report.remarks:
        typer.echo(f"remark: {printable(remark)}")
    for problem in report.problems:
        typer.echo(f"problem: {printable(problem)}")
    typer.echo(f"{len(report.problems)} problems, {len(report.remarks)} remarks")
    raise typer.Exit(1 if report.problems else 0)


@app.command("import-corrections")
def import_corrections_command(
    corrected: Annotated[
        Path,
        typer.Argument(metavar="CORRECTED", help="Folder with masks, labels, GeoJSON or ROIs."),
    ],
    dataset: Annotated[
        Path, typer.Argument(metavar="DATASET", help="Data set to add to; made where missing.")
    ],
    originals: Annotated[
        Path | None,
        typer.Option(help="Folder with the photographs. [default: those of the data set]"),
    ] = None,
    into: Annotated[SetChoice, typer.Option("--set", help="Set to add to.")] = SetChoice.TRAIN,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace pairs that are there.")
    ] = False,
    inverted: Annotated[
        bool, typer.Option("--inverted", help="Cells are black in the masks.")
    ] = False,
    allow_empty: Annotated[
        bool, typer.Option("--allow-empty", help="Photographs without a cell are meant so.")
    ] = False,
) -> None:
    """Add what was corrected in Fiji, napari or QuPath. Exit code 1 where a file is refused."""
    from bcseg_training.import_corrections import import_corrections

    report = import_corrections(
        corrected,
        dataset,
        originals=originals,
        into=into.value,
        overwrite=overwrite,
        inverted=inverted,
        allow_empty=allow_empty,
    )
    told = {
        "added": report.added,
        "replaced": report.replaced,
        "unchanged": report.unchanged,
        "refused": report.problems,
    }
    for word, lines in told.items():
        for line in lines:
            typer.echo(f"{word}: {printable(line)}")
    counts = ", ".join(f"{len(lines)} {word}" for word, lines in told.items())
    typer.echo(f"{printable(str(report.folder))}: {counts}")
    raise typer.Exit(1 if report.problems else 0)


@app.command("train")
def train_command(
    dataset: Dataset,
    out: Annotated[Path, typer.Option(help="Folder for checkpoints, curves and logs.")],
    epochs: Annotated[int, typer.Option(min=1, help="Passes over the training set.")] = 2,
    width: Annotated[int, typer.Option(min=1, help="Channels of the first step.")] = 64,
    depth: Annotated[int, typer.Option(min=1, max=6, help="Encoder steps.")] = 4,
    norm: Annotated[NormChoice, typer.Option(help="Normalisation layers.")] = NormChoice.NONE,
    lr: Annotated[float, typer.Option(min=0, help="Learning rate at its peak.")] = 3e-4,
    batch_size: Annotated[int, typer.Option(min=1, help="Items a step.")] = 8,
    loss: Annotated[LossChoice, typer.Option(help="Loss.")] = LossChoice.BCE,
    augment: Annotated[AugmentChoice, typer.Option(help="Augmentation.")] = AugmentChoice.NONE,
    crop_px: Annotated[
        int, typer.Option(min=16, help="Side of an item; 512 is the whole image.")
    ] = 512,
    crops_per_image: Annotated[
        int, typer.Option(min=1, help="Items from each image in an epoch.")
    ] = 1,
    schedule: Annotated[
        ScheduleChoice, typer.Option(help="Course of the learning rate.")
    ] = ScheduleChoice.CONSTANT,
    ema: Annotated[
        float, typer.Option(min=0, max=0.9999, help="Decay of the weights' average, 0 for none.")
    ] = 0.0,
    boxes: Annotated[
        Path | None,
        typer.Option(help="Folder with images and VOC boxes (strong).", show_default=False),
    ] = None,
    synthetic: Annotated[
        list[Path] | None,
        typer.Option(help="Folder that synth wrote; repeatable (strong).", show_default=False),
    ] = None,
    shares: Annotated[
        tuple[float, float, float],
        typer.Option(help="Of DATASET, --boxes and --synthetic among the items (strong)."),
    ] = (0.45, 0.35, 0.2),
    items: Annotated[int, typer.Option(min=1, help="Items an epoch (strong).")] = 800,
    init: Annotated[
        Path | None, typer.Option(help="Checkpoint to start from.", show_default=False)
    ] = None,
    seed: Annotated[int, typer.Option(min=0, help="Of weights, order and augmentation.")] = 0,
    resume: Annotated[bool, typer.Option("--resume", help="Continue what lies in --out.")] = False,
    stop_after_epoch: Annotated[
        int | None, typer.Option(min=1, help="Stop early, to be resumed.", show_default=False)
    ] = None,
    loader_processes: Annotated[int, typer.Option(min=0, help="Processes that augment.")] = 0,
) -> None:
    """Train a network; without options as the original did.

    Several GPUs: accelerate launch -m bcseg_training.cli train DATASET --out DIR
    """
    from rich.console import Console

    from bcseg_batch.allocator import keep_freed_memory
    from bcseg_batch.service.log import log_to_terminal
    from bcseg_training.processes import close, open_accelerator
    from bcseg_training.progress import TrainingBar
    from bcseg_training.train import TrainingPlan, train

    keep_freed_memory()
    console = Console(stderr=True)
    rank = _rank()
    # Of many processes one tells how it goes, and the others what is amiss.
    log_to_terminal(
        console, level="WARNING" if rank else "INFO", speaker=f"process {rank}: " if rank else ""
    )
    accelerator = open_accelerator()
    plan = TrainingPlan(
        dataset=dataset,
        epochs=epochs,
        width=width,
        depth=depth,
        norm=norm.value,
        lr=lr,
        batch_size=batch_size,
        loss=loss.value,
        augment=augment.value,
        crop_px=crop_px,
        crops_per_image=crops_per_image,
        schedule=schedule.value,
        ema=ema,
        seed=seed,
        boxes=boxes,
        synthetic=tuple(synthetic or ()),
        shares=shares,
        items=items,
        init=init,
    )
    with TrainingBar(epochs, Console(quiet=True) if rank else console) as bar:
        history = train(
            plan,
            out,
            resume=resume,
            stop_after_epoch=stop_after_epoch,
            num_workers=loader_processes,
            progress=bar,
            accelerator=accelerator,
        )
    close(accelerator)
    if rank:
        return
    best = max(history, key=lambda result: result.dice)
    typer.echo(f"best epoch {best.epoch}: Dice {best.dice:.4f}, IoU {best.iou:.4f}: {out}")


@app.command("evaluate")
def evaluate_command(
    checkpoint: Annotated[Path, typer.Argument(metavar="CHECKPOINT", help="Model file.")],
    folders: Annotated[
        list[Path],
        typer.Argument(
            metavar="FOLDER...",
            help="Each with original and mask, with images and VOC annotations, or with val.",
        ),
    ],
    out: Annotated[
        Path | None, typer.Option(help="Folder for tables and pictures.", show_default=False)
    ] = None,
    threshold: Annotated[
        float | None, typer.Option(help="[default: the checkpoint's own]", show_default=False)
    ] = None,
    worst: Annotated[int, typer.Option(min=1, help="Images on a page of worst cases.")] = 6,
    limit: Annotated[
        int | None, typer.Option(min=1, help="Images of each folder.", show_default=False)
    ] = None,
    baseline: Annotated[bool, typer.Option(help="Judge Otsu's threshold beside it.")] = True,
    tiling: Annotated[bool, typer.Option(help="Take small cells in tiles, as the service.")] = True,
    device: Annotated[str, typer.Option(help="Where the network runs.")] = "auto",
    in_8_bits: Annotated[
        bool, typer.Option("--int8/--float32", help="Judge the model's 8-bit form.")
    ] = False,
) -> None:
    """Judge a model at full image size: masks, cells, counts, kinds, calibration."""
    from rich.console import Console
    from rich.table import Table

    from bcseg_batch.errors import UsageError
    from bcseg_training.evaluate import evaluate

    if threshold is not None and not 0 < threshold < 1:
        raise UsageError(f"--threshold {threshold} is no probability above 0 and below 1")
    judged = evaluate(
        checkpoint,
        folders,
        out=out,
        threshold=threshold,
        worst=worst,
        limit=limit,
        baseline=baseline,
        tiling=tiling,
        device=device,
        in_8_bits=in_8_bits,
    )
    for one in judged:
        table = Table("score", "model", "Otsu", title=printable(one.name), title_justify="left")
        for name, value in one.model.scores.items():
            other = None if one.baseline is None else one.baseline.scores.get(name)
            # Not a number: there was nothing to judge by.
            shown = [
                "" if v is None else "-" if math.isnan(v) else f"{v:.4f}" for v in (value, other)
            ]
            table.add_row(name, *shown)
        tiled = f"{len(one.model.rows)} images, {one.model.tiled} in tiles"
        Console().print(table, tiled, "", sep="\n", markup=False)
    if out is not None:
        typer.echo(str(out))


@app.command("profile")
def profile_command(
    checkpoint: Annotated[Path, typer.Argument(metavar="CHECKPOINT")],
    folders: Annotated[
        list[Path], typer.Argument(metavar="FOLDER...", help="What the model was trained on.")
    ],
    out: Annotated[Path, typer.Option(help="New model file (.safetensors).")],
    device: Annotated[str, typer.Option(help="Where the network runs.")] = "auto",
) -> None:
    """Store in a model how its training images look, to flag what is unlike them."""
    from bcseg_training.profile import profile

    statistics = profile(checkpoint, folders, out, device=device)
    typer.echo(f"{out}: {statistics.count} images, limit {statistics.limit:.2f}")


@app.command("quantize")
def quantize_command(
    checkpoint: Annotated[Path, typer.Argument(metavar="CHECKPOINT")],
    folders: Annotated[
        list[Path], typer.Argument(metavar="FOLDER...", help="What the model was trained on.")
    ],
    out: Annotated[
        Path | None,
        typer.Option(help="File to write. [default: beside the checkpoint]", show_default=False),
    ] = None,
    images: Annotated[int, typer.Option(min=1, help="Images to take the ranges from.")] = 300,
    seed: Annotated[int, typer.Option(min=0, help="Of the choice of images.")] = 0,
) -> None:
    """Make the 8-bit form of a model, which OpenVINO runs twice as fast on a processor."""
    from bcseg_training.quantize import quantize

    made = quantize(checkpoint, folders, out=out, count=images, seed=seed)
    typer.echo(
        f"{made.path}: {made.size_bytes / 1e6:.1f} MB, from {made.calibration_images} images\n"
        f"on {made.images} others: Dice {made.dice:.4f} with the masks in float32, probabilities "
        f"moved by {made.mean_shift:.4f} on average and {made.largest_shift:.2f} at most"
    )


@app.command("export")
def export_command(
    checkpoint: Annotated[Path, typer.Argument(metavar="CHECKPOINT.safetensors")],
    target: Annotated[Path, typer.Argument(metavar="TARGET.pth")],
) -> None:
    """Write a model in the original's layout, for the original's scripts."""
    from bcseg_training.convert import convert

    convert(checkpoint, target, source_suffix=".safetensors", target_suffix=".pth")
    typer.echo(str(target))


@app.command("import")
def import_command(
    checkpoint: Annotated[Path, typer.Argument(metavar="CHECKPOINT.pth")],
    target: Annotated[Path, typer.Argument(metavar="TARGET.safetensors")],
) -> None:
    """Take over a checkpoint.pth of the original's scripts."""
    from bcseg_training.convert import convert

    convert(checkpoint, target, source_suffix=".pth", target_suffix=".safetensors")
    typer.echo(str(target))


@app.command("synth")
def synth_command(
    out: Annotated[Path, typer.Argument(metavar="OUT", help="New folder for the data set.")],
    count: Annotated[int, typer.Option(min=1, help="Number of smears.")] = 8,
    seed: Annotated[int, typer.Option(min=0, help="The same seed gives the same smears.")] = 0,
    width_px: Annotated[int, typer.Option(min=64, help="Width of each.")] = 1600,
    height_px: Annotated[int, typer.Option(min=64, help="Height of each.")] = 1200,
    style: Annotated[
        StyleChoice, typer.Option(help="One laboratory's look, or many.")
    ] = StyleChoice.TYPICAL,
) -> None:
    """Generate smears with masks and instance labels as truth."""
    from bcseg_training.synthetic import write_dataset

    write_dataset(out, count=count, seed=seed, shape_hw=(height_px, width_px), style=style.value)
    typer.echo(f"{count} smears with masks and labels in {out}")


def main() -> None:
    """Run the command line; `command_line.run` says how it ends."""
    rank = _rank()
    run(_app_of_whole_installation, f"bcseg-train (process {rank})" if rank else "bcseg-train")


def _rank() -> int:
    """Say which of the processes this is that a launcher has started; 0 where there is one."""
    number = os.environ.get("RANK", "") if "LOCAL_RANK" in os.environ else ""
    return int(number) if number.isdecimal() else 0


def _app_of_whole_installation() -> None:
    try:
        app()
    except ModuleNotFoundError as error:
        if error.name is None or error.name.startswith("bcseg"):
            raise
        raise SettingsError(
            f"{error.name} is not installed: pip install 'bcseg-batch[train]'"
        ) from error


if __name__ == "__main__":  # for accelerate launch -m
    main()
