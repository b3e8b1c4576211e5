"""The paper's policy over many seeds: does a stage ever make things worse, does a run ever end at chance?

    python -m experiments.paper_seeds                     # about half an hour on one core; resumable
    python -m experiments.paper_seeds --seeds 3 --tasks digits --slots 10

Six tasks on real data: digits, digits with 20 % of the labels wrong, a plain MLP on digits (three tanh layers, nothing that
normalises) over four decades of learning rates, characters, and two small tables (diabetes, breast cancer) that the policy was
not made on. Its defaults, but for the stages: five of T / 5 steps. A stage has risen where the validation loss at its end lies
above the one at its start, by however little. It has risen beyond noise where the validation data can tell: the mean of what
their examples have risen lies above 0 by more than two of its standard errors. A run is at chance where its test loss is no
better than that of predicting the training labels' frequencies, or their mean. Every finished run is a line of
runs/paper_seeds.jsonl. Writes experiments/results/paper_seeds.md.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from dataclasses import replace
from datetime import date
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
from sklearn.datasets import load_breast_cancer, load_diabetes
from torch import Tensor, nn

from autolrs_ray.core.policies import make_policy
from autolrs_ray.training.local import run_local
from autolrs_ray.training.trainer import Trainer
from experiments.compare_report import hardware, mean_se
from experiments.compare_tasks import INTERVALS, Split, Task, make_task
from experiments.tables import markdown

STAGES, OUT = 5, Path(__file__).parent / "results" / "paper_seeds.md"
STEPS = {"digits": 800, "digits_noise": 800, "plain_mlp": 800, "char_lm": 400, "diabetes": 400, "cancer": 400}
TITLES = {
    "digits": "digits, [0.001, 1]",
    "digits_noise": "noisy digits, [0.001, 1]",
    "plain_mlp": "plain MLP, [0.001, 10]",
    "char_lm": "characters (AdamW), [0.0003, 0.03]",
    "diabetes": "diabetes (MLP), [0.001, 1]",
    "cancer": "breast cancer (MLP), [0.001, 1]",
}
NOISE = 2.0  # standard errors: where nothing has changed, one stage in forty seems to rise by more


def plain_mlp() -> nn.Module:
    layers = [nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 64), nn.Tanh()]
    return nn.Sequential(nn.Flatten(), *layers, nn.Linear(64, 10))


@cache
def table_split(name: str, seed: int) -> Split:
    """Rows in random order: 60 % training, the rest in two halves. x: (n, d) standardised; y: classes, or standardised."""
    data = load_diabetes() if name == "diabetes" else load_breast_cancer()
    x, y = torch.tensor(data.data, dtype=torch.float32), torch.tensor(data.target)
    x = (x - x.mean(0)) / x.std(0)
    y = (y.float() - y.float().mean()) / y.float().std() if name == "diabetes" else y.long()
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(seed))
    parts = order.split([int(0.6 * len(x)), int(0.2 * len(x)), len(x) - int(0.6 * len(x)) - int(0.2 * len(x))])
    return {part: (x[rows], y[rows]) for part, rows in zip(("train", "val", "test"), parts, strict=True)}


def table_task(name: str) -> Task:
    def loss(output: Tensor, target: Tensor) -> Tensor:
        if name == "diabetes":
            return nn.functional.mse_loss(output[:, 0], target)
        return nn.functional.cross_entropy(output, target)

    inputs, outputs = (10, 1) if name == "diabetes" else (30, 2)
    return Task(name, name, STEPS[name], "sgd", partial(table_split, name),
                lambda: nn.Sequential(nn.Linear(inputs, 32), nn.ReLU(), nn.Linear(32, outputs)), loss, 32, 20,
                has_accuracy=name == "cancer")  # fmt: skip


def task_of(name: str) -> tuple[Task, tuple[float, float]]:
    """The task, and the interval of its learning rates."""
    if name == "plain_mlp":
        return replace(make_task("digits"), model=plain_mlp), INTERVALS["sgd"][4]
    task = table_task(name) if name in ("diabetes", "cancer") else make_task(name)
    return task, (1e-3, 1.0) if task.optimizer == "sgd" else INTERVALS["adamw"][2]


def chance_loss(labels: Tensor) -> float:
    """Cross-entropy of predicting the labels' frequencies, nats; of numbers, the squared error of predicting their mean."""
    if labels.is_floating_point():
        return float(labels.var(correction=0))
    shares = labels.flatten().bincount().double() / labels.numel()
    return float(-(shares[shares > 0] * shares[shares > 0].log()).sum())


def example_losses(trainer: Trainer, task: Task, seed: int) -> Tensor:
    """(n,) losses of the validation examples, one by one."""
    inputs, targets = task.split(seed)["val"]
    with torch.no_grad(), trainer.evaluated() as model:
        outputs = model(inputs)
        return torch.stack([task.loss(outputs[i : i + 1], targets[i : i + 1]) for i in range(len(targets))])


def standard_errors(name: str, seed: int, stages: list[dict[str, Any]]) -> list[float]:
    """By how many standard errors each stage has risen, over validation examples. The run is trained again for it."""
    task, _ = task_of(name)
    trainer = Trainer(lambda: task.build(seed), seed, averaging=False)
    before, found = example_losses(trainer, task, seed), []
    for stage in stages:
        trainer.train(stage["end"], lambda step, lr=stage["lr"]: lr)  # type: ignore[misc]
        after = example_losses(trainer, task, seed)
        risen, before = after - before, after
        found.append(float(risen.mean() / (risen.std() / len(risen) ** 0.5)))
    return found


def run(name: str, seed: int, slots: int) -> dict[str, Any]:
    task, interval = task_of(name)
    steps, began = STEPS[name], time.perf_counter()
    trainer = Trainer(lambda: task.build(seed), seed, averaging=False)
    before = trainer.evaluate()["loss"]
    tau = steps // STAGES
    policy = make_policy(
        "paper", steps, interval, seed, slots, stage_steps=tau, max_stage_steps=tau, probe_reports=task.probe_reports
    )
    found = run_local(policy, trainer)
    test = trainer.evaluate(task.split(seed)["test"])
    stages = []
    for event in found.events:
        if event["event"] == "commit":
            row = {key: event[key] for key in ("stage", "end", "lr", "forecast", "loss")}
            stages.append({"start": stages[-1]["loss"] if stages else before, **row})
    for stage, errors in zip(stages, standard_errors(name, seed, stages), strict=True):
        stage["errors"] = errors
        lrs = [event["lr"] for event in found.events if event["event"] == "probe" and event["stage"] == stage["stage"]]
        stage["lowest"] = min(lrs) > stage["lr"] / 2.0
    chance = chance_loss(task.split(seed)["train"][1])
    return dict(
        task=name, seed=seed, slots=slots, steps=steps, stages=stages, test_loss=test["loss"],
        test_accuracy=test.get("accuracy"), chance=bool(not test["loss"] < chance), compute=found.trained_steps / steps,
        rollbacks=sum(event["event"] == "rollback" for event in found.events),
        diverged=sum(event["event"] == "probe" and event["status"] == "diverged" for event in found.events),
        seconds=round(time.perf_counter() - began, 1),
    )  # fmt: skip


def risen(stage: dict[str, Any]) -> bool:
    return not stage["loss"] <= stage["start"]  # NaN too is no fall


def beyond_noise(stage: dict[str, Any]) -> bool:
    return risen(stage) and not stage["errors"] <= NOISE


def report(rows: list[dict[str, Any]]) -> str:
    lines = []
    for name, title in TITLES.items():
        for slots in sorted({row["slots"] for row in rows}):
            own = [row for row in rows if row["task"] == name and row["slots"] == slots]
            if not own:
                continue
            stages = [stage for row in own for stage in row["stages"]]
            loss, error = mean_se([row["test_loss"] for row in own]) or (math.nan, math.nan)

            def of_stages(count: int, of: int = len(stages)) -> str:
                return f"{count} of {of}"

            lines.append([
                title, str(slots), str(len(own)), f"{loss:.4f} ± {error:.4f}", f"{max(row['test_loss'] for row in own):.4f}",
                str(sum(row["chance"] for row in own)), of_stages(sum(map(risen, stages))),
                str(sum(risen(stage) and stage["lowest"] for stage in stages)),
                of_stages(sum(map(beyond_noise, stages))), str(sum(row["rollbacks"] for row in own)),
                f"{sum(row['diverged'] for row in own) / len(stages):.2f}",
                f"{sum(row['compute'] for row in own) / len(own):.2f}",
            ])  # fmt: skip
    heads = ["task", "slots", "seeds", "test loss", "worst", "runs at chance", "stages risen", "of these, at the lowest LRs",
             "beyond noise", "stages trained again", "diverged probes a stage", "compute, T"]  # fmt: skip
    return (
        "# The paper's policy, seed by seed\n\n"
        f"Made by `python -m experiments.paper_seeds` on {date.today().isoformat()}; {hardware()}. Five stages of T / 5 "
        f"steps, ten probes of a tenth of that.\nT: {STEPS['digits']} steps; of characters and tables {STEPS['char_lm']}. Mean "
        f"± standard error over seeds.\n\nA stage has risen where its validation loss ends above its start, by however little; "
        f"beyond noise, where that is more than {NOISE:g} standard\nerrors over the validation examples (paired). At the "
        "lowest LRs: where none of half the stage's was tried, so that there was nothing to go back to.\n\n"
        f"{markdown(heads, lines)}\n"
    )


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="experiments.paper_seeds", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)  # fmt: skip
    parser.add_argument("--seeds", type=int, default=20)
    parser.add_argument("--tasks", nargs="+", choices=sorted(STEPS), default=list(STEPS))
    parser.add_argument("--slots", type=int, default=1, help="probes at a time (the order in which results count)")
    parser.add_argument("--cache", type=Path, default=Path("runs/paper_seeds.jsonl"))
    arguments = parser.parse_args(argv)
    torch.set_num_threads(1)
    cache: Path = arguments.cache
    cache.parent.mkdir(parents=True, exist_ok=True)
    rows = [json.loads(line) for line in cache.read_text().splitlines()] if cache.exists() else []
    done = {(row["task"], row["seed"], row["slots"]) for row in rows}
    with cache.open("a") as file:
        for seed in range(arguments.seeds):
            for name in arguments.tasks:
                if (name, seed, arguments.slots) in done:
                    continue
                rows.append(run(name, seed, arguments.slots))
                file.write(json.dumps(rows[-1]) + "\n")
                file.flush()
                up = sum(map(risen, rows[-1]["stages"]))
                print(f"{name:13s} seed {seed:2d}: test loss {rows[-1]['test_loss']:.4f}, {up} stages risen, "
                      f"{rows[-1]['seconds']} s", flush=True)  # fmt: skip
    text = report(rows)
    OUT.write_text(text)
    print(text)


if __name__ == "__main__":
    main()
