"""A hook of mkdocs: links that lead out of docs/ become the names of files,
which the site does not have.

In the repository they work as links. A name that does not exist fails the build.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from mkdocs.exceptions import PluginError

ROOT = Path(__file__).parents[1]
_OUTWARD = re.compile(r"\[([^\]]*)\]\(\.\./([^)#]+)\)")


def on_page_markdown(markdown: str, *, page: Any, **_: object) -> str:
    """Replaces `[text](../FILE)` by FILE as code."""

    def named(match: re.Match[str]) -> str:
        if not (ROOT / match[2]).exists():
            raise PluginError(f"{page.file.src_path} links to {match[2]}, which does not exist")
        return f"`{match[2]}`"

    return _OUTWARD.sub(named, markdown)
