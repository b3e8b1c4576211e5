"""With as many free slots as learning rates, what does a run cost beside plain training of the same steps?

The workload is a dense net of about 50 ms a step on one thread. On this side and that the clock runs from the call to the
final state; the cluster is up already. `LRs = slots`: so many that every slot holds one, which is the promise; with fewer
slots than learning rates the race takes longer, and the table says how much.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable
from typing import Any

import torch
from ray import tune
from torch import nn

import autolrs_ray
from autolrs_ray.training import Trainer, TrainingTask
from benchmarks.section import Section, cluster, spread

COMMITS = 20
WIDTH, BATCH = 1024, 256


def build(config: dict[str, Any]) -> TrainingTask:
    """A net of four layers of 1,024 units on random inputs; the targets are those of a smaller net."""
    torch.set_num_threads(1)
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(4096 + 512, WIDTH, generator=generator)
    targets = (inputs @ torch.randn(WIDTH, 10, generator=generator)).argmax(1)
    layers = [layer for _ in range(4) for layer in (nn.Linear(WIDTH, WIDTH), nn.ReLU())]
    model = nn.Sequential(*layers, nn.Linear(WIDTH, 10))
    return TrainingTask(
        model=model, optimizer=torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9),
        loss=nn.functional.cross_entropy, train_data=(inputs[:4096], targets[:4096]),
        val_data=(inputs[4096:], targets[4096:]), batch_size=BATCH,
    )  # fmt: skip


def plain(steps: int, folder: str) -> None:
    """The loop a user would write: fixed LR, evaluation and a checkpoint twenty times."""
    trainer = Trainer(lambda: build({}))
    for i in range(1, COMMITS + 1):
        trainer.train(steps * i // COMMITS, lambda step: 0.1)
        trainer.evaluate()
        trainer.save(f"{folder}/{i}")


def under_tune(steps: int, folder: str) -> None:
    """The same as one trial of Tune's, first in, first out."""
    tune.run(autolrs_ray.trainable_for(build), config={"lr": 0.1, "seed": 0, "report_every": steps // COMMITS},
             stop={"step": steps}, storage_path=folder, name="fifo", verbose=0,
             checkpoint_config=tune.CheckpointConfig(checkpoint_frequency=1))  # fmt: skip


def automatic(**options: Any) -> Callable[[int, str], autolrs_ray.RunResult]:
    def call(steps: int, folder: str) -> autolrs_ray.RunResult:
        found = dict(options)
        if options["policy"] == "paper":
            found.update(stage_steps=steps // 5, max_stage_steps=steps // 5)
        return autolrs_ray.run(build, steps, storage_path=folder, progress=False, lr_interval=(1e-3, 0.3), **found)

    return call


def _split(result: autolrs_ray.RunResult) -> str:
    """Where the time went: until the first step, the main run, other trials only, neither."""
    began = min(event["began"] for event in result.events if event["event"] == "segment")
    start_s = began - result.events[0]["time"]
    timing = result.timing
    return f"{start_s:.1f} + {timing.training_s:.1f} + {timing.probing_s:.1f} + {timing.overhead_s - start_s:.1f}"


def measure(quick: bool, slots: int = 2) -> Section:
    torch.set_num_threads(1)
    steps, rounds = (100, 1) if quick else (600, 3)
    race = dict(policy="anchored", reports=4, commits=COMMITS)
    runs: dict[str, Callable[[int, str], Any]] = {
        "plain loop, fixed LR": plain,
        "one Tune trial, fixed LR": under_tune,
        f"anchored, LRs = slots = {slots}": automatic(**race, num_lrs=slots, finalists=1),
        f"paper, LRs = slots = {slots}": automatic(policy="paper", num_lrs=slots),
        f"anchored, 12 LRs on {slots} slots": automatic(**race),
        f"paper, 10 LRs on {slots} slots": automatic(policy="paper"),
    }
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    split: dict[str, str] = {}
    with cluster(slots, 1000):
        for _ in range(rounds):
            for name, call in runs.items():
                with tempfile.TemporaryDirectory() as folder:
                    began = time.perf_counter()
                    result = call(steps, folder)
                    seconds[name].append(time.perf_counter() - began)
                if isinstance(result, autolrs_ray.RunResult):
                    split[name] = _split(result)
    reference = seconds["plain loop, fixed LR"]
    ratios = {
        name: [value / base for value, base in zip(values, reference, strict=True)] for name, values in seconds.items()
    }
    rows = [(name, spread(seconds[name], 1), spread(ratios[name], 3), split.get(name, "")) for name in runs]
    middle = {name: sorted(values)[len(values) // 2] for name, values in ratios.items()}
    step_ms = 1000.0 * sorted(reference)[len(reference) // 2] / steps
    return Section(
        f"Whole run: {steps} steps of {step_ms:.0f} ms on {slots} slots, {rounds} rounds, median (min-max)",
        ("run", "wall-clock, s", "ratio to the plain loop", "start + main + others only + rest, s"),
        rows,
        note="Start: from the call to the first step (actors, imports, data). Rest: hand-overs, proposals, checkpoints that "
        "training waits for, Tune.",
        figures={
            "whole_run_ratio": middle[f"anchored, LRs = slots = {slots}"],
            "whole_run_ratio_paper": middle[f"paper, LRs = slots = {slots}"],
        },
    )
