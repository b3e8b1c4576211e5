"""Every wait has an end and a message: trials fallen silent, resources nobody has, and standstill."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import ray
from ray.tune.experiment import Trial

from autolrs_ray.core.policy import AutoLRSError
from autolrs_ray.core.segments import next_report
from autolrs_ray.driver.desk import Desk
from autolrs_ray.driver.nodes import describe_shortage, node_resources, trials_that_fit
from autolrs_ray.private import actor_of, nodes_starting

IDLE_S = 10.0  # longest the controller may have nothing running, nothing pending and nothing to start
START_S = 1800.0  # longest an autoscaler may be said to start nodes without one that a trial fits on
PATIENCE = 4.0  # a report may take so many times as long as the pace so far lets expect


class Shortage:
    """Ends the wait for what no node of the cluster has. resources: the PlacementGroupFactory of a trial."""

    def __init__(self, resources: Any) -> None:
        self._resources = resources
        self._since: float | None = None
        self._counted_since = 0.0  # as that, or when an autoscaler was last seen to start nodes

    def look(self, waiting: bool, timeout_s: float, now: float) -> None:
        """`waiting`: trials are pending and none runs. While an autoscaler starts nodes, the time does not count."""
        nodes = node_resources() if waiting else []
        if not waiting or trials_that_fit(self._resources, nodes, most=1):
            self._since = None
            return
        if self._since is None:
            self._since = self._counted_since = now
        if now - self._since < START_S and nodes_starting():
            self._counted_since = now
        if now - self._counted_since <= timeout_s:
            return
        raise AutoLRSError(
            f"{describe_shortage(self._resources, nodes)}. Ask for less per trial, add nodes, or raise resource_timeout_s "
            f"(now {timeout_s:g}) if the cluster is still growing."
        )


class Watchdog:
    """Looks at the live trials once per loop of Tune's; raises AutoLRSError when nothing can make progress.

    actor_of: the actor that is being made for a trial that has its resources, or made ready for it; None if there is none.
    """

    def __init__(self, desk: Desk, live: dict[str, Trial], resources: Any, actor_of: Callable[[Trial], Any]) -> None:
        self._desk, self._live, self._actor_of = desk, live, actor_of
        self._shortage = Shortage(resources)
        self._seen: dict[str, float] = {}
        self._starting: dict[str, tuple[Any, float]] = {}  # trial -> the actor that it waits for, and since when
        self._steps: dict[str, int] = {}  # at the last report
        self._given_up: set[str] = set()
        self._pace_s = 0.0  # slot-seconds per step of the slowest stretch between two reports so far
        self._idle_since: float | None = None

    def heard(self, trial_id: str, step: int | None = None) -> None:
        """A sign of life; step: optimizer steps done, if it was a report."""
        now = time.monotonic()
        if step is not None:
            before = self._steps.get(trial_id, step)
            if step > before and trial_id in self._seen:
                slot_s = (now - self._seen[trial_id]) * self._desk.capacity.held(trial_id)
                self._pace_s = max(self._pace_s, slot_s / (step - before))
            self._steps[trial_id] = step
        self._seen[trial_id] = now

    def drop(self, trial_id: str) -> None:
        self._starting.pop(trial_id, None)
        self._seen.pop(trial_id, None)
        self._steps.pop(trial_id, None)
        self._given_up.discard(trial_id)

    def _timeout_s(self, trial_id: str) -> float:
        """report_timeout_s, or more where the next report lies further ahead: runs may take days."""
        segment = self._desk.segment(trial_id)
        step = max(segment.start, self._steps.get(trial_id, 0))
        expected_s = self._pace_s / self._desk.capacity.held(trial_id) * (next_report(segment, step) - step)
        return max(self._desk.settings.report_timeout_s, PATIENCE * expected_s)

    def look(self, held: dict[str, Trial], saving: dict[str, float]) -> None:
        """`held`: finished trials, whose silence is right. `saving`: since when the checkpoints of trials are being written."""
        now, running = time.monotonic(), 0
        for trial_id, trial in self._live.items():
            if trial.status != Trial.RUNNING:
                self._seen.pop(trial_id, None)
                self._look_at_start(trial, now)
                continue
            running += 1
            self._starting.pop(trial_id, None)
            if now - saving.get(trial_id, now) > self._desk.settings.report_timeout_s:
                what = f"has been writing a checkpoint for {now - saving[trial_id]:.0f} s: does the storage answer, is it full?"
                self._give_up(trial, actor_of(trial), what)
                continue
            silent = now - self._seen.setdefault(trial_id, now)
            if (
                trial_id not in held
                and silent > self._desk.settings.report_timeout_s
                and silent > self._timeout_s(trial_id)
            ):
                self.heard(trial_id)
                self._give_up(trial, actor_of(trial), f"has reported nothing for {silent:.0f} s")
        pending = any(trial.status == Trial.PENDING for trial in self._live.values())
        self._shortage.look(pending and not running, self._desk.settings.resource_timeout_s, now)
        self._check_standstill(not running and not saving and not pending, now)

    def _look_at_start(self, trial: Trial, now: float) -> None:
        """Give up a trial that has its resources, and whose setup() does not return. (Tune waits for it for ever.)"""
        actor = self._actor_of(trial) if trial.status == Trial.PENDING else None
        before, since = self._starting.get(trial.trial_id, (None, now))
        if actor is None or actor is not before:
            since = now
        self._starting[trial.trial_id] = actor, since
        if actor is not None and now - since > self._desk.settings.report_timeout_s:
            del self._starting[trial.trial_id]
            self._give_up(
                trial, actor, f"has not started {now - since:.0f} s after it got its resources: see its setup()"
            )

    def _give_up(self, trial: Trial, actor: Any, what: str) -> None:
        if trial.trial_id in self._given_up:
            return  # Tune has not noticed yet
        desk, arm = self._desk, self._desk.arm(trial.trial_id)
        who = "the main trial" if arm == "main" else arm
        message = f"{who} {what} (report_timeout_s={desk.settings.report_timeout_s:g})"
        if arm == "main":
            raise AutoLRSError(f"{message}. The {desk.policy.last_good(arm)}. {desk.policy.progress()}")
        if actor is None:
            raise AutoLRSError(f"{message}, and this version of Ray does not let AutoLRS end it")
        desk.warn(message)
        self._given_up.add(trial.trial_id)
        ray.kill(actor)  # Tune retries or ends the trial; its actor is not reused

    def _check_standstill(self, stuck: bool, now: float) -> None:
        if not stuck or self._desk.policy.done or self._desk.policy.wanted():
            self._idle_since = None
        elif self._idle_since is None:
            self._idle_since = now
        elif now - self._idle_since > IDLE_S:
            progress = self._desk.policy.progress()
            raise AutoLRSError(f"nothing can make progress: {progress}; please report this with the journal")
