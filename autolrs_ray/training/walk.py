"""What can be reached from an object: attributes, containers, what functions close over; generators and open files in it."""

from __future__ import annotations

import io
import random
import sys
import sysconfig
from collections import OrderedDict, defaultdict, deque
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from types import FunctionType, MethodType, ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

Path = tuple[str, ...]
CONTAINERS = (list, tuple, dict, set, frozenset, deque, OrderedDict, defaultdict)
GENERATORS = (torch.Generator, np.random.Generator, np.random.RandomState, random.Random)
MOST = 10_000  # items of a container that are looked at one by one: more are data
OBJECTS = 100_000  # that are looked at in all
PLAIN = (bool, int, float, complex, str, bytes, type(None), torch.dtype, torch.device, torch.Size)
_OF_MODULES = set(vars(nn.Module()))
_OF_OPTIMIZERS = {"defaults", "state", "param_groups"}
_INSTALLED = tuple(sysconfig.get_path(kind) for kind in ("purelib", "platlib", "stdlib", "platstdlib"))


@dataclass
class Found:
    """`value`, found at `path` in `holder`: an object with attributes, a container, or the cell of a closure."""

    path: Path
    value: Any
    holder: Any

    @property
    def name(self) -> str:
        return ".".join(self.path)


def walk(
    roots: Mapping[str, Any], stop: Callable[[Any], bool] = lambda value: False, into_libraries: bool = False
) -> Iterator[Found]:
    """Everything that can be reached from `roots`, once each, containers before what is in them; nothing is executed.

    stop: what is not gone into. Nor are objects of installed packages, but for modules and optimizers, unless
    `into_libraries`. Attributes of torch's own modules and optimizers are theirs to save, and are left out.
    """
    seen: set[int] = set()
    stack = [Found((name,), value, None) for name, value in reversed(list(roots.items()))]
    while stack and len(seen) < OBJECTS:
        found = stack.pop()
        if not isinstance(found.value, PLAIN):
            if id(found.value) in seen:
                continue
            seen.add(id(found.value))
        yield found
        if not stop(found.value):
            stack.extend(reversed(list(_inside(found, into_libraries))))


def _inside(found: Found, into_libraries: bool) -> Iterator[Found]:
    path, value = found.path, found.value
    if isinstance(value, (*PLAIN, *GENERATORS, Tensor, np.ndarray, np.generic, type, ModuleType)):
        return
    if isinstance(value, CONTAINERS):
        if len(value) <= MOST:
            parts = keys_of(value).items() if isinstance(value, dict) else enumerate(value)
            yield from (
                Found((*path, str(key)), value[part] if isinstance(value, dict) else part, value) for key, part in parts
            )
    elif isinstance(value, nn.Module):
        if not of(value, "torch") or into_libraries:
            yield from _attributes(path, value, _OF_MODULES)
        yield from (Found((*path, name), module, value) for name, module in value._modules.items())
        yield from _hooks(path, value)
    elif isinstance(value, Optimizer):
        if not of(value, "torch"):
            yield from _attributes(path, value, _OF_OPTIMIZERS)
        yield from _hooks(path, value)
    elif isinstance(value, MethodType):
        yield Found((*path, "self"), value.__self__, None)
        yield Found((*path, value.__name__), value.__func__, None)
    elif isinstance(value, partial):
        yield Found((*path, "func"), value.func, None)
        yield from (Found((*path, str(i)), part, None) for i, part in enumerate(value.args))
        yield from (Found((*path, name), part, value.keywords) for name, part in value.keywords.items())
    elif isinstance(value, FunctionType):
        if not installed(value):
            cells = zip(value.__code__.co_freevars, value.__closure__ or (), strict=True)
            yield from (Found((*path, name), cell.cell_contents, cell) for name, cell in cells if _filled(cell))
            yield from _attributes(path, value, set())
            defaults = (*(value.__defaults__ or ()), *(value.__kwdefaults__ or {}).values())
            yield from (Found((*path, "defaults", str(i)), part, None) for i, part in enumerate(defaults))
    elif hasattr(value, "__dict__") and (into_libraries or not installed(value)):
        yield from _attributes(path, value, set())


def keys_of(value: dict[Any, Any]) -> dict[str, Any]:
    """The keys of `value` by name: as they are written where they are plain, of others (tensors, objects) their place."""
    return {str(key) if isinstance(key, (*PLAIN, tuple)) else f"#{i}": key for i, key in enumerate(value)}


def _attributes(path: Path, owner: Any, without: set[str]) -> Iterator[Found]:
    for name, value in list(vars(owner).items()):
        if name not in without:
            yield Found((*path, name), value, owner)


def _hooks(path: Path, owner: Any) -> Iterator[Found]:
    """Of a module or an optimizer; their keys are counted in each process, their order is the same in all."""
    for name, hooks in list(vars(owner).items()):
        if name.endswith("_hooks") and isinstance(hooks, dict):
            yield from (Found((*path, name, str(i)), hook, None) for i, hook in enumerate(hooks.values()))


def _filled(cell: Any) -> bool:
    try:
        return cell.cell_contents is not cell
    except ValueError:  # not assigned yet
        return False


def of(value: Any, package: str) -> bool:
    """True where the class of `value` is of `package`."""
    return type(value).__module__.partition(".")[0] == package


def installed(value: Any) -> bool:
    """True for functions and objects of installed packages and of Python's own library."""
    module = str(getattr(value if isinstance(value, FunctionType) else type(value), "__module__", None) or "")
    package = module.partition(".")[0]
    if package == "__main__":
        return False
    file = getattr(sys.modules.get(package), "__file__", None) or ""
    return package in sys.stdlib_module_names or package == "autolrs_ray" or file.startswith(_INSTALLED)


def generators_in(roots: Mapping[str, Any]) -> list[Any]:
    """The generators of random numbers that are reached from `roots`, also from objects of libraries."""
    return [found.value for found in walk(roots, into_libraries=True) if isinstance(found.value, GENERATORS)]


def open_files_in(roots: Mapping[str, Any]) -> list[str]:
    """Where open files lie in `roots`."""
    return [found.name for found in walk(roots, into_libraries=True) if _is_file(found.value)]


def _is_file(value: Any) -> bool:
    if isinstance(value, io.IOBase):
        return not isinstance(value, (io.BytesIO, io.StringIO)) and not value.closed
    return of(value, "h5py") and type(value).__name__ in ("File", "Group", "Dataset")
