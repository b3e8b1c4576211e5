"""The run's checkpoints on storage: those being written, those written, and those that may be deleted."""

from __future__ import annotations

import logging
import re
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray
from ray.tune import Checkpoint
from ray.tune.experiment import Trial
from ray.tune.trainable.function_trainable import FunctionTrainable
from ray.tune.utils import flatten_dict

from autolrs_ray.core.policy import AutoLRSError, Verdict
from autolrs_ray.driver.desk import Desk
from autolrs_ray.private import actor_of, set_source
from autolrs_ray.record.checkpoints import MANIFEST_FILE, CheckpointError, flush_checkpoint, verify_checkpoint
from autolrs_ray.trial.shared import SharedState, SharedStates
from autolrs_ray.trial.trainable import AutoLRSTrainable

logger = logging.getLogger(__name__)

_NAME = re.compile(r"checkpoint_(step_)?\d+")  # of what Tune writes, and of what is written in the background
# whose states other trials start from next: the stage's own, and the leading probe's, which the main trial goes on from
_STARTED_FROM = {("main", Verdict.PAUSE), ("probe", Verdict.FINISH_AND_SAVE)}


@dataclass
class _Save:
    """A checkpoint that Tune has been asked for: of which step, and what its trial does when it is written."""

    step: int
    verdict: Verdict
    since: float
    shared: SharedState | None = None


def _damage_by_size(path: str) -> str:
    """What its manifest says is wrong with the checkpoint at `path`, its content not read; "" if nothing."""
    try:
        verify_checkpoint(path, content=False)
    except CheckpointError as error:
        return str(error)
    return ""


class CheckpointKeeper:
    """Tells the policy of durable checkpoints and deletes those that nobody needs any more.

    A trial that stops is saved through Tune. One that trains on (Verdict.SAVE) writes in the background, if its trainable
    has a method `commit(path)` and reports "durable_step", and if the storage is a file system of this machine.
    """

    def __init__(self, desk: Desk, live: dict[str, Trial], storage: Any, trainable: type) -> None:
        self._desk, self._live = desk, live
        self._filesystem = storage.storage_filesystem
        self._local = self._filesystem.type_name == "local"
        self._background = self._local and hasattr(trainable, "commit")
        self._flushed = issubclass(trainable, AutoLRSTrainable)
        self._attaches = issubclass(trainable, FunctionTrainable)  # its checkpoints to its reports
        self._saving: dict[str, _Save] = {}
        self._committing: dict[str, list[tuple[int, str]]] = {}
        self._said: dict[str, str] = {}
        self._written: set[str] = set()
        self._shared = SharedStates(trainable)

    @property
    def saving(self) -> dict[str, float]:
        """Trials whose checkpoints Tune writes, each with when it was asked for, on the monotonic clock."""
        return {trial_id: save.since for trial_id, save in self._saving.items()}

    def adopt(self, folder: str) -> None:
        """Take over what an earlier life of this run has left in `folder`, in the trials that its journal names. What else
        lies there is not ours, and of a finished run nothing is deleted."""
        if self._local and not self._desk.policy.done:
            found = [path for name in self._desk.folders() for path in Path(folder, name).glob("checkpoint_*")]
            self._written = {path.as_posix() for path in found if _NAME.fullmatch(path.name) and not path.is_symlink()}
            self.delete_unneeded()

    def drop(self, trial_id: str) -> None:
        """This trial is gone, or starts anew."""
        self._written |= {path for _, path in self._committing.pop(trial_id, [])}
        self._said.pop(trial_id, None)
        if self._saving.pop(trial_id, None):
            self._note_promoting()

    def verdict_of(self, trial_id: str) -> Verdict | None:
        """What the trial does when its checkpoint is written; None if none is being written."""
        save = self._saving.get(trial_id)
        return save.verdict if save else None

    def expect(self, trial_id: str, step: int, verdict: Verdict) -> None:
        """Tune is about to be asked for a checkpoint of this trial."""
        self._desk.name_folder(trial_id, self._live[trial_id].storage.trial_dir_name)
        save = self._saving[trial_id] = _Save(step, verdict, time.monotonic())
        role = self._role(trial_id)
        if (role, verdict) in _STARTED_FROM:
            save.shared = self._shared.ask(role, actor_of(self._live[trial_id]))
        self._note_promoting()

    def _role(self, trial_id: str) -> str:
        return self._desk.segment(trial_id).role

    def source(self, path: str | None) -> Checkpoint | None:
        """The checkpoint at `path`, for a trial to start from; None for None."""
        return None if path is None else self._shared.checkpoint(path, self._filesystem)

    def let_go(self) -> None:
        """The run is over: keep nothing in the object store."""
        self._shared.clear()

    def _note_promoting(self) -> None:
        """The main trial may be about to start from a probe's end state that is still being written."""
        self._desk.promoting = any(save.verdict is Verdict.FINISH_AND_SAVE for save in self._saving.values())

    def last(self, trial: Trial, step: int) -> str | None:
        """Where the state of a trial at `step` is that is about to end; None if it is not to be had."""
        attached = trial.latest_checkpoint_result
        if attached is not None and flatten_dict(attached.metrics).get(self._desk.settings.time_attr) == step:
            return str(attached.checkpoint.path)
        actor = actor_of(trial)
        if actor is None or self._attaches:
            return None
        try:
            saved = ray.get(actor.save.remote(), timeout=self._desk.settings.report_timeout_s)
        except Exception as error:  # the user's save_checkpoint, a lost process, a full disk
            self._desk.warn(
                f"{self._desk.arm(trial.trial_id)} ended itself at step {step}, and cannot be saved: {error}"
            )
            return None
        return str(saved.checkpoint.path)

    def adopt_last(self, trial: Trial, step: int, path: str) -> None:
        """Tell the policy of what `last` has found."""
        if damage := self._damage(path):
            self._desk.warn(f"{self._desk.arm(trial.trial_id)}: {damage}")
        else:
            self._tell(trial.trial_id, step, path)
            self.delete_unneeded()

    # -- written in the background -------------------------------------------------------------------------------------

    def commit(self, trial: Trial, step: int) -> bool:
        """Have the trial's state written while it trains on. False if it cannot: then Tune is to be asked."""
        actor = actor_of(trial)
        if not self._background or actor is None:
            return False
        self._desk.name_folder(trial.trial_id, trial.storage.trial_dir_name)
        path = f"{trial.storage.trial_fs_path}/checkpoint_step_{step:09d}"
        actor.commit.remote(path)
        self._committing.setdefault(trial.trial_id, []).append((step, path))
        return True

    def heard(self, trial: Trial, result: dict[str, Any]) -> None:
        """Tell the policy of what the trial's report says is durable."""
        if self._role(trial.trial_id) == "main":
            self._shared.clear()  # it has started, and no probe will before its end
        message = result.get("checkpoint_error")
        if message is not None and self._said.get(trial.trial_id) != message:
            self._said[trial.trial_id] = message
            self._desk.warn(f"{self._desk.arm(trial.trial_id)}: {message}")
        self._settle(trial, int(result.get("durable_step") or 0))

    def _settle(self, trial: Trial, durable_step: int) -> None:
        waiting = self._committing.get(trial.trial_id, [])
        ready = [(step, path) for step, path in waiting if step <= durable_step]
        if not ready:
            return
        self._committing[trial.trial_id] = waiting[len(ready) :]
        for step, path in ready:
            if self._is_whole(trial.trial_id, path):
                # where Tune starts it again if it crashes
                set_source(trial, self.source(path), {self._desk.settings.time_attr: step})
                self._tell(trial.trial_id, step, path)
            else:
                self._written.add(path)
        self.delete_unneeded()

    def _is_whole(self, trial_id: str, path: str) -> bool:
        """False for a write that failed, which the trial has told of, and for one that is damaged already, with a warning."""
        if not Path(path, MANIFEST_FILE).exists():
            return False
        if damage := _damage_by_size(path):
            self._desk.warn(f"{self._desk.arm(trial_id)}: {damage}")
        return not damage

    def _tell(self, trial_id: str, step: int, path: str) -> None:
        self._desk.policy.saved(self._desk.arm(trial_id), step, path)
        self._written.add(path)

    # -- written by Tune -----------------------------------------------------------------------------------------------

    def collect(self) -> None:
        """Tell the policy of checkpoints that Tune has had written since the last loop."""
        for trial_id, save in list(self._saving.items()):
            trial = self._live[trial_id]
            if trial.is_saving or (save.verdict is Verdict.PAUSE and trial.status == Trial.RUNNING):
                continue
            del self._saving[trial_id]
            self._note_promoting()
            self._finish(trial, save)

    def _finish(self, trial: Trial, save: _Save) -> None:
        desk, arm = self._desk, self._desk.arm(trial.trial_id)
        written, fault = trial.latest_checkpoint_result, "could not be written; see the log above, and the disk space"
        complete = written is not None and flatten_dict(written.metrics).get(self._desk.settings.time_attr) == save.step
        if complete:
            self._settle(trial, save.step)  # a trainable ends its own writes before it saves for Tune
            complete = not (damage := self._damage(written.checkpoint.path))
            if damage:
                fault = f"is no good: {damage}"
                desk.warn(f"{arm}: {damage}")
        if complete:
            if save.shared is not None:
                save.shared.written(written.checkpoint.path, save.step)
            self._tell(trial.trial_id, save.step, written.checkpoint.path)
        elif arm == "main" and save.verdict is not Verdict.SAVE:
            raise AutoLRSError(
                f"the main trial ended its segment at step {save.step}, but its checkpoint {fault}. The "
                f"{desk.policy.last_good(arm)}. {desk.policy.progress()}"
            )
        if save.verdict is Verdict.PAUSE:
            desk.withdraw(trial.trial_id)
        if complete:
            self.delete_unneeded()

    def _damage(self, path: str) -> str:
        """What is wrong with a checkpoint that Tune has copied to a local folder; "" if nothing. It is on disk afterwards.

        Tune flushes nothing. An AutoLRSTrainable has flushed and read its copy before it told of it, which leaves 0.02 ms for
        here, where all trials wait, at 1 MB and at 400. Of another class the files are flushed here: 5 ms for 1 MB, and the
        time that the disk takes for what is still in memory.
        """
        if not self._local:
            return ""
        try:
            if not self._flushed:
                flush_checkpoint(path)
        except CheckpointError as error:
            return str(error)
        return _damage_by_size(path) if self._desk.stored.has_manifest(path) else ""

    def damage_of_source(self, trial: Trial) -> str:
        """What is wrong on storage with the checkpoint that `trial`, which has failed, was to start from; "" if nothing.

        What lies on a store would have to be fetched: looked at only if the error speaks of the checkpoint.
        """
        reason = self._desk.reason(trial.trial_id)
        if trial.checkpoint is None or not (self._local or "CheckpointError" in reason or "on storage" in reason):
            return ""
        try:
            return self._desk.stored.damage(trial.checkpoint.path)
        except OSError as error:  # then the trial has failed because the store does not answer
            logger.warning("cannot look at the checkpoint that %s was to start from: %s", trial, error)
            return ""

    def delete_unneeded(self) -> None:
        """Delete the checkpoints written so far that neither the policy nor a live trial needs, nor the record on disk."""
        needed = self._desk.policy.checkpoints()
        needed |= {trial.checkpoint.path for trial in self._live.values() if trial.checkpoint is not None}
        doomed = self._written - needed
        if doomed:
            self._desk.persist()  # first: a resumed run goes by the record
        if self._desk.failure is not None:
            return
        for path in doomed:
            self._written.discard(path)
            try:
                self._filesystem.delete_dir(path)
            except FileNotFoundError:
                continue  # a commit that its trial never came to
            except OSError as error:  # it costs space, not the run
                logger.warning("cannot delete the checkpoint %s, which is no longer needed: %s", path, error)
