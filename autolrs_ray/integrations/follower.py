"""What a training loop of any library has to know about its trial's config. No Ray."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, Protocol

from torch import Tensor

from autolrs_ray.core.checks import require_int
from autolrs_ray.core.segments import Segment, next_report


class HasGroups(Protocol):
    """A torch optimizer, or a library's wrapper around one."""

    @property
    def param_groups(self) -> list[dict[str, Any]]: ...


class Follower:
    """Follows `config`: the LR of every step, the steps at which a report is due, and those at which a checkpoint is.

    Steps are optimizer steps since the start of the run, restored from the checkpoint; micro-batches whose gradients are
    accumulated are none. Without the pair (plain Tune, PBT) the LR is `config["lr"]`, and a report with a checkpoint is
    due every `config["report_every"]` steps (default 100).
    """

    def __init__(self, config: Mapping[str, Any]) -> None:
        segment = config.get("autolrs")
        self.segment = Segment.from_config(segment) if isinstance(segment, dict) else None
        self._lr = float(config["lr"])
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

    def write_lr(self, optimizer: HasGroups, step: int) -> float:
        """Write the LR of the update from `step` to `step + 1` into `optimizer`; call it right before every update.

        Groups keep the ratios of the LRs they were built with, or came with where they were added later ("initial_lr", as
        torch's schedulers keep it). Raises ValueError if the first of those was not positive.
        """
        lr, groups = self.lr_at(step), optimizer.param_groups
        first = _built(groups)
        for group in groups:
            _set(group, lr * (group["initial_lr"] / first))
        return lr

    def write_built_lrs(self, optimizer: HasGroups) -> None:
        """Write the LRs that the groups were built with: callbacks that add a group take its LR from those it finds."""
        _built(optimizer.param_groups)
        for group in optimizer.param_groups:
            _set(group, group["initial_lr"])

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
        return result


def _built(groups: Iterable[dict[str, Any]]) -> float:
    """Note in every group the LR it was built with, where that is not yet noted; returns that of the first."""
    groups = list(groups)
    for group in groups:
        if "initial_lr" not in group:
            group["initial_lr"] = float(group["lr"])
            if isinstance(
                group["lr"], Tensor
            ):  # one tensor may be the LR of several groups, and the default of those to come
                group["lr"] = group["lr"].clone()
        group["initial_lr"] = float(group["initial_lr"])
    first: float = groups[0]["initial_lr"]
    if not first > 0:
        raise ValueError(f"build the optimizer with lr > 0 in its first group, got {first}: ratios are kept to it")
    return first


def _set(group: dict[str, Any], lr: float) -> None:
    if isinstance(group["lr"], Tensor):
        group["lr"].fill_(lr)
    else:
        group["lr"] = lr
