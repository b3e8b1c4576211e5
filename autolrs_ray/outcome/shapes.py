"""What a line of a journal must look like to be read: one with a checksum that fits may still be of another making."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from autolrs_ray.core.checks import require_int, require_one_of, short, validate_interval
from autolrs_ray.core.events import Event
from autolrs_ray.core.growth import require_growth
from autolrs_ray.record.journal import FORMAT

Row = dict[str, Any]
Check = Callable[[Any], bool]

_NAMES = frozenset(Event)
YEAR_10000 = 253402300800.0  # seconds since 1970: where Python's calendar ends


def _whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and abs(value) < 2**63


def _step(value: Any) -> bool:
    return _whole(value) and value >= 0


def _number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _positive(value: Any) -> bool:
    return _number(value) and value > 0


def _rate(value: Any) -> bool:
    return _number(value) and value >= 0


def _time(value: Any) -> bool:
    return _number(value) and 0 <= value < YEAR_10000


def _bool(value: Any) -> bool:
    return isinstance(value, bool)


def _text(value: Any) -> bool:
    return isinstance(value, str)


def _maybe(check: Check) -> Check:
    return lambda value: value is None or check(value)


def _list_of(check: Check) -> Check:
    return lambda value: isinstance(value, list) and all(map(check, value))


def _environment(value: Any) -> bool:
    return (
        isinstance(value, dict)
        and isinstance(value.get("packages", {}), dict)
        and _list_of(_text)(value.get("gpu_types", []))
    )


_NEEDED: dict[Event, dict[str, Check]] = {
    Event.RESUME: dict(step=_step),
    Event.EXTEND: dict(step=_step, total_steps=_positive),
    Event.PROPOSAL: dict(arm=_text, lr=_positive),
    Event.SEGMENT: dict(arm=_text, role=_text, stage=_whole, lr=_rate, start=_step, end=_step, began=_time, busy_s=_number),
    Event.WORKERS: dict(time=_time, arm=_text, step=_step, workers=_positive, slots=_positive),
    Event.COMMIT: dict(end=_step, lr=_rate),
    Event.CHOICE: dict(stage=_whole, lr=_rate),
    Event.WARNING: dict(message=_text),
    Event.ADVICE: dict(message=_text),
    Event.ERROR: dict(message=_text),
    Event.STAGE: dict(stage=_whole, start=_step),
    Event.PROBE: dict(stage=_whole, probe=_step, arm=_text, lr=_positive, status=_text, series=_text,
                      forecast=_maybe(_number), steps=_list_of(_step)),
    Event.ROLLBACK: dict(stage=_whole, step=_step, lr=_rate, new_lr=_rate),
    Event.RUNG: dict(arm=_text, step=_step, score=_maybe(_number)),
    Event.DECISION: dict(step=_step, kept=_list_of(_number)),
    Event.TRUNK: dict(arm=_text, status=_text),
}  # fmt: skip
_OF_PAPER: dict[Event, dict[str, Check]] = {
    Event.PROPOSAL: dict(stage=_whole),
    Event.COMMIT: dict(stage=_whole, start=_step, loss=_maybe(_number), forecast=_maybe(_number), warmup=_bool),
}
_OF_RACE: dict[Event, dict[str, Check]] = {Event.COMMIT: dict(arm=_text), Event.DONE: dict(arm=_text)}
_WHERE_GIVEN: dict[str, Check] = dict(
    time=_time, averaged_loss=_maybe(_number), warmup_steps=_step, losses=_list_of(_maybe(_number)),
    loss=_maybe(_number), checkpoint=_maybe(_text), environment=_environment, arm=_text, start=_step, workers=_positive,
)  # fmt: skip


def what_is_wrong(event: Row, policy: str) -> str:
    """Why `event` cannot be one of a run under `policy`; "" if it can. Events of names that are not known are let be."""
    name = event.get("event")
    if name not in _NAMES:
        return "" if isinstance(name, str) else f"an event without a name: {short(event)}"
    needed = {**_NEEDED.get(Event(name), {}), **(_OF_PAPER if policy == "paper" else _OF_RACE).get(Event(name), {})}
    for key, check in needed.items():
        if key not in event or not check(event[key]):
            return f"{name} with {key}={short(event.get(key))}"
    for key, check in _WHERE_GIVEN.items():
        if key in event and not check(event[key]):
            return f"{name} with {key}={short(event[key])}"
    if name in (Event.COMMIT, Event.SEGMENT) and event.get("start", -1) >= event["end"]:
        return f"{name} from step {event['start']} to {event['end']}"
    return ""


def refuse_foreign(events: list[Row], where: str) -> None:
    """Raise ValueError where a journal of these `events` is of a later format, or holds what this version does not know."""
    written = next(event for event in events if event.get("event") == Event.START).get(
        "format", 0
    )  # older ones do not say
    if not _step(written) or written > FORMAT:
        raise ValueError(
            f"{where} is of format {short(written)}, this version reads up to {FORMAT}: use the version that wrote it"
        )
    if any("parent" in event for event in events if event.get("event") == Event.PROPOSAL):
        raise ValueError(f"{where} is of a race with branches, which are no more: use the version that wrote it")


def complete_config(config: Any, where: str) -> Row:
    """`config`, a run's, with what older versions left out. Raises ValueError, naming the value, for what is none."""
    try:
        if not isinstance(config, dict) or not isinstance(config.get("options", {}), dict):
            raise TypeError(f"not a configuration: {short(config)}")
        whole: Row = {"metric": "val_loss", "mode": "min", "time_attr": "step", "options": {}, **config}
        require_one_of("policy", whole.get("policy"), ("paper", "anchored"))
        require_one_of("mode", whole["mode"], ("min", "max"))
        require_int("total_steps", whole.get("total_steps"), 1)
        if whole.get("lr_interval") is not None:
            whole["lr_interval"] = list(validate_interval(whole["lr_interval"]))
        for name, kind in (("metric", str), ("time_attr", str), ("averaged_metric", str)):
            if not isinstance(whole.get(name, "x"), kind) or not whole.get(name, "x"):
                raise TypeError(f"{name} must be the name of a result key, got {short(config[name])}")
        if not isinstance(whole["options"].get("envelope"), str | None):
            raise TypeError(f"envelope must be a name, got {short(config['options']['envelope'])}")
        if not _list_of(_positive)(whole["options"].get("points_to_evaluate") or []):
            raise TypeError(
                f"points_to_evaluate must hold learning rates, got {short(whole['options']['points_to_evaluate'])}"
            )
        require_growth(whole["options"].get("batch_growth"))
        if whole["policy"] == "paper":
            require_int("num_lrs", whole["options"].get("num_lrs", 1), 1)
            require_int("warmup_steps", whole["options"].get("warmup_steps", 0), 0)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{where} cannot be read: {error}") from None
    return whole
