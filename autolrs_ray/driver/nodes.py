"""What the driver has to know of the cluster's nodes: what they hold, and which folders they see."""

from __future__ import annotations

import uuid
from collections import Counter
from pathlib import Path
from typing import Any

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

ANSWER_S = 60.0  # longest to wait for a node's answer; a worker process starts there first
MOST_TRIALS = 1000  # more side by side than any policy has


def node_resources() -> list[dict[str, float]]:
    """What every live node of the cluster has in all, free or not."""
    return [dict(node["Resources"]) for node in ray.nodes() if node["Alive"]]


def trials_that_fit(trial: Any, nodes: list[dict[str, float]], most: int = MOST_TRIALS) -> int:
    """How many trials `nodes` hold at the same time, `most` at most. trial: the PlacementGroupFactory of each.

    A bundle is never split over nodes; all bundles of a trial lie on one node with STRICT_PACK, on different ones with
    STRICT_SPREAD. They are packed first fit, largest first: where trials have bundles of several sizes, a trial more might fit.
    """
    bundles, free = sorted(packed(trial), key=lambda bundle: -sum(bundle.values())), [dict(node) for node in nodes]
    apart = trial.strategy == "STRICT_SPREAD"
    for count in range(most):
        if apart:  # the nodes with the most room first, so that they do not remain alone
            free.sort(key=lambda node: -sum(node.get(name, 0.0) for name in trial.required_resources))
        taken: set[int] = set()
        for bundle in bundles:
            fits = (i for i, node in enumerate(free) if _fits(bundle, node) and not (apart and i in taken))
            found = next(fits, None)
            if found is None:
                return count
            taken.add(found)
            for name, amount in bundle.items():
                free[found][name] -= amount
    return most


def room_now(trial: Any) -> bool:
    """Whether what is free on the cluster, all nodes together, holds one more trial: others may have taken the rest."""
    return _fits(dict(trial.required_resources), ray.available_resources())


def packed(trial: Any) -> list[dict[str, float]]:
    """What has to lie on one node: the trial's bundles, or the sum of them."""
    return [trial.required_resources] if trial.strategy == "STRICT_PACK" else list(trial.bundles)


def _fits(bundle: dict[str, float], node: dict[str, float]) -> bool:
    return all(node.get(name, 0.0) >= amount - 1e-6 for name, amount in bundle.items())


def describe_shortage(trial: Any, nodes: list[dict[str, float]]) -> str:
    """What each trial asks for, and what the nodes have of it."""
    bundles = packed(trial)
    asked = Counter(str(bundle) for bundle in bundles)
    bundle = " and ".join(f"{count} x {bundle}" if count > 1 else bundle for bundle, count in asked.items())
    each = "each on a node of its own" if trial.strategy == "STRICT_SPREAD" else "each on one node"
    has = Counter(str({name: node.get(name, 0.0) for name in trial.required_resources}) for node in nodes)
    there = ", ".join(f"{count} node{'s' * (count > 1)} with {node}" for node, count in has.items())
    where = f", {each}" if len(bundles) > 1 else " on one node"
    return f"each trial asks for {bundle}{where}, but the cluster has {there or 'no node'}"


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
