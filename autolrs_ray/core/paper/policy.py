"""The paper's policy: Algorithm 1 of AutoLRS (Jin et al., ICLR 2021), with probes that may run at the same time."""

from __future__ import annotations

import math
from dataclasses import dataclass

from autolrs_ray.core.checks import require_bool, require_float, require_int, validate_points
from autolrs_ray.core.envelopes import LogInterval, envelope_factor
from autolrs_ray.core.events import Event
from autolrs_ray.core.paper.cost import MAX_ROLLBACKS, MAX_ROUNDS, bound, usual
from autolrs_ray.core.paper.forecast import Forecast
from autolrs_ray.core.paper.probes import (
    Start,
    best_of,
    half_is_left,
    has_blown_up,
    judge,
    next_smaller,
    opening_loss,
    series_of,
)
from autolrs_ray.core.paper.proposals import Probe, ProposalRule
from autolrs_ray.core.paper.state import MAIN, PaperState
from autolrs_ray.core.policy import AutoLRSError, Point, Verdict, refuse_ignored_lr
from autolrs_ray.core.segments import Segment


@dataclass
class PaperPolicy(PaperState):
    """Stage-wise search. Symbols of the paper: tau = stage_steps, tau' = probe_steps, k = num_lrs.

    series: "authors" ranks probes by training loss up to the first stage of tau_max steps and by validation loss after it,
    "validation" by validation loss always. initial: "grid" (4 bin-centred LRs, or as many as run at once) or "random" (one
    random LR). kappa: weight of the uncertainty; the authors' settings are kappa=1000, initial="random".
    A probe that ends above 4 times the larger of the stage's start loss and the run's first (validation losses) has diverged;
    a main trial that does goes back to the stage's start with the best of the smaller LRs.
    promote: hand the winning probe's state to the main trial instead of training its steps again.
    floor: lower bound of the loss that is minimised (0, until a loss lies below it; None where it has none, as a density's or
    a metric to be maximised, whose sign is changed).
    envelope: the paper has none; with one, LR(t) = stage LR * envelope(t).
    points_to_evaluate: LRs of your own that every stage tries first; they count among its `num_lrs`.
    """

    def __post_init__(self) -> None:
        for name in ("probe_reports", "main_reports", "concurrency"):
            require_int(name, getattr(self, name), 1)
        require_bool("promote", self.promote)
        if self.floor is not None:
            self.floor = require_float("floor", self.floor, -math.inf, math.inf)
        if self.series not in ("authors", "validation"):
            raise ValueError(f'series must be "authors" or "validation", got {self.series!r}')
        own = self.points_to_evaluate = validate_points(self.points_to_evaluate, self.lr_interval)
        x = tuple(map(LogInterval(*self.lr_interval).x, own))
        self._rule = ProposalRule(self.num_lrs, self.kappa, self.initial, self.fit, self.seed, x)
        if len(own) > self.num_lrs:
            raise ValueError(
                f"points_to_evaluate are the first of the num_lrs={self.num_lrs} probes of a stage, got {len(own)}"
            )
        envelope_factor(self.envelope, 0, self.total_steps)
        self._stages = len(self.plan.stages())
        self.interval = self.lr_interval
        self._begin()

    def _begin(self) -> None:
        self.step, self.checkpoint, self.probes, self.chosen = 0, None, [], None
        self.loss = self.train_loss = self.first_loss = None
        self.stage, self.phase = self.plan.stage(0, self.plan.warmup_steps), "warmup"
        if not self.plan.warmup_steps:
            self._open_stage()

    # -- what is wanted ------------------------------------------------------------------------------------------------

    @property
    def trials_needed(self) -> int:
        return 1 + self.num_lrs * self._stages

    @property
    def breadth(self) -> int:
        return self.q

    def usual(self, slots: int) -> tuple[float, float]:
        return usual(self.plan, self.num_lrs, self._rule.round_of(max(1, slots)), self.promote)

    def cost(self, slots: int) -> tuple[float, float]:
        return bound(self.plan, self.num_lrs, self._rule.round_of(max(1, slots)), self.promote)

    def wanted(self) -> list[Segment]:
        if self.phase == "search":
            self._propose()
            arms = [(self._arm(i), probe) for i, probe in enumerate(self.probes) if probe.status == "open"]
            return [self._probe_segment(arm, probe) for arm, probe in arms if arm not in self._issued]
        if self.phase in ("warmup", "train") and MAIN not in self._issued:
            return [self._main_segment()]
        return []

    def demand(self) -> dict[str, int]:
        if self.phase == "search":
            self._propose()
            steps = self.stage.probe_steps
            return {self._arm(i): steps for i, probe in enumerate(self.probes) if probe.status == "open"}
        if self.done:
            return {}
        segment = self._main_segment()
        return {MAIN: segment.end - segment.start}

    def _probe_segment(self, arm: str, probe: Probe) -> Segment:
        end = self.stage.start + self.stage.probe_steps
        return self._segment(arm, "probe", probe.lr, self.stage.start, end, self.probe_reports, self.checkpoint)

    def _main_segment(self) -> Segment:
        if self.phase == "warmup":
            end = self.plan.warmup_steps
            return Segment(MAIN, "main", -1, self.plan.warmup_lr, 0, (end,), self.main_reports, None, None,
                           self.total_steps, end, self.growth.points)  # fmt: skip
        assert self.chosen is not None
        probe = self.probes[self.chosen]
        promoted = self.promote and probe.checkpoint is not None and probe.step < self.stage.end
        start, source = (probe.step, probe.checkpoint) if promoted else (self.stage.start, self.checkpoint)
        return self._segment(MAIN, "main", probe.lr, start, self.stage.end, self.main_reports, source)

    def _segment(
        self, arm: str, role: str, lr: float, start: int, end: int, reports: int, source: str | None
    ) -> Segment:
        return Segment(arm, role, self.stage.index, lr, start, (end,), reports, source, self.envelope, self.total_steps,
                       growth=self.growth.points)  # fmt: skip

    # -- proposals -----------------------------------------------------------------------------------------------------

    def set_concurrency(self, slots: int, later: int | None = None) -> None:
        super().set_concurrency(max(slots, later or 0))
        if self.phase == "search" and len(self.probes) <= 1:  # the first proposal is the same for every q
            self.q = self._rule.round_of(self.concurrency)

    def _open_stage(self) -> None:
        self.phase, self.q = "search", self._rule.round_of(self.concurrency)
        self.interval, self.rounds, self.rollbacks, self.probes, self.chosen = self.lr_interval, 0, 0, [], None
        self._points = {}
        self.emit(Event.STAGE, stage=self.stage.index, start=self.stage.start, steps=self.stage.steps,
                  probe_steps=self.stage.probe_steps, concurrency=self.q)  # fmt: skip

    def _propose(self) -> None:
        first = self.rounds * self.num_lrs
        while proposal := self._rule.next_x(self.stage.index, self.rounds, self.probes[first:], self.q):
            x, failure = proposal
            if failure:
                self.emit(
                    Event.WARNING, stage=self.stage.index, message=f"surrogate failed ({failure}); space-filling LR"
                )
            i, own = len(self.probes), self.points_to_evaluate or ()
            lr = own[i] if i < len(own) else LogInterval(*self.interval).lr(x)
            self.probes.append(Probe(lr, x))
            self.emit(Event.PROPOSAL, stage=self.stage.index, probe=i, arm=self._arm(i), lr=lr)

    # -- reports -------------------------------------------------------------------------------------------------------

    def report(self, arm: str, point: Point, can_save: bool = True) -> Verdict:
        if arm == MAIN:
            return self._report_main(point, can_save)
        index = next((i for i, probe in enumerate(self.probes) if self._arm(i) == arm), None)
        if self.phase != "search" or index is None or self.probes[index].status != "open":
            return Verdict.FINISH
        self._record(arm, point)
        if not math.isfinite(point.loss):
            self._resolve(index, "diverged")
            return Verdict.FINISH
        if point.step < self.stage.start + self.stage.probe_steps:
            return Verdict.CONTINUE
        self.probes[index].step = point.step
        self._resolve(index, "done")
        leads = best_of(self.probes) == index
        return Verdict.FINISH_AND_SAVE if leads and self.promote and can_save else Verdict.FINISH

    def _record(self, arm: str, point: Point) -> None:
        points = self._points.setdefault(arm, [])
        while points and points[-1].step >= point.step:  # the trial was restarted and goes over old ground
            points.pop()
        points.append(point)

    def _resolve(self, index: int, status: str) -> None:
        """A probe has ended: "done", "diverged" or "failed"."""
        probe, points = self.probes[index], self._points.pop(self._arm(index), [])
        by_training = self.series == "authors" and self.plan.ranks_by_training(self.stage.index)
        probe.series, steps, losses = series_of(points, self.stage.start, by_training)
        probe.first_loss = points[0].loss if points and math.isfinite(points[0].loss) else None
        probe.status, method = status, "diverged"
        if status == "done" and all(math.isfinite(loss) for loss in losses):
            probe.steps, probe.losses = steps, losses
            probe.loss, probe.train_loss = points[-1].loss, points[-1].train_loss
            probe.moved = len({self.loss, *(point.loss for point in points)} - {None}) > 1
            found = self._judge(probe)
            method = found.method
            if found.failure:
                message = f"forecaster failed ({found.failure}); the mean of the last losses instead"
                self.emit(Event.WARNING, stage=self.stage.index, message=message)
        elif status == "done":
            probe.status = "diverged"
        self._emit_probe(index, method, steps, losses)
        if not any(other.status == "open" for other in self.probes):
            self._judge_again()
        self._keep_leading()
        self._choose_if_complete()

    def _judge(self, probe: Probe) -> Forecast:
        """Forecast a probe with finite losses from where the stage began, or call it diverged."""
        start = Start(self.loss, self.train_loss, self.first_loss)
        found = judge(probe, self.probes, start, self.stage.steps, self.floor)
        fine = math.isfinite(found.value)
        probe.status = "done" if fine else "diverged"
        probe.forecast, probe.stderr = (found.value, found.stderr) if fine else (None, None)
        return found

    def _judge_again(self) -> None:
        """A round is judged by what all of it, and those before it, tell: of where a stage began that nobody has measured, and
        of what can be gained at all, where nothing else says when a probe has diverged."""
        for i, probe in enumerate(self.probes):
            if probe.losses:
                before = probe.status, probe.forecast
                method = self._judge(probe).method
                if (probe.status, probe.forecast) != before:
                    self._emit_probe(i, method, probe.steps, probe.losses)

    def _emit_probe(self, index: int, method: str, steps: list[int], losses: list[float]) -> None:
        probe = self.probes[index]
        self.emit(
            Event.PROBE,
            stage=self.stage.index, probe=index, arm=self._arm(index), lr=probe.lr, status=probe.status,
            forecast=probe.forecast, stderr=probe.stderr, method=method, series=probe.series, steps=steps,
            losses=[loss if math.isfinite(loss) else None for loss in losses],
        )  # fmt: skip

    def _choose_if_complete(self) -> None:
        if self.phase != "search" or len(self.probes) < (self.rounds + 1) * self.num_lrs:
            return
        if any(probe.status == "open" for probe in self.probes):
            return
        try:
            self._choose()
        except AutoLRSError:
            self._open_stage()  # whoever mends the cause and resumes gets this stage searched anew
            raise

    def _choose(self) -> None:
        refuse_ignored_lr([(p.lr, p.loss, p.train_loss, p.moved) for p in self.probes if p.loss is not None])
        best = best_of(self.probes)
        if best is not None:
            self.phase, self.chosen = "train", best
            self.first_loss = opening_loss(self.probes, best) if self.first_loss is None else self.first_loss
            probe = self.probes[best]
            self.emit(Event.CHOICE, stage=self.stage.index, probe=best, lr=probe.lr, forecast=probe.forecast)
            return
        statuses = sorted({probe.status for probe in self.probes})
        self.rounds += 1
        if self.rounds >= MAX_ROUNDS or statuses == ["failed"]:
            tried = ", ".join(f"{probe.lr:.3g} ({probe.status})" for probe in self.probes)
            raise AutoLRSError(
                f"stage {self.stage.index}: none of the learning rates tried gave a finite loss: {tried}. Lower "
                "lr_interval, or look at the loss and the data of the first steps; the trials' error files say more."
            )
        self.interval = (self.interval[0] / 100.0, self.interval[0])
        self.emit(Event.WARNING, stage=self.stage.index, message=f"all probes diverged; trying {self.interval} instead")

    def _report_main(self, point: Point, can_save: bool) -> Verdict:
        if self.phase not in ("warmup", "train"):
            return Verdict.PAUSE
        if not math.isfinite(point.loss):
            return self._roll_back(point)
        if self.first_loss is None and self.phase == "warmup":
            self.first_loss = point.loss
        end = self.plan.warmup_steps if self.phase == "warmup" else self.stage.end
        if point.step < end:
            return Verdict.CONTINUE
        if self._went_wrong(point):  # at the end only: at a high LR a loss may rise at first
            return self._roll_back(point)
        if not can_save:
            patience = max(self.stage.steps, end - self.step)
            if point.step >= end + patience:
                raise AutoLRSError(
                    f"the main trial came to step {point.step} without a checkpoint; its segment ended at {end}. "
                    "Pass checkpoint= to tune.report at least once every stage_steps steps."
                )
            return Verdict.CONTINUE
        self._end = point  # `loss` stays the stage's start until the end is durable
        return Verdict.FINISH_AND_SAVE if point.step >= self.total_steps else Verdict.PAUSE

    def _went_wrong(self, point: Point) -> bool:
        """Whether a stage that ends so is to be trained again at a smaller LR: its probe, a tenth as long, saw nothing of it.

        Where it diverged, and once where it only ends above its start, if an LR of half its own was tried. Never in the
        warm-up, which has no other LR, or with a state from before first losses were kept.
        """
        if self.phase == "warmup" or self.chosen is None or self.first_loss is None:
            return False
        start = self.first_loss if self.loss is None else self.loss
        again = not self.rollbacks and half_is_left(self.probes, self.chosen)
        blown_up = has_blown_up(point, (self.loss, self.first_loss), self.probes, self.floor)
        return blown_up or (point.loss > start and again)

    def _roll_back(self, point: Point) -> Verdict:
        """The chosen LR diverged, or rose, after its probe ended: forbid it and take the best of the smaller ones."""
        self.rollbacks += 1
        lr = self.plan.warmup_lr if self.chosen is None else self.probes[self.chosen].lr
        best = None if self.chosen is None else next_smaller(self.probes, self.chosen)
        if best is None or self.rollbacks > MAX_ROLLBACKS:
            raise AutoLRSError(
                f"the main trial diverged at step {point.step} with {lr=:.3g} and no smaller learning rate is left; "
                f"the last good checkpoint is {self.checkpoint} (step {self.step}). Start anew with a lower lr_interval."
            )
        for probe in self.probes:
            if probe.lr > self.probes[best].lr:
                probe.status = "diverged"
        self.chosen = best
        self.emit(Event.ROLLBACK, stage=self.stage.index, step=point.step, lr=lr, new_lr=self.probes[best].lr)
        return Verdict.ROLLBACK

    # -- checkpoints and failures --------------------------------------------------------------------------------------

    def saved(self, arm: str, step: int, path: str) -> None:
        if arm != MAIN:
            leading = self._leading()
            if leading is not None and self._arm(leading) == arm and self.probes[leading].checkpoint != path:
                self.probes[leading].checkpoint, self.probes[leading].step = path, step
                self.emit(Event.SAVED, stage=self.stage.index, arm=arm, step=step, checkpoint=path)
            return
        if self.phase == "warmup" and step >= self.plan.warmup_steps:
            self._commit(step, path, self.plan.warmup_lr, None)
        elif self.phase == "train" and step >= self.stage.end:
            assert self.chosen is not None
            probe = self.probes[self.chosen]
            self._commit(step, path, probe.lr, probe.forecast)

    def _commit(self, step: int, path: str, lr: float, forecast_value: float | None) -> None:
        warmup, end = self.phase == "warmup", self._end
        row = dict(
            stage=-1 if warmup else self.stage.index, start=self.step, end=step, lr=lr, forecast=forecast_value,
            loss=None if end is None else end.loss, warmup=warmup,
        )  # fmt: skip
        if not warmup:
            self._remember_stage(lr, forecast_value)
        self.step, self.checkpoint, self.loss = step, path, row["loss"]
        self.train_loss = None if end is None else end.train_loss
        self.withdraw(MAIN)
        self.emit(Event.COMMIT, **row, checkpoint=path)
        if step >= self.total_steps:
            self.phase = "done"
            self.emit(Event.DONE, step=step, loss=self.loss, checkpoint=path)
            return
        self.stage = self.plan.stage(0 if warmup else self.stage.index + 1, step)
        self._open_stage()

    def failed(self, arm: str, reason: str) -> None:
        if arm == MAIN:
            raise AutoLRSError(
                f"the main trial failed for good ({reason}). The {self.last_good(arm)}, or allow more max_failures."
            )
        for i, probe in enumerate(self.probes):
            if self._arm(i) == arm and probe.status == "open":
                self.emit(Event.WARNING, stage=self.stage.index, message=f"probe {arm} failed: {reason}")
                self._resolve(i, "failed")

    def try_again(self) -> None:
        """As Policy's: the failed probes of the round."""
        if self.phase == "search":
            for probe in self.probes[self.rounds * self.num_lrs :]:
                probe.status = "open" if probe.status == "failed" else probe.status

    def lost(self, path: str) -> None:
        for probe in self.probes:
            if probe.checkpoint == path:
                probe.checkpoint = None
        if self.checkpoint != path:
            if self.previous is not None and self.previous["checkpoint"] == path:
                self.previous = None
            return
        back, self.previous = self.previous, None
        way = "starting from scratch" if back is None else "going back a stage"
        self.emit(Event.WARNING, stage=self.stage.index, message=f"checkpoint {path} is unreadable; {way}")
        self._issued.discard(MAIN)
        if back is None:
            self._begin()
            return
        self._return_to_stage(back)
