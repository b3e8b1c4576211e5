"""What stands under the report's figures: not what is drawn, but what came out."""

from __future__ import annotations

from collections import Counter
from statistics import fmean

from autolrs_ray.core.events import Event
from autolrs_ray.show.main_figures import name_of
from autolrs_ray.show.run_data import RunData, series


def number(value: float) -> str:
    return f"{value:.4g}"


def of_schedule(data: RunData) -> str:
    low, high = data.interval
    over = f"over the interval from {low:.3g} to {high:.3g} that was searched"
    others = len(data.scores().keys() & data.history.lrs.keys() - {data.arm})
    if data.anchored:
        peak = data.result.schedule.peak_lr
        grey = f"; grey, the {others} others as far as they trained" if others else ""
        return f"The learning rate of every step, {peak:.3g} at its peak, {over}{grey}."
    stages, probes = len(data.history.stages), len(data.history.lrs)
    return f"The learning rate of every step, {stages} stages, {over}; grey, the {probes} probes."


def of_curve(data: RunData, keys: tuple[str, ...]) -> str:
    """First and last value of each of `keys` that the main run reported."""
    told = []
    for key in keys:
        _, values = series(data.main_rows(), data.clock, key)
        if values:
            told.append(f"{name_of(key)} from {number(values[0])} to {number(values[-1])}")
    return "; ".join(told)[:1].upper() + "; ".join(told)[1:] + "." if told else "What the main run reported."


def of_loss(data: RunData) -> str:
    keys = ("train_loss", data.metric, data.averaged) if data.sign > 0 else ("train_loss", "val_loss", "averaged_loss")
    return of_curve(data, keys)


def of_accuracy(data: RunData) -> str:
    return of_curve(data, (data.metric, data.averaged) if data.sign < 0 else ("val_accuracy", "averaged_accuracy"))


def of_race(data: RunData) -> str:
    lrs = sorted(data.history.lrs.values())
    ends = Counter(data.history.fates.values())
    told = [f"{count} {fate}" for fate, count in ends.items() if fate not in ("won", "open")]
    ended = f"; {', '.join(told)}" if told else ""
    open_ = f"; {ends['open']} still in the race" if ends["open"] else ""
    won = f"; {data.history.lrs[data.arm]:.3g} won" if data.result.done else ""
    return f"{len(lrs)} learning rates from {lrs[0]:.3g} to {lrs[-1]:.3g}{ended}{open_}{won}. Dotted: where they were compared."


def of_surrogate(data: RunData) -> str:
    probes = data.history.named(Event.PROBE)
    lost = sum(probe["status"] != "done" for probe in probes)
    gone = f", {lost} of which diverged or failed" if lost else ""
    return (
        f"{len(probes)} probes{gone}; the star is the learning rate with the lowest forecast, which trained the stage."
    )


def of_forecasts(data: RunData) -> str:
    rows = [row for row in data.history.stages if row["forecast"] is not None and row["loss"] is not None]
    off = fmean(abs(row["forecast"] - row["loss"]) for row in rows)
    over = sum(row["forecast"] < row["loss"] for row in rows)
    return f"On average a forecast was {number(off)} off; {over} of {len(rows)} promised more than came true (above the line)."


def of_slots(data: RunData) -> str:
    timing = data.result.timing
    if sizes := data.history.named(Event.WORKERS):
        room, counts = max(event["slots"] for event in sizes), sorted({event["workers"] for event in sizes})
        share = timing.worker_s / (timing.wall_s * room) if timing.wall_s > 0 else 0.0
        return f"Trials of {' or '.join(map(str, counts))} workers kept {share:.0%} of {room} slots at work over the whole run."
    most = timing.max_concurrent
    share = timing.trial_s / (timing.wall_s * most) if timing.wall_s > 0 and most else 0.0
    return f"At most {most} trials at a time, which kept {share:.0%} of so many slots at work over the whole run."
