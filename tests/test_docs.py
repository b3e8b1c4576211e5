"""The documentation: its Python blocks run, its commands exist, its pages build without a warning."""

from __future__ import annotations

import json
import math
import os
import re
import subprocess
import sys
import warnings
from collections.abc import Iterator
from dataclasses import fields
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.main import get_command

import autolrs_ray
from autolrs_ray import LearnedSchedule
from autolrs_ray.cli import app
from autolrs_ray.core.envelopes import ENVELOPES
from autolrs_ray.outcome.schedule import Piece
from tests import doc_blocks
from tests.markdown import blocks, execute

ROOT = Path(__file__).resolve().parent.parent
DOCS = ROOT / "docs"
ELSEWHERE = {"integrations.md", "lightning.md", "huggingface.md"}  # pages whose blocks have tests of their own
SCHEDULE_FILE = DOCS / "schedule-file.md"
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


@pytest.mark.slow
@pytest.mark.ray
@pytest.mark.usefixtures("quick_cluster")
def test_the_python_blocks_run_as_one_session(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    namespace: dict[str, Any] = {"STORAGE": str(tmp_path)}
    monkeypatch.setattr(sys, "stderr", open(os.devnull, "w"))  # noqa: SIM115 - the live view writes there
    with warnings.catch_warnings():
        warnings.simplefilter("default")
        counts = {page: execute(DOCS / page, namespace) for page in nav() if page not in ELSEWHERE}
    assert {page for page, count in counts.items() if count} == {
        "fine-tuning.md", "one-machine.md", "notebook.md",
        "index.md", "choosing-a-policy.md", "writing-a-trainable.md", "reading-the-report.md", "after-the-run.md"
    }  # fmt: skip
    assert {path.name for path in tmp_path.iterdir()} == {
        "first", "mine", "task", "class", "function", "replay", "tuned", "weight-decay-0", "weight-decay-0.001", "notebook",
        "pretrained.pt",
    }  # fmt: skip
    assert (tmp_path / "first" / "report.html").exists()


def test_the_sections_of_integrations_are_executed_each_by_a_test(tmp_path: Path) -> None:
    namespace: dict[str, Any] = {"STORAGE": str(tmp_path)}
    here = "A narrower interval: the LR range test"
    for block in doc_blocks.blocks(here):
        exec(compile(block, "integrations.md", "exec"), namespace)
    assert (tmp_path / "range.png").exists()
    sections = re.findall(r"^## (.+)$", doc_blocks.PAGE.read_text(), re.MULTILINE)
    elsewhere = "".join(file.read_text() for file in Path(__file__).parent.glob("test_*.py") if file != Path(__file__))
    for section in sections:
        if section != here and doc_blocks.blocks(section):
            assert f'"{section}"' in elsewhere, section


# -- the schedule's file -----------------------------------------------------------------------------------------------


def cells(after: str) -> list[list[str]]:
    """The rows of the first table of the page on the schedule's file that comes after the text `after`, without its head."""
    text = SCHEDULE_FILE.read_text().split(after, 1)[1]
    lines = re.search(r"(?:^\|.*\n)+", text, re.MULTILINE)
    assert lines is not None
    return [[cell.strip(" `") for cell in line.strip("|").split("|")] for line in lines[0].splitlines()[2:]]


def test_the_documented_schedule_is_read_with_the_learning_rates_that_the_page_names() -> None:
    (text,) = blocks(SCHEDULE_FILE, "json")
    schedule = LearnedSchedule.from_json(text)
    assert json.loads(schedule.to_json()) == json.loads(text), "what is written has the documented fields and no others"
    page = SCHEDULE_FILE.read_text()
    steps, lrs = (re.findall(r"[\d.]+", line) for line in re.findall(r"^\| (?:step|LR) (\|.*)$", page, re.MULTILINE))
    assert len(steps) == len(lrs) == 9
    assert [schedule.lr_at(int(step)) for step in steps] == pytest.approx([float(lr) for lr in lrs], rel=1e-4)


def test_the_documented_fields_are_those_of_the_file() -> None:
    assert [row[0] for row in cells("```json")] == ["format", "total_steps", "pieces"]
    assert [row[0] for row in cells("and of each piece")] == [field.name for field in fields(Piece)]
    optional = [row[0] for row in cells("and of each piece") if "left out" in row[3]]
    piece = {field.name: 1 for field in fields(Piece)} | {"start": 0, "envelope": None}
    for name in piece:
        text = json.dumps(
            {"format": 1, "total_steps": 9, "pieces": [{k: v for k, v in piece.items() if k != name}], "note": 1}
        )
        if name in optional:
            assert LearnedSchedule.from_json(text).pieces
        else:
            with pytest.raises(ValueError, match=name):
                LearnedSchedule.from_json(text)


def test_the_documented_envelopes_are_those_of_the_code() -> None:
    formulas = {row[0].strip('"'): row[1].replace("^", "**") for row in cells("or 1 where warmup_steps is 0")}
    assert formulas.pop("null") == "1"
    assert formulas.keys() == ENVELOPES.keys()
    for name, formula in formulas.items():
        for u in (0.0, 0.2, 0.4, 0.5, 0.9, 1.0):
            assert eval(formula, {"u": u, "min": min, "cos": math.cos, "pi": math.pi}) == pytest.approx(
                ENVELOPES[name](u)
            )


def test_the_documented_csv_is_held_from_row_to_row(tmp_path: Path) -> None:
    (text,) = blocks(SCHEDULE_FILE, "csv")
    (tmp_path / "s.csv").write_text(text)
    (tmp_path / "wide.csv").write_text(text.replace("\n", ",7\n").replace("lr,7", "lr,note"))
    for file in ("s.csv", "wide.csv"):
        schedule = LearnedSchedule.load(tmp_path / file)
        assert [schedule.lr_at(step) for step in (0, 99, 100, 299, 300, 999)] == [0.1, 0.1, 0.05, 0.05, 0.01, 0.01]
        assert schedule.total_steps == 301


# -- the pages ---------------------------------------------------------------------------------------------------------


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
