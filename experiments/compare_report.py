"""Tables, JSON and figure of the comparison, from its cached rows."""

from __future__ import annotations

import json
import math
import os
import platform
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from autolrs_ray.core.policy import finite_or_inf
from autolrs_ray.record.journal import finite
from experiments.compare_tasks import Task

TITLES = {
    "digits": "Digits (8 x 8 images, SGD)",
    "digits_noise": "Digits with 20 % label noise (SGD)",
    "char_lm": "Characters (GRU, AdamW)",
    "cifar16": "CIFAR-10 at 16 x 16 (SGD)",
    "cifar32": "CIFAR-10 at 32 x 32 (SGD)",
}
RAY = ("PBT", "PB2")
COST_SLOTS = (1, 2, 4, 12)
GROUPS = {"main": "", "growth": "the batch doubled from .5 T on", "ablation": "ablations"}
"""Groups of methods in the order of a table, and their headings there."""

COSTLY = ("anchored", "anchored, no run-ahead")  # what slots change the cost of
WHOLE_RUNS = {"a grid of 7 full runs": 7, "PBT, PB2: 12 trials": 12, "one run": 1}
Number = list[float] | None


def hardware() -> str:
    import torch

    return f"{os.cpu_count()} CPU cores ({platform.machine()}), 1 thread a run, torch {torch.__version__}"


def mean_se(values: list[float | None]) -> Number:
    """[mean, standard error] over seeds; the error is 0 for one seed. None where a value is missing."""
    known = [value for value in values if value is not None]
    if not known or len(known) < len(values):
        return None
    mean = sum(known) / len(known)
    if len(known) == 1:
        return [mean, 0.0]
    return [mean, math.sqrt(sum((v - mean) ** 2 for v in known) / (len(known) - 1) / len(known))]


def summarise(
    cached: list[dict[str, Any]], methods: Mapping[str, Any], earlier: Sequence[dict[str, Any]] = ()
) -> list[dict[str, Any]]:
    """Rows of compare.json: one per task, setting and method. test_losses, lrs: by seed (lrs of the
    paper's policy: of its stages). minus_anchored: paired over the
    seeds both have. slots: number of slots -> [compute, wall-clock] there.

    A method that has run on at most half of anchored's seeds is left out: its mean would not compare with the others'.
    earlier: rows of an earlier compare.json; they stay where nothing newer of the task and method is cached, and there is
    such a method still.
    """
    by_task: dict[tuple[str, str], dict[str, list[dict[str, Any]]]] = defaultdict(lambda: defaultdict(list))
    for row in cached:
        by_task[row["task"], row["setting"]][row["method"]].append(row)
    before = {(row["task"], row["steps"]): row["test_losses"] for row in earlier if row["method"] == "anchored"}
    result = []
    for (task, _), found in by_task.items():
        steps = next(iter(found.values()))[0]["steps"]
        reference = dict(enumerate(before.get((task, steps), [])))
        reference.update({row["seed"]: row["outcome"]["test_loss"] for row in found.get("anchored", [])})
        for method, rows in found.items():
            if 2 * len(rows) <= len(reference):
                continue  # the few seeds of a run that was cut short say nothing beside the others
            known = methods.get(method)
            outcomes = [row["outcome"] for row in sorted(rows, key=lambda row: row["seed"])]
            differences = [
                row["outcome"]["test_loss"] - reference[row["seed"]] for row in rows if row["seed"] in reference
            ]
            result.append(dict(
                task=task, method=method, group=known.group if known else "main", tuned=bool(known and known.tuned),
                interval_decades=known.decades if known else 2, seeds=len(rows), steps=rows[0]["steps"],
                test_loss=mean_se([o["test_loss"] for o in outcomes]),
                test_accuracy=mean_se([o["test_accuracy"] for o in outcomes]),
                minus_anchored=mean_se(differences) if differences else None,
                compute=round(sum(o["compute"] for o in outcomes) / len(rows), 3),
                wall_clock=round(sum(o["wall_clock"] for o in outcomes) / len(rows), 3),
                slots=costs([o.get("extra", {}).get("slots") for o in outcomes], outcomes[0]["compute"]),
                test_losses=[o["test_loss"] for o in outcomes],
                lrs=[o.get("extra", {}).get("lrs") or o["lr"] for o in outcomes],
                hardware=rows[-1]["hardware"], date=max(row["date"] for row in rows),
            ))  # fmt: skip
    fresh = {(row["task"], row["method"]) for row in result}
    ours = {row["task"]: row["test_losses"] for row in result if row["method"] == "anchored"}
    kept = [
        {**row, "slots": row.get("slots") or costs([None], row["compute"])}
        for row in earlier
        if (row["task"], row["method"]) not in fresh and row["method"] in {*methods, *RAY}
    ]
    return [_against(row, ours[row["task"]]) if row["task"] in ours else row for row in kept] + result


def costs(found: Sequence[Mapping[str, list[float]] | None], compute: float) -> dict[str, list[float]]:
    """Number of slots -> [compute, wall-clock], means over seeds. None: `compute` whole runs, side by side where slots allow;
    of anything else nothing is known."""
    known = [cost for cost in found if cost]
    if len(known) == len(found):
        cells = {n: zip(*(cost[n] for cost in known), strict=True) for n in known[0]}
        return {str(n): [round(sum(values) / len(known), 3) for values in cell] for n, cell in cells.items()}
    return {str(n): [compute, math.ceil(compute / n)] for n in COST_SLOTS} if compute == int(compute) else {}


def _against(row: dict[str, Any], anchored: list[float]) -> dict[str, Any]:
    """The row with its difference to a newer `anchored`, both by seed from 0 on."""
    differences = [loss - other for loss, other in zip(row["test_losses"], anchored, strict=False)]
    return {**row, "minus_anchored": mean_se(differences)}


def _alone(row: dict[str, Any]) -> float:
    """Compute on one slot; on any number where that one is not known."""
    return float(row["slots"]["1"][0] if row["slots"] else row["compute"])


def _plus_minus(value: Number, digits: int, sign: str = "", scale: float = 1.0) -> str:
    if value is None or not all(math.isfinite(v) for v in value):
        return "" if value is None else "diverged"
    return f"{scale * value[0]:{sign}.{digits}f} ± {scale * value[1]:.{digits}f}"


def _source(row: dict[str, Any]) -> str:
    if row["tuned"]:
        return "7 full runs"
    return f"{row['interval_decades']} decades" if row["interval_decades"] else "default"


def _rank(row: dict[str, Any]) -> tuple[int, float]:
    loss = row["test_loss"][0]
    return list(GROUPS).index(row["group"]), finite_or_inf(loss)


def table(rows: list[dict[str, Any]]) -> str:
    """Markdown, group by group, the lowest test loss on top."""
    accuracy = any(row["test_accuracy"] for row in rows)
    heads = [
        "method",
        "LR from",
        "test loss",
        "minus anchored (paired)",
        "one slot, T",
        "12 slots: compute, T",
        "wall-clock, T",
        "seeds",
    ]
    heads = heads[:3] + (["test accuracy, %"] if accuracy else []) + heads[3:]
    lines = ["| " + " | ".join(heads) + " |", "|" + " --- |" * len(heads)]
    group = "main"
    for row in sorted(rows, key=_rank):
        if row["group"] != group:
            group = row["group"]
            lines.append(f"| *{GROUPS[group]}* |" + " |" * (len(heads) - 1))
        name = f"**{row['method']}**" if row["method"] in ("paper", "anchored") else row["method"]
        cells = [name, _source(row), _plus_minus(row["test_loss"], 4)]
        cells += [_plus_minus(row["test_accuracy"], 2, scale=100.0)] if accuracy else []
        difference = "" if row["method"] == "anchored" else _plus_minus(row["minus_anchored"], 4, "+")
        alone = f"{_alone(row):.2f}" if row["slots"] else ""
        cells += [difference, alone, f"{row['compute']:.2f}", f"{row['wall_clock']:.2f}", str(row["seeds"])]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def cost_table(rows: list[dict[str, Any]]) -> str:
    """Markdown: compute and wall-clock on few and many slots."""
    lines = ["| compute / wall-clock, T | " + " | ".join(f"{n} slot{'s' * (n > 1)}" for n in COST_SLOTS) + " |"]
    lines += ["| --- |" + " --- |" * len(COST_SLOTS)]
    found = {(row["task"], row["method"]): row["slots"] for row in rows}
    shown = [(f"{method}: {TITLES.get(task, task)}", found[task, method]) for method in COSTLY for task in TITLES
             if found.get((task, method))]  # fmt: skip
    shown += [(name, costs([None], runs)) for name, runs in WHOLE_RUNS.items()]
    for name, slots in shown:
        cells = [f"{compute:.2f} / {wall:.2f}" for compute, wall in (slots[str(n)] for n in COST_SLOTS)]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def verdict(rows: list[dict[str, Any]]) -> str:
    """One line: anchored against the best tuned row of as many rows of data."""
    found = {row["method"]: row for row in rows}
    tuned = [row for row in rows if row["tuned"] and row["group"] == "main" and math.isfinite(row["test_loss"][0])]
    if "anchored" not in found or not tuned:
        return ""
    ours, best = found["anchored"], min(tuned, key=lambda row: row["test_loss"][0])
    gap, error = -best["minus_anchored"][0], best["minus_anchored"][1]
    return (
        f"anchored {_plus_minus(ours['test_loss'], 4)} at {_alone(ours):.2f} T; best tuned row: {best['method']}, "
        f"{_plus_minus(best['test_loss'], 4)} at {best['compute']:.0f} T; gap {gap:+.4f} ± {error:.4f} "
        f"(paired): {'within' if gap <= error else 'more than'} one standard error."
    )


NOTES = """
Losses and accuracies: mean ± standard error over seeds, on a test split that was read once for each final model; every
choice (LR, weights, winner of a race) was made on the validation split. On the digits tasks each seed draws its own split,
so the error of a mean is mostly the split's: compare methods by the paired column (same seeds, same splits). Negative:
the method beat anchored. Compute: optimizer steps of all trials over T, search included; on one slot it is the wall-clock
too. Wall-clock: training steps only (`experiments/slots.py`). On more slots than two `anchored` trains learning rates ahead
that it may not need: the result is the same, sooner and dearer. "7 full runs": LR tuned on a grid over 2 decades around the
default (.1 for SGD, 3e-3 for AdamW; Schedule-Free 1.0 and 2.5e-3). `paper`: 5 stages of T / 5, 10 probes of T / 50 each,
ranked by validation losses throughout (the policy's default: in the first stage by training losses, "the authors' series"),
over 2 decades around the default LR (wider where its name says so). `anchored`: all defaults, over [1e-5, 10] (SGD) or
[1e-6, 1] (AdamW) unless its name says otherwise. PBT and PB2: Ray's own, 12 trials on 12 slots, LR over 2 decades.
ScheduleFree+: Adam with its authors' defaults on all tasks. Methods share stretches that they train in common; results are
those of separate runs. Where compute on one slot is blank it is not known.
"""


def _read(row: dict[str, Any]) -> dict[str, Any]:
    """A row of compare.json; losses that were not finite are null there."""
    losses = {name: [math.inf if v is None else v for v in row[name]] for name in ("test_loss", "test_losses")}
    return {**row, **losses}


def write_report(
    cached: list[dict[str, Any]], out: Path, tasks: Mapping[str, Task], methods: Mapping[str, Any]
) -> list[dict[str, Any]]:
    """Write compare.json, compare.md, compare.png and compare.svg into `out`, and print the tables.

    Rows of the compare.json that is there stay until newer ones of their task and method come.
    """
    out.mkdir(parents=True, exist_ok=True)
    before = out / "compare.json"
    earlier = [_read(row) for row in json.loads(before.read_text())] if before.exists() else []
    rows = summarise(cached, methods, earlier)
    parts = ["# The comparison\n\nMade by `python -m experiments.compare`; numbers in compare.json.\n"]
    order = {name: i for i, name in enumerate(TITLES)}
    names = sorted({row["task"] for row in rows}, key=lambda name: order.get(name, 99))
    for name in names:
        of_task = [row for row in rows if row["task"] == name]
        steps = of_task[0]["steps"]
        text = f"## {TITLES.get(name, name)}, T = {steps} steps\n\n{verdict(of_task)}\n\n{table(of_task)}\n"
        print(text)
        parts.append(text)
    parts.append(f"## What it costs on 1, 2, 4 and 12 slots\n\n{cost_table(rows)}\n")
    extra = out / "compare_notes.md"  # what was not run, written by hand beside the results
    parts += ["## Notes\n" + NOTES, extra.read_text() if extra.exists() else ""]
    replace(out / "compare.md", "\n".join(parts).rstrip() + "\n")
    replace(out / "compare.json", json.dumps([finite(row) for row in rows], indent=1) + "\n")
    if rows:
        from experiments.compare_figure import draw

        draw(rows, out / "compare", TITLES)
    return rows


def replace(path: Path, text: str) -> None:
    """Write `path` in one go: a reader sees the old file or the new one."""
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(text)
    os.replace(temporary, path)
