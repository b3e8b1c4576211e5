"""Clusters that start and stop nodes by themselves: Ray's own autoscaler, with raylets on this machine for nodes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import pytest
import ray
import torch
from ray.autoscaler._private.monitor import BASE_READONLY_CONFIG

import autolrs_ray
from autolrs_ray import AutoLRSError, RunResult, TrainingTask
from autolrs_ray.driver.nodes import node_resources
from tests.cluster.conftest import free_port, wait_for_port
from tests.faults.harness import SCALE
from tests.tasks import build_tiny

pytestmark = [pytest.mark.slow, pytest.mark.ray, pytest.mark.timeout(600)]

FAKE_HEAD = "fffffffffffffffffffffffffffffffffffffffffffffffffff00000"  # Ray's name for the head of such a cluster
STORE = 80_000_000


@contextmanager
def autoscaling(head_cpus: int, max_workers: int) -> Iterator[None]:
    """A head, and up to `max_workers` nodes with one CPU each, which go when they have been idle for three seconds."""
    port = free_port()
    node = {"resources": {"CPU": 1, "object_store_memory": STORE}, "node_config": {}, "max_workers": max_workers}
    head = {"resources": {"CPU": head_cpus}, "node_config": {}, "max_workers": 0}
    config = dict(
        BASE_READONLY_CONFIG,  # Ray's own, of a cluster that starts no nodes: all keys have to be there
        cluster_name="small",
        max_workers=max_workers,
        idle_timeout_minutes=0.05,
        provider=dict(
            type="external",
            module="ray.autoscaler._private.fake_multi_node.node_provider.FakeMultiNodeProvider",
            gcs_address=f"127.0.0.1:{port}",
            head_node_id=FAKE_HEAD,
            launch_multiple=True,
            disable_node_updaters=True,
            disable_launch_config_check=True,
            use_node_id_as_ip=True,
        ),
        available_node_types={"ray.head.default": head, "small": node},
        head_node_type="ray.head.default",
    )
    with ExitStack() as stack:
        folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="alr", dir="/tmp", ignore_cleanup_errors=True))
        file = Path(folder, "cluster.json")
        file.write_text(json.dumps(config))
        own = {"AUTOSCALER_UPDATE_INTERVAL_S": "1", "RAY_FAKE_CLUSTER": "1", "RAY_TMPDIR": folder}
        options = [
            f"--port={port}", f"--autoscaling-config={file}", f"--num-cpus={head_cpus}", "--include-dashboard=false",
            "--node-ip-address=127.0.0.1", f"--object-store-memory={STORE}", f"--temp-dir={folder}/ray",
        ]  # fmt: skip
        ray_command = str(Path(sys.executable).with_name("ray"))
        process = subprocess.Popen(
            [ray_command, "start", "--head", "--block", *options], env={**os.environ, **own},
            stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        )  # fmt: skip
        try:
            wait_for_port(port, process)
            deadline = time.monotonic() + 60
            while True:
                try:
                    ray.init(address=f"127.0.0.1:{port}", log_to_driver=False, logging_level="warning")
                    break
                except Exception:
                    assert time.monotonic() < deadline
                    time.sleep(1)
            yield
        finally:
            ray.shutdown()
            process.terminate()
            process.wait()


class Slow(torch.optim.SGD):
    """Takes its time, so that trials run side by side; the first step waits until the cluster has `nodes` nodes."""

    def __init__(self, parameters: Any, nodes: int) -> None:
        super().__init__(parameters, lr=0.1, momentum=0.9)
        self.nodes = nodes

    def step(self, closure: Any = None) -> None:
        deadline = time.monotonic() + 60
        while len(node_resources()) < self.nodes and time.monotonic() < deadline:
            time.sleep(0.2)
        self.nodes = 0
        time.sleep(0.1)
        super().step(closure)


def build_slow(config: dict[str, Any]) -> TrainingTask:
    task = build_tiny(config)
    task.optimizer = Slow(task.model.parameters(), config["nodes"])
    return task


def run(folder: Path, nodes: int = 0, **options: Any) -> RunResult:
    options = {"num_lrs": 4, "config": {"nodes": nodes}, **options}
    return autolrs_ray.run(build_slow, 100, storage_path=folder, name="run", progress=False, **options)


def asked() -> list[dict[str, float]]:
    """What the cluster is asked to have room for."""
    from ray.autoscaler._private.constants import AUTOSCALER_RESOURCE_REQUEST_CHANNEL
    from ray.experimental.internal_kv import _internal_kv_get

    return list(json.loads(_internal_kv_get(AUTOSCALER_RESOURCE_REQUEST_CHANNEL)))


def messages(result: RunResult) -> list[str]:
    return [event["message"] for event in result.events if event["event"] == "warning"]


def wait_for_nodes(count: int, limit_s: float = 90.0) -> None:
    deadline = time.monotonic() + limit_s
    while (there := len(node_resources())) != count:
        assert time.monotonic() < deadline, f"{there} nodes"
        time.sleep(0.2)


@pytest.mark.skipif(SCALE < 20, reason="two minutes and a half: with FAULTS=20")
def test_a_cluster_grows_for_the_run_and_shrinks_after_it(tmp_path: Path) -> None:
    with autoscaling(head_cpus=1, max_workers=2):
        result = run(tmp_path, nodes=3)
        assert result.done
        assert "room for 3 trials at a time now" in " ".join(messages(result))
        assert result.timing.max_concurrent > 1
        wait_for_nodes(1)  # or something would still be asked for


def test_a_cluster_capped_below_the_learning_rates_goes_on_in_waves_from_no_node_at_all(tmp_path: Path) -> None:
    """The time that the first node takes to start is longer than resource_timeout_s."""
    with autoscaling(head_cpus=0, max_workers=1):
        result = run(tmp_path, resource_timeout_s=2.0)
        assert result.done
        assert result.timing.max_concurrent == 1
        raced = {event["arm"] for event in result.events if event["event"] == "rung"}
        assert {"t00", "t03"} < raced  # the smallest, the largest, and those that the walk came to
        wait_for_nodes(1)
        with pytest.raises(AutoLRSError, match=r"asks for {'CPU': 8.0} on one node, but the cluster has 1 node with"):
            run(tmp_path / "large", resource_timeout_s=2.0, resources={"cpu": 8})
        assert asked() == []
