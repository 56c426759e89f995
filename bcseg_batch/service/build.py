"""Builds the engine that settings describe: model, predictor and the pipeline's options."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import bcseg_batch.weights
from bcseg_batch.allocator import keep_freed_memory
from bcseg_batch.errors import SettingsError
from bcseg_batch.report import check_report_installed
from bcseg_batch.segment.placement import AnyPredictor, Placement, available_cores
from bcseg_batch.segment.quantised import quantised_path
from bcseg_batch.segment.spec import ModelSpec
from bcseg_batch.service.backend import open_network
from bcseg_batch.service.pipeline import Names, Observe, Pipeline, PipelineOptions
from bcseg_batch.service.places import Inputs, Outputs
from bcseg_batch.settings import Settings, shaping_settings, written_outputs
from bcseg_batch.store.parquet import check_parquet
from bcseg_batch.version import __version__

if TYPE_CHECKING:
    from bcseg_batch.service.cluster import Cluster
    from bcseg_batch.service.process_dir import Stop

SHIPPED_MODEL = Path(bcseg_batch.weights.__file__).with_name("default.safetensors")


@dataclass(frozen=True, slots=True)
class Engine:
    """What a run needs, whoever feeds it.

    Attributes:
        predictors: hold the network on its devices; each may be run by a thread of its own.
        options: of the pipeline.
        spec: what the model says of itself.
        model_name: name of the model file.
        description: one sentence for the log: model, device and precision, with the reasons.
    """

    predictors: Sequence[AnyPredictor]
    options: PipelineOptions
    spec: ModelSpec
    model_name: str
    description: str

    @property
    def placement(self) -> Placement:
        """Where the network runs; the first of several devices."""
        return self.predictors[0].placement

    def pipeline(
        self,
        inputs: Inputs,
        outputs: Outputs,
        names: Names,
        *,
        alone: bool = False,
        observe: Observe = lambda _stage, _seconds, _images: None,
        expects_company: Callable[[], bool] = lambda: True,
        alive: Callable[[], None] = lambda: None,
    ) -> Pipeline:
        """Make the pipeline that reads from a place and writes to another, under these names.

        Args:
            inputs: where the photographs come from.
            outputs: where the outputs go.
            names: which input owns which output name.
            alone: try each image alone, without waiting for company.
            observe: as `Pipeline` has it, like the rest.
            expects_company: likewise.
            alive: likewise.
        """
        return Pipeline(
            self.predictors,
            outputs,
            names,
            replace(self.options, batch_size=1) if alone else self.options,
            inputs=inputs,
            observe=observe,
            expects_company=expects_company,
            alive=alive,
        )

    def close(self) -> None:
        """Do nothing: the process's end is the engine's."""


def build_engine(settings: Settings) -> Engine:
    """Load the model and place it.

    Args:
        settings: the effective settings.

    Raises:
        CheckpointError: the model cannot be loaded; no other is taken in its place.
        SettingsError: the device is not there.
        DeviceError: the device refuses the network.
    """
    for name in ("labels", "outlines"):
        if getattr(settings.outputs, name) and not settings.outputs.cells:
            raise SettingsError(
                f"outputs.{name} needs outputs.cells: {name} are those of the parted cells: set "
                "both, or neither"
            )
    if settings.outputs.parquet:
        check_parquet()
    if settings.report.enabled:
        check_report_installed()
    keep_freed_memory()
    path = settings.model.file or SHIPPED_MODEL
    network = open_network(
        path,
        backend=settings.model.backend,
        devices=settings.model.devices or (settings.model.device,),
        dtype=settings.model.dtype,
    )
    spec, predictors = network.spec, network.predictors
    devices = {predictor.placement.device: predictor.placement for predictor in predictors}
    outputs = written_outputs(settings)
    shaping = json.dumps(shaping_settings(settings), sort_keys=True)
    options = PipelineOptions(
        threshold=spec.threshold if settings.model.threshold is None else settings.model.threshold,
        # The predictors of one device share a batch.
        batch_size=math.ceil(settings.processing.batch_size * len(devices) / len(predictors)),
        workers=settings.processing.workers or available_cores(),
        max_wait_s=settings.service.max_wait_s,
        max_pixels=settings.images.max_pixels,
        page=settings.images.page,
        pixel_size_um=settings.images.pixel_size_um,
        class_names=spec.class_names,
        cells=outputs.cells,
        labels=outputs.labels,
        outlines=outputs.outlines,
        outline_colour=outputs.outline_colour,
        probability=outputs.probability,
        previews=outputs.previews,
        parquet=outputs.parquet,
        composite=outputs.composite,
        tiling=settings.images.tiling == "auto",
        statistics=spec.training_statistics,
        composite_format=outputs.composite_format,
        composite_quality=outputs.composite_quality,
        colour=outputs.colour,
        alpha=outputs.alpha,
        model_sha256=network.sha256,
        settings_sha256=hashlib.sha256(shaping.encode()).hexdigest(),
    )
    description = (
        f"model {path.name} ({network.sha256[:12]}), width {spec.width}, by {network.backend}, "
        f"on {', '.join(placement.reason for placement in devices.values())}"
    )
    return Engine(predictors, options, spec, path.name, description)


def open_cluster(settings: Settings, stop: Stop) -> Cluster:
    """Start workers on the Ray cluster that settings name.

    Args:
        settings: the effective settings.
        stop: asked while workers are waited for.

    Raises:
        SettingsError: there is no such cluster, or the workers refuse the settings.
        CheckpointError: they refuse the model.
        DeviceError: no worker comes up.
    """
    from bcseg_batch.service.cluster import (  # noqa: PLC0415 - it imports this module
        Cluster,
        ClusterOptions,
        model_files,
    )
    from bcseg_batch.service.remote_worker import Recipe  # noqa: PLC0415

    path = settings.model.file
    files = model_files(path, [] if path is None else [quantised_path(path)])
    smallest, largest = settings.ray.actor_range
    return Cluster(
        lambda cores: Recipe(settings, __version__, cores, files),
        ClusterOptions(
            address=settings.ray.address,
            min_actors=smallest,
            max_actors=largest,
            gpus_per_actor=settings.ray.gpus_per_actor,
            cpus_per_actor=settings.ray.cpus_per_actor,
            max_deaths=settings.service.max_attempts,
        ),
        lambda: stop.requested,
    )
