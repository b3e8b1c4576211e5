"""Whether the run in a folder is the one that is to go on: refused by name where it is not."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from autolrs_ray.core.events import Event
from autolrs_ray.core.policy import AutoLRSError, Policy
from autolrs_ray.driver.identity import changes
from autolrs_ray.record.journal import read_journal
from autolrs_ray.record.record import Record


def refuse_other_settings(record: Record, different: dict[str, tuple[Any, Any]], extend: bool) -> bool:
    """Raise ValueError, naming them, where settings that decide the run's course are `different` (name -> then, now) from those
    of `record`. True if `total_steps` is, and the run is to be extended."""
    if extend and [*different] == ["total_steps"]:
        return True
    if different:
        told = ", ".join(f"{key}: {then!r} -> {now!r}" for key, (then, now) in different.items())
        raise ValueError(f"cannot resume the run in {record} with other settings ({told})")
    return False


def refuse_other_subject(
    record: Record, ours: dict[str, Any], theirs: dict[str, Any] | None, begun: bool, done: bool, insist: bool
) -> list[str]:
    """Raise ValueError, naming what is different, where `record` is a run of something else than is to be trained now; what is
    to be warned of instead. begun: something has been trained. insist: go on with it all the same.

    What has trained nothing may be mended. Code may be mended while the run goes on; a finished one is what it was.
    """
    if not ours or not theirs or not begun:
        return []
    found, code = changes(ours, theirs)
    around = f"the code of {ours['trainable']}, or a value it takes from around it"
    if code and not found and done:
        found = [around]
    if found and not insist:
        raise ValueError(
            f"the run in {record} {'is finished' if done else 'goes on'} with something else ({'; '.join(found)}). Choose "
            "another name for this one, or pass resume=True to take that run in spite of it"
        )
    warnings = [f"resumed with something else: {'; '.join(found)}"] if found else []
    return [*warnings, f"{around}, has changed since the run began"] if code and not done else warnings


def refuse_end(record: Record, policy: Policy) -> None:
    """Raise AutoLRSError, with the error that it ended with, where `policy`, just read, is not done and has nothing to do."""
    if policy.done or policy.wanted():
        return
    errors = [event["message"] for event in read_journal(record.journal) if event["event"] == Event.ERROR]
    raise AutoLRSError(
        f"the run in {record} has nothing left to train: {errors[-1] if errors else policy.progress()} Start anew under "
        "another name"
    )


@contextmanager
def whole(record: Record) -> Iterator[None]:
    """The state of `record` is read within. Raises ValueError where it is not one that any version has written."""
    try:
        yield
    except (AttributeError, LookupError, TypeError, ArithmeticError, RecursionError, AssertionError) as error:
        raise ValueError(
            f"cannot resume from {record}: its state makes no sense ({type(error).__name__}: {error}). Move the folder away to "
            "start anew"
        ) from error


def told(record: Record, policy: Policy, failed: list[float]) -> str:
    """What the run goes on from, in a line. failed: LRs that were out when it was found; `policy` may try some again."""
    progress = policy.progress()
    if policy.done:
        return f"{record} is finished, {progress['step']} steps"
    line = f"continuing {record} at step {progress['step']} of {progress['total_steps']}"
    if not failed:
        return line
    still = policy.failures()
    again = [lr for lr in failed if lr not in still]
    line += f"; {len(failed)} learning rate{'s' * (len(failed) > 1)} had failed: {_listed(failed)}"
    if not again:
        return line
    return f"{line}; {'all' if not still else _listed(again)} will be tried again"


def _listed(lrs: list[float]) -> str:
    return ", ".join(f"{lr:.3g}" for lr in lrs)
