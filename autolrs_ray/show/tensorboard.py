"""A run as TensorBoard shows it best: one curve of the main run, what was tried grouped under it by stage and LR."""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from ray.tune.result import AUTO_RESULT_KEYS
from tensorboardX import SummaryWriter

from autolrs_ray.core.events import Event
from autolrs_ray.record.stores import is_uri, normal
from autolrs_ray.show.run_data import Row, RunData

FOLDER = "tensorboard"
_HIDDEN = {*AUTO_RESULT_KEYS, "stage", "epoch", "durable_step", "val_batches"}


def save_tensorboard(run: str | os.PathLike[str] | RunData, output: str | os.PathLike[str] | None = None) -> Path:
    """Write `run`, a folder or its URI, finished or not, for `tensorboard --logdir`; returns that folder.

    main: the main run from its first step to its last, with the steps of winning probes. trunks/lr_LR (anchored) and
    probes/stage_NNN/lr_LR (paper): the others. Events of an earlier call in these folders are replaced.

    output: a local folder (default: tensorboard in the run's). Raises FileNotFoundError where there is no journal, ValueError
    if the run never started, or is at a URI and no output is given.
    """
    data = RunData.of(run)
    folder = data.history.folder
    if output is None and is_uri(folder):
        raise ValueError(f"give a local folder as output: TensorBoard's events are not written to {folder}")
    target = Path(normal(folder)) / FOLDER if output is None else Path(output)
    for name, rows in _curves(data):
        for old in (target / name).glob("events.out.tfevents.*"):
            old.unlink()
        with SummaryWriter(str(target / name)) as writer:
            for row in rows:
                for key, value in _scalars(row, data.clock):
                    writer.add_scalar(key, value, int(row[data.clock]), walltime=row.get("timestamp"))
    return target


def _curves(data: RunData) -> Iterator[tuple[str, Iterable[Row]]]:
    yield "main", data.main_rows()
    stages = {event["arm"]: event["stage"] for event in data.history.named(Event.PROPOSAL)}
    for arm, lr in data.history.lrs.items():
        rows = data.rows(arm)
        if rows and arm != data.arm:
            group = "trunks" if data.anchored else f"probes/stage_{stages[arm]:03d}"
            yield f"{group}/lr_{lr:.3g}_{arm}", rows


def _scalars(row: Row, clock: str) -> Iterator[tuple[str, float]]:
    for key, value in row.items():
        if key not in _HIDDEN and key != clock and _is_number(value):
            yield key, float(value)


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
