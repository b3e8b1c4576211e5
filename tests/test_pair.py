"""The pair on Ray for real: both APIs of Tune, every kind of trainable, any number of slots."""

from __future__ import annotations

import json
import os
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from ray import tune

import autolrs_ray
from autolrs_ray import AutoLRSScheduler, AutoLRSSearch, AutoLRSTrainable, RunResult, TrainingTask
from autolrs_ray.core.policies import make_policy
from autolrs_ray.record.checkpoints import read_checkpoint
from autolrs_ray.show.run_data import RunData
from autolrs_ray.training.local import run_local
from autolrs_ray.training.trainer import Trainer
from tests.tasks import build_tiny
from tests.trainables import ClassTrainable, function_trainable

pytestmark = [pytest.mark.ray, pytest.mark.usefixtures("ray_cluster")]

PAPER: dict[str, Any] = {"stage_steps": 100, "max_stage_steps": 200, "probe_steps": 20, "num_lrs": 4}
INTERVAL = (1e-2, 1.0)


def tune_run(trainable: Any, folder: Path, search: AutoLRSSearch, **options: Any) -> RunResult:
    """The plain `tune.run` of a user, without our helper."""
    options = {"num_samples": -1, "reuse_actors": True, "verbose": 0, "config": {}, **options}
    tune.run(
        trainable,
        search_alg=search,
        scheduler=AutoLRSScheduler(),
        storage_path=str(folder),
        name="run",
        **options,
    )
    return RunResult.load(folder / "run")


def actors(folder: Path) -> set[int]:
    """Process ids of all actors that reported in a run."""
    lines = [line for file in folder.glob("*/result.json") for line in file.read_text().splitlines()]
    return {json.loads(line)["pid"] for line in lines}


def committed(result: RunResult) -> list[tuple[int, float, float]]:
    return [(row["end"], row["lr"], row["loss"]) for row in result.rows]


def local_events(policy: str, total_steps: int, averaging: bool = False, **options: Any) -> Any:
    """The same run in a plain loop in this process: the reference."""
    trainer = Trainer(lambda: build_tiny({}), 0, averaging)
    run = run_local(make_policy(policy, total_steps, seed=0, **options), trainer)
    return run, trainer


class Environment(AutoLRSTrainable):
    """Reports whether its process has the variable that Tune sets for Lightning: then it is not one of Ray's idle ones."""

    def build(self, config: dict[str, Any]) -> TrainingTask:
        return build_tiny(config)

    def step(self) -> dict[str, Any]:
        return {**super().step(), "own_process": "PL_DISABLE_FORK" in os.environ}


@pytest.mark.parametrize("own_variables", [True, False])
def test_actors_begin_in_processes_that_ray_keeps_ready(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, own_variables: bool
) -> None:
    if own_variables:  # which Tune passes on to the actors' environment: then they need processes of their own
        monkeypatch.setenv("AWS_SESSION_TOKEN", "none")
    autolrs_ray.run(Environment, 40, num_lrs=2, storage_path=tmp_path, name="run", slots=2, progress=False)
    rows = [json.loads(row) for file in tmp_path.glob("run/*/result.json") for row in file.read_text().splitlines()]
    assert {row["own_process"] for row in rows} == {own_variables}


def test_tune_run_with_class_api_commits_every_stage(tmp_path: Path) -> None:
    search = AutoLRSSearch(400, policy="paper", lr_interval=INTERVAL, slots=4, **PAPER)
    result = tune_run(ClassTrainable, tmp_path, search, metric="val_loss", mode="min", config={"pause_s": 0.1})
    assert result.done
    assert [end for end, _, _ in committed(result)] == [100, 300, 400]
    assert result.timing.max_concurrent == 4
    probes = [event for event in result.events if event["event"] == "probe"]
    assert len(probes) == 12
    assert all(event["status"] == "done" for event in probes)
    for stage, row in enumerate(result.rows):
        assert row["lr"] == min((p["forecast"], p["lr"]) for p in probes if p["stage"] == stage)[1]


def test_tuner_with_function_api_takes_interval_and_metric_from_tune(tmp_path: Path) -> None:
    tuner = tune.Tuner(
        function_trainable,
        param_space={"lr": tune.loguniform(*INTERVAL)},
        tune_config=tune.TuneConfig(
            search_alg=AutoLRSSearch(300, policy="paper", **{**PAPER, "max_stage_steps": 100}),
            scheduler=AutoLRSScheduler(),
            num_samples=-1,
            metric="val_loss",
            mode="min",
            max_concurrent_trials=2,
        ),
        run_config=tune.RunConfig(name="run", storage_path=str(tmp_path), verbose=0),
    )
    grid = tuner.fit()
    assert not grid.errors
    result = RunResult.load(tmp_path / "run")
    assert result.done
    assert [end for end, _, _ in committed(result)] == [100, 200, 300]
    assert result.timing.max_concurrent <= 2
    assert all(INTERVAL[0] <= row["lr"] <= INTERVAL[1] for row in result.rows)


@pytest.mark.parametrize(
    ("slots", "reuse"),
    [(1, True), pytest.param(4, True, marks=pytest.mark.slow), pytest.param(2, False, marks=pytest.mark.slow)],
)
def test_same_schedule_whatever_actors_and_weights_of_the_plain_loop(tmp_path: Path, slots: int, reuse: bool) -> None:
    options = {"lr_interval": INTERVAL, **PAPER}
    result = autolrs_ray.run(
        build_tiny,
        300,
        policy="paper",
        storage_path=tmp_path,
        name="run",
        slots=slots,
        reuse_actors=reuse,
        progress=False,
        **options,
    )
    reference, trainer = local_events("paper", 300, concurrency=slots, **options)
    expected = [(e["end"], e["lr"], e["loss"]) for e in reference.events if e["event"] == "commit"]
    assert committed(result) == expected
    weights = read_checkpoint(result.checkpoint)["model"]
    assert all(torch.equal(weights[name], value) for name, value in trainer.model.state_dict().items())
    again = sum(event["event"] == "rollback" for event in result.events)  # main trains a stage that rose again
    assert len(actors(tmp_path / "run")) == (slots if reuse else 2 * (4 + 1) + again)  # two stages of 4 probes and main


def test_winning_probe_is_the_main_run_bit_for_bit(tmp_path: Path) -> None:
    options = {"lr_interval": INTERVAL, **PAPER}
    results = [
        autolrs_ray.run(
            build_tiny,
            300,
            policy="paper",
            storage_path=tmp_path,
            name=f"promote-{promote}",
            promote=promote,
            progress=False,
            **options,
        )
        for promote in (True, False)
    ]
    one, two = (read_checkpoint(result.checkpoint)["model"] for result in results)
    assert all(torch.equal(one[name], two[name]) for name in one)
    assert results[1].search_steps - results[0].search_steps == 20 + 40 + 0  # tau' of the stages that promote


def test_anchored_race_overlaps_and_trains_no_step_twice(tmp_path: Path) -> None:
    options = {"num_lrs": 6, "lr_interval": (1e-3, 1.0)}
    result = autolrs_ray.run(build_tiny, 300, storage_path=tmp_path, name="run", progress=False, **options)
    reference, trainer = local_events("anchored", 300, averaging=True, **options)
    expected = next(event for event in reference.events if event["event"] == "done")
    assert result.done
    assert (result.rows[-1]["lr"], result.loss) == (expected["lr"], expected["loss"])
    assert 2 <= len(actors(tmp_path / "run")) <= 4
    assert result.timing.max_concurrent > 1
    assert result.weights in ("raw", "averaged")
    trainer.model.load_state_dict(result.model_state())
    losses = result.rows[-1]["loss"], result.rows[-1]["averaged_loss"]
    assert trainer.evaluate()["loss"] == min(losses)
    winner = [event for event in result.events if event["event"] == "segment" and event["lr"] == expected["lr"]]
    trained = sorted((event["start"], event["end"]) for event in winner)
    assert trained[0][0] == 0
    assert trained[-1][1] == 300
    assert all(before[1] == after[0] for before, after in pairwise(trained))


def test_finished_run_is_extended_as_if_it_had_been_longer_from_the_start(tmp_path: Path) -> None:
    options = {"storage_path": tmp_path, "name": "run", "num_lrs": 3, "envelope": "wsd", "progress": False}
    options["lr_interval"] = (1e-3, 1.0)
    short = autolrs_ray.run(build_tiny, 200, **options)
    with pytest.raises(ValueError, match="total_steps: 200 -> 400"):
        autolrs_ray.run(build_tiny, 400, **options)
    longer = autolrs_ray.run(build_tiny, 400, extend=True, **options)
    assert longer.done
    assert longer.schedule.total_steps == 400
    assert [row["end"] for row in longer.rows if row["end"] <= 80] == [
        row["end"] for row in short.rows if row["end"] <= 80
    ]
    trainer = Trainer(lambda: build_tiny({}), 0)
    trainer.train(400, longer.schedule.lr_at)
    weights = read_checkpoint(longer.checkpoint)["model"]
    assert all(torch.equal(weights[name], value) for name, value in trainer.model.state_dict().items())


def test_fractional_gpus_share_and_a_metric_to_maximise(tmp_path: Path) -> None:
    result = autolrs_ray.run(
        build_tiny,
        200,
        storage_path=tmp_path,
        name="run",
        resources={"cpu": 0.5, "gpu": 0.5},
        metric="val_accuracy",
        mode="max",
        series="validation",
        progress=False,
        policy="paper",
        lr_interval=INTERVAL,
        **PAPER,
    )
    assert result.done
    assert len(actors(tmp_path / "run")) == 4
    assert -1.0 <= result.loss <= -0.5
    probes = [event for event in result.events if event["event"] == "probe"]
    assert all(-1.0 <= loss <= 0.0 for event in probes for loss in event["losses"])


def test_a_race_for_the_highest_accuracy_looks_at_that_of_raw_and_averaged_weights(tmp_path: Path) -> None:
    result = autolrs_ray.run(
        build_tiny, 200, storage_path=tmp_path, name="run", metric="val_accuracy", mode="max", lr_interval=(1e-4, 1.0),
        num_lrs=4, progress=False,
    )  # fmt: skip
    rungs = [event for event in result.events if event["event"] == "rung"]
    data = RunData.load(result.folder)
    for event in rungs:
        (row,) = (row for row in data.rows(event["arm"]) if row["step"] == event["step"])
        assert (-event["loss"], -event["averaged_loss"]) == (row["val_accuracy"], row["averaged_accuracy"])
    last = result.rows[-1]
    assert result.loss == min(last["loss"], last["averaged_loss"]) <= -0.6


@pytest.mark.parametrize(
    ("metric", "named", "key"),
    [(None, None, "averaged_loss"), ("val_loss", None, "averaged_loss"), ("val_accuracy", None, "averaged_accuracy"),
     ("loss", None, "averaged_loss"), ("val_loss", "ema_loss", "ema_loss")],
)  # fmt: skip
def test_the_metric_of_averaged_weights_is_named_after_the_metric(metric: str, named: str, key: str) -> None:
    search = AutoLRSSearch(100, metric=metric, averaged_metric=named)
    settings = search.desk.settings
    assert settings.keys.averaged == settings.describe()["averaged_metric"] == key


def test_run_continues_where_it_was_and_refuses_other_settings(tmp_path: Path) -> None:
    options = {
        "lr_interval": INTERVAL,
        "progress": False,
        "storage_path": tmp_path,
        "name": "run",
        "policy": "paper",
        **PAPER,
    }
    first = autolrs_ray.run(build_tiny, 300, **options)
    again = autolrs_ray.run(build_tiny, 300, **options)
    assert committed(again) == committed(first)
    with pytest.raises(ValueError, match="total_steps: 300 -> 400"):
        autolrs_ray.run(build_tiny, 400, **options)
    with pytest.raises(FileExistsError, match="holds a run already"):
        autolrs_ray.run(build_tiny, 300, resume=False, **options)


def test_storage_keeps_two_main_checkpoints_and_json_only(tmp_path: Path) -> None:
    result = autolrs_ray.run(
        build_tiny,
        500,
        policy="paper",
        storage_path=tmp_path,
        name="run",
        progress=False,
        lr_interval=INTERVAL,
        **PAPER,
    )
    kept = sorted(path.parent.name for path in (tmp_path / "run").glob("*/checkpoint_*"))
    assert len([name for name in kept if name.startswith("main")]) == 2
    assert len(kept) <= 4  # and at most the leading probe of the last stage
    json.loads((tmp_path / "run" / "autolrs_state.json").read_text())
    assert Path(result.checkpoint).exists()
