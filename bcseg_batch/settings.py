"""The one tree of settings: its keys, their layers, and how they are shown to the user.

A key is written `section.key`. Its value comes from the highest layer that gives it: command-line
flag, then environment (`BCSEG_<SECTION>__<KEY>`), then the TOML file, then the default below.
Every layer refuses what it does not know, and all problems of all layers are told at once.

The layers are read here and not by pydantic-settings: its sources stop at the first value that they
cannot decode, ignore unknown environment variables and missing files, and do not say where a value
came from. What it has right is kept: the naming of the variables, and lists as JSON.

To add a section: a subclass of `Section`, and one line in `Settings`. Everything else (layers,
messages, `settings.example.toml`, `show-settings`) follows from the field.
"""

from __future__ import annotations

import difflib
import json
import os
import re
import textwrap
import tomllib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from inspect import cleandoc
from pathlib import Path
from types import MappingProxyType
from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    TypeAdapter,
    ValidationError,
)
from pydantic.fields import FieldInfo

from bcseg_batch.errors import SettingsError
from bcseg_batch.text import printable

__all__ = [
    "FolderSettings",
    "ImageSettings",
    "IntakeSettings",
    "LoadedSettings",
    "LogSettings",
    "MetricsSettings",
    "ModelSettings",
    "Note",
    "OutputSettings",
    "ProcessingSettings",
    "ReportSettings",
    "Section",
    "ServiceSettings",
    "Settings",
    "load_settings",
    "render_example",
    "render_reference",
    "render_settings",
    "shaping_settings",
    "written_outputs",
]

_ENV_PREFIX = "BCSEG_"
_ENV_FILE = "BCSEG_SETTINGS"
_ENV_RESERVED = frozenset({_ENV_FILE, "BCSEG_DATA"})
_LINE_WIDTH = 100


@dataclass(frozen=True)
class Note:
    """What a field's type cannot say of it; stands in the field's `Annotated`.

    Attributes:
        unit: of the value.
        flag: the command-line flag that sets it, if there is one.
        allowed: the allowed values in words, where the type's own constraints do not tell them.
        absent: what it means that the key is not given, for keys whose default is None.
        example: a value to show, for keys whose default is None.
    """

    unit: str | None = None
    flag: str | None = None
    allowed: str | None = None
    absent: str | None = None
    example: object = None


# ---------------------------------------------------------------------- types of values


def _known_text(value: object) -> object:
    """Refuse the empty text, and what no TOML file could hold, before it becomes a path."""
    text = str(value)
    if not text:
        raise ValueError("it is empty")
    if "\0" in text:
        raise ValueError("it has a zero byte in it")
    try:
        text.encode()
    except UnicodeEncodeError:
        raise ValueError("it is not valid UTF-8") from None
    return value


def _expand_home(path: Path) -> Path:
    try:
        return path.expanduser()
    except RuntimeError:
        raise ValueError("that user's home folder is not known") from None


def _normalise_suffix(text: str) -> str:
    suffix = "." + text.lower().removeprefix(".")
    if not re.fullmatch(r"\.[a-z0-9_-]+", suffix):
        raise ValueError(f"{_shown(text)} is not a single suffix")
    return suffix


def _grouping(text: str) -> str:
    try:
        groups = re.compile(text).groupindex
    except re.error as error:
        raise ValueError(f"not a regular expression: {error}") from None
    if "group" not in groups:
        raise ValueError("no part of it is named group, as in (?P<group>...)")
    return text


def _actor_range(text: str) -> str:
    first, colon, last = text.partition(":")
    if not first.isdecimal() or (colon and not last.isdecimal()):
        raise ValueError("is no number and no MIN:MAX")
    if not 1 <= int(first) <= int(last or first) <= 100_000:
        raise ValueError("has to be at least 1, and MAX at least MIN")
    return text


def _drop_repeated(values: tuple[str, ...]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(values))


ActorRange = Annotated[str, AfterValidator(_actor_range)]
FilePath = Annotated[Path, BeforeValidator(_known_text), AfterValidator(_expand_home)]
Suffix = Annotated[str, AfterValidator(_normalise_suffix)]
Pattern = Annotated[str, Field(min_length=1)]
Byte = Annotated[int, Field(ge=0, le=255)]

# ---------------------------------------------------------------------- the tree


class Section(BaseModel):
    """Base of the tree's parts: frozen, unknown keys refused."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class ModelSettings(Section):
    """The network: which one, where it runs, and where it cuts."""

    file: Annotated[
        FilePath | None,
        Field(
            description="Checkpoint: .safetensors, or a checkpoint.pth of the original scripts. "
            "A relative path in a settings file is relative to that file's folder, from a flag or "
            "the environment to the working directory; ~ is the home folder."
        ),
        Note(flag="--model", absent="the shipped model", example="smears.safetensors"),
    ] = None
    device: Annotated[
        str,
        Field(
            pattern=r"^(auto|cpu|mps|cuda(:[0-9]{1,3})?)$",
            description="Where the network runs. auto takes a GPU if there is one, else the "
            "processor; a device that is named and missing is an error.",
        ),
        Note(flag="--device", allowed="auto, cpu, cuda, cuda:N (N from 0) or mps"),
    ] = "auto"
    devices: Annotated[
        tuple[Annotated[str, Field(pattern=r"^(cpu|mps|cuda:[0-9]{1,3})$")], ...],
        Field(
            description="Several devices that share the work, in place of `device`: each takes the "
            "next batch when it is free, and one that is lost is left out. Empty: `device` alone."
        ),
        Note(allowed="cpu, mps, cuda:N (N from 0)", example=["cuda:0", "cuda:1"]),
    ] = ()
    backend: Annotated[
        Literal["auto", "torch", "openvino"],
        Field(
            description="What runs the network. OpenVINO is for the processor, and has to be "
            "installed (the extra `openvino`); auto takes it where it is and the model has an "
            "8-bit form beside it, which is twice as fast."
        ),
        Note(flag="--backend"),
    ] = "auto"
    dtype: Annotated[
        Literal["auto", "float32", "bfloat16", "float16", "int8"],
        Field(
            description="Precision of the network. auto takes the fastest that device and backend "
            "are sound in; float32 is the reference; int8 is for OpenVINO."
        ),
        Note(flag="--dtype"),
    ] = "auto"
    threshold: Annotated[
        float | None,
        Field(gt=0, lt=1, description="Probability above which a pixel belongs to a cell."),
        Note(flag="--threshold", absent="the checkpoint's own threshold", example=0.5),
    ] = None


class ProcessingSettings(Section):
    """How much is done at a time; changes the speed and the memory, never the result."""

    batch_size: Annotated[
        int,
        Field(
            ge=1,
            le=256,
            description="Images that go through the network together. Halved by itself where the "
            "device's memory is too small for it.",
        ),
        Note(unit="images", flag="--batch-size"),
    ] = 8
    workers: Annotated[
        int | None,
        Field(ge=1, le=64, description="Workers that read images and write outputs."),
        Note(unit="threads", flag="--workers", absent="one per processor core", example=4),
    ] = None
    engine: Annotated[
        Literal["local", "ray"],
        Field(description="What does the work: this process, or the Ray cluster of [ray]."),
        Note(flag="--engine"),
    ] = "local"


class RaySettings(Section):
    """The Ray cluster that images are processed on where processing.engine is ray."""

    address: Annotated[
        str,
        Field(
            min_length=1,
            description="Which cluster: local starts one on this machine, auto joins the one that "
            "this machine belongs to.",
        ),
        Note(flag="--address", allowed="local, auto, ray://HOST:PORT or HOST:PORT"),
    ] = "local"
    actors: Annotated[
        ActorRange | None,
        Field(
            description="Workers that are kept, and workers that there may be. One number stands "
            "for both.",
        ),
        Note(
            flag="--actors",
            allowed="MIN:MAX or a number",
            absent="as many as the machines hold",
            example="1:16",
        ),
    ] = None
    cpus_per_actor: Annotated[
        float | None,
        Field(gt=0, le=1024, description="Processor cores of each worker."),
        Note(
            flag="--cpus-per-actor",
            absent="those of the smallest machine, at most 8",
            example=4.0,
        ),
    ] = None
    gpus_per_actor: Annotated[
        float | None,
        Field(ge=0, le=64, description="GPUs of each worker; 0.5 lets two share one."),
        Note(
            flag="--gpus-per-actor",
            absent="1 where the cluster has GPUs, else 0",
            example=1.0,
        ),
    ] = None

    @property
    def actor_range(self) -> tuple[int, int | None]:
        """MIN and MAX; None where it is left to the machines."""
        if self.actors is None:
            return 1, None
        first, _, last = self.actors.partition(":")
        return int(first), int(last or first)


class ImageSettings(Section):
    """Which files are inputs, and how they are read."""

    recursive: Annotated[
        bool,
        Field(description="Whether the sub-folders of the input folder are searched too."),
        Note(flag="--recursive/--no-recursive"),
    ] = True
    suffixes: Annotated[
        tuple[Suffix, ...] | None,
        Field(
            min_length=1,
            description="File name suffixes that make a file an input; upper and lower case are "
            "the same, the leading dot may be left out. Other files are counted as ignored.",
        ),
        AfterValidator(lambda values: values and _drop_repeated(values)),
        Note(
            allowed='a list of suffixes such as ".tif", at least one',
            absent="all that can be decoded",
            example=(".jpg", ".tif"),
        ),
    ] = None
    ignore: Annotated[
        tuple[Pattern, ...],
        Field(
            description="Patterns (* ? [...]) of files and folders to leave out, besides those "
            "that are never inputs (hidden files, unfinished downloads and copies). Held against "
            "the name or, where the pattern has a slash, against the path inside the input folder; "
            "upper and lower case are the same."
        ),
        Note(allowed='a list of patterns such as "*_draft.*"'),
    ] = ()
    max_pixels: Annotated[
        int,
        Field(
            ge=1,
            description="Width times height above which an image is refused undecoded: the guard "
            "against files that would fill the memory.",
        ),
        Note(unit="pixels"),
    ] = 500_000_000
    page: Annotated[
        int,
        Field(
            ge=0,
            description="Which page of a file with several is processed, counted from 0.",
        ),
    ] = 0
    tiling: Annotated[
        Literal["auto", "never"],
        Field(
            description="auto takes an image in overlapping tiles where its cells would be too "
            "small in one piece of 512x512; never stretches every image whole, as the original did."
        ),
    ] = "auto"
    pixel_size_um: Annotated[
        float | None,
        Field(
            gt=0,
            le=1000,
            description="Side of a pixel of all images, for measurements in micrometres; goes "
            "before what a file says of itself.",
        ),
        Note(
            unit="micrometres",
            flag="--pixel-size-um",
            absent="what the file says, else pixels only",
            example=0.1,
        ),
    ] = None


class OutputSettings(Section):
    """The files that are written for each image."""

    cells: Annotated[
        bool,
        Field(
            description="Part touching cells, count them by kind and measure each one (cells.csv). "
            "Without it there are masks and composites only."
        ),
        Note(flag="--cells/--no-cells"),
    ] = True
    labels: Annotated[
        bool,
        Field(
            description="Write a label image too: TIFF, each cell's pixels have its number. Needs "
            "cells."
        ),
        Note(flag="--labels/--no-labels"),
    ] = False
    outlines: Annotated[
        bool,
        Field(description="Write the photograph with the outlines of its cells too. Needs cells."),
        Note(flag="--outlines/--no-outlines"),
    ] = False
    probability: Annotated[
        bool,
        Field(
            description="Write the probability that each pixel is a cell's too: TIFF of 32-bit "
            "floating point, 0 to 1."
        ),
        Note(flag="--probability/--no-probability"),
    ] = False
    previews: Annotated[
        bool,
        Field(
            description="Write a JPEG of each photograph too, 1600 pixels at most, so that it can "
            "be shown beside its results wherever the photograph itself has gone."
        ),
    ] = False
    parquet: Annotated[
        bool,
        Field(
            description="Write results.parquet and cells.parquet beside the tables in CSV. Needs "
            "the extra parquet."
        ),
    ] = False

    composite: Annotated[
        bool,
        Field(description="Write the composite: the photograph with its cells in blood red."),
        Note(flag="--composite/--no-composite"),
    ] = True
    composite_format: Annotated[
        Literal["jpg", "png"],
        Field(
            description="File format of composites and outlines: jpg is small and fast, png is "
            "exact."
        ),
    ] = "jpg"
    composite_quality: Annotated[
        int,
        Field(
            ge=1,
            le=100,
            description="JPEG quality of composites, outlines and previews.",
        ),
    ] = 92
    colour: Annotated[
        tuple[Byte, Byte, Byte],
        Field(description="Red, green and blue that is laid over the cells in the composites."),
    ] = (160, 0, 20)
    alpha: Annotated[
        float,
        Field(
            ge=0,
            le=1,
            description="Share of that colour in a cell's pixels: 0 leaves the photograph as it "
            "is, 1 covers it.",
        ),
    ] = 0.3
    outline_colour: Annotated[
        tuple[Byte, Byte, Byte],
        Field(description="Red, green and blue of the outlines."),
    ] = (255, 220, 0)


class ReportSettings(Section):
    """Pages about the results for a browser, in OUTPUT/report (extra `report`)."""

    enabled: Annotated[
        bool,
        Field(
            description="Make them at the end of process-dir, and by the daemon now and then. "
            "`bcseg-batch report OUTPUT` makes them at any time."
        ),
        Note(flag="--report/--no-report"),
    ] = False
    refresh_s: Annotated[
        float,
        Field(
            ge=1,
            le=86400,
            description="How long the daemon waits before it takes new results up; longer where "
            "that takes long.",
        ),
        Note(unit="seconds"),
    ] = 60.0
    group_pattern: Annotated[
        str | None,
        AfterValidator(lambda text: text and _grouping(text)),
        Field(
            description="Regular expression that finds in an image's name (the path below the "
            "input folder) what it belongs to: a slide, a patient. The part named `group` counts."
        ),
        Note(
            flag="--group-pattern",
            allowed="a regular expression with a part (?P<group>...)",
            absent="no totals by group",
            example="(?P<group>[^/_]+)_",
        ),
    ] = None
    min_cells: Annotated[
        int,
        Field(
            ge=1,
            description="Red and white cells that are enough for a group. Chance alone makes a "
            "count of n vary by a share of 1/sqrt(n): 7 % at 200.",
        ),
        Note(unit="cells", flag="--min-cells"),
    ] = 200


class FolderSettings(Section):
    """Where the daemon reads, writes and remembers; process-dir takes its folders as arguments."""

    input: Annotated[
        FilePath | None,
        Field(description="Folder that is watched for photographs."),
        Note(flag="--input", absent="the daemon refuses to start", example="/srv/bcseg/in"),
    ] = None
    output: Annotated[
        FilePath | None,
        Field(description="Folder for masks, composites and records."),
        Note(flag="--output", absent="the daemon refuses to start", example="/srv/bcseg/out"),
    ] = None
    state: Annotated[
        FilePath | None,
        Field(
            description="Folder for the ledger, on a local disk, neither in the input nor in the "
            "output folder. One daemon at a time has it."
        ),
        Note(
            flag="--state-dir",
            absent="STATE_DIRECTORY as systemd sets it, else the daemon refuses to start",
            example="/var/lib/bcseg-batch/lab",
        ),
    ] = None
    archive: Annotated[
        FilePath | None,
        Field(
            description="Where photographs go that are done, if intake.after_success says archive."
        ),
        Note(absent="needed for archive only", example="/srv/bcseg/archive"),
    ] = None
    quarantine: Annotated[
        FilePath | None,
        Field(
            description="Where files go that failed, each with a .error.json beside it, if "
            "intake.after_failure says quarantine."
        ),
        Note(absent="needed for quarantine only", example="/srv/bcseg/quarantine"),
    ] = None


class IntakeSettings(Section):
    """How the daemon notices photographs, and what becomes of them afterwards."""

    mode: Annotated[
        Literal["auto", "inotify", "poll"],
        Field(
            description="auto takes inotify where the file system tells of changes, and polling "
            "where it does not (network shares)."
        ),
    ] = "auto"
    rescan_interval_s: Annotated[
        float,
        Field(
            ge=1,
            le=86400,
            description="Time between two looks at the whole folder, to find what no event told.",
        ),
        Note(unit="seconds"),
    ] = 60.0
    poll_interval_s: Annotated[
        float,
        Field(ge=0.1, le=3600, description="Time between two looks where the folder is polled."),
        Note(unit="seconds"),
    ] = 5.0
    settle_s: Annotated[
        float,
        Field(
            ge=0,
            le=3600,
            description="How long a file must keep still before it is read; longer for scanners "
            "that pause while they write.",
        ),
        Note(unit="seconds"),
    ] = 1.0
    truncated_retries: Annotated[
        int,
        Field(
            ge=0,
            le=20,
            description="How often a file that ends too early is waited for again, each time twice "
            "as long, before it counts as failed.",
        ),
    ] = 3
    after_success: Annotated[
        Literal["keep", "archive", "delete"],
        Field(description="What becomes of a photograph that is done."),
    ] = "keep"
    after_failure: Annotated[
        Literal["keep", "quarantine"],
        Field(description="What becomes of a file that failed."),
    ] = "keep"


class ServiceSettings(Section):
    """The daemon's life."""

    max_wait_s: Annotated[
        float,
        Field(ge=0, le=60, description="How long an image waits for others to share a batch with."),
        Note(unit="seconds"),
    ] = 0.25
    max_attempts: Annotated[
        int,
        Field(
            ge=1,
            le=20,
            description="How often an image may take the whole process down before it counts as "
            "failed.",
        ),
    ] = 3
    shutdown_timeout_s: Annotated[
        float,
        Field(ge=1, le=3600, description="How long the images under way may take at the end."),
        Note(unit="seconds"),
    ] = 30.0
    stall_timeout_s: Annotated[
        float,
        Field(
            ge=5,
            le=86400,
            description="How long nothing may come out while something is under way before systemd "
            "is no longer told that all is well.",
        ),
        Note(unit="seconds"),
    ] = 120.0


class LogSettings(Section):
    """Where the daemon's log goes, besides the terminal or the journal."""

    folder: Annotated[
        FilePath | None,
        Field(description="Folder for the log as JSON lines, rotated and compressed."),
        Note(
            flag="--log-dir",
            absent="LOGS_DIRECTORY as systemd sets it, else log in the state folder",
            example="/var/log/bcseg-batch/lab",
        ),
    ] = None
    level: Annotated[
        Literal["DEBUG", "INFO", "WARNING", "ERROR"],
        Field(description="The least important lines that are kept."),
    ] = "INFO"
    rotate_bytes: Annotated[
        int,
        Field(ge=10_000, description="Size at which a new log file is begun."),
        Note(unit="bytes"),
    ] = 20_000_000
    keep_files: Annotated[
        int,
        Field(ge=1, le=10_000, description="How many old log files are kept."),
        Note(unit="files"),
    ] = 20


class MetricsSettings(Section):
    """Figures for Prometheus (/metrics) and a health check (/healthz)."""

    port: Annotated[
        int | None,
        Field(ge=1, le=65535, description="TCP port."),
        Note(absent="no figures are served", example=9464),
    ] = None
    address: Annotated[
        str,
        Field(
            pattern=r"^[0-9A-Fa-f.:]+$",
            description="Address to listen on; anything but a loopback address lets others read.",
        ),
        Note(allowed="an IP address"),
    ] = "127.0.0.1"


class Settings(Section):
    """All settings, by section."""

    model: ModelSettings = ModelSettings()
    processing: ProcessingSettings = ProcessingSettings()
    ray: RaySettings = RaySettings()
    images: ImageSettings = ImageSettings()
    outputs: OutputSettings = OutputSettings()
    report: ReportSettings = ReportSettings()
    folders: FolderSettings = FolderSettings()
    intake: IntakeSettings = IntakeSettings()
    service: ServiceSettings = ServiceSettings()
    log: LogSettings = LogSettings()
    metrics: MetricsSettings = MetricsSettings()


@dataclass(frozen=True)
class LoadedSettings:
    """Settings, and where each came from.

    Attributes:
        settings: the effective values; every path in it is absolute.
        sources: for each key (`section.key`): `default`, `file PATH`, `environment NAME` or
            `flag --NAME`.
    """

    settings: Settings
    sources: Mapping[str, str]


def written_outputs(settings: Settings) -> OutputSettings:
    """Give the outputs that are written: those asked for, and those that the report shows.

    Args:
        settings: the effective settings.
    """
    outputs = settings.outputs
    if not settings.report.enabled:
        return outputs
    # Without the first there is nothing to compare with, without the second no cell to point at.
    return outputs.model_copy(update={"previews": True, "labels": outputs.cells})


def shaping_settings(settings: Settings) -> dict[str, Any]:
    """Give the settings that shape the outputs' content: where they differ, an image is redone.

    In: `model.threshold` moves the outline of every mask, and so, by a pixel here and there, does a
    `model.dtype` or `model.backend` that is asked for by name; `images.page` chooses the picture,
    `images.tiling` how it is taken, `images.pixel_size_um` what is measured; `outputs.*` are the
    files themselves, and `report.enabled` asks for some of them. What only shapes a picture that is
    not written does not count.

    Out: `model.file`, because the record has the model's own hash. `model.device` and
    `processing.*` and `ray.*`, because they must not change the result beyond rounding; the record
    names device and precision all the same. `images.recursive`, `suffixes`, `ignore` and
    `max_pixels`, because they choose which files are processed and not what comes out of one. The
    sections of the daemon, because they say when and where and never what.

    Args:
        settings: the effective settings.

    Returns:
        Key (`section.key`) to a value that `json.dumps` takes.
    """
    outputs = written_outputs(settings)
    in_colour = outputs.composite or outputs.outlines
    is_jpeg = (in_colour and outputs.composite_format == "jpg") or outputs.previews
    backend = settings.model.backend
    return {
        # Left out where nothing is asked for: earlier versions did not have it.
        **({} if backend == "auto" else {"model.backend": backend}),
        "images.page": settings.images.page,
        "images.pixel_size_um": settings.images.pixel_size_um,
        "images.tiling": settings.images.tiling,
        "model.dtype": settings.model.dtype,
        "model.threshold": settings.model.threshold,
        "outputs.alpha": outputs.alpha if outputs.composite else None,
        "outputs.cells": outputs.cells,
        "outputs.colour": list(outputs.colour) if outputs.composite else None,
        "outputs.composite": outputs.composite,
        "outputs.composite_format": outputs.composite_format if in_colour else None,
        "outputs.composite_quality": outputs.composite_quality if is_jpeg else None,
        "outputs.labels": outputs.labels,
        "outputs.outline_colour": list(outputs.outline_colour) if outputs.outlines else None,
        "outputs.outlines": outputs.outlines,
        "outputs.previews": outputs.previews,
        "outputs.probability": outputs.probability,
    }


# ---------------------------------------------------------------------- what is known of a key


def _sections() -> Iterator[tuple[str, type[Section]]]:
    for name, field in Settings.model_fields.items():
        assert isinstance(field.annotation, type)
        assert issubclass(field.annotation, Section)
        yield name, field.annotation


@cache
def _fields() -> Mapping[str, FieldInfo]:
    return {
        f"{name}.{key}": field
        for name, section in _sections()
        for key, field in section.model_fields.items()
    }


def _note(key: str) -> Note:
    return next((entry for entry in _fields()[key].metadata if isinstance(entry, Note)), Note())


@cache
def _adapter(key: str) -> TypeAdapter[Any]:
    return TypeAdapter(_fields()[key].rebuild_annotation())


@cache
def _schema(key: str) -> Mapping[str, Any]:
    """Give the JSON schema of a key's value; that the value may be absent is left out of it."""
    schema = _adapter(key).json_schema()
    options: list[dict[str, Any]] = [
        option for option in schema.get("anyOf", [schema]) if option != {"type": "null"}
    ]
    return options[0]


def _environment_name(key: str) -> str:
    return _ENV_PREFIX + key.replace(".", "__").upper()


def _flag_name(key: str) -> str:
    return (_note(key).flag if key in _fields() else None) or f"--{key}"


def _allowed(key: str) -> str:
    """Tell in words what a key's value must be."""
    return _note(key).allowed or _allowed_by(_schema(key))


def _allowed_by(schema: Mapping[str, Any]) -> str:
    if "enum" in schema:
        *most, last = schema["enum"]
        return f"{', '.join(most)} or {last}"
    match schema.get("type"):
        case "boolean":
            return "true or false"
        case "integer":
            return "a whole number" + _bounds(schema)
        case "number":
            return "a number" + _bounds(schema)
        case "array":
            first, *_ = entries = schema["prefixItems"]
            return f"a list of {len(entries)}, each {_allowed_by(first)}"
    return "a path" if schema.get("format") == "path" else "a text"


def _bounds(schema: Mapping[str, Any]) -> str:
    match schema:
        case {"minimum": low, "maximum": high}:
            return f" from {low} to {high}"
        case {"exclusiveMinimum": low, "exclusiveMaximum": high}:
            return f" above {low} and below {high}"
        case {"minimum": low}:
            return f", at least {low}"
    return ""


# ---------------------------------------------------------------------- layers


@dataclass(frozen=True)
class _Layer:
    """Values from one place, not yet checked.

    Attributes:
        values: by key; an unknown one stands under the name that the user gave it.
        source: says where a key's value came from.
        spell: writes a key as this layer's user writes it.
        parse: checks a key's value and converts it; may raise a ValidationError.
        folder: what relative paths are relative to; by default the working directory.
        reserved: what a misspelled key may have meant, besides the keys.
    """

    values: Mapping[str, object]
    source: Callable[[str], str]
    spell: Callable[[str], str]
    parse: Callable[[str, Any], object]
    folder: Path = Path()
    reserved: tuple[str, ...] = ()


def load_settings(
    file: Path | None,
    flags: Mapping[str, object],
    environ: Mapping[str, str] | None = None,
) -> LoadedSettings:
    """Read all layers, check every value in them, and let the highest layer win for each key.

    A value is checked even where a higher layer overrides it: it is wrong all the same, and would
    be found at a worse time.

    Args:
        file: the settings file; None takes the one that `BCSEG_SETTINGS` names, if it is set.
        flags: key (`section.key`) to the value given on the command line; None is "not given".
        environ: environment variables; None takes those of the process.

    Returns:
        The effective settings, with absolute paths, and where each came from.

    Raises:
        SettingsError: listing every problem: an unreadable file, TOML syntax, unknown keys, wrong
            types, values out of range.
    """
    environ = os.environ if environ is None else environ
    problems: list[str] = []
    layers = [_environment_layer(environ), _flag_layer(flags)]
    try:
        layers[:0] = _file_layers(file, environ)
    except SettingsError as error:
        problems.append(str(error))

    sections: dict[str, dict[str, object]] = {name: {} for name, _ in _sections()}
    sources = dict.fromkeys(_fields(), "default")
    for layer in layers:  # lowest first, so that the highest has the last word
        for key, value in layer.values.items():
            try:
                checked = _check(layer, key, value)
            except SettingsError as error:
                problems.append(f"{layer.source(key)}: {error}")
            else:
                section, name = key.split(".")
                sections[section][name] = checked
                sources[key] = layer.source(key)
    if problems:
        raise SettingsError(_listed(problems))
    return LoadedSettings(Settings.model_validate(sections), MappingProxyType(sources))


def _file_layers(file: Path | None, environ: Mapping[str, str]) -> list[_Layer]:
    """Give the settings file's layer, or none where no file is named."""
    named_by = ""
    if file is None:
        if _ENV_FILE not in environ:
            return []
        if not environ[_ENV_FILE]:
            raise SettingsError(
                f"environment {_ENV_FILE}: empty; name a settings file, or unset the variable"
            )
        file = Path(environ[_ENV_FILE])
        named_by = f" (named by environment {_ENV_FILE})"
    try:
        file = _expand_home(file).absolute()
        table = _read_toml(file)
    except (SettingsError, ValueError) as error:
        raise SettingsError(f"file {printable(str(file))}{named_by}: {error}") from error
    source = f"file {printable(str(file))}"
    return [
        _Layer(
            values=dict(_flatten(table)),
            source=lambda _: source,
            spell=lambda key: "{1} in [{0}]".format(*key.split(".")),
            parse=_parse_toml,
            folder=file.parent,
        )
    ]


def _environment_layer(environ: Mapping[str, str]) -> _Layer:
    keys = {_environment_name(key): key for key in _fields()}
    names = {key: name for name, key in keys.items()} | {"settings": _ENV_FILE}
    return _Layer(
        values={
            keys.get(name, name): text
            for name, text in environ.items()
            if name.startswith(_ENV_PREFIX) and name not in _ENV_RESERVED
        },
        source=lambda key: f"environment {printable(names.get(key, key))}",
        spell=lambda key: names.get(key, key),
        parse=_parse_text,
        reserved=("settings",),
    )


def _flag_layer(flags: Mapping[str, object]) -> _Layer:
    return _Layer(
        values={key: value for key, value in flags.items() if value is not None},
        source=lambda key: f"flag {_flag_name(key)}",
        spell=_flag_name,
        parse=lambda key, value: _adapter(key).validate_python(value),
    )


def _read_toml(file: Path) -> dict[str, Any]:
    """Read a TOML file; a byte order mark is allowed, since some editors write one.

    Raises:
        SettingsError: what is wrong with it, with the line where there is one.
    """
    try:
        text = file.read_bytes().decode("utf-8-sig")
    except OSError as error:
        reason = error.strerror or str(error)
        raise SettingsError(f"cannot be read ({reason}); name a readable TOML file") from error
    except UnicodeDecodeError as error:
        line = error.object.count(b"\n", 0, error.start) + 1
        raise SettingsError(f"not UTF-8 text (at line {line}); save it as UTF-8") from error
    try:
        return tomllib.loads(text)
    except (ValueError, RecursionError) as error:  # ValueError also for numbers beyond all size
        last_line = f"at line {text.count(chr(10)) + 1}, the end of the file"
        reason = str(error).replace("at end of document", last_line)
        raise SettingsError(f"not valid TOML: {reason}") from error


def _flatten(table: Mapping[str, Any]) -> Iterator[tuple[str, object]]:
    """Give `section.key` and value; what is no table, or an unknown empty one, by its own name.

    A name that TOML wants quoted stays quoted, so that `"model.file"` is not taken for the key
    `file` of `[model]`.
    """
    for name, value in table.items():
        if isinstance(value, dict) and (value or name in Settings.model_fields):
            yield from ((f"{_toml_name(name)}.{_toml_name(key)}", value[key]) for key in value)
        else:
            yield _toml_name(name), value


def _toml_name(name: str) -> str:
    return name if re.fullmatch(r"[A-Za-z0-9_-]+", name) else _toml_value(name)


def _parse_toml(key: str, value: Any) -> object:
    """Check a value that has a type of its own: `"8"` is no number, `1` is not true.

    By way of JSON, because that is how pydantic says "strict, but an array may be a tuple".
    """
    return _adapter(key).validate_json(json.dumps(value, default=str), strict=True)


def _parse_text(key: str, text: str) -> object:
    """Check a value that is all text: lists are JSON, the rest is converted."""
    if _schema(key).get("type") == "array":
        return _adapter(key).validate_json(text, strict=True)
    return _adapter(key).validate_strings(text)


def _check(layer: _Layer, key: str, value: object) -> object:
    """Convert one value, paths made absolute.

    Raises:
        SettingsError: the key is unknown or the value is wrong; the text does not say where.
    """
    if key not in _fields():
        raise SettingsError(_unknown(layer, key))
    try:
        if isinstance(value, str):
            value.encode()  # a variable may hold bytes that are no text; pydantic stumbles on them
        checked = layer.parse(key, value)
    except (ValidationError, UnicodeEncodeError) as error:
        raise SettingsError(
            f"{key} is {_shown(value)}, but must be {_allowed(key)}{_reason(error)}"
        ) from error
    return (layer.folder / checked).absolute() if isinstance(checked, Path) else checked


# ---------------------------------------------------------------------- words


def _reason(error: ValidationError | UnicodeEncodeError) -> str:
    """Give what the allowed values alone do not explain."""
    if isinstance(error, UnicodeEncodeError):
        return " (it is not valid UTF-8)"
    first = error.errors(include_url=False)[0]
    match first["type"]:
        case "value_error":
            return f" ({first['ctx']['error']})"
        case "json_invalid":
            return ', written as JSON such as ["a", "b"] or [1, 2]'
    return ""


def _unknown(layer: _Layer, key: str) -> str:
    if key in Settings.model_fields:
        return f"{key} is a section: write [{key}] once, and its keys below it"
    meant = key.removeprefix(_ENV_PREFIX).lower().replace("__", ".")
    best = _nearest(meant, (*_fields(), *layer.reserved))
    hint = f"did you mean {layer.spell(best)}?" if best else "settings.example.toml lists all"
    return f"unknown setting {printable(key)}; {hint}"


def _nearest(unknown: str, known: tuple[str, ...]) -> str | None:
    """Find the key that was probably meant: alike as a whole, or in its last part.

    The last part counts by itself because a right key in a wrong section is a common mistake.
    """

    def likeness(key: str) -> tuple[float, float]:
        whole = _likeness(unknown, key)
        return max(whole, _likeness(unknown.rpartition(".")[2], key.rpartition(".")[2])), whole

    best = max(known, key=likeness)
    return best if likeness(best)[0] >= 0.7 else None


def _likeness(one: str, other: str) -> float:
    return difflib.SequenceMatcher(None, one, other).ratio()


def _listed(problems: list[str]) -> str:
    if len(problems) == 1:
        return problems[0]
    return "\n".join(
        [f"{len(problems)} problems with the settings:", *(f"- {p}" for p in problems)]
    )


def _shown(value: object) -> str:
    text = printable(json.dumps(value, default=str, ensure_ascii=False))
    return text if len(text) <= 80 else text[:77] + "..."


# ---------------------------------------------------------------------- rendering


def render_settings(loaded: LoadedSettings) -> str:
    """Write the effective settings as TOML, each line with a comment that says where it came from.

    Loaded as a settings file, the text gives the same settings. A key without a value is a
    comment, since TOML has no null.

    Args:
        loaded: what `load_settings` gave.

    Returns:
        The text, ending in a newline.
    """
    lines: dict[str, str] = {}
    for key in _fields():
        section, name = key.split(".")
        value = getattr(getattr(loaded.settings, section), name)
        absent = f"# {name}: {_note(key).absent}"
        lines[key] = absent if value is None else f"{name} = {_toml_value(value)}"
    width = max(map(len, lines.values()))
    blocks = []
    for section, _ in _sections():
        rows = [
            f"{line:<{width}}  # from {loaded.sources[key]}"
            for key, line in lines.items()
            if key.startswith(f"{section}.")
        ]
        blocks.append("\n".join([f"[{section}]", *rows]))
    return "\n\n".join(blocks) + "\n"


def render_example() -> str:
    """Write `settings.example.toml`: every key with its meaning, unit, allowed values and default.

    Returns:
        The text, ending in a newline.
    """
    blocks = [
        _comment(
            "Every setting of bcseg-batch, with its default. Keep what you change. A command-line "
            "flag goes before the environment, the environment before this file. Lists in the "
            f"environment are written as JSON. {_ENV_FILE} names the settings file where no "
            "--settings does."
        )
    ]
    for name, section in _sections():
        blocks.append(f"{_comment(cleandoc(section.__doc__ or ''))}\n[{name}]")
        blocks.extend(_example_of(f"{name}.{key}") for key in section.model_fields)
    return "\n\n".join(blocks) + "\n"


def render_reference() -> str:
    """Write `docs/settings.md`: a table for each section.

    Returns:
        The text, in Markdown, ending in a newline.
    """
    blocks = [
        "# Settings",
        (
            "Each setting comes from a command-line flag, else from the environment, else from the "
            f"settings file (TOML; `--settings FILE`, or `{_ENV_FILE}` in the environment), else "
            "it has its default. A key that is not known is refused, and so is a value that is not "
            "allowed. `bcseg-batch show-settings` prints what is in effect, and where each comes "
            "from. In the environment lists are written as JSON. `settings.example.toml` holds the "
            "same as a file to begin with."
        ),
    ]
    for name, section in _sections():
        blocks.append(f"## {name}")
        blocks.append(cleandoc(section.__doc__ or ""))
        blocks.extend(_reference_of(f"{name}.{key}") for key in section.model_fields)
    return "\n\n".join(blocks) + "\n"


def _reference_of(key: str) -> str:
    field = _fields()[key]
    rows = [f"### {key}", "", field.description or "", ""]
    if field.default is not None:
        rows.append(f"- Default: `{_toml_value(field.default)}`")
    rows += [f"- {fact}: {text}" for fact, text in _facts(key).items()]
    return "\n".join(rows)


def _facts(key: str) -> dict[str, str]:
    """Say what there is to say of a key beside its meaning and its default."""
    note = _note(key)
    facts = {
        "Unit": note.unit,
        "Allowed": _allowed(key),
        "Absent": note.absent,
        "Environment": _environment_name(key),
        "Flag": note.flag,
    }
    return {fact: text for fact, text in facts.items() if text}


def _example_of(key: str) -> str:
    field, note = _fields()[key], _note(key)
    name = key.split(".")[1]
    lines = [_comment(field.description or "")]
    lines += [_comment(f"{fact}: {text}") for fact, text in _facts(key).items()]
    if field.default is None:
        lines.append(f"# {name} = {_toml_value(note.example)}")
    else:
        lines.append(f"{name} = {_toml_value(field.default)}")
    return "\n".join(lines)


def _comment(text: str) -> str:
    return textwrap.fill(
        text,
        _LINE_WIDTH,
        initial_indent="# ",
        subsequent_indent="# ",
        break_long_words=False,
        break_on_hyphens=False,
    )


def _toml_value(value: object) -> str:
    """Write a bool, int, float, text, path or tuple of these as TOML."""
    match value:
        case bool():
            return str(value).lower()
        case int():
            return f"{value:_}" if abs(value) >= 100_000 else str(value)
        case float():
            return repr(value)
        case tuple():
            return f"[{', '.join(map(_toml_value, value))}]"
    # JSON's escapes are TOML's, but for DEL, which JSON leaves as it is and TOML forbids.
    return json.dumps(str(value), ensure_ascii=False).replace("\x7f", "\\u007f")
