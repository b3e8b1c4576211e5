"""What the plots draw: a run's journal, and the rows its trials reported to Tune where they are still there."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from autolrs_ray.core.policies import DEFAULT_INTERVALS
from autolrs_ray.result import RunResult, winner
from autolrs_ray.storage import local_copy

Row = dict[str, Any]
AVERAGED = "averaged_loss"
REPORTS_FILE = "result.json"  # Tune's, one in every trial's folder


def run_config(events: Iterable[Row]) -> Row:
    """The configuration in a journal's "start" event."""
    config: Row = next(event["config"] for event in events if event["event"] == "start")
    return config


def series(rows: Iterable[Row], x: str, y: str, sign: float = 1.0) -> tuple[list[float], list[float]]:
    """The (x, sign * y) of those `rows` in which both are finite numbers."""
    pairs = [(row[x], sign * row[y]) for row in rows if _is_finite(row.get(x)) and _is_finite(row.get(y))]
    return [pair[0] for pair in pairs], [pair[1] for pair in pairs]


def _is_finite(value: Any) -> bool:
    return isinstance(value, (int, float)) and math.isfinite(value)


def read_reports(folder: Path, clock: str) -> dict[str, list[Row]]:
    """Reported rows of every arm, in order of `clock` (steps), from the result.json files of the trials in `folder`.

    A trial that was restarted or rolled back goes over old ground; what it reported there before is left out, and so are
    lines cut short by a kill. Empty where the trials' files are not here (no Ray).
    """
    reports: dict[str, list[Row]] = {}
    files = [
        (rows[0].get("timestamp") or 0, rows) for file in folder.glob(f"*/{REPORTS_FILE}") if (rows := _rows(file))
    ]
    for _, rows in sorted(files, key=lambda item: item[0]):  # an arm may have had several trials, one after another
        for row in rows:
            arm = _segment(row).get("arm")
            if arm is None or not _is_finite(row.get(clock)):
                continue
            kept = reports.setdefault(arm, [])
            while kept and kept[-1][clock] >= row[clock]:
                kept.pop()
            kept.append(row)
    return reports


def _rows(file: Path) -> list[Row]:
    rows = []
    for line in file.read_text().splitlines():
        try:
            row = json.loads(line)
        except ValueError:
            continue
        if isinstance(row, dict):
            rows.append(row)
    return rows


def _segment(row: Row) -> Row:
    """The "autolrs" entry of a reported row's configuration (it may hold the arm's name only)."""
    entry = (row.get("config") or {}).get("autolrs")
    return entry if isinstance(entry, dict) else {"arm": entry}


@dataclass(frozen=True)
class RunData:
    """A run as the plots see it. reports: arm -> reported rows. clock: the key of the optimizer steps in them."""

    result: RunResult
    config: Row = field(repr=False)
    reports: dict[str, list[Row]] = field(repr=False)

    @classmethod
    def load(cls, folder: str | os.PathLike[str]) -> RunData:
        """Raises what RunResult.load raises."""
        result = RunResult.load(folder)
        config = run_config(result.events)
        with local_copy(os.fspath(folder), REPORTS_FILE) as copy:
            return cls(result, config, read_reports(Path(copy), config["time_attr"]))

    @property
    def clock(self) -> str:
        return str(self.config["time_attr"])

    @property
    def metric(self) -> str:
        return str(self.config["metric"])

    @property
    def sign(self) -> float:
        """What the journal's losses are multiplied by to get the metric: it holds a metric of mode "max" negated."""
        return -1.0 if self.config["mode"] == "max" else 1.0

    def reported(self, loss: float | None) -> float | None:
        """The metric as it was reported, of a loss in the journal."""
        return None if loss is None else self.sign * loss

    @property
    def interval(self) -> tuple[float, float]:
        low, high = self.config["lr_interval"] or DEFAULT_INTERVALS[self.config["policy"]]
        return low, high

    @property
    def anchored(self) -> bool:
        return bool(self.config["policy"] == "anchored")

    @property
    def arm(self) -> str:
        """The arm that is the main run (so far)."""
        return winner(self.result.events, self.config)

    def events(self, name: str) -> Iterator[Row]:
        return (event for event in self.result.events if event["event"] == name)

    def commits(self, warmup: bool = False) -> list[Row]:
        """Paper: one row per committed stage. Where the run went back to an older checkpoint, only what came after counts.

        warmup: with the warm-up, whose stage is -1, as the first row.
        """
        kept: list[Row] = []
        for row in self.result.rows:
            kept = [*(before for before in kept if before["end"] <= row["start"]), row]
        return [row for row in kept if warmup or not row["warmup"]]

    def boundaries(self) -> list[int]:
        """Steps between 0 and the end at which a stage ended (paper) or the race compared its trunks (anchored)."""
        if self.anchored:
            steps = {event["step"] for event in self.events("decision")}
        else:
            steps = {row["end"] for row in self.commits(warmup=True)}
        return sorted(step for step in steps if 0 < step < self.config["total_steps"])

    def main_rows(self) -> list[Row]:
        """Reports of the main run, or else rows with its metric at every commit."""
        rows = self.reports.get(self.arm, [])
        if rows and not self.anchored:
            rows = sorted([*self._promoted(rows), *rows], key=lambda row: float(row[self.clock]))
        return rows or [self._commit_row(row) for row in (self.result.rows if self.anchored else self.commits(True))]

    def _commit_row(self, commit: Row) -> Row:
        row = {self.clock: commit["end"]}
        for key, value in ((self.metric, commit.get("loss")), (AVERAGED, commit.get("averaged_loss"))):
            if value is not None:
                row[key] = self.sign * value
        return row

    def _promoted(self, main: list[Row]) -> Iterator[Row]:
        """Reports of winning probes that became the main trial's own first steps: it never trained those itself."""
        for commit in self.commits():
            inside = [row for row in main if commit["start"] < row[self.clock] <= commit["end"]]
            taken_up: int = min(
                (_segment(row).get("start") or commit["start"] for row in inside), default=commit["end"]
            )
            chosen = (probe["arm"] for probe in self.events("probe")
                      if probe["stage"] == commit["stage"] and probe["lr"] == commit["lr"])  # fmt: skip
            for row in self.reports.get(next(chosen, ""), []):
                if commit["start"] < row[self.clock] <= taken_up:
                    yield row

    def scores(self) -> dict[str, dict[int, float]]:
        """Anchored: arm -> {step: the metric the race looks at, of averaged weights where they are reported}."""
        found: dict[str, dict[int, float]] = {}
        for event in self.result.events:
            if event["event"] == "commit" and "arm" in event:
                value = event["loss"] if event.get("averaged_loss") is None else event["averaged_loss"]
                if value is not None:
                    found.setdefault(event["arm"], {})[event["end"]] = self.sign * value
        for event in self.events("rung"):
            found.setdefault(event["arm"], {})[event["step"]] = self.sign * event["score"]
        for arm, rows in self.reports.items():  # finer than the journal: where there are reports, they are the curve
            key = AVERAGED if any(AVERAGED in row for row in rows) else self.metric
            steps, values = series(rows, self.clock, key)
            if steps:
                found[arm] = {int(step): value for step, value in zip(steps, values, strict=True)}
        return {arm: dict(sorted(points.items())) for arm, points in sorted(found.items())}

    def lrs(self) -> dict[str, float]:
        """Arm -> its learning rate (anchored: the scale of its envelope)."""
        return {event["arm"]: event["lr"] for event in self.events("proposal")}

    def fates(self) -> dict[str, str]:
        """Anchored: arm -> "won", "open", "dropped", "diverged" or "failed"."""
        fates = dict.fromkeys(self.lrs(), "open")
        fates.update({event["arm"]: event["status"] for event in self.events("trunk")})
        fates.update({event["arm"]: "won" for event in self.events("done") if "arm" in event})
        return fates
