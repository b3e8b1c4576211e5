"""The comparison's own machinery: what it looks up is what would have been trained, choices never see the test split,
and the problems with known answers come out as known."""

from __future__ import annotations

import copy
import json
import math
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from autolrs_ray.core.policies import make_policy
from autolrs_ray.training.local import run_local
from autolrs_ray.training.trainer import Trainer
from experiments import compare, known_answers
from experiments.compare_lab import Lab
from experiments.compare_methods import METHODS, anchored, one_cycle, paper, scaled_rungs, tuned
from experiments.compare_optimizers import schedule_free_plus
from experiments.compare_report import cost_table, costs, mean_se, summarise, verdict
from experiments.compare_tasks import GRID, Task, make_task
from experiments.memo import Memo, MemoTrainer, PerRunOrderTrainer
from experiments.schedule_free_plus import ScheduleFreePlus
from experiments.slots import run_slots


@pytest.fixture(scope="module")
def task() -> Task:
    return small_task()


def small_task() -> Task:
    def model() -> torch.nn.Module:
        return torch.nn.Sequential(torch.nn.Flatten(), torch.nn.BatchNorm1d(64), torch.nn.Linear(64, 10))

    return replace(make_task("digits"), steps=40, model=model, commits=4, probe_reports=4)


def options(task: Task) -> dict[str, Any]:
    return dict(num_lrs=5, commits=task.commits)


def memo_trainer(task: Task, folder: Path) -> MemoTrainer:
    return MemoTrainer(
        lambda: Trainer(lambda: task.build(0), 0, averaging=True), Memo(folder / "memo.sqlite"), "root",
        lambda: task.split(0)["test"], train_losses=True,
    )  # fmt: skip


# -- looking up instead of training ------------------------------------------------------------------------------------


@pytest.mark.parametrize("growth", [None, {0.5: 2}])
def test_memo_trainer_gives_the_losses_of_the_plain_trainer_bit_for_bit(
    task: Task, tmp_path: Path, growth: dict[float, int] | None
) -> None:
    def race() -> Any:
        return make_policy("anchored", task.steps, (1e-3, 1.0), batch_growth=growth, **options(task))

    plain = Trainer(lambda: task.build(0), 0, averaging=True)
    expected = run_local(race(), plain)
    memo = memo_trainer(task, tmp_path)
    found = run_local(race(), memo)  # type: ignore[arg-type]
    assert found.events == expected.events
    assert found.trained_steps == expected.trained_steps
    assert memo.evaluate(averaged=True) == plain.evaluate(averaged=True)
    assert memo.trained == expected.trained_steps, "nothing was trained twice"


def test_memo_trainer_takes_the_average_that_is_best_on_validation_data_of_those_that_count(
    task: Task, tmp_path: Path
) -> None:
    plain, memo = Trainer(lambda: task.build(0), 0, averaging=True), memo_trainer(task, tmp_path)
    best = set()
    for lr in (0.003, 0.3):
        for trainer in (plain, memo):
            trainer.reset()
            trainer.train(60, lambda step, lr=lr: lr)  # type: ignore[misc]
        memo.averages = None
        assert memo.evaluate(averaged=True) == plain.evaluate(averaged=True)
        test = task.split(0)["test"]
        assert memo.evaluate_test(averaged=True) == plain.evaluate(test, averaged=True)
        assert memo.evaluate_test(averaged=False) == plain.evaluate(test)
        memo.averages = 1
        assert memo.evaluate(averaged=True) == plain.evaluate_averages()[0]
        assert memo.evaluate_test(averaged=True) == plain.evaluate_averages(test)[0]
        best.add(plain.best_average)
    assert len(best) > 1, "one average is the best at any learning rate"


def test_a_second_run_trains_nothing(task: Task, tmp_path: Path) -> None:
    for _ in range(2):
        trainer = memo_trainer(task, tmp_path)
        policy = make_policy("anchored", task.steps, (1e-3, 1.0), **options(task))
        run = run_slots(policy, trainer, slots=3)
        trainer._memo.flush()
    assert run.steps > task.steps
    assert trainer.trained == 0


def test_memo_trainer_trains_on_from_wherever_a_history_was_known(task: Task, tmp_path: Path) -> None:
    memo, plain = memo_trainer(task, tmp_path), Trainer(lambda: task.build(0), 0, averaging=True)
    memo.train(10, lambda _: 0.1)
    memo.evaluate()
    fork = memo.state_dict()
    memo.train(20, lambda _: 0.01)
    memo.evaluate()
    memo.load_state_dict(fork)
    memo.train(20, lambda _: 0.2)
    plain.train(20, lambda step: 0.1 if step < 10 else 0.2)
    assert memo.evaluate() == plain.evaluate()
    assert memo.trained == 30


def test_training_losses_are_known_in_other_stretches_than_they_were_trained_in(task: Task, tmp_path: Path) -> None:
    memo, plain = memo_trainer(task, tmp_path), Trainer(lambda: task.build(0), 0)
    memo.train(20, lambda _: 0.1)
    memo.reset()
    for until in (3, 17, 20):
        assert memo.train(until, lambda _: 0.1) == plain.train(until, lambda _: 0.1)
    assert memo.trained == 20


def test_without_common_random_numbers_the_order_depends_on_the_first_lr(task: Task) -> None:
    trainer = PerRunOrderTrainer(lambda: task.build(0), 0, averaging=True)
    orders = []
    for lr in (0.1, 0.2, 0.1):
        trainer.reset()
        trainer.train(1, lambda _, lr=lr: lr)
        orders.append(trainer.feed.rows.at(1).tolist())
    assert orders[0] == orders[2] != orders[1]
    state = copy.deepcopy(trainer.state_dict())
    trainer.reset()
    trainer.train(1, lambda _: 0.2)
    trainer.load_state_dict(state)
    assert trainer.feed.rows.at(1).tolist() == orders[0]


# -- the clock ---------------------------------------------------------------------------------------------------------


def test_one_slot_is_the_plain_loop(task: Task, tmp_path: Path) -> None:
    trainer = memo_trainer(task, tmp_path)
    policies = [make_policy("anchored", task.steps, (1e-3, 1.0), **options(task)) for _ in range(2)]
    local = run_local(policies[0], trainer)  # type: ignore[arg-type]
    slots = run_slots(policies[1], trainer, slots=1)
    assert slots.events == local.events
    assert slots.clock == slots.steps == local.trained_steps


def test_many_slots_choose_the_same_and_end_sooner(task: Task, tmp_path: Path) -> None:
    trainer = memo_trainer(task, tmp_path)
    policy = partial(make_policy, "anchored", task.steps, (1e-3, 1.0), **options(task))
    runs = {slots: run_slots(policy(), trainer, slots) for slots in (1, 5)}
    assert runs[1].events[-1]["lr"] == runs[5].events[-1]["lr"]
    assert task.steps <= runs[5].clock < runs[1].clock
    for slots, run in runs.items():
        compute, wall_clock = policy().cost(slots)
        assert run.steps <= compute * task.steps
        assert run.clock <= wall_clock * task.steps


@pytest.mark.parametrize(("slots", "expected"), [(1, 1.9), (10, 1.1)])  # five at a time at most
def test_paper_takes_the_time_of_the_closed_form(slots: int, expected: float, tmp_path: Path) -> None:
    """1 + (k / q - 1) tau' / tau, with promotion: k = 10 probes of tau / 10; and tau for a stage that is trained again."""
    trainer = known_answers.NoisyQuadratic(0)
    trainer.averaging = False
    policy = make_policy("paper", 300, (1e-3, 1.0), stage_steps=50, max_stage_steps=50, concurrency=slots)
    run = run_slots(policy, trainer, slots)
    again = sum(event["event"] == "rollback" for event in run.events) * 50
    assert run.clock / 300 == pytest.approx(expected + again / 300)
    assert run.steps / 300 == pytest.approx(1.9 + again / 300)
    assert policy.usual(slots) == pytest.approx((1.9, expected))
    assert run.clock / 300 <= policy.cost(slots)[1]


# -- methods -----------------------------------------------------------------------------------------------------------


def test_choices_never_see_the_test_split(task: Task, tmp_path: Path) -> None:
    lab = Lab(task, 0, tmp_path)
    reads = []
    trainer = lab.trainer()
    read = trainer.evaluate_test
    trainer.evaluate_test = lambda averaged: reads.append(1) or read(averaged)  # type: ignore[method-assign]
    outcome = tuned(lab, "linear", weights="best")
    assert len(reads) == 1
    assert outcome.lr in GRID["sgd"]
    assert outcome.compute == len(GRID["sgd"])
    found = [lab.memo.get(key) for key in lab.memo._known if key.startswith("val/")]
    assert outcome.val_loss == min(metrics["loss"] for several in found for metrics in several)  # raw, and all averages
    anchored(lab, 4, **options(task))
    paper(lab)
    assert len(reads) == 3


def test_the_race_tells_what_it_costs_on_few_slots_and_many(task: Task, tmp_path: Path) -> None:
    outcome = anchored(Lab(task, 0, tmp_path), 4, **options(task))
    cost = outcome.extra["slots"]
    assert cost[12] == (outcome.compute, outcome.wall_clock)
    assert cost[1][0] == cost[1][1] <= outcome.compute
    walls = [cost[slots][1] for slots in (1, 2, 4, 12)]
    assert walls == sorted(walls, reverse=True)
    assert walls[-1] >= 1.0


def test_ablations_of_the_rule_reach_it(task: Task, tmp_path: Path) -> None:
    lab = Lab(task, 0, tmp_path)
    walks = [
        anchored(lab, 4, **options(task), **rule).extra["walk"]
        for rule in ({}, {"rule": scaled_rungs(2.0)}, {"rule": {"close": 0.9}}, {"rule": {"fractions": (0.5, 1.0)}})
    ]
    assert walks[1] != walks[0]
    assert [rung for rung, *_ in walks[3]] == [0.5, 1.0]
    assert sum(len(kept) for *_, kept in walks[2]) > sum(len(kept) for *_, kept in walks[0])


def test_schedule_free_plus_takes_polyaks_step_and_averages() -> None:
    """Of its first two steps from (3, -1) on the loss 2 |x|: worked out by hand."""
    weights = torch.tensor([3.0, -1.0], requires_grad=True)
    optimizer = ScheduleFreePlus([weights], lambda: float(2 * weights.detach().abs().sum()), lr=0.5)
    points = []
    for _ in range(2):
        (2 * weights.abs().sum()).backward()
        optimizer.step()
        weights.grad = None
        optimizer.eval()
        points.append(weights.detach().clone())
        optimizer.train()
    size = 0.5 * 8.0 / (math.sqrt(math.pi / 2) * 4.0)
    first = torch.tensor([3.0 - size, -1.0 + size])  # all of z, whose step is the sign of the gradient
    torch.testing.assert_close(points[0], first)
    size = 0.5 * 2 * float(first.abs().sum()) / (math.sqrt(math.pi / 2) * 4.0)
    z = first - size * first.sign()
    torch.testing.assert_close(points[1], (first + z) / 2)  # the largest step so far weighs both
    torch.testing.assert_close(weights.detach(), 0.9 * points[1] + 0.1 * z)


def test_schedule_free_plus_needs_no_learning_rate(task: Task, tmp_path: Path) -> None:
    outcome = schedule_free_plus(Lab(task, 0, tmp_path))
    assert outcome.lr is None
    assert outcome.test_loss < 1.5 < math.log(10)


def test_one_cycle_is_torchs(task: Task) -> None:
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0, momentum=0.9)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=1.0, total_steps=1001)
    for step in range(1000):
        assert optimizer.param_groups[0]["lr"] == pytest.approx(one_cycle(step / 1000), abs=5e-3)
        optimizer.step()
        schedule.step()


def test_every_method_of_the_quick_comparison_exists() -> None:
    assert set(compare.QUICK_METHODS) <= set(METHODS)
    assert [name for name in METHODS if name in ("paper", "anchored")] == ["anchored", "paper"]
    with pytest.raises(ValueError, match="unknown method 'anchord'"):
        compare.chosen_methods(["anchord"], quick=False)


def test_tasks_name_what_they_need() -> None:
    with pytest.raises(ValueError, match="--data-dir"):
        make_task("cifar16")
    with pytest.raises(ValueError, match="unknown task 'mnist'"):
        make_task("mnist")


def test_noise_changes_a_fifth_of_the_labels_and_the_characters_keep_their_splits_apart() -> None:
    clean, noisy = (make_task(name).split(3) for name in ("digits", "digits_noise"))
    changed = torch.cat([clean[part][1] != noisy[part][1] for part in clean]).float().mean()
    assert 0.17 < changed < 0.23
    characters = make_task("char_lm")
    split = characters.split(0)
    rows = {part: {tuple(row) for row in inputs.tolist()} for part, (inputs, _) in split.items()}
    assert len(rows["val"] & rows["train"]) < 0.02 * len(rows["val"])  # a few set phrases
    assert torch.equal(split["train"][0][:, 1:], split["train"][1][:, :-1])
    built = characters.build(0)
    assert built.model(split["val"][0][:2]).shape == (2, 104, 32)


# -- the table ---------------------------------------------------------------------------------------------------------


def cached(task: str, method: str, seed: int, loss: float) -> dict[str, Any]:
    outcome = dict(test_loss=loss, test_accuracy=None, compute=7.0, wall_clock=1.0, lr=0.1)
    return dict(
        task=task, method=method, seed=seed, setting="T9", steps=9, outcome=outcome, hardware="h", date="2026-01-01"
    )


def test_mean_and_standard_error() -> None:
    assert mean_se([1.0, 3.0]) == [2.0, 1.0]
    assert mean_se([None, None]) is None
    assert mean_se([2.0]) == [2.0, 0.0]


def test_costs_on_few_slots_and_many() -> None:
    whole = {"1": [7.0, 7], "2": [7.0, 4], "4": [7.0, 2], "12": [7.0, 1]}
    assert costs([None, None], 7.0) == whole
    assert costs([{"1": [2.0, 2.0]}, {"1": [3.0, 3.0]}], 9.0) == {"1": [2.5, 2.5]}
    assert costs([None, {"1": [3.0, 3.0]}], 2.5) == {}
    rows = summarise([cached("digits", method, s, 1.0) for method in ("linear", "anchored") for s in range(3)], METHODS)
    assert [row["slots"] for row in rows] == [whole, whole]
    found = {"slots": {str(n): [1.9, 1.0 + 0.9 / n] for n in (1, 2, 4, 12)}}
    for row in rows:
        row["slots"] = found["slots"]
    assert "| anchored: Digits (8 x 8 images, SGD) | 1.90 / 1.90 | 1.90 / 1.45 |" in cost_table(rows)
    assert "| PBT, PB2: 12 trials | 12.00 / 12.00 | 12.00 / 6.00 | 12.00 / 3.00 | 12.00 / 1.00 |" in cost_table(rows)


def test_rows_pair_seeds_with_anchored_and_the_verdict_says_who_lost() -> None:
    rows = [cached("digits", "anchored", s, 1.0 + s) for s in range(3)]
    rows += [cached("digits", "linear", s, 0.5 + s) for s in range(3)]
    summary = {row["method"]: row for row in summarise(rows, METHODS)}
    assert summary["linear"]["minus_anchored"] == [-0.5, 0.0]
    assert summary["linear"]["tuned"] is True
    assert summary["anchored"]["interval_decades"] == 6
    assert "gap +0.5000 ± 0.0000 (paired): more than one" in verdict(list(summary.values()))


def test_earlier_rows_stay_until_newer_ones_come_and_newer_ones_are_paired_with_them() -> None:
    earlier = summarise([cached("digits", m, s, 1.0 + s) for m in ("anchored", "linear") for s in range(3)], METHODS)
    fresh = [cached("digits", method, s, 2.0 + s) for method in ("linear", "PBT") for s in range(3)]
    found = {row["method"]: row for row in summarise(fresh, METHODS, earlier)}
    assert found["anchored"] == earlier[0]
    assert found["linear"]["minus_anchored"] == found["PBT"]["minus_anchored"] == [1.0, 0.0]
    newer = [cached("digits", "anchored", s, 0.5 + s) for s in range(3)]
    again = {row["method"]: row for row in summarise(newer, METHODS, list(found.values()))}
    assert again["PBT"]["minus_anchored"] == [1.5, 0.0], "earlier rows are compared with the newer anchored"
    assert again["PBT"]["test_losses"] == found["PBT"]["test_losses"]
    gone = [{**row, "method": "linear, an older name"} for row in earlier]
    assert "linear, an older name" not in {row["method"] for row in summarise(newer, METHODS, gone)}


def test_a_line_cut_short_is_left_out_and_the_next_one_is_whole(tmp_path: Path) -> None:
    cache = compare.Cache(tmp_path / "results.jsonl")
    cache.add(cached("digits", "linear", 0, 1.0))
    with open(cache.path, "a") as file:
        file.write('{"task": "digits", "met')
    cache.add(cached("digits", "linear", 1, 2.0))
    assert [row["seed"] for row in cache.rows()] == [0, 1]


def test_the_command_writes_all_results_and_resumes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(compare, "make_task", lambda *_: small_task())
    command = ["--tasks", "digits", "--methods", "anchored", "paper", "linear", "Prodigy + cosine", "--seeds", "2",
               "--jobs", "1", "--folder", str(tmp_path / "runs"), "--out", str(tmp_path / "out")]  # fmt: skip
    compare.main(command)
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        "compare.json", "compare.md", "compare.png", "compare.svg"
    }  # fmt: skip
    rows = json.loads((tmp_path / "out/compare.json").read_text())
    required = {"task", "method", "tuned", "interval_decades", "seeds", "steps", "test_loss", "test_accuracy", "compute",
                "wall_clock", "hardware", "date"}  # fmt: skip
    assert len(rows) == 4
    assert all(required <= row.keys() and row["seeds"] == 2 and len(row["test_loss"]) == 2 for row in rows)
    monkeypatch.setattr(compare, "run_group", lambda *_: pytest.fail("everything was cached"))
    compare.main(command)
    assert "| **anchored** | 6 decades |" in capsys.readouterr().out
