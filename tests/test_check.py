"""Before the first trial: what a function is, and what is wrong with what it builds."""

from __future__ import annotations

import functools
import math
import os
import time
from contextlib import nullcontext
from functools import partial
from typing import Any

import numpy as np
import psutil
import pytest
import ray
import torch
from ray import tune
from torch import nn

import autolrs_ray
from autolrs_ray import AutoLRSError, AutoLRSScheduler, AutoLRSSearch, AutoLRSTrainable, TrainingTask, trainable_for
from autolrs_ray.trial.check import (
    ReportsOfOneTask,
    UntrainableError,
    _check,
    builds_task,
    check_first_trial,
    check_task,
    goes_on_otherwise,
)

X = torch.randn(80, 6, generator=torch.Generator().manual_seed(5))
Y = (X[:, 0] > 0).long()


other = nn.Linear(2, 2)


def task(**changes: Any) -> TrainingTask:
    model = changes.pop("model", None) or nn.Linear(6, 2)
    given = dict(
        loss=nn.functional.cross_entropy, train_data=(X[:64], Y[:64]), val_data=(X[64:], Y[64:]), batch_size=16
    )
    return TrainingTask(model, torch.optim.SGD(model.parameters(), lr=0.1), **{**given, **changes})


def annotated(config: dict[str, Any]) -> TrainingTask:
    return task()


def bare(config, rows=64, data=None):  # type: ignore[no-untyped-def]
    x, y = data or (X, Y)
    model = nn.Linear(6, 2)
    return TrainingTask(model, torch.optim.SGD(model.parameters(), lr=0.1), nn.functional.cross_entropy,
                        (x[:rows], y[:rows]), (x[64:], y[64:]), batch_size=16)  # fmt: skip


def through_a_module(config):  # type: ignore[no-untyped-def]
    return autolrs_ray.TrainingTask(nn.Linear(6, 2), config["optimizer"], config["loss"], (X, Y), (X, Y), 8)


def annotated_loosely(config: dict[str, Any]) -> Any:
    return bare(config)


def annotated_as_perhaps(config: dict[str, Any]) -> TrainingTask | None:
    return bare(config)


class Special(TrainingTask):
    pass


def special(config) -> Special:  # type: ignore[no-untyped-def]
    return Special(**config)


def logged(function: Any) -> Any:
    @functools.wraps(function)
    def call(*args: Any) -> Any:
        return function(*args)

    return call


class Builder:
    def __call__(self, config):  # type: ignore[no-untyped-def]
        return bare(config)

    def build(self, config):  # type: ignore[no-untyped-def]
        return bare(config)


def reports(config):  # type: ignore[no-untyped-def]
    built = bare(config)
    tune.report({"step": 1, "val_loss": float(built.batch_size)})


def reports_by_helper(config):  # type: ignore[no-untyped-def]
    for step in range(3):
        config["fit"](step)


BUILDERS = [annotated, annotated_loosely, annotated_as_perhaps, special, bare, partial(Builder()), partial(Builder().build),
            through_a_module, partial(bare, rows=48), partial(partial(bare), rows=48), logged(bare),
            lambda config: bare(config, 48), lambda config: task(), Builder(), Builder().build]  # fmt: skip


@pytest.mark.parametrize("function", BUILDERS)
def test_a_function_that_builds_a_task_is_known_without_its_annotation(function: Any) -> None:
    assert builds_task(function)
    assert trainable_for(function).__name__.isidentifier()


@pytest.mark.parametrize(
    "function", [reports, reports_by_helper, trainable_for(annotated), print, 3, partial(reports), len]
)
def test_what_reports_by_itself_is_none(function: Any) -> None:
    assert not builds_task(function)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"loss": nn.CrossEntropyLoss(reduction="none")}, ValueError, r"must be a scalar.*shape \(16,\)"),
        ({"loss": lambda output, target: output.sum() * math.nan}, ValueError, "loss of the first batch is nan"),
        ({"model": nn.Linear(5, 2)}, RuntimeError, "shapes cannot be multiplied"),
        ({"train_data": (X[:64], Y[:60])}, ValueError, "train_data has 64 inputs and 60 targets"),
        ({"val_data": (X[64:, :3], Y[64:])}, RuntimeError, "shapes cannot be multiplied"),
        ({"train_data": (X[:64], Y[:64].float())}, RuntimeError, "expected target dtype to be Long"),
        (
            {"loss": lambda o, y: nn.functional.mse_loss(o[:, :1], y.float())},
            ValueError,
            "pairs outputs and targets of dif",
        ),
        ({"train_data": (X[:0], Y[:0])}, ValueError, "train_data is empty, and batch_size is 16"),
        ({"train_data": (X[:9], Y[:9])}, ValueError, "train_data has 9 rows, and batch_size is 16"),
        ({"model": nn.Linear(6, 2).requires_grad_(False)}, ValueError, "does not depend on anything that is trained"),
        ({"model": nn.Linear(6, 2, device="meta")}, NotImplementedError, "meta tensor"),
        (
            {"loss": lambda o, y: o.detach().sum() + other.weight.sum(), "modules": {"other": other}},
            ValueError,
            "none of the optimizer's parameters has a gradient",
        ),
        ({"metrics": {"broken": lambda output, target: output.nothing}}, AttributeError, "nothing"),
        ({"modules": {"extra": object()}}, TypeError, r"modules\[.extra.\] must be an nn.Module, got <object"),
    ],
)
def test_what_cannot_be_trained_is_told_at_once(changes: dict[str, Any], error: type, message: str) -> None:
    before = torch.get_rng_state(), np.random.get_state()[1].tolist()  # type: ignore[index]
    with pytest.raises(error, match=message) as caught:
        check_task(lambda: task(**changes), 0)
    assert torch.equal(torch.get_rng_state(), before[0])
    assert np.random.get_state()[1].tolist() == before[1]  # type: ignore[index]
    if "Long" in message:
        assert "inputs (16, 6) float32 and targets (16,) float32" in caught.value.__notes__[0]


class Slope(nn.Module):
    """What a physics-informed network is: a derivative with respect to its input."""

    def __init__(self, wrapped: bool) -> None:
        super().__init__()
        self.net, self.wrapped = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 2)), wrapped

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        with torch.enable_grad() if self.wrapped else nullcontext():
            x = x.detach().requires_grad_()
            (slope,) = torch.autograd.grad(self.net(x).sum(), x, create_graph=True)
        return slope[:, :2]


def test_a_model_that_takes_derivatives_is_told_how_it_is_evaluated() -> None:
    with pytest.raises(RuntimeError, match="does not require grad") as caught:
        check_task(lambda: task(model=Slope(wrapped=False)), 0)
    assert "with torch.enable_grad():" in caught.value.__notes__[0]
    trainer, _ = check_task(lambda: task(model=Slope(wrapped=True)), 0)
    assert math.isfinite(trainer.evaluate()["loss"])


def test_what_can_be_trained_passes_and_a_share_of_the_batch_is_enough() -> None:
    trainer, rows = check_task(lambda: task(compile=True), 0, workers=3)
    assert (trainer.task.batch_size, rows) == (6, 16)
    assert goes_on_otherwise(trainer) is None


counted = [0]


def test_a_state_that_no_checkpoint_holds_is_warned_of() -> None:
    def loss(output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        counted[0] += 1  # a global variable
        return nn.functional.cross_entropy(output, target) * counted[0]

    assert "goes on otherwise when it is restored" in str(goes_on_otherwise(check_task(lambda: task(loss=loss), 0)[0]))


class WithSetup(AutoLRSTrainable):
    """Its data come with `setup`, as tune.with_parameters has it."""

    def setup(self, config: dict[str, Any], data: Any = (X, Y)) -> None:
        if config.get("wants_a_trial"):
            raise RuntimeError("only in a trial")
        self.data = data
        super().setup(config)
        assert self.trainer.steps_per_epoch == 4

    def build(self, config: dict[str, Any]) -> TrainingTask:
        return bare(config, config["rows"], self.data)


def test_classes_with_a_setup_of_their_own_are_tried_out() -> None:
    config = {"lr": 0.1, "rows": 64}
    bound = tune.with_parameters(WithSetup, data=(X, Y))
    for trainable in (WithSetup, bound):
        assert _check(trainable, config, 1) == (16, None)
        with pytest.raises(UntrainableError, match="ValueError: train_data has 9 rows, and batch_size is 16"):
            _check(trainable, {**config, "rows": 9}, 1)
    rows, warned = _check(WithSetup, {**config, "wants_a_trial": True}, 1)  # the trials tell
    assert rows is None
    assert warned == "WithSetup.setup could not be tried out before the first trial: RuntimeError: only in a trial"


def test_reports_of_other_validation_sets_and_new_warnings_are_told() -> None:
    seen = ReportsOfOneTask(AutoLRSTrainable)
    assert seen.heard("a", {"held_out": "1", "warning": "not finite"}) == "a: not finite"
    assert seen.heard("a", {"held_out": "1", "warning": "not finite"}) is None
    assert seen.heard("b", {}) is None
    with pytest.raises(AutoLRSError, match="b and a hold out different validation rows"):
        seen.heard("b", {"held_out": "2"})
    other = ReportsOfOneTask(tune.Trainable)
    assert [other.heard("a", {"held_out": found}) for found in (36, 36, 0.1, "10%")] == [None] * 4  # the user's own


def unseeded(config):  # type: ignore[no-untyped-def]
    rows = np.random.default_rng().permutation(80)
    return task(train_data=(X[rows[:64]], Y[rows[:64]]), val_data=(X[rows[64:]], Y[rows[64:]]))


def by_numpys_generator(config):  # type: ignore[no-untyped-def]
    rows = np.random.permutation(80)
    return task(train_data=(X[rows[:64]], Y[rows[:64]]), val_data=(X[rows[64:]], Y[rows[64:]]))


@pytest.mark.ray
@pytest.mark.usefixtures("ray_cluster")
class TestOnRay:
    def run(self, folder: Any, name: str, function: Any) -> Any:
        return autolrs_ray.run(function, 40, num_lrs=3, slots=2, progress=False, storage_path=folder, name=name)

    def test_data_of_with_parameters_and_splits_by_the_seeded_generators_train(self, tmp_path: Any) -> None:
        bound = tune.with_parameters(bare, data=(X, Y))
        assert builds_task(bound)
        assert self.run(tmp_path, "bound", bound).done
        assert self.run(tmp_path, "numpy", by_numpys_generator).done

    def test_a_process_that_had_a_gpu_ends_with_the_check(self, tmp_path: Any) -> None:
        """Or its memory would be missing to the trials."""
        file = tmp_path / "pid"

        def build(config: dict[str, Any]) -> TrainingTask:
            file.write_text(str(os.getpid()))
            return task()

        check_first_trial(trainable_for(build), {"seed": 0}, {"CPU": 1, "GPU": 1})
        until = time.monotonic() + 30.0
        while psutil.pid_exists(int(file.read_text())) and time.monotonic() < until:
            time.sleep(0.1)
        assert not psutil.pid_exists(int(file.read_text()))

    def test_a_task_that_cannot_be_trained_starts_no_trial(self, tmp_path: Any) -> None:
        with pytest.raises(
            AutoLRSError, match=r"bad cannot be trained, and no trial was started. ValueError: the loss"
        ):
            self.run(tmp_path, "bad", partial(bad))
        assert not list(tmp_path.glob("bad/*/result.json"))
        with pytest.raises(
            AutoLRSError, match=r"WithSetup cannot be trained, .* train_data has 9 rows, and batch_size is 16"
        ):
            autolrs_ray.run(WithSetup, 40, num_lrs=3, slots=2, progress=False, storage_path=tmp_path, name="class",
                            config={"rows": 9})  # fmt: skip
        tuner = tune.Tuner(
            bare, run_config=tune.RunConfig(storage_path=str(tmp_path), name="tuner", verbose=0),
            tune_config=tune.TuneConfig(num_samples=-1, metric="val_loss", mode="min", reuse_actors=True,
                                        search_alg=AutoLRSSearch(40, num_lrs=2), scheduler=AutoLRSScheduler()),
        )  # fmt: skip
        with pytest.raises(Exception, match=r"give Tune trainable_for\(bare\)"):
            tuner.fit()

    def test_another_validation_set_in_every_process_ends_the_run(self, tmp_path: Any) -> None:
        with pytest.raises(AutoLRSError, match=r"hold out different validation rows|judged on another validation set"):
            self.run(tmp_path, "unseeded", unseeded)
        assert ray.is_initialized()


def bad(config):  # type: ignore[no-untyped-def]
    return task(loss=nn.CrossEntropyLoss(reduction="none"))
