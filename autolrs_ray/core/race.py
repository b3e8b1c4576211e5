"""The anchored policy: LR(t) = scale * envelope(t), the scale found by a race of trunks from step 0.

Stage-wise search picks LRs too small too early (short-horizon bias, Wu et al. 2018). Here a field of scales trains under
one decay envelope; at rungs an LR is dropped only when it is too far behind to change places, and the last one alive is
the run itself: no step is trained twice.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field
from typing import Any

from autolrs_ray.core import surrogate
from autolrs_ray.core.plan import EnvelopeSpec, RacePlan, envelope_factor, require_float, require_int
from autolrs_ray.core.policy import AutoLRSError, Point, Policy, Verdict, refuse_ignored_lr
from autolrs_ray.core.segments import Segment

FINALISTS_FROM = 0.32  # fraction of the run after which at most `finalists` trunks go on


@dataclass
class Trunk:
    """One LR scale. status: "open", "dropped", "diverged", "failed" or "won". scores: rung step -> averaged score."""

    lr: float
    x: float
    status: str = "open"
    infill: bool = False
    step: int = 0
    checkpoint: str | None = None
    previous: tuple[int, str] | None = None
    saved_loss: float | None = None
    scores: dict[int, float] = field(default_factory=dict)


@dataclass
class AnchoredPolicy(Policy):
    """A race of `num_lrs` LR scales over `lr_interval` under `envelope`, plus `infill` scales between the leaders.

    below: an LR below the leader is dropped at this fraction of the tolerance that one above it enjoys, because large
    LRs lag on the averaged score and overtake as the envelope falls. finalists: trunks that may go past 0.32 T.
    averaging: score trunks on averaged weights where they are reported. reports: validation points per rung.
    commits: checkpoints of a trunk over the whole run, beside those at rungs.
    """

    lr_interval: tuple[float, float] = (1e-5, 10.0)
    plan: RacePlan = field(default_factory=lambda: RacePlan.from_fractions(1000))
    envelope: EnvelopeSpec = "quadratic"
    num_lrs: int = 12
    infill: int = 0
    finalists: int = 2
    below: float = 0.25
    averaging: bool = True
    reports: int = 8
    commits: int = 20

    # durable state
    trunks: list[Trunk] = field(default_factory=list)
    decided: int = 0
    phase: str = "race"

    # volatile
    _points: dict[str, list[Point]] = field(default_factory=dict, init=False, repr=False)
    _boundaries: tuple[int, ...] = field(default=(), init=False, repr=False)

    def __post_init__(self) -> None:
        for name, minimum in (("num_lrs", 1), ("infill", 0), ("finalists", 1), ("reports", 1), ("commits", 1)):
            require_int(name, getattr(self, name), minimum)
        require_float("below", self.below, 0.0, 1.0)
        for step in (0, self.total_steps // 2, self.total_steps):
            envelope_factor(self.envelope, step, self.total_steps)
        spaced = {round(self.total_steps * i / self.commits) for i in range(1, self.commits + 1)}
        rungs = self.plan.rungs
        late = {step for step in spaced if not rungs or step > rungs[0]}
        self._boundaries = tuple(sorted(set(rungs) | late | {self.total_steps}))
        low, high = self.lr_interval
        for x in surrogate.bin_centred_grid(self.num_lrs):
            self.trunks.append(Trunk(math.exp(math.log(low) + x * math.log(high / low)), x))
        for i, trunk in enumerate(self.trunks):
            self.emit("proposal", stage=0, probe=i, arm=self._arm(i), lr=trunk.lr)

    # -- what is wanted ------------------------------------------------------------------------------------------------

    @property
    def done(self) -> bool:
        return self.phase == "done"

    @property
    def trials_needed(self) -> int:
        return self.num_lrs

    def _arm(self, index: int) -> str:
        return f"t{index:02d}"

    def _open(self) -> list[tuple[int, Trunk]]:
        return [(i, trunk) for i, trunk in enumerate(self.trunks) if trunk.status == "open"]

    def _rungs_passed(self, trunk: Trunk) -> int:
        return sum(rung in trunk.scores for rung in self.plan.rungs)

    @property
    def breadth(self) -> int:
        return len(self._open()) + (self.infill if self.decided == 0 else 0)

    def wanted(self) -> list[Segment]:
        if self.done:
            return []
        waiting = [(trunk.step, i, trunk) for i, trunk in self._open() if self._arm(i) not in self._issued]
        return [
            Segment(
                self._arm(i), "trunk", 0, trunk.lr, trunk.step,
                tuple(b for b in self._boundaries if b > trunk.step), self.reports, trunk.checkpoint, self.envelope,
                self.total_steps,
            )
            for step, i, trunk in sorted(waiting, key=lambda item: item[:2])
            if self._rungs_passed(trunk) <= self.decided + 1 and step < self.total_steps
        ]  # fmt: skip

    # -- reports -------------------------------------------------------------------------------------------------------

    def report(self, arm: str, point: Point, can_save: bool = True) -> Verdict:
        index = int(arm[1:])
        trunk = self.trunks[index]
        if self.done or trunk.status != "open":
            return Verdict.FINISH
        points = self._points.setdefault(arm, [])
        while points and points[-1].step >= point.step:  # the trial was restarted and goes over old ground
            points.pop()
        crossed = [b for b in self._boundaries if (points[-1].step if points else trunk.step) < b <= point.step]
        points.append(point)
        if not math.isfinite(self._score(point)):
            self._end(index, "diverged")
            self._decide()
            self._finish_if_last()
            return Verdict.FINISH
        if not crossed:
            return Verdict.CONTINUE
        for rung in crossed:
            if rung in self.plan.rungs and rung not in trunk.scores:
                self._score_rung(index, rung, points)
        self._points[arm] = [point]
        self._decide()
        if trunk.status != "open":
            return Verdict.FINISH
        if point.step >= self.total_steps:
            return Verdict.FINISH_AND_SAVE
        full = len(self._issued) >= self.concurrency
        behind = full and any(other.start < point.step for other in self.wanted())
        if behind or self._rungs_passed(trunk) > self.decided + 1:
            return Verdict.PAUSE
        return Verdict.SAVE if can_save else Verdict.CONTINUE

    def _score(self, point: Point) -> float:
        return point.averaged_loss if self.averaging and point.averaged_loss is not None else point.loss

    def _score_rung(self, index: int, rung: int, points: list[Point]) -> None:
        since = [self._score(point) for point in points]
        tail = since[-max(1, len(since) // 4) :]
        self.trunks[index].scores[rung] = sum(tail) / len(tail)
        self.emit("rung", arm=self._arm(index), probe=index, lr=self.trunks[index].lr, step=rung,
                  score=self.trunks[index].scores[rung], loss=points[-1].loss,
                  averaged_loss=points[-1].averaged_loss)  # fmt: skip

    # -- the rule ------------------------------------------------------------------------------------------------------

    def _decide(self) -> None:
        """Decide every rung that all open trunks have passed, in order."""
        while self.decided < len(self.plan.rungs):
            rung = self.plan.rungs[self.decided]
            alive = self._open()
            if any(rung not in trunk.scores for _, trunk in alive):
                return
            if self.decided == 0:
                refuse_ignored_lr([(trunk.lr, trunk.scores[rung]) for _, trunk in alive])
            self._drop(rung, self.plan.tolerances[self.decided], alive)
            self.decided += 1
            if self.decided == 1 and self.infill:
                self._fill_in()
        if not self._open() and not self.done:
            self._fail()

    def _drop(self, rung: int, tolerance: float, alive: list[tuple[int, Trunk]]) -> None:
        if not alive:
            return
        leader = min(alive, key=lambda item: item[1].scores[rung])[1]
        best = leader.scores[rung]
        dropped = []
        for i, trunk in alive:
            behind = (trunk.scores[rung] - best) / max(abs(best), 1e-12)
            if behind > tolerance * (1.0 if trunk.lr > leader.lr else self.below):
                dropped.append(i)
        if rung >= FINALISTS_FROM * self.total_steps:
            ranked = sorted((trunk.scores[rung], i) for i, trunk in alive if i not in dropped)
            dropped += [i for _, i in ranked[self.finalists :]]
        for i in dropped:
            self._end(i, "dropped")
        kept = [trunk.lr for _, trunk in self._open()]
        self.emit("decision", step=rung, leader=leader.lr, score=best, dropped=len(dropped), kept=kept)
        if len(kept) == 1 and len(alive) > 1:
            self.emit("choice", stage=0, lr=kept[0], step=rung)

    def _fill_in(self) -> None:
        """Propose `infill` LRs by the lower confidence bound on the first rung's scores, beside and between survivors."""
        rung = self.plan.rungs[0]
        survivors = [trunk.x for _, trunk in self._open()]
        if not survivors:
            return
        spacing = 1.0 / self.num_lrs
        low, high = max(0.0, min(survivors) - spacing), min(1.0, max(survivors) + spacing)
        observed = [
            ((trunk.x - low) / (high - low), trunk.scores[rung])
            for trunk in self.trunks
            if rung in trunk.scores and low <= trunk.x <= high
        ]
        pending: list[float] = []
        for _ in range(self.infill):
            try:
                u = surrogate.propose(observed, pending, kappa=2.0)
            except Exception as error:  # numerical libraries raise many types, and no in-fill LR is worth the run
                self.emit("warning", stage=0, message=f"surrogate failed ({error}); no in-fill LR")
                return
            pending.append(u)
            x = low + u * (high - low)
            ends = math.log(self.lr_interval[0]), math.log(self.lr_interval[1])
            self.trunks.append(Trunk(math.exp(ends[0] + x * (ends[1] - ends[0])), x, infill=True))
            i = len(self.trunks) - 1
            self.emit("proposal", stage=0, probe=i, arm=self._arm(i), lr=self.trunks[i].lr, infill=True)

    def _end(self, index: int, status: str) -> None:
        trunk = self.trunks[index]
        trunk.status = status
        self._points.pop(self._arm(index), None)
        self.emit("trunk", arm=self._arm(index), probe=index, lr=trunk.lr, status=status, step=trunk.step)

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
        if trunk.status != "open":
            return
        last = self._points.get(arm, [])
        if trunk.checkpoint is not None and trunk.checkpoint != path:
            trunk.previous = (trunk.step, trunk.checkpoint)
        trunk.step, trunk.checkpoint = step, path
        trunk.saved_loss = self._score(last[-1]) if last else trunk.saved_loss
        point = last[-1] if last else None
        self.emit(
            "commit", stage=0, arm=arm, end=step, lr=trunk.lr, checkpoint=path, loss=point.loss if point else None,
            averaged_loss=point.averaged_loss if point else None,
        )  # fmt: skip
        self._finish_if_last()

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
            raise AutoLRSError(
                f"the last trunk of the race (LR {trunk.lr:.3g}) failed for good ({reason}). Its last good checkpoint is "
                f"{trunk.checkpoint or 'none: it had not reached its first rung'} (step {trunk.step}); run the same "
                'command again with resume="auto" to go on from there, or allow more max_failures.'
            )
        self.emit("warning", stage=0, message=f"trunk {arm} (LR {trunk.lr:.3g}) failed: {reason}")
        self._end(index, "failed")
        self._decide()
        self._finish_if_last()

    def is_open(self, arm: str) -> bool:
        return not self.done and self.trunks[int(arm[1:])].status == "open"

    def lost(self, path: str) -> None:
        for trunk in self.trunks:
            if trunk.previous and trunk.previous[1] == path:
                trunk.previous = None
            if trunk.checkpoint == path:
                trunk.step, trunk.checkpoint = trunk.previous or (0, None)
                trunk.previous = None
                self.emit("warning", stage=0, message=f"checkpoint {path} is unreadable; back to step {trunk.step}")

    def checkpoints(self) -> set[str]:
        alive = [trunk for trunk in self.trunks if trunk.status in ("open", "won")]
        paths = {trunk.checkpoint for trunk in alive} | {trunk.previous[1] for trunk in alive if trunk.previous}
        return {path for path in paths if path is not None}

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
            trunks=[{**asdict(t), "scores": {str(k): v for k, v in t.scores.items()}} for t in self.trunks],
        )  # fmt: skip

    def load_state_dict(self, state: dict[str, Any]) -> None:
        if state.get("policy") != "anchored":
            raise ValueError(f"this state belongs to policy {state.get('policy')!r}, not to 'anchored'")
        self.phase, self.decided = state["phase"], state["decided"]
        self.trunks = [
            Trunk(**{
                **trunk,
                "previous": tuple(trunk["previous"]) if trunk["previous"] else None,
                "scores": {int(step): score for step, score in trunk["scores"].items()},
            })
            for trunk in state["trunks"]
        ]  # fmt: skip
        self._issued, self._points, self._events = set(), {}, []
