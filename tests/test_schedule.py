"""The learned schedule: what was learned can be kept, read and replayed without Ray."""

from __future__ import annotations

import json
import time
from itertools import accumulate, pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from autolrs_ray.core.policies import make_policy
from autolrs_ray.outcome.history import History
from autolrs_ray.outcome.schedule import LearnedSchedule, Piece
from autolrs_ray.record.record import Record
from tests.schedules import RACE, STAGES
from tests.simulation import Simulation

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


def json_of(*edges, lr=0.1, growth=()):
    pieces = [{"start": start, "end": end, "lr": lr} for start, end in edges or [(0, 50)]]
    return json.dumps({"format": 1, "total_steps": 50, "pieces": pieces, "batch_growth": growth})


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
        (json_of((0, 100)), "last piece must end at total_steps=50 or before, got 100"),
        (json_of((0, 10), (20, 50)), "no learning rate from step 10 to 20: add a piece"),
        (json_of((5, 50)), "no learning rate from step 0 to 5"),
        (json_of(lr=10**400), "lr must be a finite number"),
        (json_of(growth=3), "batch_growth cannot be 3"),
        (json_of(growth=[[1]]), r"batch_growth\[0\] cannot be \[1\]"),
        (json_of(growth=[[5, 2.5]]), r"batch_growth\[0\]\[1\] cannot be 2.5"),
        (json_of(growth=[[5, -2]]), "the multiple of the batch from step 5 on must be at least 2, got -2"),
        (json_of(growth=[[-5, 2]]), "each step of batch_growth must be at least 0, got -5"),
        (json_of(growth=[[5, 2], [3, 4]]), r"batch_growth must rise from step to step, got \[\[5, 2\], \[3, 4\]\]"),
        (json_of(growth=[[3, 4], [5, 2]]), "batch_growth must rise from step to step"),
    ],
)
def test_a_file_that_is_no_schedule_is_refused(text, message, tmp_path):
    (tmp_path / "s.json").write_text(text)
    with pytest.raises(ValueError, match=f"{tmp_path}/s.json: .*{message}"):
        LearnedSchedule.load(tmp_path / "s.json")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "no rows"),
        ("step,lr\n", "no rows"),
        ("a,b\n1,2\n", r"not a learned schedule: expected rows step,lr .*'step'"),
        ("step,lr\n0,x\n", "not a learned schedule.*'x'"),
        ("step,lr\n0\n", "not a learned schedule"),
        ("step,lr\n5,0.1\n2,0.1\n", "steps must rise from row to row, got 2 after 5: sort them, each once"),
        ("step,lr\n0,0.1\n0,0.2\n", "steps must rise from row to row, got 0 after 0"),
        ("step,lr\n5,0.1\n9,0.1\n", "no learning rate from step 0 to 5"),
        ("step,lr\n0,nan\n", "lr must be a finite number .* got nan"),
        ("step,lr,batch\n0,0.1,0\n3,0.1,1\n", "batch at step 0 must be at least 1, got 0"),
        ("step,lr,batch\n0,0.1,1\n3,0.1,-2\n", "batch at step 3 must be at least 1, got -2"),
        ("step,lr,batch\n0,0.1,4\n3,0.1,2\n", r"batch_growth must rise from step to step, got \[\(0, 4\), \(3, 2\)\]"),
        ('step,lr\n0,"' + "1" * 200_000 + '"', "not a learned schedule: expected rows step,lr .*field larger"),
    ],
)
def test_a_csv_that_is_no_schedule_is_refused(text, message, tmp_path):
    (tmp_path / "s.csv").write_text(text)
    with pytest.raises(ValueError, match=f"{tmp_path}/s.csv: .*{message}"):
        LearnedSchedule.load(tmp_path / "s.csv")


def test_a_csv_as_excel_writes_it_is_read(tmp_path):
    (tmp_path / "S.CSV").write_text("step,lr,batch\r\n0,0.1,2\r\n5,0.2,4\r\n", "utf-8-sig", newline="")
    loaded = LearnedSchedule.load(tmp_path / "S.CSV")
    assert [(loaded.lr_at(step), loaded.batches_at(step)) for step in (0, 4, 5)] == [(0.1, 2), (0.1, 2), (0.2, 4)]


def test_a_file_that_is_no_text_is_named(tmp_path):
    (tmp_path / "s.json").write_bytes(b"\xff\xfe\x00junk")
    with pytest.raises(ValueError, match=f"{tmp_path}/s.json: .*can't decode"):
        LearnedSchedule.load(tmp_path / "s.json")


def test_a_run_folder_is_a_schedule_too(tmp_path):
    simulation, config = run("paper", **PAPER)
    record = Record(tmp_path)
    record.append([{"event": "start", "config": config}, *simulation.events])
    record.close()
    loaded = LearnedSchedule.load(tmp_path)
    assert loaded == learned(simulation.events, config)
