"""`make faults` ends with one line of JSON: what was done to the runs, and what came of it."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from tests.faults.harness import COUNTS, Driver, counted


@pytest.fixture(scope="session")
def folder_of_undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("undisturbed")


@pytest.fixture(scope="session")
def undisturbed(folder_of_undisturbed: Path) -> Callable[[str], dict[str, Any]]:
    """The outcome of the driver's run under a policy when nobody disturbs it; its folder is `folder`/policy."""

    @cache
    def outcome(policy: str) -> dict[str, Any]:
        with Driver(folder_of_undisturbed / policy, ("--policy", policy)) as driver:
            expected = driver.outcome()
        assert expected["done"]
        assert len({row[0] for row in expected["rows"]}) == len(expected["rows"])
        return expected

    return outcome


@pytest.fixture(scope="session")
def cluster() -> Iterator[str]:
    """The address of a Ray that outlives its drivers, as a real cluster does."""
    from ray.cluster_utils import Cluster

    with pytest.MonkeyPatch.context() as environment:
        environment.setenv("RAY_preload_python_modules", "torch")  # in workers before they are wanted: 2 s less each
        started = Cluster(initialize_head=True, head_node_args={"num_cpus": 2, "object_store_memory": 80_000_000})
    yield started.address
    started.shutdown()


def pytest_unconfigure(config: pytest.Config) -> None:
    if any(COUNTS.values()):
        print(json.dumps(counted()), flush=True)
