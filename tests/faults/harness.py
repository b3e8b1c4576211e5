"""Starts drivers as processes of their own, kills them, clears away what they leave, and counts what was done."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
import uuid
import warnings
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from autolrs_ray.core.race.plan import RacePlan
from autolrs_ray.record.journal import JOURNAL_FILE, RecordWarning, read_journal
from autolrs_ray.record.stores import join, read_bytes

ROOT = Path(__file__).resolve().parents[2]
SCALE = int(os.environ.get("FAULTS", "20"))
"""Driver kills per policy; 20 is the full suite, with 500 stages in the growth test."""

COUNTS: Counter[str] = Counter(
    driver_kills=0, driver_kills_survived=0, worker_kills=0, node_losses=0, corrupt_files=0, bad_inputs=0, hangs=0,
    differences=0,
)  # fmt: skip
"""What the tests of this session have really done and found; printed by conftest.py at the end."""

KILLS: Counter[tuple[str, str, str]] = Counter()
"""The driver kills among them by (policy, moment, signal). For the moments see `moment_of` and `killed_at` in driver.py."""

UNSETTLED: Counter[str] = Counter()
"""Driver kills of a run (its folder or URI) that has not come to its end since."""

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
        self.policy, self.run = self._given("--policy", "paper"), join(self._given("--uri", str(self.storage)), "run")
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

    def _given(self, option: str, default: str) -> str:
        return self.arguments[self.arguments.index(option) + 1] if option in self.arguments else default

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

    def ends_as(self, expected: dict[str, Any], rows: bool = True) -> None:
        """Wait for its end, which must be the `expected` one, with no committed step done again (`rows` False: a stage was,
        because its checkpoint was lost). All kills of this run's drivers have then been survived."""
        compare(self.outcome(), expected, rows)
        if rows:
            refuse_repeated_work(self.run)
        COUNTS["driver_kills_survived"] += UNSETTLED.pop(self.run, 0)

    def kill(self, number: signal.Signals = signal.SIGKILL) -> None:
        """Send `number` to the driver alone and wait for its end. Its Ray processes notice and end by themselves, some
        later than the next start."""
        self.process.send_signal(number)
        self.finish()
        self.count_kill(moment_of(journal_at(self.run)), number)

    def has_killed_itself(self, moment: str) -> bool:
        """Wait for its end; True, and one more kill at this moment, if it came as `--killed-at` has it."""
        killed = self.finish() == -signal.SIGKILL
        if killed:
            self.count_kill(moment, signal.SIGKILL)
        return killed

    def count_kill(self, moment: str, number: signal.Signals) -> None:
        COUNTS["driver_kills"] += 1
        KILLS[self.policy, moment, number.name] += 1
        UNSETTLED[self.run] += 1

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
    return journal_at(f"{storage}/run")


def journal_at(run: str) -> str:
    """The journal of the run in a folder or at a URI, "" if there is none yet."""
    try:
        return read_bytes(join(run, JOURNAL_FILE)).decode()
    except OSError:
        return ""


def moment_of(journal: str) -> str:
    """What a run does by its journal: "start", "search" or "train", where a stage's LR is decided, or none joins the race."""
    if '"event":"stage"' not in journal and '"event":"rung"' not in journal:
        return "start"
    if '"policy":"anchored"' in journal:
        rungs = re.findall(r'"event":"decision".*?"rung":([0-9.]+)', journal)
        decided = bool(rungs) and float(rungs[-1]) >= RacePlan.of(2).settled
    else:
        decided = journal.rfind('"event":"choice"') > journal.rfind('"event":"stage"')
    return "train" if decided else "search"


def refuse_repeated_work(run: str) -> None:
    """By the journal as it is on disk, every step of an arm was committed once, one after the other, and no life of the
    driver has begun an arm before the step to which it had been committed."""
    found: list[str] = []
    committed: dict[str, int] = {}
    before: dict[str, int] = {}  # what had been committed when this life of the driver began
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RecordWarning)  # of lines that the test itself has damaged
        events = read_journal(run)
    for event in events:
        arm = event.get("arm", "main")
        if event["event"] == "resume":
            before = dict(committed)
        elif event["event"] == "segment" and event["start"] < before.get(arm, 0):
            found.append(f"{arm} was trained from step {event['start']} again; {before[arm]} had been committed")
        elif event["event"] == "commit":
            done = committed.get(arm, 0)
            if event["end"] <= done or event.get("start", done) != done:
                found.append(f"{arm} was committed up to step {done}, then {event}")
            committed[arm] = event["end"]
    COUNTS["differences"] += bool(found)
    assert not found, found


def counted() -> dict[str, Any]:
    """COUNTS and KILLS as one JSON value."""
    by_signal: Counter[str] = Counter(SIGKILL=0, SIGTERM=0, SIGINT=0)
    by_moment: dict[str, Counter[str]] = {}
    for (policy, moment, number), count in sorted(KILLS.items()):
        by_signal[number] += count
        by_moment.setdefault(policy, Counter())[moment] += count
    return {**COUNTS, "driver_kills_by": by_signal, "driver_kills_at": by_moment}


def compare(got: dict[str, Any], expected: dict[str, Any], rows: bool = True) -> None:
    """Same LR at every step, same final weights, same committed rows (`rows` False: a stage was trained again)."""
    keys = ["done", "lrs", "weights", *(["rows"] if rows else [])]
    different = [key for key in keys if got[key] != expected[key]]
    COUNTS["differences"] += bool(different)
    assert not different, {key: (got[key], expected[key]) for key in different if key != "lrs"} or different
