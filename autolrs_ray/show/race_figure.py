"""The plot of a race: the scores, and below them who was in play, who waited and who joined when."""

from __future__ import annotations

import math
from typing import Any

from autolrs_ray.core.events import Event
from autolrs_ray.outcome.history import History
from autolrs_ray.show.main_figures import name_of
from autolrs_ray.show.run_data import RunData
from autolrs_ray.show.style import LR, STEPS, colours_of_lr, legend_below, mark_steps, new_figure, plain_log, scale_loss

_ENDS = {"dropped": "X", "diverged": "^", "failed": "s"}


def race_figure(data: RunData) -> Any | None:
    """Score of every trunk against steps, coloured by LR and named at its end; those that ended early with a mark, the winner
    thick.

    Below, a row for each LR: thick while it was in play, thin as far as it was trained, with a mark where it joined.
    """
    scores, lrs, fates = data.scores(), data.history.lrs, data.history.fates
    scores = {arm: points for arm, points in scores.items() if arm in lrs}
    if not data.anchored or not scores:
        return None
    first = sorted(next(iter(points.values())) for points in scores.values())
    start = first[len(first) // 2]  # of the median trunk: a diverging one must not set the scale
    edge = start + 0.5 * abs(start) if data.sign > 0 else -math.inf
    figure = new_figure(8.0, 6.6)
    axes, rows = figure.subplots(2, 1, sharex=True, height_ratios=(3.0, 1.7))
    shades = colours_of_lr(*data.interval)
    yours = data.config["options"].get("points_to_evaluate") or ()
    ends = []
    for arm, points in scores.items():
        steps = list(points)
        values = [min(value, edge) if data.sign > 0 else value for value in points.values()]
        won, colour = fates[arm] == "won", shades.to_rgba(lrs[arm])
        own = (0, (3, 1)) if lrs[arm] in yours else "-"
        axes.plot(steps, values, color=colour, linewidth=3.2 if won else 1.4, zorder=1 if won else 2, linestyle=own,
                  label=f"winner (LR {lrs[arm]:.3g})" if won else None)  # fmt: skip
        ends.append((float(steps[-1]), values[-1], lrs[arm]))
        if fates[arm] in _ENDS:
            axes.plot(steps[-1], values[-1], _ENDS[fates[arm]], color=colour, markersize=9, markeredgecolor="0.1",
                      markeredgewidth=0.8, zorder=5, clip_on=False)  # fmt: skip
    for fate in sorted(set(fates.values()) & set(_ENDS)):
        axes.plot(
            [], [], _ENDS[fate], color="0.7", markersize=9, markeredgecolor="0.1", markeredgewidth=0.8, label=fate
        )
    if set(yours) & {lrs[arm] for arm in scores}:
        axes.plot([], [], color="0.5", linewidth=1.4, linestyle=(0, (3, 1)), label="yours")
    drawn = [value for points in scores.values() for value in points.values()]
    added = scale_loss(axes, [min(value, edge) for value in drawn]) if data.sign > 0 else ""
    if data.sign > 0 and max(drawn) > edge:
        axes.set_ylim(top=edge + 0.1 * abs(edge))
    mark_steps(axes, data.history.boundaries, "")
    averaged = any(event.get("averaged_loss") is not None for event in data.history.named(Event.RUNG))
    score = name_of(data.metric) + (", raw or averaged weights" if averaged else "")
    axes.set_xscale("log")
    axes.set_xlim(right=2.0 * max(step for step, _, _ in ends))  # room for the names
    axes.set_ylabel(score + added, fontsize="small")
    axes.set_title("The race of learning rates: the leader and the next below it go on")
    _draw_rows(rows, data, scores, shades)
    rows.set(xlabel=f"{STEPS}, log scale", ylabel=LR)
    plain_log(rows.xaxis, grouped=True)
    name_ends(axes, ends)
    legend_below(figure)
    return figure


def name_ends(axes: Any, ends: list[tuple[float, float, float]]) -> None:
    """The learning rate of every line beside its end; those that lie on one another share a name. ends: (step, value, LR)."""
    to_axes = axes.transData + axes.transAxes.inverted()
    places = [(*to_axes.transform((step, value)), lr) for step, value, lr in ends]
    groups: list[list[tuple[float, float, float]]] = []
    for place in sorted(places, key=lambda place: (round(place[0], 2), place[1])):
        near = groups and abs(groups[-1][-1][0] - place[0]) < 0.08 and abs(groups[-1][-1][1] - place[1]) < 0.05
        if near:
            groups[-1].append(place)
        else:
            groups.append([place])
    named: list[tuple[float, float]] = []
    for group in reversed(groups):
        lrs = sorted(lr for _, _, lr in group)
        name = f"{lrs[0]:.3g}" if len(lrs) == 1 else f"{lrs[0]:.3g} to {lrs[-1]:.3g}"
        x, y = max(x for x, _, _ in group), sum(y for _, y, _ in group) / len(group)
        crowded = any(abs(x - other) < 0.3 and abs(y - height) < 0.05 for other, height in named)
        named.append((x, y))
        axes.annotate(name, (x, y), xycoords="axes fraction", xytext=(7, -11 if crowded else 0), va="center",
                      textcoords="offset points", fontsize=9, color="0.2", gid="lr", zorder=6,
                      bbox={"facecolor": "white", "edgecolor": "none", "alpha": 0.75, "pad": 0.6})  # fmt: skip


def _draw_rows(rows: Any, data: RunData, scores: dict[str, dict[int, float]], shades: Any) -> None:
    first = min(min(points) for points in scores.values())
    spans = in_play(data.history)
    rows.set_yscale("log")
    rows.grid(visible=False, axis="y")
    for arm, lr in data.history.lrs.items():
        colour, joined = shades.to_rgba(lr), [low for low, _ in spans.get(arm, [])]
        if arm in scores:
            rows.plot([first, max(scores[arm])], [lr, lr], color=colour, linewidth=1.0, zorder=1)
        else:
            rows.plot(first, lr, "_", color=colour, markersize=6)
        for low, high in spans.get(arm, []):
            rows.plot([max(first, low), max(first, high)], [lr, lr], color=colour, linewidth=4.0, solid_capstyle="butt")
        if joined and max(joined) > 0:
            rows.plot(max(first, min(joined)), lr, "|", color="0.1", markersize=10, zorder=5)
    rows.plot([], [], color="0.5", linewidth=4.0, label="in play")
    rows.plot([], [], color="0.5", linewidth=1.0, label="trained, but not in play")
    rows.plot([], [], "|", color="0.1", markersize=10, label="joined here, from step 0")
    mark_steps(rows, data.history.boundaries, "")
    plain_log(rows.yaxis)


def in_play(history: History) -> dict[str, list[tuple[int, int]]]:
    """Anchored: arm -> the stretches of the race in which it was in play, from the last rung decided before to the last one."""
    now, since, spans = 0, dict[str, int](), dict[str, list[tuple[int, int]]]()
    reached: dict[str, int] = {}
    for event in history.named(Event.TRUNK, Event.DECISION, Event.DONE, Event.RUNG):
        if event["event"] == Event.RUNG:
            reached[event["arm"]] = event["step"]
        elif event["event"] == Event.DECISION:
            now = event["step"]
        elif event["event"] == Event.DONE or event["status"] != "open":
            arms = [event["arm"]] if event["event"] == Event.TRUNK else list(since)
            for arm in arms:
                if arm in since:
                    spans.setdefault(arm, []).append((since.pop(arm), max(now, reached.get(arm, 0))))
        else:
            since.setdefault(event["arm"], now)
    for arm, low in since.items():  # the run is under way
        spans.setdefault(arm, []).append((low, now))
    return spans
