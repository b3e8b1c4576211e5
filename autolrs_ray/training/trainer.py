"""A torch training loop whose step t is a function of (seed, t): no Ray, no hidden state.

Because batches, augmentation and dropout at step t depend on the seed and on t alone (common random numbers), two runs
from one checkpoint differ by their learning rate only, and a probe at the chosen LR *is* the run's own next steps.
"""

from __future__ import annotations

import copy
import hashlib
import math
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel
from torch.utils.data import default_collate

from autolrs_ray.record.checkpoints import FORMAT, read_checkpoint, require_format, snapshot, write_checkpoint
from autolrs_ray.training.averages import lowest
from autolrs_ray.training.task import Batch, Data, TrainingTask, chosen, length

_EPOCH, _STEP, _AUGMENT, _VALIDATION = 0, 1, 2, 3  # streams of the counter-based random numbers


def _generator(seed: int, stream: int, index: int) -> torch.Generator:
    """A CPU generator for (seed, stream, index); nearby keys give unrelated numbers."""
    digest = hashlib.blake2b(f"{seed}/{stream}/{index}".encode(), digest_size=8).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "little") >> 1)


def _state_tensors(model: nn.Module) -> tuple[list[Tensor], list[Tensor]]:
    """Parameters and buffers of `model`: those that can be averaged, and the counters."""
    tensors = [*(parameter.detach() for parameter in model.parameters()), *model.buffers()]
    return [t for t in tensors if t.is_floating_point()], [t for t in tensors if not t.is_floating_point()]


def _addresses(state: Mapping[str, Any]) -> set[int]:
    """Where the tensors of `state` lie in memory."""
    return {value.data_ptr() for value in state.values() if isinstance(value, Tensor) and value.numel()}


def _copied(new: Any, old: Any) -> Any:
    """A copy of `new`, the state of an optimizer, in the tensors of `old` where these are alike."""
    if isinstance(new, dict):
        old = old if isinstance(old, dict) else {}
        return {key: _copied(value, old.get(key)) for key, value in new.items()}
    if isinstance(new, (list, tuple)):
        return type(new)(_copied(value, None) for value in new)
    if not isinstance(new, Tensor):
        return new
    alike = isinstance(old, Tensor) and (old.shape, old.stride()) == (new.shape, new.stride())
    return old.copy_(new) if alike and (old.dtype, old.device) == (new.dtype, new.device) else new.clone()


class Trainer:
    """Trains one :class:`TrainingTask` from any step to any later one.

    build: () -> TrainingTask; called once, with torch's generator seeded by `seed`, so every process starts from the
    same weights. averaging: keep averages of weights and buffers (torch's AveragedModel), one for each part of the steps so
    far that the task names in `average_over`.
    """

    rank, world = 0, 1  # of DistributedTrainer's processes

    def __init__(self, build: Callable[[], TrainingTask], seed: int = 0, averaging: bool = False) -> None:
        torch.manual_seed(seed)
        task = build()
        if not isinstance(task, TrainingTask):
            raise TypeError(f"the build function must return a TrainingTask, got {type(task).__name__}")
        self.task, self.seed, self.averaging, self.step = task, seed, averaging, 0
        self.device = torch.device(task.device or ("cuda" if torch.cuda.is_available() else "cpu"))
        self.model = task.model.to(self.device)
        self._memory_format = torch.channels_last if task.channels_last else torch.contiguous_format
        if task.channels_last:
            self.model = self.model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        mode = task.compile if isinstance(task.compile, str) else None
        self._forward = torch.compile(self.model, mode=mode) if task.compile else self.model
        self._train_forward: Any = self._forward
        self.train_data, self.val_data = self._place(task.train_data), self._place(self._drawn(task.val_data))
        base = task.optimizer.param_groups[0]["lr"]
        if not base > 0:
            raise ValueError(f"build the optimizer with lr > 0 in its first group, got {base}: ratios are kept to it")
        self._ratios = [group["lr"] / base for group in task.optimizer.param_groups]
        self._initial = copy.deepcopy((self.model.state_dict(), task.optimizer.state_dict()))
        self.averages = self._new_averages() if averaging else []
        self._best_average, self._judged_at = 0, -1
        self._order: tuple[int, Tensor] = (-1, torch.empty(0))

    def _new_averages(self) -> list[AveragedModel]:
        averages = [AveragedModel(self.model, use_buffers=True) for _ in self.task.average_over]
        self._tensors = _state_tensors(self.model), [_state_tensors(average.module) for average in averages]
        return averages

    @torch.no_grad()
    def _update_averages(self) -> None:
        """AveragedModel.update_parameters copies its count to the device at every step, and so waits for the device."""
        (new_values, new_counters), tensors = self._tensors
        for part, average, (values, counters) in zip(self.task.average_over, self.averages, tensors, strict=True):
            first = int(average.n_averaged) == 0
            torch._foreach_lerp_(values, new_values, 1.0 if first else min(1.0, 1.0 / (part * self.step)))
            if counters:
                torch._foreach_copy_(counters, new_counters)
            average.n_averaged += 1

    def _drawn(self, data: Data) -> Data:
        """`task.val_fraction` of the rows, in their order; all of them as they are."""
        count = math.ceil(self.task.val_fraction * length(data))
        if count == length(data):
            return data
        order = torch.randperm(length(data), generator=_generator(self.seed, _VALIDATION, 0))
        return chosen(data, order[:count].sort().values)

    def _place(self, data: Data) -> Data:
        if isinstance(data, tuple):
            return data[0].to(self.device), data[1].to(self.device)
        return data

    # -- one step ------------------------------------------------------------------------------------------------------

    @property
    def steps_per_epoch(self) -> int:
        """Optimizer steps per pass over the training data."""
        return length(self.train_data) // self.task.batch_size

    def _indices(self, step: int) -> Tensor:
        """Rows of the batch at `step`: epochs are permutations, the last short batch of each is left out."""
        epoch, position = divmod(step, self.steps_per_epoch)
        if self._order[0] != epoch:
            order = torch.randperm(length(self.train_data), generator=_generator(self.seed, _EPOCH, epoch))
            self._order = (epoch, order.to(self.device) if isinstance(self.train_data, tuple) else order)
        start = position * self.task.batch_size
        return self._order[1][start : start + self.task.batch_size]

    def batch(self, step: int) -> Batch:
        """The training batch at `step`, augmented, on the device."""
        inputs, targets = self._take(self.train_data, self._indices(step))
        if self.task.augment is not None:
            inputs = self.task.augment(inputs, _generator(self.seed, _AUGMENT, step * self.world + self.rank))
        return inputs, targets

    def _take(self, data: Data, rows: Tensor) -> Batch:
        if isinstance(data, tuple):
            inputs, targets = data[0][rows], data[1][rows]
        else:
            inputs, targets = default_collate([data[int(i)] for i in rows])
            inputs, targets = inputs.to(self.device), targets.to(self.device)
        if inputs.dim() == 4 and self.task.channels_last:
            inputs = inputs.contiguous(memory_format=torch.channels_last)
        return inputs, targets

    def _autocast(self) -> AbstractContextManager[Any]:
        return torch.autocast(self.device.type, torch.bfloat16) if self.task.autocast else nullcontext()

    def train(self, until: int, lr_at: Callable[[int], float]) -> float:
        """Train up to step `until`; `lr_at(t)` is the LR of the update from t to t + 1. Returns the mean training loss.

        The LR is written into the optimizer at every step, after any restore, each group keeping its ratio to the first.
        """
        optimizer, parameters = self.task.optimizer, list(self.model.parameters())
        self.model.train()
        total, count = torch.zeros((), device=self.device), max(1, until - self.step)
        while self.step < until:
            lr = lr_at(self.step)
            for group, ratio in zip(optimizer.param_groups, self._ratios, strict=True):
                group["lr"] = lr * ratio
            self._seed_step(_generator(self.seed, _STEP, self.step * self.world + self.rank).initial_seed())
            inputs, targets = self.batch(self.step)
            with self._autocast():
                loss = self.task.loss(self._train_forward(inputs), targets)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()  # type: ignore[no-untyped-call]
            if self.task.clip_norm is not None:
                nn.utils.clip_grad_norm_(parameters, self.task.clip_norm)
            optimizer.step()
            total += loss.detach()
            self.step += 1
            if self.averages:
                self._update_averages()
        return float(total) / count

    def _seed_step(self, seed: int) -> None:
        """Seed the generators that dropout and the like draw from; torch.manual_seed formats stack traces at every call."""
        torch.default_generator.manual_seed(seed)
        if self.device.type != "cpu":
            torch.manual_seed(seed)

    # -- evaluation ----------------------------------------------------------------------------------------------------

    def _batches(self, data: Data) -> Iterator[Batch]:
        size = self.task.eval_batch_size
        for start in range(0, length(data), size):
            yield self._take(data, torch.arange(start, min(start + size, length(data)), device=self._row_device(data)))

    def _row_device(self, data: Data) -> torch.device:
        return self.device if isinstance(data, tuple) else torch.device("cpu")

    def evaluate(self, data: Data | None = None, averaged: bool = False) -> dict[str, float]:
        """Mean "loss" and metrics on `data`, of the raw weights or of `best_average`.

        Default: on the rows of the validation data that reports are taken on.
        """
        if not averaged:
            return self._metrics(self._forward, data)
        if data is not None:
            return self._metrics(self._averages()[self.best_average], data)
        found = self.evaluate_averages()
        self._best_average, self._judged_at = lowest([metrics["loss"] for metrics in found]), self.step
        return found[self._best_average]

    def evaluate_averages(self, data: Data | None = None) -> list[dict[str, float]]:
        """As `evaluate`, of every average, in the order of the task's `average_over`."""
        return [self._metrics(average, data) for average in self._averages()]

    def _averages(self) -> list[AveragedModel]:
        if not self.averages:
            raise ValueError("this trainer keeps no averaged weights; build it with averaging=True")
        return self.averages

    @property
    def best_average(self) -> int:
        """Index, in the task's `average_over`, of the average with the lowest loss on the validation data."""
        if self._judged_at != self.step:
            self.evaluate(averaged=True)
        return self._best_average

    @torch.no_grad()
    def _metrics(self, network: nn.Module | Any, data: Data | None) -> dict[str, float]:
        data = self.val_data if data is None else self._place(data)
        network.eval()
        functions = {"loss": self.task.loss, **self.task.metrics}
        sums = {name: torch.zeros((), device=self.device) for name in functions}
        for inputs, targets in self._batches(data):
            with self._autocast():
                output = network(inputs)
            for name, function in functions.items():
                sums[name] += function(output.float(), targets) * len(targets)
        network.train()
        return {name: float(value) / length(data) for name, value in sums.items()}

    # -- state ---------------------------------------------------------------------------------------------------------

    def reset(self) -> None:
        """Back to step 0 and the initial weights."""
        model, optimizer = self._initial
        self._load(copy.deepcopy(model), copy.deepcopy(optimizer), 0)

    def _load(self, model: Any, optimizer: Any, step: int) -> None:
        self.model.load_state_dict(model)
        self.task.optimizer.load_state_dict(optimizer)
        self.step, self._judged_at = step, -1
        if self.averaging:
            self.averages = self._new_averages()

    def state_dict(self) -> dict[str, Any]:
        """Everything the next step depends on, and `best_average` where the state has been evaluated; tensors and plain
        values only."""
        state = dict(format=FORMAT, step=self.step, seed=self.seed, model=self.model.state_dict())
        state["optimizer"] = self.task.optimizer.state_dict()
        state["averages"] = [average.state_dict() for average in self.averages]
        state["best_average"] = self._best_average if self._judged_at == self.step else None
        return state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        require_format(state)
        self._load(state["model"], state["optimizer"], state["step"])
        averages = state["averages"] if self.averaging else []
        if averages and len(averages) != len(self.averages):
            raise ValueError(
                f"the state holds {len(averages)} averages, the task's average_over={self.task.average_over} asks for "
                f"{len(self.averages)}: keep average_over as it was when the run began"
            )
        for average, values in zip(self.averages, averages, strict=False):
            average.load_state_dict(values)
        if averages and state["best_average"] is not None:
            self._best_average, self._judged_at = state["best_average"], self.step

    def copy_state_dict(self, state: dict[str, Any]) -> None:
        """As load_state_dict, from tensors that are neither kept nor written to: all are copied, those of the optimizer into
        the memory in use where they fit (fresh memory costs several times the copy)."""
        optimizer = self.task.optimizer
        before = dict(optimizer.state)
        plain = type(optimizer).load_state_dict is torch.optim.Optimizer.load_state_dict
        if not plain or any(name.endswith("_extra_state") for name in state["model"]):
            state = snapshot(state)
        self.load_state_dict(state)
        for parameter, values in optimizer.state.items():
            optimizer.state[parameter] = _copied(values, before.get(parameter))
        if _addresses(state["model"]) & _addresses(self.model.state_dict()):  # a model that keeps what it is given
            self.load_state_dict(snapshot(state))

    def save(self, folder: str | os.PathLike[str], flush: bool = True) -> None:
        """Write the state into `folder`, flushed to disk (unless it is copied from there), with a manifest of its size and
        SHA-256."""
        write_checkpoint(self.state_dict(), folder, flush)

    def load(self, folder: str | os.PathLike[str]) -> None:
        """Continue from `folder`. Raises CheckpointError if it is missing, cut short or altered."""
        self.load_state_dict(read_checkpoint(folder, self.device))
