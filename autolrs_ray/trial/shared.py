"""The stage's checkpoint in Ray's object store: on storage as ever, and in memory for the trials that start from it.

The driver asks the trial that is about to save for its state and owns the object, which so outlives the trial. Trials find
the reference in the checkpoint that Tune hands them. Storage is the fall-back: whatever fails here costs time, not the run.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import ray
import torch
from ray.tune import Checkpoint
from torch import Tensor

from autolrs_ray.private import sent_by_ray
from autolrs_ray.record.checkpoints import mapped

logger = logging.getLogger(__name__)

LEAST_BYTES = 2**20  # less is read from a file as fast
ANSWER_S = 1.0  # the size of an object is known before the checkpoint is written: only a dead actor gives no answer
FETCH_S = 30.0  # longest a trial waits for the object before it reads the file


@dataclass(frozen=True)
class PackedTensor:
    """A tensor as the bytes of its elements in the order they have in memory. NumPy arrays are not copied when read."""

    data: np.ndarray[Any, Any]
    dtype: torch.dtype
    shape: tuple[int, ...]
    stride: tuple[int, ...]

    @classmethod
    def of(cls, tensor: Tensor) -> PackedTensor:
        tensor = tensor.detach().cpu()
        if not torch.ops.aten.is_non_overlapping_and_dense(tensor):
            tensor = tensor.contiguous()
        flat = tensor.as_strided((tensor.numel(),), (1,))
        return cls(flat.view(torch.uint8).numpy(), tensor.dtype, tuple(tensor.shape), tensor.stride())

    def tensor(self) -> Tensor:
        """The tensor, in the memory of `data`: not to be written to where that is in the object store."""
        flat = torch.frombuffer(self.data, dtype=self.dtype) if self.data.size else torch.empty(0, dtype=self.dtype)
        return flat.as_strided(self.shape, self.stride)


def pack(state: Any) -> Any:
    """Nested dicts, lists and tuples with every tensor packed. CPU tensors are not copied."""
    return mapped(state, lambda value: PackedTensor.of(value) if isinstance(value, Tensor) else value)


def unpack(state: Any) -> Any:
    """What `pack` was given, bit for bit, in the memory of the packed one, which may be read-only."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*buffer is not writable")
        return mapped(state, lambda value: value.tensor() if isinstance(value, PackedTensor) else value)


def state_bytes(state: Any) -> int:
    """Bytes of all tensors in nested dicts, lists and tuples."""
    if isinstance(state, Tensor):
        return state.nbytes
    values = state.values() if isinstance(state, dict) else state if isinstance(state, (list, tuple)) else ()
    return sum(state_bytes(value) for value in values)


class SharedState:
    """A state in the object store, of the checkpoint at `path` once that is written. Nothing holds it but `reference`."""

    def __init__(self, reference: ray.ObjectRef | None, path: str = "", step: int = -1) -> None:
        self.reference, self.path, self.step = reference, path, step
        self.size: ray.ObjectRef | None = None

    def written(self, path: str, step: int) -> None:
        """The checkpoint of this state is whole on storage. Lets go of the object if the trial has put nothing there."""
        if self.reference is None:
            return
        self.path, self.step = path, step
        try:
            size = ray.get(self.size, timeout=ANSWER_S)
        except Exception as error:  # the actor died, or its class raised: the file is there
            logger.debug("no state in the object store for %s: %s", path, error)
            size = 0
        if not size:
            self.clear()

    def clear(self) -> None:
        self.size = self.reference = None


class SharedCheckpoint(Checkpoint):  # type: ignore[misc]
    """A checkpoint on storage whose state may lie in the object store too.

    Sent to an actor it takes the reference along. Written into Tune's own files it is a plain checkpoint: a reference that
    is pickled outside of Ray's messages keeps its object for ever.
    """

    def __init__(self, path: str, filesystem: Any, shared: SharedState) -> None:
        super().__init__(path, filesystem=filesystem)
        self._shared, self._taken = shared, False

    def __reduce__(self) -> tuple[Any, ...]:
        if self._shared.reference is None or not sent_by_ray():
            return Checkpoint, (self.path, self.filesystem)
        return _received, (self.path, self.filesystem, self._shared.reference, self._shared.step)

    def take(self) -> dict[str, Any] | None:
        """The state from the object store, read-only; None if it cannot be had within FETCH_S seconds."""
        try:
            packed = ray.get(self._shared.reference, timeout=FETCH_S)
            if packed["step"] != self._shared.step:
                raise ValueError(f"it is of step {packed['step']}, not {self._shared.step}")
            state: dict[str, Any] = unpack(packed)
        except Exception as error:  # lost with its node, evicted, not in time: Ray has many names for it
            logger.warning("reading %s from storage: it cannot be had from the object store (%s)", self.path, error)
            return None
        self._taken = True
        return state

    @contextmanager
    def as_directory(self) -> Iterator[str]:
        """The folder, fetched from storage unless the state has been taken from the object store."""
        if self._taken:
            yield self.path
            return
        with super().as_directory() as folder:
            yield folder


def _received(path: str, filesystem: Any, reference: ray.ObjectRef, step: int) -> SharedCheckpoint:
    return SharedCheckpoint(path, filesystem, SharedState(reference, path, step))


class SharedStates:
    """The states of a run that lie in the object store: at most that of the stage's start, and that of the leading probe.

    trainable: the class of the trials; it takes part if its attribute `object_store` is true.
    """

    def __init__(self, trainable: type) -> None:
        self._takes_part = bool(getattr(trainable, "object_store", False))
        self._states: dict[str, SharedState] = {}

    def ask(self, role: str, actor: Any) -> SharedState | None:
        """Ask `actor`, which is about to save, for its state. Lets go of those that no trial will start from any more."""
        if not self._takes_part or actor is None:
            return None
        self.clear(None if role == "main" else role)
        size, reference = actor.share.options(num_returns=2).remote(room())
        state = self._states[role] = SharedState(reference)
        state.size = size
        return state

    def checkpoint(self, path: str, filesystem: Any) -> Checkpoint:
        """The checkpoint at `path` for a trial to start from."""
        for state in self._states.values():
            if state.path == path and state.reference is not None:
                return SharedCheckpoint(path, filesystem, state)
        return Checkpoint(path, filesystem=filesystem)

    def clear(self, role: str | None = None) -> None:
        """Let go of the object of `role`, or of all."""
        for name in [role] if role else list(self._states):
            state = self._states.pop(name, None)
            if state is not None:
                state.clear()


def room() -> int:
    """Bytes that an object may have so that no node's object store, with what else lies there, has to spill to disk.

    Half of the smallest store, less the part of all stores that is in use.
    """
    stores = [node["Resources"].get("object_store_memory", 0.0) for node in ray.nodes() if node["Alive"]]
    free = float(ray.available_resources().get("object_store_memory", 0.0))
    return int(min(stores, default=0.0) * free / max(1.0, sum(stores)) / 2)
