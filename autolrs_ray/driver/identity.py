"""What is trained, for the record: the trainable by name and by a digest of its code, and its config in readable values.

So that a run is not taken for another's of the same name: another model's finished result would be returned, or its training
continued.
"""

from __future__ import annotations

import dis
import functools
import hashlib
import inspect
import json
import sys
import sysconfig
from argparse import Namespace
from collections.abc import Mapping, Sequence
from dataclasses import fields, is_dataclass
from datetime import date, time, timedelta
from decimal import Decimal
from enum import Enum
from fractions import Fraction
from pathlib import PurePath
from types import CodeType, SimpleNamespace
from typing import Any
from uuid import UUID

import numpy as np
from ray.tune.search.sample import Domain

from autolrs_ray.driver.settings import CONFIG_KEY, LR_KEY

READER = 2  # changes with what counts: digests of other readers say nothing
_MOST = 10_000  # items of a list or a dict that are read
_FOREIGN = {"ray", "torch", "autolrs_ray", "numpy", *sys.stdlib_module_names} - {
    "__main__"
}  # whose code is not the user's
_NAMESPACES = (Namespace, SimpleNamespace)
_AS_THEY_LOOK = (complex, range, slice, PurePath, Enum, date, time, timedelta, Decimal, Fraction, UUID, np.dtype)
_TORCHS = {"torch.dtype", "torch.device", "torch.layout"}
_INSTALLED = tuple(sysconfig.get_path(kind) for kind in ("purelib", "platlib"))


def subject(trainable: type, config: dict[str, Any]) -> dict[str, Any]:
    """As JSON values: "trainable" (its name), "code" (a digest of its code, and of the values it takes from around it),
    "python" (the digest depends on it, and on how it is read), and "config" without what AutoLRS puts in."""
    own = {key: value for key, value in config.items() if key not in (LR_KEY, CONFIG_KEY)}
    reader = _Reader()
    code = json.dumps(reader.read(trainable), sort_keys=True)
    return dict(
        trainable=reader.name or trainable.__qualname__, code=_digest(code.encode()),
        python=f"{sys.version_info.major}.{sys.version_info.minor}, read by {READER}", config=_Reader().read(own),
    )  # fmt: skip


def changes(ours: dict[str, Any], theirs: dict[str, Any]) -> tuple[list[str], bool]:
    """What is different in the subject of a run that is to go on, by name, and whether its code is."""
    found = []
    if ours["trainable"] != theirs.get("trainable", ours["trainable"]):
        found.append(f"trainable: {theirs['trainable']} -> {ours['trainable']}")
    before, now = _flat(theirs.get("config", {})), _flat(ours["config"])
    for key in sorted(before.keys() | now.keys()):
        if before.get(key) != now.get(key):
            found.append(f"config {key}: {before.get(key)} -> {now.get(key)}")
    same_python = ours["python"] == theirs.get("python")
    return found, same_python and ours["code"] != theirs.get("code")


def refuse_search_spaces(config: dict[str, Any]) -> None:
    """Raise ValueError, naming key and value, for anything in `config`, "lr" apart, that stands for many values."""
    if found := search_spaces({key: value for key, value in config.items() if key != LR_KEY}):
        raise ValueError(
            f"{'; '.join(found)}: only the learning rate is searched for. Give one value, and start a run per value, under "
            "names of their own"
        )


def search_spaces(config: Any, path: str = "", around: tuple[int, ...] = ()) -> list[str]:
    """What stands for many values in `config`, nested values included, each as 'config["key"] = value'. around: ids of what
    holds it, which it may hold again."""
    if id(config) in around:
        return []
    around = (*around, id(config))
    if isinstance(config, dict) and set(config) == {"grid_search"}:
        return [f"config{path} = tune.grid_search({config['grid_search']!r})"]
    if isinstance(config, Domain):
        return [f"config{path} = {type(config).__name__} {config.domain_str}"]
    if isinstance(config, dict):
        return [found for key, value in config.items() for found in search_spaces(value, f"{path}[{key!r}]", around)]
    if isinstance(config, (list, tuple)):
        return [found for i, value in enumerate(config) for found in search_spaces(value, f"{path}[{i}]", around)]
    return []


def _flat(config: Any, path: str = "") -> dict[str, str]:
    if isinstance(config, dict):
        inner: dict[str, str] = {}
        for key, value in config.items():
            inner |= _flat(value, f"{path}.{key}" if path else str(key))
        return inner
    return {path: json.dumps(config)}


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:16]


def _package(value: Any) -> str:
    return str(getattr(value, "__module__", None) or "").partition(".")[0]


class _Reader:
    """Reads values as JSON values that are the same in every process: code and arrays by a digest, other objects by their type.

    name: of the first function or class met that is the user's own. Its package is the user's, wherever it is installed; of
    other installed packages only names count.
    """

    def __init__(self) -> None:
        self.name = ""
        self._package = ""
        self._open: set[int] = set()  # objects that are being read: they may hold themselves
        self._known: set[int] = set()  # functions and classes that have been read: once is enough

    def _foreign(self, value: Any) -> bool:
        package = _package(value)
        if package in _FOREIGN or (self._package and package == self._package):
            return package in _FOREIGN
        file = getattr(sys.modules.get(package), "__file__", None) or ""
        return bool(self._package) and file.startswith(_INSTALLED)

    def _own(self, value: Any) -> None:
        self.name, self._package = self.name or value.__qualname__, self._package or _package(value)

    def read(self, value: Any) -> Any:
        if isinstance(value, int) and abs(value) > sys.float_info.max:  # the journal's readers take none
            return f"int {_digest(hex(value).encode())}"
        if value is None or isinstance(value, (bool, int, str)):
            return value
        if isinstance(value, (float, np.generic)):
            return repr(getattr(value, "item", lambda: value)())
        if id(value) in self._open:
            return getattr(value, "__qualname__", type(value).__qualname__)
        if hasattr(value, "__len__") and not inspect.isclass(value) and _long(value):
            text = repr(value)
            return type(value).__qualname__ + ("" if " at 0x" in text else f" {_digest(text.encode())}")
        self._open.add(id(value))
        try:
            return self._read(value)
        finally:
            self._open.discard(id(value))

    def _read(self, value: Any) -> Any:
        if isinstance(value, Mapping):
            return {str(key): self.read(item) for key, item in value.items()}
        if isinstance(value, bytes):
            return f"bytes {_digest(value)}"
        if _by_repr(value):
            return repr(value)
        if isinstance(value, _NAMESPACES) or (is_dataclass(value) and not isinstance(value, type)):
            inside = (
                vars(value)
                if isinstance(value, _NAMESPACES)
                else {f.name: getattr(value, f.name) for f in fields(value)}
            )
            return {"": type(value).__qualname__, **{str(name): self.read(item) for name, item in inside.items()}}
        if isinstance(value, Sequence):
            return [self.read(item) for item in value]
        if isinstance(value, (set, frozenset)):
            return sorted(json.dumps(self.read(item), sort_keys=True) for item in value)
        if hasattr(value, "detach") and hasattr(value, "numpy"):  # a tensor
            value = value.detach().cpu().double().numpy()
        if isinstance(value, np.ndarray) and value.dtype == object:
            return self.read(value.tolist())
        if isinstance(value, np.ndarray):
            return f"array {value.shape} of {value.dtype} {_digest(np.ascontiguousarray(value).tobytes())}"
        if isinstance(value, functools.partial):
            return [self.read(value.func), self.read(value.args), self.read(value.keywords)]
        if not isinstance(value, type) and not inspect.isfunction(value):
            return type(value).__qualname__
        if id(value) in self._known:
            return value.__qualname__
        self._known.add(id(value))
        return self._read_class(value) if isinstance(value, type) else self._read_function(value)

    def _read_class(self, value: type) -> Any:
        """Name, methods, plain attributes and bases; of a wrapper of Ray's or our own what it wraps."""
        foreign, local = self._foreign(value), "<locals>" in value.__qualname__
        if not foreign:
            self._own(value)
        bases = [self.read(base) for base in value.__bases__] if local or not foreign else []
        members = {name: item for name, item in vars(value).items() if not name.startswith("__") or name == "__init__"}
        kept = (
            {name: item for name, item in members.items() if inspect.isfunction(item) and item.__closure__}
            if foreign
            else {name: item for name, item in members.items() if inspect.isfunction(item) or _simple(item)}
        )
        if foreign and local and not kept:
            return bases[0]  # it only asks for resources
        return [value.__qualname__, bases, {name: self.read(kept[name]) for name in sorted(kept)}]

    def _read_function(self, value: Any) -> Any:
        """Name, code, and what it takes from around it: defaults, the cells of its closure, and the globals it names."""
        code = value.__code__
        cells = [self.read(cell.cell_contents) for cell in value.__closure__ or () if _filled(cell)]
        if self._foreign(value):
            return [value.__qualname__, cells]
        self._own(value)
        around = {name: value.__globals__[name] for name in sorted(_names(code) & value.__globals__.keys())}
        kept = {
            name: self.read(item)
            for name, item in around.items()
            if _simple(item) or (not self._foreign(item) and (inspect.isfunction(item) or inspect.isclass(item)))
        }
        return [
            value.__qualname__,
            _digest(repr(self._code(code)).encode()),
            self.read(value.__defaults__),
            cells,
            kept,
        ]

    def _code(self, code: CodeType) -> Any:
        consts = [self._code(item) if isinstance(item, CodeType) else self.read(item) for item in code.co_consts]
        return code.co_code.hex(), code.co_names, consts


def _by_repr(value: Any) -> bool:
    """Whether it is a plain value that is what it looks like."""
    kind = type(value)
    return isinstance(value, _AS_THEY_LOOK) or f"{kind.__module__}.{kind.__qualname__}" in _TORCHS


def _simple(value: Any, depth: int = 3) -> bool:
    """Whether it is a plain constant, or a collection of such: no state of a program."""
    if value is None or isinstance(value, (bool, int, float, str, bytes)) or _by_repr(value):
        return True
    if isinstance(value, _NAMESPACES) or (is_dataclass(value) and not isinstance(value, type)):
        return True
    if not depth or not isinstance(value, (tuple, list, dict)) or len(value) > _MOST:
        return False
    return all(_simple(item, depth - 1) for item in (value.values() if isinstance(value, dict) else value))


def _long(value: Any) -> bool:
    try:
        return len(value) > _MOST and not isinstance(value, np.ndarray) and not hasattr(value, "detach")
    except (TypeError, RuntimeError):
        return False


def _filled(cell: Any) -> bool:
    try:
        return cell.cell_contents is not cell
    except ValueError:
        return False


def _names(code: CodeType) -> set[str]:
    """Of the globals that `code`, and the functions defined in it, take."""
    found = {step.argval for step in dis.get_instructions(code) if step.opname == "LOAD_GLOBAL"}
    return found.union(*(_names(item) for item in code.co_consts if isinstance(item, CodeType)))
