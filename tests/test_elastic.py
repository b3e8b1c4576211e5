"""Trials that grow into free slots and shrink again, on a cluster of two slots: the run is the same run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

import autolrs_ray
from autolrs_ray import RunResult
from autolrs_ray.core.policies import make_policy
from autolrs_ray.driver import elastic
from autolrs_ray.training.local import run_local
from autolrs_ray.training.task import TrainingTask
from autolrs_ray.training.trainer import Trainer
from experiments import own_ddp
from tests.cluster.test_distributed import plain_task
from tests.races import alternating

pytestmark = [pytest.mark.ray, pytest.mark.usefixtures("ray_cluster")]

STEPS = 60
POLICIES: dict[str, dict[str, Any]] = {
    "anchored": {"num_lrs": 3, "lr_interval": (1e-2, 1.0), "commits": 2, "batch_growth": {0.5: 2}},
    "paper": {"num_lrs": 2, "lr_interval": (1e-2, 1.0), "stage_steps": 30, "max_stage_steps": 30, "probe_steps": 5},
}


def threads(output: torch.Tensor, target: torch.Tensor) -> float:
    return float(torch.get_num_threads())


def build(config: dict[str, Any]) -> TrainingTask:
    task = plain_task()
    task.metrics = {"threads": threads}
    return task


@pytest.fixture
def sizes_alternate(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(elastic, "best_units", alternating)


def widths(result: RunResult, arm: str | None = None) -> list[int]:
    """Workers, in order of the changes."""
    events = [event for event in result.events if event["event"] == "workers"]
    return [event["workers"] for event in events if arm in (None, event["arm"])]


def committed(events: list[dict[str, Any]]) -> list[tuple[int, float, float]]:
    """(step, LR, loss) of the run that the journal ends with."""
    arm = next(event for event in reversed(events) if event["event"] == "done").get("arm")
    return [(e["end"], e["lr"], e["loss"]) for e in events if e["event"] == "commit" and e.get("arm") == arm]


def troubles(events: list[dict[str, Any]]) -> list[str]:
    return [event["message"] for event in events if event["event"] in ("warning", "error")]


@pytest.mark.usefixtures("sizes_alternate")
@pytest.mark.parametrize("policy", ["anchored", pytest.param("paper", marks=pytest.mark.slow)])
def test_a_run_that_grows_chooses_and_ends_as_one_process_does(policy: str, tmp_path: Path) -> None:
    options = POLICIES[policy]
    result = autolrs_ray.run(
        build,
        STEPS,
        policy=policy,
        workers="elastic",
        slots=2,
        storage_path=tmp_path,
        name="run",
        progress=False,
        **options,
    )
    alone = run_local(
        make_policy(policy, STEPS, concurrency=2, **options), Trainer(plain_task, 0, policy == "anchored")
    )
    assert result.done
    assert max(widths(result)) == 2
    assert troubles(result.events) == troubles(alone.events)
    ours, theirs = committed(result.events), committed(alone.events)
    assert [row[:2] for row in ours] == [row[:2] for row in theirs]
    assert [row[2] for row in ours] == pytest.approx([row[2] for row in theirs], rel=1e-3)
    assert {event["workers"] for event in result.events if event["event"] == "segment"} == {1, 2}


def test_the_example_of_a_loop_of_ones_own_grows_and_ends_as_one_process_does(tmp_path: Path) -> None:
    options: dict[str, Any] = {"num_lrs": 1, "lr_interval": (1e-2, 1.0), "commits": 2, "slots": 2, "progress": False}
    resources = {"cpu": 1}
    grown = autolrs_ray.run(
        own_ddp.train, 60, workers="elastic", resources=resources, storage_path=tmp_path, name="grown", **options
    )
    fixed = autolrs_ray.run(own_ddp.train, 60, resources=resources, storage_path=tmp_path, name="fixed", **options)
    assert widths(grown) == [2]  # one alone has all slots from the start
    ours, theirs = committed(grown.events), committed(fixed.events)
    assert [row[:2] for row in ours] == [row[:2] for row in theirs]
    assert [row[2] for row in ours] == pytest.approx([row[2] for row in theirs], rel=1e-4)


def test_threads_are_workers_on_cpus(tmp_path: Path) -> None:
    result = autolrs_ray.run(
        build, 20, workers="elastic", threads=True, num_lrs=1, slots=2, storage_path=tmp_path, progress=False
    )
    assert result.done
    assert widths(result) == [2]
    (trial,) = Path(result.folder).glob("t00_*")
    assert json.loads((trial / "result.json").read_text().splitlines()[-1])["val_threads"] == 2
