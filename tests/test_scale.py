"""The model of large runs agrees with a simulation of them, and its page with the model."""

from __future__ import annotations

import importlib
import json
import math
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

ROOT = Path(__file__).parents[1]
BENCHMARKS = ROOT / "benchmarks"
PAGE = (ROOT / "docs/scale.md").read_text(encoding="utf-8")
# Few blocks for each machine, so that beginning and end weigh more than in a run of hours.
BLOCKS = 20
APART = 0.08


@pytest.fixture(autouse=True)
def beside_each_other(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(BENCHMARKS))


@pytest.fixture
def scale() -> ModuleType:
    return importlib.import_module("scale")


@pytest.fixture
def model() -> ModuleType:
    return importlib.import_module("scale_model")


@pytest.fixture
def simulation() -> ModuleType:
    return importlib.import_module("scale_simulation")


@pytest.fixture
def figures(scale: ModuleType) -> Any:
    return scale.load_figures()


# What holds each run up, written down here apart from model and simulation.
HELD_UP_BY = {
    "1 machine": "PROCESSORS",
    "10 machines, shared folder": "PROCESSORS",
    "30 machines, shared folder": "BANDWIDTH",
    "30 machines, no composites": "PROCESSORS",
    "10 machines at 100 Mbit/s": "LINKS",
    "100 machines, one prefix": "WRITES",
    "20 machines, 500 GET/s": "READS",
    "100 machines, 10 drivers": "PROCESSORS",
    "MANY machines, one driver": "DRIVER",
    "300 machines, 20 drivers by `--shard`, bucket": "DRIVER",
    "10 machines, 16 cores, GPU": "PROCESSORS",
    "10 machines, 64 cores, GPU": "GPUS",
    "10 machines, each lost every minute for half a minute": "PROCESSORS",
}
LARGE = "1,000 machines, 50 drivers, 50 prefixes"


def run_named(scale: ModuleType, figures: Any, name: str, blocks: int) -> Any:
    runs = scale.scenarios(figures, blocks=blocks)
    assert set(HELD_UP_BY) | {LARGE} == {
        re.sub(r"^\d{2,} (?=.*one driver)", "MANY ", n) for n in runs
    }
    return next(
        run
        for shown, run in runs.items()
        if shown == name or (name.startswith("MANY") and shown.endswith("one driver"))
    )


@pytest.mark.parametrize("name", HELD_UP_BY)
def test_model_and_simulation_agree(
    scale: ModuleType, model: ModuleType, simulation: ModuleType, figures: Any, name: str
) -> None:
    run = run_named(scale, figures, name, BLOCKS)
    told, seen = model.predict(run), simulation.play(run)
    assert seen.done == run.images
    assert told.seconds == pytest.approx(seen.seconds, rel=APART)
    assert told.bound is seen.bound is model.Bound[HELD_UP_BY[name]]


def test_a_narrower_thing_gives_out_in_the_model_and_in_the_simulation(
    model: ModuleType, simulation: ModuleType, scale: ModuleType, figures: Any
) -> None:
    """From the number of machines that the model names, and not before."""
    run = scale.a_run(figures, storage=model.Storage(writes_per_s=600.0), start_s=0.0)
    machines = model.machines_to_saturate(run, model.Bound.WRITES)
    assert 2 < machines < 10
    for count, bound in (
        (math.ceil(machines * 1.5), model.Bound.WRITES),
        (math.floor(machines / 1.5), model.Bound.PROCESSORS),
    ):
        near = replace(run, machines=count, images=count * 40 * run.block)
        assert model.predict(near).bound is simulation.play(near).bound is bound


def test_lost_machines_cost_time_and_no_image(
    simulation: ModuleType, scale: ModuleType, figures: Any
) -> None:
    run = scale.a_run(figures, machines=4, images=4 * 200 * 32, start_s=0.0)
    losing = replace(run, machine=replace(run.machine, losses_per_hour=120.0, repair_s=20.0))
    whole, torn = simulation.play(run), simulation.play(losing)
    assert whole.losses == whole.redone == 0
    assert torn.losses > 0
    assert torn.redone > 0
    assert torn.done == whole.done == run.images
    assert torn.seconds > whole.seconds
    assert simulation.play(losing) == torn
    assert simulation.play(losing, seed=1) != torn


def test_as_many_drivers_as_the_model_asks_for_hold_nothing_up(
    model: ModuleType, scale: ModuleType, figures: Any
) -> None:
    run = scale.a_run(figures, machines=1000)
    assert model.predict(run).bound is model.Bound.DRIVER
    enough = model.drivers_needed(run)
    assert model.predict(replace(run, drivers=enough)).bound is model.Bound.PROCESSORS
    assert model.predict(replace(run, drivers=enough - 1)).bound is model.Bound.DRIVER

    sharded = replace(run, lists_all=True, drivers=enough)
    assert model.predict(sharded).bound is model.Bound.DRIVER
    more = model.drivers_needed(sharded)
    assert more > enough
    assert model.predict(replace(sharded, drivers=more)).bound is model.Bound.PROCESSORS
    bucket = replace(sharded, driver=scale.of_bucket(run.driver))
    assert model.drivers_needed(bucket) is None
    assert model.predict(replace(bucket, drivers=10**6)).bound is model.Bound.DRIVER


def test_costs_are_the_readers_prices_times_what_is_used(
    model: ModuleType, scale: ModuleType, figures: Any
) -> None:
    made = model.predict(scale.a_run(figures))
    assert model.cost(made, model.Prices(), months=12) == 0
    assert model.cost(made, model.Prices(machine_hour=3), months=0) == 3 * made.machine_hours
    kept_tb = (made.written_bytes + made.table_bytes) / 1e12
    prices = model.Prices(stored_terabyte_month=20, thousand_writes=0.005)
    assert model.cost(made, prices, months=2) == pytest.approx(
        2 * 20 * kept_tb + 0.005 * made.writes / 1000
    )


def test_numbers_are_written_in_three_digits(scale: ModuleType) -> None:
    assert [scale.number(value) for value in (0, 0.0123, 1.234, 56.78, 999, 4567)] == [
        *("0", "0.0123", "1.23", "56.8", "999", "4,570"),
    ]
    assert [scale.size(value) for value in (1430, 10**12, 10**15)] == [
        "1.43 kB",
        "1.00 TB",
        "1.00 PB",
    ]
    assert [scale.duration(value) for value in (30, 90, 7200, 86400, 864000)] == [
        *("30.0 s", "1.50 min", "2.00 h", "24.0 h", "10.0 days"),
    ]


# The page --------------------------------------------------------------------------------------


def table_of_page(name: str) -> str:
    found = re.search(rf"<!-- {name} -->\n\n(.*?)\n\n<!-- /{name} -->", PAGE, re.DOTALL)
    assert found is not None, f"docs/scale.md has no table {name!r}"
    return found[1]


@pytest.mark.parametrize("name", ["figures", "storage", "runs", "bottlenecks"])
def test_the_tables_of_the_page_are_those_of_the_model(
    scale: ModuleType, figures: Any, name: str
) -> None:
    assert table_of_page(name) == scale.TABLES[name](figures), (
        "run benchmarks/scale.py --simulate --write"
    )


def rows_of(text: str) -> list[list[str]]:
    return [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines()[2:]]


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_the_simulated_table_of_the_page_is_what_comes_of_it(
    scale: ModuleType, figures: Any
) -> None:
    """The large run included; another version of numpy may draw other sizes."""
    shown = rows_of(table_of_page("simulation"))
    made = rows_of(scale.simulation_table(figures, scale.BLOCKS))
    for told, found in zip(shown, made, strict=True):
        assert told[:2] == found[:2]
        assert told[4:6] == found[4:6]
        assert told[4] == told[5]
        seen, now = (float(row[2].replace(",", "")) for row in (told, found))
        assert seen == pytest.approx(now, rel=0.03)
        assert abs(float(told[3].removesuffix(" %"))) <= 5


def test_a_run_of_the_readers_own_is_worked_out(
    scale: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["scale.py", "--images", "2e7", "--machines", "40", "--cores", "32"]
    monkeypatch.setattr(sys, "argv", arguments)
    assert scale.main() == 0
    free = dict(rows_of(capsys.readouterr().out))
    assert free["costs, by your prices"] == "no price was given"
    assert free["held up by"] == "driver"
    monkeypatch.setattr(sys, "argv", [*arguments, "--drivers", "4", "--price-machine-hour", "2"])
    assert scale.main() == 0
    paid = dict(rows_of(capsys.readouterr().out))
    hours = float(paid["machine-hours"].replace(",", ""))
    assert float(paid["costs, by your prices"].replace(",", "")) == pytest.approx(
        2 * hours, rel=0.01
    )
    assert paid["held up by"] == "processors"


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_the_figures_can_be_measured_anew(tmp_path: Path, tiny_model: Path) -> None:
    pytest.importorskip("ray", reason="needs the extra [ray]")
    path = tmp_path / "figures.json"
    done = subprocess.run(
        [
            *(sys.executable, BENCHMARKS / "scale_measure.py", "--out", path),
            *("--photographs", "2", "--records", "200", "--files", "200"),
            *("--model", tiny_model, "--folder", tmp_path),
        ],
        check=False,
        capture_output=True,
        text=True,
        timeout=280,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads(path.read_text(encoding="utf-8"))
    kept = json.loads((BENCHMARKS / "scale_figures.json").read_text(encoding="utf-8"))
    assert set(found) == set(kept)
    assert all(value > 0 for value in found.values() if not isinstance(value, str))
    # The same photographs are drawn on every machine.
    assert found["input_bytes"] == pytest.approx(kept["input_bytes"], rel=0.1)
