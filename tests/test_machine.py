"""Both policies under any interleaving of reports, failures, duplicates, slow saves, crashes and restores."""

from __future__ import annotations

import json
import math

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from autolrs_ray.core.policies import make_policy
from autolrs_ray.core.policy import AutoLRSError, Point, Verdict
from autolrs_ray.core.segments import next_report
from tests.simulation import Toy

PICK = st.integers(min_value=0, max_value=99)
ENOUGH = 4000  # reports that end any of these runs


class Machine(RuleBasedStateMachine):
    """A driver with slots, trials and checkpoints that takes its time and makes every mistake a cluster makes."""

    kind = "paper"

    @initialize(
        slots=st.sampled_from([1, 2, 3, 5]),
        seed=st.integers(0, 3),
        flag=st.booleans(),
        warmup=st.sampled_from([0, 4]),
        interval=st.sampled_from([(1e-3, 1.0), (1e-2, 30.0)]),
        envelope=st.sampled_from(["quadratic", "wsd"]),
    )
    def begin(self, slots, seed, flag, warmup, interval, envelope):
        options = dict(lr_interval=interval, seed=seed, concurrency=slots)
        if self.kind == "paper":
            self.new = lambda: make_policy(
                "paper", 60, stage_steps=12, max_stage_steps=24, probe_steps=3, num_lrs=4, promote=flag,
                initial="random" if seed % 2 else "grid",
                warmup_steps=warmup, warmup_lr=0.01, kappa=2.0, **options,
            )  # fmt: skip
        else:
            self.new = lambda: make_policy(
                "anchored",
                60,
                num_lrs=5,
                run_ahead=flag,
                warmup=0.05 * warmup,
                commits=6,
                envelope=envelope,
                **options,
            )
        self.policy, self.slots = self.new(), slots
        self.ended = False
        self.running = {}  # arm -> (segment, toy)
        self.held = {}  # arm -> toy: trials that stand still until their checkpoint is written
        self.writing = []  # (arm, toy)
        self.store, self.writes = {}, 0
        self.at = {"main": 0}  # steps committed so far, by arm
        self.finite = {}  # stage -> arm -> LR, of those whose last report was finite
        self.past = []  # (arm, point) of segments that have ended
        self.delivered = {}  # arm -> points of the segment under way
        self.states = []  # what the driver has written down: (JSON, at, finite)

    # -- what happens --------------------------------------------------------------------------------------------------

    def alive(self):
        return not self.ended and not self.policy.done

    def busy(self):
        return self.alive() and bool(self.running)

    def call(self, function, *args):
        """The policy's answer; None if it has ended the run with AutoLRSError."""
        try:
            return function(*args)
        except AutoLRSError as error:
            self.ended = True
            self.reason = str(error)
            return None

    def start(self):
        wanted = self.policy.wanted()
        assert not {segment.arm for segment in wanted} & (self.running.keys() | self.held.keys())
        if not wanted or len(self.running) + len(self.held) >= self.slots:
            return False
        segment = wanted[0]
        if segment.role == "main" and self.writing:
            return False  # the pair waits for the winner's end state
        toy = Toy() if segment.source is None else self.store[segment.source]
        assert toy.step == segment.start
        self.policy.issue(segment.arm)
        self.running[segment.arm] = (segment, toy)
        return True

    def advance(self, arm, loss=None):
        segment, toy = self.running[arm]
        toy = toy.train(next_report(segment, toy.step), segment.lr_at)
        self.running[arm] = (segment, toy)
        self.report(arm, Point(toy.step, toy.loss if loss is None else loss, toy.train_loss, loss or toy.loss))

    def report(self, arm, point):
        self.remember(self.running[arm][0], point)
        verdict = self.call(self.policy.report, arm, point, True)
        if verdict in (Verdict.SAVE, Verdict.PAUSE, Verdict.FINISH_AND_SAVE):
            self.writing.append((arm, self.running[arm][1]))
        if verdict in (Verdict.PAUSE, Verdict.FINISH_AND_SAVE):
            self.held[arm] = self.running.pop(arm)[1]
        elif verdict is Verdict.FINISH:
            self.end(arm)
        elif verdict is Verdict.ROLLBACK:
            self.leave(arm)

    def remember(self, segment, point):
        finite = self.finite.setdefault(segment.stage, {})
        if math.isfinite(point.loss):
            finite[segment.arm] = segment.lr
        else:
            finite.pop(segment.arm, None)
        self.delivered.setdefault(segment.arm, []).append(point)

    def end(self, arm):
        """Its segment has come to its end."""
        self.past += [(arm, point) for point in self.delivered.get(arm, [])]
        self.leave(arm)

    def leave(self, arm):
        self.delivered.pop(arm, None)
        self.running.pop(arm, None)
        self.held.pop(arm, None)
        self.writing = [write for write in self.writing if write[0] != arm]
        self.policy.withdraw(arm)

    def write(self, arm, toy):
        self.writes += 1
        path = f"{arm}@{toy.step}#{self.writes}"
        self.store[path] = toy
        self.call(self.policy.saved, arm, toy.step, path)
        if arm in self.held and not any(other == arm for other, _ in self.writing):
            self.end(arm)

    def arm(self, pick):
        return sorted(self.running)[pick % len(self.running)]

    def serve(self):
        """One thing that brings the run on, as a driver does that nothing happens to."""
        while self.start():
            pass
        if self.writing:
            self.write(*self.writing.pop())
        else:
            assert self.running, f"nothing can make progress: {self.policy.progress()}"
            self.advance(sorted(self.running)[0])
        self.nothing_is_lost_and_nothing_is_done_twice()

    @rule(times=st.integers(1, 40))
    @precondition(alive)
    def nothing_happens_for_a_while(self, times):
        for _ in range(times):
            if self.alive():
                self.serve()

    @rule()
    @precondition(alive)
    def a_slot_is_filled(self):
        self.start()

    @rule(pick=PICK, times=st.integers(1, 6))
    @precondition(busy)
    def a_trial_reports(self, pick, times):
        arm = self.arm(pick)
        for _ in range(times):
            if arm in self.running and self.alive():
                self.advance(arm)

    @rule(pick=PICK, bad=st.sampled_from([math.nan, math.inf, 1e30]))
    @precondition(busy)
    def a_trial_diverges(self, pick, bad):
        self.advance(self.arm(pick), bad)

    @rule(pick=PICK)
    @precondition(busy)
    def a_report_arrives_twice(self, pick):
        arm = self.arm(pick)
        _, toy = self.running[arm]
        if toy.step:
            self.report(arm, Point(toy.step, toy.loss, toy.train_loss, toy.loss))

    @rule(pick=PICK)
    @precondition(lambda self: self.alive() and bool(self.past))
    def a_result_of_an_earlier_segment_arrives_late(self, pick):
        arm, point = self.past[pick % len(self.past)]
        before = json.dumps(self.policy.state_dict())
        verdict = self.call(self.policy.report, arm, point, True)
        assert json.dumps(self.policy.state_dict()) == before, "a late result has changed what the run remembers"
        if self.policy.is_open(arm) and not (arm == "main" and self.policy.phase == "search"):
            assert verdict is Verdict.CONTINUE
        else:
            assert verdict in (Verdict.FINISH, Verdict.PAUSE), "a trial that has nothing to do goes on"

    @rule(pick=PICK)
    @precondition(lambda self: self.alive() and bool(self.writing))
    def a_checkpoint_is_written(self, pick):
        self.write(*self.writing.pop(pick % len(self.writing)))

    @rule(pick=PICK)
    @precondition(lambda self: self.alive() and bool(self.store))
    def a_checkpoint_is_announced_twice(self, pick):
        path = sorted(self.store)[pick % len(self.store)]
        self.call(self.policy.saved, path.split("@")[0], self.store[path].step, path)

    @rule(pick=PICK)
    @precondition(lambda self: self.alive() and bool(self.writing))
    def a_trial_dies_while_it_saves(self, pick):
        self.leave(self.writing[pick % len(self.writing)][0])

    @rule(pick=PICK)
    @precondition(busy)
    def a_trial_crashes_and_tune_restarts_it(self, pick):
        arm = self.arm(pick)
        segment, _ = self.running[arm]
        self.running[arm] = (segment, Toy() if segment.source is None else self.store[segment.source])

    @rule(pick=PICK)
    @precondition(lambda self: self.busy() and len(self.running) > 1)
    def a_trial_fails_for_good(self, pick):
        arm = self.arm(pick)
        self.leave(arm)
        self.call(self.policy.failed, arm, "it was killed")

    def resume(self, state):
        self.policy = self.new()
        self.policy.load_state_dict(json.loads(state))
        assert json.dumps(self.policy.state_dict()) == state
        self.running, self.held, self.writing, self.delivered, self.past = {}, {}, [], {}, []

    def lose(self, path):
        self.policy.lost(path)
        self.collect()
        if self.kind == "paper":
            self.at["main"] = self.policy.step
        else:
            self.at = {f"t{i:02d}": trunk.step for i, trunk in enumerate(self.policy.trunks)}

    @rule()
    def the_driver_is_killed_and_resumes(self):
        if self.ended:
            return
        self.collect()
        self.resume(json.dumps(self.policy.state_dict(), allow_nan=False))

    @rule(pick=PICK)
    @precondition(lambda self: not self.ended and bool(self.policy.checkpoints()))
    def a_checkpoint_turns_out_unreadable_on_resuming(self, pick):
        self.the_driver_is_killed_and_resumes()
        path = sorted(self.policy.checkpoints())[pick % len(self.policy.checkpoints())]
        del self.store[path]
        self.lose(path)

    @rule(pick=PICK)
    @precondition(lambda self: not self.ended and bool(self.states))
    def the_driver_resumes_from_an_older_state(self, pick):
        """The last one is damaged. Some checkpoints that the older one names have been deleted since."""
        self.states = self.states[: pick % len(self.states) + 1]
        state, at, finite = self.states[-1]
        self.collect()
        self.resume(state)
        self.at, self.finite = dict(at), {stage: dict(arms) for stage, arms in finite.items()}
        for path in sorted(self.policy.checkpoints() - self.store.keys()):
            self.lose(path)

    # -- what must hold ------------------------------------------------------------------------------------------------

    def collect(self):
        """Look at the events since the last time."""
        for event in self.policy.drain_events():
            json.dumps(event, allow_nan=False)
            if "starts again" in event.get("message", ""):  # a dropped trunk that all others have died for
                self.at[event["arm"]] = 0
                self.past = [(arm, point) for arm, point in self.past if arm != event["arm"]]
            if event["event"] == "stage":
                self.finite[event["stage"]] = {}  # searched anew
            if event["event"] == "commit":
                arm = event.get("arm", "main")
                start = self.at.get(arm, 0)
                assert event["end"] > start, "a step was committed twice"
                if self.kind == "paper":
                    assert event["start"] == start, "a step was lost, or committed twice"
                self.at[arm] = event["end"]

    @invariant()
    def nothing_is_lost_and_nothing_is_done_twice(self):
        if not hasattr(self, "policy"):
            return
        self.collect()
        needed = self.policy.checkpoints()
        assert needed <= self.store.keys()
        sources = {segment.source for segment, _ in self.running.values()}
        self.store = {path: toy for path, toy in self.store.items() if path in needed | sources}
        if self.ended:
            return
        state = json.dumps(self.policy.state_dict(), allow_nan=False)
        if not self.states or self.states[-1][0] != state:
            copy = {stage: dict(arms) for stage, arms in self.finite.items()}
            self.states = [*self.states[-3:], (state, dict(self.at), copy)]
        for arm in [arm for arm in [*self.running, *self.held] if not self.policy.is_open(arm)]:
            if not any(other == arm for other, _ in self.writing):
                self.end(arm)
        wanted = self.policy.wanted()
        arms = [segment.arm for segment in wanted]
        assert len(arms) == len(set(arms))
        assert not set(arms) & (self.running.keys() | self.held.keys()), "an issued arm is wanted"
        assert [segment.arm for segment in self.policy.wanted()] == arms
        assert not (self.policy.done and arms)
        self.rules_of_the_policy()

    def rules_of_the_policy(self):
        policy = self.policy
        assert len(policy.probes) <= (policy.rounds + 1) * policy.num_lrs <= 2 * policy.num_lrs
        if policy.phase == "train":
            chosen = policy.probes[policy.chosen]
            assert chosen.status == "done"
            assert math.isfinite(chosen.forecast)
            tried = [lr for arm, lr in self.finite[policy.stage.index].items() if arm != "main"]
            assert chosen.lr in tried, "the LR that trains was not tried in this stage, or gave no finite loss"

    def teardown(self):
        """Served faithfully, the run ends."""
        if not hasattr(self, "policy"):
            return
        for _ in range(ENOUGH):
            if not self.alive():
                break
            self.serve()
        assert not self.alive(), "no end"
        assert len(self.reason) > 40 if self.ended else max(self.at.values()) == 60


class RaceMachine(Machine):
    kind = "anchored"

    def rules_of_the_policy(self):
        policy = self.policy
        assert len(policy.trunks) == policy.num_lrs
        low, high = policy.lr_interval
        for trunk in policy.trunks:
            assert low * 0.999 <= trunk.lr <= high * 1.001
        if policy.done:
            (won,) = [trunk for trunk in policy.trunks if trunk.status == "won"]
            assert math.isfinite(won.saved_loss)
            assert won.step == 60


CALM = settings(
    deadline=None, max_examples=60, stateful_step_count=60, suppress_health_check=list(HealthCheck), print_blob=True
)
Machine.TestCase.settings = CALM
RaceMachine.TestCase.settings = CALM


class TestPaperPolicyUnderAnyInterleaving(Machine.TestCase):
    pass


class TestAnchoredPolicyUnderAnyInterleaving(RaceMachine.TestCase):
    pass
