"""The layers of settings, their errors, and the texts that are made from them."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from parts import as_plain_user

from bcseg_batch.errors import SettingsError
from bcseg_batch.settings import (
    LoadedSettings,
    Settings,
    load_settings,
    render_example,
    render_settings,
    shaping_settings,
)

EXAMPLE = Path(__file__).parents[1] / "settings.example.toml"

# For each key three good values, none of them the default: one for each layer.
VALUES: dict[str, tuple[Any, Any, Any]] = {
    "model.file": ("/models/a.safetensors", "/models/b.safetensors", "/models/c.pth"),
    "model.device": ("cpu", "cuda:1", "mps"),
    "model.devices": (["cpu"], ["cuda:0", "cuda:1"], ["mps"]),
    "model.backend": ("torch", "openvino", "torch"),
    "model.dtype": ("float32", "bfloat16", "float16"),
    "model.threshold": (0.25, 0.5, 0.75),
    "processing.batch_size": (1, 16, 256),
    "processing.workers": (1, 2, 64),
    "processing.engine": ("ray", "local", "ray"),
    "ray.address": ("auto", "ray://head:10001", "10.0.0.1:6379"),
    "ray.actors": ("1", "1:16", "2:2"),
    "ray.cpus_per_actor": (0.5, 4.0, 64.0),
    "ray.gpus_per_actor": (0.0, 0.5, 1.0),
    "images.recursive": (False, False, False),
    "images.suffixes": ([".png"], [".tif", ".tiff"], [".webp"]),
    "images.ignore": (["a*"], ["b?"], ["c [1]", 'd"']),
    "images.max_pixels": (1, 1_000_000, 2_000_000_000),
    "images.page": (1, 2, 3),
    "images.tiling": ("never", "never", "never"),
    "images.pixel_size_um": (0.1, 0.25, 1.0),
    "outputs.cells": (False, False, False),
    "outputs.labels": (True, True, True),
    "outputs.outlines": (True, True, True),
    "outputs.probability": (True, True, True),
    "outputs.previews": (True, True, True),
    "outputs.parquet": (True, True, True),
    "outputs.composite": (False, False, False),
    "outputs.outline_colour": ([0, 0, 0], [255, 255, 255], [1, 2, 3]),
    "outputs.composite_format": ("png", "png", "png"),
    "outputs.composite_quality": (1, 50, 100),
    "outputs.colour": ([0, 0, 0], [255, 255, 255], [1, 2, 3]),
    "outputs.alpha": (0.0, 0.5, 1.0),
    "report.enabled": (True, True, True),
    "report.refresh_s": (1.0, 30.0, 86400.0),
    "report.group_pattern": ("(?P<group>a)", "(?P<group>[^/]+)/", "(?P<group>.)"),
    "report.min_cells": (1, 100, 100_000),
    "folders.input": ("/in/a", "/in/b", "/in/c"),
    "folders.output": ("/out/a", "/out/b", "/out/c"),
    "folders.state": ("/state/a", "/state/b", "/state/c"),
    "folders.archive": ("/archive/a", "/archive/b", "/archive/c"),
    "folders.quarantine": ("/bad/a", "/bad/b", "/bad/c"),
    "intake.mode": ("inotify", "poll", "inotify"),
    "intake.rescan_interval_s": (1.0, 30.0, 86400.0),
    "intake.poll_interval_s": (0.5, 1.0, 60.0),
    "intake.settle_s": (0.0, 2.0, 30.0),
    "intake.truncated_retries": (0, 1, 20),
    "intake.after_success": ("archive", "delete", "archive"),
    "intake.after_failure": ("quarantine", "quarantine", "quarantine"),
    "service.max_wait_s": (0.0, 1.0, 60.0),
    "service.max_attempts": (1, 2, 20),
    "service.shutdown_timeout_s": (1.0, 10.0, 3600.0),
    "service.stall_timeout_s": (5.0, 60.0, 600.0),
    "log.folder": ("/log/a", "/log/b", "/log/c"),
    "log.level": ("DEBUG", "WARNING", "ERROR"),
    "log.rotate_bytes": (10_000, 1_000_000, 1_000_000_000),
    "log.keep_files": (1, 5, 10_000),
    "metrics.port": (1, 9464, 65535),
    "metrics.address": ("0.0.0.0", "::1", "10.0.0.1"),
}
FLAGS = {
    "model.file": "--model",
    "model.device": "--device",
    "model.backend": "--backend",
    "model.dtype": "--dtype",
    "model.threshold": "--threshold",
    "processing.batch_size": "--batch-size",
    "processing.workers": "--workers",
    "processing.engine": "--engine",
    "ray.address": "--address",
    "ray.actors": "--actors",
    "ray.cpus_per_actor": "--cpus-per-actor",
    "ray.gpus_per_actor": "--gpus-per-actor",
    "images.recursive": "--recursive/--no-recursive",
    "images.pixel_size_um": "--pixel-size-um",
    "outputs.cells": "--cells/--no-cells",
    "outputs.labels": "--labels/--no-labels",
    "outputs.outlines": "--outlines/--no-outlines",
    "outputs.probability": "--probability/--no-probability",
    "outputs.composite": "--composite/--no-composite",
    "report.enabled": "--report/--no-report",
    "report.group_pattern": "--group-pattern",
    "report.min_cells": "--min-cells",
    "folders.input": "--input",
    "folders.output": "--output",
    "folders.state": "--state-dir",
    "log.folder": "--log-dir",
}
LAYERS = ("file", "environment", "flag")


def environment_name(key: str) -> str:
    return "BCSEG_" + key.replace(".", "__").upper()


def environment_text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def toml_text(values: Mapping[str, Any]) -> str:
    """Write the values as JSON, which for ASCII texts, numbers, booleans and lists is TOML."""
    lines = []
    for section in Settings.model_fields:
        lines.append(f"[{section}]")
        for key, value in values.items():
            if key.startswith(f"{section}."):
                lines.append(f"{key.split('.')[1]} = {json.dumps(value)}")
    return "\n".join(lines)


def plain(loaded: LoadedSettings) -> dict[str, Any]:
    """Key to value, in the types that JSON has."""
    sections = loaded.settings.model_dump(mode="json")
    return {
        f"{name}.{key}": value for name, keys in sections.items() for key, value in keys.items()
    }


def problems(
    file: Path | None = None,
    flags: Mapping[str, object] | None = None,
    environ: Mapping[str, str] | None = None,
) -> str:
    with pytest.raises(SettingsError) as caught:
        load_settings(file, flags or {}, environ or {})
    return str(caught.value)


@pytest.fixture
def settings_file(tmp_path: Path) -> Path:
    return tmp_path / "settings.toml"


DEFAULTS = plain(load_settings(None, {}, {}))


# ---------------------------------------------------------------------- layers


def test_each_key_is_tried() -> None:
    assert VALUES.keys() == DEFAULTS.keys()


@given(chosen=st.fixed_dictionaries({key: st.sets(st.sampled_from(LAYERS)) for key in VALUES}))
def test_highest_layer_that_gives_a_key_wins(
    chosen: dict[str, set[str]], tmp_path_factory: pytest.TempPathFactory
) -> None:
    path = tmp_path_factory.getbasetemp() / "precedence.toml"
    given_by = {
        layer: {key: VALUES[key][place] for key, layers in chosen.items() if layer in layers}
        for place, layer in enumerate(LAYERS)
    }
    path.write_text(toml_text(given_by["file"]))
    loaded = load_settings(
        path,
        {key: given_by["flag"].get(key) for key in VALUES},
        {environment_name(k): environment_text(v) for k, v in given_by["environment"].items()},
    )
    effective = plain(loaded)
    for key, layers in chosen.items():
        flag = FLAGS.get(key, f"--{key}")
        source, value = "default", DEFAULTS[key]
        if "file" in layers:
            source, value = f"file {path}", VALUES[key][0]
        if "environment" in layers:
            source, value = f"environment {environment_name(key)}", VALUES[key][1]
        if "flag" in layers:
            source, value = f"flag {flag}", VALUES[key][2]
        assert (effective[key], loaded.sources[key]) == (value, source), key


def test_environment_of_the_process_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BCSEG_MODEL__DEVICE", "cpu")
    monkeypatch.setenv("BCSEG_IMAGES__RECURSIVE", "off")
    settings = load_settings(None, {}).settings
    assert settings.model.device == "cpu"
    assert settings.images.recursive is False


def test_environment_names_the_settings_file(settings_file: Path, tmp_path: Path) -> None:
    settings_file.write_text("[images]\npage = 3\n")
    other = tmp_path / "other.toml"
    other.write_text("[images]\npage = 4\n")
    environ = {"BCSEG_SETTINGS": str(settings_file), "BCSEG_DATA": "/anything"}
    assert load_settings(None, {}, environ).settings.images.page == 3
    assert load_settings(other, {}, environ).settings.images.page == 4


def test_relative_model_starts_where_it_was_written(
    settings_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    monkeypatch.chdir(elsewhere)
    settings_file.write_text('[model]\nfile = "m.pth"\n')
    environ = {"BCSEG_MODEL__FILE": "m.pth"}
    by_relative_name = Path("../settings.toml")
    in_file = load_settings(by_relative_name, {}, {}).settings.model.file
    assert in_file is not None
    assert in_file.resolve() == tmp_path / "m.pth"
    assert in_file.is_absolute()
    assert load_settings(settings_file, {}, environ).settings.model.file == elsewhere / "m.pth"
    by_flag = load_settings(settings_file, {"model.file": Path("f.pth")}, environ)
    assert by_flag.settings.model.file == elsewhere / "f.pth"


def test_home_folder_is_expanded_in_every_layer(
    settings_file: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    settings_file.write_text('[model]\nfile = "~/m.pth"\n')
    for loaded in (
        load_settings(Path("~/settings.toml"), {}, {}),
        load_settings(None, {}, {"BCSEG_MODEL__FILE": "~/m.pth"}),
        load_settings(None, {"model.file": "~/m.pth"}, {}),
    ):
        assert loaded.settings.model.file == tmp_path / "m.pth"


def test_suffixes_are_normalised() -> None:
    loaded = load_settings(None, {}, {"BCSEG_IMAGES__SUFFIXES": '["TIF", ".tif", "png"]'})
    assert loaded.settings.images.suffixes == (".tif", ".png")


def test_byte_order_mark_is_no_error(settings_file: Path) -> None:
    settings_file.write_bytes(b"\xef\xbb\xbf[images]\npage = 1\n")
    assert load_settings(settings_file, {}, {}).settings.images.page == 1


def test_settings_cannot_be_changed() -> None:
    loaded = load_settings(None, {}, {})
    with pytest.raises(ValueError, match="frozen"):
        loaded.settings.images.page = 1


# ---------------------------------------------------------------------- unknown keys


@pytest.mark.parametrize(
    ("text", "unknown", "meant"),
    [
        ("[processing]\nbatchsize = 4", "processing.batchsize", "batch_size in [processing]"),
        ("[procesing]\nbatch_size = 4", "procesing.batch_size", "batch_size in [processing]"),
        ("batch_size = 4", "batch_size", "batch_size in [processing]"),
        ("[model]\npage = 0", "model.page", "page in [images]"),
        ("[Model]\nfile = 'x'", "Model.file", "file in [model]"),
        ("'model.file' = 'x'", '"model.file"', "file in [model]"),
    ],
)
def test_typing_error_in_the_file_is_named_with_what_was_meant(
    settings_file: Path, text: str, unknown: str, meant: str
) -> None:
    settings_file.write_text(text)
    expected = f"file {settings_file}: unknown setting {unknown}; did you mean {meant}?"
    assert problems(settings_file) == expected


@pytest.mark.parametrize("text", ["[banana]", "[zzz]\nqqqq = 1", "qqqq = 1"])
def test_unlike_anything_known_gets_no_suggestion(settings_file: Path, text: str) -> None:
    settings_file.write_text(text)
    message = problems(settings_file)
    assert "unknown setting" in message
    assert "did you mean" not in message


@pytest.mark.parametrize("text", ["model = 3", "[[model]]\nfile = 'x'"])
def test_section_that_is_none(settings_file: Path, text: str) -> None:
    settings_file.write_text(text)
    assert "model is a section: write [model]" in problems(settings_file)


@pytest.mark.parametrize(
    ("name", "meant"),
    [
        ("BCSEG_BATCH_SIZE", "BCSEG_PROCESSING__BATCH_SIZE"),
        ("BCSEG_MODEL_FILE", "BCSEG_MODEL__FILE"),
        ("BCSEG_model__file", "BCSEG_MODEL__FILE"),
        ("BCSEG_SETTING", "BCSEG_SETTINGS"),
    ],
)
def test_unknown_variable_is_named_with_what_was_meant(name: str, meant: str) -> None:
    message = problems(environ={name: "4"})
    assert message.startswith(f"environment {name}: ")
    assert message.endswith(f"did you mean {meant}?")


@given(name=st.from_regex(r"BCSEG_[A-Z_]{0,12}", fullmatch=True))
def test_any_unknown_variable_is_refused(name: str) -> None:
    known = {environment_name(key) for key in VALUES} | {"BCSEG_SETTINGS", "BCSEG_DATA"}
    if name not in known:
        assert name in problems(environ={name: ""})


def test_foreign_variables_are_left_alone() -> None:
    load_settings(None, {}, {"BCSEGX": "1", "PATH": "/bin", "XBCSEG_MODEL__FILE": ""})


def test_unknown_flag_is_refused() -> None:
    assert "did you mean --batch-size?" in problems(flags={"processing.batchsize": 4})


# ---------------------------------------------------------------------- wrong values


@pytest.mark.parametrize(
    ("key", "value", "allowed"),
    [
        ("model.file", "", "a path (it is empty)"),
        ("model.file", "a\0b", "a path (it has a zero byte in it)"),
        ("model.file", "~nobody-of-that-name/x", "a path (that user's home folder is not known)"),
        ("model.device", "gpu", "auto, cpu, cuda, cuda:N (N from 0) or mps"),
        ("model.device", "cuda:", "auto, cpu, cuda, cuda:N (N from 0) or mps"),
        ("model.dtype", "fp16", "auto, float32, bfloat16, float16 or int8"),
        ("ray.actors", "4:2", "MIN:MAX or a number (has to be at least 1, and MAX at least MIN)"),
        ("ray.actors", "0", "MIN:MAX or a number (has to be at least 1, and MAX at least MIN)"),
        ("ray.actors", "many", "MIN:MAX or a number (is no number and no MIN:MAX)"),
        ("ray.actors", "1:", "MIN:MAX or a number (is no number and no MIN:MAX)"),
        ("model.threshold", 0, "a number above 0 and below 1"),
        ("model.threshold", 1.0, "a number above 0 and below 1"),
        ("model.threshold", True, "a number above 0 and below 1"),
        ("processing.batch_size", 0, "a whole number from 1 to 256"),
        ("processing.batch_size", 257, "a whole number from 1 to 256"),
        ("processing.batch_size", True, "a whole number from 1 to 256"),
        ("processing.batch_size", "8", "a whole number from 1 to 256"),
        ("processing.batch_size", 8.5, "a whole number from 1 to 256"),
        ("processing.workers", 65, "a whole number from 1 to 64"),
        ("images.recursive", 1, "true or false"),
        ("images.suffixes", [], 'a list of suffixes such as ".tif", at least one'),
        ("images.suffixes", ".png", 'a list of suffixes such as ".tif", at least one'),
        (
            "images.suffixes",
            [".png", "a b"],
            'a list of suffixes such as ".tif", at least one ("a b" is not a single suffix)',
        ),
        ("images.ignore", [""], 'a list of patterns such as "*_draft.*"'),
        ("images.max_pixels", 0, "a whole number, at least 1"),
        ("images.page", -1, "a whole number, at least 0"),
        ("outputs.composite_format", "jpeg", "jpg or png"),
        ("outputs.composite_quality", 101, "a whole number from 1 to 100"),
        ("outputs.colour", [1, 2], "a list of 3, each a whole number from 0 to 255"),
        ("outputs.colour", [1, 2, 256], "a list of 3, each a whole number from 0 to 255"),
        ("outputs.alpha", 1.1, "a number from 0 to 1"),
    ],
)
def test_wrong_value_in_the_file(settings_file: Path, key: str, value: Any, allowed: str) -> None:
    settings_file.write_text(toml_text({key: value}))
    shown = json.dumps(value)
    expected = f"file {settings_file}: {key} is {shown}, but must be {allowed}"
    assert problems(settings_file).replace("\\\\", "\\") == expected


@pytest.mark.parametrize("value", ["nan", "inf", "-inf", "1979-05-27", "{ a = 1 }"])
def test_no_number_at_all(settings_file: Path, value: str) -> None:
    settings_file.write_text(f"[outputs]\nalpha = {value}\n")
    assert problems(settings_file).endswith("but must be a number from 0 to 1")


@pytest.mark.parametrize(
    ("key", "text", "allowed"),
    [
        ("model.file", "", "a path (it is empty)"),
        ("model.file", "\udcff", "a path (it is not valid UTF-8)"),
        ("processing.workers", "", "a whole number from 1 to 64"),
        ("processing.workers", "many", "a whole number from 1 to 64"),
        ("images.recursive", "maybe", "true or false"),
        ("outputs.colour", "1,2,3", "a whole number from 0 to 255, written as JSON"),
        ("outputs.colour", "[1, 2]", "a list of 3, each a whole number from 0 to 255"),
    ],
)
def test_wrong_value_in_the_environment(key: str, text: str, allowed: str) -> None:
    message = problems(environ={environment_name(key): text})
    assert message.startswith(f"environment {environment_name(key)}: {key} is ")
    assert allowed in message


def test_wrong_value_of_a_flag() -> None:
    expected = (
        "flag --batch-size: processing.batch_size is 0, but must be a whole number from 1 to 256"
    )
    assert problems(flags={"processing.batch_size": 0}) == expected


def test_all_problems_of_all_layers_are_told_at_once(settings_file: Path) -> None:
    settings_file.write_text("[images]\npage = -1\npages = 2\n[outputs]\nalpha = 'much'\n")
    lines = problems(
        settings_file,
        flags={"processing.workers": 0},
        environ={"BCSEG_OUTPUTS__COLOUR": "red", "BCSEG_HELLO": "1"},
    ).splitlines()
    assert lines[0] == "6 problems with the settings:"
    told = "\n".join(lines[1:])
    for part in ("images.page", "images.pages", "outputs.alpha", "BCSEG_OUTPUTS__COLOUR"):
        assert part in told
    assert "BCSEG_HELLO" in told
    assert "--workers" in told
    assert len(lines) == 7


def test_value_that_is_overridden_must_be_right_too(settings_file: Path) -> None:
    settings_file.write_text("[images]\npage = -1\n")
    assert "images.page is -1" in problems(settings_file, flags={"images.page": 1})


def test_endless_value_is_cut_short() -> None:
    assert len(problems(environ={"BCSEG_MODEL__DEVICE": "x" * 10_000})) < 250


# ---------------------------------------------------------------------- unreadable files


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("[images]\npage 3\n", "at line 2"),
        ("[images]\npage = 1\npage = 2\n", "at line 3"),
        ("[images]\n\nignore = [1, 2", "at line 3, the end of the file"),
        ("[images]\n[images]\n", "at line 2"),
    ],
)
def test_syntax_error_names_the_line(settings_file: Path, text: str, line: str) -> None:
    settings_file.write_text(text)
    message = problems(settings_file)
    assert message.startswith(f"file {settings_file}: not valid TOML: ")
    assert line in message


def test_file_that_is_not_utf8_names_the_line(settings_file: Path) -> None:
    settings_file.write_bytes("[images]\n# für\npage = 1\n".encode("latin-1"))
    expected = f"file {settings_file}: not UTF-8 text (at line 2); save it as UTF-8"
    assert problems(settings_file) == expected


def test_missing_file_is_an_error_and_not_the_defaults(settings_file: Path) -> None:
    message = problems(settings_file, environ={"BCSEG_NOPE": ""})
    assert f"file {settings_file}: cannot be read (No such file or directory)" in message
    assert "BCSEG_NOPE" in message
    by_environment = problems(environ={"BCSEG_SETTINGS": str(settings_file)})
    assert "(named by environment BCSEG_SETTINGS)" in by_environment


def test_empty_name_of_the_settings_file_is_an_error() -> None:
    assert problems(environ={"BCSEG_SETTINGS": ""}).startswith("environment BCSEG_SETTINGS: empty")


def test_folder_instead_of_a_file(tmp_path: Path) -> None:
    assert f"file {tmp_path}: cannot be read (Is a directory)" in problems(tmp_path)


def test_file_that_may_not_be_read(settings_file: Path) -> None:
    settings_file.write_text("")
    settings_file.chmod(0)
    with as_plain_user():
        assert "cannot be read (Permission denied)" in problems(settings_file)


@given(data=st.binary(max_size=60))
def test_any_bytes_give_settings_or_a_settings_error(
    data: bytes, tmp_path_factory: pytest.TempPathFactory
) -> None:
    path = tmp_path_factory.getbasetemp() / "any.toml"
    path.write_bytes(data)
    try:
        load_settings(path, {}, {})
    except SettingsError as error:
        told = str(error)
    else:
        told = str(path)
    assert str(path) in told


# ---------------------------------------------------------------------- texts

text = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=12)


@given(
    given_values=st.fixed_dictionaries(
        {},
        optional={
            "model.file": text.filter(lambda name: "\0" not in name and name[0] not in "~/"),
            "model.threshold": st.floats(0, 1, exclude_min=True, exclude_max=True),
            "images.ignore": st.lists(text, max_size=3),
            "images.suffixes": st.just(["PNG", ".tif"]),
            "images.max_pixels": st.integers(1, 10**30),
            "outputs.colour": st.lists(st.integers(0, 255), min_size=3, max_size=3),
            "outputs.alpha": st.floats(0, 1),
        },
    )
)
@example(given_values={"images.ignore": ['\x7f\x00\x85\u2028\r\n"\\'], "model.file": "\x7f#"})
def test_rendered_settings_load_back_the_same(
    given_values: dict[str, Any], tmp_path_factory: pytest.TempPathFactory
) -> None:
    loaded = load_settings(None, given_values, {"BCSEG_PROCESSING__WORKERS": "3"})
    path = tmp_path_factory.getbasetemp() / "rendered.toml"
    path.write_text(render_settings(loaded), encoding="utf-8", newline="")
    assert load_settings(path, {}, {}).settings == loaded.settings


def test_rendered_settings_say_where_each_came_from(tmp_path: Path) -> None:
    odd = tmp_path / "od\nd.toml"
    odd.write_text("[images]\npage = 1\n")
    rendered = render_settings(load_settings(odd, {"model.device": "cpu"}, {}))
    rows = [line for line in rendered.splitlines() if line and not line.startswith("[")]
    assert len(rows) == len(VALUES)
    assert len({line.index("# from ") for line in rows}) == 1
    sources = {line.split(" ")[0]: line.partition("# from ")[2] for line in rows}
    assert sources["page"] == f"file {tmp_path}/od\\nd.toml"
    assert sources["device"] == "flag --device"
    assert sources["alpha"] == "default"
    assert any(line.startswith("# file: the shipped model ") for line in rows)


def test_example_is_what_the_code_says() -> None:
    assert EXAMPLE.read_text(encoding="utf-8") == render_example()


def test_example_holds_the_defaults() -> None:
    loaded = load_settings(EXAMPLE, {}, {})
    assert loaded.settings == Settings()


def test_example_with_every_comment_taken_off_is_good_too(settings_file: Path) -> None:
    lines = EXAMPLE.read_text(encoding="utf-8").splitlines()
    settings_file.write_text(
        "\n".join(line[2:] if line.startswith("# ") and " = " in line else line for line in lines)
    )
    loaded = load_settings(settings_file, {}, {})
    assert set(loaded.sources.values()) == {f"file {settings_file}"}
    assert loaded.settings.model.file == settings_file.parent / "smears.safetensors"


def test_example_tells_each_variable_and_flag() -> None:
    lines = EXAMPLE.read_text(encoding="utf-8").splitlines()
    for key in VALUES:
        assert f"# Environment: {environment_name(key)}" in lines
    for flag in FLAGS.values():
        assert any(line.startswith(f"# Flag: {flag}") for line in lines)


# ---------------------------------------------------------------------- shaping


def test_exactly_the_settings_that_shape_the_outputs_count() -> None:
    before = shaping_settings(Settings())
    changing = {
        key
        for key, values in VALUES.items()
        if shaping_settings(load_settings(None, {key: values[0]}, {}).settings) != before
    }
    assert changing == {
        "model.backend",
        "model.dtype",
        "model.threshold",
        "images.page",
        "images.pixel_size_um",
        "images.tiling",
        "outputs.cells",
        "outputs.labels",
        "outputs.outlines",
        "outputs.probability",
        "outputs.previews",
        "outputs.composite",
        "outputs.composite_format",
        "outputs.composite_quality",
        "outputs.colour",
        "outputs.alpha",
        "report.enabled",
    }
    json.dumps(before)


def test_jpeg_quality_does_not_shape_a_png() -> None:
    png = load_settings(None, {"outputs.composite_format": "png"}, {})
    coarse = load_settings(
        None, {"outputs.composite_format": "png", "outputs.composite_quality": 1}, {}
    )
    assert shaping_settings(png.settings) == shaping_settings(coarse.settings)


def test_settings_are_loaded_without_the_heavy_parts() -> None:
    code = "import sys, bcseg_batch.settings; print({'torch', 'PIL', 'numpy'} & sys.modules.keys())"
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert ran.stdout.strip() == "set()"
