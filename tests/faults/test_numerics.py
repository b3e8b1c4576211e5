"""Every second fit of the surrogate and of the forecaster raises: the run ends all the same, and its journal says so."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import pytest

from autolrs_ray.record.journal import read_journal
from tests.faults.harness import Driver

pytestmark = [pytest.mark.slow, pytest.mark.ray, pytest.mark.timeout(300)]


def test_run_survives_failing_fits(tmp_path: Path, cluster: str) -> None:
    """Every second fit fails; a search that begins with one random learning rate asks the surrogate for all others."""
    options = json.dumps({"initial": "random"})
    with Driver(tmp_path, ("--policy", "paper", "--address", cluster, "--sabotage", "--options", options)) as driver:
        assert driver.outcome()["done"]
    messages = Counter(event["message"] for event in read_journal(tmp_path / "run") if event["event"] == "warning")
    assert set(messages) == {
        "surrogate failed (RuntimeError: injected); space-filling LR",
        "forecaster failed (RuntimeError: injected); the mean of the last losses instead",
    }
    assert min(messages.values()) >= 5  # of five stages of four probes
