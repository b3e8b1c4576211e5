"""What crashes of trials do to a run, driven without Ray: they are the code's, a learning rate's or bad luck."""

from __future__ import annotations

import pytest
from ray.tune.experiment import Trial

from autolrs_ray import AutoLRSError
from tests.fake_tune import RACE, Begin, first_step


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


@pytest.mark.parametrize(("task", "ends"), [("its creation task", True), ("train()", False)])
def test_two_arms_that_raise_alike_end_it_if_no_learning_rate_can_be_to_blame(
    begin: Begin, task: str, ends: bool
) -> None:
    run = begin(cpus=2)
    for _ in range(2):
        run.crash(run.start(), "RuntimeError: Unrecognized option", task=task)
    failure = run.search_alg.desk.failure
    assert ("the first trials all raised RuntimeError: Unrecognized option" in str(failure)) is ends


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
