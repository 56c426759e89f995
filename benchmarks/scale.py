"""What runs over a million and a thousand million images take: docs/scale.md in figures.

    python benchmarks/scale.py                      # the tables of docs/scale.md
    python benchmarks/scale.py --images 2e7 --machines 40 --cores 32   # your own run
    python benchmarks/scale.py --simulate           # the model held against the simulation
    python benchmarks/scale.py --simulate --write   # all tables anew, into docs/scale.md

The figures of an image, of listing and of recording are measured, by `scale_measure.py`. What
machines and storage can do is assumed, named in every table, and yours to replace.
"""

from __future__ import annotations

import argparse
import math
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from pathlib import Path

from scale_figures import FIGURES_PATH, Figures, load_figures
from scale_model import (
    Bound,
    Driver,
    Machine,
    Prices,
    Run,
    Storage,
    cost,
    drivers_needed,
    images_per_s_of,
    machines_to_saturate,
    predict,
)
from scale_simulation import play

PAGE = Path(__file__).parents[1] / "docs/scale.md"
MILLION, MILLIARD = 10**6, 10**9

# Assumed, none of it measured.
MACHINE = Machine(cores=16, link_bytes_per_s=1.25e9)
GPU_IMAGES_PER_S = 200.0
GPU_MACHINE = replace(MACHINE, gpu_images_per_s=GPU_IMAGES_PER_S)
LARGE_GPU_MACHINE = replace(GPU_MACHINE, cores=64)
START_S = 120.0
SHARE = Storage(bytes_per_s=1e9)
# What the maker of S3 documents for one prefix; its bytes are taken as unlimited.
READS_PER_PREFIX_PER_S, WRITES_PER_PREFIX_PER_S = 5500.0, 3500.0
# A page of 1,000 names, one after the other.
PAGE_OF_NAMES, PAGE_S = 1000, 0.1

BY_SHARD = "by `--shard`"
SHARE_NAME, PREFIX_NAME = "shared folder, 1 GB/s", "bucket, one prefix"


def prefixes(count: int) -> Storage:
    """Give a bucket whose images lie under so many prefixes."""
    return Storage(
        reads_per_s=count * READS_PER_PREFIX_PER_S, writes_per_s=count * WRITES_PER_PREFIX_PER_S
    )


def of_bucket(driver: Driver) -> Driver:
    """Give a driver that lists a bucket in place of a folder."""
    return replace(driver, list_s=PAGE_S / PAGE_OF_NAMES)


# Words and tables ------------------------------------------------------------------------------


def number(value: float) -> str:
    """Write a number in three digits that count."""
    if value == 0:
        return "0"
    digits = max(0, 2 - math.floor(math.log10(abs(value))))
    return f"{round(value, 2 - math.floor(math.log10(abs(value)))):,.{digits}f}"


def count_of(value: float) -> str:
    """Write a whole number."""
    return f"{value:,.0f}"


def size(value_bytes: float) -> str:
    """Write a size in the unit that suits it, powers of ten."""
    for unit in ("B", "kB", "MB", "GB", "TB"):
        if value_bytes < 999.5:
            return f"{number(value_bytes)} {unit}"
        value_bytes /= 1000
    return f"{number(value_bytes)} PB"


def duration(seconds: float) -> str:
    """Write a time in the unit that suits it."""
    for unit, length_s in (("days", 86400 * 2), ("h", 3600), ("min", 60)):
        if seconds >= length_s:
            return f"{number(seconds / min(length_s, 86400))} {unit}"
    return f"{number(seconds)} s"


def table(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Give a table in Markdown."""
    lines = [columns, ["---"] * len(columns), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


# The tables of the page ------------------------------------------------------------------------


def figures_table(figures: Figures) -> str:
    """Everything that the rest is made of."""
    one = figures.image
    per_core = 1 / (one.network_core_s + one.files_core_s)
    return table(
        ["of one image", "measured"],
        [
            ["photograph, JPEG", size(figures.input_bytes)],
            ["mask", size(figures.mask_bytes)],
            ["composite", size(figures.composite_bytes)],
            ["table of cells", size(figures.cells_bytes)],
            ["label image (`--labels`)", size(figures.labels_bytes)],
            ["preview (`outputs.previews`)", size(figures.preview_bytes)],
            ["line in `results.jsonl`", size(figures.record_bytes)],
            ["line in `results.csv`", size(figures.row_bytes)],
            ["lines in `cells.csv`", size(figures.cell_rows_bytes)],
            ["network, 8 bits", f"{number(figures.network_core_ms)} core-ms"],
            ["all the rest", f"{number(figures.files_core_ms)} core-ms"],
            ["so one core makes", f"{number(per_core)} images/s"],
            ["listed by the driver, local disk", f"{number(figures.list_us)} us"],
            ["handed to a Ray actor and taken back", f"{number(figures.hand_out_us)} us"],
            ["recorded by the driver", f"{number(figures.record_us)} us"],
            ["so one driver keeps up with", f"{count_of(handled_per_s(figures.driver))} images/s"],
            ["put into `results.csv` and `cells.csv` at the end", f"{number(figures.table_us)} us"],
        ],
    )


def handled_per_s(driver: Driver) -> float:
    """Give what one driver keeps up with."""
    return 1 / (driver.list_s + driver.hand_out_s + driver.record_s)


def storage_table(figures: Figures) -> str:
    """What lies there afterwards."""
    rows: list[tuple[str, float]] = [
        ("photographs", figures.input_bytes),
        ("masks", figures.mask_bytes),
        ("composites", figures.composite_bytes),
        ("tables of cells", figures.cells_bytes),
        ("`results.jsonl`", figures.record_bytes),
        ("`results.csv`", figures.row_bytes),
        ("`cells.csv`", figures.cell_rows_bytes),
        ("label images, if asked for", figures.labels_bytes),
        ("previews, if asked for", figures.preview_bytes),
    ]
    files = figures.image.output_files
    return table(
        ["", "10^6 images", "10^9 images"],
        [
            *([name, size(each * MILLION), size(each * MILLIARD)] for name, each in rows),
            ["files written", count_of(files * MILLION), count_of(files * MILLIARD)],
            ["requests: GET", count_of(MILLION), count_of(MILLIARD)],
            ["requests: PUT", count_of(files * MILLION), count_of(files * MILLIARD)],
            [
                "requests: LIST",
                count_of(MILLION / PAGE_OF_NAMES),
                count_of(MILLIARD / PAGE_OF_NAMES),
            ],
        ],
    )


def a_run(figures: Figures, **changes: object) -> Run:
    """Give a run on a shared folder that limits nothing, but for what is changed."""
    base = Run(
        images=MILLION,
        machines=1,
        image=figures.image,
        machine=MACHINE,
        storage=Storage(),
        driver=figures.driver,
        start_s=START_S,
    )
    return replace(base, **changes)  # type: ignore[arg-type]


def runs_table(figures: Figures) -> str:
    """Machines, hours, what holds it up."""
    bucket = of_bucket(figures.driver)
    shapes = [
        (MILLION, machines, SHARE_NAME, SHARE, figures.driver, "1") for machines in (1, 10, 100)
    ]
    shapes.append((MILLION, 100, PREFIX_NAME, prefixes(1), bucket, "1"))
    for machines, folders, drivers in (
        (100, 1, "1"),
        (100, 4, "4, by prefix"),
        (1000, 50, "1"),
        (1000, 50, f"50, {BY_SHARD}"),
        (1000, 50, "50, by prefix"),
    ):
        where = PREFIX_NAME if folders == 1 else f"bucket, {folders} prefixes"
        shapes.append((MILLIARD, machines, where, prefixes(folders), bucket, drivers))
    shapes.append((MILLIARD, 1000, SHARE_NAME, SHARE, figures.driver, f"50, {BY_SHARD}"))
    rows = []
    for images, machines, where, storage, driver, drivers in shapes:
        made = predict(
            a_run(
                figures,
                images=images,
                machines=machines,
                storage=storage,
                driver=driver,
                drivers=int(drivers.split(",")[0]),
                lists_all=drivers.endswith(BY_SHARD),
            )
        )
        rows.append(
            [
                f"10^{round(math.log10(images))}",
                count_of(machines),
                where,
                drivers,
                number(made.images_per_s),
                duration(made.seconds),
                count_of(made.machine_hours),
                made.bound.value,
                duration(made.tables_s),
            ]
        )
    columns = ["images", "machines", "storage", "drivers", "images/s", "time", "machine-hours"]
    return table([*columns, "held up by", "then tables"], rows)


def drivers_of(run: Run) -> str:
    """Write how many drivers a run needs."""
    needed = drivers_needed(run)
    return "no number is enough" if needed is None else count_of(needed)


def bottlenecks_table(figures: Figures) -> str:
    """From how many machines on something else than they themselves holds the run up."""
    machines = [MACHINE, GPU_MACHINE, LARGE_GPU_MACHINE]
    gpu = f"GPU of {count_of(GPU_IMAGES_PER_S)} images/s"
    columns = [
        "",
        f"{MACHINE.cores} cores",
        f"{GPU_MACHINE.cores} cores, {gpu}",
        f"{LARGE_GPU_MACHINE.cores} cores, {gpu}",
    ]
    rows = [
        [
            "one machine makes, images/s",
            *(number(images_per_s_of(machine, figures.image)[1]) for machine in machines),
        ],
        [
            "of this held up by",
            *(images_per_s_of(machine, figures.image)[0].value for machine in machines),
        ],
    ]
    needed = GPU_IMAGES_PER_S * figures.image.files_core_s
    rows.append(
        [
            "cores that keep it busy",
            *("" if m.gpu_images_per_s is None else count_of(math.ceil(needed)) for m in machines),
        ]
    )
    limits: list[tuple[str, Bound, Run]] = [
        (SHARE_NAME, Bound.BANDWIDTH, a_run(figures, storage=SHARE)),
        (
            "the same, `--no-composite`",
            Bound.BANDWIDTH,
            a_run(figures, storage=SHARE, image=figures.without_composites),
        ),
        (f"{PREFIX_NAME}, 3,500 PUT/s", Bound.WRITES, a_run(figures, storage=prefixes(1))),
        (
            "the same, `--no-composite`",
            Bound.WRITES,
            a_run(figures, storage=prefixes(1), image=figures.without_composites),
        ),
        ("one driver, shared folder", Bound.DRIVER, a_run(figures)),
        (
            "one driver, bucket (10,000 names/s)",
            Bound.DRIVER,
            a_run(figures, driver=of_bucket(figures.driver)),
        ),
    ]
    for name, bound, run in limits:
        row = [name]
        for machine in machines:
            found = machines_to_saturate(replace(run, machine=machine), bound)
            row.append(f"from {count_of(math.ceil(found))} machines")
        rows.append(row)
    bucket = of_bucket(figures.driver)
    alone_s = MILLIARD / handled_per_s(bucket)
    rows.append(["10^9 by one driver, at best", *([duration(alone_s)] * len(machines))])
    rows.append(
        [
            "drivers by prefix that 1,000 machines need",
            *(
                drivers_of(a_run(figures, machines=1000, machine=machine, driver=bucket))
                for machine in machines
            ),
        ]
    )
    at_most = 1 / bucket.list_s
    by_shard = f"{count_of(at_most)} images/s at most"
    rows.append([f"any number of drivers {BY_SHARD}, bucket", *([by_shard] * len(machines))])
    return table(columns, rows)


def scenarios(figures: Figures, *, blocks: int) -> dict[str, Run]:
    """Give runs in which each thing gives out in its turn.

    Args:
        figures: of an image.
        blocks: that each machine gets. What a run comes to does not depend on it, but the
            beginning and the end of a short one weigh more.
    """
    slow_link = replace(MACHINE, link_bytes_per_s=1.25e7)
    many = min(1000, math.ceil(2 * machines_to_saturate(a_run(figures), Bound.DRIVER)))
    bucket = of_bucket(figures.driver)
    shapes = {
        "1 machine": a_run(figures),
        "10 machines, shared folder": a_run(figures, machines=10, storage=SHARE),
        "30 machines, shared folder": a_run(figures, machines=30, storage=SHARE),
        "30 machines, no composites": a_run(
            figures, machines=30, storage=SHARE, image=figures.without_composites
        ),
        "10 machines at 100 Mbit/s": a_run(figures, machines=10, machine=slow_link),
        "100 machines, one prefix": a_run(
            figures, machines=100, storage=prefixes(1), driver=bucket, drivers=4
        ),
        "20 machines, 500 GET/s": a_run(figures, machines=20, storage=Storage(reads_per_s=500)),
        "100 machines, 10 drivers": a_run(figures, machines=100, drivers=10),
        f"{many} machines, one driver": a_run(figures, machines=many),
        "300 machines, 20 drivers by `--shard`, bucket": a_run(
            figures, machines=300, driver=bucket, drivers=20, lists_all=True
        ),
        "1,000 machines, 50 drivers, 50 prefixes": a_run(
            figures, machines=1000, storage=prefixes(50), driver=bucket, drivers=50
        ),
        "10 machines, 16 cores, GPU": a_run(figures, machines=10, machine=GPU_MACHINE),
        "10 machines, 64 cores, GPU": a_run(figures, machines=10, machine=LARGE_GPU_MACHINE),
        "10 machines, each lost every minute for half a minute": a_run(
            figures, machines=10, machine=replace(MACHINE, losses_per_hour=60, repair_s=30)
        ),
    }
    return {
        # What begins at once is compared; with losses it takes some of them to see an average.
        name: replace(
            run,
            start_s=0.0,
            images=run.machines * run.block * blocks * (40 if run.machine.repair_s else 1),
        )
        for name, run in shapes.items()
    }


def simulation_table(figures: Figures, blocks: int) -> str:
    """The model beside the simulation."""
    rows = []
    for name, run in scenarios(figures, blocks=blocks).items():
        told, seen = predict(run), play(run)
        per_s = run.images / told.seconds
        rows.append(
            [
                name,
                number(per_s),
                number(run.images / seen.seconds),
                f"{100 * (told.seconds / seen.seconds - 1):+.1f} %",
                told.bound.value,
                seen.bound.value,
                f"{100 * seen.busy[seen.bound]:.0f} %",
            ]
        )
    return table(
        ["", "model, images/s", "simulated", "apart", "model: held up by", "seen", "busy"], rows
    )


TABLES: dict[str, Callable[[Figures], str]] = {
    "figures": figures_table,
    "storage": storage_table,
    "runs": runs_table,
    "bottlenecks": bottlenecks_table,
}
SIMULATED = "simulation"
BLOCKS = 40


def replaced(page: str, name: str, content: str) -> str:
    """Put a table between its two marks in a page."""
    marked = re.compile(rf"(<!-- {name} -->\n).*?(\n<!-- /{name} -->)", re.DOTALL)
    changed, found = marked.subn(lambda marks: f"{marks[1]}\n{content}\n{marks[2]}", page)
    if found != 1:
        raise SystemExit(f"{PAGE.name} has no place for the table {name!r}")
    return changed


def own_table(figures: Figures, options: argparse.Namespace) -> str:
    """What the reader's own run comes to."""
    run = Run(
        images=round(options.images),
        machines=options.machines,
        image=figures.image if options.composites else figures.without_composites,
        machine=Machine(
            cores=options.cores,
            link_bytes_per_s=options.link_gbit_per_s / 8 * 1e9,
            gpu_images_per_s=options.gpu_images_per_s,
        ),
        storage=Storage(
            bytes_per_s=options.storage_gb_per_s * 1e9,
            reads_per_s=options.reads_per_s,
            writes_per_s=options.writes_per_s,
        ),
        driver=figures.driver,
        drivers=options.drivers,
        lists_all=options.by_shard,
        start_s=START_S,
    )
    made = predict(run)
    prices = Prices(
        machine_hour=options.price_machine_hour,
        stored_terabyte_month=options.price_terabyte_month,
        thousand_reads=options.price_thousand_reads,
        thousand_writes=options.price_thousand_writes,
        read_terabyte=options.price_read_terabyte,
    )
    money = cost(made, prices, months=options.months)
    return table(
        ["", "your run"],
        [
            ["images/s", number(made.images_per_s)],
            ["time until the last record", duration(made.seconds)],
            ["then tables, one process", duration(made.tables_s)],
            ["machine-hours", count_of(made.machine_hours)],
            ["held up by", made.bound.value],
            ["drivers needed at least", drivers_of(run)],
            ["read", size(made.read_bytes)],
            ["written", size(made.written_bytes)],
            ["tables", size(made.table_bytes)],
            ["reading, writing requests", f"{count_of(made.reads)}, {count_of(made.writes)}"],
            ["costs, by your prices", number(money) if money else "no price was given"],
        ],
    )


def parse() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--simulate", action="store_true", help="the model's check too")
    parser.add_argument("--blocks", type=int, default=BLOCKS, help="per simulated machine")
    parser.add_argument("--write", action="store_true", help="put the tables into docs/scale.md")
    parser.add_argument("--figures", type=Path, default=FIGURES_PATH, help="other measured ones")
    own = parser.add_argument_group("your own run")
    own.add_argument("--images", type=float, help="how many; the tables are left out")
    own.add_argument("--machines", type=int, default=1)
    own.add_argument("--cores", type=int, default=MACHINE.cores, help="of a machine")
    own.add_argument("--gpu-images-per-s", type=float, help="measured on yours, of a machine")
    own.add_argument("--link-gbit-per-s", type=float, default=10.0, help="of a machine")
    own.add_argument("--storage-gb-per-s", type=float, default=math.inf)
    own.add_argument("--reads-per-s", type=float, default=math.inf)
    own.add_argument("--writes-per-s", type=float, default=math.inf)
    own.add_argument("--drivers", type=int, default=1)
    own.add_argument("--by-shard", action="store_true", help="all drivers list all images")
    own.add_argument("--composites", action=argparse.BooleanOptionalAction, default=True)
    own.add_argument("--months", type=float, default=1.0, help="that the results are kept")
    for price in ("machine-hour", "terabyte-month", "thousand-reads", "thousand-writes"):
        own.add_argument(f"--price-{price}", type=float, default=0.0)
    own.add_argument("--price-read-terabyte", type=float, default=0.0)
    return parser.parse_args()


def main() -> int:
    options = parse()
    figures = load_figures(options.figures)
    if options.images is not None:
        print(own_table(figures, options))
        return 0
    made = {name: write(figures) for name, write in TABLES.items()}
    if options.simulate:
        made[SIMULATED] = simulation_table(figures, options.blocks)
    for name, content in made.items():
        print(f"{name}\n\n{content}\n")
    if options.write:
        page = PAGE.read_text(encoding="utf-8")
        for name, content in made.items():
            page = replaced(page, name, content)
        PAGE.write_text(page, encoding="utf-8")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
