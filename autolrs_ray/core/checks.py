"""Checks of arguments: each returns the value it was given, or raises with the name and the value."""

from __future__ import annotations

import math
import sys
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import MISSING, fields, is_dataclass
from types import NoneType, UnionType
from typing import Any, get_args, get_origin, get_type_hints

MOST = 2**53
"""Whole numbers that a float holds."""

SAME_LR = 1e-9
"""Relative difference up to which two learning rates are one, written with other digits."""

INTERVALS = {"fine-tuning": (1e-6, 1.0)}
"""Search intervals by name. Pre-trained weights want smaller learning rates than new ones: as many decades as usual in a race,
a decade lower."""


def _is_int(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def require_int(name: str, value: Any, minimum: int, most: int = MOST) -> int:
    """Return `value` if it is an int in [`minimum`, `most`]; raise TypeError or ValueError that names it otherwise."""
    if not _is_int(value):
        raise TypeError(f"{name} must be an int, got {value!r} ({type(value).__name__})")
    if value < minimum:
        raise ValueError(f"{name} must be at least {minimum}, got {value}")
    if value > most:
        raise ValueError(f"{name} must be at most {most}, got one above it")
    return int(value)


def require_float(name: str, value: Any, low: float, high: float, low_open: bool = False) -> float:
    """Return `value` as float if it is a finite real number in [low, high] (or (low, high] if `low_open`); raise TypeError or
    ValueError that names it otherwise."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name} must be a number, got {value!r} ({type(value).__name__})")
    try:
        number = float(value)
    except OverflowError:  # of an int
        number = math.inf
    if not math.isfinite(number) or number > high or number < low or (low_open and number == low):
        bounds = f"{'(' if low_open or low == -math.inf else '['}{low}, {high}{')' if high == math.inf else ']'}"
        raise ValueError(f"{name} must be a finite number in {bounds}, got {value!r}")
    return number


def require_bool(name: str, value: Any) -> bool:
    """Return `value` if it is True or False; raise TypeError that names it otherwise."""
    if not isinstance(value, bool):
        raise TypeError(f"{name} must be True or False, got {value!r} ({type(value).__name__})")
    return value


def require_function(name: str, value: Any) -> Any:
    """Return `value` if it can be called; raise TypeError that names it otherwise, and for a class, which makes an object."""
    if not callable(value) or isinstance(value, type):
        raise TypeError(
            f"{name} must be a function, or an object that can be called, got {value!r} ({type(value).__name__})"
        )
    return value


def require_one_of(name: str, value: Any, allowed: Iterable[str]) -> str:
    """Return `value` if it is one of the names `allowed`; raise ValueError that names it, whatever it is, otherwise."""
    names = sorted(allowed)
    if not isinstance(value, str) or value not in names:
        raise ValueError(f"{name} must be one of {names}, got {value!r}")
    return value


def require_tuple(name: str, value: Any) -> tuple[Any, ...]:
    """Return `value` as a tuple if it is a list or tuple; raise TypeError that names it otherwise."""
    if not isinstance(value, (list, tuple)):
        raise TypeError(f"{name} must be a list or tuple, got {value!r} ({type(value).__name__})")
    return tuple(value)


def conforming(name: str, value: Any, kind: Any) -> Any:
    """`value`, out of JSON, as a `kind`: bool, int, float (finite), str, None, Any, a union of these, list[...], tuple[...], a
    dict of names and kinds, or a dataclass of such. Lists become tuples where the kind says so, dicts dataclasses.

    Raises ValueError that names what is missing, too large or of another kind.
    """
    if kind is Any:
        return value
    if isinstance(kind, dict):
        return _members(name, value, kind, set())
    if is_dataclass(kind) and isinstance(kind, type):
        optional = {item.name for item in fields(kind) if (item.default, item.default_factory) != (MISSING, MISSING)}
        hints = get_type_hints(kind)
        return kind(**_members(name, value, {item.name: hints[item.name] for item in fields(kind)}, optional))
    if isinstance(kind, UnionType):
        return _one_of(name, value, get_args(kind))
    origin, parts = get_origin(kind) or kind, get_args(kind)
    if origin in (list, tuple) and isinstance(value, (list, tuple)):
        many = origin is list or parts[-1] is Ellipsis
        if many or len(value) == len(parts):
            return origin(conforming(f"{name}[{i}]", item, parts[0 if many else i]) for i, item in enumerate(value))
    elif _is_plain(value, kind):
        return float(value) if kind is float else value
    raise ValueError(f"{name} cannot be {short(value)}")


def _members(name: str, value: Any, kinds: dict[str, Any], optional: set[str]) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise ValueError(f"{name} cannot be {short(value)}")
    if wrong := sorted({*kinds} - optional - {*value}) or sorted(map(str, {*value} - {*kinds})):
        raise ValueError(f"{name} {'lacks' if wrong[0] in kinds else 'has an unknown'} {wrong[0]}")
    return {key: conforming(f"{name}.{key}", item, kinds[key]) for key, item in value.items()}


def _one_of(name: str, value: Any, kinds: tuple[Any, ...]) -> Any:
    for kind in kinds:
        with suppress(ValueError):
            return conforming(name, value, kind)
    raise ValueError(f"{name} cannot be {short(value)}")


def _is_plain(value: Any, kind: Any) -> bool:
    if kind in (NoneType, None):
        return value is None
    if isinstance(value, bool) or kind is bool:
        return isinstance(value, bool) and kind is bool
    if kind is float:
        return isinstance(value, (int, float)) and abs(value) <= sys.float_info.max
    return isinstance(value, int) and abs(value) <= MOST if kind is int else kind is str and isinstance(value, str)


def short(value: Any) -> str:
    """`value` as an error names it, in 60 characters at most."""
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


def validate_interval(lr_interval: Any) -> tuple[float, float]:
    """Return (min_lr, max_lr), of a name in INTERVALS too; raise with the value unless 0 < min_lr < max_lr, both finite."""
    if isinstance(lr_interval, str):
        lr_interval = INTERVALS[require_one_of("lr_interval, if it is a name,", lr_interval, INTERVALS)]
    try:
        low, high = lr_interval
    except (TypeError, ValueError):
        raise TypeError(f"lr_interval must be a pair (min_lr, max_lr), got {lr_interval!r}") from None
    low = require_float("min_lr", low, 0.0, math.inf, low_open=True)
    high = require_float("max_lr", high, 0.0, math.inf, low_open=True)
    if not low < high:
        raise ValueError(f"min_lr must be below max_lr, got {low=}, {high=}; widen lr_interval")
    return low, high


def validate_points(points: Any, lr_interval: tuple[float, float]) -> list[float]:
    """`points_to_evaluate`: learning rates, or Tune's {"lr": ...}, each once and inside `lr_interval`, as a list; [] for None.

    Raises TypeError or ValueError, naming the value.
    """
    if points is None:
        return []
    given = [point["lr"] if isinstance(point, dict) and [*point] == ["lr"] else point
             for point in require_tuple("points_to_evaluate", points)]  # fmt: skip
    lrs = [require_float("each of points_to_evaluate", lr, 0.0, math.inf, low_open=True) for lr in given]
    low, high = lr_interval
    for i, lr in enumerate(lrs):
        if not low <= lr <= high:
            raise ValueError(f"points_to_evaluate: {lr:g} lies outside of lr_interval=({low:g}, {high:g}); widen that")
        if any(math.isclose(lr, other, rel_tol=SAME_LR) for other in lrs[:i]):
            raise ValueError(f"points_to_evaluate holds {lr:g} twice, got {points!r}")
    return lrs
