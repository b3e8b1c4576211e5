"""The tasks whose best schedule is known."""

from __future__ import annotations

import math

import pytest
import torch

from experiments import known_answers


def test_the_best_schedule_of_the_noisy_quadratic_beats_the_greedy_one() -> None:
    """Short-horizon bias (Wu et al., 2018): the best next step is a bad schedule."""
    best = known_answers.best_schedule(100, iterations=60)
    losses = [float(known_answers.expected_loss(torch.tensor(s, dtype=torch.float64)))
              for s in (best, known_answers.greedy_schedule(100), (0.5,) * 100)]  # fmt: skip
    assert losses[0] < 0.5 * losses[1]
    assert losses[0] < losses[2]


def test_the_recursion_is_the_mean_of_the_trajectories() -> None:
    finals = []
    for seed in range(200):
        trainer = known_answers.NoisyQuadratic(seed)
        trainer.train(20, lambda _: 0.3)
        finals.append(trainer.evaluate()["loss"])
    expected = float(known_answers.expected_loss(torch.full((20,), 0.3, dtype=torch.float64)))
    assert sum(finals) / 200 == pytest.approx(expected, rel=0.1)


def test_anchored_comes_closer_to_the_best_schedule_than_paper_and_greedy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(known_answers, "best_schedule", lambda steps: known_answers.greedy_schedule(steps))
    losses = {m: known_answers.answer("noisy quadratic", m, 3).final[0] for m in ("anchored", "paper", "greedy")}
    assert losses["anchored"] < losses["paper"] < losses["greedy"]


def test_rays_toy_runs_unchanged_and_climbs_fastest_at_its_triangle_wave() -> None:
    from ray import tune
    from ray.tune.examples import pbt_function

    toy = known_answers.RayToy(0)
    toy.train(150, lambda step: 0.001)
    slow = toy.evaluate()["loss"]
    best = known_answers._follow(SimpleToy(), lambda state, step: toy.best_lr(state, step))
    assert best < slow - 20.0
    assert pbt_function.tune is tune, "the example was put back as it was"
    assert math.isfinite(best)


class SimpleToy(known_answers.RayToy):
    steps = 150

    def __init__(self) -> None:
        super().__init__(0)


def test_tables_hold_every_answer() -> None:
    answer = known_answers.Answer("p", "m", [1.0, 0.1], [0.5, 0.1], 1.9)
    assert "| p | m | 1 ± 0.1 | 0.5 ± 0.1 | 1.90 |" in known_answers.table([answer])
