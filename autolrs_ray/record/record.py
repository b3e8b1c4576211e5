"""The record of a run: the journal of its decisions, and the state that a restart needs, replaced atomically.

Tables, plots, exports and results read the journal; resuming reads the state, which names the journal's length it belongs
to. The state repeats the lines that the learned schedule is made of, so that a damaged journal is mended from it.
"""

from __future__ import annotations

import fcntl
import os
import shutil
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, TextIO

from autolrs_ray.core.events import Event
from autolrs_ray.record.files import fsync_folder, no_link, replacing, write_whole
from autolrs_ray.record.journal import FORMAT, JOURNAL_FILE, RecordWarning, append_lines, opened, read_journal, sealed
from autolrs_ray.record.mirror import LOCK_FILE, Mirror
from autolrs_ray.record.stores import HERE, relative

STATE_FILE = "autolrs_state.json"
PREVIOUS_STATE_FILE = "autolrs_state.previous.json"
DAMAGED_STATE_FILE = "autolrs_state.damaged.json"
ORPHANED_JOURNAL_FILE = "autolrs.orphaned.jsonl"
REPEATED = (Event.START, Event.COMMIT)  # the events that the state repeats
MIRRORED = (JOURNAL_FILE, PREVIOUS_STATE_FILE, STATE_FILE)  # the journal before the state that names its length


class Record:
    """Journal and state of one run folder. One process at a time: the second to open the folder is refused.

    mirror: the run's folder on a store, where the record belongs; `folder` is then a working copy, fetched from there now,
    copied there with every state, and deleted in the end.

    Raises RuntimeError if another process has the folder open.
    """

    def __init__(self, folder: str | os.PathLike[str], mirror: Mirror | None = None) -> None:
        self.folder, self._mirror = Path(folder), mirror
        self.folder.mkdir(parents=True, exist_ok=True)
        self._lock: TextIO = open(self.folder / LOCK_FILE, "a+", opener=no_link)  # noqa: SIM115 - held as long as the run
        self._closed = False
        self._repeated: list[str] = []
        self._next = 0  # number of the next line: a journal that is mended keeps its order, whatever the clock did
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self._lock.close()
            raise RuntimeError(
                f"another process is driving the run in {self.folder}; wait for it, stop it, or choose another name"
            ) from None
        if mirror is not None:
            try:
                mirror.acquire()
                mirror.fetch(self.folder, MIRRORED)
            except BaseException:
                self.close()
                raise

    def __str__(self) -> str:
        return str(self._mirror or self.folder)

    @property
    def journal(self) -> Path:
        return self.folder / JOURNAL_FILE

    def exists(self) -> bool:
        """True if the folder holds the state of an earlier run."""
        return (self.folder / STATE_FILE).exists() or (self.folder / PREVIOUS_STATE_FILE).exists()

    def begin(self, event: dict[str, Any]) -> None:
        """Start a journal with `event`. One without a state, left by a run that was killed at once, is put aside."""
        if self.journal.exists():
            os.replace(self.journal, self.folder / ORPHANED_JOURNAL_FILE)
        self.append([{**event, "format": FORMAT}])

    def append(self, events: list[dict[str, Any]]) -> None:
        """Append `events`, each with the wall-clock time unless it has one, and flush them to disk."""
        if not events:
            return
        now = time.time()
        lines = [
            sealed({"time": now, **self._to_disk(event), "line": self._next + i}) for i, event in enumerate(events)
        ]
        append_lines(self.journal, lines)
        self._next += len(lines)
        self._repeated += [line for event, line in zip(events, lines, strict=True) if event["event"] in REPEATED]

    def write_state(self, config: dict[str, Any], state: dict[str, Any]) -> None:
        """Replace the state: temporary name, fsync, rename, fsync of the folder. The one before stays beside it."""
        length = self.journal.stat().st_size if self.journal.exists() else 0
        content = dict(format=FORMAT, config=config, journal_bytes=length, repeated=self._repeated,
                       state=self._to_disk(state))  # fmt: skip
        with replacing(self.folder / STATE_FILE, keep=self.folder / PREVIOUS_STATE_FILE) as file:
            file.write(sealed(content).encode())
        fsync_folder(self.folder)
        if self._mirror is not None:
            self._mirror.push(self.folder, MIRRORED)

    def load_state(self) -> dict[str, Any]:
        """The last intact state: a dict with "config" and "state". The journal is cut back to where it belongs, and mended.

        Damage raises RecordWarning; RuntimeError if no state can be read.
        """
        failures = []
        for name in (STATE_FILE, PREVIOUS_STATE_FILE):
            try:
                record = _checked_state((self.folder / name).read_text())
            except (OSError, ValueError) as error:
                failures.append(f"{name}: {error}")
                continue
            if failures:
                warnings.warn(f"{self.folder}: {failures[0]}; using {name}", RecordWarning, stacklevel=2)
                if (self.folder / STATE_FILE).exists():  # or it would take the place of the one before it
                    os.replace(self.folder / STATE_FILE, self.folder / DAMAGED_STATE_FILE)
            self._cut(record["journal_bytes"])
            self._mend(record["repeated"])
            return {**record, "state": self._from_disk(record["state"])}
        raise RuntimeError(
            f"cannot resume from {self.folder}: {'; '.join(failures)}. Move the folder away to start anew"
        )

    def _cut(self, length: int) -> None:
        if not self.journal.exists():
            return
        with open(self.journal, "r+b", opener=no_link) as file:
            size = file.seek(0, os.SEEK_END)
            if size < length:
                warnings.warn(f"{self.journal} has lost its last {length - size} bytes", RecordWarning, stacklevel=3)
            file.truncate(min(length, size))
            end = file.seek(0, os.SEEK_END)
            file.seek(max(0, end - 1))
            if end and file.read(1) != b"\n":  # cut short within a line: the next one is not to be spoilt by it
                file.write(b"\n")

    def _mend(self, repeated: list[str]) -> None:
        """Put the lines that the state repeats back into the journal, where it has lost them."""
        self._repeated = repeated
        events = read_journal(self.journal) if self.journal.exists() else []
        found = {sealed(event) for event in events}
        lost = [line for line in repeated if line not in found]
        if lost:
            message = f"{self.journal} had lost {len(lost)} of the lines that the state repeats; they are put back"
            warnings.warn(message, RecordWarning, stacklevel=3)
            events = sorted([*map(opened, lost), *events], key=_place)
            write_whole(self.journal, "".join(sealed(event) + "\n" for event in events).encode())
            fsync_folder(self.folder)
        self._next = max(map(_place, events), default=-1) + 1

    # -- paths: relative to the folder on disk, so that a run may be moved or copied --------------------------------------

    @property
    def _root(self) -> str:
        return self.folder.as_posix() if self._mirror is None else self._mirror.path

    def _to_disk(self, value: Any) -> Any:
        return _with_strings(value, lambda text: relative(self._root, text))

    def _from_disk(self, value: Any) -> Any:
        return _with_strings(value, lambda text: f"{self._root}/{text[len(HERE) :]}" if text.startswith(HERE) else text)

    def close(self) -> None:
        """Give the folder free for another process."""
        if not self._closed:
            self._closed = True
            if self._mirror is not None:
                self._mirror.release()
                shutil.rmtree(self.folder, ignore_errors=True)
            self._lock.close()


def _checked_state(text: str) -> dict[str, Any]:
    """The content of a state file. Raises ValueError for what is none, or of another format."""
    record = opened(text)
    written = record.get("format")
    if written != FORMAT:
        raise ValueError(f"format {written!r:.20} is not {FORMAT}: end the run with the version that began it")
    kinds = dict(config=dict, state=dict, journal_bytes=int, repeated=list)
    wrong = [key for key, kind in kinds.items() if not isinstance(record.get(key), kind)]
    if wrong:
        raise ValueError(f"it is no state: {', '.join(wrong)} missing or of another kind")
    for line in record["repeated"]:
        opened(str(line))
    return record


def _place(event: dict[str, Any]) -> int:
    """Number of `event` in its journal; -1 where it has none."""
    number = event.get("line")
    return number if isinstance(number, int) else -1


def _with_strings(value: Any, change: Callable[[str], str]) -> Any:
    """`value`, nested lists and dicts, with every string in it changed, but for those of messages."""
    if isinstance(value, str):
        return change(value)
    if isinstance(value, dict):
        return {key: item if key == "message" else _with_strings(item, change) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_with_strings(item, change) for item in value]
    return value
