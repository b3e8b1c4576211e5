"""Batches: tensors, or dicts, lists, tuples and objects of them."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, MutableMapping
from dataclasses import fields, is_dataclass
from typing import Any

import torch
from torch import Tensor

Batch = tuple[Any, Any]
"""(inputs, targets): tensors, or dicts, lists and tuples of them."""


def channels_last(tensor: Tensor) -> Tensor:
    return tensor.contiguous(memory_format=torch.channels_last) if tensor.dim() == 4 else tensor


def _on_parts(function: Callable[[Any], Any], value: Any) -> Any:
    """`value`, of its own type, with every part of a dict, list, tuple or dataclass replaced by `function` of it."""
    if type(value) is dict:
        return {key: function(part) for key, part in value.items()}
    if isinstance(value, MutableMapping):  # a model's output, or a tokenizer's: it has attributes, too
        found = copy.copy(value)
        for key, part in value.items():
            found[key] = function(part)
        return found
    if isinstance(value, Mapping):
        return {key: function(part) for key, part in value.items()}
    if isinstance(value, (list, tuple)):
        parts = [function(part) for part in value]
        return type(value)(*parts) if hasattr(value, "_fields") else type(value)(parts)
    if is_dataclass(value) and not isinstance(value, type):
        same = copy.copy(value)
        for each in fields(value):
            object.__setattr__(same, each.name, function(getattr(value, each.name)))
        return same
    return value


def on_tensors(function: Callable[[Tensor], Tensor], value: Any) -> Any:
    """`value` with every tensor in its dicts, lists, tuples and dataclasses replaced by `function` of it."""
    if isinstance(value, Tensor):
        return function(value)
    return _on_parts(lambda part: on_tensors(function, part), value)


def on_device(value: Any, device: torch.device) -> Any:
    """`value` with its tensors, and whatever has a method `to`, on `device`."""
    if isinstance(value, Tensor):
        return value.to(device, non_blocking=True)
    if callable(getattr(type(value), "to", None)):
        return value.to(device)
    return _on_parts(lambda part: on_device(part, device), value)


def share_of_rows(value: Any, rows: int, share: slice) -> Any:
    """Of a batch of `rows` rows those in `share`: of tensors that have so many, and of lists that hold one thing for each row.

    A list of tensors with `rows` rows each is one of several inputs, whatever its length.
    """
    if isinstance(value, Tensor):
        return value[share] if value.dim() and len(value) == rows else value
    one_each = isinstance(value, (list, tuple)) and len(value) == rows and not hasattr(value, "_fields")
    if one_each and not all(isinstance(part, Tensor) and part.dim() and len(part) == rows for part in value):
        return value[share]
    return _on_parts(lambda part: share_of_rows(part, rows, share), value)
