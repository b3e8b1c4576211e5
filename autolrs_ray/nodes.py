"""What the driver has to know of the cluster's other nodes."""

from __future__ import annotations

import uuid
from pathlib import Path

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

ANSWER_S = 60.0  # longest to wait for a node's answer; a worker process starts there first


def _exists(path: str) -> bool:
    return Path(path).exists()


def nodes_without(folder: Path) -> list[str]:
    """Addresses of the other nodes with CPUs that do not see `folder`, in order. A node that does not answer is left out."""
    here = ray.get_runtime_context().get_node_id()
    others = [node for node in ray.nodes() if node["Alive"] and node["NodeID"] != here and "CPU" in node["Resources"]]
    if not others:
        return []
    marker = folder / f".shared-{uuid.uuid4().hex}"
    marker.touch()
    try:
        look = ray.remote(num_cpus=0, max_retries=0)(_exists)
        answers = {}
        for node in others:
            there = NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)
            answers[look.options(scheduling_strategy=there).remote(str(marker))] = str(node["NodeManagerAddress"])
        arrived, _ = ray.wait(list(answers), num_returns=len(answers), timeout=ANSWER_S)
        return sorted(answers[answer] for answer in arrived if _answered_no(answer))
    finally:
        marker.unlink()


def _answered_no(answer: ray.ObjectRef) -> bool:
    try:
        return not ray.get(answer)
    except ray.exceptions.RayError:  # the node was lost meanwhile
        return False


def require_shared(folder: Path) -> None:
    """Raise RuntimeError, naming the nodes, if trials on other nodes of the cluster could not write to `folder`."""
    if ray.is_initialized() and (blind := nodes_without(folder)):
        raise RuntimeError(
            f"the run folder {folder} is not there on {len(blind)} of the cluster's nodes ({', '.join(blind)}): checkpoints "
            "written there would be lost. Pass a storage_path on a file system that all nodes share, or a URI such as "
            "s3://bucket/runs"
        )
