"""The batches of a task, on the device: of every step, augmented, and of evaluations."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from autolrs_ray.training.batches import Batch, channels_last, on_tensors, share_of_rows
from autolrs_ray.training.data import (
    Data,
    Key,
    Loader,
    Rows,
    drawn,
    length,
    pairs_of,
    placed,
    row_device,
    validation_keys,
)
from autolrs_ray.training.randomness import AUGMENT, STEP, VALIDATION, generator_of, reseed, seed_all, seed_of
from autolrs_ray.training.task import TrainingTask


class Feed:
    """What one of `world` processes is given: each world-th row of a batch.

    generators: those of the model and the like, which are seeded by step as those are that everybody uses.
    """

    def __init__(self, task: TrainingTask, seed: int, device: torch.device, rank: int, world: int) -> None:
        self.task, self.seed, self.device, self.rank, self.world = task, seed, device, rank, world
        self.generators: list[Any] = []
        self.train_data = placed(task.train_data, device)
        self.val_data = placed(drawn(task.val_data, task.val_fraction, seed), device)
        count = length(self.train_data)
        self.rows = Rows(count, task.batch_size, seed, task.sampler, row_device(self.train_data, device))
        self.loader = Loader(self._keys, self.train_data, device, task.num_workers, task.collate_fn)

    def own(self) -> slice:
        """This process's rows of a batch."""
        return slice(self.rank, None, self.world)

    def _loaded(self) -> slice:
        """The rows of a batch that this process loads: all where they are augmented, so that the random numbers of a row do
        not depend on how many processes there are."""
        return slice(None) if self.task.augment is not None else self.own()

    def _keys(self, step: int) -> list[Key]:
        return self.rows.keys(step, self._loaded())

    # -- training ------------------------------------------------------------------------------------------------------

    def batch(self, step: int) -> Batch:
        """This process's rows of the training batch at `step`, augmented. The generators that everybody uses are left as the
        forward pass of the step finds them."""
        if isinstance(self.train_data, tuple):
            inputs, targets = pairs_of(self.train_data, self.rows.at(step)[self._loaded()])
        else:
            inputs, targets = self.loader.at(step)
        if self.task.augment is not None:
            inputs = self._augmented(inputs, step)
            if self.world > 1:
                size = self.rows.size(step)
                inputs, targets = (share_of_rows(part, size, self.own()) for part in (inputs, targets))
        self.seed_step(step)
        return self._laid_out(inputs), targets

    def seed_step(self, step: int) -> None:
        """Seed the generators that dropout and the like draw from."""
        key = (step,) if self.rank == 0 else (step, self.rank)
        seed_all(seed_of(self.seed, STEP, *key), self.device)
        reseed(self.generators, self.seed, STEP, *key)

    def seed_evaluation(self) -> None:
        """Seed them for models that draw while they are evaluated: every evaluation sees the same numbers."""
        seed_all(seed_of(self.seed, VALIDATION, self.rank), self.device)
        reseed(self.generators, self.seed, VALIDATION, self.rank)

    def whole_inputs(self, step: int) -> Any:
        """The inputs of all rows of the batch at `step`, in every process, whatever loads ahead."""
        if isinstance(self.train_data, tuple):
            inputs, _ = pairs_of(self.train_data, self.rows.at(step))
        else:
            inputs, _ = self.loader.out_of_order(self.rows.keys(step, slice(None)))
        return self._augmented(inputs, step)

    def _augmented(self, inputs: Any, step: int) -> Any:
        """In every process alike, also where `augment` draws from other generators than the one it is given."""
        if self.task.augment is None:
            return inputs
        seed_all(seed_of(self.seed, AUGMENT, step), self.device)
        reseed(self.generators, self.seed, AUGMENT, step)
        return self.task.augment(inputs, generator_of(self.seed, AUGMENT, step))

    def _laid_out(self, inputs: Any) -> Any:
        return on_tensors(channels_last, inputs) if self.task.channels_last else inputs

    # -- evaluation ----------------------------------------------------------------------------------------------------

    def batches(self, data: Data) -> Iterator[tuple[Batch, int]]:
        """Batches of this process's rows of `data`, and the number of rows in each."""
        rows = torch.arange(self.rank, length(data), self.world, device=row_device(data, self.device))
        parts = [part for part in torch.split(rows, self.task.eval_batch_size) if len(part)]
        batches = (
            (pairs_of(data, part) for part in parts)
            if isinstance(data, tuple)
            else self.loader.once(data, [validation_keys(self.seed, part.tolist()) for part in parts])
        )
        for (inputs, targets), part in zip(batches, parts, strict=True):
            yield (self._laid_out(inputs), targets), len(part)

    def close(self) -> None:
        """End the processes that load data."""
        self.loader.close()
