"""A batch that grows: which rows a step takes, and that nothing else depends on it."""

from __future__ import annotations

import copy
import json
import math
from dataclasses import replace
from typing import Any

import pytest
import torch

from autolrs_ray import LearnedSchedule, Trainer, make_policy, run_local
from autolrs_ray.core.growth import BatchGrowth, require_growth
from autolrs_ray.core.policies import options_of
from autolrs_ray.core.policy import Point
from autolrs_ray.core.segments import Segment
from autolrs_ray.driver.advice import GrowthAdvice
from autolrs_ray.driver.reports import ReportKeys, point_of
from autolrs_ray.driver.settings import RunSettings
from autolrs_ray.integrations.follower import Follower
from autolrs_ray.outcome.history import History
from autolrs_ray.outcome.result import RunResult
from autolrs_ray.training.data import Rows
from tests.cluster.test_distributed import plain_task

GROWTH = BatchGrowth(((10, 2), (15, 3)))


@pytest.mark.parametrize(
    "wrong",
    [2, "x", {0.5: 1}, {0.5: 1.5}, {0.5: True}, {0.0: 2}, {1.0: 2}, {-0.1: 2}, {"half": 2}, {0.5: 4, 0.8: 2}, {0.5: 2, 0.7: 2},
     {0.5: 1000}, [0.5, 2], [[0.5, 2, 3]], [[0.5, 2], [0.5, 4]], {math.nan: 2}],
)  # fmt: skip
def test_what_is_no_growth_is_refused_by_name(wrong: Any) -> None:
    with pytest.raises((TypeError, ValueError), match=r"batch"):
        make_policy("anchored", 100, batch_growth=wrong)


def test_growth_is_taken_as_it_is_given_and_as_a_record_holds_it() -> None:
    assert require_growth(None) == {}
    assert require_growth({0.8: 4, 0.5: 2}) == {0.5: 2, 0.8: 4} == require_growth([[0.5, 2], [0.8, 4]])
    policy = make_policy("anchored", 200, batch_growth={0.5: 2})
    assert policy.growth == BatchGrowth(((100, 2),))
    assert options_of(policy)["batch_growth"] == [[0.5, 2]]
    assert options_of(make_policy("anchored", 200))["batch_growth"] is None
    again = make_policy("anchored", 200, batch_growth=options_of(policy)["batch_growth"])
    assert again.growth == policy.growth
    with pytest.raises(ValueError, match="cannot be extended"):
        make_policy("anchored", 200, envelope="wsd", num_lrs=1, batch_growth={0.5: 2}).extend(400)  # type: ignore[attr-defined]


def test_a_run_of_another_growth_is_not_taken_for_this_one() -> None:
    def settings(**options: Any) -> RunSettings:
        given = ("val_loss", "min", "step", "train_loss", None, 0, None, False, False, 900.0, 60.0, 1)
        return RunSettings(200, "anchored", None, *given, options)

    grown, plain = settings(batch_growth={0.5: 2}), settings()
    assert "batch_growth" in grown.adopt(plain.describe())
    assert settings(batch_growth={0.5: 2}).adopt(grown.describe()) == {}
    before = plain.describe()
    del before["options"]["batch_growth"]  # of a version that knew of none
    assert settings().adopt(before) == {}


def test_every_batch_is_taken_once_and_in_order() -> None:
    taken = [n for step in range(20) for n in range(GROWTH.first(step), GROWTH.first(step) + GROWTH.factor(step))]
    assert taken == list(range(10 + 2 * 5 + 3 * 5))
    assert [BatchGrowth().first(step) for step in (0, 7)] == [0, 7]
    plain, grown = Rows(40, 4, seed=0), Rows(40, 4, seed=0, growth=GROWTH)
    assert grown.at(10).tolist() == [*plain.at(10).tolist(), *plain.at(11).tolist()]
    assert grown.at(16).tolist() == [row for n in (23, 24, 25) for row in plain.at(n).tolist()]
    keys = [
        key for n in (18, 19) for key in plain.keys(n, slice(None))
    ]  # the row's random numbers are those of its place
    assert grown.keys(14, slice(None)) == keys
    assert grown.keys(14, slice(1, None, 3)) == keys[1::3]
    assert [grown.size(step) for step in (9, 10, 15)] == [4, 8, 12]
    assert grown.epochs(20) == 3.5


def segment(total: int, **options: Any) -> Segment:
    return Segment("t00", "trunk", 0, 0.1, 0, (total,), 1, None, "quadratic", total, 0, **options)


def test_a_grown_step_is_that_of_a_larger_batch_and_a_restore_is_exact() -> None:
    large = Trainer(lambda: replace(plain_task(), batch_size=32))
    grown = Trainer(plain_task)
    grown.grow(BatchGrowth(((0, 2),)))
    for step in range(3):
        for ours, theirs in zip(grown.batch(step), large.batch(step), strict=True):
            assert torch.equal(ours, theirs)
    trainer = Trainer(plain_task, averaging=True)
    trainer.grow(GROWTH)
    lr_at = segment(20, growth=GROWTH.points).lr_at
    trainer.train(12, lr_at)
    state = copy.deepcopy(trainer.state_dict())
    other = Trainer(plain_task, averaging=True)
    other.grow(GROWTH)
    other.train(3, lambda step: 1.0)
    other.load_state_dict(state)
    trainer.train(20, lr_at)
    other.train(20, lr_at)
    assert other.evaluate(averaged=True) == trainer.evaluate(averaged=True)
    assert trainer.epoch == (10 + 10 + 15) / trainer.steps_per_epoch


def test_a_run_grows_its_batch_and_says_what_that_cost(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes: dict[int, set[int]] = {}
    batch = Trainer.batch

    def seen(self: Trainer, step: int) -> Any:
        found = batch(self, step)
        sizes.setdefault(step, set()).add(len(found[1]))
        return found

    monkeypatch.setattr(Trainer, "batch", seen)
    policy = make_policy("anchored", 40, (1e-2, 1.0), num_lrs=1, batch_growth={0.5: 2})
    start = {"event": "start", "time": 0.0, "config": {"policy": "anchored", "total_steps": 40,
             "lr_interval": [1e-2, 1.0], "options": options_of(policy)}}  # fmt: skip
    found = run_local(policy, Trainer(plain_task, averaging=True))
    assert sizes == {step: {16 if step < 20 else 32} for step in range(40)}
    trained = {"event": "segment", "arm": "t00", "role": "trunk", "stage": 0, "lr": 0.1, "start": 0, "end": 40,
               "began": 0.0, "busy_s": 1.0, "time": 1.0}  # fmt: skip
    history = History.of([start, trained, *({"time": 1.0, **event} for event in found.events)])
    result = RunResult.of(history)
    assert (result.main_steps, result.search_steps, result.grown_steps, result.compute) == (40, 0, 20, 1.5)
    assert result.schedule.growth == BatchGrowth(((20, 2),))


def test_a_schedule_keeps_the_growth_in_its_files(tmp_path: Any) -> None:
    policy = make_policy("anchored", 40, (1e-2, 1.0), num_lrs=1, batch_growth={0.5: 2, 0.75: 4})
    start = {"event": "start", "config": {"policy": "anchored", "total_steps": 40, "options": options_of(policy)}}
    found = run_local(policy, Trainer(plain_task, averaging=True))
    schedule = LearnedSchedule.of(History.of([start, *found.events]))
    assert LearnedSchedule.from_json(schedule.to_json()) == schedule
    assert [schedule.batches_at(step) for step in (0, 19, 20, 30, 39)] == [1, 1, 2, 4, 4]
    assert [schedule.stretch(80).batches_at(step) for step in (39, 40, 60)] == [1, 2, 4]
    schedule.write_csv(tmp_path / "learned.csv")
    read = LearnedSchedule.load(tmp_path / "learned.csv")
    assert read.growth == schedule.growth
    assert [read.lr_at(step) for step in range(40)] == [schedule.lr_at(step) for step in range(40)]
    plain = LearnedSchedule(40, schedule.pieces)
    assert "batch" not in plain.to_json() + plain.to_csv()


def test_segments_carry_the_growth_through_json_and_loops_of_ones_own_read_it() -> None:
    config = json.loads(json.dumps(segment(40, growth=((20, 2),)).to_config()))
    with pytest.raises(ValueError, match="batch_growth"):
        Follower({"lr": 0.1, "autolrs": config})
    follower = Follower({"lr": 0.1, "autolrs": config}, grows=True)
    assert [follower.batches_at(step) for step in (19, 20)] == [1, 2]
    keys, loss = ReportKeys("step", "val_loss", "train_loss", "averaged_loss"), {"val_loss": 1.0}
    for step in (20, 21):
        assert point_of(follower.report(step, loss), Segment.from_config(config), keys, 1.0, None)
    ungrown = {**follower.report(21, loss), "batches": 1}
    with pytest.raises(ValueError, match=r"2 times as large .* reports batches=1"):
        point_of(ungrown, Segment.from_config(config), keys, 1.0, None)
    del config["growth"]  # of a trial that an earlier version began
    assert Segment.from_config(config).batches_at(30) == 1
    assert Follower({"lr": 0.1}).batches_at(30) == 1


@pytest.mark.parametrize(
    ("step", "raw", "epoch", "growth", "told"),
    [
        (50, 1.0, 0.5, {}, True),
        (49, 1.0, 0.49, {}, False),  # not yet half way
        (50, 1.2, 0.5, {}, False),  # an average is better: noise is left
        (50, 1.0, 1.0, {}, False),  # two passes
        (50, 1.0, 0.5, {0.5: 2}, False),
    ],
)
def test_a_run_says_once_when_growth_is_worth_it(
    step: int, raw: float, epoch: float, growth: dict[float, int], told: bool
) -> None:
    advice = GrowthAdvice(make_policy("anchored", 100, batch_growth=growth))
    point = Point(step, raw, averaged_loss=1.1)
    assert (advice.heard(point, {"epoch": epoch}) is not None) == told
    assert advice.heard(point, {"epoch": epoch}) is None
