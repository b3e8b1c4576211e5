"""Trainables from the training loops of other libraries: `integrations.lightning`, `integrations.huggingface`, and
`integrations.follower` for any loop. Each module imports its own library; none is imported by the package itself."""

from __future__ import annotations

from collections.abc import Iterable

from autolrs_ray import __version__


def stopped(step: int, end: int, callbacks: Iterable[object], more: str) -> RuntimeError:
    """The error of a training that has stopped at `step`, before its trial's `end`: it names the user's `callbacks`, one of
    which may have done so. more: what else may have."""
    names = ", ".join(sorted({type(callback).__name__ for callback in callbacks}))
    who = f"one of its callbacks ({names}) stops it, or {more}" if names else f"{more[0].upper()}{more[1:]}"
    return RuntimeError(
        f"training stopped at step {step}, before the trial's end at {end}: {who}. AutoLRS decides where trials stop: leave "
        "out what stops them"
    )


def missing(error: ModuleNotFoundError, extra: str) -> ImportError:
    """The error to raise in place of `error`: it names the command that installs `extra`. The package is on no index."""
    install = (
        f"pip install '.[{extra}]' in a clone, or 'autolrs_ray-{__version__}-py3-none-any.whl[{extra}]' from a wheel"
    )
    return ImportError(f"autolrs_ray.integrations.{extra} needs {error.name}, which is not installed: {install}",
                       name=error.name)  # fmt: skip
