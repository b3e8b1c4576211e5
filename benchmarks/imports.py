"""What importing costs, each in a fresh interpreter."""

from __future__ import annotations

import statistics
import subprocess
import sys
import time

from benchmarks.section import Section, spread

STATEMENTS = {
    "ray.tune": "import ray.tune",
    "autolrs_ray": "import autolrs_ray",
    "autolrs_ray with run and the pair": "from autolrs_ray import run, AutoLRSSearch, AutoLRSScheduler",
    "autolrs_ray.LearnedSchedule (replay, no Ray)": "from autolrs_ray import LearnedSchedule",
}


def measure(quick: bool) -> Section:
    seconds: dict[str, list[float]] = {name: [] for name in STATEMENTS}
    for _ in range(2 if quick else 7):
        for name, statement in STATEMENTS.items():
            began = time.perf_counter()
            subprocess.run([sys.executable, "-c", statement], check=True)
            seconds[name].append(time.perf_counter() - began)
    reference = statistics.median(seconds["ray.tune"])
    rows = [(name, spread(times), f"{statistics.median(times) / reference:.2f}") for name, times in seconds.items()]
    return Section("Import, s, median (min-max)", ("what", "s", "ratio to ray.tune"), rows)
