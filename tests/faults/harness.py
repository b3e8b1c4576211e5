"""Starts drivers as processes of their own, kills them, clears away what they leave, and counts what was done."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
import uuid
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from autolrs_ray.journal import JOURNAL_FILE

ROOT = Path(__file__).resolve().parents[2]
SCALE = int(os.environ.get("FAULTS", "4"))
"""Driver kills per policy (the race gets three quarters); 20 is the full suite, with 500 stages in the growth test."""

COUNTS: Counter[str] = Counter(
    driver_kills=0, worker_kills=0, node_losses=0, corrupt_files=0, bad_inputs=0, hangs=0, differences=0
)
"""What the tests of this session have really done and found; printed by conftest.py at the end."""

LIMIT_S = 240.0
"""A driver that takes longer hangs. (Undisturbed: 12 s on 2 idle cores.)"""


@dataclass
class Driver:
    """One process of tests/faults/driver.py in `storage`. Use as a context manager: nothing of it survives the block."""

    storage: Path
    arguments: tuple[str, ...] = ()
    environment: dict[str, str] = field(default_factory=dict)
    outputs: Path | None = None
    limit_s: float = LIMIT_S

    def __enter__(self) -> Driver:
        self.mark = f"AUTOLRS_FAULTS={uuid.uuid4().hex}"
        name, value = self.mark.split("=")
        self.storage.mkdir(parents=True, exist_ok=True)
        outputs = self.outputs or self.storage
        self.output, self.errors = outputs / f"{value[:6]}.out", outputs / f"{value[:6]}.err"
        with open(self.output, "w") as output, open(self.errors, "w") as errors:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "tests.faults.driver", str(self.storage), *self.arguments],
                stdout=output,
                stderr=errors,
                env={**os.environ, **self.environment, name: value},
                cwd=ROOT,
                start_new_session=True,
            )
        self.began = time.monotonic()
        return self

    def __exit__(self, *_: object) -> None:
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait()
        self.clear()

    def alive(self) -> bool:
        """True while it runs; raises TimeoutError, counted as a hang, when it has run for too long."""
        if self.process.poll() is not None:
            return False
        if time.monotonic() - self.began > self.limit_s:
            COUNTS["hangs"] += 1
            raise TimeoutError(f"the driver has run for {self.limit_s:.0f} s:\n{self.errors.read_text()[-3000:]}")
        return True

    def wait_until(self, ready: Callable[[], bool], every_s: float = 0.002) -> bool:
        """Wait for `ready`; False if the driver ended before."""
        while self.alive():
            if ready():
                return True
            time.sleep(every_s)
        return False

    def finish(self) -> int:
        """Wait for its end; the exit status."""
        while self.alive():
            time.sleep(0.05)
        return self.process.returncode

    def outcome(self) -> dict[str, Any]:
        """Wait for its end, which must be a good one, and return what it printed."""
        status = self.finish()
        assert status == 0, f"the driver ended with status {status}:\n{self.errors.read_text()[-3000:]}"
        result: dict[str, Any] = json.loads(self.output.read_text().splitlines()[-1])
        return result

    def kill(self) -> None:
        """SIGKILL to the driver alone. Its Ray processes notice and end by themselves, some later than the next start."""
        self.process.kill()
        self.process.wait()
        COUNTS["driver_kills"] += 1

    def descendants(self) -> list[int]:
        """All processes that were started by this driver and live, found by the mark in their environment."""
        found = []
        for entry in Path("/proc").iterdir():
            try:
                if entry.name.isdigit() and self.mark.encode() in (entry / "environ").read_bytes().split(b"\0"):
                    found.append(int(entry.name))
            except OSError:
                continue  # ended meanwhile, or not ours
        return found

    def clear(self, patience_s: float = 1.0) -> None:
        """Wait for what the driver has left to end, then end it."""
        deadline = time.monotonic() + patience_s
        while (left := self.descendants()) and time.monotonic() < deadline:
            time.sleep(0.1)
        for pid in left:
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                continue


def journal_text(storage: Path) -> str:
    try:
        return (storage / "run" / JOURNAL_FILE).read_text()
    except OSError:
        return ""


def compare(got: dict[str, Any], expected: dict[str, Any], rows: bool = True) -> None:
    """Same LR at every step, same final weights, same committed rows (`rows` False: a stage was trained again)."""
    keys = ["done", "lrs", "weights", *(["rows"] if rows else [])]
    different = [key for key in keys if got[key] != expected[key]]
    COUNTS["differences"] += bool(different)
    assert not different, {key: (got[key], expected[key]) for key in different if key != "lrs"} or different
