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

from autolrs_ray.record.files import fsync_folder, replacing

STATE_FILE = "state.pt"
MANIFEST_FILE = "manifest.json"
PICKLE_FILE = "_dict_checkpoint.pkl"
"""Where Tune keeps what a `save_checkpoint` returned as a dict. Tune unpickles it, and so executes it, wherever it lies."""

FORMAT = 2
"""Of a Trainer's state: 2 since it holds several averages."""


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


def write_checkpoint(state: dict[str, Any], folder: str | os.PathLike[str], flush: bool = True) -> None:
    """Write `state` to `folder`/state.pt and its manifest: temporary name, fsync, rename, the manifest last.

    flush: False where the files are copied from here at once, and it is the copy that must last: nothing is flushed to disk.
    """
    path = Path(folder)
    new = [path, *path.parents][: sum(not parent.exists() for parent in (path, *path.parents))]
    path.mkdir(parents=True, exist_ok=True)
    with replacing(path / STATE_FILE, flush) as file:
        hashing = _HashingFile(file)
        torch.save(state, cast(BinaryIO, hashing))
    manifest = {"size": hashing.size, "sha256": hashing.sha256.hexdigest(), "step": state["step"]}
    with replacing(path / MANIFEST_FILE, flush) as file:
        file.write(json.dumps(manifest).encode())
    if flush:
        for changed in (path, *(made.parent for made in new)):
            fsync_folder(changed)


def flush_checkpoint(folder: str | os.PathLike[str]) -> None:
    """Make the files below `folder` durable, whoever wrote them, and their names, with that of `folder` itself and of the
    one it lies in, which Tune makes for a trial. Raises CheckpointError where the disk refuses."""
    path = Path(folder)
    try:
        found = [*path.rglob("*"), path]
        for file in found:
            if file.is_file():
                with open(file, "rb") as opened:
                    os.fsync(opened.fileno())
        above = [parent for parent in path.parents[:2] if os.access(parent, os.R_OK)]
        for changed in (*(place for place in found if place.is_dir()), *above):
            fsync_folder(changed)
    except OSError as error:
        raise CheckpointError(f"checkpoint {path} cannot be flushed to disk: {error}") from error


def refuse_pickle(folder: str | os.PathLike[str]) -> None:
    """Raise CheckpointError if `folder` holds a file that Tune would unpickle."""
    if Path(folder, PICKLE_FILE).exists():
        raise CheckpointError(
            f"checkpoint {folder} holds {PICKLE_FILE}, which would be executed when it is loaded, and which AutoLRSTrainable "
            "never writes: delete the file if you do not know where it comes from. A save_checkpoint of your own must write "
            "its files into the folder it is given, and return None, not a dict"
        )


def verify_checkpoint(folder: str | os.PathLike[str], content: bool = True) -> int:
    """Return the step of the checkpoint in `folder`; raise CheckpointError if it does not match its manifest, or if it holds
    a file that Tune would unpickle.

    content: False compares the size only, and takes well under a millisecond, whatever the size.
    """
    path = Path(folder)
    refuse_pickle(path)
    try:
        manifest = json.loads((path / MANIFEST_FILE).read_text())
        size, digest, step = manifest["size"], manifest["sha256"], int(manifest["step"])
        whole = (path / STATE_FILE).stat().st_size == size
        if not whole or (content and _sha256(path / STATE_FILE) != digest):
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


def require_format(state: dict[str, Any]) -> None:
    """Raise ValueError where `state`, a Trainer's, was written by a version of another format."""
    if state.get("format") != FORMAT:
        raise ValueError(
            f"the state is of format {state.get('format')}, this version reads format {FORMAT}: end the run with the "
            "version that began it, or begin anew under another name"
        )


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
