"""Two quick problems whose best LR schedule is known: what each policy loses against it.

    python -m experiments.known_answers [--seeds 10]

1. `ray.tune.examples.pbt_function`, the toy of Ray's own PBT example, run unchanged: its accuracy rises fastest at an LR
   that is a triangle wave of the accuracy itself (.001 up to .01 and back). No decay envelope has that shape.
2. The noisy quadratic model (Wu et al., ICLR 2018): SGD on 1/2 sum h_i (theta_i - c_i)^2 with c_i ~ N(0, 1) and h_i = 1/i.
   The moments of theta follow a recursion, so the best schedule is found by gradient descent through it, and the greedy
   schedule (the best LR for the very next step: short-horizon bias in its pure form) in closed form.

Regret: final loss minus that of the best schedule, under the same random numbers; mean and standard error over seeds.
Result (2 CPU cores, 10 seeds): see the table in experiments/results/known_answers.md.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch

from autolrs_ray.core.policies import make_policy
from autolrs_ray.training.local import run_local
from autolrs_ray.training.task import TrainingTask
from experiments.compare_report import mean_se


class ToyTrainer:
    """What `run_local` needs of a trainer, for a problem whose step t is a function of (seed, t)."""

    averaging = False

    def __init__(self, seed: int) -> None:
        self.seed = seed
        self.reset()

    def reset(self) -> None:
        self.step, self.state = 0, self.initial()

    def train(self, until: int, lr_at: Callable[[int], float]) -> float:
        losses = []
        while self.step < until:
            self.state = self.update(self.state, lr_at(self.step))
            self.step += 1
            losses.append(self.loss(self.state))
        return sum(losses) / max(1, len(losses))

    def evaluate(self, data: Any = None, averaged: bool = False) -> dict[str, float]:
        return {"loss": self.loss(self.state)}

    def state_dict(self) -> dict[str, Any]:
        return {"step": self.step, "state": self.state}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.step, self.state = state["step"], state["state"]

    def initial(self) -> Any:
        raise NotImplementedError

    def update(self, state: Any, lr: float) -> Any:
        raise NotImplementedError

    def loss(self, state: Any) -> float:
        raise NotImplementedError

    def best_lr(self, state: Any, step: int) -> float:
        """The LR of the best schedule."""
        raise NotImplementedError


# -- Ray's PBT example -------------------------------------------------------------------------------------------------


class _OneStep(Exception):  # noqa: N818 - ends the endless loop of the example after one report
    pass


class RayToy(ToyTrainer):
    """`pbt_function` itself, one report at a time: its `tune` is replaced by two functions. loss = 200 - accuracy."""

    interval = (1e-4, 1e-1)
    steps = 500

    def __init__(self, seed: int) -> None:
        from ray.tune.examples import pbt_function as module

        self._module = module
        self._folder = tempfile.TemporaryDirectory()
        super().__init__(seed)

    def initial(self) -> float:
        return 0.0

    def update(self, state: float, lr: float) -> float:
        Path(self._folder.name, "checkpoint.json").write_text(json.dumps({"acc": state, "step": self.step}))
        found: dict[str, Any] = {}

        def report(metrics: dict[str, Any], **_: Any) -> None:
            found.update(metrics)
            raise _OneStep

        checkpoint = SimpleNamespace(as_directory=lambda: _Folder(self._folder.name))
        before, states = self._module.tune, (random.getstate(), np.random.get_state())
        self._module.tune = SimpleNamespace(get_checkpoint=lambda: checkpoint, report=report)
        random.seed(self.seed * 1_000_003 + self.step)  # the example draws from the global generators: put them back
        np.random.seed((self.seed * 1_000_003 + self.step) % 2**32)
        try:
            self._module.pbt_function({"lr": lr, "checkpoint_interval": 10**9})
        except _OneStep:
            pass
        finally:
            self._module.tune = before
            random.setstate(states[0])
            np.random.set_state(states[1])
        return float(found["mean_accuracy"])

    def loss(self, state: float) -> float:
        return 200.0 - state

    def best_lr(self, state: float, step: int) -> float:
        """The triangle wave of the example."""
        wave = 0.01 * state / 100 if state < 100 else 0.01 - 0.01 * (state - 100) / 100
        return min(0.01, max(0.001, wave))


class _Folder:
    def __init__(self, path: str) -> None:
        self.path = path

    def __enter__(self) -> str:
        return self.path

    def __exit__(self, *_: object) -> None:
        return None


# -- the noisy quadratic model -----------------------------------------------------------------------------------------

DIMENSIONS = 100
CURVATURE = 1.0 / torch.arange(1, DIMENSIONS + 1, dtype=torch.float64)
START = 1.0  # theta_i at step 0, and the scale of the noise of c_i


def expected_loss(lrs: torch.Tensor) -> torch.Tensor:
    """Expected final loss under the schedule `lrs` (T,): m <- (1 - lr h)^2 m + lr^2 h^2, with m = E[theta^2]."""
    m = torch.full((DIMENSIONS,), START**2, dtype=torch.float64)
    for lr in lrs:
        m = (1.0 - lr * CURVATURE) ** 2 * m + (lr * CURVATURE) ** 2
    return 0.5 * (CURVATURE * m).sum()


@cache
def best_schedule(steps: int, iterations: int = 150) -> tuple[float, ...]:
    """Schedule with the lowest expected final loss: Adam on log LR through the recursion, from a linear decay."""
    z = torch.linspace(1.0, 1e-3, steps, dtype=torch.float64).log().requires_grad_()
    optimizer = torch.optim.Adam([z], lr=0.1)
    for i in range(iterations):
        optimizer.param_groups[0]["lr"] = 0.1 * (1.0 - i / iterations)
        optimizer.zero_grad()
        expected_loss(z.exp()).log().backward()
        optimizer.step()
    return tuple(z.detach().exp().tolist())


@cache
def greedy_schedule(steps: int) -> tuple[float, ...]:
    """The LR that minimises the expected loss after the very next step, at every step (closed form)."""
    m, lrs = torch.full((DIMENSIONS,), START**2, dtype=torch.float64), []
    for _ in range(steps):
        lr = (CURVATURE**2 * m).sum() / (CURVATURE**3 * (m + 1.0)).sum()
        lrs.append(float(lr))
        m = (1.0 - lr * CURVATURE) ** 2 * m + (lr * CURVATURE) ** 2
    return tuple(lrs)


class NoisyQuadratic(ToyTrainer):
    """One trajectory; the loss is the risk 1/2 sum h_i theta_i^2, known without sampling. Keeps averages as Trainer does."""

    interval = (1e-4, 1e2)
    steps = 300
    averaging = True

    def initial(self) -> tuple[np.ndarray, np.ndarray]:
        """theta (dimensions,) and its averages (averages, dimensions)."""
        return np.full(DIMENSIONS, START), np.full((len(TrainingTask.average_over), DIMENSIONS), START)

    def update(self, state: Any, lr: float) -> Any:
        h = CURVATURE.numpy()
        noise = np.random.default_rng([self.seed, self.step]).standard_normal(DIMENSIONS)
        theta = np.clip(state[0] - lr * h * (state[0] - noise), -1e100, 1e100)  # clip: no overflow warnings
        weights = np.minimum(1.0, 1.0 / (np.array(TrainingTask.average_over) * (self.step + 1)))
        return theta, state[1] + weights[:, None] * (theta - state[1])

    def loss(self, state: Any) -> float:
        return self._risk(state[0])

    def evaluate(self, data: Any = None, averaged: bool = False) -> dict[str, float]:
        return {"loss": min(map(self._risk, self.state[1])) if averaged else self._risk(self.state[0])}

    def _risk(self, theta: np.ndarray) -> float:
        risk = 0.5 * float((CURVATURE.numpy() * theta**2).sum())
        return risk if risk < 1e100 else math.inf

    def best_lr(self, state: Any, step: int) -> float:
        return best_schedule(self.steps)[step]


# -- regret ------------------------------------------------------------------------------------------------------------

PROBLEMS: dict[str, type[ToyTrainer]] = {"Ray's PBT example": RayToy, "noisy quadratic": NoisyQuadratic}


@dataclass(frozen=True)
class Answer:
    """final: loss [mean, se]. regret: to the best schedule at equal seeds [mean, se]. compute: steps over T."""

    problem: str
    method: str
    final: list[float]
    regret: list[float]
    compute: float


def _follow(trainer: Any, lr_of: Callable[[Any, int], float]) -> float:
    trainer.reset()
    while trainer.step < trainer.steps:
        lr = lr_of(trainer.state, trainer.step)
        trainer.train(trainer.step + 1, lambda _, lr=lr: lr)
    return float(trainer.evaluate()["loss"])


def _policy(name: str, **options: Any) -> Callable[[Any], tuple[float, float]]:
    def run(trainer: Any) -> tuple[float, float]:
        if name == "paper":
            options.setdefault("stage_steps", trainer.steps // 5)
        policy = make_policy(name, trainer.steps, trainer.interval, trainer.seed, concurrency=1, **options)
        steps = run_local(policy, trainer).trained_steps
        averaged = name == "anchored" and trainer.averaging
        losses = [trainer.evaluate()["loss"], *([trainer.evaluate(averaged=True)["loss"]] if averaged else [])]
        return float(min(losses)), steps / trainer.steps

    return run


def _best_constant(trainer: Any) -> tuple[float, float]:
    low, high = trainer.interval
    count = 12
    lrs = [low * (high / low) ** ((i + 0.5) / count) for i in range(count)]
    return min(_follow(trainer, lambda _, __, lr=lr: lr) for lr in lrs), float(count)


METHODS: dict[str, Callable[[Any], tuple[float, float]]] = {
    "paper": _policy("paper"),
    "anchored": _policy("anchored"),
    "anchored, linear": _policy("anchored", envelope="linear"),
    "anchored, no envelope": _policy("anchored", envelope="constant"),
    "best constant of 12 (full runs)": _best_constant,
}


def answer(problem: str, method: str, seeds: int) -> Answer:
    """Run `method` on `problem` for `seeds` seeds. method "greedy": the closed form, noisy quadratic only."""
    finals, regrets, computes = [], [], []
    for seed in range(seeds):
        trainer: Any = PROBLEMS[problem](seed)
        best = _follow(trainer, trainer.best_lr)
        if method == "greedy":
            final, compute = _follow(trainer, lambda _, step: greedy_schedule(NoisyQuadratic.steps)[step]), 1.0
        else:
            final, compute = METHODS[method](trainer)
        finals.append(final)
        regrets.append(final - best)
        computes.append(compute)
    final_se, regret_se = mean_se(finals), mean_se(regrets)
    assert final_se is not None
    assert regret_se is not None
    return Answer(problem, method, final_se, regret_se, sum(computes) / seeds)


def table(answers: list[Answer]) -> str:
    lines = ["| problem | method | final loss | regret | compute, T |", "| --- | --- | --- | --- | --- |"]
    for a in answers:
        final, regret = (f"{value[0]:.4g} ± {value[1]:.2g}" for value in (a.final, a.regret))
        lines.append(f"| {a.problem} | {a.method} | {final} | {regret} | {a.compute:.2f} |")
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="experiments.known_answers")
    parser.add_argument("--seeds", type=int, default=10)
    parser.add_argument("--out", default="experiments/results")
    arguments = parser.parse_args(argv)
    torch.set_num_threads(1)
    answers = []
    for problem in PROBLEMS:
        for method in [*METHODS, *(["greedy"] if problem == "noisy quadratic" else [])]:
            answers.append(answer(problem, method, arguments.seeds))
            print(answers[-1], flush=True)
    text = table(answers)
    print(text)
    out = Path(arguments.out)
    out.mkdir(parents=True, exist_ok=True)
    head = (
        f"# Known answers\n\nMade by `python -m experiments.known_answers`; {arguments.seeds} seeds; regret to the best"
    )
    note = "Anchored, where averages are kept: the best of the last weights and three averages; all others: the last weights."
    (out / "known_answers.md").write_text(f"{head} schedule at equal random numbers. {note}\n\n{text}\n")


if __name__ == "__main__":
    main()
