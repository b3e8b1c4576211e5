"""What the plots draw: a run's journal, and between its entries the rows that the trials reported to Tune."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from autolrs_ray.core.events import Event
from autolrs_ray.core.policies import DEFAULT_INTERVALS
from autolrs_ray.outcome.history import History
from autolrs_ray.outcome.result import RunResult
from autolrs_ray.record.stores import local_copy

Row = dict[str, Any]
REPORTS_FILE = "result.json"  # Tune's, one in every trial's folder


def series(rows: Iterable[Row], x: str, y: str, sign: float = 1.0) -> tuple[list[float], list[float]]:
    """The (x, sign * y) of those `rows` in which both are finite numbers."""
    pairs = [(row[x], sign * row[y]) for row in rows if _is_finite(row.get(x)) and _is_finite(row.get(y))]
    return [pair[0] for pair in pairs], [pair[1] for pair in pairs]


def _is_finite(value: Any) -> bool:
    return isinstance(value, (int, float)) and abs(value) <= sys.float_info.max


def read_reports(folder: Path, clock: str) -> dict[str, list[Row]]:
    """Reported rows of every arm, in order of `clock` (steps), from the result.json files of the trials in `folder`.

    A trial that was restarted or rolled back goes over old ground; what it reported there before is left out, and so are
    lines cut short by a kill. Empty where the trials' files are not here (no Ray).
    """
    reports: dict[str, list[Row]] = {}
    files = [
        (rows[0]["timestamp"] if _is_finite(rows[0].get("timestamp")) else 0, rows)
        for file in folder.glob(f"*/{REPORTS_FILE}")
        if (rows := read_lines(file))
    ]
    for _, rows in sorted(files, key=lambda item: item[0]):  # an arm may have had several trials, one after another
        for row in rows:
            arm = _segment(row).get("arm")
            if not isinstance(arm, str) or not _is_finite(row.get(clock)):
                continue
            kept = reports.setdefault(arm, [])
            while kept and kept[-1][clock] >= row[clock]:
                kept.pop()
            kept.append(row)
    return reports


def read_lines(file: Path) -> list[Row]:
    """The objects in a file of one JSON value per line; lines cut short by a kill are left out."""
    rows = []
    for line in file.read_text(errors="replace").splitlines():
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):
            continue
        if isinstance(row, dict):
            rows.append(row)
    return rows


def _segment(row: Row) -> Row:
    """The "autolrs" entry of a reported row's configuration (it may hold the arm's name only)."""
    config = row.get("config")
    entry = config.get("autolrs") if isinstance(config, dict) else None
    return entry if isinstance(entry, dict) else {"arm": entry}


@dataclass(frozen=True)
class RunData:
    """A run as the plots see it. reports: arm -> reported rows. clock: the key of the optimizer steps in them."""

    history: History
    reports: dict[str, list[Row]] = field(repr=False)

    @classmethod
    def of(cls, run: RunData | str | os.PathLike[str]) -> RunData:
        """The run itself, or what lies in its folder or at its URI; raises what `load` raises."""
        return run if isinstance(run, RunData) else cls.load(run)

    @classmethod
    def load(cls, folder: str | os.PathLike[str]) -> RunData:
        """Raises what History.read raises."""
        history = History.read(folder)
        with local_copy(os.fspath(folder), REPORTS_FILE) as copy:
            return cls(history, read_reports(Path(copy), history.config["time_attr"]))

    @cached_property
    def result(self) -> RunResult:
        return RunResult.of(self.history)

    @property
    def config(self) -> Row:
        return self.history.config

    @property
    def clock(self) -> str:
        return str(self.config["time_attr"])

    @property
    def metric(self) -> str:
        return str(self.config["metric"])

    @property
    def averaged(self) -> str:
        """Result key of the metric of averaged weights."""
        return str(self.config.get("averaged_metric", "averaged_loss"))

    @property
    def sign(self) -> float:
        """What the journal's losses are multiplied by to get the metric: it holds a metric of mode "max" negated."""
        return -1.0 if self.config["mode"] == "max" else 1.0

    def reported(self, loss: float | None) -> float | None:
        """The metric as it was reported, of a loss in the journal."""
        return None if loss is None else self.sign * loss

    @property
    def interval(self) -> tuple[float, float]:
        low, high = self.config.get("lr_interval") or DEFAULT_INTERVALS[self.history.policy]
        return low, high

    @property
    def anchored(self) -> bool:
        return self.history.anchored

    @property
    def arm(self) -> str:
        """The arm that is the main run (so far)."""
        return self.history.arm

    def rows(self, arm: str) -> list[Row]:
        """What `arm` reported, in order of steps: all that the journal holds of it, and Tune's rows in between.

        Tune's file may lose rows where a trial was restarted, or keep some that the run went back behind; the journal does
        not: at a step that both have, its values count.
        """
        rows = {row[self.clock]: row for row in self.reports.get(arm, [])}
        for row in self._journalled.get(arm, []):
            rows[row[self.clock]] = {**rows.get(row[self.clock], {}), **row}
        return [rows[step] for step in sorted(rows)]

    @cached_property
    def _journalled(self) -> dict[str, list[Row]]:
        """Arm -> the losses that the journal holds: of commits, of rungs (anchored), of probes as far as they were ranked."""
        found: dict[str, list[Row]] = {}
        starts = {event["stage"]: event["start"] for event in self.history.named(Event.STAGE)}
        for event in self.history.named(Event.PROBE):
            key, sign = ("train_loss", 1.0) if event["series"] == "training" else (self.metric, self.sign)
            steps = [starts.get(event["stage"], 0) + step for step in event["steps"]]
            losses = [
                (step, loss) for step, loss in zip(steps, event.get("losses", []), strict=False) if loss is not None
            ]
            found[event["arm"]] = [
                {self.clock: step, key: sign * loss, "timestamp": event.get("time")} for step, loss in losses
            ]
        for event in self.history.named(Event.RUNG, Event.EXTEND):
            if event["event"] == Event.RUNG:
                found.setdefault(event["arm"], []).append(self._loss_row(event["step"], event))
            else:  # what came after is trained again
                found = {arm: [row for row in rows if row[self.clock] <= event["step"]] for arm, rows in found.items()}
        for arm, commits in self.history.commits.items():
            found.setdefault(arm, []).extend(self._loss_row(row["end"], row) for row in commits)
        return found

    def _loss_row(self, step: int, event: Row) -> Row:
        """A report of the losses in `event`, as the trial made it."""
        row = {self.clock: step, "timestamp": event.get("time")}
        for key, value in ((self.metric, event.get("loss")), (self.averaged, event.get("averaged_loss"))):
            if value is not None:
                row[key] = self.sign * value
        return row

    def main_rows(self) -> list[Row]:
        """What the main run reported from its first step on: a stage's begins with what the probe reported whose state was
        promoted."""
        if self.anchored:
            return self.rows(self.arm)
        rows = {row[self.clock]: row for row in self.rows("main")}
        for commit in self.history.stages:
            inside = [step for step in rows if commit["start"] < step <= commit["end"]]
            lrs = {step: _segment(rows[step]).get("lr", commit["lr"]) for step in inside}
            for step in inside:  # of an attempt that was rolled back
                if lrs[step] != commit["lr"] and step != commit["end"]:
                    del rows[step]
            rows |= {row[self.clock]: row for row in self._promoted(commit, list(rows.values()))}
        return [rows[step] for step in sorted(rows)]

    def _promoted(self, commit: Row, main: list[Row]) -> list[Row]:
        """Reports of a winning probe that became the main trial's own first steps: it never trained those itself."""
        own = [event["start"] for event in self.history.named(Event.SEGMENT)
               if event["role"] == "main" and event["stage"] == commit["stage"] and event["lr"] == commit["lr"]]  # fmt: skip
        inside = [row for row in main if commit["start"] < row[self.clock] <= commit["end"]]
        own = own or [start for row in inside if _is_finite(start := _segment(row).get("start"))]
        chosen = (probe["arm"] for probe in self.history.named(Event.PROBE)
                  if probe["stage"] == commit["stage"] and probe["lr"] == commit["lr"])  # fmt: skip
        taken_up = min(own, default=commit["start"])
        return [row for row in self.rows(next(chosen, "")) if commit["start"] < row[self.clock] <= taken_up]

    def scores(self) -> dict[str, dict[int, float]]:
        """Anchored: arm -> {step: the metric the race looks at, of raw or averaged weights, whichever are better}."""
        keys = [self.metric, self.averaged] if self.config["options"].get("averaging", True) else [self.metric]
        found: dict[str, dict[int, float]] = {}
        for arm in {*self.reports, *self._journalled}:
            points: dict[int, float] = {}
            for key in keys:
                for step, value in zip(*series(self.rows(arm), self.clock, key), strict=True):
                    points[int(step)] = min(points.get(int(step), value), value, key=lambda x: self.sign * x)
            if points:
                found[arm] = points
        for event in self.history.named(
            Event.RUNG
        ):  # its score may be of a loss that guides the race for another metric
            if event.get("loss") is None and event.get("averaged_loss") is None and event["score"] is not None:
                found.setdefault(event["arm"], {})[event["step"]] = self.sign * event["score"]
        return {arm: dict(sorted(points.items())) for arm, points in sorted(found.items())}
