"""A training run as a user would start it, in a process of its own, to be killed. Its last line on stdout is its outcome.

`python -m tests.faults.driver STORAGE --policy paper` once more is how it is resumed.
"""

from __future__ import annotations

import argparse
import hashlib
import io
import json
import os
import shutil
import signal
import sys
import tempfile
from collections.abc import Callable
from itertools import count
from pathlib import Path
from typing import Any

import ray
import torch
from ray.tune import Callback

import autolrs_ray
from autolrs_ray import RunResult
from autolrs_ray.core.paper import forecast, surrogate
from autolrs_ray.core.paper.policy import PaperPolicy
from autolrs_ray.core.policy import Verdict
from autolrs_ray.core.race.policy import AnchoredPolicy
from autolrs_ray.driver import elastic
from autolrs_ray.record import files, journal, record
from autolrs_ray.record.checkpoints import read_checkpoint
from autolrs_ray.record.stores import local_copy
from tests.faults.trainables import Fragile, Growing
from tests.races import alternating

OPTIONS: dict[str, dict[str, Any]] = {
    "paper": dict(
        total_steps=200, stage_steps=40, max_stage_steps=40, probe_steps=8, num_lrs=4, probe_reports=4, main_reports=4,
        lr_interval=(1e-2, 1.0),
    ),
    "growth": dict(
        total_steps=2000, stage_steps=20, max_stage_steps=20, probe_steps=2, num_lrs=3, probe_reports=1, main_reports=1,
        lr_interval=(1e-2, 1.0), policy="paper",
    ),
    "anchored": dict(
        total_steps=160, num_lrs=5, commits=6, lr_interval=(1e-3, 1.0),
    ),
    "elastic": dict(
        total_steps=160, num_lrs=4, commits=4, lr_interval=(1e-2, 1.0), policy="anchored", workers="elastic",
    ),
}  # fmt: skip


class RecordWith:
    """`os` for the modules of autolrs_ray.record, in which every fsync and rename is a chance to die first."""

    def __init__(self, chance: Callable[[], None]) -> None:
        self._chance = chance

    def __getattr__(self, name: str) -> Any:
        if name in ("fsync", "replace"):
            self._chance()
        return getattr(os, name)


def killed_at(where: str) -> None:
    """From now on this process is killed at the n-th of some moments; `where`: one of these names, a colon, and n.

    "sync": before a fsync or rename of the record. "line": half of what is added to the journal has been written.
    "pause": the policy has said PAUSE, and nobody has asked for the checkpoint yet. "saved": a checkpoint is whole on disk,
    and the policy does not know of it.
    """
    name, n = where.split(":")
    calls = count(1)

    def comes() -> bool:
        return next(calls) == int(n)

    def chance() -> None:
        if comes():
            os.kill(os.getpid(), signal.SIGKILL)

    class Torn(io.FileIO):
        def write(self, content: Any) -> int:
            super().write(content[: len(content) // 2])
            os.kill(os.getpid(), signal.SIGKILL)
            return 0

    def opened(file: Any, mode: str = "r", **options: Any) -> Any:
        return Torn(file, mode) if mode == "ab" and comes() else open(file, mode, **options)

    def instrument(policy: Any) -> None:
        report, saved = policy.report, policy.saved

        def reporting(self: Any, *arguments: Any, **more: Any) -> Verdict:
            verdict = report(self, *arguments, **more)
            if verdict is Verdict.PAUSE:
                chance()
            return verdict

        def saving(self: Any, *arguments: Any) -> None:
            chance()
            saved(self, *arguments)

        if name == "pause":
            policy.report = reporting
        else:
            policy.saved = saving

    if name == "sync":
        for module in (files, journal, record):
            module.os = RecordWith(chance)  # type: ignore[assignment]
    elif name == "line":
        journal.open = opened  # type: ignore[attr-defined]
    else:
        assert name in ("pause", "saved"), where
        for policy in (PaperPolicy, AnchoredPolicy):
            instrument(policy)


class KillsIdleActors(Callback):  # type: ignore[misc]
    """Kills the actor of every third probe as soon as it has ended and waits for its next trial."""

    def __init__(self, flag: str) -> None:
        self._flag, self._ended = Path(flag), 0

    def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        self._ended += 1
        if self._ended % 3 == 0:
            with open(self._flag, "a") as file:
                file.write("idle\n")
            os.kill(int(trial.last_result["pid"]), signal.SIGKILL)


def every_second(function: Callable[..., Any]) -> Callable[..., Any]:
    """`function`, which raises at every second call."""
    calls = count(1)

    def call(*args: Any, **kwargs: Any) -> Any:
        if next(calls) % 2 == 0:
            raise RuntimeError("injected")
        return function(*args, **kwargs)

    return call


def digest(checkpoint: str) -> str:
    """SHA-256 of all weights and buffers of a checkpoint, "" for one that holds none."""
    state = hashlib.sha256()
    with local_copy(checkpoint) as folder:
        if not Path(folder, "state.pt").exists():
            return ""
        weights = read_checkpoint(folder)["model"]
    for name, value in sorted(weights.items()):
        state.update(name.encode() + value.contiguous().numpy().tobytes())
    return state.hexdigest()


def outcome(result: RunResult) -> dict[str, Any]:
    """What two runs are compared by: the LR of every step, every committed row, the final weights."""
    assert result.checkpoint is not None
    return {
        "done": result.done,
        "lrs": [result.schedule.lr_at(step) for step in range(result.schedule.total_steps)],
        "rows": [[row["end"], row["lr"], row["loss"]] for row in result.rows],
        "weights": digest(result.checkpoint),
    }


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("storage")
    parser.add_argument("--uri", default="", help="where the run goes, if not to a folder")
    parser.add_argument("--policy", default="paper")
    parser.add_argument("--address", default="local")
    parser.add_argument("--config", type=json.loads, default={})
    parser.add_argument("--options", type=json.loads, default={})
    parser.add_argument("--killed-at", default="")
    parser.add_argument("--kill-idle", default="")
    parser.add_argument("--sabotage", action="store_true")
    given = parser.parse_args()
    torch.set_num_threads(1)
    if given.sabotage:
        surrogate.FITS.update({name: every_second(fit) for name, fit in surrogate.FITS.items()})
        forecast._forecast = every_second(forecast._forecast)
    if given.policy == "elastic":
        elastic.best_units = alternating  # type: ignore[attr-defined]
    if given.killed_at:
        killed_at(given.killed_at)
    folder = tempfile.mkdtemp(prefix="alr", dir="/tmp")  # socket paths end at 107 bytes
    local = given.address == "local"
    own = dict(num_cpus=2, include_dashboard=False, object_store_memory=80_000_000, _temp_dir=folder) if local else {}
    ray.init(address=given.address, log_to_driver=False, **own)
    try:
        result = autolrs_ray.run(
            Growing if given.policy == "elastic" else Fragile,
            storage_path=given.uri or given.storage,
            name="run",
            config=given.config,
            progress=False,
            callbacks=[KillsIdleActors(given.kill_idle)] if given.kill_idle else None,
            **{"policy": given.policy, **OPTIONS[given.policy], **given.options},
        )
    finally:
        ray.shutdown()
        shutil.rmtree(folder, ignore_errors=True)
    print(json.dumps(outcome(result)))


if __name__ == "__main__":
    sys.exit(main())
