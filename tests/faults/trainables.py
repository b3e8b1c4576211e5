"""Trainables whose process is killed, by a plan that does not depend on timing."""

from __future__ import annotations

import hashlib
import os
import signal
import time
from pathlib import Path
from typing import Any

from ray import tune

from autolrs_ray import AutoLRSTrainable, TrainingTask
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


class Fragile(AutoLRSTrainable):
    """The tiny torch task; waits config["pause_s"] before every report and may be killed at a report or in a save.

    config["trace"]: a folder in which the file named like its arm holds its process id while it trains.
    """

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
        strike(self.config, self._moment("report"))
        return result

    def save_checkpoint(self, checkpoint_dir: str) -> None:
        super().save_checkpoint(checkpoint_dir)
        strike(self.config, self._moment("save"))


class Counter(tune.Trainable):  # type: ignore[misc]
    """Costs nothing: the loss is a parabola in log LR about 0.1, the state a step count."""

    def setup(self, config: dict[str, Any]) -> None:
        self.reset_config(config)

    def reset_config(self, new_config: dict[str, Any]) -> bool:
        self._count, self._lr, self._end = 0, new_config["lr"], new_config["autolrs"]["boundaries"][-1]
        return True

    def step(self) -> dict[str, Any]:
        self._count = self._end
        return {"step": self._count, "val_loss": 1.0 + (self._lr - 0.1) ** 2}

    def save_checkpoint(self, checkpoint_dir: str) -> None:
        Path(checkpoint_dir, "count").write_text(str(self._count))

    def load_checkpoint(self, checkpoint: str) -> None:
        self._count = int(Path(checkpoint, "count").read_text())
