"""The rule of the race, "walk down": one pure function of what has been read at the rungs."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from autolrs_ray.core.race.plan import RacePlan


@dataclass(frozen=True)
class Reading:
    """A trunk at a rung. score: to be minimised, inf of one that has diverged by then. train: its mean training loss since the
    rung before, None where none is reported. final: what the end is judged by, where that is not the score."""

    score: float
    train: float | None = None
    final: float | None = None


@dataclass(frozen=True)
class Untrained:
    """The same of a model that has learned nothing yet. noise, score_noise: by how much training losses and scores scatter.
    patience: readings are rough, and the leader of the rung before is to stay in play. sampling: by how much scores would
    scatter over other validation data of the same size; None where that is not known."""

    score: float
    train: float | None = None
    noise: float = 0.0
    score_noise: float = 0.0
    patience: bool = False
    sampling: float | None = None


@dataclass(frozen=True)
class Decision:
    """What the rung at `rung` has shown. judged: the leader has learned something; play: those that go on, by number."""

    rung: float
    leader: int
    judged: bool
    play: frozenset[int]


@dataclass(frozen=True)
class Course:
    """How far the readings carry a race. missing: trunk -> the rung that it is to be trained to before more can be decided;
    play: those that are compared there. winner: who has won; None while trunks are missing, or where none is left."""

    decisions: tuple[Decision, ...]
    missing: Mapping[int, float]
    play: frozenset[int]
    winner: int | None = None


Field = Sequence[Mapping[float, Reading]]


def walk(field: Field, untrained: Untrained | None, plan: RacePlan) -> Course:
    """Where a race stands: who leads, who goes on, who has won.

    field[i]: what has been read of learning rate (LR) number i, the smallest first, by rung (a nominal share of the run).
    untrained: what a model reads that has learned nothing. Until that is known, the largest LR goes to the first rung, and the
    smallest, which learns next to nothing at first, from rung to rung.

    The best LR falls as training goes on, and while the LR rises, the largest look better than they will turn out. So the race
    starts with the largest LR and walks down. At a rung those in play are level, and the best of them leads. Two go on: the
    leader and the next LR below it, which starts from step 0 where it has not started. All others wait.

    One margin says who else is in question: `close` of the progress (from the untrained score to the leader's) times the share
    of the run that is left. From the end of the rise on, the next LR above the leader goes on too while it is near: behind by
    no more than the margin, or catching up so fast, per log of the steps, that it would be ahead by as much at the end. From
    `settled` of the run on none joins, unless it is the first rung, and the LR below goes on only while it is near as well; but
    where the leader's score has got worse by more than the margin since the rung before, the walk goes on.

    A large LR may destroy a network in its first steps: its units are dead, it predicts a constant, and that may be far better
    than an untrained model whose inputs or targets are of the size of hundreds. So until `settled` the walk passes over what is
    stuck: where the second half of its training has brought the leader no more than `close` of what the first half has,
    the one that goes on below it is the next of which that cannot be said.

    None leads that has not learned: its training loss must have fallen by more than its noise, and its score too, since running
    statistics lag behind. A score that has fallen by more than its sampling noise will do alone: batches may scatter by more
    than all that there is to learn. While none has learned (a plateau), the largest LR that has not got worse stands in for the
    leader, and it and the next below go on, whatever their scores, until learning has lasted as long as the plateau. It has not
    got worse whose training loss has not risen by more than its noise. Where that is known, a score will do that has fallen by
    more than it scatters; where it is not, the score must not have risen either, once statistics have had the rise of the LR to
    follow. Where no training losses are reported, the score speaks for them.

    Only ratios of differences of losses count, so that neither their scale matters nor a constant that is added to them. Of
    equal scores the lower training loss leads, then the better reading at the rung before, and so on.
    """
    alive = _alive(field, math.inf)
    if untrained is None:
        first = {alive[-1]: plan.fractions[:1], alive[0]: plan.fractions} if alive else {}
        unread = {i: next((rung for rung in rungs if rung not in field[i]), None) for i, rungs in first.items()}
        return Course((), {i: rung for i, rung in unread.items() if rung is not None}, frozenset(first))
    decisions: list[Decision] = []
    play = {len(field) - 1}
    for rung in plan.fractions:
        learning = next((decision.rung for decision in decisions if decision.judged), None)
        race = _Level(field, untrained, plan, rung, decisions[-1] if decisions else None, learning)
        while True:
            if missing := {i: rung for i in race.alive if i in play and rung not in field[i]}:
                return Course(tuple(decisions), missing, frozenset(play.intersection(race.alive)))
            level = [i for i in race.alive if i in play]
            leader, judged = race.leader(level)
            below = race.next_below(leader, judged, play)
            walking = leader is None or race.walking(leader)
            if below is None or below in play or not walking:
                break
            play.add(below)
        if leader is None:
            return Course(tuple(decisions), {}, frozenset())
        if rung == plan.fractions[-1]:
            best = race.best(level)
            decisions.append(Decision(rung, best, judged, frozenset({best})))
            return Course(tuple(decisions), {}, frozenset({best}), best)
        play = race.going_on(level, leader, judged, walking)
        decisions.append(Decision(rung, leader, judged, frozenset(play)))
    raise AssertionError("a plan has a last rung")


def _alive(field: Field, rung: float) -> list[int]:
    """Those that have not diverged up to `rung`, the smallest first."""
    return [i for i, seen in enumerate(field) if all(math.isfinite(r.score) for at, r in seen.items() if at <= rung)]


class _Level:
    """The trunks at one rung."""

    def __init__(
        self,
        field: Field,
        untrained: Untrained,
        plan: RacePlan,
        rung: float,
        last: Decision | None,
        learning: float | None,
    ) -> None:
        self._field, self._untrained, self._plan, self._rung, self._last = field, untrained, plan, rung, last
        self._learning = learning
        self.alive = _alive(field, rung)
        self._margin = plan.close * (1.0 - rung)

    def _score(self, i: int) -> float:
        return self._field[i][self._rung].score

    def best(self, among: Iterable[int]) -> int:
        """The one with the best score; of equals, by training loss and by the rungs before. Only of LRs that are equal in all
        that, which nothing tells apart, the largest."""
        rungs = [rung for rung in reversed(self._plan.fractions) if rung <= self._rung]
        at_end = self._rung == self._plan.fractions[-1]

        def rank(i: int) -> tuple[float, list[tuple[float, float]]]:
            final = self._field[i][self._rung].final if at_end else None
            seen = [self._field[i].get(rung, Reading(math.inf)) for rung in rungs]
            return math.inf if final is None else final, [
                (r.score, math.inf if r.train is None else r.train) for r in seen
            ]

        return min(sorted(among, reverse=True), key=rank)

    def leader(self, level: list[int]) -> tuple[int | None, bool]:
        """Who leads, and whether it has learned something."""
        learned = [i for i in level if self._has_learned(i)]
        if learned:
            return self.best(learned), True
        calm = [i for i in level if self._is_calm(i)]
        return (max(calm) if calm else min(level, default=None)), False

    def _is_calm(self, i: int) -> bool:
        """Whether it has not got worse."""
        gain, noise, scatter = self._gain(i), self._untrained.noise, self._untrained.score_noise
        follows = self._rung < self._plan.rise or noise > 0.0 or gain >= -scatter
        return (self._fall(i) >= -self._noise(i) and follows) or (noise > 0.0 and gain > scatter)

    def _fall(self, i: int) -> float:
        """By how much the training loss has fallen; the score, where no training loss is reported."""
        train, first = self._field[i][self._rung].train, self._untrained.train
        return self._untrained.score - self._score(i) if train is None or first is None else first - train

    def _noise(self, i: int) -> float:
        """How much of that may be chance."""
        scored = self._field[i][self._rung].train is None or self._untrained.train is None
        return self._untrained.score_noise if scored else self._untrained.noise

    def _has_learned(self, i: int) -> bool:
        gain, sampling = self._gain(i), self._untrained.sampling
        beyond_chance = sampling is not None and gain > sampling
        return gain > self._untrained.score_noise and (beyond_chance or self._fall(i) > self._noise(i))

    def _gain(self, i: int) -> float:
        """By how much the score has got better."""
        return self._untrained.score - self._score(i)

    def next_below(self, leader: int | None, judged: bool, play: set[int]) -> int | None:
        below = self._below(min(play) if leader is None else leader, judged)
        if (
            leader is None and below is None
        ):  # all have diverged, down to the smallest: back to the last that was given up
            return min(self.alive, default=None)
        return below

    def _below(self, i: int, judged: bool) -> int | None:
        """The next LR below `i`; where `i` has learned and is stuck, the next that is not, or has not been here."""
        lower = [j for j in reversed(self.alive) if j < i]
        passing = judged and self._is_stuck(i)
        return next((j for j in lower if not (passing and self._is_stuck(j))), lower[0] if lower else None)

    def _is_stuck(self, i: int) -> bool:
        """Whether the second half of its training has brought it no more than `close` of what the first half has."""
        scores = {rung: reading.score for rung, reading in self._field[i].items()}
        half = [scores[rung] for rung in sorted(scores) if rung <= self._rung / 2.0]
        if not half or self._rung not in scores or self._rung >= self._plan.settled:
            return False
        best = min(half)
        return best - scores[self._rung] <= self._plan.close * (half[0] - best)

    def walking(self, leader: int) -> bool:
        """Whether the next LR below may still join: at the first rung, until the run has settled, and where the leader gets
        worse."""
        if self._last is None or self._rung < self._plan.settled:
            return True
        before = self._before(leader)
        if before is None:
            return False
        lost, progress = self._score(leader) - before, self._untrained.score - before
        return lost > self._margin * progress > 0.0

    def _before(self, i: int) -> float | None:
        """The score of `i` at the rung before."""
        reading = self._field[i].get(self._last.rung) if self._last else None
        return reading.score if reading else None

    def going_on(self, level: list[int], leader: int, judged: bool, walking: bool) -> set[int]:
        """Those of `level` that are trained to the next rung."""
        progress = self._untrained.score - self._score(leader)
        judged = judged and progress > 0.0
        early = self._rung < 2.0 * (self._learning or self._rung)  # it has not been learning for as long as it was not
        play = {leader}
        below = self._below(leader, judged)
        above = min((i for i in level if i > leader), default=None)
        if below in level and (walking or early or not judged or self._near(below, leader, progress)):
            play.add(below)
        if above is not None and judged and self._rung >= self._plan.rise and self._near(above, leader, progress):
            play.add(above)
        if (self._plan.patience or self._untrained.patience) and self._last and self._last.leader in level:
            play.add(self._last.leader)
        return play

    def _near(self, i: int, leader: int, progress: float) -> bool:
        """Whether `i` may still come out ahead: behind by no more than the margin, or soon ahead by as much."""
        gap = (self._score(i) - self._score(leader)) / progress
        if gap <= self._margin:
            return True
        mine, its = self._before(i), self._before(leader)
        if self._last is None or mine is None or its is None:
            return False
        closing = ((mine - its) / progress - gap) / math.log(self._rung / self._last.rung)
        return gap + self._margin < closing * math.log(1.0 / self._rung)
