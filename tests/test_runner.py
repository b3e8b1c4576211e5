"""What `run` says before it begins, and when Tune has been interrupted; Tune itself is not started."""

from __future__ import annotations

import math
import os
from pathlib import Path
from typing import Any

import pytest
from ray import tune

import autolrs_ray
from autolrs_ray import TrainingTask
from autolrs_ray.driver import runner
from tests.fake_tune import Trainable
from tests.tasks import build_tiny


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"config": "abc"}, TypeError, "config must be a dict, got 'abc'"),
        (
            {"config": {"wd": tune.choice([1, 2])}},
            ValueError,
            r"config\['wd'\] = Categorical \[1, 2\]: only the learning",
        ),
        ({"config": {"seed": 1}, "seed": 2}, ValueError, r'two seeds: config\["seed"\] = 1 and seed=2'),
        ({"config": {"seed": 1.5}}, TypeError, "seed must be an int, got 1.5"),
        ({"seed": -1}, ValueError, "seed must be at least 0, got -1"),
        ({"trainable": None}, TypeError, r"trainable must be a function build\(config\) -> TrainingTask, .*, got None"),
        ({"trainable": "build"}, TypeError, "trainable must be a function .*, got 'build'"),
        ({"trainable": build_tiny({})}, TypeError, r"trainable must be a function .*, got TrainingTask\("),
        ({"trainable": TrainingTask}, TypeError, "trainable must be a function .*, got <class"),
        ({"max_failures": 1.5}, TypeError, "max_failures must be an int, got 1.5"),
        ({"max_failures": -2}, ValueError, "max_failures must be at least -1, got -2"),
        ({"callbacks": 3}, TypeError, "callbacks must be a list or tuple, got 3"),
        ({"callbacks": tune.Callback()}, TypeError, "callbacks must be a list or tuple, got <ray"),
        ({"callbacks": [tune.Callback]}, TypeError, "callbacks must be instances of ray.tune.Callback, got <class"),
        ({"callbacks": [print]}, TypeError, "callbacks must be instances of ray.tune.Callback, got <built-in"),
        ({"name": None}, TypeError, "name must be a string, got None"),
        ({"name": 7}, TypeError, "name must be a string, got 7"),
        ({"name": ""}, ValueError, "name must name a folder below storage_path, got ''"),
        ({"name": "../up"}, ValueError, "name must name a folder below"),
        ({"name": "/tmp/x"}, ValueError, "name must name a folder below"),
        ({"name": "n" * 300}, ValueError, "name must name a folder below"),
        ({"name": "a\0b"}, ValueError, "name must name a folder below"),
        ({"storage_path": ""}, ValueError, "a path must name a folder, got ''"),
        ({"storage_path": "a\0b"}, ValueError, r"a path must name a folder, got 'a\\x00b'"),
        ({"storage_path": "file://runs"}, ValueError, "'file://runs' names no folder of this machine: give"),
        ({"total_steps": 2.5}, TypeError, "total_steps must be an int, got 2.5"),
        ({"total_steps": 2**53 + 1}, ValueError, "total_steps must be at most 9007199254740992"),
        (
            {"total_steps": 10**15, "policy": "paper", "stage_steps": 10},
            ValueError,
            "are more than 100000 stages: are all",
        ),
        ({"num_lrs": 10**6}, ValueError, "num_lrs must be at most 1000"),
        ({"resources": {"cpu": -1}}, ValueError, r"resources\['cpu'\] must be a finite number in .*, got -1"),
        ({"resources": {"cpu": 1, "gpu": math.nan}}, ValueError, r"resources\['gpu'\] must be a finite number"),
        ({"resources": {"cpu": None}}, TypeError, r"resources\['cpu'\] must be a number, got None"),
        ({"resources": tune.PlacementGroupFactory([{"CPU": math.inf}])}, ValueError, r"resources\['CPU'\] must be"),
        ({"num_lr": 4}, TypeError, "has no option num_lr"),
        ({"storage_path": "s3://me:secret@bucket/x"}, ValueError, "holds a secret"),
    ],
)
def test_what_cannot_be_run_is_refused_before_anything_starts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: dict[str, Any], error: type[Exception], message: str
) -> None:
    monkeypatch.setattr(tune, "run", lambda *_, **__: pytest.fail("Tune was started"))
    with pytest.raises(error, match=message):
        autolrs_ray.run(**{"trainable": Trainable, "total_steps": 20, "storage_path": tmp_path, **options})


def test_a_ray_client_is_refused_in_a_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runner.client, "is_connected", lambda: True)
    with pytest.raises(RuntimeError, match=r"does not go through Ray Client \(ray://\).*`ray job submit`"):
        autolrs_ray.run(Trainable, 20)


def test_a_home_folder_is_meant_by_a_tilde_and_an_interruption_is_no_result(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given: dict[str, Any] = {}
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setattr(tune, "run", lambda _, **options: given.update(options))  # Tune swallows a Ctrl-C, and returns
    with pytest.raises(KeyboardInterrupt, match="interrupted at step 0 of 20; the same command continues"):
        autolrs_ray.run(Trainable, 20, storage_path="~/runs", progress=False)
    assert given["storage_path"] == f"{tmp_path}/runs"
    assert given["config"]["seed"] == 0
    assert "TUNE_DISABLE_STRICT_METRIC_CHECKING" not in os.environ
