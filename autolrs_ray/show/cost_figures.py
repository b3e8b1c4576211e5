"""A plot of what the run kept busy: its slots over the wall-clock."""

from __future__ import annotations

from typing import Any

from autolrs_ray.core.events import Event
from autolrs_ray.show.run_data import RunData
from autolrs_ray.show.style import legend_below, new_figure, whole_numbers

_UNITS = ((7200.0, 3600.0, "hours"), (120.0, 60.0, "minutes"), (0.0, 1.0, "seconds"))


def slots_figure(data: RunData) -> Any | None:
    """Workers that trained or evaluated at the same time, against the time since the first trial began: those of the main run,
    and all others above them. Where trials grow a line shows how many there is room for. None where the journal holds no times
    of trials."""
    segments = data.history.named(Event.SEGMENT)
    if not segments:
        return None
    first = min(segment["began"] for segment in segments)
    last = max(segment["began"] + segment["busy_s"] for segment in segments) - first
    unit, name = next((unit, name) for least, unit, name in _UNITS if last >= least)
    spans = [
        (
            (segment["began"] - first) / unit,
            (segment["began"] - first + segment["busy_s"]) / unit,
            segment.get("workers", 1),
            segment["arm"] == data.arm,
        )
        for segment in segments
    ]
    times = sorted({0.0, *(time for low, high, *_ in spans for time in (low, high))})
    main = _running(times, [(low, high, workers) for low, high, workers, own in spans if own])
    busy = _running(times, [(low, high, workers) for low, high, workers, _ in spans])
    sizes = data.history.named(Event.WORKERS)
    figure = new_figure(8.0, 3.2)
    axes = figure.subplots()
    axes.fill_between(
        times, 0, main, step="post", color="C1", linewidth=0, label="the winner" if data.anchored else "the main run"
    )
    axes.fill_between(times, main, busy, step="post", color="C5", linewidth=0,
                      label="other learning rates" if data.anchored else "probes")  # fmt: skip
    if sizes:
        room = [sizes[0]["slots"], *(event["slots"] for event in sizes)]
        since = [0.0, *(max(0.0, (event["time"] - first) / unit) for event in sizes), times[-1]]
        axes.step(since, [*room, room[-1]], where="post", color="0.4", linestyle="--", linewidth=1, label="room for")
    grown = sizes or any(workers > 1 for *_, workers, _ in spans)
    most = max([*busy, *(event["slots"] for event in sizes)])
    axes.set(xlabel=f"{name} since the first trial began", ylabel="workers" if grown else "trials at work",
             title="Slots in use", xlim=(0, times[-1] or 1.0), ylim=(0, 1.05 * most + 0.25))  # fmt: skip
    axes.yaxis.set_major_locator(whole_numbers(6))
    legend_below(figure)
    return figure


def _running(times: list[float], spans: list[tuple[float, float, int]]) -> list[int]:
    """How many workers those of `spans` have that cover the stretch which begins at each of `times`, where all spans end."""
    change = dict.fromkeys(times, 0)
    for low, high, workers in spans:
        change[low] += workers
        change[high] -= workers
    running, counts = 0, []
    for time in times:
        running += change[time]
        counts.append(running)
    return counts
