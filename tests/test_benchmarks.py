"""The benchmarks run, say what they promise, and compare with the right thing."""

from __future__ import annotations

import importlib
import json
import runpy
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch

from bcseg_batch.segment.checkpoint import load_checkpoint
from bcseg_batch.segment.postprocess import Blend, composite_image
from bcseg_batch.segment.preprocess import preprocess

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
SCRIPTS = sorted(
    path for path in BENCHMARKS.glob("*.py") if "ArgumentParser" in path.read_text(encoding="utf-8")
)
FIGURE_KEYS = {"name", "median", "min", "max", "unit", "aim", "at_least", "is_met"}


@pytest.fixture(autouse=True)
def beside_each_other(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(BENCHMARKS))


@pytest.fixture
def reference() -> ModuleType:
    return importlib.import_module("reference")


@pytest.fixture
def harness() -> ModuleType:
    return importlib.import_module("harness")


def noise(shape_hw: tuple[int, int]) -> Any:
    return np.random.default_rng(0).integers(0, 256, (*shape_hw, 3), dtype=np.uint8)


# The reference ---------------------------------------------------------------------------------


def test_the_reference_is_the_originals_network(reference: ModuleType) -> None:
    with torch.device("meta"):
        weights = reference.ReferenceUNet().state_dict()
    assert sum(tensor.numel() for tensor in weights.values()) == 31_031_745
    layers = {f"bottleneck.c{c}" for c in (1, 2)} | {"out"} | {f"up{n}.up" for n in range(1, 5)}
    layers |= {f"{way}{n}.c.c{c}" for way in ("down", "up") for n in range(1, 5) for c in (1, 2)}
    assert set(weights) == {f"{layer}.{kind}" for layer in layers for kind in ("weight", "bias")}


def test_the_reference_and_the_product_agree_on_a_checkpoint(
    reference: ModuleType, tmp_path: Path
) -> None:
    path = tmp_path / "checkpoint.pth"
    pixels = noise((60, 80))
    reference.write_checkpoint(path, pixels, width=4)
    ours = load_checkpoint(path).model
    theirs = reference.load_network(path)
    batch = preprocess(pixels, reference.SIZE_PX)[np.newaxis]
    image = reference.Image.fromarray(pixels)
    np.testing.assert_array_equal(reference.to_tensor(image)[None].numpy(), batch)
    with torch.inference_mode():
        expected = ours(torch.from_numpy(batch))
        found = theirs(torch.from_numpy(batch))
    assert float((found - expected).abs().max()) < 1e-4
    share = float((torch.sigmoid(found) > 0.5).float().mean())
    assert share == pytest.approx(reference.FOREGROUND, abs=0.02)


def test_the_blood_red_of_reference_and_product_are_the_same(reference: ModuleType) -> None:
    values = np.arange(256, dtype=np.uint8)
    pixels = np.stack([values, np.roll(values, 85), values[::-1]], axis=-1).reshape(16, 16, 3)
    mask = np.where(np.indices((16, 16)).sum(axis=0) % 3, 255, 0).astype(np.uint8)
    ours = composite_image(pixels, mask, Blend.of((160, 0, 20), 0.3))
    np.testing.assert_array_equal(reference.blood_red(pixels, mask), ours)
    everywhere = np.full_like(mask, 255)
    ours = composite_image(pixels, everywhere, Blend.of((160, 0, 20), 0.3))
    np.testing.assert_array_equal(reference.blood_red(pixels, everywhere), ours)


# The measuring ---------------------------------------------------------------------------------


def test_a_steady_rate_is_that_between_the_first_and_the_last_batch(harness: ModuleType) -> None:
    # Batches of 4, one each second, after a start of ten; the last one is written while nothing
    # runs any more, and takes as long as it likes.
    times_s = [10.0 + second for second in range(10) for _ in range(4)]
    late = [*times_s[:-4], *(time_s + 5 for time_s in times_s[-4:])]
    assert harness.steady_per_s(times_s, 4) == pytest.approx(4.0)
    assert harness.steady_per_s(late[::-1], 4) == pytest.approx(4.0)


@pytest.mark.parametrize("count", [1, 2, 3, 5])
def test_a_steady_rate_of_few_images_is_a_rate_or_nothing(harness: ModuleType, count: int) -> None:
    rate = harness.steady_per_s([float(number) for number in range(count)], 8)
    assert rate is None if count == 1 else rate == pytest.approx(1.0)


def test_things_are_measured_in_turn_and_divided_round_by_round(harness: ModuleType) -> None:
    order: list[str] = []

    def measure(name: str) -> float:
        order.append(name)
        return float(len(order))

    took = harness.in_turn({"a": lambda: measure("a"), "b": lambda: measure("b")}, 3)
    assert order == ["a", "b"] * 3
    figure = harness.ratios("a / b", took["a"], took["b"], aim=0.8)
    assert list(figure.values) == [1 / 2, 3 / 4, 5 / 6]
    assert figure.median == 3 / 4
    assert figure.is_met is False
    assert harness.ratios("nothing", [None], [1.0]) is None


def test_photographs_are_all_different_and_always_the_same(harness: ModuleType) -> None:
    first = [pixels.tobytes() for pixels in harness.photographs(14, (96, 128))]
    assert len(set(first)) == 14
    assert first == [pixels.tobytes() for pixels in harness.photographs(14, (96, 128))]


def test_memory_is_that_of_the_program_and_not_of_its_parent(harness: ModuleType) -> None:
    held = np.ones(300_000_000, dtype=np.uint8)
    finished = harness.run([sys.executable, "-c", "import time; time.sleep(0.3)"])
    assert 1e6 < finished.peak_bytes < 100e6
    assert finished.wall_s >= 0.3
    del held


def test_a_command_that_fails_ends_the_benchmark_with_its_words(harness: ModuleType) -> None:
    with pytest.raises(SystemExit, match="ended with 3"):
        harness.run([sys.executable, "-c", "raise SystemExit(3)"])


def test_time_that_several_networks_share_counts_once() -> None:
    stages = importlib.import_module("stages")
    assert stages.covered_s([(0, 2), (1, 3), (5, 6), (5.2, 5.4)]) == 4


# The scripts -----------------------------------------------------------------------------------


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.stem)
def test_help_says_what_a_script_measures(
    script: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", [script.name, "--help"])
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(script), run_name="__main__")
    assert ended.value.code == 0
    assert f"usage: {script.name}" in capsys.readouterr().out


@pytest.fixture
def run_script(tmp_path: Path) -> Any:
    def run(name: str, *options: str | Path) -> tuple[str, dict[str, Any]]:
        path = tmp_path / "figures.json"
        arguments = [sys.executable, BENCHMARKS / f"{name}.py", *options]
        done = subprocess.run(
            [*map(str, arguments), "--folder", str(tmp_path), "--json", str(path)],
            check=False,
            capture_output=True,
            text=True,
            timeout=110,
        )
        assert done.returncode == 0, done.stdout + done.stderr
        content = json.loads(path.read_text(encoding="utf-8"))
        assert content["benchmark"] == name
        assert content["machine"]["cores"] >= 1
        assert content["limits"]["matrix_float32_gflops"] > 0
        assert content["figures"]
        assert all(set(figure) == FIGURE_KEYS for figure in content["figures"])
        assert "Figures" in done.stdout
        return done.stdout, content

    return run


def names(content: dict[str, Any]) -> set[str]:
    return {figure["name"] for figure in content["figures"]}


@pytest.mark.slow
def test_throughput_compares_with_the_reference(run_script: Any, tiny_model: Path) -> None:
    shown, content = run_script(
        *("throughput", "--images", "2", "--wide-images", "2", "--reference-images", "1"),
        *("--rounds", "1", "--width", "2", "--model", tiny_model, "--backends", "torch"),
        *("--only", "reference", "* pictures*", "network *"),
    )
    assert "process-dir wide pictures torch / reference" in names(content)
    assert "process-dir shipped pictures torch, peak memory" in names(content)
    assert content["runs"]["process-dir shipped pictures torch"][0]["images"] == 2
    assert content["networks"]["network shipped torch"][0]["operations_per_image"] > 0
    assert "core-ms/image" in shown


@pytest.mark.slow
def test_another_runtime_writes_the_same_files(
    reference: ModuleType, tmp_path: Path, tiny_model: Path
) -> None:
    (tmp_path / "in").mkdir()
    reference.Image.fromarray(noise((60, 80))).save(tmp_path / "in" / "a.png")
    for runtime in ("openvino", "onnxruntime"):
        output = tmp_path / runtime
        arguments = ["--runtime", runtime, "--input", tmp_path / "in", "--output", output]
        done = subprocess.run(
            [sys.executable, str(BENCHMARKS / "runtimes.py"), *arguments, "--model", tiny_model],
            check=True,
            capture_output=True,
            text=True,
        )
        said = json.loads(done.stdout.splitlines()[-1])
        assert said["images"] == len(said["finished_s"]) == 1
        assert (output / "masks" / "a_mask.png").stat().st_size > 0
    with_both = [
        np.asarray(reference.Image.open(tmp_path / runtime / "masks" / "a_mask.png"))
        for runtime in ("openvino", "onnxruntime")
    ]
    assert (with_both[0] != with_both[1]).mean() < 0.01


@pytest.mark.slow
def test_stages_add_up_and_say_when_the_network_runs(run_script: Any, tiny_model: Path) -> None:
    _, content = run_script(
        "stages", "--images", "2", "--repeats", "1", "--rounds", "1", "--model", tiny_model
    )
    core_ms = {name: took["core_ms"] for name, took in content["stages"].items()}
    assert {"decode", "network", "encode composite", "ledger", "quality"} <= set(core_ms)
    total_ms = next(f for f in content["figures"] if f["name"].endswith("with cells"))["median"]
    assert total_ms == pytest.approx(sum(core_ms.values()) - core_ms["network"])
    assert 0 < content["runs"]["whole pipeline"][0]["network_share"] <= 1


@pytest.mark.slow
def test_records_say_what_an_image_costs_and_what_is_held() -> None:
    done = subprocess.run(
        [sys.executable, str(BENCHMARKS / "records.py"), "--rows", "3000", "--ask", "500"],
        check=False,
        capture_output=True,
        text=True,
    )
    figures = json.loads(done.stdout.splitlines()[-1])
    assert done.returncode in {0, 1}, done.stderr  # a busy machine may miss the aim
    assert figures["load_in_lines_of_json"] > 1
    assert 0 < figures["full"]["memory_mib"] < 64


@pytest.mark.slow
def test_scaling_compares_the_largest_with_the_smallest(run_script: Any) -> None:
    _, content = run_script(
        *("scaling", "--images", "4", "12", "--photographs", "--files", "100", "1000")
    )
    assert content["small images"]["12"]["images"] == 12
    assert "small images: peak memory, 12 / 4 images" in names(content)
    assert "scan of a file, 1,000 / 100 files" in names(content)


@pytest.mark.slow
def test_startup_times_help_and_the_first_result(run_script: Any, tiny_model: Path) -> None:
    _, content = run_script("startup", "--rounds", "1", "--model", tiny_model)
    assert {"bcseg-batch --help", "process-dir, start to first result"} <= names(content)
    assert set(content["seconds"]) == {"python alone", "--help", "import torch", "first result"}
