"""A torch training loop whose step t is a function of (seed, t): no Ray, no hidden state.

Because batches, augmentation and dropout at step t depend on the seed and on t alone (common random numbers), two runs
from one checkpoint differ by their learning rate only, and a probe at the chosen LR *is* the run's own next steps.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import update_bn

from autolrs_ray.core.growth import BatchGrowth
from autolrs_ray.record.checkpoints import FORMAT, read_checkpoint, require_format, write_checkpoint
from autolrs_ray.training.averages import WeightAverages, buffers_put_back, lowest
from autolrs_ray.training.batches import Batch
from autolrs_ray.training.data import Data, checked_data, drawn, held_out, length, placed
from autolrs_ray.training.evaluation import weighted_sums
from autolrs_ray.training.feed import Feed
from autolrs_ray.training.gradients import checked_loss, clip, first_weights
from autolrs_ray.training.optimizers import (
    evaluation_mode,
    has_modes,
    lr_ratios,
    needs_closure,
    note_built_lrs,
    parameters_of,
    set_lr,
    step_all,
    step_with_closure,
    train_mode,
)
from autolrs_ray.training.precision import autocast_dtype
from autolrs_ray.training.randomness import random_numbers_put_back, seed_all
from autolrs_ray.training.state import TaskState
from autolrs_ray.training.task import TrainingTask
from autolrs_ray.training.walk import generators_in


class Trainer:
    """Trains one :class:`TrainingTask` from any step to any later one.

    build: () -> TrainingTask; called once, with the generators of Python, NumPy and torch seeded by `seed`, so that every
    process starts from the same weights and holds out the same rows. averaging: keep the averages of weights that the task
    names in `average_over`; the attribute is False where its optimizer averages by itself. device: where the task names none
    (None: CUDA if there is any).

    Raises what TrainingTask raises, TypeError if `build` returns something else, and ValueError for an optimizer built with an
    LR of 0.
    """

    rank, world = 0, 1  # of DistributedTrainer's processes

    def __init__(
        self, build: Callable[[], TrainingTask], seed: int = 0, averaging: bool = False, device: str | None = None
    ) -> None:
        seed_all(seed)
        task = build()
        if not isinstance(task, TrainingTask):
            raise TypeError(f"the build function must return a TrainingTask, got {type(task).__name__}")
        self.task, self.seed, self.step = task, seed, 0
        self.device = torch.device(task.device or device or ("cuda" if torch.cuda.is_available() else "cpu"))
        self._autocast_dtype = autocast_dtype(task.autocast, self.device)
        self.feed = Feed(task, seed, self.device, self.rank, self.world)
        self.held_out = held_out(drawn(task.val_data, task.val_fraction, seed), seed)
        self._optimizers = task.optimizers
        self._modal = any(has_modes(optimizer) for optimizer in self._optimizers)
        self._with_closure = needs_closure(self._optimizers[0])
        self._share = 1.0  # of the mean over the batch: what the loss of this process counts
        self._prepare_modules()
        self.feed.generators = generators_in(self._state.roots)
        self.averaging = averaging and not self._modal
        self.averages = WeightAverages(self._whole, task.average_over) if self.averaging else None

    def _prepare_modules(self) -> None:
        task = self.task
        self.model = task.model = self._prepared(task.model.to(self.device))
        for module in (*task.saved_modules().values(), *(m for m in task.metrics.values() if isinstance(m, nn.Module))):
            module.to(self.device)
        if task.channels_last:
            self.model = self.model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        for optimizer in self._optimizers:
            if self.device.type != "cpu" and optimizer.state:  # of one that has state before its first step
                optimizer.load_state_dict(optimizer.state_dict())
        mode = task.compile if isinstance(task.compile, str) else None
        self._forward = torch.compile(self.model, mode=mode) if task.compile else self.model
        self._train_forward: Any = self._forward
        note_built_lrs(self._groups())
        train_mode(self._optimizers)
        self._state = TaskState(task, self.device)
        self._whole = nn.Module()
        for name, module in self._state.modules.items():
            self._whole.add_module(name, module)

    def _prepared(self, model: nn.Module) -> nn.Module:
        return model

    def _groups(self) -> list[dict[str, Any]]:
        return [group for optimizer in self._optimizers for group in optimizer.param_groups]

    @property
    def train_data(self) -> Data:
        return self.feed.train_data

    @property
    def val_data(self) -> Data:
        return self.feed.val_data

    @property
    def steps_per_epoch(self) -> int:
        """Batches per pass over the training data."""
        return self.feed.rows.steps_per_epoch

    @property
    def epoch(self) -> float:
        """Passes over the training data so far."""
        return self.feed.rows.epochs(self.step)

    def grow(self, growth: BatchGrowth) -> None:
        """Train with a batch that grows so. Every worker's share of the largest one has to fit its memory."""
        self.feed.rows.growth = growth
        self.feed.loader.start_over()

    @property
    def val_batches(self) -> float:
        """The rows of the validation data that reports are taken on, in training batches."""
        return length(self.val_data) / self.task.batch_size

    def batch(self, step: int) -> Batch:
        """This process's rows of the training batch at `step`, augmented, on the device."""
        return self.feed.batch(step)

    # -- one step ------------------------------------------------------------------------------------------------------

    def _autocast(self) -> AbstractContextManager[Any]:
        dtype = self._autocast_dtype
        return nullcontext() if dtype is None else torch.autocast(self.device.type, dtype)

    def train(self, until: int, lr_at: Callable[[int], float]) -> float:
        """Train up to step `until`; `lr_at(t)` is the LR of the update from t to t + 1. Returns the mean training loss.

        The LR is written into the optimizer at every step, after any restore, each group keeping its ratio to the first.
        Raises ValueError where the loss is no scalar.
        """
        ratios: list[float] = []
        self._whole.train()
        train_mode(self._optimizers)
        total, count = torch.zeros((), device=self.device), max(1, until - self.step)
        while self.step < until:
            lr, groups = lr_at(self.step), self._groups()
            if len(ratios) != len(groups):  # a hook, or the model, may add some while it trains
                ratios, self._clipped = lr_ratios(note_built_lrs(groups)), parameters_of(self._optimizers)
                held = set(map(id, self._clipped))
                self._others = [parameter for parameter in self._whole.parameters() if id(parameter) not in held]
            for group, ratio in zip(groups, ratios, strict=True):
                set_lr(group, lr * ratio)
            total += self._update(self.batch(self.step))
            self.step += 1
            if self.averages is not None:
                self.averages.update(self.step)
        return float(total) / count

    def _update(self, batch: Batch) -> Tensor:
        """One step of all optimizers; the loss before it, times what this process counts."""
        if not self._with_closure:
            loss = self._backward(batch)
            step_all(self._optimizers, self.task.scaler)
            return loss
        step = self.step

        def again() -> Tensor:
            self.feed.seed_step(step)  # the same dropout each time: one function is minimised
            return self._backward(batch)

        return step_with_closure(self._optimizers[0], self._backward(batch), again)

    def _backward(self, batch: Batch) -> Tensor:
        """Gradients of the loss, clipped where that is asked for; the loss, times what this process counts."""
        inputs, targets = batch
        scaler = self.task.scaler
        for optimizer in self._optimizers:
            optimizer.zero_grad(set_to_none=True)
        for parameter in self._others:  # an optimizer may be given them later
            parameter.grad = None
        with self._autocast():
            loss = checked_loss(self.task.loss(self._train_forward(inputs), targets))
        if self._share != 1.0:
            loss = loss * self._share
        (loss if scaler is None else scaler.scale(loss)).backward()  # type: ignore[no-untyped-call]
        self._share_gradients()
        if self.task.clip_norm is not None:
            for optimizer in self._optimizers if scaler is not None else ():
                scaler.unscale_(optimizer)  # type: ignore[union-attr]
            clip(self._clipped, self.task.clip_norm)
        return loss.detach()

    def _share_gradients(self) -> None:
        """For DistributedTrainer: take the mean of those gradients that nobody else takes the mean of."""

    # -- evaluation ----------------------------------------------------------------------------------------------------

    def evaluate(self, data: Data | None = None, averaged: bool = False) -> dict[str, float]:
        """Mean "loss" and metrics on `data`, of the raw weights or of `best_average`.

        Default: on the rows of the validation data that reports are taken on. Nothing that trains is changed.
        """
        if averaged and data is None:
            found = self.evaluate_averages()
            losses = [metrics["loss"] for metrics in found]
            self._averages().judged(lowest(losses))
            self._averages().find_trouble(losses)
            return found[lowest(losses)]
        with self.evaluated(self.best_average if averaged else None):
            return self._metrics(data)

    def evaluate_averages(self, data: Data | None = None) -> list[dict[str, float]]:
        """As `evaluate`, of every average, in the order of the task's `average_over`."""
        found = []
        for index in range(len(self._averages().over)):
            with self.evaluated(index):
                found.append(self._metrics(data))
        return found

    def _averages(self) -> WeightAverages:
        if self.averages is None:
            why = "its optimizer averages by itself" if self._modal else "build it with averaging=True"
            raise ValueError(f"this trainer keeps no averaged weights; {why}")
        return self.averages

    @property
    def best_average(self) -> int:
        """Index, in the task's `average_over`, of the average with the lowest loss on the validation data."""
        if self._averages().best is None:
            self.evaluate(averaged=True)
        best = self._averages().best
        assert best is not None
        return best

    @contextmanager
    def evaluated(self, average: int | None = None) -> Iterator[nn.Module]:
        """The model with the weights that are to be evaluated: average number `average`, or (None) the raw ones, in the
        evaluation mode of an optimizer that has one. Afterwards everything is as it was."""
        with ExitStack() as stack:
            stack.enter_context(self._state.attributes.put_back())
            stack.enter_context(random_numbers_put_back())
            self.feed.seed_evaluation()
            if average is None:
                stack.enter_context(buffers_put_back(self._whole))
                stack.enter_context(evaluation_mode(self._optimizers))
            else:
                stack.enter_context(self._averages().applied(average))
            if self.task.reestimate and (average is not None or self._modal):
                self._reestimate(average)
            yield self.model

    def _reestimate(self, average: int | None) -> None:
        """Estimate batch-norm statistics anew on the last batches, whole ones in every process."""
        first = max(0, self.step - self.task.reestimate)
        with self._autocast():
            update_bn(([self.feed.whole_inputs(first + i)] for i in range(self.task.reestimate)), self.model)
        if average is not None:
            self._averages().keep_statistics(average)

    def _metrics(self, data: Data | None) -> dict[str, float]:
        data = self.val_data if data is None else placed(checked_data("data", data), self.device)
        self._whole.eval()
        names, parameters = zip(*self._whole.named_parameters(), strict=True)
        before = first_weights(parameters)
        functions = {"loss": self.task.loss, **self.task.metrics}
        autocast = None if self._autocast_dtype is None else self._autocast
        sums = weighted_sums(self._forward, functions, self.feed.batches(data), autocast)
        self._whole.train()
        changed = (first_weights(parameters) != before) & before.isfinite()
        if changed.any():
            name = [name for name, p in zip(names, parameters, strict=True) if p.numel()][int(changed.nonzero()[0])]
            raise ValueError(
                f"{name} changes while the model is evaluated: what changes it in forward must ask `if self.training`"
            )
        return {name: value / length(data) for name, value in sums.items()}

    # -- state ---------------------------------------------------------------------------------------------------------

    def reset(self) -> None:
        """Back to step 0 and the initial weights."""
        self._state.reset()
        self.step = 0
        if self.averages is not None:
            self.averages.reset()

    def state_dict(self) -> dict[str, Any]:
        """Everything the next step depends on, with the averages, and which of them is best where they have been evaluated;
        "evaluated": the model's weights in the evaluation mode of an optimizer that has one. Tensors and plain values only.

        Raises TypeError that names a value which a checkpoint cannot hold.
        """
        state = dict(format=FORMAT, step=self.step, seed=self.seed, held_out=self.held_out, **self._state.state_dict())
        state["averages"] = self.averages.state_dict() if self.averages is not None else None
        if self._modal:
            with self.evaluated() as model:
                state["evaluated"] = {
                    k: v.clone() if isinstance(v, Tensor) else v for k, v in model.state_dict().items()
                }
        return state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Raises ValueError where `state` has another format, other averages or another validation set."""
        self._require_fit(state)
        self._state.load_state_dict(state)
        self._load_rest(state)

    def copy_state_dict(self, state: dict[str, Any]) -> None:
        """As load_state_dict, from tensors that are neither kept nor written to: all are copied, into the memory in use."""
        self._require_fit(state)
        self._state.copy_state_dict(state)
        self._load_rest(state)

    def _require_fit(self, state: dict[str, Any]) -> None:
        require_format(state)
        if state["held_out"] != self.held_out:
            raise ValueError(
                f"the state was judged on another validation set ({state['held_out']}) than this task's ({self.held_out}), so "
                "that losses cannot be compared: build must hold out the same rows in every process and at every resume. Give "
                "generators of your own fixed seeds; those of random, NumPy and torch are seeded before build is called"
            )

    def _load_rest(self, state: dict[str, Any]) -> None:
        self.step = state["step"]
        if self.averages is not None:
            if state["averages"] is None:
                self.averages.reset()
            else:
                self.averages.load_state_dict(state["averages"])

    def save(self, folder: str | os.PathLike[str], flush: bool = True) -> None:
        """Write the state into `folder`, flushed to disk (unless it is copied from there), with a manifest of its size and
        SHA-256."""
        write_checkpoint(self.state_dict(), folder, flush)

    def load(self, folder: str | os.PathLike[str]) -> None:
        """Continue from `folder`. Raises CheckpointError if it is missing, cut short or altered."""
        self.load_state_dict(read_checkpoint(folder))

    @property
    def trouble(self) -> str | None:
        """Why an average cannot be used, once one has been found out."""
        return self.averages.trouble if self.averages is not None else None

    def close(self) -> None:
        """End the processes that load data."""
        self.feed.close()
