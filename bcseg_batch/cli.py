"""The command line: parse, build, call, and turn errors into exit codes."""

# No `from __future__ import annotations` here: typer reads the annotations as they are.
import json
import os
import shlex
from dataclasses import asdict
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from bcseg_batch.command_line import new_app, run

# Everything heavy is imported where it is used, so that --help is there at once.
if TYPE_CHECKING:
    from bcseg_batch.remote.url import Place
    from bcseg_batch.report.build import Report
    from bcseg_batch.service.process_dir import Summary
    from bcseg_batch.settings import LoadedSettings
    from bcseg_batch.store.shards import Shard

app = new_app(
    "bcseg-batch", "Find the blood cells in smear photographs: masks and blood-red composites."
)

# What a run may have left in the output folder, for the summary.
_RESULTS = (
    "masks",
    "composites",
    "outlines",
    "labels",
    "probabilities",
    "cells.csv",
    "results.csv",
    "results.jsonl",
)


class Dtype(StrEnum):
    """Choices of --dtype."""

    AUTO = "auto"
    FLOAT32 = "float32"
    BFLOAT16 = "bfloat16"
    FLOAT16 = "float16"
    INT8 = "int8"


class Backend(StrEnum):
    """Choices of --backend."""

    AUTO = "auto"
    TORCH = "torch"
    OPENVINO = "openvino"


class EngineChoice(StrEnum):
    """Choices of --engine."""

    LOCAL = "local"
    RAY = "ray"


class ExportChoice(StrEnum):
    """Choices of --to."""

    QUPATH = "qupath"
    IMAGEJ = "imagej"
    COCO = "coco"
    LABELS = "labels"


SettingsFile = Annotated[
    Path | None,
    typer.Option("--settings", metavar="FILE", help="Settings file (TOML).", show_default=False),
]


def _folder(text: str) -> Path:
    """Read an argument that has to be a folder here.

    Raises:
        UsageError: it is the URL of a place in a store.
    """
    from bcseg_batch.errors import UsageError
    from bcseg_batch.remote.url import parse_place

    place = parse_place(text)
    if isinstance(place, Path):
        return place
    raise UsageError(
        f"{place} is no folder, and this command wants one: copy it here first (docs/storage.md "
        "says how), then name the copy"
    )


AsJson = Annotated[bool, typer.Option("--json", help="Print JSON on standard output.")]


@app.command("process-dir")
def process_dir_command(
    source: Annotated[
        str,
        typer.Argument(
            metavar="INPUT",
            help="Folder with photographs, or s3://BUCKET/PREFIX, gs://..., az://...",
            show_default=False,
        ),
    ],
    output: Annotated[
        str,
        typer.Argument(metavar="OUTPUT", help="Folder or URL for the results.", show_default=False),
    ],
    recursive: Annotated[
        bool | None,
        typer.Option("--recursive/--no-recursive", help="Enter sub-folders. [default: recursive]"),
    ] = None,
    model: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Model file. [default: the shipped model]"),
    ] = None,
    device: Annotated[
        str | None,
        typer.Option(metavar="auto|cpu|cuda|cuda:N|mps", help="Where the network runs."),
    ] = None,
    backend: Annotated[Backend | None, typer.Option(help="What runs the network.")] = None,
    dtype: Annotated[Dtype | None, typer.Option(help="Precision of the network.")] = None,
    batch_size: Annotated[
        int | None, typer.Option(metavar="N", help="Images the network takes at once.")
    ] = None,
    threshold: Annotated[
        float | None,
        typer.Option(metavar="T", help="Probability above which a pixel is a cell, 0 to 1."),
    ] = None,
    workers: Annotated[
        int | None, typer.Option(metavar="N", help="Threads that read and write.")
    ] = None,
    cells: Annotated[
        bool | None,
        typer.Option("--cells/--no-cells", help="Count and measure the cells. [default: cells]"),
    ] = None,
    labels: Annotated[
        bool | None,
        typer.Option("--labels/--no-labels", help="Write label images. [default: no-labels]"),
    ] = None,
    outlines: Annotated[
        bool | None,
        typer.Option(
            "--outlines/--no-outlines", help="Write outlines of cells. [default: no-outlines]"
        ),
    ] = None,
    probability: Annotated[
        bool | None,
        typer.Option(
            "--probability/--no-probability",
            help="Write probability maps. [default: no-probability]",
        ),
    ] = None,
    composite: Annotated[
        bool | None,
        typer.Option("--composite/--no-composite", help="Write composites. [default: composite]"),
    ] = None,
    pixel_size: Annotated[
        float | None,
        typer.Option("--pixel-size-um", metavar="UM", help="Side of a pixel, micrometres."),
    ] = None,
    report: Annotated[
        bool | None,
        typer.Option("--report/--no-report", help="Make pages of the results. [default: no]"),
    ] = None,
    engine: Annotated[
        EngineChoice | None,
        typer.Option(help="What does the work: this process, or a Ray cluster."),
    ] = None,
    address: Annotated[
        str | None,
        typer.Option(metavar="local|auto|ray://HOST:PORT", help="Which Ray cluster."),
    ] = None,
    actors: Annotated[
        str | None, typer.Option(metavar="MIN:MAX", help="Workers on the Ray cluster.")
    ] = None,
    cpus_per_actor: Annotated[
        float | None, typer.Option(metavar="F", help="Processor cores of each of these.")
    ] = None,
    gpus_per_actor: Annotated[
        float | None, typer.Option(metavar="F", help="GPUs of each of these.")
    ] = None,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Do again what is done already.")
    ] = False,
    shard: Annotated[
        str | None,
        typer.Option(metavar="K/N", help="The K-th of N parts of INPUT alone; see `merge`."),
    ] = None,
    settings_file: SettingsFile = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print the summary as JSON on standard output.")
    ] = False,
) -> None:
    """Process a folder of photographs once; run it again to resume or to catch up."""
    from bcseg_batch.errors import UsageError
    from bcseg_batch.remote.url import parse_place
    from bcseg_batch.settings import load_settings
    from bcseg_batch.store.shards import Shard

    loaded = load_settings(
        settings_file,
        {
            "images.pixel_size_um": pixel_size,
            "images.recursive": recursive,
            "model.file": model,
            "model.device": device,
            "model.backend": backend and backend.value,
            "model.dtype": dtype and dtype.value,
            "model.threshold": threshold,
            "outputs.cells": cells,
            "outputs.composite": composite,
            "outputs.labels": labels,
            "outputs.outlines": outlines,
            "outputs.probability": probability,
            "processing.batch_size": batch_size,
            "processing.engine": engine and engine.value,
            "processing.workers": workers,
            "ray.actors": actors,
            "ray.address": address,
            "ray.cpus_per_actor": cpus_per_actor,
            "ray.gpus_per_actor": gpus_per_actor,
            "report.enabled": report,
        },
    )
    target = parse_place(output)
    if loaded.settings.report.enabled and not isinstance(target, Path):
        raise UsageError(
            f"the report is made in a folder, and {target} is none: leave out --report, copy the "
            "results here, then run `bcseg-batch report` on the copy"
        )
    part = None if shard is None else Shard.parse(shard)
    if loaded.settings.report.enabled and part is not None:
        raise UsageError(
            "the report is made of all shards: leave it out (--no-report), and run `bcseg-batch "
            "report` when they are through"
        )
    summary, code = _process_dir(
        loaded, parse_place(source), target, overwrite=overwrite, shard=part
    )
    if as_json:
        typer.echo(json.dumps(_summary_json(summary, target), indent=2))
    else:
        _print_summary(summary, target)
    # After the summary: the images are done, whatever becomes of the pages about them.
    if loaded.settings.report.enabled and isinstance(target, Path) and code in {0, 1}:
        index = _report_of_a_run(loaded, target)
        if index is None:
            code = 1
        elif not as_json:
            typer.echo(_result_line("report", index))
    raise typer.Exit(code)


def _process_dir(
    loaded: "LoadedSettings",
    source: "Place",
    output: "Place",
    *,
    overwrite: bool,
    shard: "Shard | None",
) -> "tuple[Summary, int]":
    from loguru import logger
    from rich.console import Console

    from bcseg_batch.intake.ignore import IgnoreRules
    from bcseg_batch.service.folders import check_folders
    from bcseg_batch.service.log import log_to_terminal
    from bcseg_batch.service.progress import ProgressBar, ProgressLines
    from bcseg_batch.service.stop import StopSignals

    console = Console(stderr=True)
    log_to_terminal(console)
    check_folders(source, output)  # before the seconds that torch and the model take

    from contextlib import nullcontext

    from bcseg_batch.service.build import build_engine, open_cluster
    from bcseg_batch.service.process_dir import process_dir
    from bcseg_batch.store.images import SUFFIXES

    images = loaded.settings.images
    local = None if loaded.settings.processing.engine == "ray" else build_engine(loaded.settings)
    with (
        StopSignals() as stop,
        # A cluster may have to be waited for, which a signal ends.
        nullcontext(local) if local else open_cluster(loaded.settings, stop) as chosen,
        ProgressBar(console) if console.is_terminal else ProgressLines() as progress,
    ):
        logger.info("{}", chosen.description)
        summary = process_dir(
            source,
            output,
            engine=chosen.pipeline,
            rules=IgnoreRules(images.suffixes or SUFFIXES, images.ignore),
            recursive=images.recursive,
            overwrite=overwrite,
            stop=stop,
            progress=progress,
            shard=shard,
        )
    if stop.requested:
        return summary, stop.exit_code
    return summary, 0 if summary.is_whole else 1


def _report_of_a_run(loaded: "LoadedSettings", output: Path) -> Path | None:
    """Make the report and give its first page; where that fails, say so and give None."""
    from loguru import logger

    from bcseg_batch.errors import BcsegError

    try:
        return _report(loaded, output).index
    except BcsegError as error:
        logger.error("the images are done, and the report is not: {}", error)
        return None


def _report(loaded: "LoadedSettings", output: Path) -> "Report":
    from loguru import logger

    from bcseg_batch.report import check_report_installed

    check_report_installed()
    from bcseg_batch.report.build import ReportOptions, build_report

    settings = loaded.settings.report
    logger.info("making the report")
    return build_report(
        output,
        ReportOptions(group_pattern=settings.group_pattern, min_cells=settings.min_cells),
    )


def _summary_json(summary: "Summary", output: "Place") -> dict[str, Any]:
    fields = asdict(summary)
    fields["images_per_s"] = summary.images_per_s
    fields["output"] = str(output)
    return fields


def _print_summary(summary: "Summary", output: "Place") -> None:
    from bcseg_batch.text import printable

    total = summary.done + summary.failed + summary.skipped
    lines = [] if summary.shard is None else [f"Shard {summary.shard}:"]
    if summary.left:
        left = f"at least {summary.left}" if summary.unlisted else f"{summary.left}"
        lines.append(f"Interrupted with {left} images left: run again to go on.")
    elif not total:
        where = "the input folder" if summary.shard is None else "this part of the input folder"
        lines.append(f"Nothing to do: no image in {where}.")
    elif total == summary.skipped and not summary.changed:
        lines.append(f"Nothing to do: all {total} images were done before.")
    lines.append(
        f"{summary.done} done, {summary.failed} failed, {summary.skipped} skipped, "
        f"{summary.images_per_s:.2f} images/s, {summary.seconds:.1f} s"
    )
    if summary.flagged:
        lines.append(f"{summary.flagged} to be doubted: the column flags of results.csv says why")
    if summary.ignored:
        names = [printable(f"{f.image} ({f.reason})") for f in summary.ignored_names[:5]]
        more = f", and {summary.ignored - len(names)} more" if summary.ignored > len(names) else ""
        lines.append(f"{summary.ignored} ignored: {', '.join(names)}{more}")
    if summary.unsettled:
        names = [printable(image) for image in summary.unsettled[:5]]
        more = f", and {summary.changed - len(names)} more" if summary.changed > len(names) else ""
        lines.append(
            f"{summary.changed} vanished or were being written: {', '.join(names)}{more}: "
            "run again when they are there"
        )
    if summary.shard is not None:
        lines.append(
            "  when all shards are through, this makes results.jsonl and the tables: "
            f"bcseg-batch merge {shlex.quote(str(output))}"
        )
    elif isinstance(output, Path):
        there = [output / kind for kind in _RESULTS if (output / kind).exists()]
        lines.extend(_result_line(path.name, path) for path in there)
    else:
        lines.append(f"  results in {printable(str(output))}")
    typer.echo("\n".join(lines))


def _result_line(kind: str, path: Path) -> str:
    from bcseg_batch.text import printable

    return f"  {kind:<13} {printable(str(path))}"


@app.command("merge")
def merge_command(
    output: Annotated[
        Path,
        typer.Argument(
            metavar="OUTPUT",
            parser=_folder,
            help="Folder that shards have written to.",
            show_default=False,
        ),
    ],
    settings_file: SettingsFile = None,
) -> None:
    """Join what the runs of process-dir --shard have recorded, and make the tables over all."""
    from rich.console import Console

    from bcseg_batch.service.log import log_to_terminal
    from bcseg_batch.service.shards import merge_folder
    from bcseg_batch.settings import load_settings
    from bcseg_batch.text import printable

    log_to_terminal(Console(stderr=True))
    settings = load_settings(settings_file, {}).settings
    merged = merge_folder(output, parquet=settings.outputs.parquet)
    if merged is None:
        typer.echo("nothing to merge: no shard has left records there")
        return
    typer.echo(
        f"{merged.records} records of {len(merged.shards)} shards merged: "
        f"{printable(str(output / 'results.jsonl'))}"
    )
    if merged.absent:
        absent = ", ".join(merged.absent[:10]) + (", ..." if len(merged.absent) > 10 else "")
        typer.echo(f"no records of shards {absent}: they have not run since the last merge")


@app.command("export")
def export_command(
    output: Annotated[
        Path,
        typer.Argument(
            metavar="OUTPUT",
            parser=_folder,
            help="Folder that a run has written to.",
            show_default=False,
        ),
    ],
    to: Annotated[ExportChoice, typer.Option(help="The program or form.", show_default=False)],
    folder: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="Where to. [default: OUTPUT/exports/FORMAT]"),
    ] = None,
    images: Annotated[
        str | None,
        typer.Option(metavar="PATTERN", help="Of images like this only, such as 'night/*'."),
    ] = None,
    editable: Annotated[
        bool, typer.Option("--editable", help="qupath: annotations, to be corrected by hand.")
    ] = False,
) -> None:
    """Write the cells for QuPath, ImageJ, COCO, or as plain label images with tables.

    Needs label images (process-dir --labels). Exit code 1 where images could not be exported.
    """
    from bcseg_batch.errors import UsageError
    from bcseg_batch.exchange.folder import ExportFormat, export_folder
    from bcseg_batch.text import printable

    if editable and to is not ExportChoice.QUPATH:
        raise UsageError("--editable is for --to qupath: leave it out")
    summary = export_folder(
        output, ExportFormat(to.value), folder=folder, pattern=images, editable=editable
    )
    typer.echo(f"{summary.exported} images exported to {printable(str(summary.folder))}")
    if summary.problems:
        typer.echo(f"{len(summary.problems)} not exported:")
    for image, reason in summary.problems:
        typer.echo(f"  {printable(image)}: {printable(reason)}")
    if not summary.exported and not summary.problems:
        which = "no image is recorded there" if images is None else f"no image is like {images}"
        typer.echo(f"nothing to export: {printable(which)}")
    raise typer.Exit(0 if summary.exported and not summary.problems else 1)


@app.command("report")
def report_command(
    output: Annotated[
        Path,
        typer.Argument(
            metavar="OUTPUT",
            parser=_folder,
            help="Folder that process-dir or the daemon has written to.",
            show_default=False,
        ),
    ],
    group_pattern: Annotated[
        str | None,
        typer.Option(
            metavar="REGEX", help="Totals by this part of the names: '(?P<group>[^/_]+)_'."
        ),
    ] = None,
    min_cells: Annotated[
        int | None, typer.Option(metavar="N", help="Cells that are enough for a group.")
    ] = None,
    settings_file: SettingsFile = None,
) -> None:
    """Make or refresh the pages about an output folder; a browser opens them without a server."""
    from rich.console import Console

    from bcseg_batch.service.log import log_to_terminal
    from bcseg_batch.settings import load_settings
    from bcseg_batch.text import printable

    log_to_terminal(Console(stderr=True))
    loaded = load_settings(
        settings_file, {"report.group_pattern": group_pattern, "report.min_cells": min_cells}
    )
    made = _report(loaded, output)
    typer.echo(f"{made.images} images, {made.drawn} of them drawn: {printable(str(made.index))}")


@app.command("show-settings")
def show_settings_command(settings_file: SettingsFile = None) -> None:
    """Print the settings in effect and where each comes from."""
    from bcseg_batch.settings import load_settings, render_settings

    typer.echo(render_settings(load_settings(settings_file, {})), nl=False)


StateDir = Annotated[
    Path | None,
    typer.Option(metavar="DIR", help="Folder of the ledger.", show_default=False),
]


@app.command("show")
def show_command(
    image: Annotated[
        Path, typer.Argument(metavar="IMAGE", help="A photograph.", show_default=False)
    ],
    save: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Where to. [default: IMAGE's stem and _panel.png, here]"),
    ] = None,
    is_opened: Annotated[
        bool | None,
        typer.Option("--open/--no-open", help="Open it. [default: where there is a screen]"),
    ] = None,
    model: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Model file. [default: the shipped model]"),
    ] = None,
    threshold: Annotated[
        float | None,
        typer.Option(metavar="T", help="Probability above which a pixel is a cell, 0 to 1."),
    ] = None,
) -> None:
    """Show one photograph, its probability, mask, composite and outlines side by side."""
    from bcseg_batch.api import load_model
    from bcseg_batch.errors import ImageError, UsageError
    from bcseg_batch.panel import SUFFIXES, check_matplotlib, draw_panel, has_screen, save_panel
    from bcseg_batch.text import printable

    check_matplotlib()
    path = Path(f"{image.stem}_panel.png") if save is None else save
    if path.suffix.lower() not in SUFFIXES:
        raise UsageError(f"a panel is saved as {', '.join(SUFFIXES)}, not as {path.name!r}")
    if path.exists() and image.exists() and path.samefile(image):
        raise UsageError(f"{printable(str(path))} is the photograph itself: name another file")
    try:
        found = load_model(model, threshold=threshold).segment(image)
    except ImageError as error:
        raise UsageError(str(error)) from error
    save_panel(draw_panel(found), path)
    for flag in found.flags:
        typer.echo(flag.sentence)
    typer.echo(printable(str(path)))
    if has_screen() if is_opened is None else is_opened:
        typer.launch(str(path))


@app.command("verify")
def verify_command(
    output: Annotated[
        Path,
        typer.Argument(
            metavar="OUTPUT", parser=_folder, help="Folder with results.", show_default=False
        ),
    ],
    source: Annotated[
        Path | None,
        typer.Option("--input", metavar="DIR", help="Compare the photographs too."),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Hold every record against its files and their hashes. Exit code 1 where they differ."""
    from bcseg_batch.store.verify import Verified, verify
    from bcseg_batch.text import printable

    verified, count = Verified(), 0
    for finding in verify(output, verified, source):
        count += 1
        if as_json:
            typer.echo(json.dumps(asdict(finding)))
        else:
            whose = "" if finding.image is None else f"{finding.image}: "
            typer.echo(printable(f"{whose}{finding.path}: {finding.problem}"))
    if as_json:
        typer.echo(json.dumps({**asdict(verified), "findings": count}))
    else:
        inputs = "" if source is None else f", {verified.inputs} photographs compared"
        unhashed = f", {verified.unhashed} without a hash" if verified.unhashed else ""
        typer.echo(
            f"{verified.images} images, {verified.files} files compared{unhashed}{inputs}, "
            f"{count} findings" + (", while a run is going on" if verified.is_running else "")
        )
    raise typer.Exit(1 if count else 0)


@app.command("run")
def run_command(
    settings_file: SettingsFile = None,
    source: Annotated[
        Path | None,
        typer.Option("--input", metavar="DIR", help="Folder to watch.", show_default=False),
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="Folder for the results.", show_default=False),
    ] = None,
    state_dir: StateDir = None,
    log_dir: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="Folder for the log files.", show_default=False),
    ] = None,
    until_idle: Annotated[
        float | None,
        typer.Option(metavar="SECONDS", min=0, help="End after this long without work."),
    ] = None,
) -> None:
    """Watch a folder and process what comes, until told to stop."""
    from bcseg_batch.service.daemon import Daemon, daemon_folders, leave_in_time
    from bcseg_batch.service.log import log_of_the_daemon
    from bcseg_batch.service.stop import StopSignals
    from bcseg_batch.settings import Settings, load_settings

    def load() -> Settings:
        return load_settings(
            settings_file,
            {
                "folders.input": source,
                "folders.output": output,
                "folders.state": state_dir,
                "log.folder": log_dir,
            },
        ).settings

    settings = load()
    with StopSignals(reload=True) as signals:
        log_of_the_daemon(settings.log, daemon_folders(settings).state)
        daemon = Daemon(settings, reload=load, signals=signals, until_idle_s=until_idle)
        leave_in_time(signals, settings.service.shutdown_timeout_s)
        daemon.run()


def _state_folder(settings_file: Path | None, state_dir: Path | None) -> Path:
    from bcseg_batch.errors import SettingsError
    from bcseg_batch.settings import load_settings

    state = load_settings(settings_file, {"folders.state": state_dir}).settings.folders.state
    if state is None:
        raise SettingsError(
            "which daemon? name its settings file with --settings, or its state folder with "
            "--state-dir"
        )
    return state


@app.command("status")
def status_command(
    settings_file: SettingsFile = None, state_dir: StateDir = None, as_json: AsJson = False
) -> None:
    """Show how the daemon is. Exit code 0: well; 1: in trouble; 3: not running."""
    from bcseg_batch.service.overview import overview, render_overview

    facts = overview(_state_folder(settings_file, state_dir))
    typer.echo(json.dumps(facts, indent=2) if as_json else render_overview(facts))
    raise typer.Exit(3 if not facts["alive"] else 1 if facts["troubles"] else 0)


@app.command("failures")
def failures_command(
    settings_file: SettingsFile = None, state_dir: StateDir = None, as_json: AsJson = False
) -> None:
    """List the images that failed, the latest first."""
    from bcseg_batch.store.ledger import LEDGER_NAME, Ledger
    from bcseg_batch.store.results import to_record
    from bcseg_batch.text import printable

    with Ledger.open_existing(_state_folder(settings_file, state_dir) / LEDGER_NAME) as ledger:
        for failure in ledger.failures():
            outcome = failure.outcome
            if as_json:
                typer.echo(json.dumps({**to_record(outcome), "attempts": failure.attempts}))
            else:
                typer.echo(
                    f"{outcome.finished_at}  {printable(outcome.image)}  "
                    f"({failure.attempts} x)  {printable(outcome.error or '')}"
                )


@app.command("retry")
def retry_command(
    pattern: Annotated[
        str | None,
        typer.Argument(metavar="[PATTERN]", help="Such as 'night/*.jpg'; all without it."),
    ] = None,
    settings_file: SettingsFile = None,
    state_dir: StateDir = None,
) -> None:
    """Put failed images back into the queue; a running daemon takes them up at once.

    Exit code 1 where there is none.
    """
    from bcseg_batch.store.ledger import LEDGER_NAME, Ledger
    from bcseg_batch.text import printable

    path = _state_folder(settings_file, state_dir) / LEDGER_NAME
    with Ledger.open_existing(path, readonly=False) as ledger:
        count = ledger.retry(pattern)
    if not count:
        which = "no image has failed" if pattern is None else f"no failed image is like {pattern}"
        typer.echo(f"nothing to try again: {printable(which)}")
        raise typer.Exit(1)
    typer.echo(f"{count} images are tried again")


@app.command("logs")
def logs_command(
    settings_file: SettingsFile = None,
    state_dir: StateDir = None,
    log_dir: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="Folder of the log files.", show_default=False),
    ] = None,
    follow: Annotated[bool, typer.Option("--follow", "-f", help="Go on with what comes.")] = False,
    image: Annotated[
        str | None, typer.Option(metavar="PATTERN", help="Of images like this only.")
    ] = None,
    level: Annotated[
        str | None, typer.Option(metavar="LEVEL", help="Of this weight and above.")
    ] = None,
    since: Annotated[
        str | None, typer.Option(metavar="WHEN", help="Such as 2h, 1d12h or 2026-03-01T08:30.")
    ] = None,
    stage: Annotated[
        str | None, typer.Option(metavar="STAGE", help="decode, network, write or record.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Read the daemon's log files back, rotated and compressed ones too."""
    from datetime import UTC, datetime

    from bcseg_batch.service.log import log_folder
    from bcseg_batch.service.logfile import LogQuery, parse_since, read_logs, render, to_json
    from bcseg_batch.settings import load_settings

    loaded = load_settings(settings_file, {"folders.state": state_dir, "log.folder": log_dir})
    settings = loaded.settings
    if settings.log.folder is not None:
        folder = settings.log.folder
    else:
        folder = log_folder(settings.log, _state_folder(settings_file, state_dir), os.environ)
    query = LogQuery(
        image=image,
        level=level,
        since=None if since is None else parse_since(since, datetime.now(UTC)),
        stage=stage,
    )
    for line in read_logs(folder, query, follow=follow):
        typer.echo(to_json(line).rstrip("\n") if as_json else render(line))


@app.command("check")
def check_command(
    settings_file: SettingsFile = None,
    source: Annotated[
        Path | None, typer.Option("--input", metavar="DIR", show_default=False)
    ] = None,
    output: Annotated[Path | None, typer.Option(metavar="DIR", show_default=False)] = None,
    state_dir: StateDir = None,
    as_json: AsJson = False,
) -> None:
    """Look a set-up over: folders, rights, space, watching, ledger, model, one image end to end."""
    from rich.console import Console

    from bcseg_batch.service.doctor import Verdict, examine
    from bcseg_batch.service.log import log_to_terminal
    from bcseg_batch.settings import load_settings
    from bcseg_batch.text import printable

    log_to_terminal(Console(stderr=True))
    loaded = load_settings(
        settings_file,
        {"folders.input": source, "folders.output": output, "folders.state": state_dir},
    )
    findings = []
    for finding in examine(loaded.settings):
        findings.append(finding)
        if not as_json:
            typer.echo(f"{finding.verdict:<8} {finding.subject}: {printable(finding.text)}")
    if as_json:
        typer.echo(json.dumps([asdict(finding) for finding in findings], indent=2))
    raise typer.Exit(any(finding.verdict is Verdict.FAILURE for finding in findings))


def main() -> None:
    """Run the command line; `command_line.run` says how it ends."""
    run(app, "bcseg-batch")
