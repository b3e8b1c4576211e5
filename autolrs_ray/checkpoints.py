"""Checkpoints that can be trusted: written under a temporary name, flushed and renamed, with a manifest that comes last."""

from __future__ import annotations

import hashlib
import io
import json
import os
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, BinaryIO, cast

import torch
from torch import Tensor

from autolrs_ray.journal import fsync_folder

STATE_FILE = "state.pt"
MANIFEST_FILE = "manifest.json"


class CheckpointError(RuntimeError):
    """A checkpoint that is missing, cut short or altered."""


class _HashingFile(io.RawIOBase):
    """A file opened for writing that keeps the SHA-256 of what has gone through it."""

    def __init__(self, file: BinaryIO) -> None:
        self._file, self.size, self.sha256 = file, 0, hashlib.sha256()

    def writable(self) -> bool:
        return True

    def write(self, data: Any) -> int:
        self._file.write(data)
        self.sha256.update(data)
        self.size += len(data)
        return len(data)


def write_checkpoint(state: dict[str, Any], folder: str | os.PathLike[str]) -> None:
    """Write `state` to `folder`/state.pt and its manifest: temporary name, fsync, rename, the manifest last."""
    path = Path(folder)
    path.mkdir(parents=True, exist_ok=True)
    temporary = path / (STATE_FILE + ".tmp")
    with open(temporary, "wb") as file:
        hashing = _HashingFile(file)
        torch.save(state, cast(BinaryIO, hashing))
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path / STATE_FILE)
    manifest = {"size": hashing.size, "sha256": hashing.sha256.hexdigest(), "step": state["step"]}
    temporary = path / (MANIFEST_FILE + ".tmp")
    with open(temporary, "w") as text:
        json.dump(manifest, text)
        text.flush()
        os.fsync(text.fileno())
    os.replace(temporary, path / MANIFEST_FILE)
    fsync_folder(path)


def verify_checkpoint(folder: str | os.PathLike[str]) -> int:
    """Return the step of the checkpoint in `folder`; raise CheckpointError if it does not match its manifest."""
    path = Path(folder)
    try:
        manifest = json.loads((path / MANIFEST_FILE).read_text())
        size, digest, step = manifest["size"], manifest["sha256"], int(manifest["step"])
        if (path / STATE_FILE).stat().st_size != size or _sha256(path / STATE_FILE) != digest:
            raise CheckpointError(f"checkpoint {path} is cut short or altered: it does not match its manifest")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"checkpoint {path} cannot be read: {error}") from error
    return step


def read_checkpoint(folder: str | os.PathLike[str], device: torch.device | str = "cpu") -> dict[str, Any]:
    """Load a verified checkpoint. Only tensors and plain values are accepted (`weights_only=True`)."""
    verify_checkpoint(folder)
    try:
        state: dict[str, Any] = torch.load(Path(folder) / STATE_FILE, map_location=device, weights_only=True)
    except Exception as error:  # torch.load raises many types for a hostile or foreign file
        raise CheckpointError(f"checkpoint {folder} cannot be loaded: {error}") from error
    return state


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def snapshot(state: Any) -> Any:
    """A copy of nested dicts and lists in which no tensor shares memory with `state`; tensors come to the CPU."""
    if isinstance(state, Tensor):
        return state.detach().to("cpu", copy=True)
    if isinstance(state, dict):
        return {key: snapshot(value) for key, value in state.items()}
    if isinstance(state, (list, tuple)):
        return type(state)(snapshot(value) for value in state)
    return state


class BackgroundWriter:
    """Writes checkpoints on a thread of its own, one at a time and in order, while training goes on.

    At most one snapshot waits: `submit` blocks until the write before it has ended.
    """

    def __init__(self) -> None:
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._writing: Future[None] | None = None
        self._step = 0
        self.durable_step = 0  # of the last checkpoint that is whole on disk
        self.failure: str | None = None  # of the last write, if it failed

    def submit(self, state: dict[str, Any], folder: str) -> None:
        """Begin to write a snapshot of `state` to `folder`."""
        self.wait()
        self._step = state["step"]
        self._writing = self._pool.submit(write_checkpoint, snapshot(state), folder)

    def poll(self) -> None:
        """Bring `durable_step` and `failure` up to date; does not block."""
        if self._writing is not None and self._writing.done():
            self.wait()

    def wait(self) -> None:
        """Return when nothing is being written."""
        if self._writing is None:
            return
        error, self._writing = self._writing.exception(), None
        if error is None:
            self.durable_step, self.failure = self._step, None
        else:
            self.failure = f"the checkpoint of step {self._step} could not be written: {error}"

    def forget(self) -> None:
        """Wait, and start again with nothing written."""
        self.wait()
        self.durable_step, self.failure = 0, None
