"""The coordinator: sees to it that trials train what the policy wants, and maps its verdicts to Tune's verbs."""

from __future__ import annotations

import threading
from functools import partial
from typing import TYPE_CHECKING, Any

from ray.tune.experiment import Trial
from ray.tune.schedulers import TrialScheduler
from ray.tune.trainable.function_trainable import FunctionTrainable

from autolrs_ray.core.events import Event
from autolrs_ray.core.paper import surrogate
from autolrs_ray.core.policy import AutoLRSError, Verdict
from autolrs_ray.core.segments import Segment
from autolrs_ray.driver.actors import Actors
from autolrs_ray.driver.advice import GrowthAdvice
from autolrs_ray.driver.clocks import Clocks
from autolrs_ray.driver.crashes import crash_of
from autolrs_ray.driver.desk import Desk
from autolrs_ray.driver.elastic import Elastic
from autolrs_ray.driver.failures import Failures, no_reset
from autolrs_ray.driver.identity import subject
from autolrs_ray.driver.keeper import CheckpointKeeper
from autolrs_ray.driver.nodes import node_resources, trials_that_fit
from autolrs_ray.driver.refusals import refuse_unfit
from autolrs_ray.driver.reports import refuse_unsaved, too_seldom
from autolrs_ray.driver.settings import CONFIG_KEY, LR_KEY
from autolrs_ray.driver.slots import Slots
from autolrs_ray.driver.watchdog import Watchdog
from autolrs_ray.private import (
    drop_windows,
    saver_of,
    set_source,
    set_status,
    starting_actor,
    use_idle_workers,
)
from autolrs_ray.record.mirror import Mirror
from autolrs_ray.trial.check import ReportsOfOneTask, check_first_trial
from autolrs_ray.trial.trainable import writes_manifests

if TYPE_CHECKING:
    from ray.tune.execution.tune_controller import TuneController

MOST_AT_ONE_STEP = 10  # reports in a row of the same step: a trial that does not count its steps trains for ever
_driving: dict[str, Coordinator] = {}  # run folder -> who has it open in this process


class Coordinator:
    """The trials of a run from the first one on, with the keeper of their checkpoints, the watchdog, the slots, the actors
    and the clocks. It keeps no durable state.

    first: any trial; all have its resources, its class and its storage.
    """

    def __init__(self, desk: Desk, controller: TuneController, first: Trial) -> None:
        self._desk, self._controller = desk, controller
        refuse_unfit(first)
        bundle = first.placement_group_factory.bundles[-1]
        rows, warnings = check_first_trial(first.get_trainable_cls(), first.config, bundle)
        if rows:  # more workers than rows there cannot be
            desk.settings.cap_units(rows // desk.settings.least_workers)
        self._resources, self._max_failures = first.placement_group_factory, first.max_failures
        if self._resources.strategy == "STRICT_PACK" and desk.settings.elastic:  # no more than one node holds
            desk.settings.cap_units(max(trials_that_fit(self._resources, [node]) for node in node_resources()))
        trainable, storage = first.get_trainable_cls(), first.storage
        self._function_api = issubclass(trainable, FunctionTrainable)
        self._live: dict[str, Trial] = {}
        self._held: dict[str, Trial] = {}  # finished, or to be paused, as soon as their actors are wanted
        self._steps: dict[str, tuple[int, int]] = {}  # since a start: step of the last report, and how often it came
        self._failures = Failures(desk, first.max_failures)
        self._savers: set[str] = set()  # trials that have attached a checkpoint to a report
        self._task = ReportsOfOneTask(trainable)
        self._said_spacing = False
        self._damage = ""  # of the checkpoint that a trial was to start from
        self._went_back = 0
        self._clocks, self._actors = Clocks(desk), Actors(desk, self._resources)
        self._slots = Slots(desk, self._resources)
        local = storage.storage_filesystem.type_name == "local"
        folder = storage.experiment_fs_path if local else storage.experiment_driver_staging_path
        if not local:
            desk.stored.keep_on(Mirror(storage.storage_filesystem, storage.experiment_fs_path))
        self._place, self._thread = storage.experiment_fs_path, threading.current_thread()
        self._evict()
        self._keeper = CheckpointKeeper(desk, self._live, storage, trainable)
        self._starting = partial(starting_actor, controller)
        self._watchdog = Watchdog(desk, self._live, self._resources, self._starting)
        desk.stored.expect_manifests(writes_manifests(trainable))
        try:
            if desk.open_record(folder, subject(trainable, first.config)):
                self._keeper.adopt(folder)
        except BaseException:
            del _driving[self._place]
            raise
        for warning in warnings:
            desk.warn(warning)
        self._slots.ask()
        self._elastic = Elastic(desk, controller, self._resources, self._live, rows is None)
        self._elastic.settle()
        self._advice = GrowthAdvice(desk.policy)
        use_idle_workers(controller, trainable)
        if desk.settings.policy_name == "paper":  # the race proposes none
            # a second, while the actors start; after the record, whose warnings it would silence
            threading.Thread(target=surrogate.preload, daemon=True).start()

    def _evict(self) -> None:
        """Take our folder. A run in it that a Tune in this process drove, and left when it was interrupted or out of time, is
        closed."""
        other = _driving.setdefault(self._place, self)  # two threads may begin at once
        if other is self:
            return
        if other._thread is not self._thread and other._thread.is_alive():
            raise RuntimeError(
                f"another thread of this process drives the run in {self._place}; wait for it, or choose another name"
            )
        other.close()
        _driving[self._place] = self

    def __len__(self) -> int:
        """Checkpoints that are being written."""
        return len(self._keeper.saving)

    def close(self) -> None:
        """The run is over, or ends with an error: let go of what is held outside of this process."""
        self._slots.withdraw()
        self._keeper.let_go()
        self._desk.close()
        if _driving.get(self._place) is self:
            del _driving[self._place]

    # -- what Tune tells -----------------------------------------------------------------------------------------------

    def add(self, trial: Trial) -> None:
        """A trial waits to be started."""
        if not self._desk.knows(trial.trial_id):
            # of an earlier life of this run: its arm gets a new trial. One that Tune means to start again, though its arm has
            # been booked as failed, is in Tune's tables, and is stopped in the next loop
            if trial.trial_id not in self._live and not trial.is_finished():
                trial.set_status(Trial.TERMINATED)
            return
        again = trial.trial_id in self._live  # Tune tries it once more, with the workers that it has grown to
        if not again and trial.placement_group_factory != self._resources:
            raise ValueError(
                f"trials ask for different resources ({trial.placement_group_factory.required_resources} and "
                f"{self._resources.required_resources}): probes and the main trial take turns on the same slots, so "
                "resources must not depend on the config"
            )
        self._drop_traces(trial.trial_id)
        self._live[trial.trial_id] = trial
        if CONFIG_KEY not in trial.config or isinstance(trial.config[CONFIG_KEY], str):
            self._configure(trial, self._desk.segment(trial.trial_id))
        self._elastic.add(trial, self._desk.segment(trial.trial_id))

    def _configure(self, trial: Trial, segment: Segment) -> None:
        trial.set_config({**trial.config, LR_KEY: segment.lr_at(segment.start), CONFIG_KEY: segment.to_config()})
        set_source(trial, self._keeper.source(segment.source), {self._desk.settings.time_attr: segment.start})

    def ended(self, trial: Trial, result: dict[str, Any] | None = None) -> None:
        """The trial has been completed, with its last `result`, or removed."""
        if result is not None and self._desk.knows(trial.trial_id) and trial.trial_id not in self._held:
            with self._desk.guard():
                self._take_last(trial, result)
        self._drop_traces(trial.trial_id)

    def _take_last(self, trial: Trial, result: dict[str, Any]) -> None:
        """A report that the trial ended itself with (done=True, or a stop criterion): if its segment ends there too, all is
        well. Tune has told nobody of it, and the actor is there until we return."""
        desk, trial_id = self._desk, trial.trial_id
        if desk.settings.time_attr not in result:
            return  # of a function that has returned without a report Tune makes one up
        point = desk.point(result, trial_id, self._steps.get(trial_id, (None, 0))[0])
        if point is None or point.step < desk.segment(trial_id).end:
            return
        path = self._keeper.last(trial, point.step)
        verdict = desk.report(trial_id, point, can_save=path is not None)
        self._clocks.heard(trial_id, point.step, verdict, result)
        if path is not None and verdict in (Verdict.SAVE, Verdict.PAUSE, Verdict.FINISH_AND_SAVE):
            self._keeper.adopt_last(trial, point.step, path)
            desk.forget(trial_id)
        elif verdict is Verdict.FINISH:
            desk.forget(trial_id)

    def _drop_traces(self, trial_id: str) -> None:
        self._held.pop(trial_id, None)
        self._steps.pop(trial_id, None)
        for helper in (self._clocks, self._keeper, self._watchdog, self._elastic):
            helper.drop(trial_id)

    def crashed(self, trial: Trial) -> None:
        """The trial has raised an error, or its actor has died. Tune may start it again."""
        trial_id, crash, damage = trial.trial_id, crash_of(trial), ""
        self._desk.crashed(trial_id, str(crash))
        if self._desk.knows(trial_id) and trial_id not in self._steps:
            damage = self._keeper.damage_of_source(trial)
        if damage:
            self._damage = damage
            if trial.status != Trial.ERROR:  # not to be recovered by Tune: it is not the arm that has failed
                self._desk.forget(trial_id)
        elif self._desk.knows(trial_id) and self._failures.judge(trial, crash, self._steps.get(trial_id, (None, 0))[0]):
            self._actors.lost_one()
        self._actors.lost(trial_id)
        self._drop_traces(trial_id)

    def report(self, trial: Trial, result: dict[str, Any]) -> str:
        """A trial has reported; what it does next, as one of Tune's verbs."""
        desk, trial_id = self._desk, trial.trial_id
        if not desk.knows(trial_id):
            return TrialScheduler.STOP
        if trial_id in self._held:
            return TrialScheduler.NOOP
        self._actors.heard(trial_id, result)
        with desk.guard():
            before, count = self._steps.get(trial_id, (None, 0))
            point = desk.point(result, trial_id, before)
            step = desk.segment(trial_id).start if point is None else point.step
            self._watchdog.heard(trial_id, step)
            self._steps[trial_id] = step, count + 1 if step == before else 1
            if count >= MOST_AT_ONE_STEP:
                raise ValueError(
                    f"trial {trial_id} has reported step {step} {count + 1} times in a row: "
                    f'"{desk.settings.time_attr}" is to count optimizer steps since the beginning of the run'
                )
            if point is None:
                return TrialScheduler.CONTINUE
            self._elastic.heard(trial_id, step, result)
            self._keeper.heard(trial, result)
            if warning := self._task.heard(desk.arm(trial_id), result):
                desk.warn(warning)
            if advice := self._advice.heard(point, result):
                desk.note(Event.ADVICE, message=advice)
            if not self._said_spacing and (warning := too_seldom(desk.segment(trial_id), before, step)):
                self._said_spacing = True
                desk.warn(warning)
            verdict = desk.report(trial_id, point, self._can_save(trial_id, result))
            if verdict is Verdict.CONTINUE and self._function_api and trial_id not in self._savers:
                refuse_unsaved(desk.segment(trial_id), step)
            if verdict is Verdict.SAVE and self._elastic.rests(trial_id):
                verdict = Verdict.PAUSE
            self._clocks.heard(trial_id, step, verdict, result)
            return self._carry_out(trial, verdict, step, result)
        return TrialScheduler.NOOP

    def _can_save(self, trial_id: str, result: dict[str, Any]) -> bool:
        """Class trainables save when asked; function trainables only by what they attached to this report."""
        if attached := result.get("checkpoint_dir_name") is not None:
            self._savers.add(trial_id)
        return attached or not self._function_api

    def _carry_out(self, trial: Trial, verdict: Verdict, step: int, result: dict[str, Any]) -> str:
        trial_id = trial.trial_id
        if verdict is Verdict.CONTINUE:
            return TrialScheduler.CONTINUE
        if verdict is Verdict.ROLLBACK:
            self._controller.pause_trial(trial, should_checkpoint=False)
            self._desk.withdraw(trial_id)
            return TrialScheduler.NOOP
        if verdict is Verdict.FINISH:
            self._held[trial_id] = trial
            return TrialScheduler.NOOP
        if verdict is Verdict.SAVE and self._keeper.commit(trial, step):
            return TrialScheduler.CONTINUE
        written = result.get("checkpoint_dir_name") is not None  # a function trainable attaches its checkpoint
        save = saver_of(self._controller)
        if save is None and not written:
            verdict = Verdict.PAUSE
        self._keeper.expect(trial_id, step, verdict)
        if verdict is Verdict.PAUSE:
            if self._actors_suffice():
                return TrialScheduler.PAUSE
            self._held[trial_id] = trial  # paused as soon as the other slots have actors of their own
            return TrialScheduler.NOOP
        if save is not None and not written:
            save(trial, result=result)
        if verdict is Verdict.SAVE:
            return TrialScheduler.CONTINUE
        self._held[trial_id] = trial
        return TrialScheduler.NOOP

    # -- once per loop of Tune's ---------------------------------------------------------------------------------------

    def look(self) -> None:
        """Learn of all that has happened since the last loop; what ends the run is then the desk's `failure`."""
        if self._desk.failure is not None:
            return
        with self._desk.guard():
            self._keeper.collect()
            if self._damage and self._desk.trials <= set(self._live):  # or Tune is in the middle of adding trials
                self._go_back()
            self._reconcile()
            self._slots.recount()
            if self._elastic.settle():
                self._actors.lost_one()
            self._watchdog.look(self._held, self._keeper.saving)
        self._count_busy()

    def next_trial(self) -> Trial | None:
        """Do what is due, and name the trial that is to run next; None leaves the choice to `suggest`. Raises what ends the
        run."""
        self.look()
        if self._desk.failure is not None:
            self.close()
            raise self._desk.failure
        self._release()
        self._count_busy()
        self._desk.persist()
        if not self._desk.policy.done:
            return self._resume()
        for trial in list(self._live.values()):
            self._stop(trial)
        self._desk.persist()
        self.close()
        return None

    def _count_busy(self) -> None:
        active = [t for t, trial in self._live.items() if trial.status in (Trial.RUNNING, Trial.PENDING)]
        self._desk.capacity.count({trial_id: trial_id not in self._held for trial_id in active})
        self._elastic.choose()

    def _go_back(self) -> None:
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
                self._stop(trial)
        self._desk.go_back()

    def _reconcile(self) -> None:
        """Some of Tune's failure paths notify nobody: look at the trials themselves."""
        desk = self._desk
        for trial_id, trial in list(self._live.items()):
            if not desk.knows(trial_id):
                self._stop(trial)  # booked already, while Tune means to try again
            elif not trial.is_finished():
                if trial.status == Trial.PAUSED and not desk.policy.is_open(desk.arm(trial_id)):
                    self._stop(trial)  # dropped while it waited
            else:
                if trial.status == Trial.ERROR:
                    crash = crash_of(trial)
                    if error := no_reset(trial, crash):
                        raise error
                    desk.book_failure(trial_id, str(crash))
                else:
                    desk.forget(trial_id)  # Tune ends the experiment
                self._live.pop(trial_id)
                self._drop_traces(trial_id)
            if trial.status == Trial.ERROR and desk.failure is None:
                # the run goes on; tune.run would raise at its end
                set_status(self._controller, trial, Trial.TERMINATED)

    def _actors_suffice(self) -> bool:
        return self._actors.suffice(
            [trial for trial in self._live.values() if trial.status == Trial.PENDING], self._starting
        )

    def _release(self) -> None:
        """Let go of finished trials once all slots have actors, so that theirs serve the next trials."""
        if not self._held or not self._actors_suffice():
            return
        for trial_id, trial in list(self._held.items()):
            verdict = self._keeper.verdict_of(trial_id)
            if trial.is_saving:
                continue
            if verdict is None:
                self._stop(trial)
            elif verdict is Verdict.PAUSE:
                del self._held[trial_id]
                self._controller.pause_trial(trial)

    def _stop(self, trial: Trial) -> None:
        self._desk.forget(trial.trial_id)
        self._live.pop(trial.trial_id, None)
        self._controller.stop_trial(trial)
        drop_windows(trial)
        self._drop_traces(trial.trial_id)

    def _resume(self) -> Trial | None:
        """Give the most urgent segment of a paused trial to it, if a slot is free."""
        desk = self._desk
        if not desk.capacity.room or desk.promoting:
            return None
        for segment in desk.policy.wanted():
            trial_id = desk.trial_of(segment.arm)
            trial = self._live.get(trial_id) if trial_id else None
            if trial is None:
                return None  # an arm without a trial comes first: suggest() gives it one
            if trial.status == Trial.PAUSED and not trial.is_saving:
                self._elastic.begin(trial, segment)
                desk.hand_over(trial.trial_id, segment)
                self._configure(trial, segment)
                self._steps.pop(trial.trial_id, None)
                return trial
        return None
