"""Nodes of a cluster are lost while they run probes, and while they run the main trial. The disk is shared."""

from __future__ import annotations

import json
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import autolrs_ray
from autolrs_ray import AutoLRSError
from tests.faults.harness import COUNTS, Driver, journal_text, moment_of
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
    """A head without CPUs and two nodes with one each: three raylets on this machine, with ports and folders of their own."""
    from ray.cluster_utils import Cluster

    head = {"num_cpus": 0, **own_folder(), "_system_config": NOTICES_SOON}
    started = Cluster(initialize_head=True, head_node_args=head)
    for _ in range(2):
        started.add_node(num_cpus=1, **own_folder())
    nodes = [started.head_node, *started.worker_nodes]
    assert len({node.get_temp_dir_path() for node in nodes}) == len({node.node_manager_port for node in nodes}) == 3
    yield started
    folders = [node.get_temp_dir_path() for node in (started.head_node, *started.worker_nodes)]
    started.shutdown()
    for folder in folders:
        shutil.rmtree(folder, ignore_errors=True)


def own_folder() -> dict[str, Any]:
    return {"object_store_memory": 80_000_000, "temp_dir": tempfile.mkdtemp(prefix="alr", dir="/tmp")}


def raylet_of(node: Any) -> int:
    return int(node.all_processes["raylet"][0].process.pid)


def kill_node_that_runs(cluster: Any, driver: Driver, arms: str, moment: str) -> None:
    """Kill every process of the node on which a trial of `arms` (a glob) trains just now, at a `moment_of` the run."""
    raylets = {raylet_of(node): node for node in cluster.worker_nodes}
    found: list[Any] = []

    def ready() -> bool:
        if moment_of(journal_text(driver.storage)) != moment:
            return False
        for file in (driver.storage / "trace").glob(arms):
            try:
                status = Path(f"/proc/{file.read_text()}/status").read_text()
            except OSError:
                continue
            parents = [int(line.split()[1]) for line in status.splitlines() if line.startswith("PPid")]
            found.extend(raylets[parent] for parent in parents if parent in raylets)
        return bool(found)

    assert driver.wait_until(ready), f"{arms} never ran"
    folder = found[0].get_temp_dir_path()
    cluster.remove_node(found[0], allow_graceful=False)
    shutil.rmtree(folder, ignore_errors=True)
    COUNTS["node_losses"] += 1


@pytest.mark.parametrize(("policy", "probes", "main", "later", "pause_s"), [
    ("paper", "s001p??", "main", '"event":"stage","stage":2', 0.2),
    ("anchored", "t??", "t??", '"event":"decision","step":19', 0.4),
])  # fmt: skip
def test_lost_nodes_change_nothing(
    tmp_path: Path,
    cluster: Any,
    undisturbed: Callable[[str], dict[str, Any]],
    policy: str,
    probes: str,
    main: str,
    later: str,
    pause_s: float,
) -> None:
    """One life of the driver: a node is lost in the search, another one joins, and one is lost that trains on."""
    (tmp_path / "trace").mkdir()
    config = json.dumps({"pause_s": pause_s, "trace": str(tmp_path / "trace")})
    with Driver(tmp_path, ("--policy", policy, "--address", cluster.address, "--config", config)) as driver:

        def wait_for(event: str) -> None:
            assert driver.wait_until(lambda: event in journal_text(tmp_path), every_s=0.05), event

        kill_node_that_runs(cluster, driver, probes, "search")
        wait_for("room for 1 trials at a time now, for 2 before")
        wait_for(later)  # with one slot left of two
        cluster.add_node(num_cpus=1, **own_folder())
        wait_for("room for 2 trials at a time now, for 1 before")
        kill_node_that_runs(cluster, driver, main, "train")
        driver.ends_as(undisturbed(policy))
    assert '"event":"resume"' not in journal_text(tmp_path)


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
        result = autolrs_ray.run(build_tiny, 60, workers=2, num_lrs=2, storage_path=tmp_path / "two", progress=False)
        assert result.done
        assert result.timing.max_concurrent == 1
    finally:
        ray.shutdown()
