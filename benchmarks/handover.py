"""How long slots stand idle between segments, warm actors against new ones.

    python -m benchmarks.handover [--stages 6] [--slots 2]

Prints medians in milliseconds: from a stage's end to its first probe's first step, from probe to probe on a slot, and
from the last probe to the main trial's first step; and the time of one proposal (fit and acquisition) at n = 10.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from typing import Any

import numpy as np
import ray
import torch
from rich.console import Console
from rich.table import Table

import autolrs_ray
from autolrs_ray.core import surrogate
from experiments.digits_task import build


def gaps(result: autolrs_ray.RunResult) -> dict[str, list[float]]:
    """Idle milliseconds by kind, from the segments of the journal; the first stage starts its actors and is left out."""
    segments = [event for event in result.events if event["event"] == "segment"]
    found: dict[str, list[float]] = {"stage end to first probe": [], "probe to probe": [], "last probe to main": []}
    for stage in sorted({segment["stage"] for segment in segments})[1:]:
        probes = sorted((s["began"], s["time"]) for s in segments if s["stage"] == stage and s["role"] == "probe")
        main = next(s for s in segments if s["stage"] == stage and s["role"] == "main")
        before = next(s for s in segments if s["stage"] == stage - 1 and s["role"] == "main")
        found["stage end to first probe"].append(probes[0][0] - before["time"])
        found["last probe to main"].append(main["began"] - max(end for _, end in probes))
        ends: list[float] = []
        for began, end in probes:
            free = [other for other in ends if other <= began]
            if free:
                found["probe to probe"].append(began - max(free))
                ends.remove(max(free))
            ends.append(end)
    return {kind: [1000.0 * value for value in values] for kind, values in found.items()}


def proposal_ms(fit: str, points: int = 10, repeats: int = 30) -> float:
    """Median milliseconds of one proposal on one thread, after warm-up."""
    rng = np.random.default_rng(0)
    observed = [(float(x), float((x - 0.6) ** 2 + 0.1 * rng.normal())) for x in np.linspace(0, 1, points)]
    times = []
    for _ in range(repeats + 3):
        began = time.perf_counter()
        surrogate.propose(observed, [], 2.0, 1.0, fit)
        times.append(1000.0 * (time.perf_counter() - began))
    return statistics.median(times[3:])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--stages", type=int, default=6)
    parser.add_argument("--slots", type=int, default=2)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    ray.init(address="local", num_cpus=arguments.slots, include_dashboard=False, object_store_memory=200_000_000,
             log_to_driver=False, logging_level="warning")  # fmt: skip
    measured: dict[str, dict[str, list[float]]] = {}
    options: dict[str, Any] = {
        "policy": "paper",
        "stage_steps": 100,
        "max_stage_steps": 100,
        "lr_interval": (1e-3, 1.0),
    }
    with tempfile.TemporaryDirectory() as folder:
        for name, reuse in (("warm", True), ("new actors", False)):
            stages = arguments.stages if reuse else 3
            result = autolrs_ray.run(
                build, 100 * stages, storage_path=folder, name=name.replace(" ", "-"), reuse_actors=reuse, progress=False,
                num_lrs=10 if reuse else 4, **options,
            )  # fmt: skip
            measured[name] = gaps(result)
    ray.shutdown()
    table = Table(title=f"hand-over on {arguments.slots} slots, median ms (n)")
    for column in ("gap", "warm", "new actors", "ratio"):
        table.add_column(column, justify="left" if column == "gap" else "right")
    for kind, warm in measured["warm"].items():
        cold = measured["new actors"][kind]
        one, two = statistics.median(warm), statistics.median(cold)
        table.add_row(kind, f"{one:.0f} ({len(warm)})", f"{two:.0f} ({len(cold)})", f"{two / one:.0f}x")
    console = Console(width=100)
    console.print(table)
    console.print(
        f"one proposal at n = 10: {proposal_ms('map'):.1f} ms; with BoTorch's own fit {proposal_ms('mll'):.1f} ms"
    )


if __name__ == "__main__":
    main()
