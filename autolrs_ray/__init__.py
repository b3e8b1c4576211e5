"""Automatic learning rates for people who train on Ray clusters."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from autolrs_ray.core.policies import make_policy
    from autolrs_ray.core.policy import AutoLRSError
    from autolrs_ray.driver.live import LiveProgress
    from autolrs_ray.driver.replay import ReplayScheduler
    from autolrs_ray.driver.runner import run
    from autolrs_ray.driver.scheduler import AutoLRSScheduler
    from autolrs_ray.driver.searcher import AutoLRSSearch
    from autolrs_ray.lr_range import LRRange, lr_range_test
    from autolrs_ray.outcome.points import OwnPoint
    from autolrs_ray.outcome.result import RunResult, Timing
    from autolrs_ray.outcome.schedule import LearnedLRScheduler, LearnedSchedule, Piece
    from autolrs_ray.record.journal import read_journal
    from autolrs_ray.show.page import save_report
    from autolrs_ray.show.plots import save_plots
    from autolrs_ray.show.tensorboard import save_tensorboard
    from autolrs_ray.training.averages import WeightAverages
    from autolrs_ray.training.local import run_local
    from autolrs_ray.training.task import TrainingTask, accuracy
    from autolrs_ray.training.trainer import Trainer
    from autolrs_ray.trial.trainable import AutoLRSTrainable, lr_at, trainable_for

_HOMES = {
    "AutoLRSError": "core.policy",
    "AutoLRSScheduler": "driver.scheduler",
    "AutoLRSSearch": "driver.searcher",
    "AutoLRSTrainable": "trial.trainable",
    "LRRange": "lr_range",
    "LearnedLRScheduler": "outcome.schedule",
    "LearnedSchedule": "outcome.schedule",
    "LiveProgress": "driver.live",
    "OwnPoint": "outcome.points",
    "Piece": "outcome.schedule",
    "ReplayScheduler": "driver.replay",
    "RunResult": "outcome.result",
    "Timing": "outcome.result",
    "Trainer": "training.trainer",
    "TrainingTask": "training.task",
    "WeightAverages": "training.averages",
    "accuracy": "training.task",
    "lr_at": "trial.trainable",
    "lr_range_test": "lr_range",
    "make_policy": "core.policies",
    "read_journal": "record.journal",
    "run": "driver.runner",
    "run_local": "training.local",
    "save_plots": "show.plots",
    "save_report": "show.page",
    "save_tensorboard": "show.tensorboard",
    "trainable_for": "trial.trainable",
}

# what the extra "tune" brings, and how to get it: the package is on no index
_TUNE = {"botorch", "gpytorch", "jinja2", "matplotlib", "ray", "rich", "tensorboardX", "typer"}

__version__ = "0.1.0"
INSTALL_TUNE = f"pip install '.[tune]' in a clone, or 'autolrs_ray-{__version__}-py3-none-any.whl[tune]' from a wheel"
__all__ = [
    "AutoLRSError",
    "AutoLRSScheduler",
    "AutoLRSSearch",
    "AutoLRSTrainable",
    "LRRange",
    "LearnedLRScheduler",
    "LearnedSchedule",
    "LiveProgress",
    "OwnPoint",
    "Piece",
    "ReplayScheduler",
    "RunResult",
    "Timing",
    "Trainer",
    "TrainingTask",
    "WeightAverages",
    "accuracy",
    "lr_at",
    "lr_range_test",
    "make_policy",
    "read_journal",
    "run",
    "run_local",
    "save_plots",
    "save_report",
    "save_tensorboard",
    "trainable_for",
]


def lacks_tune(error: ModuleNotFoundError) -> bool:
    """True if what is missing is a package that the extra "tune" brings."""
    return (error.name or "").partition(".")[0] in _TUNE


def __getattr__(name: str) -> Any:
    if name in _HOMES:  # on first use: importing Ray and torch costs seconds
        try:
            return getattr(import_module(f"autolrs_ray.{_HOMES[name]}"), name)
        except ModuleNotFoundError as error:
            if not lacks_tune(error):
                raise
            message = f"autolrs_ray.{name} needs {error.name}, which is not installed: {INSTALL_TUNE}"
            raise ImportError(message, name=error.name) from error
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
