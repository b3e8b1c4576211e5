"""Bad input ends in a clear error within seconds; nothing hangs."""

from __future__ import annotations

import math
import time
from pathlib import Path
from typing import Any

import pytest
from ray import tune
from ray.tune.schedulers import FIFOScheduler

import autolrs_ray
from autolrs_ray import AutoLRSError, AutoLRSScheduler, AutoLRSSearch, RunResult
from tests import trainables
from tests.trainables import ClassTrainable

PAPER: dict[str, Any] = {"policy": "paper", "stage_steps": 100, "probe_steps": 20, "num_lrs": 4}


def start(trainable: Any, folder: Path, search: AutoLRSSearch | None = None, **options: Any) -> RunResult:
    search = search or AutoLRSSearch(200, lr_interval=(1e-2, 1.0), **PAPER)
    search.max_slots = search.max_slots or 1
    options = {"num_samples": -1, "reuse_actors": True, "verbose": 0, "config": {}, "max_failures": 0, **options}
    options.setdefault("scheduler", AutoLRSScheduler())
    tune.run(trainable, search_alg=search, storage_path=str(folder), name="run", **options)
    return RunResult.load(folder / "run")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"total_steps": 1}, "total_steps must be at least 2, got 1"),
        ({"total_steps": 10.0}, "total_steps must be an int, got 10.0"),
        ({"total_steps": True}, "total_steps must be an int, got True"),
        ({"policy": "papers"}, "policy must be one of"),
        ({"lr_interval": (0.1, 0.1)}, "min_lr must be below max_lr"),
        ({"lr_interval": (0.1, 0.01)}, "min_lr must be below max_lr"),
        ({"lr_interval": (0.0, 0.01)}, "min_lr must be a finite number"),
        ({"lr_interval": (1e-3, math.inf)}, "max_lr must be a finite number"),
        ({"lr_interval": (1e-3, math.nan)}, "max_lr must be a finite number"),
        ({"lr_interval": 0.1}, "lr_interval must be a pair"),
        ({"mode": "minimum"}, 'mode must be "min" or "max"'),
        ({"metric": 3}, "metric must be the name of a result key"),
        ({"time_attr": ""}, "time_attr must be the name of a result key"),
        ({"slots": 0}, "slots must be at least 1"),
        ({"seed": -1}, "seed must be at least 0"),
        ({"resume": "yes"}, "resume must be False, True or"),
        ({"report_timeout_s": 0.0}, "report_timeout_s must be a finite number"),
        ({"resource_timeout_s": -1.0}, "resource_timeout_s must be a finite number"),
        ({"stage_steps": None}, "needs stage_steps"),
        ({"stage_steps": 0}, "stage_steps must be at least 1"),
        ({"stage_steps": 100, "max_stage_steps": 50}, "max_stage_steps must be at least stage_steps"),
        ({"probe_steps": 101}, "probe_steps must be at most stage_steps"),
        ({"num_lrs": 0}, "num_lrs must be at least 1"),
        ({"kappa": -1.0}, "kappa must be a finite number"),
        ({"initial": "sobol"}, "initial must be one of"),
        ({"fit": "mcmc"}, "fit must be one of"),
        ({"series": "test"}, 'series must be "authors" or "validation"'),
        ({"warmup_steps": 1000}, "warmup_steps must be below total_steps"),
        ({"warmup_steps": 10}, "warmup_lr must be a finite number"),
        ({"envelope": "step"}, "unknown envelope 'step'"),
        ({"rungs": (0.1,)}, "has no option rungs"),
        ({"learning_rate": 0.1}, "has no option learning_rate"),
    ],
)
def test_constructor_names_the_value_and_the_mend(options: dict[str, Any], message: str) -> None:
    with pytest.raises((ValueError, TypeError), match=message):
        AutoLRSSearch(**{"total_steps": 200, **PAPER, **options})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rungs": (0.5, 0.2), "tolerances": (0.1, 0.1)}, "rungs must be increasing"),
        ({"rungs": (0.5,)}, "same length"),
        ({"rungs": (1.5,), "tolerances": (0.1,)}, "each rung must be a finite number"),
        ({"tolerances": (-0.1,), "rungs": (0.5,)}, "each tolerance must be a finite number"),
        ({"finalists": 0}, "finalists must be at least 1"),
        ({"infill": -1}, "infill must be at least 0"),
        ({"below": -2.0}, "below must be a finite number"),
        ({"envelope": lambda step: -1.0}, "the envelope must be finite and >= 0"),
        ({"stage_steps": 100}, "has no option stage_steps"),
    ],
)
def test_anchored_constructor_names_the_value(options: dict[str, Any], message: str) -> None:
    with pytest.raises((ValueError, TypeError), match=message):
        AutoLRSSearch(200, **options)


@pytest.mark.ray
@pytest.mark.usefixtures("ray_cluster")
class TestOnRay:
    @pytest.fixture(autouse=True)
    def _within_seconds(self) -> Any:
        began = time.monotonic()
        yield
        assert time.monotonic() - began < 90.0

    def test_too_few_samples(self, tmp_path: Path) -> None:
        with pytest.raises(ValueError, match=r"num_samples=3 is too small.*Pass num_samples=-1"):
            start(ClassTrainable, tmp_path, num_samples=3)

    def test_scheduler_without_its_searcher(self, tmp_path: Path) -> None:
        with pytest.raises(RuntimeError, match=r"AutoLRSScheduler runs with BasicVariantGenerator.*AutoLRSSearch"):
            tune.run(
                ClassTrainable, scheduler=AutoLRSScheduler(), config={"lr": 0.1}, verbose=0, storage_path=str(tmp_path)
            )

    def test_searcher_without_its_scheduler(self, tmp_path: Path) -> None:
        with pytest.raises(Exception, match=r"without its scheduler.*AutoLRSScheduler"):
            start(ClassTrainable, tmp_path, scheduler=FIFOScheduler())

    def test_reset_config_that_returns_false(self, tmp_path: Path) -> None:
        with pytest.raises(AutoLRSError, match=r"reset_config returns False.*reuse_actors=False"):
            start(trainables.CannotBeReused, tmp_path, AutoLRSSearch(200, lr_interval=(0.01, 1.0), slots=2, **PAPER))

    def test_unequal_resources(self, tmp_path: Path) -> None:
        with pytest.raises(ValueError, match="trials ask for different resources"):
            start(trainables.ResourcesByRole, tmp_path)

    def test_resources_nobody_has(self, tmp_path: Path) -> None:
        search = AutoLRSSearch(200, resource_timeout_s=1.0, **PAPER)
        with pytest.raises(AutoLRSError, match=r"each trial asks for .*64.*but the cluster has"):
            start(ClassTrainable, tmp_path, search, resources_per_trial={"cpu": 64})

    def test_stop_that_ends_the_main_trial(self, tmp_path: Path) -> None:
        with pytest.raises(AutoLRSError, match=r"the main trial failed for good .*it ended early, at step 150"):
            start(ClassTrainable, tmp_path, stop={"step": 150})

    def test_trainable_that_ignores_the_learning_rate(self, tmp_path: Path) -> None:
        with pytest.raises(AutoLRSError, match=r"does not use config\[\"lr\"\]"):
            start(trainables.IgnoresLR, tmp_path)

    def test_trainable_that_does_not_restore(self, tmp_path: Path) -> None:
        with pytest.raises(ValueError, match="restored from a checkpoint at step 20 reports step 10"):
            start(trainables.ForgetsItsState, tmp_path)

    def test_function_that_forgets_the_checkpoint(self, tmp_path: Path) -> None:
        with pytest.raises(AutoLRSError, match="without a checkpoint; its segment ended at 100"):
            start(trainables.forgets_the_checkpoint, tmp_path)

    def test_function_that_returns_before_its_segment_ends(self, tmp_path: Path) -> None:
        search = AutoLRSSearch(200, lr_interval=(0.01, 1.0), **{**PAPER, "probe_steps": 50})
        with pytest.raises(AutoLRSError, match="none of the learning rates tried gave a finite loss"):
            start(trainables.stops_early, tmp_path, search)

    def test_trainable_that_raises_in_setup(self, tmp_path: Path) -> None:
        with pytest.raises(AutoLRSError, match="no such data set: /data/nowhere"):
            start(trainables.RaisesInSetup, tmp_path)

    @pytest.mark.parametrize(
        ("config", "message"),
        [
            ({"omit": "step"}, 'does not report "step"'),
            ({"omit": "val_loss"}, 'does not report the metric "val_loss"'),
            ({"report": {"step": 1.5}}, '"step" must be a whole number'),
            ({"report": {"step": math.nan}}, '"step" must be a whole number'),
            ({"report": {"step": -10}}, '"step" must be a whole number'),
            ({"report": {"val_loss": True}}, '"val_loss" must be a float, got True'),
            ({"report": {"val_loss": "0.1"}}, "\"val_loss\" must be a float, got '0.1'"),
            ({"report": {"val_loss": math.nan}}, "none of the learning rates tried gave a finite loss"),
        ],
    )
    def test_reports_that_cannot_be_used(self, tmp_path: Path, config: dict[str, Any], message: str) -> None:
        with pytest.raises((AutoLRSError, ValueError, TypeError), match=message):
            start(trainables.Reports, tmp_path, config=config)

    def test_tensor_as_metric(self, tmp_path: Path) -> None:
        with pytest.raises(TypeError, match=r"call \.item\(\) on tensors"):
            start(trainables.TensorMetric, tmp_path)

    def test_negative_losses_are_fine(self, tmp_path: Path) -> None:
        search = AutoLRSSearch(200, metric="gain", mode="max", lr_interval=(0.01, 1.0), **PAPER)
        assert start(trainables.Gain, tmp_path, search).done

    def test_two_intervals(self, tmp_path: Path) -> None:
        with pytest.raises(ValueError, match="two intervals"):
            start(ClassTrainable, tmp_path, config={"lr": tune.loguniform(1e-4, 1e-1)})

    def test_lr_in_param_space_that_is_no_interval(self, tmp_path: Path) -> None:
        with pytest.raises(ValueError, match="would be overwritten"):
            start(ClassTrainable, tmp_path, config={"lr": 0.1})
        with pytest.raises(ValueError, match=r"must be tune\.loguniform"):
            start(ClassTrainable, tmp_path, config={"lr": tune.uniform(0.1, 0.2)})

    def test_anchored_race_needs_the_learning_rate_of_every_step(self, tmp_path: Path) -> None:
        def search() -> AutoLRSSearch:
            return AutoLRSSearch(500, num_lrs=3, lr_interval=(0.1, 1.5))

        with pytest.raises(ValueError, match=r"reports no lr: set every step's LR to autolrs_ray.lr_at"):
            start(trainables.NoLR, tmp_path / "no", search())
        with pytest.raises(ValueError, match=r"used the learning rate .*the envelope gives"):
            start(ClassTrainable, tmp_path / "constant", search())
        assert start(trainables.Enveloped, tmp_path / "right", search()).done

    def test_two_metrics(self, tmp_path: Path) -> None:
        search = AutoLRSSearch(200, metric="val_loss", **PAPER)
        with pytest.raises(ValueError, match="two values for metric"):
            start(ClassTrainable, tmp_path, search, metric="train_loss", mode="min")

    def test_two_drivers_on_one_folder(self, tmp_path: Path) -> None:
        from autolrs_ray.journal import Record

        record = Record(tmp_path / "run")
        with pytest.raises(RuntimeError, match="another process is driving"):
            start(ClassTrainable, tmp_path)
        record.close()

    def test_probe_that_never_reports_is_given_up(self, tmp_path: Path) -> None:
        search = AutoLRSSearch(200, lr_interval=(0.01, 1.0), report_timeout_s=3.0, **PAPER)
        result = start(trainables.Silent, tmp_path, search, config={"flag": str(tmp_path / "flag")})
        assert result.done
        assert any("has reported nothing for" in event.get("message", "") for event in result.events)

    def test_killed_probe_is_booked_and_killed_main_says_how_to_resume(self, tmp_path: Path) -> None:
        config = {"flag": str(tmp_path / "flag"), "kill": ["probe"]}
        result = start(trainables.KillsItself, tmp_path / "probe", config=config)
        assert result.done
        assert [event["status"] for event in result.events if event["event"] == "probe"].count("failed") == 1
        config = {"flag": str(tmp_path / "flag"), "kill": ["main"], "once": False}
        with pytest.raises(AutoLRSError, match=r"the main trial failed for good.*resume=\"auto\""):
            start(trainables.KillsItself, tmp_path / "main", config=config)

    def test_killed_main_is_retried(self, tmp_path: Path) -> None:
        config = {"flag": str(tmp_path / "flag"), "kill": ["main", "probe"]}
        killed = start(trainables.KillsItself, tmp_path / "killed", config=config, max_failures=2)
        whole = start(ClassTrainable, tmp_path / "whole")
        assert [(r["end"], r["lr"], r["loss"]) for r in killed.rows] == [
            (r["end"], r["lr"], r["loss"]) for r in whole.rows
        ]

    def test_run_without_an_experiment_to_resume(self, tmp_path: Path) -> None:
        with pytest.raises(FileNotFoundError, match="nothing to resume"):
            autolrs_ray.run(ClassTrainable, 200, storage_path=tmp_path, resume=True, progress=False, **PAPER)
