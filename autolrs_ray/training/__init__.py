"""A torch training loop whose step t is a function of (seed, t); no Ray."""

from autolrs_ray.training.task import TrainingTask, accuracy
from autolrs_ray.training.trainer import Trainer

__all__ = ["Trainer", "TrainingTask", "accuracy"]
