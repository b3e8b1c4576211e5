"""points_to_evaluate: a user's own learning rates race too, exactly, and are held against the one that was found."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import nn

from autolrs_ray import AutoLRSSearch, Trainer, TrainingTask, make_policy, run_local
from autolrs_ray.core.envelopes import lr_factor
from autolrs_ray.core.policy import Point
from autolrs_ray.outcome.history import History
from autolrs_ray.outcome.points import own_points
from autolrs_ray.show.run_data import RunData
from autolrs_ray.show.summary import summary
from tests.races import anchored, drive
from tests.simulation import Simulation

PAPER = dict(stage_steps=50, max_stage_steps=50, probe_steps=5, num_lrs=5)


@pytest.mark.parametrize("policy", ["anchored", "paper"])
@pytest.mark.parametrize(
    ("points", "said"),
    [
        ([20.0], r"20 lies outside of lr_interval=\(0.001, 10\)"),
        ([1e-4], r"0.0001 lies outside"),
        ([0.1, 0.1 + 1e-12], "holds 0.1 twice"),
        ([0.0], "each of points_to_evaluate"),
        ([math.nan], "each of points_to_evaluate"),
        (["0.1"], "each of points_to_evaluate"),
        ([{"lr": 0.1, "wd": 1}], "each of points_to_evaluate"),
        (0.1, "points_to_evaluate must be a list or tuple, got 0.1"),
    ],
)
def test_what_is_no_learning_rate_of_the_search_is_refused(policy, points, said):
    options = PAPER if policy == "paper" else {}
    with pytest.raises((TypeError, ValueError), match=said):
        AutoLRSSearch(200, policy=policy, lr_interval=(1e-3, 10.0), points_to_evaluate=points, **options)


def test_what_cannot_be_kept_is_refused():
    with pytest.raises(ValueError, match=r"keep=True .* got none"):
        anchored(keep=True)
    with pytest.raises(TypeError, match='policy="paper" has no option keep'):
        make_policy("paper", 200, keep=True, points_to_evaluate=[0.01], **PAPER)
    with pytest.raises(ValueError, match="num_lrs=5 probes of a stage, got 6"):
        make_policy("paper", 200, points_to_evaluate=[0.01 * i for i in range(1, 7)], **PAPER)


def test_they_race_as_they_were_given_and_take_the_place_of_equal_ones():
    grid = [trunk.lr for trunk in anchored(num_lrs=4).trunks]
    policy = anchored(num_lrs=4, points_to_evaluate=[{"lr": 3e-1}, grid[1] * (1 + 1e-12), 10.0, 1e-3])
    lrs = [trunk.lr for trunk in policy.trunks]
    assert lrs == sorted([1e-3, grid[0], grid[1] * (1 + 1e-12), 3e-1, grid[2], grid[3], 10.0])
    assert policy.trials_needed == 7
    assert policy.cost(1)[0] > anchored(num_lrs=4).cost(1)[0]


@pytest.mark.parametrize("slots", [1, 2, 3, 12])
@pytest.mark.parametrize("own", [(0.3,), (1e-3, 5.0)])
def test_what_is_kept_is_trained_to_the_end_and_changes_nothing_of_the_race(own, slots):
    """As if it had been trained alone, on any number of slots, whatever order reports come in."""
    alone = Simulation(anchored(points_to_evaluate=own)).run()
    order = np.random.default_rng(slots)
    run = Simulation(anchored(points_to_evaluate=own, keep=True, concurrency=slots), slots=slots, order=order).run()
    assert run.of("decision") == alone.of("decision")
    assert run.trained <= 200 * run.policy.cost(slots)[0]
    ends = {}
    for lr in own:
        (trunk,) = [trunk for trunk in run.policy.trunks if trunk.lr == lr]
        end = run.toy.train(200, lambda t, lr=lr: lr * lr_factor("quadratic", t, 200, 40))
        if math.isfinite(end.loss):
            ends[lr] = end.loss
            assert (trunk.step, trunk.readings[1.0].score) == (200, end.loss)
            assert run.store[trunk.checkpoint].loss == end.loss
        else:
            assert trunk.status == "diverged"
    (done,) = run.of("done")
    assert done["loss"] == min(alone.of("done")[0]["loss"], *ends.values())
    assert len(run.store) <= 2 * (1 + len(ends))


def test_one_that_ends_better_than_the_one_found_wins():
    policy = anchored(1000, num_lrs=4, points_to_evaluate=[1e-3], keep=True)
    drive(policy, lambda lr, step: 0.5 if (lr, step) == (1e-3, 1000) else 3.0 - lr * step / 1e4)
    assert [trunk.lr for trunk in policy.trunks if trunk.status == "won"] == [1e-3]
    assert {trunk.status for trunk in policy.trunks} <= {"won", "dropped", "untried"}


def test_it_is_kept_over_interruptions():
    run, whole = (Simulation(anchored(points_to_evaluate=[1e-2], keep=True)) for _ in range(2))
    while not run.policy.done:
        run.act()
        if len(run.verdicts) % 7 == 0:
            run.interrupt(anchored(points_to_evaluate=[1e-2], keep=True))
    whole.run()
    assert run.of("done") == [{**event, "checkpoint": run.of("done")[0]["checkpoint"]} for event in whole.of("done")]
    assert [trunk.step for trunk in run.policy.trunks] == [trunk.step for trunk in whole.policy.trunks]


@pytest.mark.parametrize("ends", ["fail", math.nan])
def test_a_race_ends_without_one_that_comes_to_grief_after_it(ends):
    run = Simulation(anchored(points_to_evaluate=[1e-3], keep=True))

    def trouble(arm, point):
        if run.running[arm][0].lr == 1e-3 and point.step > 100:
            return "fail" if ends == "fail" else Point(point.step, ends)
        return None

    run.change = trouble
    assert run.run().policy.trunks[0].status == ("failed" if ends == "fail" else "diverged")


def test_every_stage_of_the_papers_policy_tries_them_first():
    own = [0.0123, 0.5]
    run = Simulation(make_policy("paper", 200, (1e-3, 1.0), 0, 2, points_to_evaluate=own, **PAPER), slots=2).run()
    for stage in range(4):
        lrs = [event["lr"] for event in run.of("proposal") if event["stage"] == stage]
        assert lrs[:2] == own
        assert len({round(math.log10(lr), 3) for lr in lrs}) == PAPER["num_lrs"]


def test_the_interval_of_fine_tuning_lies_a_decade_lower_at_the_same_spacing():
    usual, lower = (make_policy("anchored", 200, lr_interval) for lr_interval in (None, "fine-tuning"))
    assert [trunk.lr for trunk in lower.trunks] == pytest.approx([trunk.lr / 10 for trunk in usual.trunks])
    with pytest.raises(ValueError, match=r"lr_interval, .* one of \['fine-tuning'\], got 'finetune'"):
        make_policy("anchored", 200, "finetune")


# -- what is said of them ----------------------------------------------------------------------------------------------


def told(run, points):
    return told_of(run.events, run.policy.total_steps, points)


def told_of(events, total_steps, points, policy="anchored"):
    """The sentences about `points`, and the history, of a run that left `events`."""
    config = dict(total_steps=total_steps, policy=policy, options={"points_to_evaluate": points})
    history = History.of(
        {"time": float(i), **event} for i, event in enumerate([dict(event="start", config=config), *events])
    )
    return [point.sentence("val_loss", total_steps) for point in own_points(history)], history


def test_the_report_says_where_each_fell_and_by_how_much():
    points = [1e-3, 0.3, 8.0]
    run = Simulation(anchored(points_to_evaluate=points)).run()
    (low, mine, high), history = told(run, points)
    found = RunData(history, {}).result
    ends = {event["arm"]: event for event in run.of("rung")}
    arm = next(arm for arm, lr in history.lrs.items() if lr == 0.3)
    if found.schedule.peak_lr == 0.3:
        assert mine == "0.3, yours, is the learning rate found."
    else:
        behind = ends[arm]["score"] - next(
            event["score"]
            for event in run.of("rung")
            if event["arm"] == history.arm and event["step"] == ends[arm]["step"]
        )
        assert f"{abs(behind):.3g} " in mine
        assert "keep=True does" in mine
    assert low.startswith("0.001, yours, was ")
    assert "to train it to the end would cost " in low
    assert "better in val_loss than" in high
    assert "(early readings flatter large learning rates)" in high
    assert [point["text"] for point in summary(RunData(history, {}))["points"]] == [low, mine, high]
    (kept,), history = told(Simulation(anchored(points_to_evaluate=[0.01], keep=True)).run(), [0.01])
    assert "worse in val_loss than" in kept
    assert ", at the end: " in kept
    assert "would cost" not in kept
    assert RunData(history, {}).result.points[0].checkpoint.startswith("t")


def test_of_stages_it_says_how_often_it_was_chosen():
    run = Simulation(make_policy("paper", 200, (1e-3, 1.0), points_to_evaluate=[0.1], **PAPER)).run()
    (text,), history = told_of(run.events, 200, [0.1], "paper")
    (point,) = own_points(history)
    assert point.stages == 4
    assert point.chosen == sum(event["lr"] == 0.1 for event in run.of("choice"))
    assert point.behind >= 0
    assert text.startswith(f"0.1, yours, was chosen in {point.chosen} of the 4 stages")


def test_a_real_training_keeps_ones_own_learning_rate():
    def build() -> TrainingTask:
        x = torch.randn(200, 4, generator=torch.Generator().manual_seed(0))
        y = (x[:, 0] > 0).long()
        model = nn.Linear(4, 2)
        return TrainingTask(model, torch.optim.SGD(model.parameters(), lr=0.1), nn.functional.cross_entropy,
                            train_data=(x[:150], y[:150]), val_data=(x[150:], y[150:]), batch_size=25)  # fmt: skip

    policy = make_policy("anchored", 60, num_lrs=3, points_to_evaluate=[1e-3], keep=True)
    _, history = told_of(run_local(policy, Trainer(build)).events, 60, [1e-3])
    (point,) = own_points(history)
    assert (point.lr, point.step, point.compared, point.more) == (1e-3, 60, 60, 0.0)
    assert point.behind > 0.01
