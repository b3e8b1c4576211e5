"""Trainer: the averages are the plain formula's, and the best on the validation data counts."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel

from autolrs_ray.training.trainer import Trainer
from tests.trainings import X, Y, assert_same, falling, task


def test_averaged_weights_and_buffers_follow_the_plain_formula():
    """average(t) = average(t - 1) + min(1, 1 / (part * t)) * (current - average(t - 1)), over weights and batch-norm
    statistics. Over all of the run that is the plain mean."""
    trainer = Trainer(lambda: task(average_over=(0.25, 1.0)), 0, averaging=True)
    twins = {part: {} for part in trainer.task.average_over}
    for step in range(1, 41):
        trainer.train(step, falling)
        for part, twin in twins.items():
            for name, value in trainer.model.state_dict().items():
                if not value.is_floating_point():
                    twin[name] = value.clone()
                elif step == 1:
                    twin[name] = value.double().clone()
                else:
                    twin[name] += min(1.0, 1.0 / (part * step)) * (value.double() - twin[name])
    for index, twin in enumerate(twins.values()):
        with trainer.evaluated(index) as model:
            ours = copy.deepcopy(model.state_dict())
        assert ours.keys() == twin.keys()
        for name, value in ours.items():
            assert torch.allclose(value.double(), twin[name].double(), atol=1e-6), name
        assert not torch.allclose(ours["0.weight"], trainer.model.state_dict()["0.weight"], atol=1e-4)


def test_the_averages_are_torchs_own_to_the_last_bit_and_count():
    trainer = Trainer(lambda: task(), 0, averaging=True)
    weight = []

    def twin(i):
        return AveragedModel(
            trainer.model, multi_avg_fn=lambda old, new, _: _lerp(list(old), list(new), weight[i]), use_buffers=True
        )

    twins = [twin(i) for i in range(3)]
    for step in range(1, 30):
        trainer.train(step, falling)
        weight[:] = [min(1.0, 1.0 / (part * step)) for part in trainer.task.average_over]
        for other in twins:
            other.update_parameters(trainer.model)
    for index, other in enumerate(twins):
        with trainer.evaluated(index) as model:
            assert_same(model.state_dict(), other.module.state_dict())


def _lerp(old, new, weight):
    if old[0].is_floating_point():
        torch._foreach_lerp_(old, new, weight)
    else:
        torch._foreach_copy_(old, new)


def by_hand(trainer):
    """Validation loss of every average."""
    return [loss_of(trainer, index, X[64:], Y[64:]) for index in range(3)]


def loss_of(trainer, index, inputs, targets):
    with trainer.evaluated(index) as model:
        found = nn.functional.cross_entropy(model.eval()(inputs), targets).item()
        model.train()
    return found


def test_the_average_that_is_best_on_the_validation_data_counts():
    trainer = Trainer(lambda: task(), 0, averaging=True)
    best = set()
    for lr in (0.01, 3.0):  # slow: the latest weights are the best; noisy: the longer the average, the better
        trainer.reset()
        trainer.train(40, lambda step, lr=lr: lr)
        losses = by_hand(trainer)
        assert trainer.best_average == losses.index(min(losses))
        found = trainer.evaluate(averaged=True)["loss"]
        assert found == pytest.approx(min(losses), rel=1e-6)
        assert [m["loss"] for m in trainer.evaluate_averages()] == pytest.approx(losses, rel=1e-6)
        loss = loss_of(trainer, trainer.best_average, X[:64], Y[:64])
        assert trainer.evaluate((X[:64], Y[:64]), averaged=True)["loss"] == pytest.approx(loss, rel=1e-6)
        assert trainer.evaluate()["loss"] != found
        best.add(trainer.best_average)
    assert len(best) == 2, "one of them is the best at any learning rate"


def test_without_averages_there_is_none_to_evaluate():
    trainer = Trainer(lambda: task(), 0)
    for call in (lambda: trainer.evaluate(averaged=True), trainer.evaluate_averages, lambda: trainer.best_average):
        with pytest.raises(ValueError, match="averaging=True"):
            call()


@pytest.mark.parametrize(
    ("parts", "error", "message"),
    [
        ((), ValueError, r"one or more different parts of the run, got \(\)"),
        ((0.5, 0.5), ValueError, r"different parts of the run, got \(0.5, 0.5\)"),
        ((0.25, 0.0), ValueError, "each part of average_over must be a finite number in .*, got 0.0"),
        ((4,), ValueError, "each part of average_over must be a finite number in .*, got 4"),
        (0.25, TypeError, "average_over must be a list or tuple, got 0.25"),
    ],
)
def test_parts_of_the_run_that_cannot_be_averaged_over_are_refused(parts, error, message):
    with pytest.raises(error, match=message):
        task(average_over=parts)


def test_the_best_average_is_known_where_its_state_is_loaded(tmp_path):
    trainer = Trainer(lambda: task(), 0, averaging=True)
    trainer.train(40, lambda step: 3.0)
    assert trainer.state_dict()["averages"]["best"] is None, "nobody has looked yet"
    best = trainer.best_average
    trainer.save(tmp_path)
    trainer.reset()
    assert trainer.state_dict()["averages"]["best"] is None
    trainer.load(tmp_path)
    assert trainer.state_dict()["averages"]["best"] == best
    trainer.train(41, falling)
    assert trainer.state_dict()["averages"]["best"] is None, "that was of another step"


def test_a_checkpoint_without_averages_begins_them_where_it_stands(tmp_path):
    Trainer(lambda: task(), 0).save(tmp_path)
    trainer = Trainer(lambda: task(), 0, averaging=True)
    trainer.train(10, falling)
    trainer.load(tmp_path)
    now = trainer.model[0].weight.detach().clone()
    for index in range(3):
        with trainer.evaluated(index) as model:
            assert torch.equal(model[0].weight, now)


def test_states_of_another_format_or_with_other_averages_are_refused():
    trainer = Trainer(lambda: task(average_over=(0.25,)), 0, averaging=True)
    with pytest.raises(ValueError, match=r"holds averages over \(0.25,\) of the run.*keep average_over"):
        Trainer(lambda: task(), 0, averaging=True).load_state_dict(trainer.state_dict())
    with pytest.raises(ValueError, match="of format 2, this version reads format 3"):
        trainer.load_state_dict({**trainer.state_dict(), "format": 2})
