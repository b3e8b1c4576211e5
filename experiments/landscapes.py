"""Loss against learning rate, measured: what a stage's search has to find its way in.

    python -m experiments.landscapes        # minutes on one core; writes experiments/results/landscapes.npz

Nine small tasks on real data (digits, digits with noisy labels, diabetes, breast cancer, English text) x SGD, SGD with
momentum and Adam x four checkpoints of a run at a usual learning rate. From each checkpoint, 61 learning rates over six
decades train for `STAGE_STEPS`, all on the same batches. Kept are the validation loss at the end, and the series that a
probe of a tenth of the steps would have reported. `load` reads the file; `experiments.regrets` and `experiments.forecasts`
measure proposals and forecasts on it.
"""

from __future__ import annotations

import math
import time
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache, partial
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
from sklearn.datasets import load_breast_cancer, load_diabetes
from torch import Tensor, nn
from torch.func import functional_call, grad_and_value, stack_module_state, vmap

from experiments.compare_tasks import default_text, digits_split, noisy_digits_split

FILE = Path(__file__).parent / "results" / "landscapes.npz"
STAGE_STEPS, PROBE_STEPS, REPORTS = 200, 20, 10  # tau, tau', losses a probe reports
LRS, DECADES, BATCH = 61, 6, 32
CHECKPOINTS = (0, 40, 160, 480)  # optimizer steps of the run before the stage
LOWEST = {"sgd": 1e-4, "momentum": 1e-5, "adam": 1e-6}
USUAL = {"sgd": 0.05, "momentum": 5e-3, "adam": 1e-3}
Split = dict[str, tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class Landscape:
    """One checkpoint. start: validation loss there. lrs, final: (n,) learning rates and validation losses tau steps on, inf
    where training diverged. train, val: (n, r) losses of a probe at `steps` (r,), steps since the checkpoint.
    history: (m, 2) steps before the checkpoint (negative) and the validation losses of the run there.
    """

    name: str
    start: float
    start_train: float
    lrs: np.ndarray
    final: np.ndarray
    steps: np.ndarray
    train: np.ndarray
    val: np.ndarray
    history: np.ndarray


# -- tasks -------------------------------------------------------------------------------------------------------------


def _mlp(sizes: tuple[int, ...], activation: type[nn.Module] = nn.ReLU, norm: bool = False) -> nn.Module:
    layers: list[nn.Module] = [nn.Flatten()]
    for i, (a, b) in enumerate(pairwise(sizes)):
        layers.append(nn.Linear(a, b))
        if i < len(sizes) - 2:
            layers += [nn.LayerNorm(b)] if norm else []
            layers.append(activation())
    return nn.Sequential(*layers)


class _NextCharacter(nn.Module):
    """(n, 8) characters -> (n, alphabet) logits of the next one."""

    def __init__(self, alphabet: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(alphabet, 12)
        self.net = _mlp((96, 48, alphabet))

    def forward(self, characters: Tensor) -> Tensor:
        out: Tensor = self.net(self.embedding(characters))
        return out


@cache
def _characters() -> tuple[Split, int]:
    text = default_text()[:200_000]
    alphabet = sorted(set(text), key=lambda c: (-text.count(c), c))[:63]
    ids = torch.tensor([alphabet.index(c) if c in alphabet else 63 for c in text])
    windows = ids.unfold(0, 9, 3)
    x, y = windows[:, :8], windows[:, 8]
    cut = int(0.9 * len(x))
    return {"train": (x[:cut], y[:cut]), "val": (x[cut : cut + 1000], y[cut : cut + 1000])}, 64


@cache
def _table(which: str) -> Split:
    data = load_diabetes() if which == "diabetes" else load_breast_cancer()
    x, y = torch.tensor(data.data, dtype=torch.float32), torch.tensor(data.target, dtype=torch.float32)
    x = (x - x.mean(0)) / x.std(0)
    y = (y - y.mean()) / y.std() if which == "diabetes" else y.long()
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
    train, val = order[: int(0.7 * len(x))], order[int(0.7 * len(x)) :]
    return {"train": (x[train], y[train]), "val": (x[val], y[val])}


def _squared(output: Tensor, target: Tensor) -> Tensor:
    return nn.functional.mse_loss(output[:, 0], target)


TASKS: dict[str, tuple[Callable[[], Split], Callable[[], nn.Module], Callable[[Tensor, Tensor], Tensor]]] = {
    "digits, MLP": (lambda: digits_split(0), lambda: _mlp((64, 32, 10)), nn.functional.cross_entropy),
    "digits, deep tanh": (lambda: digits_split(0), lambda: _mlp((64, 32, 32, 32, 10), nn.Tanh), nn.functional.cross_entropy),
    "digits, LayerNorm": (lambda: digits_split(0), lambda: _mlp((64, 32, 32, 10), norm=True), nn.functional.cross_entropy),
    "digits, plain 3 layers": (lambda: digits_split(0), lambda: _mlp((64, 48, 48, 10)), nn.functional.cross_entropy),
    "noisy digits, MLP": (lambda: noisy_digits_split(0), lambda: _mlp((64, 64, 10)), nn.functional.cross_entropy),
    "noisy digits, tanh": (lambda: noisy_digits_split(0), lambda: _mlp((64, 32, 32, 10), nn.Tanh), nn.functional.cross_entropy),
    "diabetes": (lambda: _table("diabetes"), lambda: _mlp((10, 32, 1)), _squared),
    "breast cancer": (lambda: _table("cancer"), lambda: _mlp((30, 16, 2)), nn.functional.cross_entropy),
    "characters": (lambda: _characters()[0], lambda: _NextCharacter(_characters()[1]), nn.functional.cross_entropy),
}  # fmt: skip


# -- training many learning rates at once ------------------------------------------------------------------------------


class _Ensemble:
    """(n,) copies of one net, each with a learning rate of its own; all see the batch that is a function of the step."""

    def __init__(self, task: str, optimizer: str) -> None:
        split, model, self.loss = TASKS[task]
        self.data, self.optimizer = split(), optimizer
        torch.manual_seed(0)
        self.model = model()
        parameters, _ = stack_module_state([self.model])  # type: ignore[list-item]
        self.parameters = {name: value.detach() for name, value in parameters.items()}
        self.first = {name: torch.zeros_like(value) for name, value in self.parameters.items()}
        self.second = {name: torch.zeros_like(value) for name, value in self.parameters.items()}
        self.step, self.seed = 0, zlib.crc32(f"{task}/{optimizer}".encode())

    def widen(self, count: int) -> None:
        for state in (self.parameters, self.first, self.second):
            for name, value in state.items():
                state[name] = value[:1].repeat(count, *[1] * (value.dim() - 1))

    def _of(self, parameters: dict[str, Tensor], x: Tensor, y: Tensor) -> Tensor:
        return self.loss(functional_call(self.model, parameters, (x,)), y)

    def train(self, lrs: Tensor) -> Tensor:
        """One optimizer step; returns the (n,) losses of the batch before it."""
        x, y = self.data["train"]
        generator = torch.Generator().manual_seed(self.seed + self.step)
        rows = torch.randint(len(x), (BATCH,), generator=generator)
        gradients, losses = vmap(grad_and_value(self._of), in_dims=(0, None, None))(self.parameters, x[rows], y[rows])
        self.step += 1
        for name, value in self.parameters.items():
            g, lr = gradients[name].detach(), lrs.view(-1, *[1] * (value.dim() - 1))
            m, v = self.first[name], self.second[name]
            if self.optimizer == "adam":
                m.lerp_(g, 0.1), v.lerp_(g.square(), 0.001)
                correction = math.sqrt(1 - 0.999**self.step) / (1 - 0.9**self.step)
                value -= lr * correction * m / (v.sqrt() + 1e-8)
            else:
                m.mul_(0.9 if self.optimizer == "momentum" else 0.0).add_(g)
                value -= lr * m
        return losses.detach()

    def evaluate(self) -> Tensor:
        x, y = self.data["val"]
        with torch.no_grad():
            return vmap(partial(self._of, x=x, y=y))(self.parameters)


def _measure(task: str, optimizer: str) -> Iterator[dict[str, np.ndarray]]:
    """The four checkpoints of one run."""
    run, usual = _Ensemble(task, optimizer), torch.tensor([USUAL[optimizer]])
    history, recent = [(0, float(run.evaluate()))], [math.nan]
    lrs = torch.logspace(0, DECADES, LRS, dtype=torch.float64) * LOWEST[optimizer]
    for checkpoint in CHECKPOINTS:
        while run.step < checkpoint:
            recent = [*recent[-9:], float(run.train(usual))]
            if run.step % 10 == 0:
                history.append((run.step, float(run.evaluate())))
        many = _Ensemble(task, optimizer)
        for name in ("parameters", "first", "second"):
            setattr(many, name, {key: value.clone() for key, value in getattr(run, name).items()})
        many.step = run.step
        many.widen(LRS)
        train, val, since = [], [], []
        while many.step < checkpoint + STAGE_STEPS:
            since.append(many.train(lrs.float()))
            done = many.step - checkpoint
            if done <= PROBE_STEPS and done % (PROBE_STEPS // REPORTS) == 0:
                train.append(torch.stack(since).mean(0))
                val.append(many.evaluate())
                since = []
        yield {
            "lrs": lrs.numpy(), "start": run.evaluate().numpy(), "start_train": np.array([np.mean(recent)]),
            "train": torch.stack(train, 1).numpy(), "val": torch.stack(val, 1).numpy(), "final": many.evaluate().numpy(),
            "history": np.array(history, float),
        }  # fmt: skip


# -- the file ----------------------------------------------------------------------------------------------------------


def load(path: Path = FILE) -> list[Landscape]:
    """The landscapes in the file. A final loss that is not finite, or above 4 times the start, is inf."""
    kept = np.load(path)
    found = []
    for name in kept["names"]:
        part = {
            key: kept[f"{name}/{key}"].astype(float) for key in ("start", "start_train", "lrs", "final", "train", "val")
        }
        start, history = float(part["start"][0]), kept[f"{name}/history"].astype(float)
        final = np.where(np.isfinite(part["final"]) & (part["final"] <= 4.0 * start), part["final"], np.inf)
        steps = np.arange(1, REPORTS + 1) * (PROBE_STEPS // REPORTS)
        history[:, 0] -= history[-1, 0]
        found.append(Landscape(str(name), start, float(part["start_train"][0]), part["lrs"], final, steps, part["train"],
                               part["val"], history))  # fmt: skip
    return found


def main() -> None:
    torch.set_num_threads(1)
    began, arrays, names = time.perf_counter(), {}, []
    for task in TASKS:
        for optimizer in LOWEST:
            for checkpoint, part in zip(CHECKPOINTS, _measure(task, optimizer), strict=True):
                name = f"{task}, {optimizer}, step {checkpoint}"
                names.append(name)
                for key, value in part.items():
                    small = key in ("train", "val")  # 3 digits do for a series; what overflows has diverged
                    with np.errstate(over="ignore"):
                        arrays[f"{name}/{key}"] = value.astype(np.float16 if small else np.float32)
            print(f"{time.perf_counter() - began:5.0f} s  {task}, {optimizer}", flush=True)
    np.savez_compressed(FILE, names=np.array(names), **arrays)
    print(f"{len(names)} landscapes, {FILE.stat().st_size / 1024:.0f} kB in {FILE}")


if __name__ == "__main__":
    main()
