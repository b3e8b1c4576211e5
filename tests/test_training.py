"""Trainer: step t is a function of (seed, t), so the winning probe is the main run."""

from __future__ import annotations

import copy
import math
import subprocess
import sys
from functools import partial

import pytest
import torch
from torch import nn
from torch.utils.data import TensorDataset

from autolrs_ray.training.task import accuracy
from autolrs_ray.training.trainer import Trainer
from tests.trainings import X, Y, adamw, assert_same, falling, momentum, noisy, sgd, task

# -- promotion ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("optimizer", [sgd, momentum, adamw])
@pytest.mark.parametrize("averaging", [False, True])
@pytest.mark.parametrize("options", [{}, {"augment": noisy, "clip_norm": 0.5}, {"autocast": torch.bfloat16}])
def test_winning_probe_is_the_main_run_bit_for_bit(optimizer, averaging, options, tmp_path):
    """0 -> 20, a checkpoint, another process -> 50 is 0 -> 50: dropout, batch norm, augmentation and all."""
    whole = Trainer(lambda: task(optimizer, **options), 3, averaging)
    whole.train(50, falling)
    probe = Trainer(lambda: task(optimizer, **options), 3, averaging)
    probe.train(20, falling)
    probe.evaluate()
    probe.save(tmp_path)
    torch.manual_seed(99)
    main = Trainer(lambda: task(optimizer, **options), 3, averaging)
    main.train(33, lambda step: 1.0)  # it was busy with something else
    main.load(tmp_path)
    assert main.step == 20
    main.train(50, falling)
    assert_same(main.state_dict(), whole.state_dict())
    assert main.evaluate() == whole.evaluate()


def test_how_the_steps_are_cut_into_calls_makes_no_difference():
    one, many = (Trainer(lambda: task(augment=noisy), 0, True) for _ in range(2))
    one.train(30, falling)
    for until in (1, 2, 7, 7, 20, 30):
        many.train(until, falling)
        many.evaluate()
    assert_same(one.state_dict(), many.state_dict())


def test_two_probes_from_one_checkpoint_see_the_same_batches_and_differ_by_their_lr_only(tmp_path):
    start = Trainer(lambda: task(), 0)
    start.train(5, falling)
    start.save(tmp_path)
    states = []
    for lr in (0.05, 0.05, 0.3):
        probe = Trainer(lambda: task(), 0)
        probe.load(tmp_path)
        probe.train(15, lambda step, lr=lr: lr)
        states.append(copy.deepcopy(probe.model.state_dict()))
    assert_same(states[0], states[1])
    assert not torch.equal(states[0]["0.weight"], states[2]["0.weight"])


def adagrad(model):
    return torch.optim.Adagrad(model.parameters(), lr=0.1)  # it has state before its first step


@pytest.mark.parametrize("optimizer", [adamw, adagrad])
def test_reset_goes_back_to_the_very_start(optimizer):
    trainer = Trainer(lambda: task(optimizer), 1, True)
    begin = copy.deepcopy(trainer.state_dict())
    trainer.train(25, falling)
    once = copy.deepcopy(trainer.state_dict())
    trainer.reset()
    assert_same(trainer.state_dict(), begin)
    trainer.train(25, falling)
    assert_same(trainer.state_dict(), once)
    trainer.reset()
    assert_same(trainer.state_dict(), begin)  # the copy it went back to was not trained on


def test_every_process_starts_from_the_same_weights():
    code = (
        "from autolrs_ray.training.trainer import Trainer\nfrom tests.trainings import falling, task\n"
        "t = Trainer(lambda: task(), 7); t.train(9, falling)\n"
        "print(t.evaluate()['loss'].hex(), t.batch(9)[0].sum().item().hex())"
    )
    other = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    here = Trainer(lambda: task(), 7)
    here.train(9, falling)
    expected = f"{here.evaluate()['loss'].hex()} {here.batch(9)[0].sum().item().hex()}\n"
    assert other.stdout == expected


# -- batches -----------------------------------------------------------------------------------------------------------


def test_the_batch_at_a_step_is_a_function_of_seed_and_step():
    first, second, other = Trainer(lambda: task(), 1), Trainer(lambda: task(), 1), Trainer(lambda: task(), 2)
    expected = {step: first.batch(step)[0] for step in range(20)}
    for step in (19, 3, 11, 3, 0):  # in whatever order they are asked for
        assert torch.equal(second.batch(step)[0], expected[step])
    assert not torch.equal(other.batch(3)[0], expected[3])


def test_an_epoch_shows_every_row_once_but_for_the_last_short_batch():
    trainer = Trainer(lambda: task(), 0)
    rows = [torch.cat([trainer.feed.rows.at(step) for step in range(6 * epoch, 6 * epoch + 6)]) for epoch in range(3)]
    for epoch in rows:
        assert len(set(epoch.tolist())) == 60 == len(epoch)  # 64 rows, batches of 10
    assert not torch.equal(rows[0], rows[1])


def test_augmentation_draws_from_seed_and_step_and_not_from_the_global_generator():
    trainer = Trainer(lambda: task(augment=noisy), 0)
    once = trainer.batch(4)[0]
    torch.manual_seed(123)
    assert torch.equal(trainer.batch(4)[0], once)
    plain = Trainer(lambda: task(), 0).batch(4)[0]
    assert not torch.equal(once, plain)
    assert not torch.allclose(trainer.batch(5)[0] - Trainer(lambda: task(), 0).batch(5)[0], once - plain)


def test_a_map_style_dataset_gives_the_same_run_as_the_tensors():
    tensors = Trainer(lambda: task(), 0)
    dataset = Trainer(lambda: task(train_data=TensorDataset(X[:64], Y[:64]), val_data=TensorDataset(X[64:], Y[64:])), 0)
    for trainer in (tensors, dataset):
        trainer.train(15, falling)
    assert_same(tensors.state_dict(), dataset.state_dict())
    assert tensors.evaluate() == dataset.evaluate()


def test_reports_on_a_fraction_of_the_validation_data_use_the_same_rows_in_every_trial():
    pairs = (X[64:], Y[64:])
    trainers = [Trainer(partial(task, val_data=data, val_fraction=0.4), seed)
                for data, seed in ((pairs, 3), (TensorDataset(*pairs), 3), (pairs, 4))]  # fmt: skip
    rows = [torch.stack([x for x, _ in t.val_data]) if t is trainers[1] else t.val_data[0] for t in trainers]
    assert [len(found) for found in rows] == [7, 7, 7]  # of 16
    assert {trainer.val_batches for trainer in trainers} == {7 / trainers[0].task.batch_size}
    assert torch.equal(rows[0], rows[1])
    assert not torch.equal(rows[0], rows[2])
    places = [int((pairs[0] == row).all(1).nonzero()) for row in rows[0]]
    assert places == sorted(set(places))
    expected = trainers[0].evaluate((pairs[0][places], pairs[1][places]))
    assert trainers[0].evaluate() == pytest.approx(expected)
    assert trainers[1].evaluate() == pytest.approx(expected)
    assert trainers[0].evaluate() != pytest.approx(trainers[0].evaluate(pairs), rel=1e-3)


# -- learning rates ----------------------------------------------------------------------------------------------------


def used(trainer):
    """Have `trainer` note the LR of every group at every update."""
    seen, step = [], trainer.task.optimizer.step

    def noting(*args):
        seen.append([group["lr"] for group in trainer.task.optimizer.param_groups])
        return step(*args)

    trainer.task.optimizer.step = noting
    return seen


def test_the_lr_is_applied_after_the_restore(tmp_path):
    """`Optimizer.load_state_dict` brings the old LR back: the very first update after it must be at the new one."""
    old = Trainer(lambda: task(), 0)
    old.train(10, lambda step: 0.7)
    old.save(tmp_path)
    new = Trainer(lambda: task(), 0)
    new.load(tmp_path)
    assert new.task.optimizer.param_groups[0]["lr"] == 0.7  # what it would be without us
    seen = used(new)
    new.train(12, lambda step: 0.01)
    assert seen == [[0.01], [0.01]]
    twin = Trainer(lambda: task(), 0)
    twin.train(12, lambda step: 0.7 if step < 10 else 0.01)
    assert_same(new.state_dict(), twin.state_dict())


def test_the_lr_of_the_update_from_t_is_that_of_step_t():
    trainer = Trainer(lambda: task(), 0)
    seen = used(trainer)
    trainer.train(4, lambda step: 0.1 * (step + 1))
    assert seen == [[pytest.approx(0.1 * (step + 1))] for step in range(4)]


def groups(model):
    return torch.optim.SGD(
        [{"params": list(model[0].parameters()), "lr": 0.2}, {"params": list(model[4].parameters()), "lr": 0.05}],
        lr=0.1,
    )


def test_parameter_groups_keep_the_ratio_they_were_built_with(tmp_path):
    trainer = Trainer(lambda: task(groups), 0)
    seen = used(trainer)
    trainer.train(1, lambda step: 0.4)
    trainer.save(tmp_path)
    again = Trainer(lambda: task(groups), 0)
    again.load(tmp_path)
    later = used(again)
    again.train(2, lambda step: 0.002)
    assert seen == [pytest.approx([0.4, 0.1])]
    assert later == [pytest.approx([0.002, 0.0005])]


def test_an_optimizer_built_without_an_lr_is_refused():
    with pytest.raises(ValueError, match="lr > 0 in its first group, got 0"):
        Trainer(lambda: task(lambda model: sgd(model, lr=0.0)), 0)


def test_gradients_are_clipped_to_the_norm_asked_for():
    trainer = Trainer(lambda: task(sgd, clip_norm=1e-3), 0)
    before = [p.detach().clone() for p in trainer.model.parameters()]
    trainer.train(1, lambda step: 1.0)
    moved = torch.stack([(a - b).norm() for a, b in zip(before, trainer.model.parameters(), strict=True)]).norm()
    assert float(moved.detach()) == pytest.approx(1e-3, rel=1e-3)


# -- evaluation --------------------------------------------------------------------------------------------------------


def test_evaluation_changes_nothing():
    trainer = Trainer(lambda: task(), 0, averaging=True)
    trainer.train(10, falling)
    before, random = copy.deepcopy(trainer.state_dict()), torch.random.get_rng_state()
    first = trainer.evaluate()
    trainer.evaluate(averaged=True)
    trainer.evaluate((X, Y))
    after = trainer.state_dict()
    assert before["averages"].pop("best") is None
    assert after["averages"].pop("best") in (0, 1, 2)  # what was found
    assert_same(after, before)
    assert torch.equal(torch.random.get_rng_state(), random)
    assert trainer.evaluate() == first
    assert trainer.model.training


def test_evaluation_is_the_mean_over_all_rows_whatever_the_batch_size():
    results = [Trainer(lambda size=size: task(eval_batch_size=size), 0).evaluate() for size in (3, 5, 16, 1000)]
    model = Trainer(lambda: task(), 0).model.eval()
    with torch.no_grad():
        output = model(X[64:])
    expected = dict(loss=nn.functional.cross_entropy(output, Y[64:]).item(), accuracy=accuracy(output, Y[64:]).item())
    for result in results:
        assert result == pytest.approx(expected, rel=1e-6)


def test_the_training_loss_is_the_mean_over_the_steps_of_the_call():
    whole, parts = Trainer(lambda: task(), 0), Trainer(lambda: task(), 0)
    losses = [parts.train(step, falling) for step in range(1, 9)]
    assert whole.train(8, falling) == pytest.approx(sum(losses) / 8, rel=1e-5)
    assert whole.train(8, falling) == 0.0  # nothing left to train


def test_a_diverging_training_reports_it_and_goes_on():
    trainer = Trainer(lambda: task(sgd, model=lambda: nn.Linear(6, 2)), 0)
    loss = trainer.train(60, lambda step: 1e38)
    assert not math.isfinite(loss)
    assert not math.isfinite(trainer.evaluate()["loss"])


# -- what is asked of a task -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("asked", "expected"), [(False, []), (True, [None]), ("reduce-overhead", ["reduce-overhead"])])
def test_compile_is_off_on_or_a_mode(asked, expected, monkeypatch):
    modes = []
    monkeypatch.setattr(torch, "compile", lambda model, mode: modes.append(mode) or model)
    trainer = Trainer(lambda: task(compile=asked), 0)
    trainer.train(2, falling)
    assert modes[-1:] == expected


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch_size": 0}, "batch_size must be at least 1, got 0"),
        ({"batch_size": 65}, "train_data has 64 rows, and batch_size is 65"),
        ({"val_data": (X[:0], Y[:0])}, "val_data is empty"),
        ({"val_fraction": 0.0}, "val_fraction must be a finite number in .0.0, 1.0., got 0.0"),
        ({"val_fraction": 1.5}, "val_fraction .* got 1.5"),
        ({"clip_norm": -1.0}, r"clip_norm \(None turns clipping off\) must be a finite number in .0.0, inf., got -1.0"),
        ({"clip_norm": 0}, "clip_norm .* got 0"),
        ({"clip_norm": math.nan}, "clip_norm .* got nan"),
        ({"clip_norm": math.inf}, "clip_norm .* got inf"),
        ({"clip_norm": "1"}, "clip_norm .* must be a number, got '1'"),
        ({"clip_norm": True}, "clip_norm .* must be a number, got True"),
        (
            {"model": lambda: nn.Linear, "optimizer": lambda model: None},
            r"model must be an nn.Module, got <class .*Linear.*\(type\)",
        ),
        ({"modules": [nn.Linear(1, 1)]}, r"modules must be a dict, as {\"teacher\": teacher}, got \[Linear"),
        ({"modules": {"x": 3}}, r"modules\['x'\] must be an nn.Module, got 3"),
        ({"loss": None}, r"loss must be a function, or an object that can be called, got None"),
        ({"loss": nn.CrossEntropyLoss}, "loss must be a function, .*CrossEntropyLoss"),
        ({"augment": 3}, "augment .None: none. must be a function, .*got 3"),
        ({"autocast": "bf16"}, "autocast must be True, False, torch.bfloat16 or torch.float16, got 'bf16'"),
        ({"autocast": torch.int8}, "autocast must be .* got torch.int8"),
        ({"scaler": "x"}, "scaler must be a torch.amp.GradScaler or None, got 'x'"),
        ({"compile": "yes"}, "compile='yes' is refused by torch.compile: .*reduce-overhead"),
        ({"compile": 1}, "compile, if it is no mode of torch.compile, must be True or False, got 1"),
        ({"metrics": [accuracy]}, r"metrics must be a dict, as {\"accuracy\": accuracy}, got \[<function accuracy"),
        (
            {"metrics": {"loss": accuracy}},
            "metrics has 'loss', and \"val_loss\" is reported anyway: choose another name",
        ),
        ({"metrics": {"batches": accuracy}}, "metrics has 'batches', and \"val_batches\" is reported anyway"),
        ({"metrics": {"": accuracy}}, "each name in metrics must be a string that is not empty, got ''"),
        ({"metrics": {3: accuracy}}, "each name in metrics must be a string that is not empty, got 3"),
        ({"metrics": {"a": 3}}, r"metrics\['a'\] must be a function, .*got 3 \(int\)"),
        ({"metrics": {"a": nn.L1Loss}}, r"metrics\['a'\] must be a function, .*L1Loss.*\(type\)"),
    ],
)
def test_a_task_that_cannot_be_trained_is_refused(options, message):
    with pytest.raises((TypeError, ValueError), match=message):
        task(**options)


def test_a_build_function_that_returns_something_else_is_refused():
    with pytest.raises(TypeError, match="must return a TrainingTask, got int"):
        Trainer(lambda: 3)
