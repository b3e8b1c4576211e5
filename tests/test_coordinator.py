"""What the pair does when trials misbehave, driven report by report without Ray: the run ends truly, or goes on plainly."""

from __future__ import annotations

import math
import os
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import ray
from ray.tune import Checkpoint
from ray.tune.experiment import Trial

from autolrs_ray import AutoLRSError, AutoLRSSearch
from autolrs_ray.core.events import Event
from autolrs_ray.driver import actors, coordinator
from autolrs_ray.record.journal import read_journal
from tests.fake_tune import FakeTune, Trainable

RACE: dict[str, Any] = dict(num_lrs=4, lr_interval=(1e-3, 1.0), envelope="constant", warmup=0.0, resume="auto")


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


@pytest.fixture
def begin(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    coordinator._driving.clear()
    monkeypatch.setattr(coordinator.surrogate, "preload", lambda: None)
    yield Begin(tmp_path, monkeypatch)
    coordinator._driving.clear()


def first_step(run: FakeTune, trial: Any) -> int:
    """Where the trial's first boundary is."""
    return int(run.search_alg.desk.segment(trial.trial_id).boundaries[0])


# -- crashes -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "error", ["NameError: name 'model' is not defined", "TypeError: f() missing 1 argument", "KeyError: 'a'"]
)
def test_a_plain_mistake_ends_a_run_that_has_reported_nothing_at_its_first_crash(begin: Begin, error: str) -> None:
    run = begin()
    run.crash(run.start(), error, code="model.train()")
    with pytest.raises(AutoLRSError, match="the first trial raised " + error[:9]) as raised:
        run.start()
    assert "/me/a.py, line 5, in f: model.train()" in str(raised.value)
    assert len(run.trials) == 1


def test_two_arms_whose_files_are_missing_end_it_and_say_where_trials_run(begin: Begin) -> None:
    run = begin(cpus=2)
    for _ in range(2):
        run.crash(run.start(), "FileNotFoundError: [Errno 2] No such file or directory: 'data.npy'")
    with pytest.raises(
        AutoLRSError, match=r"the first trials all raised FileNotFoundError.*trials run in a folder of their own"
    ):
        run.start()


def test_a_mistake_that_comes_late_ends_its_arm_only_and_is_not_tried_a_third_time(begin: Begin) -> None:
    run = begin(cpus=2)
    one, two = run.start(), run.start()
    run.report(two, first_step(run, two), 1.0)
    for _ in range(2):
        assert run.search_alg.desk.failure is None
        run.crash(one, "KeyError: 'batch 7'")
    run.scheduler.choose_trial_to_run(run)
    assert not run.search_alg.desk.knows(one.trial_id)
    assert one.status == Trial.TERMINATED  # Tune meant to start it again
    assert begin.told("failed", "KeyError: 'batch 7'", "twice")


def test_a_lost_machine_is_tried_as_often_as_tune_does(begin: Begin) -> None:
    run = begin()
    trial = run.start()
    for _ in range(3):
        trial.status = Trial.RUNNING
        run.crash(trial, "ray.exceptions.ActorDiedError: The actor died unexpectedly")
    assert run.search_alg.desk.knows(trial.trial_id)


@pytest.mark.parametrize("error", ["AssertionError: loss is nan", "FloatingPointError: it", "ValueError: non-finite"])
@pytest.mark.parametrize("policy", ["anchored", "paper"])
def test_an_exception_that_says_nan_counts_as_a_loss_of_nan(begin: Begin, error: str, policy: str) -> None:
    options = dict(stage_steps=100, probe_steps=20) if policy == "paper" else {}
    if policy == "paper":
        for name in ("envelope", "warmup"):
            begin.monkeypatch.delitem(RACE, name)
    run = begin(policy=policy, **options)
    trial = run.start()
    arm = run.search_alg.desk.arm(trial.trial_id)
    run.report(trial, 1, 1.0)
    run.crash(trial, error)
    run.start()
    statuses = {str(event["status"]) for event in begin.events if event.get("arm") == arm and "status" in event}
    assert "diverged" in statuses
    assert "failed" not in statuses
    assert begin.told(arm, "counts as diverged", error)
    assert len(run.trials) == 2


def test_an_error_that_only_mentions_reset_config_accuses_nobody(begin: Begin) -> None:
    run = begin()
    run.crash(run.start(), "RuntimeError: my reset_config is fine")
    assert run.search_alg.desk.failure is None
    run.crash(
        run.trials[0], "RuntimeError: Trainable runner reuse requires reset_config() to be implemented and return True."
    )
    with pytest.raises(AutoLRSError, match="reset_config returns False"):
        run.start()


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


def test_reports_further_apart_than_the_rungs_are_told_once(begin: Begin) -> None:
    run = begin()
    trial = run.start()
    segment = run.search_alg.desk.segment(trial.trial_id)
    run.report(trial, segment.boundaries[2], 1.0)
    run.start()
    assert (
        len(begin.told("reports come too seldom", f"at step {segment.boundaries[2]}", f"{segment.boundaries[0]}, "))
        == 1
    )


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


# -- one run, one process, one search ----------------------------------------------------------------------------------


def test_a_cell_that_was_interrupted_goes_on_in_the_same_process(begin: Begin) -> None:
    run = begin()
    trial = run.start()
    run.report(trial, 1, 1.0)
    again = begin()  # Tune has swallowed the Ctrl-C, and the folder is still open
    again.start()
    assert [event["event"] for event in begin.events if event["event"] in ("start", "resume")] == ["start", "resume"]
    run.search_alg.desk.warn("from the grave")
    run.search_alg.desk.persist()
    assert not begin.told("from the grave")


def test_a_run_that_another_thread_drives_is_refused_in_these_words(begin: Begin) -> None:
    run, hold, ready = begin(), threading.Event(), threading.Event()

    def drive() -> None:
        run.start()
        ready.set()
        hold.wait(60)

    thread = threading.Thread(target=drive)
    thread.start()
    assert ready.wait(60)
    with pytest.raises(RuntimeError, match="another thread of this process drives the run"):
        begin().start()
    hold.set()
    thread.join()
    begin().start()  # its thread is gone: nobody drives it any more


def test_a_search_is_used_once(begin: Begin, tmp_path: Path) -> None:
    run = begin()
    run.start()
    other = FakeTune(tmp_path / "other", begin.monkeypatch, run.search_alg, 2)
    with pytest.raises(RuntimeError, match="has driven a run already: make a new one"):
        other.start()
    finished = begin(config={"a": 1}).search_alg
    finished.desk.policy.phase = "done"
    assert finished.suggest("a") == "FINISHED"
    with pytest.raises(RuntimeError, match="has driven a run already: make a new one"):
        finished.suggest("b")


def test_tunes_own_resume_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match=r'Tuner.restore: run the same command .*resume="auto"'):
        AutoLRSSearch(100, num_lrs=2).restore_from_dir(str(tmp_path))


# -- another run of the same name ----------------------------------------------------------------------------------------


class Other(Trainable):
    width = 64


def trained(begin: Begin, **options: Any) -> None:
    """A run that has a checkpoint."""
    run = begin(**options)
    trial = run.start()
    folder = begin.folder / "run" / trial.trial_id / "checkpoint_000000"
    folder.mkdir(parents=True)
    (folder / "w.json").write_text("[]")
    step = first_step(run, trial)
    run.report(trial, step, 1.0)
    run.search_alg.policy.saved(run.search_alg.desk.arm(trial.trial_id), step, str(folder))
    run.search_alg.desk.persist()
    run.search_alg.close()


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"config": {"width": 64}}, "config width: 8 -> 64"),
        ({"config": {}}, "config width: 8 -> None"),
        ({"config": {"width": 8, "wd": 0.1}}, 'config wd: None -> "0.1"'),
        ({"config": {"width": 8}, "trainable": Other}, "trainable: Trainable -> Other"),
    ],
)
def test_another_config_or_trainable_under_the_same_name_is_refused_by_name(
    begin: Begin, options: dict[str, Any], told: str
) -> None:
    trained(begin, config={"width": 8})
    with pytest.raises(ValueError, match=r"goes on with something else .*Choose another name") as raised:
        begin(**options).start()
    assert told in str(raised.value)
    begin(config={"width": 8}).start()  # the same one goes on
    coordinator._driving.clear()


def test_who_insists_gets_it_and_a_warning(begin: Begin) -> None:
    trained(begin, config={"width": 8})
    begin(config={"width": 64}, resume=True).start()
    assert begin.told("resumed with something else: config width: 8 -> 64")


def test_what_has_trained_nothing_may_be_mended(begin: Begin) -> None:
    run = begin(config={"data": "/wrong"})
    run.start()
    run.search_alg.close()
    begin(config={"data": "/right"}).start()


def test_code_may_be_mended_while_a_run_goes_on_and_not_when_it_is_finished(begin: Begin) -> None:
    class Mended(Trainable):
        width = 5

    Mended.__qualname__ = "Trainable"
    trained(begin)
    run = begin(trainable=Mended)
    run.start()
    assert begin.told("the code of Trainable", "has changed since the run began")
    run.search_alg.policy.phase = "done"
    run.search_alg.desk.warn("the end")
    run.search_alg.close()
    begin.monkeypatch.setattr(Mended, "width", 6)
    again = begin(trainable=Mended)
    again.start()


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
