"""What goes wrong with a race, and how it is said: failures everywhere, an empty field, a result to be wary of."""

from __future__ import annotations

import math

from autolrs_ray.core.policy import AutoLRSError
from autolrs_ray.core.race.plan import RacePlan
from autolrs_ray.core.race.trunk import Trunk


def none_left(trunks: list[Trunk]) -> AutoLRSError:
    """The error that ends a race in which every LR has come to grief."""
    tried = ", ".join(f"{trunk.lr:.3g} ({trunk.status})" for trunk in trunks)
    return AutoLRSError(
        f"no learning rate is left in the race: {tried}. Lower lr_interval, or look at the loss and the data of the "
        "first steps; the trials' error files say more."
    )


def caveat(winner: int, num_lrs: int, judged: bool, lr_interval: tuple[float, float]) -> str:
    """What a person should know of the result before using it; "" if nothing. judged: some LR has learned something."""
    if num_lrs > 1 and not judged:
        return (
            "it has won, but no learning rate has learned anything: losses have not got better by more than "
            "their noise. Look at the data, the loss and the model, train for longer, or report val_loss beside a metric "
            "that says little at first, as F1 does"
        )
    if num_lrs > 2 and winner in (0, num_lrs - 1):
        end, other = ("smallest", "lower") if winner == 0 else ("largest", "higher")
        return (
            f"it has won and is the {end} of the interval: a {other} one may be better still; widen "
            f"lr_interval={lr_interval}"
        )
    return ""


def fails_everywhere(trunks: list[Trunk], plan: RacePlan, i: int, known: bool) -> bool:
    """Whether two have failed before trunk `i` does, the smallest LR has been heard of, and none has come further.

    known: it is known what an untrained model reads.
    """
    failed = [j for j, trunk in enumerate(trunks) if trunk.status == "failed"]
    heard = known or 0 in (*failed, i)
    front = trunks[i].front(plan)
    further = any(trunk.front(plan) > front for j, trunk in enumerate(trunks) if j not in failed)
    return len(failed) >= 2 and heard and not further


def forgive(trunks: list[Trunk]) -> None:
    """Whoever mends the cause gets those back that it had taken out of the race; they start again."""
    for trunk in trunks:
        if trunk.status == "failed":
            trunk.readings = {rung: r for rung, r in trunk.readings.items() if math.isfinite(r.score)}
            trunk.status = "waiting" if trunk.readings else "untried"
            trunk.restart()
