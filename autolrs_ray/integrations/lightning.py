"""A LightningModule as a trainable of the pair: `fit(trainer, module, config, ...)` inside a function of `config`."""

from __future__ import annotations

import math
import os
import sys
import tempfile
import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from operator import mul
from typing import Any

from ray import tune
from torch.utils.data import IterableDataset

from autolrs_ray.integrations import missing, stopped
from autolrs_ray.integrations.follower import Follower
from autolrs_ray.training.averages import WeightAverages

try:
    from lightning.pytorch import Callback, LightningModule, Trainer, seed_everything
    from lightning.pytorch.callbacks import (
        BatchSizeFinder,
        EarlyStopping,
        LearningRateFinder,
        ModelSummary,
        ProgressBar,
        StochasticWeightAveraging,
    )
except ModuleNotFoundError as error:
    raise missing(error, "lightning") from error

FILE = "trainer.ckpt"
_REFUSED = {
    EarlyStopping: "AutoLRS decides which trials stop, and the winner trains to the end",
    StochasticWeightAveraging: "it sets learning rates of its own; average_over of fit averages without",
    LearningRateFinder: "it sets the learning rate, which is searched here; lr_range_test can be run before",
    BatchSizeFinder: "trials would train with batches of different sizes, and could not be compared",
}
NEVER = sys.maxsize


class AutoLRSCallback(Callback):  # type: ignore[misc]
    """Writes the LR right before every optimizer step, has Lightning validate where the pair wants a report, and reports.

    A report holds every scalar the module has logged, train_loss (mean since the last report), step (optimizer steps:
    `trainer.global_step`), epoch (passes over the training data) and val_batches, where loaders tell them, lr, stage and role.
    Checkpoints are Lightning's own, attached where they are needed.

    Raises ValueError where there is no validation data, or another number of optimizers than one.
    """

    def __init__(
        self,
        config: Mapping[str, Any],
        averages: WeightAverages | None = None,
        metric: str = "val_loss",
        mode: str = "min",
    ) -> None:
        self.follower, self.averages, self._metric, self._mode = Follower(config), averages, metric, mode
        self._averaged: dict[str, float] = {}
        self._seed = int(config.get("seed", 0))
        self._step, self._due = 0, False
        self._loss, self._count = 0.0, 0

    def state_dict(self) -> dict[str, Any]:
        return {} if self.averages is None else self.averages.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        if self.averages is not None:
            self.averages.load_state_dict(state_dict)

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Seed by the step too: Lightning restores no random numbers, and with the seed alone every restored segment would
        begin with the first epoch's batches. Trials from one checkpoint still see the same ones."""
        seed_everything((self._seed + checkpoint["global_step"]) % 2**32, verbose=False)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not trainer.enable_validation:
            raise ValueError(
                "learning rates are chosen on validation data: give fit() val_dataloaders (or a datamodule that has them) "
                "and the module a validation_step that logs the metric"
            )
        if not any(optimizer.param_groups for optimizer in trainer.optimizers):
            raise ValueError("there is no optimizer to write learning rates into: configure_optimizers returned none")
        if len(trainer.optimizers) != 1:
            raise ValueError(
                f"one optimizer is supported, got {len(trainer.optimizers)}: global_step counts the steps of all"
            )
        for schedule in trainer.lr_scheduler_configs:
            schedule.strict = False  # one that waits for a metric has no say: validation comes where the pair wants it
        self._step = trainer.global_step
        loader = trainer.train_dataloader
        if (
            self._step
            and isinstance(getattr(loader, "dataset", None), IterableDataset)
            and not hasattr(loader, "state_dict")
        ):
            warnings.warn(
                f"restored at step {self._step}, and the training data are a stream, which begins anew: what comes late in it "
                "is never seen. Give fit() a loader with state_dict() and load_state_dict() that keeps its place",
                stacklevel=2,
            )
        trainer.check_val_every_n_epoch, trainer.val_check_batch = None, NEVER
        if self.averages is not None:
            validation = trainer.fit_loop.epoch_loop.val_loop
            validation.run = partial(self._validate, trainer, validation.run)

    def _validate(self, trainer: Trainer, run: Callable[[], Any]) -> Any:
        """Validate all averages where a report is due, before the raw weights, with which all that is logged ends."""
        if self._due and self.averages is not None:
            self._due = False
            self._averaged = self.averages.evaluate(partial(self._validated, trainer, run), self._metric, self._mode)
            self._due = True
        return run()

    def _validated(self, trainer: Trainer, run: Callable[[], Any]) -> dict[str, float]:
        run()
        return {name: float(value) for name, value in trainer.callback_metrics.items() if name.startswith("val_")}

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Callbacks that unfreeze a part of the model give it a share of the LR they find, at the start of an epoch."""
        self.follower.write_built_lrs(trainer.optimizers[0])

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """A LearningRateMonitor reads it now."""
        self.follower.write_lr(trainer.optimizers[0], trainer.global_step)

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Any) -> None:
        self.follower.write_lr(optimizer, trainer.global_step)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        loss = outputs.get("loss") if isinstance(outputs, Mapping) else outputs
        if loss is not None:  # a skipped batch has none, nor has manual optimization that returns none
            parts = trainer.accumulate_grad_batches  # Lightning has divided the loss by it
            self._loss, self._count = self._loss + loss.detach() * parts, self._count + 1
        before, self._step = self._step, trainer.global_step
        if self.averages is not None and self._step > before:
            self.averages.update(self._step)
        missed = [step for step in range(before + 1, self._step) if self.follower.report_due(step)]
        if missed:
            raise RuntimeError(
                f"a report was due after step {missed[0]}, inside of one batch: this training_step makes "
                f"{self._step - before} optimizer steps; make one per batch"
            )
        self._due = self._step > before and self.follower.report_due(self._step)
        end = self.follower.end
        trainer.should_stop = trainer.should_stop or (end is not None and self._step >= end)
        trainer.val_check_batch = 1 if self._due else NEVER

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.sanity_checking or not self._due:
            return
        metrics = {name: float(value) for name, value in trainer.callback_metrics.items()} | self._averaged
        if self._count:
            metrics["train_loss"] = float(self._loss) / self._count
        self._due, self._loss, self._count = False, 0.0, 0
        if math.isfinite(trainer.num_training_batches):
            metrics["epoch"] = self._step / math.ceil(trainer.num_training_batches / trainer.accumulate_grad_batches)
        metrics |= _val_batches(trainer)
        report = self.follower.report(self._step, metrics)
        if not self.follower.checkpoint_due(self._step):
            tune.report(report)
            return
        with tempfile.TemporaryDirectory(prefix="autolrs-") as folder:
            trainer.save_checkpoint(os.path.join(folder, FILE), weights_only=False)
            tune.report(report, checkpoint=tune.Checkpoint.from_directory(folder))


def _val_batches(trainer: Trainer) -> dict[str, float]:
    """The rows that it validates on, in batches of a training step, as a report has them; none where loaders do not tell."""
    loaders = trainer.val_dataloaders if isinstance(trainer.val_dataloaders, list) else [trainer.val_dataloaders]
    *sizes, size = (getattr(loader, "batch_size", None) for loader in (*loaders, trainer.train_dataloader))
    if size is None or None in sizes or len(sizes) != len(trainer.num_val_batches):
        return {}
    rows = sum(map(mul, trainer.num_val_batches, sizes))
    return {"val_batches": rows / (size * trainer.accumulate_grad_batches)} if math.isfinite(rows) else {}


def fit(
    trainer: Trainer,
    module: LightningModule,
    config: Mapping[str, Any],
    average_over: Sequence[float] = (),
    metric: str = "val_loss",
    mode: str = "min",
    **data: Any,
) -> None:
    """Train `module` as `config` says, from the trial's checkpoint where there is one, with the LRs of the pair.

    average_over: keep averages of the weights over these parts of the run, (0.25, 0.5, 1.0) say, as WeightAverages does, and
    report the metrics of the best, by `metric` and `mode` ("min" or "max"), beside those of the raw weights. Validation then
    runs once more for each.
    data: what `trainer.fit` takes (train_dataloaders, val_dataloaders, datamodule). Under the pair the trial's segment
    decides how far training goes. The trainer's own max_epochs and validation interval are not used, and its max_steps are
    those of the whole run, for schedulers and whatever else asks for them. Build the trainer with `logger=False,
    enable_checkpointing=False`: Tune keeps reports and checkpoints. They are loaded with `weights_only=True`; a module that
    saves objects of other kinds needs `weights_only=False` here, which executes what they hold.

    Raises ValueError where there is no validation data, none or more than one optimizer, or a callback that stops trials, sets
    learning rates or changes the batch; RuntimeError where something else stops the training.
    """
    for kind, why in _REFUSED.items():
        if any(isinstance(callback, kind) for callback in trainer.callbacks):
            raise ValueError(f"{kind.__name__} is not possible here: {why}; leave it out of the Trainer's callbacks")
    if trainer.barebones:
        raise ValueError("barebones=True is not possible here: nothing is logged then, and the metric has to be")
    own = [other for other in trainer.callbacks if not isinstance(other, (ProgressBar, ModelSummary))]
    averages = WeightAverages(module, average_over) if average_over else None
    callback = AutoLRSCallback(config, averages, metric, mode)
    trainer.callbacks.insert(0, callback)
    end = callback.follower.end
    if end is not None:
        loop = trainer.fit_loop
        loop.max_epochs = loop.epoch_loop.max_steps = callback.follower.total_steps  # an epoch has a step, or more
        loop.min_epochs = loop.epoch_loop.min_steps = None
    checkpoint = tune.get_checkpoint()
    with ExitStack() as stack:
        folder = stack.enter_context(checkpoint.as_directory()) if checkpoint else None
        path = os.path.join(folder, FILE) if folder else None
        trainer.fit(module, ckpt_path=path, **{"weights_only": True, **data})
    if end is not None and trainer.global_step < end:
        raise stopped(trainer.global_step, end, own, "max_time does, or the training data are empty")
