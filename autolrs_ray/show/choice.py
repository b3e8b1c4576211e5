"""How sure the choice of a learning rate is: the winner's margin over the runner-up, against the scatter of reports."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from autolrs_ray.show.run_data import RunData

EDGE = 0.02  # of the interval's decades: what a paper's stage chose within so much of an end is at the edge


@dataclass(frozen=True)
class Choice:
    """The winner of a race beside its runner-up, at `step`, the last at which both were compared.

    margin: by how much the winner was better, in units of the metric; negative where it was not. scatter: standard deviation
    of the difference of two reports about a smooth course; None where there are too few. It is an upper bound of the noise of
    the margin: validation set and batches are the same for both.
    """

    lr: float
    runner_up: float
    step: int
    share: float  # of the run
    margin: float
    scatter: float | None
    final: bool = True  # the run is over

    @property
    def clear(self) -> bool | None:
        """True where the margin is above two standard deviations; None where these are not known."""
        return None if self.scatter is None else self.margin > 2.0 * self.scatter

    def sentence(self, metric: str) -> str:
        """What to think of it."""
        when = f"At step {self.step:,}, {self.share:.0%} of the run and the last at which both were compared,"
        what = f"{when} {self.lr:.3g}{'' if self.final else ', which leads so far,'} was"
        by = f"ahead of {self.runner_up:.3g}, the runner-up, by {self.margin:.3g} in {metric}"
        if self.margin < 0:
            reason = "; it was chosen for what came before or after" if self.final else ""
            by = f"behind {self.runner_up:.3g} by {-self.margin:.3g} in {metric}{reason}"
        if self.scatter is None:
            return f"{what} {by}."
        noise = f"The difference between two reports scatters by {self.scatter:.2g} there"
        return f"{what} {by}. {noise}: " + (
            "the choice is clear."
            if self.clear
            else "that is within the noise, and either may have done."
            if self.final
            else "so far that is within the noise."
        )


def choice(data: RunData) -> Choice | None:
    """The choice that the race in `data` made, or makes so far; None where nothing was compared."""
    scores, lrs = data.scores(), data.history.lrs
    options = data.config["options"]
    if options.get("keep"):  # was trained to the end whatever the race had made of it, and is no runner-up for that
        kept = options.get("points_to_evaluate") or ()
        scores = {arm: points for arm, points in scores.items() if arm == data.arm or lrs.get(arm) not in kept}
    own = scores.get(data.arm, {}) if data.anchored else {}
    shared = {arm: max(set(points) & set(own), default=0) for arm, points in scores.items() if arm in lrs}
    shared = {arm: step for arm, step in shared.items() if step and arm != data.arm}
    if not shared or data.arm not in lrs:
        return None
    ahead = {arm: data.sign * (scores[arm][step] - own[step]) for arm, step in shared.items()}
    arm = max(shared, key=lambda arm: (shared[arm], -ahead[arm]))
    spread = scatter(own, shared[arm])
    return Choice(
        lrs[data.arm],
        lrs[arm],
        shared[arm],
        shared[arm] / data.history.total_steps,
        ahead[arm],
        None if spread is None else math.sqrt(2.0) * spread,
        data.result.done,
    )


def scatter(points: Mapping[int, float], at: int) -> float | None:
    """Standard deviation of `points` (step -> value) about straight lines between their neighbours, from half of step `at` to
    twice that step. None with fewer than three residuals.
    """
    steps = sorted(step for step in points if at <= 2 * step <= 4 * at)
    squares = []
    for before, step, after in zip(steps, steps[1:], steps[2:], strict=False):
        share = (step - before) / (after - before)
        residual = points[step] - (1.0 - share) * points[before] - share * points[after]
        squares.append(residual**2 / (1.0 + (1.0 - share) ** 2 + share**2))
    squares = [square for square in squares if math.isfinite(square)]
    return math.sqrt(sum(squares) / len(squares)) if len(squares) >= 3 else None


def edge(data: RunData) -> str | None:
    """A warning where what was chosen lies at an end of the search interval: what is beyond was not tried."""
    low, high = data.interval
    if data.anchored:
        tried = sorted(data.history.lrs.values())
        if data.arm not in data.history.lrs or len(tried) < 3 or data.result.main_steps == 0:
            return None
        lr = data.history.lrs[data.arm]
        end = "smallest" if lr == tried[0] else "largest" if lr == tried[-1] else None
        if end is None:
            return None
        wider = (low / 100.0, high) if end == "smallest" else (low, high * 100.0)
        return (f"the learning rate found, {lr:.3g}, is the {end} of the race: what is beyond was not tried. Search wider, "
                f"lr_interval=({wider[0]:.3g}, {wider[1]:.3g})")  # fmt: skip
    stages = data.history.stages
    width = math.log(high / low)
    for bound, name in ((low, "lower"), (high, "upper")):
        at = sum(abs(math.log(row["lr"] / bound)) <= EDGE * width for row in stages if row["lr"] > 0)
        if at and 2 * at >= len(stages):
            return (f"{at} of {len(stages)} stages chose a learning rate at the {name} end of the interval, {bound:.3g}: what "
                    "is beyond was not tried; widen lr_interval")  # fmt: skip
    return None
