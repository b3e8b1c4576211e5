"""Which processes serve the trials, and when a trial that has ended may let go of its own."""

from __future__ import annotations

import time
from typing import Any

from autolrs_ray.driver.desk import Desk

HOLD_S = 20.0  # longest a finished trial keeps its actor while another waits for one of its own


class Actors:
    """The actors that have reported, by node and process.

    Tune gives an actor that is free to the next pending trial and cancels the one being started for it: trials that end
    before their neighbours' actors are up would make all of them queue on the first actor.
    """

    def __init__(self, desk: Desk) -> None:
        self._desk = desk
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

    def suffice(self, pending: list[str]) -> bool:
        """False while side-by-side trials are still waiting for actors of their own. pending: trials without one."""
        count = (len(pending), len(self._last))
        if count != self._counts[:2]:
            self._counts = (*count, time.monotonic())
        if len(self._last) >= min(self._desk.slots, self._desk.policy.breadth):
            return True
        alone = all(self._desk.segment(trial_id).role == "main" for trial_id in pending)
        return (alone and not self._desk.policy.wanted()) or time.monotonic() - self._counts[2] > HOLD_S
