"""One full run of a fixed schedule in a plain loop, kept on disk: a run that was killed goes on from its last checkpoint."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch

from autolrs_ray.training.trainer import Trainer
from experiments.compare_report import replace

RECORD, WEIGHTS, PROGRESS = "run.json", "weights.pt", "progress.pt"


def full_run(
    make: Callable[[], Trainer], lr_at: Callable[[int], float], marks: Iterable[int], folder: Path, curve: bool = False
) -> dict[str, Any]:
    """Train to the last of `marks` with `lr_at`, a checkpoint at each, or return what is kept of it in `folder`.

    The model is the best average of the weights where the trainer keeps averages; its state lies in "weights", a file. Returns
    that, "val" (its metrics on the validation data), "seconds" (of training), and "curve": if asked for, the same metrics of
    the model at every mark, with "step".
    """
    record, progress = folder / RECORD, folder / PROGRESS
    if record.exists():
        return {**json.loads(record.read_text()), "weights": folder / WEIGHTS}
    folder.mkdir(parents=True, exist_ok=True)
    trainer, seconds, points = make(), 0.0, []
    if progress.exists():
        kept = torch.load(progress, map_location="cpu", weights_only=True)
        trainer.load_state_dict(kept["state"])
        seconds, points = kept["seconds"], kept["curve"]
    for mark in [mark for mark in marks if mark > trainer.step]:
        began = time.perf_counter()
        loss = trainer.train(mark, lr_at)
        seconds += time.perf_counter() - began
        print(f"{folder.name}: step {mark}, training loss {loss:.4f}, {seconds:.0f} s", flush=True)
        if curve:
            points.append({"step": mark, **trainer.evaluate(averaged=trainer.averaging)})
        _save(progress, {"state": trainer.state_dict(), "seconds": seconds, "curve": points})
    val = trainer.evaluate(averaged=trainer.averaging)
    with trainer.evaluated(trainer.best_average if trainer.averaging else None) as network:
        _save(folder / WEIGHTS, network.state_dict())
    found = {"val": val, "seconds": seconds, "curve": points}
    replace(record, json.dumps(found))
    progress.unlink(missing_ok=True)
    return {**found, "weights": folder / WEIGHTS}


def _save(path: Path, value: Any) -> None:
    part = path.with_suffix(".part")
    torch.save(value, part)
    os.replace(part, path)
