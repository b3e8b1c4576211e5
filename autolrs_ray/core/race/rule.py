"""What a rung of the race decides: who is dropped, and which LRs join. Functions of the trunks' scores alone."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field
from typing import Any

from autolrs_ray.core.paper import surrogate

FINALISTS_FROM = 0.16
"""Fraction of the run after which at most `finalists` trunks go on."""

FORK_FROM = 0.32
"""Branches begin at the first rung at or past this fraction of the run."""

FLATTERED_UNTIL = 0.32
"""Fraction of the run before which a leader may turn out to be no better than the warm-up had made it look."""

CATCH_UP = ((0.12, math.inf), (0.24, 0.5), (0.32, 0.2), (math.inf, 0.05))
"""Up to which fraction of the run an LR within reach may be how much worse than the leader (relative score)."""


@dataclass(eq=False)
class Trunk:
    """One LR scale of the race. status: "open", "dropped", "diverged", "failed" or "won". x: log LR scaled to [0, 1].

    scores: rung step -> score; first_score: that of its first report. step, checkpoint: the last commit; previous: the
    one before it; held: the one at the end of the envelope's hold. saved_loss: the score at the last commit, train_loss:
    the training loss at the last rung; moved: its reports up to there were not all the same. A branch has begun at
    `origin`, a checkpoint of the trunk number `parent`.
    """

    lr: float
    x: float
    status: str = "open"
    infill: bool = False
    step: int = 0
    checkpoint: str | None = None
    previous: tuple[int, str] | None = None
    saved_loss: float | None = None
    train_loss: float | None = None
    moved: bool = False
    scores: dict[int, float] = field(default_factory=dict)
    first_score: float | None = None
    held: tuple[int, str] | None = None
    parent: int | None = None
    origin: tuple[int, str] | None = None

    def state_dict(self) -> dict[str, Any]:
        return {**asdict(self), "scores": {str(rung): score for rung, score in self.scores.items()}}

    @classmethod
    def from_state(cls, state: dict[str, Any]) -> Trunk:
        pairs = {name: tuple(state[name]) if state[name] else None for name in ("previous", "held", "origin")}
        scores = {int(rung): score for rung, score in state["scores"].items()}
        return cls(**{**state, **pairs, "scores": scores})

    def branch(self, number: int, lr: float, x: float, origin: tuple[int, str]) -> Trunk:
        """A trunk at another LR from `origin`, a checkpoint of this one, which is trunk `number`."""
        scores = {rung: score for rung, score in self.scores.items() if rung <= origin[0]}
        return Trunk(lr, x, step=origin[0], checkpoint=origin[1], scores=scores, parent=number, origin=origin)

    def restart(self) -> None:
        """Open again, from scratch. (A branch has no beginning of its own.)"""
        self.status, self.step = "open", 0
        self.checkpoint = self.previous = self.held = None


def leader_of(trunks: list[Trunk], rung: int) -> Trunk:
    """The trunk with the lowest score at `rung`; the first of equals."""
    return min(trunks, key=lambda trunk: trunk.scores[rung])


def reach(drift: float, settled: float, fraction: float) -> float:
    """Decades by which the best LR may still fall from `fraction` of the run on: `drift` per doubling, until `settled`."""
    return max(0.0, drift * math.log2(settled / fraction))


def catch_up(fraction: float) -> float:
    """How much worse than the leader (relative score) an LR within its reach may be at `fraction` of the run. Early on, the
    loss of a small LR says how far it has come, not what it is worth."""
    return next(allowed for until, allowed in CATCH_UP if fraction < until - 1e-9)


def losers(
    trunks: list[Trunk],
    rung: int,
    tolerance: float,
    finalists: int | None = None,
    decades: float = 0.0,
    allowance: float = math.inf,
) -> list[Trunk]:
    """Those of `trunks` (all scored at `rung`) that do not go on.

    A trunk stays that is worse than the leader by `tolerance` (relative) at most, and so does one at most `decades` below
    the leader's LR that is worse by `allowance` at most: as training goes on the best LR falls, it does not rise. Of those,
    the best `finalists` stay (None: all).
    """
    leader = leader_of(trunks, rung)
    best = leader.scores[rung]

    def stays(trunk: Trunk) -> bool:
        within = 0.0 < math.log10(leader.lr / trunk.lr) <= decades + 1e-9
        allowed = max(tolerance, allowance if within else 0.0)
        return trunk is leader or trunk.scores[rung] - best <= allowed * max(abs(best), 1e-12)

    kept = sorted((trunk for trunk in trunks if stays(trunk)), key=lambda trunk: trunk.scores[rung])
    staying = {id(trunk) for trunk in kept[:finalists]}
    return [trunk for trunk in trunks if id(trunk) not in staying]


def infill(trunks: list[Trunk], rung: int, spacing: float, count: int) -> list[float]:
    """x of up to `count` LRs beside and between the open trunks, by the lower confidence bound on the scores at `rung`.

    They reach one `spacing` beyond the outermost open trunks, but not up to an LR that diverged before the rung, and
    keep a quarter of it from every other LR: left alone, the bound proposes the same LR twice over.
    """
    survivors = [trunk.x for trunk in trunks if trunk.status == "open"]
    if not survivors:
        return []
    diverged = [trunk.x for trunk in trunks if trunk.status == "diverged" and rung not in trunk.scores]
    low = max(0.0, min(survivors) - spacing)
    high = max(max(survivors), min([1.0, max(survivors) + spacing, *(x - 0.5 * spacing for x in diverged)]))
    observed = [
        ((trunk.x - low) / (high - low), trunk.scores[rung])
        for trunk in trunks
        if rung in trunk.scores and low <= trunk.x <= high
    ]
    apart, pending = 0.25 * spacing / (high - low), list[float]()
    for _ in range(count):
        u = surrogate.propose(observed, pending, kappa=2.0, apart=apart)
        if min(abs(u - other) for other in [*pending, *(x for x, _ in observed)]) < apart:
            break  # there is no room left
        pending.append(u)
    return [low + u * (high - low) for u in pending]
