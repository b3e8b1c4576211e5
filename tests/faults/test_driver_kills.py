"""Kill the driver at any time, start it again with the same command: the schedule and the weights come out the same, and
no step that had been committed is done again."""

from __future__ import annotations

import random
import signal
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from autolrs_ray.record.journal import read_journal
from tests.faults.harness import KILLS, SCALE, Driver, journal_at, journal_text, moment_of

pytestmark = [pytest.mark.slow, pytest.mark.ray, pytest.mark.timeout(600 + 120 * SCALE)]

MOMENTS = ("search", "train", "pause", "record")


@dataclass(frozen=True)
class Kill:
    """One kill to come, after about `share` of a whole run.

    "search", "train": from outside, `pause_s` seconds after the run has come to be there. "pause" (between a trial's PAUSE
    and the end of its save) and "record" (while the journal or the state is being written): the driver's own, at the n-th
    moment of the kind `inside`, one of those of `killed_at`.
    """

    moment: str
    share: float
    pause_s: float
    inside: str = ""

    def n(self, whole: str) -> int:
        """Which of these moments it is, in a run whose journal has come to `whole`."""
        segments, lines = whole.count('"event":"segment"'), whole.count("\n")
        often = {"pause": segments // 4, "saved": segments // 2, "line": lines // 3, "sync": 5 * lines // 3, "": 0}
        return 1 + int(self.share * often[self.inside])

    def strike(self, driver: Driver, whole: str) -> bool:
        """Kill `driver`; False if it has ended before."""
        if self.inside:
            return driver.has_killed_itself(self.moment)
        grown = len(journal_at(driver.run)) + self.share * len(whole)

        def comes() -> bool:
            journal = journal_at(driver.run)
            return len(journal) > grown and moment_of(journal) == self.moment

        if not driver.wait_until(comes):
            return False
        time.sleep(self.pause_s)
        if not driver.alive():
            return False
        driver.kill()
        return True


def kills(count: int, seed: int) -> Iterator[Kill]:
    """`count` of them at random, about evenly spread over a run, each moment as often as the others."""
    generator = random.Random(seed)
    inside = {"pause": ("pause", "saved"), "record": ("line", "sync")}
    moments = [(MOMENTS[i % 4], i // 4 % 2) for i in range(count)]
    generator.shuffle(moments)
    for moment, which in moments:
        share, pause_s = generator.uniform(0.0, 2.0 / count), generator.uniform(0.0, 0.2)
        yield Kill(moment, share, pause_s, inside.get(moment, ("", ""))[which])


@pytest.mark.parametrize("policy", ["paper", "anchored"])
def test_killed_driver_resumes_to_the_undisturbed_run(
    tmp_path: Path,
    request: pytest.FixtureRequest,
    undisturbed: Callable[[str], dict[str, Any]],
    folder_of_undisturbed: Path,
    policy: str,
) -> None:
    address = "local" if policy == "paper" else request.getfixturevalue("cluster")
    expected, whole = undisturbed(policy), journal_text(folder_of_undisturbed / policy)
    before = KILLS.copy()
    left, attempt = list(kills(SCALE, seed=SCALE)), 0
    while left:  # a run may end before all kills are spent: the rest goes to another one, a little earlier
        attempt, ended = attempt + 1, False
        while not ended:
            command = ["--policy", policy, "--address", address]
            if left and left[0].inside:
                command += ["--killed-at", f"{left[0].inside}:{max(1, left[0].n(whole) // attempt)}"]
            with Driver(tmp_path / str(attempt), tuple(command)) as driver:
                if left and left[0].strike(driver, whole):
                    left.pop(0)
                else:
                    driver.ends_as(expected)
                    ended = True
        events = read_journal(tmp_path / str(attempt) / "run")  # a damaged line would be an error
        assert [event["event"] for event in events].count("start") == 1
    done = {moment: (KILLS - before)[policy, moment, "SIGKILL"] for moment in MOMENTS}
    print(policy, done)
    if SCALE >= 20:
        assert all(done.values()), done


@pytest.mark.parametrize("policy", ["paper", "anchored"] if SCALE >= 20 else ["paper"])
def test_killed_in_its_first_writes_or_told_to_end(
    tmp_path: Path, cluster: str, undisturbed: Callable[[str], dict[str, Any]], policy: str
) -> None:
    command = ("--policy", policy, "--address", cluster)
    for at in ("line:1", "sync:2", "sync:3"):  # the journal's first line, the first state, its rename
        with Driver(tmp_path, (*command, "--killed-at", at)) as driver:
            assert driver.has_killed_itself("record")
    first, second = {
        "paper": ('"arm":"s001p02","lr"', '"event":"choice","stage":3'),
        "anchored": ('"event":"rung","arm":"t03"', '"event":"decision","step":51'),
    }[policy]
    for number, event in ((signal.SIGTERM, first), (signal.SIGINT, second)):
        with Driver(tmp_path, command) as driver:
            assert driver.wait_until(lambda event=event: event in journal_text(tmp_path))
            driver.kill(number)
    with Driver(tmp_path, command) as driver:
        driver.ends_as(undisturbed(policy))
    assert journal_text(tmp_path).count('"event":"start"') == 1
