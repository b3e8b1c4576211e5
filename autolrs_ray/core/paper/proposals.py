"""Which learning rate a stage tries next: a function of what its probes have found, and of nothing else."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from autolrs_ray.core.checks import require_float, require_int
from autolrs_ray.core.envelopes import bin_centred_grid
from autolrs_ray.core.paper import surrogate


@dataclass
class Probe:
    """One LR tried in the current stage. status: "open", "done", "diverged" or "failed". x: log LR scaled to [0, 1].

    first_loss: at its first report, where that is finite. loss, train_loss: at its last; moved: the losses before it were
    others. checkpoint: of its end state, kept for the leading probe only.
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


@dataclass(frozen=True)
class ProposalRule:
    """Paper, section 4.1: `initial` first, then the lower confidence bound mu - kappa * sigma of the surrogate.

    num_lrs: probes of a round (the paper's k). initial: "random" (one random LR) or "grid" (4 bin-centred LRs).
    fit: how the surrogate's hyperparameters are found, a key of `surrogate.FITS`.
    """

    num_lrs: int
    kappa: float
    initial: str
    fit: str
    seed: int

    def __post_init__(self) -> None:
        require_int("num_lrs", self.num_lrs, 1)
        require_float("kappa", self.kappa, 0.0, 1e6)
        for name, value, allowed in (
            ("initial", self.initial, ("random", "grid")),
            ("fit", self.fit, tuple(surrogate.FITS)),
        ):
            if value not in allowed:
                raise ValueError(f"{name} must be one of {allowed}, got {value!r}")

    def next_x(self, stage: int, attempt: int, probes: list[Probe], q: int) -> tuple[float, str] | None:
        """x of the next probe of a round, and why the surrogate failed ("" if it did not); None while it must wait.

        probes: those of the round so far; `attempt` counts the stage's rounds. Probe i is told of the probes up to
        i - q and takes the later ones as pending: proposals do not depend on the order in which probes that run
        together finish, and q = 1 is the paper's loop.
        """
        i = len(probes)
        split = max(0, i - q + 1)
        told, pending = probes[:split], probes[split:]
        if i >= self.num_lrs or any(probe.status == "open" for probe in told):
            return None
        if i == 0 and self.initial == "random":
            return float(np.random.default_rng([self.seed, stage, attempt]).uniform()), ""
        diverged = [probe.x for probe in told if probe.status == "diverged"]
        upper = max(0.0, min(diverged) - 1e-3) if diverged else 1.0
        grid = bin_centred_grid(min(4, self.num_lrs))
        if self.initial == "grid" and i < len(grid) and grid[i] <= upper:
            return grid[i], ""
        observed = [(p.x, p.forecast) for p in told if p.status == "done" and p.forecast is not None]
        # a failed probe has no value, but trying its LR again would be a waste: it counts as pending
        waiting = [probe.x for probe in pending] + [probe.x for probe in told if probe.status == "failed"]
        try:
            return surrogate.propose(observed, waiting, self.kappa, upper, self.fit), ""
        except Exception as error:  # numerical libraries raise many types, and no probe is worth the run
            return surrogate.space_filling([p.x for p in probes], upper), f"{type(error).__name__}: {error}"
