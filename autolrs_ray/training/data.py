"""Batches that are functions of (seed, step): from tensors on the device, or from a map-style dataset, loaded ahead."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import BatchSampler, DataLoader, Dataset, IterableDataset, Sampler, Subset, default_collate

from autolrs_ray.core.growth import BatchGrowth
from autolrs_ray.training.batches import Batch, on_device
from autolrs_ray.training.randomness import (
    EPOCH,
    ROW,
    VALIDATION,
    VALIDATION_ROW,
    generator_of,
    random_numbers_put_back,
    reseed,
    seed_all,
    seed_of,
    states_of_all,
)
from autolrs_ray.training.walk import generators_in

Data = tuple[Tensor, Tensor] | Dataset[Any]
"""(inputs, targets) tensors with the same first dimension, or a map-style dataset whose batches are pairs."""

CPU = torch.device("cpu")
COMPARED_ROWS = 16  # of the validation data, to see that it is the same in every process
Draw = Callable[[torch.Generator], Any]
Key = tuple[int, int]  # the seed of a row's random numbers, and the row


def checked_data(name: str, data: Any) -> Data:
    """`data` as Data: NumPy arrays become tensors. Raises TypeError or ValueError with the mend."""
    if isinstance(data, DataLoader):
        raise TypeError(
            f"{name} is a DataLoader: give its dataset, and batch_size, num_workers, collate_fn and sampler as options of the "
            "task, which draws the rows of a step from the seed and the step"
        )
    if isinstance(data, IterableDataset):
        raise TypeError(
            f"{name} is an IterableDataset ({type(data).__name__}): the batch of a step must be a function of the step, so "
            "that trials can be restored in the middle. Give a map-style dataset, with __len__ and __getitem__"
        )
    if isinstance(data, list) and data and all(isinstance(part, (Tensor, np.ndarray)) for part in data):
        raise TypeError(f"{name} is a list of {len(data)} arrays: give a tuple (inputs, targets)")
    if not isinstance(data, tuple):
        if not (hasattr(data, "__len__") and hasattr(data, "__getitem__")):
            raise TypeError(
                f"{name} must be a pair of tensors or a map-style dataset, with __len__ and __getitem__, got "
                f"{type(data).__name__}"
            )
        return data  # type: ignore[no-any-return]
    if len(data) != 2 or not all(isinstance(part, (Tensor, np.ndarray)) for part in data):
        raise TypeError(
            f"{name} must be a pair (inputs, targets) of tensors, got a tuple of {[type(part).__name__ for part in data]}: for "
            "more, give a TensorDataset or a dataset of your own, with a collate_fn that returns a pair"
        )
    inputs, targets = (torch.as_tensor(part) for part in data)
    if len(inputs) != len(targets):
        raise ValueError(f"{name} has {len(inputs)} inputs and {len(targets)} targets: one of each for every row")
    return inputs, targets


def checked_sampler(sampler: Any) -> Any:
    """`sampler` if it is a function or one of torch's samplers of rows. Raises TypeError with the mend."""
    if isinstance(sampler, BatchSampler) or not (sampler is None or callable(sampler) or isinstance(sampler, Sampler)):
        raise TypeError(
            f"sampler is a {type(sampler).__name__}: give a function of a torch.Generator that returns the rows of an epoch, "
            "or a torch sampler of single rows; each batch_size of them, one after another, are a batch"
        )
    return sampler


def length(data: Data) -> int:
    return len(data[0]) if isinstance(data, tuple) else len(data)  # type: ignore[arg-type]


def chosen(data: Data, rows: Tensor) -> Data:
    """`rows` of `data`."""
    return pairs_of(data, rows) if isinstance(data, tuple) else Subset(data, rows.tolist())


def drawn(data: Data, fraction: float, seed: int) -> Data:
    """`fraction` of the rows, in their order, drawn by `seed`; all of them as they are."""
    count = math.ceil(fraction * length(data))
    if count == length(data):
        return data
    order = torch.randperm(length(data), generator=generator_of(seed, VALIDATION, 0))
    return chosen(data, order[:count].sort().values)


def pairs_of(data: tuple[Tensor, Tensor], rows: Tensor) -> Batch:
    return data[0][rows], data[1][rows]


def placed(data: Data, device: torch.device) -> Data:
    """`data`; tensors on `device`."""
    return (data[0].to(device), data[1].to(device)) if isinstance(data, tuple) else data


def row_device(data: Data, device: torch.device) -> torch.device:
    """Where the numbers of rows are wanted that are taken of `data` for `device`."""
    return device if isinstance(data, tuple) else CPU


@dataclass
class _Seeded(Dataset[Any]):
    """A dataset of `data` in which a row's random numbers are functions of its key, those of the generators it holds too.

    Seeding Python's and NumPy's generators takes as long as a fiftieth of a small image. They are seeded once a batch has been
    seen to move them, and that batch is loaded again.
    """

    data: Any

    def __post_init__(self) -> None:
        self._generators = generators_in({"data": self.data})
        self._draws_from_all = False

    def __getitem__(self, key: Key) -> Any:
        seed_all(key[0], CPU)
        return self._row(key)

    def __getitems__(self, keys: list[Key]) -> list[Any]:
        if not self._draws_from_all:
            before = states_of_all()
            rows = [self._row(key) for key in keys]
            if states_of_all() == before:
                return rows
            self._draws_from_all = True
        return [self[key] for key in keys]

    def _row(self, key: Key) -> Any:
        torch.default_generator.manual_seed(key[0])
        if self._generators:
            reseed(self._generators, key[0])
        return self.data[key[1]]


@dataclass
class _Batches:
    """A batch sampler: the keys of all batches from `step` on, without an end."""

    keys: Callable[[int], list[Key]]
    step: int = 0

    def __iter__(self) -> Iterator[list[Key]]:
        step = self.step
        while True:
            yield self.keys(step)
            step += 1


@dataclass
class Rows:
    """Which rows are the batch of a step: every epoch is a permutation, or what `sampler` draws, by (seed, epoch); the last
    short batch of an epoch is left out. Where the batch grows, a step takes several of the batches that follow one another.

    Raises ValueError where `sampler` draws fewer rows than a batch has, or another number of rows in another epoch.
    """

    count: int
    batch_size: int
    seed: int
    sampler: Draw | Sampler[int] | None = None
    device: torch.device = CPU
    growth: BatchGrowth = field(default_factory=BatchGrowth)

    def __post_init__(self) -> None:
        self._order: tuple[int, Tensor]
        self.forget()
        if self.sampler is not None:
            rows, available = self._drawn(0), self.count
            self.count = len(rows)
            if self.count and not 0 <= int(rows.min()) <= int(rows.max()) < available:
                raise ValueError(f"the sampler draws rows {int(rows.min())} to {int(rows.max())} of {available}")
            if self.count < self.batch_size:
                raise ValueError(f"the sampler draws {self.count} rows an epoch, batch_size is {self.batch_size}")

    def forget(self) -> None:
        """Draw the epoch anew: `seed` has changed."""
        self._order = (-1, torch.empty(0))

    @property
    def steps_per_epoch(self) -> int:
        return self.count // self.batch_size

    def _drawn(self, epoch: int) -> Tensor:
        generator = generator_of(self.seed, EPOCH, epoch)
        if self.sampler is None:
            return torch.randperm(self.count, generator=generator)
        rows = self._sampled(self.sampler, generator, epoch)
        rows = rows if isinstance(rows, Tensor) else torch.as_tensor(list(rows))
        if epoch and len(rows) != self.count:
            raise ValueError(f"the sampler draws {self.count} rows in epoch 0 and {len(rows)} in epoch {epoch}")
        return rows.long()

    def epochs(self, step: int) -> float:
        """Passes over the data that `step` steps have made."""
        return self.growth.first(step) / self.steps_per_epoch

    def size(self, step: int) -> int:
        """Rows of the batch at `step`."""
        return self.batch_size * self.growth.factor(step)

    def _batches(self, step: int) -> range:
        """The numbers of those that the step takes."""
        return range(self.growth.first(step), self.growth.first(step) + self.growth.factor(step))

    def _sampled(self, sampler: Draw | Sampler[int], generator: torch.Generator, epoch: int) -> Any:
        """What `sampler` draws, whichever generator it draws from: they are all functions of (seed, epoch)."""
        with random_numbers_put_back():
            seed_all(seed_of(self.seed, EPOCH, epoch), CPU)
            reseed(generators_in({"sampler": sampler}), self.seed, EPOCH, epoch)
            if not isinstance(sampler, Sampler):
                return sampler(generator)
            if hasattr(sampler, "set_epoch"):
                sampler.set_epoch(epoch)
            if getattr(sampler, "generator", generator) is None:
                sampler.generator = generator  # type: ignore[attr-defined]
            return list(sampler)

    def at(self, step: int) -> Tensor:
        """(size(step),) rows of the batch at `step`, on the device."""
        return torch.cat([self._batch(number) for number in self._batches(step)])

    def _batch(self, number: int) -> Tensor:
        epoch, position = divmod(number, self.steps_per_epoch)
        if self._order[0] != epoch:
            self._order = (epoch, self._drawn(epoch).to(self.device))
        start = position * self.batch_size
        return self._order[1][start : start + self.batch_size]

    def keys(self, step: int, share: slice) -> list[Key]:
        """Of the batch's rows in `share`, with seeds that are functions of (seed, epoch, place in the epoch): of the row, and
        not of who loads it."""
        found: list[tuple[int, int, int]] = []
        for number in self._batches(step):
            epoch, position = divmod(number, self.steps_per_epoch)
            first = position * self.batch_size
            found += [(epoch, first + i, row) for i, row in enumerate(self._batch(number).tolist())]
        return [(seed_of(self.seed, ROW, epoch, place), row) for epoch, place, row in found[share]]


class Loader:
    """Batches of a map-style dataset, collated, on the device; with `workers` processes they are loaded while the device
    computes."""

    def __init__(
        self,
        keys: Callable[[int], list[Key]],
        data: Any,
        device: torch.device,
        workers: int = 0,
        collate: Callable[[list[Any]], Any] | None = None,
    ) -> None:
        self._keys, self._data, self.device = keys, _Seeded(data), device
        self._workers, self._collate = workers, collate or default_collate
        self._batches = _Batches(keys)
        self._loader = self._new_loader(self._data, self._batches, persistent=True) if workers else None
        self._iterator: Iterator[Any] | None = None
        self._next = -1

    def _new_loader(self, data: _Seeded, batches: Any, persistent: bool) -> DataLoader[Any]:
        return DataLoader(
            data, batch_sampler=batches, num_workers=self._workers, collate_fn=self._collate,
            pin_memory=self.device.type == "cuda", persistent_workers=persistent, generator=torch.Generator(),
        )  # fmt: skip

    def at(self, step: int) -> Batch:
        """The batch at `step`. In order they come from the workers; out of order, these begin anew at `step`."""
        if self._loader is None:
            return self._here(self._keys(step))
        if self._iterator is None or self._next != step:
            self._batches.step = step
            self._iterator = iter(self._loader)
        batch, self._next = next(self._iterator), step + 1
        return self._placed(batch)

    def start_over(self) -> None:
        """Load the next batch anew: what has been loaded ahead is of other rows."""
        self._iterator = None

    def out_of_order(self, keys: list[Key]) -> Batch:
        """The batch of `keys`, loaded in this process, whatever the workers do."""
        return self._here(keys)

    def once(self, data: Dataset[Any], keys: Sequence[list[Key]]) -> Iterator[Batch]:
        """One batch of `data` for each of `keys`."""
        if not self._workers:
            yield from (self._here(each, _Seeded(data)) for each in keys)
            return
        yield from map(self._placed, self._new_loader(_Seeded(data), keys, persistent=False))

    def _here(self, keys: list[Key], data: _Seeded | None = None) -> Batch:
        data = data or self._data
        return self._placed(self._collate(data.__getitems__(keys)))

    def _placed(self, batch: Any) -> Batch:
        if not isinstance(batch, (list, tuple)) or len(batch) != 2:
            found = f"{type(batch).__name__} of {list(batch)}" if isinstance(batch, Mapping) else type(batch).__name__
            found += f" of {len(batch)}" if isinstance(batch, (list, tuple)) else ""
            raise TypeError(
                f"a batch of the dataset must be a pair (inputs, targets), got a {found}: give TrainingTask a collate_fn that "
                "turns a list of rows into a pair; either may be a dict or a tuple, which the model and the loss are given"
            )
        inputs, targets = (on_device(part, self.device) for part in batch)
        return inputs, targets

    def close(self) -> None:
        """End the workers."""
        self._iterator = None
        self._loader = None


def validation_keys(seed: int, rows: Sequence[int]) -> list[Key]:
    """Of rows whose random numbers, where they have any, are the same in every evaluation."""
    return [(seed_of(seed, VALIDATION_ROW, row), row) for row in rows]


def held_out(data: Data, seed: int) -> str:
    """A few characters that tell one validation set from another: of its length and of some rows, evenly spread.

    Numbers are compared to two digits: those of another machine may differ in the last one.
    """
    count = length(data)
    rows = sorted({i * (count - 1) // max(1, COMPARED_ROWS - 1) for i in range(COMPARED_ROWS)})
    digest = hashlib.blake2b(str(count).encode(), digest_size=6)
    with random_numbers_put_back():
        if isinstance(data, tuple):
            found = [(data[0][row], data[1][row]) for row in rows]
        else:
            seeded = _Seeded(data)
            found = [seeded[key] for key in validation_keys(seed, rows)]
    for row in found:
        digest.update(_told_apart(row).encode())
    return digest.hexdigest()


def _told_apart(value: Any) -> str:
    if isinstance(value, (list, tuple)):
        return ",".join(map(_told_apart, value))
    if isinstance(value, Mapping):
        return ",".join(f"{key}:{_told_apart(part)}" for key, part in value.items())
    if hasattr(value, "__array__") and not isinstance(value, Tensor):
        value = torch.as_tensor(np.array(value))
    if isinstance(value, (Tensor, int, float, complex)):
        numbers = torch.as_tensor(value).detach().cpu()
        numbers = torch.view_as_real(numbers) if numbers.is_complex() else numbers
        flat = numbers.reshape(-1).double()
        weights = torch.cos(torch.arange(1, len(flat) + 1, dtype=torch.float64))  # so that the order counts
        return f"{float((flat * weights).sum()):.1e}" if flat.isfinite().all() else str(tuple(numbers.shape))
    return repr(value) if isinstance(value, (str, bytes)) else type(value).__name__
