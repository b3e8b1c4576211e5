"""The desk: the one object that everything in the driver's process shares. Who trains what, what is on record, what failed."""

from __future__ import annotations

import logging
import os
import tempfile
from pathlib import Path
from typing import Any

from autolrs_ray.core.events import Event
from autolrs_ray.core.policy import AutoLRSError, Point, Policy, Verdict
from autolrs_ray.core.race.policy import AnchoredPolicy
from autolrs_ray.core.segments import Segment
from autolrs_ray.driver.environment import environment
from autolrs_ray.driver.nodes import require_shared
from autolrs_ray.driver.reports import point_of
from autolrs_ray.driver.settings import RunSettings
from autolrs_ray.record.checkpoints import MANIFEST_FILE, CheckpointError, verify_checkpoint
from autolrs_ray.record.journal import finite, read_journal
from autolrs_ray.record.mirror import Mirror, RunTakenError
from autolrs_ray.record.record import Record

logger = logging.getLogger(__name__)


class Desk:
    """A run's policy and record, the book of its trials and slots, and the error that ends it.

    Searcher and scheduler bring what Tune says; keeper, watchdog, slots and clocks each look after one thing; all of them
    read and change the run through the methods here.
    """

    def __init__(self, settings: RunSettings) -> None:
        self.settings = settings
        self._policy: Policy | None = None
        self._record: Record | None = None
        self._mirror: Mirror | None = None  # the run's folder, where that is not a local one
        self._manifests = False  # checkpoints have one, or are damaged
        self._restored = False
        self._named: set[str] = set()  # folders of trials that the journal names
        self._work: dict[str, Segment] = {}  # trial -> what it trains
        self._slots, self._busy = 1, 0
        self._begun = False
        self._later_slots: int | None = None
        self._promoting = False
        self._reasons: dict[str, str] = {}  # trial -> the last line of its error
        self._failure: Exception | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_record": None, "_mirror": None}

    # -- what is to be done --------------------------------------------------------------------------------------------

    @property
    def policy(self) -> Policy:
        if self._policy is None:
            self._policy = self.settings.build(self._slots)
        return self._policy

    def take_metric(self, metric: str | None, mode: str | None) -> None:
        """Set what the settings left open; ValueError if they say otherwise."""
        self.settings.take_metric(metric, mode)
        self._plan_anew()

    def take_interval(self, domain: Any) -> None:
        """Take the interval from `param_space["lr"]`; ValueError for what is none."""
        self.settings.take_interval(domain)
        self._plan_anew()

    def _plan_anew(self) -> None:
        """The settings have changed. Tune may tell of them after it has asked for the first trial."""
        if self._record is not None or self._restored:  # the policy has a past
            return
        self._policy = None
        if self._work:
            self.policy.wanted()  # proposes
        for segment in self._work.values():
            self.policy.issue(segment.arm)

    # -- the record ----------------------------------------------------------------------------------------------------

    def keep_on(self, mirror: Mirror) -> None:
        """The record belongs to a store; the first one named counts."""
        self._mirror = self._mirror or mirror

    def open_record(self, folder: str | os.PathLike[str], manifests: bool = False) -> bool:
        """Open the run folder, write the first entry or continue what it holds. True if an earlier run goes on.

        On a store (`keep_on`), that is the run folder, and `folder` is not used. manifests: every checkpoint has one.
        Raises RuntimeError if another process drives the run, or if the cluster's nodes do not share the folder.
        """
        if self._record is not None:
            return False
        self._manifests = manifests
        record = Record(folder if self._mirror is None else tempfile.mkdtemp(prefix="autolrs-"), self._mirror)
        try:
            if self._mirror is None:
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
            if self.settings.resume is True:
                raise FileNotFoundError(f'nothing to resume in {record}; use resume="auto" to start there')
            record.begin({"event": Event.START, "config": self.settings.describe(), "environment": environment()})
            return False
        if self.settings.resume is False and not self._restored:
            raise FileExistsError(
                f'{record} holds a run already: pass resume="auto" to continue it, or choose another name'
            )
        self._continue(record, record.load_state())
        step = self.policy.progress()["step"]
        record.append([{"event": Event.RESUME, "step": step, "environment": environment()}])
        record.write_state(self.settings.describe(), self.policy.state_dict())
        return True

    def _continue(self, record: Record, saved: dict[str, Any]) -> None:
        """Go on from the state `saved`; ValueError, naming them, if its settings are others."""
        theirs = saved["config"]
        different = self.settings.adopt(theirs)
        extending = self.settings.extend and [*different] == ["total_steps"]
        if different and not extending:
            changes = ", ".join(f"{key}: {then!r} -> {now!r}" for key, (then, now) in different.items())
            raise ValueError(f"cannot resume the run in {record} with other settings ({changes})")
        self._policy = self.settings.build(self._slots, theirs["total_steps"])
        self.policy.load_state_dict(saved["state"])
        if self.settings.max_slots != theirs.get("slots"):
            self.policy.set_concurrency(self._slots, self._later_slots)
        self._let_go_of_damaged()
        if extending:
            if not isinstance(self.policy, AnchoredPolicy):
                raise ValueError('only policy="anchored" can be extended')
            self.policy.extend(self.settings.total_steps)
        self._clear_book()

    def restore(self, state: dict[str, Any]) -> None:
        """Begin with the policy's `state` out of a snapshot of Tune's. The record, once it is open, goes before it."""
        self._restored = True
        self.policy.load_state_dict(state)

    def damage(self, path: str) -> str:
        """What is wrong on storage with the checkpoint at `path`; "" if nothing. Raises OSError if a store does not answer."""
        try:
            if self._mirror is not None:
                self._mirror.verify(path, self._manifests)
            elif self.has_manifest(path) or not Path(path).is_dir():
                verify_checkpoint(path)
        except CheckpointError as error:
            return str(error)
        return ""

    def has_manifest(self, path: str) -> bool:
        """Whether the checkpoint in the local folder `path` has a manifest, or is damaged if it has not."""
        return self._manifests or Path(path, MANIFEST_FILE).exists()

    def _let_go_of_damaged(self) -> None:
        """Checkpoints that were cut short or altered since they were written are none."""
        for path in sorted(self.policy.checkpoints()):
            if damage := self.damage(path):
                logger.warning("%s", damage)
                self.policy.lost(path)

    def go_back(self) -> None:
        """A checkpoint was damaged while the run was under way, and no trial is left: go on as a run does that is resumed."""
        self.persist()
        self.policy.load_state_dict(finite(self.policy.state_dict()))
        self._let_go_of_damaged()
        self._clear_book()
        self.persist()

    def note(self, event: Event, **fields: Any) -> None:
        """Add an event of the driver's own to the journal."""
        self.policy.emit(event, **fields)

    def warn(self, message: str) -> None:
        """Add a warning to the journal: something went wrong and was mended."""
        self.note(Event.WARNING, message=message)

    def name_folder(self, trial_id: str, name: str) -> None:
        """The trial keeps its checkpoints in the folder `name` of the run's; told once, so that they may be deleted."""
        if name not in self._named:
            self._named.add(name)
            self.note(Event.TRIAL, arm=self.arm(trial_id), folder=name)

    def folders(self) -> set[str]:
        """Names of the folders, in the run's, of all trials that the journal names."""
        if self._record is None:
            return set()
        named = {event.get("folder") for event in read_journal(self._record.journal) if event["event"] == Event.TRIAL}
        return {name for name in named if isinstance(name, str) and name not in ("", ".", "..") and "/" not in name}

    def persist(self) -> None:
        """Write pending events to the journal and replace the state, if anything has happened.

        Where the disk refuses, nothing more is written, so that the record stays as it is, and the run ends.
        """
        if self._record is None:
            return
        events = self.policy.drain_events()
        if not events:
            return
        record, failure = self._record, ""
        try:
            record.append(events)
            record.write_state(self.settings.describe(), self.policy.state_dict())
            return
        except RunTakenError as error:
            failure = str(error)
        except OSError as error:
            failure = (
                f"cannot write the record of the run in {record}: {error.strerror or error}. What it holds is intact: make "
                'room, or mend the disk, and run the same command again with resume="auto"'
            )
        record.close()
        self._record, self._failure = None, self._failure or AutoLRSError(failure)

    def close(self) -> None:
        """Give the run folder free for another process."""
        if self._record is not None:
            self._record.close()

    @property
    def folder(self) -> Path | None:
        return self._record.folder if self._record else None

    # -- who trains what -----------------------------------------------------------------------------------------------

    def assign(self, trial_id: str) -> Segment | None:
        """The most urgent segment whose arm has no trial yet, from now on that of `trial_id`; None if there is none."""
        if not self.room:
            return None
        taken = {segment.arm for segment in self._work.values()}
        segment = next((s for s in self.policy.wanted() if s.arm not in taken), None)
        if segment is None or (segment.role == "main" and self._promoting):
            return None
        self.hand_over(trial_id, segment)
        self._busy += 1
        return segment

    def hand_over(self, trial_id: str, segment: Segment) -> None:
        """The trial trains `segment` from now on."""
        self.policy.issue(segment.arm)
        self._work[trial_id] = segment

    def knows(self, trial_id: str) -> bool:
        """Whether the trial trains an arm; no longer once nobody waits for it."""
        return trial_id in self._work

    def segment(self, trial_id: str) -> Segment:
        return self._work[trial_id]

    def arm(self, trial_id: str) -> str:
        return self._work[trial_id].arm

    def trial_of(self, arm: str) -> str | None:
        return next((trial_id for trial_id, segment in self._work.items() if segment.arm == arm), None)

    @property
    def trials(self) -> set[str]:
        """All trials that train an arm."""
        return set(self._work)

    def withdraw(self, trial_id: str) -> None:
        """The trial rests; what is left of its arm is wanted again."""
        self.policy.withdraw(self.arm(trial_id))

    def forget(self, trial_id: str) -> None:
        """The trial works on its arm no more, and that is as it should be."""
        segment = self._work.pop(trial_id, None)
        if segment is not None:
            self.policy.withdraw(segment.arm)

    def _clear_book(self) -> None:
        self._work.clear()
        self._busy = 0

    # -- what trials say -----------------------------------------------------------------------------------------------

    def point(self, result: dict[str, Any], trial_id: str, first: bool) -> Point:
        """A trial's report as a Point; raises ValueError or TypeError that says how to mend the trainable."""
        return point_of(result, self.segment(trial_id), self.settings.keys, self.settings.sign, first)

    def report(self, trial_id: str, point: Point, can_save: bool) -> Verdict:
        return self.policy.report(self.arm(trial_id), point, can_save)

    def crashed(self, trial_id: str, reason: str) -> None:
        """The trial raised `reason`; Tune may start it again."""
        self._reasons[trial_id] = reason

    def reason(self, trial_id: str) -> str:
        """Why the trial crashed last; "" if it did not."""
        return self._reasons.get(trial_id, "")

    def book_failure(self, trial_id: str, reason: str) -> None:
        """A trial ended for good without finishing its segment. Idempotent."""
        if trial_id not in self._work:
            return
        arm = self.arm(trial_id)
        self.forget(trial_id)
        self._reasons.pop(trial_id, None)
        try:
            self.policy.failed(arm, reason)
        except AutoLRSError as error:
            self.fail(error if reason in str(error) else AutoLRSError(f"{error} The last failure: {reason}"))
        self.persist()

    def fail(self, error: Exception) -> None:
        """End the run with `error`, raised where Tune lets it through."""
        if self._failure is None:
            self._failure = error
            self.note(Event.ERROR, message=str(error))
            self.persist()

    @property
    def failure(self) -> Exception | None:
        """What ends the run."""
        return self._failure

    # -- slots ---------------------------------------------------------------------------------------------------------

    @property
    def begun(self) -> bool:
        """Whether it is known how many trials fit; before that, nothing runs."""
        return self._begun

    @property
    def slots(self) -> int:
        """Trials that fit side by side."""
        return self._slots

    @property
    def busy(self) -> int:
        """Trials that hold a slot, or are about to."""
        return self._busy

    @property
    def room(self) -> bool:
        return self._busy < self._slots

    def plan_for(self, slots: int) -> None:
        """The policy is to count on `slots` trials side by side."""
        self._slots, self._begun = slots, True
        self.policy.set_concurrency(slots)

    def may_grow_to(self, slots: int) -> None:
        """The cluster may come to hold `slots` trials; a policy that has not begun plans for these."""
        self._later_slots = slots
        if self.policy.progress()["step"] == 0:
            self.policy.set_concurrency(self._slots, slots)

    def resize(self, slots: int) -> None:
        """The cluster has shrunk or grown: `slots` trials fit now. What the policy has planned stays."""
        if slots != self._slots:
            self.warn(f"room for {slots} trials at a time now, for {self._slots} before")
        self._slots = slots

    def count_busy(self, busy: int) -> None:
        self._busy = busy

    @property
    def promoting(self) -> bool:
        """A probe's end state, which the main trial may be about to start from, is still being written."""
        return self._promoting

    def await_promotion(self, promoting: bool) -> None:
        self._promoting = promoting
