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

ROOT = Path(__file__).parents[1]
BIN = Path(sys.executable).parent


def shown_commands(text: str) -> list[str]:
    """Give the lines that call our programs in code blocks that name no language."""
    blocks = re.findall(r"^```(\w*)\n(.*?)^```$", text, flags=re.MULTILINE | re.DOTALL)
    lines = [
        line.strip() for language, block in blocks if not language for line in block.splitlines()
    ]
    return [line for line in lines if line.startswith(".venv/bin/bcseg-")]


@pytest.mark.slow
def test_every_command_of_the_readme_works_in_order(tmp_path: Path) -> None:
    commands = shown_commands((ROOT / "README.md").read_text(encoding="utf-8"))
    assert len(commands) >= 8
    shutil.copytree(ROOT / "samples", tmp_path / "samples")
    environment = {k: v for k, v in os.environ.items() if not k.startswith("BCSEG_")}
    for command in commands:
        program, *arguments = shlex.split(command)
        program = str(BIN / Path(program).name)
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
        if " evaluate " in command:
            found = re.search(r"dice\W+([0-9.]+)", done.stdout)
            assert found, done.stdout
            assert float(found[1]) > 0.8, done.stdout


def test_the_folders_and_files_that_the_docs_link_to_exist() -> None:
    for page in [*ROOT.glob("*.md"), *(ROOT / "docs").glob("**/*.md"), ROOT / "systemd/README.md"]:
        if not page.exists():
            continue
        for target in re.findall(r"\]\(([^)#:]+)\)", page.read_text(encoding="utf-8")):
            assert (page.parent / target).exists(), f"{page.name} links to {target}"


def test_the_changelog_names_the_version() -> None:
    from bcseg_batch.version import __version__

    assert f"## {__version__}" in (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
