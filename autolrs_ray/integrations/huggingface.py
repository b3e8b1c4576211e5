"""A Hugging Face Trainer as a trainable of the pair: `fit(trainer, config)` inside a function of `config`."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Mapping, Sequence, Sized
from contextlib import ExitStack
from typing import Any

import torch
from ray import tune

from autolrs_ray.integrations import missing, stopped
from autolrs_ray.integrations.follower import Follower
from autolrs_ray.training.averages import WeightAverages

try:
    from transformers import EarlyStoppingCallback, Trainer, TrainerCallback
except ModuleNotFoundError as error:
    raise missing(error, "huggingface") from error

AVERAGES = "averages.pt"
_REFUSED = {
    "load_best_model_at_end": "what a run leaves is the state at its end, which the learning rates were chosen for",
    "save_only_model": "trials go on from checkpoints, which must hold the optimizer too",
    "push_to_hub": "every trial would push its checkpoints; push the final one, result.checkpoint, after the run",
    "auto_find_batch_size": "trials would train with batches of different sizes, and could not be compared",
}


class AutoLRSCallback(TrainerCallback):  # type: ignore[misc]
    """Writes the LR right before every optimizer step, has the Trainer evaluate where the pair wants a report, and reports.

    A report holds the metrics of all evaluation sets, eval_NAME as val_NAME, train_loss (mean since the last log), step
    (`state.global_step`), epoch, val_batches (rows of the evaluation set, where there is one, in training batches), lr, stage
    and role. Checkpoints are the Trainer's own, attached where needed.
    It comes before the Trainer's other callbacks, so that their log has the LR in use. What these evaluate or save besides is
    no report.
    """

    def __init__(self, config: Mapping[str, Any], sets: int = 1, averaged: Averaged | None = None) -> None:
        self.follower, self.averaged = Follower(config), averaged
        self._sets, self._awaited, self._logged, self._to_save = sets, 0, False, False
        self._metrics: dict[str, float] = {}

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        if self.averaged is not None:
            self.averaged.begin(model)

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, optimizer: Any = None, **kwargs: Any) -> None:
        self.follower.write_lr(optimizer, state.global_step)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        due, end = self.follower.report_due(state.global_step), self.follower.end
        if self.averaged is not None:
            self.averaged.weights.update(state.global_step)
        self._awaited, self._logged = self._sets if due else 0, False
        self._to_save = due and self.follower.checkpoint_due(state.global_step)
        control.should_evaluate = control.should_evaluate or due
        control.should_save = control.should_save or self._to_save
        control.should_log = control.should_log or due
        control.should_training_stop = control.should_training_stop or (end is not None and state.global_step >= end)

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float] | None = None, **kwargs: Any) -> None:
        if logs and "loss" in logs:
            self._metrics["train_loss"] = float(logs["loss"])
            self._logged = True
        elif self._awaited and not self._logged:  # a callback's own evaluation, before the Trainer's turn
            control.should_log = True
        for line in (logs, state.log_history[-1] if state.log_history else None):
            if line and "learning_rate" in line:
                line["learning_rate"] = self.follower.lr_at(max(0, state.global_step - 1))

    def on_evaluate(
        self, args: Any, state: Any, control: Any, metrics: dict[str, float] | None = None, **kwargs: Any
    ) -> None:
        if (
            self._awaited and not self._logged
        ):  # a callback's own; the Trainer takes it for the one that it was asked for
            control.should_evaluate = True
            return
        if not self._awaited or not any(name.startswith("eval_") for name in metrics or {}):
            return
        for name, value in (metrics or {}).items():
            self._metrics[f"val_{name.removeprefix('eval_')}" if name.startswith("eval_") else name] = value
        self._awaited -= 1
        rows = getattr(kwargs.get("eval_dataloader"), "dataset", None)
        if self._sets == 1 and isinstance(rows, Sized):
            batch = args.train_batch_size * args.gradient_accumulation_steps * args.world_size
            self._metrics["val_batches"] = len(rows) / batch
        if not self._awaited and self.averaged is not None:
            self._metrics.update(self.averaged.evaluate())
        if not self._awaited and not self.follower.checkpoint_due(state.global_step):
            tune.report(self._report(state))

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if not self._to_save:
            return
        self._to_save = False
        folder = os.path.join(args.output_dir, f"checkpoint-{state.global_step}")
        try:
            if self.averaged is not None:
                self.averaged.save(folder)
            tune.report(self._report(state), checkpoint=tune.Checkpoint.from_directory(folder))
        finally:
            shutil.rmtree(folder, ignore_errors=True)

    def _report(self, state: Any) -> dict[str, Any]:
        metrics, self._metrics = self._metrics, {}
        if state.epoch:
            metrics["epoch"] = float(state.epoch)
        return self.follower.report(state.global_step, metrics)


class Averaged:
    """Averages of the weights that `trainer` trains, evaluated as the Trainer evaluates, but for its log and its callbacks.

    over, metric, mode: as WeightAverages has them. folder: of the checkpoint that the trial goes on from.
    """

    def __init__(self, trainer: Trainer, over: Sequence[float], metric: str, mode: str, folder: str | None) -> None:
        self._trainer, self._over, self._metric, self._mode, self._folder = trainer, over, metric, mode, folder
        self.weights: WeightAverages

    def begin(self, model: Any) -> None:
        """The Trainer may have built its model only now."""
        self.weights = WeightAverages(model, self._over)
        path = os.path.join(self._folder, AVERAGES) if self._folder else ""
        if os.path.exists(path):
            self.weights.load_state_dict(torch.load(path, map_location="cpu", weights_only=True))

    def save(self, folder: str) -> None:
        torch.save(self.weights.state_dict(), os.path.join(folder, AVERAGES))

    def evaluate(self) -> dict[str, float]:
        return self.weights.evaluate(self._validate, self._metric, self._mode)

    def _validate(self) -> dict[str, float]:
        sets = self._trainer.eval_dataset
        named = {f"eval_{name}": data for name, data in sets.items()} if isinstance(sets, dict) else {"eval": sets}
        found: dict[str, float] = {}
        for prefix, data in named.items():
            loader = self._trainer.get_eval_dataloader(data)
            found |= self._trainer.evaluation_loop(loader, "Evaluation", metric_key_prefix=prefix).metrics
        return {f"val_{name.removeprefix('eval_')}": float(value) for name, value in found.items()}


def fit(
    trainer: Trainer,
    config: Mapping[str, Any],
    average_over: Sequence[float] = (),
    metric: str = "val_loss",
    mode: str = "min",
) -> None:
    """Train `trainer`'s model as `config` says, from the trial's checkpoint where there is one, with the LRs of the pair.

    average_over: keep averages of the weights over these parts of the run, (0.25, 0.5, 1.0) say, as WeightAverages does, and
    report the metrics of the best, by `metric` and `mode` ("min" or "max"), beside those of the raw weights.

    The intervals of logging aside, the trainer's own plans (max_steps, num_train_epochs, learning_rate, lr_scheduler_type,
    the strategies and intervals of evaluation and saving, eval_on_start, output_dir) are not used: the trial's segment decides.
    To schedulers and callbacks max_steps is that of the whole run.

    Raises ValueError where there is no eval_dataset, and for load_best_model_at_end, save_only_model, auto_find_batch_size,
    push_to_hub and EarlyStoppingCallback; RuntimeError where something else stops the training.
    """
    args = trainer.args
    if not trainer.eval_dataset:
        raise ValueError("learning rates are chosen on validation data: build the Trainer with an eval_dataset")
    for name, why in _REFUSED.items():
        if getattr(args, name, False):
            raise ValueError(f"{name}=True is not possible here: {why}; leave it out of the TrainingArguments")
    if any(isinstance(callback, EarlyStoppingCallback) for callback in trainer.callback_handler.callbacks):
        raise ValueError("EarlyStoppingCallback is not possible here: AutoLRS decides which trials stop, and the winner trains "
                         "to the end; leave it out of the Trainer's callbacks")  # fmt: skip
    own = [c for c in trainer.callback_handler.callbacks if not type(c).__module__.startswith("transformers.")]
    callback = AutoLRSCallback(config, len(trainer.eval_dataset) if isinstance(trainer.eval_dataset, dict) else 1)
    trainer.callback_handler.callbacks.insert(0, callback)
    end = callback.follower.end
    if end is not None:
        args.max_steps = callback.follower.total_steps
    args.eval_strategy = args.save_strategy = "no"
    args.eval_on_start, args.metric_for_best_model = False, None
    args.ignore_data_skip = (
        False  # or every trial that goes on from a checkpoint would train on the first batches again
    )
    args.lr_scheduler_type = "constant"  # others may want a metric, or the length of the run
    args.logging_nan_inf_filter = False  # a diverged trial must be seen to diverge
    checkpoint = tune.get_checkpoint()
    with ExitStack() as stack:
        args.output_dir = stack.enter_context(tempfile.TemporaryDirectory(prefix="autolrs-"))
        folder = stack.enter_context(checkpoint.as_directory()) if checkpoint else None
        if average_over:
            callback.averaged = Averaged(trainer, average_over, metric, mode, folder)
        trainer.train(resume_from_checkpoint=folder)
    if end is not None and trainer.state.global_step < end:
        raise stopped(trainer.state.global_step, end, own, "the training data are empty")
