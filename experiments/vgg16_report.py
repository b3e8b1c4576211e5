"""Table and JSON of the VGG16 runs, from their outcomes."""

from __future__ import annotations

import json
from collections import defaultdict
from pathlib import Path
from typing import Any

import torch

from experiments.compare_report import hardware as cpu_hardware
from experiments.compare_report import mean_se, replace

NOTES_FILE = "vgg16_notes.md"
STEP_FILE = "vgg16_step.json"
SAME = ("dataset", "width", "epochs", "train_images", "device")
DETAILS = ("val_images", "padding", "autocast", "channels_last", "compile")
SEARCHES = ("anchored", "paper")
ORDER = (*SEARCHES, "linear", "cosine", "multistep", "constant")

LEGEND = """
Mean ± standard error over seeds; every choice (LR, winner of the race, raw or averaged weights) is made on validation
images, and the accuracy is the last model's, on the 10,000 test images, read once for each final model. compute: optimizer
steps of all trials over those of one training. images/s: training images of all trials over the minutes, evaluations of
the search included. minutes: in which anything trained, search and tuning included. `constant`: the model is the best
average of the weights on validation images; with several peaks it is one of the two controls, `linear` from an untuned 0.1
the other. epochs: of the main training.
"""


def hardware() -> str:
    """The GPU, or else the CPU, and torch's version."""
    if torch.cuda.is_available():
        return f"{torch.cuda.get_device_name()}, torch {torch.__version__}"
    return cpu_hardware()


def summarise(outcomes: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Rows of vgg16_cifar.json: one per setting and policy, over its seeds."""
    groups: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for outcome in outcomes:
        groups[_setting(outcome)].append(outcome)
    return _in_order([_row(sorted(found, key=lambda outcome: int(outcome["seed"]))) for found in groups.values()])


def _setting(found: dict[str, Any]) -> str:
    """All that an outcome or a row depends on but the seed. (A fixed schedule is trained in a loop, whatever the slots.)"""
    slots = found["slots"] if found["policy"] in SEARCHES else None
    return json.dumps(
        [*(found[name] for name in (*SAME, *DETAILS, "policy", "peaks", "options")), slots], sort_keys=True
    )


def _in_order(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return sorted(rows, key=lambda row: (*(str(row[name]) for name in SAME), ORDER.index(row["policy"]), row["tuned"]))


def _row(found: list[dict[str, Any]]) -> dict[str, Any]:
    first = found[0]

    def mean(name: str) -> float:
        return sum(float(outcome[name]) for outcome in found) / len(found)

    return dict(
        dataset=first["dataset"], policy=first["policy"], tuned=first["tuned"], peaks=first["peaks"],
        width=first["width"], epochs=first["epochs"], steps=first["steps"], train_images=first["train_images"],
        seeds=len(found), test_accuracy=mean_se([outcome["test_accuracy"] for outcome in found]),
        test_loss=mean_se([outcome["test_loss"] for outcome in found]),
        val_accuracy=mean_se([outcome["val_accuracy"] for outcome in found]),
        train_images_per_s=round(mean("train_images_per_s"), 1), device=first["device"],
        training_minutes=round(mean("seconds") / 60, 2), compute=round(mean("compute"), 3),
        lrs=[outcome["lrs"] for outcome in found], weights=[outcome["weights"] for outcome in found],
        **{name: first[name] for name in DETAILS}, options=first["options"], slots=first["slots"], hardware=first["hardware"],
        date=max(outcome["date"] for outcome in found),
    )  # fmt: skip


def _label(row: dict[str, Any]) -> str:
    if row["policy"] in SEARCHES:
        return f"**{row['policy']}**"
    name = "constant, averaged weights" if row["policy"] == "constant" else row["policy"]
    if row["tuned"]:
        return f"{name}, best peak of {', '.join(f'{peak:g}' for peak in row['peaks'])}"
    return f"{name}, untuned peak {row['peaks'][0]:g}"


def _lrs(row: dict[str, Any]) -> str:
    return "; ".join(" ".join(f"{lr:.2g}" for lr in found) for found in row["lrs"])


def _percent(value: list[float] | None) -> str:
    return "" if value is None else f"{100 * value[0]:.2f} ± {100 * value[1]:.2f}"


def table(rows: list[dict[str, Any]]) -> str:
    """Markdown, one line a row, best test accuracy on top."""
    heads = ["policy", "test accuracy, %", "test loss", "validation accuracy, %", "compute, T", "images/s", "minutes",
             "LR by seed", "seeds"]  # fmt: skip
    lines = ["| " + " | ".join(heads) + " |", "|" + " --- |" * len(heads)]
    for row in sorted(rows, key=lambda row: -row["test_accuracy"][0]):
        loss = f"{row['test_loss'][0]:.3f} ± {row['test_loss'][1]:.3f}"
        cells = [_label(row), _percent(row["test_accuracy"]), loss, _percent(row["val_accuracy"])]
        cells += [f"{row['compute']:.2f}", f"{row['train_images_per_s']:.0f}", f"{row['training_minutes']:.1f}"]
        cells += [_lrs(row), str(row["seeds"])]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _section(rows: list[dict[str, Any]]) -> str:
    first = rows[0]
    name = first["dataset"].replace("cifar", "CIFAR-")
    title = f"{name}, width {first['width']:g}, {first['train_images']:,} images, {first['epochs']} epochs, {first['device']}"
    told = f"T = {first['steps']} steps on {first['hardware']}; {', '.join(sorted({row['date'] for row in rows}))}."
    return f"## {title}\n\n{told}\n\n{table(rows)}\n"


def step_section(rows: list[dict[str, Any]]) -> str:
    """Markdown of what `python -m benchmarks.vgg16_step` measured."""
    first = rows[0]
    lines = [
        f"## Throughput, width {first['width']:g}, {first['device']}\n",
        f"By `python -m benchmarks.vgg16_step` on {first['hardware']}; {first['date']}. Training step alone, the data set and "
        "its augmentation on the device, beside torchvision's usual DataLoader pipeline; last, the batches alone.\n",
        "| variant | images/s | TFLOP/s | of the bf16 matrix peak | over the DataLoader |",
        "|" + " --- |" * 5,
    ]
    for row in rows:
        speed = "" if row["tflops"] is None else f"{row['tflops']:.3f}"
        share = "" if row["share_of_peak"] is None else f"{row['share_of_peak']:.1%}"
        cells = [row["variant"], f"{row['images_per_s']:.0f}", speed, share, f"{row['over_loader']:.2f}"]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def write_report(out: Path, results: Path) -> list[dict[str, Any]]:
    """Write vgg16_cifar.json and vgg16_cifar.md into `results` from the outcomes in `out`, and print the tables.

    Rows that are there already, from another machine say, stay unless `out` has runs with the same setting.
    Raises FileNotFoundError where nothing has finished yet.
    """
    files = sorted((out / "outcomes").glob("*.json"))
    if not files:
        raise FileNotFoundError(
            f"no finished runs in {out / 'outcomes'}: run a policy first, or name its folder by --out"
        )
    rows = summarise([json.loads(file.read_text()) for file in files])
    results.mkdir(parents=True, exist_ok=True)
    known, made = results / "vgg16_cifar.json", {_setting(row) for row in rows}
    kept = [row for row in json.loads(known.read_text()) if _setting(row) not in made] if known.exists() else []
    rows = _in_order([*rows, *kept])
    tables: dict[tuple[Any, ...], list[dict[str, Any]]] = defaultdict(list)
    for row in rows:
        tables[tuple(row[name] for name in SAME)].append(row)
    parts = ["# VGG16 on CIFAR\n\nMade by `python -m experiments.vgg16_cifar --report`; numbers in vgg16_cifar.json.\n"]
    parts += [_section(found) for found in tables.values()]
    steps = results / STEP_FILE
    parts += [step_section(json.loads(steps.read_text()))] if steps.exists() else []
    notes = results / NOTES_FILE  # what was not run, written by hand beside the results
    parts += ["## Notes\n" + LEGEND, notes.read_text() if notes.exists() else ""]
    text = "\n".join(parts).rstrip() + "\n"
    print(text)
    replace(results / "vgg16_cifar.md", text)
    replace(known, json.dumps(rows, indent=1) + "\n")
    return rows
