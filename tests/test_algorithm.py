"""PaperPolicy at concurrency 1 against the plain re-writing of the paper's Algorithm 1."""

from __future__ import annotations

import numpy as np
import pytest

from autolrs_ray.core.paper.forecast import forecast
from autolrs_ray.core.paper.proposals import APART
from autolrs_ray.core.policies import make_policy
from autolrs_ray.core.policy import Point
from autolrs_ray.core.segments import next_report
from tests import reference

CELL = 1.0 / 1000  # of the proposal grid


class Landscape:
    """Random losses: a decay towards an LR-dependent plateau, new for every stage, lowest at one LR for the training loss and
    at another for the validation loss; the state is the step and both levels."""

    def __init__(self, seed):
        self.seed = seed

    def series(self, state, lr, steps, noise=0.01):
        """(n,) training losses and (n,) validation losses after `steps` (n,) steps from `state`."""
        rng = np.random.default_rng([self.seed, state[0]])
        found = []
        for level in state[1:]:
            best, width, drop = rng.uniform(np.log(1e-3), np.log(1e-1)), rng.uniform(0.5, 3.0), rng.uniform(0.05, 0.5)
            plateau = level * (1.0 - drop * np.exp(-(((np.log(lr) - best) / width) ** 2)))
            wave = noise * level * np.sin(np.arange(1, len(steps) + 1) * (1.0 + abs(np.log(lr))))
            found.append(plateau + (level - plateau) * np.exp(-np.asarray(steps) / 7.0) + wave)
        return tuple(found)

    def after(self, state, lr, steps):
        """The state `steps` on, which lies below the start, and its two losses."""
        losses = tuple(float(series[-1]) for series in self.series(state, lr, [steps], noise=0.0))
        return (state[0] + steps, *losses), losses


def run_policy(policy, landscape):
    """Drive `policy` probe by probe; return per stage its values, the (forecast, x, lr) tried, and the winner's index."""
    state, history = (0, 2.7, 3.0), []
    while not policy.done:
        stage, tried = policy.stage, []
        while policy.phase == "search":
            (segment,) = policy.wanted()
            assert segment.role == "probe"
            steps, step = [], segment.start
            while step < segment.end:
                step = next_report(segment, step)
                steps.append(step - segment.start)
            for done, train, loss in zip(steps, *landscape.series(state, segment.lr, steps), strict=True):
                policy.report(segment.arm, Point(segment.start + done, float(loss), float(train)))
        tried = [(probe.forecast, probe.x, probe.lr) for probe in policy.probes]
        chosen, validate = policy.chosen, policy.probes[0].series == "validation"
        (segment,) = policy.wanted()
        assert (segment.start, segment.end) == (stage.start, stage.end)
        state, (train, loss) = landscape.after(state, segment.lr, stage.steps)
        policy.report("main", Point(segment.end, loss, train))
        policy.saved("main", segment.end, f"main@{segment.end}")
        history.append(
            dict(start=stage.start, steps=stage.steps, probe_steps=stage.probe_steps, tried=tried, best=chosen,
                 validate=validate)
        )  # fmt: skip
    return state, history


@pytest.mark.parametrize("seed", range(5))
def test_the_paper_policy_follows_algorithm_1_over_20_random_stages(seed):
    rng = np.random.default_rng(seed)
    tau, doublings, k = int(rng.integers(20, 60)), int(rng.integers(1, 4)), int(rng.integers(2, 9))
    tau_max, probe_tau = tau * 2**doublings, max(1, tau // int(rng.integers(4, 11)))
    total = sum(tau * 2 ** min(i, doublings) for i in range(19)) + int(rng.integers(1, tau_max))
    kappa, landscape = float(rng.choice([1.0, 2.0, 10.0, 1000.0])), Landscape(seed)
    policy = make_policy(
        "paper", total, (1e-4, 1.0), seed=seed, stage_steps=tau, max_stage_steps=tau_max, probe_steps=probe_tau, num_lrs=k,
        kappa=kappa, initial="random", promote=False,
    )  # fmt: skip
    state, ours = run_policy(policy, landscape)

    def probe(state, lr, steps):
        count = min(16, steps)
        at = [steps * i // count for i in range(1, count + 1)]
        return tuple((at, series) for series in landscape.series(state, lr, at))

    def predict(series, of_stage, tau, began):
        firsts = sorted(losses[0] for _, losses in of_stage)
        return forecast(*series, tau, 0.0, firsts[len(firsts) // 4] if began is None else began).value

    def first_x(index):
        return ours[index]["tried"][0][1]

    expected_state, theirs = reference.algorithm1(
        (0, 2.7, 3.0),
        probe,
        landscape.after,
        predict,
        first_x,
        total,
        tau,
        tau_max,
        probe_tau,
        k,
        kappa,
        1e-4,
        1.0,
        APART,
    )

    assert len(ours) == len(theirs) == 20
    keys = ("start", "steps", "probe_steps", "best", "validate")
    for mine, paper in zip(ours, theirs, strict=True):
        assert [mine[key] for key in keys] == [paper[key] for key in keys]
        assert len(mine["tried"]) == k
        for (_, x, lr), (_, expected_x, expected_lr) in zip(mine["tried"], paper["tried"], strict=True):
            assert x == pytest.approx(expected_x, abs=CELL)
            assert lr == pytest.approx(expected_lr, rel=0.02)
        assert mine["best"] == int(np.argmin([value for value, *_ in mine["tried"]]))
    assert [stage["validate"] for stage in ours] == [i > doublings for i in range(20)]
    assert state == pytest.approx(expected_state, rel=1e-6)


@pytest.mark.parametrize("n", [1, 2, 3, 5, 9, 15])
@pytest.mark.parametrize("kappa", [0.5, 2.0, 1000.0])
def test_proposals_given_the_same_observations_lie_within_a_grid_cell_of_the_plain_gp(n, kappa):
    from autolrs_ray.core.paper.surrogate import propose

    rng = np.random.default_rng(n)
    for _ in range(5):
        x, losses = rng.uniform(size=n), 10.0 ** rng.uniform(-3, 3) * (1.0 + rng.uniform(size=n) ** 2)
        ours = propose(list(zip(x.tolist(), losses.tolist(), strict=True)), [], kappa)
        assert ours == pytest.approx(reference.lower_confidence_bound(x, losses, kappa), abs=CELL)


def test_every_stage_starts_its_main_segment_where_the_winner_ended_if_it_is_promoted():
    policy = make_policy("paper", 80, seed=1, stage_steps=40, max_stage_steps=40, probe_steps=8, num_lrs=3)
    landscape, state = Landscape(0), (0, 2.7, 3.0)
    while policy.phase == "search":
        (segment,) = policy.wanted()
        _, losses = landscape.series(state, segment.lr, range(1, 9))
        for done, loss in enumerate(losses, start=1):
            verdict = policy.report(segment.arm, Point(done, float(loss)))
        if verdict.name == "FINISH_AND_SAVE":
            policy.saved(segment.arm, 8, f"{segment.arm}@8")
    (main,) = policy.wanted()
    best = min(policy.probes, key=lambda probe: probe.forecast)
    assert (main.lr, main.start, main.end, main.source) == (best.lr, 8, 40, best.checkpoint)
    assert best.checkpoint.startswith(f"s000p0{policy.probes.index(best)}")
