"""Which learning rate a stage tries next: a function of what its probes have found, and of nothing else."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from autolrs_ray.core.checks import require_float, require_int
from autolrs_ray.core.envelopes import bin_centred_grid
from autolrs_ray.core.paper import surrogate

GRID_START = 4  # LRs of a stage that are tried before a surrogate is asked: three segments between them show a basin
APART = 0.02  # of the interval: the least distance between two proposals (a fifth of the spacing of a grid of 10)


@dataclass
class Probe:
    """One LR tried in the current stage. status: "open", "done", "diverged" or "failed". x: log LR scaled to [0, 1].

    first_loss: at its first report, where that is finite. loss, train_loss: at its last; moved: the losses before it were
    others. steps, losses: the series it is ranked by, `series` ("training" or "validation"), at steps of the stage.
    checkpoint: of its end state, kept for the leading probe only.
    """

    lr: float
    x: float
    status: str = "open"
    forecast: float | None = None
    stderr: float | None = None
    loss: float | None = None
    train_loss: float | None = None
    moved: bool = False
    step: int = 0
    checkpoint: str | None = None
    first_loss: float | None = None
    series: str = "validation"
    steps: list[int] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)


@dataclass(frozen=True)
class ProposalRule:
    """Paper, section 4.1: `initial` first, then the lower confidence bound mu - kappa * sigma of the surrogate.

    num_lrs: probes of a stage (the paper's k). initial: "grid" (bin-centred LRs, 4 or as many as run at once) or "random"
    (one, as published). fit: how the surrogate's hyperparameters are found, a key of `surrogate.FITS`.
    """

    num_lrs: int
    kappa: float
    initial: str
    fit: str
    seed: int
    points: tuple[float, ...] = ()  # x of those that are tried first

    def __post_init__(self) -> None:
        require_int("num_lrs", self.num_lrs, 1, 1000)
        require_float("kappa", self.kappa, 0.0, 1e6)
        for name, value, allowed in (
            ("initial", self.initial, ("random", "grid")),
            ("fit", self.fit, tuple(surrogate.FITS)),
        ):
            if value not in allowed:
                raise ValueError(f"{name} must be one of {allowed}, got {value!r}")

    def round_of(self, slots: int) -> int:
        """Probes in a round, on `slots` slots: no more than half of the stage's, or than the grid that it starts with. What the
        others know nothing of cannot be better than a grid."""
        return min(slots, self.num_lrs, max(GRID_START, (self.num_lrs + 1) // 2))

    def next_x(self, stage: int, attempt: int, probes: list[Probe], q: int) -> tuple[float, str] | None:
        """x of the next probe of a stage's `attempt`, and why the surrogate failed ("" if it did not); None while it must wait.

        probes: those of the attempt so far, q of them in a round. A probe is told of the rounds before its own and takes
        the others of its round as pending: proposals do not depend on the order in which probes that run together
        finish, and q = 1 is the paper's loop.
        """
        i = len(probes)
        told, pending = probes[: i - i % q], probes[i - i % q :]
        if i >= self.num_lrs or any(probe.status == "open" for probe in told):
            return None
        own = self.points if attempt == 0 else ()
        if i < len(own):
            return own[i], ""
        if i == len(own) == 0 and self.initial == "random":
            return float(np.random.default_rng([self.seed, stage, attempt]).uniform()), ""
        upper = upper_bound(told)
        grid = [x for x in self._grid(q) if all(abs(x - point) > APART for point in own)]
        n = i - len(own)
        if self.initial == "grid" and n < len(grid) and grid[n] <= upper:
            return grid[n], ""
        observed = [(p.x, p.forecast) for p in told if p.status == "done" and p.forecast is not None]
        # those without a value count as pending: to try their LRs again would be a waste
        waiting = [p.x for p in pending] + [p.x for p in told if p.status != "done" and p.x <= upper]
        try:
            return surrogate.propose(observed, waiting, self.kappa, upper, self.fit, APART), ""
        except Exception as error:  # numerical libraries raise many types, and no probe is worth the run
            return surrogate.space_filling([p.x for p in probes], upper), f"{type(error).__name__}: {error}"

    def _grid(self, q: int) -> list[float]:
        """Where the search of a stage begins: LRs even in log LR, as many as run at once, and 4 at least.

        The first is the same for every q: a cluster's slots are counted when the first trial is there.
        """
        first = bin_centred_grid(min(GRID_START, self.num_lrs))[0]
        rest = bin_centred_grid(min(max(GRID_START, q), self.num_lrs))
        rest.remove(min(rest, key=lambda x: abs(x - first)))
        return [first, *rest]


def upper_bound(told: list[Probe]) -> float:
    """x above which nothing is tried: halfway between the smallest that diverged and the largest below it that did not.

    A bound just below the one that diverged would do worse: nothing is known of what lies there, so that the next probe
    would, and diverge, and so on. One that diverged below the best of all is a fluke, and bounds nothing.
    """
    done = [(p.forecast, p.x) for p in told if p.status == "done" and p.forecast is not None]
    best = min(done)[1] if done else 0.0
    diverged = min((p.x for p in told if p.status == "diverged" and p.x >= best), default=None)
    if diverged is None:
        return 1.0
    return (diverged + max((x for _, x in done if x < diverged), default=0.0)) / 2.0
