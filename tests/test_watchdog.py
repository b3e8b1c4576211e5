"""How long a trial may be silent, or wait for a node: no Ray runs here, and no time passes."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
from ray.tune import PlacementGroupFactory
from ray.tune.experiment import Trial

from autolrs_ray.core.policy import AutoLRSError, way_on
from autolrs_ray.core.segments import Segment
from autolrs_ray.driver import watchdog
from autolrs_ray.driver.capacity import Capacity
from autolrs_ray.driver.watchdog import Watchdog

SEGMENT = Segment("main", "main", 0, 0.1, 0, (100, 1000), 1, total_steps=1000)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    now = SimpleNamespace(s=0.0)
    monkeypatch.setattr(watchdog.time, "monotonic", lambda: now.s)
    return now


@pytest.fixture
def dog() -> Watchdog:
    policy = SimpleNamespace(done=False, progress=dict, last_good=lambda arm: way_on("/run/c", 100, ""), wanted=list)
    desk: Any = SimpleNamespace(
        settings=SimpleNamespace(report_timeout_s=10.0, resource_timeout_s=60.0),
        capacity=Capacity(),
        policy=policy,
        segment=lambda trial_id: SEGMENT,
        arm=lambda trial_id: "main",
    )
    trial: Any = SimpleNamespace(status=Trial.RUNNING, trial_id="a", temporary_state=SimpleNamespace(ray_actor=None))
    return Watchdog(desk, {"a": trial}, PlacementGroupFactory([{"CPU": 1}]), lambda trial: trial.actor)


def test_a_silent_trial_is_given_up_after_report_timeout_s(dog: Watchdog, clock: SimpleNamespace) -> None:
    dog.look({}, {})
    clock.s = 10.0
    dog.look({}, {})
    clock.s = 10.5
    with pytest.raises(AutoLRSError, match=r"reported nothing for 10 s \(report_timeout_s=10\)") as raised:
        dog.look({}, {})
    assert "last good checkpoint is /run/c (step 100)" in str(raised.value)
    assert 'resume="auto"' in str(raised.value)


def test_a_probe_whose_save_hangs_is_given_up_once_and_the_main_trial_ends_the_run(
    dog: Watchdog, clock: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    killed, told, clock.s = [], [], 50.0
    monkeypatch.setattr(watchdog.ray, "kill", killed.append)
    monkeypatch.setattr(dog._desk, "warn", told.append, raising=False)
    dog._live["a"].temporary_state.ray_actor = "its actor"
    with pytest.raises(
        AutoLRSError, match="the main trial has been writing a checkpoint for 11 s: does the storage answer"
    ):
        dog.look({}, {"a": 39.0})
    monkeypatch.setattr(dog._desk, "arm", lambda trial_id: "s000p01")
    for _ in range(3):
        dog.look({}, {"a": 39.0})
    assert killed == ["its actor"]
    assert [message.startswith("s000p01 has been writing a checkpoint for 11 s") for message in told] == [True]


@pytest.mark.parametrize("workers", [1, 3])
def test_a_trial_whose_next_report_lies_far_ahead_has_time_for_it(
    dog: Watchdog, clock: SimpleNamespace, workers: int
) -> None:
    dog._desk.capacity.take("a", workers)
    for clock.s, step in ((0.0, 50), (5.0, 100)):  # a tenth of a second a step, and 900 steps to the next report
        dog.heard("a", step)
    dog._desk.capacity.take("a", 1)  # with fewer workers it is slower
    clock.s = 5.0 + 4.0 * 90.0 * workers
    dog.look({}, {})
    clock.s += 0.5
    with pytest.raises(AutoLRSError, match=f"reported nothing for {360 * workers} s"):
        dog.look({}, {})


def test_a_trial_that_never_starts_is_given_up_once_it_has_its_resources(
    dog: Watchdog, clock: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(watchdog, "node_resources", lambda: [{"CPU": 1.0}])
    trial: Any = dog._live["a"]
    trial.status, trial.actor = Trial.PENDING, None
    for clock.s in (0.0, 1000.0):  # others have the resources
        dog.look({}, {})
    for clock.s, trial.actor in ((1001.0, "first"), (1011.0, "first"), (1012.0, "second"), (1022.0, "second")):
        dog.look({}, {})
    clock.s = 1022.5
    with pytest.raises(AutoLRSError, match=r"has not started 10 s after it got its resources: see its setup\(\)"):
        dog.look({}, {})


def test_time_to_start_does_not_count_as_silence(
    dog: Watchdog, clock: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(watchdog, "node_resources", lambda: [{"CPU": 1.0}])
    trial: Any = dog._live["a"]
    trial.status, trial.actor = Trial.PENDING, "actor"
    for clock.s, trial.status in (
        (0.0, Trial.PENDING),
        (9.0, Trial.PENDING),
        (10.0, Trial.RUNNING),
        (20.0, Trial.RUNNING),
    ):
        dog.look({}, {})


@pytest.fixture
def waiting(monkeypatch: pytest.MonkeyPatch) -> tuple[Watchdog, SimpleNamespace]:
    """Trials of two CPUs that wait on two nodes with one each."""
    cluster = SimpleNamespace(nodes=[{"CPU": 1.0}, {"CPU": 1.0}], starting=None)
    monkeypatch.setattr(watchdog, "node_resources", lambda: cluster.nodes)
    monkeypatch.setattr(watchdog, "nodes_starting", lambda: cluster.starting)
    desk: Any = SimpleNamespace(settings=SimpleNamespace(report_timeout_s=10.0, resource_timeout_s=60.0))
    trial: Any = SimpleNamespace(status=Trial.PENDING, trial_id="a")
    return Watchdog(desk, {"a": trial}, PlacementGroupFactory([{"CPU": 2}]), lambda trial: None), cluster


def test_a_trial_that_fits_on_no_node_ends_the_run(
    waiting: tuple[Watchdog, SimpleNamespace], clock: SimpleNamespace
) -> None:
    dog, cluster = waiting
    dog.look({}, {})
    clock.s, cluster.nodes = 50.0, [{"CPU": 2.0}]  # a node that is large enough joins, and is lost
    dog.look({}, {})
    clock.s, cluster.nodes = 60.0, [{"CPU": 1.0}, {"CPU": 1.0}]
    dog.look({}, {})
    clock.s = 120.0
    dog.look({}, {})
    clock.s = 120.5
    with pytest.raises(
        AutoLRSError, match=r"asks for {'CPU': 2.0} on one node, but the cluster has 2 nodes with {'CPU'"
    ):
        dog.look({}, {})


def test_the_time_in_which_nodes_are_started_does_not_count_up_to_half_an_hour(
    waiting: tuple[Watchdog, SimpleNamespace], clock: SimpleNamespace
) -> None:
    dog, cluster = waiting
    cluster.starting = 1
    for clock.s in range(0, 600, 7):
        dog.look({}, {})
    cluster.starting = 0  # the node has failed to start
    clock.s += 60
    dog.look({}, {})
    cluster.starting = 1  # and another is tried
    for clock.s in range(664, 1800, 7):
        dog.look({}, {})
    clock.s = 1900.0
    with pytest.raises(AutoLRSError, match="raise resource_timeout_s"):
        dog.look({}, {})
    cluster.starting = 0
    dog._shortage._since = None
    for clock.s in (2000.0, 2059.0):
        dog.look({}, {})
    clock.s = 2061.0
    with pytest.raises(AutoLRSError, match="add nodes"):
        dog.look({}, {})
