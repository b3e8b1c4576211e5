"""AutoLRSTrainable: a torch training task as a Tune trainable."""

from __future__ import annotations

import copy
import logging
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from ray import tune
from ray.util.placement_group import get_current_placement_group

from autolrs_ray.core.checks import require_int
from autolrs_ray.core.growth import BatchGrowth
from autolrs_ray.core.segments import Segment, next_report
from autolrs_ray.record.checkpoints import (
    MANIFEST_FILE,
    BackgroundWriter,
    flush_checkpoint,
    refuse_pickle,
    verify_checkpoint,
)
from autolrs_ray.training.task import TrainingTask
from autolrs_ray.training.trainer import Trainer
from autolrs_ray.trial.device import own_device
from autolrs_ray.trial.shared import LEAST_BYTES, SharedCheckpoint, pack, state_bytes

if TYPE_CHECKING:
    from autolrs_ray.trial.distributed import WorkerGroup

Build = Callable[[dict[str, Any]], TrainingTask]


class _Inert(tune.Checkpoint):  # type: ignore[misc]
    """A checkpoint that is refused, once its files are here and before Tune looks at them, if Tune would unpickle one."""

    def __init__(self, checkpoint: tune.Checkpoint) -> None:
        super().__init__(checkpoint.path, filesystem=checkpoint.filesystem)
        self._checkpoint = checkpoint

    @contextmanager
    def as_directory(self) -> Iterator[str]:
        with self._checkpoint.as_directory() as folder:
            refuse_pickle(folder)
            yield folder


class AutoLRSTrainable(tune.Trainable):  # type: ignore[misc]
    """Subclass it and implement `build(config) -> TrainingTask`, or use :func:`trainable_for`.

    Under the pair it follows its segment: LR from the envelope at every step, reports where they are wanted, common
    random numbers (`config["seed"]`), averaged weights where the policy scores them. Without the pair (plain Tune, PBT)
    it trains `config["report_every"]` steps (default 100) per report at `config["lr"]`.

    It reports step, epoch, lr, stage, role, train_loss, val_loss, val_METRIC for every metric of the task, with averaging
    averaged_loss and averaged_METRIC, and where the pair has it write checkpoints while it trains on, durable_step.

    workers: processes that train one trial together, each on its share of every batch (torch's DistributedDataParallel).
    None: as many as the trial's resources have bundles for, which is what a run with workers="elastic" changes.
    threads: those workers are threads of one process instead, on the CPUs of the trial.
    object_store: trials may take the checkpoint they start from out of Ray's object store, where it lies besides storage.
    False for subclasses with a save_checkpoint or load_checkpoint of their own; not used with several workers.
    idle_workers: trials may begin in processes that Ray keeps ready. False for those that need PL_DISABLE_FORK=1, which Tune
    sets for Lightning in processes of its own.
    """

    workers: int | None = 1
    threads = False
    object_store = True
    idle_workers = True

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        if {"save_checkpoint", "load_checkpoint"} & set(vars(cls)) and "object_store" not in vars(cls):
            cls.object_store = False

    def build(self, config: dict[str, Any]) -> TrainingTask:
        raise NotImplementedError("implement build(config) -> TrainingTask, or use trainable_for(build)")

    def setup(self, config: dict[str, Any]) -> None:
        for name in ("ray.train._internal.storage", "ray.tune.trainable.trainable"):
            logging.getLogger(name).setLevel(logging.WARNING)  # they print a line for every checkpoint and restore
        self._writer = BackgroundWriter()
        self._to_reset = False
        self._growth: tuple[tuple[int, int], ...] = ()
        self._taken: dict[str, Any] | None = None
        self._asked_for_averages = self._averaging(config)
        self.trainer = self._new_trainer(config.get("seed", 0), self._averaging(config), config)
        self._begin(config)

    def _new_trainer(self, seed: int, averaging: bool, config: dict[str, Any]) -> Trainer | WorkerGroup:
        workers = trial_workers() if self.workers is None else self.workers
        if self.threads:
            torch.set_num_threads(trial_cpus())
        if workers == 1 or self.threads:
            return Trainer(lambda: self.build(config), seed, averaging, own_device())
        from autolrs_ray.trial.distributed import WorkerGroup

        blank = object.__new__(type(self))  # what the workers are sent: build, and nothing of this process
        return WorkerGroup(lambda: blank.build(config), seed, averaging, workers)

    def _averaging(self, config: dict[str, Any]) -> bool:
        segment = config.get("autolrs")
        return bool(config.get("averaging", segment is not None and segment["role"] == "trunk"))

    def _begin(self, config: dict[str, Any]) -> None:
        segment = config.get("autolrs")
        self._segment = Segment.from_config(segment) if segment else None
        self._lr, self._report_every = float(config["lr"]), int(config.get("report_every", 100))
        growth = self._segment.growth if self._segment else ()
        if growth != self._growth:
            self.trainer.grow(BatchGrowth(growth))
            self._growth = growth

    def reset_config(self, new_config: dict[str, Any]) -> bool:
        if new_config.get("seed", 0) != self.trainer.seed or self._averaging(new_config) != self._asked_for_averages:
            return False
        self._writer.forget()
        self._begin(new_config)
        self._to_reset = True
        return True

    def _reset_if_due(self) -> None:
        """Most trials are restored right after they are reset, which is then not needed."""
        if self._to_reset:
            self._to_reset = False
            self.trainer.reset()

    def restore(self, checkpoint_path: Any) -> None:
        """As Tune's; raises CheckpointError for a checkpoint that holds a pickle of Tune's, before that is loaded."""
        given = tune.Checkpoint.from_directory(checkpoint_path) if isinstance(checkpoint_path, str) else checkpoint_path
        if isinstance(given, tune.Checkpoint):
            given = _Inert(given)
        else:
            result, given = given, copy.copy(given)
            given.checkpoint = _Inert(result.checkpoint)
            self._taken = result.checkpoint.take() if isinstance(result.checkpoint, SharedCheckpoint) else None
        try:
            super().restore(given)
        finally:
            self._taken = None  # or the object stays in use

    def load_checkpoint(self, checkpoint: Any) -> None:
        if self._taken is not None and isinstance(self.trainer, Trainer):
            self.trainer.copy_state_dict(self._taken)
        elif self._taken is not None:
            self.trainer.load_state_dict(self._taken)
        else:
            self.trainer.load(checkpoint)
        self._to_reset = False

    def share(self, most: int) -> tuple[int, Any]:
        """The state for the object store and its size in bytes; (0, None) if that is above `most`, or not worth it."""
        if not isinstance(self.trainer, Trainer):
            return 0, None
        self._reset_if_due()
        state = self.trainer.state_dict()
        size = state_bytes(state)
        return (size, pack(state)) if LEAST_BYTES <= size <= most else (0, None)

    def save(self, checkpoint_dir: str | None = None) -> Any:
        """As Tune's, which copies what `save_checkpoint` writes; returns when the copy is whole and, in a local folder, on
        disk. Raises CheckpointError where it is not.

        Measured on two busy cores and an ext4 disk, flush and reading back: 5 and 1 ms for 1 MB, 28 and 71 ms for 60 MB, 122
        and 271 ms for 400 MB. The files that are copied are not flushed.
        """
        saved = super().save(checkpoint_dir)
        checkpoint = saved.checkpoint
        if checkpoint.filesystem.type_name == "local":
            refuse_pickle(checkpoint.path)
            flush_checkpoint(checkpoint.path)
            if os.path.exists(os.path.join(checkpoint.path, MANIFEST_FILE)):
                verify_checkpoint(checkpoint.path)
        return saved

    def save_checkpoint(self, checkpoint_dir: str) -> None:
        """Write the state into `checkpoint_dir`. A method of your own writes its files there, and returns None."""
        self._reset_if_due()
        self._writer.wait()
        self.trainer.save(checkpoint_dir, flush=False)  # `save` flushes what is copied from there

    def commit(self, folder: str) -> None:
        """Begin to write the state to `folder`; "durable_step" of a later report tells that it is whole on disk."""
        self._reset_if_due()
        self._writer.submit(self.trainer.state_dict(), folder)

    def cleanup(self) -> None:
        self._writer.wait()
        self.trainer.close()

    def _next_report(self) -> int:
        """Step of the next report: `reports` of them, evenly spaced, up to every boundary of the segment."""
        step = self.trainer.step
        if self._segment is None:
            return step + self._report_every
        return next_report(self._segment, step)

    def step(self) -> dict[str, Any]:
        self._reset_if_due()
        segment, trainer = self._segment, self.trainer
        train_loss = trainer.train(self._next_report(), segment.lr_at if segment else lambda step: self._lr)
        lr = segment.lr_at(max(0, trainer.step - 1)) if segment else self._lr
        result: dict[str, Any] = {"step": trainer.step, "lr": lr, "train_loss": train_loss}
        if self.workers is None and isinstance(trainer, Trainer) and not self.threads:
            result["batch_size"] = trainer.task.batch_size  # more workers than rows there cannot be
        result.update(epoch=trainer.epoch, held_out=trainer.held_out, val_batches=trainer.val_batches)
        if segment:
            result.update(stage=segment.stage, role=segment.role)
        if self._growth:
            result["batches"] = BatchGrowth(self._growth).factor(max(0, trainer.step - 1))
        result.update({f"val_{name}": value for name, value in trainer.evaluate().items()})
        self._writer.poll()
        if self._writer.durable_step:
            result["durable_step"] = self._writer.durable_step
        if self._writer.failure:
            result["checkpoint_error"] = self._writer.failure
        if trainer.averaging:
            result.update({f"averaged_{name}": value for name, value in trainer.evaluate(averaged=True).items()})
            if trainer.trouble is not None:
                result["warning"] = trainer.trouble
        return result


def trial_workers() -> int:
    """How many workers the trial that this process belongs to is to train with: the bundles of its resources."""
    group = get_current_placement_group()
    return len(group.bundle_specs) if group is not None else 1


def trial_cpus() -> int:
    """How many CPU cores the trial that this process belongs to owns; 1 of a part."""
    group = get_current_placement_group()
    return max(1, int(sum(bundle.get("CPU", 0.0) for bundle in group.bundle_specs))) if group is not None else 1


def writes_manifests(trainable: type) -> bool:
    """True if every checkpoint of `trainable` has a manifest: an AutoLRSTrainable's has, unless it writes its own."""
    return getattr(trainable, "save_checkpoint", None) is AutoLRSTrainable.save_checkpoint


def lr_at(config: dict[str, Any], step: int) -> float:
    """Learning rate of the update from `step` to `step + 1` for a trainable with this `config`: for loops of your own.

    Under a policy with an envelope it changes at every step; without AutoLRS it is `config["lr"]`.
    """
    segment = config.get("autolrs")
    return Segment.from_config(segment).lr_at(step) if isinstance(segment, dict) else float(config["lr"])


def _name_of(build: Any) -> str:
    """What Tune calls the trials: no lambda, and of a partial the function's name."""
    name = str(getattr(getattr(build, "func", build), "__name__", "task"))
    return name if name.isidentifier() else "task"


def trainable_for(
    build: Build, name: str | None = None, workers: int | None = 1, threads: bool = False
) -> type[AutoLRSTrainable]:
    """An AutoLRSTrainable class whose task comes from the function `build(config) -> TrainingTask`.

    workers: processes per trial; None: as many as its resources have bundles for. threads: they are threads of one process.
    Raises ValueError for fewer than one.
    """
    if workers is not None:
        require_int("workers", workers, 1)

    def call(self: AutoLRSTrainable, config: dict[str, Any]) -> TrainingTask:
        return build(config)

    return type(name or _name_of(build), (AutoLRSTrainable,), {"build": call, "workers": workers, "threads": threads})
