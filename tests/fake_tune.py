"""Tune's side of the pair without Ray: a controller and trials that do what they are told, for tests of what we tell them."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from ray import tune
from ray.tune import PlacementGroupFactory
from ray.tune.experiment import Trial

from autolrs_ray import AutoLRSScheduler, AutoLRSSearch
from autolrs_ray.driver import slots, watchdog
from autolrs_ray.record.journal import read_journal

RACE: dict[str, Any] = dict(num_lrs=4, lr_interval=(1e-3, 1.0), envelope="constant", warmup=0.0, resume="auto")


class Trainable(tune.Trainable):
    """What the trials train; nothing ever runs it."""


class FakeTrial:
    """A trial; `error` is what its error file holds."""

    def __init__(self, trial_id: str, config: dict[str, Any], folder: Path, trainable: type = Trainable) -> None:
        self.trial_id, self.config, self.status = trial_id, config, Trial.PENDING
        self.placement_group_factory, self.max_failures = PlacementGroupFactory([{"CPU": 1}]), 3
        self.trainable_name, self.is_saving, self.last_result = trainable.__name__, False, {}
        self.error_file = str(folder / f"{trial_id}.txt")
        self.storage = SimpleNamespace(
            storage_filesystem=SimpleNamespace(type_name="local", delete_dir=lambda path: None),
            experiment_fs_path=str(folder / "run"), experiment_driver_staging_path=str(folder / "staging"),
            trial_fs_path=str(folder / "run" / trial_id), trial_dir_name=trial_id,
        )  # fmt: skip
        self.run_metadata = SimpleNamespace(
            checkpoint_manager=SimpleNamespace(_latest_checkpoint_result=None), metric_n_steps={}
        )
        self.temporary_state = SimpleNamespace(ray_actor=None)
        self._trainable = trainable

    def get_trainable_cls(self) -> type:
        return self._trainable

    @property
    def latest_checkpoint_result(self) -> Any:
        return self.run_metadata.checkpoint_manager._latest_checkpoint_result

    @property
    def checkpoint(self) -> Any:
        return self.latest_checkpoint_result and self.latest_checkpoint_result.checkpoint

    def set_config(self, config: dict[str, Any]) -> None:
        self.config = config

    def set_status(self, status: str) -> None:
        self.status = status

    def is_finished(self) -> bool:
        return self.status in (Trial.ERROR, Trial.TERMINATED)


class FakeTune:
    """tune.run's loop, a step at a time: `start` gives a trial a slot, `report` and `crash` are what it does then."""

    def __init__(
        self, folder: Path, monkeypatch: pytest.MonkeyPatch, search: AutoLRSSearch, cpus: int = 1, **config: Any
    ) -> None:
        for module in (slots, watchdog):
            monkeypatch.setattr(module, "node_resources", lambda: [{"CPU": float(cpus)}])
        monkeypatch.setattr(slots, "nodes_starting", lambda: None)
        self.folder, self.search_alg, self.scheduler, self.config = folder, search, AutoLRSScheduler(), config
        self.trials: list[FakeTrial] = []
        self.trainable: type = Trainable

    # what a controller offers
    def stop_trial(self, trial: Any) -> None:
        trial.status = Trial.TERMINATED

    def pause_trial(self, trial: Any, should_checkpoint: bool = True) -> None:
        trial.status = Trial.PAUSED

    def start(self) -> FakeTrial | None:
        """Once round the loop: the trial that runs then, if one is to."""
        found: Any = self.scheduler.choose_trial_to_run(self)
        if found is None:
            trial_id = f"trial{len(self.trials)}"
            suggested = self.search_alg.suggest(trial_id)
            if not isinstance(suggested, dict):
                return None
            found = FakeTrial(trial_id, {**self.config, **suggested}, self.folder, self.trainable)
            self.trials.append(found)
            self.scheduler.on_trial_add(self, found)
        if not self.search_alg.desk.knows(found.trial_id):
            return self.start()  # it belonged to an earlier life of the run
        found.status = Trial.RUNNING
        return found

    def report(self, trial: Any, step: Any, loss: Any, **more: Any) -> str:
        segment = self.search_alg.desk.segment(trial.trial_id)
        lr = segment.lr_at(max(0, step - 1)) if isinstance(step, int) and step < 10**6 else segment.lr
        result = {"step": step, "val_loss": loss, "lr": lr, "time_this_iter_s": 1.0, **more}
        return str(self.scheduler.on_trial_result(self, trial, result))

    def crash(
        self, trial: Any, error: str, again: bool = True, line: int = 5, code: str = "x", task: str = "train()"
    ) -> None:
        """The trial raises in `task` of its actor; again: Tune means to start it once more."""
        Path(trial.error_file).write_text(
            f"Failure # 1 (occurred)\nThe actor died because of an error raised in {task}, ray::T()\n"
            f'  File "/me/a.py", line {line}, in f\n    {code}\n{error}'
        )
        self.scheduler.on_trial_error(self, trial)
        if again:
            trial.status = Trial.PENDING
            self.scheduler.on_trial_add(self, trial)
            assert trial.status == Trial.PENDING, "Tune counts it as one of these"
        else:
            self.search_alg.on_trial_complete(trial_id=trial.trial_id, error=True)
            trial.status = Trial.ERROR

    def end(self, trial: Any, step: int, loss: float) -> None:
        """The trial reports done=True, or meets a stop criterion: Tune keeps the report to itself."""
        result = {"step": step, "val_loss": loss, "lr": self.search_alg.desk.segment(trial.trial_id).lr_at(step - 1)}
        self.scheduler.on_trial_complete(self, trial, result)
        self.search_alg.on_trial_complete(trial_id=trial.trial_id, result=result)
        trial.status = Trial.TERMINATED


class Begin:
    """Makes runs in one folder, each as a new process or cell would."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.folder, self.monkeypatch = folder, monkeypatch

    def __call__(
        self, cpus: int = 1, trainable: type = Trainable, config: dict[str, Any] | None = None, **options: Any
    ) -> FakeTune:
        search = AutoLRSSearch(200, **{**RACE, **options})
        run = FakeTune(self.folder, self.monkeypatch, search, cpus, **(config or {}))
        run.trainable = trainable
        return run

    @property
    def events(self) -> list[dict[str, Any]]:
        return read_journal(self.folder / "run")

    def told(self, *words: str) -> list[str]:
        """Messages in the journal with all of `words`."""
        messages = [str(event.get("message", "")) for event in self.events]
        return [message for message in messages if all(word in message for word in words)]


def first_step(run: FakeTune, trial: Any) -> int:
    """Where the trial's first boundary is."""
    return int(run.search_alg.desk.segment(trial.trial_id).boundaries[0])
