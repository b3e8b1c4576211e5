"""What became of a user's own learning rates (`points_to_evaluate`), beside the one that was found."""

from __future__ import annotations

from dataclasses import dataclass
from statistics import fmean
from typing import Any

from autolrs_ray.core.events import Event
from autolrs_ray.outcome.history import History


@dataclass(frozen=True)
class OwnPoint:
    """One of `points_to_evaluate`.

    lr: the learning rate (LR). fate: of its trunk: "won", "open", "waiting", "dropped", "diverged", "failed" or "untried";
    under the paper's policy "chosen" where a stage took it, or "tried". step: how far it was trained. compared: the last step
    at which it and the LR found, `found`, were both measured. value, best: the metric of both there, as it is reported (paper:
    means of their forecasts over the stages that tried it). behind: by how much it was worse; negative where it was better.
    None where there was nothing to compare. chosen, stages: paper: stages that took it, of those that tried it.
    more: what training it to the end would cost, in T. checkpoint: of its end, where it came there.
    """

    lr: float
    fate: str
    step: int
    compared: int | None
    found: float | None
    value: float | None
    best: float | None
    behind: float | None
    more: float
    checkpoint: str | None = None
    chosen: int = 0
    stages: int = 0

    def sentence(self, metric: str, total_steps: int, done: bool = True) -> str:
        """What to think of it. done: the run is over."""
        told = f"{self.lr:.3g}, yours, "
        if self.stages:
            told += f"was chosen in {self.chosen} of the {self.stages} stages that tried it"
            if self.behind is not None:
                side = "worse" if self.behind > 0 else "better"
                told += f"; its forecasts were {abs(self.behind):.3g} {side} in {metric} than those chosen, on average"
            return f"{told}. A run at it alone takes 1 T."
        if self.found == self.lr:
            return f"{told}{'is the learning rate found' if self.fate == 'won' else 'leads so far'}."
        if self.fate in ("diverged", "failed"):
            return f"{told}{self.fate} after step {self.step:,}."
        if self.behind is None or self.compared is None or self.found is None:
            way = "was not compared yet" if self.step else "was not trained, for the race did not walk down to it"
            return f"{told}{way}{self._cost(total_steps)}."
        side = "worse" if self.behind > 0 else "better"
        which = "the one found" if done else "which leads so far"
        by = f"{abs(self.behind):.3g} {side} in {metric} than {self.found:.3g}, {which}"
        where = "at the end" if self.compared >= total_steps else f"at step {self.compared:,} of {total_steps:,}"
        what = f"{by}, {where}: {self.value:.4g} against {self.best:.4g}"
        if self.behind < 0 and self.compared < total_steps and self.lr > self.found:
            what += " (early readings flatter large learning rates)"
        return f"{told}{'is' if self.fate == 'open' else 'was'} {what}{self._cost(total_steps)}."

    def _cost(self, total_steps: int) -> str:
        if self.fate == "open" or self.step >= total_steps:
            return ""
        return f"; to train it to the end would cost {self.more:.2f} T more, and keep=True does"


def own_points(history: History) -> list[OwnPoint]:
    """What became of each of the run's `points_to_evaluate`, in their order."""
    given = history.config["options"].get("points_to_evaluate") or ()
    return [(_of_race if history.anchored else _of_stages)(history, lr) for lr in given]


def _of_race(history: History, lr: float) -> OwnPoint:
    arm = next((arm for arm, other in history.lrs.items() if other == lr), "")
    sign = -1.0 if history.config["mode"] == "max" else 1.0
    mine, best = ({step: sign * loss for step, loss in _read(history, one).items()} for one in (arm, history.arm))
    commits = history.commits.get(arm, [])
    step = max([*mine, *(row["end"] for row in commits)], default=0)
    last = commits[-1]["checkpoint"] if commits and step >= history.total_steps else None
    at = max(set(mine) & set(best), default=None)
    if at is None or arm == history.arm:
        at = value = top = behind = None
    else:
        value, top = mine[at], best[at]
        behind = sign * (value - top)
    found = history.lrs.get(history.arm) if best else None
    more = max(0.0, 1.0 - step / history.total_steps)
    return OwnPoint(lr, history.fates.get(arm, "untried"), step, at, found, value, top, behind, more, last)


def _read(history: History, arm: str) -> dict[int, float]:
    """Step -> what the race was judged by there: of the metric, the better of raw and averaged weights."""
    found = {}
    for event in history.named(Event.RUNG):
        if event["arm"] == arm:
            known = [loss for key in ("loss", "averaged_loss") if (loss := event.get(key)) is not None]
            if known:
                found[int(event["step"])] = min(known)
    return found


def _of_stages(history: History, lr: float) -> OwnPoint:
    probes: dict[int, list[dict[str, Any]]] = {}
    for event in history.named(Event.PROBE):
        probes.setdefault(event["stage"], []).append(event)
    choices = {event["stage"]: event["lr"] for event in history.named(Event.CHOICE)}
    tried = [stage for stage, events in probes.items() if any(event["lr"] == lr for event in events)]
    pairs = []
    for stage in tried:
        forecasts = {event["lr"]: event["forecast"] for event in probes[stage]}
        mine, best = forecasts[lr], forecasts.get(choices.get(stage, lr))
        if mine is not None and best is not None:
            pairs.append((stage, mine, best))
    sign = -1.0 if history.config["mode"] == "max" else 1.0
    value, top = (sign * fmean(pair[i] for pair in pairs) if pairs else None for i in (1, 2))
    behind = fmean(mine - best for _, mine, best in pairs) if pairs else None
    took = sum(choices.get(stage) == lr for stage in tried)
    return OwnPoint(lr, "chosen" if took else "tried" if tried else "untried", 0, None, None, value, top, behind, 1.0,
                    None, took, len(tried))  # fmt: skip
