"""The figures over real HTTP, and the health of a daemon that has fallen silent."""

from __future__ import annotations

import json
import socket
import urllib.error
import urllib.request
from collections.abc import Iterator

import pytest

from bcseg_batch.errors import SettingsError
from bcseg_batch.items import Outcome, Status
from bcseg_batch.service.metrics import Metrics


class Clock:
    now_s = 100.0

    def __call__(self) -> float:
        return self.now_s


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


class Served:
    def __init__(self) -> None:
        self.clock = Clock()
        self.port = free_port()
        self.metrics = Metrics(
            "127.0.0.1",
            self.port,
            model="one.safetensors",
            model_sha256="1" * 64,
            device="cpu",
            stale_after_s=30,
            clock=self.clock,
        )

    def get(self, path: str) -> tuple[int, str]:
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{self.port}{path}", timeout=5) as answer:
                return answer.status, answer.read().decode()
        except urllib.error.HTTPError as error:
            with error:
                return error.code, error.read().decode()


@pytest.fixture
def served() -> Iterator[Served]:
    served = Served()
    yield served
    served.metrics.stop()


def test_a_daemon_that_has_fallen_silent_is_unwell(served: Served) -> None:
    served.metrics.gauge(in_flight=1, settling=0, queued=0, troubles={})
    assert served.get("/healthz")[0] == 200
    assert "bcseg_healthy 1.0" in served.get("/metrics")[1]
    served.clock.now_s += 31
    code, text = served.get("/healthz")
    assert code == 503
    assert json.loads(text)["troubles"]["pipeline"] == "nothing was heard for 31 s"
    assert "bcseg_healthy 0.0" in served.get("/metrics")[1]
    served.metrics.gauge(in_flight=1, settling=0, queued=0, troubles={})
    assert served.get("/healthz")[0] == 200


def test_troubles_are_told(served: Served) -> None:
    served.metrics.gauge(in_flight=0, settling=3, queued=7, troubles={"input": "it is gone"})
    code, text = served.get("/healthz")
    assert (code, json.loads(text)["troubles"]) == (503, {"input": "it is gone"})
    assert "bcseg_settling_files 3.0" in served.get("/metrics")[1]
    assert "bcseg_queued_images 7.0" in served.get("/metrics")[1]


def test_images_are_counted_by_status_and_class_of_error(served: Served) -> None:
    error = "TruncatedImageError: it ends"
    served.metrics.count(Outcome(image="a", status=Status.FAILED, error=error))
    served.metrics.count(Outcome(image="b", status=Status.DONE))
    text = served.get("/metrics")[1]
    assert 'bcseg_images_total{error="TruncatedImageError",status="failed"} 1.0' in text
    assert 'bcseg_images_total{error="",status="done"} 1.0' in text


def test_only_the_model_in_use_is_named(served: Served) -> None:
    served.metrics.describe("two.safetensors", "2" * 64, "cuda:0")
    lines = [x for x in served.get("/metrics")[1].splitlines() if x.startswith("bcseg_model_info{")]
    assert len(lines) == 1
    assert 'model="two.safetensors"' in lines[0]


def test_a_port_in_use_is_refused_with_its_name(served: Served) -> None:
    with pytest.raises(SettingsError, match=f"metrics.port {served.port} on 127.0.0.1"):
        Metrics(
            "127.0.0.1",
            served.port,
            model="m",
            model_sha256="1",
            device="cpu",
            stale_after_s=30,
        )
