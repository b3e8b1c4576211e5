"""The learned schedule: what was learned can be kept, read and replayed without Ray."""

from __future__ import annotations

import copy
import io
import subprocess
import sys
import time
import weakref
from itertools import accumulate, pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.optim.lr_scheduler import ChainedScheduler, ConstantLR, ExponentialLR, LambdaLR, SequentialLR

from autolrs_ray.core.policies import make_policy
from autolrs_ray.outcome.history import History
from autolrs_ray.outcome.schedule import LearnedLRScheduler, LearnedSchedule, Piece
from autolrs_ray.record.record import Record
from tests.simulation import Simulation

STAGES = LearnedSchedule(100, (Piece(0, 10, 0.5, None, 10), Piece(10, 30, 0.2), Piece(30, 100, 0.05, "linear")))
RACE = LearnedSchedule(100, (Piece(0, 100, 0.3, "quadratic"),))


# -- the function ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("step", "lr"),
    [
        (0, 0.05), (4, 0.25), (9, 0.5),  # a linear rise
        (10, 0.2), (29, 0.2),  # the boundary belongs to the new stage
        (30, 0.05 * 0.7), (65, 0.05 * 0.35), (99, 0.05 * 0.01),
        (100, 0.05 * 0.01), (10_000, 0.05 * 0.01),  # past its end it is held
    ],
)  # fmt: skip
def test_the_learning_rate_has_its_written_out_values(step, lr):
    assert STAGES.lr_at(step) == pytest.approx(lr)


def test_the_race_follows_its_envelope():
    assert [RACE.lr_at(step) for step in (0, 50, 90)] == pytest.approx([0.3, 0.3 * 0.75, 0.3 * 0.19])


def test_a_step_that_no_piece_covers_is_an_error_and_not_a_guess():
    gap = LearnedSchedule(100, (Piece(10, 20, 0.1), Piece(30, 40, 0.2)))
    assert gap.lr_at(19) == 0.1
    assert gap.lr_at(99) == 0.2
    for step in (-1, 0, 9, 20, 29):
        with pytest.raises(ValueError, match=f"no learning rate at step {step}"):
            gap.lr_at(step)
    with pytest.raises(ValueError, match="no learning rate at step 0"):
        LearnedSchedule(100, ()).lr_at(0)


def test_a_schedule_of_a_hundred_thousand_pieces_is_looked_up_quickly():
    schedule = LearnedSchedule(100_000, tuple(Piece(i, i + 1, 0.1 + i) for i in range(100_000)))
    began = time.perf_counter()
    assert [schedule.lr_at(step) for step in range(0, 100_000, 50)] == [0.1 + i for i in range(0, 100_000, 50)]
    assert time.perf_counter() - began < 1.0  # a scan of the pieces takes 20 s


@pytest.mark.parametrize(
    ("pieces", "error", "message"),
    [
        ([(10, 20, 0.1), (0, 10, 0.1)], ValueError, "in order"),
        ([(0, 20, 0.1), (10, 30, 0.1)], ValueError, "must not overlap"),
        ([(0, 0, 0.1)], ValueError, "end must be at least 1, got 0"),
        ([(-1, 5, 0.1)], ValueError, "start must be at least 0, got -1"),
        ([(0, 5, float("nan"))], ValueError, "lr must be a finite number .* got nan"),
        ([(0, 5, -0.1)], ValueError, "lr must be a finite number .* got -0.1"),
        ([(0, 5, "0.1")], TypeError, "lr must be a number, got '0.1'"),
        ([(0.5, 5, 0.1)], TypeError, "start must be an int, got 0.5"),
    ],
)
def test_a_schedule_that_makes_no_sense_is_refused(pieces, error, message):
    with pytest.raises(error, match=message):
        LearnedSchedule(30, tuple(Piece(*piece) for piece in pieces))


# -- over another number of steps --------------------------------------------------------------------------------------


def test_a_stretched_schedule_has_the_same_course():
    for times in (1, 2, 7):
        long = STAGES.stretch(100 * times)
        assert long.total_steps == 100 * times
        assert [(p.start, p.end, p.warmup_steps) for p in long.pieces] == [
            (0, 10 * times, 10 * times), (10 * times, 30 * times, 0), (30 * times, 100 * times, 0),
        ]  # fmt: skip
        assert [long.lr_at(step * times) for step in range(10, 100)] == pytest.approx(
            [STAGES.lr_at(step) for step in range(10, 100)]
        )
        assert long.lr_at(10 * times - 1) == STAGES.lr_at(9) == 0.5  # the end of the rise
        assert long.stretch(100) == STAGES


@settings(deadline=None, max_examples=100)
@given(st.integers(1, 2**53), st.lists(st.integers(1, 50), min_size=1, max_size=8))
def test_whatever_the_length_a_stretched_schedule_has_no_gaps_and_the_same_rates(total, lengths):
    edges = [0, *accumulate(lengths)]
    schedule = LearnedSchedule(edges[-1], tuple(Piece(a, b, 0.1 + a) for a, b in pairwise(edges)))
    stretched = schedule.stretch(total)
    assert (stretched.pieces[0].start, stretched.pieces[-1].end) == (0, total)
    assert all(before.end == after.start for before, after in pairwise(stretched.pieces))
    assert [piece.lr for piece in stretched.pieces] == sorted({piece.lr for piece in stretched.pieces})
    if total >= edges[-1]:
        assert len(stretched.pieces) == len(lengths)


def test_a_schedule_cannot_be_stretched_to_nothing():
    with pytest.raises(ValueError, match="total_steps must be at least 1, got 0"):
        RACE.stretch(0)


# -- from a run --------------------------------------------------------------------------------------------------------


def run(name, **options):
    simulation = Simulation(make_policy(name, 100, (1e-3, 1.0), **options)).run()
    config = dict(total_steps=100, policy=name, options={k: v for k, v in options.items() if k != "seed"})
    return simulation, config


def learned(events, config):
    return LearnedSchedule.of(History.of([{"event": "start", "config": config}, *events]))


PAPER = dict(stage_steps=20, max_stage_steps=40, probe_steps=5, num_lrs=3)


@pytest.mark.parametrize("options", [{}, {"warmup_steps": 10, "warmup_lr": 0.2}, {"envelope": "cosine"}])
def test_a_papers_run_is_replayed_step_by_step(options):
    simulation, config = run("paper", **PAPER, **options, promote=False)
    schedule = learned(simulation.events, config)
    for segment in simulation.started:
        if segment.role == "main":
            for step in range(segment.start, segment.end):
                assert schedule.lr_at(step) == pytest.approx(segment.lr_at(step), rel=1e-12)
    assert schedule.pieces[-1].end == 100
    assert simulation.toy.train(100, schedule.lr_at).loss == simulation.policy.loss


def test_a_race_is_replayed_step_by_step():
    simulation, config = run("anchored", num_lrs=4)
    (done,) = simulation.of("done")
    schedule = learned(simulation.events, config)
    assert simulation.toy.train(100, schedule.lr_at).loss == done["loss"]


def test_a_stage_that_was_trained_twice_counts_once():
    simulation = Simulation(make_policy("paper", 100, (1e-3, 1.0), **PAPER))
    while len(simulation.of("commit")) < 2:
        simulation.act()
    simulation.policy.lost(simulation.policy.checkpoint)
    simulation.running.clear()
    simulation.run()
    assert len(simulation.of("commit")) == 4
    schedule = learned(simulation.events, dict(total_steps=100, policy="paper", options={}))
    assert [(piece.start, piece.end) for piece in schedule.pieces] == [(0, 20), (20, 60), (60, 100)]


def test_a_run_with_an_envelope_of_its_own_can_be_read_but_not_replayed():
    events = [{"event": "commit", "arm": "t00", "lr": 0.1, "end": 100}]
    config = dict(total_steps=100, policy="anchored", options={"envelope": "my_own"})
    schedule = learned(events, config)
    for use in (lambda: schedule.lr_at(0), schedule.to_json):
        with pytest.raises(ValueError, match=r"unknown envelope 'my_own'.*cannot be replayed"):
            use()


def test_a_run_that_has_committed_nothing_has_an_empty_schedule():
    for policy in ("paper", "anchored"):
        assert learned([], dict(total_steps=9, policy=policy, options={})).pieces == ()


def test_a_journal_with_a_damaged_commit_still_gives_the_rest():
    simulation, config = run("paper", **PAPER)
    rows = [event for event in simulation.events if not (event["event"] == "commit" and event["start"] == 20)]
    schedule = learned(rows, config)
    assert schedule.lr_at(0) > 0
    with pytest.raises(ValueError, match="no learning rate at step 20"):
        schedule.lr_at(20)


# -- files -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("schedule", [STAGES, RACE, LearnedSchedule(5, ())])
def test_json_comes_back_as_it_was(schedule, tmp_path):
    assert LearnedSchedule.from_json(schedule.to_json()) == schedule
    (tmp_path / "s.json").write_text(schedule.to_json())
    assert LearnedSchedule.load(tmp_path / "s.json") == schedule


@pytest.mark.parametrize("schedule", [STAGES, RACE])
def test_csv_comes_back_with_the_same_learning_rate_at_every_step(schedule, tmp_path):
    schedule.write_csv(tmp_path / "s.csv")
    loaded = LearnedSchedule.load(tmp_path / "s.csv")
    assert [loaded.lr_at(step) for step in range(101)] == [schedule.lr_at(step) for step in range(101)]
    assert loaded.total_steps == 100


@pytest.mark.parametrize("every", [1, 7, 10, 33, 99, 100, 300])
def test_a_csv_of_every_nth_step_keeps_the_length_of_the_run(every, tmp_path):
    for schedule in (STAGES, RACE):
        schedule.write_csv(tmp_path / "s.csv", every)
        loaded = LearnedSchedule.load(tmp_path / "s.csv")
        assert loaded.total_steps == schedule.total_steps == loaded.pieces[-1].end
        assert [loaded.lr_at(step) for step in (*range(0, 100, every), 99)] == [
            schedule.lr_at(step) for step in (*range(0, 100, every), 99)
        ]


def test_a_csv_of_a_million_billion_rows_is_refused_before_it_is_begun(tmp_path):
    long = LearnedSchedule(10**15, (Piece(0, 10**15, 0.1, "linear"),))
    with pytest.raises(ValueError, match=r"1,000,000,000,000,000 rows are too many.*a larger `every`, or JSON"):
        long.to_csv()
    assert len(long.to_csv(10**14).splitlines()) == 12
    with pytest.raises(ValueError, match="every must be at least 1, got 0"):
        RACE.to_csv(0)


def test_a_coarse_csv_is_held_from_row_to_row(tmp_path):
    STAGES.write_csv(tmp_path / "s.csv", every=10)
    assert (tmp_path / "s.csv").read_text().splitlines()[:3] == ["step,lr", "0,0.05", "10,0.2"]
    loaded = LearnedSchedule.load(tmp_path / "s.csv")
    assert [loaded.lr_at(step) for step in (0, 9, 10, 29)] == [0.05, 0.05, 0.2, 0.2]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "not a learned schedule"),
        ("{}", "not a learned schedule"),
        ("[]", "not a learned schedule"),
        ("null", "not a learned schedule"),
        ("[" * 100_000, "not a learned schedule"),
        ('{"format": 2}', "format 2 is not 1"),
        ('{"format": 1, "total_steps": 5, "pieces": [{"start": 0}]}', "not a learned schedule"),
        ('{"format": 1, "total_steps": 5, "pieces": [{"start": 0, "end": 5, "lr": "x"}]}', "lr must be a number"),
        (
            '{"format": 1, "total_steps": 5, "pieces": [{"start": 0, "end": 5, "lr": 1, "envelope": "no"}]}',
            "envelope 'no'",
        ),
        ('{"format": 1, "total_steps": 5, "pieces": [{"start": 0, "end": 5, "lr": 1, "colour": 1}]}', "colour"),
    ],
)
def test_a_file_that_is_no_schedule_is_refused(text, message, tmp_path):
    (tmp_path / "s.json").write_text(text)
    with pytest.raises(ValueError, match=message):
        LearnedSchedule.load(tmp_path / "s.json")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "no rows"),
        ("step,lr\n", "no rows"),
        ("a,b\n1,2\n", r"not a learned schedule: expected rows step,lr .*'step'"),
        ("step,lr\n0,x\n", "not a learned schedule.*'x'"),
        ("step,lr\n0\n", "not a learned schedule"),
        ("step,lr\n5,0.1\n2,0.1\n", "end must be at least 6, got 2"),
    ],
)
def test_a_csv_that_is_no_schedule_is_refused(text, message, tmp_path):
    (tmp_path / "s.csv").write_text(text)
    with pytest.raises(ValueError, match=message):
        LearnedSchedule.load(tmp_path / "s.csv")


def test_a_run_folder_is_a_schedule_too(tmp_path):
    simulation, config = run("paper", **PAPER)
    record = Record(tmp_path)
    record.append([{"event": "start", "config": config}, *simulation.events])
    record.close()
    loaded = LearnedSchedule.load(tmp_path)
    assert loaded == learned(simulation.events, config)


# -- the torch scheduler -----------------------------------------------------------------------------------------------


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
