"""What a training loop of any library has to know about its trial's config. No Ray."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

from autolrs_ray.core.checks import require_int
from autolrs_ray.core.segments import Segment, next_report
from autolrs_ray.training.optimizers import note_built_lrs, set_lr, write_lr


class HasGroups(Protocol):
    """A torch optimizer, or a library's wrapper around one."""

    @property
    def param_groups(self) -> list[dict[str, Any]]: ...


class Follower:
    """Follows `config`: the LR of every step, the steps at which a report is due, and those at which a checkpoint is.

    Steps are optimizer steps since the start of the run, restored from the checkpoint; micro-batches whose gradients are
    accumulated are none. Without the pair (plain Tune, PBT) the LR is `config["lr"]`, and a report with a checkpoint is
    due every `config["report_every"]` steps (default 100).

    grows: the loop takes `batches_at(step)` times as many rows as at first. Raises ValueError where it does not, and is to
    (`batch_growth`).
    """

    def __init__(self, config: Mapping[str, Any], grows: bool = False) -> None:
        segment = config.get("autolrs")
        self.segment = Segment.from_config(segment) if isinstance(segment, dict) else None
        self._lr = float(config["lr"])
        if self.segment and self.segment.growth and not grows:
            raise ValueError(
                "batch_growth is for a TrainingTask, and for loops of your own that follow it: Follower(config, grows=True) "
                "says by batches_at(step) how many times as many rows a step takes. Leave batch_growth out"
            )
        self._every = require_int("report_every", config.get("report_every", 100), 1)

    @property
    def end(self) -> int | None:
        """Step at which the trial's training ends; None without the pair."""
        return self.segment.end if self.segment else None

    @property
    def total_steps(self) -> int | None:
        """Optimizer steps of the whole run, of which this trial trains a part; None without the pair."""
        return max(self.segment.total_steps, self.segment.end) if self.segment else None

    def lr_at(self, step: int) -> float:
        """Learning rate of the update from `step` to `step + 1`."""
        return self.segment.lr_at(step) if self.segment else self._lr

    def batches_at(self, step: int) -> int:
        """How many times as large as at the start the batch of the update from `step` to `step + 1` is (`batch_growth`)."""
        return self.segment.batches_at(step) if self.segment else 1

    def write_lr(self, optimizer: HasGroups, step: int) -> float:
        """Write the LR of the update from `step` to `step + 1` into `optimizer`; call it right before every update.

        Groups keep the ratios of the LRs they were built with, or came with where they were added later ("initial_lr", as
        torch's schedulers keep it). Raises ValueError if the first of those was not positive.
        """
        lr = self.lr_at(step)
        write_lr(optimizer.param_groups, lr)
        return lr

    def write_built_lrs(self, optimizer: HasGroups) -> None:
        """Write the LRs that the groups were built with: callbacks that add a group take its LR from those it finds."""
        groups = optimizer.param_groups
        for group, lr in zip(groups, note_built_lrs(groups), strict=True):
            set_lr(group, lr)

    def report_due(self, step: int) -> bool:
        """True if a report is due after `step` steps."""
        if self.segment is None:
            return step % self._every == 0
        return step > self.segment.start and next_report(self.segment, step - 1) == step

    def checkpoint_due(self, step: int) -> bool:
        """True if the report due after `step` steps must hold a checkpoint."""
        return step in self.segment.boundaries if self.segment else self.report_due(step)

    def report(self, step: int, metrics: Mapping[str, float]) -> dict[str, Any]:
        """`metrics` with what the pair reads beside them: step, lr (of the last update), stage and role."""
        result: dict[str, Any] = {**metrics, "step": step, "lr": self.lr_at(max(0, step - 1))}
        if self.segment:
            result.update(stage=self.segment.stage, role=self.segment.role)
        if self.segment and self.segment.growth:
            result["batches"] = self.batches_at(max(0, step - 1))
        return result
