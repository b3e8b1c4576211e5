"""Data sets, workers, samplers and random numbers: the batch of a step is a function of (seed, step), whoever loads it."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, IterableDataset, TensorDataset

from autolrs_ray import Trainer, TrainingTask
from autolrs_ray.training.data import held_out
from tests.trainings import assert_same

X = torch.randn(80, 6, generator=torch.Generator().manual_seed(5))
Y = (X[:, 0] > 0).long()


class Noisy(Dataset[Any]):
    """Draws from all three generators that everybody uses."""

    def __init__(self, first: int, last: int) -> None:
        self.rows = range(first, last)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, row: int) -> tuple[Tensor, Tensor]:
        noise = random.random() + np.random.rand() + torch.rand(())
        return X[self.rows[row]] + 0.1 * noise, Y[self.rows[row]]


def task(**changes: Any) -> TrainingTask:
    model = changes.pop("model", None) or nn.Linear(6, 2)
    given = dict(loss=nn.functional.cross_entropy, train_data=Noisy(0, 64), val_data=Noisy(64, 80), batch_size=10)
    return TrainingTask(model, torch.optim.SGD(model.parameters(), lr=0.1), **{**given, **changes})


@pytest.mark.parametrize("workers", [0, 2])
def test_random_numbers_of_rows_do_not_depend_on_who_loads_them_or_when(workers: int) -> None:
    plain, loaded = Trainer(lambda: task(), 3), Trainer(lambda: task(num_workers=workers), 3)
    for until in (4, 9, 14):  # 6 steps are an epoch
        random.seed(workers)
        np.random.seed(workers)
        torch.manual_seed(workers)
        loaded.train(until, lambda step: 0.1)
        assert loaded.evaluate() == loaded.evaluate()
    plain.train(14, lambda step: 0.1)
    assert_same(loaded.state_dict(), plain.state_dict())
    assert torch.equal(loaded.batch(8)[0], plain.batch(8)[0])  # in the middle of an epoch, and back
    assert torch.equal(loaded.batch(2)[0], plain.batch(2)[0])
    assert not torch.equal(plain.batch(2)[0], Trainer(lambda: task(), 4).batch(2)[0])
    loaded.close()


def test_a_model_that_draws_from_pythons_and_numpys_generators_goes_on_as_it_would_have() -> None:
    class Jittered(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x + random.random() + float(np.random.rand()))

    whole, parts = (Trainer(lambda: task(model=Jittered(6, 2)), 1) for _ in range(2))
    whole.train(8, lambda step: 0.1)
    for until in (3, 8):
        random.seed(0)
        np.random.seed(0)
        parts.train(until, lambda step: 0.1)
    assert_same(parts.state_dict(), whole.state_dict())


def test_build_runs_under_the_same_seeds_of_all_generators() -> None:
    def build() -> TrainingTask:
        rows = np.random.permutation(80)
        random.shuffle(rows.tolist())
        return task(train_data=(X[rows[:64]], Y[rows[:64]]), val_data=(X[rows[64:]], Y[rows[64:]]))

    one = Trainer(build, 7)
    np.random.seed(1)
    random.seed(1)
    two = Trainer(build, 7)
    assert_same(one.state_dict(), two.state_dict())
    with pytest.raises(ValueError, match="judged on another validation set"):
        Trainer(build, 8).load_state_dict(one.state_dict())


def test_validation_sets_are_told_apart_but_not_by_their_last_digit() -> None:
    found = held_out((X, Y), 0)
    assert held_out((X * (1 + 1e-7), Y), 0) == found
    assert held_out(TensorDataset(X, Y), 0) == found
    others = [(X[torch.randperm(80, generator=torch.Generator().manual_seed(seed))], Y) for seed in range(20)]
    assert len({found, *(held_out(other, 0) for other in others)}) == 21
    assert held_out((X[:79], Y[:79]), 0) != found


def test_dicts_tuples_collate_functions_and_samplers() -> None:
    class Rows(Dataset[Any]):
        def __len__(self) -> int:
            return 64

        def __getitem__(self, row: int) -> dict[str, Any]:
            return {"x": X[row], "y": Y[row], "row": row}

    class Named(nn.Linear):
        def forward(self, inputs: dict[str, Any]) -> dict[str, Tensor]:
            return {"logits": super().forward(inputs["x"][0])}

    def collate(rows: list[dict[str, Any]]) -> Any:
        x = torch.stack([row["x"] for row in rows])
        return {"x": (x, x), "row": torch.tensor([row["row"] for row in rows])}, [
            torch.stack([row["y"] for row in rows])
        ]

    def loss(output: dict[str, Tensor], targets: list[Tensor]) -> Tensor:
        return nn.functional.cross_entropy(output["logits"], targets[0])

    def weighted(generator: torch.Generator) -> Tensor:
        return torch.multinomial((torch.arange(64) < 8).float(), 30, replacement=True, generator=generator)

    def build() -> TrainingTask:
        return task(
            model=Named(6, 2), train_data=Rows(), val_data=Rows(), loss=loss, collate_fn=collate, sampler=weighted
        )

    trainer = Trainer(build, 0, averaging=True)
    assert trainer.steps_per_epoch == 3
    drawn = [trainer.batch(step)[0]["row"] for step in range(6)]
    assert max(int(rows.max()) for rows in drawn) < 8
    assert not torch.equal(torch.stack(drawn[:3]), torch.stack(drawn[3:]))
    trainer.train(20, lambda step: 0.3)
    assert trainer.evaluate(averaged=True)["loss"] < 0.7
    with pytest.raises(
        TypeError, match=r"must be a pair .inputs, targets., got a dict of \['x', 'y', 'row'\]: give.*collate_fn"
    ):
        Trainer(lambda: task(train_data=Rows())).train(1, lambda step: 0.1)
    with pytest.raises(TypeError, match=r"must be a pair .*, got a list of 3"):
        Trainer(lambda: task(train_data=TensorDataset(X, X, Y))).train(1, lambda step: 0.1)
    with pytest.raises(ValueError, match="the sampler draws 30 rows an epoch, batch_size is 31"):
        Trainer(lambda: task(sampler=weighted, batch_size=31))


class Stream(IterableDataset[Any]):
    def __iter__(self) -> Any:
        return iter(zip(X, Y, strict=True))


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"train_data": Stream()}, TypeError, "train_data is an IterableDataset .Stream.: the batch of a step must be"),
        ({"train_data": DataLoader(TensorDataset(X, Y))}, TypeError, "train_data is a DataLoader: give its dataset"),
        ({"train_data": [X, Y]}, TypeError, "train_data is a list of 2 arrays: give a tuple"),
        (
            {"val_data": (X, Y, Y)},
            TypeError,
            "val_data must be a pair .* got a tuple of .'Tensor', 'Tensor', 'Tensor'.",
        ),
        ({"train_data": (X, Y[:70])}, ValueError, "train_data has 80 inputs and 70 targets"),
        ({"val_data": iter([])}, TypeError, "val_data must be a pair of tensors or a map-style dataset"),
        ({"train_data": (X, Y), "val_data": (X, Y), "num_workers": 2}, ValueError, "num_workers: of datasets"),
        ({"num_workers": -1}, ValueError, "num_workers must be at least 0"),
        ({"autocast": torch.float16}, ValueError, "float16 wants scaler"),
    ],
)
def test_data_and_options_that_do_not_fit_are_told_when_the_task_is_built(
    changes: dict[str, Any], error: type, message: str
) -> None:
    with pytest.raises(error, match=message):
        task(**changes)


def test_numpy_arrays_are_tensors() -> None:
    trainer = Trainer(lambda: task(train_data=(X.numpy(), Y.numpy()), val_data=(X.numpy(), Y.numpy())))
    trainer.train(3, lambda step: 0.1)
    assert trainer.evaluate()["loss"] > 0


def test_what_trains_but_is_saved_nowhere_is_told_when_the_task_is_built() -> None:
    model, head = nn.Linear(6, 2), nn.Linear(2, 2)
    optimizer = torch.optim.SGD([*model.parameters(), *head.parameters()], lr=0.1)
    given = (nn.functional.cross_entropy, (X, Y), (X, Y), 10)
    with pytest.raises(ValueError, match=r"shape \(2, 2\) in group 0 of the optimizer belongs neither.*modules="):
        TrainingTask(model, optimizer, *given)
    assert TrainingTask(model, optimizer, *given, modules={"head": head}).saved_modules() == {"also_head": head}
    lazy = nn.LazyLinear(2)
    with pytest.raises(ValueError, match="weight has no shape yet"):
        TrainingTask(lazy, torch.optim.SGD(lazy.parameters(), lr=0.1), *given)


def test_state_that_a_checkpoint_cannot_hold_is_told_at_the_first_save() -> None:
    class Odd(nn.Linear):
        def get_extra_state(self) -> Any:
            return {"array": np.zeros(3)}

        def set_extra_state(self, state: Any) -> None:
            pass

    with pytest.raises(
        TypeError, match=r"model\['_extra_state'\]\['array'\] is a numpy.ndarray, which a checkpoint cannot hold"
    ):
        Trainer(lambda: task(model=Odd(6, 2)))
