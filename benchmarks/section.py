"""What a benchmark hands in: a table for people, and the figures that machines read."""

from __future__ import annotations

import math
import os
import statistics
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import psutil
import ray
from rich.console import Console
from rich.table import Table

PRELOAD = {"RAY_preload_python_modules": "torch,torch._dynamo,ray.tune"}  # as docs/cluster.md advises


@dataclass(frozen=True)
class Section:
    """One table. `figures`: the numbers of it that go into results.json."""

    title: str
    columns: tuple[str, ...]
    rows: list[tuple[str, ...]]
    note: str = ""
    figures: dict[str, float] = field(default_factory=dict)

    def show(self, console: Console) -> None:
        table = Table(title=self.title, caption=self.note or None, title_justify="left", caption_justify="left")
        for i, column in enumerate(self.columns):
            table.add_column(column, justify="right" if i else "left")
        for row in self.rows:
            table.add_row(*row)
        console.print(table)

    def markdown(self) -> str:
        lines = [
            f"## {self.title}",
            "",
            "| " + " | ".join(self.columns) + " |",
            "|---" + "|---:" * (len(self.columns) - 1) + "|",
        ]
        lines += ["| " + " | ".join(row) + " |" for row in self.rows]
        return "\n".join([*lines, "", *([self.note, ""] if self.note else [])])


def spread(values: Sequence[float], digits: int = 2) -> str:
    """Median, and in brackets the smallest and the largest."""
    low, middle, high = min(values), statistics.median(values), max(values)
    return f"{middle:.{digits}f} ({low:.{digits}f}-{high:.{digits}f})"


def _await_imports(slots: int, limit_s: float = 60.0) -> None:
    """Wait until the idle workers of all slots have begun and done their imports. Raises TimeoutError."""
    deadline, before = time.monotonic() + limit_s, math.inf
    while time.monotonic() < deadline:
        processes = psutil.process_iter(["cmdline", "cpu_times"])
        idle = [found.info for found in processes if "ray::IDLE" in " ".join(found.info["cmdline"] or ())]
        spent = sum(info["cpu_times"].user for info in idle)
        if len(idle) >= slots and 0.0 <= spent - before < 0.1:  # a second's housekeeping
            return
        before = spent
        time.sleep(1.0)
    raise TimeoutError(f"{slots} idle workers of Ray were not ready within {limit_s:.0f} s")


@contextmanager
def cluster(slots: int, object_store_mb: int = 200, ready: bool = False) -> Iterator[None]:
    """A local cluster of `slots` CPUs that is gone afterwards. ready: wait for the imports of its workers."""
    os.environ.update(PRELOAD)
    ray.init(address="local", num_cpus=slots, include_dashboard=False, object_store_memory=object_store_mb * 2**20,
             log_to_driver=False, logging_level="warning")  # fmt: skip
    try:
        if ready:
            _await_imports(slots)
        yield
    finally:
        ray.shutdown()
