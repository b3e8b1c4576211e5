"""Which learning rate does a stage's search find? Regret on measured landscapes, ours beside other rules.

    python -m experiments.regrets                 # our rules, random and a log grid: minutes on one core
    python -m experiments.regrets --slow          # scikit-optimize and BoTorch as well: hours; resumable

Every landscape of `experiments.landscapes` gives up to two intervals of three decades: one wholly below the smallest learning
rate that diverges, one with that inside. A rule tries ten learning rates, q at a time; it sees the exact loss at the end of
the stage, or that training has diverged. Regret: the loss of the best one tried, above the interval's best, as a share of
what that gains on the start (1 where all diverge). Writes experiments/results/regrets.md.
"""

from __future__ import annotations

import argparse
import json
import math
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from autolrs_ray.core.envelopes import bin_centred_grid
from autolrs_ray.core.paper.proposals import Probe, ProposalRule
from experiments.compare_report import mean_se
from experiments.landscapes import LRS, Landscape, load
from experiments.tables import markdown

K, QS = 10, (1, 2, 5, 10)
OUT = Path(__file__).parent / "results"
WINDOW = LRS // 2  # steps of the grid of learning rates: three decades
LEAST_DEPTH = 0.02  # of the start: an interval that gains less has nothing to find


@dataclass(frozen=True)
class Interval:
    """Losses over x in [0, 1], log LR scaled to three decades: straight lines between those measured."""

    name: str
    diverging: bool
    start: float
    losses: np.ndarray  # (31,), inf where training diverges

    def __call__(self, x: float) -> float:
        """The loss at `x`; inf where the nearer of the two neighbours diverges."""
        at = x * (len(self.losses) - 1)
        low = min(int(at), len(self.losses) - 2)
        a, b, u = self.losses[low], self.losses[low + 1], at - low
        if not (math.isfinite(a) and math.isfinite(b)):
            return float(a if u < 0.5 else b)
        return float(a + u * (b - a))

    @property
    def best(self) -> float:
        return float(self.losses.min())

    def regret(self, xs: list[float]) -> float:
        found = min(min(self(x) for x in xs), self.start)
        return (found - self.best) / (self.start - self.best)


def intervals(landscapes: list[Landscape]) -> list[Interval]:
    """Both kinds, placed at random (seeded) among the places that hold the best learning rate of their kind."""
    found = []
    for i, landscape in enumerate(landscapes):
        rng, bad = np.random.default_rng(i), np.flatnonzero(~np.isfinite(landscape.final))
        edge = int(bad[0]) if len(bad) else LRS
        best = int(np.argmin(landscape.final[:edge])) if edge else 0
        for diverging in (False, True):
            starts = [
                s for s in range(LRS - WINDOW)
                if s <= best <= s + WINDOW and (s + WINDOW >= edge + 2) == diverging and (diverging or s + WINDOW < edge)
            ]  # fmt: skip
            if starts:
                low = int(rng.choice(starts))
                losses = landscape.final[low : low + WINDOW + 1]
                if landscape.start - losses.min() > LEAST_DEPTH * landscape.start:
                    found.append(Interval(landscape.name, diverging, landscape.start, losses))
    return found


# -- rules: interval, q, seed -> the x tried ----------------------------------------------------------------------------


def ours(interval: Interval, q: int, seed: int, kappa: float = 2.0, initial: str = "grid") -> list[float]:
    rule, probes = ProposalRule(K, kappa, initial, "map", seed), []
    q = rule.round_of(q)
    while True:
        opened = []
        while (found := rule.next_x(0, 0, probes, q)) is not None:
            opened.append(Probe(0.0, found[0]))
            probes.append(opened[-1])
        if not opened:
            return [probe.x for probe in probes]
        for probe in opened:
            loss = interval(probe.x)
            probe.status, probe.forecast = ("done", loss) if math.isfinite(loss) else ("diverged", None)


def random(interval: Interval, q: int, seed: int) -> list[float]:
    xs: list[float] = np.random.default_rng(seed).uniform(size=K).tolist()
    return xs


def log_grid(interval: Interval, q: int, seed: int) -> list[float]:
    return bin_centred_grid(K)


def _told(interval: Interval, xs: list[float]) -> list[float]:
    """Losses for a rule that knows no divergence: that counts as 4 times the start, where a stage calls it one."""
    return [min(interval(x), 4.0 * interval.start) for x in xs]


def scikit_optimize(interval: Interval, q: int, seed: int) -> list[float]:
    """Optimizer's defaults, but for four initial points of its own Sobol sequence; q at a time by its constant liar."""
    from skopt import Optimizer

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # deprecated calls, fits that hit a bound
        optimizer = Optimizer(
            [(0.0, 1.0)], n_initial_points=max(4, q), initial_point_generator="sobol", random_state=seed
        )
        xs: list[float] = []
        while len(xs) < K:
            new = [point[0] for point in optimizer.ask(n_points=min(q, K - len(xs)))]
            optimizer.tell([[x] for x in new], _told(interval, new))
            xs += new
    return xs


def botorch(interval: Interval, q: int, seed: int, acquisition: str) -> list[float]:
    """A log grid first, then SingleTaskGP, its own fit, and the acquisition maximised by `optimize_acqf`."""
    from botorch.acquisition.analytic import LogExpectedImprovement
    from botorch.acquisition.logei import qLogNoisyExpectedImprovement
    from botorch.fit import fit_gpytorch_mll
    from botorch.models import SingleTaskGP
    from botorch.models.transforms import Standardize
    from botorch.optim import optimize_acqf
    from gpytorch.mlls import ExactMarginalLogLikelihood

    torch.manual_seed(seed)
    xs = bin_centred_grid(max(4, q))
    bounds = torch.tensor([[0.0], [1.0]], dtype=torch.float64)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        while len(xs) < K:
            x = torch.tensor(xs, dtype=torch.float64)[:, None]
            y = -torch.tensor(_told(interval, xs), dtype=torch.float64)[:, None]
            model = SingleTaskGP(x, y, outcome_transform=Standardize(1))
            fit_gpytorch_mll(ExactMarginalLogLikelihood(model.likelihood, model))
            if acquisition == "LogEI":
                chosen, _ = optimize_acqf(LogExpectedImprovement(model, y.max()), bounds, 1, 4, 64)
            else:
                function = qLogNoisyExpectedImprovement(model, x)
                chosen, _ = optimize_acqf(function, bounds, min(q, K - len(xs)), 4, 64, sequential=True)
            xs += chosen[:, 0].tolist()
    return xs


Rule = Callable[[Interval, int, int], list[float]]


@dataclass(frozen=True)
class Entry:
    rule: Rule
    qs: tuple[int, ...] = QS
    seeds: int = 1
    slow: bool = False


RULES: dict[str, Entry] = {
    "ours": Entry(ours),
    "ours, kappa 1": Entry(partial(ours, kappa=1.0)),
    "ours, kappa 4": Entry(partial(ours, kappa=4.0)),
    "published settings: kappa 1000, one random point": Entry(partial(ours, kappa=1000.0, initial="random"), seeds=5),
    "log grid": Entry(log_grid),
    "random": Entry(random, seeds=20),
    "scikit-optimize": Entry(scikit_optimize, slow=True),
    "BoTorch LogExpectedImprovement": Entry(partial(botorch, acquisition="LogEI"), (1,), slow=True),
    "BoTorch qLogNoisyExpectedImprovement": Entry(partial(botorch, acquisition="qLogNEI"), slow=True),
}


INTRODUCTION = """# What a stage's search finds

Made by `python -m experiments.regrets`: ten learning rates over three decades, q at a time, exact losses; ours on ten slots
five at a time too, so that its columns q = 5 and q = 10 are one. Regret as a share of what the best learning rate gains on the
start: mean and standard error over intervals; in brackets, probes of ten that diverged.

"""

# -- results -------------------------------------------------------------------------------------------------------------


def measure(names: list[str], most: int | None, cache: Path) -> list[dict[str, Any]]:
    """One row per rule, q and interval: regret and diverged probes, means over seeds. Rows in `cache` are not made again."""
    rows = [json.loads(line) for line in cache.read_text().splitlines()] if cache.exists() else []
    done = {(row["rule"], row["q"], row["name"], row["diverging"]) for row in rows}
    cache.parent.mkdir(parents=True, exist_ok=True)
    with cache.open("a") as file:
        found = intervals(load())
        for i in np.random.default_rng(0).permutation(len(found))[:most].tolist():  # any part of them is a fair sample
            interval = found[i]
            for name in names:
                entry = RULES[name]
                for q in entry.qs:
                    key = (name, q, interval.name, interval.diverging)
                    if key in done:
                        continue
                    tried = [entry.rule(interval, q, seed) for seed in range(entry.seeds)]
                    regret = float(np.mean([interval.regret(xs) for xs in tried]))
                    diverged = float(np.mean([sum(not math.isfinite(interval(x)) for x in xs) for xs in tried]))
                    rows.append(
                        dict(
                            zip(("rule", "q", "name", "diverging"), key, strict=True), regret=regret, diverged=diverged
                        )
                    )
                    file.write(json.dumps(rows[-1]) + "\n")
                    file.flush()
    return rows


def table(rows: list[dict[str, Any]], diverging: bool, slow: bool) -> str:
    """Mean regret, its standard error, and diverged probes of ten, on the intervals that every rule has seen."""
    rows = [row for row in rows if row["diverging"] == diverging and (slow or not RULES[row["rule"]].slow)]
    seen = [{row["name"] for row in rows if row["rule"] == name} for name in {row["rule"] for row in rows}]
    common = set.intersection(*seen)
    lines = []
    for name in dict.fromkeys(row["rule"] for row in rows):
        cells = [name]
        for q in QS:
            own = [row for row in rows if row["rule"] == name and row["q"] == q and row["name"] in common]
            regret, error = mean_se([row["regret"] for row in own]) or (math.nan, math.nan)
            bad = mean_se([row["diverged"] for row in own]) or (math.nan,)
            cells.append(f"{regret:.3f} ± {error:.3f} ({bad[0]:.1f})" if own else "")
        lines.append(cells)
    kind = "with a divergence inside" if diverging else "without one"
    return f"## Intervals {kind}: {len(common)}\n\n" + markdown(["rule", *(f"q = {q}" for q in QS)], lines)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="experiments.regrets", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)  # fmt: skip
    parser.add_argument("--slow", action="store_true", help="scikit-optimize and BoTorch too")
    parser.add_argument("--most", type=int, help="measure so many intervals, drawn at random (default: all)")
    parser.add_argument("--cache", type=Path, default=Path("runs/regrets.jsonl"))
    arguments = parser.parse_args(argv)
    torch.set_num_threads(1)
    began = time.perf_counter()
    rows = measure(
        [n for n, entry in RULES.items() if arguments.slow or not entry.slow], arguments.most, arguments.cache
    )
    tables = [table(rows, kind, slow=False) for kind in (False, True)]
    if any(RULES[row["rule"]].slow for row in rows):
        tables += ["# Beside other libraries", *(table(rows, kind, slow=True) for kind in (False, True))]
    text = INTRODUCTION + "\n\n".join(tables) + "\n"
    (OUT / "regrets.md").write_text(text)
    print(text, f"{time.perf_counter() - began:.0f} s", sep="\n")


if __name__ == "__main__":
    main()
