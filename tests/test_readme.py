"""Every Python block of the README runs, in order, in one namespace."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from tests.markdown import blocks, execute

README = Path(__file__).resolve().parent.parent / "README.md"


@pytest.mark.ray
@pytest.mark.usefixtures("ray_cluster")
def test_python_blocks_run(tmp_path: Path) -> None:
    namespace: dict[str, Any] = {"STORAGE": str(tmp_path)}
    assert execute(README, namespace) == 3
    assert namespace["result"].done
    assert namespace["scheduler"].get_last_lr() == [namespace["schedule"].lr_at(0)]


def test_make_commands_exist() -> None:
    makefile = README.with_name("Makefile").read_text()
    for block in blocks(README, ""):
        for target in re.findall(r"^make (\S+)", block, re.MULTILINE):
            assert re.search(rf"^{target}:", makefile, re.MULTILINE), target
    images = re.findall(r"\]\((docs/[^)]+)\)", README.read_text())
    assert images
    assert all(
        README.with_name(image).exists() if "/" not in image else (README.parent / image).exists() for image in images
    )
