"""What is trained: a model, its optimizer, its loss and its data, as the user's build function returns them."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.optim import Optimizer
from torch.utils.data import Sampler

from autolrs_ray.core.checks import require_bool, require_float, require_function, require_int
from autolrs_ray.training.averages import require_parts
from autolrs_ray.training.data import Data, Draw, checked_data, checked_sampler, length
from autolrs_ray.training.optimizers import needs_closure
from autolrs_ray.training.precision import HALF
from autolrs_ray.training.walk import open_files_in

OWN_METRICS = ("loss", "batches")
"""What a report has by itself as "val_NAME" or "averaged_NAME"."""


def accuracy(output: Tensor, target: Tensor) -> Tensor:
    """Fraction of rows of `output` (n, classes) whose largest entry is at `target` (n,)."""
    return (output.argmax(1) == target).float().mean()


@dataclass
class TrainingTask:
    """What is trained: built once per process by the user's function.

    model: called with the inputs of a batch. loss: (model output, targets) -> scalar mean over the batch; where it is an
    nn.Module its weights are saved, and trained if an optimizer has them. optimizer: one, or several, which step one after
    another; all groups keep the ratio of their LR to the first. Modes (schedulefree) and closures (LBFGS) are seen to.
    modules: by name, further modules whose state is to be saved, restored and reset with the model's.
    metrics: further (output, targets) -> scalar mean, reported on the validation data as "val_NAME".

    train_data, val_data: (inputs, targets) tensors, moved to the device, or map-style datasets, of which num_workers
    processes load rows ahead, collate_fn makes batches (torch's default_collate) and sampler draws the rows of an epoch:
    generator -> rows, with a generator of (seed, epoch), or one of torch's samplers; default: a permutation. Batches are
    pairs (inputs, targets), either a tensor or a dict, list, tuple or dataclass of them, or an object with a method `to`.
    augment: (inputs, generator) -> inputs, on the device, of the whole batch.
    val_data must not be the test set: learning rates are chosen on it. val_fraction: the part of its rows, in (0, 1], that
    reports are taken on: the same ones, drawn by the run's seed, in every trial.

    average_over: where weights are averaged, one average for each part of the run so far, in (0, 1]: 0.25 spans about its
    last quarter, 1.0 all of it. The one that is best on the validation data counts. Each costs the memory of the weights,
    and a validation pass a report. Optimizers with modes average by themselves, and have no other averages.
    clip_norm: largest norm of all gradients together, to which a larger one is scaled down; None: as they are.
    reestimate: batches on which the batch-norm statistics of averaged weights are estimated anew before they are evaluated; 0
    averages the statistics too.
    autocast: True: run forward passes in bfloat16 where the device computes in it, else as without. A dtype: run them in that;
    float16 wants a scaler (torch.amp.GradScaler).
    compile: True, or a mode of torch.compile ("reduce-overhead": CUDA graphs). sync_batch_norm: several processes that train
    one trial take batch-norm statistics over the whole batch.

    Raises TypeError or ValueError for what cannot be trained, restored or averaged as it stands.
    """

    model: nn.Module
    optimizer: Optimizer | Sequence[Optimizer]
    loss: Callable[[Any, Any], Tensor]
    train_data: Data
    val_data: Data
    batch_size: int
    eval_batch_size: int = 1024
    val_fraction: float = 1.0
    metrics: Mapping[str, Callable[[Any, Any], Any]] = field(default_factory=dict)
    augment: Callable[[Any, torch.Generator], Any] | None = None
    clip_norm: float | None = None
    average_over: tuple[float, ...] = (0.25, 0.5, 1.0)
    autocast: bool | torch.dtype = False
    channels_last: bool = False
    compile: bool | str = False
    device: torch.device | str | None = None
    modules: Mapping[str, nn.Module] = field(default_factory=dict)
    num_workers: int = 0
    collate_fn: Callable[[list[Any]], Any] | None = None
    sampler: Draw | Sampler[int] | None = None
    scaler: torch.amp.GradScaler | None = None
    sync_batch_norm: bool = False
    reestimate: int = 0

    def __post_init__(self) -> None:
        self.train_data = checked_data("train_data", self.train_data)
        self.val_data = checked_data("val_data", self.val_data)
        checked_sampler(self.sampler)
        require_int("batch_size", self.batch_size, 1)
        if length(self.train_data) < self.batch_size:
            rows = f"has {length(self.train_data)} rows" if length(self.train_data) else "is empty"
            raise ValueError(f"train_data {rows}, and batch_size is {self.batch_size}: a batch must have as many rows")
        if length(self.val_data) < 1:
            raise ValueError("val_data is empty: learning rates are chosen on it; hold out a part of the training data")
        require_int("eval_batch_size", self.eval_batch_size, 1)
        require_float("val_fraction", self.val_fraction, 0.0, 1.0, low_open=True)
        require_int("num_workers", self.num_workers, 0)
        require_int("reestimate", self.reestimate, 0)
        self.average_over = require_parts("average_over", self.average_over)
        if self.clip_norm is not None:
            require_float("clip_norm (None turns clipping off)", self.clip_norm, 0.0, math.inf, low_open=True)
        self._check_functions()
        self._check_metrics()
        self._check_modes()
        self._check_data_options()
        self._check_optimizers()

    @property
    def optimizers(self) -> tuple[Optimizer, ...]:
        """All optimizers, in the order in which they step."""
        return (self.optimizer,) if isinstance(self.optimizer, Optimizer) else tuple(self.optimizer)

    def saved_modules(self) -> dict[str, nn.Module]:
        """What has a state besides the model: a loss that is a module, and `modules`, with "also_" before their names."""
        loss = {"loss": self.loss} if isinstance(self.loss, nn.Module) else {}
        return {**loss, **{f"also_{name}": module for name, module in self.modules.items()}}

    def _check_functions(self) -> None:
        require_function("loss", self.loss)
        if self.augment is not None:
            require_function("augment (None: none)", self.augment)
        if not isinstance(self.modules, Mapping):
            raise TypeError(f'modules must be a dict, as {{"teacher": teacher}}, got {self.modules!r}')
        for name, module in (("model", self.model), *((f"modules[{name!r}]", m) for name, m in self.modules.items())):
            if not isinstance(module, nn.Module):
                raise TypeError(f"{name} must be an nn.Module, got {module!r} ({type(module).__name__})")

    def _check_modes(self) -> None:
        if not isinstance(self.autocast, bool) and self.autocast not in HALF:
            raise TypeError(f"autocast must be True, False, torch.bfloat16 or torch.float16, got {self.autocast!r}")
        if not isinstance(self.scaler, torch.amp.GradScaler | None):
            raise TypeError(f"scaler must be a torch.amp.GradScaler or None, got {self.scaler!r}")
        if not isinstance(self.compile, str):
            require_bool("compile, if it is no mode of torch.compile,", self.compile)
            return
        try:
            torch.compile(nn.Identity(), mode=self.compile)
        except RuntimeError as error:  # it names the modes
            raise ValueError(f"compile={self.compile!r} is refused by torch.compile: {error}") from error

    def _check_metrics(self) -> None:
        if not isinstance(self.metrics, Mapping):
            raise TypeError(f'metrics must be a dict, as {{"accuracy": accuracy}}, got {self.metrics!r}')
        for name, metric in self.metrics.items():
            if not isinstance(name, str) or not name:
                raise TypeError(f"each name in metrics must be a string that is not empty, got {name!r}")
            if name in OWN_METRICS:
                raise ValueError(f'metrics has {name!r}, and "val_{name}" is reported anyway: choose another name')
            require_function(f"metrics[{name!r}]", metric)

    def _check_data_options(self) -> None:
        given = [name for name in ("num_workers", "collate_fn") if getattr(self, name)]
        if given and all(isinstance(data, tuple) for data in (self.train_data, self.val_data)):
            raise ValueError(
                f"{' and '.join(given)}: of datasets, but the data are tensors, which are moved to the device"
            )
        data = {"train_data": self.train_data, "val_data": self.val_data}
        if self.num_workers and (files := open_files_in(data)):
            raise ValueError(
                f"{files[0]} is an open file, and {self.num_workers} processes would move its one position: open it in "
                "__getitem__ when it is first needed, so that each has its own, or use num_workers=0"
            )

    def _check_optimizers(self) -> None:
        if isinstance(self.model, torch.jit.ScriptModule):
            raise TypeError(
                "the model is a ScriptModule, whose state cannot be put back: give the module itself, and compile=True"
            )
        optimizers = self.optimizers
        if not optimizers or not all(isinstance(optimizer, Optimizer) for optimizer in optimizers):
            raise TypeError(f"optimizer must be a torch optimizer, or several of them, got {self.optimizer!r}")
        closures = [type(optimizer).__name__ for optimizer in optimizers if needs_closure(optimizer)]
        if closures and (len(optimizers) > 1 or self.scaler is not None):
            raise ValueError(
                f"{closures[0]} computes the loss several times a step: use it alone, and without a scaler"
            )
        if self.autocast is torch.float16 and self.scaler is None:
            raise ValueError(
                "autocast=torch.float16 wants scaler=torch.amp.GradScaler(...): small gradients would become 0"
            )
        modules = {"model": self.model, **self.saved_modules()}
        saved = {id(p): f"{name}.{path}" for name, module in modules.items() for path, p in module.named_parameters()}
        lazy = [saved[id(p)] for module in modules.values() for p in module.parameters() if is_lazy(p)]
        if lazy:
            raise ValueError(f"{lazy[0]} has no shape yet: give the model a batch before the optimizer is built")
        for group, parameters in enumerate(group["params"] for o in optimizers for group in o.param_groups):
            for parameter in parameters:
                if id(parameter) not in saved:
                    raise ValueError(
                        f"a parameter of shape {tuple(parameter.shape)} in group {group} of the optimizer belongs neither to "
                        "the model nor to a loss that is an nn.Module, so no checkpoint would hold it: pass the module it is "
                        'of as modules={"name": module}, and build the optimizer after the modules'
                    )
