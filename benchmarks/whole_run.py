"""With as many free slots as learning rates, what does a run cost beside plain training of the same steps?

The workload is a convolutional net on one thread, bound by computing and not by memory, at the batch size at which a step
takes about 50 ms on this machine. On every side
the clock runs from the call to the final state; Python and its imports are up already on this side, and so are the cluster,
a new one for every run, and the imports of its idle workers on that. `LRs = slots`: so many that every slot holds one, which
is the promise; with fewer slots than learning rates a run takes longer, and the table says how much. Plain loops side by
side, as many as slots, tell what is due to the machine: cores that are all busy share its memory and its power.
"""

from __future__ import annotations

import json
import multiprocessing
import statistics
import tempfile
import time
from collections.abc import Callable
from functools import partial
from multiprocessing.synchronize import Barrier
from pathlib import Path
from typing import Any

import torch
from ray import tune
from torch import nn

import autolrs_ray
from autolrs_ray import AutoLRSTrainable, RunResult, TrainingTask
from autolrs_ray.outcome.history import History
from autolrs_ray.training.task import Data
from autolrs_ray.training.trainer import Trainer
from benchmarks.section import Section, cluster, spread

COMMITS = 20
CHANNELS, PIXELS = 32, 16
TRAIN, HELD_OUT = 4096, 256
STEP_MS = 50.0


def build(config: dict[str, Any]) -> TrainingTask:
    """Four convolutions, 243 thousand weights, on noise in which each class has a pattern of its own."""
    torch.set_num_threads(1)
    generator = torch.Generator().manual_seed(0)
    targets = torch.randint(10, (TRAIN + HELD_OUT,), generator=generator)
    patterns = torch.randn(10, 3, PIXELS, PIXELS, generator=generator)
    inputs = 0.1 * patterns[targets] + torch.randn(len(targets), 3, PIXELS, PIXELS, generator=generator)
    widths = (3, CHANNELS, 2 * CHANNELS, 4 * CHANNELS, 4 * CHANNELS)
    layers: list[nn.Module] = []
    for i in range(4):
        stride = 2 if i in (1, 2) else 1
        layers += [nn.Conv2d(widths[i], widths[i + 1], 3, stride, 1), nn.BatchNorm2d(widths[i + 1]), nn.ReLU()]
    model = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(widths[-1], 10))
    return TrainingTask(
        model=model, optimizer=torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9),
        loss=nn.functional.cross_entropy, train_data=(inputs[:TRAIN], targets[:TRAIN]),
        val_data=(inputs[TRAIN:], targets[TRAIN:]), batch_size=config.get("batch_size", 128), channels_last=True,
    )  # fmt: skip


class TimedTrainer(Trainer):
    """Adds up the seconds it evaluates."""

    evaluation_s = 0.0

    def evaluate(self, data: Data | None = None, averaged: bool = False) -> dict[str, float]:
        began = time.perf_counter()
        found = super().evaluate(data, averaged)
        self.evaluation_s += time.perf_counter() - began
        return found


class Timed(AutoLRSTrainable):
    """Reports the seconds since its last report in which it evaluated."""

    def build(self, config: dict[str, Any]) -> TrainingTask:
        return build(config)

    def _new_trainer(self, seed: int, averaging: bool, config: dict[str, Any]) -> Trainer:
        return TimedTrainer(lambda: self.build(config), seed, averaging)

    def step(self) -> dict[str, Any]:
        self.trainer.evaluation_s = 0.0
        return {**super().step(), "evaluation_s": self.trainer.evaluation_s}


def fitting_batch() -> int:
    """The batch size at which a step takes `STEP_MS` here: a multiple of 16."""
    trainer = Trainer(lambda: build({}))
    trainer.train(10, lambda step: 0.1)
    began = time.perf_counter()
    trainer.train(50, lambda step: 0.1)
    step_ms = 1000.0 * (time.perf_counter() - began) / 40
    return 16 * max(1, round(trainer.task.batch_size * STEP_MS / step_ms / 16))


def _loop(steps: int, config: dict[str, Any], folder: str, ready: Barrier, seconds: Any) -> None:
    build(config)  # what torch imports at its first use
    ready.wait()
    began = time.perf_counter()
    trainer = Trainer(lambda: build(config))
    for i in range(1, COMMITS + 1):
        trainer.train(steps * i // COMMITS, lambda step: 0.1)
        trainer.evaluate()
        trainer.save(f"{folder}/{i}")
    seconds.put(time.perf_counter() - began)


def plain(steps: int, config: dict[str, Any], folder: str, side_by_side: int = 1) -> float:
    """Seconds of the loop a user would write: fixed LR, evaluation and a checkpoint twenty times. The longest of several."""
    context = multiprocessing.get_context("spawn")
    ready, seconds = context.Barrier(side_by_side), context.SimpleQueue()
    loops = [
        context.Process(target=_loop, args=(steps, config, f"{folder}/{i}", ready, seconds), daemon=True)
        for i in range(side_by_side)
    ]
    for loop in loops:
        loop.start()
    for loop in loops:
        loop.join()
    if any(loop.exitcode for loop in loops):
        raise RuntimeError(f"a plain loop failed with exit codes {[loop.exitcode for loop in loops]}")
    return max(float(seconds.get()) for _ in loops)


def under_tune(steps: int, config: dict[str, Any], folder: str) -> None:
    """The same as one trial of Tune's, first in, first out."""
    tune.run(Timed, config={**config, "lr": 0.1, "seed": 0, "report_every": steps // COMMITS},
             stop={"step": steps}, storage_path=folder, name="fifo", verbose=0,
             checkpoint_config=tune.CheckpointConfig(checkpoint_frequency=1))  # fmt: skip


def automatic(steps: int, config: dict[str, Any], folder: str, **options: Any) -> RunResult:
    if options["policy"] == "paper":
        options.update(stage_steps=steps // 5, max_stage_steps=steps // 5)
    return autolrs_ray.run(Timed, steps, config=config, storage_path=folder, name="run", progress=False,
                           lr_interval=(1e-3, 0.3), **options)  # fmt: skip


def _split(result: RunResult) -> str:
    """Where the time went: until the first step, training and evaluation of the main run, other trials only, neither."""
    rows = [row for file in Path(result.folder).glob("*/result.json") for row in map(json.loads, file.open())]
    arm = History.of(result.events).arm
    evaluation_s = sum(row["evaluation_s"] for row in rows if row["config"]["autolrs"]["arm"] == arm)
    start_s = min(e["began"] for e in result.events if e["event"] == "segment") - result.events[0]["time"]
    timing = result.timing
    parts = (start_s, timing.training_s - evaluation_s, evaluation_s, timing.probing_s, timing.overhead_s - start_s)
    return " + ".join(f"{part:.1f}" for part in parts)


def _row(call: Callable[..., Any], steps: int, config: dict[str, Any], slots: int) -> tuple[float, str]:
    """Seconds of one run on a new cluster, and its split."""
    with tempfile.TemporaryDirectory() as folder, cluster(slots, 1000, ready=True):
        began = time.perf_counter()
        result = call(steps, config, folder)
        seconds = time.perf_counter() - began
        if isinstance(result, RunResult):
            return seconds, _split(result)
    return (result if isinstance(result, float) else seconds), ""


def measure(quick: bool, slots: int = 2) -> Section:
    steps, rounds = (100, 1) if quick else (700, 2)
    reference, both = "plain loop, fixed LR", f"{slots} plain loops side by side"
    race, paper = f"anchored, LRs = slots = {slots}", f"paper, LRs = slots = {slots}"
    runs: dict[str, Callable[..., Any]] = {
        reference: plain,
        both: partial(plain, side_by_side=slots),
        "one Tune trial, fixed LR": under_tune,
        race: partial(automatic, policy="anchored", num_lrs=slots),
        paper: partial(automatic, policy="paper", num_lrs=slots),
    }
    more: dict[str, Callable[..., Any]] = {
        f"anchored, 12 LRs on {slots} slots": partial(automatic, policy="anchored"),
        f"paper, 10 LRs on {slots} slots": partial(automatic, policy="paper"),
    }
    config = {"batch_size": fitting_batch()}
    found: dict[str, list[tuple[float, str]]] = {name: [] for name in (*runs, *more)}
    for _ in range(rounds):
        for name, call in runs.items():
            found[name].append(_row(call, steps, config, slots))
    for name, call in more.items():  # once: they take long
        found[name].append(_row(call, steps, config, slots))
    base, busy = ([seconds for seconds, _ in found[name]] for name in (reference, both))
    rows, middle = [], {}
    for name, measured in found.items():
        alone, beside = (
            [seconds / plain_s for (seconds, _), plain_s in zip(measured, of, strict=False)] for of in (base, busy)
        )
        middle[name] = statistics.median(alone), statistics.median(beside)
        rows.append((name, spread([s for s, _ in measured], 1), spread(alone, 3), spread(beside, 3), measured[-1][1]))
    step = f"{1000.0 * statistics.median(base) / steps:.0f} ms (batch {config['batch_size']})"
    return Section(
        f"Whole run: {steps} steps of {step} on {slots} slots, {rounds} rounds, median (min-max)",
        ("run", "wall-clock, s", "ratio to the plain loop", f"to {slots} side by side",
         "start + training + evaluation + others only + rest, s"), rows,
        note="Start: from the call to the first step (actors, imports, data). Training, evaluation: of the main run. Rest: "
        "hand-overs, proposals, checkpoints that training waits for, Tune. The split is the last round's; rows with fewer "
        "slots than LRs have one round.",
        figures={
            "whole_run_ratio": middle[race][0], "whole_run_ratio_paper": middle[paper][0],
            "whole_run_ratio_side_by_side": middle[race][1], "whole_run_ratio_paper_side_by_side": middle[paper][1],
            "two_plain_loops_ratio": middle[both][0],
        },
    )  # fmt: skip
