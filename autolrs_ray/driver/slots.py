"""How many trials the cluster holds, as nodes come and go, and how many an autoscaler is asked to make room for."""

from __future__ import annotations

import atexit
import logging
import time
from typing import Any

import ray

from autolrs_ray.driver.desk import Desk
from autolrs_ray.driver.nodes import MOST_TRIALS, node_resources, packed, trials_that_fit
from autolrs_ray.private import nodes_starting

logger = logging.getLogger(__name__)

RECOUNT_S = 2.0  # how often the cluster is asked for its size


class Slots:
    """Counts the desk's slots, and keeps asking a cluster that starts nodes by itself for as many as the policy can use.

    trial: the PlacementGroupFactory of every trial. Ray keeps one such request per cluster, whoever made the last one; it stays
    until it is withdrawn, which happens when the run ends, and at the latest when this process ends.
    """

    def __init__(self, desk: Desk, trial: Any) -> None:
        self._desk, self._trial = desk, trial
        self._grows = False  # an autoscaler has been seen
        self._asked = 0  # trials that it has been asked to make room for
        self._closed = False
        self._recounted = 0.0
        desk.plan_for(self._count())
        self._look_for_autoscaler()

    @property
    def _most(self) -> int:
        return self._desk.settings.max_slots or MOST_TRIALS

    def _count(self) -> int:
        return max(1, trials_that_fit(self._trial, node_resources(), self._most))

    def _look_for_autoscaler(self) -> None:
        """Plan for as many slots as the run may come to have, if there is one: its first nodes say nothing of that."""
        if not self._grows and nodes_starting() is not None:
            self._grows = True
            self._desk.may_grow_to(self._most)

    def recount(self) -> int:
        """Follow the cluster; how many slots there are more than before. The policy's proposals do not depend on it."""
        now, before = time.monotonic(), self._desk.capacity.slots
        if now - self._recounted < RECOUNT_S:
            return 0
        self._recounted = now
        self._desk.resize(self._count())
        self._look_for_autoscaler()
        self.ask()
        return self._desk.capacity.slots - before

    def ask(self) -> None:
        """Have the autoscaler make room for the trials that may run side by side from here on."""
        trials = min(self._desk.policy.breadth * (self._desk.settings.asked_units), self._most)
        if self._grows and not self._closed and trials != self._asked:
            self._request(packed(self._trial) * trials)
            if not self._asked:
                atexit.register(self.withdraw)
            self._asked = trials

    def withdraw(self) -> None:
        """Have the autoscaler keep no nodes for this run any more."""
        self._closed = True
        if self._asked and ray.is_initialized():
            self._request([])
        self._asked = 0
        atexit.unregister(self.withdraw)

    def _request(self, bundles: list[dict[str, float]]) -> None:
        from ray.autoscaler.sdk import request_resources

        try:
            request_resources(bundles=bundles)
        except Exception as error:  # the cluster is gone, or it is another Ray
            logger.warning("the autoscaler could not be asked to make room for %d bundles: %s", len(bundles), error)
