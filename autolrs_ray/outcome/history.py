"""A run as its journal tells it, read once: the schedule, the result, plots, table, report and TensorBoard ask it."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from autolrs_ray.core.events import Event
from autolrs_ray.core.growth import BatchGrowth, require_growth
from autolrs_ray.outcome.shapes import complete_config, refuse_foreign, what_is_wrong
from autolrs_ray.record.journal import RecordWarning, read_journal
from autolrs_ray.record.stores import is_uri, located

Row = dict[str, Any]


@dataclass(frozen=True)
class History:
    """What happened in a run. Losses are as the policy saw them: a metric of mode "max" is negated.

    folder: the run's folder, or its URI. config: what it was asked to do, with the options that it went by. events: all of
    the journal's, in order, checkpoints at their places of today.
    """

    folder: Path | str
    config: Row = field(repr=False)
    events: list[Row] = field(repr=False)

    @classmethod
    def read(cls, folder: str | os.PathLike[str]) -> History:
        """The run in `folder` or at its URI. Damaged lines, and such as no version has written, raise RecordWarning.

        Raises FileNotFoundError if it holds no journal, ValueError if it never started or another version wrote it.
        """
        return cls.of(read_journal(folder), folder)

    @classmethod
    def of(cls, events: Iterable[Row], folder: str | os.PathLike[str] = "") -> History:
        """The run whose journal holds `events`. Raises and warns as `read` does."""
        events = list(events)
        start = next((event for event in events if event.get("event") == Event.START), None)
        if start is None:
            raise ValueError(f"the journal in {folder} has no start: its first line is damaged")
        refuse_foreign(events, f"the journal in {folder}")
        config = complete_config(start.get("config"), f"the journal in {folder}")
        wrong = [(event, problem) for event in events if (problem := what_is_wrong(event, config["policy"]))]
        if wrong:
            message = f"{folder}: {len(wrong)} line(s) that make no sense left out; the first: {wrong[0][1]}"
            warnings.warn(message, RecordWarning, stacklevel=3)
        bad = {id(event) for event, _ in wrong}
        place = os.fspath(folder)
        kept = [_placed(event, place) for event in events if id(event) not in bad]
        return cls(place if is_uri(place) else Path(place), config, kept)

    def named(self, *names: Event) -> list[Row]:
        """The events called so, in order."""
        return [event for event in self.events if event["event"] in names]

    # -- what was asked ------------------------------------------------------------------------------------------------

    @property
    def policy(self) -> str:
        return str(self.config["policy"])

    @property
    def anchored(self) -> bool:
        return self.policy == "anchored"

    @property
    def envelope(self) -> str | None:
        """The envelope's name; None where there is none. One that was the user's own function cannot be computed again."""
        default = "quadratic" if self.anchored else None  # of records that do not hold it
        envelope: str | None = self.config["options"].get("envelope", default)
        return envelope

    @cached_property
    def growth(self) -> BatchGrowth:
        """How the batch grew, by steps."""
        return BatchGrowth.of(require_growth(self.config["options"].get("batch_growth")), self.total_steps)

    @cached_property
    def total_steps(self) -> int:
        """Steps of the run, as last extended."""
        return int([self.config, *self.named(Event.EXTEND)][-1]["total_steps"])

    # -- what happened -------------------------------------------------------------------------------------------------

    @cached_property
    def done(self) -> Row | None:
        """The event that ended the run; None while it goes on, and where it was extended after that."""
        last = next(iter(reversed(self.named(Event.DONE, Event.EXTEND))), None)
        return last if last is not None and last["event"] == Event.DONE else None

    @cached_property
    def arm(self) -> str:
        """The arm that is the main run: "main" (paper), the winning trunk, or the leader so far (anchored)."""
        if not self.anchored:
            return "main"
        done = self.named(Event.DONE)
        if done:
            return str(done[-1]["arm"])
        fates = self.fates
        alive = [event for event in self.named(Event.RUNG) if fates.get(event["arm"], "open") == "open"]
        best = min(alive, key=lambda event: (-event["step"], event["score"] is None, event["score"]), default=None)
        return "t00" if best is None else str(best["arm"])

    @cached_property
    def commits(self) -> dict[str, list[Row]]:
        """Arm -> its commits in order of steps. Where it lost a checkpoint and went back, the later ones count."""
        kept: dict[str, list[Row]] = {}
        for event in self.named(Event.COMMIT):
            arm, start = event.get("arm", "main"), event.get("start", event["end"] - 1)
            kept[arm] = [*(earlier for earlier in kept.get(arm, []) if earlier["end"] <= start), event]
        return kept

    @property
    def rows(self) -> list[Row]:
        """The commits of the main run."""
        return self.commits.get(self.arm, [])

    @property
    def stages(self) -> list[Row]:
        """Paper: the commits of the main run without its warm-up."""
        return [row for row in self.rows if not row["warmup"]]

    @cached_property
    def boundaries(self) -> list[int]:
        """Steps between 0 and the end at which a stage ended (paper) or the race compared its trunks (anchored)."""
        ends = (
            {event["step"] for event in self.named(Event.DECISION)} if self.anchored else {r["end"] for r in self.rows}
        )
        return sorted(step for step in ends if 0 < step < self.total_steps)

    @cached_property
    def lrs(self) -> dict[str, float]:
        """Arm -> its learning rate (anchored: the scale of its envelope)."""
        return {event["arm"]: float(event["lr"]) for event in self.named(Event.PROPOSAL)}

    @cached_property
    def fates(self) -> dict[str, str]:
        """Anchored: arm -> "untried", "open", "waiting", "dropped", "diverged", "failed" or "won"."""
        fates = {event["arm"]: str(event.get("status", "open")) for event in self.named(Event.PROPOSAL)}
        fates.update({event["arm"]: event["status"] for event in self.named(Event.TRUNK)})
        fates.update({event["arm"]: "won" for event in self.named(Event.DONE) if "arm" in event})
        return fates

    @property
    def lives(self) -> list[Row]:
        """What each process that drove the run ran on, where the journal says it."""
        return [event["environment"] for event in self.named(Event.START, Event.RESUME) if "environment" in event]


def _placed(event: Row, folder: str) -> Row:
    """`event` with its checkpoint at the place that it has today."""
    path = event.get("checkpoint")
    return event if path is None else {**event, "checkpoint": located(folder, path)}
