"""What a training loop asks of optimizers: groups that keep the ratios of their LRs, modes, closures, several of them."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer


def lr_ratios(lrs: Sequence[float | Tensor]) -> list[float]:
    """`lrs` over the first of them. Raises ValueError where that is not positive."""
    first = float(lrs[0])
    if not first > 0:
        raise ValueError(f"build the optimizer with lr > 0 in its first group, got {first}: ratios are kept to it")
    return [float(lr) / first for lr in lrs]


def note_built_lrs(groups: Iterable[dict[str, Any]]) -> list[float]:
    """The LRs that parameter groups were built with, or came with where they were added later. They are kept in the groups as
    "initial_lr", as torch's schedulers keep them. Raises ValueError where the first is not positive."""
    groups = list(groups)
    for group in groups:
        if "initial_lr" not in group:
            group["initial_lr"] = float(group["lr"])
            if isinstance(group["lr"], Tensor):  # one tensor may be the LR of several groups, and of those to come
                group["lr"] = group["lr"].clone()
        group["initial_lr"] = float(group["initial_lr"])
    lrs = [group["initial_lr"] for group in groups]
    lr_ratios(lrs[:1])
    return lrs


def set_lr(group: dict[str, Any], lr: float) -> None:
    """Write `lr` into `group`, into the tensor where it is one."""
    if isinstance(group["lr"], Tensor):
        group["lr"].fill_(lr)
    else:
        group["lr"] = lr


def write_lr(groups: Iterable[dict[str, Any]], lr: float) -> None:
    """Write `lr` into the first of `groups`, and into the others what keeps the ratios they were built with."""
    groups = list(groups)
    for group, ratio in zip(groups, lr_ratios(note_built_lrs(groups)), strict=True):
        set_lr(group, lr * ratio)


def needs_closure(optimizer: Optimizer) -> bool:
    """True if `step` cannot be called without a closure that computes the loss anew: LBFGS, and what steps twice (SAM)."""
    if all(callable(getattr(optimizer, name, None)) for name in ("first_step", "second_step")):
        return True
    step = inspect.signature(type(optimizer).step)
    closure = step.parameters.get("closure")
    return closure is not None and closure.default is inspect.Parameter.empty


def has_modes(optimizer: Optimizer) -> bool:
    """True if the weights that are trained are not those to be evaluated (schedulefree's optimizers)."""
    return callable(getattr(optimizer, "train", None)) and callable(getattr(optimizer, "eval", None))


def train_mode(optimizers: Iterable[Optimizer]) -> None:
    """Put those that have modes into that of training."""
    for optimizer in optimizers:
        if has_modes(optimizer):
            optimizer.train()  # type: ignore[attr-defined]


@contextmanager
def evaluation_mode(optimizers: Sequence[Optimizer]) -> Iterator[None]:
    """The weights are those to be evaluated; afterwards they are again those that are trained, to the last bit, which going
    there and back is not."""
    modal = [optimizer for optimizer in optimizers if has_modes(optimizer)]
    weights = [weight for optimizer in modal for weight in parameters_of([optimizer])]
    kept = [weight.detach().clone(memory_format=torch.preserve_format) for weight in weights]
    try:
        for optimizer in modal:
            optimizer.eval()  # type: ignore[attr-defined]
        yield
    finally:
        train_mode(modal)
        with torch.no_grad():
            for weight, value in zip(weights, kept, strict=True):
                weight.copy_(value)


def parameters_of(optimizers: Iterable[Optimizer]) -> list[Tensor]:
    """All parameters that `optimizers` hold, each once."""
    found = {id(p): p for optimizer in optimizers for group in optimizer.param_groups for p in group["params"]}
    return list(found.values())


def step_all(optimizers: Iterable[Optimizer], scaler: torch.amp.GradScaler | None) -> None:
    """One step of each, through `scaler` where there is one. Raises ValueError for one that turns out to want a closure."""
    for optimizer in optimizers:
        try:
            optimizer.step() if scaler is None else scaler.step(optimizer)
        except (AssertionError, TypeError, RuntimeError, ValueError) as error:
            if "closure" not in str(error) and "'NoneType' object is not callable" not in str(error):
                raise
            name = type(optimizer).__name__
            raise ValueError(
                f"{name}.step() wants a closure ({error}): say so in its signature, class Mine({name}): "
                "def step(self, closure): return super().step(closure). It is given one that computes loss and gradients anew"
            ) from error
    if scaler is not None:
        scaler.update()


def step_with_closure(optimizer: Optimizer, first: Tensor, again: Callable[[], Tensor]) -> Tensor:
    """One step of an optimizer that computes the loss several times: `first`, whose gradients are there, and `again()` once
    the weights or the gradients are others."""
    weights = parameters_of([optimizer])
    before = [(weight.detach().clone(), weight.grad, _version(weight.grad)) for weight in weights]
    calls = 0

    def closure() -> Tensor:
        nonlocal calls
        calls += 1
        if calls == 1 and all(
            weight.grad is grad and _version(grad) == version and torch.equal(weight, value)
            for weight, (value, grad, version) in zip(weights, before, strict=True)
        ):
            return first
        with torch.enable_grad():
            return again()

    optimizer.step(closure)  # type: ignore[arg-type]
    return first


def _version(tensor: Tensor | None) -> int:
    """How often `tensor` was written to."""
    return -1 if tensor is None else tensor._version
