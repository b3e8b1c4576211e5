"""AutoLRSSearch: the Tune searcher that owns the policy, the journal and all durable state."""

from __future__ import annotations

import json
import logging
import math
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ray.tune.search import Searcher
from ray.tune.search.sample import Domain, Float, LogUniform

from autolrs_ray.core.checks import require_bool, require_float, require_int, validate_interval
from autolrs_ray.core.paper.policy import PaperPolicy
from autolrs_ray.core.policies import make_policy
from autolrs_ray.core.policy import AutoLRSError, Point, Policy
from autolrs_ray.core.race.policy import AnchoredPolicy
from autolrs_ray.core.segments import Segment
from autolrs_ray.driver.environment import environment
from autolrs_ray.driver.nodes import require_shared
from autolrs_ray.driver.reports import ReportKeys, point_of
from autolrs_ray.record.checkpoints import MANIFEST_FILE, CheckpointError, verify_checkpoint
from autolrs_ray.record.journal import finite
from autolrs_ray.record.mirror import Mirror, RunTakenError
from autolrs_ray.record.record import Record

logger = logging.getLogger(__name__)

CONFIG_KEY = "autolrs"
LR_KEY = "lr"
PAIR_HELP = "Pass search_alg=AutoLRSSearch(...) and scheduler=AutoLRSScheduler() together, with num_samples=-1"


class AutoLRSSearch(Searcher):
    """Searcher half of the pair; give it to Tune together with :class:`AutoLRSScheduler` and ``num_samples=-1``.

    total_steps: optimizer steps of the main training. policy: "anchored" (a race of LRs under a warm-up and a decay
    envelope) or "paper" (Algorithm 1 of AutoLRS, Jin et al. 2021).
    lr_interval: (min, max); None takes it from ``param_space={"lr": tune.loguniform(min, max)}``, else the policy's own
    default. metric, mode: the validation metric ("val_loss", "min"); None takes TuneConfig's.
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

    Options of policy="paper": stage_steps (tau), max_stage_steps (tau_max), probe_steps (tau'), warmup_steps, warmup_lr,
    num_lrs (k), kappa, initial, fit, series, probe_reports, main_reports, promote, envelope.
    Options of policy="anchored": effort ("thorough" or "thrifty"), num_lrs, envelope, warmup, rungs, tolerances, drift,
    settled, early, infill, finalists, branches, averaging, reports, commits.
    See :class:`~autolrs_ray.core.paper.policy.PaperPolicy`, :class:`~autolrs_ray.core.race.policy.AnchoredPolicy`.

    Raises TypeError or ValueError, naming the value, for anything out of range.
    """

    def __init__(
        self,
        total_steps: int,
        *,
        policy: str = "anchored",
        lr_interval: tuple[float, float] | None = None,
        metric: str | None = None,
        mode: str | None = None,
        time_attr: str = "step",
        train_metric: str = "train_loss",
        averaged_metric: str | None = None,
        seed: int = 0,
        slots: int | None = None,
        resume: bool | str = False,
        extend: bool = False,
        report_timeout_s: float = 900.0,
        resource_timeout_s: float = 60.0,
        **options: Any,
    ) -> None:
        if mode not in (None, "min", "max"):
            raise ValueError(f'mode must be "min" or "max", got {mode!r}')
        if not isinstance(resume, bool) and resume != "auto":
            raise ValueError(f'resume must be False, True or "auto", got {resume!r}')
        require_bool("extend", extend)
        for name, key in (("metric", "val_loss" if metric is None else metric), ("time_attr", time_attr),
                          ("train_metric", train_metric),
                          ("averaged_metric", "averaged" if averaged_metric is None else averaged_metric)):  # fmt: skip
            if not isinstance(key, str) or not key:
                raise TypeError(f"{name} must be the name of a result key, got {key!r}")
        if slots is not None:
            require_int("slots", slots, 1)
        super().__init__(metric=metric, mode=mode)
        self._metric: str | None = metric
        self._mode: str | None = mode
        self.total_steps, self.policy_name, self.options = total_steps, policy, options
        self.lr_interval = None if lr_interval is None else validate_interval(lr_interval)
        self.time_attr, self.train_metric, self.averaged_metric = time_attr, train_metric, averaged_metric
        self.seed, self.resume, self.extend = seed, resume, extend
        self.report_timeout_s = require_float("report_timeout_s", report_timeout_s, 0.0, math.inf, low_open=True)
        self.resource_timeout_s = require_float("resource_timeout_s", resource_timeout_s, 0.0, math.inf)
        self.max_slots = slots
        self.slots = 1  # until the scheduler has seen the resources of a trial
        self.later_slots: int | None = None  # how many a cluster that grows may come to have
        self.bound = False  # the scheduler has found us
        self.fatal: Exception | None = None
        self.arm_of: dict[str, str] = {}
        self.segments: dict[str, Segment] = {}
        self.active = 0  # trials that hold a slot; the scheduler keeps it
        self.reconcile: Callable[[], None] | None = None  # the scheduler's look at trials that ended unnoticed
        self.at_end: Callable[[], None] | None = None  # the scheduler's withdrawal of what it asked the cluster for
        self.reasons: dict[str, str] = {}  # trial -> the last line of its error
        self.manifests = False  # checkpoints have one, or are damaged; the scheduler sets it
        self.promoting = False  # a probe's end state is being written; the scheduler keeps it
        self._restored: dict[str, Any] | None = None
        self.mirror: Mirror | None = None  # the run's folder, where that is not a local one
        self._record: Record | None = None
        self._policy: Policy | None = None
        self._build()  # bad options are to raise here, not minutes later

    # -- set-up --------------------------------------------------------------------------------------------------------

    @property
    def policy(self) -> Policy:
        if self._policy is None:
            self._policy = self._build()
        return self._policy

    def _build(self, total_steps: int | None = None) -> Policy:
        floor = None if self.mode == "max" else 0.0
        return make_policy(
            self.policy_name,
            total_steps or self.total_steps,
            self.lr_interval,
            self.seed,
            self.slots,
            floor,
            **self.options,
        )

    @property
    def loss_key(self) -> str:
        return self.metric or "val_loss"

    @property
    def averaged_key(self) -> str:
        return self.averaged_metric or f"averaged_{self.loss_key.removeprefix('val_')}"

    def set_search_properties(self, metric: str | None, mode: str | None, config: dict[str, Any], **spec: Any) -> bool:
        """Take metric and mode from TuneConfig and the interval from ``param_space["lr"]``."""
        self.set_metric(metric, mode)
        domain = config.get(LR_KEY)
        if isinstance(domain, Domain):
            if not (isinstance(domain, Float) and isinstance(domain.sampler, LogUniform)):
                raise ValueError(
                    f'param_space["{LR_KEY}"] must be tune.loguniform(min_lr, max_lr): it is taken as the interval of the '
                    f"search; got {domain}"
                )
            interval = (float(domain.lower), float(domain.upper))
            if self.lr_interval not in (None, interval):
                raise ValueError(f'two intervals: lr_interval={self.lr_interval} and param_space["lr"]={interval}')
            self.lr_interval = validate_interval(interval)
        elif domain is not None:
            raise ValueError(
                f'param_space["{LR_KEY}"] = {domain!r} would be overwritten: leave it out, or give the interval as '
                "tune.loguniform(min_lr, max_lr)"
            )
        return True

    def set_metric(self, metric: str | None, mode: str | None) -> None:
        """Set what the constructor left open; ValueError if it says otherwise."""
        for name, ours, theirs in (("metric", self._metric, metric), ("mode", self._mode, mode)):
            if ours is not None and theirs is not None and ours != theirs:
                raise ValueError(f"two values for {name}: {ours!r} in AutoLRSSearch and {theirs!r} in TuneConfig")
        self._metric, self._mode = self._metric or metric, self._mode or mode
        if self._mode == "max" and isinstance(self._policy, PaperPolicy):
            self._policy.floor = None

    def set_max_concurrency(self, max_concurrent: int) -> bool:
        """Cap the slots ourselves: Tune's limiter would count the paused main trial."""
        self.max_slots = max_concurrent if self.max_slots is None else min(self.max_slots, max_concurrent)
        return True

    def open_record(self, folder: str | os.PathLike[str]) -> bool:
        """Open the run folder, write the first entry or continue what it holds. True if an earlier run goes on.

        With a `mirror`, that is the run folder, and `folder` is not used. Raises RuntimeError if another process drives the
        run, or if the cluster's nodes do not share the folder.
        """
        if self._record is not None:
            return False
        record = Record(folder if self.mirror is None else tempfile.mkdtemp(prefix="autolrs-"), self.mirror)
        try:
            if self.mirror is None:
                require_shared(record.folder)
            resumed = self._open(record)
        except BaseException:
            record.close()
            raise
        self._record = record
        self.persist()
        return resumed

    def _open(self, record: Record) -> bool:
        if not record.exists():
            if self.resume is True:
                raise FileNotFoundError(f'nothing to resume in {record}; use resume="auto" to start there')
            record.begin({"event": "start", "config": self.describe(), "environment": environment()})
            return False
        if self.resume is False and self._restored is None:
            raise FileExistsError(
                f'{record} holds a run already: pass resume="auto" to continue it, or choose another name'
            )
        saved = record.load_state()
        ours, theirs = self.describe(), saved["config"]
        different = [key for key in ours if ours[key] != theirs.get(key) and key != "slots"]
        extending = self.extend and different == ["total_steps"]
        if extending:
            self._policy, different = self._build(theirs["total_steps"]), []
        if different:
            changes = ", ".join(f"{key}: {theirs.get(key)!r} -> {ours[key]!r}" for key in different)
            raise ValueError(f"cannot resume the run in {record} with other settings ({changes})")
        self.policy.load_state_dict(saved["state"])
        if ours["slots"] != theirs.get("slots"):
            self.policy.set_concurrency(self.slots, self.later_slots)
        self._verify_checkpoints()
        if extending:
            if not isinstance(self.policy, AnchoredPolicy):
                raise ValueError('only policy="anchored" can be extended')
            self.policy.extend(self.total_steps)
        self.arm_of.clear()
        self.segments.clear()
        step = self.policy.progress()["step"]
        record.append([{"event": "resume", "step": step, "environment": environment()}])
        record.write_state(self.describe(), self.policy.state_dict())
        return True

    def damage(self, path: str) -> str:
        """What is wrong on storage with the checkpoint at `path`; "" if nothing. Raises OSError if a store does not answer."""
        try:
            if self.mirror is not None:
                self.mirror.verify(path, self.manifests)
            elif self.manifests or Path(path, MANIFEST_FILE).exists() or not Path(path).is_dir():
                verify_checkpoint(path)
        except CheckpointError as error:
            return str(error)
        return ""

    def _verify_checkpoints(self) -> None:
        """Let go of checkpoints that were cut short or altered since they were written."""
        for path in sorted(self.policy.checkpoints()):
            if damage := self.damage(path):
                logger.warning("%s", damage)
                self.policy.lost(path)

    def go_back(self) -> None:
        """A checkpoint was damaged while the run was under way, and no trial is left: go on as a run does that is resumed."""
        self.persist()
        self.policy.load_state_dict(finite(self.policy.state_dict()))
        self._verify_checkpoints()
        self.arm_of.clear()
        self.segments.clear()
        self.persist()

    def describe(self) -> dict[str, Any]:
        """Everything that decides the run's course, as JSON values."""
        options = {
            k: v if not callable(v) else f"function {getattr(v, '__name__', '')}" for k, v in self.options.items()
        }
        described = dict(
            total_steps=self.total_steps, policy=self.policy_name, lr_interval=self.lr_interval, metric=self.loss_key,
            mode=self.mode or "min", time_attr=self.time_attr, train_metric=self.train_metric,
            averaged_metric=self.averaged_key, seed=self.seed, options=options, slots=self.max_slots,
        )  # fmt: skip
        return json.loads(json.dumps(described))  # type: ignore[no-any-return]

    def persist(self) -> None:
        """Write pending events to the journal and replace the state, if anything has happened.

        Where the disk refuses, nothing more is written, so that the record stays as it is, and the run ends.
        """
        if self._record is None:
            return
        events = self.policy.drain_events()
        if not events:
            return
        try:
            self._record.append(events)
            self._record.write_state(self.describe(), self.policy.state_dict())
        except RunTakenError as error:
            self.close()
            self._record = None
            self.fatal = self.fatal or AutoLRSError(str(error))
        except OSError as error:
            self.close()
            record, self._record = self._record, None
            self.fatal = self.fatal or AutoLRSError(
                f"cannot write the record of the run in {record}: {error.strerror or error}. What it holds is intact: make "
                'room, or mend the disk, and run the same command again with resume="auto"'
            )

    def close(self) -> None:
        if self.at_end is not None:
            self.at_end()
        if self._record is not None:
            self._record.close()

    @property
    def folder(self) -> Path | None:
        return self._record.folder if self._record else None

    def note(self, event: str, **fields: Any) -> None:
        """Add an event of the pair's own (timings, warnings) to the journal."""
        self.policy.emit(event, **fields)

    # -- Tune's side ---------------------------------------------------------------------------------------------------

    def suggest(self, trial_id: str) -> dict[str, Any] | str | None:
        if self.reconcile is not None:  # with no trial left alive Tune calls nothing but suggest()
            self.reconcile()
        if self.fatal is not None:
            self.close()
            raise self.fatal
        if self.arm_of and not self.bound:
            raise RuntimeError(f"AutoLRSSearch runs without its scheduler. {PAIR_HELP}")
        if self.policy.done:
            return Searcher.FINISHED  # type: ignore[no-any-return]
        if self.active >= (self.slots if self.bound else 1):
            return None
        known = set(self.arm_of.values())
        segment = next((s for s in self.policy.wanted() if s.arm not in known), None)
        if segment is None or (segment.role == "main" and self.promoting):
            return None
        self.policy.issue(segment.arm)
        self.arm_of[trial_id], self.segments[segment.arm] = segment.arm, segment
        self.active += 1
        return {LR_KEY: segment.lr_at(segment.start), CONFIG_KEY: segment.arm}

    def on_trial_result(self, trial_id: str, result: dict[str, Any]) -> None:
        if not self.bound:
            raise RuntimeError(f"AutoLRSSearch runs without its scheduler. {PAIR_HELP}")

    def on_trial_complete(self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False) -> None:
        """Tune has ended a trial that the scheduler did not ask to end."""
        arm = self.arm_of.get(trial_id)
        if arm is not None:
            step = (result or {}).get(self.time_attr)
            reason = self.reasons.pop(trial_id, "it raised an error") if error else f"it ended early, at step {step}"
            self.book_failure(trial_id, reason)

    # -- the scheduler's side ------------------------------------------------------------------------------------------

    def forget(self, trial_id: str) -> None:
        """No trial works on this arm any more, and that is as it should be."""
        arm = self.arm_of.pop(trial_id, None)
        if arm is not None:
            self.policy.withdraw(arm)
            self.segments.pop(arm, None)

    def book_failure(self, trial_id: str, reason: str) -> None:
        """A trial ended for good without finishing its segment. Idempotent."""
        arm = self.arm_of.get(trial_id)
        if arm is None:
            return
        self.forget(trial_id)
        try:
            self.policy.failed(arm, reason)
        except AutoLRSError as error:
            self.fail(error if reason in str(error) else AutoLRSError(f"{error} The last failure: {reason}"))
        self.persist()

    def fail(self, error: Exception) -> None:
        """End the run with `error`, raised where Tune lets it through."""
        if self.fatal is None:
            self.fatal = error
            self.note("error", message=str(error))
            self.persist()

    def point(self, result: dict[str, Any], arm: str, first: bool) -> Point:
        """The report of `arm` as a Point; raises ValueError or TypeError that says how to mend the trainable."""
        sign = -1.0 if self.mode == "max" else 1.0
        keys = ReportKeys(self.time_attr, self.loss_key, self.train_metric, self.averaged_key)
        return point_of(result, self.segments[arm], keys, sign, first)

    # -- Tune's snapshots ----------------------------------------------------------------------------------------------

    def save(self, checkpoint_path: str) -> None:
        with open(checkpoint_path, "w") as file:
            json.dump({"config": self.describe(), "state": self.policy.state_dict()}, file)

    def restore(self, checkpoint_path: str) -> None:
        """Continue a snapshot of Tune's. The run folder's own state, written at every decision, goes before it."""
        with open(checkpoint_path) as file:
            saved = json.load(file)
        self._restored = saved
        self.policy.load_state_dict(saved["state"])

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_record": None, "reconcile": None, "at_end": None, "mirror": None}
