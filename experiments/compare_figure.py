"""The figure of the comparison: test loss against total compute on one slot, one mark a method, one panel a task."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

OURS, PAPER, GREY = "#c1272d", "#1f5fa8", "#555555"
# method -> label, colour, marker, filled
MARKS: dict[str, tuple[str, str, str, bool]] = {
    "anchored": ("anchored (6 decades)", OURS, "o", True),
    "paper": ("paper's AutoLRS (2 decades)", PAPER, "s", True),
    "paper, 6 decades": ("paper's AutoLRS (6 decades)", PAPER, "s", False),
    "linear": ("linear decay, tuned", GREY, "v", True),
    "linear, default LR": ("linear decay, default LR", GREY, "v", False),
    "cosine": ("cosine, tuned", GREY, "D", True),
    "one-cycle": ("one-cycle, tuned", GREY, "^", True),
    "quadratic, best of raw and averaged": ("quadratic + averaging, tuned", "#111111", "D", True),
    "warm-up + quadratic, best of raw and averaged": (
        "warm-up + quadratic + averaging, tuned",
        "#111111",
        "o",
        False,
    ),
    "linear, best of raw and averaged": ("linear + averaging, tuned", "#111111", "v", True),
    "one-cycle, best of raw and averaged": ("one-cycle + averaging, tuned", "#111111", "^", True),
    "constant": ("constant, tuned", "#8c6d1f", "P", True),
    "constant + averaged weights": ("constant + averaging, tuned", "#8c6d1f", "P", False),
    "Schedule-Free": ("Schedule-Free, tuned", "#2a8a4a", "X", True),
    "Schedule-Free, default LR": ("Schedule-Free, default LR", "#2a8a4a", "X", False),
    "ScheduleFree+": ("ScheduleFree+", "#2a8a4a", "P", False),
    "Prodigy + cosine": ("Prodigy + cosine", "#7b3fa0", "*", True),
    "PBT": ("Ray PBT (2 decades)", "#d9822b", "h", True),
    "PB2": ("Ray PB2 (2 decades)", "#d9822b", "h", False),
}
CEILING = 3.0  # losses that lie above the best by more than this many times the median's distance go to the top edge


def draw(rows: list[dict[str, Any]], path: Path, titles: Mapping[str, str]) -> None:
    """Write `path`.png (1,600 pixels wide) and `path`.svg."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    tasks = [name for name in titles if any(row["task"] == name for row in rows)]
    tasks += sorted({row["task"] for row in rows} - set(tasks))
    columns = 2 if len(tasks) > 1 else 1
    lines = math.ceil(len(tasks) / columns)
    with plt.rc_context({"font.size": 9.5, "axes.spines.top": False, "axes.spines.right": False}):
        figure, axes = plt.subplots(lines, columns, figsize=(8.0, 2.9 * lines + 1.7), squeeze=False)
        for axis in axes.flat[len(tasks) :]:
            axis.set_visible(False)
        for axis, task in zip(axes.flat, tasks, strict=False):
            _panel(axis, {row["method"]: row for row in rows if row["task"] == task}, titles.get(task, task))
        used = [name for name in MARKS if any(row["method"] == name for row in rows)]
        handles = [_mark(plt, name) for name in used]
        height = 2.9 * lines + 1.7
        figure.legend(
            handles=handles,
            loc="lower center",
            bbox_to_anchor=(0.5, 0.3 / height),
            ncols=3,
            frameon=False,
            handletextpad=0.3,
            columnspacing=1.2,
        )
        figure.tight_layout(rect=(0, (0.5 + 0.19 * math.ceil(len(used) / 3)) / height, 1, 1))
        figure.text(0.5, 0.02, "Marks with a number lie above their axis. Bars: standard error over seeds.", ha="center",
                    fontsize=8, color=GREY)  # fmt: skip
        figure.savefig(path.with_suffix(".png"), dpi=200)
        figure.savefig(path.with_suffix(".svg"), metadata={"Date": None})
        plt.close(figure)


def _mark(plt: Any, name: str) -> Any:
    label, colour, marker, filled = MARKS[name]
    return plt.Line2D([], [], color=colour, marker=marker, markerfacecolor=colour if filled else "white",
                      linestyle="none", markersize=7, label=label)  # fmt: skip


def _panel(axis: Any, found: dict[str, dict[str, Any]], title: str) -> None:
    shown = [name for name in MARKS if name in found and math.isfinite(found[name]["test_loss"][0])]
    losses = sorted(found[name]["test_loss"][0] for name in shown)
    top = losses[0] + CEILING * max(losses[len(losses) // 2] - losses[0], 0.01 * abs(losses[0]))
    edge = top + 0.3 * (top - losses[0])  # marks that lie above the axis, and their numbers, have a band of their own
    crowd: dict[float, int] = {}
    clipped: dict[float, int] = {}
    for name in shown:
        (loss, error), row = found[name]["test_loss"], found[name]
        compute = row["slots"]["1"][0] if row["slots"] else row["compute"]
        _, colour, marker, filled = MARKS[name]
        place = round(math.log(compute), 1)
        crowd[place] = crowd.get(place, 0) + 1
        x = compute * 1.08 ** (crowd[place] // 2 * (-1) ** crowd[place])  # methods of equal compute side by side
        high = loss > top
        axis.errorbar(x, edge if high else loss, yerr=None if high else error, color=colour, marker=marker, markersize=7,
                      markerfacecolor=colour if filled else "white", elinewidth=1, capsize=0,
                      zorder=5 if name == "anchored" else 3)  # fmt: skip
        if high:
            clipped[place] = clipped.get(place, 0) + 1
            axis.annotate(f"{loss:.2f}" if loss > 0.3 else f"{loss:.3f}", (x, edge), (0, -4 - 11 * clipped[place]),
                          textcoords="offset points", ha="center", fontsize=8, color=colour)  # fmt: skip
    axis.set_xscale("log")
    axis.set_xlim(0.8, 16)
    axis.set_xticks([1, 2, 4, 7, 12], ["1", "2", "4", "7", "12"])
    axis.set_xticks([], minor=True)
    axis.grid(axis="y", color="#dddddd", linewidth=0.6)
    axis.set_title(title, fontsize=10, loc="left")
    axis.set_xlabel("compute on one slot, search included (units of T)")
    axis.set_ylabel("test loss")
