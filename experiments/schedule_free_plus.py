"""ScheduleFree+ (Defazio 2026, arXiv 2605.19095): Schedule-Free Adam whose step is Polyak's, written from its equations.

With g the gradient at y and F the loss there, moments m and v of Adam, averages x of the iterates z:

    step = warmup * max(0, F + beta <g, z - x>) / (sqrt(pi / 2) * |g|_1)
    z <- z - step^2 * decay * y - step * m / (sqrt(v) + eps)
    x <- x + c (z - x),  c = step_max^2 / (sum of step_max^2),  1 during the warm-up
    y <- beta x + (1 - beta) z

Moments are corrected for their start at 0; beta = .9, Adam's betas .9 and .95, no decay: its authors' defaults. Like theirs it
has a training mode, in which the weights are y, and one for evaluation, in which they are x.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor


class ScheduleFreePlus(torch.optim.Optimizer):
    """value: returns the loss whose gradients `step` finds, at the same weights. lr: the warm-up's factor, set step by step.

    warmup_steps: those over which x follows z.
    """

    def __init__(
        self,
        params: Iterable[Tensor],
        value: Callable[[], float],
        warmup_steps: int = 0,
        lr: float = 1.0,
        betas: tuple[float, float] = (0.9, 0.95),
        beta: float = 0.9,
        weight_decay: float = 0.0,
        eps: float = 1e-8,
    ) -> None:
        super().__init__(params, dict(lr=lr, betas=betas, beta=beta, weight_decay=weight_decay, eps=eps))
        self._value, self._warmup_steps, self._steps = value, warmup_steps, 0
        self._largest, self._weights = 0.0, 0.0
        for p in self._parameters():
            zeros = {name: torch.zeros_like(p) for name in ("m", "v")}
            self.state[p] = {**{name: p.detach().clone() for name in "xyz"}, **zeros}

    def _parameters(self) -> list[Tensor]:
        return [p for group in self.param_groups for p in group["params"]]

    @torch.no_grad()
    def _show(self, point: str) -> None:
        for p in self._parameters():
            p.copy_(self.state[p][point])

    def train(self) -> None:
        self._show("y")

    def eval(self) -> None:
        self._show("x")

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """One update of x, y and z. Gradients of None count as zero."""
        group = self.param_groups[0]
        beta, (b1, b2), decay = group["beta"], group["betas"], group["weight_decay"]
        known = [(p.grad, self.state[p]) for p in self._parameters() if p.grad is not None]
        norm = math.sqrt(math.pi / 2) * float(sum(grad.abs().sum() for grad, _ in known))
        lead = beta * float(sum((grad * (s["z"] - s["x"])).sum() for grad, s in known))
        size = group["lr"] * max(0.0, self._value() + lead) / norm if norm else 0.0
        self._steps += 1
        self._largest = max(self._largest, size)
        share = 1.0
        if self._steps > self._warmup_steps:
            self._weights += self._largest**2
            share = self._largest**2 / self._weights if self._weights else 1.0
        for grad, s in known:
            s["z"] -= size**2 * decay * s["y"]
            s["m"].lerp_(grad, 1 - b1)
            s["v"].lerp_(grad * grad, 1 - b2)
            root = (s["v"] / (1 - b2**self._steps)).sqrt_() + group["eps"]
            s["z"] -= size / (1 - b1**self._steps) * s["m"] / root
            s["x"].lerp_(s["z"], share)
            s["y"].copy_(s["z"]).lerp_(s["x"], beta)
        self._show("y")
