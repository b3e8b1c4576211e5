"""What can be caught before the first trial starts: what a function is, and whether what it builds can be trained."""

from __future__ import annotations

import inspect
import logging
import math
import time
import warnings
from collections.abc import Iterator
from functools import partial
from types import CodeType, FunctionType, MethodType
from typing import Any

import ray
import torch
from ray.exceptions import RayTaskError
from ray.tune.trainable.function_trainable import FunctionTrainable
from torch import Tensor

from autolrs_ray.core.policy import AutoLRSError
from autolrs_ray.record.checkpoints import snapshot
from autolrs_ray.training.batches import on_tensors
from autolrs_ray.training.data import chosen, length
from autolrs_ray.training.gradients import first_weights
from autolrs_ray.training.optimizers import parameters_of
from autolrs_ray.training.randomness import random_numbers_put_back
from autolrs_ray.training.task import TrainingTask
from autolrs_ray.training.trainer import Trainer
from autolrs_ray.trial.device import own_device
from autolrs_ray.trial.trainable import AutoLRSTrainable

logger = logging.getLogger(__name__)

CHECK_S = 60.0  # longest that a run waits for the check: for a free slot, and for a build that takes long
DEPTH = 4  # functions that call functions: how far they are followed


def builds_task(function: Any, depth: int = DEPTH) -> bool:
    """True for a function that returns a TrainingTask: as its annotation says, or, as it has none, as its code does.

    Looks through functools.partial, tune.with_parameters, lambdas, methods, callable objects and decorators. A function that
    reports to Tune is none, whatever it builds on the way.
    """
    function = inspect.unwrap(function) if callable(function) else function
    if isinstance(function, partial):
        return builds_task(function.func, depth)
    if isinstance(function, MethodType):
        return builds_task(function.__func__, depth)
    if isinstance(function, type) or not callable(function):
        return False
    if not isinstance(function, FunctionType):
        call = type(function).__call__
        return isinstance(call, FunctionType) and builds_task(call, depth)
    returns = function.__annotations__.get("return")
    if _is_task(returns) or (isinstance(returns, str) and "TrainingTask" in returns):
        return True
    if isinstance(returns, type) and returns is not Any:
        return False
    names = set(_names(function.__code__))
    if "report" in names:
        return False
    found = [value for name in sorted(names) if (value := _value(function, name)) is not None]
    if any(map(_is_task, found)) or "TrainingTask" in names:
        return True
    return depth > 0 and any(builds_task(value, depth - 1) for value in found if _own(value))


def _is_task(value: Any) -> bool:
    return isinstance(value, type) and issubclass(value, TrainingTask)


def _names(code: CodeType) -> Iterator[str]:
    """The names that `code` refers to, with those of the functions inside of it."""
    yield from (*code.co_names, *code.co_freevars)
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _names(constant)


def _value(function: Any, name: str) -> Any:
    """What `name` stands for in `function`: a variable around it, or of its module."""
    if not isinstance(function, FunctionType):
        return None
    around = dict(zip(function.__code__.co_freevars, function.__closure__ or (), strict=True))
    try:
        return around[name].cell_contents if name in around else function.__globals__.get(name)
    except ValueError:  # not assigned yet
        return None


def _own(value: Any) -> bool:
    """True for functions of the user's: libraries build no tasks."""
    module = str(getattr(value, "__module__", ""))
    return isinstance(value, (FunctionType, MethodType, partial)) and module.split(".")[0] not in (
        "torch",
        "ray",
        "numpy",
    )


def check_task(build: Any, seed: int, workers: int = 1) -> tuple[Trainer, int]:
    """Build the task, train it one step, evaluate it on one batch and read its state out. Returns the trainer, and the rows of
    a whole batch.

    workers: processes that will share a batch; one share is tried. Raises whatever building and training raise, and ValueError
    for a loss that is not finite, that broadcasts its arguments, or that no parameter of the optimizer has a gradient of. The
    generators that everybody uses are put back.
    """

    rows = 0

    def quickly() -> TrainingTask:
        nonlocal rows
        task: TrainingTask = build()
        if isinstance(task, TrainingTask):
            rows = task.batch_size
            task.compile, task.num_workers = False, 0
            task.batch_size = -(-task.batch_size // workers)
        return task

    with random_numbers_put_back(), warnings.catch_warnings():
        warnings.filterwarnings("error", message=r"Using a (target|input) size", category=UserWarning)
        trainer = Trainer(quickly, seed, device=own_device())
        try:
            _check_one_step(trainer)
        except UserWarning as error:
            raise ValueError(f"the loss pairs outputs and targets of different shapes. {error}") from error
        trainer.state_dict()
    return trainer, rows


def _check_one_step(trainer: Trainer) -> None:
    lr = trainer.task.optimizers[0].param_groups[0]["initial_lr"]
    parameters = parameters_of(trainer.task.optimizers)
    before = first_weights(parameters)
    try:
        loss = trainer.train(1, lambda step: lr)
    except Exception as error:
        inputs, targets = (on_tensors(_described, part) for part in trainer.batch(trainer.step))
        error.add_note(f"The first batch has inputs {inputs} and targets {targets}")
        raise
    if not math.isfinite(loss):
        raise ValueError(
            f"the loss of the first batch is {loss}, before anything is learned: look at the data and the loss"
        )
    if all(p.grad is None for p in parameters) and torch.equal(before, first_weights(parameters)):
        raise ValueError(
            "none of the optimizer's parameters has a gradient: the loss depends on others only. Build the optimizer with the "
            "parameters of the model that is trained"
        )
    rows = min(length(trainer.val_data), trainer.task.eval_batch_size)
    try:
        found = trainer.evaluate(chosen(trainer.val_data, torch.arange(rows)))
    except RuntimeError as error:
        if "does not require grad" in str(error):
            error.add_note(
                "Evaluation runs without gradients: a model whose forward takes derivatives must run it in "
                "`with torch.enable_grad():`"
            )
        raise
    if math.isnan(found["loss"]):
        raise ValueError(f"the validation loss of the first batch is {found['loss']} after one step at LR {lr:g}")


def _described(tensor: Tensor) -> Any:
    return f"{tuple(tensor.shape)} {str(tensor.dtype).removeprefix('torch.')}"


def goes_on_otherwise(trainer: Trainer) -> str | None:
    """What to warn of where training from one state twice does not give the same losses: a state that is not saved.

    Not tried where a step takes longer than a twentieth of CHECK_S. Accelerators add up in any order: there the losses may
    differ by the root of the precision.
    """
    lr = trainer.task.optimizers[0].param_groups[0]["initial_lr"]
    step, state, began = trainer.step, snapshot(trainer.state_dict()), time.monotonic()
    straight = [trainer.train(step + 1, lambda step: lr)]
    if time.monotonic() - began > CHECK_S / 20:
        return None
    straight.append(trainer.train(step + 2, lambda step: lr))
    trainer.load_state_dict(state)
    restored = [trainer.train(step + 1 + i, lambda step: lr) for i in range(2)]
    close = 0.0 if trainer.device.type == "cpu" else torch.finfo(torch.bfloat16).eps ** 0.5
    pairs = [(one, two) for one, two in zip(straight, restored, strict=True) if math.isfinite(one)]
    if all(abs(one - two) <= close * abs(one) for one, two in pairs):
        return None
    return (
        f"training goes on otherwise when it is restored (losses {straight}, then {restored}): something keeps a state or "
        "random numbers of its own that no checkpoint holds, so that trials differ by more than their learning rates. "
        "Attributes of the model, the loss, the augmentation and the optimizer are saved; global variables, what a dataset "
        "counts, and generators without a seed that are made in a call are not"
    )


class UntrainableError(Exception):
    """What is wrong with a task."""


def check_first_trial(
    trainable: type, config: dict[str, Any], resources: dict[str, float]
) -> tuple[int | None, list[str]]:
    """Try out what the trials are to train, once, where a trial would run: in a process of its own with `resources`.

    For an AutoLRSTrainable, also one with a `setup` of its own; other classes, and functions that report, train only as trials.
    Raises AutoLRSError with what is wrong; nothing is started then. Returns the rows of a batch (0 where that is not for us
    to know, None where it could not be found out) and what is to be warned of. Where the check itself cannot be done in CHECK_S
    seconds, for want of a free slot say, the run goes on without it.
    """
    function = _value(getattr(trainable, "_trainable_func", None), "train_func")
    if issubclass(trainable, FunctionTrainable) and builds_task(function):
        name = getattr(trainable, "_name", "build")
        raise AutoLRSError(
            f"{name} returns a TrainingTask, and Tune takes it for a function that trains and reports: give Tune "
            f"trainable_for({name}), or call autolrs_ray.run"
        )
    if not issubclass(trainable, AutoLRSTrainable):
        return 0, []
    if not any(
        all(node["Resources"].get(k, 0.0) >= v for k, v in resources.items()) for node in ray.nodes() if node["Alive"]
    ):
        return None, []  # nodes may yet come; if not, the run says so
    others = {name: amount for name, amount in resources.items() if name not in ("CPU", "GPU", "memory")}
    options: dict[str, Any] = {
        "num_cpus": resources.get("CPU", 0),
        "num_gpus": resources.get("GPU", 0),
        "resources": others,
    }
    task = partial(
        _check, trainable, config, trainable.workers or 1
    )  # no more than a batch has rows, where trials grow
    # given here and not by .options(): then Ray ends the process of a task that had a GPU, whose memory the trials want
    reference = ray.remote(max_retries=0, **options)(lambda: task()).remote()
    done, _ = ray.wait([reference], timeout=CHECK_S)
    if not done:
        ray.cancel(reference, force=True)
        logger.warning("the task could not be tried out in %.0f s; trials start all the same", CHECK_S)
        return None, []
    try:
        rows, warned = ray.get(reference)
        return 0 if trainable.threads else rows, [warned] if warned is not None else []
    except RayTaskError as error:
        cause = error.cause
        wrong = str(cause) if isinstance(cause, UntrainableError) else f"{type(cause).__name__}: {cause}"
        raise AutoLRSError(f"{trainable.__name__} cannot be trained, and no trial was started. {wrong}") from error
    except Exception as error:  # the process died: a trial that does so too is told of with more to say
        logger.warning("the task could not be tried out (%s); trials start all the same", error)
        return None, []


def _check(trainable: type[AutoLRSTrainable], config: dict[str, Any], workers: int) -> tuple[int | None, str | None]:
    """The rows of a batch, where they are known, and what is to be warned of. Raises UntrainableError."""
    rows: int | None = None
    warned: str | None = None

    def tried(self: AutoLRSTrainable, seed: int, averaging: bool, given: dict[str, Any]) -> Trainer:
        nonlocal rows, warned
        try:
            trainer, rows = check_task(lambda: self.build(given), seed, workers)
            with random_numbers_put_back():
                warned = goes_on_otherwise(trainer)
        except Exception as error:
            notes = "".join(f". {note}" for note in getattr(error, "__notes__", ()))
            raise UntrainableError(f"{type(error).__name__}: {error}{notes}") from error
        return trainer

    if trainable.setup is AutoLRSTrainable.setup:
        tried(object.__new__(trainable), config.get("seed", 0), False, config)
        return rows, warned
    own = {name: value for name, value in config.items() if name != "autolrs"}  # it trains no segment
    try:
        type(trainable.__name__, (trainable,), {"_new_trainer": tried})(config={"lr": 1.0, **own}).cleanup()
    except UntrainableError:
        raise
    except Exception as error:  # it may want what only a trial has
        if isinstance(error, KeyError) and error.args == ("autolrs",):
            return rows, None  # its segment
        warned = (
            f"{trainable.__name__}.setup could not be tried out before the first trial: {type(error).__name__}: {error}"
        )
    return rows, warned


class ReportsOfOneTask:
    """Reads from reports what tells that trials do not train the same: held out other rows.

    trainable: of all trials. Of other classes than ours "held_out" is a result like any.
    """

    def __init__(self, trainable: type) -> None:
        self._ours = issubclass(trainable, AutoLRSTrainable)
        self._held_out: tuple[Any, str] | None = None
        self._warned: set[str] = set()

    def heard(self, arm: str, result: dict[str, Any]) -> str | None:
        """A warning that is new, or None. Raises AutoLRSError where another trial has another validation set."""
        found = result.get("held_out")
        if self._ours and found is not None:
            self._held_out = self._held_out or (found, arm)
            if self._held_out[0] != found:
                raise AutoLRSError(
                    f"{arm} and {self._held_out[1]} hold out different validation rows, so that losses cannot be compared: "
                    "build must split the data in the same way in every process. The generators of random, NumPy and torch are "
                    "seeded before build is called; give those of your own a fixed seed"
                )
        warning = result.get("warning")
        if warning is None or arm in self._warned:
            return None
        self._warned.add(arm)
        return f"{arm}: {warning}"
