"""Finds what the pages show to users: blocks of code, and the commands in them."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).parents[1]
_BLOCK = re.compile(r"^```(\w*)\n(.*?)^```$", flags=re.MULTILINE | re.DOTALL)
_LINE = re.compile(r"(?:[^\n]*\\\n)*[^\n]*")
_HERE = re.compile(r"[^\n]*<<'EOF'\n.*?^EOF$", flags=re.MULTILINE | re.DOTALL)


def documents() -> list[Path]:
    """Give the pages that users read."""
    pages = [*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md"), ROOT / "systemd/README.md"]
    # What was tried once stands in the one with the commands of that time; the other shows none.
    return sorted(page for page in pages if page.name not in {"experiments.md", "CHANGELOG.md"})


def name_of(page: Path) -> str:
    """Give a page's path in the repository."""
    return page.relative_to(ROOT).as_posix()


def blocks(page: Path) -> list[tuple[str, str]]:
    """Give the language and the text of each block of code, in order."""
    return _BLOCK.findall(page.read_text(encoding="utf-8"))


def is_shell(language: str) -> bool:
    """Say whether a block's lines are commands: those of shell, and those that name no language."""
    return language in {"", "sh"}


def split_commands(text: str) -> list[str]:
    """Give the commands of a block, with the lines that a backslash or a here-document adds."""
    found: list[str] = []
    while text:
        match = _HERE.match(text) or _LINE.match(text)
        assert match is not None
        command = match[0].strip()
        if command and not command.startswith("#"):
            found.append(command)
        text = text[match.end() + 1 :]
    return found


def commands(page: Path) -> list[str]:
    """Give the commands that a page shows in blocks."""
    return [
        command
        for language, text in blocks(page)
        if is_shell(language)
        for command in split_commands(text)
    ]


def spans(page: Path) -> list[str]:
    """Give what stands as code within sentences and tables."""
    prose = _BLOCK.sub("", page.read_text(encoding="utf-8"))
    return [" ".join(span.split()) for span in re.findall(r"`([^`]+)`", prose)]
