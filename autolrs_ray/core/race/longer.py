"""Runs that are made longer: under envelopes that begin with a hold, what was trained while it lasted can stay."""

from __future__ import annotations

from autolrs_ray.core.envelopes import EnvelopeSpec
from autolrs_ray.core.race.trunk import Trunk

HOLDS = {"wsd": 0.4, "constant": 1.0}
"""Envelopes that begin with a hold at 1, and the fraction of the run it lasts: runs under them can be extended."""


def hold_end(envelope: EnvelopeSpec, total_steps: int) -> int:
    """Last step up to which the envelope is 1 whatever the total is; 0 where it falls from the start."""
    return int(HOLDS.get(envelope, 0.0) * total_steps) if isinstance(envelope, str) else 0


def only_racing(trunks: list[Trunk], envelope: EnvelopeSpec, total_steps: int, longer: int, decided: int) -> int:
    """The one trunk left of a race, which a run of `longer` steps in place of `total_steps` would go on with.

    decided: decisions so far. Raises ValueError if the envelope does not hold first, the race is still on, or `longer` is not.
    """
    alive = [i for i, trunk in enumerate(trunks) if trunk.racing]
    if not hold_end(envelope, total_steps):
        raise ValueError(f"envelope {envelope!r} falls from the start: only {' and '.join(HOLDS)} can be extended")
    if longer <= total_steps:
        raise ValueError(f"total_steps must be larger than {total_steps}, got {longer}")
    if len(alive) != 1 or not decided:
        raise ValueError(f"{len(alive)} learning rates are still in the race: let it come to one before extending")
    return alive[0]


def back_to_hold(trunk: Trunk, end: int) -> None:
    """Put `trunk` back to the end of its hold, the step `end`, if it is past it. Raises ValueError if that state is lost."""
    if trunk.step > end:
        if trunk.held is None:
            raise ValueError("the checkpoint at the end of the hold is lost: the run cannot be extended")
        (trunk.step, trunk.checkpoint), trunk.previous = trunk.held, None
    trunk.status, trunk.saved_loss, trunk.points = "open", None, []
