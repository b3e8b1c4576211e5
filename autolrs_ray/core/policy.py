"""What a policy is: the values it exchanges with whoever runs the training, and the state it must keep.

A policy never trains. It asks for segments of training (`wanted`), hears of every reported loss (`report`), of written
checkpoints (`saved`) and of failures (`failed`), and answers each report with a verdict. Whoever drives it (the Ray Tune
pair, or the plain loop in :mod:`autolrs_ray.training.local`) maps verdicts to its own verbs.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from enum import Enum
from typing import Any

from autolrs_ray.core.events import Event
from autolrs_ray.core.growth import BatchGrowth
from autolrs_ray.core.segments import Segment


class AutoLRSError(RuntimeError):
    """The run cannot go on; the message says why, and what to do."""


def way_on(checkpoint: str | None, step: int, none: str) -> str:
    """How an error of the main training ends: where that stands on storage, and how to go on. none: why there is nothing."""
    return (
        f"last good checkpoint is {checkpoint or f'none: {none}'} (step {step}); run the same command again with "
        'resume="auto" to go on from there'
    )


def finite_or_inf(loss: float) -> float:
    """`loss` for comparing: one that is not finite is the worst."""
    return loss if math.isfinite(loss) else math.inf


PERFECT = (0.0, -1.0, -100.0)
"""Scores that many learning rates may reach: a loss of 0, an accuracy of 1 or of 100 %."""


def refuse_ignored_lr(results: list[tuple[float, float, float | None, bool]]) -> None:
    """Raise AutoLRSError if three or more learning rates gave the very same losses.

    results: (lr, score, training loss or None, whether the scores before it were others). A score that never moves is no
    evidence by itself: an accuracy may lie at chance level for every LR. Nor is one that can get no better.
    """
    lrs, losses = {lr for lr, *_ in results}, {(score, train_loss) for _, score, train_loss, _ in results}
    telling = all(train_loss is not None or moved for _, _, train_loss, moved in results)
    telling = telling and not all(score in PERFECT and train_loss in (None, 0.0) for score, train_loss in losses)
    if len(lrs) >= 3 and len(losses) == 1 and telling:
        raise AutoLRSError(
            f"{len(results)} trials with learning rates from {min(results)[0]:.3g} to {max(results)[0]:.3g} all reported "
            f'the same loss {results[0][1]:.6g}: the trainable does not use config["lr"]. Write it into the optimizer\'s '
            "parameter groups after restoring (load_state_dict brings the old learning rate back)."
        )


class Verdict(Enum):
    """What the trial that has just reported does next."""

    CONTINUE = "continue"
    SAVE = "save"  # write a checkpoint, then go on
    PAUSE = "pause"  # write a checkpoint, give the slot back, wait to be wanted again
    FINISH = "finish"  # end; its state is not needed
    FINISH_AND_SAVE = "finish and save"  # write a checkpoint, then end
    ROLLBACK = "rollback"  # drop the state, wait to be wanted again from another checkpoint


@dataclass(frozen=True)
class Point:
    """One report: losses to be minimised, at `step` optimizer steps since the start of the run.

    loss: validation loss of the weights. train_loss: mean training loss since the last report. averaged_loss: validation
    loss of the averaged weights. guide, averaged_guide: the validation losses where `loss` and `averaged_loss` are of a metric
    to be maximised (negated), which says less early on. val_batches: the rows of the validation data, in training batches,
    where they are scored by the loss that is trained. None where the training does not report it.
    """

    step: int
    loss: float
    train_loss: float | None = None
    averaged_loss: float | None = None
    guide: float | None = None
    averaged_guide: float | None = None
    val_batches: float | None = None


@dataclass
class Policy(ABC):
    """A state machine over segments. Durable state is what `state_dict` returns: JSON values only."""

    total_steps: int
    seed: int = 0
    concurrency: int = 1
    batch_growth: dict[float, int] = field(
        default_factory=dict
    )  # share of the run -> multiple of the batch from there on
    _issued: set[str] = field(default_factory=set, init=False, repr=False)
    _events: list[dict[str, Any]] = field(default_factory=list, init=False, repr=False)

    @property
    @abstractmethod
    def done(self) -> bool:
        """True when the run is over and nothing is wanted any more."""

    @property
    def growth(self) -> BatchGrowth:
        """How the batch grows, by steps."""
        return BatchGrowth.of(self.batch_growth, self.total_steps)

    @property
    @abstractmethod
    def trials_needed(self) -> int:
        """Fewest trials the run takes from the start if nothing fails."""

    @property
    @abstractmethod
    def breadth(self) -> int:
        """How many trials may run side by side from here on, slots permitting."""

    @abstractmethod
    def cost(self, slots: int) -> tuple[float, float]:
        """Most compute and most wall-clock on `slots` equal slots, both in full runs, if nothing fails."""

    def usual(self, slots: int) -> tuple[float, float]:
        """The same as it mostly turns out."""
        return self.cost(slots)

    @abstractmethod
    def wanted(self) -> list[Segment]:
        """Segments that may start now and have not been issued, the most urgent first."""

    @abstractmethod
    def demand(self) -> dict[str, int]:
        """Arms that may train now, or do, and the steps that each is sure to train from its last report on while the others are
        in play too: 0 for what runs ahead of its time."""

    def set_concurrency(self, slots: int, later: int | None = None) -> None:
        """Note how many trials can run at the same time. Proposals made before stay as they are.

        later: how many may come to, on a cluster that grows; what is planned once is planned for these.
        """
        self.concurrency = max(1, slots)

    def issue(self, arm: str) -> None:
        """Note that `arm` has been given to a trial; it is not wanted again until `withdraw`."""
        self._issued.add(arm)

    def withdraw(self, arm: str) -> None:
        """Note that no trial works on `arm` any more; if it is unfinished, it is wanted again."""
        self._issued.discard(arm)

    @abstractmethod
    def report(self, arm: str, point: Point, can_save: bool = True) -> Verdict:
        """Take one report. `can_save` False: no checkpoint can be had of the state that was reported."""

    @abstractmethod
    def saved(self, arm: str, step: int, path: str) -> None:
        """Take note of a durable checkpoint of `arm` at `step`."""

    @abstractmethod
    def failed(self, arm: str, reason: str) -> None:
        """Book `arm` as failed for good. Raises AutoLRSError where the run cannot go on without it."""

    @abstractmethod
    def failures(self) -> list[float]:
        """Learning rates that are out because their trials failed for good."""

    @abstractmethod
    def try_again(self) -> None:
        """A run goes on: what failed before anything was read of it is wanted again, where that may still change something."""

    @abstractmethod
    def is_open(self, arm: str) -> bool:
        """True while `arm` still has steps to train, now or after a pause."""

    @abstractmethod
    def lost(self, path: str) -> None:
        """Take note that the checkpoint at `path` cannot be read, and go back to the one before it."""

    @abstractmethod
    def last_good(self, arm: str) -> str:
        """For the errors that end a run in `arm`: its last good checkpoint, and how to go on from there."""

    @abstractmethod
    def checkpoints(self) -> set[str]:
        """Paths that are still needed; every other checkpoint of the run may be deleted."""

    @abstractmethod
    def progress(self) -> dict[str, Any]:
        """What a person wants to see while it runs: phase, stage, stages, probes, lr, loss, step, total_steps."""

    @abstractmethod
    def state_dict(self) -> dict[str, Any]:
        """The durable state, as JSON values."""

    @abstractmethod
    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from `state`. Nothing counts as issued: every unfinished segment is wanted again."""

    def emit(self, event: Event, **fields: Any) -> None:
        """Have an event written to the journal. Raises ValueError for a name that is none of `Event`'s."""
        self._events.append({"event": Event(event), **fields})

    def drain_events(self) -> list[dict[str, Any]]:
        """Events since the last call, for the journal."""
        events, self._events = self._events, []
        return events
