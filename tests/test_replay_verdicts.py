"""The replay scheduler's verdicts, report by report, without Ray running: what it accepts, and what it says where it cannot."""

from __future__ import annotations

from typing import Any

import pytest
from ray.tune.trainable.function_trainable import FunctionTrainable

from autolrs_ray.driver.replay import ReplayScheduler
from autolrs_ray.outcome.schedule import LearnedSchedule, Piece

PIECES = LearnedSchedule(60, (Piece(0, 20, 1.0), Piece(20, 40, 0.5), Piece(40, 60, 2.0, "linear")))


class FakeTrial:
    trial_id = "a"

    def __init__(self, trainable: type = object) -> None:
        self.config: dict[str, Any] = {"seed": 3}
        self.trainable = trainable

    def set_config(self, config: dict[str, Any]) -> None:
        self.config = config

    def get_trainable_cls(self) -> type:
        return self.trainable


def started(trainable: type = object) -> tuple[ReplayScheduler, FakeTrial]:
    scheduler, trial = ReplayScheduler(PIECES), FakeTrial(trainable)
    scheduler.on_trial_add(None, trial)
    return scheduler, trial


def report(scheduler: ReplayScheduler, trial: FakeTrial, **result: Any) -> str:
    return str(scheduler.on_trial_result(None, trial, result))


def test_a_piece_is_left_at_its_end_with_the_next_one_in_the_config() -> None:
    scheduler, trial = started()
    assert (trial.config["lr"], trial.config["autolrs"]["boundaries"], trial.config["seed"]) == (1.0, (20,), 3)
    assert [report(scheduler, trial, step=step) for step in (10, 19)] == ["CONTINUE", "CONTINUE"]
    assert report(scheduler, trial, step=20) == "PAUSE"
    assert (trial.config["lr"], trial.config["autolrs"]["start"], trial.config["seed"]) == (0.5, 20, 3)
    assert report(scheduler, trial, step=45) == "PAUSE"  # a report that comes late enters the piece it falls into
    assert trial.config["lr"] == pytest.approx(2.0 / 3)
    assert report(scheduler, trial, step=60, lr=2.0 / 60) == "STOP"


def test_a_trial_that_has_gone_back_to_an_older_checkpoint_gets_the_piece_it_is_in() -> None:
    scheduler, trial = started()
    report(scheduler, trial, step=20)
    assert report(scheduler, trial, step=10) == "PAUSE"
    assert trial.config["lr"] == 1.0


def test_a_function_goes_on_until_it_attaches_a_checkpoint_and_not_for_ever() -> None:
    scheduler, trial = started(FunctionTrainable)
    assert report(scheduler, trial, step=20) == "CONTINUE"
    assert report(scheduler, trial, step=30, checkpoint_dir_name="checkpoint_000000") == "PAUSE"
    scheduler, trial = started(FunctionTrainable)
    with pytest.raises(ValueError, match="came to step 40 without a checkpoint since the schedule changed at step 20"):
        report(scheduler, trial, step=40)


@pytest.mark.parametrize("used", [{}, {"lr": 2.0}, {"lr": 0.1}])
def test_a_trainable_that_does_not_follow_an_envelope_is_told_how_to(used: dict[str, float]) -> None:
    scheduler, trial = started()
    report(scheduler, trial, step=40)
    with pytest.raises(ValueError, match=r"autolrs_ray.lr_at\(config, step\)"):
        report(scheduler, trial, step=50, **used)


def test_a_report_without_the_step_is_refused() -> None:
    with pytest.raises(ValueError, match=r'does not report "step".*Reported: \[\'loss\'\]'):
        report(*started(), loss=1.0)


@pytest.mark.parametrize(
    ("pieces", "message"),
    [
        ((), "must begin at step 0, but its pieces are none"),
        ((Piece(0, 10, 0.1), Piece(20, 60, 0.1)), "no learning rate from step 10 to 20"),
        (tuple(Piece(i, i + 1, 0.1) for i in range(1001)), "has 1001 pieces"),
    ],
)
def test_a_schedule_that_cannot_be_replayed_is_refused(pieces: tuple[Piece, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ReplayScheduler(LearnedSchedule(2000, pieces))


def test_something_else_than_a_schedule_is_refused() -> None:
    with pytest.raises(TypeError, match=r"LearnedSchedule\.load reads files"):
        ReplayScheduler("schedule.json")  # type: ignore[arg-type]
