"""Whole fields of learning rates under every envelope, and what the race loses on them.

    python -m experiments.fields make --envelopes quadratic constant/0 --kinds "plain net" --seeds 2
    python -m experiments.fields table

A field is one training at every one of twelve learning rates, to T, with losses at all steps at which the race may ask for a
report. A trunk of a race is a prefix of its full run, so races are replayed from a field for nothing. Fields are lines of
runs/fields/fields.jsonl, and are made once.

Regret: what the learning rate chosen loses to the field's best, in validation loss (of raw or averaged weights, whichever is
lower) at T, as a share of the best one's progress. Results: experiments/results/fields.md.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from statistics import fmean
from typing import Any

import torch

from autolrs_ray.core.envelopes import lr_factor
from autolrs_ray.core.policies import make_policy
from autolrs_ray.core.policy import Point, Verdict, finite_or_inf
from autolrs_ray.core.race.plan import RacePlan
from autolrs_ray.core.race.policy import AnchoredPolicy
from autolrs_ray.core.segments import next_report
from autolrs_ray.show.run_data import read_lines
from autolrs_ray.training.data import length
from autolrs_ray.training.trainer import Trainer
from experiments.field_kinds import KINDS, Kind, best_constant
from experiments.slots import run_slots
from experiments.tables import markdown

SHAPES = ("quadratic", "constant", "wsd", "linear", "cosine")
ENVELOPES = (*SHAPES, *(f"{shape}/0" for shape in SHAPES))
"""Name and, after the stroke, the share of the run over which the learning rate rises: .2 unless told otherwise."""

FEW_KINDS = ("20 rows of validation", "small table", "inputs x 100", "60 steps", "100 steps", "150 steps", "plain net",
             "outliers", "plain net, AdamW", "two adversaries", "flow (negative loss)", "batch norm",
             "40 % wrong labels")  # fmt: skip
"""Those that are trained under every envelope; the others under the default."""

Row = list[float]
"""Step, training loss per step since the row before, losses and accuracies of the raw and the averaged weights."""


def options_of(envelope: str) -> dict[str, Any]:
    name, _, rise = envelope.partition("/")
    return {"envelope": name, "warmup": float(rise or 0.2)}


@dataclass
class Field:
    """rows: of each learning rate, the smallest first; it ends where the losses are no longer finite."""

    kind: str
    envelope: str
    seed: int
    steps: int
    interval: tuple[float, float]
    lrs: list[float]
    rows: list[list[Row]]

    @cached_property
    def val_batches(self) -> float:
        """The rows of the validation data, in training batches."""
        task = KINDS[self.kind].build(self.seed)
        return length(task.val_data) / task.batch_size

    @cached_property
    def finals(self) -> list[float]:
        return [min(map(finite_or_inf, rows[-1][2:6])) if rows[-1][0] == self.steps else math.inf for rows in self.rows]

    @cached_property
    def start(self) -> float:
        """What progress is counted from."""
        untrained = max(row[2] for rows in self.rows[:3] for row in rows[:1] if math.isfinite(row[2]))
        kind = KINDS[self.kind]
        return min(untrained, best_constant(kind.build(self.seed))) if kind.raw else untrained

    def regret(self, lr: float) -> float:
        best = min(self.finals)
        return (self.finals[self.lrs.index(lr)] - best) / max(self.start - best, 1e-12)


def policy_of(field: Field | Kind, envelope: str, num_lrs: int = 12, **options: Any) -> AnchoredPolicy:
    options = {**options_of(envelope), **options}
    policy = make_policy("anchored", field.steps, field.interval, 0, 1, num_lrs=num_lrs, **options)
    assert isinstance(policy, AnchoredPolicy)
    return policy


def make(name: str, envelope: str, seed: int, num_lrs: int = 12) -> Field:
    """Train every learning rate of the race to T."""
    kind = KINDS[name]
    policy = policy_of(kind, envelope, num_lrs)
    segment = next(segment for segment in policy.wanted() if segment.arm == "t00")  # it asks for the most reports
    trainer = Trainer(lambda: kind.build(seed), seed, averaging=True)
    factor = partial(lr_factor, policy.envelope, total_steps=kind.steps, warmup_steps=policy.warmup_steps)
    field = Field(name, envelope, seed, kind.steps, kind.interval, [trunk.lr for trunk in policy.trunks], [])
    for lr in field.lrs:
        trainer.reset()
        rows: list[Row] = []
        while trainer.step < kind.steps:
            train = trainer.train(next_report(segment, trainer.step), lambda step, lr=lr: lr * factor(step))
            found = [trainer.evaluate(), *trainer.evaluate_averages()]
            accuracies = [metrics.get("accuracy", math.nan) for metrics in found]
            rows.append([trainer.step, train, *(metrics["loss"] for metrics in found), *accuracies])
            if not math.isfinite(train) or not math.isfinite(rows[-1][2]):
                break
        field.rows.append(rows)
    return field


class FieldTrainer:
    """Looks like a Trainer to `run_slots`; what it trains is looked up."""

    def __init__(self, field: Field, averaging: bool = True) -> None:
        self.val_batches = field.val_batches
        self.averaging, self._by_lr = averaging, dict(zip(field.lrs, field.rows, strict=True))
        policy = policy_of(field, field.envelope)
        self._factor = partial(lr_factor, policy.envelope, total_steps=field.steps, warmup_steps=policy.warmup_steps)
        self.reset()

    def reset(self) -> None:
        self.step, self.lr = 0, math.nan

    def state_dict(self) -> dict[str, Any]:
        return {"step": self.step, "lr": self.lr}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.step, self.lr = state["step"], state["lr"]

    def train(self, until: int, lr_at: Any) -> float:
        scale = lr_at(self.step) / self._factor(self.step)
        self.lr = min(self._by_lr, key=lambda lr: abs(math.log(lr / scale)))
        parts, at = [], 0.0
        for row in self._by_lr[self.lr]:
            if self.step < row[0] <= until:
                parts.append((row[0] - max(at, self.step), row[1]))
            at = row[0]
        self.step = until
        return sum(n * loss for n, loss in parts) / sum(n for n, _ in parts) if parts and at >= until else math.nan

    @property
    def row(self) -> Row:
        return next((row for row in self._by_lr[self.lr] if row[0] == self.step), [self.step, *[math.nan] * 9])

    def evaluate(self, data: Any = None, averaged: bool = False) -> dict[str, float]:
        losses = self.row[2:6]
        best = min(range(1, 4), key=lambda i: finite_or_inf(losses[i])) if averaged else 0
        return {"loss": losses[best], "accuracy": self.row[6 + best]}


@dataclass
class Found:
    lr: float
    regret: float
    compute: float
    events: list[dict[str, Any]]


def race(
    field: Field,
    slots: int = 1,
    metric: str = "",
    averaging: bool = True,
    rule: Any = None,
    reports: int = 0,
    **options: Any,
) -> Found:
    """Race on the field. metric: "accuracy" (nothing else is reported) or "accuracy beside the loss"; then the regret is in
    accuracy too. rule: numbers of the rule other than its own. reports: over the whole run, of a trainable whose step() is as
    long as that; 2, 5 or 10 (0: those that are asked for)."""
    policy = policy_of(field, field.envelope, len(field.lrs), **options)
    if rule is not None:
        policy.follow(RacePlan.of(field.steps, **{"rise": policy.warmup, **rule}))
    trainer = FieldTrainer(field, averaging)
    if metric:
        heard = policy.report

        def report(arm: str, point: Point, can_save: bool = True) -> Verdict:
            raw, averaged = (-trainer.evaluate(averaged=average)["accuracy"] for average in (False, True))
            guides = (point.loss, point.averaged_loss, point.val_batches) if "loss" in metric else ()
            return heard(arm, Point(point.step, raw, point.train_loss, averaged, *guides), can_save)

        policy.report = report  # type: ignore[method-assign]
    run = run_slots(policy, trainer, slots, every=field.steps // reports if reports else 0)
    lr = run.events[-1]["lr"]
    finals, regret = accuracies(field), field.regret(lr)
    if metric:
        best = min(finals)
        regret = (finals[field.lrs.index(lr)] - best) / max(-field.rows[0][0][6] - best, 1e-12)
    return Found(lr, regret, run.steps / field.steps, run.events)


def accuracies(field: Field) -> list[float]:
    return [-max(rows[-1][6:10]) if rows[-1][0] == field.steps else math.inf for rows in field.rows]


# -- the command -------------------------------------------------------------------------------------------------------


def read(path: Path) -> list[Field]:
    rows = read_lines(path) if path.exists() else []
    return [Field(**{**row, "interval": tuple(row["interval"])}) for row in rows if row["kind"] in KINDS]


def write(path: Path, field: Field) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    short = [[[float(f"{x:.6g}") for x in row] for row in rows] for rows in field.rows]
    with open(path, "a") as file:
        file.write(json.dumps(vars(replace(field, rows=short))) + "\n")


VARIANTS: dict[str, dict[str, Any]] = {
    "the race": {},
    "margin half as wide": dict(rule={"close": 0.02}),
    "margin twice as wide": dict(rule={"close": 0.08}),
    "settled at .15 T": dict(rule={"settled": 0.15}),
    "settled at .6 T": dict(rule={"settled": 0.6}),
    "patience": dict(rule={"patience": 1}),
    "no averages": dict(averaging=False),
    "ten reports, an epoch each": dict(reports=10),
    "five reports": dict(reports=5),
    "two reports": dict(reports=2),
}
METRICS = {"highest accuracy, beside the loss": "accuracy beside the loss", "highest accuracy alone": "accuracy"}
HEADS = ("", "fields", "mean regret, %", "above 1 %", "above 5 %", "most, %", "compute, T", "most, T")


def line(name: str, found: Iterable[Found]) -> list[str]:
    all_found = list(found)
    regrets, costs = [min(1.0, f.regret) for f in all_found], [f.compute for f in all_found]
    return [name, str(len(regrets)), f"{100 * fmean(regrets):.2f}", str(sum(r > 0.01 for r in regrets)),
            str(sum(r > 0.05 for r in regrets)), f"{100 * max(regrets):.1f}", f"{fmean(costs):.2f}",
            f"{max(costs):.2f}"]  # fmt: skip


def tables(fields: list[Field]) -> str:
    """Markdown: what the race loses by envelope, by kind of training, and under other numbers and metrics."""
    by_count = _by_count(fields)
    fields = [field for field in fields if len(field.lrs) == 12]
    kinds = {e: {f.kind for f in fields if f.envelope == e} for e in ENVELOPES}
    common = set.intersection(set(FEW_KINDS), *(found for found in kinds.values() if found))
    envelopes = [(e, [f for f in fields if f.envelope == e and f.kind in common and not f.seed]) for e in ENVELOPES]
    raw, default = ([f for f in fields if f.envelope == ENVELOPES[0] and KINDS[f.kind].raw is is_raw]
                    for is_raw in (True, False))  # fmt: skip
    scored = [field for field in default if "accuracy" in KINDS[field.kind].build(field.seed).metrics]
    by_envelope = [line(told(e), map(race, found)) for e, found in envelopes if found]
    by_variant = [line(name, (race(f, **options) for f in default)) for name, options in VARIANTS.items()]
    by_metric = [line(name, (race(f, metric=metric) for f in scored)) for name, metric in METRICS.items()]
    by_kind, by_raw = (
        [line(kind, map(race, found)) for kind in KINDS if (found := [f for f in group if f.kind == kind])]
        for group in (default, raw)
    )
    parts = [
        ("By envelope", by_envelope),
        ("Under the default envelope, other numbers of the rule and other scores", by_variant + by_metric),
        ("By the number of learning rates, against the best of all", by_count),
        ("By kind, under the default envelope", by_kind),
        (
            "Inputs and targets as they come, against the best constant prediction",
            [line("all", map(race, raw)), *by_raw] if raw else [],
        ),
    ]
    return "\n\n".join(f"## {title}\n\n{markdown(HEADS, rows)}" for title, rows in parts if rows)


def _by_count(fields: list[Field]) -> list[list[str]]:
    """The trainings that were made with different numbers of learning rates."""
    groups: dict[tuple[str, str, int], dict[int, Field]] = {}
    for field in fields:
        groups.setdefault((field.kind, field.envelope, field.seed), {})[len(field.lrs)] = field
    counts = sorted({count for group in groups.values() for count in group})
    whole = [group for group in groups.values() if len(group) == len(counts) > 1]
    found: dict[int, list[Found]] = {count: [] for count in counts}
    for group in whole:
        best = min(min(field.finals) for field in group.values())
        for count, field in group.items():
            raced = race(field)
            lost = (field.finals[field.lrs.index(raced.lr)] - best) / max(field.start - best, 1e-12)
            found[count].append(replace(raced, regret=lost))
    return [line(f"{count} learning rates", raced) for count, raced in found.items() if raced]


def told(envelope: str) -> str:
    name, _, rise = envelope.partition("/")
    return f"{name}, no rise" if rise == "0" else name


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="experiments.fields", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)  # fmt: skip
    parser.add_argument("what", choices=("make", "table"))
    parser.add_argument("--envelopes", nargs="+", choices=ENVELOPES, default=list(ENVELOPES))
    parser.add_argument(
        "--kinds", nargs="+", choices=KINDS, help="default: all; under another envelope than quadratic a part"
    )
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--num-lrs", type=int, default=12)
    parser.add_argument("--out", type=Path, default=Path("experiments/results"))
    parser.add_argument("--file", type=Path, default=Path("runs/fields/fields.jsonl"))
    arguments = parser.parse_args(argv)
    if arguments.what == "make":
        make_all(arguments)
        return
    notes = arguments.out / "fields_notes.md"  # written by hand
    text = "# Races on whole fields\n\nMade by `python -m experiments.fields table`.\n\n" + tables(read(arguments.file))
    text += "\n\n## Notes\n\n" + notes.read_text() if notes.exists() else "\n"
    (arguments.out / "fields.md").write_text(text)
    print(text)


def make_all(arguments: argparse.Namespace) -> None:
    torch.set_num_threads(1)
    done = {(field.kind, field.envelope, field.seed, len(field.lrs)) for field in read(arguments.file)}
    for seed in range(arguments.seeds):
        for envelope in arguments.envelopes:
            for name in arguments.kinds or (KINDS if envelope == "quadratic" else FEW_KINDS):
                if (name, envelope, seed, arguments.num_lrs) in done:
                    continue
                began = time.perf_counter()
                field = make(name, envelope, seed, arguments.num_lrs)
                write(arguments.file, field)
                found = race(field)
                best = field.lrs[field.finals.index(min(field.finals))]
                print(f"{name:26s} {envelope:12s} seed {seed}  regret {100 * found.regret:6.2f} %  won {found.lr:.2g}, "
                      f"best {best:.2g}  {found.compute:.2f} T  {time.perf_counter() - began:.0f} s", flush=True)  # fmt: skip


if __name__ == "__main__":
    main()
