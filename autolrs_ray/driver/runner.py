"""One call that sets up Tune the right way."""

from __future__ import annotations

import os
import re
import threading
import uuid
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import PurePosixPath
from typing import Any

from ray import tune
from ray.tune.experiment import Trial
from ray.util.client import ray as client

from autolrs_ray.core.checks import require_bool, require_int, require_tuple
from autolrs_ray.core.workers import parse_workers
from autolrs_ray.driver.identity import refuse_search_spaces
from autolrs_ray.driver.live import LiveProgress, Stderr
from autolrs_ray.driver.refusals import require_amounts
from autolrs_ray.driver.scheduler import AutoLRSScheduler
from autolrs_ray.driver.searcher import AutoLRSSearch
from autolrs_ray.driver.settings import CONFIG_KEY
from autolrs_ray.outcome.result import RunResult
from autolrs_ray.record.mirror import Mirror
from autolrs_ray.record.stores import is_uri, join, normal
from autolrs_ray.trial.check import builds_task
from autolrs_ray.trial.trainable import trainable_for

_registering = threading.Lock()  # Tune's table of names is no matter for two threads at once


def run(
    trainable: Callable[[dict[str, Any]], Any] | type[tune.Trainable],
    total_steps: int | None = None,
    *,
    epochs: float | None = None,
    hours: float | None = None,
    config: dict[str, Any] | None = None,
    name: str = "autolrs",
    storage_path: str | os.PathLike[str] = "runs",
    resources: dict[str, float] | tune.PlacementGroupFactory | None = None,
    workers: int | str | tuple[int, int] = 1,
    threads: bool = False,
    resume: bool | str = "auto",
    max_failures: int = 3,
    reuse_actors: bool = True,
    seed: int | None = None,
    callbacks: list[tune.Callback] | None = None,
    progress: bool = True,
    **search: Any,
) -> RunResult:
    """Train `trainable` for `total_steps` with automatic learning rates, and return what was found.

    Or for `epochs` passes over its training data, or for as many steps as a run of about `hours` has room for, search and all:
    then a trial of its own trains a few steps first, which are counted or timed.

    trainable: a function `build(config) -> TrainingTask`, an AutoLRSTrainable, or any Tune trainable (class, or function
    that calls tune.report). config: passed on to it, with "seed" (0, unless it is given here or there); one value for each
    key. A run of the same name with another trainable or config is not taken for this one.
    resources: per trial, e.g. {"cpu": 1, "gpu": 0.25}.
    workers: processes that train each trial together (torch's DistributedDataParallel); `resources` are then of each.
    "elastic", or (least, most): every trial begins with one, or with `least`, and grows into free slots where that pays.
    threads: on CPUs: workers are threads of one process, on one node. How many add up a sum decides how it is rounded.
    name, storage_path: the run folder is storage_path/name; the same call again continues it (`resume`). storage_path is a
    folder that all nodes share, or a URI such as s3://bucket/runs.
    max_failures: how often a crashed trial is started again (-1: always). search: every option of :class:`AutoLRSSearch`.

    Raises what AutoLRSSearch raises for bad options, AutoLRSError if the run cannot go on, and KeyboardInterrupt, with the
    step, where it was stopped by Ctrl-C.
    """
    if client.is_connected():
        raise RuntimeError(
            "autolrs_ray.run does not go through Ray Client (ray://): the run's folder has to be seen from where it is called. "
            "Run the script on the cluster, with `ray job submit`, or on a node of it with ray.init()"
        )
    _require_trainable(trainable)
    require_int("max_failures", max_failures, -1)
    callbacks = _callbacks(callbacks)
    storage, name = normal(storage_path), _run_name(name)
    if not isinstance(config, (dict, type(None))):
        raise TypeError(f"config must be a dict, got {config!r:.200}")
    config = dict(config or {})
    refuse_search_spaces(config)
    config["seed"] = seed = _seed(config, seed)
    least, most = parse_workers(workers)
    elastic = most != least
    if builds_task(trainable):
        resources = resources if resources is not None else getattr(trainable, "_resources", None)  # of with_resources
        trainable = trainable_for(
            trainable, workers=None if elastic else least, threads=require_bool("threads", threads)
        )
    elif threads:
        raise ValueError(f"threads=True needs a function build(config) -> TrainingTask, got {trainable!r}")
    elif workers != 1 and not elastic:
        raise ValueError(f"workers={workers} needs a function build(config) -> TrainingTask, got {trainable!r}")
    if isinstance(resources, (dict, tune.PlacementGroupFactory)):
        require_amounts(resources)
    if elastic and isinstance(resources, tune.PlacementGroupFactory):
        raise ValueError(
            f"workers={workers!r} needs the resources of one worker, such as {{'gpu': 1}}, got {resources!r}"
        )
    shared = isinstance(resources, dict) and (resources.get("gpu") or resources.get("GPU") or 0) % 1
    if (elastic or least > 1) and shared:
        raise ValueError(
            f"workers={workers!r} needs whole GPUs, which is what NCCL wants of each worker, got {resources!r}"
        )
    if threads and not isinstance(resources, tune.PlacementGroupFactory):
        from autolrs_ray.trial.distributed import worker_resources

        resources = worker_resources(least, resources, together=True)
    elif least > 1 and not isinstance(resources, tune.PlacementGroupFactory):
        from autolrs_ray.trial.distributed import worker_resources

        resources = worker_resources(least, resources)
    if resources is not None:
        trainable = tune.with_resources(trainable, resources)
    if total_steps is None or epochs is not None or hours is not None:
        total_steps = _length(trainable, total_steps, epochs, hours, config, storage, name,
                              {**search, "workers": workers}, reuse_actors)  # fmt: skip
    searcher = AutoLRSSearch(total_steps, seed=seed, resume=resume, workers=workers, **search)
    if is_uri(storage):
        searcher.desk.stored.keep_on(Mirror.at(join(storage, name)))
    reports = [LiveProgress(searcher)] if progress else []
    # Tune's own word on a report without the metric is a traceback
    tunes = dict(TUNE_GLOBAL_CHECKPOINT_S="60", RAY_AIR_NEW_OUTPUT="0", TUNE_DISABLE_STRICT_METRIC_CHECKING="1")
    with _settings(**tunes), warnings.catch_warnings():
        warnings.filterwarnings("ignore", category=DeprecationWarning, module=r"ray\..*")
        registered = _register(trainable)
        try:
            tune.run(
                registered,
                name=name,
                storage_path=storage,
                config=config,
                search_alg=searcher,
                scheduler=AutoLRSScheduler(),
                num_samples=-1,
                metric=searcher.desk.settings.loss_key,
                mode=searcher.desk.settings.mode or "min",
                max_failures=max_failures,
                reuse_actors=reuse_actors,
                trial_name_creator=_trial_name,
                trial_dirname_creator=_trial_name,
                callbacks=[*reports, *callbacks],
                verbose=0,
            )
        finally:
            searcher.close()  # or the folder stays locked while anyone holds on to an error's traceback
    if not searcher.policy.done:  # Tune has taken the Ctrl-C for itself
        state = searcher.policy.progress()
        raise KeyboardInterrupt(
            f"interrupted at step {state['step']} of {state['total_steps']}; the same command continues"
        )
    return RunResult.load(join(storage, name))


def _require_trainable(value: Any) -> None:
    """Raise TypeError, naming `value`, for what is neither a function nor a class of Tune's."""
    if not callable(value) or (isinstance(value, type) and not issubclass(value, tune.Trainable)):
        raise TypeError(
            "trainable must be a function build(config) -> TrainingTask, or a Tune trainable (a class, or a function that "
            f"reports), got {value!r:.200}"
        )


def _callbacks(given: Any) -> list[tune.Callback]:
    """`given` as a list; TypeError, with the value, for what is no callback of Tune's."""
    found = list(require_tuple("callbacks", () if given is None else given))
    for callback in found:
        if not isinstance(callback, tune.Callback):
            raise TypeError(f"callbacks must be instances of ray.tune.Callback, got {callback!r:.200}")
    return found


def _run_name(name: Any) -> str:
    """The run's name, if it names a folder below the storage path. Raises TypeError or ValueError with the value."""
    if not isinstance(name, str):
        raise TypeError(f"name must be a string, got {name!r} ({type(name).__name__})")
    parts = PurePosixPath(name).parts
    if (
        not parts
        or name != name.strip()
        or "\0" in name
        or parts[0] == "/"
        or ".." in parts
        or any(len(os.fsencode(p)) > 255 for p in parts)
    ):
        raise ValueError(f"name must name a folder below storage_path, got {name!r:.300}")
    return name


def _seed(config: dict[str, Any], seed: int | None) -> int:
    """The seed of the run, given by itself or in `config`; ValueError for two."""
    given = config.get("seed", seed)
    if seed is not None and given != seed:
        raise ValueError(f'two seeds: config["seed"] = {given!r} and seed={seed!r}; give one of them')
    return require_int("seed", 0 if given is None else given, 0)


def _register(trainable: Any) -> str:
    """Register `trainable` with Tune under a name that no other run of this program has: by their own names, the second of two
    functions that are both called "build" would take the first one's place."""
    wrapped = getattr(trainable, "__name__", type(trainable).__name__)
    name = f"{re.sub(r'[^A-Za-z0-9_-]', '', wrapped)}-{uuid.uuid4().hex[:8]}"
    with _registering:
        tune.register_trainable(name, trainable)
    return name


def _length(
    trainable: Any, total_steps: int | None, epochs: float | None, hours: float | None, config: dict[str, Any], storage: str,
    name: str, search: dict[str, Any], reuse_actors: bool,
) -> int:  # fmt: skip
    """Optimizer steps of the run, of which one of the three is given; what had to be measured is told."""
    given = {"total_steps": total_steps, "epochs": epochs, "hours": hours}
    if sum(value is not None for value in given.values()) != 1:
        raise TypeError(f"give one of total_steps, epochs and hours, got {given}")
    from autolrs_ray.driver.lengths import steps_of_epochs, steps_of_hours

    clock = search.get("time_attr", "step")
    with _settings(RAY_AIR_NEW_OUTPUT="0"):
        if epochs is not None:
            total, told = steps_of_epochs(trainable, epochs, config, storage, clock, search)
        else:
            assert hours is not None
            total, told = steps_of_hours(trainable, hours, config, storage, name, clock, search, reuse_actors)
    print(f"AutoLRS: {told}", file=Stderr())
    return total


def _trial_name(trial: Trial) -> str:
    """The arm's name and the trial's own id: s003p07_1a2b3_00042."""
    arm = trial.config.get(CONFIG_KEY)
    label = arm["arm"] if isinstance(arm, dict) else str(arm)
    return re.sub(r"[^A-Za-z0-9_-]", "", f"{label}_{trial.trial_id}")


@contextmanager
def _settings(**values: str) -> Iterator[None]:
    """Environment variables that Tune reads, unless the user has set them; put back afterwards."""
    ours = {name: value for name, value in values.items() if name not in os.environ}
    os.environ.update(ours)
    try:
        yield
    finally:
        for name in ours:
            os.environ.pop(name, None)
