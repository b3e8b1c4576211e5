"""What a checkpoint costs: how long training waits for one that is written, and how long 8 probes take to start from it,
from disk against Ray's object store."""

from __future__ import annotations

import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.fs
import ray
import torch

from autolrs_ray.checkpoints import BackgroundWriter, read_checkpoint, write_checkpoint
from benchmarks.section import Section, cluster

PROBES = 8


def _state(megabytes: int) -> dict[str, Any]:
    """A state of 16 equal tensors, `megabytes` in all."""
    return {"step": 1, "model": {f"w{i}": torch.randn(megabytes * 2**20 // 4 // 16) for i in range(16)}}


def _arrays(state: dict[str, Any]) -> dict[str, Any]:
    """The model as NumPy arrays, which processes of one node share in the object store without a copy."""
    return {name: tensor.numpy() for name, tensor in state["model"].items()}


@ray.remote(num_cpus=0)
class Probe:
    """A process that starts from a checkpoint; both ways end with tensors of its own."""

    def ready(self) -> None:
        torch.set_num_threads(1)

    def from_disk(self, folder: str) -> int:
        return len(read_checkpoint(folder)["model"])

    def from_store(self, arrays: dict[str, Any]) -> int:
        return len({name: torch.from_numpy(np.array(array)) for name, array in arrays.items()})


def _ms(call: Any, *arguments: Any) -> float:
    began = time.perf_counter()
    call(*arguments)
    return 1000.0 * (time.perf_counter() - began)


def _measure(megabytes: int, repeats: int, probes: list[Any]) -> list[tuple[str, ...]]:
    state, times = _state(megabytes), {name: [] for name in ("tune", "background", "whole", "put", "disk", "store")}
    local = pyarrow.fs.LocalFileSystem()
    with tempfile.TemporaryDirectory() as folder:
        for i in range(repeats):
            staged, stored, own = (Path(folder, f"{name}{i}").as_posix() for name in ("staged", "stored", "own"))

            def through_tune(staged: str = staged, stored: str = stored) -> None:
                write_checkpoint(state, staged)
                local.create_dir(stored)
                pyarrow.fs.copy_files(staged, stored, source_filesystem=local, destination_filesystem=local)

            writer = BackgroundWriter()
            times["tune"].append(_ms(through_tune))
            began = time.perf_counter()
            times["background"].append(_ms(writer.submit, state, own))
            writer.wait()
            times["whole"].append(1000.0 * (time.perf_counter() - began))
            began = time.perf_counter()
            reference = ray.put(_arrays(state))
            times["put"].append(1000.0 * (time.perf_counter() - began))
            times["disk"].append(_ms(ray.get, [probe.from_disk.remote(own) for probe in probes]))
            times["store"].append(_ms(ray.get, [probe.from_store.remote(reference) for probe in probes]))
            del reference
    middle = {name: statistics.median(values) for name, values in times.items()}
    size = f"{megabytes} MB"
    return [
        (f"{size}: training waits, written through Tune", f"{middle['tune']:.0f}", "1.0"),
        (f"{size}: training waits, written in the background", f"{middle['background']:.0f}",
         f"{middle['tune'] / middle['background']:.1f}"),
        (f"{size}: until it is durable in the background", f"{middle['whole']:.0f}",
         f"{middle['tune'] / middle['whole']:.1f}"),
        (f"{size}: {PROBES} probes read it from disk", f"{middle['disk']:.0f}", "1.0"),
        (f"{size}: {PROBES} probes take it from the object store", f"{middle['store']:.0f}",
         f"{middle['disk'] / middle['store']:.1f}"),
        (f"{size}: and putting it there", f"{middle['put']:.0f}", ""),
    ]  # fmt: skip


def measure(quick: bool) -> Section:
    torch.set_num_threads(1)
    rows: list[tuple[str, ...]] = []
    with cluster(1, 1500):
        probes = [Probe.remote() for _ in range(PROBES)]
        ray.get([probe.ready.remote() for probe in probes])
        for megabytes in (60,) if quick else (60, 400):
            rows += _measure(megabytes, 3 if quick else 5, probes)
    return Section(
        "Checkpoints of 60 and 400 MB, ms, median", ("what", "ms", "times faster"), rows,
        note="Read from disk: from the page cache, after the SHA-256 of the manifest has been checked.",
    )  # fmt: skip
