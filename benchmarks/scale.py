"""The controller alone: a trainable of almost no cost, 10 probes a stage, on 1, 8 and 64 slots of a fraction of a CPU.

Seconds per probe are the time of Tune's loop and ours. A growing time per stage would mean that finished trials are
looked at over and over; Tune keeps them all in its list.
"""

from __future__ import annotations

import json
import math
import os
import statistics
import tempfile
import time
from itertools import pairwise
from pathlib import Path
from typing import Any

from ray import tune

import autolrs_ray
from benchmarks.section import Section, cluster

PROBES = 10
STAGE_STEPS = 10


class Cheap(tune.Trainable):
    """One step per report and a loss that depends on the LR; its state is one integer."""

    def setup(self, config: dict[str, Any]) -> None:
        self.steps, self.lr = 0, config["lr"]

    def reset_config(self, new_config: dict[str, Any]) -> bool:
        self.steps, self.lr = 0, new_config["lr"]
        return True

    def step(self) -> dict[str, Any]:
        self.steps += 1
        return {
            "step": self.steps,
            "val_loss": (1.0 + 0.1 * math.log10(self.lr / 0.1) ** 2) * 1000 / (1000 + self.steps),
        }

    def save_checkpoint(self, checkpoint_dir: str) -> None:
        Path(checkpoint_dir, "state.json").write_text(json.dumps(self.steps))

    def load_checkpoint(self, checkpoint: str) -> None:
        self.steps = json.loads(Path(checkpoint, "state.json").read_text())


def _resident_mb() -> float:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**20


def _measure(slots: int, stages: int) -> dict[str, float]:
    before, began = _resident_mb(), time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        result = autolrs_ray.run(
            Cheap, STAGE_STEPS * stages, storage_path=folder, policy="paper", num_lrs=PROBES, lr_interval=(1e-3, 1.0),
            stage_steps=STAGE_STEPS, max_stage_steps=STAGE_STEPS, probe_steps=1, slots=slots, progress=False,
            resources={"cpu": 1.0 / 64.0},
        )  # fmt: skip
    wall_s = time.perf_counter() - began
    commits = [event["time"] for event in result.events if event["event"] == "commit"]
    lengths = [after - earlier for earlier, after in pairwise(commits)]
    tenth = max(1, len(lengths) // 10)
    early, late = lengths[tenth : 3 * tenth], lengths[-2 * tenth :]
    return dict(wall_s=wall_s, stage_s=statistics.median(lengths), early_s=statistics.median(early),
                late_s=statistics.median(late), grown_mb=_resident_mb() - before)  # fmt: skip


def measure(quick: bool) -> Section:
    stages, rows, growth = (20 if quick else 100), [], {}
    for slots in (1, 8, 64):
        with cluster(1):
            found = _measure(slots, stages)
        growth[slots] = found["late_s"] / found["early_s"]
        rows.append((
            str(slots), f"{found['wall_s']:.0f}", f"{1000 * found['stage_s'] / (PROBES + 1):.0f}",
            f"{found['early_s']:.2f}", f"{found['late_s']:.2f}", f"{growth[slots]:.2f}", f"{found['grown_mb']:.0f}",
        ))  # fmt: skip
    return Section(
        f"Scale: {stages} stages of {PROBES} probes that cost nothing",
        (
            "slots",
            "wall-clock, s",
            "ms per trial",
            "early stage, s",
            "late stage, s",
            "late / early",
            "driver grew, MB",
        ),
        rows,
        note="Early: the second and third tenth of the stages; late: the last two tenths. No more than 10 slots are ever busy.",
        figures={"stage_time_growth": growth[8]},
    )
