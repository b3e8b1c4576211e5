"""Which processes serve the trials, and when a trial that has ended may let go of its own."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

from ray.tune.experiment import Trial

from autolrs_ray.driver.desk import Desk
from autolrs_ray.driver.nodes import room_now

FREE_S = (
    1.0  # how often the cluster is asked for free resources: between a trial's end and the next one's start it has some
)
HOLD_S = 20.0  # longest a finished trial keeps its actor while another waits for one of its own


class Actors:
    """The actors that have reported, by node and process.

    Tune gives an actor that is free to the next pending trial and cancels the one being started for it: trials that end
    before their neighbours' actors are up would make all of them queue on the first actor.
    """

    def __init__(self, desk: Desk, resources: Any) -> None:
        self._desk, self._resources = desk, resources
        self._room = self._before = True
        self._asked = 0.0
        self._last: dict[tuple[str, int], str] = {}  # node and process -> the trial last seen there
        self._counts: tuple[int, int, float] = (0, 0, 0.0)

    def heard(self, trial_id: str, result: dict[str, Any]) -> None:
        """A trial has reported from its actor."""
        self._last[str(result.get("node_ip")), int(result.get("pid") or 0)] = trial_id

    def lost(self, trial_id: str) -> None:
        """The trial has failed, and its actor is gone."""
        self._last = {actor: last for actor, last in self._last.items() if last != trial_id}

    def lost_one(self) -> None:
        """An idle actor turned out to be dead, or of no use; nobody knows which."""
        self._last.clear()

    def suffice(self, pending: list[Trial], actor_of: Callable[[Trial], Any]) -> bool:
        """False while side-by-side trials are still waiting for actors of their own, and will get them.

        pending: trials without one. actor_of: the actor that is being made for one of them.
        """
        count = (len(pending), len(self._last))
        if count != self._counts[:2]:
            self._counts = (*count, time.monotonic())
        if len(self._last) >= min(self._desk.capacity.places, self._desk.policy.breadth):
            return True
        alone = all(self._desk.segment(trial.trial_id).role == "main" for trial in pending)
        if (alone and not self._desk.policy.wanted()) or time.monotonic() - self._counts[2] > HOLD_S:
            return True
        # what others have taken of the cluster is not to be waited for: the next trial gets the actor that is free
        return bool(self._last) and not any(actor_of(trial) for trial in pending) and not self._free()

    def _free(self) -> bool:
        """Whether the cluster has room for one more trial, by the last look or the one before it."""
        now = time.monotonic()
        if now - self._asked > FREE_S:
            self._asked, self._before, self._room = now, self._room, room_now(self._resources)
        return self._room or self._before
