"""Averages of weights over parts of the run so far, in any training loop."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from autolrs_ray.core.checks import require_float, require_int, require_tuple
from autolrs_ray.core.policy import finite_or_inf

logger = logging.getLogger(__name__)

STATISTICS = ("running_mean", "running_var")  # what layers of normalisation call the buffers that are statistics
T = TypeVar("T")


def lowest(losses: Sequence[float]) -> int:
    """Index of the lowest of `losses`, the first of equals; one that is not finite counts as the highest."""
    return min(range(len(losses)), key=lambda i: finite_or_inf(losses[i]))


def require_parts(name: str, parts: Any) -> tuple[float, ...]:
    """`parts` of a run, the option `name`: different ones in (0, 1]. Raises TypeError or ValueError."""
    parts = require_tuple(name, parts)
    for part in parts:
        require_float(f"each part of {name}", part, 0.0, 1.0, low_open=True)
    if not parts or len(set(parts)) < len(parts):
        raise ValueError(f"{name} must hold one or more different parts of the run, got {parts}")
    return tuple(parts)


@contextmanager
def buffers_put_back(module: nn.Module) -> Iterator[None]:
    """All buffers of `module` as they were, afterwards: also those that its forward assigns anew."""
    named = [(owner, dict(owner._buffers)) for owner in module.modules() if owner._buffers]
    written = [b for _, buffers in named for b in buffers.values() if b is not None and not expanded(b)]
    contents = [(b, b.detach().clone()) for b in written]
    try:
        yield
    finally:
        with torch.no_grad():
            for owner, buffers in named:
                owner._buffers.update(buffers)
            for buffer, content in contents:
                buffer.copy_(content)


def expanded(tensor: Tensor) -> bool:
    """True where one number in memory is several of the tensor: torch writes to none of these."""
    return any(stride == 0 and size > 1 for stride, size in zip(tensor.stride(), tensor.shape, strict=True))


@dataclass(frozen=True, eq=False)
class _Place:
    """Where a tensor that is averaged lies in the model, under all of its names: weights may be tied."""

    tensors: dict[str, Any]  # the owner's _parameters or _buffers: what lies there may be assigned anew
    attribute: str
    names: tuple[str, ...]

    @property
    def tensor(self) -> Tensor:
        tensor: Tensor = self.tensors[self.attribute]
        return tensor


class WeightAverages:
    """Averages of a model's weights, one for each part of the run so far; the one that is best on validation data counts.

        averages = WeightAverages(model)
        ...
        averages.update(step)                                       # after every optimizer step
        report = {"val_loss": validate(), **averages.evaluate(validate)}  # adds "averaged_loss"

    over: parts of the run, in (0, 1]: .25 spans about the last quarter of the steps so far, 1.0 all of them. Each costs the
    memory of the weights in float32, and a validation pass a report.

    Parameters that are trained and the running statistics of normalisation layers are averaged, in float32 or, where they are
    wider, in their own precision. All other buffers are the model's own. Frozen parameters, which are their own average,
    cost nothing; one that is thawed later joins with its value after its first step. Keep `state_dict()` in every checkpoint.

    Raises ValueError or TypeError for parts out of range.
    """

    def __init__(self, model: nn.Module, over: Sequence[float] = (0.25, 0.5, 1.0)) -> None:
        self.model, self.over = model, require_parts("over", over)
        self._best: int | None
        self.trouble: str | None = None  # why an average cannot be used, once one has been found out
        self.reset()

    # -- training ------------------------------------------------------------------------------------------------------

    def reset(self) -> None:
        """Begin anew with the weights as they are: the first update copies them."""
        self.step, self._best = 0, None
        self._places: list[_Place] = []
        self._frozen: list[_Place] = []
        self._kept: list[list[Tensor]] = [[] for _ in self.over]
        found = _places(self.model)
        self._keep([place for place in found if _trained(place)])
        self._frozen = [place for place in found if not _trained(place)]

    def _keep(self, places: list[_Place]) -> None:
        self._places = [*self._places, *places]
        for kept in self._kept:
            kept.extend(_widened(place.tensor).clone(memory_format=torch.preserve_format) for place in places)
        self._real = [[_real(tensor) for tensor in kept] for kept in self._kept]
        self._narrow = [i for i, tensor in enumerate(self._kept[0]) if tensor.dtype != self._places[i].tensor.dtype]
        self._complex = [i for i, tensor in enumerate(self._kept[0]) if tensor.is_complex()]

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Take in the weights after optimizer step number `step` of the run, counted from 1.

        average += min(1, steps since the last update / (part * step)) * (weights - average). Raises ValueError where `step`
        is not above that of the last update.
        """
        if step <= self.step:
            require_int("step", step, 1)
            raise ValueError(
                f"the averages have seen step {self.step}, got {step}: update them once after every optimizer step, and load "
                "their state where a checkpoint is loaded"
            )
        if self._frozen and (thawed := [place for place in self._frozen if _trained(place)]):
            self._frozen = [place for place in self._frozen if not _trained(place)]
            self._keep(thawed)
        new = [place.tensors[place.attribute] for place in self._places]
        if new and self._kept[0][0].device != new[0].device:  # the model was moved since
            self._kept = [[old.to(now.device) for old, now in zip(kept, new, strict=True)] for kept in self._kept]
            self._real = [[_real(tensor) for tensor in kept] for kept in self._kept]
        for i in self._narrow:
            new[i] = _widened(new[i])
        for i in self._complex:
            new[i] = torch.view_as_real(new[i])
        for part, kept in zip(self.over, self._real, strict=True):
            weight = 1.0 if self.step == 0 else min(1.0, (step - self.step) / (part * step))
            if kept:
                torch._foreach_lerp_(kept, new, weight)
        self.step, self._best = step, None

    # -- evaluation ----------------------------------------------------------------------------------------------------

    @property
    def best(self) -> int | None:
        """Index in `over` of the average that was best when these averages were last evaluated; None if they have been updated
        since, or never evaluated."""
        return self._best

    def judged(self, best: int) -> None:
        """Note that average `best` is the best of these."""
        self._best = best

    @contextmanager
    def applied(self, index: int | None = None) -> Iterator[None]:
        """The model has average `index` for weights (None: the best one's); its own are put back afterwards.

        Raises ValueError where the best is asked for and not known.
        """
        if index is None and (index := self._best) is None:
            raise ValueError("which average is best is not known: call evaluate first, or name one by its index")
        parameters = [place.tensor for place in self._places if isinstance(place.tensor, nn.Parameter)]
        own = [parameter.detach().clone(memory_format=torch.preserve_format) for parameter in parameters]
        with buffers_put_back(self.model):
            try:
                _copy([place.tensor for place in self._places], self._kept[index])
                yield
            finally:
                _copy(parameters, own)

    def keep_statistics(self, index: int) -> None:
        """Take the model's running statistics into average `index`, where they have been estimated anew for it."""
        pairs = zip(self._kept[index], (place.tensor for place in self._places), strict=True)
        for kept, now in pairs:
            if not isinstance(now, nn.Parameter):
                _copy([kept], [now])

    def statistics(self) -> list[Tensor]:
        """The running statistics of all averages."""
        own = [i for i, place in enumerate(self._places) if not isinstance(place.tensor, nn.Parameter)]
        return [kept[i] for kept in self._kept for i in own]

    def each(self, function: Callable[[], T]) -> list[T]:
        """What `function` returns with every average in the model, in the order of `over`."""
        found = []
        for index in range(len(self.over)):
            with self.applied(index):
                found.append(function())
        return found

    def evaluate(
        self, validate: Callable[[], float | Mapping[str, float]], metric: str = "val_loss", mode: str = "min"
    ) -> dict[str, float]:
        """The metrics of the average that is best, under the names that the pair looks for: "averaged_loss" for "val_loss".

        validate: () -> `metric`, or several metrics by name, of the model as it is when called. mode: "min" or "max", of
        `metric`, by which the best is chosen. Raises ValueError where `validate` does not tell `metric`.
        """
        if mode not in ("min", "max"):
            raise ValueError(f'mode must be "min" or "max", got {mode!r}')
        found = [value if isinstance(value, Mapping) else {metric: value} for value in self.each(validate)]
        if metric not in found[0]:
            raise ValueError(
                f"averages are compared by {metric!r}, which is none of {sorted(found[0])}: give its name as metric"
            )
        scores = [float(values[metric]) * (1.0 if mode == "min" else -1.0) for values in found]
        self._best = best = lowest(scores)
        self.find_trouble(scores)
        return {f"averaged_{name.removeprefix('val_')}": float(value) for name, value in found[best].items()}

    def find_trouble(self, scores: Sequence[float]) -> None:
        """Where a score is not finite, look whether weights of an average are not though the model's are; said once."""
        if self.trouble is not None or all(map(math.isfinite, scores)):
            return
        for part, kept in zip(self.over, self._kept, strict=True):
            for place, tensor in zip(self._places, kept, strict=True):
                if not bool(tensor.isfinite().all()) and bool(place.tensor.isfinite().all()):
                    self.trouble = (
                        f"the average over {part:g} of the run is not finite at step {self.step} in {place.names[0]!r}, though "
                        "the weights are: it cannot be the best before values that were not finite have left it"
                    )
                    logger.warning(self.trouble)
                    return

    # -- state ---------------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Tensors and plain values: "over", "step", "best" and "weights", for every average a dict of tensors by the names they
        have in the model's own state_dict."""
        weights = [
            {name: kept for place, kept in zip(self._places, average, strict=True) for name in place.names}
            for average in self._kept
        ]
        return {"over": list(self.over), "step": self.step, "best": self._best, "weights": weights}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Copy the averages of `state`. Raises ValueError where it is of another model or of other parts of the run."""
        if tuple(state["over"]) != self.over:
            raise ValueError(
                f"the state holds averages over {tuple(state['over'])} of the run, over={self.over} is asked for: keep "
                "average_over as it was when the run began"
            )
        weights = state["weights"]
        found = {name: place for place in _places(self.model) for name in place.names}
        unknown = sorted(set(weights[0]) - set(found))
        shapes = [name for name in weights[0] if name in found and found[name].tensor.shape != weights[0][name].shape]
        if unknown or shapes:
            raise ValueError(f"the averages are of another model: see {', '.join((unknown + shapes)[:3])}")
        places = {id(found[name]): found[name] for name in weights[0]}
        if {place.names for place in places.values()} != {place.names for place in self._places}:  # others were frozen
            self._places, self._kept = [], [[] for _ in self.over]
            self._keep(list(places.values()))
            self._frozen = [place for place in found.values() if id(place) not in places]
        for kept, average in zip(self._kept, weights, strict=True):
            _copy(kept, [average[place.names[0]] for place in self._places])
        self.step, self._best = state["step"], state["best"]


def _places(model: nn.Module) -> list[_Place]:
    """All parameters that can be averaged, and all running statistics, each once."""
    found: dict[Any, tuple[dict[str, Any], str, list[str]]] = {}
    for prefix, owner in model.named_modules(remove_duplicate=False):
        for attribute, tensor in (*owner._parameters.items(), *owner._buffers.items()):
            parameter = isinstance(tensor, nn.Parameter)
            if tensor is None or not (tensor.is_floating_point() or tensor.is_complex()):
                continue
            if parameter or attribute in STATISTICS:
                tensors = owner._parameters if parameter else owner._buffers
                name = f"{prefix}.{attribute}" if prefix else attribute
                key = id(tensor) if parameter else (id(owner), attribute)
                found.setdefault(key, (tensors, attribute, []))[2].append(name)
    return [_Place(tensors, attribute, tuple(names)) for tensors, attribute, names in found.values()]


def _trained(place: _Place) -> bool:
    return place.tensor.requires_grad or not isinstance(place.tensor, nn.Parameter)


def _widened(tensor: Tensor) -> Tensor:
    return tensor.detach().to(torch.promote_types(tensor.dtype, torch.float32))


def _real(tensor: Tensor) -> Tensor:
    return torch.view_as_real(tensor) if tensor.is_complex() else tensor


@torch.no_grad()
def _copy(targets: Sequence[Tensor], sources: Sequence[Tensor]) -> None:
    for target, source in zip(targets, sources, strict=True):
        target.copy_(source)
