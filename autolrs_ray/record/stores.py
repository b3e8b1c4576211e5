"""Files on any store that pyarrow has a filesystem for (s3://, gs://, ...), beside plain local ones.

Credentials and endpoints come from the environment (AWS_ACCESS_KEY_ID, AWS_ENDPOINT_URL, ...), never from the URI.
"""

from __future__ import annotations

import os
import re
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl, unquote_to_bytes, urlsplit, urlunsplit

from autolrs_ray.record.files import write_whole

SECRET = re.compile("key|secret|token|passw|ticket|^sig", re.IGNORECASE)  # in the name of a query's value


def is_uri(path: str | os.PathLike[str]) -> bool:
    """True for s3://bucket/folder and the like; file:///folder too."""
    return "://" in os.fspath(path)


def normal(path: str | os.PathLike[str]) -> str:
    """`path` as an absolute local path, ~ meaning the home folder, or as the URI it is. file:// becomes a local path.

    Raises ValueError for what names no folder.
    """
    text = os.fspath(path)
    place = _of_file_uri(text) if text.lower().startswith("file:") else text
    if not place or "\0" in place:
        raise ValueError(
            f'a path must name a folder, got {text!r}: give one without NUL, or "." for the working folder'
        )
    return place if is_uri(place) else Path(place).expanduser().resolve().as_posix()


def _of_file_uri(uri: str) -> str:
    """The local path that a file URI stands for, its %20 and the like undone."""
    _, host, path, query, fragment = urlsplit(uri)
    if host not in ("", "localhost") or path[:1] != "/" or query or fragment:
        raise ValueError(
            f"{uri!r} names no folder of this machine: give the path itself, or file:///FOLDER without host, query or "
            "fragment, as Path(...).as_uri() writes it"
        )
    return os.fsdecode(unquote_to_bytes(path))


def printable(path: str) -> str:
    """`path` as text that can be printed and drawn: bytes that are not UTF-8 as \\xff."""
    return os.fsencode(path).decode(errors="backslashreplace")


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
    return read_from(*open_store(path)) if is_uri(path) else Path(path).read_bytes()


def write_bytes(path: str, content: bytes) -> None:
    """Write a local file, whole or not at all, or the object at a URI. Raises OSError."""
    if is_uri(path):
        write_to(*open_store(path), content)
    else:
        write_whole(path, content)


def read_from(filesystem: Any, path: str) -> bytes:
    with filesystem.open_input_stream(path) as stream:
        return bytes(stream.read())


def write_to(filesystem: Any, path: str, content: bytes) -> None:
    with filesystem.open_output_stream(path) as stream:
        stream.write(content)


def below(uri: str, path: str) -> str:
    """The URI of `path`, which lies below `uri` on the same store."""
    _, root = open_store(uri)
    return join(uri, *Path(path).relative_to(root).parts)


HERE = "./"  # how the paths begin that a record gives relative to its own folder


def relative(root: str, path: str) -> str:
    """`path` as the record of a run in `root` holds it: relative, where it lies below. Both local, or on one store."""
    return HERE + path[len(root) + 1 :] if path.startswith(f"{root}/") else path


def located(folder: str, path: str) -> str:
    """Where a `path` from the record of a run lies now that the run is in `folder`, or at that URI."""
    if path.startswith(HERE):
        return join(folder, path.removeprefix(HERE))
    return below(folder, path) if is_uri(folder) else path  # records of format 2 and before: whole paths


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
            target.write_bytes(read_from(filesystem, info.path))


def upload(folder: Path, uri: str) -> list[str]:
    """Copy the files of `folder` to `uri`; returns their URIs."""
    filesystem, path = open_store(uri)
    filesystem.create_dir(path)
    files = sorted(file for file in folder.iterdir() if file.is_file())
    for file in files:
        write_to(filesystem, f"{path}/{file.name}", file.read_bytes())
    return [join(uri, file.name) for file in files]
