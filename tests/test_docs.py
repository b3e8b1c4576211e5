"""The documentation: its Python blocks run, its commands exist, its pages build without a warning."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import warnings
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.main import get_command

import autolrs_ray
from autolrs_ray.cli import app
from tests.markdown import blocks, execute

ROOT = Path(__file__).resolve().parent.parent
DOCS = ROOT / "docs"
ELSEWHERE = {"integrations.md"}  # pages whose blocks have tests of their own
PAGES = sorted(DOCS.glob("*.md"))


def nav() -> list[str]:
    """The pages in the order of the navigation."""
    entries = yaml.safe_load((ROOT / "mkdocs.yml").read_text())["nav"]
    return [entry if isinstance(entry, str) else next(iter(entry.values())) for entry in entries]


@pytest.fixture(scope="module")
def quick_cluster(request: pytest.FixtureRequest) -> Iterator[None]:
    """The cluster, with workers that have imported torch before they are wanted."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_preload_python_modules", "torch")
        yield request.getfixturevalue("ray_cluster")


@pytest.mark.ray
@pytest.mark.usefixtures("quick_cluster")
def test_the_python_blocks_run_as_one_session(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    namespace: dict[str, Any] = {"STORAGE": str(tmp_path)}
    monkeypatch.setattr(sys, "stderr", open(os.devnull, "w"))  # noqa: SIM115 - the live view writes there
    with warnings.catch_warnings():
        warnings.simplefilter("default")
        counts = {page: execute(DOCS / page, namespace) for page in nav() if page not in ELSEWHERE}
    assert {page for page, count in counts.items() if count} == {
        "index.md", "choosing-a-policy.md", "writing-a-trainable.md", "reading-the-report.md", "after-the-run.md"
    }  # fmt: skip
    assert {path.name for path in tmp_path.iterdir()} == {"first", "task", "class", "function", "replay"}
    assert (tmp_path / "first" / "report.html").exists()


def test_every_page_is_in_the_navigation_once() -> None:
    assert sorted(nav()) == [page.name for page in PAGES]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_commands_in_blocks_and_sentences_exist(page: Path) -> None:
    commands = get_command(app).commands  # type: ignore[attr-defined]
    text = "\n".join([*blocks(page, ""), *re.findall(r"`([^`\n]+)`", page.read_text())])
    for command in re.findall(r"^autolrs (\w+)", text, re.MULTILINE):
        assert command in commands, command
    makefile = (ROOT / "Makefile").read_text()
    for target in re.findall(r"^make ([\w-]+)", text, re.MULTILINE):
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), target


class Site(HTMLParser):
    """What a page would fetch, and the ids in it."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.fetched: list[str] = []
        self.ids: set[str] = set()
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        found = dict(attrs)
        self.ids.add(found.get("id") or "")
        if tag in ("script", "img", "iframe", "source") or (tag == "link" and found.get("rel") != "canonical"):
            self.fetched += [value for key in ("src", "href") if (value := found.get(key))]


def test_the_site_builds_without_a_warning_and_fetches_nothing_from_elsewhere(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path)]
    environment = {**os.environ, "NO_MKDOCS_2_WARNING": "1"}
    result = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment)
    assert result.returncode == 0, result.stderr
    sites = {file: Site(file.read_text()) for file in tmp_path.rglob("index.html")}
    assert len(sites) == len(PAGES)
    assert [url for site in sites.values() for url in site.fetched if "//" in url] == []
    documented = {name.rpartition(".")[2] for name in sites[tmp_path / "api" / "index.html"].ids}
    assert set(autolrs_ray.__all__) <= documented
