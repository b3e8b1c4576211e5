"""Runs whose length is given in epochs or in hours."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from ray.tune import PlacementGroupFactory

import autolrs_ray
from autolrs_ray.core.policy import AutoLRSError
from autolrs_ray.driver import lengths, watchdog
from autolrs_ray.driver.lengths import Pace
from autolrs_ray.trial.trainable import trainable_for
from tests.tasks import build_tiny


def pace(**rows: list[dict[str, Any]]) -> Pace:
    found = Pace()
    for name, results in rows.items():
        for result in results:
            found.on_trial_result(0, [], SimpleNamespace(trial_id=name, placement_group_factory="one CPU"), result)
    return found


def timed(every: int, *seconds: float) -> list[dict[str, Any]]:
    return [{"step": every * (i + 1), "time_this_iter_s": s} for i, s in enumerate(seconds)]


def test_seconds_per_step_are_told_apart_from_those_of_a_report() -> None:
    step_s, report_s = pace(few=timed(4, 9.0, 2.4, 2.9), more=timed(24, 30.0, 5.0, 4.4)).seconds("step")
    assert (step_s, report_s) == pytest.approx(
        (0.1, 2.0)
    )  # the first of each, and the slower of the others, do not count


def test_where_reports_cannot_be_moved_their_cost_is_the_steps() -> None:
    assert pace(one=timed(5, 1.0, 0.5, 0.5), two=timed(5, 1.0, 0.6, 0.6)).seconds("step") == (0.12, 0.0)


@pytest.mark.parametrize(("row", "steps"), [({"step": 1, "epoch": 1 / 7}, 7), ({"step": 1, "epoch": 2 / 21}, 11)])
def test_steps_per_epoch_are_read_from_a_report(row: dict[str, Any], steps: int) -> None:
    assert pace(one=[row]).steps_per_epoch("step") == steps  # gradients of two batches, and of the last alone: 11 steps


def test_trials_that_report_no_epoch_need_steps() -> None:
    with pytest.raises(ValueError, match=r'epochs= needs trials that report "epoch".*give total_steps instead'):
        pace(one=[{"step": 1}]).steps_per_epoch("step")


def test_one_length_is_given() -> None:
    with pytest.raises(TypeError, match="give one of total_steps, epochs and hours"):
        autolrs_ray.run(lambda config: None)
    with pytest.raises(TypeError, match="'epochs': 3"):
        autolrs_ray.run(lambda config: None, 100, epochs=3)
    for length in ({"epochs": 0}, {"hours": float("nan")}, {"epochs": "3"}):
        with pytest.raises(ValueError, match=f"{next(iter(length))} must be a positive number"):
            autolrs_ray.run(lambda config: None, **length)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r'hours= is for policy="anchored"'):
        autolrs_ray.run(lambda config: None, hours=1.0, policy="paper", stage_steps=10)


def test_too_few_epochs_are_an_error(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(lengths, "rehearse", lambda *args: pace(one=[{"step": 1, "epoch": 1 / 8}]))
    assert lengths.steps_of_epochs(build_tiny, 0.25, {}, str(tmp_path), "step", {})[0] == 2
    with pytest.raises(ValueError, match=r"epochs=0.01 are 0 of the 8 steps of an epoch, too few for a run: give more"):
        lengths.steps_of_epochs(build_tiny, 0.01, {}, str(tmp_path), "step", {})


def trial(status: str, actor: str | None = None) -> SimpleNamespace:
    factory = PlacementGroupFactory([{"CPU": 4}])
    return SimpleNamespace(trial_id="a", status=status, actor=actor, placement_group_factory=factory)


def test_a_trial_that_is_timed_may_not_be_silent_for_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    now = SimpleNamespace(s=0.0)
    monkeypatch.setattr(lengths.time, "monotonic", lambda: now.s)
    monkeypatch.setattr(watchdog, "node_resources", lambda: [{"CPU": 4.0}])
    watched = Pace(report_timeout_s=10.0, actor_of=lambda trial: trial.actor)  # type: ignore[attr-defined]
    for seconds, seen in ((0.0, trial("PENDING")), (500.0, trial("PENDING", "its actor")), (510.0, trial("RUNNING"))):
        now.s = seconds
        watched.on_step_begin(0, [seen])
    watched.on_trial_result(0, [], trial("RUNNING"), {"step": 1})
    now.s = 520.0
    watched.on_step_begin(0, [trial("RUNNING")])
    now.s = 521.0
    with pytest.raises(AutoLRSError, match=r"has reported nothing for 11 s \(report_timeout_s=10\)"):
        watched.on_step_begin(0, [trial("RUNNING")])


def test_a_trial_that_is_timed_does_not_wait_for_what_no_node_has(monkeypatch: pytest.MonkeyPatch) -> None:
    now = SimpleNamespace(s=0.0)
    monkeypatch.setattr(lengths.time, "monotonic", lambda: now.s)
    monkeypatch.setattr(watchdog, "node_resources", lambda: [{"CPU": 2.0}])
    watched = Pace(resource_timeout_s=5.0)
    watched.on_step_begin(0, [trial("PENDING")])
    now.s = 6.0
    with pytest.raises(
        AutoLRSError, match=r"each trial asks for \{'CPU': 4.0\} on one node, but the cluster has 1 node"
    ):
        watched.on_step_begin(0, [trial("PENDING")])


def test_too_few_hours_and_a_trial_that_fails_are_errors(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(lengths.tune, "run", lambda *args, **options: SimpleNamespace(trials=[]))
    with pytest.raises(AutoLRSError, match="failed before its first reports"):
        lengths.rehearse(build_tiny, {}, str(tmp_path), (1,), 1, {})
    found = pace(few=timed(4, 9.0, 2.4, 2.9), more=timed(24, 30.0, 5.0, 4.4))
    monkeypatch.setattr(lengths, "rehearse", lambda *args: found)
    monkeypatch.setattr(lengths, "node_resources", lambda: [])
    monkeypatch.setattr(lengths, "trials_that_fit", lambda *args: 2)
    given = (build_tiny, {}, str(tmp_path), "none", "step")
    assert lengths.steps_of_hours(given[0], 1.0, *given[1:], {})[0] == pytest.approx(
        (3600 / 1.35 - 25 * 2.0) / 0.1, abs=1
    )
    steps, told = lengths.steps_of_hours(given[0], 1.0, *given[1:], {"workers": "elastic"})
    assert steps == pytest.approx((3600 / (2.0 / 2) - 25 * 2.0) / 0.1, abs=1)
    assert "about 1 T of wall-clock, if 2 workers are 2 times as fast as one" in told
    mine = {"points_to_evaluate": [0.1, 0.2], "keep": True}
    for options, wall in (({"slots": 1}, 2.0), ({"slots": 1, **mine}, 4.0), ({**mine, "keep": False}, 1.35)):
        steps, _ = lengths.steps_of_hours(given[0], 1.0, *given[1:], options)
        assert steps == pytest.approx((3600 / wall - 25 * 2.0) / 0.1, abs=1)
    with pytest.raises(ValueError, match=r"hours=0.01 are too few: a step takes 100 ms and a report 2e\+03 ms"):
        lengths.steps_of_hours(given[0], 0.01, *given[1:], {})


@pytest.mark.slow
@pytest.mark.ray
@pytest.mark.usefixtures("ray_cluster")
def test_epochs_and_hours_become_steps_and_a_begun_run_keeps_them(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options: dict[str, Any] = dict(num_lrs=2, slots=1, storage_path=tmp_path, progress=False)
    build = trainable_for(build_tiny)
    each = autolrs_ray.Trainer(lambda: build_tiny({})).steps_per_epoch
    steps, told = lengths.steps_of_epochs(build, 10.5, {"seed": 0}, str(tmp_path), "step", {})
    assert (steps, told) == (84, f"10.5 epochs of {each} steps: T = 84 steps")
    first = autolrs_ray.run(build, hours=1.0 / 3600, **options)
    told = capsys.readouterr().err
    assert (
        f"on 1 slot a run takes about 2 T of wall-clock: 0.000278 hours are T = {first.schedule.total_steps:,} steps"
        in told
    )
    assert autolrs_ray.run(build, hours=2.0, **options).schedule.total_steps == first.schedule.total_steps
    assert "goes on over its own T" in capsys.readouterr().err
    assert {path.name for path in tmp_path.iterdir()} == {"autolrs"}
