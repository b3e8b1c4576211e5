"""Nodes of a cluster are lost while they run probes, and while they run the main trial. The disk is shared."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import autolrs_ray
from autolrs_ray import AutoLRSError
from tests.faults.harness import COUNTS, Driver, compare, journal_text
from tests.tasks import build_tiny

pytestmark = [pytest.mark.slow, pytest.mark.ray, pytest.mark.timeout(600)]

NOTICES_SOON = {  # a lost node is noticed after 1.4 s instead of 14
    "health_check_initial_delay_ms": 5000,
    "health_check_period_ms": 500,
    "health_check_timeout_ms": 2000,
    "health_check_failure_threshold": 4,
}


@pytest.fixture
def cluster() -> Iterator[Any]:
    """A head without CPUs and two nodes with one each: three raylets on this machine."""
    from ray.cluster_utils import Cluster

    head = {"num_cpus": 0, "object_store_memory": 80_000_000, "_system_config": NOTICES_SOON}
    started = Cluster(initialize_head=True, head_node_args=head)
    for _ in range(2):
        started.add_node(num_cpus=1, object_store_memory=80_000_000)
    yield started
    started.shutdown()


def raylet_of(node: Any) -> int:
    return int(node.all_processes["raylet"][0].process.pid)


def kill_node_that_runs(cluster: Any, driver: Driver, arms: str) -> None:
    """Kill every process of the node on which a trial of `arms` (a glob) trains just now."""
    raylets = {raylet_of(node): node for node in cluster.worker_nodes}
    found: list[Any] = []

    def ready() -> bool:
        for file in (driver.storage / "trace").glob(arms):
            try:
                status = Path(f"/proc/{file.read_text()}/status").read_text()
            except OSError:
                continue
            found.extend(raylets[int(line.split()[1])] for line in status.splitlines() if line.startswith("PPid"))
        return bool(found)

    assert driver.wait_until(ready), f"{arms} never ran"
    cluster.remove_node(found[0], allow_graceful=False)
    COUNTS["node_losses"] += 1


def test_lost_nodes_change_nothing(tmp_path: Path, cluster: Any, undisturbed: Callable[[str], dict[str, Any]]) -> None:
    (tmp_path / "trace").mkdir()
    config = json.dumps({"pause_s": 0.2, "trace": str(tmp_path / "trace")})
    command = ("--address", cluster.address, "--config", config)
    with Driver(tmp_path, command) as driver:
        kill_node_that_runs(cluster, driver, "s001p??")
        assert driver.wait_until(lambda: '"stage":2' in journal_text(tmp_path))
        driver.kill()
    began = time.monotonic()
    with Driver(tmp_path, command) as driver:  # with one slot left of two
        assert driver.wait_until(lambda: '"stage":3' in journal_text(tmp_path))
        cluster.add_node(num_cpus=1, object_store_memory=80_000_000)
        kill_node_that_runs(cluster, driver, "main")
        compare(driver.outcome(), undisturbed("paper"))
    print(time.monotonic() - began)


def test_a_trial_larger_than_any_node_ends_the_run_in_seconds_and_two_workers_share_two_nodes(
    tmp_path: Path, cluster: Any
) -> None:
    import ray

    ray.init(address=cluster.address, log_to_driver=False)
    try:
        began = time.monotonic()
        with pytest.raises(
            AutoLRSError, match=r"{'CPU': 2.0} on one node, but the cluster has .*2 nodes with {'CPU': 1.0}"
        ):
            autolrs_ray.run(
                build_tiny, 60, resources={"cpu": 2}, resource_timeout_s=1.0, storage_path=tmp_path, progress=False
            )
        assert time.monotonic() - began < 30.0
        result = autolrs_ray.run(
            build_tiny, 60, workers=2, num_lrs=2, infill=0, branches=0, storage_path=tmp_path / "two", progress=False
        )
        assert result.done
        assert result.timing.max_concurrent == 1
    finally:
        ray.shutdown()
