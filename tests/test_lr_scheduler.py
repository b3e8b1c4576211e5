"""LearnedLRScheduler: a learned schedule as one of torch's own."""

from __future__ import annotations

import copy
import io
import subprocess
import sys
import weakref

import pytest
import torch
from torch import nn
from torch.optim.lr_scheduler import ChainedScheduler, ConstantLR, ExponentialLR, LambdaLR, SequentialLR

from autolrs_ray.outcome.schedule import LearnedLRScheduler, LearnedSchedule
from tests.schedules import RACE, STAGES


def optimizer(*lrs):
    parameters = [nn.Parameter(torch.ones(1)) for _ in lrs]
    return torch.optim.SGD([{"params": [p], "lr": lr} for p, lr in zip(parameters, lrs, strict=True)], lr=1.0)


def replay(optim, scheduler, steps):
    seen = []
    for _ in range(steps):
        seen.append([float(group["lr"]) for group in optim.param_groups])
        optim.step()
        scheduler.step()
    return seen


def test_the_torch_scheduler_replays_the_schedule():
    optim = optimizer(0.1)
    seen = replay(optim, LearnedLRScheduler(optim, STAGES), 100)
    assert [lr for (lr,) in seen] == [STAGES.lr_at(step) for step in range(100)]


def test_training_past_the_schedules_end_is_warned_of_once_and_training_to_it_is_not():
    optim = optimizer(0.1)
    scheduler = LearnedLRScheduler(optim, STAGES)
    replay(optim, scheduler, 100)
    optim.step()
    with pytest.warns(UserWarning, match=r"ends at step 100, and training goes on.*stretch\(total_steps\)"):
        scheduler.step()
    assert replay(optim, scheduler, 5) == [[STAGES.lr_at(99)]] * 5
    part = LearnedSchedule(100, STAGES.pieces[:2])  # of a run that has come to step 30
    scheduler = LearnedLRScheduler(optimizer(0.1), part)
    with pytest.warns(UserWarning, match="ends at step 30"):
        replay(scheduler.optimizer, scheduler, 40)


def test_parameter_groups_keep_the_ratios_of_their_initial_learning_rates():
    optim = optimizer(0.1, 0.02, 0.0)
    for step, lrs in enumerate(replay(optim, LearnedLRScheduler(optim, STAGES), 40)):
        assert lrs == pytest.approx([STAGES.lr_at(step), 0.2 * STAGES.lr_at(step), 0.0])


def test_an_optimizer_without_an_lr_in_its_first_group_is_refused():
    with pytest.raises(ValueError, match="lr > 0 in its first group, got 0"):
        LearnedLRScheduler(optimizer(0.0, 0.1), STAGES)


def test_a_path_is_refused_with_what_reads_it():
    with pytest.raises(TypeError, match=r"got 'learned.json'; LearnedSchedule.load reads files"):
        LearnedLRScheduler(optimizer(0.1), "learned.json")


def test_its_state_loads_with_weights_only_and_a_resumed_replay_goes_on_where_it_was():
    whole_optim = optimizer(0.1, 0.05)
    whole = replay(whole_optim, LearnedLRScheduler(whole_optim, STAGES), 60)
    seen, states = [], None
    for steps in (13, 20, 27):  # resumed twice
        optim = optimizer(0.1, 0.05)
        scheduler = LearnedLRScheduler(optim, STAGES if states is None else RACE)  # the state brings its own schedule
        if states is not None:
            loaded = torch.load(io.BytesIO(states), weights_only=True)
            optim.load_state_dict(loaded["optimizer"])
            scheduler.load_state_dict(loaded["scheduler"])
            assert scheduler.schedule == STAGES
        seen += replay(optim, scheduler, steps)
        buffer = io.BytesIO()
        torch.save({"optimizer": optim.state_dict(), "scheduler": scheduler.state_dict()}, buffer)
        states = buffer.getvalue()
    assert seen == whole


def test_last_epoch_resumes_in_torchs_own_way():
    optim = optimizer(0.1)
    with pytest.raises(KeyError, match="'initial_lr' is not specified in param_groups\\[0\\]"):
        LearnedLRScheduler(optim, STAGES, last_epoch=28)
    for group in optim.param_groups:
        group["initial_lr"] = 0.1
    scheduler = LearnedLRScheduler(optim, STAGES, last_epoch=28)
    assert scheduler.get_last_lr() == [pytest.approx(0.2)]
    optim.step()
    scheduler.step()
    assert scheduler.get_last_lr() == [pytest.approx(STAGES.lr_at(30))]
    with pytest.warns(UserWarning, match="epoch parameter"):  # torch's deprecated way to jump
        scheduler.step(4)
    assert (scheduler.get_last_lr(), scheduler.last_epoch) == ([0.25], 4)


# Torch's own LambdaLR with the values written into it is the twin: whatever torch does with that, it must do with ours.
BEHIND = {
    "alone": lambda optim, scheduler: scheduler,
    "chained": lambda optim, scheduler: ChainedScheduler([scheduler, ExponentialLR(optim, 0.9)], optim),
    "first": lambda optim, scheduler: SequentialLR(optim, [scheduler, ConstantLR(optim, 0.5, 100)], [12]),
    "second": lambda optim, scheduler: SequentialLR(optim, [ConstantLR(optim, 0.5, 100), scheduler], [12]),
}


@pytest.mark.parametrize("tensor", [False, True], ids=["float", "tensor"])
@pytest.mark.parametrize("behind", BEHIND.values(), ids=BEHIND.keys())
def test_it_does_what_torchs_own_scheduler_of_the_same_values_does(behind, tensor):
    sequences = []
    for ours in (True, False):
        optim = optimizer(*((torch.tensor(lr) if tensor else lr) for lr in (0.1, 0.02)))
        tensors = [group["lr"] for group in optim.param_groups]
        scheduler = LearnedLRScheduler(optim, STAGES) if ours else LambdaLR(optim, lambda t: STAGES.lr_at(t) / 0.1)
        whole = behind(optim, scheduler)
        seen = []
        for _ in range(60):
            assert whole.get_last_lr() == [group["lr"] for group in optim.param_groups]
            seen += [float(group["lr"]) for group in optim.param_groups]
            optim.step()
            whole.step()
        sequences.append(seen)
        assert not tensor or all(group["lr"] is lr for group, lr in zip(optim.param_groups, tensors, strict=True))
    assert sequences[0] == pytest.approx(sequences[1], rel=1e-6)
    assert len(set(sequences[0])) >= 20


@pytest.mark.parametrize("behind", BEHIND.values(), ids=BEHIND.keys())
def test_its_state_comes_back_from_behind_other_schedulers(behind):
    def build(schedule):
        optim = optimizer(0.1, 0.02)
        return optim, behind(optim, LearnedLRScheduler(optim, schedule))

    whole = replay(*build(STAGES), 40)
    optim, scheduler = build(STAGES)
    seen, buffer = replay(optim, scheduler, 20), io.BytesIO()
    torch.save([optim.state_dict(), scheduler.state_dict()], buffer)
    buffer.seek(0)
    optim, scheduler = build(RACE)
    for target, state in zip((optim, scheduler), torch.load(buffer, weights_only=True), strict=True):
        target.load_state_dict(state)
    assert seen + replay(optim, scheduler, 20) == whole


def test_a_copy_goes_on_by_itself():
    optim = optimizer(0.1, 0.02)
    scheduler = LearnedLRScheduler(optim, STAGES)
    replay(optim, scheduler, 7)
    twin = copy.deepcopy(scheduler)
    assert twin.optimizer is not optim
    ahead = replay(twin.optimizer, twin, 20)
    assert (scheduler.last_epoch, optim.param_groups[0]["lr"]) == (7, STAGES.lr_at(7))
    assert replay(optim, scheduler, 20) == ahead


def test_steps_in_the_wrong_order_are_warned_of():
    with pytest.warns(UserWarning, match=r"`lr_scheduler.step\(\)` before `optimizer.step\(\)`"):
        LearnedLRScheduler(optimizer(0.1), STAGES).step()
    optim = optimizer(0.1)
    scheduler = LearnedLRScheduler(optim, STAGES)
    optim.step = lambda: None
    with pytest.warns(UserWarning, match=r"`optimizer.step\(\)` has been overridden"):
        scheduler.step()


@pytest.mark.parametrize("given", [{"lr": 0.02}, {}], ids=["own LR", "default LR"])
@pytest.mark.parametrize("tensor", [False, True], ids=["float", "tensor"])
def test_a_group_that_is_added_later_follows_with_the_ratio_of_the_lr_it_comes_with(given, tensor):
    weights = [nn.Parameter(torch.ones(1)) for _ in range(2)]
    optim = torch.optim.SGD(weights[:1], lr=torch.tensor(0.1) if tensor else 0.1)
    scheduler = LearnedLRScheduler(optim, STAGES)
    replay(optim, scheduler, 7)
    optim.add_param_group({"params": weights[1:], **given})
    optim.step()
    scheduler.step()
    ratio = given.get("lr", 0.1) / 0.1
    for step, lrs in enumerate(replay(optim, scheduler, 30), 8):
        assert [float(lr) for lr in lrs] == pytest.approx([STAGES.lr_at(step), ratio * STAGES.lr_at(step)])
    state = scheduler.state_dict()
    again = LearnedLRScheduler(optim, RACE)
    again.load_state_dict(state)
    assert [float(lr) for lr in again.get_lr()] == pytest.approx([STAGES.lr_at(38), ratio * STAGES.lr_at(38)])


def test_it_holds_no_cycle_that_would_keep_model_and_optimizer_alive():
    optim = optimizer(0.1)
    scheduler = LearnedLRScheduler(optim, STAGES)
    replay(optim, scheduler, 2)
    gone = weakref.ref(optim)
    del optim, scheduler
    assert gone() is None  # at once, without the garbage collector


def test_replaying_needs_no_ray():
    code = "import sys, autolrs_ray.outcome.schedule; print('ray' in sys.modules)"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout == "False\n"
