"""The files of cluster/ are what Slurm, Ray, Kubernetes and Docker take."""

from __future__ import annotations

import copy
import csv
import hashlib
import importlib.util
import json
import os
import re
import shutil
import stat
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import jsonschema
import kubernetes_validate
import pytest
import yaml

ROOT = Path(__file__).parents[1]
CLUSTER = ROOT / "cluster"
SLURM = CLUSTER / "slurm.sh"
VENV = Path(sys.prefix)
KUBERNETES = "1.29"
PAGE = (ROOT / "docs/cluster.md").read_text(encoding="utf-8")


def tool(name: str) -> str:
    """Find a program that the extra `test` brings."""
    found = shutil.which(name, path=VENV / "bin")
    assert found is not None, f"{name} is missing: pip install '.[test]'"
    return found


def run_slurm(
    *arguments: str | Path, path: str, **variables: str
) -> subprocess.CompletedProcess[str]:
    """Run the script as a task of an array finds itself."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("SLURM_", "BCSEG_", "SHARDS"))}
    return subprocess.run(
        ["bash", str(SLURM), *map(str, arguments)],
        env={**kept, "PATH": f"{path}:{os.environ['PATH']}", **variables},
        capture_output=True,
        text=True,
        check=False,
        timeout=110,
    )


def task(number: int, count: int, *, least: int = 1, most: int | None = None) -> dict[str, str]:
    """Give what Slurm puts into a task's environment."""
    return {
        "SLURM_ARRAY_TASK_ID": str(number),
        "SLURM_ARRAY_TASK_MIN": str(least),
        "SLURM_ARRAY_TASK_MAX": str(most or count),
        "SLURM_ARRAY_TASK_COUNT": str(count),
    }


# Slurm -----------------------------------------------------------------------------------------


def test_the_slurm_script_is_sound() -> None:
    assert SLURM.stat().st_mode & stat.S_IXUSR
    subprocess.run(["bash", "-n", SLURM], check=True)
    done = subprocess.run([tool("shellcheck"), SLURM], check=False, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


def test_what_slurm_reads_comes_before_the_first_command() -> None:
    """It stops looking there."""
    lines = SLURM.read_text(encoding="utf-8").splitlines()
    first = next(number for number, line in enumerate(lines) if line and not line.startswith("#"))
    options = [number for number, line in enumerate(lines) if line.startswith("#SBATCH")]
    assert len(options) >= 5
    assert max(options) < first


@pytest.fixture
def recorder(tmp_path: Path) -> Path:
    """A folder with a `bcseg-batch` that says what it was given."""
    folder = tmp_path / "bin"
    folder.mkdir()
    program = folder / "bcseg-batch"
    program.write_text('#!/bin/sh\nprintf "%s\\n" "$@"\n')
    program.chmod(0o755)
    return folder


def test_a_task_takes_its_shard_and_hands_the_options_on(recorder: Path) -> None:
    options = ("in put", "out", "--labels", "--threshold", "0.4")
    done = run_slurm(*options, path=str(recorder), **task(3, 20))
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == [
        *("process-dir", "in put", "out", "--shard", "3/20", "--labels", "--threshold", "0.4"),
    ]


def test_some_tasks_again_are_the_same_shards_as_before(recorder: Path) -> None:
    """`--array=3,7` has two tasks, but twenty shards."""
    again = task(7, 2, least=3, most=7)
    refused = run_slurm("in", "out", path=str(recorder), **again)
    assert refused.returncode == 64
    assert "SHARDS" in refused.stderr
    assert not refused.stdout
    done = run_slurm("in", "out", path=str(recorder), **again, SHARDS="20")
    assert done.stdout.splitlines()[-2:] == ["--shard", "7/20"]


def test_outside_an_array_the_script_says_how_to_submit_it(recorder: Path) -> None:
    assert "--array" in run_slurm("in", "out", path=str(recorder)).stderr
    few = run_slurm("in", path=str(recorder), **task(1, 1))
    assert few.returncode == 64
    assert "usage" in few.stderr


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_all_tasks_of_an_array_do_each_image_once(tmp_path: Path) -> None:
    """The script itself, one task after the other, on the samples; then the merge."""
    source, output = ROOT / "samples", tmp_path / "out"
    images = {path.name for path in source.glob("*.jpg")}
    shards = 3
    seen: list[str] = []
    for number in range(1, shards + 1):
        done = run_slurm(
            source, output, "--no-cells", path=str(VENV / "bin"), **task(number, shards)
        )
        assert done.returncode == 0, done.stdout + done.stderr
        records = output / f"results.{number}-of-{shards}.jsonl"
        if records.exists():
            seen += [json.loads(line)["image"] for line in records.read_text().splitlines()]
    assert sorted(seen) == sorted(images)

    subprocess.run([tool("bcseg-batch"), "merge", output], check=True, timeout=110)
    with (output / "results.csv").open(encoding="utf-8", newline="") as table:
        rows = list(csv.DictReader(table))
    assert {row["image"] for row in rows} == images
    assert len(rows) == len(images)
    assert {row["status"] for row in rows} == {"done"}

    whole = tmp_path / "whole"
    command = [tool("bcseg-batch"), "process-dir", source, whole, "--no-cells"]
    subprocess.run(command, check=True, timeout=110)
    assert hashes(output / "masks") == hashes(whole / "masks")
    assert hashes(output / "composites") == hashes(whole / "composites")


def hashes(folder: Path) -> dict[str, str]:
    return {
        path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in folder.rglob("*")
        if path.is_file()
    }


# Ray -------------------------------------------------------------------------------------------


def read_yaml(name: str) -> Any:
    return yaml.safe_load((CLUSTER / name).read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def ray_schema() -> Any:
    """The schema that `ray up` holds such a file against."""
    ray = importlib.util.find_spec("ray")
    if ray is None or ray.origin is None:
        pytest.skip("needs the extra [ray]")
    path = Path(ray.origin).parent / "autoscaler/ray-schema.json"
    return json.loads(path.read_text(encoding="utf-8"))


def test_ray_takes_the_cluster_file(ray_schema: Any) -> None:
    content = read_yaml("ray-cluster.yaml")
    jsonschema.validate(content, ray_schema)
    with pytest.raises(jsonschema.ValidationError, match="head_start_commands"):
        jsonschema.validate({**content, "head_start_commands": []}, ray_schema)


def test_the_options_of_ray_start_are_its_options() -> None:
    pytest.importorskip("ray", reason="needs the extra [ray]")
    help_text = subprocess.run(
        [sys.executable, "-m", "ray.scripts.scripts", "start", "--help"],
        check=True,
        capture_output=True,
        text=True,
        timeout=110,
    ).stdout
    content = read_yaml("ray-cluster.yaml")
    commands = content["head_start_ray_commands"] + content["worker_start_ray_commands"]
    named = {option for command in commands for option in re.findall(r"--[a-z-]+", command)}
    assert {"--head", "--ray-client-server-port", "--address"} <= named
    assert all(option in help_text for option in named)


def test_ray_tells_nobody_of_its_use() -> None:
    """It tells its makers unasked, wherever a head is started."""
    (start,) = (
        c for c in read_yaml("ray-cluster.yaml")["head_start_ray_commands"] if "--head" in c
    )
    assert "--disable-usage-stats" in start
    # Kubernetes starts it with the image's environment.
    assert "ENV RAY_USAGE_STATS_ENABLED=0" in (CLUSTER / "Dockerfile").read_text(encoding="utf-8")


# Kubernetes ------------------------------------------------------------------------------------


def check_rayjob(job: dict[str, Any]) -> None:
    """Refuse what the API server would in strict mode.

    KubeRay's part is held against `schemas/rayjob.json`, the pods against Kubernetes' own schema.
    """
    schema = json.loads((ROOT / "tests/schemas/rayjob.json").read_text(encoding="utf-8"))
    jsonschema.Draft202012Validator.check_schema(schema)
    jsonschema.Draft202012Validator(schema).validate(job)
    cluster = job["spec"]["rayClusterSpec"]
    for group in (cluster["headGroupSpec"], *cluster["workerGroupSpecs"]):
        template = {
            "apiVersion": "v1",
            "kind": "PodTemplate",
            "metadata": job["metadata"],
            "template": group["template"],
        }
        kubernetes_validate.validate(template, KUBERNETES, strict=True)


def test_kubernetes_takes_the_ray_job() -> None:
    check_rayjob(read_yaml("rayjob.yaml"))


@pytest.mark.parametrize(
    ("place", "name", "value"),
    [
        ((), "specs", {}),
        (("spec",), "entryPoint", "x"),
        (("spec",), "ttlSecondsAfterFinished", "600"),
        (("spec", "rayClusterSpec"), "workerGroupSpec", []),
        (("spec", "rayClusterSpec", "headGroupSpec", "rayStartParams"), "num-cpus", 0),
        (("spec", "rayClusterSpec", "headGroupSpec", "template", "spec"), "container", []),
        (
            ("spec", "rayClusterSpec", "workerGroupSpecs", 0, "template", "spec", "containers", 0),
            "resource",
            {},
        ),
        (("spec", "rayClusterSpec", "workerGroupSpecs", 0), "minReplicas", None),
    ],
)
def test_what_is_misspelt_in_the_ray_job_is_refused(
    place: tuple[str | int, ...], name: str, value: object
) -> None:
    job = copy.deepcopy(read_yaml("rayjob.yaml"))
    at = job
    for step in place:
        at = at[step]
    at[name] = value
    with pytest.raises((jsonschema.ValidationError, kubernetes_validate.ValidationError)):
        check_rayjob(job)


def test_an_actor_fits_into_a_worker_and_there_are_as_many() -> None:
    spec = read_yaml("rayjob.yaml")["spec"]
    (workers,) = spec["rayClusterSpec"]["workerGroupSpecs"]
    (container,) = workers["template"]["spec"]["containers"]
    cores = re.search(r"--cpus-per-actor (\S+)", spec["entrypoint"])
    actors = re.search(r"--actors (\d+):(\d+)", spec["entrypoint"])
    assert cores is not None
    assert actors is not None
    assert cores[1] == container["resources"]["requests"]["cpu"]
    assert cores[1] == workers["rayStartParams"]["num-cpus"]
    assert (int(actors[1]), int(actors[2])) == (workers["minReplicas"], workers["maxReplicas"])


# The image, which is not built here: it comes from a registry of images. ------------------------


def test_the_dockerfile_is_linted() -> None:
    done = subprocess.run(
        [tool("hadolint"), CLUSTER / "Dockerfile"], check=False, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_dockerfile_copies_and_installs_what_there_is() -> None:
    text = (CLUSTER / "Dockerfile").read_text(encoding="utf-8")
    for line in re.findall(r"^COPY (.+) \S+$", text, re.MULTILINE):
        for source in line.split():
            assert (ROOT / source).exists(), source
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    extras = re.findall(r"/src\[([a-z0-9,]+)\]", text)
    assert extras
    for extra in extras[0].split(","):
        assert extra in project["optional-dependencies"], extra


def test_versions_are_of_this_version_everywhere() -> None:
    from bcseg_batch.version import __version__

    texts = [(CLUSTER / name).read_text(encoding="utf-8") for name in ("Dockerfile", "rayjob.yaml")]
    named = re.findall(r"bcseg-batch:([\w.]+)", "".join(texts))
    assert len(named) >= 3
    assert set(named) == {__version__}
    rays = re.findall(r"ray\[default\]==([\d.]+)|rayVersion: \"([\d.]+)\"", "".join(texts))
    assert len(rays) == 2
    assert len({one or other for one, other in rays}) == 1


def test_the_page_links_to_every_file_and_copies_none() -> None:
    for path in sorted(CLUSTER.iterdir()):
        assert f"](../cluster/{path.name})" in PAGE, path.name
    assert "#SBATCH" not in PAGE
    assert "apiVersion" not in PAGE
