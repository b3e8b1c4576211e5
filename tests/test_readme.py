"""The README as a stranger takes it: its programs run as files of their own, its table is that of the results."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import autolrs_ray
from autolrs_ray import RunResult
from tests.markdown import blocks

ROOT = Path(__file__).resolve().parent.parent
README = ROOT / "README.md"
TEXT = README.read_text()
RESULTS = json.loads((ROOT / "experiments" / "results" / "compare.json").read_text())
TASKS = ("digits", "digits_noise", "char_lm", "cifar16")  # in the order of the table's columns
BEST_TUNED = "the best tuned row of each task"
ROWS = {
    "**anchored**, six decades, nothing tuned": "anchored",
    "the paper's AutoLRS, two decades around the default": "paper",
    "control: constant LR, *tuned*, averaged": "constant + averaged weights",
    "linear decay, *tuned*": "linear",
    "the best *tuned* row of each task, averaged or not": BEST_TUNED,
    "control: linear decay, *default* peak": "linear, default LR",
    "one-cycle, *default* peak": "one-cycle, default LR",
    "Ray Tune's PBT, 12 trials, 3 seeds": "PBT",
}  # the row's name -> the method's in the results


# -- programs ----------------------------------------------------------------------------------------------------------


@pytest.mark.ray
@pytest.mark.usefixtures("ray_cluster")
def test_its_programs_run_as_a_file_in_a_folder_of_the_readers(tmp_path: Path) -> None:
    import ray

    program = tmp_path / "program.py"
    program.write_text("\n".join(blocks(README, "python")))
    address = ray.get_runtime_context().gcs_address
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(
        [sys.executable, program],
        cwd=tmp_path,
        env={**environment, "RAY_ADDRESS": address},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert {path.name for path in (tmp_path / "runs").iterdir() if path.is_dir()} == {"ten-lines", "race"}
    lines, race = (RunResult.load(tmp_path / "runs" / name) for name in ("ten-lines", "race"))
    assert lines.done
    assert race.done
    assert lines.schedule.peak_lr == race.schedule.peak_lr
    assert f"{race.schedule.peak_lr} {race.compute} {race.checkpoint}" in done.stdout


def test_every_program_is_whole_and_uses_only_what_is_installed(tmp_path: Path) -> None:
    programs = blocks(README, "python")
    assert len(programs) == 2
    program = "\n".join(programs)
    assert not re.search(r"^(from|import) (tests|experiments|benchmarks)\b", program, re.MULTILINE), program
    (tmp_path / "program.py").write_text(program)
    command = [sys.executable, "-m", "ruff", "check", "--isolated", "--select", "F821,F401", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


def test_commands_and_files_that_it_names_exist() -> None:
    makefile = (ROOT / "Makefile").read_text()
    for block in blocks(README, ""):
        for target in re.findall(r"^make (\S+)", block, re.MULTILINE):
            assert re.search(rf"^{target}:", makefile, re.MULTILINE), target
    files = [target for target in re.findall(r"\]\(([^)#]+)\)", TEXT) if "//" not in target]
    assert len(files) > 10
    assert [file for file in files if not (ROOT / file).exists()] == []
    wheels = re.findall(r"autolrs_ray-(.+?)-py3-none-any\.whl", (ROOT / "docs" / "index.md").read_text())
    assert set(wheels) == {autolrs_ray.__version__}


# -- the table ---------------------------------------------------------------------------------------------------------


def results(method: str) -> dict[str, dict[str, Any]]:
    """Task -> its row in the results."""
    if method == BEST_TUNED:
        tuned = [row for row in RESULTS if row["tuned"] and row["group"] == "main"]
        return {task: min((row for row in tuned if row["task"] == task), key=mean) for task in TASKS}
    return {row["task"]: row for row in RESULTS if row["method"] == method and row["task"] in TASKS}


def mean(row: dict[str, Any]) -> float:
    return float(row["test_loss"][0])


def table() -> dict[str, list[str]]:
    """Row's name -> the cells after it."""
    lines = TEXT.split("## What it is worth")[1].split("Test loss, mean")[0].splitlines()
    rows = [[cell.strip() for cell in line.strip("|").split(" | ")] for line in lines if line.startswith("| ")]
    return {row[0]: row[1:] for row in rows[1:]}


def cell(row: dict[str, Any] | None, task: str) -> str:
    """A result as the table writes it."""
    if row is None:
        return "not run"
    loss, error = row["test_loss"]
    return f"{loss:.4f} ± {error:.4f}".replace("0.", ".") if task == "digits" else f"{loss:.3f} ± {error:.3f}"


def spread(values: list[float]) -> str:
    low, high = (f"{value:.1f}".removesuffix(".0") for value in (min(values), max(values)))
    return low if low == high else f"{low} to {high}"


@pytest.mark.parametrize("name", ROWS)
def test_the_table_holds_the_numbers_of_the_results(name: str) -> None:
    found = results(ROWS[name])
    compute, *losses = table()[name]
    assert compute == spread([row["compute"] for row in found.values()])
    assert [loss.replace("**", "") for loss in losses] == [cell(found.get(task), task) for task in TASKS]


def test_the_lowest_mean_of_every_task_is_bold_and_no_other() -> None:
    assert table().keys() == ROWS.keys()
    for column, task in enumerate(TASKS, start=1):
        means = {name: mean(results(method)[task]) for name, method in ROWS.items() if task in results(method)}
        lowest = [name for name, loss in means.items() if loss == min(means.values())]
        assert [name for name, cells in table().items() if "**" in cells[column]] == lowest


def test_the_cost_on_few_slots_and_many_is_that_of_the_results() -> None:
    lines = TEXT.split("What it costs on your machine")[1].splitlines()
    head, _, *rows = ([cell.strip() for cell in line.strip("|").split("|")] for line in lines if line.startswith("|"))
    costs = [row["slots"] for row in RESULTS if row["method"] == "anchored"]
    for i, name in enumerate(("compute, T", "wall-clock, T")):
        assert rows[i] == [name, *(spread([cost[slots][i] for cost in costs]) for slots in head[1:])]


def test_an_untuned_run_that_beats_anchored_is_named() -> None:
    ours = {task: mean(row) for task, row in results("anchored").items()}
    better = {row["method"] for row in RESULTS if row["compute"] == 1.0 and row["task"] in ours
              and mean(row) < ours[row["task"]]}  # fmt: skip
    named = TEXT.split("## What it is worth")[1].casefold()
    assert [method for method in better if method.split(",")[0].casefold() not in named] == []


def test_the_costs_named_for_the_example_are_those_it_prints(capsys: pytest.CaptureFixture[str]) -> None:
    _, example, text, *_ = (ROOT / "docs" / "choosing-a-policy.md").read_text().split("```")
    exec(example.removeprefix("python"), {})
    printed = re.findall(r"at most (\S+) T of compute", capsys.readouterr().out)
    assert printed == ["10.4", "5.9", "7.6"]
    assert [cost for cost in printed if f"{cost} T" not in text] == []
