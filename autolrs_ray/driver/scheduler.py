"""AutoLRSScheduler: maps the policy's verdicts to Tune's verbs. It keeps no durable state."""

from __future__ import annotations

import logging
import threading
import time
from collections import Counter
from functools import partial
from typing import TYPE_CHECKING, Any

from ray.tune.experiment import Trial
from ray.tune.schedulers import TrialScheduler
from ray.tune.trainable.function_trainable import FunctionTrainable

from autolrs_ray.core.paper import surrogate
from autolrs_ray.core.policy import AutoLRSError, Verdict
from autolrs_ray.core.segments import Segment
from autolrs_ray.driver.clocks import Clocks
from autolrs_ray.driver.keeper import CheckpointKeeper
from autolrs_ray.driver.reports import error_of
from autolrs_ray.driver.searcher import CONFIG_KEY, LR_KEY, PAIR_HELP, AutoLRSSearch
from autolrs_ray.driver.slots import Slots
from autolrs_ray.driver.watchdog import Watchdog
from autolrs_ray.private import drop_windows, keep_actors_warm, set_source, starting_actor, use_idle_workers
from autolrs_ray.record.mirror import Mirror
from autolrs_ray.trial.trainable import writes_manifests

if TYPE_CHECKING:
    from ray.tune.execution.tune_controller import TuneController

logger = logging.getLogger(__name__)

HOLD_S = 20.0  # longest a finished trial keeps its actor while another waits for one of its own


class AutoLRSScheduler(TrialScheduler):
    """Scheduler half of the pair; give it to Tune together with :class:`AutoLRSSearch`. It takes no arguments.

    It starts every trial from the checkpoint its segment names, pauses the main trial so that its slot serves probes,
    keeps finished probes' actors warm, and raises, naming the state, when nothing can make progress.
    """

    _supports_buffered_results = False  # what a report decides is of the state that was reported

    def __init__(self) -> None:
        super().__init__()
        self._search: AutoLRSSearch | None = None
        self._properties: tuple[str | None, str | None] = (None, None)
        self._live: dict[str, Trial] = {}
        self._held: dict[str, Trial] = {}
        self._keeper: CheckpointKeeper  # these three from the first trial on
        self._watchdog: Watchdog
        self._slots: Slots
        self._reported: set[str] = set()
        self._restarts: Counter[str] = Counter()  # arm -> its trials that failed before they ran
        self._damage = ""  # of the checkpoint that a trial was to start from
        self._went_back = 0
        self._clocks = Clocks()
        self._actors: dict[tuple[str, int], str] = {}  # node and process -> the trial last seen there
        self._resources: Any = None
        self._max_failures = 0
        self._function_api = False
        self._counts: tuple[int, int, float] = (0, 0, 0.0)

    def __getstate__(self) -> dict[str, Any]:
        return {}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__()  # type: ignore[misc]

    def set_search_properties(self, metric: str | None, mode: str | None, **spec: Any) -> bool:
        """Keep TuneConfig's metric and mode for the searcher: Tune tells it none where param_space is empty."""
        self._properties = (metric, mode)
        return True

    # -- binding -------------------------------------------------------------------------------------------------------

    def _bind(self, controller: TuneController, trial: Trial) -> AutoLRSSearch:
        if self._search is not None:
            return self._search
        algorithm: Any = controller.search_alg
        search = algorithm
        while search is not None and not isinstance(search, AutoLRSSearch):
            search = getattr(search, "searcher", None)
        if search is None:
            raise RuntimeError(f"AutoLRSScheduler runs with {type(algorithm).__name__}. {PAIR_HELP}")
        search.set_metric(*self._properties)
        needed = search.policy.trials_needed
        if getattr(algorithm, "total_samples", needed) < needed:
            raise ValueError(
                f"num_samples={algorithm.total_samples} is too small: this run takes at least {needed} trials. "
                "Pass num_samples=-1; AutoLRS ends the run itself."
            )
        self._search = search
        search.bound = True
        search.reconcile = partial(self._look, controller, search)
        return search

    def _open(self, controller: TuneController, search: AutoLRSSearch, trial: Trial) -> None:
        """First trial of this process: open the run folder, count the slots, pin the actors."""
        self._resources, self._max_failures = trial.placement_group_factory, trial.max_failures
        self._function_api = issubclass(trial.get_trainable_cls(), FunctionTrainable)
        self._slots = Slots(search, self._resources)
        storage = trial.storage
        local = storage.storage_filesystem.type_name == "local"
        folder = storage.experiment_fs_path if local else storage.experiment_driver_staging_path
        if not local and search.mirror is None:
            search.mirror = Mirror(storage.storage_filesystem, storage.experiment_fs_path)
        self._keeper = CheckpointKeeper(search, self._live, storage, trial.get_trainable_cls())
        self._watchdog = Watchdog(search, self._live, self._resources, partial(starting_actor, controller))
        search.manifests = writes_manifests(trial.get_trainable_cls())
        if search.open_record(folder):
            search.active = 0
            self._keeper.adopt(folder)
        self._slots.ask()
        keep_actors_warm(controller, self._resources, search.slots, more=search.slots)
        use_idle_workers(controller, trial.get_trainable_cls())
        if getattr(search.policy, "infill", True):  # a race without in-fill LRs proposes none
            # a second, while the actors start; after the record, whose warnings it would silence
            threading.Thread(target=surrogate.preload, daemon=True).start()

    # -- Tune's notices ------------------------------------------------------------------------------------------------

    def on_trial_add(self, tune_controller: TuneController, trial: Trial) -> None:
        controller = getattr(tune_controller, "_tune_controller", tune_controller)
        search = self._bind(controller, trial)
        if self._resources is None:
            self._open(controller, search, trial)
        arm = search.arm_of.get(trial.trial_id)
        if arm is None:  # a trial of an earlier life of this run: its arm gets a new trial
            if not trial.is_finished():
                trial.set_status(Trial.TERMINATED)
            return
        if trial.placement_group_factory != self._resources:
            raise ValueError(
                f"trials ask for different resources ({trial.placement_group_factory.required_resources} and "
                f"{self._resources.required_resources}): probes and the main trial take turns on the same slots, so "
                "resources must not depend on the config"
            )
        self._drop_traces(trial.trial_id)
        self._live[trial.trial_id] = trial
        segment = search.segments[arm]
        if CONFIG_KEY not in trial.config or isinstance(trial.config[CONFIG_KEY], str):
            self._configure(search, trial, segment)

    def _configure(self, search: AutoLRSSearch, trial: Trial, segment: Segment) -> None:
        trial.set_config({**trial.config, LR_KEY: segment.lr_at(segment.start), CONFIG_KEY: segment.to_config()})
        set_source(trial, self._keeper.source(segment.source), {search.time_attr: segment.start})

    def _drop_traces(self, trial_id: str) -> None:
        self._held.pop(trial_id, None)
        self._clocks.drop(trial_id)
        self._reported.discard(trial_id)
        if self._search is not None:
            self._keeper.drop(trial_id)
            self._watchdog.drop(trial_id)

    def on_trial_error(self, tune_controller: TuneController, trial: Trial) -> None:
        search, trial_id, damage = self._search, trial.trial_id, ""
        if search is not None:
            search.reasons[trial_id] = error_of(trial)
            if trial_id in search.arm_of and trial_id not in self._reported:
                damage = self._keeper.damage_of_source(trial)
        if search is not None and damage:
            self._damage = damage
            if trial.status != Trial.ERROR:  # not to be recovered by Tune: it is not the arm that has failed
                search.forget(trial_id)
        elif trial.status == Trial.PENDING:  # it was given an idle actor, which had died, or which cannot be reset
            self._actors.clear()
            self._start_again(trial)
        self._actors = {actor: last for actor, last in self._actors.items() if last != trial.trial_id}
        self._drop_traces(trial.trial_id)

    def _start_again(self, trial: Trial) -> None:
        """Within max_failures, have the arm of a trial that failed before it ran asked for anew: Tune only retries trials
        that fail while they run."""
        search, trial_id = self._search, trial.trial_id
        arm = search.arm_of.get(trial_id) if search else None
        if search is None or arm is None or 0 <= trial.max_failures <= self._restarts[arm]:
            return
        self._restarts[arm] += 1
        search.note("warning", message=f"{arm} failed before it ran, and starts again: {search.reasons[trial_id]}")
        search.forget(trial_id)

    def on_trial_complete(self, tune_controller: TuneController, trial: Trial, result: dict[str, Any]) -> None:
        self._drop_traces(trial.trial_id)

    def on_trial_remove(self, tune_controller: TuneController, trial: Trial) -> None:
        self._drop_traces(trial.trial_id)

    def on_trial_result(self, tune_controller: TuneController, trial: Trial, result: dict[str, Any]) -> str:
        search, trial_id = self._search, trial.trial_id
        arm = search.arm_of.get(trial_id) if search else None
        if search is None or arm is None:
            return self.STOP
        if trial_id in self._held:
            return self.NOOP
        self._actors[str(result.get("node_ip")), int(result.get("pid") or 0)] = trial_id
        try:
            point = search.point(result, arm, trial_id not in self._reported)
            self._watchdog.heard(trial_id, point.step)
            self._reported.add(trial_id)
            self._keeper.heard(trial, result)
            verdict = search.policy.report(arm, point, can_save=self._can_save(result))
            self._clocks.heard(search, trial_id, verdict, result)
        except (AutoLRSError, ValueError, TypeError) as error:
            search.fail(error)
            return self.NOOP
        return self._carry_out(tune_controller, search, trial, verdict, point.step, result)

    def _can_save(self, result: dict[str, Any]) -> bool:
        """Class trainables save when asked; function trainables only by what they attached to this report."""
        return not self._function_api or result.get("checkpoint_dir_name") is not None

    def _carry_out(
        self, controller: Any, search: AutoLRSSearch, trial: Trial, verdict: Verdict, step: int, result: dict[str, Any]
    ) -> str:
        trial_id = trial.trial_id
        if verdict is Verdict.CONTINUE:
            return self.CONTINUE
        if verdict is Verdict.ROLLBACK:
            controller.pause_trial(trial, should_checkpoint=False)
            search.policy.withdraw(search.arm_of[trial_id])
            return self.NOOP
        if verdict is Verdict.FINISH:
            self._held[trial_id] = trial
            return self.NOOP
        if verdict is Verdict.SAVE and self._keeper.commit(trial, step):
            return self.CONTINUE
        self._keeper.expect(trial_id, step, verdict)
        if verdict is Verdict.PAUSE:
            if self._actors_suffice(search):
                return self.PAUSE
            self._held[trial_id] = trial  # paused as soon as the other slots have actors of their own
            return self.NOOP
        if result.get("checkpoint_dir_name") is None:  # a function trainable has attached its checkpoint already
            controller._schedule_trial_save(trial, result=result)
        if verdict is Verdict.SAVE:
            return self.CONTINUE
        self._held[trial_id] = trial
        return self.NOOP

    # -- the heart: called once per controller loop --------------------------------------------------------------------

    def choose_trial_to_run(self, tune_controller: TuneController) -> Trial | None:
        search = self._search
        if search is None:
            return None
        self._look(tune_controller, search)
        if search.fatal is not None:
            search.close()
            self._keeper.let_go()
            raise search.fatal
        self._release(tune_controller, search)
        self._count_active(search)
        search.persist()
        if search.policy.done:
            for trial in list(self._live.values()):
                self._stop(tune_controller, search, trial)
            search.persist()
            search.close()
            self._keeper.let_go()
            return None
        return self._resume(search)

    def _look(self, controller: Any, search: AutoLRSSearch) -> None:
        """Learn of all that has happened since the last loop; an error is kept in `search.fatal`."""
        if search.fatal is not None:
            return
        try:
            self._keeper.collect()
            if self._damage and set(search.arm_of) <= set(self._live):  # or Tune is in the middle of adding trials
                self._go_back(controller, search)
            self._reconcile(controller, search)
            if more := self._slots.recount():
                keep_actors_warm(controller, self._resources, search.slots, more=more)
            self._watchdog.look(self._held, len(self._keeper))
        except AutoLRSError as error:
            search.fail(error)
        self._count_active(search)

    def _count_active(self, search: AutoLRSSearch) -> None:
        holding = [trial for trial_id, trial in self._live.items() if trial_id not in self._held]
        search.active = sum(trial.status in (Trial.RUNNING, Trial.PENDING) for trial in holding)

    def _go_back(self, controller: Any, search: AutoLRSSearch) -> None:
        """A checkpoint was damaged after it had been found whole: as often as a trial may fail, end all trials, and go on
        from the last good one as a run does that is resumed."""
        damage, self._damage = self._damage, ""
        self._went_back += 1
        if 0 <= self._max_failures < self._went_back:
            raise AutoLRSError(
                f"{damage}. No trial can start from it: look at the storage, and run the same command again with "
                'resume="auto" to go on from the last good checkpoint'
            )
        for trial in list(self._live.values()):
            if not trial.is_finished():
                self._stop(controller, search, trial)
        search.go_back()

    def _reconcile(self, controller: Any, search: AutoLRSSearch) -> None:
        """Some of Tune's failure paths notify nobody: look at the trials themselves."""
        for trial_id, trial in list(self._live.items()):
            if not trial.is_finished():
                if trial.status == Trial.PAUSED and not search.policy.is_open(search.arm_of[trial_id]):
                    self._stop(controller, search, trial)  # dropped while it waited
                continue
            error = error_of(trial) if trial.status == Trial.ERROR else "it ended early"
            if "reset_config" in error:
                raise AutoLRSError(
                    f"{trial.trainable_name} cannot be reused: its reset_config returns False. Implement it (take the new "
                    "config, return True) or run with reuse_actors=False."
                )
            search.book_failure(trial_id, error)
            self._live.pop(trial_id)
            self._drop_traces(trial_id)
            if trial.status == Trial.ERROR and search.fatal is None:
                # the run goes on; tune.run would raise at its end
                controller._set_trial_status(trial, Trial.TERMINATED)

    def _actors_suffice(self, search: AutoLRSSearch) -> bool:
        """False while side-by-side trials are still waiting for actors of their own.

        Tune gives an actor that is free to the next pending trial and cancels the one being started for it: trials
        that end before their neighbours' actors are up would make all of them queue on the first actor.
        """
        pending = [trial for trial in self._live.values() if trial.status == Trial.PENDING]
        count = (len(pending), len(self._actors))
        if count != self._counts[:2]:
            self._counts = (*count, time.monotonic())
        if len(self._actors) >= min(search.slots, search.policy.breadth):
            return True
        alone = all(search.segments[search.arm_of[trial.trial_id]].role == "main" for trial in pending)
        return (alone and not search.policy.wanted()) or time.monotonic() - self._counts[2] > HOLD_S

    def _release(self, controller: Any, search: AutoLRSSearch) -> None:
        """Let go of finished trials once all slots have actors, so that theirs serve the next trials."""
        if not self._held or not self._actors_suffice(search):
            return
        for trial_id, trial in list(self._held.items()):
            verdict = self._keeper.verdict_of(trial_id)
            if trial.is_saving:
                continue
            if verdict is None:
                self._stop(controller, search, trial)
            elif verdict is Verdict.PAUSE:
                del self._held[trial_id]
                controller.pause_trial(trial)

    def _stop(self, controller: Any, search: AutoLRSSearch, trial: Trial) -> None:
        search.forget(trial.trial_id)
        self._live.pop(trial.trial_id, None)
        controller.stop_trial(trial)
        drop_windows(trial)
        self._drop_traces(trial.trial_id)

    def _resume(self, search: AutoLRSSearch) -> Trial | None:
        """Give the most urgent segment of a paused trial to it, if a slot is free."""
        if search.active >= search.slots or search.promoting:
            return None
        trial_of = {arm: trial_id for trial_id, arm in search.arm_of.items()}
        for segment in search.policy.wanted():
            trial = self._live.get(trial_of.get(segment.arm, ""))
            if trial is None:
                return None  # an arm without a trial comes first: suggest() gives it one
            if trial.status == Trial.PAUSED and not trial.is_saving:
                search.policy.issue(segment.arm)
                search.segments[segment.arm] = segment
                self._configure(search, trial, segment)
                self._reported.discard(trial.trial_id)
                return trial
        return None

    def debug_string(self) -> str:
        if self._search is None:
            return "AutoLRS: not started"
        progress = self._search.policy.progress()
        return (
            f"AutoLRS {self._search.policy_name}: {progress['phase']}, stage {progress['stage'] + 1}/{progress['stages']}, "
            f"step {progress['step']}/{progress['total_steps']}, {progress['resolved']}/{progress['trials']} trials resolved, "
            f"{self._search.active} of {self._search.slots} slots busy, {len(self._keeper)} checkpoints being written"
        )
