"""The plain loop: what a run leaves does not depend on how its segments were cut, and promotion changes nothing."""

from __future__ import annotations

import copy
import math

import pytest

from autolrs_ray.core.policies import make_policy
from autolrs_ray.core.policy import AutoLRSError
from autolrs_ray.training.local import run_local
from autolrs_ray.training.trainer import Trainer
from tests.trainings import adamw, assert_same, momentum, noisy, task


def paper(**options):
    defaults = dict(lr_interval=(1e-3, 1.0), seed=1, stage_steps=12, max_stage_steps=24, probe_steps=4, num_lrs=3)
    return make_policy("paper", 60, **{**defaults, **options})


def anchored(**options):
    return make_policy("anchored", 60, **{**dict(lr_interval=(1e-3, 1.0), num_lrs=4), **options})


def events(run, *names):
    return [event for event in run.events if event["event"] in names]


@pytest.mark.parametrize("optimizer", [momentum, adamw])
@pytest.mark.parametrize("options", [{}, {"warmup_steps": 5, "warmup_lr": 0.1}, {"concurrency": 3}])
def test_promotion_trains_fewer_steps_and_ends_in_the_same_weights_bit_for_bit(optimizer, options):
    finals, steps, choices = [], [], []
    for promote in (True, False):
        trainer = Trainer(lambda: task(optimizer, augment=noisy), 2)
        run = run_local(paper(promote=promote, **options), trainer)
        finals.append(copy.deepcopy(run.final_state))
        steps.append(run.trained_steps)
        choices.append([(event["stage"], event["lr"]) for event in events(run, "choice")])
        assert_same(trainer.state_dict(), run.final_state)
    assert choices[0] == choices[1]
    assert_same(finals[0], finals[1])
    probed = sum(event["probe_steps"] for event in events(run, "stage"))
    assert steps[1] - steps[0] == probed  # one probe's steps saved in every stage


def test_the_final_state_is_that_of_one_training_at_the_chosen_learning_rates():
    run = run_local(paper(), Trainer(lambda: task(), 2))
    rows = events(run, "commit")
    alone = Trainer(lambda: task(), 2)
    for row in rows:
        alone.train(row["end"], lambda step, lr=row["lr"]: lr)
    assert_same(alone.state_dict(), run.final_state)
    assert rows[-1]["loss"] == alone.evaluate()["loss"]


def test_the_winning_trunk_is_one_training_under_the_envelope():
    run = run_local(anchored(), Trainer(lambda: task(), 2, averaging=True))
    (done,) = events(run, "done")
    alone = Trainer(lambda: task(), 2, averaging=True)
    alone.train(60, lambda step: done["lr"] * min(1.0, (step + 1) / 12) * (1.0 - (step / 60) ** 2))
    assert done["loss"] == alone.evaluate(averaged=True)["loss"]
    assert_same(alone.state_dict(), run.final_state)  # and the best of the averages is the same
    assert run.trained_steps < 4 * 60


def test_a_race_on_one_slot_and_on_many_has_one_outcome():
    finals = [
        run_local(anchored(concurrency=q), Trainer(lambda: task(), 2, averaging=True)).final_state for q in (1, 4)
    ]
    assert_same(*finals)


@pytest.mark.parametrize("make", [paper, anchored])
def test_the_same_seeds_give_the_same_run(make):
    runs = [run_local(make(), Trainer(lambda: task(), 2, averaging=True)) for _ in range(2)]
    assert runs[0].events == runs[1].events
    assert_same(runs[0].final_state, runs[1].final_state)


def test_a_run_whose_losses_are_all_nan_ends_with_the_reason():
    def broken(output, target):
        return output.sum() * math.nan

    with pytest.raises(AutoLRSError, match="none of the learning rates"):
        run_local(paper(), Trainer(lambda: task(loss=broken), 0))
    with pytest.raises(AutoLRSError, match="no learning rate is left"):
        run_local(anchored(), Trainer(lambda: task(loss=broken), 0))


def test_a_policy_that_wants_nothing_is_an_error_and_not_a_hang():
    policy = paper()
    policy.issue(policy.wanted()[0].arm)  # somebody else works on it and never comes back
    with pytest.raises(AutoLRSError, match="nothing can make progress"):
        run_local(policy, Trainer(lambda: task(), 0))
