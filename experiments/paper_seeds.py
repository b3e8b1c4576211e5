"""The paper's policy over many seeds: does a stage ever make things worse, does a run ever end at chance?

    python -m experiments.paper_seeds                     # about 15 minutes on one core; resumable
    python -m experiments.paper_seeds --seeds 3 --tasks digits --slots 10

Four tasks on real data: digits, digits with 20 % of the labels wrong, a plain MLP on digits (three tanh layers, nothing that
normalises) over four decades of learning rates, characters. The policy's defaults, but for the stages: five of T / 5 steps.
A stage has risen where the validation loss at its end lies above the one at its start, at all or by more than 1 % of what
the run had gained until then; a run is at chance where its test loss is no better than that of predicting the training
labels' frequencies. Every finished run is a line of runs/paper_seeds.jsonl. Writes experiments/results/paper_seeds.md.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from dataclasses import replace
from datetime import date
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from autolrs_ray.core.policies import make_policy
from autolrs_ray.training.local import run_local
from autolrs_ray.training.trainer import Trainer
from experiments.compare_report import hardware, mean_se
from experiments.compare_tasks import INTERVALS, Task, make_task
from experiments.tables import markdown

STAGES, OUT = 5, Path(__file__).parent / "results" / "paper_seeds.md"
STEPS = {"digits": 800, "digits_noise": 800, "plain_mlp": 800, "char_lm": 400}
TITLES = {
    "digits": "digits, [0.001, 1]",
    "digits_noise": "noisy digits, [0.001, 1]",
    "plain_mlp": "plain MLP, [0.001, 10]",
    "char_lm": "characters (AdamW), [0.0003, 0.03]",
}


def plain_mlp() -> nn.Module:
    layers = [nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 64), nn.Tanh()]
    return nn.Sequential(nn.Flatten(), *layers, nn.Linear(64, 10))


def task_of(name: str) -> tuple[Task, tuple[float, float]]:
    """The task, and the interval of its learning rates."""
    if name == "plain_mlp":
        return replace(make_task("digits"), model=plain_mlp), INTERVALS["sgd"][4]
    task = make_task(name)
    return task, (1e-3, 1.0) if task.optimizer == "sgd" else INTERVALS["adamw"][2]


def label_entropy(labels: Tensor) -> float:
    """Cross-entropy of predicting their frequencies, nats."""
    shares = labels.flatten().bincount().double() / labels.numel()
    return float(-(shares[shares > 0] * shares[shares > 0].log()).sum())


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
            row = {key: event[key] for key in ("stage", "lr", "forecast", "loss")}
            stages.append({"first": before, "start": stages[-1]["loss"] if stages else before, **row})
    chance = label_entropy(task.split(seed)["train"][1])
    return dict(
        task=name, seed=seed, slots=slots, steps=steps, stages=stages, test_loss=test["loss"],
        test_accuracy=test.get("accuracy"), chance=bool(not test["loss"] < chance), compute=found.trained_steps / steps,
        rollbacks=sum(event["event"] == "rollback" for event in found.events),
        diverged=sum(event["event"] == "probe" and event["status"] == "diverged" for event in found.events),
        seconds=round(time.perf_counter() - began, 1),
    )  # fmt: skip


def rise(stage: dict[str, Any]) -> float:
    """How far the stage's end lies above its start, as a share of what the run had gained by then (1 or more: all of it)."""
    gained = max(stage["first"] - stage["start"], 0.0)
    risen = stage["loss"] - stage["start"]
    if risen <= 0.0:
        return 0.0
    return risen / gained if risen < math.inf and gained > 0.0 else math.inf  # NaN too is no fall


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
                str(sum(row["chance"] for row in own)), of_stages(sum(rise(stage) > 0.0 for stage in stages)),
                of_stages(sum(rise(stage) > 0.01 for stage in stages)), str(sum(row["rollbacks"] for row in own)),
                f"{sum(row['diverged'] for row in own) / len(stages):.2f}",
                f"{sum(row['compute'] for row in own) / len(own):.2f}",
            ])  # fmt: skip
    heads = ["task", "slots", "seeds", "test loss", "worst", "runs at chance", "stages risen", "by over 1 %", "rollbacks",
             "diverged probes a stage", "compute, T"]  # fmt: skip
    return (
        "# The paper's policy, seed by seed\n\n"
        f"Made by `python -m experiments.paper_seeds` on {date.today().isoformat()}; {hardware()}. Five stages of T / 5 "
        f"steps, ten probes of a tenth of that.\nT: {STEPS['digits']} steps, characters {STEPS['char_lm']}. Mean ± standard "
        f"error over seeds.\n\n{markdown(heads, lines)}\n"
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
                risen = sum(rise(stage) > 0.0 for stage in rows[-1]["stages"])
                print(f"{name:13s} seed {seed:2d}: test loss {rows[-1]['test_loss']:.4f}, {risen} stages risen, "
                      f"{rows[-1]['seconds']} s", flush=True)  # fmt: skip
    text = report(rows)
    OUT.write_text(text)
    print(text)


if __name__ == "__main__":
    main()
