"""Every second fit of the surrogate and of the forecaster raises: the run ends all the same, and its journal says so."""

from __future__ import annotations

from pathlib import Path

import pytest

from autolrs_ray.record.journal import read_journal
from tests.faults.harness import Driver

pytestmark = [pytest.mark.slow, pytest.mark.ray, pytest.mark.timeout(300)]


def test_run_survives_failing_fits(tmp_path: Path, cluster: str) -> None:
    with Driver(tmp_path, ("--policy", "paper", "--address", cluster, "--sabotage")) as driver:
        assert driver.outcome()["done"]
    messages = [event["message"] for event in read_journal(tmp_path / "run") if event["event"] == "warning"]
    assert {message: messages.count(message) for message in messages} == {
        "surrogate failed (RuntimeError: injected); space-filling LR": 5,
        "forecaster failed (RuntimeError: injected); the mean of the last losses instead": 10,
    }
