"""Run folders on any store that pyarrow has a filesystem for (s3://, gs://, ...), beside plain local folders.

The record of a run is written to a local folder first, as always, and at every commit copied to the store: the journal
before the state that names its length, so that a copy cut short at any point leaves a state and a journal that fit.
Credentials and endpoints come from the environment (AWS_ACCESS_KEY_ID, AWS_ENDPOINT_URL, ...), never from the URI.
"""

from __future__ import annotations

import json
import logging
import os
import re
import socket
import tempfile
import threading
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl, urlsplit, urlunsplit

logger = logging.getLogger(__name__)

BEAT_S = 5.0  # how often the driver of a run renews its lock on the store
LEASE_S = 15.0  # a lock that has not changed for so long is that of a driver that died
SETTLE_S = 1.0  # two drivers that take a lock at once: the later write wins, and is seen after this
LOCK_FILE = "autolrs.lock"
SECRET = re.compile("key|secret|token|passw|ticket|^sig", re.IGNORECASE)  # in the name of a query's value


class RunTakenError(RuntimeError):
    """Another process drives the run."""


def is_uri(path: str | os.PathLike[str]) -> bool:
    """True for s3://bucket/folder and the like; file:///folder too."""
    return "://" in os.fspath(path)


def normal(path: str | os.PathLike[str]) -> str:
    """`path` as an absolute local path, or as the URI it is. file:// becomes a local path."""
    text = os.fspath(path)
    if text.startswith("file://"):
        return urlsplit(text).path
    return text if is_uri(text) else Path(text).resolve().as_posix()


def join(base: str, *parts: str) -> str:
    """A path below a local folder or a URI; the URI's query stays."""
    if not is_uri(base):
        return Path(base, *parts).as_posix()
    scheme, host, path, query, fragment = urlsplit(base)
    return urlunsplit((scheme, host, "/".join([path.rstrip("/"), *parts]), query, fragment))


def refuse_secrets(uri: str) -> None:
    """Raise ValueError, with the secrets blotted out, if `uri` holds any: it is printed, and seen in lists of processes."""
    scheme, host, path, query, fragment = urlsplit(uri)
    login, _, place = host.rpartition("@")
    values = parse_qsl(query, keep_blank_values=True)
    if ":" not in login and not any(SECRET.search(name) for name, _ in values):
        return
    shown = "&".join(f"{name}={'***' if SECRET.search(name) else value}" for name, value in values)
    blotted = urlunsplit((scheme, f"***@{place}" if login else place, path, shown, fragment))
    raise ValueError(
        f"{blotted} holds a secret: give it in the environment of the driver and of the workers (for s3:// "
        "AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY), or use the machine's role, and leave it out of the URI"
    )


def open_store(uri: str) -> tuple[Any, str]:
    """The pyarrow filesystem of `uri` and the path on it. Raises ValueError for a URI that pyarrow does not know, and for one
    with a password or a key in it."""
    from pyarrow import ArrowException
    from pyarrow.fs import FileSystem

    refuse_secrets(uri)
    try:
        filesystem, path = FileSystem.from_uri(uri)
    except ArrowException as error:
        raise ValueError(f"cannot open {uri}: {error}. Give a local folder, or a URI that pyarrow.fs opens") from error
    return filesystem, path


def read_bytes(path: str) -> bytes:
    """The content of a local file or of the object at a URI. Raises FileNotFoundError if it is not there, OSError if the
    store does not answer."""
    return _read(*open_store(path)) if is_uri(path) else Path(path).read_bytes()


def write_bytes(path: str, content: bytes) -> None:
    """Write a local file or the object at a URI. Raises OSError."""
    if is_uri(path):
        _write(*open_store(path), content)
    else:
        Path(path).write_bytes(content)


def _read(filesystem: Any, path: str) -> bytes:
    with filesystem.open_input_stream(path) as stream:
        return bytes(stream.read())


def _write(filesystem: Any, path: str, content: bytes) -> None:
    with filesystem.open_output_stream(path) as stream:
        stream.write(content)


def below(uri: str, path: str) -> str:
    """The URI of `path`, which lies below `uri` on the same store."""
    _, root = open_store(uri)
    return join(uri, *Path(path).relative_to(root).parts)


@contextmanager
def local_copy(path: str, name: str | None = None) -> Iterator[str]:
    """A local folder with the content of `path`: itself, or a temporary copy of what is at a URI.

    name: copy no files but those called so in the folders directly below.
    """
    if not is_uri(path):
        yield path
        return
    filesystem, root = open_store(path)
    with tempfile.TemporaryDirectory(prefix="autolrs-") as folder:
        if name is None:
            download(filesystem, root, folder)
        else:
            _download_named(filesystem, root, name, Path(folder))
        yield folder


def download(filesystem: Any, path: str, folder: str | os.PathLike[str]) -> None:
    """Copy all files below `path` into `folder`. Raises FileNotFoundError if there is nothing."""
    from pyarrow.fs import LocalFileSystem, copy_files

    copy_files(path, os.fspath(folder), source_filesystem=filesystem, destination_filesystem=LocalFileSystem())


def _download_named(filesystem: Any, root: str, name: str, folder: Path) -> None:
    """Copy every `root`/FOLDER/`name` to `folder`/FOLDER/`name`."""
    from pyarrow.fs import FileSelector, FileType

    children = filesystem.get_file_info(FileSelector(root, allow_not_found=True))
    wanted = [f"{child.path}/{name}" for child in children if child.type is FileType.Directory]
    for info in filesystem.get_file_info(wanted):
        if info.type is FileType.File:
            target = folder / Path(info.path).relative_to(root)
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(_read(filesystem, info.path))


def upload(folder: Path, uri: str) -> list[str]:
    """Copy the files of `folder` to `uri`; returns their URIs."""
    filesystem, path = open_store(uri)
    filesystem.create_dir(path)
    files = sorted(file for file in folder.iterdir() if file.is_file())
    for file in files:
        _write(filesystem, f"{path}/{file.name}", file.read_bytes())
    return [join(uri, file.name) for file in files]


class Mirror:
    """A run's record on a store: copied there at every commit, fetched from there when a run goes on.

    One driver at a time, as far as a store without locks allows: the driver renews a lock object every BEAT_S, a second one
    is refused while it changes, and takes over when it has stood still for LEASE_S. Before every commit the driver reads
    the lock and gives up if it is another's. Between that read and the write lies the time of one request, in which two
    drivers that both think themselves alone can each write once: stores offer no atomic "write if the lock is mine" here.
    """

    def __init__(self, filesystem: Any, path: str) -> None:
        self._filesystem, self.path = filesystem, path.rstrip("/")
        self._lock = f"{self.path}/{LOCK_FILE}"
        self._owner = uuid.uuid4().hex
        self._beats = 0
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None

    @classmethod
    def at(cls, uri: str) -> Mirror:
        return cls(*open_store(uri))

    def __str__(self) -> str:
        return f"{self._filesystem.type_name}://{self.path}"

    # -- the lock ------------------------------------------------------------------------------------------------------

    def _locked_by(self) -> dict[str, Any] | None:
        try:
            found: dict[str, Any] = json.loads(_read(self._filesystem, self._lock))
        except FileNotFoundError:
            return None
        except ValueError:
            return {"owner": "unreadable"}
        return found

    def _beat(self) -> None:
        self._beats += 1
        lock = dict(owner=self._owner, beat=self._beats, host=socket.gethostname(), pid=os.getpid())
        _write(self._filesystem, self._lock, json.dumps(lock).encode())

    def acquire(self) -> None:
        """Become the driver of the run, waiting LEASE_S where the last one died. Raises RunTakenError if it is alive."""
        self._filesystem.create_dir(self.path)
        first = self._locked_by()
        if first is not None:
            logger.warning("%s has a lock; waiting %.0f s to see if its driver is alive", self, LEASE_S)
            deadline = time.monotonic() + LEASE_S
            while (now := self._locked_by()) is not None and time.monotonic() < deadline:
                if now != first:
                    raise self._taken(now)
                time.sleep(min(SETTLE_S, LEASE_S / 4))
        self._beat()
        time.sleep(SETTLE_S)
        self.confirm()
        self._thread = threading.Thread(target=self._keep_beating, daemon=True, name="autolrs-lock")
        self._thread.start()

    def _taken(self, lock: dict[str, Any] | None) -> RunTakenError:
        if lock is None:
            return RunTakenError(f"the lock on {self} is gone: someone has deleted it. Start again to take it anew")
        return RunTakenError(
            f"another process is driving the run in {self} (process {lock.get('pid')} on {lock.get('host')}); wait for it, "
            "stop it, or choose another name"
        )

    def confirm(self) -> None:
        """Raise RunTakenError unless the lock is ours."""
        lock = self._locked_by()
        if lock is None or lock.get("owner") != self._owner:
            raise self._taken(lock)

    def _keep_beating(self) -> None:
        while not self._stop.wait(BEAT_S):
            try:
                self.confirm()
                self._beat()
            except RunTakenError:
                return  # the next commit says so
            except OSError as error:
                logger.warning("cannot renew the lock on %s: %s", self, error)

    def release(self) -> None:
        """Give the run free. A lock that cannot be deleted is found dead after LEASE_S."""
        self._stop.set()
        if self._thread is not None:
            self._thread.join()
        try:
            self.confirm()
            self._filesystem.delete_file(self._lock)
        except (OSError, RunTakenError) as error:
            logger.warning("%s", error)

    # -- the record ----------------------------------------------------------------------------------------------------

    def fetch(self, folder: Path, names: tuple[str, ...]) -> None:
        """Copy the files called `names` that the store has into `folder`."""
        for name in names:
            try:
                content = _read(self._filesystem, f"{self.path}/{name}")
            except FileNotFoundError:
                continue
            (folder / name).write_bytes(content)

    def verify(self, path: str, manifests: bool = False) -> None:
        """Raise CheckpointError unless the checkpoint at `path` on this store is whole. One without a manifest, of a
        trainable that is not ours, has only to be there. manifests: none is of such a trainable. Raises OSError."""
        from pyarrow.fs import FileType

        from autolrs_ray.record.checkpoints import MANIFEST_FILE, CheckpointError, verify_checkpoint

        files = self._filesystem.get_file_info([path, f"{path}/{MANIFEST_FILE}"])
        if not manifests and files[0].type is FileType.Directory and files[1].type is FileType.NotFound:
            return
        with tempfile.TemporaryDirectory() as folder:
            try:
                download(self._filesystem, path, folder)
            except OSError as error:
                raise CheckpointError(f"checkpoint {path} cannot be read: {error}") from error
            verify_checkpoint(folder)

    def push(self, folder: Path, names: tuple[str, ...]) -> None:
        """Copy the files called `names` to the store, in that order. Raises RunTakenError, OSError."""
        self.confirm()
        for name in names:
            if (folder / name).exists():
                _write(self._filesystem, f"{self.path}/{name}", (folder / name).read_bytes())
