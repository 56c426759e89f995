"""Figures for Prometheus and a health check, on one small HTTP server."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Mapping
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from prometheus_client import (
    CONTENT_TYPE_LATEST,
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    generate_latest,
)

from bcseg_batch.errors import SettingsError
from bcseg_batch.items import Outcome, Status

_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)
_BATCH = (1, 2, 4, 8, 16, 32, 64, 128, 256)


class NoMetrics:
    """Stands in where no figures are asked for.

    Attributes:
        are_served: whether a figure that costs something to find is worth it.
    """

    are_served = False

    def observe_stage(self, stage: str, seconds: float, images: int) -> None:
        """Do nothing."""

    def count(self, outcome: Outcome) -> None:
        """Do nothing."""

    def gauge(
        self, *, in_flight: int, settling: int, queued: int, troubles: Mapping[str, str]
    ) -> None:
        """Do nothing."""

    def describe(self, model: str, model_sha256: str, device: str) -> None:
        """Do nothing."""

    def stop(self) -> None:
        """Do nothing."""


class Metrics(NoMetrics):
    """Serves `/metrics` and `/healthz`.

    Args:
        address: to listen on.
        port: to listen on.
        model: name of the model file.
        model_sha256: of the model file.
        device: where the network runs.
        stale_after_s: a daemon that has said nothing for so long counts as unwell.
        clock: monotonic, seconds.

    Raises:
        SettingsError: the port cannot be had.
    """

    are_served = True

    def __init__(
        self,
        address: str,
        port: int,
        *,
        model: str,
        model_sha256: str,
        device: str,
        stale_after_s: float,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        registry = CollectorRegistry()
        self._images = Counter(
            "bcseg_images", "Images that are through.", ["status", "error"], registry=registry
        )
        self._stages = Histogram(
            "bcseg_stage_seconds",
            "Time of one image (decode, write) or one batch (network) in a stage.",
            ["stage"],
            buckets=_SECONDS,
            registry=registry,
        )
        self._fill = Histogram(
            "bcseg_batch_images", "Images in a batch.", buckets=_BATCH, registry=registry
        )
        self._in_flight = Gauge(
            "bcseg_in_flight_images", "Images being processed.", registry=registry
        )
        self._queued = Gauge(
            "bcseg_queued_images", "Images ready and waiting their turn.", registry=registry
        )
        self._settling = Gauge(
            "bcseg_settling_files", "Files waited for to keep still.", registry=registry
        )
        Gauge("bcseg_healthy", "1 where nothing is amiss.", registry=registry).set_function(
            lambda: float(not self.troubles())
        )
        self._last_success = Gauge(
            "bcseg_last_success_timestamp_seconds",
            "When an image was last done.",
            registry=registry,
        )
        self._model = Gauge(
            "bcseg_model_info",
            "Always 1; the labels tell the model.",
            ["model", "sha256", "device"],
            registry=registry,
        )
        self.describe(model, model_sha256, device)
        self._registry = registry
        self._troubles: Mapping[str, str] = {}
        self._stale_after_s = stale_after_s
        self._clock = clock
        self._heard_s = clock()
        try:
            self._server = ThreadingHTTPServer((address, port), self._handler())
        except OSError as error:
            raise SettingsError(
                f"metrics.port {port} on {address} cannot be had: {error.strerror}: name another"
            ) from error
        self._server.daemon_threads = True
        self._thread = threading.Thread(
            target=self._server.serve_forever, name="bcseg-metrics", daemon=True
        )
        self._thread.start()

    def observe_stage(self, stage: str, seconds: float, images: int) -> None:
        """Note how long a stage took; called from any thread.

        Args:
            stage: `decode`, `network` or `write`.
            seconds: wall time.
            images: how many went through it together.
        """
        self._stages.labels(stage).observe(seconds)
        if stage == "network":
            self._fill.observe(images)

    def count(self, outcome: Outcome) -> None:
        """Count one that is through, by status and class of error."""
        kind = (outcome.error or "").partition(":")[0]
        self._images.labels(outcome.status.value, kind).inc()
        if outcome.status is Status.DONE:
            self._last_success.set_to_current_time()

    def gauge(
        self, *, in_flight: int, settling: int, queued: int, troubles: Mapping[str, str]
    ) -> None:
        """Set what is true at the moment."""
        self._in_flight.set(in_flight)
        self._settling.set(settling)
        self._queued.set(queued)
        self._troubles = dict(troubles)
        self._heard_s = self._clock()

    def describe(self, model: str, model_sha256: str, device: str) -> None:
        """Name the model in use."""
        self._model.clear()
        self._model.labels(model, model_sha256, device).set(1)

    def troubles(self) -> Mapping[str, str]:
        """Say what is amiss; a daemon that hangs cannot say it itself."""
        silent_s = self._clock() - self._heard_s
        if silent_s > self._stale_after_s:
            return {**self._troubles, "pipeline": f"nothing was heard for {silent_s:.0f} s"}
        return self._troubles

    def stop(self) -> None:
        """Close the server."""
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    def _handler(self) -> type[BaseHTTPRequestHandler]:
        metrics = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                if self.path == "/metrics":
                    self._answer(200, CONTENT_TYPE_LATEST, generate_latest(metrics._registry))
                elif self.path == "/healthz":
                    troubles = metrics.troubles()
                    text = json.dumps({"healthy": not troubles, "troubles": troubles}) + "\n"
                    self._answer(503 if troubles else 200, "application/json", text.encode())
                else:
                    self._answer(404, "text/plain", b"/metrics or /healthz\n")

            def _answer(self, code: int, kind: str, body: bytes) -> None:
                self.send_response(code)
                self.send_header("Content-Type", kind)
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, format: str, *args: object) -> None:  # noqa: A002 - its name
                """Leave the requests out of the log."""

        return Handler
