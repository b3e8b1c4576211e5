"""Tables, JSON and figure of the comparison at size, from its outcomes."""

from __future__ import annotations

import json
import os
import platform
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path
from textwrap import fill
from typing import Any

import torch

from experiments.compare_report import mean_se, replace
from experiments.tables import markdown

NOTES_FILE = "scale_notes.md"
COMMAND = "python -m experiments.scale --data DIR --tasks {task} --rows {rows}"
SAME = ("task", "steps", "epochs", "width", "batch_size")
COLOURS = {"anchored": "#c1272d", "linear": "#555555", "constant + averaged weights": "#8c6d1f", "paper": "#1f5fa8"}

LEGEND = """
Every choice (LR, winner of the race, raw or averaged weights) is made on validation data; the test split is read once, by a
row's final model. Losses are those that are trained on. compute: optimizer steps of all trials over those of one training
(T), on one slot, where it is the wall-clock too. rows/s: rows of all trials' batches (images, or windows of 256 bytes) over
the seconds in which they trained, or for the searches trained or evaluated, on a machine with other work. ±: standard error
over seeds, where there are two. less anchored: over the seeds that both rows have. The figure has raw weights, but for
`constant`, whose model is an average.
"""


def machine() -> str:
    """The GPU, or the CPU by name with its number of cores and what of bfloat16 it has, and torch's version."""
    if torch.cuda.is_available():
        return f"{torch.cuda.get_device_name()}, torch {torch.__version__}"
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    flags = next((line.split(":", 1)[1].split() for line in lines if line.startswith("flags")), [])
    bf16 = " and ".join(flag for flag in ("avx512_bf16", "amx_bf16") if flag in flags)
    name = names[0] if names else platform.machine()
    return f"{name}, {os.cpu_count()} cores{f' ({bf16})' if bf16 else ''}, torch {torch.__version__}"


Methods = Mapping[str, Mapping[str, int | None]]
"""Task -> the methods that its table has, in their order -> decades of the interval that each searches."""


def summarise(outcomes: list[dict[str, Any]], methods: Methods) -> list[dict[str, Any]]:
    """Rows of scale.json, one per setting and method, over its seeds, in the order of `methods`.

    minus_anchored: of the test loss, over the seeds that both have. curves: [step, validation accuracy] of the first seed.
    """
    groups: dict[tuple[Any, ...], list[dict[str, Any]]] = defaultdict(list)
    for outcome in sorted(outcomes, key=lambda outcome: int(outcome["seed"])):
        groups[(*(outcome[name] for name in SAME), outcome["method"])].append(outcome)
    tasks = list(methods)

    def place(key: tuple[Any, ...]) -> tuple[Any, ...]:
        return tasks.index(key[0]), *map(str, key[1:-1]), list(methods[key[0]]).index(key[-1])

    ordered = sorted(groups.items(), key=lambda item: place(item[0]))
    return [
        {**_row(found, groups.get((*key[:-1], "anchored"), [])), "interval_decades": methods[key[0]][key[-1]]}
        for key, found in ordered
    ]


def _row(found: list[dict[str, Any]], anchored: list[dict[str, Any]]) -> dict[str, Any]:
    first = found[0]
    reference = {outcome["seed"]: outcome["test"]["loss"] for outcome in anchored}
    losses = [outcome["test"]["loss"] for outcome in found]
    differences = [
        outcome["test"]["loss"] - reference[outcome["seed"]] for outcome in found if outcome["seed"] in reference
    ]
    compute = round(sum(outcome["compute"] for outcome in found) / len(found), 3)
    slots = max(outcome.get("slots") or 1 for outcome in found)
    return dict(
        **{name: first[name] for name in SAME}, title=first["title"], method=first["method"], group="main",
        tuned=first["tuned"], seeds=len(found),
        test_loss=mean_se(losses), test_accuracy=mean_se([outcome["test"].get("accuracy") for outcome in found]),
        val_loss=mean_se([outcome["val"]["loss"] for outcome in found]),
        minus_anchored=mean_se(differences) if differences else None, compute=compute,
        wall_clock=compute if slots == 1 else None, slots={"1": [compute, compute]} if slots == 1 else {},
        test_losses=losses, lrs=[outcome["lr"] for outcome in found], weights=[outcome["weights"] for outcome in found],
        images_per_s=round(sum(outcome["images_per_s"] for outcome in found) / len(found), 1), curves=first["curves"],
        hardware=_hardware(found), date=max(outcome["date"] for outcome in found),
    )  # fmt: skip


def _hardware(rows: list[dict[str, Any]]) -> str:
    """The machines of all rows, each once."""
    return "; ".join(dict.fromkeys(name for row in rows for name in row["hardware"].split("; ")))


def section(rows: list[dict[str, Any]], methods: Mapping[str, int | None]) -> str:
    """The table of one setting, with the rows that have not been run, and the command that runs them."""
    first = rows[0]
    heads = ["", "test loss", "less anchored", "test accuracy, %", "compute, T", "LR", "weights", "rows/s", "seeds"]
    lines = []
    by_method = {row["method"]: row for row in rows}
    for method in methods:
        row = by_method.get(method)
        if row is None:
            lines.append([method, "not run yet", *[""] * (len(heads) - 2)])
            continue
        lrs = "; ".join("by stage" if lr is None else f"{lr:.3g}" for lr in row["lrs"])
        lines.append(
            [f"**{method}**" if method in ("anchored", "paper") else method, _number(row["test_loss"], 4),
             "" if method == "anchored" else _number(row["minus_anchored"], 4, "+"),
             _number(row["test_accuracy"], 2, scale=100), f"{row['compute']:.2f}", lrs, "; ".join(row["weights"]),
             f"{row['images_per_s']:.0f}", str(row["seeds"])]
        )  # fmt: skip
    missing = " ".join(f'"{method}"' for method in methods if method not in by_method)
    text = (
        f"## {first['title']}\n\n`{first['task']}`: T = {first['steps']:,} steps of {first['batch_size']}, "
        f"{first['epochs']:g} epochs, width {first['width']:g}; {_hardware(rows)}; "
        f"{', '.join(sorted({row['date'] for row in rows}))}.\n\n{markdown(heads, lines)}\n"
    )
    return text + (f"\nTo run the rest: `{COMMAND.format(task=first['task'], rows=missing)}`\n" if missing else "")


def _number(value: list[float] | None, digits: int, sign: str = "", scale: float = 1.0) -> str:
    if value is None:
        return ""
    mean, error = (scale * part for part in value)
    return f"{mean:{sign}.{digits}f}" + (f" ± {error:.{digits}f}" if error else "")


def write_report(out: Path, results: Path, methods: Methods) -> list[dict[str, Any]]:
    """Write scale.json, scale.md and scale.png into `results` from the outcomes in `out`. Returns the rows.

    Rows of an earlier report, from another machine say, stay unless `out` has runs of the same setting and method. Raises
    FileNotFoundError where nothing has finished yet.
    """
    files = sorted((out / "outcomes").glob("*.json"))
    if not files:
        raise FileNotFoundError(
            f"no finished rows in {out / 'outcomes'}: run some first, or name their folder by --out"
        )
    rows = summarise([json.loads(file.read_text()) for file in files], methods)
    results.mkdir(parents=True, exist_ok=True)
    known = results / "scale.json"

    def key(row: dict[str, Any]) -> tuple[Any, ...]:
        return (*(row[name] for name in SAME), row["method"])

    made = {key(row) for row in rows}
    rows += [row for row in json.loads(known.read_text()) if key(row) not in made] if known.exists() else []
    settings: dict[tuple[Any, ...], list[dict[str, Any]]] = defaultdict(list)
    for row in rows:
        settings[key(row)[:-1]].append(row)
    parts = ["# At size\n\nMade by `python -m experiments.scale --report`; numbers in scale.json.\n"]
    parts += ["![Validation accuracy against epochs, with the trunks of the race](scale.png)\n"]
    parts += [section(found, methods[found[0]["task"]]) for found in settings.values()]
    absent = [task for task in methods if all(row["task"] != task for row in rows)]
    if absent:
        told = "\n".join(f"- `{task}`: `python -m experiments.scale --data DIR --tasks {task}`" for task in absent)
        parts += [f"## Not run yet\n\n{told}\n"]
    notes = results / NOTES_FILE
    parts += ["## Notes\n" + LEGEND, notes.read_text() if notes.exists() else ""]
    replace(results / "scale.md", "\n".join(parts).rstrip() + "\n")
    replace(known, json.dumps(rows) + "\n")
    draw(list(settings.values()), results / "scale.png")
    return rows


# -- figure ------------------------------------------------------------------------------------------------------------


def draw(settings: list[list[dict[str, Any]]], path: Path) -> None:
    """One panel a setting: validation accuracy against epochs; the trunks of the race thin, its winner bold."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    columns = min(2, len(settings))
    lines = -(-len(settings) // columns)
    with plt.rc_context({"font.size": 9, "axes.spines.top": False, "axes.spines.right": False}):
        figure, axes = plt.subplots(lines, columns, figsize=(4.6 * columns, 3.6 * lines), squeeze=False)
        for axis in axes.flat[len(settings) :]:
            axis.set_visible(False)
        for axis, rows in zip(axes.flat, settings, strict=False):
            _panel(axis, rows)
        figure.tight_layout()
        figure.savefig(path, dpi=160)
        plt.close(figure)


def _panel(axis: Any, rows: list[dict[str, Any]]) -> None:
    epochs = rows[0]["epochs"] / rows[0]["steps"]
    # of one schedule's grids the last, which is the widest
    drawn = {name: row for row in rows if (name := row["method"].split(", best of")[0]) in COLOURS}
    for name, row in drawn.items():
        for curve in row["curves"]:
            if not curve["points"]:
                continue
            steps, accuracies = zip(*curve["points"], strict=True)
            x, y = [epochs * step for step in steps], [100 * accuracy for accuracy in accuracies]
            label = (name if row["lrs"][0] is None else f"{name}, LR {curve['lr']:.2g}") if curve["chosen"] else None
            axis.plot(x, y, color=COLOURS[name], linewidth=1.8 if curve["chosen"] else 0.8, label=label,
                      alpha=1.0 if curve["chosen"] else 0.45, zorder=3 if name == "anchored" else 2)  # fmt: skip
    axis.set_title(fill(rows[0]["title"], 45), fontsize=9, loc="left")
    axis.set_xlabel("epochs of the main training")
    axis.set_ylabel("validation accuracy, %")
    axis.grid(color="#dddddd", linewidth=0.6)
    axis.legend(frameon=False, fontsize=8)
