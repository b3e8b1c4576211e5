"""Trials that change their size are killed meanwhile: the driver, a worker, a node. The run is the one of a single process."""

from __future__ import annotations

import json
import os
import signal
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from autolrs_ray.core.policies import make_policy
from autolrs_ray.record.journal import read_journal
from autolrs_ray.training.local import run_local
from autolrs_ray.training.trainer import Trainer
from tests.faults.driver import OPTIONS
from tests.faults.harness import COUNTS, SCALE, UNSETTLED, Driver, journal_text, refuse_repeated_work
from tests.faults.test_nodes import cluster as two_nodes
from tests.faults.test_nodes import own_folder
from tests.faults.trainables import build_shared

pytestmark = [pytest.mark.slow, pytest.mark.ray, pytest.mark.timeout(900)]

nodes = two_nodes  # a fixture


def sizes(storage: Path) -> list[int]:
    """Workers, in order of the changes in the journal."""
    lines = [line for line in journal_text(storage).splitlines() if '"event":"workers"' in line]
    return [int(line.split('"workers":')[1].split(",")[0]) for line in lines]


@cache
def alone() -> tuple[list[tuple[int, float]], list[float]]:
    """(step, LR) and loss of every commit of the run in one process."""
    options = {name: value for name, value in OPTIONS["elastic"].items() if name not in ("policy", "workers")}
    policy = make_policy("anchored", options.pop("total_steps"), options.pop("lr_interval"), 0, 2, **options)
    events = run_local(policy, Trainer(lambda: build_shared({}), 0, averaging=True)).events
    arm = next(event["arm"] for event in events if event["event"] == "done")
    rows = [event for event in events if event["event"] == "commit" and event["arm"] == arm]
    return [(row["end"], row["lr"]) for row in rows], [row["loss"] for row in rows]


def ends_alike(driver: Driver) -> None:
    """Same learning rates and, up to how sums are rounded, same losses; no committed step done again."""
    outcome: dict[str, Any] = driver.outcome()
    where, losses = alone()
    same = [(end, lr) for end, lr, _ in outcome["rows"]] == where
    same = same and [loss for *_, loss in outcome["rows"]] == pytest.approx(losses, rel=1e-3)
    COUNTS["differences"] += not same
    assert same, (outcome["rows"], where, losses)
    refuse_repeated_work(driver.run)
    COUNTS["driver_kills_survived"] += UNSETTLED.pop(driver.run, 0)


def test_drivers_killed_while_trials_grow_and_shrink_change_nothing(tmp_path: Path) -> None:
    """Right after a trial was given another size, before it has begun, and when it has trained with it."""
    command, kills = ("--policy", "elastic"), 2 if SCALE < 20 else 6
    for n in range(kills):
        with Driver(tmp_path, command) as driver:
            before = len(sizes(tmp_path))

            def changed(before: int = before) -> bool:
                return len(set(sizes(tmp_path)[before:])) > 1

            if not driver.wait_until(changed):
                break
            if n % 2:
                trained = journal_text(tmp_path).count('"event":"segment"')
                driver.wait_until(lambda: journal_text(tmp_path).count('"event":"segment"') > trained)  # noqa: B023
            if driver.alive():
                driver.kill()
    with Driver(tmp_path, command) as driver:
        ends_alike(driver)
    assert set(sizes(tmp_path)) == {1, 2}


def test_a_worker_killed_while_its_trial_is_grown_changes_nothing(tmp_path: Path) -> None:
    config, kills = json.dumps({"pause_s": 0.1}), 0
    with Driver(tmp_path, ("--policy", "elastic", "--config", config)) as driver:
        for _ in range(2):
            found: list[int] = []

            def ready() -> bool:
                found[:] = [pid for pid in driver.descendants() if is_worker(pid)]  # noqa: B023
                return len(found) == 2  # noqa: B023

            if not driver.wait_until(ready, every_s=0.05):
                break
            os.kill(found[1], signal.SIGKILL)
            kills += 1
            driver.wait_until(lambda: not is_worker(found[1]))  # noqa: B023
        ends_alike(driver)
    COUNTS["worker_kills"] += kills
    assert kills


def is_worker(pid: int) -> bool:
    """Whether the process is a rank of a trial."""
    try:
        return "ray::_Worker" in Path(f"/proc/{pid}/cmdline").read_text()
    except OSError:
        return False


@pytest.mark.skipif(SCALE < 20, reason="with FAULTS=20")
def test_a_node_lost_under_a_grown_trial_changes_nothing(tmp_path: Path, nodes: Any) -> None:
    """A trial with a worker on each of two nodes goes on with one on one, and grows again with the next node."""
    config = json.dumps({"pause_s": 0.2})
    with Driver(tmp_path, ("--policy", "elastic", "--address", nodes.address, "--config", config)) as driver:
        assert driver.wait_until(lambda: 2 in sizes(tmp_path), every_s=0.05)
        nodes.remove_node(next(iter(nodes.worker_nodes)), allow_graceful=False)
        COUNTS["node_losses"] += 1
        assert driver.wait_until(
            lambda: "room for 1 trials at a time now, for 2 before" in journal_text(tmp_path), 0.05
        )
        grown = len(sizes(tmp_path))
        nodes.add_node(num_cpus=1, **own_folder())
        assert driver.wait_until(lambda: 2 in sizes(tmp_path)[grown:], every_s=0.05)
        ends_alike(driver)
    assert not [event for event in read_journal(tmp_path / "run") if event["event"] == "resume"]
