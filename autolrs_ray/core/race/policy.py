"""The anchored policy: LR(t) = scale * rise(t) * envelope(t), the scale found by a race of trunks from step 0.

Stage-wise search picks LRs too small too early (short-horizon bias, Wu et al. 2018). Here whole trainings at different scales
run under one decay envelope and are compared at rungs. Which of them go on is the rule's to say
(:mod:`autolrs_ray.core.race.rule`); the one that wins is the run itself: no step of it is trained twice.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from autolrs_ray.core.checks import conforming, require_bool, require_float, require_int, validate_points
from autolrs_ray.core.envelopes import EnvelopeSpec, LogInterval, bin_centred_grid, envelope_factor
from autolrs_ray.core.events import Event
from autolrs_ray.core.policy import AutoLRSError, Point, Policy, Verdict, way_on
from autolrs_ray.core.race.ahead import ahead_of
from autolrs_ray.core.race.baseline import baseline_of
from autolrs_ray.core.race.cost import bound, usual
from autolrs_ray.core.race.longer import back_to_hold, hold_end, only_racing
from autolrs_ray.core.race.plan import FIRST_READINGS, RacePlan
from autolrs_ray.core.race.points import arrived, best_at_the_end, field_of, on_the_way
from autolrs_ray.core.race.race import MANY, Race, arm_of
from autolrs_ray.core.race.readings import score_of
from autolrs_ray.core.race.trouble import fails_everywhere, forgive, none_left
from autolrs_ray.core.race.trunk import Trunk
from autolrs_ray.core.segments import Segment

FEW = 3
"""Trunks side by side at which a race does not wait for slots: those in play, and one that runs ahead."""


@dataclass
class AnchoredPolicy(Policy):
    """A race of `num_lrs` LR scales over `lr_interval` under `envelope`.

    warmup: share of the run over which a linear rise is a factor beside the envelope (0: none). commits: checkpoints of a trunk
    over the whole run, beside those at rungs. run_ahead: slots that the rule leaves over train the next LRs below those in play
    ahead, up to 0.12 T, in case they are needed.
    points_to_evaluate: LRs of your own that race beside those of the grid. keep: they are trained to the end whatever the rule
    makes of them, on slots that it leaves over, or after it has come to an end; the best of all that came there wins.
    """

    lr_interval: tuple[float, float] = (1e-5, 10.0)
    num_lrs: int = 12
    envelope: EnvelopeSpec = "quadratic"
    warmup: float = 0.2
    commits: int = 10
    run_ahead: bool = True
    points_to_evaluate: Sequence[float] | None = None
    keep: bool = False

    # durable state
    race: Race = field(init=False)
    phase: str = field(default="race", init=False)
    heir: int | None = field(default=None, init=False)  # the one trunk of a race that is over and was extended
    warmup_steps: int = field(init=False)  # of the run as it began: extending it changes none of them

    # volatile
    _boundaries: tuple[int, ...] = field(default=(), init=False, repr=False)
    _unsaved: set[str] = field(default_factory=set, init=False, repr=False)

    def __post_init__(self) -> None:
        for name in ("num_lrs", "commits", "concurrency"):
            require_int(name, getattr(self, name), 1, MANY)
        for name in ("run_ahead", "keep"):
            require_bool(name, getattr(self, name))
        own = self.points_to_evaluate = validate_points(self.points_to_evaluate, self.lr_interval)
        if self.keep and not own:
            raise ValueError(
                "keep=True trains the learning rates of points_to_evaluate to the end: give some, got none"
            )
        rise = require_float("warmup", self.warmup, 0.0, 1.0)
        self.warmup_steps = round(rise * self.total_steps)
        for step in (0, self.total_steps // 2, self.total_steps):
            envelope_factor(self.envelope, step, self.total_steps)
        interval = LogInterval(*self.lr_interval)
        trunks = field_of((interval.lr(x) for x in bin_centred_grid(self.num_lrs)), own)
        self.race = Race(RacePlan.of(self.total_steps, rise=rise), trunks, self.emit, self._kept)
        self._boundaries = self._lay_boundaries()
        for i, trunk in enumerate(trunks):
            self.emit(Event.PROPOSAL, stage=0, probe=i, arm=arm_of(i), lr=trunk.lr, status=trunk.status)
        self.race.sort_out()

    @property
    def trunks(self) -> list[Trunk]:
        """One for each learning rate, the smallest first."""
        return self.race.trunks

    @property
    def plan(self) -> RacePlan:
        return self.race.plan

    def follow(self, plan: RacePlan) -> None:
        """Race by another plan than the default; before anything has been reported."""
        self.race.follow(plan)
        self._boundaries = self._lay_boundaries()

    def _lay_boundaries(self) -> tuple[int, ...]:
        """Steps at which checkpoints are due: rungs, commits, the end of the envelope's hold, the end."""
        spaced = {round(self.total_steps * i / self.commits) for i in range(1, self.commits + 1)}
        steps = (self.total_steps,) if self.heir is not None else self.plan.steps
        late = {
            step
            for step in (*spaced, hold_end(self.envelope, self.total_steps))
            if step > (0 if self.heir is not None else steps[0])
        }
        return tuple(sorted({*steps, *late}))

    def extend(self, total_steps: int) -> None:
        """Lengthen a run whose race is over, finished or not, to `total_steps`.

        The steps trained while the envelope held stay; what came after is trained again at the longer envelope. Raises
        ValueError if the envelope does not hold first, the race is still on, or `total_steps` is not larger.
        """
        if self.batch_growth:
            raise ValueError("a run whose batch grows cannot be extended: shares of it would fall on other steps")
        decided = len(self.race.course.decisions)
        heir = only_racing(self.trunks, self.envelope, self.total_steps, total_steps, decided)
        back_to_hold(self.trunks[heir], hold_end(self.envelope, self.total_steps))
        self.total_steps, self.phase, self.heir = total_steps, "race", heir
        self._boundaries = self._lay_boundaries()
        self.emit(Event.EXTEND, total_steps=total_steps, step=self.trunks[heir].step, lr=self.trunks[heir].lr)

    # -- what is wanted ------------------------------------------------------------------------------------------------

    @property
    def done(self) -> bool:
        return self.phase == "done"

    @property
    def trials_needed(self) -> int:
        return len(self.trunks)  # the walk may go all the way down

    @property
    def breadth(self) -> int:
        in_play = {self.heir} if self.heir is not None else self.race.course.play
        return max(1, min(FEW, len({*in_play, *self._ahead(1), *self._to_keep()})))

    def cost(self, slots: int) -> tuple[float, float]:
        return bound(len(self.trunks), self.plan, slots, len(self._kept))

    def usual(self, slots: int) -> tuple[float, float]:
        return usual(len(self.trunks), self.plan, slots, self.run_ahead, len(self._kept))

    def _alone(self) -> int | None:
        """The one trunk that is left, where there is only one."""
        return self.race.course.winner if self.heir is None else self.heir

    def _needed(self) -> dict[int, int]:
        """Trunk -> the step to which the rule needs it."""
        if self.done:
            return {}
        alone = self._alone()
        if alone is not None:
            last = [alone] if self.trunks[alone].step < self.total_steps else self._to_keep()
            return dict.fromkeys(last, self.total_steps)
        return {i: self.plan.step(rung) for i, rung in self.race.course.missing.items()}

    def _ahead(self, slots: int) -> list[int]:
        """Trunks that `slots` slots which the rule leaves over run ahead."""
        if not self.run_ahead or self.done or self.heir is not None:
            return []
        return ahead_of(self.trunks, self.race.course, self.plan, not self.race.baseline.known, slots)

    def _left_over(self) -> int:
        """Slots beside those of the trunks in play, which are two at least before the race has settled."""
        course = self.race.course
        settled = bool(course.decisions) and course.decisions[-1].rung >= self.plan.settled
        return max(0, self.concurrency - max(1 if settled else 2, len(course.play)))

    @property
    def _kept(self) -> Sequence[float]:
        return (self.points_to_evaluate or ()) if self.keep else ()

    def _to_keep(self) -> list[int]:
        over = self.done or self.heir is not None
        return [] if over else on_the_way(self.trunks, self._kept, self.total_steps)

    def _spare(self) -> list[int]:
        """What is trained on slots that the rule leaves over."""
        slots = self._left_over()
        return list(dict.fromkeys([*self._ahead(slots), *self._to_keep()]))[:slots]

    def wanted(self) -> list[Segment]:
        needed = sorted(self._needed(), key=lambda i: (self.trunks[i].step, i))
        free = [i for i in dict.fromkeys([*needed, *self._spare()]) if arm_of(i) not in self._issued]
        return [self._segment(i) for i in free]

    def demand(self) -> dict[str, int]:
        ahead = {arm_of(i): 0 for i in self._spare()}
        needed = self._needed()
        if len(self.race.course.play) == 1:  # nobody is left to join it
            needed = dict.fromkeys(needed, self.total_steps)
        return {**ahead, **{arm_of(i): step - self.trunks[i].front(self.plan) for i, step in needed.items()}}

    def _segment(self, i: int) -> Segment:
        trunk, baseline = self.trunks[i], self.race.baseline
        boundaries = tuple(boundary for boundary in self._boundaries if boundary > trunk.step)
        until = self.plan.step(self.plan.first) if not baseline.known and i == baseline_of(self.trunks) else 0
        reports = tuple(FIRST_READINGS if boundary <= until else 1 for boundary in boundaries)
        return Segment(arm_of(i), "trunk", 0, trunk.lr, trunk.step, boundaries, reports, trunk.checkpoint,
                       self.envelope, self.total_steps, self.warmup_steps, self.growth.points)  # fmt: skip

    # -- reports -------------------------------------------------------------------------------------------------------

    def report(self, arm: str, point: Point, can_save: bool = True) -> Verdict:
        i = int(arm[1:])
        trunk = self.trunks[i]
        if self.done or not trunk.active:
            return Verdict.FINISH
        before = trunk.hear(point)
        if not math.isfinite(score_of(point)):
            self._give_up(i, "diverged")
            return Verdict.FINISH
        if self.heir is None:
            plan = self.plan
            self.race.hear(i, point, before)
            if self.plan is not plan:
                self._boundaries = self._lay_boundaries()
        crossed = any(before < boundary <= point.step for boundary in self._boundaries)
        if crossed:
            self._settle()
            if not trunk.active:
                return Verdict.FINISH
        return self._rest(i, point, can_save) if crossed or arm in self._unsaved else Verdict.CONTINUE

    def _rest(self, i: int, point: Point, can_save: bool) -> Verdict:
        """The verdict at a boundary, or at the first report after it whose state can be saved."""
        arm, trunk = arm_of(i), self.trunks[i]
        if not can_save:
            self._unsaved.add(arm)
            if point.step >= 2 * self.total_steps - trunk.step:
                raise AutoLRSError(
                    f"trunk {arm} came to step {point.step} of {self.total_steps} without a checkpoint since step "
                    f"{trunk.step}. Pass checkpoint= to tune.report at every report, or at least at those past a rung."
                )
            return Verdict.CONTINUE
        self._unsaved.discard(arm)
        if point.step >= self.total_steps:
            return Verdict.FINISH_AND_SAVE
        needed = self._needed()
        full = len(self._issued) >= self.concurrency
        if needed.get(i, 0) > point.step:
            behind = full and any(self.trunks[j].step < point.step for j in needed if arm_of(j) not in self._issued)
            return Verdict.PAUSE if behind else Verdict.SAVE
        urgent = full and any(arm_of(j) not in self._issued for j in needed)
        return Verdict.SAVE if i in self._spare() and not urgent else Verdict.PAUSE

    def _settle(self) -> None:
        """Draw every conclusion that what is known allows: who goes on, the end, or that there is none."""
        if self.heir is None:
            self.race.settle()
            self._unsaved = {arm for arm in self._unsaved if self.trunks[int(arm[1:])].active}
        self._finish_if_won()

    def _give_up(self, i: int, status: str) -> None:
        """Trunk `i` has come to grief: "diverged" or "failed"."""
        if self.heir is not None:
            self.race.turn(i, status)
            raise none_left(self.trunks)
        self.race.give_up(i, status)
        self._settle()

    def _finish_if_won(self) -> None:
        winner = self._alone()
        if winner is None or self.done or self.trunks[winner].step < self.total_steps or self._to_keep():
            return
        if self.heir is None:
            came = {winner, *arrived(self.trunks, self._kept, self.total_steps)}
            winner = best_at_the_end(self.trunks, came, self.plan.fractions[-1])
            for other in came - {winner}:
                self.race.turn(other, "dropped")
        trunk = self.trunks[winner]
        self.phase, trunk.status = "done", "won"
        if self.heir is None:
            self.race.warn_of(winner, self.lr_interval)
        self.emit(Event.DONE, arm=arm_of(winner), lr=trunk.lr, step=trunk.step, loss=trunk.saved_loss,
                  checkpoint=trunk.checkpoint)  # fmt: skip

    # -- checkpoints and failures --------------------------------------------------------------------------------------

    def saved(self, arm: str, step: int, path: str) -> None:
        trunk = self.trunks[int(arm[1:])]
        if not trunk.active or step <= trunk.step:
            return
        point = trunk.commit(step, path, max((rung for rung in self.plan.steps if rung <= step), default=0))
        if step == hold_end(self.envelope, self.total_steps):
            trunk.held = (step, path)
        self.emit(
            Event.COMMIT, stage=0, arm=arm, end=step, lr=trunk.lr, warmup_steps=self.warmup_steps, checkpoint=path,
            loss=point.loss if point else None, averaged_loss=point.averaged_loss if point else None,
        )  # fmt: skip
        self._finish_if_won()

    def failed(self, arm: str, reason: str) -> None:
        """As Policy's. An LR that fails has diverged, if others go on; where three fail at one place, it is not the LR."""
        i = int(arm[1:])
        trunk = self.trunks[i]
        if not trunk.active:
            return
        last = not any(other.active for other in self.trunks if other is not trunk)
        if last or fails_everywhere(self.trunks, self.plan, i, self.race.baseline.known):
            forgive(self.trunks)
            which = (
                "the last trunk of the race"
                if last
                else f"the third trunk that failed, and none has come further: {arm}"
            )
            raise AutoLRSError(
                f"{which} (LR {trunk.lr:.3g}) failed for good ({reason}). Its {self.last_good(arm)}, or "
                "allow more max_failures."
            )
        self.emit(Event.WARNING, stage=0, message=f"trunk {arm} (LR {trunk.lr:.3g}) failed: {reason}")
        self._give_up(i, "failed")

    def failures(self) -> list[float]:
        return [trunk.lr for trunk in self.trunks if trunk.status == "failed"]

    def try_again(self) -> None:
        if not self.done and self.heir is None:
            self.race.try_again()

    def is_open(self, arm: str) -> bool:
        return not self.done and self.trunks[int(arm[1:])].active

    def lost(self, path: str) -> None:
        for i, trunk in enumerate(self.trunks):
            if trunk.lose(path):
                if trunk.status == "won":
                    trunk.status, self.phase = "open", "race"
                self._unsaved.discard(arm_of(i))
                self.emit(Event.WARNING, stage=0, message=f"checkpoint {path} is unreadable; back to step {trunk.step}")

    def last_good(self, arm: str) -> str:
        trunk = self.trunks[int(arm[1:])]
        return way_on(trunk.checkpoint, trunk.step, "it had not reached its first rung")

    def checkpoints(self) -> set[str]:
        kept = {i for i, t in enumerate(self.trunks) if t.status == "won" or (t.active and not self.done)}
        if self.done:
            kept.update(arrived(self.trunks, self._kept, self.total_steps))
        return {path for i in kept for path in self.trunks[i].paths}

    # -- what is seen and kept -----------------------------------------------------------------------------------------

    def progress(self) -> dict[str, Any]:
        racing = [trunk for trunk in self.trunks if trunk.racing]
        leader = min((t for t in racing if t.saved_loss is not None), key=lambda t: t.saved_loss or 0.0, default=None)
        return dict(
            phase=self.phase, stage=self.race.decided, stages=len(self.plan.fractions),
            resolved=len(self.trunks) - len(racing), trials=len(self.trunks),
            lr=leader.lr if leader else None, loss=leader.saved_loss if leader else None,
            step=max((trunk.step for trunk in racing), default=0), total_steps=self.total_steps,
        )  # fmt: skip

    def state_dict(self) -> dict[str, Any]:
        return dict(
            policy="anchored", phase=self.phase, total_steps=self.total_steps, heir=self.heir, commits=self.commits,
            envelope=self.envelope if isinstance(self.envelope, str | None) else "function",
            warmup_steps=self.warmup_steps, **self.race.state_dict(),
        )  # fmt: skip

    def load_state_dict(self, state: dict[str, Any]) -> None:
        if state.get("policy") != "anchored":
            raise ValueError(f"this state belongs to policy {state.get('policy')!r}, not to 'anchored'")
        if missing := {"plan", "commits", "envelope"} - state.keys():
            raise ValueError(
                f"this state is of a race by an earlier rule (it has no {', '.join(sorted(missing))}): end the run with the "
                "version that began it"
            )
        if (state["envelope"] == "function") != callable(self.envelope):
            raise ValueError(f"this race began with the envelope {state['envelope']!r}, not {self.envelope!r}")
        self.envelope = self.envelope if callable(self.envelope) else state["envelope"]
        saved = conforming("the state", {name: state.get(name) for name in _SAVED}, _SAVED)
        self.phase = "done" if saved["phase"] == "done" else "race"
        self.race = Race.from_state(state, self.emit, self._kept)
        self.commits = require_int("commits", saved["commits"], 1, MANY)
        self.warmup_steps = require_int("warmup_steps", saved["warmup_steps"], 0)
        self.heir = None if saved["heir"] is None else require_int("heir", saved["heir"], 0, len(self.trunks) - 1)
        envelope_factor(self.envelope, 0, self.total_steps)
        self._issued, self._events, self._unsaved = set(), [], set()
        self._boundaries = self._lay_boundaries()


_SAVED: dict[str, Any] = dict(phase=str, heir=int | None, commits=int, warmup_steps=int)
