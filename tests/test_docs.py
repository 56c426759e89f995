"""What is shown to users is true: commands, settings, names of errors and flags, links."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import typer
import typer.core
from daemons import wait_until
from shown import (
    ROOT,
    blocks,
    commands,
    documents,
    is_shell,
    name_of,
    spans,
    split_commands,
)

VENV = Path(sys.prefix)

# Commands that are not run from their page: how they begin, and where else they are tried: a file,
# and what has to stand in it.
TRIED_ELSEWHERE = {
    "make demo": (".ci/run", "make demo"),  # installs, from a network
    "make test": (".ci/run", "make test"),
    "make check": ("Makefile", "check: test lint types docs slow"),  # this very run, and more
    "make bench": ("tests/test_benchmarks.py", '"throughput"'),  # hours
    ".venv/bin/python benchmarks/NAME.py": ("tests/test_benchmarks.py", '"throughput"'),
    ".venv/bin/python benchmarks/scale.py": ("tests/test_scale.py", '"--price-machine-hour"'),
    # Need a cluster, or a bucket.
    ".venv/bin/bcseg-batch process-dir /mnt/smears": ("tests/test_ray_cluster.py", "--engine"),
    ".venv/bin/bcseg-batch process-dir s3://smears": ("tests/test_ray_cluster.py", "--engine"),
    "python3 -m venv .venv": ("Makefile", "-m venv .venv"),
    # From a network; `make demo` and `make test` have installed the same.
    ".venv/bin/python -m pip install '.[openvino,report,show]'": (
        "Makefile",
        "'.[openvino,report,show]'",
    ),
    ".venv/bin/python -m pip install '.[s3]'": ("pyproject.toml", ",s3,"),
    # Against a server on this machine.
    ".venv/bin/bcseg-batch process-dir s3://": ("tests/test_remote.py", "command(), *asked"),
    ".venv/bin/python -m pip install -e '.[report]'": ("Makefile", ",report,"),
    ".venv/bin/python -m pip install -e '.[train]'": ("pyproject.toml", ",train]"),
    ".venv/bin/python -m pip install -e '.[bench]'": ("Makefile", "'.[bench]'"),
    # CONTRIBUTING: writes into the checkout.
    '.venv/bin/python -c "from bcseg_batch.settings import render_example': (
        "tests/test_settings.py",
        "render_example()",
    ),
    # MODEL_CARD: on photographs that are not in the repository.
    "bcseg-train evaluate bcseg_batch/weights/default.safetensors ../shared": (
        "tests/test_evaluate.py",
        "data_dir",
    ),
}

# Pages with commands that are run elsewhere as a whole: they change the machine.
PAGES_ELSEWHERE = {"systemd/README.md": "tests/test_systemd_page.py"}

# Options that make a shown command long, and what is run in their place.
SHORTER = {"--lr 3e-4 --epochs 60": "--lr 3e-4 --epochs 1 --items 8 --crop-px 64"}

PAGES = [page for page in documents() if name_of(page) not in PAGES_ELSEWHERE]


def shown_here(page: Path) -> Iterator[tuple[str, str]]:
    """Give what a page's run takes up, in order: commands, and settings (`toml`)."""
    for language, text in blocks(page):
        if language == "toml":
            yield "toml", text
        elif is_shell(language):
            for command in split_commands(text):
                if not command.startswith(tuple(TRIED_ELSEWHERE)):
                    yield "command", command


class Desk:
    """A folder of its own in which a page is followed, as a newcomer does."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.daemons: list[subprocess.Popen[str]] = []
        (folder / ".venv").symlink_to(VENV)
        for name in ("samples", "bcseg_batch/weights"):
            shutil.copytree(ROOT / name, folder / name)

    def run(self, command: str) -> str:
        """Run a command to its end, and give what it printed."""
        done = subprocess.run(
            ["bash", "-c", command],
            cwd=self.folder,
            env=clean_environment(),
            capture_output=True,
            text=True,
            timeout=500,
            check=False,
        )
        assert done.returncode == 0, f"{command}: {done.returncode}\n{done.stdout}\n{done.stderr}"
        return done.stdout

    def write_settings(self, text: str) -> None:
        """Write shown settings as settings.toml, with the folders of the machine in this one."""
        text = re.sub(r'"(/[^"]+)"', lambda path: json.dumps(f"{self.folder}{path[1]}"), text)
        (self.folder / "settings.toml").write_text(text)
        for key in ("input", "output"):
            if found := re.search(rf'^{key} = "(.+)"', text, re.MULTILINE):
                Path(found[1]).mkdir(parents=True, exist_ok=True)

    def start(self, command: str) -> None:
        """Start a daemon that is never idle long enough, and give it two files to work on."""
        with (self.folder / "daemon.log").open("w") as log:
            daemon = subprocess.Popen(
                ["bash", "-c", f"exec {command}"],
                cwd=self.folder,
                env=clean_environment(),
                stdout=log,
                stderr=log,
                text=True,
            )
        self.daemons.append(daemon)
        source, output = self.folder / "srv/bcseg/in", self.folder / "srv/bcseg/out"
        (source / "night").mkdir()
        (source / "night/broken.jpg").write_text("no photograph")
        shutil.copy(ROOT / "samples/synth_00000.jpg", source / "a.jpg")

        def is_through() -> bool:
            assert daemon.poll() is None, (self.folder / "daemon.log").read_text()
            with contextlib.suppress(FileNotFoundError):
                lines = (output / "results.jsonl").read_text().splitlines()
                return {json.loads(line)["status"] for line in lines} == {"done", "failed"}
            return False

        wait_until(is_through, "one image is done, one has failed", timeout_s=300)

    def stop(self) -> None:
        """End the daemons as systemd or Ctrl-C does."""
        for daemon in self.daemons:
            daemon.send_signal(signal.SIGTERM)
            assert daemon.wait(180) == 0

    def close(self) -> None:
        for daemon in self.daemons:
            if daemon.poll() is None:
                daemon.kill()
            daemon.wait()


def clean_environment() -> dict[str, str]:
    return {key: value for key, value in os.environ.items() if not key.startswith("BCSEG_")}


@pytest.fixture
def desk(tmp_path: Path) -> Iterator[Desk]:
    """An empty desk with samples, weights and the `.venv`."""
    desk = Desk(tmp_path)
    yield desk
    desk.close()


@pytest.mark.slow
@pytest.mark.timeout(1500)
@pytest.mark.parametrize(
    "page",
    [page for page in PAGES if any(k == "command" for k, _ in shown_here(page))],
    ids=name_of,
)
def test_every_command_of_a_page_works_in_order(desk: Desk, page: Path) -> None:
    for kind, text in shown_here(page):
        if kind == "toml":
            if "[folders]" in text:
                desk.write_settings(text)
        elif " run " in text and "--until-idle" not in text:
            desk.start(text)
        elif "torch.cuda.is_available" in text:
            assert desk.run(text).strip() in {"True", "False"}
        else:
            for long, short in SHORTER.items():
                text = text.replace(long, short)  # noqa: PLW2901 - the same command, cut short
            told = desk.run(text)
            if " evaluate runs/demo" in text:
                found = re.search(r"dice\W+([0-9.]+)", told)
                assert found, told
                assert float(found[1]) > 0.8, told
    desk.stop()


def test_what_is_tried_elsewhere_is_shown_and_is_tried_there() -> None:
    shown = [text for page in PAGES for text in (*commands(page), *spans(page))]
    for start, (file, evidence) in TRIED_ELSEWHERE.items():
        assert any(text.startswith(start) for text in shown), f"no longer shown: {start}"
        assert evidence in (ROOT / file).read_text(encoding="utf-8"), (start, file)
    for long in SHORTER:
        assert any(long in " ".join(text.replace("\\\n", " ").split()) for text in shown), long
    for page, file in PAGES_ELSEWHERE.items():
        assert page in (ROOT / file).read_text(encoding="utf-8")


def test_a_whole_command_in_a_sentence_is_one_of_those_that_are_run() -> None:
    """`.venv/bin/...` can be copied and run; without it, it is the name of a command."""
    for page in PAGES:
        run = {" ".join(command.split()) for command in commands(page)}
        for span in spans(page):
            if re.match(r"\.venv/bin/\S+ ", span) and not span.startswith(tuple(TRIED_ELSEWHERE)):
                assert span in run, f"{name_of(page)}: `{span}` stands in no block"


def test_every_block_without_a_language_holds_commands() -> None:
    begins = re.compile(r"(\.venv/bin/\S+|make|mkdir|cp|python3|bcseg-train) ")
    for page in PAGES:
        for command in commands(page):
            assert begins.match(command), f"{name_of(page)}: {command}: name the block's language"


def test_every_option_that_a_page_names_is_there() -> None:
    """What stands in a sentence is not run, but it has to exist."""
    told: dict[str, set[tuple[str, str]]] = {"bcseg-batch": set(), "bcseg-train": set()}
    for page in documents():
        text = page.read_text(encoding="utf-8").replace("\\\n", " ")
        for program, command, rest in re.findall(
            r"(bcseg-(?:batch|train)) ([a-z][a-z-]+)([^`\n]*)", text
        ):
            options = re.findall(r"--[a-z][a-z0-9-]+", rest)
            told[program] |= {(command, option) for option in options}
            told[program].add((command, "--help"))
    for program, names in told.items():
        known = options_of(program)
        for command, option in sorted(names):
            if command in known:
                assert option in known[command], f"{program} {command} has no {option}"
        assert {command for command, _ in names} & known.keys(), program


def options_of(program: str) -> dict[str, set[str]]:
    """Give the options of each command of a program."""
    from bcseg_batch.cli import app as batch
    from bcseg_training.cli import app as train

    group = typer.main.get_command({"bcseg-batch": batch, "bcseg-train": train}[program])
    assert isinstance(group, typer.core.TyperGroup)
    context = typer.Context(group)
    found = {}
    for name in group.list_commands(context):
        command = group.get_command(context, name)
        assert command is not None
        options = {option for p in command.params for option in (*p.opts, *p.secondary_opts)}
        found[name] = options | {"--help"}
    return found


def test_settings_that_a_page_shows_are_settings(tmp_path: Path) -> None:
    from bcseg_batch.settings import Settings, load_settings

    file = tmp_path / "settings.toml"
    count = 0
    for page in documents():
        shown = [text for language, text in blocks(page) if language == "toml"]
        for span in spans(page):
            found = re.fullmatch(r"([a-z]+)\.([a-z_]+)(?: = (.+))?", span)
            if found is None or found[1] not in Settings.model_fields:
                continue
            section, key, value = found.groups()
            if key in {"py", "md"} or (ROOT / f"bcseg_batch/{section}/{key}.py").exists():
                continue  # a file or a module
            tree = type(getattr(Settings(), section)).model_fields
            assert key in tree, f"{name_of(page)}: there is no setting {span}"
            if value is not None:
                shown.append(f"[{section}]\n{key} = {value}\n")
        for text in shown:
            file.write_text(text, encoding="utf-8")
            load_settings(file, {}, {})
            count += 1
    assert count >= 8


def test_every_error_and_flag_is_explained_and_no_other() -> None:
    from bcseg_batch import errors

    page = (ROOT / "docs/troubleshooting.md").read_text(encoding="utf-8")
    there = {name for name, kind in vars(errors).items() if isinstance(kind, type)}
    of_images = {
        name
        for name in there
        if issubclass(getattr(errors, name), errors.ImageError) and name != "ImageError"
    }
    assert set(re.findall(r"^\| `(\w+Error)`", page, re.MULTILINE)) == of_images
    for document in documents():
        named = {span for span in spans(document) if re.fullmatch(r"[A-Z]\w+Error", span)}
        assert named <= there, name_of(document)

    source = (ROOT / "bcseg_batch/segment/quality.py").read_text(encoding="utf-8")
    flags = set(re.findall(r'Flag\(\s*"(\w+)"', source))
    assert len(flags) == 7
    for name in ("troubleshooting", "outputs"):
        rows = re.findall(
            r"^\| (`[^|]+`) \|",
            (ROOT / f"docs/{name}.md").read_text(encoding="utf-8"),
            re.MULTILINE,
        )
        assert flags <= {flag for row in rows for flag in re.findall(r"\w+", row)}, name


def test_every_exit_code_is_explained() -> None:
    from bcseg_batch import errors

    page = (ROOT / "docs/troubleshooting.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| ([\d, ]+) \|", page, re.MULTILINE)
    told = {int(code) for row in rows for code in row.split(",")}
    kinds = [kind for kind in vars(errors).values() if isinstance(kind, type)]
    assert {kind.exit_code for kind in kinds if issubclass(kind, errors.BcsegError)} <= told


def test_the_page_of_settings_is_the_one_of_the_settings_tree() -> None:
    from bcseg_batch.settings import render_reference

    assert (ROOT / "docs/settings.md").read_text(encoding="utf-8") == render_reference()


def test_the_site_is_whole_and_fetches_nothing(tmp_path: Path) -> None:
    done = subprocess.run(
        [VENV / "bin/mkdocs", "build", "--strict", "--quiet", "--site-dir", tmp_path / "site"],
        cwd=ROOT,
        env={**os.environ, "NO_MKDOCS_2_WARNING": "true"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    pages = sorted((tmp_path / "site").rglob("*.html"))
    assert len(pages) >= 15
    fetched = re.compile(r"""(?:src|<link[^>]*href)\s*=\s*["'](?:https?:)?//[^"']+""")
    for page in pages:
        text = page.read_text(encoding="utf-8")
        assert not fetched.findall(text), page.name
        for target in re.findall(r"""(?:src|href)=["']([^"'#:]+)["'#]""", text):
            assert target.startswith("/") or (page.parent / target).exists(), (page.name, target)
    for file in (tmp_path / "site").rglob("*"):
        if file.suffix in {".css", ".js"}:
            text = file.read_text(encoding="utf-8")
            assert not re.findall(r"url\([\"']?(?:https?:)?//|@import|fetch\(", text), file.name


def test_the_folders_and_files_that_the_docs_link_to_exist() -> None:
    for page in [*ROOT.glob("*.md"), *(ROOT / "docs").glob("**/*.md"), ROOT / "systemd/README.md"]:
        if not page.exists():
            continue
        for target in re.findall(r"\]\(([^)#:]+)\)", page.read_text(encoding="utf-8")):
            assert (page.parent / target).exists(), f"{page.name} links to {target}"


def test_the_changelog_names_the_version() -> None:
    from bcseg_batch.version import __version__

    assert f"## {__version__}" in (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
