"""Files that are whole or not there: written under a temporary name, renamed, and never through a symbolic link."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO


def fsync_folder(path: str | os.PathLike[str]) -> None:
    """Make renames and new names in `path` durable."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def no_link(path: str, flags: int) -> int:
    """An opener, for `open`, that refuses a symbolic link in the last place of `path`: others may write to the folder, and
    have one there that points to a file of the user's. Raises OSError."""
    return os.open(path, flags | os.O_NOFOLLOW, 0o666)


@contextmanager
def replacing(
    path: str | os.PathLike[str], flush: bool = True, keep: str | os.PathLike[str] | None = None
) -> Iterator[BinaryIO]:
    """A file that takes the place of `path` when the block ends, and leaves it as it was where the block raises.

    flush: the content is on disk before the rename (the rename is not: that is for `fsync_folder`). keep: where the file
    goes that was there before. Raises OSError.
    """
    target = Path(path)
    temporary = target.with_name(target.name + ".tmp")
    temporary.unlink(missing_ok=True)  # of a writer that was killed, or a link that someone has laid there
    try:
        with open(temporary, "xb", opener=no_link) as file:
            yield file
            file.flush()
            if flush:
                os.fsync(file.fileno())
        if keep is not None and target.exists():
            os.replace(target, keep)
        os.replace(temporary, target)
    except Exception:
        temporary.unlink(missing_ok=True)
        raise


def write_whole(path: str | os.PathLike[str], content: bytes, flush: bool = True) -> None:
    """Put a file with `content` in the place of `path`, or leave what is there. A device or a pipe is written to."""
    if Path(path).exists() and not Path(path).is_file():
        Path(path).write_bytes(content)
        return
    with replacing(path, flush) as file:
        file.write(content)
