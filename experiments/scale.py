"""At size: the policies beside tuned and untuned schedules on whole data sets, in runs of thousands of steps.

    python -m experiments.scale --data DIR --download --tasks cifar10 cifar100 --width 1 --epochs 50 --seeds 3   # on a GPU
    python -m experiments.scale --data DIR                             # on a CPU: all tasks, smaller; hours
    python -m experiments.scale --data DIR --tasks bytes --rows anchored "linear, untuned"
    python -m experiments.scale --report                               # tables and figure of what has finished
    ray job submit --working-dir . -- python -m experiments.scale --data /shared/data --out /shared/runs/scale

Tasks: experiments/scale_tasks.py. Everything is resumable: a command that was killed goes on where it was. Every choice
(LR, winner of the race, raw or averaged weights) is made on validation data, and the test split is read once for each row's
final model. A second seed of a tuned row is trained at the LR that the first one chose. What has finished lies under --out;
--report writes scale.json, scale.md and scale.png. Results: experiments/results/scale.md.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any

import torch

import autolrs_ray
from autolrs_ray.core.envelopes import ENVELOPES
from autolrs_ray.core.policy import finite_or_inf
from autolrs_ray.show.run_data import RunData, series
from experiments.compare_report import replace
from experiments.full_runs import full_run
from experiments.scale_report import machine, write_report
from experiments.scale_tasks import TASKS, ScaleTask, make_task
from experiments.vgg16_cifar import default_address, resources_of, start_ray
from experiments.vgg16_task import CLASSES, read_cifar

MARKS = 20  # checkpoints of a fixed schedule, and points of its curve


@dataclass(frozen=True)
class Row:
    """A row of the table. policy: a search; else the fixed schedule `shape` at `lrs` of the task, of which the best is taken.

    options: of the search, for a task. tasks: that have this row. decades: of the search's interval.
    """

    policy: str | None = None
    options: Callable[[ScaleTask], dict[str, Any]] = lambda task: {}
    shape: str = ""
    lrs: Callable[[ScaleTask], tuple[float, ...]] = lambda task: ()
    averaged: bool = False
    more_seeds: bool = False
    decades: int | None = None
    tasks: tuple[str, ...] = TASKS


def _paper(task: ScaleTask) -> dict[str, Any]:
    """Five stages of ten probes; nothing else differs from the policy's own settings."""
    tau = -(-task.steps // 5)
    return {"stage_steps": tau, "max_stage_steps": tau, "lr_interval": task.interval, "probe_reports": 4}


ROWS = {
    "anchored": Row("anchored", more_seeds=True, decades=6),
    "linear, untuned": Row(shape="linear", lrs=lambda task: task.peaks[1:2]),
    "linear, best of 3": Row(shape="linear", lrs=lambda task: task.peaks, more_seeds=True),
    "constant + averaged weights, best of 2": Row(
        shape="constant", lrs=lambda task: task.constants, averaged=True, more_seeds=True
    ),
    "linear, best of 5": Row(shape="linear", lrs=lambda task: task.wide_peaks, more_seeds=True),
    "constant + averaged weights, best of 4": Row(
        shape="constant", lrs=lambda task: task.wide_constants, averaged=True, more_seeds=True
    ),
    "paper": Row("paper", _paper, decades=2),
    "anchored, batch x 2 from .5 T": Row(
        "anchored", lambda task: {"batch_growth": {0.5: 2}}, decades=6, tasks=("bytes",)
    ),
}


def run_name(task: ScaleTask, seed: int, *what: Any) -> str:
    """Names everything that the outcome depends on; the last part is a hash of the details."""
    details = {**task.config, "data_dir": None, "weights": None, "steps": task.steps}
    digest = hashlib.blake2b(json.dumps(details, sort_keys=True).encode(), digest_size=4).hexdigest()
    words = "-".join(f"{part:g}" if isinstance(part, float) else str(part) for part in what)
    return re.sub(r"[^A-Za-z0-9.-]+", "-", f"{task.name}-{words}-s{seed}-{digest}")


# -- fixed schedules ---------------------------------------------------------------------------------------------------


def run_fixed(task: ScaleTask, row: Row, seed: int, out: Path) -> dict[str, Any]:
    """Full runs at all LRs of the row, or at the one that seed 0 chose; the best on the validation data."""
    lrs = row.lrs(task)
    if seed and len(lrs) > 1:
        lrs = (min(_full_runs(task, row, 0, lrs, out), key=_loss)["lr"],)
    runs = _full_runs(task, row, seed, lrs, out)
    best = min(runs, key=_loss)
    return dict(
        lr=best["lr"], weights="averaged" if row.averaged else "raw", compute=float(len(row.lrs(task))),
        seconds=sum(run["seconds"] for run in runs), steps_trained=len(runs) * task.steps, val=best["val"],
        test=tested(task, torch.load(best["weights"], map_location="cpu", weights_only=True)),
        curves=[{"lr": run["lr"], "chosen": run is best, "points": _points(run["curve"], "step", "accuracy")} for run in runs],
    )  # fmt: skip


def _full_runs(task: ScaleTask, row: Row, seed: int, lrs: tuple[float, ...], out: Path) -> list[dict[str, Any]]:
    factor, steps = ENVELOPES[row.shape], task.steps
    marks = sorted({max(1, steps * i // MARKS) for i in range(1, MARKS + 1)})

    def train(lr: float) -> dict[str, Any]:
        folder = out / "fixed" / run_name(task, seed, row.shape, lr)
        return {
            "lr": lr,
            **full_run(lambda: task.trainer(seed, row.averaged), lambda t: lr * factor(t / steps), marks, folder, True),
        }

    return [train(lr) for lr in lrs]


def _loss(run: dict[str, Any]) -> float:
    return finite_or_inf(run["val"]["loss"])


def _points(rows: list[dict[str, Any]], step: str, *keys: str) -> list[list[float]]:
    """[step, value] of the first of `keys` that is there."""
    key = next((key for key in keys if any(key in row for row in rows)), keys[0])
    return [[x, round(y, 4)] for x, y in zip(*series(rows, step, key), strict=True)]


def tested(task: ScaleTask, state: dict[str, Any]) -> dict[str, float]:
    """Metrics of the model `state` on the test split."""
    trainer = task.trainer(0)
    trainer.model.load_state_dict(state)
    return trainer.evaluate(task.test(task.config))


# -- the policies ------------------------------------------------------------------------------------------------------


def run_search(task: ScaleTask, method: str, seed: int, out: Path, arguments: argparse.Namespace) -> dict[str, Any]:
    """A run of the pair on Ray, and its final model's metrics."""
    row = ROWS[method]
    start_ray(arguments.address)
    resources = resources_of(arguments.cpus_per_trial, arguments.gpus_per_trial, 0.25)
    result = autolrs_ray.run(
        task.build, task.steps, policy=row.policy, config=task.config, seed=seed, storage_path=out,
        name=run_name(task, seed, method), resources=resources, slots=arguments.slots, **row.options(task),
    )  # fmt: skip
    data = RunData.load(result.folder)
    arms = sorted(data.reports) if data.anchored else [data.arm]
    curves = []
    for arm in arms:
        rows = data.rows(arm) if data.anchored else data.main_rows()
        lr = next((event["lr"] for event in result.events if event.get("arm") == arm and "lr" in event), None)
        curves.append({"lr": lr, "chosen": arm == data.arm, "points": _points(rows, "step", "val_accuracy")})
    last = data.main_rows()[-1]
    accuracy = "averaged_accuracy" if result.weights == "averaged" else "val_accuracy"
    return dict(
        lr=result.rows[-1]["lr"] if data.anchored else None, weights=result.weights, compute=result.compute,
        seconds=result.timing.training_s + result.timing.probing_s,
        steps_trained=result.main_steps + result.search_steps, val={"loss": result.loss, "accuracy": last.get(accuracy)},
        test=tested(task, result.model_state()), curves=curves, lrs=[row["lr"] for row in result.rows],
        slots=result.timing.max_concurrent,
    )  # fmt: skip


# -- command line ------------------------------------------------------------------------------------------------------


def run_row(task: ScaleTask, method: str, seed: int, out: Path, arguments: argparse.Namespace) -> dict[str, Any]:
    """Run one row at one seed, or return its kept outcome."""
    row = ROWS[method]
    file = out / "outcomes" / f"{run_name(task, seed, method)}.json"
    if file.exists():
        return dict(json.loads(file.read_text()))
    task.prepare(task.config)
    found = run_search(task, method, seed, out, arguments) if row.policy else run_fixed(task, row, seed, out)
    outcome = dict(
        task=task.name, title=task.title, method=method, tuned=len(row.lrs(task)) > 1, seed=seed, steps=task.steps,
        epochs=task.epochs, width=task.config["width"], batch_size=task.batch_size, **found,
        images_per_s=found["steps_trained"] * task.batch_size / found["seconds"], hardware=machine(),
        date=date.today().isoformat(),
    )  # fmt: skip
    file.parent.mkdir(parents=True, exist_ok=True)
    replace(file, json.dumps(outcome))
    print(f"{file.stem}: test {outcome['test']}, compute {outcome['compute']:.2f} T", flush=True)
    return outcome


def planned(tasks: list[ScaleTask], rows: list[str], seeds: int) -> list[tuple[ScaleTask, str, int]]:
    """Task by task; further seeds, of the rows that have them, after all rows of the first."""
    return [
        (task, method, seed)
        for task in tasks
        for seed in range(seeds)
        for method in rows
        if task.name in ROWS[method].tasks and (seed == 0 or ROWS[method].more_seeds)
    ]


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=list(TASKS))
    parser.add_argument("--rows", nargs="+", choices=list(ROWS), default=list(ROWS))
    parser.add_argument("--seeds", type=int, default=2, help="of anchored and of the tuned rows (default 2)")
    parser.add_argument("--data", default="data", help="torchvision's root folder (default data)")
    parser.add_argument("--download", action="store_true", help="let torchvision fetch what is not there")
    parser.add_argument("--width", type=float, help="factor of the layers' widths (default: VGG16 0.5, others 1)")
    parser.add_argument("--epochs", type=float, help="of the main training (default: each task's own)")
    parser.add_argument("--text", help="folder of Python files for `bytes` (default: the standard library)")
    parser.add_argument("--slots", type=int, help="trials at the same time (default: as many as fit)")
    parser.add_argument("--cpus-per-trial", type=float, default=1.0)
    parser.add_argument("--gpus-per-trial", type=float, help="(default: 0.25 where the cluster has any)")
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction, default=torch.cuda.is_available())
    parser.add_argument("--threads", type=int, help="of a fixed schedule's run (default: torch's own)")
    parser.add_argument(
        "--address", default=default_address(), help='of the Ray cluster (default: "auto" in a job, else "local")'
    )
    parser.add_argument("--out", type=Path, default=Path("runs/scale"), help="folder of the runs (default runs/scale)")
    parser.add_argument("--report", action="store_true", help="write the tables and the figure to --results")
    parser.add_argument("--results", type=Path, default=Path("experiments/results"))
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    arguments = parse(argv)
    if arguments.report:
        methods = {name: {method: row.decades for method, row in ROWS.items() if name in row.tasks} for name in TASKS}
        write_report(arguments.out, arguments.results, methods)
        return
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    out = arguments.out.absolute()
    if arguments.download:
        for dataset in CLASSES:
            read_cifar(dataset, arguments.data, train=False, download=True)
    tasks = [make_task(name, arguments.data, str(out), arguments.width, arguments.epochs, arguments.text,
                       compile=arguments.compile) for name in arguments.tasks]  # fmt: skip
    for task, method, seed in planned(tasks, arguments.rows, arguments.seeds):
        run_row(task, method, seed, out, arguments)


if __name__ == "__main__":
    main()
