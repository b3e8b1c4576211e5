"""The desk: the one object that everything in the driver's process shares. Who trains what, what is on record, what failed."""

from __future__ import annotations

import logging
import math
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from autolrs_ray.core.events import Event
from autolrs_ray.core.policy import AutoLRSError, Point, Policy, Verdict
from autolrs_ray.core.race.policy import AnchoredPolicy
from autolrs_ray.core.segments import Segment
from autolrs_ray.driver import resume
from autolrs_ray.driver.advice import tell
from autolrs_ray.driver.capacity import Capacity
from autolrs_ray.driver.environment import environment
from autolrs_ray.driver.nodes import require_shared
from autolrs_ray.driver.reports import point_of
from autolrs_ray.driver.settings import RunSettings
from autolrs_ray.driver.stored import Stored
from autolrs_ray.record.journal import finite, read_journal
from autolrs_ray.record.mirror import RunTakenError
from autolrs_ray.record.record import Record

logger = logging.getLogger(__name__)


class Desk:
    """A run's policy and record, the book of its trials and slots, and the error that ends it.

    Searcher and scheduler bring what Tune says; keeper, watchdog, slots and clocks each look after one thing; all of them
    read and change the run through the methods here.
    """

    def __init__(self, settings: RunSettings) -> None:
        self.settings, self.stored = settings, Stored()
        self._policy: Policy | None = None
        self._record: Record | None = None
        self._restored = False
        self._named: set[str] = set()  # folders of trials that the journal names
        self._work: dict[str, Segment] = {}  # trial -> what it trains
        self.capacity = Capacity(settings.least_workers)
        self._untouched = True
        self._later_slots: int | None = None
        self.promoting = False  # a probe's end state, which main may be about to start from, is still being written
        self._reasons: dict[str, str] = {}  # trial -> the last line of its error
        self._failure: Exception | None = None
        self._subject: dict[str, Any] = {}
        self._told, self._failed = "", list[float]()  # LRs that had failed when the run went on
        self._trained_steps, self._trained_s = 0, 0.0

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_record": None, "stored": Stored()}

    # -- what is to be done --------------------------------------------------------------------------------------------

    @property
    def policy(self) -> Policy:
        if self._policy is None:
            self._policy = self.settings.build(self.capacity.slots)
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

    def open_record(self, folder: str | os.PathLike[str], subject: dict[str, Any] | None = None) -> bool:
        """Open the run folder, write the first entry or continue what it holds. True if an earlier run goes on.

        On a store (`stored.mirror`), that is the run folder, and `folder` is not used.
        subject: what is trained (:func:`~autolrs_ray.driver.identity.subject`); a run of something else is not gone on with.
        Raises RuntimeError if another process drives the run, or if the cluster's nodes do not share the folder.
        """
        if self._record is not None:
            return False
        self._subject = subject or {}
        mirror = self.stored.mirror
        record = Record(folder if mirror is None else tempfile.mkdtemp(prefix="autolrs-"), mirror)
        try:
            if mirror is None:
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
            start = dict(config=self.settings.describe(), environment=environment(), **self._described_subject())
            record.begin({"event": Event.START, **start})
            return False
        if self.settings.resume is False and not self._restored:
            raise FileExistsError(
                f'{record} holds a run already: pass resume="auto" to continue it, or choose another name'
            )
        with resume.whole(record):
            self._continue(record, record.load_state())
        went_on = dict(step=self.policy.progress()["step"], environment=environment(), **self._described_subject())
        record.append([{"event": Event.RESUME, **went_on}])
        record.write_state(self._state_config(), self.policy.state_dict())
        self._told = resume.told(record, self.policy, self._failed)
        return True

    def _described_subject(self) -> dict[str, Any]:
        return {"subject": self._subject} if self._subject else {}

    def _state_config(self) -> dict[str, Any]:
        return {**self.settings.describe(), **self._described_subject()}

    @property
    def told(self) -> str:
        """What the run that was found in the folder is continued from; "" for a new one."""
        return self._told

    def _continue(self, record: Record, saved: dict[str, Any]) -> None:
        """Go on from the state `saved`; ValueError, naming it, if it is of something else than is to be done now."""
        settings, theirs = self.settings, saved["config"]
        extending = resume.refuse_other_settings(record, settings.adopt(theirs), settings.extend)
        self._policy = settings.build(self.capacity.slots, theirs["total_steps"])
        self.policy.load_state_dict(saved["state"])
        begun = self.policy.done or bool(self.policy.checkpoints())
        self._untouched = not begun
        warnings = resume.refuse_other_subject(
            record, self._subject, theirs.get("subject"), begun, self.policy.done, settings.resume is True
        )
        if settings.max_slots != theirs.get("slots"):
            self._set_concurrency(self._later_slots)
        self._let_go_of_damaged()
        resume.refuse_end(record, self.policy)
        if extending:
            if not isinstance(self.policy, AnchoredPolicy):
                raise ValueError('only policy="anchored" can be extended')
            self.policy.extend(settings.total_steps)
        for warning in warnings:
            self.warn(warning)
        self._failed = self.policy.failures()
        self.policy.try_again()
        self._clear_book()

    def restore(self, state: dict[str, Any]) -> None:
        """Begin with the policy's `state` out of a snapshot of Tune's. The record, once it is open, goes before it."""
        self._restored = True
        self.policy.load_state_dict(state)

    def _let_go_of_damaged(self) -> None:
        """Checkpoints that were cut short or altered since they were written are none."""
        for path in sorted(self.policy.checkpoints()):
            if damage := self.stored.damage(path):
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
            record.write_state(self._state_config(), self.policy.state_dict())
        except (RunTakenError, TypeError, ValueError) as error:
            failure = str(error)
        except OSError as error:
            failure = (
                f"cannot write the record of the run in {record}: {error.strerror or error}. What it holds is intact: make "
                'room, or mend the disk, and run the same command again with resume="auto"'
            )
        else:
            tell(events)
            return
        record.close()
        self._record, self._failure = None, self._failure or AutoLRSError(failure)

    def close(self) -> None:
        """Give the run folder free for another process."""
        if self._record is not None:
            self._record.close()
            self._record = None

    # -- who trains what -----------------------------------------------------------------------------------------------

    def assign(self, trial_id: str) -> Segment | None:
        """The most urgent segment whose arm has no trial yet, from now on that of `trial_id`; None if there is none."""
        if not self.capacity.room:
            return None
        taken = {segment.arm for segment in self._work.values()}
        segment = next((s for s in self.policy.wanted() if s.arm not in taken), None)
        if segment is None or (segment.role == "main" and self.promoting):
            return None
        self.hand_over(trial_id, segment)
        self.capacity.take(trial_id)
        self.capacity.busy += self.capacity.units
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
        self.capacity.give_back(trial_id)
        if segment is not None:
            self.policy.withdraw(segment.arm)

    def _clear_book(self) -> None:
        self._work.clear()
        self.capacity.clear()

    # -- what trials say -----------------------------------------------------------------------------------------------

    def point(self, result: dict[str, Any], trial_id: str, before: int | None) -> Point | None:
        """A trial's report as a Point, None if it says nothing new; before: step of the report before it.

        Raises ValueError or TypeError that says how to mend the trainable.
        """
        return point_of(result, self.segment(trial_id), self.settings.keys, self.settings.sign, before)

    def report(self, trial_id: str, point: Point, can_save: bool) -> Verdict:
        self._untouched = False
        return self.policy.report(self.arm(trial_id), point, can_save)

    @property
    def untouched(self) -> bool:
        """Whether no trial has reported anything yet, in this life of the run or an earlier one."""
        return self._untouched

    def crashed(self, trial_id: str, reason: str) -> None:
        """The trial raised `reason`; Tune may start it again."""
        self._reasons[trial_id] = reason

    def book_divergence(self, trial_id: str, step: int, reason: str) -> None:
        """The trial raised `reason` after `step`, which says what a loss of NaN would have said."""
        arm = self.arm(trial_id)
        self.warn(f"{arm} (LR {self.segment(trial_id).lr:.3g}) counts as diverged: {reason}")
        with self.guard():
            self.policy.report(arm, Point(step + 1, math.nan), can_save=False)
        self.forget(trial_id)
        self.persist()

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
        with self.guard():
            try:
                self.policy.failed(arm, reason)
            except AutoLRSError as error:
                raise error if reason in str(error) else AutoLRSError(f"{error} The last failure: {reason}") from None
        self.persist()

    @contextmanager
    def guard(self) -> Iterator[None]:
        """What is raised within ends the run, by an error that Tune passes on, whatever it calls us from."""
        try:
            yield
        except (AutoLRSError, ValueError, TypeError) as error:
            self.fail(error)
        except Exception as error:
            logger.exception("an error of AutoLRS's own")
            self.fail(AutoLRSError(f"{type(error).__name__}: {error}; please report this with the log above"))

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

    def trained(self, steps: int, seconds: float) -> None:
        """A trial has trained and evaluated for so many seconds."""
        self._trained_steps, self._trained_s = self._trained_steps + max(0, steps), self._trained_s + seconds

    @property
    def trained_steps(self) -> int:
        """Optimizer steps of all trials since this process began or resumed the run."""
        return self._trained_steps

    @property
    def step_s(self) -> float | None:
        """Seconds that a step of one trial has taken so far, evaluation included; None before the first report."""
        return self._trained_s / self._trained_steps if self._trained_steps else None

    # -- slots ---------------------------------------------------------------------------------------------------------

    def plan_for(self, slots: int) -> None:
        """The policy is to count on `slots` trials side by side."""
        self.capacity.slots, self.capacity.begun = slots, True
        self._set_concurrency()

    def may_grow_to(self, slots: int) -> None:
        """The cluster may come to hold `slots` trials; a policy that has not begun plans for these."""
        self._later_slots = slots
        if self.policy.progress()["step"] == 0:
            self._set_concurrency(slots)

    def resize(self, slots: int) -> None:
        """The cluster has shrunk or grown: `slots` trials fit now. What the policy has planned stays."""
        if slots != self.capacity.slots:
            self.warn(f"room for {slots} trials at a time now, for {self.capacity.slots} before")
        self.capacity.slots = slots

    def _set_concurrency(self, later: int | None = None) -> None:
        plan = self.settings.side_by_side
        self.policy.set_concurrency(plan(self.capacity.slots), None if later is None else plan(later))
