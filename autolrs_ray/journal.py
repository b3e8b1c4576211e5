"""The record of a run: an append-only journal of decisions and an atomically replaced state, both JSON.

Tables, plots, exports and results read the journal; resuming reads the state, which names the journal's length it belongs
to. Every journal line ends in a CRC-32 of itself; lines that do not match are left out with a warning.
"""

from __future__ import annotations

import fcntl
import json
import math
import os
import time
import warnings
import zlib
from pathlib import Path
from typing import Any, TextIO

JOURNAL_FILE = "autolrs.jsonl"
STATE_FILE = "autolrs_state.json"
PREVIOUS_STATE_FILE = "autolrs_state.previous.json"
LOCK_FILE = "autolrs.lock"
FORMAT = 1


class RecordWarning(UserWarning):
    """A part of a run's record was unreadable and has been left out."""


def _finite(value: Any) -> Any:
    """`value` with NaN and infinities replaced by None: strict JSON has neither."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {str(key): _finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    return value


def _sealed(record: dict[str, Any]) -> str:
    body = json.dumps(_finite(record), separators=(",", ":"), allow_nan=False)
    return f'{body[:-1]},"crc":{zlib.crc32(body.encode())}}}'


def _opened(line: str) -> dict[str, Any]:
    """The record of a sealed line; ValueError if it does not match its CRC."""
    body, mark, crc = line.rstrip("\n").rpartition(',"crc":')
    if not mark or not crc.endswith("}") or zlib.crc32((body + "}").encode()) != int(crc[:-1]):
        raise ValueError("the line does not match its checksum")
    record: dict[str, Any] = json.loads(body + "}")
    return record


def fsync_folder(path: Path) -> None:
    """Make renames and new names in `path` durable."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def read_journal(path: str | os.PathLike[str]) -> list[dict[str, Any]]:
    """All intact events of the journal at `path` (a file or a run folder), in order. Damaged lines raise RecordWarning.

    Raises FileNotFoundError, naming the path, where there is no journal.
    """
    file = Path(path)
    file = file / JOURNAL_FILE if file.is_dir() else file
    if not file.exists():
        raise FileNotFoundError(f"no journal at {file}: give the folder of an AutoLRS run (it holds {JOURNAL_FILE})")
    events, damaged = [], 0
    for line in file.read_bytes().split(b"\n"):
        if not line:
            continue
        try:
            events.append(_opened(line.decode()))
        except ValueError:
            damaged += 1
    if damaged:
        warnings.warn(f"{file}: {damaged} damaged line(s) left out", RecordWarning, stacklevel=2)
    return events


class Record:
    """Journal and state of one run folder. One process at a time: the second to open the folder is refused.

    Raises RuntimeError if another process has the folder open.
    """

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        self.folder = Path(folder)
        self.folder.mkdir(parents=True, exist_ok=True)
        self._lock: TextIO = open(self.folder / LOCK_FILE, "a+")  # noqa: SIM115 - held as long as the run
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            self._lock.close()
            raise RuntimeError(
                f"another process is driving the run in {self.folder}; wait for it, stop it, or choose another name"
            ) from None
        self._closed = False

    @property
    def journal(self) -> Path:
        return self.folder / JOURNAL_FILE

    def exists(self) -> bool:
        """True if the folder holds the state of an earlier run."""
        return (self.folder / STATE_FILE).exists() or (self.folder / PREVIOUS_STATE_FILE).exists()

    def append(self, events: list[dict[str, Any]]) -> None:
        """Append `events`, each with the wall-clock time, and flush them to disk."""
        if not events:
            return
        now = time.time()
        lines = "".join(_sealed({"time": now, **event}) + "\n" for event in events)
        with open(self.journal, "ab") as file:
            file.write(lines.encode())
            file.flush()
            os.fsync(file.fileno())

    def write_state(self, config: dict[str, Any], state: dict[str, Any]) -> None:
        """Replace the state: temporary name, fsync, rename, fsync of the folder. The one before stays beside it."""
        length = self.journal.stat().st_size if self.journal.exists() else 0
        current, temporary = self.folder / STATE_FILE, self.folder / (STATE_FILE + ".tmp")
        with open(temporary, "w") as file:
            file.write(_sealed({"format": FORMAT, "config": config, "journal_bytes": length, "state": state}))
            file.flush()
            os.fsync(file.fileno())
        if current.exists():
            os.replace(current, self.folder / PREVIOUS_STATE_FILE)
        os.replace(temporary, current)
        fsync_folder(self.folder)

    def load_state(self) -> dict[str, Any]:
        """The last intact state: a dict with "config" and "state". The journal is cut back to where it belongs.

        Raises RuntimeError if no state can be read.
        """
        failures = []
        for name in (STATE_FILE, PREVIOUS_STATE_FILE):
            try:
                record = _opened((self.folder / name).read_text())
                if record["format"] != FORMAT:
                    raise ValueError(f"format {record['format']} is not {FORMAT}")
            except (OSError, ValueError, KeyError) as error:
                failures.append(f"{name}: {error}")
                continue
            if failures:
                warnings.warn(f"{self.folder}: {failures[0]}; using {name}", RecordWarning, stacklevel=2)
            self._cut(record["journal_bytes"])
            return record
        raise RuntimeError(
            f"cannot resume from {self.folder}: {'; '.join(failures)}. Move the folder away to start anew"
        )

    def _cut(self, length: int) -> None:
        if self.journal.exists() and self.journal.stat().st_size > length:
            os.truncate(self.journal, length)

    def close(self) -> None:
        """Give the folder free for another process."""
        if not self._closed:
            self._closed = True
            self._lock.close()
