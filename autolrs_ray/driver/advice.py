"""What the user of a run is told while it goes on, and what its reports show that is worth knowing for the next one."""

from __future__ import annotations

import logging
from typing import Any

from autolrs_ray.core.events import Event
from autolrs_ray.core.policy import Point, Policy

logger = logging.getLogger(__name__)

HALF_WAY = 0.5
"""Share of the run from which on a batch that grows was measured to pay, and at which it is looked for."""
PASSES = 2.0
"""Passes over the data up to which it was: rows that are seen again and again are no new ones."""


def tell(events: list[dict[str, Any]]) -> None:
    """Say on screen what the journal warns of."""
    for event in events:
        if event["event"] == Event.WARNING:
            logger.warning("AutoLRS: %s", event["message"])


class GrowthAdvice:
    """Says once whether a batch that grows is worth its compute: where raw weights beat all averages half way, noise of the
    gradients is not what is left to be averaged out, and where data are seen about once, more rows a step are new ones."""

    def __init__(self, policy: Policy) -> None:
        self._policy, self._told = policy, bool(policy.batch_growth)

    def heard(self, point: Point, result: dict[str, Any]) -> str | None:
        """What the report of a trunk tells; None where that is nothing new."""
        total, epoch = self._policy.total_steps, result.get("epoch")
        if self._told or point.step < HALF_WAY * total or point.averaged_loss is None or not isinstance(epoch, float):
            return None
        self._told = True
        passes = epoch * total / point.step
        if point.loss > point.averaged_loss or passes >= PASSES:
            return None
        told = (
            f"at step {point.step} raw weights are better than all averages, and the run sees its data {passes:.2g} times: "
            f"batch_growth={{{HALF_WAY}: 2}} is likely to end lower, for {1.0 - HALF_WAY:g} T more of compute"
        )
        logger.warning("AutoLRS: %s", told)
        return told
