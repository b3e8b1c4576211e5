"""What a checkpoint costs: how long training waits for one that is written, and how long the 8 probes of a stage take to
start from it, in runs of the paper's policy with Ray's object store and without."""

from __future__ import annotations

import json
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import pyarrow.fs
import torch
from torch import nn

import autolrs_ray
from autolrs_ray import AutoLRSTrainable, TrainingTask
from autolrs_ray.record.checkpoints import BackgroundWriter, flush_checkpoint, verify_checkpoint, write_checkpoint
from benchmarks.section import Section, cluster

PROBES = 8
LAYERS, INPUTS = 16, 1024
STAGE_STEPS = 10


def _state(megabytes: int) -> dict[str, Any]:
    """A state of 16 equal tensors, `megabytes` in all."""
    return {"step": 1, "model": {f"w{i}": torch.randn(megabytes * 2**20 // 4 // 16) for i in range(16)}}


class Wide(nn.Module):
    """16 layers side by side, which take little time to train for their size."""

    def __init__(self, outputs: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(INPUTS, outputs) for _ in range(LAYERS))

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        return torch.cat([layer(inputs) for layer in self.layers], 1)


class FromStore(AutoLRSTrainable):
    """A state of config["megabytes"], half weights and half momentum; it reports how long it took to restore."""

    restore_ms: float | None = None

    def build(self, config: dict[str, Any]) -> TrainingTask:
        torch.set_num_threads(1)
        model = Wide(int(config["megabytes"] * 2**20 / 2 / 4 / LAYERS / INPUTS))
        inputs, targets = torch.randn(64, INPUTS), torch.arange(64)
        return TrainingTask(model, torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9), nn.functional.cross_entropy,
                            (inputs, targets), (inputs[48:], targets[48:]), batch_size=8)  # fmt: skip

    def restore(self, checkpoint_path: Any) -> None:
        began = time.perf_counter()
        super().restore(checkpoint_path)
        self.restore_ms = 1000.0 * (time.perf_counter() - began)

    def step(self) -> dict[str, Any]:
        restore_ms, self.restore_ms = self.restore_ms, None
        return {**super().step(), **({} if restore_ms is None else {"restore_ms": restore_ms})}


class FromStorage(FromStore):
    object_store = False


def _ms(call: Any, *arguments: Any) -> float:
    began = time.perf_counter()
    call(*arguments)
    return 1000.0 * (time.perf_counter() - began)


def _writing(megabytes: int, repeats: int) -> list[tuple[str, ...]]:
    state, times = _state(megabytes), {name: [] for name in ("tune", "background", "whole")}
    local = pyarrow.fs.LocalFileSystem()
    with tempfile.TemporaryDirectory() as folder:
        for i in range(repeats):
            staged, stored, own = (Path(folder, f"{name}{i}").as_posix() for name in ("staged", "stored", "own"))

            def through_tune(staged: str = staged, stored: str = stored) -> None:
                write_checkpoint(state, staged, flush=False)
                local.create_dir(stored)
                pyarrow.fs.copy_files(staged, stored, source_filesystem=local, destination_filesystem=local)
                flush_checkpoint(stored)
                verify_checkpoint(stored)

            writer = BackgroundWriter()
            times["tune"].append(_ms(through_tune))
            began = time.perf_counter()
            times["background"].append(_ms(writer.submit, state, own))
            writer.wait()
            times["whole"].append(1000.0 * (time.perf_counter() - began))
    middle = {name: statistics.median(values) for name, values in times.items()}
    names = {
        "tune": "training waits, written through Tune",
        "background": "training waits, written in the background",
        "whole": "until it is durable in the background",
    }
    return [
        (f"{megabytes} MB: {text}", f"{middle[name]:.0f}", f"{middle['tune'] / middle[name]:.1f}")
        for name, text in names.items()
    ]


def _starts(trainable: type, megabytes: int, stages: int) -> dict[str, list[float]]:
    """Milliseconds of a run's later stages: to restore a probe, to restore main, and from a stage's end to the first step
    of the first and of the last of its probes."""
    options: dict[str, Any] = dict(policy="paper", num_lrs=PROBES, lr_interval=(1e-5, 1e-3), promote=True,
                                   stage_steps=STAGE_STEPS, max_stage_steps=STAGE_STEPS, probe_steps=1)  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        result = autolrs_ray.run(trainable, STAGE_STEPS * stages, storage_path=folder, name="run", progress=False,
                                 config={"megabytes": megabytes}, resources={"cpu": 1.0 / PROBES}, slots=PROBES,
                                 **options)  # fmt: skip
        lines = [line for file in Path(folder, "run").glob("*/result.json") for line in file.read_text().splitlines()]
    rows = [row for row in map(json.loads, lines) if "restore_ms" in row and row["stage"] > 0]
    found = {role: [row["restore_ms"] for row in rows if row["role"] == role] for role in ("probe", "main")}
    segments = [event for event in result.events if event["event"] == "segment"]
    ends = {event["stage"]: event["time"] for event in segments if event["role"] == "main"}
    for stage in range(1, stages):
        began = [event["began"] for event in segments if event["role"] == "probe" and event["stage"] == stage]
        found.setdefault("first", []).append(1000.0 * (min(began) - ends[stage - 1]))
        found.setdefault("last", []).append(1000.0 * (max(began) - ends[stage - 1]))
    return found


def _starting(megabytes: int, stages: int) -> list[tuple[str, ...]]:
    found = {trainable: _starts(trainable, megabytes, stages) for trainable in (FromStorage, FromStore)}
    names = {
        "probe": f"one of {PROBES} probes restores",
        "main": "the main trial restores the winning probe's state",
        "last": f"from the stage's end until all {PROBES} probes train",
    }
    rows = []
    for name, text in names.items():
        storage, store = (statistics.median(found[trainable][name]) for trainable in (FromStorage, FromStore))
        rows.append((f"{megabytes} MB: {text}, from storage", f"{storage:.0f}", "1.0"))
        rows.append((f"{megabytes} MB: {text}, from the object store", f"{store:.0f}", f"{storage / store:.1f}"))
    return rows


def measure(quick: bool) -> Section:
    torch.set_num_threads(1)
    rows: list[tuple[str, ...]] = []
    for megabytes in (60,) if quick else (60, 400):
        rows += _writing(megabytes, 3 if quick else 5)
        with cluster(1, 2000):
            rows += _starting(megabytes, 3 if quick else 6)
    return Section(
        f"Checkpoints of 60 and 400 MB on {PROBES} slots, ms, median", ("what", "ms", "times faster"), rows,
        note="The storage is a local disk, and what is read from it lies in the page cache. All probes start at once.",
    )  # fmt: skip
