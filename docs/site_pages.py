"""Brings the pages of the repository that lie outside docs/ into the site, links included."""

from __future__ import annotations

import posixpath
import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).resolve().parents[1]
# Where each lies in the repository, by its page in the site.
OUTSIDE = {
    "index.md": "README.md",
    "model_card.md": "MODEL_CARD.md",
    "changelog.md": "CHANGELOG.md",
    "contributing.md": "CONTRIBUTING.md",
    "systemd.md": "systemd/README.md",
}
# Files that pages link to, to be taken as they are.
AS_THEY_ARE = tuple(f"cluster/{path.name}" for path in sorted((ROOT / "cluster").iterdir()))
_LINK = re.compile(r"(?<=\]\()([^)#:\s]+)")


def on_files(files: Files, *, config: Any) -> Files:
    """Add the pages and files; called by mkdocs."""
    for page, source in OUTSIDE.items():
        files.append(File.generated(config, page, abs_src_path=str(ROOT / source)))
    for path in AS_THEY_ARE:
        files.append(File.generated(config, path, abs_src_path=str(ROOT / path)))
    return files


def on_page_markdown(markdown: str, *, page: Any, **_: Any) -> str:
    """Turn links as they are right in the repository into those of the site; called by mkdocs."""
    source = OUTSIDE.get(page.file.src_uri, f"docs/{page.file.src_uri}")

    def moved(link: re.Match[str]) -> str:
        target = posixpath.normpath(posixpath.join(posixpath.dirname(source), link[1]))
        for name, outside in OUTSIDE.items():
            if target == outside:
                return name
        return target.removeprefix("docs/")

    return _LINK.sub(moved, markdown)
