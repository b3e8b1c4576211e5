"""Kinds of tasks whose state lies in attributes, closures, hooks and generators of their own."""

from __future__ import annotations

import collections
import random
import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import ConcatDataset, Dataset, Subset, WeightedRandomSampler

from tests.kinds import CLASSES, ROWS, Parts, cross_entropy, mlp, with_adamw

STATEFUL: dict[str, Callable[[], Parts]] = {}


def stateful(function: Callable[[], Parts]) -> Callable[[], Parts]:
    STATEFUL[function.__name__] = function
    return function


class Inner(nn.Module):
    """An mlp, whose forward the kinds below change."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = mlp()
        self.register_buffer("steps", torch.zeros((), dtype=torch.long))

    def forward(self, x: Tensor) -> Any:
        if self.training:
            self.steps += 1
        return self.inner(x)


# -- attributes --------------------------------------------------------------------------------------------------------


@stateful
def counters_arrays_and_lists_in_attributes() -> Parts:
    class Model(Inner):
        def __init__(self) -> None:
            super().__init__()
            self.calls, self.scale, self.array = 0, np.float32(1.0), np.zeros(3)
            self.lock, self.twice, self.me = threading.Lock(), (lambda x: 2 * x), [self]
            self.recent: Any = collections.deque([1.0], maxlen=2)
            self.seen: Any = {1}
            self.of_weights: Any = dict.fromkeys(self.inner.parameters(), 0)

        def forward(self, x: Tensor) -> Any:
            self.calls, self.scale = self.calls + 1, self.scale * np.float32(1.01)
            self.array[0] += 1
            self.recent.append(float(self.calls))
            self.seen.add(self.calls % 3)
            self.of_weights[self.inner[0].weight] += 1
            self.late = x.detach().mean()  # did not exist at the start
            with self.lock:
                factor = sum(self.recent) + self.scale + self.array[0] + len(self.seen) + max(self.of_weights.values())
                return self.twice(self.inner(x)) * float(factor)

    return with_adamw(Model())


@stateful
def hidden_state_carried_from_step_to_step() -> Parts:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.cell, self.head = nn.GRUCell(6, 5), nn.Linear(5, 2)
            self.hidden: Any = None

        def forward(self, x: Tensor) -> Tensor:
            hidden = self.cell(x, torch.zeros(len(x), 5) if self.hidden is None else self.hidden)
            self.hidden = hidden.detach()
            return self.head(hidden)

    return with_adamw(Model(), eval_batch_size=8)


@stateful
def weights_set_from_the_first_batch() -> Parts:
    class Model(Inner):
        def __init__(self) -> None:
            super().__init__()
            self.centre, self.known = nn.Parameter(torch.zeros(6)), False

        def forward(self, x: Tensor) -> Any:
            if self.training and not self.known:
                with torch.no_grad():
                    self.centre.copy_(x.mean(0))
                self.known = True
            return self.inner(x - self.centre)

    return with_adamw(Model())


@stateful
def a_queue_and_its_place() -> Parts:
    class Model(Inner):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("queue", torch.randn(16, 2))
            self.register_buffer("spread", torch.ones(1, 2).expand(3, 2))
            self.place = 0

        def forward(self, x: Tensor) -> Any:
            output = self.inner(x)
            if self.training:
                self.queue[self.place : self.place + len(x)] = output.detach()
                self.place = (self.place + len(x)) % 16
            return output + self.queue.mean(0) * self.spread[0]

    return with_adamw(Model())


@stateful
def a_schedule_of_their_own_in_an_object() -> Parts:
    class Annealed:
        def __init__(self) -> None:
            self.step = 0

        def __call__(self) -> float:
            self.step += 1
            return 1.0 / self.step

    class Loss:
        def __init__(self) -> None:
            self.weight, self.mean = Annealed(), None

        def __call__(self, output: Tensor, target: Tensor) -> Tensor:
            loss = cross_entropy(output, target)
            self.mean = loss.detach() if self.mean is None else 0.9 * self.mean + 0.1 * loss.detach()
            return loss / self.mean * (1.0 + self.weight())

    return with_adamw(mlp(), loss=Loss())


@stateful
def a_closure_that_counts() -> Parts:
    state, calls = {"steps": 0}, 0

    def loss(output: Tensor, target: Tensor, seen: list[int] = []) -> Tensor:  # noqa: B006
        nonlocal calls
        calls += 1
        state["steps"] += 1
        seen.append(calls)
        return cross_entropy(output, target) * (1.0 + 0.1 * state["steps"] + 0.1 * calls + 0.1 * len(seen))

    return with_adamw(mlp(), loss=loss)


@stateful
def hooks_that_remember() -> Parts:
    model, found = mlp(), {"calls": 0}

    def hook(module: nn.Module, given: Any, output: Tensor) -> Tensor:
        found["calls"] += 1
        return output * (1.0 + 0.01 * found["calls"])

    model[0].register_forward_hook(hook)
    model[0].weight.register_hook(lambda gradient: 0.5 * gradient)
    return with_adamw(model)


@stateful
def metrics_with_a_running_count() -> Parts:
    class Running:
        right = rows = 0

        def __call__(self, output: Tensor, target: Tensor) -> float:
            self.right += int((output.argmax(1) == target).sum())
            self.rows += len(target)
            return self.right / self.rows

    return with_adamw(mlp(), metrics={"running": Running()}, eval_batch_size=3)


# -- optimizers --------------------------------------------------------------------------------------------------------


class Remembers(torch.optim.SGD):
    """SGD whose steps depend on attributes."""

    def __init__(self, parameters: Any, lr: float) -> None:
        super().__init__(parameters, lr=lr, momentum=0.9)
        self.steps, self.norms, self.total = 0, collections.deque([1.0], maxlen=3), np.zeros(2)

    def step(self, closure: Any = None) -> Any:
        weights = self.param_groups[0]["params"]
        self.steps += 1
        self.norms.append(float(weights[0].grad.norm()))
        self.total += self.norms[-1]
        for weight in weights:
            weight.grad /= self.steps + sum(self.norms) + self.total[0]
        return super().step(closure)


@stateful
def an_optimizer_with_attributes() -> Parts:
    model = mlp()
    return {"model": model, "optimizer": Remembers(model.parameters(), 0.1)}


class SAM(torch.optim.Optimizer):
    """Sharpness-aware minimisation (Foret et al., 2021) with an optimizer inside that shares its groups."""

    def __init__(self, parameters: Any, lr: float, rho: float = 0.05) -> None:
        super().__init__(parameters, {"lr": lr, "rho": rho})
        self.inside = torch.optim.SGD(self.param_groups, lr=lr, momentum=0.9)
        self.param_groups = self.inside.param_groups

    @torch.no_grad()
    def first_step(self) -> None:
        weights = self.param_groups[0]["params"]
        norm = torch.stack([weight.grad.norm() for weight in weights]).norm()
        for weight in weights:
            self.state[weight]["before"] = weight.clone()
            weight.add_(weight.grad, alpha=self.param_groups[0]["rho"] / float(norm))
        self.zero_grad()

    @torch.no_grad()
    def second_step(self) -> None:
        for weight in self.param_groups[0]["params"]:
            weight.copy_(self.state[weight]["before"])
        self.inside.step()

    def step(self, closure: Any = None) -> None:
        assert closure is not None
        self.first_step()
        with torch.enable_grad():
            closure()
        self.second_step()


class ClosureSAM(SAM):
    def step(self, closure: Any) -> None:
        super().step(closure)


@stateful
def sam() -> Parts:
    model = mlp()
    return {"model": model, "optimizer": SAM(model.parameters(), 0.1)}


@stateful
def sam_with_the_closure_in_its_signature() -> Parts:
    model = mlp()
    return {"model": model, "optimizer": ClosureSAM(model.parameters(), 0.1)}


class Lookahead(torch.optim.Optimizer):
    """Zhang et al., 2019, as it is usually written: a wrapper that has its inner optimizer's groups and state for its own."""

    def __init__(self, inner: torch.optim.Optimizer) -> None:
        super().__init__([weight for group in inner.param_groups for weight in group["params"]], dict(inner.defaults))
        self.inner, self.count = inner, 0
        self.param_groups, self.state = inner.param_groups, inner.state
        self.slow = [weight.detach().clone() for weight in self.param_groups[0]["params"]]

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        self.inner.step()
        self.count += 1
        for weight, slow in zip(self.param_groups[0]["params"], self.slow, strict=True):
            if self.count % 2 == 0:
                weight.copy_(slow.lerp_(weight, 0.5))


@stateful
def lookahead() -> Parts:
    model = mlp()
    return {"model": model, "optimizer": Lookahead(torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9))}


@stateful
def a_group_added_while_it_trains() -> Parts:
    class Model(Inner):
        def forward(self, x: Tensor) -> Any:
            output = super().forward(x)
            if self.training and self.steps == 2:
                self.inner[3].requires_grad_(True)
                optimizer.add_param_group({"params": list(self.inner[3].parameters()), "lr": 0.05})
            return output

    model = Model()
    model.inner[3].requires_grad_(False)
    optimizer = torch.optim.SGD(model.inner[0].parameters(), lr=0.1, momentum=0.9)
    return {"model": model, "optimizer": optimizer}


@stateful
def a_scheduler_of_the_momentum_in_a_hook() -> Parts:
    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.1, total_steps=30)
    optimizer.register_step_post_hook(lambda *args: scheduler.step())
    return {"model": model, "optimizer": optimizer}


# -- data and generators -----------------------------------------------------------------------------------------------


class Noisy(Dataset[Any]):
    """Draws from generators of its own, one of which a transform holds."""

    def __init__(self, first: int, last: int) -> None:
        self.rows, self.torch, self.python = range(first, last), torch.Generator().manual_seed(1), random.Random(3)
        self.old, self.transforms = np.random.RandomState(2), [Shift()]

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, row: int) -> Any:
        noise = torch.randn(6, generator=self.torch) + self.python.random() + self.old.rand()
        return self.transforms[0](ROWS[self.rows[row]] + 0.1 * noise), CLASSES[self.rows[row]]


class Shift:
    def __init__(self) -> None:
        self.rng = np.random.default_rng(0)

    def __call__(self, x: Tensor) -> Tensor:
        return x + float(self.rng.normal())


@stateful
def generators_in_datasets_and_a_sampler_of_torchs() -> Parts:
    train = Subset(ConcatDataset([Noisy(0, 20), Noisy(20, 32)]), range(30))
    sampler = WeightedRandomSampler([1.0] * 30, 24)
    return with_adamw(mlp(), train_data=train, val_data=Noisy(32, 40), sampler=sampler)


@stateful
def generators_in_model_and_augmentation() -> Parts:
    class Model(Inner):
        def __init__(self) -> None:
            super().__init__()
            self.generator = torch.Generator().manual_seed(7)

        def forward(self, x: Tensor) -> Any:  # draws while it is evaluated, too
            return self.inner(x + torch.randn(x.shape, generator=self.generator) + 0.1 * torch.rand(()))

    def augment(x: Tensor, generator: torch.Generator) -> Tensor:
        return x + float(rng.normal()) + random.random()

    rng = np.random.default_rng(3)
    return with_adamw(Model(), augment=augment)


@dataclass
class Output:
    logits: Tensor
    further: Any = None


class Named(collections.UserDict[str, Any]):
    """As a tokenizer returns it: its items are attributes."""

    def __getattr__(self, name: str) -> Any:
        if name == "data":
            raise AttributeError(name)
        return self.data[name]


@stateful
def batches_and_outputs_with_attributes() -> Parts:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = mlp()

        def forward(self, batch: Any) -> Output:
            assert batch.names[0].startswith("row")
            return Output(self.inner(batch.x))

    class Rows(Noisy):
        def __getitem__(self, row: int) -> Any:
            return ROWS[row], CLASSES[row], f"row {row}"

    def collate(rows: list[Any]) -> Any:
        x, y, names = zip(*rows, strict=True)
        return Named(x=torch.stack(x), names=names), torch.stack(y)

    def loss(output: Output, target: Tensor) -> Tensor:
        assert output.logits.dtype in (torch.float32, torch.bfloat16)
        return cross_entropy(output.logits, target)

    return with_adamw(
        Model(), train_data=Rows(0, 32), val_data=Rows(0, 8), collate_fn=collate, loss=loss, autocast=torch.bfloat16
    )
