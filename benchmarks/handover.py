"""How long slots stand idle between segments, warm actors against new ones.

Medians in milliseconds: from a stage's end to its first probe's first step, from probe to probe on a slot, and from the
last probe to the main trial's first step.
"""

from __future__ import annotations

import statistics
import tempfile
from typing import Any

import autolrs_ray
from benchmarks.section import Section, cluster
from experiments.digits_task import build

KINDS = ("stage end to first probe", "probe to probe", "last probe to main")


def gaps(result: autolrs_ray.RunResult) -> dict[str, list[float]]:
    """Idle milliseconds by kind, from the segments of the journal; the first stage starts its actors and is left out."""
    segments = [event for event in result.events if event["event"] == "segment"]
    found: dict[str, list[float]] = {kind: [] for kind in KINDS}
    for stage in sorted({segment["stage"] for segment in segments})[1:]:
        probes = sorted((s["began"], s["time"]) for s in segments if s["stage"] == stage and s["role"] == "probe")
        main = next(s for s in segments if s["stage"] == stage and s["role"] == "main")
        before = next(s for s in segments if s["stage"] == stage - 1 and s["role"] == "main")
        found[KINDS[0]].append(probes[0][0] - before["time"])
        found[KINDS[2]].append(main["began"] - max(end for _, end in probes))
        ends: list[float] = []
        for began, end in probes:
            free = [other for other in ends if other <= began]
            if free:
                found[KINDS[1]].append(began - max(free))
                ends.remove(max(free))
            ends.append(end)
    return {kind: [1000.0 * value for value in values] for kind, values in found.items()}


def _measure(stages: int, reuse: bool, num_lrs: int) -> dict[str, list[float]]:
    options: dict[str, Any] = dict(policy="paper", stage_steps=100, max_stage_steps=100, lr_interval=(1e-3, 1.0))
    with tempfile.TemporaryDirectory() as folder:
        return gaps(autolrs_ray.run(build, 100 * stages, storage_path=folder, reuse_actors=reuse, progress=False,
                                    num_lrs=num_lrs, **options))  # fmt: skip


def measure(quick: bool, slots: int = 2) -> Section:
    with cluster(slots):
        warm = _measure(3 if quick else 8, True, 4 if quick else 10)
        cold = _measure(2 if quick else 3, False, 4)
    rows = []
    for kind in KINDS:
        one, two = statistics.median(warm[kind]), statistics.median(cold[kind])
        rows.append((kind, f"{one:.0f} ({len(warm[kind])})", f"{two:.0f} ({len(cold[kind])})", f"{two / one:.0f}"))
    return Section(
        f"Hand-over on {slots} slots: idle time between segments, ms, median (n)",
        ("gap", "warm actors", "new actors", "ratio"),
        rows,
        figures={"handover_ms": statistics.median([gap for kind in KINDS for gap in warm[kind]])},
    )
