"""Kinds of models, losses and optimizers, by name, and tasks of them: the rows of the matrix of test_model_matrix.py."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import prodigyopt
import schedulefree
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations

from autolrs_ray import TrainingTask

ROWS = torch.randn(40, 6, generator=torch.Generator().manual_seed(2))
CLASSES = (ROWS[:, 0] > ROWS[:, 1]).long()
TOKENS = torch.randint(0, 9, (40, 5), generator=torch.Generator().manual_seed(3))
IMAGES = torch.randn(40, 3, 6, 6, generator=torch.Generator().manual_seed(4))
cross_entropy = nn.functional.cross_entropy
Parts = dict[str, Any]
KINDS: dict[str, Callable[[], Parts]] = {}


def kind(function: Callable[[], Parts]) -> Callable[[], Parts]:
    KINDS[function.__name__] = function
    return function


def mlp(**options: Any) -> nn.Sequential:
    return nn.Sequential(nn.Linear(6, 8, **options), nn.Tanh(), nn.Dropout(0.2), nn.Linear(8, 2, **options))


def optimized(make: Callable[[Any], torch.optim.Optimizer], model: nn.Module | None = None, **options: Any) -> Parts:
    model = mlp() if model is None else model
    return {"model": model, "optimizer": make(model.parameters()), **options}


for name, make in {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.1),
    "nesterov": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, nesterov=True),
    "adamw": lambda p: torch.optim.AdamW(p, lr=0.01),
    "amsgrad": lambda p: torch.optim.Adam(p, lr=0.01, amsgrad=True),
    "nadam": lambda p: torch.optim.NAdam(p, lr=0.01),
    "radam": lambda p: torch.optim.RAdam(p, lr=0.01),
    "rmsprop": lambda p: torch.optim.RMSprop(p, lr=0.01, momentum=0.5, centered=True),
    "adagrad": lambda p: torch.optim.Adagrad(p, lr=0.1),
    "adadelta": lambda p: torch.optim.Adadelta(p, lr=1.0),
    "adamax": lambda p: torch.optim.Adamax(p, lr=0.01),
    "asgd": lambda p: torch.optim.ASGD(p, lr=0.1),
    "rprop": lambda p: torch.optim.Rprop(p, lr=0.01),
    "adafactor": lambda p: torch.optim.Adafactor(p, lr=0.01),
    "lbfgs": lambda p: torch.optim.LBFGS(p, lr=0.1, max_iter=3),
    "prodigy": lambda p: prodigyopt.Prodigy(p, lr=1.0),
    "schedule_free_sgd": lambda p: schedulefree.SGDScheduleFree(p, lr=0.5),
    "schedule_free_adamw": lambda p: schedulefree.AdamWScheduleFree(p, lr=0.01, warmup_steps=2),
    "schedule_free_radam": lambda p: schedulefree.RAdamScheduleFree(p, lr=0.01),
    "numpy_options": lambda p: torch.optim.AdamW(
        p, lr=np.float64(0.01), weight_decay=np.float32(0.1), eps=np.float64(1e-8)
    ),
    "tensor_lr": lambda p: torch.optim.SGD(p, lr=torch.tensor(0.1)),
}.items():
    KINDS[name] = lambda make=make: optimized(make)  # type: ignore[misc]


def adamw(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), lr=0.01)


def with_adamw(model: nn.Module, **options: Any) -> Parts:
    return {"model": model, "optimizer": adamw(model), **options}


@kind
def muon_and_adamw() -> Parts:
    model = mlp()
    matrices = [p for p in model.parameters() if p.dim() == 2]
    rest = [p for p in model.parameters() if p.dim() != 2]
    return {"model": model, "optimizer": [torch.optim.Muon(matrices, lr=0.02), torch.optim.AdamW(rest, lr=0.01)]}


@kind
def groups_with_ratios() -> Parts:
    model = mlp()
    groups = [{"params": model[0].parameters(), "lr": 0.1}, {"params": model[3].parameters(), "lr": 0.02}]
    return {"model": model, "optimizer": torch.optim.SGD(groups, lr=0.1)}


@kind
def clipped() -> Parts:
    return with_adamw(mlp(), clip_norm=0.1)


@kind
def bfloat16_weights() -> Parts:
    return with_adamw(mlp(dtype=torch.bfloat16), data=(ROWS.bfloat16(), CLASSES))


@kind
def bfloat16_autocast() -> Parts:
    return with_adamw(mlp(), autocast=torch.bfloat16)


@kind
def float16_autocast_with_a_scaler() -> Parts:
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**16, growth_interval=2)
    return with_adamw(mlp(), autocast=torch.float16, scaler=scaler, clip_norm=1.0)


@kind
def float64_weights_and_loss() -> Parts:
    loss = nn.CrossEntropyLoss(weight=torch.tensor([1.0, 2.0], dtype=torch.float64))
    return with_adamw(mlp(dtype=torch.float64), data=(ROWS.double(), CLASSES), loss=loss)


class Complex(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(6, 2, dtype=torch.complex64))

    def forward(self, x: Tensor) -> Tensor:
        return (x.to(torch.complex64) @ self.weight).abs()


@kind
def complex_weights() -> Parts:
    return with_adamw(Complex())


@kind
def old_weight_norm() -> Parts:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = nn.Sequential(nn.utils.weight_norm(nn.Linear(6, 8)), nn.ReLU(), nn.Linear(8, 2))
    return with_adamw(model)


@kind
def new_weight_norm() -> Parts:
    return with_adamw(nn.Sequential(parametrizations.weight_norm(nn.Linear(6, 8)), nn.ReLU(), nn.Linear(8, 2)))


@kind
def old_spectral_norm() -> Parts:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = nn.Sequential(nn.utils.spectral_norm(nn.Linear(6, 8)), nn.ReLU(), nn.Linear(8, 2))
    return with_adamw(model)


@kind
def new_spectral_norm() -> Parts:
    return with_adamw(nn.Sequential(parametrizations.spectral_norm(nn.Linear(6, 8)), nn.ReLU(), nn.Linear(8, 2)))


@kind
def orthogonal() -> Parts:
    return with_adamw(nn.Sequential(parametrizations.orthogonal(nn.Linear(6, 6)), nn.ReLU(), nn.Linear(6, 2)))


class Recurrent(nn.Module):
    """Returns a tuple, the second part of which nobody wants."""

    def __init__(self, cell: Any) -> None:
        super().__init__()
        self.embed, self.cell, self.head = nn.Embedding(9, 6), cell(6, 6, batch_first=True), nn.Linear(6, 2)

    def forward(self, tokens: Tensor) -> tuple[Tensor, Any]:
        output, state = self.cell(self.embed(tokens))
        return self.head(output[:, -1]), state


def of_first(output: Any, target: Tensor) -> Tensor:
    return cross_entropy(output[0], target)


@kind
def lstm_that_returns_a_tuple() -> Parts:
    return with_adamw(Recurrent(nn.LSTM), data=(TOKENS, CLASSES), loss=of_first)


@kind
def gru() -> Parts:
    return with_adamw(Recurrent(nn.GRU), data=(TOKENS, CLASSES), loss=of_first)


class Attention(nn.Module):
    """Causal, with a mask of -inf among its buffers, tied embeddings, and an output that is a dict."""

    def __init__(self, persistent: bool = True) -> None:
        super().__init__()
        self.embed, self.attention = nn.Embedding(9, 6), nn.MultiheadAttention(6, 2, dropout=0.1, batch_first=True)
        self.norm, self.head = nn.LayerNorm(6), nn.Linear(6, 9, bias=False)
        self.head.weight = self.embed.weight
        self.register_buffer("mask", torch.full((5, 5), -math.inf).triu(1), persistent=persistent)

    def forward(self, tokens: Tensor) -> dict[str, Tensor]:
        x = self.embed(tokens)
        return {"logits": self.head(self.norm(x + self.attention(x, x, x, attn_mask=self.mask)[0]))}


def of_logits(output: dict[str, Tensor], target: Tensor) -> Tensor:
    return cross_entropy(output["logits"].flatten(0, 1), target.flatten())


@kind
def masked_attention_with_tied_weights() -> Parts:
    return with_adamw(Attention(), data=(TOKENS, TOKENS), loss=of_logits)


@kind
def a_mask_that_is_not_saved() -> Parts:
    return with_adamw(Attention(persistent=False), data=(TOKENS, TOKENS), loss=of_logits)


class Pooled(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(9, 6, sparse=True), nn.Linear(6, 2)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.embed(tokens).mean(1))


@kind
def sparse_embedding_with_an_optimizer_of_its_own() -> Parts:
    model = Pooled()
    optimizers = [torch.optim.SparseAdam(model.embed.parameters(), lr=0.01), adamw(model.head)]
    return {"model": model, "optimizer": optimizers, "data": (TOKENS, CLASSES)}


@kind
def frozen_part() -> Parts:
    model = mlp()
    model[0].requires_grad_(False)
    return with_adamw(model)


@kind
def batch_norm() -> Parts:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(64, 2))
    return with_adamw(model, data=(IMAGES, CLASSES), channels_last=True)


@kind
def batch_norm_estimated_anew() -> Parts:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Dropout(0.1), nn.Linear(64, 2))
    return with_adamw(model, data=(IMAGES, CLASSES), reestimate=2)


@kind
def group_and_instance_norm() -> Parts:
    norms = [nn.GroupNorm(2, 4), nn.InstanceNorm2d(4, affine=True, track_running_stats=True)]
    model = nn.Sequential(nn.Conv2d(3, 4, 3), *norms, nn.Flatten(), nn.Linear(64, 2))
    return with_adamw(model, data=(IMAGES, CLASSES))


class Buffers(nn.Module):
    """A buffer assigned anew, one that grows, one that no state_dict holds, a counter, and extra state that is no tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.calls = mlp(), 0
        self.register_buffer("mean", torch.zeros(6))
        self.register_buffer("seen", torch.zeros(0, dtype=torch.long))
        self.register_buffer("hidden", torch.zeros(()), persistent=False)
        self.register_buffer("late", None)

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            self.calls += 1
            self.mean = 0.9 * self.mean + 0.1 * x.detach().mean(0)
            self.seen = torch.cat([self.seen, torch.tensor([self.calls])])
            self.late = x.detach().std(0)
        self.hidden += 0.01
        return self.inner(x - self.mean + self.hidden)

    def get_extra_state(self) -> dict[str, Any]:
        return {"calls": np.int64(self.calls), "of": ("a", [1.0, None])}

    def set_extra_state(self, state: dict[str, Any]) -> None:
        assert state["of"] == ("a", [1.0, None])
        self.calls = state["calls"]


@kind
def buffers_of_all_kinds_and_extra_state() -> Parts:
    return with_adamw(Buffers())


class Temperature(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(1.0))
        self.register_buffer("mean_loss", torch.zeros(()))

    def forward(self, output: Tensor, target: Tensor) -> Tensor:
        loss = cross_entropy(output * self.scale, target)
        if self.training:
            self.mean_loss = 0.9 * self.mean_loss + 0.1 * loss.detach()
        return loss


@kind
def a_loss_that_learns() -> Parts:
    model, loss = mlp(), Temperature()
    return {
        "model": model,
        "optimizer": torch.optim.AdamW([*model.parameters(), *loss.parameters()], lr=0.01),
        "loss": loss,
    }


@kind
def a_further_module() -> Parts:
    model, decoder = mlp(), nn.Sequential(nn.Linear(2, 6), nn.BatchNorm1d(6))
    optimizer = torch.optim.AdamW([*model.parameters(), *decoder.parameters()], lr=0.01)

    def loss(output: Tensor, target: Tensor) -> Tensor:
        return nn.functional.mse_loss(decoder(output), target)

    return {"model": model, "optimizer": optimizer, "loss": loss, "modules": {"decoder": decoder}, "data": (ROWS, ROWS)}


@kind
def sparse_gradients_with_momentum_that_are_clipped() -> Parts:
    model = nn.Sequential(nn.EmbeddingBag(9, 6, sparse=True), nn.Linear(6, 2))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    return {"model": model, "optimizer": optimizer, "data": (TOKENS, CLASSES), "clip_norm": 0.1}


@kind
def wrapped_models() -> Parts:
    return with_adamw(nn.DataParallel(torch.compile(mlp(), backend="eager")))


def build(kind: Callable[[], Parts]) -> TrainingTask:
    parts: Parts = {"loss": cross_entropy, "data": (ROWS, CLASSES), "batch_size": 8, **kind()}
    inputs, targets = parts.pop("data")
    return TrainingTask(**{"train_data": (inputs[:32], targets[:32]), "val_data": (inputs[32:], targets[32:]), **parts})
