"""Records of every format that there has been: readers read them, a resume reads today's and refuses the others by name.

tools/golden_run.py writes those of today's version.
"""

from __future__ import annotations

import json
import re
import shutil
import warnings
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from autolrs_ray import LearnedSchedule, RunResult
from autolrs_ray.cli import app
from autolrs_ray.core.policies import make_policy
from autolrs_ray.record.journal import FORMAT, JOURNAL_FILE
from autolrs_ray.record.record import Record

RUNS = Path(__file__).parent / "golden"
GOLDEN = sorted(journal.parent for journal in RUNS.glob(f"*/*/{JOURNAL_FILE}"))


def number(folder: Path) -> int:
    return int(re.findall(r"\d+", folder.parent.name)[0])


def test_there_is_a_golden_run_of_each_policy_for_every_format() -> None:
    found = {(number(folder), folder.name) for folder in GOLDEN}
    assert found == {(n, policy) for n in range(1, FORMAT + 1) for policy in ("paper", "anchored")}


@pytest.fixture(params=GOLDEN, ids=lambda folder: f"{folder.parent.name}/{folder.name}")
def golden(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    folder = tmp_path / request.param.parent.name / request.param.name
    return Path(shutil.copytree(request.param, folder))


def lines(folder: Path, name: str) -> list[dict[str, Any]]:
    found = map(json.loads, (folder / JOURNAL_FILE).read_text().splitlines())
    return [event for event in found if event["event"] == name]


def test_every_reader_reads_it(golden: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        result, schedule = RunResult.load(golden), LearnedSchedule.load(golden)
    (done,) = lines(golden, "done")
    arm = done.get("arm", "main")
    commits = [event for event in lines(golden, "commit") if event.get("arm", "main") == arm]
    assert result.done
    assert (result.policy, result.loss, result.main_steps) == (golden.name, done["loss"], 40)
    assert [(row["end"], row["lr"]) for row in result.rows] == [(event["end"], event["lr"]) for event in commits]
    assert result.schedule == schedule
    for commit in commits:
        before = commit["lr"] * (1 - ((commit["end"] - 1) / 40) ** 2 if result.policy == "anchored" else 1)
        rise = min(1.0, commit["end"] / (commit.get("warmup_steps") or 1))
        assert schedule.lr_at(commit["end"] - 1) == pytest.approx(before * rise)
    assert str(result.checkpoint).endswith(f"{arm}_trial/checkpoint_000040")
    for command in ("show", "export", "report", "tensorboard"):
        told = CliRunner().invoke(app, [command, str(golden)])
        assert (told.exit_code, told.stderr) == (0, ""), (command, told.exception)
    (shown,) = [json.loads(CliRunner().invoke(app, ["show", "--json", str(golden)]).stdout)]
    assert len(shown.get("trunks", shown.get("stages"))) == {"anchored": 5, "paper": 2}[golden.name]


def test_a_resume_reads_todays_and_refuses_the_others_by_name(golden: Path) -> None:
    record = Record(golden)
    if number(golden) != FORMAT:
        with pytest.raises(
            RuntimeError, match=rf"format {number(golden)} is not {FORMAT}: end the run with the version that"
        ):
            record.load_state()
    else:
        state = record.load_state()
        policy = make_policy(golden.name, 40, **state["config"]["options"])
        policy.load_state_dict(state["state"])
        assert policy.done
        assert all(path.startswith(f"{golden}/") for path in policy.checkpoints())
        assert policy.checkpoints()
    record.close()
