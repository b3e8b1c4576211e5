"""Checkpoints that can be trusted: written under a temporary name, flushed and renamed, with a manifest that comes last."""

from __future__ import annotations

import copy
import hashlib
import io
import json
import os
from collections import OrderedDict
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, BinaryIO, cast

import numpy as np
import torch
from torch import Tensor

from autolrs_ray.record.files import fsync_folder, replacing

STATE_FILE = "state.pt"
MANIFEST_FILE = "manifest.json"
PICKLE_FILE = "_dict_checkpoint.pkl"
"""Where Tune keeps what a `save_checkpoint` returned as a dict. Tune unpickles it, and so executes it, wherever it lies."""

FORMAT = 3
"""Of a Trainer's state: 2 since it holds several averages, 3 since it holds all that trains besides the model."""


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


def read_checkpoint(folder: str | os.PathLike[str]) -> dict[str, Any]:
    """Load a verified checkpoint, to the CPU: an optimizer moves what it wants elsewhere, and waits for the GPU at every step
    where its step counts lie there. Only tensors and plain values are accepted (`weights_only=True`)."""
    verify_checkpoint(folder)
    try:
        state: dict[str, Any] = torch.load(Path(folder) / STATE_FILE, map_location="cpu", weights_only=True)
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


def model_weights(state: dict[str, Any], averaged: bool) -> dict[str, Any]:
    """The model's state_dict in a Trainer's `state`: with the best average's weights and statistics, in the model's dtypes, or
    with the raw ones, those to be evaluated where the optimizer has a mode for that.

    Raises ValueError where the state holds no average that has been found to be best.
    """
    model = dict(state.get("evaluated", state["model"]))
    if not averaged:
        return model
    averages = state["averages"]
    if averages is None or averages["best"] is None:
        raise ValueError(f"the state of step {state['step']} holds no average found to be best: load it with a Trainer")
    prefix = "model."  # of the names that a Trainer gives: a loss may have weights too
    for name, value in averages["weights"][averages["best"]].items():
        if name.startswith(prefix) and name[len(prefix) :] in model:
            model[name[len(prefix) :]] = value.to(model[name[len(prefix) :]].dtype)
    return model


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def mapped(state: Any, leaf: Callable[[Any], Any]) -> Any:
    """Nested dicts, lists and tuples with every other value replaced by `leaf` of it. An OrderedDict keeps what torch notes
    on it, the versions of a model's layers, without which some of them take their state for an old one's."""
    if isinstance(state, dict):
        found = {key: mapped(value, leaf) for key, value in state.items()}
        if not hasattr(state, "_metadata"):
            return found
        ordered = OrderedDict(found)
        ordered._metadata = copy.deepcopy(state._metadata)  # type: ignore[attr-defined]
        return ordered
    if isinstance(state, tuple):
        values = [mapped(value, leaf) for value in state]
        return type(state)(values) if type(state) in (tuple, torch.Size) else tuple(values)
    if isinstance(state, list):
        return [mapped(value, leaf) for value in state]
    return leaf(state)


PLAIN = (bool, int, float, complex, str, bytes, type(None), torch.dtype, torch.device, torch.Size)
"""What a checkpoint holds besides tensors, dicts, lists and tuples: `torch.load(weights_only=True)` reads these back."""


def plain(state: Any, where: str = "the state") -> Any:
    """`state` with NumPy's scalars, and subclasses of plain types, as plain values.

    Raises TypeError that names the place of a value that could be written, but not read back.
    """
    if isinstance(state, dict):
        for key in state:
            if not isinstance(key, (str, int)):
                raise TypeError(f"{where} has the key {key!r}: a checkpoint holds strings and ints for keys")
        found = {_plain_leaf(key, where): plain(value, f"{where}[{key!r}]") for key, value in state.items()}
        if not hasattr(state, "_metadata"):
            return found
        ordered = OrderedDict(found)
        ordered._metadata = state._metadata  # type: ignore[attr-defined]
        return ordered
    if isinstance(state, torch.Size):
        return state
    if isinstance(state, (list, tuple)):
        values = [plain(value, f"{where}[{i}]") for i, value in enumerate(state)]
        return values if isinstance(state, list) else tuple(values)
    return _plain_leaf(state, where)


def _plain_leaf(value: Any, where: str) -> Any:
    if isinstance(value, Tensor):
        return value
    if isinstance(value, np.generic):
        value = value.item()
    if type(value) in PLAIN:
        return value
    for kind in (int, float, str):  # an IntEnum, a named float
        if isinstance(value, kind):
            return kind(value)
    raise TypeError(
        f"{where} is a {type(value).__module__}.{type(value).__qualname__}, which a checkpoint cannot hold: it is read back "
        "as tensors, numbers, strings, lists, tuples and dicts only. Return one of these from get_extra_state, or from the "
        "state_dict of the optimizer; arrays and deques may be attributes of the optimizer, not part of its state"
    )


def snapshot(state: Any) -> Any:
    """A copy of nested dicts and lists in which no tensor shares memory with `state`; tensors come to the CPU. What is one
    tensor under two names, as tied weights are, stays one."""
    copies: dict[Any, Tensor] = {}

    def copied(value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        if value.layout is not torch.strided or not value.numel():
            return value.detach().to("cpu", copy=True)
        key = (value.data_ptr(), value.dtype, value.shape, value.stride(), value.device)
        if key not in copies:
            copies[key] = value.detach().to("cpu", copy=True)
        return copies[key]

    return mapped(state, copied)


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
