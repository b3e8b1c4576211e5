"""State that no state_dict holds: in attributes of modules, optimizers and losses, and in what their functions close over."""

from __future__ import annotations

from collections import OrderedDict, defaultdict, deque
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from itertools import chain
from types import CellType
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from autolrs_ray.record.checkpoints import mapped
from autolrs_ray.training.walk import CONTAINERS, MOST, PLAIN, Found, keys_of, walk

KIND, VALUE = "autolrs_kind", "value"  # of what weights_only=True does not read back, packed into a dict


IN_PLACE = (
    list,
    dict,
    set,
    deque,
    np.ndarray,
    Tensor,
)  # what is written into where it lies in nothing that can be assigned


class _UnpackableError(TypeError):
    """A value that is no state, or none that a checkpoint can hold."""


class Attributes:
    """Numbers, strings, tensors, arrays and containers of them that are reached from `roots`, and objects with a state_dict of
    their own (schedulers, optimizers inside of optimizers).

    roots: by name, what is called in a step. given: modules and other objects whose state is saved elsewhere. data: tensors
    that are data, and no state. Containers of more than 10,000 items at the start are taken for data, too.

    Only what is no longer as it was at the start is saved. Tensors that belong to a graph, and objects that cannot be read,
    are left alone.
    """

    def __init__(
        self, roots: Mapping[str, Any], given: tuple[Any, ...], data: tuple[Tensor, ...], device: torch.device
    ) -> None:
        self._roots, self._data, self.device = dict(roots), data, device
        self._modules = [module for module in given if isinstance(module, nn.Module)]
        self._given = {id(each) for each in given} | {id(m) for top in self._modules for m in top.modules()}
        self._hidden: dict[str, Any] = {}
        self._long: set[str] = set()
        places = self._places()
        self._long = {found.name for found in places if isinstance(found.value, CONTAINERS) and len(found.value) > MOST}
        self._initial = _copied(self._read(places))
        self._hidden = {found.name: _probe(found.value) for found in places if self._is_hidden(found.value)}

    def state_dict(self) -> dict[str, Any]:
        """By name, what has changed since the start, copied. Raises ValueError for a module that changes and is not saved."""
        places = self._places()
        for found in places:
            if self._is_hidden(found.value) and self._hidden.setdefault(found.name, _probe(found.value)) != _probe(
                found.value
            ):
                raise ValueError(
                    f"{found.name} is a module that changes while the task trains, and belongs neither to the model nor to a "
                    'loss that is an nn.Module, so no checkpoint would hold it: pass it as modules={"name": module}'
                )
        now = self._read(places)
        changed = {k: v for k, v in now.items() if k not in self._initial or not _same(v, self._initial[k])}
        return {name: _copied(value) for name, value in changed.items()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Everything as in `state`, and what that does not name as at the start."""
        wanted, places = {**self._initial, **state}, self._places()
        now = self._read(places)
        for found in places:
            if found.name in wanted:
                if found.name not in now or not _same(now[found.name], wanted[found.name]):
                    _put(found, wanted[found.name], self.device)
            elif found.name in now:
                _remove(found)
        owners = {found.path: found.value for found in places}
        for name in state.keys() - {found.name for found in places}:
            path = tuple(name.split("."))
            if path[:-1] in owners:
                _assign(owners[path[:-1]], path[-1], unpacked(state[name], self.device))

    @contextmanager
    def put_back(self) -> Iterator[None]:
        """Everything as it was, afterwards."""
        before = self.state_dict()
        try:
            yield
        finally:
            self.load_state_dict(before)

    def _places(self) -> list[Found]:
        self._taken = set()  # addresses of what is saved elsewhere, or is data
        for module in self._modules:
            self._taken |= {
                t.untyped_storage().data_ptr() for t in chain(module.parameters(), module.buffers()) if _in_memory(t)
            }
        self._taken |= {tensor.untyped_storage().data_ptr() for tensor in self._data}
        self._taken.discard(0)
        return list(walk(self._roots, self._is_whole))

    def _is_whole(self, value: Any) -> bool:
        if isinstance(value, CONTAINERS):
            try:
                self._packed(value)
            except _UnpackableError:
                return False
            return True
        return self._has_state(value)

    def _has_state(self, value: Any) -> bool:
        """True for an object that saves its state by itself, and that nobody else saves. The optimizers of torch are."""
        if id(value) in self._given or isinstance(value, (nn.Module, type)):
            return False
        return all(callable(getattr(type(value), name, None)) for name in ("state_dict", "load_state_dict"))

    def _is_hidden(self, value: Any) -> bool:
        return isinstance(value, nn.Module) and id(value) not in self._given

    def _read(self, places: list[Found]) -> dict[str, Any]:
        found = {}
        for place in places:
            if place.name in self._long or (place.holder is None and not isinstance(place.value, IN_PLACE)):
                continue
            try:
                found[place.name] = self._packed(place.value)
            except _UnpackableError:
                continue
        return found

    def _packed(self, value: Any) -> Any:
        if type(value) in PLAIN:
            return value
        if isinstance(value, Tensor):
            known = _in_memory(value) and value.untyped_storage().data_ptr() in self._taken
            if known or value.grad_fn is not None or isinstance(value, nn.Parameter) or not _in_memory(value):
                raise _UnpackableError
            return value.detach() if value.device.type == "cpu" else {KIND: "on the device", VALUE: value.detach()}
        if isinstance(value, np.ndarray):
            if value.dtype.kind not in "biufc" or value.__array_interface__["data"][0] in self._taken:
                raise _UnpackableError
            return {KIND: "ndarray", VALUE: torch.from_numpy(np.require(value, value.dtype.newbyteorder("="), "W"))}
        if isinstance(value, np.generic):
            if value.dtype.kind not in "biufc":
                raise _UnpackableError
            return {KIND: "number", VALUE: torch.from_numpy(np.array([value]))}
        if type(value) in (list, tuple):
            return type(value)(self._packed(part) for part in value)
        if type(value) in (set, frozenset, deque):
            most = value.maxlen if isinstance(value, deque) else None
            return {KIND: type(value).__name__, VALUE: [self._packed(part) for part in value], "most": most}
        if type(value) in (dict, OrderedDict, defaultdict):
            if not all(type(key) in PLAIN or type(key) is tuple for key in value):
                raise _UnpackableError
            items = [(self._packed(key), self._packed(part)) for key, part in value.items()]
            return {KIND: type(value).__name__, VALUE: items}
        if self._has_state(value):
            return {KIND: "object", VALUE: self._packed(value.state_dict())}
        raise _UnpackableError


def _in_memory(tensor: Tensor) -> bool:
    return tensor.layout is torch.strided and tensor.device.type != "meta"


def _probe(module: nn.Module) -> tuple[Any, ...]:
    """What tells that weights of `module` have changed, without a copy: where they lie, how often they were written to, and
    the first of each."""
    return tuple(
        (p.data_ptr(), p._version, p.detach()[(0,) * p.dim()].item() if p.numel() else 0)
        for p in chain(module.parameters(), module.buffers())
        if _in_memory(p)
    )


def _copied(packed: Any) -> Any:
    return mapped(packed, lambda leaf: leaf.clone() if isinstance(leaf, Tensor) else leaf)


def unpacked(value: Any, device: torch.device) -> Any:
    """What was packed as `value`, in memory of its own."""
    if isinstance(value, Tensor):
        return value.to("cpu", copy=True)
    if isinstance(value, (list, tuple)):
        return type(value)(unpacked(part, device) for part in value)
    if not isinstance(value, Mapping):
        return value
    kind, content = value[KIND], value[VALUE]
    if kind == "on the device":
        return content.to(device, copy=True)
    if kind in ("ndarray", "number"):
        array = content.cpu().numpy().copy()
        return array if kind == "ndarray" else array[0]
    if kind == "object":
        return unpacked(content, device)
    parts = [unpacked(part, device) for part in content]
    if kind == "deque":
        return deque(parts, value["most"])
    kinds: dict[str, Any] = {"set": set, "frozenset": frozenset, "OrderedDict": OrderedDict}
    return kinds.get(kind, dict)(parts)


def _put(found: Found, packed: Any, device: torch.device) -> None:
    """Write what was packed into its place: into the object that is there where it can be, as others may hold it too."""
    new, now = unpacked(packed, device), found.value
    if isinstance(packed, Mapping) and packed[KIND] == "object":
        now.load_state_dict(new)
    elif isinstance(new, Tensor) and isinstance(now, Tensor) and _alike(new, now):
        with torch.no_grad():
            now.copy_(new)
    elif isinstance(new, np.ndarray) and isinstance(now, np.ndarray) and _alike(new, now) and now.flags.writeable:
        now[...] = new
    elif isinstance(new, list) and isinstance(now, list):
        now[:] = new
    elif isinstance(new, (dict, set)) and isinstance(now, type(new)):
        now.clear()
        now.update(new)
    elif isinstance(new, deque) and isinstance(now, deque) and new.maxlen == now.maxlen:
        now.clear()
        now.extend(new)
    else:
        _assign(found.holder, found.path[-1], new)


def _alike(new: Any, now: Any) -> bool:
    if (new.shape, new.dtype) != (now.shape, now.dtype):
        return False
    return isinstance(now, np.ndarray) or bool(
        new.device == now.device and now.grad_fn is None and not now.requires_grad and 0 not in now.stride()
    )


def _assign(holder: Any, name: str, value: Any) -> None:
    if isinstance(holder, CellType):
        holder.cell_contents = value
    elif isinstance(holder, dict):
        holder[keys_of(holder).get(name, name)] = value
    elif isinstance(holder, list):
        holder[int(name)] = value
    elif hasattr(holder, "__dict__"):
        vars(holder)[name] = value


def _remove(found: Found) -> None:
    holder, name = found.holder, found.path[-1]
    if isinstance(holder, dict):
        holder.pop(keys_of(holder).get(name, name), None)
    elif not isinstance(holder, (CellType, *CONTAINERS)) and hasattr(holder, "__dict__"):
        vars(holder).pop(name, None)


def _same(one: Any, two: Any) -> bool:
    if type(one) is not type(two):
        return False
    if isinstance(one, Tensor):
        return (one.shape, one.dtype) == (two.shape, two.dtype) and torch.equal(one, two.to(one.device))
    if isinstance(one, Mapping):
        return one.keys() == two.keys() and all(_same(one[key], two[key]) for key in one)
    if isinstance(one, (list, tuple)):
        return len(one) == len(two) and all(map(_same, one, two))
    return bool(one == two)


def nested_optimizers(optimizers: tuple[Optimizer, ...]) -> list[tuple[Optimizer, Optimizer]]:
    """Pairs of an optimizer and one that it holds."""
    return [
        (optimizer, found.value)
        for optimizer in optimizers
        for found in walk({"optimizer": optimizer})
        if isinstance(found.value, Optimizer) and found.value not in optimizers
    ]
