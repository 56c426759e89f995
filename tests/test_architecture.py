"""Who may import whom: the rooms of docs/design.md stay apart."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PLAIN = {"bcseg_batch.errors", "bcseg_batch.items", "bcseg_batch.text", "bcseg_batch.version"}
# What bcseg_training may use of the service's package.
FOR_TRAINING = {
    "bcseg_batch.allocator",
    "bcseg_batch.command_line",
    "bcseg_batch.errors",
    "bcseg_batch.exchange",
    "bcseg_batch.segment",
    "bcseg_batch.service.log",
    "bcseg_batch.store.drawings",
    "bcseg_batch.store.encode",
    "bcseg_batch.store.images",
    "bcseg_batch.store.outputs",
    "bcseg_batch.text",
    "bcseg_batch.version",
}
READS_SETTINGS = {
    "bcseg_batch.cli",
    "bcseg_batch.service.build",
    "bcseg_batch.service.daemon",
    "bcseg_batch.service.doctor",
    "bcseg_batch.service.remote_worker",
}


def modules(package: Path) -> dict[str, Path]:
    """Map each module's dotted name to its file."""
    found = {}
    for path in package.rglob("*.py"):
        parts = path.relative_to(package.parent).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


BATCH = modules(ROOT / "bcseg_batch")
TRAINING = modules(ROOT / "training" / "bcseg_training")


def imports(path: Path) -> Iterator[str]:
    """Give the dotted names that a module imports while it runs, wherever in it.

    What stands below `if TYPE_CHECKING:` is left out: it binds no room to another at run time.
    """
    tree = ast.parse(path.read_text(encoding="utf-8"))
    for_types = {
        inner
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and ast.unparse(node.test).endswith("TYPE_CHECKING")
        for statement in node.body
        for inner in ast.walk(statement)
    }
    for node in ast.walk(tree):
        if node in for_types:
            continue
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative imports hide where a room ends"
            for alias in node.names:
                whole = f"{node.module}.{alias.name}"
                yield whole if whole in BATCH or whole in TRAINING else str(node.module)


def within(name: str, packages: set[str]) -> bool:
    return any(name == package or name.startswith(package + ".") for package in packages)


def ours(path: Path) -> set[str]:
    return {name for name in imports(path) if within(name, {"bcseg_batch", "bcseg_training"})}


def test_the_modules_are_found() -> None:
    assert "bcseg_batch.segment.model" in BATCH
    assert "bcseg_training.train" in TRAINING
    assert "bcseg_batch.service.build" in ours(BATCH["bcseg_batch.cli"])


@pytest.mark.parametrize("room", ["segment", "intake", "store"])
def test_a_room_imports_only_plain_things_and_itself(room: str) -> None:
    own = f"bcseg_batch.{room}"
    for name, path in BATCH.items():
        if within(name, {own}):
            strangers = {i for i in ours(path) if not within(i, {*PLAIN, own})}
            assert not strangers, name


def test_the_stores_of_objects_are_known_below_the_service() -> None:
    own = "bcseg_batch.remote"
    for name, path in BATCH.items():
        if within(name, {own}):
            may = {*PLAIN, own, "bcseg_batch.intake", "bcseg_batch.store"}
            assert not {i for i in ours(path) if not within(i, may)}, name


def test_the_report_imports_no_service() -> None:
    may = {*PLAIN, "bcseg_batch.report", "bcseg_batch.segment", "bcseg_batch.store"}
    for name, path in BATCH.items():
        if within(name, {"bcseg_batch.report"}):
            assert not {i for i in ours(path) if not within(i, may)}, name


def test_the_plain_modules_import_nothing_of_ours() -> None:
    for name in PLAIN | {"bcseg_batch.allocator"}:
        assert not ours(BATCH[name]), name


def test_the_service_imports_the_rooms_and_no_command_line() -> None:
    for name, path in BATCH.items():
        if within(name, {"bcseg_batch.service"}):
            assert "bcseg_batch.cli" not in ours(path), name


def test_the_exchange_uses_what_is_on_disk_and_arrays_alone() -> None:
    own = "bcseg_batch.exchange"
    rooms = {own, "bcseg_batch.segment", "bcseg_batch.store"}
    for name, path in BATCH.items():
        if within(name, {own}):
            strangers = {i for i in ours(path) if not within(i, {*PLAIN, *rooms})}
            assert not strangers, name


def test_only_those_who_build_see_the_settings() -> None:
    readers = {name for name, path in BATCH.items() if "bcseg_batch.settings" in ours(path)}
    assert readers <= READS_SETTINGS


def test_the_product_does_not_need_the_training() -> None:
    for name, path in BATCH.items():
        assert not [i for i in imports(path) if within(i, {"bcseg_training"})], name


def test_the_training_uses_only_what_it_may_of_the_product() -> None:
    for name, path in TRAINING.items():
        strangers = {i for i in ours(path) if not within(i, {*FOR_TRAINING, "bcseg_training"})}
        assert not strangers, name


@pytest.mark.parametrize("room", ["intake", "store", "report"])
def test_files_are_handled_without_torch(room: str) -> None:
    for name, path in BATCH.items():
        if within(name, {f"bcseg_batch.{room}"}):
            assert not [i for i in imports(path) if within(i, {"torch"})], name


def test_threads_and_signals_live_in_the_service_alone() -> None:
    for name, path in BATCH.items():
        if within(
            name, {f"bcseg_batch.{room}" for room in ("segment", "intake", "store", "report")}
        ):
            found = [i for i in imports(path) if within(i, {"signal", "concurrent", "queue"})]
            assert not found, name


def test_image_formats_are_known_where_files_are_read_and_written_alone() -> None:
    of_the_store = (
        "images",
        "raster",
        "pixel_size",
        "encode",
        "stream",
        "provenance",
        "read_back",
        "drawings",
    )
    known = {f"bcseg_batch.store.{name}" for name in of_the_store}
    known.add("bcseg_batch.exchange.label_images")
    for name, path in BATCH.items():
        if within(name, {"bcseg_batch"}) and name not in known:
            assert not [i for i in imports(path) if within(i, {"tifffile", "imagecodecs"})], name
