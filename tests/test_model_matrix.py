"""Many kinds of models, losses and optimizers: straight on = restored = reset, bit for bit; averages as in float64; whatever is
saved is read back with weights_only=True."""

from __future__ import annotations

import copy
import math
from pathlib import Path

import pytest
import torch
from torch import Tensor

from autolrs_ray import Trainer
from autolrs_ray.record.checkpoints import STATE_FILE, read_checkpoint
from tests.kinds import KINDS, build
from tests.refused_kinds import REFUSED
from tests.stateful_kinds import STATEFUL
from tests.trainings import assert_same

ALL = {**KINDS, **STATEFUL}
SAVED = 3  # the step after which the state is saved; twice as many are trained


def lr_at(step: int) -> float:
    return 0.02 / (1 + step)


def trainer_of(name: str) -> Trainer:
    return Trainer(lambda: build(ALL[name]), 5, averaging=True)


def wide(trainer: Trainer) -> dict[str, Tensor]:
    """All parameters and running statistics, in float64 or complex128."""
    values = dict(trainer._whole.named_parameters()) | {
        key: value
        for key, value in trainer._whole.named_buffers()
        if key.rpartition(".")[2] in ("running_mean", "running_var")
    }
    return {k: v.detach().to(torch.complex128 if v.is_complex() else torch.float64).clone() for k, v in values.items()}


@pytest.mark.parametrize("name", ALL)
def test_straight_on_is_restored_is_reset(name: str, tmp_path: Path) -> None:
    whole, first = trainer_of(name), trainer_of(name)
    start = copy.deepcopy(whole.state_dict())
    whole.train(2 * SAVED, lr_at)
    first.train(SAVED, lr_at)
    assert first.evaluate() == first.evaluate()  # looking changes nothing
    if first.averaging:
        first.evaluate(averaged=True)
    first.save(tmp_path)
    torch.load(tmp_path / STATE_FILE, weights_only=True)
    first.train(2 * SAVED, lr_at)
    goal = copy.deepcopy(whole.state_dict())
    if not whole.task.reestimate:
        assert_same(first.state_dict(), goal)
    assert not all(torch.equal(a, b) for a, b in zip(goal["model"].values(), start["model"].values(), strict=True)
                   if isinstance(a, Tensor) and a.shape == b.shape)  # fmt: skip

    other = trainer_of(name)
    other.train(2 * SAVED - 1, lambda step: 0.05)  # was busy with something else
    for load in (other.load, lambda folder: other.copy_state_dict(read_checkpoint(folder))):
        load(tmp_path)
        assert other.step == SAVED
        other.train(2 * SAVED, lr_at)
        assert_same(other.state_dict(), first.state_dict())
    assert other.evaluate() == whole.evaluate()
    other.reset()
    assert_same(other.state_dict(), start)
    other.train(2 * SAVED, lr_at)
    assert_same(other.state_dict(), goal)


@pytest.mark.parametrize("name", [name for name in KINDS if not name.startswith("schedule_free")])
def test_averages_are_those_of_a_float64_reference(name: str) -> None:
    trainer = trainer_of(name)
    twins: list[dict[str, Tensor]] = [{} for _ in trainer.task.average_over]
    for step in range(1, 9):
        trainer.train(step, lr_at)
        for part, twin in zip(trainer.task.average_over, twins, strict=True):
            for key, value in wide(trainer).items():
                old = twin.get(key, value)
                twin[key] = old + min(1.0, 1.0 / (part * step)) * (value - old)
    assert trainer.averages is not None
    for twin, kept in zip(twins, trainer.averages.state_dict()["weights"], strict=True):
        assert all(key in twin for key in kept if not key.endswith("head.weight"))  # tied: once among the parameters
        for key in set(twin) & set(kept):
            rounding = torch.finfo(kept[key].real.dtype).eps * max(1.0, float(twin[key].abs().max()))
            torch.testing.assert_close(kept[key].to(twin[key].dtype), twin[key], rtol=0, atol=8 * 4 * rounding)
    assert all(math.isfinite(metrics["loss"]) for metrics in trainer.evaluate_averages())


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_saved_is_refused_by_name(name: str) -> None:
    make, message = REFUSED[name]
    with pytest.raises((TypeError, ValueError), match=message):  # noqa: PT012
        trainer = Trainer(lambda: build(make), 5)
        trainer.train(SAVED, lr_at)
        trainer.evaluate()
        trainer.state_dict()


@pytest.mark.parametrize("name", ["sam", "sam_with_the_closure_in_its_signature"])
def test_what_steps_twice_is_given_gradients_at_both_places(name: str) -> None:
    trainer, by_hand = trainer_of(name), trainer_of(name)
    trainer.train(4, lr_at)
    optimizer = by_hand.task.optimizer
    for step in range(4):
        inputs, targets = by_hand.batch(step)

        def closure(inputs: Tensor = inputs, targets: Tensor = targets) -> Tensor:
            by_hand.feed.seed_step(by_hand.step)  # one mask of the dropout for both
            loss = by_hand.task.loss(by_hand.model(inputs), targets)
            loss.backward()
            return loss

        optimizer.param_groups[0]["lr"] = lr_at(step)
        closure()
        optimizer.step(closure)
        optimizer.zero_grad()
        by_hand.step += 1
    assert_same(trainer.model.state_dict(), by_hand.model.state_dict())


def test_there_are_many_kinds() -> None:
    assert len(KINDS) >= 40
    assert len(STATEFUL) >= 15
