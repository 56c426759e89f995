"""The commands shown to users do what they say."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import typer
import typer.core

ROOT = Path(__file__).parents[1]
BIN = Path(sys.executable).parent


PAGES = (
    "README.md",
    *(f"docs/{name}.md" for name in ("quickstart", "report", "exports", "corrections", "training")),
)
"""Pages whose commands are run one after the other, each page in a folder of its own."""

# Commands in blocks of shell, which are not run from the page: how they begin, and what tries them
# instead.
TRIED_ELSEWHERE = {
    ".venv/bin/python -m pip install": "`make test` and `make demo` have installed by it",
    ".venv/bin/bcseg-batch run --settings": "tests/test_daemon.py runs it",
    ".venv/bin/bcseg-train train data --out runs/mine --init": (
        "hours on a processor; tests/test_train.py trains with each of these options"
    ),
    ".venv/bin/bcseg-train train my-set --out runs/mine --init": "the same",
    ".venv/bin/bcseg-train evaluate runs/mine/best.safetensors my-set/val": (
        "docs/training.md runs it with another data set"
    ),
    ".venv/bin/bcseg-batch process-dir samples results-mine": "docs/training.md runs it",
    ".venv/bin/bcseg-train export runs/mine": "tests/test_convert.py and tests/test_train_cli.py",
    "bcseg-batch status --settings /etc": "tests/test_nspawn.py, under systemd",
    "bcseg-batch failures --settings /etc": "tests/test_nspawn.py, under systemd",
    "bcseg-batch logs --settings /etc": "tests/test_nspawn.py, under systemd",
}


def code_blocks(text: str) -> list[tuple[str, list[str]]]:
    """Give the language and the lines of each block of code."""
    blocks = re.findall(r"^```(\w*)\n(.*?)^```$", text, flags=re.MULTILINE | re.DOTALL)
    return [(language, [line.strip() for line in block.splitlines()]) for language, block in blocks]


def shown_commands(text: str) -> list[str]:
    """Give the lines that call our programs in code blocks that name no language."""
    lines = [line for language, block in code_blocks(text) if not language for line in block]
    return [line for line in lines if line.startswith((".venv/bin/bcseg-", "mkdir ", "cp "))]


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("page", PAGES)
def test_every_command_of_a_page_works_in_order(tmp_path: Path, page: str) -> None:
    commands = shown_commands((ROOT / page).read_text(encoding="utf-8"))
    assert len(commands) >= 2
    shutil.copytree(ROOT / "samples", tmp_path / "samples")
    shutil.copytree(ROOT / "bcseg_batch/weights", tmp_path / "bcseg_batch/weights")
    environment = {k: v for k, v in os.environ.items() if not k.startswith("BCSEG_")}
    for command in commands:
        program, *arguments = shlex.split(command)
        program = str(BIN / Path(program).name) if "/" in program else program
        done = subprocess.run(
            [program, *arguments],
            cwd=tmp_path,
            env=environment,
            capture_output=True,
            text=True,
            timeout=300,
            check=False,
        )
        assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
        if " evaluate " in command and page == "README.md":
            found = re.search(r"dice\W+([0-9.]+)", done.stdout)
            assert found, done.stdout
            assert float(found[1]) > 0.8, done.stdout


def test_no_command_is_shown_that_nothing_tries() -> None:
    shown = []
    for page in documents():
        for language, lines in code_blocks(page.read_text(encoding="utf-8")):
            run_here = not language and page.relative_to(ROOT).as_posix() in PAGES
            shown += [line for line in lines if not run_here and re.match(r"\S*bcseg-\w+ \w", line)]
    tried = tuple(TRIED_ELSEWHERE)
    assert not [line for line in shown if not line.startswith(tried)]
    everything = "\n".join(page.read_text(encoding="utf-8") for page in documents())
    assert not [start for start in tried if start not in everything], "no longer shown"


def test_every_option_that_a_page_names_is_there() -> None:
    """What stands in a sentence is not run, but it has to exist."""
    told: dict[str, set[tuple[str, str]]] = {"bcseg-batch": set(), "bcseg-train": set()}
    for page in documents():
        text = page.read_text(encoding="utf-8")
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


def documents() -> list[Path]:
    """Give the pages that users read."""
    pages = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")), ROOT / "systemd/README.md"]
    # What was once tried stands there with the commands of that time.
    return [page for page in pages if page.name != "experiments.md"]


def test_the_page_of_settings_is_the_one_of_the_settings_tree() -> None:
    from bcseg_batch.settings import render_reference

    assert (ROOT / "docs/settings.md").read_text(encoding="utf-8") == render_reference()


def test_the_site_is_whole_and_fetches_nothing(tmp_path: Path) -> None:
    done = subprocess.run(
        [BIN / "mkdocs", "build", "--strict", "--quiet", "--site-dir", tmp_path / "site"],
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
    for sheet in (tmp_path / "site").rglob("*.css"):
        assert not re.findall(r"url\([\"']?(?:https?:)?//", sheet.read_text(encoding="utf-8"))


def test_the_folders_and_files_that_the_docs_link_to_exist() -> None:
    for page in [*ROOT.glob("*.md"), *(ROOT / "docs").glob("**/*.md"), ROOT / "systemd/README.md"]:
        if not page.exists():
            continue
        for target in re.findall(r"\]\(([^)#:]+)\)", page.read_text(encoding="utf-8")):
            assert (page.parent / target).exists(), f"{page.name} links to {target}"


def test_the_changelog_names_the_version() -> None:
    from bcseg_batch.version import __version__

    assert f"## {__version__}" in (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
