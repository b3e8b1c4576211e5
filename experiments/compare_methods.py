"""The methods of the comparison. Each trains T main steps, makes every choice on validation data, and reads the test
split once, for its final model.

compute: steps trained in all trials over T, search included. wall_clock: the same on `SLOTS` free slots, in steps over T
(a grid of full runs fits its slots: 1.0; the policies: `experiments.slots`).
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

from autolrs_ray.core.envelopes import lr_factor
from autolrs_ray.core.growth import BatchGrowth
from autolrs_ray.core.policies import make_policy
from autolrs_ray.core.policy import finite_or_inf
from autolrs_ray.core.race.plan import RUNGS, RacePlan
from autolrs_ray.core.race.policy import AnchoredPolicy
from experiments.compare_lab import Lab, Outcome, candidates
from experiments.compare_optimizers import prodigy, schedule_free_default, schedule_free_grid, schedule_free_plus
from experiments.compare_report import COST_SLOTS
from experiments.compare_tasks import DEFAULT_LR, GRID, INTERVALS, Task
from experiments.memo import MemoTrainer
from experiments.slots import run_slots

GROWTH = {0.5: 2}
"""Of the batch, in the rows that say so: with it every step takes twice as many rows from half of the run on."""
SLOTS = 12
"""k: trials that run at the same time; the size of the race's field."""


# -- schedules ---------------------------------------------------------------------------------------------------------


def one_cycle(u: float) -> float:
    """torch's OneCycleLR: cosine from 1/25 to 1 over the first 30 %, cosine to 1/250,000 over the rest."""
    low, start, end, turn = 1.0, 1 / 25, 1 / 250_000, 0.3
    if u < turn:
        return start + (low - start) * 0.5 * (1.0 - math.cos(math.pi * u / turn))
    return end + (low - end) * 0.5 * (1.0 + math.cos(math.pi * (u - turn) / (1.0 - turn)))


def warmed_up(u: float) -> float:
    """The race's own shape: quadratic decay with a linear rise over the first fifth."""
    return min(1.0, (u + 1e-3) / 0.2) * (1.0 - u * u)


SHAPES: dict[str, Callable[[float], float]] = {
    "constant": lambda u: 1.0,
    "linear": lambda u: 1.0 - u,
    "cosine": lambda u: 0.5 * (1.0 + math.cos(math.pi * u)),
    "one-cycle": one_cycle,
    "quadratic": lambda u: 1.0 - u * u,
    "warm-up + quadratic": warmed_up,
}


def _train(lab: Lab, shape: str, lr: float, growth: dict[float, int] | None = None) -> MemoTrainer:
    trainer, steps = lab.trainer(), lab.task.steps
    trainer.grow(BatchGrowth.of(growth or {}, steps))
    trainer.train(steps, lambda step: lr * SHAPES[shape](step / steps))
    return trainer


def tuned(lab: Lab, shape: str, weights: str = "raw", growth: dict[float, int] | None = None) -> Outcome:
    """Full runs at every LR of the grid, the best on validation: a grid of 7 costs 7 T, and more where their batches grow."""
    grid = GRID[lab.task.optimizer]
    found = []
    for lr in grid:
        trainer = _train(lab, shape, lr, growth)
        found.append(
            (min(finite_or_inf(trainer.evaluate(averaged=w == "averaged")["loss"]) for w in candidates(weights)), lr)
        )
    lr = min(found)[1]
    edge = lr in (grid[0], grid[-1])
    cost = len(grid) * BatchGrowth.of(growth or {}, lab.task.steps).first(lab.task.steps) / lab.task.steps
    return lab.outcome(_train(lab, shape, lr, growth), weights, cost, 1.0, lr=lr, extra={"edge": edge})


def untuned(lab: Lab, shape: str) -> Outcome:
    lr = DEFAULT_LR[lab.task.optimizer]
    return lab.outcome(_train(lab, shape, lr), "raw", 1.0, 1.0, lr=lr)


# -- our policies ------------------------------------------------------------------------------------------------------


def paper(lab: Lab, decades: int = 2, slots: int = SLOTS, **options: Any) -> Outcome:
    """5 stages of tau = T / 5, tau' = tau / 10, k = 10 probes a stage; the validation loss ranks probes throughout.

    Ablations: the training loss ranks those of the first stage, as the authors have it; stages that double from T / 15 on.
    """
    task, tau = lab.task, lab.task.steps // 5
    options = {"stage_steps": tau, "max_stage_steps": tau, "series": "validation", **options}
    options = {"probe_reports": task.probe_reports, **options}
    policy = make_policy("paper", task.steps, INTERVALS[task.optimizer][decades], lab.seed, slots, **options)
    trainer = lab.trainer(averaging=False, train_losses=True)
    run = run_slots(policy, trainer, slots)
    lrs = [event["lr"] for event in run.events if event["event"] == "commit"]
    return lab.outcome(trainer, "raw", run.steps / task.steps, run.clock / task.steps, extra={"lrs": lrs})


def paper_doubling(lab: Lab) -> Outcome:
    tau = lab.task.steps // 15
    return paper(lab, stage_steps=tau, max_stage_steps=8 * tau, series="authors")


def anchored(
    lab: Lab,
    decades: int = 6,
    order: str = "common",
    weights: str = "best",
    averages: int | None = None,
    averaging: bool = True,
    rule: dict[str, Any] | None = None,
    **options: Any,
) -> Outcome:
    """The race; the final model is the best of raw and averaged weights on validation. averages: how many of them there are
    (None: all of the task's). averaging: whether there are any. rule: numbers of the race's rule other than its own.

    Run on 1, 2, 4 and `SLOTS` slots, for what it costs there. Raises RuntimeError where their number changes the LR found.
    """
    task, cost, found = lab.task, {}, {}
    for slots in COST_SLOTS:
        given = {"commits": task.commits, **options}
        policy = make_policy("anchored", task.steps, INTERVALS[task.optimizer][decades], lab.seed, slots, **given)
        assert isinstance(policy, AnchoredPolicy)
        if rule is not None:
            policy.follow(RacePlan.of(task.steps, **{"rise": policy.warmup, **rule}))
        trainer = lab.trainer(averaging=averaging, train_losses=True, order=order, averages=averages)
        run = run_slots(policy, trainer, slots)
        cost[slots] = (run.steps / task.steps, run.clock / task.steps)
        found[slots] = run.events[-1]["lr"]
    if len(set(found.values())) > 1:
        raise RuntimeError(f"the number of slots has changed the learning rate found: {found}")
    walk = [(event["rung"], event["leader"], event["kept"]) for event in run.events if event["event"] == "decision"]
    extra = {"slots": cost, "walk": walk, "tried": sum(trunk.status != "untried" for trunk in policy.trunks)}
    return lab.outcome(trainer, weights, *cost[SLOTS], lr=found[SLOTS], extra=extra)


def whole_field(lab: Lab) -> Outcome:
    """Every LR of the race trained to T, the best on validation: what the race would find if it could not err."""
    task = lab.task
    policy = AnchoredPolicy(task.steps, lr_interval=INTERVALS[task.optimizer][6], commits=task.commits)
    best, lr, final = math.inf, math.nan, None
    for trunk in policy.trunks:
        trainer = lab.trainer()
        factor = partial(lr_factor, policy.envelope, total_steps=task.steps, warmup_steps=policy.warmup_steps)
        trainer.train(task.steps, lambda step, lr=trunk.lr, factor=factor: lr * factor(step))
        score = min(finite_or_inf(trainer.evaluate(averaged=averaged)["loss"]) for averaged in (False, True))
        if score < best:
            best, lr, final = score, trunk.lr, trainer.state_dict()
    assert final is not None
    trainer.load_state_dict(final)
    return lab.outcome(trainer, "best", float(len(policy.trunks)), 1.0, lr=lr)


def scaled_rungs(factor: float) -> dict[str, Any]:
    """Rungs at `factor` times the usual fractions, those past the end left out, and one at the end."""
    return {"fractions": (*(rung * factor for rung in RUNGS if rung * factor < 1.0), 1.0)}


# -- the list ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Method:
    """group: "main", "growth", "ablation" or "ray". decades: width of the search interval."""

    name: str
    group: str
    run: Callable[[Lab], Outcome]
    tuned: bool = False
    decades: int | None = None


def _anchored(name: str, group: str = "ablation", decades: int = 6, **options: Any) -> Method:
    return Method(f"anchored, {name}", group, partial(anchored, decades=decades, **options), decades=decades)


def _methods() -> list[Method]:
    return [
        Method("anchored", "main", anchored, decades=6),
        Method("paper", "main", paper, decades=2),
        Method("constant", "main", partial(tuned, shape="constant"), tuned=True),
        Method("constant + averaged weights", "main", partial(tuned, shape="constant", weights="averaged"), tuned=True),
        Method("linear", "main", partial(tuned, shape="linear"), tuned=True),
        Method("linear, best of raw and averaged", "main", partial(tuned, shape="linear", weights="best"), tuned=True),
        Method("linear, default LR", "main", partial(untuned, shape="linear")),
        Method("quadratic", "main", partial(tuned, shape="quadratic"), tuned=True),
        Method("quadratic, best of raw and averaged", "main", partial(tuned, shape="quadratic", weights="best"), True),
        Method(
            "warm-up + quadratic, best of raw and averaged",
            "main",
            partial(tuned, shape="warm-up + quadratic", weights="best"),
            tuned=True,
        ),
        Method(
            "one-cycle, best of raw and averaged", "main", partial(tuned, shape="one-cycle", weights="best"), tuned=True
        ),
        _anchored("growth x 2 from .5 T", "growth", batch_growth=GROWTH),
        *(
            Method(
                f"{shape}, best of raw and averaged, growth x 2 from .5 T",
                "growth",
                partial(tuned, shape=shape, weights="best", growth=GROWTH),
                tuned=True,
            )
            for shape in ("warm-up + quadratic", "one-cycle")
        ),
        Method("Schedule-Free", "main", schedule_free_grid, tuned=True),
        Method("Schedule-Free, default LR", "main", schedule_free_default),
        Method("ScheduleFree+", "main", schedule_free_plus),
        Method("Prodigy + cosine", "main", prodigy),
        Method("paper, q = 1", "main", partial(paper, slots=1), decades=2),
        Method("paper, 4 decades", "main", partial(paper, decades=4), decades=4),
        Method("paper, 6 decades", "main", partial(paper, decades=6), decades=6),
        _anchored("4 decades", "main", 4),
        _anchored("2 decades", "main", 2),
        Method("cosine", "main", partial(tuned, shape="cosine"), tuned=True),
        Method("one-cycle", "main", partial(tuned, shape="one-cycle"), tuned=True),
        Method("cosine, default LR", "main", partial(untuned, shape="cosine")),
        Method("one-cycle, default LR", "main", partial(untuned, shape="one-cycle")),
        Method("constant, default LR", "main", partial(untuned, shape="constant")),
        Method("whole field of 12 (full runs)", "ablation", whole_field, decades=6),
        _anchored("no warm-up", warmup=0.0),
        _anchored("warm-up half as long", warmup=0.1),
        _anchored("warm-up twice as long", warmup=0.4),
        _anchored("no averaging", averaging=False, weights="raw"),
        _anchored("one average, over a quarter", averages=1),
        _anchored("no envelope", envelope="constant"),
        _anchored("wsd", envelope="wsd"),
        _anchored("linear", envelope="linear"),
        _anchored("6 LRs", num_lrs=6),
        _anchored("24 LRs", num_lrs=24),
        _anchored("rungs half as long", rule=scaled_rungs(0.5)),
        _anchored("rungs twice as long", rule=scaled_rungs(2.0)),
        _anchored("margin half as wide", rule={"close": 0.02}),
        _anchored("margin twice as wide", rule={"close": 0.08}),
        _anchored("settled at .15 T", rule={"settled": 0.15}),
        _anchored("settled at .6 T", rule={"settled": 0.6}),
        _anchored("never an LR above", rule={"rise": 1.0}),
        _anchored("patience", rule={"patience": 1}),
        _anchored("no run-ahead", run_ahead=False),
        _anchored("no common random numbers", order="per run"),
        Method("paper + quadratic envelope", "ablation", partial(paper, envelope="quadratic"), decades=2),
        Method("paper, the authors' series", "ablation", partial(paper, series="authors"), decades=2),
        Method("paper, doubling stages", "ablation", paper_doubling, decades=2),
    ]


METHODS = {method.name: method for method in _methods()}


def setting(task: Task) -> str:
    """What a cached result depends on beside task, method and seed, in short."""
    text = f"{task.steps}/{SLOTS}/{task.batch_size}/{task.commits}/{task.probe_reports}/{task.title}"
    return f"T{task.steps}-{hashlib.blake2b(text.encode(), digest_size=4).hexdigest()}"
