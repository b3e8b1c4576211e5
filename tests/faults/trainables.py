"""Trainables whose process is killed or hangs, or whose checkpoints are damaged, by a plan that does not depend on timing."""

from __future__ import annotations

import hashlib
import os
import signal
import time
from pathlib import Path
from typing import Any

import torch
from torch import nn

from autolrs_ray import AutoLRSTrainable, TrainingTask
from autolrs_ray.record.checkpoints import STATE_FILE
from tests.tasks import build_tiny


def strike(config: dict[str, Any], moment: str) -> None:
    """SIGKILL this process if the plan in `config` says so for `moment`; every kill leaves a line in config["flag"].

    config["kill"]: role -> probability per report. config["kill_at"]: moments, each killed once ("main save 80").
    """
    flag = config.get("flag")
    if flag is None:
        return
    killed = Path(flag).read_text().splitlines() if Path(flag).exists() else []
    role = moment.split()[0]
    draw = hashlib.blake2b(f"{moment}/{killed.count(moment)}".encode(), digest_size=4).digest()
    by_chance = int.from_bytes(draw, "little") < config.get("kill", {}).get(role, 0.0) * 2**32
    if by_chance or (moment in config.get("kill_at", ()) and moment not in killed):
        with open(flag, "a") as file:
            file.write(moment + "\n")
        os.kill(os.getpid(), signal.SIGKILL)


def flip(file: Path) -> None:
    """Change one bit in the middle of `file`."""
    with open(file, "r+b") as opened:  # not a new file: others may be reading it
        middle = opened.seek(0, os.SEEK_END) // 2
        opened.seek(middle)
        old = opened.read(1)
        opened.seek(middle)
        opened.write(bytes([old[0] ^ 1]))


def due(config: dict[str, Any], plan: str, moment: str) -> bool:
    """Whether `moment` is among those in config[plan], each of which comes once and leaves a line in config["flag"]."""
    if moment not in config.get(plan, ()):
        return False
    flag = Path(config["flag"])
    if flag.exists() and moment in flag.read_text().splitlines():
        return False
    with open(flag, "a") as file:
        file.write(moment + "\n")
    return True


class Fragile(AutoLRSTrainable):
    """The tiny torch task; waits config["pause_s"] before every report and may be killed at a report or in a save.

    config["trace"]: a folder in which the file named like its arm holds its process id while it trains.
    config["hang_at"]: arms whose setup never returns, or "ARM STEP" for a report that never comes. config["damage_at"]: "copy
    ARM STEP" flips a bit of a checkpoint in the moment in which Tune has copied it, "saved ARM STEP" cuts one short that has
    been found whole, "restore ARM STEP" flips a bit of the one that a trial is about to start from.
    """

    def setup(self, config: dict[str, Any]) -> None:
        if due(config, "hang_at", config["autolrs"]["arm"]):
            time.sleep(3600)
        super().setup(config)

    def restore(self, checkpoint_path: Any) -> None:
        assert self._segment is not None
        if due(self.config, "damage_at", f"restore {self._segment.arm} {self._segment.start}"):
            flip(Path(checkpoint_path.checkpoint.path, STATE_FILE))
        super().restore(checkpoint_path)

    def _report_class_trainable_checkpoint(self, checkpoint_dir: str, given: Any) -> Any:
        copied = super()._report_class_trainable_checkpoint(checkpoint_dir, given)
        assert self._segment is not None
        if due(self.config, "damage_at", f"copy {self._segment.arm} {self.trainer.step}"):
            flip(Path(copied.checkpoint.path, STATE_FILE))
        return copied

    def save(self, checkpoint_dir: str | None = None) -> Any:
        saved = super().save(checkpoint_dir)
        assert self._segment is not None
        if due(self.config, "damage_at", f"saved {self._segment.arm} {self.trainer.step}"):
            os.truncate(Path(saved.checkpoint.path, STATE_FILE), 100)
        return saved

    def build(self, config: dict[str, Any]) -> TrainingTask:
        return build_tiny(config)

    def _moment(self, what: str) -> str:
        segment = self._segment
        assert segment is not None
        arm = f" {segment.arm}" if segment.role != "main" else ""
        return f"{segment.role} {what} {self.trainer.step}{arm}"

    def step(self) -> dict[str, Any]:
        segment, trace = self._segment, self.config.get("trace")
        if trace is None:
            return self._step()
        assert segment is not None
        running = Path(trace, segment.arm)
        running.write_text(str(os.getpid()))
        try:
            return self._step()
        finally:
            running.unlink()

    def _step(self) -> dict[str, Any]:
        time.sleep(self.config.get("pause_s", 0.0))
        result = super().step()
        assert self._segment is not None
        if due(self.config, "hang_at", f"{self._segment.arm} {self.trainer.step}"):
            time.sleep(3600)
        strike(self.config, self._moment("report"))
        return result

    def save_checkpoint(self, checkpoint_dir: str) -> None:
        super().save_checkpoint(checkpoint_dir)
        strike(self.config, self._moment("save"))


def build_shared(config: dict[str, Any]) -> TrainingTask:
    """The tiny task without batch norm and dropout, whose outcome depends on how many workers share a batch."""
    task = build_tiny(config)
    model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 2))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    return TrainingTask(model, optimizer, task.loss, task.train_data, task.val_data, task.batch_size)


class Growing(Fragile):
    """A task that several workers may share."""

    workers = None

    def build(self, config: dict[str, Any]) -> TrainingTask:
        return build_shared(config)
