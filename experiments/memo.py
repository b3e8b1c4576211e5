"""A trainer that trains no stretch twice: what two methods have in common is trained once and looked up afterwards.

A state of `autolrs_ray.Trainer` is a function of (task, seed, LR and batch of every step so far). `MemoTrainer` therefore
keeps only the LR history and its rolling hash, looks losses up by that hash, and trains for real where one is missing.
Results are those of the plain trainer, bit for bit (a test says so); the steps each method *would* train are counted
by whoever drives it.
"""

from __future__ import annotations

import copy
import hashlib
import json
import sqlite3
import struct
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from autolrs_ray.core.growth import BatchGrowth
from autolrs_ray.training.averages import lowest
from autolrs_ray.training.trainer import Trainer

MAX_SNAPSHOTS = 250


class Memo:
    """Losses by state, in one SQLite file. Written at `flush`, so a killed run loses what came since."""

    def __init__(self, path: str | Path) -> None:
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        self._database = sqlite3.connect(path, timeout=60.0)
        self._database.execute("CREATE TABLE IF NOT EXISTS losses (key TEXT PRIMARY KEY, value TEXT)")
        self._known: dict[str, Any] = {
            key: json.loads(value) for key, value in self._database.execute("SELECT key, value FROM losses")
        }
        self._new: dict[str, Any] = {}

    def get(self, key: str) -> Any | None:
        return self._known.get(key)

    def put(self, key: str, value: Any) -> None:
        self._known[key] = self._new[key] = value

    def flush(self) -> None:
        rows = [(key, json.dumps(value)) for key, value in self._new.items()]
        with self._database:
            self._database.executemany("INSERT OR REPLACE INTO losses VALUES (?, ?)", rows)
        self._new = {}


class PerRunOrderTrainer(Trainer):
    """The ablation of common random numbers: the order of the data depends on the first LR of the run too."""

    def train(self, until: int, lr_at: Callable[[int], float]) -> float:
        if self.step == 0:
            digest = hashlib.blake2b(struct.pack("<qd", self.base_seed, lr_at(0)), digest_size=4).digest()
            self._set_seed(int.from_bytes(digest, "little"))
        return super().train(until, lr_at)

    @property
    def base_seed(self) -> int:
        return int(self.__dict__.setdefault("_base_seed", self.seed))

    def _set_seed(self, seed: int) -> None:
        self.seed = self.feed.seed = self.feed.rows.seed = seed
        self.feed.rows.forget()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        _ = self.base_seed
        self._set_seed(state["seed"])
        super().load_state_dict(state)


class History(dict[str, Any]):
    """The state of a MemoTrainer; never changed once made, so copies are the thing itself."""

    def __deepcopy__(self, memo: dict[int, Any]) -> History:
        return self


class MemoTrainer:
    """Looks like a Trainer to `run_local` and `run_slots`.

    make: builds the real trainer (averaging=True), called at the first miss. root: names task, seed and everything else
    that the real trainer depends on. train_losses: False returns NaN for the training loss, where nobody reads it.
    averages: how many of the task's averages count, the first ones (None: all).
    """

    def __init__(
        self,
        make: Callable[[], Trainer],
        memo: Memo,
        root: str,
        test_data: Callable[[], tuple[Tensor, Tensor]],
        averaging: bool = True,
        train_losses: bool = False,
    ) -> None:
        self._make, self._memo, self._test_data = make, memo, test_data
        self.averaging, self.train_losses = averaging, train_losses
        self.averages: int | None = None
        self._root = hashlib.blake2b(root.encode(), digest_size=16).digest()
        self._real: Trainer | None = None
        self._real_mark = b""
        self._snapshots: OrderedDict[bytes, dict[str, Any]] = OrderedDict()
        self.trained = 0  # steps that were really trained, for the log
        self._growth = BatchGrowth()
        self.reset()

    @property
    def step(self) -> int:
        return len(self._lrs)

    @property
    def val_batches(self) -> float:
        self._real = self._real or self._make()
        return self._real.val_batches

    @property
    def _mark(self) -> bytes:
        return self._marks[-1]

    def reset(self) -> None:
        self._lrs: list[float] = []
        self._marks: list[bytes] = [self._root]

    def grow(self, growth: BatchGrowth) -> None:
        self._growth = growth
        if self._real is not None:
            self._real.grow(growth)

    def state_dict(self) -> dict[str, Any]:
        self._snapshot()
        return History(step=self.step, lrs=tuple(self._lrs), marks=tuple(self._marks))

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._lrs, self._marks = list(state["lrs"]), list(state["marks"])

    def _snapshot(self) -> None:
        if self._real is not None and self._real_mark == self._mark and self._mark not in self._snapshots:
            self._snapshots[self._mark] = copy.deepcopy(self._real.state_dict())
            if len(self._snapshots) > MAX_SNAPSHOTS:
                self._snapshots.popitem(last=False)

    # -- training ------------------------------------------------------------------------------------------------------

    def train(self, until: int, lr_at: Callable[[int], float]) -> float:
        key = self._mark
        lrs = [float(lr_at(step)) for step in range(self.step, until)]
        marks = []
        for step, lr in enumerate(lrs, self.step):
            factor = self._growth.factor(step)
            grown = struct.pack("<q", factor) if factor > 1 else b""
            key = hashlib.blake2b(key + struct.pack("<d", lr) + grown, digest_size=16).digest()
            marks.append(key)
        if self.train_losses and any(self._memo.get(_train(mark)) is None for mark in marks):
            self._continue(self._at_mark(), lrs, marks)
        self._lrs += lrs
        self._marks += marks
        if not self.train_losses or not marks:
            return float("nan")
        total = np.float32(0.0)  # the Trainer's own sum
        with np.errstate(over="ignore", invalid="ignore"):
            for mark in marks:
                total += np.float32(self._memo.get(_train(mark)))
        return float(total) / len(marks)

    def _continue(self, real: Trainer, lrs: list[float], marks: list[bytes]) -> None:
        """Step by step, so that every step's loss is known and may be asked for in other stretches."""
        start = real.step
        self.trained += len(lrs)
        for mark in marks:
            self._memo.put(_train(mark), real.train(real.step + 1, lambda step: lrs[step - start]))
            self._real_mark = mark

    def _at_mark(self) -> Trainer:
        """The real trainer in the present state, by training on from the latest state of this history still known."""
        if self._real is None:
            self._real, self._real_mark = self._make(), self._root
            self._real.grow(self._growth)
        steps = len(self._marks) - 1
        while steps and self._marks[steps] != self._real_mark and self._marks[steps] not in self._snapshots:
            steps -= 1
        known = self._marks[steps]
        if known != self._real_mark:
            if steps:
                self._snapshots.move_to_end(known)
                self._real.load_state_dict(copy.deepcopy(self._snapshots[known]))
            else:
                self._real.reset()
            self._real_mark = known
        if steps < self.step:
            self._continue(self._real, self._lrs[steps:], self._marks[steps + 1 :])
        return self._real

    # -- evaluation ----------------------------------------------------------------------------------------------------

    def evaluate(self, data: Any = None, averaged: bool = False) -> dict[str, float]:
        """As the Trainer's, on the validation data only."""
        if data is not None:
            raise ValueError("this trainer evaluates on its own validation data; use evaluate_test for the test split")
        found = self._look_up("val", averaged)
        return found[self._best_average()] if averaged else found[0]

    def evaluate_test(self, averaged: bool) -> dict[str, float]:
        return self._look_up("test", averaged)[self._best_average() if averaged else 0]

    def _best_average(self) -> int:
        losses = [metrics["loss"] for metrics in self._look_up("val", True)]
        return lowest(losses[: self.averages])

    def _look_up(self, split: str, averaged: bool) -> list[dict[str, float]]:
        """The metrics of the raw weights, alone in their list, or of every average."""
        key = f"{split}/{'averaged' if averaged else 'raw'}/{self._mark.hex()}"
        value = self._memo.get(key)
        if value is None:
            data, real = self._test_data() if split == "test" else None, self._at_mark()
            both = split == "val" and self.averaging  # coming back for the other would mean training again
            kinds = (True, False) if both else (averaged,)
            for kind in kinds:
                value = real.evaluate_averages(data) if kind else [real.evaluate(data)]
                self._memo.put(f"{split}/{'averaged' if kind else 'raw'}/{self._mark.hex()}", value)
            value = self._memo.get(key)
        return [dict(metrics) for metrics in value or []]


def _train(mark: bytes) -> str:
    """The name of the training loss of the step that led to this state."""
    return f"train/{mark.hex()}"
