"""How many trials a cluster's nodes hold, and what an autoscaler is asked for: no Ray runs here."""

from __future__ import annotations

import atexit
import json
from types import SimpleNamespace
from typing import Any

import pytest
from ray.autoscaler.v2.schema import ClusterStatus, LaunchRequest, NodeInfo
from ray.tune import PlacementGroupFactory

from autolrs_ray import AutoLRSSearch
from autolrs_ray import private as _ray
from autolrs_ray.driver import slots
from autolrs_ray.driver.desk import Desk
from autolrs_ray.driver.nodes import describe_shortage, trials_that_fit
from autolrs_ray.driver.slots import Slots

ONE = {"CPU": 1.0}
FOUR = {"CPU": 4.0, "GPU": 1.0, "memory": 1e9}


@pytest.mark.parametrize(
    ("bundles", "strategy", "nodes", "expected"),
    [
        ([{"CPU": 1}], "PACK", [ONE, ONE], 2),
        ([{"CPU": 2}], "PACK", [ONE, ONE], 0),  # a bundle lies on one node
        ([{"CPU": 2}], "PACK", [FOUR, {"CPU": 3.0}], 3),  # not (4 + 3) // 2 of a sum, by chance; the next two are less
        ([{"CPU": 3}], "PACK", [FOUR, {"CPU": 3.0}, {"CPU": 2.0}], 2),
        ([{"CPU": 1}, {"CPU": 1}], "PACK", [ONE, ONE, ONE], 1),  # the bundles of a trial may lie on different nodes
        ([{"CPU": 1}, {"CPU": 1}], "STRICT_PACK", [ONE, ONE, FOUR], 2),  # or must not
        ([{"CPU": 1}, {"CPU": 1}], "STRICT_SPREAD", [FOUR], 0),
        ([{"CPU": 1}, {"CPU": 1}], "STRICT_SPREAD", [ONE, ONE, ONE, {"CPU": 3.0}], 3),
        ([{}, {"CPU": 2}, {"CPU": 2}], "PACK", [FOUR, FOUR], 2),
        ([{"CPU": 1}, {"CPU": 3}], "PACK", [FOUR, FOUR], 2),
        ([{"CPU": 1, "GPU": 0.25}], "PACK", [FOUR], 4),
        ([{"CPU": 0.1}], "PACK", [ONE], 10),  # ten tenths are one
        ([{"CPU": 1, "TPU": 1}], "PACK", [FOUR], 0),
        ([{"CPU": 1}], "PACK", [], 0),
        ([{"memory": 1}], "PACK", [FOUR], 1000),
    ],
)
def test_trials_are_packed_on_nodes(
    bundles: list[dict[str, float]], strategy: str, nodes: list[dict[str, float]], expected: int
) -> None:
    given = [dict(node) for node in nodes]
    assert trials_that_fit(PlacementGroupFactory(bundles, strategy), given) == expected
    assert given == nodes
    assert trials_that_fit(PlacementGroupFactory(bundles, strategy), nodes, most=1) == min(1, expected)


def test_a_shortage_is_told_in_terms_of_nodes() -> None:
    assert describe_shortage(PlacementGroupFactory([{"CPU": 2}]), [ONE, ONE, FOUR]) == (
        "each trial asks for {'CPU': 2.0} on one node, but the cluster has 2 nodes with {'CPU': 1.0}, 1 node with {'CPU': 4.0}"
    )
    spread = PlacementGroupFactory([{"GPU": 1}, {"GPU": 1}], "STRICT_SPREAD")
    assert describe_shortage(spread, [FOUR]) == (
        "each trial asks for 2 x {'GPU': 1.0}, each on a node of its own, but the cluster has 1 node with {'GPU': 1.0}"
    )
    assert describe_shortage(spread, []).endswith("but the cluster has no node")


class Cluster:
    """Nodes, and an autoscaler or none."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.nodes, self.starting, self.asked, self.s = [ONE], None, [], 100.0
        monkeypatch.setattr(slots, "node_resources", lambda: self.nodes)
        monkeypatch.setattr(slots, "nodes_starting", lambda: self.starting)
        monkeypatch.setattr(slots.ray, "is_initialized", lambda: True)
        monkeypatch.setattr(slots.time, "monotonic", lambda: self.s)
        monkeypatch.setattr("ray.autoscaler.sdk.request_resources", lambda bundles: self.asked.append(bundles))

    def look(self, found: Slots) -> int:
        self.s += 3.0
        return found.recount()


@pytest.fixture
def cluster(monkeypatch: pytest.MonkeyPatch) -> Cluster:
    return Cluster(monkeypatch)


def begun(trial: Any = None, **options: Any) -> tuple[Desk, Slots]:
    desk = AutoLRSSearch(100, **{"num_lrs": 4, **options}).desk
    found = Slots(desk, trial or PlacementGroupFactory([{"CPU": 1}]))
    found.ask()
    return desk, found


def test_a_cluster_that_does_not_grow_is_asked_for_nothing(cluster: Cluster) -> None:
    desk, found = begun()
    assert desk.capacity.slots == 1
    cluster.nodes = [ONE, ONE]
    assert cluster.look(found) == 1
    assert desk.capacity.slots == 2
    cluster.nodes = []
    assert cluster.look(found) == -1
    assert desk.capacity.slots == 1
    found.withdraw()
    assert cluster.asked == []


def test_an_autoscaler_is_asked_for_what_the_policy_can_use_until_the_end(cluster: Cluster) -> None:
    cluster.starting = 0
    desk, found = begun()
    assert cluster.asked == [[{"CPU": 1.0}] * desk.policy.breadth]
    assert desk.policy.breadth == 3
    cluster.look(found)
    assert len(cluster.asked) == 1  # as before
    desk._policy = SimpleNamespace(breadth=2, emit=lambda *_, **__: None)  # learning rates have dropped out
    cluster.look(found)
    assert cluster.asked[1:] == [[{"CPU": 1.0}] * 2]
    found.withdraw()
    assert cluster.asked[2:] == [[]]
    found.withdraw()
    cluster.look(found)  # Tune's loop goes round once more
    assert cluster.asked[3:] == []


def test_slots_cap_what_is_asked_for_and_bundles_that_belong_together_are_asked_for_together(cluster: Cluster) -> None:
    cluster.starting = 0
    begun(PlacementGroupFactory([{}, {"CPU": 1}, {"CPU": 1}]), slots=2)
    begun(PlacementGroupFactory([{}, {"CPU": 1}, {"CPU": 1}], "STRICT_PACK"), slots=2)
    assert cluster.asked == [[{"CPU": 1.0}] * 4, [{"CPU": 2.0}] * 2]


def test_the_papers_policy_plans_for_the_slots_that_may_come(cluster: Cluster) -> None:
    def planned(**options: Any) -> tuple[int, int]:
        desk = AutoLRSSearch(100, policy="paper", stage_steps=50, num_lrs=4, **options).desk
        found = Slots(desk, PlacementGroupFactory([{"CPU": 1}]))
        cluster.look(found)
        return desk.capacity.slots, desk.policy.breadth

    assert planned() == (1, 1)
    cluster.starting = 0
    assert planned() == (1, 4)
    assert planned(slots=3) == (1, 3)


def test_an_autoscaler_that_first_speaks_after_the_start_is_asked_too(cluster: Cluster) -> None:
    desk, found = begun()
    assert cluster.asked == []
    cluster.starting = 1
    cluster.look(found)
    assert cluster.asked == [[{"CPU": 1.0}] * desk.policy.breadth]


def test_a_driver_that_ends_by_itself_withdraws_too(cluster: Cluster, monkeypatch: pytest.MonkeyPatch) -> None:
    at_exit: list[Any] = []
    monkeypatch.setattr(atexit, "register", at_exit.append)
    cluster.starting = 0
    begun()
    assert len(at_exit) == 1
    at_exit[0]()
    assert cluster.asked[-1] == []


def test_a_cluster_that_cannot_be_asked_ends_no_run(
    cluster: Cluster, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def gone(bundles: list[Any]) -> None:
        raise ConnectionError("no answer")

    monkeypatch.setattr("ray.autoscaler.sdk.request_resources", gone)
    cluster.starting = 0
    _, found = begun()
    found.withdraw()
    assert "could not be asked to make room for" in caplog.text


ALONE = "node_" + "0f" * 28  # what Ray calls the type of a node on a cluster that starts none


@pytest.mark.parametrize(
    ("report", "expected"),
    [
        (None, None),
        ({}, None),
        ({"autoscaler_report": {"active_nodes": {ALONE: 1}, "pending_nodes": [], "pending_launches": {}}}, None),
        ({"autoscaler_report": {"active_nodes": {ALONE: 1}, "node_type_mapping": {"a": ALONE}}}, None),
        ({"autoscaler_report": {"active_nodes": {}, "node_type_mapping": {"a": "ray.head.default"}}}, 0),
        ({"autoscaler_report": {"active_nodes": {"head": 1}, "pending_nodes": [["a", "gpu", "setting-up"]],
                                "pending_launches": {"gpu": 2, "cpu": 1}}}, 4),
        ({"autoscaler_report": {"active_nodes": 7}}, None),  # of another Ray
    ],
)  # fmt: skip
def test_what_the_autoscaler_says_of_the_nodes_it_starts(
    report: dict[str, Any] | None, expected: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ray.autoscaler.v2.utils.is_autoscaler_v2", lambda: False)
    said = None if report is None else json.dumps(report).encode()
    monkeypatch.setattr("ray.experimental.internal_kv._internal_kv_get", lambda key: said)
    assert _ray.nodes_starting() == expected


@pytest.mark.parametrize(("kind", "expected"), [(ALONE, None), ("headgroup", 3)])
def test_what_the_second_autoscaler_says(kind: str, expected: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    def node(kind: str) -> NodeInfo:
        return NodeInfo(instance_type_name=kind, ray_node_type_name=kind, instance_id="i", ip_address="")

    launch = LaunchRequest("gpu", "gpu", 2, LaunchRequest.Status.PENDING, 0)
    status = ClusterStatus(idle_nodes=[node(kind)], pending_nodes=[node("gpu")], pending_launches=[launch])
    monkeypatch.setattr("ray.autoscaler.v2.utils.is_autoscaler_v2", lambda: True)
    monkeypatch.setattr("ray.autoscaler.v2.sdk.get_cluster_status", lambda address: status)
    monkeypatch.setattr(_ray.ray, "get_runtime_context", lambda: SimpleNamespace(gcs_address="127.0.0.1:1"))
    assert _ray.nodes_starting() == expected
