"""Workers are killed: retried within max_failures with nothing lost; beyond it probes are booked as failed, and the main
trial ends the run with an error that says how to go on."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from autolrs_ray.record.journal import read_journal
from tests.faults.harness import COUNTS, Driver

pytestmark = [pytest.mark.slow, pytest.mark.ray, pytest.mark.timeout(600)]

Undisturbed = Callable[[str], dict[str, Any]]


def command(folder: Path, cluster: str, policy: str = "paper", max_failures: int = 0, **plan: Any) -> tuple[str, ...]:
    config = json.dumps({"flag": str(folder / "flag"), **plan})
    options = json.dumps({"max_failures": max_failures})
    return ("--policy", policy, "--address", cluster, "--config", config, "--options", options)


def count_kills(folder: Path) -> list[str]:
    kills = (folder / "flag").read_text().splitlines()
    COUNTS["worker_kills"] += len(kills)
    return kills


@pytest.mark.parametrize(("policy", "plan"), [
    ("paper", {"kill": {"probe": 0.1}, "kill_at": ["main report 104", "main save 160"]}),
    ("anchored", {"kill": {"trunk": 0.1}, "kill_at": ["trunk save 19 t03", "trunk save 51 t03"]}),
])  # fmt: skip
def test_killed_workers_change_nothing(
    tmp_path: Path, cluster: str, undisturbed: Undisturbed, policy: str, plan: dict[str, Any]
) -> None:
    with Driver(tmp_path, command(tmp_path, cluster, policy, 10, **plan)) as driver:
        driver.ends_as(undisturbed(policy))
    kills = count_kills(tmp_path)
    assert len(kills) >= 4
    assert any("report" in kill for kill in kills)
    assert any("save" in kill for kill in kills)


@pytest.mark.parametrize("policy", ["paper", "anchored"])
def test_actors_killed_between_two_trials_change_nothing(
    tmp_path: Path, cluster: str, undisturbed: Undisturbed, policy: str
) -> None:
    arguments = ("--policy", policy, "--address", cluster, "--kill-idle", str(tmp_path / "flag"))
    with Driver(tmp_path, arguments) as driver:
        driver.ends_as(undisturbed(policy))
    assert count_kills(tmp_path)


def test_a_probe_whose_setup_hangs_is_given_up_and_a_silent_main_trial_names_its_checkpoint(
    tmp_path: Path, cluster: str, undisturbed: Undisturbed
) -> None:
    config = json.dumps({"flag": str(tmp_path / "flag"), "hang_at": ["s000p00", "main 144"]})
    options = json.dumps({"report_timeout_s": 10.0})
    again = ("--address", cluster, "--config", config, "--options", options)
    with Driver(tmp_path, again) as driver:
        assert driver.finish() == 1
        message = driver.errors.read_text().splitlines()[-1]
    assert "the main trial has reported nothing for 10 s (report_timeout_s=10)" in message
    checkpoint = message.split("last good checkpoint is ")[1].split(" (step 120)")[0]
    assert (Path(checkpoint) / "state.pt").exists()
    warnings = [event["message"] for event in read_journal(tmp_path / "run") if event["event"] == "warning"]
    assert any(text.startswith("s000p00 has not started 10 s after it got its resources") for text in warnings)
    with Driver(tmp_path, again) as driver:
        driver.ends_as(undisturbed("paper"))


def test_probe_killed_for_good_is_booked_and_the_run_ends(tmp_path: Path, cluster: str) -> None:
    plan = {"kill_at": ["probe report 84 s002p01", "probe report 84 s002p02"]}
    with Driver(tmp_path, command(tmp_path, cluster, **plan)) as driver:
        assert driver.outcome()["done"]
    assert len(count_kills(tmp_path)) == 2
    failed = [e["arm"] for e in read_journal(tmp_path / "run") if e["event"] == "probe" and e["status"] == "failed"]
    assert sorted(failed) == ["s002p01", "s002p02"]


def test_main_killed_for_good_names_its_checkpoint_and_resumes(
    tmp_path: Path, cluster: str, undisturbed: Undisturbed
) -> None:
    again = command(tmp_path, cluster, kill_at=["main report 104", "main save 160"])
    for last_good in (80, 120):
        with Driver(tmp_path, again) as driver:
            assert driver.finish() == 1
            message = driver.errors.read_text().splitlines()[-1]
        assert message.startswith("autolrs_ray.core.policy.AutoLRSError: the main trial failed for good")
        assert f"(step {last_good})" in message
        assert 'resume="auto"' in message
        checkpoint = message.split("last good checkpoint is ")[1].split(" (step")[0]
        assert (Path(checkpoint) / "state.pt").exists()
    with Driver(tmp_path, again) as driver:
        driver.ends_as(undisturbed("paper"))
    assert len(count_kills(tmp_path)) == 2
