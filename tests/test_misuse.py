"""Bad input ends in a clear error within seconds; nothing hangs."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from functools import cache
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
RACE: dict[str, Any] = {  # trainables that read config["lr"] once are right under it
    "policy": "anchored", "num_lrs": 4, "envelope": "constant", "warmup": 0.0, "commits": 2,
}  # fmt: skip
POLICIES = {"paper": PAPER, "anchored": RACE}
either_policy = pytest.mark.parametrize("policy", list(POLICIES))

Row = tuple[dict[str, Any], str]

EITHER: list[Row] = [
    ({"total_steps": 1}, "total_steps must be at least 2, got 1"),
    ({"total_steps": 10.0}, "total_steps must be an int, got 10.0"),
    ({"total_steps": True}, "total_steps must be an int, got True"),
    ({"policy": "papers"}, "policy must be one of .*, got 'papers'"),
    ({"policy": []}, r"policy must be one of .*, got \[\]"),
    ({"lr_interval": (0.1, 0.1)}, "min_lr must be below max_lr"),
    ({"lr_interval": (0.1, 0.01)}, "min_lr must be below max_lr"),
    ({"lr_interval": (0.0, 0.01)}, "min_lr must be a finite number"),
    ({"lr_interval": (1e-3, math.inf)}, "max_lr must be a finite number"),
    ({"lr_interval": (1e-3, math.nan)}, "max_lr must be a finite number"),
    ({"lr_interval": 0.1}, "lr_interval must be a pair"),
    ({"mode": "minimum"}, 'mode must be "min" or "max", got \'minimum\''),
    ({"mode": ""}, 'mode must be "min" or "max", got \'\''),
    ({"metric": 3}, "metric must be the name of a result key, got 3"),
    ({"metric": ""}, "metric must be the name of a result key, got ''"),
    ({"metric": []}, r"metric must be the name of a result key, got \[\]"),
    ({"time_attr": ""}, "time_attr must be the name of a result key, got ''"),
    ({"train_metric": ""}, "train_metric must be the name of a result key, got ''"),
    ({"train_metric": None}, "train_metric must be the name of a result key, got None"),
    ({"averaged_metric": 0}, "averaged_metric must be the name of a result key, got 0"),
    ({"averaged_metric": ["loss"]}, r"averaged_metric must be the name of a result key, got \['loss'\]"),
    ({"slots": 0}, "slots must be at least 1"),
    ({"slots": True}, "slots must be an int, got True"),
    ({"seed": -1}, "seed must be at least 0"),
    ({"resume": "yes"}, "resume must be False, True or \"auto\", got 'yes'"),
    ({"resume": 1}, 'resume must be False, True or "auto", got 1'),
    ({"resume": None}, 'resume must be False, True or "auto", got None'),
    ({"extend": "yes"}, "extend must be True or False, got 'yes'"),
    ({"extend": 2}, "extend must be True or False, got 2"),
    ({"extend": None}, "extend must be True or False, got None"),
    ({"report_timeout_s": 0.0}, "report_timeout_s must be a finite number"),
    ({"report_timeout_s": math.inf}, r"report_timeout_s must be a finite number in \(0.0, inf\), got inf"),
    ({"resource_timeout_s": -1.0}, "resource_timeout_s must be a finite number"),
    ({"num_lrs": 0}, "num_lrs must be at least 1"),
    ({"num_lrs": 2.5}, "num_lrs must be an int, got 2.5"),
    ({"envelope": "step"}, "unknown envelope 'step'"),
    ({"envelope": []}, r"unknown envelope \[\]"),
    ({"envelope": lambda step: -1.0}, "the envelope must be finite and >= 0"),
    ({"learning_rate": 0.1}, "has no option learning_rate"),
]
ONLY_PAPER: list[Row] = [
    ({"stage_steps": None}, "needs stage_steps"),
    ({"stage_steps": 0}, "stage_steps must be at least 1"),
    ({"stage_steps": 100, "max_stage_steps": 50}, "max_stage_steps must be at least stage_steps"),
    ({"probe_steps": 101}, "probe_steps must be at most stage_steps"),
    ({"probe_reports": 0}, "probe_reports must be at least 1"),
    ({"main_reports": "8"}, "main_reports must be an int, got '8'"),
    ({"kappa": -1.0}, "kappa must be a finite number"),
    ({"initial": "sobol"}, "initial must be one of"),
    ({"initial": []}, r"initial must be one of .*, got \[\]"),
    ({"fit": "mcmc"}, "fit must be one of"),
    ({"series": "test"}, 'series must be "authors" or "validation"'),
    ({"promote": "no"}, "promote must be True or False, got 'no'"),
    ({"warmup_steps": 1000}, "warmup_steps must be below total_steps"),
    ({"warmup_steps": 10}, "warmup_lr must be a finite number"),
    ({"rungs": (0.1,)}, "has no option rungs"),
    ({"effort": "thrifty"}, "has no option effort"),
]
ONLY_ANCHORED: list[Row] = [
    ({"commits": 0}, "commits must be at least 1"),
    ({"run_ahead": "yes"}, "run_ahead must be True or False, got 'yes'"),
    ({"warmup": -0.2}, r"warmup must be a finite number in \[0.0, 1.0\], got -0.2"),
    ({"warmup": 500}, r"warmup must be a finite number in \[0.0, 1.0\], got 500"),
    ({"warmup": True}, "warmup must be a number, got True"),
    ({"effort": "thrifty"}, "has no option effort"),
    ({"averaging": False}, "has no option averaging"),
    ({"stage_steps": 100}, "has no option stage_steps"),
]
ROWS = [
    *((policy, *row) for policy in POLICIES for row in EITHER),
    *(("paper", *row) for row in ONLY_PAPER),
    *(("anchored", *row) for row in ONLY_ANCHORED),
]


def search_by(policy: str, /, **options: Any) -> AutoLRSSearch:
    return AutoLRSSearch(**{"total_steps": 200, "lr_interval": (1e-2, 1.0), **POLICIES[policy], **options})


def start(trainable: Any, folder: Path, search: AutoLRSSearch | None = None, **options: Any) -> RunResult:
    search = search or search_by("paper")
    search.set_max_concurrency(1 if search.desk.settings.max_slots is None else search.desk.settings.max_slots)
    options = {"num_samples": -1, "reuse_actors": True, "verbose": 0, "config": {}, "max_failures": 0, **options}
    options.setdefault("scheduler", AutoLRSScheduler())
    tune.run(trainable, search_alg=search, storage_path=str(folder), name="run", **options)
    return RunResult.load(folder / "run")


def rows_of(result: RunResult) -> list[tuple[Any, ...]]:
    return [(row["end"], row["lr"], row["loss"]) for row in result.rows]


@pytest.mark.parametrize(("policy", "options", "message"), ROWS)
def test_constructor_names_the_value_and_the_mend(policy: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises((ValueError, TypeError), match=message):
        search_by(policy, **options)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory, ray_cluster: None) -> Callable[[str], list[tuple[Any, ...]]]:
    """The rows of a run under a policy that nobody disturbs."""

    @cache
    def rows(policy: str) -> list[tuple[Any, ...]]:
        return rows_of(start(ClassTrainable, tmp_path_factory.mktemp(policy), search_by(policy)))

    return rows


class Echoes(AutoLRSScheduler):
    """Tune delivers every result twice, and all that trials reported last once more after they have ended."""

    def __init__(self) -> None:
        super().__init__()
        self.ended: list[Any] = []

    def on_trial_result(self, tune_controller: Any, trial: Any, result: dict[str, Any]) -> str:
        for ended in self.ended:
            assert super().on_trial_result(tune_controller, ended, dict(ended.last_result)) == self.STOP
        verdict = super().on_trial_result(tune_controller, trial, result)
        if verdict != self.PAUSE:
            assert super().on_trial_result(tune_controller, trial, dict(result)) == verdict
        return verdict

    def on_trial_complete(self, tune_controller: Any, trial: Any, result: dict[str, Any]) -> None:
        super().on_trial_complete(tune_controller, trial, result)
        self.ended.append(trial)


@pytest.mark.ray
@pytest.mark.usefixtures("ray_cluster")
class TestOnRay:
    @pytest.fixture(autouse=True)
    def _within_seconds(self) -> Any:
        began = time.monotonic()
        yield
        assert time.monotonic() - began < 90.0

    @either_policy
    def test_too_few_samples(self, tmp_path: Path, policy: str) -> None:
        with pytest.raises(ValueError, match=r"num_samples=3 is too small.*Pass num_samples=-1"):
            start(ClassTrainable, tmp_path, search_by(policy), num_samples=3)

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
            start(trainables.CannotBeReused, tmp_path, search_by("paper", slots=2))

    def test_unequal_resources(self, tmp_path: Path) -> None:
        with pytest.raises(ValueError, match="trials ask for different resources"):
            start(trainables.ResourcesByRole, tmp_path)

    def test_checkpoints_that_tune_is_to_delete(self, tmp_path: Path) -> None:
        with pytest.raises(ValueError, match=r"num_to_keep=2\) has Tune delete .*leave num_to_keep out"):
            start(ClassTrainable, tmp_path, checkpoint_config=tune.CheckpointConfig(num_to_keep=2))
        kept = tune.CheckpointConfig(checkpoint_frequency=1, checkpoint_score_attribute="val_loss")
        assert start(ClassTrainable, tmp_path, checkpoint_config=kept).done  # Tune deletes none

    def test_resources_nobody_has(self, tmp_path: Path) -> None:
        search = search_by("paper", resource_timeout_s=1.0)
        with pytest.raises(AutoLRSError, match=r"each trial asks for .*64.*but the cluster has"):
            start(ClassTrainable, tmp_path, search, resources_per_trial={"cpu": 64})

    @either_policy
    def test_stop_that_ends_the_main_trial(self, tmp_path: Path, policy: str) -> None:
        with pytest.raises(
            AutoLRSError, match=r"the (main trial|last trunk|third trunk) .*for good .*it ended early, at step 150"
        ):
            start(ClassTrainable, tmp_path, search_by(policy), stop={"step": 150})

    @either_policy
    def test_trainable_that_ignores_the_learning_rate(self, tmp_path: Path, policy: str) -> None:
        with pytest.raises(AutoLRSError, match=r"does not use config\[\"lr\"\]"):
            start(trainables.IgnoresLR, tmp_path, search_by(policy))

    @either_policy
    def test_trainable_that_does_not_restore(self, tmp_path: Path, policy: str) -> None:
        search = search_by(
            policy,
        )
        with pytest.raises(ValueError, match=r"restored from a checkpoint at step \d+ reports step 10"):
            start(trainables.ForgetsItsState, tmp_path, search)

    def test_function_that_forgets_the_checkpoint(self, tmp_path: Path) -> None:
        with pytest.raises(AutoLRSError, match="without a checkpoint; its segment ended at 100"):
            start(trainables.forgets_the_checkpoint, tmp_path)

    def test_function_that_returns_before_its_segment_ends(self, tmp_path: Path) -> None:
        search = search_by("paper", probe_steps=50)
        with pytest.raises(AutoLRSError, match="none of the learning rates tried gave a finite loss"):
            start(trainables.stops_early, tmp_path, search)

    @pytest.mark.parametrize(("error", "max_failures"), [("OSError", 0), ("RuntimeError", 0), ("RuntimeError", 3)])
    def test_trainable_that_raises_in_setup(self, tmp_path: Path, error: str, max_failures: int) -> None:
        with pytest.raises(AutoLRSError, match=f"the first trials all raised {error}: no such data set: /data/nowhere"):
            start(trainables.RaisesInSetup, tmp_path, config={"error": error}, max_failures=max_failures)

    @pytest.mark.parametrize(
        ("policy", "config", "message"),
        [
            ("paper", {"omit": "step"}, 'does not report "step"'),
            ("anchored", {"report": {"val_loss": True}}, '"val_loss" must be a float, got True'),
            ("paper", {"report": {"val_loss": math.nan}}, "none of the learning rates tried gave a finite loss"),
            ("anchored", {"report": {"val_loss": -math.inf}}, "no learning rate is left in the race"),
        ],
    )
    def test_reports_that_cannot_be_used(
        self, tmp_path: Path, policy: str, config: dict[str, Any], message: str
    ) -> None:
        with pytest.raises((AutoLRSError, ValueError, TypeError), match=message):
            start(trainables.Reports, tmp_path, search_by(policy), config=config)

    def test_tensor_as_metric(self, tmp_path: Path) -> None:
        with pytest.raises(TypeError, match=r"call \.item\(\) on tensors"):
            start(trainables.TensorMetric, tmp_path)

    def test_negative_losses_are_fine(self, tmp_path: Path) -> None:
        assert start(trainables.Gain, tmp_path, search_by("paper", metric="gain", mode="max")).done

    @either_policy
    @pytest.mark.parametrize("slope", [1.0, -1.0])
    def test_best_learning_rate_at_a_bound(self, tmp_path: Path, policy: str, slope: float) -> None:
        result = start(trainables.Slopes, tmp_path, search_by(policy), config={"slope": slope})
        proposals = [event for event in result.events if event["event"] == "proposal"]
        assert all(1e-2 * 0.999999 <= event["lr"] <= 1.0 * 1.000001 for event in proposals)
        best = min if slope > 0 else max
        assert result.done
        for row in result.rows:
            assert row["lr"] == best(event["lr"] for event in proposals if event["stage"] == row["stage"])

    @either_policy
    def test_results_delivered_twice_or_after_completion(
        self, tmp_path: Path, policy: str, undisturbed: Callable[[str], list[tuple[Any, ...]]]
    ) -> None:
        scheduler = Echoes()
        result = start(ClassTrainable, tmp_path, search_by(policy), scheduler=scheduler)
        assert scheduler.ended
        assert rows_of(result) == undisturbed(policy)

    def test_results_that_tune_is_told_to_buffer(
        self,
        tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch,
        undisturbed: Callable[[str], list[tuple[Any, ...]]],
    ) -> None:
        monkeypatch.setenv("TUNE_RESULT_BUFFER_LENGTH", "4")
        with pytest.warns(UserWarning, match="buffer length was forcibly set to 1"):
            result = start(ClassTrainable, tmp_path)
        assert rows_of(result) == undisturbed("paper")

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
        search = search_by("paper", metric="val_loss")
        with pytest.raises(ValueError, match="two values for metric"):
            start(ClassTrainable, tmp_path, search, metric="train_loss", mode="min")

    def test_two_drivers_on_one_folder(self, tmp_path: Path) -> None:
        from autolrs_ray.record.record import Record

        record = Record(tmp_path / "run")
        with pytest.raises(RuntimeError, match="another process is driving"):
            start(ClassTrainable, tmp_path)
        record.close()

    def test_probe_that_never_reports_is_given_up(self, tmp_path: Path) -> None:
        search = search_by("paper", report_timeout_s=8.0)  # a loaded machine takes seconds to start an actor
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

    def test_killed_main_is_retried(self, tmp_path: Path, undisturbed: Callable[[str], list[tuple[Any, ...]]]) -> None:
        config = {"flag": str(tmp_path / "flag"), "kill": ["main", "probe"]}
        killed = start(trainables.KillsItself, tmp_path / "killed", config=config, max_failures=2)
        assert rows_of(killed) == undisturbed("paper")

    def test_run_without_an_experiment_to_resume(self, tmp_path: Path) -> None:
        with pytest.raises(FileNotFoundError, match="nothing to resume"):
            autolrs_ray.run(ClassTrainable, 200, storage_path=tmp_path, resume=True, progress=False, **PAPER)
