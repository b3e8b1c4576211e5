"""AutoLRSSearch: what Tune asks of a searcher, answered from the desk, and the run's arguments."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from ray.tune.search import Searcher

from autolrs_ray.core.policy import Policy
from autolrs_ray.driver.coordinator import Coordinator
from autolrs_ray.driver.desk import Desk
from autolrs_ray.driver.identity import refuse_search_spaces
from autolrs_ray.driver.settings import CONFIG_KEY, LR_KEY, REPORT_TIMEOUT_S, RESOURCE_TIMEOUT_S, RunSettings

if TYPE_CHECKING:
    from ray.tune.execution.tune_controller import TuneController
    from ray.tune.experiment import Trial

USED = "this AutoLRSSearch has driven a run already: make a new one for every tune.run or Tuner"
PAIR_HELP = "Pass search_alg=AutoLRSSearch(...) and scheduler=AutoLRSScheduler() together, with num_samples=-1"


class AutoLRSSearch(Searcher):
    """Searcher half of the pair; give it to Tune together with :class:`AutoLRSScheduler` and ``num_samples=-1``.

    total_steps: optimizer steps of the main training. policy: "anchored" (a race of LRs under a warm-up and a decay
    envelope) or "paper" (Algorithm 1 of AutoLRS, Jin et al. 2021).
    lr_interval: (min, max); "fine-tuning": (1e-6, 1), for weights that are already good; None takes it from
    ``param_space={"lr": tune.loguniform(min, max)}``, else the policy's own default.
    metric, mode: the validation metric ("val_loss", "min"); None takes TuneConfig's.
    time_attr: result key with the optimizer steps done, restored from checkpoints. train_metric, averaged_metric: result
    keys of the mean training loss and of the metric of averaged weights, used where they are reported (None: the metric's, with
    "averaged_" before it or in place of "val_": of "val_loss" that is "averaged_loss").
    slots: trials at the same time; None: as many as the cluster holds, and where it starts nodes by itself, as many as the
    policy can use. policy="paper" plans its probes for the slots a run began with, or may grow to, whatever nodes come and go;
    resumed with another value of `slots`, it plans them anew.
    resume: False refuses a folder with an earlier run, "auto" continues it where there is one, True demands one.
    extend: a run found there, of fewer steps, finished or not, goes on to `total_steps` (envelopes "wsd", "constant").
    report_timeout_s: a probe silent for so long, and for four times as long as the pace of the run so far lets expect, is given
    up, and so is one that has its resources and takes longer than that to start; the main trial's silence ends the run.
    resource_timeout_s: how long trials may wait for resources no node has. While an autoscaler starts nodes, it does not count.
    workers: how many processes train a trial together. "elastic", or (least, most): trials begin with the least, for which the
    trainable asks, and grow into free slots where that saves clearly more than the restart costs. It is the trainable's part to
    train with as many as its resources have bundles for; an AutoLRSTrainable with `workers = None` does.

    batch_growth: {0.5: 2}: from half of the run on every step takes twice as many rows, at the same learning rates; a policy's
    option.
    Options of policy="paper": stage_steps (tau), max_stage_steps (tau_max), probe_steps (tau'), warmup_steps, warmup_lr,
    num_lrs (k), kappa, initial, fit, series, floor, probe_reports, main_reports, promote, envelope, points_to_evaluate.
    Options of policy="anchored": num_lrs, envelope, warmup, commits, run_ahead, points_to_evaluate, keep.
    See :class:`~autolrs_ray.core.paper.policy.PaperPolicy`, :class:`~autolrs_ray.core.race.policy.AnchoredPolicy`.

    Raises TypeError or ValueError, naming the value, for anything out of range.
    """

    def __init__(
        self,
        total_steps: int,
        *,
        policy: str = "anchored",
        lr_interval: tuple[float, float] | str | None = None,
        metric: str | None = None,
        mode: str | None = None,
        time_attr: str = "step",
        train_metric: str = "train_loss",
        averaged_metric: str | None = None,
        seed: int = 0,
        slots: int | None = None,
        resume: bool | str = False,
        extend: bool = False,
        report_timeout_s: float = REPORT_TIMEOUT_S,
        resource_timeout_s: float = RESOURCE_TIMEOUT_S,
        workers: int | str | tuple[int, int] = 1,
        **options: Any,
    ) -> None:
        settings = RunSettings(
            total_steps, policy, lr_interval, metric, mode, time_attr, train_metric, averaged_metric, seed, slots, resume,
            extend, report_timeout_s, resource_timeout_s, workers, options,
        )  # fmt: skip
        super().__init__(metric=metric, mode=mode)
        self.desk = Desk(settings)
        self._coordinator: Coordinator | None = None  # once the scheduler has found us
        self._finished = False  # Tune has been told
        self._refused = ""  # why nothing is to be begun

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_coordinator": None}

    @property
    def policy(self) -> Policy:
        """What decides; `policy.cost(slots)` is the run's greatest cost in full runs."""
        return self.desk.policy

    def coordinate(self, controller: TuneController, first: Trial) -> Coordinator:
        """Begin or continue the run, now that its first trial is there; for the scheduler."""
        if self._coordinator is not None:
            self.close()
            raise RuntimeError(USED)
        self._coordinator = Coordinator(self.desk, controller, first)
        return self._coordinator

    def close(self) -> None:
        """Give the run folder free for another process."""
        if self._coordinator is not None:
            self._coordinator.close()
        self.desk.close()

    # -- Tune's questions ----------------------------------------------------------------------------------------------

    def set_search_properties(self, metric: str | None, mode: str | None, config: dict[str, Any], **spec: Any) -> bool:
        """Take metric and mode from TuneConfig and the interval from ``param_space["lr"]``."""
        self.desk.take_metric(metric, mode)
        self.desk.take_interval(config.get(LR_KEY))
        refuse_search_spaces(config)
        return True

    def set_max_concurrency(self, max_concurrent: int) -> bool:
        """Cap the slots ourselves: Tune's limiter would count the paused main trial."""
        self.desk.settings.cap_slots(max_concurrent)
        return True

    def suggest(self, trial_id: str) -> dict[str, Any] | str | None:
        if self._refused:
            raise RuntimeError(self._refused)
        if self._coordinator is not None:  # with no trial left alive Tune calls nothing but suggest()
            self._coordinator.look()
        if self.desk.failure is not None:
            self.close()
            raise self.desk.failure
        if self.desk.trials and self._coordinator is None:
            raise RuntimeError(f"AutoLRSSearch runs without its scheduler. {PAIR_HELP}")
        if self.policy.done:
            if self._finished:  # Tune asks no more in the experiment that was told so
                raise RuntimeError(USED)
            self._finished = True
            return Searcher.FINISHED  # type: ignore[no-any-return]
        segment = self.desk.assign(trial_id)
        return None if segment is None else {LR_KEY: segment.lr_at(segment.start), CONFIG_KEY: segment.arm}

    def on_trial_result(self, trial_id: str, result: dict[str, Any]) -> None:
        if self._coordinator is None:
            raise RuntimeError(f"AutoLRSSearch runs without its scheduler. {PAIR_HELP}")

    def on_trial_complete(self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False) -> None:
        """Tune has ended a trial that the scheduler did not ask to end."""
        if error:
            reason = self.desk.reason(trial_id) or "it raised an error"
        else:
            step = (result or {}).get(self.desk.settings.time_attr)
            when = "before its first report" if step is None else f"at step {step} of {self.policy.total_steps}"
            reason = (
                f"it ended early, {when}: by returning or reporting done, a stop "
                "criterion of Tune's, or an early-stopping callback or limit of its own"
            )
        self.desk.book_failure(trial_id, reason)

    # -- Tune's snapshots ----------------------------------------------------------------------------------------------

    def save(self, checkpoint_path: str) -> None:
        with open(checkpoint_path, "w") as file:
            json.dump({"config": self.desk.settings.describe(), "state": self.policy.state_dict()}, file)

    def restore(self, checkpoint_path: str) -> None:
        """Continue a snapshot that `save` wrote, on a new instance. The run folder's own state, written at every decision, goes
        before it."""
        with open(checkpoint_path) as file:
            saved = json.load(file)
        self.desk.restore(saved["state"])

    def restore_from_dir(self, checkpoint_dir: str) -> None:
        """Refuse Tune's own resume: it would copy old files of the run over newer ones. Raises RuntimeError, which Tune logs,
        and so does every call of `suggest`, as Tune then begins anew with half of the old state."""
        self._refused = (
            "a run of AutoLRS is not continued by resume=True of tune.run or by Tuner.restore: run the same command without "
            'them, with AutoLRSSearch(..., resume="auto")'
        )
        raise RuntimeError(self._refused)

    def debug_string(self) -> str:
        progress, desk = self.policy.progress(), self.desk
        saving = 0 if self._coordinator is None else len(self._coordinator)
        return (
            f"AutoLRS {desk.settings.policy_name}: {progress['phase']}, stage {progress['stage'] + 1}/{progress['stages']}, "
            f"step {progress['step']}/{progress['total_steps']}, {progress['resolved']}/{progress['trials']} trials resolved, "
            f"{desk.capacity.busy} of {desk.capacity.slots} slots busy, {saving} checkpoints being written"
        )
