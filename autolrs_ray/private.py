"""The places where the pair reaches past Ray's public interface. Nothing else in the package does.

Each has a fall-back for a Ray that lacks them: a run then goes on in a slower or plainer way. The one thing that a run cannot
do without, starting a trial from a checkpoint of our choice, is refused by name where no way is left.
"""

from __future__ import annotations

import json
import logging
import os
import re
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import ray
from ray.tune import Checkpoint
from ray.tune.experiment import Trial

if TYPE_CHECKING:
    from ray.tune.execution.tune_controller import TuneController

logger = logging.getLogger(__name__)


def _expected(record: logging.LogRecord) -> bool:
    """Tune looks for log files of every trial that starts from a checkpoint, and in the end of every trial; new trials
    have none, and neither has the one that a resumed run drops."""
    message = record.getMessage()
    return "Remote file not found" not in message and "Failed to fetch metrics" not in message


for _name in ("ray.tune.logger.logger", "ray.tune.analysis.experiment_analysis"):
    logging.getLogger(_name).addFilter(_expected)


def controller_of(given: Any) -> Any:
    """Tune's controller, out of what a scheduler is given: some versions wrap it."""
    return getattr(given, "_tune_controller", given)


def set_source(trial: Trial, checkpoint: Checkpoint | None, metrics: dict[str, Any]) -> None:
    """Let `trial` restore from `checkpoint` when it starts next (None: from nothing), as PBT does.

    Where the place that PBT writes to is gone, the checkpoint is registered as one of the trial's own. Raises RuntimeError
    where the trial would start from anything else.
    """
    # Tune's counts go on from here; loggers draw against the number of reports, and W&B drops what is not above the last.
    counts = {key: trial.last_result[key] for key in _COUNTS if key in (trial.last_result or {})}
    try:
        source = None if checkpoint is None else _training_result(checkpoint, {**counts, **metrics})
        manager = trial.run_metadata.checkpoint_manager
        if hasattr(manager, "_latest_checkpoint_result"):
            manager._latest_checkpoint_result = source
        elif source is not None:
            trial.on_checkpoint(source)
    except (ImportError, AttributeError, TypeError) as error:
        logger.debug("this version of Ray has another place for a trial's checkpoint (%s)", error)
    found = trial.checkpoint
    if (found and found.path) != (checkpoint and checkpoint.path):
        raise RuntimeError(
            f"Ray {ray.__version__} does not let AutoLRS start a trial from a checkpoint of its choice: {trial} would start "
            f"from {found} in place of {checkpoint}. Install the version of constraints.txt"
        )


_COUNTS = ("training_iteration", "time_total_s")


def _training_result(checkpoint: Checkpoint, metrics: dict[str, Any]) -> Any:
    from ray.train._internal.checkpoint_manager import _TrainingResult

    return _TrainingResult(checkpoint=checkpoint, metrics=metrics)


def actor_of(trial: Trial) -> Any:
    """The handle of the actor that runs `trial`; None if there is none, or this Ray does not tell."""
    return getattr(getattr(trial, "temporary_state", None), "ray_actor", None)


def saver_of(controller: TuneController) -> Callable[..., Any] | None:
    """What has Tune write a checkpoint of a running trial, which goes on: called with the trial, and `result`, its last one.
    None if this Ray does not offer it: then the trial is to be paused, which writes one too."""
    save: Callable[..., Any] | None = getattr(controller, "_schedule_trial_save", None)
    if save is None:
        logger.debug("this version of Ray writes checkpoints of paused trials only")
    return save


def set_status(controller: TuneController, trial: Trial, status: str) -> bool:
    """Have Tune count `trial`, which has ended, as one of `status`. False if this Ray does not offer it: then `tune.run`
    names the trials that failed at its end."""
    change = getattr(controller, "_set_trial_status", None)
    if change is None:
        logger.debug("this version of Ray does not let AutoLRS book a failed trial as ended")
        return False
    change(trial, status)
    return True


def checkpoints_kept(trial: Trial) -> int | None:
    """How many checkpoints of `trial` Tune keeps, and deletes the others; None for all, and where this Ray does not tell."""
    try:
        kept: int | None = trial.run_metadata.checkpoint_manager.checkpoint_config.num_to_keep
    except AttributeError as error:
        logger.debug("this version of Ray does not tell which checkpoints it deletes (%s)", error)
        return None
    return kept


def drop_windows(trial: Trial) -> None:
    """Let go of the last five and ten values of every metric, about 1 kB each, which Tune keeps of a `trial` for as long as
    the run lasts; their averages stay. For trials that have ended."""
    try:
        trial.run_metadata.metric_n_steps.clear()
    except AttributeError as error:
        logger.debug("this version of Ray keeps no such values (%s)", error)


def starting_actor(controller: TuneController, trial: Trial) -> Any:
    """The actor that pending `trial` has resources for, and which is being made or reset; None while it waits for those."""
    try:
        tracked = controller._trial_to_actor.get(trial)
        manager = controller._actor_manager
        if tracked is None or not manager.is_actor_started(tracked):
            return None
        return manager._live_actors_to_ray_actors_resources[tracked][0]
    except (AttributeError, KeyError, TypeError) as error:
        logger.debug("this version of Ray does not let AutoLRS see which actors are being made (%s)", error)
        return None


def sent_by_ray() -> bool:
    """True while Ray pickles a value to send it, and counts the references in it; False for any other pickling."""
    try:
        from ray._private.worker import global_worker

        return bool(global_worker.get_serialization_context().is_in_band_serialization())
    except Exception:  # not connected, or another Ray: then no reference is sent, and storage is read
        return False


def keep_actors_warm(controller: TuneController, resources: Any, slots: int, more: int) -> bool:
    """Let Tune cache one idle actor with `resources` per slot, `more` than before, and start as many at a time. False if
    this Ray does not offer it: then probes still run, on new actors."""
    try:
        if controller._reuse_actors:
            controller._actor_cache.increase_max(resources, more)
        controller._max_pending_trials = max(controller._max_pending_trials, slots)
    except (AttributeError, TypeError) as error:
        logger.warning("this version of Ray does not let AutoLRS keep its actors warm (%s)", error)
        return False
    return True


def unstage(controller: TuneController, trial: Trial) -> bool:
    """Have pending `trial` wait for no resources any more: it is PAUSED afterwards. False if this Ray does not offer it."""
    try:
        if trial in controller._trial_to_actor:
            controller.pause_trial(trial, should_checkpoint=False)
        else:
            controller._set_trial_status(trial, Trial.PAUSED)
        if trial in controller._staged_trials:
            controller._staged_trials.remove(trial)
            controller._actor_cache.decrease_max(trial.placement_group_factory)
    except (AttributeError, TypeError) as error:
        logger.warning("this version of Ray does not let AutoLRS take back what a trial waits for (%s)", error)
        return False
    return True


def use_idle_workers(controller: TuneController, trainable: type) -> bool:
    """Let actors of `trainable` begin in processes that Ray keeps ready, with what these have imported, if its attribute
    `idle_workers` is true. False if they do not.

    Tune gives every actor an environment variable against a fault of Lightning's, and Ray gives an actor with variables of
    its own a new process. Where Tune has the user's variables to pass on, that stays so.
    """
    try:
        from ray.tune.execution.class_cache import ENV_VARS_TO_PROPAGATE

        if not getattr(trainable, "idle_workers", False) or any(name in os.environ for name in ENV_VARS_TO_PROPAGATE):
            return False
        controller._class_cache._cache.setdefault(trainable, ray.remote(trainable))
    except (ImportError, AttributeError, TypeError) as error:
        logger.warning("this version of Ray does not let AutoLRS use idle processes (%s)", error)
        return False
    return True


def nodes_starting() -> int | None:
    """How many nodes the cluster's autoscaler is starting just now. None where there is none, where it has said nothing yet,
    in the first seconds of a cluster, and where this Ray does not tell."""
    try:
        from ray._private.ray_constants import DEBUG_AUTOSCALING_STATUS
        from ray.autoscaler.v2.sdk import get_cluster_status
        from ray.autoscaler.v2.utils import is_autoscaler_v2
        from ray.experimental.internal_kv import _internal_kv_get

        if is_autoscaler_v2():
            status = get_cluster_status(ray.get_runtime_context().gcs_address)
            types = [node.ray_node_type_name for node in (*status.active_nodes, *status.idle_nodes)]
            starting = len(status.pending_nodes) + sum(launch.count for launch in status.pending_launches)
        else:
            report = json.loads(_internal_kv_get(DEBUG_AUTOSCALING_STATUS) or "{}").get("autoscaler_report") or {}
            types = [*report.get("active_nodes", ()), *(report.get("node_type_mapping") or {}).values()]
            starting = len(report.get("pending_nodes", ())) + sum(report.get("pending_launches", {}).values())
    except Exception as error:  # whatever another Ray says instead: the run goes on with the nodes that are there
        logger.debug("what the autoscaler does cannot be read: %s", error)
        return None
    # Ray's monitor runs on every cluster: where it starts no nodes, each has a type of its own, "node_" and its id
    return starting if any(not re.fullmatch("node_[0-9a-f]{56}", kind) for kind in types) else None
