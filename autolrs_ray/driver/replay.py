"""Replays a learned schedule in plain Tune: no search, every trial trains under the schedule from step 0 to its end."""

from __future__ import annotations

from itertools import pairwise
from typing import TYPE_CHECKING, Any

from ray.tune.experiment import Trial
from ray.tune.schedulers import FIFOScheduler

from autolrs_ray.core.checks import require_int
from autolrs_ray.core.segments import Segment
from autolrs_ray.driver.reports import check_batches, check_lr, step_of
from autolrs_ray.outcome.schedule import LearnedSchedule, Piece

if TYPE_CHECKING:
    from ray.tune.execution.tune_controller import TuneController

MOST_PIECES = 1000


class ReplayScheduler(FIFOScheduler):  # type: ignore[misc]
    """Tune scheduler that trains every trial under `schedule` and stops it at the end. Give it to Tune without a searcher.

    The trials are those that the pair takes: they read `config["lr"]` after a restore, or call `autolrs_ray.lr_at`. Where
    the schedule changes its piece, the trial is checkpointed, paused and continued with the new piece in its config, as
    PBT does; a function trainable must attach a checkpoint to its report there. Trials may differ in all other settings.

    schedule: one without gaps. time_attr: result key of the optimizer steps done. reports: reports per piece that trainables
    with a say in it (AutoLRSTrainable) make.

    Raises ValueError for a schedule that is empty, does not begin at step 0 or has gaps, TypeError for anything else.
    """

    def __init__(self, schedule: LearnedSchedule, time_attr: str = "step", reports: int = 10) -> None:
        super().__init__()
        if not isinstance(schedule, LearnedSchedule):
            raise TypeError(f"schedule must be a LearnedSchedule, got {schedule!r}; LearnedSchedule.load reads files")
        self._pieces = _checked(schedule)
        self._total_steps, self._growth, self._time_attr = schedule.total_steps, schedule.growth.points, time_attr
        self._reports = require_int("reports", reports, 1)
        self._before: dict[str, int] = {}

    def _segment(self, index: int) -> Segment:
        piece = self._pieces[index]
        return Segment(arm="main", role="main", stage=index, lr=piece.lr, start=piece.start, boundaries=(piece.end,),
                       reports=self._reports, envelope=piece.envelope, total_steps=self._total_steps,
                       warmup_steps=piece.warmup_steps, growth=self._growth)  # fmt: skip

    def _configure(self, trial: Trial, index: int) -> None:
        segment = self._segment(index)
        trial.set_config({**trial.config, "lr": segment.lr_at(segment.start), "autolrs": segment.to_config()})

    def on_trial_add(self, tune_controller: TuneController, trial: Trial) -> None:
        if "autolrs" not in trial.config:  # a trial of a restored experiment goes on with its own piece
            self._configure(trial, 0)

    def on_trial_result(self, tune_controller: TuneController, trial: Trial, result: dict[str, Any]) -> str:
        step = step_of(result, self._time_attr)
        segment = Segment.from_config(trial.config["autolrs"])
        check_lr(result, segment, self._before.get(trial.trial_id, segment.start), step)
        check_batches(result, segment, step)
        self._before[trial.trial_id] = step
        if step >= self._pieces[-1].end:
            return str(self.STOP)
        index = next(i for i, piece in enumerate(self._pieces) if step < piece.end)
        if index == segment.stage:
            return str(self.CONTINUE)
        if _has_no_checkpoint(trial, result):
            if index > segment.stage + 1:
                raise ValueError(
                    f"{trial} came to step {step} without a checkpoint since the schedule changed at step {segment.end}: "
                    "pass checkpoint= to tune.report at every report, or at least at the ends of the schedule's pieces"
                )
            return str(self.CONTINUE)
        self._configure(trial, index)
        return str(self.PAUSE)

    def debug_string(self) -> str:
        return f"AutoLRS replay: {len(self._pieces)} pieces, {self._total_steps} steps"


def _checked(schedule: LearnedSchedule) -> tuple[Piece, ...]:
    """The pieces; ValueError where a trial could not be trained under them from step 0 to the end."""
    pieces = schedule.pieces
    if not pieces or pieces[0].start != 0:
        raise ValueError(f"the schedule must begin at step 0, but its pieces are {pieces[:1] or 'none'}")
    if len(pieces) > MOST_PIECES:
        raise ValueError(
            f"the schedule has {len(pieces)} pieces, and each takes a checkpoint (at most {MOST_PIECES}): load the run folder "
            "or its JSON export, which has one piece per stage, instead of a CSV file with a row per step"
        )
    for before, after in pairwise(pieces):
        if after.start != before.end:
            raise ValueError(f"the schedule has no learning rate from step {before.end} to {after.start}")
    schedule.to_json()  # refuses an envelope that was a function of the user's own
    return pieces


def _has_no_checkpoint(trial: Trial, result: dict[str, Any]) -> bool:
    """True for a report of a function trainable that nothing was attached to: its state cannot be saved."""
    from ray.tune.trainable.function_trainable import FunctionTrainable

    return issubclass(trial.get_trainable_cls(), FunctionTrainable) and result.get("checkpoint_dir_name") is None
