"""A run as one table: its stages or trunks, what they cost and what went wrong, as JSON values."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from autolrs_ray.core.events import Event
from autolrs_ray.show.choice import choice, edge
from autolrs_ray.show.run_data import RunData

Row = dict[str, Any]


def _stages(data: RunData) -> list[Row]:
    """One row per committed stage of a paper run."""
    probes: dict[int, dict[str, str]] = {}
    for event in data.history.named(Event.PROBE):
        probes.setdefault(event["stage"], {})[event["arm"]] = event["status"]
    return [
        dict(
            stage="warm-up" if row["warmup"] else row["stage"], start=row["start"], end=row["end"], lr=row["lr"],
            forecast=data.reported(row["forecast"]), realised=data.reported(row["loss"]),
            tried=len(statuses), failed=sum(status != "done" for status in statuses),
        )
        for row in data.history.rows
        for statuses in [list(probes.get(row["stage"], {}).values())]
    ]  # fmt: skip


def _trunks(data: RunData) -> list[Row]:
    """One row per trunk of an anchored run, the smallest LR first. step: how far it came."""
    found = data.scores()
    scores: dict[str, Row] = {}
    steps: dict[str, int] = {}
    for event in data.history.named(Event.RUNG):
        scores[event["arm"]] = event
        steps[event["arm"]] = max(event["step"], steps.get(event["arm"], 0))
    for event in data.history.named(Event.COMMIT):
        steps[event["arm"]] = max(event["end"], steps.get(event["arm"], 0))
    rows = [
        dict(
            arm=arm, lr=lr, rung=scores.get(arm, {}).get("step"),
            score=found.get(arm, {}).get(scores.get(arm, {}).get("step", -1)),
            fate=data.history.fates[arm], step=steps.get(arm, 0),
        )
        for arm, lr in data.history.lrs.items()
    ]  # fmt: skip
    return sorted(rows, key=lambda row: float(row["lr"]))


def _totals(data: RunData) -> Row:
    """What the run cost. Times in seconds; None where the journal holds no segments (a run without Ray)."""
    result, timing = data.result, data.result.timing
    measured = bool(data.history.named(Event.SEGMENT))
    return dict(
        total_steps=data.history.total_steps, main_steps=result.main_steps,
        search_steps=result.search_steps if measured else None, compute=result.compute if measured else None,
        wall_s=timing.wall_s, training_s=timing.training_s if measured else None,
        probing_s=timing.probing_s if measured else None, overhead_s=timing.overhead_s if measured else None,
        max_concurrent=timing.max_concurrent if measured else None,
    )  # fmt: skip


def _warnings(data: RunData) -> list[str]:
    """What went wrong, in order, whether it was mended or has ended the run; and a choice at the edge of what was tried."""
    told = []
    for event in data.history.named(Event.WARNING, Event.ADVICE, Event.ERROR, Event.ROLLBACK, Event.RESUME):
        if event["event"] in (Event.WARNING, Event.ADVICE):
            told.append(event["message"])
        elif event["event"] == Event.ERROR:
            told.append(f"the run was ended: {event['message']}")
        elif event["event"] == Event.ROLLBACK:
            told.append(f"stage {event['stage']}: at step {event['step']} the main trial was above the stage's start, with LR "
                        f"{event['lr']:.3g}; trained again with {event['new_lr']:.3g}")  # fmt: skip
        else:
            told.append(f"the run was interrupted, and resumed from step {event['step']}")
    at_edge = edge(data)
    return [*told, at_edge] if at_edge else told


def summary(data: RunData) -> Row:
    """What `show` shows, as JSON values. Scores and losses are the metric as it was reported."""
    rows = dict(trunks=_trunks(data)) if data.anchored else dict(stages=_stages(data))
    chosen = choice(data)
    return dict(
        folder=str(data.history.folder), policy=data.config["policy"], done=data.result.done, metric=data.metric,
        mode=data.config["mode"], value=data.result.metric, checkpoint=data.result.checkpoint, **rows,
        choice=None if chosen is None else {**asdict(chosen), "clear": chosen.clear, "text": chosen.sentence(data.metric)},
        points=[{**asdict(point), "text": point.sentence(data.metric, data.history.total_steps, data.result.done)}
                for point in data.result.points],
        totals=_totals(data), warnings=_warnings(data),
    )  # fmt: skip
