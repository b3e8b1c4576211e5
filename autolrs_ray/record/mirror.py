"""A run's record on a store without locks: one driver at a time, copied there at every commit.

The record is written to a local folder first, as always, and at every commit copied to the store: the journal before the
state that names its length, so that a copy cut short at any point leaves a state and a journal that fit.
"""

from __future__ import annotations

import json
import logging
import os
import socket
import tempfile
import threading
import time
import uuid
from pathlib import Path
from typing import Any

from autolrs_ray.record.stores import download, open_store, read_from, write_to

logger = logging.getLogger(__name__)

BEAT_S = 5.0  # how often the driver of a run renews its lock on the store
LEASE_S = 15.0  # a lock that has not changed for so long is that of a driver that died
SETTLE_S = 1.0  # two drivers that take a lock at once: the later write wins, and is seen after this
LOCK_FILE = "autolrs.lock"


class RunTakenError(RuntimeError):
    """Another process drives the run."""


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
            found: dict[str, Any] = json.loads(read_from(self._filesystem, self._lock))
        except FileNotFoundError:
            return None
        except ValueError:
            return {"owner": "unreadable"}
        return found

    def _beat(self) -> None:
        self._beats += 1
        lock = dict(owner=self._owner, beat=self._beats, host=socket.gethostname(), pid=os.getpid())
        write_to(self._filesystem, self._lock, json.dumps(lock).encode())

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
        self._stop.clear()
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
            self._thread = None
        if not self._beats:
            return  # it never was ours
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
                content = read_from(self._filesystem, f"{self.path}/{name}")
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
                write_to(self._filesystem, f"{self.path}/{name}", (folder / name).read_bytes())
