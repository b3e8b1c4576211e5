"""The desk without Ray: who trains what, whenever Tune tells of metric and mode."""

from __future__ import annotations

from typing import Any

import pytest

from autolrs_ray import AutoLRSSearch, RunResult
from autolrs_ray.core.policy import Point
from tests.fake_tune import Begin, first_step

POLICIES: dict[str, dict[str, Any]] = {"paper": {"stage_steps": 50, "num_lrs": 3}, "anchored": {"num_lrs": 3}}


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("late", [True, False])
def test_a_trial_that_began_before_tune_told_the_mode_has_its_arm(policy: str, late: bool) -> None:
    search = AutoLRSSearch(100, policy=policy, **POLICIES[policy])
    desk = search.desk
    if not late:
        desk.take_metric("val_accuracy", "max")
    first = search.suggest("a")
    if late:  # as where param_space is empty
        desk.take_metric("val_accuracy", "max")
    desk.plan_for(2)
    assert (desk.settings.keys.loss, desk.settings.sign) == ("val_accuracy", -1.0)
    assert desk.knows("a")
    assert desk.arm("a") not in {segment.arm for segment in desk.policy.wanted()}
    second = desk.assign("b")
    assert second is not None
    assert isinstance(first, dict)
    assert second.arm != first["autolrs"] == desk.arm("a")
    assert desk.assign("c") is None  # two slots
    desk.book_failure("a", "it was killed")
    desk.book_failure("a", "it was killed")
    warnings = [event for event in desk.policy.drain_events() if "it was killed" in event.get("message", "")]
    assert len(warnings) == 1
    assert not desk.policy.is_open(first["autolrs"])


def test_an_interval_of_tunes_is_taken_whatever_was_asked_before() -> None:
    from ray import tune

    search = AutoLRSSearch(100, num_lrs=3)
    wide = [segment.lr for segment in search.policy.wanted()]
    search.set_search_properties("val_loss", "min", {"lr": tune.loguniform(1e-3, 1e-2)})
    lrs = [segment.lr for segment in search.policy.wanted()]
    assert lrs != wide
    assert all(1e-3 <= lr <= 1e-2 for lr in lrs)


def test_what_ends_the_run_is_raised_where_tune_lets_it_through_and_is_the_first_thing_that_did() -> None:
    search = AutoLRSSearch(100, num_lrs=3)
    search.desk.fail(ValueError("the cause"))
    search.desk.fail(ValueError("what follows from it"))
    with pytest.raises(ValueError, match="the cause"):
        search.suggest("a")


def test_a_report_is_booked_on_the_arm_of_its_trial() -> None:
    desk = AutoLRSSearch(100, num_lrs=2, slots=1).desk
    desk.plan_for(1)
    segment = desk.assign("a")
    assert segment is not None
    point = desk.point({"step": 10, "val_loss": 0.5, "lr": segment.lr_at(9)}, "a", before=None)
    assert point == Point(10, 0.5)
    assert point is not None
    desk.report("a", point, can_save=True)
    desk.forget("a")
    assert not desk.knows("a")
    assert desk.policy.is_open(segment.arm)
    assert not desk.untouched


def test_what_the_journal_warns_of_is_said_on_screen_and_in_the_result(
    begin: Begin, caplog: pytest.LogCaptureFixture
) -> None:
    run = begin()
    trial = run.start()
    run.search_alg.desk.warn("something was mended")
    run.report(trial, first_step(run, trial), 0.5)
    run.start()
    assert begin.told("something was mended")
    assert [record.message for record in caplog.records].count("AutoLRS: something was mended") == 1
    assert "something was mended" in RunResult.load(begin.folder / "run").warnings
