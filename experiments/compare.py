"""The comparison: what the policies are worth beside schedules that were tuned, on real data, one table a task.

    python -m experiments.compare --quick                     # under five minutes on 2 cores
    python -m experiments.compare --jobs 4                    # digits (clean and noisy) and characters, 5, 5 and 3 seeds
    python -m experiments.compare --tasks cifar16 --data-dir DIR
    python -m experiments.compare --methods ray --tasks digits   # PBT and PB2 through Ray Tune

Runs are resumable: every finished (task, method, seed) is a line of runs/compare/results.jsonl, and trained stretches are
looked up in runs/compare/memo. Writes compare.json, compare.md, compare.png and compare.svg to experiments/results
(--quick: to runs/compare/quick). Results: experiments/results/compare.md.
"""

from __future__ import annotations

import argparse
import fcntl
import json
import multiprocessing
import os
import signal
import sys
import time
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, replace
from datetime import date
from pathlib import Path
from typing import Any

from autolrs_ray.show.run_data import read_lines
from experiments.compare_lab import Lab
from experiments.compare_methods import METHODS, setting
from experiments.compare_report import GROUPS, RAY, hardware, write_report
from experiments.compare_tasks import DEFAULT_TASKS, Task, make_task

QUICK_METHODS = ("anchored", "paper", "constant", "constant + averaged weights", "linear",
                 "linear, default LR", "Schedule-Free, default LR", "Prodigy + cosine", "anchored, 2 decades",
                 "anchored, no warm-up", "anchored, no envelope")  # fmt: skip


class Cache:
    """Finished results, one JSON line each; a line cut short by a crash is left out."""

    def __init__(self, path: Path) -> None:
        self.path = path
        path.parent.mkdir(parents=True, exist_ok=True)

    def rows(self) -> list[dict[str, Any]]:
        rows = read_lines(self.path) if self.path.exists() else []
        return list({(row["task"], row["method"], row["seed"], row["setting"]): row for row in rows}.values())

    def add(self, row: dict[str, Any]) -> None:
        """Append one line: under a lock, in one write, flushed to disk, on a line of its own."""
        with open(self.path, "a+b") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            end = file.seek(0, os.SEEK_END)
            file.seek(max(0, end - 1))
            start = b"" if file.read(1) in (b"", b"\n") else b"\n"
            file.write(start + json.dumps(row).encode() + b"\n")
            file.flush()
            os.fsync(file.fileno())


def cached_row(task: Task, method: str, seed: int, outcome: Any, seconds: float) -> dict[str, Any]:
    return dict(task=task.name, method=method, seed=seed, setting=setting(task), steps=task.steps,
                outcome=asdict(outcome), seconds=round(seconds, 2), hardware=hardware(),
                date=date.today().isoformat())  # fmt: skip


def scaled(task: Task, quick: bool, seeds: int | None) -> Task:
    """The task at its usual size, or cut to 200 steps and 2 seeds."""
    if quick:
        task = replace(task, steps=200, seeds=2)
    return replace(task, seeds=seeds) if seeds else task


def run_group(arguments: argparse.Namespace, name: str, seed: int, methods: list[str]) -> None:
    """All `methods` of one task and seed, in one process: they share what they train in common."""
    import torch

    torch.set_num_threads(1)
    task = scaled(make_task(name, arguments.data_dir, arguments.text), arguments.quick, arguments.seeds)
    folder = Path(arguments.folder)
    cache, lab = Cache(folder / "results.jsonl"), Lab(task, seed, folder / "memo")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("stopped"))  # what has been trained is kept
    for method in methods:
        began = time.perf_counter()
        try:
            outcome = METHODS[method].run(lab)
        finally:
            lab.memo.flush()
        seconds = time.perf_counter() - began
        cache.add(cached_row(task, method, seed, outcome, seconds))
        print(f"{task.name:13s} seed {seed}  {method:38s} test loss {outcome.test_loss:.4f}  compute "
              f"{outcome.compute:5.2f} T  {seconds:6.1f} s", flush=True)  # fmt: skip


def run_ray(arguments: argparse.Namespace, task: Task, missing: list[tuple[str, int]]) -> None:
    """PBT and PB2, one after the other: each run has the whole machine."""
    from experiments.compare_pbt import ray_session, run_pbt

    cache = Cache(Path(arguments.folder) / "results.jsonl")
    with ray_session():
        for method, seed in missing:
            began = time.perf_counter()
            outcome = run_pbt(method, task, seed)
            cache.add(cached_row(task, method, seed, outcome, time.perf_counter() - began))
            print(f"{task.name:13s} seed {seed}  {method:38s} test loss {outcome.test_loss:.4f}  "
                  f"{time.perf_counter() - began:6.1f} s", flush=True)  # fmt: skip


def chosen_methods(names: list[str] | None, quick: bool) -> list[str]:
    """Method names, or whole groups of them. Raises ValueError for a name there is none of."""
    if not names:
        return list(QUICK_METHODS if quick else METHODS)
    chosen: list[str] = []
    for name in names:
        if name in GROUPS:
            chosen += [method for method, m in METHODS.items() if m.group == name]
        elif name == "ray":
            chosen += RAY
        elif name in METHODS or name in RAY:
            chosen.append(name)
        else:
            known = ", ".join([*GROUPS, "ray", *RAY, *METHODS])
            raise ValueError(f"unknown method {name!r}: use one of {known}")
    return chosen


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="experiments.compare", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)  # fmt: skip
    parser.add_argument("--quick", action="store_true", help="200 steps, 2 seeds, the main methods")
    parser.add_argument("--tasks", nargs="+", help="digits, digits_noise, char_lm, cifar16, cifar32")
    parser.add_argument("--methods", nargs="+", help="names or groups: main, growth, ablation, ray")
    parser.add_argument("--seeds", type=int, help="seeds a task (default: 5, for characters and CIFAR-10 3)")
    parser.add_argument("--first-seed", type=int, default=0)
    parser.add_argument("--data-dir", help="torchvision root that holds cifar-10-batches-py")
    parser.add_argument("--text", help="text file of the character model (default: Python's language reference)")
    parser.add_argument("--jobs", type=int, default=2, help="processes")
    parser.add_argument("--folder", help="where caches go (default runs/compare)")
    parser.add_argument("--out", help="where the results go (default experiments/results)")
    parser.add_argument("--report-only", action="store_true", help="make tables and figure from what is cached")
    arguments = parser.parse_args(argv)
    arguments.folder = arguments.folder or ("runs/compare/quick" if arguments.quick else "runs/compare")
    arguments.out = arguments.out or (arguments.folder if arguments.quick else "experiments/results")
    return arguments


def main(argv: list[str] | None = None) -> None:
    arguments = parse(argv)
    names = arguments.tasks or (["digits", "char_lm"] if arguments.quick else list(DEFAULT_TASKS))
    methods = chosen_methods(arguments.methods, arguments.quick)
    tasks = [scaled(make_task(n, arguments.data_dir, arguments.text), arguments.quick, arguments.seeds) for n in names]
    cache = Cache(Path(arguments.folder) / "results.jsonl")
    done = {(row["task"], row["method"], row["seed"], row["setting"]) for row in cache.rows()}
    began = time.perf_counter()
    groups = []
    for task in tasks if not arguments.report_only else []:
        for seed in range(arguments.first_seed, arguments.first_seed + task.seeds):
            missing = [m for m in methods if m in METHODS and (task.name, m, seed, setting(task)) not in done]
            groups += [(task, seed, missing)] if missing else []
    if len(groups) > 1 and arguments.jobs > 1:
        context = multiprocessing.get_context("spawn")
        with ProcessPoolExecutor(arguments.jobs, mp_context=context) as pool:
            for future in as_completed(pool.submit(run_group, arguments, t.name, s, m) for t, s, m in groups):
                future.result()
    else:
        for task, seed, missing in groups:
            run_group(arguments, task.name, seed, missing)
    for task in tasks if not arguments.report_only else []:
        seeds = range(arguments.first_seed, arguments.first_seed + task.seeds)
        todo = [(m, s) for m in methods if m in RAY for s in seeds]
        todo = [(m, s) for m, s in todo if (task.name, m, s, setting(task)) not in done]
        if todo:
            run_ray(arguments, task, todo)
    write_report(cache.rows(), Path(arguments.out), {task.name: task for task in tasks}, METHODS)
    print(f"{time.perf_counter() - began:.0f} s; results in {arguments.out}")


if __name__ == "__main__":
    main()
