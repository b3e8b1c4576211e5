"""Kinds of tasks that are refused by name, with the words that say so."""

from __future__ import annotations

import collections
import copy
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import BatchSampler, SequentialSampler

from tests.kinds import ROWS, Parts, cross_entropy, mlp, with_adamw
from tests.stateful_kinds import Inner, Noisy

REFUSED: dict[str, tuple[Callable[[], Parts], str]] = {}


def refused(message: str) -> Callable[[Callable[[], Parts]], Callable[[], Parts]]:
    def note(function: Callable[[], Parts]) -> Callable[[], Parts]:
        REFUSED[function.__name__] = (function, message)
        return function

    return note


@refused("model.late.bias, model.late.weight: added, taken away or replaced")
def a_layer_added_while_it_trains() -> Parts:
    class Model(Inner):
        def forward(self, x: Tensor) -> Any:
            if self.training and self.steps == 1:
                self.late = nn.Linear(6, 6)
            return super().forward(x)

    return with_adamw(Model())


@refused(r"loss.teacher.0 is a module that changes .*modules=")
def a_teacher_that_nobody_saves() -> Parts:
    class Loss:
        def __init__(self, teacher: nn.Module) -> None:
            self.teacher = [teacher]  # in a list, so that it does not count as part of the model

        def __call__(self, output: Tensor, target: Tensor) -> Tensor:
            for mean, weight in zip(self.teacher[0].parameters(), model.parameters(), strict=True):
                mean.data.lerp_(weight.data, 0.1)
            return cross_entropy(output, target)

    model = mlp()
    return with_adamw(model, loss=Loss(copy.deepcopy(model)))


@refused("model.mean.weight changes while the model is evaluated: .*self.training")
def a_mean_that_evaluation_moves() -> Parts:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.own, self.mean = nn.Linear(6, 2), nn.Linear(6, 2).requires_grad_(False)

        def forward(self, x: Tensor) -> Tensor:
            self.mean.weight.data.lerp_(self.own.weight.data, 0.1)
            return self.own(x) + self.mean(x)

    return with_adamw(Model())


@refused(r"optimizers\[0\].*is a collections.deque, which a checkpoint cannot hold")
def a_deque_in_an_optimizers_state() -> Parts:
    class Queue(torch.optim.SGD):
        def step(self, closure: Any = None) -> Any:
            self.state[self.param_groups[0]["params"][0]]["recent"] = collections.deque([1.0])
            return super().step(closure)

    model = mlp()
    return {"model": model, "optimizer": Queue(model.parameters(), lr=0.1)}


@refused(r"Wants.step.. wants a closure .*def step.self, closure.")
def an_optimizer_that_does_not_say_that_it_wants_a_closure() -> Parts:
    class Wants(torch.optim.SGD):
        def step(self, closure: Any = None) -> Any:
            closure()
            return super().step()

    model = mlp()
    return {"model": model, "optimizer": Wants(model.parameters(), lr=0.1)}


@refused("val_data.file is an open file, and 2 processes would move its one position")
def an_open_file_in_a_dataset_that_is_loaded_by_workers() -> Parts:
    class Rows(Noisy):
        def __init__(self, first: int, last: int) -> None:
            super().__init__(first, last)
            self.file = Path(__file__).open()  # noqa: SIM115

    return with_adamw(mlp(), train_data=Noisy(0, 32), val_data=Rows(32, 40), num_workers=2)


@refused("sampler is a BatchSampler: give a function")
def a_sampler_of_batches() -> Parts:
    return with_adamw(mlp(), sampler=BatchSampler(SequentialSampler(range(32)), 8, True))


@refused("must be a scalar tensor, .* got a float: return the tensor")
def a_loss_that_is_a_number() -> Parts:
    return with_adamw(mlp(), loss=lambda output, target: cross_entropy(output, target).item())


@refused("does not depend on anything that is trained")
def nothing_to_train() -> Parts:
    return with_adamw(mlp().requires_grad_(False))


@refused("is a ScriptModule, whose state cannot be put back")
def a_scripted_model() -> Parts:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return with_adamw(torch.jit.trace(mlp().eval(), ROWS[:2]))
