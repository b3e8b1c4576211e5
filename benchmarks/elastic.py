"""Do trials that grow keep every slot at work, and what does a whole run cost beside data-parallel training on the same slots?

The workload is that of `whole_run`. Plain data-parallel training is one trial of as many workers as slots, at a fixed LR,
with as many evaluations and checkpoints. Every run has a cluster of its own, whose idle workers have done their imports.
The runs on this machine have few slots: what 8 and 64 GPUs would see is simulated, with the real policies and the real rule
for workers on a virtual clock, over losses of the digits task.
"""

from __future__ import annotations

import os
import statistics
import tempfile
import time
from typing import Any

from ray import tune

import autolrs_ray
from autolrs_ray import RunResult
from autolrs_ray.core.policies import make_policy
from autolrs_ray.driver.settings import RunSettings
from autolrs_ray.training.trainer import Trainer
from autolrs_ray.trial.distributed import worker_resources
from autolrs_ray.trial.trainable import trainable_for
from benchmarks.elastic_simulation import Cluster, Losses, Simulated, speed
from benchmarks.section import Section, cluster, spread
from benchmarks.whole_run import COMMITS, build, fitting_batch
from experiments.digits_task import build as build_digits

SIMULATED_STEPS = 500
LENGTHS_S = {"10 min": 600.0, "1 h": 3600.0, "10 h": 36000.0}
"""How long plain data-parallel training on all slots takes."""
PAPER = {"lr_interval": (1e-3, 1.0)}


def data_parallel(steps: int, config: dict[str, Any], folder: str, slots: int) -> None:
    """One trial with a worker per slot, at a fixed LR."""
    trainable = tune.with_resources(trainable_for(build, workers=slots), worker_resources(slots))
    tune.run(trainable, config={**config, "lr": 0.1, "seed": 0, "report_every": steps // COMMITS, "averaging": True},
             stop={"step": steps}, storage_path=folder, name="plain", verbose=0,
             checkpoint_config=tune.CheckpointConfig(checkpoint_frequency=1))  # fmt: skip


def automatic(steps: int, config: dict[str, Any], folder: str, policy: str, workers: Any) -> RunResult:
    options: dict[str, Any] = {} if policy == "anchored" else dict(stage_steps=steps // 4, max_stage_steps=steps // 4)
    return autolrs_ray.run(build, steps, config=config, storage_path=folder, name="run", progress=False, policy=policy,
                           workers=workers, **options)  # fmt: skip


def restarts(result: RunResult) -> tuple[int, float]:
    """Trials that began with another number of workers than before, and the seconds until they trained."""
    seen, changed, waits = set(), {}, []  # changed: arm -> when, until its next segment tells when it trained
    for event in result.events:
        arm = event.get("arm")
        if event["event"] == "workers":
            if arm in seen:
                changed[arm] = event["time"]
            seen.add(arm)
        elif event["event"] == "segment" and arm in changed:
            waits.append(max(0.0, event["began"] - changed.pop(arm)))
    return len(waits), sum(waits)


def _timed(call: Any, slots: int, *arguments: Any) -> tuple[float, Any]:
    with tempfile.TemporaryDirectory() as folder, cluster(slots, 1000, ready=True):
        began = time.perf_counter()
        result = call(*arguments[:2], folder, *arguments[2:])
        return time.perf_counter() - began, result


def simulated(
    losses: Losses, policy: str, slots: int, length_s: float, workers: Any, efficiency: float, **race: Any
) -> Simulated:
    """A run whose plain data-parallel training would take `length_s`."""
    tau = SIMULATED_STEPS // 5
    options = race if policy == "anchored" else dict(stage_steps=tau, max_stage_steps=tau)
    interval = PAPER["lr_interval"] if policy == "paper" else None
    given = ("val_loss", "min", "step", "train_loss", None, 0, None, False, False, 900.0, 60.0, workers)
    settings = RunSettings(SIMULATED_STEPS, policy, interval, *given, options)
    made = make_policy(policy, SIMULATED_STEPS, interval, 0, settings.side_by_side(slots), **options)
    step_s = length_s * speed(slots, efficiency) / SIMULATED_STEPS
    return Cluster(made, losses, slots, step_s, efficiency=efficiency, most=settings.most_units).run()


def _simulations(quick: bool) -> list[tuple[str, ...]]:
    rows: list[tuple[str, ...]] = []
    for policy in ("anchored", "paper"):
        losses = Losses(Trainer(lambda: build_digits({}), 0, policy == "anchored"))
        for slots in (8,) if quick else (8, 64):
            cases: list[tuple[str, Any, float, dict[str, Any]]] = [(name, "elastic", 1.0, {}) for name in LENGTHS_S]
            cases += [("1 h", "elastic", 0.8, {}), ("1 h", 1, 1.0, {})]
            if policy == "anchored":  # free slots train, and never run ahead
                cases += [("1 h", "elastic", efficiency, {"run_ahead": False}) for efficiency in (1.0, 0.8)]
            cases += [("1 h", (1, 8), 1.0, {})] if slots > 8 and policy == "anchored" else []
            for name, workers, efficiency, race in cases:
                found = simulated(losses, policy, slots, LENGTHS_S[name], workers, efficiency, **race)
                wall, compute = found.seconds / LENGTHS_S[name], found.steps / SIMULATED_STEPS
                use = found.trained_s / (slots * found.seconds)
                rows.append((
                    f"simulated: {policy}, workers={workers!r}{', run_ahead=False' * bool(race)}, {slots} GPUs, {name}, "
                    f"scaling {efficiency:.0%}", "",
                    f"{wall:.2f}", f"{compute:.2f}", f"{wall / compute:.2f}", f"{use:.0%}",
                    f"{found.restarts}",
                ))  # fmt: skip
    return rows


def measure(quick: bool, slots: int = 2) -> Section:
    steps, rounds = (100, 1) if quick else (1500, 1)
    config = {"batch_size": fitting_batch()}
    plain: list[float] = []
    found: dict[tuple[str, Any], list[tuple[float, float, RunResult]]] = {}
    for _ in range(rounds):
        for case in (("anchored", "elastic"), ("anchored", 1), ("paper", "elastic"), ("paper", 1)):
            if (
                len(plain) < 2 * rounds and case[1] == "elastic"
            ):  # beside each of them, so that both have the same neighbours
                plain.append(_timed(data_parallel, slots, steps, config, slots)[0])
            wall, result = _timed(automatic, slots, steps, config, *case)
            found.setdefault(case, []).append((wall, wall / plain[-1], result))
    rows = [(f"plain data-parallel training, {slots} workers", spread(plain, 1), "1.00", "1.00", "1.00", "", "")]
    figures = {}
    for (policy, workers), measured in found.items():
        ratios = [ratio for _, ratio, _ in measured]
        compute = [result.compute for _, _, result in measured]
        use = [result.timing.worker_s / (slots * result.timing.wall_s) for _, _, result in measured]
        lost = [restarts(result) for _, _, result in measured]
        over = [ratio / T for ratio, T in zip(ratios, compute, strict=True)]
        rows.append((
            f"{policy}, workers={workers!r}", spread([wall for wall, _, _ in measured], 1), spread(ratios), spread(compute),
            spread(over), f"{statistics.median(use):.0%}",
            f"{statistics.median(n for n, _ in lost):.0f} ({statistics.median(s for _, s in lost):.1f} s)",
        ))  # fmt: skip
        if (policy, workers) == ("anchored", "elastic"):
            figures = dict(
                elastic_slot_use=statistics.median(use), elastic_race_over_data_parallel=statistics.median(ratios),
                elastic_race_compute=statistics.median(compute),
            )  # fmt: skip
    step = f"{1000.0 * statistics.median(plain) / steps:.0f} ms (batch {config['batch_size']})"
    return Section(
        f"Elastic: {steps} steps of {step} on {slots} slots, {rounds} round(s), median (min-max); 8 and 64 GPUs simulated",
        ("run", "wall-clock, s", "over data-parallel", "compute, T", "wall-clock over compute", "slots in use", "restarts"),
        rows + _simulations(quick),
        note="Every ratio is to a data-parallel run right before it. Slots in use: share of the slot-seconds in which a "
        "worker trained or evaluated. Restarts: of trials that change their size. Simulated: a restart takes 3 s, a trial in "
        "another one's actor .3 s; 10 min, 1 h, 10 h: what plain data-parallel training takes; scaling: what each further "
        f"worker adds. Load averages of the machine at the end: {', '.join(f'{load:.0f}' for load in os.getloadavg())}.",
        figures=figures,
    )  # fmt: skip
