"""How long slots stand idle between segments, warm actors against new ones, and how much of it is ours.

Medians in milliseconds: from a stage's end to its first probe's first step, from probe to probe on a slot, and from the
last probe to the main trial's first step. Ours: what of a gap is spent in the scheduler and the searcher, as Tune calls them,
with policy, journal and state written to disk, without what they ask Tune to do.
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

from ray.tune.execution.tune_controller import TuneController

import autolrs_ray
from autolrs_ray import AutoLRSScheduler, AutoLRSSearch
from benchmarks.section import Section, cluster
from experiments.digits_task import build

Span = tuple[float, float]
"""Begin and end, by the wall clock, in seconds."""

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
TUNES_OWN = {TuneController: ("stop_trial", "pause_trial", "_schedule_trial_save")}
"""What ours call of Tune's."""


class Stopwatch:
    """When any of several functions ran; one that another of them calls is not counted twice."""

    def __init__(self) -> None:
        self._spans: list[Span] = []
        self._depth = 0

    def timed(self, function: Any) -> Any:
        @wraps(function)
        def call(*arguments: Any, **named: Any) -> Any:
            self._depth += 1
            began = time.time()
            try:
                return function(*arguments, **named)
            finally:
                self._depth -= 1
                if not self._depth:
                    self._spans.append((began, time.time()))

        return call

    def within(self, gap: Span) -> float:
        """Seconds of `gap` in which one of them ran."""
        return sum(max(0.0, min(end, gap[1]) - max(began, gap[0])) for began, end in self._spans)

    @contextmanager
    def on(self, functions: dict[type, tuple[str, ...]]) -> Iterator[None]:
        """Time these methods."""
        patches = [
            patch.object(owner, name, self.timed(getattr(owner, name)))
            for owner, names in functions.items()
            for name in names
        ]
        for one in patches:
            one.start()
        try:
            yield
        finally:
            for one in patches:
                one.stop()


def gaps(result: autolrs_ray.RunResult) -> dict[str, list[Span]]:
    """Idle times by kind, from the segments of the journal; the first stage starts its actors and is left out."""
    segments = [event for event in result.events if event["event"] == "segment"]
    found: dict[str, list[Span]] = {kind: [] for kind in KINDS}
    for stage in sorted({segment["stage"] for segment in segments})[1:]:
        probes = sorted((s["began"], s["time"]) for s in segments if s["stage"] == stage and s["role"] == "probe")
        main = next(s for s in segments if s["stage"] == stage and s["role"] == "main")
        before = next(s for s in segments if s["stage"] == stage - 1 and s["role"] == "main")
        found[KINDS[0]].append((before["time"], probes[0][0]))
        found[KINDS[2]].append((max(end for _, end in probes), main["began"]))
        ends: list[float] = []
        for began, end in probes:
            free = [other for other in ends if other <= began]
            if free:
                found[KINDS[1]].append((max(free), began))
                ends.remove(max(free))
            ends.append(end)
    return found


def _measure(stages: int, reuse: bool, num_lrs: int) -> dict[str, list[tuple[float, float]]]:
    """The gaps of a run by kind: their length in milliseconds, and that of the part that is ours."""
    options: dict[str, Any] = dict(policy="paper", stage_steps=100, max_stage_steps=100, lr_interval=(1e-3, 1.0))
    ours, tunes = Stopwatch(), Stopwatch()
    with tempfile.TemporaryDirectory() as folder, ours.on(ENTRIES), tunes.on(TUNES_OWN):
        result = autolrs_ray.run(build, 100 * stages, storage_path=folder, reuse_actors=reuse, progress=False,
                                 num_lrs=num_lrs, **options)  # fmt: skip
    return {
        kind: [(1000.0 * (span[1] - span[0]), 1000.0 * (ours.within(span) - tunes.within(span))) for span in spans]
        for kind, spans in gaps(result).items()
    }


def measure(quick: bool, slots: int = 2) -> Section:
    with cluster(slots):
        warm = _measure(3 if quick else 8, True, 4 if quick else 10)
        cold = _measure(2 if quick else 3, False, 4)
    rows = []
    for kind in KINDS:
        one, ours, two = (
            statistics.median(values)
            for values in ([gap for gap, _ in warm[kind]], [ours for _, ours in warm[kind]], [g for g, _ in cold[kind]])
        )
        rows.append((kind, f"{one:.0f} ({len(warm[kind])})", f"{ours:.1f}", f"{two:.0f} ({len(cold[kind])})",
                     f"{two / one:.0f}"))  # fmt: skip
    every = [pair for kind in KINDS for pair in warm[kind]]
    return Section(
        f"Hand-over on {slots} slots: idle time between segments, ms, median (n)",
        ("gap", "warm actors", "of it ours", "new actors", "new / warm"),
        rows,
        note="Ours: scheduler, searcher, policy, journal and state flushed to disk; the rest is Tune's and the trial's.",
        figures={
            "handover_ms": statistics.median([gap for gap, _ in every]),
            "handover_ours_ms": statistics.median([ours for _, ours in every]),
        },
    )
