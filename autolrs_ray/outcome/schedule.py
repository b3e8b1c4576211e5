"""The learned schedule: a function step -> learning rate, as JSON or CSV, and a torch scheduler that replays it.

Nothing here needs Ray. File format 1: {"format": 1, "total_steps": T, "pieces": [{"start", "end", "lr", "envelope",
"warmup_steps"}, ...]}; a piece holds for steps start <= t < end. Where the batch grows, "batch_growth": [[step, factor], ...].
"""

from __future__ import annotations

import csv
import json
import math
import os
import warnings
from bisect import bisect_right
from dataclasses import asdict, dataclass, field, replace
from itertools import groupby, pairwise
from pathlib import Path
from typing import Any

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from autolrs_ray import __version__
from autolrs_ray.core.checks import require_float, require_int
from autolrs_ray.core.envelopes import ENVELOPES
from autolrs_ray.core.growth import BatchGrowth
from autolrs_ray.core.segments import Segment
from autolrs_ray.outcome.history import History
from autolrs_ray.record.stores import is_uri, write_bytes
from autolrs_ray.training.optimizers import lr_ratios

FORMAT = 1
MOST_ROWS = 10_000_000  # of a CSV file: some 250 MB


@dataclass(frozen=True)
class Piece:
    """LR(t) = lr * envelope(t) for start <= t < end, times a linear rise over the run's first `warmup_steps` steps."""

    start: int
    end: int
    lr: float
    envelope: str | None = None
    warmup_steps: int = 0

    def __post_init__(self) -> None:
        require_int("start", self.start, 0)
        require_int("end", self.end, self.start + 1)
        require_float("lr", self.lr, 0.0, math.inf)
        require_int("warmup_steps", self.warmup_steps, 0)


@dataclass(frozen=True)
class LearnedSchedule:
    """Learning rate by optimizer step: pieces in order. (Damage to a run's journal may leave a gap.) growth: of the batch."""

    total_steps: int
    pieces: tuple[Piece, ...]
    growth: BatchGrowth = field(default_factory=BatchGrowth)
    _starts: list[int] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        require_int("total_steps", self.total_steps, 1)
        object.__setattr__(self, "_starts", [piece.start for piece in self.pieces])  # the class is frozen
        for before, after in pairwise(self.pieces):
            if after.start < before.end:
                raise ValueError(f"pieces must be in order and must not overlap, got {before} and {after}")

    def _refuse_unknown(self, envelope: str | None) -> None:
        if envelope is not None and envelope not in ENVELOPES:
            raise ValueError(
                f"unknown envelope {envelope!r}: a run with an envelope of its own cannot be replayed from its record"
            )

    def lr_at(self, step: int) -> float:
        """Learning rate of the update from `step` to `step + 1`. Past the last piece it is held.

        Raises ValueError for a step before the first piece or in a gap, or an envelope that was the user's own function.
        """
        i = bisect_right(self._starts, step) - 1
        if i < 0 or (step >= self.pieces[i].end and i < len(self.pieces) - 1):
            raise ValueError(
                f"no learning rate at step {step}; the nearest pieces are {self.pieces[max(0, i) : i + 2]}"
            )
        piece = self.pieces[i]
        self._refuse_unknown(piece.envelope)
        step = min(step, piece.end - 1)
        segment = Segment("", "main", 0, piece.lr, piece.start, (piece.end,), 1, None, piece.envelope,
                          self.total_steps, piece.warmup_steps)  # fmt: skip
        return segment.lr_at(step)

    def batches_at(self, step: int) -> int:
        """How many times as large as at the start the batch of the update from `step` to `step + 1` is."""
        return self.growth.factor(step)

    @classmethod
    def of(cls, history: History) -> LearnedSchedule:
        """The schedule of a run, as far as it has come."""
        rows, envelope, total = history.rows, history.envelope, history.total_steps
        if history.anchored:
            changes = [row["end"] for row, after in pairwise(rows) if after["lr"] != row["lr"]]
            lrs = [lr for lr, _ in groupby(rows, key=lambda row: row["lr"])]
            edges = pairwise([0, *changes, total] if rows else [])
            ramp = rows[0].get("warmup_steps", 0) if rows else 0
            pieces = tuple(Piece(*edge, lr, envelope, ramp) for edge, lr in zip(edges, lrs, strict=True))
        else:
            ramp = history.config["options"].get("warmup_steps", 0)
            pieces = tuple(
                Piece(row["start"], row["end"], row["lr"], *((None, ramp) if row["warmup"] else (envelope, 0)))
                for row in rows
            )
        return cls(total, pieces, history.growth)

    @property
    def peak_lr(self) -> float:
        """The largest learning rate before envelope and warm-up; NaN for a schedule without pieces."""
        return max((piece.lr for piece in self.pieces), default=math.nan)

    def to_json(self) -> str:
        for piece in self.pieces:
            self._refuse_unknown(piece.envelope)
        found = {"format": FORMAT, "total_steps": self.total_steps, "pieces": [asdict(p) for p in self.pieces]}
        return json.dumps({**found, "batch_growth": self.growth.points} if self.growth.points else found)

    @classmethod
    def from_json(cls, text: str) -> LearnedSchedule:
        """Raises ValueError if `text` is not a schedule of a known format."""
        try:
            data = json.loads(text)
            if data["format"] != FORMAT:
                raise ValueError(
                    f"format {data['format']!r} is not {FORMAT}, the one that autolrs_ray {__version__} reads: export the "
                    "schedule again with this version, or install the one that wrote it"
                )
            growth = BatchGrowth.from_file(data.get("batch_growth", []))
            schedule = cls(data["total_steps"], tuple(Piece(**piece) for piece in data["pieces"]), growth)
            schedule.to_json()
            return schedule
        except (KeyError, TypeError, RecursionError, json.JSONDecodeError) as error:
            raise ValueError(f"this is not a learned schedule: {error}") from error

    def to_csv(self, every: int = 1) -> str:
        """Rows step,lr for every `every`-th step and the last one, which tells the length of the run; where the batch grows,
        step,lr,batch, with its multiple.

        Raises ValueError for more than MOST_ROWS of them, and what `lr_at` raises.
        """
        require_int("every", every, 1)
        count = -(-self.total_steps // every)
        if count > MOST_ROWS:
            raise ValueError(f"{count:,} rows are too many (at most {MOST_ROWS:,}): a larger `every`, or JSON")
        last = [] if (self.total_steps - 1) % every == 0 else [self.total_steps - 1]
        steps = (*range(0, self.total_steps, every), *last)
        if self.growth.points:
            return "step,lr,batch\n" + "".join(f"{t},{self.lr_at(t)!r},{self.batches_at(t)}\n" for t in steps)
        return "step,lr\n" + "".join(f"{step},{self.lr_at(step)!r}\n" for step in steps)

    def write_csv(self, path: str | os.PathLike[str], every: int = 1) -> None:
        """Write `to_csv(every)` to a file, or to its URI."""
        write_bytes(os.fspath(path), self.to_csv(every).encode())

    def stretch(self, total_steps: int) -> LearnedSchedule:
        """The same course over `total_steps`: where a share of them is done, LR is what it is here at the same share.

        Warm-up and pieces shrink or grow with it; pieces shorter than half a step vanish. The learning rates stay: whether the
        best of a short run is that of a long one is another question.
        """
        require_int("total_steps", total_steps, 1)

        def scaled(step: int) -> int:
            return (2 * step * total_steps + self.total_steps) // (
                2 * self.total_steps
            )  # rounded, exact for any length

        pieces = [
            replace(piece, start=scaled(piece.start), end=scaled(piece.end), warmup_steps=scaled(piece.warmup_steps))
            for piece in self.pieces
            if scaled(piece.start) < scaled(piece.end)
        ]
        growth = BatchGrowth(tuple((scaled(step), factor) for step, factor in self.growth.points))
        return LearnedSchedule(total_steps, tuple(pieces), growth)

    @classmethod
    def from_csv(cls, text: str) -> LearnedSchedule:
        """Of rows step,lr or step,lr,batch, held until the next row. Raises ValueError if `text` is no such schedule."""
        try:
            read = [
                (int(row["step"]), float(row["lr"]), int(row.get("batch") or 1))
                for row in csv.DictReader(text.splitlines())
            ]
        except (KeyError, TypeError, ValueError, csv.Error) as error:
            raise ValueError(f"this is not a learned schedule: expected rows step,lr ({error!r})") from error
        if not read:
            raise ValueError("there are no rows; expected step,lr")
        for (before, *_), (step, *_) in pairwise(read):
            if step <= before:
                raise ValueError(f"steps must rise from row to row, got {step} after {before}: sort them, each once")
        for step, _, batch in read:
            require_int(f"batch at step {step}", batch, 1)
        ends = [step for step, *_ in read[1:]] + [read[-1][0] + 1]
        multiples = [1, *(batch for *_, batch in read)]
        grows = [(step, batch) for (step, _, batch), before in zip(read, multiples, strict=False) if batch != before]
        pieces = tuple(Piece(step, end, lr) for (step, lr, _), end in zip(read, ends, strict=True))
        return cls(ends[-1], pieces, BatchGrowth.from_file(grows))

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> LearnedSchedule:
        """From a JSON file, a CSV file (".csv") with rows step,lr (held until the next row), or a run folder or its URI.

        Raises ValueError, naming the file, for one that is no schedule, or that has a gap or more than its total_steps.
        """
        file = Path(path)
        if is_uri(path) or file.is_dir():
            return cls.of(History.read(path))
        try:
            text = file.read_text("utf-8-sig")  # as Excel writes it
            schedule = cls.from_csv(text) if file.suffix.lower() == ".csv" else cls.from_json(text)
            schedule._refuse_gaps()
        except ValueError as error:
            raise ValueError(f"{file}: {error}") from error
        return schedule

    def _refuse_gaps(self) -> None:
        known = 0
        for piece in self.pieces:
            if piece.start > known:
                raise ValueError(
                    f"there is no learning rate from step {known} to {piece.start}: add a piece or rows for them"
                )
            known = piece.end
        if known > self.total_steps:
            raise ValueError(f"the last piece must end at total_steps={self.total_steps} or before, got {known}")


class LearnedLRScheduler(LRScheduler):
    """Replays a learned schedule: step it once per optimizer step. Groups keep the ratios of their initial LRs.

    So do groups that are added later, whose initial LR is the one they come with. Past the schedule's end the last LR is
    held, with a warning. Raises TypeError for what is no schedule, ValueError where the first group's is
    not positive, and what the schedule raises at steps that it does not cover.
    """

    def __init__(self, optimizer: Optimizer, schedule: LearnedSchedule, last_epoch: int = -1) -> None:
        if not isinstance(schedule, LearnedSchedule):
            raise TypeError(f"schedule must be a LearnedSchedule, got {schedule!r}; LearnedSchedule.load reads files")
        self.schedule = schedule
        self._told = False
        super().__init__(optimizer, last_epoch)

    def get_lr(self) -> list[float | Any]:
        groups = self.optimizer.param_groups
        for group in groups[len(self.base_lrs) :]:
            shared = next(other for other in groups if other["lr"] is group["lr"])  # a tensor as the default of both
            self.base_lrs.append(group.setdefault("initial_lr", float(shared.get("initial_lr", group["lr"]))))
        self._tell_of_the_end()
        lr = self.schedule.lr_at(max(0, self.last_epoch))
        return [lr * ratio for ratio in lr_ratios(self.base_lrs)]

    def _tell_of_the_end(self) -> None:
        """The call after the last update asks for a learning rate that nobody uses; one more, and somebody trains on."""
        end = self.schedule.pieces[-1].end if self.schedule.pieces else 0
        if self.last_epoch > end and not self._told:
            self._told = True
            message = (
                f"the learned schedule ends at step {end:,}, and training goes on: its last learning rate is held. "
            )
            mend = f"LearnedSchedule.stretch(total_steps) makes one of {self.schedule.total_steps:,} steps longer"
            warnings.warn(message + mend, stacklevel=3)

    def state_dict(self) -> dict[str, Any]:
        return {
            **{k: v for k, v in super().state_dict().items() if k not in ("schedule", "_told")},
            "schedule": self.schedule.to_json(),
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        state = dict(state_dict)
        self.schedule = LearnedSchedule.from_json(state.pop("schedule"))
        super().load_state_dict(state)
