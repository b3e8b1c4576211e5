"""Trainables from the training loops of other libraries: `integrations.lightning`, `integrations.huggingface`, and
`integrations.follower` for any loop. Each module imports its own library; none is imported by the package itself."""

from __future__ import annotations

from autolrs_ray import __version__


def missing(error: ModuleNotFoundError, extra: str) -> ImportError:
    """The error to raise in place of `error`: it names the command that installs `extra`. The package is on no index."""
    install = (
        f"pip install '.[{extra}]' in a clone, or 'autolrs_ray-{__version__}-py3-none-any.whl[{extra}]' from a wheel"
    )
    return ImportError(f"autolrs_ray.integrations.{extra} needs {error.name}, which is not installed: {install}",
                       name=error.name)  # fmt: skip
