"""Kill the driver at any time, start it again with the same command: the schedule and the weights come out the same."""

from __future__ import annotations

import random
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.faults.harness import COUNTS, SCALE, Driver, compare, journal_text

pytestmark = [pytest.mark.slow, pytest.mark.ray, pytest.mark.timeout(600 + 120 * SCALE)]

PERSISTS = 5  # fsyncs and renames of one decision: the journal, the new state, two renames, the folder


def is_new(storage: Path, event: str, before: int) -> bool:
    return journal_text(storage).count(event) > before


def kill_somewhere(driver: Driver, kind: str, growth: float, pause_s: float, event: str) -> bool:
    """Kill `driver` at the moment described in `moments`; False if it has ended before."""
    text = journal_text(driver.storage)
    if kind == "bytes":
        came = driver.wait_until(lambda: len(journal_text(driver.storage)) > len(text) + growth)
        time.sleep(pause_s if came else 0.0)
        came = came and driver.alive()
    elif kind == "save":
        before = text.count(event)
        came = driver.wait_until(lambda: is_new(driver.storage, event, before))
    else:
        came = driver.finish() == -signal.SIGKILL
    if came:
        driver.kill()
    return came


def moments(count: int, length: int, seed: int) -> Iterator[tuple[str, float, float]]:
    """`count` moments to kill at, about evenly spread over a run whose journal comes to `length` bytes.

    ("bytes", n, s): s seconds after the journal has grown by n bytes. ("save", ...): a segment has ended and its checkpoint
    is being written. ("record", n, ...): inside the record, while it has grown by about n bytes, before a fsync or rename.
    """
    generator = random.Random(seed)
    kinds = [("bytes", "save", "record", "bytes")[i % 4] for i in range(count)]
    generator.shuffle(kinds)
    for kind in kinds:
        yield kind, generator.uniform(0.0, 2.0 * length / count), generator.uniform(0.0, 0.2)


@pytest.mark.parametrize(("policy", "count", "event"), [
    ("paper", SCALE, '"event":"segment","arm":"main"'),
    ("anchored", (3 * SCALE) // 4, '"event":"rung"'),
])  # fmt: skip
def test_killed_driver_resumes_to_the_undisturbed_run(
    tmp_path: Path,
    request: pytest.FixtureRequest,
    undisturbed: Callable[[str], dict[str, Any]],
    folder_of_undisturbed: Path,
    policy: str,
    count: int,
    event: str,
) -> None:
    address = "local" if policy == "paper" else request.getfixturevalue("cluster")
    expected, whole = undisturbed(policy), journal_text(folder_of_undisturbed / policy)
    left, attempt = list(moments(count, len(whole), seed=count)), 0
    while left:  # a run may end before all kills are spent: the rest goes to another one
        attempt += 1
        ended: dict[str, Any] | None = None
        while ended is None:
            kind, growth, pause_s = left[0] if left else ("", 0.0, 0.0)
            command = ["--policy", policy, "--address", address]
            if kind == "record":
                at = round(growth / len(whole) * whole.count("\n") * PERSISTS)
                command += ["--die-at", str(max(1, at))]
            with Driver(tmp_path / str(attempt), tuple(command)) as driver:
                if left and kill_somewhere(driver, kind, growth, pause_s, event):
                    left.pop(0)
                else:
                    ended = driver.outcome()
        compare(ended, expected)


def test_killed_in_its_first_writes_or_told_to_end(
    tmp_path: Path, cluster: str, undisturbed: Callable[[str], dict[str, Any]]
) -> None:
    command = ("--address", cluster)
    for at in (1, 2, 3):  # the journal's first line, the first state, its rename
        with Driver(tmp_path, (*command, "--die-at", str(at))) as driver:
            assert driver.finish() == -signal.SIGKILL
            COUNTS["driver_kills"] += 1
    for number, event in ((signal.SIGTERM, '"arm":"s001p02","lr"'), (signal.SIGINT, '"event":"choice","stage":3')):
        with Driver(tmp_path, command) as driver:
            assert driver.wait_until(lambda event=event: event in journal_text(tmp_path))
            driver.process.send_signal(number)
            driver.finish()
            COUNTS["driver_kills"] += 1
    with Driver(tmp_path, command) as driver:
        compare(driver.outcome(), undisturbed("paper"))
    assert journal_text(tmp_path).count('"event":"start"') == 1
