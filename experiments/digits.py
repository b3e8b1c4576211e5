"""Watch AutoLRS train a real network on real data: scikit-learn's digits, on every core of this machine.

    python -m experiments.digits [--steps 1600] [--seed 0] [--out runs]

Runs the paper's policy (10 probes per stage) and the anchored race, then the two controls at the same main-training
steps: the best constant learning rate with averaged weights, and linear decay from the untuned default peak. Prints the
stage table, the final test accuracies and where the plots lie. Learning rates are chosen on validation data; the test
images are read once per final model.
"""

from __future__ import annotations

import argparse
import os
import shutil
import sys
import time
from pathlib import Path
from typing import Any

import ray
import torch
from rich.console import Console
from rich.table import Table

import autolrs_ray
from autolrs_ray.core.envelopes import envelope_factor
from autolrs_ray.show.plots import save_plots
from autolrs_ray.training.trainer import Trainer
from experiments.digits_task import build, split

INTERVAL = (1e-3, 1.0)
GRID = (0.01, 0.03, 0.1, 0.3, 1.0)
DEFAULT_PEAK = 0.1


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=1600, help="optimizer steps of the main training (default 1600)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", default="runs", help="folder of the runs (default runs)")
    parser.add_argument("--cpus", type=int, default=None, help="slots (default: the machine's cores)")
    return parser.parse_args()


def control(steps: int, seed: int, lr: float, envelope: str, averaged: bool) -> dict[str, Any]:
    """One full run in a plain loop: validation loss for the choice, test accuracy for the table."""
    trainer = Trainer(lambda: build({}), seed, averaging=averaged)
    trainer.train(steps, lambda step: lr * envelope_factor(envelope, step, steps))
    test = trainer.evaluate(split()["test"], averaged=averaged)
    return {
        "lr": lr,
        "val_loss": trainer.evaluate(averaged=averaged)["loss"],
        **{f"test_{k}": v for k, v in test.items()},
    }


def final(result: autolrs_ray.RunResult, seed: int) -> dict[str, float]:
    """Test loss and accuracy of a run's final model: of raw and averaged weights, the better on validation."""
    trainer = Trainer(lambda: build({}), seed)
    trainer.model.load_state_dict(result.model_state())
    return trainer.evaluate(split()["test"])


def stage_table(result: autolrs_ray.RunResult) -> Table:
    table = Table(title="AutoLRS as published, stage by stage")
    for name in ("stage", "steps", "learning rate", "forecast", "validation loss"):
        table.add_column(name, justify="right")
    for row in result.rows:
        table.add_row(str(row["stage"] + 1), f"{row['start']} to {row['end']}", f"{row['lr']:.4g}",
                      f"{row['forecast']:.4f}", f"{row['loss']:.4f}")  # fmt: skip
    return table


def main() -> None:
    arguments = parse()
    console = Console() if sys.stdout.isatty() else Console(width=120)
    torch.set_num_threads(1)
    began, out = time.monotonic(), Path(arguments.out)
    ray.init(address="local", num_cpus=arguments.cpus, include_dashboard=False, object_store_memory=200_000_000,
             log_to_driver=False, logging_level="warning")  # fmt: skip
    steps, seed, rows = arguments.steps, arguments.seed, []
    for policy, options in (
        ("paper", {"stage_steps": steps // 8, "max_stage_steps": steps // 4, "num_lrs": 10, "lr_interval": INTERVAL}),
        ("anchored", {}),
    ):
        name = f"digits-{policy}"
        shutil.rmtree(out / name, ignore_errors=True)  # a demonstration shows a whole run every time
        result = autolrs_ray.run(
            build, steps, policy=policy, name=name, storage_path=out, seed=seed, resources={"cpu": 1}, **options
        )
        if policy == "paper":
            console.print(stage_table(result))
        label = (
            "paper: stage-wise search" if policy == "paper" else f"anchored: race won by LR {result.rows[-1]['lr']:.3g}"
        )
        rows.append((label, result.compute, final(result, seed), result.timing))
        console.print(f"plots: {os.path.commonpath([str(path) for path in save_plots(out / name)])}", highlight=False)
    ray.shutdown()
    constant = min((control(steps, seed, lr, "constant", True) for lr in GRID), key=lambda run: run["val_loss"])
    linear = control(steps, seed, DEFAULT_PEAK, "linear", False)
    table = Table(title=f"digits, {steps} steps, seed {seed}, one run: test images, read once")
    for name in ("method", "compute (T)", "test loss", "test accuracy", "wall-clock s", "trials at once"):
        table.add_column(name, justify="left" if name == "method" else "right")
    for label, compute, test, timing in rows:
        table.add_row(label, f"{compute:.2f}", f"{test['loss']:.4f}", f"{test['accuracy']:.2%}", f"{timing.wall_s:.0f}",
                      str(timing.max_concurrent))  # fmt: skip
    for label, compute, run in (
        (f"control: best constant of {len(GRID)} (LR {constant['lr']:g}), averaged weights", len(GRID), constant),
        (f"control: linear decay from the untuned default {DEFAULT_PEAK:g}", 1, linear),
    ):
        table.add_row(label, f"{compute:.2f}", f"{run['test_loss']:.4f}", f"{run['test_accuracy']:.2%}", "", "")
    console.print(table)
    console.print(
        f"{time.monotonic() - began:.0f} s in all. One seed says little: python -m experiments.compare runs more."
    )


if __name__ == "__main__":
    main()
