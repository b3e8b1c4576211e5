"""How many optimizer steps a run of so many epochs, or of so many hours, has: a trial of its own trains a few and is timed."""

from __future__ import annotations

import math
import shutil
import time
import uuid
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any

from ray import tune
from ray.tune.error import TuneError
from ray.tune.experiment import Trial
from ray.tune.schedulers import FIFOScheduler

from autolrs_ray.core.checks import require_float
from autolrs_ray.core.policy import AutoLRSError
from autolrs_ray.core.race.cost import measured
from autolrs_ray.core.workers import parse_workers
from autolrs_ray.driver.crashes import crash_of
from autolrs_ray.driver.nodes import node_resources, trials_that_fit
from autolrs_ray.driver.settings import REPORT_TIMEOUT_S, RESOURCE_TIMEOUT_S
from autolrs_ray.driver.watchdog import Shortage
from autolrs_ray.private import starting_actor
from autolrs_ray.record.journal import read_journal
from autolrs_ray.record.stores import is_uri, join

if TYPE_CHECKING:
    from ray.tune.execution.tune_controller import TuneController

FEW, MORE = 4, 24  # steps between two reports of the trials that are timed: their difference is what 20 steps cost
REPORTS = 3  # of each; the first, in which memory is taken and kernels are chosen, does not count
RACE_REPORTS = 25  # of one trunk: at the race's rungs, and at its commits
LEAST_STEPS = 50  # a race over fewer goes by noise


@dataclass
class Pace(tune.Callback):  # type: ignore[misc]
    """What a trial's reports tell: seconds per step and per report, and steps per epoch. Watches the trials it is given to,
    and raises AutoLRSError where they fall silent, or want what no node has."""

    report_timeout_s: float = REPORT_TIMEOUT_S
    resource_timeout_s: float = RESOURCE_TIMEOUT_S
    rows: dict[str, list[dict[str, Any]]] = field(default_factory=dict)
    resources: Any = None
    actor_of: Callable[[Trial], Any] = lambda trial: None
    _shortage: Shortage | None = None
    _heard: float | None = None  # when the last report came, or a trial had got what it asks for

    def on_trial_result(
        self, iteration: int, trials: list[Any], trial: Any, result: dict[str, Any], **info: Any
    ) -> None:
        self.rows.setdefault(trial.trial_id, []).append(dict(result))
        self.resources = trial.placement_group_factory
        self._heard = time.monotonic()

    def on_step_begin(self, iteration: int, trials: list[Any], **info: Any) -> None:
        now, running = time.monotonic(), any(trial.status == Trial.RUNNING for trial in trials)
        pending = [trial for trial in trials if trial.status == Trial.PENDING]
        if pending:
            self._shortage = self._shortage or Shortage(pending[0].placement_group_factory)
            self._shortage.look(not running, self.resource_timeout_s, now)
        if self._heard is None and (running or any(self.actor_of(trial) is not None for trial in pending)):
            self._heard = now
        if self._heard is not None and now - self._heard > self.report_timeout_s:
            raise AutoLRSError(
                f"the trial whose steps were to be timed has reported nothing for {now - self._heard:.0f} s "
                f"(report_timeout_s={self.report_timeout_s:g}): see its setup and its loop, or give total_steps"
            )

    def steps_per_epoch(self, clock: str) -> int:
        """Optimizer steps per epoch. Raises ValueError where the trials do not report "epoch", steps / steps per epoch."""
        row = next((rows[-1] for rows in self.rows.values()), {})
        if not row.get("epoch") or not row.get(clock):
            raise ValueError('epochs= needs trials that report "epoch", the passes over the training data so far, as a '
                             "TrainingTask, Lightning and Hugging Face do: give total_steps instead")  # fmt: skip
        return math.ceil(row[clock] / row["epoch"] - 1e-6)

    def seconds(self, clock: str) -> tuple[float, float]:
        """Seconds per step, and per report beside its steps."""
        found = []
        for rows in self.rows.values():
            steps = rows[-1][clock] - rows[-2][clock]
            found.append((steps, min(row["time_this_iter_s"] for row in rows[1:])))
        (few, quick), (more, slow) = min(found), max(found)
        step = (slow - quick) / (more - few) if more > few and slow > quick else slow / more
        return step, max(0.0, quick - few * step)


class _Introduction(FIFOScheduler):  # type: ignore[misc]
    """Shows a Pace the actors of its trials: Tune tells schedulers alone of its controller."""

    def __init__(self, pace: Pace) -> None:
        super().__init__()
        self._pace = pace

    def on_trial_add(self, tune_controller: TuneController, trial: Trial) -> None:
        self._pace.actor_of = partial(starting_actor, tune_controller)


def rehearse(
    trainable: Any,
    config: dict[str, Any],
    storage: str,
    reports: tuple[int, ...],
    count: int,
    search: Mapping[str, Any],
    reuse_actors: bool = True,
) -> Pace:
    """Train a trial for each of `reports`, steps between two reports, until it has made `count` of them; leaves no files.

    search: the options of AutoLRSSearch. Raises AutoLRSError, with the trial's own error, if one fails, and as Pace does.
    """
    limits = {"report_timeout_s": REPORT_TIMEOUT_S, "resource_timeout_s": RESOURCE_TIMEOUT_S}
    pace = Pace(*(require_float(name, search.get(name, usual), 0.0, math.inf) for name, usual in limits.items()))
    failure = None
    name = f".pace-{uuid.uuid4().hex[:8]}"
    try:
        found = tune.run(
            trainable, name=name, storage_path=storage, stop={"training_iteration": count}, verbose=0, callbacks=[pace],
            config={**config, "lr": 1e-6, "report_every": tune.grid_search(list(reports))}, max_concurrent_trials=1,
            scheduler=_Introduction(pace), raise_on_failed_trial=False, reuse_actors=reuse_actors,
        )  # fmt: skip
        failure = next((crash_of(trial) for trial in found.trials if trial.status == Trial.ERROR), None)
    except TuneError as error:
        raise AutoLRSError(f"the trial whose steps were to be timed failed: {error}") from error
    finally:
        _remove(join(storage, name))
    whole = [rows for rows in pace.rows.values() if len(rows) >= count]
    if len(whole) < len(reports):
        why = f": {failure}" if failure is not None else ""
        raise AutoLRSError(f"the trial whose steps were to be timed failed before its first reports{why}")
    return pace


def _remove(folder: str) -> None:
    """Take away `folder`, a path or a URI, as far as that is possible."""
    if not is_uri(folder):
        shutil.rmtree(folder, ignore_errors=True)
        return
    from pyarrow.fs import FileSystem

    store, path = FileSystem.from_uri(folder)
    with suppress(OSError):
        store.delete_dir(path)


def steps_of_epochs(
    trainable: Any, epochs: float, config: dict[str, Any], storage: str, clock: str, search: Mapping[str, Any]
) -> tuple[int, str]:
    """Optimizer steps of `epochs` passes over the training data, and a line that says how they were found.

    search: the options of AutoLRSSearch.
    """
    if not (isinstance(epochs, (int, float)) and math.isfinite(epochs) and epochs > 0):
        raise ValueError(f"epochs must be a positive number, got {epochs!r}")
    each = rehearse(trainable, config, storage, (1,), 1, search).steps_per_epoch(clock)
    total = round(epochs * each)
    if total < 2:
        raise ValueError(
            f"epochs={epochs:g} are {total} of the {each:,} steps of an epoch, too few for a run: give more"
        )
    return total, f"{epochs:g} epochs of {each:,} steps: T = {total:,} steps"


def steps_of_hours(
    trainable: Any,
    hours: float,
    config: dict[str, Any],
    storage: str,
    name: str,
    clock: str,
    search: Mapping[str, Any],
    reuse_actors: bool = True,
) -> tuple[int, str]:
    """Optimizer steps of a run that takes about `hours`, search and all, and a line that says how they were found.

    A run that is there already keeps its own. search: the options of AutoLRSSearch.
    """
    if not (isinstance(hours, (int, float)) and math.isfinite(hours) and hours > 0):
        raise ValueError(f"hours must be a positive number, got {hours!r}")
    if search.get("policy", "anchored") != "anchored":
        raise ValueError(f'hours= is for policy="anchored", got {search["policy"]!r}: give total_steps')
    if (begun := _steps_begun(join(storage, name))) is not None:
        return begun, f"the run that is there goes on over its own T = {begun:,} steps"
    pace = rehearse(trainable, config, storage, (FEW, MORE), REPORTS, search, reuse_actors)
    step_s, report_s = pace.seconds(clock)
    fit = trials_that_fit(pace.resources, node_resources())
    slots = max(1, min(fit, search.get("slots") or fit))
    units = units_that_grow(slots, search.get("workers", 1))
    own = search.get("points_to_evaluate")
    kept = len(own) if search.get("keep") and isinstance(own, (list, tuple)) else 0
    _, wall = measured(slots // units, search.get("run_ahead", True))
    wall = wall / units + kept / slots
    total = int((hours * 3600.0 / wall - RACE_REPORTS * report_s) / step_s)
    told = f"a step takes {1000 * step_s:.3g} ms and a report {1000 * report_s:.3g} ms"
    if total < LEAST_STEPS:
        raise ValueError(f"hours={hours:g} are too few: {told}, which leaves {max(0, total)} steps; give more, or validate on "
                         "less (val_fraction)")  # fmt: skip
    where = f"on {slots} slot{'s' * (slots > 1)} a run takes about {wall:.3g} T of wall-clock"
    where += f", if {units} workers are {units} times as fast as one" if units > 1 else ""
    return total, f"{told}; {where}: {hours:.3g} hours are T = {total:,} steps"


def units_that_grow(slots: int, workers: int | str | tuple[int, int]) -> int:
    """Units with which the trials of a run train on `slots` slots if they lose nothing by it; 1 of trials that do not grow."""
    least, most = parse_workers(workers)
    return slots if most is None else min(slots, most // least)


def _steps_begun(folder: str) -> int | None:
    """T of the run in `folder`; None where there is none."""
    try:
        events = read_journal(folder)
    except FileNotFoundError:
        return None
    totals = [event["config"]["total_steps"] for event in events if event["event"] == "start"]
    totals += [event["total_steps"] for event in events if event["event"] == "extend"]
    return int(totals[-1]) if totals else None
