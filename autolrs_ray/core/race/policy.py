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

from autolrs_ray.core.checks import require_bool, require_float, require_int, validate_points
from autolrs_ray.core.envelopes import EnvelopeSpec, LogInterval, bin_centred_grid, envelope_factor
from autolrs_ray.core.events import Event
from autolrs_ray.core.policy import AutoLRSError, Point, Policy, Verdict, finite_or_inf, refuse_ignored_lr, way_on
from autolrs_ray.core.race.ahead import ahead_of
from autolrs_ray.core.race.baseline import Baseline, baseline_of
from autolrs_ray.core.race.plan import FIRST_READINGS, RacePlan
from autolrs_ray.core.race.points import arrived, best_at_the_end, field_of, on_the_way
from autolrs_ray.core.race.readings import final_of, score_of
from autolrs_ray.core.race.rule import Course, Reading, walk
from autolrs_ray.core.race.trouble import caveat, fails_everywhere, forgive, none_left
from autolrs_ray.core.race.trunk import ENDED, Trunk
from autolrs_ray.core.segments import Segment

HOLDS = {"wsd": 0.4, "constant": 1.0}
"""Envelopes that begin with a hold at 1, and the fraction of the run it lasts: runs under them can be extended."""

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
    trunks: list[Trunk] = field(default_factory=list, init=False)
    baseline: Baseline = field(default_factory=Baseline, init=False)
    phase: str = field(default="race", init=False)
    heir: int | None = field(default=None, init=False)  # the one trunk of a race that is over and was extended
    plan: RacePlan = field(init=False)
    warmup_steps: int = field(init=False)  # of the run as it began: extending it changes none of them
    decided: int = field(default=0, init=False)

    # volatile
    _course: Course = field(init=False, repr=False)
    _boundaries: tuple[int, ...] = field(default=(), init=False, repr=False)
    _unsaved: set[str] = field(default_factory=set, init=False, repr=False)

    def __post_init__(self) -> None:
        for name in ("num_lrs", "commits", "concurrency"):
            require_int(name, getattr(self, name), 1)
        for name in ("run_ahead", "keep"):
            require_bool(name, getattr(self, name))
        own = self.points_to_evaluate = validate_points(self.points_to_evaluate, self.lr_interval)
        if self.keep and not own:
            raise ValueError(
                "keep=True trains the learning rates of points_to_evaluate to the end: give some, got none"
            )
        rise = require_float("warmup", self.warmup, 0.0, 1.0)
        self.warmup_steps = round(rise * self.total_steps)
        self.plan = RacePlan.of(self.total_steps, rise=rise)
        for step in (0, self.total_steps // 2, self.total_steps):
            envelope_factor(self.envelope, step, self.total_steps)
        self._boundaries = self._lay_boundaries()
        interval = LogInterval(*self.lr_interval)
        self.trunks = field_of((interval.lr(x) for x in bin_centred_grid(self.num_lrs)), own)
        for i, trunk in enumerate(self.trunks):
            self.emit(Event.PROPOSAL, stage=0, probe=i, arm=_arm(i), lr=trunk.lr, status=trunk.status)
        self._course = self._walk()
        self._sort_out()

    def follow(self, plan: RacePlan) -> None:
        """Race by another plan than the default; before anything has been reported."""
        self.plan = plan
        self._boundaries, self._course = self._lay_boundaries(), self._walk()

    def _lay_boundaries(self) -> tuple[int, ...]:
        """Steps at which checkpoints are due: rungs, commits, the end of the envelope's hold, the end."""
        spaced = {round(self.total_steps * i / self.commits) for i in range(1, self.commits + 1)}
        steps = (self.total_steps,) if self.heir is not None else self.plan.steps
        late = {step for step in (*spaced, self._hold_end()) if step > (0 if self.heir is not None else steps[0])}
        return tuple(sorted({*steps, *late}))

    def _hold_end(self) -> int:
        """Last step up to which the envelope is 1 whatever the total is; 0 where it falls from the start."""
        return int(HOLDS.get(self.envelope, 0.0) * self.total_steps) if isinstance(self.envelope, str) else 0

    def extend(self, total_steps: int) -> None:
        """Lengthen a run whose race is over, finished or not, to `total_steps`.

        The steps trained while the envelope held stay; what came after is trained again at the longer envelope. Raises
        ValueError if the envelope does not hold first, the race is still on, or `total_steps` is not larger.
        """
        alive = [i for i, trunk in enumerate(self.trunks) if trunk.status in ("open", "won")]
        if not self._hold_end():
            raise ValueError(
                f"envelope {self.envelope!r} falls from the start: only {' and '.join(HOLDS)} can be extended"
            )
        if total_steps <= self.total_steps:
            raise ValueError(f"total_steps must be larger than {self.total_steps}, got {total_steps}")
        if len(alive) != 1 or not self._course.decisions:
            raise ValueError(f"{len(alive)} learning rates are still in the race: let it come to one before extending")
        trunk = self.trunks[alive[0]]
        if trunk.step > self._hold_end():
            if trunk.held is None:
                raise ValueError("the checkpoint at the end of the hold is lost: the run cannot be extended")
            (trunk.step, trunk.checkpoint), trunk.previous = trunk.held, None
        trunk.status, trunk.saved_loss, trunk.points = "open", None, []
        self.total_steps, self.phase, self.heir = total_steps, "race", alive[0]
        self._boundaries = self._lay_boundaries()
        self.emit(Event.EXTEND, total_steps=total_steps, step=trunk.step, lr=trunk.lr)

    # -- what is wanted ------------------------------------------------------------------------------------------------

    @property
    def done(self) -> bool:
        return self.phase == "done"

    @property
    def trials_needed(self) -> int:
        return len(self.trunks)  # the walk may go all the way down

    @property
    def breadth(self) -> int:
        in_play = {self.heir} if self.heir is not None else self._course.play
        return max(1, min(FEW, len({*in_play, *self._ahead(1), *self._to_keep()})))

    def cost(self, slots: int) -> tuple[float, float]:
        count, settled = len(self.trunks), self.plan.settled
        few, kept = min(FEW, count), len(self._kept)
        compute = count * settled + few * (1.0 - settled) + kept  # all join, and three go on to the end
        joining = max(0, count - 2) * settled  # one after another, while the others wait
        return compute, min(compute, few / min(slots, few) + joining + math.ceil(kept / slots))

    def _needed(self) -> dict[int, int]:
        """Trunk -> the step to which the rule needs it."""
        if self.done:
            return {}
        alone = self._course.winner if self.heir is None else self.heir
        if alone is not None:
            last = [alone] if self.trunks[alone].step < self.total_steps else self._to_keep()
            return dict.fromkeys(last, self.total_steps)
        return {i: self.plan.step(rung) for i, rung in self._course.missing.items()}

    def _ahead(self, slots: int) -> list[int]:
        """Trunks that `slots` slots which the rule leaves over run ahead."""
        if not self.run_ahead or self.done or self.heir is not None:
            return []
        return ahead_of(self.trunks, self._course, self.plan, not self.baseline.known, slots)

    def _left_over(self) -> int:
        """Slots beside those of the trunks in play, which are two at least before the race has settled."""
        settled = bool(self._course.decisions) and self._course.decisions[-1].rung >= self.plan.settled
        return max(0, self.concurrency - max(1 if settled else 2, len(self._course.play)))

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
        free = [i for i in dict.fromkeys([*needed, *self._spare()]) if _arm(i) not in self._issued]
        return [self._segment(i) for i in free]

    def demand(self) -> dict[str, int]:
        ahead = {_arm(i): 0 for i in self._spare()}
        needed = self._needed()
        if len(self._course.play) == 1:  # nobody is left to join it
            needed = dict.fromkeys(needed, self.total_steps)
        return {**ahead, **{_arm(i): step - self.trunks[i].front(self.plan) for i, step in needed.items()}}

    def _segment(self, i: int) -> Segment:
        trunk = self.trunks[i]
        boundaries = tuple(boundary for boundary in self._boundaries if boundary > trunk.step)
        until = self.plan.step(self.plan.first) if not self.baseline.known and i == baseline_of(self.trunks) else 0
        reports = tuple(FIRST_READINGS if boundary <= until else 1 for boundary in boundaries)
        return Segment(_arm(i), "trunk", 0, trunk.lr, trunk.step, boundaries, reports, trunk.checkpoint,
                       self.envelope, self.total_steps, self.warmup_steps)  # fmt: skip

    # -- reports -------------------------------------------------------------------------------------------------------

    def report(self, arm: str, point: Point, can_save: bool = True) -> Verdict:
        i = int(arm[1:])
        trunk = self.trunks[i]
        if self.done or not trunk.active:
            return Verdict.FINISH
        before = trunk.hear(point)
        crossed = [boundary for boundary in self._boundaries if before < boundary <= point.step]
        if not math.isfinite(score_of(point)):
            self._break(i, "diverged")
            return Verdict.FINISH
        if not self.baseline.known and i == baseline_of(self.trunks):
            self.baseline.hear(point)
        if self.heir is None:
            for rung, step in zip(self.plan.fractions, self.plan.steps, strict=True):
                if step in crossed and rung not in trunk.readings:
                    self._read(i, rung, point)
        if crossed:
            self._settle()
            if not trunk.active:
                return Verdict.FINISH
        return self._rest(i, point, can_save) if crossed or arm in self._unsaved else Verdict.CONTINUE

    def _read(self, i: int, rung: float, point: Point) -> None:
        """Note what trunk `i` reads at `rung`."""
        trunk = self.trunks[i]
        index = self.plan.fractions.index(rung)
        final = None if point.guide is None else finite_or_inf(final_of(point))
        reading = Reading(score_of(point), trunk.train_loss(self.plan.steps[index - 1] if index else 0), final)
        trunk.readings[rung] = reading
        self.emit(Event.RUNG, arm=_arm(i), probe=i, lr=trunk.lr, step=self.plan.steps[index], rung=rung, score=reading.score,
                  loss=point.loss, averaged_loss=point.averaged_loss, train_loss=reading.train)  # fmt: skip
        if i == baseline_of(self.trunks):
            self.baseline.conclude(at_end=rung == self.plan.fractions[-1])

    def _rest(self, i: int, point: Point, can_save: bool) -> Verdict:
        """The verdict at a boundary, or at the first report after it whose state can be saved."""
        arm, trunk = _arm(i), self.trunks[i]
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
            behind = full and any(self.trunks[j].step < point.step for j in needed if _arm(j) not in self._issued)
            return Verdict.PAUSE if behind else Verdict.SAVE
        urgent = full and any(_arm(j) not in self._issued for j in needed)
        return Verdict.SAVE if i in self._spare() and not urgent else Verdict.PAUSE

    # -- what follows --------------------------------------------------------------------------------------------------

    def _walk(self) -> Course:
        """Ask the rule how far what has been read carries the race."""
        return walk([trunk.readings for trunk in self.trunks], self.baseline.untrained, self.plan)

    def _settle(self) -> None:
        """Draw every conclusion that what is known allows: who goes on, the end, or that there is none."""
        if self.heir is None:
            self._course = self._walk()
            self._announce()
            self._sort_out()
            if not self._course.missing and self._course.winner is None:
                raise none_left(self.trunks)
        self._finish_if_won()

    def _announce(self) -> None:
        for decision in self._course.decisions[self.decided :]:
            field_ = [i for i, trunk in enumerate(self.trunks) if decision.rung in trunk.readings]
            if self.decided == 0:
                seen = [(i, self.trunks[i].readings[decision.rung]) for i in field_]
                refuse_ignored_lr(
                    [
                        (self.trunks[i].lr, r.score, r.train, self.baseline.moved)
                        for i, r in seen
                        if math.isfinite(r.score)
                    ]
                )
            score = self.trunks[decision.leader].readings[decision.rung].score
            self.emit(Event.DECISION, step=self.plan.step(decision.rung), rung=decision.rung, score=score,
                      leader=self.trunks[decision.leader].lr, judged=decision.judged,
                      kept=[self.trunks[i].lr for i in sorted(decision.play)])  # fmt: skip
            self.decided += 1

    def _sort_out(self) -> None:
        """Every trunk's status: in play, waiting for its turn below, or given up."""
        play, winner, decisions = self._course.play, self._course.winner, self._course.decisions
        leader = decisions[-1].leader if decisions else None
        for i, trunk in enumerate(self.trunks):
            if trunk.broken or trunk.status == "won":
                continue
            if i in play or i in self._course.missing:
                if trunk.status == "dropped":
                    trunk.restart()
                    self._tell(i, "all other learning rates have diverged; it starts again")
                self._turn(i, "open")
            elif trunk.readings and trunk.status != "dropped":
                passed = winner is not None or (leader is not None and i > leader)
                self._turn(i, "dropped" if passed and trunk.lr not in self._kept else "waiting")

    def _turn(self, i: int, status: str) -> None:
        """Change a trunk's status, and say so."""
        trunk = self.trunks[i]
        if trunk.status == status:
            return
        trunk.status = status
        if status in ENDED:
            trunk.points = []
            self._unsaved.discard(_arm(i))
        if status == "waiting":
            trunk.previous = None
        self.emit(Event.TRUNK, arm=_arm(i), probe=i, lr=trunk.lr, status=status, step=trunk.step)

    def _tell(self, i: int, message: str) -> None:
        self.emit(Event.WARNING, stage=0, arm=_arm(i), message=f"LR {self.trunks[i].lr:.3g}: {message}")

    def _break(self, i: int, status: str) -> None:
        """Trunk `i` has come to grief past the last rung at which it was read."""
        trunk = self.trunks[i]
        if self.heir is None:
            rung = next((rung for rung in self.plan.fractions if rung not in trunk.readings), self.plan.fractions[-1])
            trunk.readings[rung] = Reading(math.inf)
        baseline = i == baseline_of(self.trunks)
        self._turn(i, status)
        if self.heir is not None:
            raise none_left(self.trunks)
        if baseline and not self.baseline.known:
            following = baseline_of(self.trunks)
            self.baseline.stand_in(None if following is None else self.trunks[following], self.plan)
        self._settle()

    def _finish_if_won(self) -> None:
        winner = self._course.winner if self.heir is None else self.heir
        if winner is None or self.done or self.trunks[winner].step < self.total_steps or self._to_keep():
            return
        trunk = self.trunks[winner]
        if self.heir is None:
            came = [trunk, *arrived(self.trunks, self._kept, self.total_steps)]
            trunk = best_at_the_end(came, self.plan.fractions[-1])
            for other in {*came} - {trunk}:
                self._turn(self.trunks.index(other), "dropped")
            winner = self.trunks.index(trunk)
        self.phase, trunk.status = "done", "won"
        if self.heir is None:
            judged = self._course.decisions[-1].judged
            if warning := caveat(winner, len(self.trunks), judged, self.lr_interval):
                self._tell(winner, warning)
        self.emit(Event.DONE, arm=_arm(winner), lr=trunk.lr, step=trunk.step, loss=trunk.saved_loss,
                  checkpoint=trunk.checkpoint)  # fmt: skip

    # -- checkpoints and failures --------------------------------------------------------------------------------------

    def saved(self, arm: str, step: int, path: str) -> None:
        i = int(arm[1:])
        trunk = self.trunks[i]
        if not trunk.active or step <= trunk.step:
            return
        point = trunk.commit(step, path, max((rung for rung in self.plan.steps if rung <= step), default=0))
        if step == self._hold_end():
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
        if last or fails_everywhere(self.trunks, self.plan, i, self.baseline.known):
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
        self._break(i, "failed")

    def is_open(self, arm: str) -> bool:
        return not self.done and self.trunks[int(arm[1:])].active

    def lost(self, path: str) -> None:
        for i, trunk in enumerate(self.trunks):
            if trunk.lose(path):
                if trunk.status == "won":
                    trunk.status, self.phase = "open", "race"
                self._unsaved.discard(_arm(i))
                self.emit(Event.WARNING, stage=0, message=f"checkpoint {path} is unreadable; back to step {trunk.step}")

    def last_good(self, arm: str) -> str:
        trunk = self.trunks[int(arm[1:])]
        return way_on(trunk.checkpoint, trunk.step, "it had not reached its first rung")

    def checkpoints(self) -> set[str]:
        alive = [trunk for trunk in self.trunks if trunk.active or trunk.status == "won"]
        if self.done:
            alive = [trunk for trunk in alive if trunk.status == "won"]
            alive += arrived(self.trunks, self._kept, self.total_steps)
        return {path for trunk in alive for path in trunk.paths}

    # -- what is seen and kept -----------------------------------------------------------------------------------------

    def standing(self) -> list[tuple[float, float | None, int]]:
        """(LR, score at the last rung, steps trained) of those in play, the largest LR first."""
        alive = [(i, trunk) for i, trunk in enumerate(self.trunks) if trunk.status in ("open", "won")]
        return [
            (t.lr, t.readings[max(t.readings)].score if t.readings else None, self.trunks[i].front(self.plan))
            for i, t in alive[::-1]
        ]

    def progress(self) -> dict[str, Any]:
        alive = [trunk for trunk in self.trunks if trunk.status in ("open", "won")]
        leader = min((t for t in alive if t.saved_loss is not None), key=lambda t: t.saved_loss or 0.0, default=None)
        return dict(
            phase=self.phase, stage=self.decided, stages=len(self.plan.fractions),
            resolved=len(self.trunks) - len(alive), trials=len(self.trunks),
            lr=leader.lr if leader else None, loss=leader.saved_loss if leader else None,
            step=max((trunk.step for trunk in alive), default=0), total_steps=self.total_steps,
        )  # fmt: skip

    def state_dict(self) -> dict[str, Any]:
        return dict(
            policy="anchored", phase=self.phase, decided=self.decided, total_steps=self.total_steps, heir=self.heir,
            envelope=self.envelope if isinstance(self.envelope, str | None) else "function", commits=self.commits,
            warmup_steps=self.warmup_steps, plan=self.plan.state_dict(), **self.baseline.state_dict(),
            trunks=[trunk.state_dict() for trunk in self.trunks],
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
        self.commits = state["commits"]
        self.phase, self.decided, self.heir = state["phase"], state["decided"], state["heir"]
        self.warmup_steps, self.plan = state["warmup_steps"], RacePlan.from_state(state["plan"])
        self.baseline = Baseline.from_state(state)
        self.trunks = [Trunk.from_state(trunk) for trunk in state["trunks"]]
        self._issued, self._events = set(), []
        self._unsaved = set()
        self._boundaries = self._lay_boundaries()
        self._course = self._walk()


def _arm(i: int) -> str:
    return f"t{i:02d}"
