"""A Hugging Face Trainer as a trainable of the pair: `fit(trainer, config)` inside a function of `config`."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Mapping
from contextlib import ExitStack
from typing import Any

from ray import tune
from transformers import Trainer, TrainerCallback

from autolrs_ray.integrations.follower import Follower


class AutoLRSCallback(TrainerCallback):  # type: ignore[misc]
    """Writes the LR right before every optimizer step, has the Trainer evaluate where the pair wants a report, and reports.

    A report holds the evaluation's metrics, eval_NAME as val_NAME, train_loss (mean since the last log), step (optimizer
    steps: `state.global_step`), lr, stage and role. Checkpoints are the Trainer's own, attached where they are needed.
    """

    def __init__(self, config: Mapping[str, Any]) -> None:
        self.follower = Follower(config)
        self._metrics: dict[str, float] = {}

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, optimizer: Any = None, **kwargs: Any) -> None:
        self.follower.write_lr(optimizer, state.global_step)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        due = self.follower.report_due(state.global_step)
        control.should_evaluate = due
        control.should_save = due and self.follower.checkpoint_due(state.global_step)
        control.should_log = control.should_log or due

    def on_epoch_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        control.should_evaluate = control.should_save = False

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float] | None = None, **kwargs: Any) -> None:
        if logs and "loss" in logs:
            self._metrics["train_loss"] = float(logs["loss"])

    def on_evaluate(
        self, args: Any, state: Any, control: Any, metrics: dict[str, float] | None = None, **kwargs: Any
    ) -> None:
        for name, value in (metrics or {}).items():
            self._metrics[f"val_{name.removeprefix('eval_')}" if name.startswith("eval_") else name] = value
        if not self.follower.checkpoint_due(state.global_step):
            tune.report(self._report(state))

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        folder = os.path.join(args.output_dir, f"checkpoint-{state.global_step}")
        try:
            tune.report(self._report(state), checkpoint=tune.Checkpoint.from_directory(folder))
        finally:
            shutil.rmtree(folder, ignore_errors=True)

    def _report(self, state: Any) -> dict[str, Any]:
        metrics, self._metrics = self._metrics, {}
        return self.follower.report(state.global_step, metrics)


def fit(trainer: Trainer, config: Mapping[str, Any]) -> None:
    """Train `trainer`'s model as `config` says, from the trial's checkpoint where there is one, with the LRs of the pair.

    The intervals of logging aside, the trainer's own plans (max_steps, num_train_epochs, learning_rate, lr_scheduler_type,
    the strategies and intervals of evaluation and saving, output_dir) are not used: the trial's segment decides.

    Raises ValueError where there is no eval_dataset.
    """
    if trainer.eval_dataset is None:
        raise ValueError("learning rates are chosen on validation data: build the Trainer with an eval_dataset")
    callback = AutoLRSCallback(config)
    trainer.add_callback(callback)
    if callback.follower.end is not None:
        trainer.args.max_steps = callback.follower.end
    trainer.args.logging_nan_inf_filter = False  # a diverged trial must be seen to diverge
    checkpoint = tune.get_checkpoint()
    with ExitStack() as stack:
        trainer.args.output_dir = stack.enter_context(tempfile.TemporaryDirectory(prefix="autolrs-"))
        folder = stack.enter_context(checkpoint.as_directory()) if checkpoint else None
        trainer.train(resume_from_checkpoint=folder)
