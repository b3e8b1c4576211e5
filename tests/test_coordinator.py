"""What the pair does when trials misbehave, driven report by report without Ray: the run ends truly, or goes on plainly."""

from __future__ import annotations

import math
import os
import re
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import ray
from ray.tune import Checkpoint, PlacementGroupFactory
from ray.tune.experiment import Trial
from ray.tune.search import ConcurrencyLimiter, Repeater
from ray.tune.trainable.function_trainable import FunctionTrainable

from autolrs_ray import AutoLRSError, AutoLRSScheduler
from autolrs_ray.core.events import Event
from autolrs_ray.driver import actors, coordinator
from tests.fake_tune import RACE, Begin, first_step

# -- reports -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("reports", "message"),
    [
        ([(5, 1.0), (50, 1.0), (5, 1.0)], '"step" went back from 50 to 5'),
        ([(1, 1.0)] * 11, "has reported step 1 11 times in a row"),
        ([(math.inf, 1.0)], '"step" must be a whole number'),
        ([(10**400, 1.0)], '"step" must be a whole number'),
        ([(10**9, 1.0)], "far past the 200 steps of the run"),
        ([(5, 10**400)], '"val_loss" must be a float'),
        ([(5, [1.0])], '"val_loss" must be a float'),
    ],
)
def test_reports_that_would_never_end_a_trial_end_the_run(begin: Begin, reports: list[Any], message: str) -> None:
    run = begin(lr_interval=(1e-3, 1e-1))
    trial = run.start()
    for step, loss in reports:
        assert run.report(trial, step, loss) in ("CONTINUE", "NOOP", "PAUSE")
    with pytest.raises((ValueError, TypeError), match=message):
        run.start()
    assert begin.told(message.partition("(")[0][:20])  # on record too


class Function(FunctionTrainable):  # type: ignore[misc]
    """What Tune makes of a function; nothing ever runs it."""


def test_a_function_that_never_attaches_a_checkpoint_is_told_so_where_the_run_would_end(begin: Begin) -> None:
    run = begin(trainable=Function)
    trial = run.start()
    for step in range(7, 200, 7):
        assert run.report(trial, step, 1.0 / step) == "CONTINUE"
    run.report(trial, 203, 0.005)
    with pytest.raises(AutoLRSError, match=r"t\d\d has trained all 200 steps .* Pass checkpoint= to tune.report"):
        run.start()


def test_amounts_that_no_node_can_have_end_the_run_before_it_has_begun(begin: Begin) -> None:
    begin.monkeypatch.setattr("tests.fake_tune.PlacementGroupFactory", lambda _: PlacementGroupFactory([{"CPU": -1}]))
    with pytest.raises(ValueError, match=r"resources\['CPU'\] must be a finite number .* got -1.0"):
        begin().start()
    assert not begin.folder.joinpath("run").exists()


def test_steps_and_losses_of_numpy_are_journaled_as_plain_numbers(begin: Begin) -> None:
    run = begin()
    trial = run.start()
    run.report(trial, np.int64(first_step(run, trial)), np.float32(0.5))
    run.start()
    assert run.search_alg.desk.failure is None
    assert begin.events


def test_any_other_exception_of_our_own_ends_the_run_with_a_clear_error(begin: Begin) -> None:
    run = begin()
    trial = run.start()

    def broken(*_: Any, **__: Any) -> None:
        raise RecursionError("too deep")

    begin.monkeypatch.setattr(run.search_alg.policy, "report", broken)
    assert run.report(trial, 5, 1.0) == "NOOP"
    with pytest.raises(AutoLRSError, match="RecursionError: too deep; please report this"):
        run.start()


def test_reports_further_apart_than_the_rungs_are_told_once_and_journaled_where_they_were_made(begin: Begin) -> None:
    run = begin()
    trial = run.start()
    first, _, third = run.search_alg.desk.segment(trial.trial_id).boundaries[:3]
    run.report(trial, third, 1.0)
    run.start()
    (told,) = begin.told("reports come too seldom", f"at step {third}", f"{first}, ")
    place, name = re.findall(r"(autolrs_ray[\w.]*)\.(\w+) names", told)[0]
    assert hasattr(import_module(place), name)
    read = [(event["step"], event["rung"]) for event in begin.events if event["event"] == Event.RUNG]
    assert {step for step, _ in read} == {third}
    assert len({rung for _, rung in read}) == len(read) > 1


def test_probes_that_report_once_an_epoch_are_told_to_be_dearer_than_was_said(begin: Begin) -> None:
    for name in ("envelope", "warmup"):
        begin.monkeypatch.delitem(RACE, name)
    run = begin(policy="paper", stage_steps=100, probe_steps=20)
    run.report(run.start(), 50, 1.0)
    run.start()
    assert begin.told("reports come too seldom", "for 20 steps and reported after 50", "2.5 times as many")


def test_a_scheduler_within_the_trainable_is_seen_under_the_papers_policy_too(begin: Begin) -> None:
    for name in ("envelope", "warmup"):
        begin.monkeypatch.delitem(RACE, name)
    run = begin(policy="paper", stage_steps=100, probe_steps=20)
    run.report(run.start(), 5, 1.0, lr=1e-7)
    with pytest.raises(ValueError, match="used the learning rate 1e-07 in place of"):
        run.start()


# -- ends --------------------------------------------------------------------------------------------------------------


class Saved:
    """An actor whose save() answers."""

    def __init__(self, folder: Path) -> None:
        self.save, self.folder = self, folder

    def remote(self) -> Saved:
        (self.folder / "w.json").write_text("[]")
        return self

    @property
    def checkpoint(self) -> Checkpoint:
        return Checkpoint.from_directory(self.folder)


@pytest.mark.parametrize("answers", [True, False])
def test_a_trial_that_says_done_at_its_segments_end_is_saved_and_counts(
    begin: Begin, tmp_path: Path, answers: bool
) -> None:
    begin.monkeypatch.setattr(ray, "get", lambda saved, timeout: saved)
    for name in ("envelope", "warmup"):
        begin.monkeypatch.delitem(RACE, name)
    run = begin(policy="paper", stage_steps=200, max_stage_steps=200, probe_steps=20, num_lrs=1)
    probe = run.start()
    run.end(probe, 20, 1.0)
    main = run.start()
    assert run.search_alg.desk.arm(main.trial_id) == "main"
    folder = tmp_path / "run" / "checkpoint"
    folder.mkdir()
    main.temporary_state.ray_actor = Saved(folder) if answers else None
    run.end(main, 200, 0.5)
    if answers:
        assert run.start() is None
        assert run.search_alg.policy.done
        assert begin.events[-1]["event"] == Event.DONE
    else:
        with pytest.raises(AutoLRSError, match=r"it ended early, at step 200 of 200: by returning or reporting done"):
            run.start()


def test_a_function_that_returns_without_a_report_is_told_so(begin: Begin) -> None:
    run = begin(num_lrs=1)
    trial = run.start()
    made_up = {"done": True, "trial_id": trial.trial_id}  # Tune's
    run.scheduler.on_trial_complete(run, trial, made_up)
    run.search_alg.on_trial_complete(trial_id=trial.trial_id, result=made_up)
    with pytest.raises(AutoLRSError, match="it ended early, before its first report: by returning"):
        run.start()


def test_trials_that_tune_ends_with_the_experiment_have_not_failed(begin: Begin) -> None:
    run = begin(cpus=2)
    one, two = run.start(), run.start()
    arms = {run.search_alg.desk.arm(trial.trial_id) for trial in (one, two)}
    run.report(one, 1, 1.0)
    one.status = two.status = Trial.TERMINATED  # time_budget_s: nobody is told
    run.search_alg._coordinator.look()
    assert not begin.told("failed")
    again = begin(cpus=2)
    assert {again.search_alg.desk.arm(trial.trial_id) for trial in (again.start(), again.start())} == arms


# -- slots -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("free", "starting", "released"), [(0.0, None, True), (1.0, None, False), (0.0, "actor", False)]
)
def test_a_slot_that_another_job_has_is_not_waited_for(
    begin: Begin, free: float, starting: str | None, released: bool
) -> None:
    now = [100.0]
    begin.monkeypatch.setattr(actors.time, "monotonic", lambda: now[0])
    begin.monkeypatch.setattr(ray, "available_resources", lambda: {"CPU": free})
    begin.monkeypatch.setattr(coordinator, "starting_actor", lambda controller, trial: starting)
    run = begin(cpus=2)
    one, two = run.start(), run.start()
    two.status = Trial.PENDING  # its resources are not to be had
    begin.monkeypatch.setattr(run.search_alg.policy, "report", lambda *_, **__: coordinator.Verdict.FINISH)
    run.report(one, 5, 1.0, node_ip="n", pid=os.getpid())
    for _ in range(3):
        now[0] += 1.5
        run.scheduler.choose_trial_to_run(run)
    assert (one.status == Trial.TERMINATED) is released
    now[0] += 30.0
    run.scheduler.choose_trial_to_run(run)
    assert one.status == Trial.TERMINATED  # in any case after a while


# -- the search --------------------------------------------------------------------------------------------------------


def test_a_repeater_around_the_search_is_refused_and_a_limiter_is_looked_through(begin: Begin) -> None:
    search = begin(num_lrs=2).search_alg
    with pytest.raises(ValueError, match="a Repeater trains every learning rate several times"):
        AutoLRSScheduler()._find_search(SimpleNamespace(search_alg=Repeater(search, repeat=2)))  # type: ignore[arg-type]
    limited = SimpleNamespace(search_alg=ConcurrencyLimiter(search, max_concurrent=1))
    assert AutoLRSScheduler()._find_search(limited) is search  # type: ignore[arg-type]
