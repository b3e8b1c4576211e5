"""Code blocks of Markdown pages."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any


def blocks(page: Path, language: str) -> list[str]:
    """The fenced blocks of `page` marked with `language` ("": those without a mark), in order."""
    fenced = re.findall(r"^```(\w*)\n(.*?)^```$", page.read_text(), re.DOTALL | re.MULTILINE)
    return [content for mark, content in fenced if mark == language]


def execute(page: Path, namespace: dict[str, Any]) -> int:
    """Run the Python blocks of `page` in `namespace`, in order; returns how many there were. Errors name the page."""
    found = blocks(page, "python")
    for block in found:
        exec(compile(block, str(page), "exec"), namespace)
    return len(found)
