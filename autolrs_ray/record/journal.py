"""The journal of a run: one JSON line per event, each with a CRC-32 of itself, appended and flushed to disk.

Lines that do not match their checksum are left out with a warning.
"""

from __future__ import annotations

import errno
import json
import math
import os
import warnings
import zlib
from pathlib import Path
from typing import Any, NoReturn

from autolrs_ray.record.files import no_link
from autolrs_ray.record.stores import is_uri, join, read_bytes

JOURNAL_FILE = "autolrs.jsonl"
FORMAT = 3
"""Of journal and state: 3 since paths are relative, lines are numbered and options are written as they were resolved."""


class RecordWarning(UserWarning):
    """A part of a run's record was unreadable and has been left out."""


def finite(value: Any) -> Any:
    """`value` with NaN and infinities replaced by None, tuples by lists, and halves of characters by their escapes: strict JSON
    has none of them."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, str):
        return value if value.isascii() else value.encode("utf-8", "backslashreplace").decode()
    if isinstance(value, dict):
        return {finite(str(key)): finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite(item) for item in value]
    return value


def sealed(record: dict[str, Any]) -> str:
    """`record` as a line of strict JSON, without its end, that carries its own checksum."""
    body = json.dumps(finite(record), separators=(",", ":"), allow_nan=False)
    return f'{body[:-1]},"crc":{zlib.crc32(body.encode())}}}'


def opened(line: str) -> dict[str, Any]:
    """The record of a sealed line. ValueError if it does not match its checksum, or holds what `sealed` never writes."""
    body, mark, crc = line.rstrip("\n").rpartition(',"crc":')
    if not mark or not crc.endswith("}") or zlib.crc32((body + "}").encode()) != int(crc[:-1]):
        raise ValueError("the line does not match its checksum")
    try:
        record = json.loads(body + "}", parse_constant=_no_constant, parse_float=_float, parse_int=_int)
        if not isinstance(record, dict) or not isinstance(record.get("event", ""), str):
            raise ValueError("the line is no record")
        json.dumps(record, ensure_ascii=False).encode()  # halves of characters cannot be
    except RecursionError:
        raise ValueError("the line is nested too deep") from None
    return record


def _no_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not JSON")


def _float(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"{text:.20} is too large")
    return value


def _int(text: str) -> int:
    _float(text)
    return int(text)


def read_journal(path: str | os.PathLike[str]) -> list[dict[str, Any]]:
    """All intact events of the journal at `path` (a file, a run folder or its URI), in order. Damaged lines raise
    RecordWarning.

    Raises FileNotFoundError, naming the path, where there is no journal.
    """
    file, content = _journal_at(os.fspath(path))
    events, damaged = [], 0
    for line in content.split(b"\n"):
        if not line:
            continue
        try:
            events.append(opened(line.decode()))
        except ValueError:
            damaged += 1
    if damaged:
        warnings.warn(f"{file}: {damaged} damaged line(s) left out", RecordWarning, stacklevel=2)
    return events


def _journal_at(path: str) -> tuple[str, bytes]:
    """Where the journal of `path` lies, and its content."""
    folder = not path.endswith(".jsonl") if is_uri(path) else Path(path).is_dir()
    file = join(path, JOURNAL_FILE) if folder else path
    try:
        return file, read_bytes(file)
    except FileNotFoundError:
        message = f"no journal at {file}: give the folder of an AutoLRS run (it holds {JOURNAL_FILE})"
        raise FileNotFoundError(message) from None


def append_lines(path: Path, lines: list[str]) -> None:
    """Append `lines` to the journal at `path` and flush them to disk: all of them, or none where it raises OSError."""
    content = "".join(line + "\n" for line in lines).encode()
    with open(path, "ab", buffering=0, opener=no_link) as file:
        before = file.tell()
        try:
            if file.write(content) != len(content):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
            os.fsync(file.fileno())
        except OSError:
            file.truncate(before)  # half a line would spoil the next one too
            raise
