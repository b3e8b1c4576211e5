"""What a run found and what it cost, read from its journal."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

from autolrs_ray.core.events import Event
from autolrs_ray.outcome.history import History
from autolrs_ray.outcome.points import OwnPoint, own_points
from autolrs_ray.outcome.schedule import LearnedSchedule
from autolrs_ray.record.stores import local_copy


@dataclass(frozen=True)
class Timing:
    """Seconds. wall_s: first event to last, waiting for a resume left out. training_s and probing_s: the time in which the
    main trial, or else probes only, trained or evaluated; overhead_s: the rest. trial_s: summed over all trials; worker_s: and
    over the workers of each."""

    wall_s: float
    training_s: float
    probing_s: float
    overhead_s: float
    trial_s: float
    worker_s: float
    max_concurrent: int


@dataclass(frozen=True)
class RunResult:
    """Outcome of a run.

    schedule: the learning rate at every step. checkpoint: folder of the final state, or its URI, where the run's is one.
    metric: the final validation metric as it was reported, of the weights named by `weights`. loss: the same as a loss, negated
    for mode "max". main_steps, search_steps: optimizer steps committed,
    and trained beside them. grown_steps: what steps whose batches have grown cost beyond one of the batch's own size, in such.
    rows: one dict per committed stage (paper) or checkpoint of the winner (anchored). points: what became of each of
    `points_to_evaluate`. events: the whole journal.
    """

    folder: Path | str
    done: bool
    policy: str
    metric: float | None
    loss: float | None
    checkpoint: str | None
    schedule: LearnedSchedule
    rows: list[dict[str, Any]] = field(repr=False)
    main_steps: int
    search_steps: int
    grown_steps: int
    timing: Timing
    points: list[OwnPoint]
    events: list[dict[str, Any]] = field(repr=False)

    @property
    def compute(self) -> float:
        """Optimizer steps of all trials over the steps of the main training (the paper's policy: 1.9). A step whose batch has
        grown counts as many times."""
        return (self.main_steps + self.search_steps + self.grown_steps) / max(1, self.main_steps)

    @property
    def warnings(self) -> list[str]:
        """What was warned of in the course of the run: a winner at an end of the interval, nothing learned, trouble that was
        mended."""
        return [event["message"] for event in self.events if event["event"] == Event.WARNING]

    @property
    def weights(self) -> str:
        """Which weights of the final checkpoint are better on the validation data: "averaged" or "raw"."""
        last = self.rows[-1] if self.rows else {}
        raw, averaged = last.get("loss"), last.get("averaged_loss")
        return "averaged" if averaged is not None and (raw is None or averaged <= raw) else "raw"

    def model_state(self) -> dict[str, Any]:
        """The final model's state_dict on the CPU, of the weights named by `weights`; for runs of a TrainingTask.

        Raises ValueError if the run has no checkpoint yet or one of another version's format, CheckpointError if it cannot be
        read.
        """
        from autolrs_ray.record.checkpoints import model_weights, read_checkpoint, require_format

        if self.checkpoint is None:
            raise ValueError(f"the run in {self.folder} has committed no checkpoint yet")
        with local_copy(self.checkpoint) as folder:
            state = read_checkpoint(folder)
        require_format(state)
        return model_weights(state, averaged=self.weights == "averaged")

    @classmethod
    def load(cls, folder: str | os.PathLike[str]) -> RunResult:
        """Read the run in `folder` or at its URI.

        Raises FileNotFoundError if it holds no journal, ValueError if it never started.
        """
        return cls.of(History.read(folder))

    @classmethod
    def of(cls, history: History) -> RunResult:
        """What `history` tells."""
        rows, segments = history.rows, history.named(Event.SEGMENT)
        last = history.done or (rows[-1] if rows else {})
        trained = sum(event["end"] - event["start"] for event in segments)
        batches = sum(history.growth.first(event["end"]) - history.growth.first(event["start"]) for event in segments)
        main_steps = max((row["end"] for row in rows), default=0)
        found = [last.get(key) for key in ("loss", "averaged_loss")]  # of the better weights, at the end as before it
        loss = min((value for value in found if value is not None), default=None)
        metric = -loss if loss is not None and history.config["mode"] == "max" else loss
        return cls(
            folder=history.folder, done=history.done is not None, policy=history.policy, metric=metric, loss=loss,
            checkpoint=last.get("checkpoint"), schedule=LearnedSchedule.of(history), rows=rows, main_steps=main_steps,
            search_steps=max(0, trained - main_steps), grown_steps=batches - trained, timing=_timing(history, segments),
            points=own_points(history), events=history.events,
        )  # fmt: skip


def _timing(history: History, segments: list[dict[str, Any]]) -> Timing:
    timed = [event for event in history.events if "time" in event]
    times = [event["time"] for event in timed]
    gaps = [event["time"] - before["time"] for before, event in pairwise(timed) if event["event"] == Event.RESUME]
    wall_s = times[-1] - times[0] - sum(gaps) if times else 0.0
    spans = [(e["began"], e["began"] + e["busy_s"], e["arm"] == history.arm) for e in segments]
    main_s = _covered([(low, high) for low, high, main in spans if main])
    any_s = _covered([(low, high) for low, high, _ in spans])
    edges = sorted([(low, 1) for low, _, _ in spans] + [(high, -1) for _, high, _ in spans])
    most = running = 0
    for _, change in edges:
        running += change
        most = max(most, running)
    trial_s = sum(high - low for low, high, _ in spans)
    worker_s = sum(e["busy_s"] * e.get("workers", 1) for e in segments)
    return Timing(wall_s, main_s, any_s - main_s, max(0.0, wall_s - any_s), trial_s, worker_s, most)


def _covered(spans: list[tuple[float, float]]) -> float:
    """Length of the union of intervals."""
    total, end = 0.0, float("-inf")
    for low, high in sorted(spans):
        total += max(0.0, high - max(low, end))
        end = max(end, high)
    return total
