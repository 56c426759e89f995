"""Fixtures that several test modules share."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from no_skips import NoSkips

from bcseg_batch.store.outputs import OutputFolder


def pytest_configure(config: pytest.Config) -> None:
    """Fail on skipped tests where the run is told to."""
    if os.environ.get("TESTS_MUST_NOT_SKIP"):
        config.pluginmanager.register(NoSkips(), "no-skips")


@pytest.fixture(scope="session")
def data_dir() -> Path:
    """The folder of real images beside the checkout; without it the test is skipped."""
    beside = Path(__file__).resolve().parents[2] / "shared" / "data"
    folder = Path(os.environ.get("BCSEG_DATA") or beside)
    if not folder.is_dir():
        pytest.skip("needs ../shared/data (or BCSEG_DATA): real images are not in the repository")
    return folder


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """An empty input folder."""
    folder = tmp_path / "in"
    folder.mkdir()
    return folder


@pytest.fixture
def outputs(tmp_path: Path) -> Iterator[OutputFolder]:
    """An output folder, held."""
    with OutputFolder(tmp_path / "out") as folder:
        yield folder


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model file with a network of some hundred random weights, for inputs of 64 px."""
    from parts import tiny_network

    from bcseg_batch.segment.checkpoint import save_checkpoint

    path = tmp_path_factory.mktemp("model") / "tiny.safetensors"
    save_checkpoint(path, *tiny_network())
    return path
