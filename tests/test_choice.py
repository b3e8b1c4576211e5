"""How sure the choice of a race is, and what is said where it lies at the edge of what was tried."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from autolrs_ray.record.record import Record
from autolrs_ray.show.choice import choice, edge, scatter
from autolrs_ray.show.run_data import RunData
from autolrs_ray.show.summary import summary

LRS = {"t00": 1.0, "t01": 0.1, "t02": 0.01}


def race(folder: Path, scores: dict[str, dict[int, float]], winner: str, mode: str = "min", **config: Any) -> RunData:
    """A finished race of 100 steps whose trunks had `scores` at their rungs."""
    start = dict(total_steps=100, policy="anchored", lr_interval=[1e-3, 10.0], metric="val_loss", mode=mode,
                 time_attr="step", seed=0, options={}, **config)  # fmt: skip
    sign = 1.0 if mode == "min" else -1.0
    events: list[dict[str, Any]] = [{"event": "start", "config": start}]
    events += [dict(event="proposal", stage=0, probe=i, arm=arm, lr=LRS[arm]) for i, arm in enumerate(LRS)]
    events += [dict(event="rung", arm=arm, lr=LRS[arm], step=step, score=sign * score, loss=sign * score, averaged_loss=None)
               for arm, points in scores.items() for step, score in points.items()]  # fmt: skip
    events.append(dict(event="commit", stage=0, arm=winner, end=100, lr=LRS[winner], checkpoint="c",
                       loss=sign * scores[winner].get(100, 0.5), averaged_loss=None))  # fmt: skip
    events.append(dict(event="done", arm=winner, lr=LRS[winner], step=100, loss=sign * 0.5, checkpoint="c"))
    record = Record(folder)
    record.append(events)
    record.close()
    return RunData.load(folder)


def course(noise: float) -> dict[int, float]:
    return {step: 2.0 - step / 100 + noise * (-1) ** (step // 10) for step in range(10, 101, 10)}


@pytest.mark.parametrize(("noise", "clear"), [(0.001, True), (0.1, False)])
def test_a_margin_counts_against_the_scatter_of_reports(noise: float, clear: bool, tmp_path: Path) -> None:
    other = dict.fromkeys(range(10, 61, 10), 1.6)
    data = race(tmp_path, {"t01": course(noise), "t00": other, "t02": {10: 2.0}}, "t01")
    found = choice(data)
    assert found is not None
    assert (found.lr, found.runner_up, found.step, found.share) == (0.1, 1.0, 60, 0.6)
    assert found.margin == pytest.approx(1.6 - course(noise)[60])
    assert found.scatter == pytest.approx(2.0 * noise * (4 / 3) ** 0.5, rel=0.02)
    assert found.clear is clear
    assert ("clear" in found.sentence("val_loss")) is clear


def test_an_accuracy_is_better_where_it_is_higher(tmp_path: Path) -> None:
    data = race(tmp_path, {"t01": {10: 0.5, 20: 0.8}, "t00": {10: 0.6, 20: 0.7}}, "t01", mode="max")
    found = choice(data)
    assert found is not None
    assert found.margin == pytest.approx(0.1)
    assert found.clear is None
    assert found.sentence("val_accuracy").endswith("ahead of 1, the runner-up, by 0.1 in val_accuracy.")


def test_what_lies_on_a_line_does_not_scatter_and_few_points_tell_nothing() -> None:
    assert scatter({step: 3.0 - 0.1 * step for step in range(1, 12)}, 8) == pytest.approx(0.0, abs=1e-12)
    assert scatter({10: 1.0, 20: 2.0, 30: 1.0, 40: 2.0}, 40) is None


@pytest.mark.parametrize(("winner", "said"), [("t00", "largest"), ("t01", None), ("t02", "smallest")])
def test_a_winner_at_the_edge_of_the_race_is_told(winner: str, said: str | None, tmp_path: Path) -> None:
    data = race(tmp_path, {winner: {10: 0.5}}, winner)
    told = edge(data)
    assert (told is None) == (said is None)
    if told and said:
        assert f"is the {said} of the race" in told
        wider = "(1e-05, 10)" if said == "smallest" else "(0.001, 1e+03)"
        assert f"lr_interval={wider}" in told


def test_stages_that_choose_the_end_of_the_interval_are_told(tmp_path: Path) -> None:
    config = dict(total_steps=30, policy="paper", lr_interval=[1e-3, 1.0], metric="val_loss", mode="min",
                  time_attr="step", seed=0, options={})  # fmt: skip
    record = Record(tmp_path)
    record.append([{"event": "start", "config": config}])
    for stage, lr in enumerate((0.99, 0.97, 0.1)):
        record.append([dict(event="commit", stage=stage, start=10 * stage, end=10 * stage + 10, lr=lr, loss=1.0, forecast=1.0,
                            warmup=False, checkpoint="c")])  # fmt: skip
    record.close()
    assert "2 of 3 stages chose a learning rate at the upper end of the interval, 1:" in str(
        edge(RunData.load(tmp_path))
    )


def test_a_race_that_a_loss_guides_is_shown_in_its_own_metric(tmp_path: Path) -> None:
    data = race(tmp_path, {"t01": {10: 0.5, 100: 0.8}, "t00": {10: 0.6}}, "t01", mode="max")
    for event in data.history.events:
        if event["event"] == "rung":
            event["score"] = 2.3  # the validation loss, by which the race went
    assert data.scores() == {"t00": {10: 0.6}, "t01": {10: 0.5, 100: 0.8}}
    assert {trunk["arm"]: trunk["score"] for trunk in summary(data)["trunks"]} == {"t00": 0.6, "t01": 0.8, "t02": None}
