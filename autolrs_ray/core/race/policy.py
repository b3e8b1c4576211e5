"""The anchored policy: LR(t) = scale * rise(t) * envelope(t), the scale found by a race of trunks from step 0.

Stage-wise search picks LRs too small too early (short-horizon bias, Wu et al. 2018). Here a field of scales trains under
one decay envelope; at rungs an LR is dropped only when it is too far behind to change places, and the last one alive is
the run itself: no step is trained twice.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

from autolrs_ray.core.checks import require_bool, require_float, require_int
from autolrs_ray.core.envelopes import EnvelopeSpec, bin_centred_grid, envelope_factor
from autolrs_ray.core.policy import AutoLRSError, Point, Verdict, finite_or_inf, refuse_ignored_lr
from autolrs_ray.core.race.field import RaceField
from autolrs_ray.core.race.plan import RacePlan
from autolrs_ray.core.race.rule import FINALISTS_FROM, FLATTERED_UNTIL, Trunk, catch_up, leader_of, losers, reach
from autolrs_ray.core.segments import Segment

HOLDS = {"wsd": 0.4, "constant": 1.0}
"""Envelopes that begin with a hold at 1, and the fraction of the run it lasts: runs under them can be extended."""


@dataclass
class AnchoredPolicy(RaceField):
    """A race of `num_lrs` LR scales over `lr_interval` under `envelope`, plus `infill` scales between the leaders.

    drift: as training goes on the best LR falls, by no more than so many decades per doubling of the steps done, until
    `settled` * T. An LR below the leader's stays while the best may still fall to it (0: none does).
    finalists: trunks that may go past 0.16 T (None: three, or a quarter of a field of more than twelve: in a denser one the
    leader's neighbours would take all places).
    averaging: score trunks on the better of raw and averaged weights where both are reported. reports: validation points up to
    each boundary before `early` * T, twice as many up to the first; later one.
    commits: checkpoints of a trunk over the whole run, beside those at rungs. branches: LRs between the leader's and four
    times that, tried from the leader's own state after the first rung at or past 0.32 T; the rungs after it decide.
    warmup: fraction of the run over which a linear rise is a factor beside the envelope (0: none).
    """

    envelope: EnvelopeSpec = "quadratic"
    finalists: int | None = None
    drift: float = 0.5
    settled: float = 0.64
    early: float = 0.32
    averaging: bool = True
    reports: int = 1
    commits: int = 10
    warmup: float = 0.2

    _boundaries: tuple[int, ...] = field(default=(), init=False, repr=False)

    def __post_init__(self) -> None:
        for name in ("num_lrs", "reports", "commits", "concurrency"):
            require_int(name, getattr(self, name), 1)
        require_int("infill", self.infill, 0)
        if self.finalists is not None:
            require_int("finalists", self.finalists, 1)
        require_int("branches", self.branches, 0)
        require_bool("averaging", self.averaging)
        require_float("drift", self.drift, 0.0, math.inf)
        require_float("settled", self.settled, 0.0, 1.0, low_open=True)
        require_float("early", self.early, 0.0, 1.0)
        self.warmup_steps = round(require_float("warmup", self.warmup, 0.0, 1.0) * self.total_steps)
        for step in (0, self.total_steps // 2, self.total_steps):
            envelope_factor(self.envelope, step, self.total_steps)
        self._boundaries = self._lay_boundaries()
        for x in bin_centred_grid(self.num_lrs):
            self._new_trunk(x)
        for i, trunk in enumerate(self.trunks):
            self.emit("proposal", stage=0, probe=i, arm=self._arm(i), lr=trunk.lr)

    def _lay_boundaries(self) -> tuple[int, ...]:
        """Steps at which checkpoints are due: rungs, commits, the end of the envelope's hold, the end."""
        spaced = {round(self.total_steps * i / self.commits) for i in range(1, self.commits + 1)}
        rungs = self.plan.rungs
        late = {step for step in (*spaced, self._hold_end()) if not rungs or step > rungs[0]}
        return tuple(sorted(set(rungs) | late | {self.total_steps}))

    def _hold_end(self) -> int:
        """Last step up to which the envelope is 1 whatever the total is; 0 where it falls from the start."""
        return int(HOLDS.get(self.envelope, 0.0) * self.total_steps) if isinstance(self.envelope, str) else 0

    def extend(self, total_steps: int) -> None:
        """Lengthen a run whose race is over, finished or not, to `total_steps`.

        The steps trained while the envelope held stay; what came after is trained again at the longer envelope. Raises
        ValueError if the envelope does not hold first, the race is still on, or `total_steps` is not larger.
        """
        alive = [trunk for trunk in self.trunks if trunk.status in ("open", "won")]
        if not self._hold_end():
            raise ValueError(
                f"envelope {self.envelope!r} falls from the start: only {' and '.join(HOLDS)} can be extended"
            )
        if total_steps <= self.total_steps:
            raise ValueError(f"total_steps must be larger than {self.total_steps}, got {total_steps}")
        if len(alive) != 1:
            raise ValueError(f"{len(alive)} learning rates are still in the race: let it come to one before extending")
        trunk = alive[0]
        if trunk.step > self._hold_end():
            if trunk.held is None:
                raise ValueError("the checkpoint at the end of the hold is lost: the run cannot be extended")
            (trunk.step, trunk.checkpoint), trunk.previous = trunk.held, None
        trunk.status, trunk.scores, trunk.saved_loss = "open", {}, None
        self.total_steps, self.phase = total_steps, "race"
        self._close_race()
        self.emit("extend", total_steps=total_steps, step=trunk.step, lr=trunk.lr)

    def _close_race(self) -> None:
        """No rungs any more: the one trunk left trains to the end."""
        self.plan, self.decided = RacePlan(self.total_steps, (), ()), 0
        self._boundaries = self._lay_boundaries()

    # -- what is wanted ------------------------------------------------------------------------------------------------

    @property
    def trials_needed(self) -> int:
        return self.num_lrs

    def _is_ahead(self, step: int) -> bool:
        """Whether a trunk at `step` waits for the others: it has passed two rungs that are not decided yet."""
        return sum(rung <= step for rung in self.plan.rungs) > self.decided + 1

    @property
    def _places(self) -> int:
        """How many trunks may go on as finalists."""
        return max(3, -(-(self.num_lrs + self.infill) // 4)) if self.finalists is None else self.finalists

    def cost(self, slots: int) -> tuple[float, float]:
        trunks, late = self.num_lrs + self.infill, min(self._places, self.num_lrs + self.infill)
        waves, last = -(-trunks // max(1, slots)), -(-late // max(1, slots))
        early = FINALISTS_FROM
        more = 0.0 if self._fork_step is None else self.branches * (1.0 - self._fork_step / self.total_steps)
        wall = waves * early + last * (1.0 - early) + (more if slots <= late else more / slots)
        return trunks * early + late * (1.0 - early) + more, wall

    def wanted(self) -> list[Segment]:
        if self.done:
            return []
        waiting = [(trunk.step, i, trunk) for i, trunk in self._open() if self._arm(i) not in self._issued]
        return [
            self._segment(i, trunk)
            for step, i, trunk in sorted(waiting, key=lambda item: item[:2])
            if not self._is_ahead(step) and step < self.total_steps
        ]

    def _segment(self, index: int, trunk: Trunk) -> Segment:
        boundaries = tuple(boundary for boundary in self._boundaries if boundary > trunk.step)
        reports = tuple(self._reports_from(low) for low in (trunk.step, *boundaries[:-1]))
        return Segment(self._arm(index), "trunk", 0, trunk.lr, trunk.step, boundaries, reports, trunk.checkpoint,
                       self.envelope, self.total_steps, self.warmup_steps)  # fmt: skip

    def _reports_from(self, step: int) -> int:
        """Reports between the boundary `step` and the next: the first rung looks back to a point early in its stretch, and
        what lies between two late boundaries decides nothing."""
        if step >= round(self.early * self.total_steps):
            return 1
        return self.reports if step else 2 * self.reports

    # -- reports -------------------------------------------------------------------------------------------------------

    def report(self, arm: str, point: Point, can_save: bool = True) -> Verdict:
        index = int(arm[1:])
        trunk = self.trunks[index]
        if self.done or trunk.status != "open":
            return Verdict.FINISH
        crossed = self._record(arm, trunk, point)
        if not math.isfinite(self._score(point)):
            self._end(index, "diverged")
            self._settle()
            return Verdict.FINISH
        if crossed:
            for rung in crossed:
                if rung in self.plan.rungs and rung not in trunk.scores:
                    self._score_rung(index, rung, self._points[arm])
            self._points[arm] = []
            self._crossings[arm].append(point)
            self._settle()
            if trunk.status != "open":
                return Verdict.FINISH
        return self._rest(arm, trunk, point, can_save) if crossed or arm in self._unsaved else Verdict.CONTINUE

    def _record(self, arm: str, trunk: Trunk, point: Point) -> list[int]:
        """Take the point in; return the boundaries crossed since the one before it."""
        points, crossings = self._points.setdefault(arm, []), self._crossings.setdefault(arm, [])
        for earlier in (points, crossings):
            while earlier and earlier[-1].step >= point.step:  # the trial was restarted and goes over old ground
                earlier.pop()
        before = max(trunk.step, *(earlier[-1].step for earlier in (points, crossings) if earlier), 0)
        points.append(point)
        return [boundary for boundary in self._boundaries if before < boundary <= point.step]

    def _rest(self, arm: str, trunk: Trunk, point: Point, can_save: bool) -> Verdict:
        """The verdict at a boundary, or at the first report after it whose state can be saved."""
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
        full = len(self._issued) >= self.concurrency
        behind = full and any(other.start < point.step for other in self.wanted())
        return Verdict.PAUSE if behind or self._is_ahead(point.step) else Verdict.SAVE

    def _score(self, point: Point) -> float:
        """Of the raw or the averaged weights, whichever are better: one of them is the final model."""
        if not self.averaging or point.averaged_loss is None:
            return point.loss
        return min(point.loss, point.averaged_loss, key=finite_or_inf)

    def _score_rung(self, index: int, rung: int, points: list[Point]) -> None:
        since = [self._score(point) for point in points]
        tail = since[-max(1, len(since) // 4) :]
        trunk, last = self.trunks[index], points[-1]
        if trunk.first_score is None:
            trunk.first_score = since[0]
        trunk.scores[rung], trunk.train_loss = sum(tail) / len(tail), last.train_loss
        trunk.moved = len(set(since)) > 1
        self.emit("rung", arm=self._arm(index), probe=index, lr=trunk.lr, step=rung, score=trunk.scores[rung],
                  loss=last.loss, averaged_loss=last.averaged_loss)  # fmt: skip

    # -- the rule ------------------------------------------------------------------------------------------------------

    def _settle(self) -> None:
        """Draw every conclusion that what is known allows: rungs, the end, or that there is none."""
        self._decide()
        self._branch()
        if not self._open() and not self.done and not self._revive():
            self._fail()
        self._finish_if_last()

    def _decide(self) -> None:
        """Decide every rung that all open trunks have passed, in order.

        A trunk that passed the rung and diverged after it takes part: it would have if the others had been faster.
        """
        while self.decided < len(self.plan.rungs) and self._parent() is None:
            rung = self.plan.rungs[self.decided]
            if any(rung not in trunk.scores for _, trunk in self._open()):
                return
            field = [t for t in self.trunks if t.status in ("open", "diverged") and rung in t.scores]
            if self.decided == 0:
                refuse_ignored_lr([(trunk.lr, trunk.scores[rung], trunk.train_loss, trunk.moved) for trunk in field])
            self._drop(rung, self.plan.tolerances[self.decided], field)
            self.decided += 1
            if self.decided == 1 and self.infill:
                self._fill_in()

    def _blown_up(self, leader: Trunk, rung: int) -> bool:
        """Whether even the leader is no better off than at its first report, and a lower LR, dropped since, was better:
        then that one was dropped wrongly, for being slow while the rise hid that the leader's LR is too large. Early on
        only: later, a model that learns its data by heart is as badly off, at any LR."""
        first = leader.first_score
        if first is None or not self.warmup_steps or rung >= round(FLATTERED_UNTIL * self.total_steps):
            return False
        score = leader.scores[rung]
        fallen = [t for t in self.trunks if t.status == "dropped" and t.lr < leader.lr and t.parent is None]
        return score >= first and any(min(t.scores.values()) < score for t in fallen)

    def _drop(self, rung: int, tolerance: float, field: list[Trunk]) -> None:
        while field and self._blown_up(leader := leader_of(field, rung), rung):
            field.remove(leader)
            if leader.status == "open":
                self._end(self.trunks.index(leader), "diverged")
        if not field:
            return
        late = rung >= round(FINALISTS_FROM * self.total_steps) or rung == self.plan.rungs[-1]
        fraction = rung / self.total_steps
        decades = reach(self.drift, self.settled, fraction)
        out = losers(field, rung, tolerance, self._places if late else None, decades, catch_up(fraction))
        for trunk in out:
            trunk.scores = {step: score for step, score in trunk.scores.items() if step <= rung}  # no run-ahead
            self._end(self.trunks.index(trunk), "dropped")
        kept = [trunk.lr for _, trunk in self._open()]
        self.emit("decision", step=rung, leader=leader.lr, score=leader.scores[rung], dropped=len(out), kept=kept)
        if len(kept) == 1 and len(field) > 1:
            self.emit("choice", stage=0, lr=kept[0], step=rung)

    def _fail(self) -> None:
        tried = ", ".join(f"{trunk.lr:.3g} ({trunk.status})" for trunk in self.trunks)
        raise AutoLRSError(
            f"no learning rate is left in the race: {tried}. Lower lr_interval, or look at the loss and the data of the "
            "first steps; the trials' error files say more."
        )

    # -- checkpoints and failures --------------------------------------------------------------------------------------

    def saved(self, arm: str, step: int, path: str) -> None:
        index = int(arm[1:])
        trunk = self.trunks[index]
        if trunk.status != "open" or step <= trunk.step:
            return
        if trunk.checkpoint is not None:
            trunk.previous = (trunk.step, trunk.checkpoint)
        trunk.step, trunk.checkpoint = step, path
        if step == self._hold_end():
            trunk.held = (step, path)
        if step == self._fork_step and not self._forked():
            self.forks[index] = (step, path)
        seen = [*self._crossings.get(arm, []), *self._points.get(arm, [])]
        point = next((point for point in seen if point.step == step), None)
        trunk.saved_loss = self._score(point) if point else None
        self.emit(
            "commit", stage=0, arm=arm, end=step, lr=trunk.lr, warmup_steps=self.warmup_steps, checkpoint=path,
            loss=point.loss if point else None, averaged_loss=point.averaged_loss if point else None,
        )  # fmt: skip
        self._settle()

    def _finish_if_last(self) -> None:
        alive = self._open()
        if not alive or any(trunk.step < self.total_steps for _, trunk in alive):
            return
        index, winner = min(alive, key=lambda item: (item[1].saved_loss is None, item[1].saved_loss, item[0]))
        for i, _ in alive:
            if i != index:
                self._end(i, "dropped")
        winner.status, self.phase = "won", "done"
        self.emit("done", arm=self._arm(index), lr=winner.lr, step=winner.step, loss=winner.saved_loss,
                  checkpoint=winner.checkpoint)  # fmt: skip

    def failed(self, arm: str, reason: str) -> None:
        index = int(arm[1:])
        trunk = self.trunks[index]
        if trunk.status != "open":
            return
        if len(self._open()) == 1:
            for other in self.trunks:  # before the first decision, whoever mends the cause gets the whole field back
                if other.status == "failed" and self.decided == 0:
                    other.restart()
            raise AutoLRSError(
                f"the last trunk of the race (LR {trunk.lr:.3g}) failed for good ({reason}). Its {self.last_good(arm)}, or "
                "allow more max_failures."
            )
        self.emit("warning", stage=0, message=f"trunk {arm} (LR {trunk.lr:.3g}) failed: {reason}")
        self._end(index, "failed")
        self._settle()

    def lost(self, path: str) -> None:
        super().lost(path)
        self._settle()  # those that are left may have been waiting for a branch that has nothing to go back to

    def progress(self) -> dict[str, Any]:
        alive = self._open() or [(i, t) for i, t in enumerate(self.trunks) if t.status == "won"]
        front = max((trunk.step for _, trunk in alive), default=0)
        leader = min((t for _, t in alive if t.saved_loss is not None), key=lambda t: t.saved_loss or 0.0, default=None)
        return dict(
            phase=self.phase, stage=self.decided, stages=len(self.plan.rungs),
            resolved=len(self.trunks) - len(alive), trials=len(self.trunks), lr=leader.lr if leader else None,
            loss=leader.saved_loss if leader else None, step=front, total_steps=self.total_steps,
        )  # fmt: skip

    def state_dict(self) -> dict[str, Any]:
        return dict(
            policy="anchored", phase=self.phase, decided=self.decided, total_steps=self.total_steps,
            extended=not self.plan.rungs, forks=list(self.forks.items()), warmup_steps=self.warmup_steps,
            trunks=[trunk.state_dict() for trunk in self.trunks],
        )  # fmt: skip

    def load_state_dict(self, state: dict[str, Any]) -> None:
        if state.get("policy") != "anchored":
            raise ValueError(f"this state belongs to policy {state.get('policy')!r}, not to 'anchored'")
        self.phase, self.decided = state["phase"], state["decided"]
        self.warmup_steps = state.get("warmup_steps", 0)  # a race begun before there was a warm-up goes on without
        if state["extended"]:
            self._close_race()
        self.trunks = [Trunk.from_state(trunk) for trunk in state["trunks"]]
        self.forks = {number: (step, path) for number, (step, path) in state["forks"]}
        self._issued, self._events = set(), []
        self._points, self._crossings, self._unsaved = {}, {}, set()
