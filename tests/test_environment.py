"""The environment of a run: what its journal says of it, and that a resume does not ask for the same one."""

from __future__ import annotations

import os
import platform
from pathlib import Path

import pytest
import ray
import torch

from autolrs_ray import AutoLRSSearch
from autolrs_ray.driver import desk
from autolrs_ray.driver.environment import environment
from autolrs_ray.record.journal import read_journal


def test_it_names_the_software_and_the_machine_without_a_cluster() -> None:
    found = environment()
    assert (found["python"], found["cpus"], found["gpus"]) == (platform.python_version(), os.cpu_count(), 0)
    assert torch.__version__.startswith(found["packages"]["torch"].partition("+")[0])
    assert {"autolrs-ray", "ray"} <= set(found["packages"])


def test_gpus_are_those_that_ray_knows_of(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ray, "is_initialized", lambda: True)
    monkeypatch.setattr(ray, "cluster_resources", lambda: {"CPU": 8.0, "GPU": 4.0, "accelerator_type:H100": 1.0})
    assert (environment()["gpus"], environment()["gpu_types"]) == (4, ["H100"])


def test_a_run_goes_on_in_another_environment_and_its_journal_names_both(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for version, resumed in (("2.0", False), ("3.0", True)):
        monkeypatch.setattr(desk, "environment", lambda version=version: {"packages": {"torch": version}})
        search = AutoLRSSearch(100, num_lrs=3, resume="auto")
        assert search.desk.open_record(tmp_path) is resumed
        search.close()
    told = [event["environment"] for event in read_journal(tmp_path) if "environment" in event]
    assert told == [{"packages": {"torch": "2.0"}}, {"packages": {"torch": "3.0"}}]
