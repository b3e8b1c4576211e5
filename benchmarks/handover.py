"""How long slots stand idle between segments, warm actors against new ones, and how much of it is ours.

Medians in milliseconds: from a stage's end to its first probe's first step, from probe to probe on a slot, and from the
last probe to the main trial's first step. Ours: the time per segment in the scheduler and the searcher, as Tune calls them,
with policy, journal and state written to disk.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import wraps
from typing import Any
from unittest.mock import patch

import autolrs_ray
from autolrs_ray import AutoLRSScheduler, AutoLRSSearch
from benchmarks.section import Section, cluster
from experiments.digits_task import build

KINDS = ("stage end to first probe", "probe to probe", "last probe to main")
ENTRIES = {
    AutoLRSScheduler: (
        "on_trial_add",
        "on_trial_result",
        "on_trial_complete",
        "on_trial_remove",
        "choose_trial_to_run",
    ),
    AutoLRSSearch: ("suggest", "on_trial_result", "on_trial_complete"),
}


class Stopwatch:
    """The time inside any of several functions; one that another of them calls is not counted twice."""

    def __init__(self) -> None:
        self.seconds, self._depth = 0.0, 0

    def timed(self, function: Any) -> Any:
        @wraps(function)
        def call(*arguments: Any, **named: Any) -> Any:
            self._depth += 1
            began = time.perf_counter()
            try:
                return function(*arguments, **named)
            finally:
                self._depth -= 1
                self.seconds += 0.0 if self._depth else time.perf_counter() - began

        return call

    @contextmanager
    def on_entries(self) -> Iterator[None]:
        """Time what Tune calls of ours."""
        patches = [
            patch.object(owner, name, self.timed(getattr(owner, name))) for owner in ENTRIES for name in ENTRIES[owner]
        ]
        for one in patches:
            one.start()
        try:
            yield
        finally:
            for one in patches:
                one.stop()


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


def _measure(stages: int, reuse: bool, num_lrs: int) -> tuple[dict[str, list[float]], float]:
    """The gaps of a run, and the milliseconds per segment that are ours."""
    options: dict[str, Any] = dict(policy="paper", stage_steps=100, max_stage_steps=100, lr_interval=(1e-3, 1.0))
    watch = Stopwatch()
    with tempfile.TemporaryDirectory() as folder, watch.on_entries():
        result = autolrs_ray.run(build, 100 * stages, storage_path=folder, reuse_actors=reuse, progress=False,
                                 num_lrs=num_lrs, **options)  # fmt: skip
    segments = sum(event["event"] == "segment" for event in result.events)
    return gaps(result), 1000.0 * watch.seconds / segments


def measure(quick: bool, slots: int = 2) -> Section:
    with cluster(slots):
        warm, ours_ms = _measure(3 if quick else 8, True, 4 if quick else 10)
        cold, cold_ours_ms = _measure(2 if quick else 3, False, 4)
    rows = []
    for kind in KINDS:
        one, two = statistics.median(warm[kind]), statistics.median(cold[kind])
        rows.append((kind, f"{one:.0f} ({len(warm[kind])})", f"{two:.0f} ({len(cold[kind])})", f"{two / one:.0f}"))
    rows.append(("ours, mean per segment with all its reports", f"{ours_ms:.1f}", f"{cold_ours_ms:.1f}", ""))
    return Section(
        f"Hand-over on {slots} slots: idle time between segments, ms, median (n)",
        ("gap", "warm actors", "new actors", "ratio"),
        rows,
        note="Ours: scheduler, searcher, policy, journal and state flushed to disk, from a segment's start to its end; the "
        "rest of a gap is Tune's and the trial's.",
        figures={
            "handover_ms": statistics.median([gap for kind in KINDS for gap in warm[kind]]),
            "handover_ours_ms": ours_ms,
        },
    )
